"""Cost as the work grows: categories, locations, queue length, images. Time and peak memory.

    python tests/bench_scale.py                 runs/bench_scale.png and runs/bench_scale.csv
    python tests/bench_scale.py --axis cached   one axis: C, N, L, images or cached
    python tests/bench_scale.py --large         C = 2000, B 128, N 196, D 512, L 64, all labels
                                                known: does it train in 16 GB?

C, N, L: train.py's own step on random features; the backbone's cost depends on none of them but N,
and is linear in it. images: the order of an epoch and the labels of its first 50 batches. cached:
a feature cache is found again and read for a whole epoch; its images are blank, its features tiny,
so what is left is the work of keeping order, the file's name (a hash of all images' paths, sizes
and times) among it. `filling` prints what a first run takes beside the backbone.

The exponent is the slope of log(cost) over log(size) between the last two sizes: 1 is linear. Only
C grows faster: Eq. 13 compares C anchors with C * L prototypes, which is quadratic and outweighs
all else above some 1000 categories, where memory also makes its parts be computed twice.
"""
import argparse
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_step import DEVICE, interleaved, peak, random_clip, write_rows

import data
from clip.features import FeatureLoader
from config import Config
from memory import MemoryBank
from support.checkpoint import State
from train import training_step, update
from trm import TRM, Prompts

SIZES = {"C": (20, 80, 320, 1000, 2000), "N": (49, 196, 784, 3136), "L": (16, 64, 256, 1024, 4096),
         "images": (1_000, 10_000, 100_000, 1_000_000),
         "cached": (1_000, 10_000, 100_000, 1_000_000)}


def our_step(C=80, N=196, L=64, B=8, D=128, known=0.3, amp=None):
    """A function that trains one step of stage two on features (B, N, D) that stay the same."""
    encoder = random_clip("small", embed_dim=D)
    torch.manual_seed(1)
    model, memory = TRM(C, D, Prompts(encoder, ["dog"] * C)).to(DEVICE), MemoryBank(C, L, D)
    memory.bank.copy_(F.normalize(torch.randn(C, L, D), dim=-1))  # as in later epochs: full
    memory.cursor.fill_(L)
    memory.text_prototypes.copy_(F.normalize(torch.randn(C, D), dim=-1))
    truth = torch.where(torch.rand(B, C) < 0.05, 1, -1)
    labels = torch.where(torch.rand(B, C) < known, truth, 0) if known < 1 else torch.ones(B, C)
    labels = labels.to(torch.int8).to(DEVICE)
    f = torch.randn(B, N, D, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scheduler = SimpleNamespace(step=lambda: None)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    state = State(model, memory.to(DEVICE), optimizer, scheduler, scaler)
    cfg = Config()

    def step():
        loss, _, _ = training_step(model, state.memory, encoder, cfg, f, None, labels, True, amp)
        update(state, loss, cfg)
        return float(loss.detach())
    return step


class Blank(data.Images):
    """n images under the name of one real file, that cost nothing to decode."""

    def __init__(self, n):
        labels = np.zeros((n, 80), np.int8)
        super().__init__(data.Split("blank", [__file__] * n, ["dog"] * 80, labels), 32)
        self.image = torch.zeros(3, 4, 4)

    def __getitem__(self, key):
        return self.image, key[1]


class NoBackbone(SimpleNamespace):
    """What FeatureLoader asks of CLIP: one location, eight dimensions."""
    D, mean, std, sha256 = 8, (0, 0, 0), (1, 1, 1), "blank"

    def grid(self, H, W):
        return 1, 1

    def encode_dense(self, x):
        return x.new_zeros(len(x), 1, 8)

    def encode(self, x):
        return x.new_zeros(len(x), 8), self.encode_dense(x)


def fifty_steps(n):
    """The start of an epoch and its first fifty batches, whose labels are looked up."""
    loader = FeatureLoader(Blank(n), NoBackbone(), device=DEVICE, need_global=False)
    labels = torch.from_numpy(loader.split.labels).to(DEVICE)
    steps = loader.batches(1)
    for _ in range(min(50, n // loader.batch)):
        labels[next(steps)[0]].sum()
    steps.close()


def cached_epoch(n, folder):
    """A cache of n images: opened, and read once in an epoch's order."""
    loader = FeatureLoader(Blank(n), NoBackbone(), views=1, cache=folder, device=DEVICE)
    for _ in loader.batches(1):
        pass


def measure(axis, size, folder):
    """-> seconds, MiB"""
    if axis == "images":
        work = lambda: fifty_steps(size)
    elif axis == "cached":
        start = time.perf_counter()
        filling = peak(lambda: cached_epoch(size, folder))
        print(f"filling {size}: {time.perf_counter() - start:.1f} s, {filling:.0f} MiB", flush=True)
        work = lambda: cached_epoch(size, folder)
    else:
        work = our_step(**{axis: size})
    work()
    (seconds,) = interleaved([work], 2)
    return seconds, peak(work)


def run(axes=SIZES):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for axis, sizes in axes.items():
            for size in sizes:
                seconds, mib = measure(axis, size, folder)
                slope = float("nan")
                if size != sizes[0]:
                    before = rows[-1]
                    slope = math.log(seconds / before["seconds"]) / math.log(size / before["size"])
                rows.append(dict(axis=axis, size=size, device=DEVICE.type, seconds=seconds, MiB=mib,
                                 exponent=slope))
                print(f"{axis:>7} {size:>8}  {seconds:9.4f} s  {mib:8.0f} MiB  "
                      f"exponent {slope:5.2f}", flush=True)
    write_rows("bench_scale.csv", rows)
    draw(rows)
    return rows


def draw(rows):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(2, len(axes), figsize=(3 * len(axes), 5), squeeze=False,
                                  sharex="col")
    for column, axis in zip(panels.T, axes):
        mine = [row for row in rows if row["axis"] == axis]
        for panel, what in zip(column, ("seconds", "MiB")):
            x = np.array([row["size"] for row in mine], float)
            y = np.array([max(row[what], 1e-3) for row in mine], float)
            panel.loglog(x, y, "o-", label=axis)
            panel.loglog(x, y[-1] * x / x[-1], ":", color="grey", label="linear")
            panel.set(ylabel=what if axis == axes[0] else None)
            panel.grid(alpha=0.3)
        column[0].legend(fontsize=7)
        column[1].set(xlabel=axis)
    figure.tight_layout()
    figure.savefig(Path(__file__).resolve().parent.parent / "runs" / "bench_scale.png", dpi=110)
    plt.close(figure)


def large(C=2000, B=128):
    """Peak memory of a step with every place filled: Eq. 13's logits are (C, B*C + C*L)."""
    start = time.perf_counter()
    loss = our_step(C=C, N=196, L=64, B=B, D=512, known=1)()
    if DEVICE.type == "cpu":
        whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    else:
        whole = torch.cuda.max_memory_allocated() / 2**30
    print(f"C {C} B {B} N 196 D 512 L 64: L {loss:.4f}, peak {whole:.1f} GiB for the whole "
          f"process, {time.perf_counter() - start:.0f} s")


@pytest.mark.parametrize("axis", list(SIZES))
def test_scale(axis):
    rows = run({axis: SIZES[axis]})
    assert rows[-1]["exponent"] < (2.4 if axis == "C" else 1.35), rows[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--large", action="store_true", help="the memory of C = 2000")
    parser.add_argument("--classes", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--axis", choices=list(SIZES))
    args = parser.parse_args()
    if args.large:
        large(args.classes, args.batch)
    else:
        run({args.axis: SIZES[args.axis]} if args.axis else SIZES)
