"""Trains TRM-ML, a baseline or an ablation; every random number follows from --seed (Sec. 3, 4.1).

    python train.py --data scenes --ratio 0.1                      drawn scenes, minutes
    python train.py --data coco --root /data/coco --ratio 0.3      the paper's setting
    python train.py --resume runs/NAME                             goes on, bit for bit
    torchrun --nproc-per-node 4 train.py --data coco ...           several GPUs

support/checkpoint.py says what a run folder holds. B images of a batch, C categories, N locations,
D dims. Labels: 1 present, -1 absent, 0 unknown.
"""
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import clip
import kernels
import losses
from clip.features import set_precision
from config import parse
from eval import count_pseudo, evaluate, note_best, pseudo_numbers
from memory import MemoryBank
from support import UserError, distributed
from support.checkpoint import State, begin, new_run, read_checkpoint, save, write_metrics
from support.cli import best_device, run_main, stop
from support.distributed import average_gradients, gather
from support.replay import replayed
from tools import report
from tools.build import (build_model, evaluation_loaders, load_carl, load_data, settled,
                         training_loader)
from tools.zero_shot import zero_shot_text
from trm import Output


def training_step(model, memory, encoder, cfg, f, x, labels, stage_two, amp=None):
    """Section 3 of the paper for one batch -> loss, {name: term}, pseudo-labels (B, C) or None.

    encoder is the frozen CLIP; memory, a MemoryBank, is changed in place; amp: autocast's dtype.
    f (b, N, D) dense and x (b, D) global features (or None, where they are not asked for) of this
    process's images, b = B in one process; labels (B, C) int8 of the whole batch: each process
    computes the losses of all of it. stage_two: whether MMCP and MMCL take part.
    """
    with torch.autocast(f.device.type, amp or torch.bfloat16, enabled=amp is not None):
        g_pos, g_neg = model.prompts(encoder)  # Sec. 3.1   (C, D)
        out = model(f, x, g_pos, g_neg)  # Eq. 1-5
    # From here on `out` holds the whole batch, in float32.
    out = Output(*(None if part is None else gather(part.float(), len(labels)) for part in out))

    # Sec. 3.4: the prototypes of the batch enter the bank, in stage one too. In stage two the
    # similarities to the bank move the thresholds, then the unknown labels are estimated. In this
    # order, so that the bank already holds the prototypes of the images that are compared with it.
    pseudo = None
    if cfg.uses("mmcp") or cfg.uses("mmcl"):
        memory.enqueue(out.energy, gather(f, len(labels)), labels, cfg.topk)  # Eq. 7
    if cfg.uses("mmcp") and stage_two:
        s = memory.similarities(out.regions)  # Eq. 8   (2, B, C)
        # A single positive tells no negatives: without assumed ones no theta_negative exists.
        assumed = torch.where(labels == 0, -1, labels) if cfg.assume_negative else labels
        memory.update_thresholds(s, assumed)  # Eq. 9, 11
        pseudo = memory.pseudo_labels(s, labels, cfg.modalities)  # Eq. 10, 12
    completed = labels if pseudo is None else torch.where(labels == 0, pseudo, labels)

    # Sec. 3.3, 3.5 and 3.6: the losses.
    terms = {"L_r": losses.asymmetric(out.logits_r, completed, **cfg.asl)}  # Eq. 14
    if out.logits_q is not None:
        terms["L_q"] = losses.asymmetric(out.logits_q, completed, **cfg.asl)  # Eq. 14
    if cfg.uses("kd"):
        terms["L_KD"] = losses.distillation(out.logits_r, out.logits_q, cfg.kd, cfg.kd_temperature,
                                            cfg.kd_teacher)  # Eq. 6
    if cfg.uses("mmcl") and stage_two:
        present = (completed if cfg.pseudo_in_contrastive else labels) == 1  # (B, C)
        samples, classes = model.contrastive_samples(out.regions, present, memory)
        # Eq. 13
        terms["L_NCE"] = losses.contrastive(model.heads["text"](g_pos), samples, classes, cfg.tau)
    return losses.total(terms, cfg.alpha, cfg.beta, cfg.gamma), terms, pseudo  # Eq. 15


def update(state, loss, cfg):
    """One step of the optimizer and of its schedule -> norm of the gradient before clipping, 0
    if not finite: fp16's scaler skips that step."""
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    state.optimizer.zero_grad(set_to_none=True)
    state.scaler.scale(loss).backward()
    average_gradients(parameters)  # before unscale_, so that all processes see an overflow
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.scheduler.step()
    return norm.nan_to_num(nan=0, posinf=0)


def train_one_epoch(state, encoder, loader, cfg):
    """One pass over the training images -> the epoch's line of metrics.jsonl."""
    model, memory, device = state.model, state.memory, state.memory.bank.device
    labels = torch.from_numpy(loader.split.labels).to(device)  # (n, C) what training sees
    truth = torch.from_numpy(loader.split.truth).to(device)  # (n, C) what is known
    amp = set_precision(cfg.amp, device)
    stage_two = state.epoch >= round(cfg.stage_one * cfg.epochs)
    if stage_two and memory.text_prototypes.isnan().any():
        # the end of stage one: "the text representation trained in the first stage"
        with torch.no_grad():
            memory.set_text_prototypes(model.prompts(encoder)[0])
    model.train()
    # Dropout depends on seed, epoch and rank alone: a resumed run has the same.
    torch.manual_seed((cfg.seed * 1_000_003 + state.epoch) * 1009 + loader.rank)
    pseudo_count, sums = torch.zeros(2, 2, dtype=torch.int64, device=device), {}
    start, steps = time.perf_counter(), math.ceil(len(loader) / cfg.batch)
    bar = tqdm(loader.batches(state.epoch), f"epoch {state.epoch + 1}/{cfg.epochs}", steps,
               leave=False, disable=loader.rank > 0 or None)  # None: no bar without a terminal
    for i, (index, f, x) in enumerate(bar, 1):
        if stop.asked:  # Python may lose the exception that a signal raised
            raise KeyboardInterrupt
        index = gather(index, min(cfg.batch, len(loader) - (i - 1) * cfg.batch))  # (B,)
        loss, terms, pseudo = training_step(model, memory, encoder, cfg, f, x, labels[index],
                                            stage_two, amp)
        lr = state.scheduler.get_last_lr()[0]  # of this step
        norm = update(state, loss, cfg)
        if pseudo is not None:
            pseudo_count += count_pseudo(pseudo, labels[index], truth[index])
        for name, term in {**terms, "L": loss, "gradient_norm": norm}.items():
            sums[name] = sums.get(name, 0) + term.detach()
        if device.type == "cpu" or i % 50 == 1 or i == steps:  # reading a value waits for a GPU
            weights = model.parameters() if i == steps else ()
            if not all(tensor.isfinite().all() for tensor in (sums["L"], *weights)):
                raise FloatingPointError(report.of_failure(state.epoch, i, steps, terms))
            bar.set_postfix(loss=f"{float(sums['L']) / i:.3f}")
    seconds = time.perf_counter() - start
    means = {name: round(float(value) / steps, 6) for name, value in sums.items()}
    return dict(epoch=state.epoch + 1, stage=2 if stage_two else 1, lr=lr, **means,
                **pseudo_numbers(pseudo_count),
                images_per_second=round(len(loader) / seconds, 1), seconds=round(seconds, 2))


def train(cfg, resume=None, splits=None, encoder=None, on_epoch=None):
    """Trains a run to its end; returns the lines of metrics.jsonl.

    resume    folder of a run to go on with
    splits    (train, val, test) as data.load returns them, and encoder, of clip.load, where they
              are loaded already
    on_epoch  called as on_epoch(state, line) after each epoch, with support.checkpoint.State
    """
    rank, world = distributed.start()
    device = best_device(world)
    if cfg.batch % world:
        raise UserError(f"--batch {cfg.batch} does not divide among {world} processes")
    kernels.use(cfg.kernels)
    run = Path(resume) if resume else new_run(cfg)
    splits = splits or load_data(cfg)
    train_split = splits[0]
    encoder = (encoder or clip.load(cfg.clip, activation=cfg.activation)).to(device)
    cfg = settled(cfg, run, train_split, encoder, resume)
    g_zero = zero_shot_text(encoder, train_split.prompts)  # (C, D) what CLIP knows without training

    torch.manual_seed(cfg.seed)
    model = build_model(cfg, train_split, encoder).to(device)
    if cfg.carl_from and not (run / "last.pt").is_file():
        load_carl(model, cfg.carl_from, train_split, encoder)
    # on a GPU the text encoder's 600 launches are recorded once and replayed
    model.prompts.forward = replayed(model.prompts, encoder, set_precision(cfg.amp, device))
    with device:  # not on the CPU first, which may have less memory
        memory = MemoryBank(len(train_split.names), cfg.queue, encoder.D, cfg.eta)
    start = time.perf_counter()
    loader = training_loader(cfg, train_split, encoder, device, rank, world)
    loaders = evaluation_loaders(cfg, splits, encoder, device, rank, world)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    steps = max(2, cfg.epochs * math.ceil(len(loader) / cfg.batch))  # the rate of one stays near 0
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=cfg.lr, total_steps=steps)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    state = State(model, memory, optimizer, scheduler, scaler)

    distributed.barrier()  # each process has looked into the folder: now it may be written
    lock = begin(run, cfg, encoder.sha256, splits, resume) if rank == 0 else None
    if (run / "last.pt").is_file():
        state.load_state_dict(read_checkpoint(run / "last.pt", device))
        if rank == 0:
            write_metrics(run, state.history)  # a kill may have come between the two files
    zero = evaluate(model, encoder, g_zero, train_split, {} if state.epoch else loaders,
                    "zero-shot")[0]  # epoch 0; a run that is resumed has printed it
    if rank == 0:
        report.of_start(run, cfg, train_split, trainable, zero)
    fixed = dict(config=json.dumps(dataclasses.asdict(cfg)), names=train_split.names,
                 clip_sha256=encoder.sha256, g_zero=g_zero.cpu())  # the same in every epoch
    while state.epoch < cfg.epochs:
        line = train_one_epoch(state, encoder, loader, cfg)
        state.epoch += 1
        due = state.epoch % cfg.eval_every == 0 or state.epoch == cfg.epochs
        numbers, texts, evaluated = evaluate(model, encoder, g_zero, train_split,
                                             loaders if due else {}, cfg.score)
        if due or not state.evaluated:  # else the last evaluation's stay
            state.evaluated = evaluated
        line |= numbers
        state.history.append(line)
        improved = note_best(state, numbers)
        if rank == 0:
            save(run, state, fixed | texts | state.evaluated, improved)
            report.of_epoch(run, line, cfg.epochs)
        if on_epoch:
            on_epoch(state, line)
    for one in (loader, *loaders.values()):
        one.loader = None  # ends its processes; else torch reports them as killed
    if rank == 0:
        report.of_run(run, cfg, state, encoder, splits, time.perf_counter() - start)
        lock.release(force=True)
    return state.history


def main(argv=None):
    return run_main(lambda: train(*parse(argv, __doc__)),
                    "stopped; if the run had begun, --resume RUN goes on after its last finished "
                    "epoch")


if __name__ == "__main__":
    sys.exit(main())
