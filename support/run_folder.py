"""A run folder: where it lies, who may write it, what it was begun with.

    config.json      settings, sha256 of CLIP's weights and of each split's names, labels, truth
    metrics.jsonl    a line an epoch
    last.pt          all that training goes on from
    best.pt          what inference needs, of the best epoch
"""
import dataclasses
import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from support import UserError
from support.checkpoint import save_checkpoint, write_atomically

FILES = ("config.json", "last.pt", "best.pt", "metrics.jsonl", "curves.png", "regions.png")


def new_run(cfg):
    """A folder for a new run: cfg.out, or one named after the settings; nothing is overwritten."""
    setting = "captions" if cfg.images == "captions" else cfg.single_positive or f"{cfg.ratio:g}"
    left_out = f"-no-{cfg.without.replace(',', '-')}" if cfg.without else ""
    name = f"{Path(cfg.data).stem}-{setting}-{cfg.matching}{left_out}-seed{cfg.seed}"
    run = Path(cfg.out or f"runs/{name}")
    number = 1
    while any((run / file).exists() for file in FILES):
        if cfg.out:
            raise UserError(f"{run} holds a run already: --resume {run}, or choose another --out")
        number += 1
        run = Path(f"runs/{name}-{number}")
    if not writable(run):  # told before an hour of decoding
        raise UserError(f"{run} cannot be written into: choose another --out")
    return run


def writable(folder):
    above = next(one for one in (folder, *folder.absolute().parents) if one.exists())  # or itself
    return above.is_dir() and os.access(above, os.W_OK)


def begun(run):
    """What config.json says of a run that was begun."""
    file = run / "config.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["config"] and about["clip_sha256"] and about["data"]:
            return about
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} holds no run: restore it, or give another folder")


def begin(run, cfg, clip_sha256, splits, resume=False):
    """Locks the folder, writes config.json; on resume CLIP and data must be the same -> lock."""
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock")
    try:
        lock.acquire(timeout=10)  # a killed run's loader processes end within that
    except Timeout:
        raise UserError(f"another process is writing {run}: wait, or choose --out") from None
    except (OSError, NotImplementedError) as error:  # some network disks cannot lock
        raise UserError(f"{run} cannot be locked ({error}): choose --out on another disk") from None
    about = {"config": dataclasses.asdict(cfg), "clip_sha256": clip_sha256,
             "data": {split.name: split.info for split in splits if split}}
    if not resume:
        if (run / "config.json").exists():  # of a run that began meanwhile
            raise UserError(f"{run} holds a run already: choose another --out")
        write_atomically(run / "config.json", json.dumps(about, indent=1))
        return lock
    before = begun(run)
    if before["clip_sha256"] != clip_sha256:
        raise UserError(f"{run} was begun on other CLIP weights: give --clip the same file")
    for name, info in about["data"].items():
        if before["data"].get(name, {}).get("sha256") != info["sha256"]:
            raise UserError(f"{run} was begun on other data: names, labels or images of {name} "
                            "have changed: put them back, or train anew")
    return lock


def save(run, state, inference, improved):
    """Writes last.pt and metrics.jsonl, and best.pt if improved. state: support.checkpoint.State;
    inference: dict of what a prediction needs beside CLIP and the model."""
    parts = state.state_dict()
    if improved:
        save_checkpoint(inference | {"model": parts["model"], "epoch": state.epoch},
                        run / "best.pt")
    save_checkpoint(inference | parts, run / "last.pt")
    write_metrics(run, state.history)


def write_metrics(run, history):
    write_atomically(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
