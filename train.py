"""Trains TRM-ML, a baseline or an ablation; every random number follows from --seed (Sec. 3, 4.1).

    python train.py --data scenes --ratio 0.1                      drawn scenes, minutes
    python train.py --data coco --root /data/coco --ratio 0.3      the paper's setting
    python train.py --resume runs/NAME                             goes on, bit for bit
    torchrun --nproc-per-node 4 train.py --data coco ...           several GPUs

A run folder holds config.json, metrics.jsonl (a line an epoch), last.pt, best.pt, curves.png,
regions.png. B images, C categories, N locations, D dims. Labels: 1 present, -1 absent, 0 unknown.
"""
import sys

from config import parse

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    parse(None, __doc__)  # prints the help and exits, before torch takes a second to load

import dataclasses
import json
import os
import time

import torch
from tqdm import tqdm

import clip
import data
import kernels
import losses
from clip.features import autocast_dtype
from eval import PseudoCount, evaluate
from memory import MemoryBank
from support import UserError, distributed
from support.checkpoint import State, read_checkpoint
from support.cli import best_device, run_main, stop
from support.distributed import average_gradients, gather
from support.run_folder import begin, new_run, save, write_metrics
from tools import report
from tools.build import build_model, evaluation_loaders, load_carl, load_data, training_loader
from tools.zero_shot import zero_shot_text
from trm import Output

# Positives a category that validation needs to choose the best epoch: with fewer, what it chooses
# is on average worse than the last epoch (docs/readings.md).
ENOUGH = 10


def training_step(model, memory, encoder, cfg, f, x, labels, stage_two, amp=None):
    """Section 3 of the paper for one batch -> loss, {name: term}, pseudo-labels (B, C) or None.

    f (b, N, D) dense and x (b, D) global features of this process's images; labels (B, C) int8 of
    the batch (processes share it: b < B, and what the losses need is gathered on each of them)
    """
    with torch.autocast(f.device.type, amp or torch.bfloat16, enabled=amp is not None):
        g_pos, g_neg = model.prompts(encoder)  # Sec. 3.1   (C, D)
        out = model(f, x, g_pos, g_neg)  # Eq. 1-5
    out = Output(*(part if part is None else gather(part.float(), len(labels)) for part in out))

    # Sec. 3.4: the batch's prototypes enter the bank, its similarities move the thresholds, the
    # unknown is estimated. In this order, so that an image meets its own prototypes among those of
    # its categories.
    pseudo = None
    if cfg.uses("mmcp") or cfg.uses("mmcl"):
        memory.enqueue(out.energy, gather(f, len(labels)), labels, cfg.topk)  # Eq. 7
    if cfg.uses("mmcp") and stage_two:
        s = memory.similarities(out.regions)  # Eq. 8   (2, B, C)
        assumed = torch.where(labels == 0, -1, labels) if cfg.assume_negative else labels
        memory.update_thresholds(s, assumed)  # Eq. 9, 11
        modalities = [i for i, name in enumerate(("visual", "text")) if cfg.uses(name)]
        pseudo = memory.pseudo_labels(s, labels, modalities)  # Eq. 10, 12
    completed = labels if pseudo is None else torch.where(labels == 0, pseudo, labels)

    # Sec. 3.3, 3.5 and 3.6: the losses.
    asl = dict(gamma_pos=cfg.gamma_pos, gamma_neg=cfg.gamma_neg, shift=cfg.shift,
               assume_negative=cfg.assume_negative)
    terms = {"L_r": losses.asymmetric(out.logits_r, completed, **asl)}  # Eq. 14
    if out.logits_q is not None:
        terms["L_q"] = losses.asymmetric(out.logits_q, completed, **asl)  # Eq. 14
    if cfg.uses("kd"):
        terms["L_KD"] = losses.distillation(out.logits_r, out.logits_q, cfg.kd, cfg.kd_temperature,
                                            cfg.kd_teacher)  # Eq. 6
    if cfg.uses("mmcl") and stage_two:
        present = (completed if cfg.pseudo_in_contrastive else labels) == 1  # (B, C)
        samples, classes = contrastive_samples(model, memory, out.regions, present)
        # Eq. 13
        terms["L_NCE"] = losses.contrastive(model.heads["text"](g_pos), samples, classes, cfg.tau)
    return losses.total(terms, cfg.alpha, cfg.beta, cfg.gamma), terms, pseudo  # Eq. 15


def contrastive_samples(model, memory, regions, present):
    """What Eq. 13 compares the texts with: regions of present categories and all prototypes, each
    through its MLP. regions (B, C, D), present (B, C) bool -> samples (S, D), categories (S,)."""
    filled = memory.filled()  # (C, L)
    region_class = present.nonzero()[:, 1]
    pixel_class = filled.nonzero()[:, 0]
    samples = [model.heads["region"](regions[present]), model.heads["pixel"](memory.bank[filled])]
    return torch.cat(samples), torch.cat([region_class, pixel_class])


def update(state, loss, cfg):
    """A step of AdamW on the gradient of all processes, its norm clipped, and of the schedule.
    Returns the norm before it was clipped."""
    parameters = state.optimizer.param_groups[0]["params"]
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    average_gradients(parameters)  # first, so that one process's overflow is seen by all
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.scheduler.step()
    return norm


def train_one_epoch(state, encoder, loader, cfg, rank=0):
    """One pass over the training images; returns the epoch's line of metrics.jsonl."""
    device = state.memory.bank.device
    labels = torch.from_numpy(loader.split.labels).to(device)  # (n, C) what training sees
    truth = torch.from_numpy(loader.split.truth).to(device)  # (n, C) what is known
    amp = autocast_dtype(cfg.amp, device)
    stage_two = state.epoch >= cfg.first_stage
    if stage_two and state.memory.text_prototypes.isnan().any():
        # the end of stage one: "the text representation trained in the first stage"
        with torch.no_grad():
            state.memory.set_text_prototypes(state.model.prompts(encoder)[0])
    state.model.train()
    torch.manual_seed((cfg.seed * 1_000_003 + state.epoch) * 1009 + rank)  # so dropout resumes
    pseudo_count = PseudoCount(device)
    sums, start, steps = {}, time.perf_counter(), -(-len(loader) // cfg.batch)
    bar = tqdm(loader.batches(state.epoch), f"epoch {state.epoch + 1}/{cfg.epochs}", steps,
               leave=False, disable=rank > 0 or not sys.stderr.isatty())
    for i, (index, f, x) in enumerate(bar):
        if stop.asked:
            raise KeyboardInterrupt
        index = gather(index, min(cfg.batch, len(loader) - i * cfg.batch))  # (B,)
        loss, terms, pseudo = training_step(state.model, state.memory, encoder, cfg, f, x,
                                            labels[index], stage_two, amp)
        norm = update(state, loss, cfg)
        if pseudo is not None:
            pseudo_count.add(pseudo, labels[index], truth[index])
        for name, term in {**terms, "L": loss, "gradient_norm": norm}.items():
            sums[name] = sums.get(name, 0) + term.detach()
        # asking makes the host wait for a GPU
        if device.type == "cpu" or i % 50 == 0 or i + 1 == steps:
            require_finite([sums["L"]], f"the loss is not finite after step {i + 1} of {steps}",
                           state, terms)
            bar.set_postfix(loss=f"{float(sums['L']) / (i + 1):.3f}")
    require_finite(state.model.parameters(), "a weight is not finite after the last step", state,
                   terms)
    seconds = time.perf_counter() - start
    means = {name: round(float(value) / steps, 6) for name, value in sums.items()}
    return dict(epoch=state.epoch + 1, stage=2 if stage_two else 1,
                lr=state.scheduler.get_last_lr()[0], **means, **pseudo_count.report(),
                images_per_second=round(len(loader) / seconds, 1), seconds=round(seconds, 2),
                waiting=round(loader.waited / seconds, 3))


def require_finite(tensors, what, state, terms):
    if not all(tensor.isfinite().all() for tensor in tensors):
        values = ", ".join(f"{name} {float(value.detach()):g}" for name, value in terms.items())
        raise FloatingPointError(f"epoch {state.epoch + 1}: {what} ({values}); {state.epoch} "
                                 "epochs are kept; train anew with a lower --lr or --amp none")


def train(cfg, resume=None, splits=None, encoder=None, on_epoch=None):
    """Trains a run to its end; returns the lines of metrics.jsonl.

    resume    folder of a run to go on with
    splits    (train, val, test) and encoder, a clip.CLIP, where they are loaded already
    on_epoch  called as on_epoch(state, line) after each epoch, with support.checkpoint.State
    """
    rank, world = distributed.start()
    device = best_device(int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0, world)
    if cfg.batch % world:
        raise UserError(f"--batch {cfg.batch} does not divide among {world} processes")
    kernels.use(cfg.kernels)
    run = resume or new_run(cfg)
    splits = splits or load_data(cfg)
    train_split = splits[0]
    encoder = (encoder or clip.load(cfg.clip, activation=cfg.activation)).to(device)

    g_zero = zero_shot_text(encoder, train_split.prompts)  # (C, D) what CLIP knows without training
    positives = (train_split.labels == 1).sum(0)  # (C,)
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, train_split, encoder).to(device)
    if cfg.carl_from:
        model.carl.requires_grad_(False)
        if not resume:
            load_carl(model, cfg.carl_from, train_split, encoder)
    memory = MemoryBank(len(train_split.names), cfg.queue, encoder.D, cfg.eta).to(device)
    start = time.perf_counter()
    loader = training_loader(cfg, train_split, encoder, device, rank, world)
    loaders = evaluation_loaders(cfg, splits, encoder, device, rank, world)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=cfg.lr, total_steps=cfg.epochs * -(-len(loader) // cfg.batch))
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    state = State(model, memory, optimizer, scheduler, scaler)

    distributed.barrier()
    held = begin(run, cfg, encoder.sha256, splits, resume) if rank == 0 else None
    if resume and (run / "last.pt").is_file():
        state.load_state_dict(read_checkpoint(run / "last.pt", device))
        if rank == 0:
            write_metrics(run, state.history)  # a kill may have come between the two files
    if rank == 0:
        count = sum(p.numel() for p in trainable) / 2**20
        print(f"{run}: {data.describe(train_split)}; {len(train_split.names)} categories, "
              f"{count:.2f} Mi trainable; {kernels.chosen()}")

    while state.epoch < cfg.epochs:
        line = train_one_epoch(state, encoder, loader, cfg, rank)
        state.epoch += 1
        with torch.no_grad():
            g_pos, g_neg = model.prompts(encoder)
        due = state.epoch % cfg.eval_every == 0 or state.epoch == cfg.epochs
        numbers, found = evaluate(model, g_pos, g_neg, g_zero, positives, loaders if due else {},
                                  cfg.score)
        line |= numbers
        state.history.append(line)
        improved = is_best(state, numbers)
        if rank == 0:
            save(run, state, found | dict(
                config=json.dumps(dataclasses.asdict(cfg)), names=train_split.names,
                clip_sha256=encoder.sha256, model=model.state_dict(), g_pos=g_pos.cpu(),
                g_neg=g_neg.cpu(), g_zero=g_zero.cpu(), epoch=state.epoch), improved)
            report.of_epoch(run, line, cfg.epochs)
        if on_epoch:
            on_epoch(state, line)
    loader.loader = None  # ends its processes; at Python's exit torch reports them as killed
    if rank == 0:
        report.of_run(run, cfg, state, encoder, splits, time.perf_counter() - start)
        held.release()
    return state.history


def is_best(state, numbers):
    """Whether this epoch is the best so far, on validation or else on test; the state notes it."""
    split = "val" if "val" in numbers else "test"
    enough = max(1, ENOUGH * len(state.memory.cursor)) if split == "val" else 1
    if split not in numbers or numbers[split]["positives"] < enough:
        return False
    if state.best and numbers[split]["mAP"] <= state.best["mAP"]:
        return False
    state.best = {"epoch": state.epoch, "chosen_on": split, "mAP": numbers[split]["mAP"]}
    return True


def main(argv=None):
    def work():
        train(*parse(argv, __doc__))
    return run_main(work, "stopped; last.pt holds what was finished: go on with --resume RUN")


if __name__ == "__main__":
    sys.exit(main())
