"""Two processes that share every batch give what one process gives: losses, memory, thresholds,
scores; only one of them writes.

The two run in processes of their own (this file, called with a rank), over gloo on the CPU. Adam
divides by the size of the gradient, so it turns the rounding of a sum in another order into steps
of its own: at scenes' learning rate float32 drifts apart within a dozen steps. The same in float64
does not, which shows that rounding is all there is.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pytest
import torch
import torch.distributed as dist

from clip import features
import eval
import train
from support import UserError
from small_world import make, options, start, world
from tools.build import load_data

# 4 steps an epoch, the last of a single image. Dropout draws other numbers on every rank, so
# equality is asked without it.
UNEVEN = dict(train_images=19, batch=6, epochs=6, dropout=0.0)
LR = {"float32": 1e-4, "float64": 1e-3}


@contextlib.contextmanager
def in_float64():
    """All that follows the image encoder in double precision."""
    batches, load = features.FeatureLoader.batches, train.clip.load

    def loaded(*args, **kw):
        model = load(*args, **kw).double()
        model.visual.to(torch.float32)
        return model

    def doubled(feed, *args, **kw):
        return (
            (index, f.double(), x if x is None else x.double())
            for index, f, x in batches(feed, *args, **kw)
        )

    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(features.FeatureLoader, "batches", doubled),
        mock.patch.object(train.clip, "load", loaded),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def job(folder, rank, ranks, dtype):
    """Trains, and saves what every step gave as {ranks}-{rank}.pt."""
    torch.set_num_threads(1)
    cfg, _ = train.parse(options(folder, folder / f"run-{ranks}", **UNEVEN, lr=LR[dtype]))
    with in_float64() if dtype == "float64" else contextlib.nullcontext():
        record(cfg, folder, f"{ranks}-{rank}.pt")


def record(cfg, folder, name):
    training, val, test = load_data(cfg)
    test = dataclasses.replace(
        test,
        paths=test.paths[:11],
        labels=test.labels[:11],
        truth=test.truth[:11],
        # 6 and 5: one image more on rank 0
        boxes=test.boxes and test.boxes[:11],
    )
    steps, step, states, scores, whole = [], train.training_step, [], {}, eval.score_split

    def recorded(*args):
        loss, terms, pseudo = step(*args)
        steps.append({k: float(v) for k, v in (terms | {"L": loss}).items()})
        return loss, terms, pseudo

    def scored(*args):  # val in the first epoch, all else after it: test comes last
        found, maps = whole(*args)
        scores["test" if "val" in scores else "val"] = found["region"]
        return found, maps

    with (
        mock.patch.object(train, "training_step", recorded),
        mock.patch.object(eval, "score_split", scored),
        mock.patch("tools.report.curves"),
    ):
        train.train(
            cfg, splits=(training, val, test), on_epoch=lambda state, line: states.append(state)
        )
    state = states[-1]
    torch.save(
        dict(
            terms=steps,
            memory=state.memory.state_dict(),
            model=state.model.state_dict(),
            scores=scores,
            history=state.history,
        ),
        folder / name,
    )


@pytest.fixture(scope="module", params=LR)
def results(request, tmp_path_factory):
    """(one process, rank 0 of two, rank 1 of two), and the folder."""
    folder = make(tmp_path_factory.mktemp("ranks"))
    job(folder, 0, 1, request.param)  # also fills the cache that all of them read
    processes = [start(__file__, folder, rank, 2, request.param) for rank in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
    return [
        torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    ], folder


def test_losses_of_20_steps_agree(results):
    one, *two = results[0]
    bound = 1e-5 if one["memory"]["bank"].dtype == torch.float32 else 1e-10
    assert len(one["terms"]) == 24 and "L_NCE" in one["terms"][-1]
    for rank in two:
        for i, (a, b) in enumerate(zip(one["terms"][:20], rank["terms"])):
            assert a.keys() == b.keys()
            for k in a:
                assert abs(a[k] - b[k]) <= bound * max(1, abs(a[k])), (
                    f"step {i}: {k} is {b[k]!r} on two processes, {a[k]!r} on one"
                )


def test_memory_is_the_same_everywhere(results):
    one, *two = (r["memory"] for r in results[0])
    for rank in two:
        assert torch.equal(one["bank"], rank["bank"]) and torch.equal(one["cursor"], rank["cursor"])
        for k in ("theta", "text_prototypes"):
            assert torch.equal(rank[k].isnan(), one[k].isnan())
            assert torch.allclose(rank[k], one[k], atol=1e-5, equal_nan=True), k
    for k in one:  # and bit for bit between the two
        assert torch.equal(two[0][k].nan_to_num(7), two[1][k].nan_to_num(7)), k
    for k, v in results[0][1]["model"].items():
        assert torch.equal(v, results[0][2]["model"][k]), k


def test_every_image_is_scored_once(results):
    one, *two = (r["scores"] for r in results[0])
    assert len(one["test"]) == 11 and len(one["val"]) % 6 == 0
    for rank in two:
        for split in one:
            assert torch.allclose(rank[split].double(), one[split].double(), atol=1e-4), split
    clean = lambda history: [
        {k: v for k, v in line.items() if k in ("stage", "pseudo_pos", "pseudo_neg")}
        for line in history
    ]
    # padding is not counted
    assert clean(results[0][0]["history"]) == clean(results[0][1]["history"])


def test_one_rank_writes(results):
    folder = results[1]
    assert sorted(p.name for p in folder.glob("run-2*")) == ["run-2"]
    lines = [
        json.loads(line) for line in (folder / "run-2" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in lines] == list(range(1, 7)) and {
        "config.json",
        "last.pt",
    } <= {p.name for p in (folder / "run-2").iterdir()}


def test_a_batch_that_does_not_divide_is_refused(world, tmp_path):
    cfg, _ = train.parse(options(world, tmp_path / "run", batch=5))
    with mock.patch.multiple(
        dist, is_initialized=lambda: True, get_rank=lambda: 0, get_world_size=lambda: 2
    ):
        with pytest.raises(UserError, match="--batch 5 does not divide among 2"):
            train.train(cfg)


def test_a_broken_photo_is_one_line_of_each_process(world, tmp_path):
    photos = shutil.copytree(world / "scenes" / "train2014", tmp_path / "photos")
    files = sorted(photos.iterdir())
    files[5].write_bytes(files[5].read_bytes()[:300])
    sheet = tmp_path / "labels.csv"
    sheet.write_text("\n".join(["image,sun,cup", *(f"photos/{p.name},1,0" for p in files)]))
    words = options(world, tmp_path / "run", data=sheet, root=None, ratio=None, val=0, batch=24,
                    cache_features=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = []
    for rank in "01":
        where = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=port)
        with mock.patch.dict(os.environ, where):
            both.append(start("train.py", *words))
    told = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], told
    lines = sorted(line for text in told for line in text.splitlines() if "[Gloo]" not in line)
    assert len(lines) == 2 and files[5].name in lines[0] and "another process" in lines[1], told


if __name__ == "__main__":
    folder, rank, ranks, dtype = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    job(folder, rank, ranks, dtype)
    dist.destroy_process_group()
