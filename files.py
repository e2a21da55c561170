"""What stands around a run: one-line errors, Ctrl-C, files that survive a kill, one writer a folder, the device.

`train.py`, `eval.py` and `reproduce.py` share it. Nothing here knows the method.
"""
import argparse
import contextlib
import difflib
import io
import json
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor

import torch

from clip import ClipError
from data import DataError


class ConfigError(ValueError):
    """A setting or a file that cannot be: one line for the user."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one line, with the nearest option; the usage of fifty options would bury it.
    An empty value (--resume "$RUN" without a RUN) is refused: it would silently be no value. about: the file's docstring."""

    def __init__(self, prog, about, **options):
        first, _, rest = about.partition("\n")
        super().__init__(prog=prog, description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False, **options)

    def parse_known_args(self, *arguments, **options):
        found, rest = super().parse_known_args(*arguments, **options)
        empty = [name for name, value in vars(found).items() if name != "without" and "" in (value if isinstance(value, list) else [value])]
        if empty:                                                                  # --without "" is the default
            raise ConfigError(f"{empty[0].replace('_', '-')} expects a value, got an empty one: give it, or drop the option")
        return found, rest

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
            message = f"unknown option {unknown}{f', did you mean {near[0]}?' if near else ''}"
        raise ConfigError(f"{message} ({self.prog} --help lists the options)")


def guarded(work, stopped="stopped"):
    """work() -> exit status: what work returns, or 0; 2 after one line on stderr about something the user can mend; 130 after Ctrl-C.

    More of them within two seconds are ignored, so that the way out is not interrupted; later ones count, because Python drops
    an exception that meets a hook of its own. What is raised otherwise is a fault of this code and keeps its traceback.
    """
    last = -math.inf

    def interrupt(*_):
        nonlocal last
        again, last = time.monotonic() - last < 2, max(last, time.monotonic())
        if uninterrupted.depth:
            uninterrupted.pending = True
        elif not again:
            raise KeyboardInterrupt
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                                             # closed by whoever started this (>&-)
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")              # a name that the terminal cannot show stops nothing
    ours = threading.current_thread() is threading.main_thread()                   # elsewhere Python allows no handler
    earlier = signal.signal(signal.SIGINT, interrupt) if ours else None
    try:
        status = work() or 0
        sys.stdout.flush()                                                         # here, where a reader that went away is no fault
    except KeyboardInterrupt:
        last = math.inf                                                            # from here on they are ignored; SIG_IGN would let Python report one
        print(f"\n{stopped}", file=sys.stderr)
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)                           # Python takes its own handlers away as it ends
        return 130
    except (ConfigError, DataError, ClipError, FloatingPointError) as error:
        line = str(error)
    except BrokenExecutor:                                                         # a RuntimeError, too
        line = "a process that works for this one was ended from outside, mostly for want of memory: use fewer --jobs or --workers"
    except (MemoryError, RuntimeError) as error:                                   # RuntimeError: how torch says it on a CPU and on mps
        if not (isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)):
            raise
        line = f"too little memory: lower --batch, --size or --queue, or use --amp bf16 on a GPU ({str(error).split('. ')[0][:150]})"
    except BrokenPipeError:                                                        # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)                               # so that Python's last flush finds no fault either
        return 141
    except OSError as error:
        line = f"{error.filename or 'input or output'}: {error.strerror or error}; check the path, the rights and the free space"
    else:
        return status
    finally:
        if ours and signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, earlier)
    with contextlib.suppress(OSError):                                             # nobody listens there either
        print("error: " + " ".join(line.split()), file=sys.stderr)
    return 2


class uninterrupted(contextlib.ContextDecorator):
    """A Ctrl-C that comes meanwhile counts at the end: while processes begin or end, Python's hooks would drop it. Processes forked
    meanwhile leave it to this one."""
    depth, pending = 0, False

    def __enter__(self):
        uninterrupted.depth += 1

    def __exit__(self, *_):
        uninterrupted.depth -= 1
        if uninterrupted.pending and not uninterrupted.depth:
            uninterrupted.pending = False
            raise KeyboardInterrupt


def write_atomically(file, content):
    """bytes or text into `file`: written beside it, flushed to disk, renamed. A kill leaves the old file or the new one."""
    try:
        if not file.name or file.exists() and not file.is_file():                  # a folder; a device, which a rename would replace
            raise OSError("not a regular file")
        temporary = file.with_name(f".{file.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)                                      # of a process that was killed
            with open(temporary, "xb") as handle:
                handle.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"{file} cannot be written ({error.strerror or error}): free some space or choose another place; "
                          "what the file held before is untouched") from None


def save_atomically(save, file):
    """save(buffer) writes into memory, as torch.save, np.save, PIL and matplotlib do; it lands in `file` whole or not at all."""
    buffer = io.BytesIO()
    save(buffer)
    write_atomically(file, buffer.getvalue())


def read_checkpoint(file, device="cpu"):
    """A last.pt or best.pt as written by train.py; ConfigError when there is none or it is none. Runs no code from it."""
    if not file.is_file() and (file.parent / "last.pt").is_file():
        raise ConfigError(f"{file.parent} has no {file.name} (without validation there is none): drop --checkpoint, or say last")
    if not file.is_file():
        raise ConfigError(f"expected a run folder with {file.name}, found none in {file.parent}: give the folder of a run "
                          "that finished an epoch")
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        missing = {"config", "names", "clip_sha256", "model", "g_pos", "g_neg", "threshold", "epoch"} - set(state)
        if not missing:
            if not isinstance(json.loads(state["config"]), dict) or not isinstance(state["model"], dict):
                raise ValueError("its settings or its model are no dictionary")
            if not len(set(state["names"])) == len(state["g_pos"]) == len(state["g_neg"]) == len(state["threshold"]):
                raise ValueError("its parts speak of different numbers of categories")
            numbers = (*state["model"].values(), state["g_pos"], state["g_neg"], torch.tensor(state["threshold"]))
            words = (state["clip_sha256"], *state["names"])
            if not all(part.isfinite().all() for part in numbers) or not all(isinstance(word, str) for word in words):
                raise ValueError("it holds what is not finite, or is no name")
    except Exception as error:                                                     # whatever a damaged file makes the reader raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ConfigError(f"{file} is no readable checkpoint ({reason}): restore it, or train again") from None
    if missing:
        raise ConfigError(f"{file} lacks {', '.join(sorted(missing))}: it is no checkpoint of train.py")
    return state


def locked(file, wait=False):
    """-> `file`, open, and locked for this process until it is closed or the process ends, however it ends (its workers do not
    inherit the lock). Held by another process: wait, or ConfigError. Where there are no such locks, on Windows, there is none."""
    handle = open(file, "w")
    try:
        import fcntl
        fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        raise ConfigError(f"another process is writing {file.parent}: wait for it, or choose another --out") from None
    except (ImportError, OSError):
        pass
    return handle


def best_device(rank=0, world=1):
    """CUDA's device of this rank; Apple's mps for a single process; else the CPU."""
    if torch.cuda.is_available():
        return torch.device(f"cuda:{rank}")
    return torch.device("mps" if world == 1 and torch.backends.mps.is_available() else "cpu")


def peak_memory():
    """The most memory that this process held so far, for the log."""
    try:
        import resource                                                            # not on Windows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return "unknown"
    gpu = f", GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if torch.cuda.is_available() else ""
    return f"{peak / 2**30:.2f} GiB{gpu}"
