"""Cost as the work grows: categories, locations, queue length, images. Time and peak memory of a training step, drawn and kept.

    python tests/bench_scale.py            runs/bench_scale.png and runs/bench_scale.csv; exponents on the last line of each axis
    python tests/bench_scale.py --large    C = 2000, B 128, N 196, D 512, L 64, all labels known: does it train in 16 GB?

The step is train.py's own, on random features instead of a backbone's (the backbone's cost depends on none of these axes but
N, and is linear in it). The exponent is the slope of log(cost) over log(size) between the last two sizes: 1 is linear. Only
the product of Eq. 13, C anchors against C * L + positives samples, may grow faster with C than linearly.
"""
import argparse
import math
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clip import features
from bench_step import DEVICE, Version, interleaved, peak, random_clip, stages, write_rows
from memory import MemoryBank
from trm import TRM, Prompts

SIZES = {"C": (20, 80, 320, 1000, 2000), "N": (49, 196, 784, 3136), "L": (16, 64, 256, 1024, 4096),
         "images": (1_000, 10_000, 100_000, 1_000_000)}


def our_step(**sizes):
    """train.Run.step as a function without arguments."""
    return our_version(**sizes).step


def our_version(C=80, N=196, L=64, B=8, D=128, known=0.3, dtype=torch.float32):
    """A bench_step.Version that steps as train.py does, on features (B, N, D) that are random and stay the same."""
    clip = random_clip("small", embed_dim=D)
    torch.manual_seed(1)
    case = SimpleNamespace(clip=clip, images=None, model=TRM(C, D, Prompts(clip, ["dog"] * C)).to(DEVICE), memory=MemoryBank(C, L, D).to(DEVICE))
    case.memory.bank.copy_(F.normalize(torch.randn(C, L, D), dim=-1))
    case.memory.cursor.fill_(L)
    case.memory.T.copy_(F.normalize(torch.randn(C, D), dim=-1))
    truth = torch.where(torch.rand(B, C) < 0.05, 1, -1)
    case.labels = (torch.where(torch.rand(B, C) < known, truth, 0) if known < 1 else torch.ones(B, C)).to(torch.int8).to(DEVICE)
    f = torch.randn(B, N, D, device=DEVICE).to(dtype)
    parts = {}
    for _, change in stages(None):
        parts |= change
    return Version(parts | dict(image=lambda *_: f), case)


class Blank:
    """A million images that cost nothing: what is left is the work of keeping order."""

    def __init__(self, n):
        self.n, self.image = n, torch.zeros(3, 4, 4)

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return self.image, key[1]


def feed_of(n, batch=128):
    split = SimpleNamespace(paths=range(n), name="blank")
    clip = SimpleNamespace(grid=lambda *_: (1, 1), D=8, encode_dense=lambda x: x.new_zeros(len(x), 1, 8))
    feed = features.Features(split, clip, 32, batch=batch, device=DEVICE, whole=False)
    feed.images = Blank(n)
    return feed


def fifty_steps(feed):
    """The start of an epoch and its first fifty batches, whose labels are looked up."""
    labels = torch.zeros(len(feed), 80, dtype=torch.int8, device=DEVICE)
    steps = feed.batches(1)
    for _ in range(min(50, len(feed) // feed.batch)):
        index, _, _ = next(steps)
        labels[index].sum()
    steps.close()


def measure(axis, size):
    if axis == "images":
        feed = feed_of(size)
        work = lambda: fifty_steps(feed)
    else:
        work = our_step(**{axis: size})
    work()
    (t,) = interleaved([work], 2)
    return t, peak(work)


def run(axes=SIZES):
    rows = []
    for axis, sizes in axes.items():
        for size in sizes:
            t, mib = measure(axis, size)
            before = rows[-1] if rows and rows[-1]["axis"] == axis else None
            slope = math.log(t / before["seconds"]) / math.log(size / before["size"]) if before else float("nan")
            rows.append(dict(axis=axis, size=size, device=DEVICE.type, seconds=t, MiB=mib, exponent=slope))
            print(f"{axis:>7} {size:>8}  {t:9.4f} s  {mib:8.0f} MiB  exponent {slope:5.2f}", flush=True)
    write_rows("bench_scale.csv", rows)
    draw(rows)
    return rows


def draw(rows):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(2, len(axes), figsize=(3 * len(axes), 5), squeeze=False, sharex="col")
    for column, axis in zip(panels.T, axes):
        mine = [row for row in rows if row["axis"] == axis]
        for panel, what in zip(column, ("seconds", "MiB")):
            x = np.array([row["size"] for row in mine], float)
            y = np.array([max(row[what], 1e-3) for row in mine], float)
            panel.loglog(x, y, "o-", label="a step" if axis != "images" else "50 steps' order and labels")
            panel.loglog(x, y[-1] * x / x[-1], ":", color="grey", label="linear")
            panel.set(ylabel=what if axis == axes[0] else None)
            panel.grid(alpha=0.3)
        column[0].legend(fontsize=7)
        column[1].set(xlabel=axis)
    figure.tight_layout()
    figure.savefig(Path(__file__).resolve().parent.parent / "runs" / "bench_scale.png", dpi=110)
    plt.close(figure)


def large(C=2000, B=128):
    """Peak memory of a step with every place filled: the (C, B*C + C*L) logits of Eq. 13 as a GPU, too, would compute them."""
    start = time.perf_counter()
    step = our_step(C=C, N=196, L=64, B=B, D=512, known=1)
    terms = step()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if DEVICE.type == "cpu" else torch.cuda.max_memory_allocated() / 2**30
    print(f"C {C} B {B} N 196 D 512 L 64: L {float(terms['L']):.4f}, peak {whole:.1f} GiB for the whole process, {time.perf_counter() - start:.0f} s")
    return whole


def test_compile_and_bf16():
    """What could be switched on besides: torch.compile of the region module, bf16 products. At the demo's size, fifteen steps a turn."""
    demo = dict(C=24, N=64, B=64, L=64)
    versions = {"float32, as it is": our_version(**demo), "torch.compile of the region module": our_version(**demo),
                "bf16": our_version(**demo, dtype=torch.bfloat16)}
    versions["torch.compile of the region module"].model.carl.compile(dynamic=False)
    versions["bf16"].amp = torch.bfloat16
    times = interleaved([lambda v=v: [v.step() for _ in range(15)] for v in versions.values()], 5)
    rows = [dict(what=name, device=DEVICE.type, threads=torch.get_num_threads(), ms=1000 * t / 15, ratio=times[0] / t) for name, t in zip(versions, times)]
    print("\n" + "\n".join(f"{row['what']:36} {row['ms']:7.1f} ms/step, {row['ratio']:.2f} times" for row in rows))
    write_rows("bench_switches.csv", rows)


@pytest.mark.parametrize("axis", list(SIZES))
def test_scale(axis):
    rows = run({axis: SIZES[axis]})
    assert rows[-1]["exponent"] < (2.1 if axis == "C" else 1.25), rows[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--large", action="store_true", help="the memory of C = 2000 at the paper's sizes")
    parser.add_argument("--classes", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--axis", choices=list(SIZES))
    args = parser.parse_args()
    large(args.classes, args.batch) if args.large else run({args.axis: SIZES[args.axis]} if args.axis else SIZES)
