"""What a run tells: a line an epoch, and at the end its numbers, curves.png and regions.png."""
import torch

from support.checkpoint import FILES
from tools.plots import curves, save_regions
from tools.predictor import Predictor


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


def mAPs(line):
    """mAP of each split that was evaluated, beside it that of CLIP without any training."""
    return "  ".join(f"{split} mAP {line[split]['mAP']:.2f} (zero-shot "
                     f"{line[split]['mAP_zero-shot']:.2f})" for split in ("val", "test")
                     if split in line)


def of_run(run, cfg, state, encoder, splits, seconds):
    """Prints what was reached and draws the two pictures. state: support.checkpoint.State, splits
    (train, val, test)"""
    history, best = state.history, state.best
    for split in ("val", "test"):
        if numbers := history[-1].get(split):
            told = "  ".join(f"{name} {value:.2f}" for name, value in numbers.items()
                             if name not in ("left_out", "positives", "AP"))
            none = numbers["left_out"]
            print(f"last epoch, {split}: {told}  (of {numbers['positives']} positives"
                  + (f", {none} categories without one left out)" if none else ")"))
            if numbers["mAP"] < numbers["mAP_zero-shot"]:
                print(f"warning: on {split} the run is below CLIP without any training"
                      + ("" if cfg.score == "mixed" else "; --score mixed adds the two"))
    if best:
        print(f"best epoch {best['epoch']}, chosen on {best['chosen_on']}: "
              f"{mAPs(history[best['epoch'] - 1])}")
    else:
        print("no best epoch: too few known positives to choose it on")
    weights = {"L_r": cfg.alpha, "L_KD": cfg.beta, "L_NCE": cfg.gamma}  # of the total
    curves(history, run / "curves.png", weights, best and best["epoch"])
    train_split, val_split, test_split = splits
    shown = test_split or val_split or (train_split if cfg.images == "photos" else None)
    if shown:
        predictor = Predictor(run, "last", state.memory.bank.device, encoder)
        save_regions(predictor, shown, run / "regions.png")
    print(f"{seconds:.0f} s with features and evaluation")
    if torch.cuda.is_available():
        print(f"GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most")
    print(f"wrote {run}/: {' '.join(name for name in FILES[1:] if (run / name).exists())}")
