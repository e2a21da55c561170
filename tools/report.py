"""What a run tells: a line per epoch, and at the end its numbers, curves.png and regions.png."""
import data
import kernels
from support.checkpoint import FILES
from tools.plots import curves, region_tiles, save_grid
from tools.predictor import Predictor


def of_start(run, cfg, split, trainable, zero):
    """Prints split, number of trainable parameters, zero-shot mAP (zero: its numbers by split)."""
    count = sum(p.numel() for p in trainable) / 2**20
    print(f"{run}: {data.describe(split)}; {len(split.names)} categories, {count:.2f} Mi "
          f"trainable; {kernels.chosen()}")
    if cfg.assume_negative:
        print(f"unknown labels count as absent, with weight {cfg.assume_negative:g} "
              "(--assume-negative 0: not at all)")
    told = [f"{name} mAP {zero[name]['mAP']:.2f}" for name in ("val", "test") if name in zero]
    if told:
        print(f"epoch   0/{cfg.epochs} CLIP without training  {'  '.join(told)}")


def of_epoch(run, line, epochs):
    """Prints a line of metrics.jsonl; TensorBoard gets its numbers where it is installed."""
    terms = "  ".join(f"{name} {value:.3f}" for name, value in line.items() if name[0] == "L")
    print(f"epoch {line['epoch']:>3}/{epochs} stage {line['stage']}  {terms}  {mAPs(line)}  "
          f"{line['images_per_second']:.0f} images/s", flush=True)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # it is not installed, or does not fit the other packages
        return
    with SummaryWriter(run / "tensorboard") as writer:
        for name, value in line.items():
            numbers = value if isinstance(value, dict) else {"": value}
            for part, number in numbers.items():
                if isinstance(number, (int, float)):
                    writer.add_scalar(f"{name}/{part}".strip("/"), number, line["epoch"])


def of_failure(epoch, step, steps, terms):
    """Why a run ends; epoch: finished ones, terms: the loss's of this step."""
    values = ", ".join(f"{name} {term.item():g}" for name, term in terms.items())
    return (f"epoch {epoch + 1}: the loss or a weight is not finite after step {step} of {steps} "
            f"({values}); {epoch} epochs are kept; train anew with a lower --lr or --amp none")


def mAPs(line):
    """mAP of each split that was evaluated, and of CLIP without any training."""
    return "  ".join(
        f"{name} mAP {numbers['mAP']:.2f} ({numbers['positives']} positives of "
        f"{len(numbers['AP']) - numbers['left_out']} categories, "
        f"zero-shot {numbers['mAP_zero-shot']:.2f})"
        for name in ("val", "test") if (numbers := line.get(name)))


def warn_if_below(split, numbers, cfg):
    """Prints a warning where zero-shot ranks better. numbers: eval.metrics, and mAP_zero-shot"""
    if numbers["mAP"] < numbers["mAP_zero-shot"]:
        print(f"warning: on {split} the run is below CLIP without any training"
              + ("" if cfg.score == "mixed" else "; --score mixed adds the two"))


def of_run(run, cfg, state, encoder, splits, seconds):
    """Prints what was reached, draws the two pictures. state: a State, splits (train, val, test)"""
    history, best = state.history, state.best
    for split in ("val", "test"):
        if numbers := history[-1].get(split):
            told = "  ".join(f"{name} {round(value, 2)}" for name, value in numbers.items()
                             if name != "AP")
            print(f"last epoch, {split}, CP to OF1 at 0.5: {told}")
            warn_if_below(split, numbers, cfg)
    if best:
        print(f"best epoch {best['epoch']}, chosen on {best['chosen_on']}: "
              f"{mAPs(history[best['epoch'] - 1])}")
    if not (run / "best.pt").exists():
        print("no best epoch is kept: no validation has enough positives; eval.py takes the last")
    weights = {"L_r": cfg.alpha, "L_KD": cfg.beta, "L_NCE": cfg.gamma}  # of the total
    curves(history, run / "curves.png", weights, best and best["epoch"])
    train_split, val_split, test_split = splits
    shown = test_split or val_split or (train_split if cfg.images == "photos" else None)
    if shown:
        predictor = Predictor(run, "last", state.memory.bank.device, encoder)
        save_grid([region_tiles(predictor, shown.paths[i], p, maps, 3, shown.truth[i])
                   for i, p, maps in predictor.iterate(shown.paths[:6])], run / "regions.png")
    print(f"{seconds:.0f} s with features and evaluation")
    print(f"wrote {run}/: {' '.join(name for name in FILES[1:] if (run / name).exists())}")
