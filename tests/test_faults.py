"""What happens to runs in the world: killed, out of disk, read-only, broken loaders, NaN, two
writers. Always a readable checkpoint of a finished epoch or one clear line. tests/kill_train.py
kills 200 times; here it kills four times."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch
from filelock import FileLock
from kill_train import same_run
from small_world import ROOT, command, one_line, options, run, start, world

import data
import eval as evaluation
from datasets import scenes
from support import checkpoint
import train
from support import UserError
from support.checkpoint import read_checkpoint, write_atomically

linux = pytest.mark.skipif(sys.platform != "linux", reason="fork, mount and /proc are Linux's")


@linux
def test_kill_9_leaves_a_finished_epoch_and_resumes_bit_for_bit():
    done = subprocess.run(
        [sys.executable, "tests/kill_train.py", "4", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    count = json.loads(done.stdout.splitlines()[-1])
    assert count["kills"] == 4 and count["runs"] >= 1


def test_a_write_is_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    write_atomically(file, "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(checkpoint.os, name, full)
            with pytest.raises(UserError, match="No space left on device.*free some space"):
                write_atomically(file, "new")
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and file.read_text() == "old"
    write_atomically(file, b"new")
    assert file.read_text() == "new"


@pytest.fixture
def mounted(tmp_path):
    """mount(options): a tmpfs of its own, or a skip that says why."""
    points = []

    def mount(how):
        point = tmp_path / f"mount{len(points)}"
        point.mkdir()
        done = (
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", how, "none", str(point)],
                capture_output=True,
                text=True,
            )
            if shutil.which("mount") and os.geteuid() == 0
            else None
        )
        if done is None or done.returncode:
            pytest.skip(
                "cannot mount a small file system here: "
                f"{done.stderr.strip() if done else 'not root'}"
            )
        points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", "-l", str(point)])


@linux
@pytest.mark.parametrize(
    "room",
    (
        ("config.json",),
        ("config.json", "best.pt"),
        ("config.json", "best.pt", "last.pt"),
        ("config.json", "best.pt", "last.pt", "last.pt", "metrics.jsonl"),
    ),
    ids=lambda r: f"after {len(r)} files",
)
def test_a_full_disk_stops_the_run_in_one_line(world, mounted, tmp_path, capfd, monkeypatch, room):
    """No room for best.pt; for last.pt; for the second version beside the first; for the pictures
    at the end."""
    if not (world / "measured").exists():
        run(world, world / "measured")
    disk = mounted(
        f"size={sum((world / 'measured' / name).stat().st_size // 1024 + 8 for name in room)}k"
    )
    monkeypatch.setattr("tools.report.curves", lambda *_: None)
    line = one_line(
        train.main, options(world, disk / "run", epochs=3), capfd, "No space left on device"
    )
    assert str(disk) in line and not list(disk.rglob("*.tmp"))
    if (disk / "run" / "last.pt").exists():
        assert read_checkpoint(disk / "run" / "last.pt")["epoch"] >= 1
    if (disk / "run" / "config.json").exists():  # room was made: it goes on
        shutil.copytree(disk / "run", tmp_path / "moved")
        assert train.main(["--resume", str(tmp_path / "moved")]) == 0
        run(world, tmp_path / "never-full", epochs=3)
        same_run(tmp_path / "never-full", tmp_path / "moved")


@linux
def test_a_full_disk_under_the_feature_cache_is_told_before_it_is_filled(
    world, mounted, tmp_path, capfd
):
    disk = mounted("size=8k")
    one_line(
        train.main,
        options(world, tmp_path / "run", cache_dir=disk, batch=8, cache_features=3, augment="flip"),
        capfd,
        "feature cache needs",
        "--cache-dir",
    )
    assert not (tmp_path / "run").exists()


@linux
def test_a_read_only_folder_is_told_before_anything_is_decoded(world, mounted, capfd, monkeypatch):
    disk = mounted("size=1m,ro")
    monkeypatch.setattr(data, "load", None)  # not reached
    one_line(train.main, options(world, disk / "run"), capfd, disk, "choose another --out")


@linux
def test_a_run_folder_that_became_read_only_is_refused_for_writing_and_read(
    world, mounted, tmp_path, capfd
):
    run(world, tmp_path / "run", epochs=1)
    disk = mounted("size=8m")
    shutil.copytree(tmp_path / "run", disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    photos = [disk / "run", "--image", world / "scenes" / "val2014"]
    one_line(train.main, ["--resume", disk / "run"], capfd, "Read-only file system", disk)
    one_line(evaluation.main, photos, capfd, "Read-only file system", "check path")
    status, out, err = command(evaluation.main, [*photos, "--pictures", 0], capfd)
    assert status == 0 and len(out) == 13 and not err
    assert command(evaluation.main, [*photos, "--out", tmp_path / "pictures"], capfd)[0] == 0


def test_a_loader_process_that_dies_ends_in_one_line(world, tmp_path, capfd, monkeypatch):
    train_one_epoch = train.train_one_epoch

    def with_dead_workers(state, *args):
        for process in multiprocessing.active_children() if state.epoch == 1 else ():
            process.kill()
        return train_one_epoch(state, *args)

    monkeypatch.setattr(train, "train_one_epoch", with_dead_workers)
    one_line(
        train.main,
        options(world, tmp_path / "run", workers=2, cache_features=0),
        capfd,
        "--workers",
    )
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("where", ("images", "weights"))
def test_nan_stops_the_run_prints_the_terms_and_leaves_the_last_good_epoch(
    world, tmp_path, capfd, monkeypatch, where
):
    monkeypatch.setattr("tools.report.curves", lambda *_: None)
    with monkeypatch.context() as patch:
        if where == "images":
            step, calls = train.training_step, []

            def spoilt(model, memory, encoder, cfg, f, *rest):
                calls.append(1)
                return step(
                    model, memory, encoder, cfg, f * (float("nan") if len(calls) > 6 else 1), *rest
                )

            patch.setattr(train, "training_step", spoilt)
            words = [
                "epoch 3",
                "the loss or a weight is not finite after step 1 of 3",
                "L_r nan",
                "L_q nan",
                "2 epochs are kept",
            ]
        else:  # a gradient overflows in the very last step
            total, calls = train.losses.total, []

            def overflow(*arguments):
                calls.append(1)
                return total(*arguments) if len(calls) < 9 else _Overflow.apply(total(*arguments))

            patch.setattr(train.losses, "total", overflow)
            words = ["epoch 3", "not finite after step 3 of 3", "L_r ", "2 epochs are kept"]
        line = one_line(train.main, options(world, tmp_path / "run", epochs=4), capfd, *words)
    assert "--lr" in line
    state = read_checkpoint(tmp_path / "run" / "last.pt")
    assert state["epoch"] == 2 and all(v.isfinite().all() for v in state["model"].values())
    # the cause is gone: it goes on as if nothing was
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    run(world, tmp_path / "never", epochs=4)
    same_run(tmp_path / "never", tmp_path / "run")


class _Overflow(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@linux
def test_two_writers_of_one_folder(world, tmp_path, capfd):
    first = start("train.py", *options(world, tmp_path / "run", epochs=500))
    while not (tmp_path / "run" / "last.pt").exists():
        assert first.poll() is None, first.communicate()
    one_line(train.main, ["--resume", tmp_path / "run"], capfd, "another process is writing")
    one_line(train.main, options(world, tmp_path / "run"), capfd, "holds a run already")
    first.send_signal(signal.SIGSTOP)  # reading meanwhile is fine
    assert command(evaluation.main, [tmp_path / "run", "--checkpoint", "last"], capfd)[0] == 0
    first.kill()
    first.communicate()
    FileLock(tmp_path / "run" / ".lock").acquire(timeout=10)  # the lock went with the process


def test_a_reader_sees_whole_checkpoints_while_they_are_written(world, tmp_path):
    run(world, tmp_path / "run", epochs=1)
    whole = (tmp_path / "run" / "last.pt").read_bytes()
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from support.checkpoint "
            "import write_atomically\n"
            "file = pathlib.Path(sys.argv[1]); content = file.read_bytes()\n"
            "for _ in range(200): write_atomically(file, content)\n",
            str(tmp_path / "run" / "last.pt"),
        ],
        cwd=ROOT,
    )
    reads = 0
    while writer.poll() is None:
        assert (tmp_path / "run" / "last.pt").read_bytes() == whole
        reads += 1
    assert writer.returncode == 0 and reads > 10


@linux
def test_a_run_is_evaluated_from_a_read_only_folder(world, mounted, tmp_path, capfd, monkeypatch):
    """Where features cannot be kept they are computed."""
    monkeypatch.chdir(tmp_path)
    run(world, tmp_path / "run", epochs=1, cache_dir="features")
    monkeypatch.chdir(mounted("size=1m,ro"))
    assert command(evaluation.main, [tmp_path / "run"], capfd)[0] == 0
    assert command(evaluation.main, [tmp_path / "run", "--suggest", tmp_path / "s.csv"],
                   capfd)[0] == 0


@pytest.mark.parametrize("error", (OSError(37, "No locks available"), NotImplementedError("flock")))
def test_a_disk_that_cannot_lock_is_one_line(world, tmp_path, capfd, monkeypatch, error):
    class Lock:
        def __init__(self, _, is_singleton):
            pass

        def acquire(self, timeout):
            raise error

    monkeypatch.setattr("support.checkpoint.FileLock", Lock)
    one_line(train.main, options(world, tmp_path / "run"), capfd, "cannot be locked")
    lock = mock.Mock(**{"return_value.acquire.side_effect": error})
    monkeypatch.setattr("datasets.scenes.FileLock", lock)
    one_line(scenes.main, ["--root", tmp_path / "new"], capfd, "cannot be locked", "another root")


@linux
@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_a_table_that_is_stopped_tells_of_no_semaphores(world, tmp_path, number):
    words = options(world, tmp_path, epochs=200, ratio=None)
    process = start("-m", "paper.reproduce", "--table", "3", "--jobs", "2", "--seeds", "1", *words)
    runs = tmp_path / "runs"
    for _ in range(600):
        if len(list(runs.glob("*/last.pt"))) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.split() == (
        "stopped; the same command goes on from here".split()), err


@pytest.mark.parametrize("error", (RuntimeError, OSError))  # no thread, no process
def test_no_thread_is_left_while_scenes_are_drawn(tmp_path, monkeypatch, error):
    """The processes that were started would wait without end, and be waited for."""
    from concurrent.futures import ProcessPoolExecutor
    from datasets import scenes

    real = ProcessPoolExecutor.map

    def start_and_fail(pool, *arguments, **keywords):
        real(pool, *arguments, **keywords)
        raise error("can't start new thread")

    monkeypatch.setattr(ProcessPoolExecutor, "map", start_and_fail)
    with pytest.raises(error, match="new thread"):
        scenes.write(tmp_path / "s", train=200, val=1, test=1, size=64, workers=2)
    assert not multiprocessing.active_children() and not list(tmp_path.glob("s*"))


@linux
def test_a_worker_destroys_nothing_of_its_parents(tmp_path):
    """A CUDA graph among the parent's garbage, collected in a forked process, would end it."""
    import gc
    from concurrent.futures import ProcessPoolExecutor
    from support.cli import end_with_parent

    class Told:
        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        told = Told()
        told.itself = told
        del told
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(1, fork, initializer=end_with_parent) as pool:
            pool.submit(gc.collect).result()
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


WORKERS = """
import multiprocessing, os, signal, sys, time
sys.path.insert(0, sys.argv[3])
from support.cli import end_with_parent

def work(ready, late):
    if late:
        ready.send(os.getpid())
        time.sleep(1)  # meanwhile the parent is killed
    end_with_parent()
    time.sleep(1)  # longer than it takes to see that nobody is there
    if not late:
        ready.send(os.getpid())
    time.sleep(100)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    told, ready = multiprocessing.Pipe(False)
    for _ in range(2):
        multiprocessing.Process(target=work, args=(ready, sys.argv[2] == "late")).start()
    ready.close()
    print(len({told.recv(), told.recv()}), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@linux
@pytest.mark.parametrize("when", ("early", "late"))
@pytest.mark.parametrize("method", ("fork", "forkserver", "spawn"))
def test_workers_live_as_long_as_their_parent(method, when, tmp_path):
    """forkserver is Python 3.14's default: there the server, not the run, is a worker's parent
    process, and each one ended at once. late: the run is killed while they start; they took their
    new parent, init, for the one that they wait for."""
    (tmp_path / "pool.py").write_text(WORKERS)
    done = subprocess.run([sys.executable, tmp_path / "pool.py", method, when, ROOT], timeout=50,
                          capture_output=True, text=True)  # returns when all have closed stdout
    assert done.stdout == "2\n" and done.returncode == -signal.SIGKILL, done.stderr


def test_a_stop_that_came_in_a_fork_ends_the_drawing(tmp_path, monkeypatch):
    from datasets import scenes

    monkeypatch.setattr(scenes.stop, "asked", True)
    with pytest.raises(KeyboardInterrupt):
        scenes.write(tmp_path / "s", train=200, val=1, test=1, size=64, workers=1)
    assert not list(tmp_path.glob("s*"))


def test_commands_run_in_a_thread(world, tmp_path):
    """Where no signal can be heard: a server's worker, a notebook's background job."""
    statuses = []

    def work():
        statuses.append(train.main(options(world, tmp_path / "run", epochs=1)))
        statuses.append(evaluation.main([str(tmp_path / "run")]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert statuses == [0, 0]
