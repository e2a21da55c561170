"""kill -9 at random moments of a run: a readable checkpoint of a finished epoch remains, and
resuming ends where an uninterrupted run ends, bit for bit.

    python tests/kill_train.py             200 kills
    python tests/kill_train.py 20 7        20 kills, seed 7

A training is started, killed, its folder is inspected, it is resumed, and so on; when it comes to
its end its checkpoints are compared and a new one begins. Every other kill comes at a moment drawn
uniformly from a run's length, the others while a file is being written. The trainings are forked
from one process that has imported everything: not on Windows.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
from small_world import make, options, rows

from tools import report
import eval
import train
from support.checkpoint import read_checkpoint

EPOCHS = 6


def equal(a, b):
    """Two checkpoints, every tensor bit for bit."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.cpu().numpy().tobytes() == b.cpu().numpy().tobytes()
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(a, b):
    """Two run folders hold the same result, times and folder names aside."""
    for name in ("last.pt", "best.pt"):
        x, y = read_checkpoint(a / name), read_checkpoint(b / name)
        for state in (x, y):
            state.pop("history", None)
            state["config"] = {k: v for k, v in json.loads(state["config"]).items() if k != "out"}
        assert x.keys() == y.keys()
        different = [k for k in x if not equal(x[k], y[k])]
        assert not different, f"{name}: {different} differ"
    assert rows(a) == rows(b)


def inspect(folder, before):
    """What a kill left: nothing, or a checkpoint that reads, of an epoch not before the last one
    seen. Returns its epoch."""
    if not (folder / "last.pt").exists():
        assert before == 0, "a finished epoch is lost"
        return 0
    state = read_checkpoint(folder / "last.pt")
    assert state["epoch"] >= before, f"epoch {before} was there, now {state['epoch']}"
    assert len(json.loads(state["history"])) == state["epoch"]
    read_checkpoint(folder / "best.pt")
    if (folder / "metrics.jsonl").exists():
        assert len(rows(folder)) in (state["epoch"] - 1, state["epoch"])
    return state["epoch"]


def fork(log, arguments):
    """train.main(arguments) in a child, its output in the file `log`. Returns the process id."""
    child = os.fork()
    if child == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)  # sums are equal bit for bit with equal threads
        report.curves = lambda *_: None  # drawing is no part of this
        eval.ENOUGH = 0  # twelve scenes choose a best epoch too
        os._exit(train.main(arguments))
    return child


def ended(child):
    """Whether the child is gone; its exit status must be 0 unless it was killed."""
    pid, status = os.waitpid(child, os.WNOHANG)
    assert not pid or os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), (
        f"exit status {status}"
    )
    return pid != 0


def campaign(world, kills, seed):
    """Returns {"kills": n, "at_a_write": kills while a temporary file was there, "runs": compared,
    "epochs": {found: kills}}."""
    rng, found, killed, finished, at_write = random.Random(seed), [], 0, 0, 0
    length, reference, log = None, world / "reference", world / "log"
    while killed < kills or finished == 0:
        folder, epoch = (world / f"killed-{seed}-{finished}", 0) if length else (reference, 0)
        while True:
            resume = (folder / "config.json").exists()
            child = fork(
                log,
                ["--resume", str(folder)]
                if resume
                else options(world, folder, epochs=EPOCHS, cache_features=0),
            )
            start, writing = time.perf_counter(), killed % 2 == 1
            moment = (
                start + rng.random() * length * (2 if writing else 1)
                if length and killed < kills
                else float("inf")
            )
            gone = False
            while not gone and time.perf_counter() < moment:
                if (
                    writing
                    and length
                    and killed < kills
                    and any(folder.glob("*.tmp"))
                    and rng.random() < 0.3
                ):
                    at_write += 1
                    break
                time.sleep(0.0002 if writing else 0.002)
                gone = ended(child)
            if not gone:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                    killed += 1
                    epoch = inspect(folder, epoch)
                    found.append(epoch)
                    continue
            assert inspect(folder, EPOCHS) == EPOCHS, log.read_text()
            if length:
                same_run(reference, folder)
                finished += 1
            else:
                length = time.perf_counter() - start
            break
    return dict(
        kills=killed,
        at_a_write=at_write,
        runs=finished,
        epochs={e: found.count(e) for e in sorted(set(found))},
    )


if __name__ == "__main__":
    kills, seed = [int(a) for a in sys.argv[1:]] + [200, 0][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(campaign(make(Path(scratch)), kills, seed)))
