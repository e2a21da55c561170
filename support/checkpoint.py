"""Files that survive a kill: written beside, flushed, renamed. Checkpoints carry a checksum."""
import hashlib
import io
import json
import os
from dataclasses import dataclass, field

from support import UserError


def write_atomically(file, content):
    """bytes or text into `file` (a Path): a kill leaves the old file or the new one, no part."""
    if isinstance(content, str):
        content = content.encode(errors="surrogateescape")
    file = file.resolve()  # what a link points to, not the link
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        if file.exists() and not file.is_file():  # a device, which a rename would replace
            raise OSError("not a regular file")
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
    import torch
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(file, buffer.getvalue() + hashlib.sha256(buffer.getbuffer()).digest())


def read_checkpoint(file, device="cpu"):
    """A last.pt or best.pt -> dict, its tensors on `device`. Runs no code from the file."""
    import torch
    if not file.is_file():
        raise UserError(f"expected a run folder with {file.name}, found none in {file.parent} "
                        "(without validation there is no best.pt: use last)")
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
    scaled: dict = None  # scale and thresholds of the last epoch that was evaluated
    PARTS = ("model", "memory", "optimizer", "scheduler", "scaler")

    def state_dict(self):
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        return parts | dict(epoch=self.epoch, best=self.best, history=json.dumps(self.history),
                            scaled=self.scaled)

    def load_state_dict(self, saved):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.epoch, self.best, self.scaled = saved["epoch"], saved["best"], saved.get("scaled")
        self.history = json.loads(saved["history"])
