"""What a run keeps on disk, in files that survive a kill: written beside, flushed, renamed.

    config.json      settings, sha256 of CLIP's weights and of each split's names and labels
    metrics.jsonl    a line per epoch
    last.pt          all that training goes on from (State), and all of best.pt
    best.pt          what inference needs of the epoch that validation chose: model, epoch, config,
                     names, clip_sha256, g_pos, g_neg, g_zero, zero_shot_scale, threshold, rests_on
    curves.png, regions.png, and tensorboard/ where that is installed
"""
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from filelock import FileLock

from support import UserError, refused

EVALUATED = ("zero_shot_scale", "threshold", "rests_on")  # what inference needs of an evaluation
FILES = ("config.json", "last.pt", "best.pt", "metrics.jsonl", "curves.png", "regions.png")


def write_atomically(file, content):
    """bytes or text into `file` (a Path): a kill leaves the old file or the new one, no part."""
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")
    file = file.resolve()  # what a link points to, not the link
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        if file.exists():
            os.chmod(temporary, file.stat().st_mode)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror or error}): free some space or "
                        "choose another place; what the file held before is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_atomically(save, file):
    """save(buffer) writes into memory, as np.save does; `file` gets all of it or nothing."""
    buffer = io.BytesIO()
    save(buffer)
    write_atomically(file, buffer.getvalue())


def save_checkpoint(state, file):
    """A dict of tensors, numbers, strings, lists, dicts -> `file`, which ends with its sha256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(file, buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest())


def read_checkpoint(file, device="cpu"):
    """A last.pt or best.pt -> dict, its tensors on `device`. Runs no code from the file."""
    if not file.is_file():
        raise UserError(f"expected a run folder with {file.name}, found none in {file.parent} "
                        "(only a run with enough validation has a best.pt: --checkpoint last)")
    content = file.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise UserError(f"{file} is damaged, or no checkpoint: restore it, or train again")
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


@dataclass
class State:
    """What training changes, and so what last.pt keeps: parts with a state_dict, and numbers."""
    model: object
    memory: object
    optimizer: object
    scheduler: object
    scaler: object
    epoch: int = 0  # finished epochs
    best: dict = None  # {"epoch", "chosen_on", "mAP"} of the best epoch
    history: list = field(default_factory=list)  # a line of metrics.jsonl an epoch
    evaluated: dict = None  # EVALUATED of the last epoch that was evaluated
    PARTS = ("model", "memory", "optimizer", "scheduler", "scaler")

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | dict(epoch=self.epoch, best=self.best, history=json.dumps(self.history))

    def load_state_dict(self, saved):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.epoch, self.best = saved["epoch"], saved["best"]
        self.history = json.loads(saved["history"])
        self.evaluated = {name: saved[name] for name in EVALUATED}  # `save` adds them for inference


# ---- the folder

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
    """Whether files can be written into a folder that is there or would be made."""
    above = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return above.is_dir() and os.access(above, os.W_OK)


def read_config(run):
    """What config.json says of a run that was begun."""
    file = run / "config.json"
    with refused(f"{file} holds no run: restore it, or give another folder"):
        about = json.loads(file.read_text(encoding="utf-8"))
        return {name: about[name] for name in ("config", "clip_sha256", "data")}


def changed(run, splits):
    """The splits whose names, prompts or labels are not the run's. A sheet may have a new name."""
    begun = read_config(run)["data"]
    sha256 = {name.split("/")[-1]: info["sha256"] for name, info in begun.items()}
    return [split.name for split in splits
            if split and sha256.get(split.name.split("/")[-1]) != split.info["sha256"]]


def begin(run, cfg, clip_sha256, splits, resume=False):
    """Locks the folder, writes config.json; on resume CLIP and data must be the same -> lock."""
    run.mkdir(parents=True, exist_ok=True)
    # a singleton: a stopped notebook cell keeps this lock, and the next one must get it again
    lock = FileLock(run / ".lock", is_singleton=True)
    with refused(f"{run} cannot be locked: another process is writing it, or its disk knows no "
                 "locks; wait, or choose another --out"):
        lock.acquire(timeout=10)  # a killed run's loader processes end within that
    if resume:
        if read_config(run)["clip_sha256"] != clip_sha256:
            raise UserError(f"{run} was begun on other CLIP weights: give --clip the same file")
        if names := changed(run, splits):
            raise UserError(f"{run} was begun on other data: names, prompts or labels of "
                            f"{names[0]} have changed: put them back, or train anew")
    elif (run / "config.json").exists():  # of a run that began meanwhile
        raise UserError(f"{run} holds a run already: choose another --out")
    else:
        names = [split.name.split("/")[-1] for split in splits if split]
        if len({*names}) < len(names):
            raise UserError(f"expected splits of different names, got {names}: set split.name")
        if len({tuple(split.names) for split in splits if split}) > 1:
            raise UserError("expected splits of the same classes in the same order: data.load's")
        about = {"config": asdict(cfg), "clip_sha256": clip_sha256,
                 "data": {split.name: split.info for split in splits if split}}
        write_atomically(run / "config.json", json.dumps(about, indent=1))
    return lock


def save(run, state, inference, improved):
    """Writes last.pt and metrics.jsonl, and best.pt if improved. inference: dict of what a
    prediction needs beside CLIP and the model."""
    parts = state.state_dict()
    if improved:
        save_checkpoint(inference | dict(model=parts["model"], epoch=state.epoch), run / "best.pt")
    save_checkpoint(inference | parts, run / "last.pt")
    write_metrics(run, state.history)


def write_metrics(run, history):
    write_atomically(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
