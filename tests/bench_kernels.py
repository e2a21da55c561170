"""Microbenchmarks of the kernels: `make bench` or `pytest -s tests/bench_kernels.py`. A rerun
replaces its rows.

kernels/benchmarks.csv keeps p20, p50 and p80 of the time, GB/s (the bytes that have to move over
p50), that as a share of a copy measured in the same run, peak MB (GPU), versions and commit; and
what the compiler says of each kernel. runs/kernels.png shows the medians. On a CPU the references
are timed, on one thread; Triton's interpreter is no rival.
"""

import csv
import functools
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import test_compile
import torch
import torch._functorch.config
import torch.nn.functional as F
from conftest import GPU, gpu

import kernels
from kernels.region_pool import region_match_reference, region_pool_reference
from kernels.topk_prototypes import topk_prototypes_reference

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "kernels" / "benchmarks.csv"
KEY = ("kernel", "provider", "pass", "shape", "dtype", "device")
FIELDS = KEY + (
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "gb_s",
    "copy_share",
    "peak_mb",
    "registers",
    "spills",
    "shared_bytes",
    "tensor_core",
    "torch",
    "triton",
    "commit",
)
SHAPES = {
    "paper": (128, 80, 196, 512),
    "vg200": (128, 200, 196, 512),
    "c1000": (32, 1000, 196, 512),
    "n784": (32, 80, 784, 512),
    "small": (16, 20, 64, 128),
}  # (B, C, N, D)
DEVICE = "cuda" if GPU else "cpu"
NAME = torch.cuda.get_device_name() if GPU else f"CPU {platform.machine()}, 1 thread"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32]
PROVIDERS = ("eager", "compile", "triton") if GPU else ("eager", "compile")
NOT_YET = "not yet measured on a GPU"
L, K = 64, 5  # queue length, prototypes an image


def write(row):
    rows = {}
    if CSV.exists():
        with open(CSV, newline="") as file:
            rows = {tuple(r[k] for k in KEY): r for r in csv.DictReader(file)}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    version = kernels.dispatch.triton.__version__ if kernels.dispatch.triton else ""
    row = (
        {k: "" for k in FIELDS}
        | row
        | {"torch": torch.__version__, "triton": version, "commit": commit.strip()}
    )
    rows[tuple(str(row[k]) for k in KEY)] = row
    with open(CSV, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[k] for k in sorted(rows))


def measure(fn):
    """(p20, p50, p80) in ms and peak MB; on a CPU about a second of runs, at least five."""
    fn()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = kernels.dispatch.triton.testing.do_bench(fn, quantiles=[0.2, 0.5, 0.8])
        return *times, (torch.cuda.max_memory_allocated() - before) / 1e6
    times, end = [], time.perf_counter() + 1
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    return *np.quantile(times, [0.2, 0.5, 0.8]), None


@functools.cache
def copy_bandwidth():
    x = torch.empty(2**28 if GPU else 2**26, dtype=torch.uint8, device=DEVICE).random_()
    y = torch.empty_like(x)
    return 2 * x.numel() / measure(lambda: y.copy_(x))[1] / 1e6  # GB/s


def bench(kernel, provider, what, shape, dtype, fn, moved=None):
    try:
        p20, p50, p80, peak = measure(fn)
    except Exception as error:
        if provider != "compile":
            raise
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    row = dict(zip(KEY, (kernel, provider, what, shape, str(dtype)[6:], NAME)))
    row |= {"p20_ms": f"{p20:.4g}", "p50_ms": f"{p50:.4g}", "p80_ms": f"{p80:.4g}"}
    if moved:
        row |= {
            "gb_s": f"{moved / p50 / 1e6:.4g}",
            "copy_share": f"{moved / p50 / 1e6 / copy_bandwidth():.3f}",
        }
    write(row | ({"peak_mb": f"{peak:.4g}"} if peak is not None else {}))
    print(f"\n{kernel} {what} {shape} {provider}: {p50:.4g} ms", row.get("copy_share", ""))
    return p50


def inputs(shape, dtype):
    B, C, N, D = SHAPES[shape]
    g = F.normalize(torch.randn(2, C, D, device=DEVICE), dim=-1)
    return (
        torch.randn(B, C, N, device=DEVICE, dtype=dtype),
        torch.randn(B, N, D, device=DEVICE, dtype=dtype),
        *g,
    )


def provide(provider, public, reference):
    kernels.use("triton" if provider == "triton" else "reference")
    torch._dynamo.reset()  # every shape is compiled for itself
    return {
        "eager": reference,
        "compile": torch.compile(reference, dynamic=False),
        "triton": public,
    }[provider]


@pytest.fixture(autouse=True)
def restore():
    earlier, threads = kernels.use("auto"), torch.get_num_threads()
    torch.set_num_threads(1)  # another program on a second core would stall every step
    # a compiled backward may then run again and again
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch.set_num_threads(threads)
    kernels.use(earlier)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_region_pool(shape, dtype, provider):
    energy, f, _, _ = inputs(shape, dtype)
    pool = provide(provider, kernels.region_pool, region_pool_reference)
    out, size = (
        torch.randn(*energy.shape[:2], f.shape[2], device=DEVICE, dtype=dtype),
        f.element_size(),
    )
    forward = (energy.numel() + f.numel() + out.numel()) * size
    backward = forward + energy.numel() * size  # dF^r in place of F^r, and the gradient of energy
    bench("region_pool", provider, "forward", shape, dtype, lambda: pool(energy, f), forward)
    energy.requires_grad_()
    graph = pool(energy, f)
    bench(
        "region_pool",
        provider,
        "backward",
        shape,
        dtype,
        lambda: torch.autograd.grad(graph, energy, out, retain_graph=True),
        backward,
    )
    bench(
        "region_pool",
        provider,
        "both",
        shape,
        dtype,
        lambda: torch.autograd.grad(pool(energy, f), energy, out),
        forward + backward,
    )


@pytest.mark.parametrize("provider", PROVIDERS + ("two cosines",))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_region_match(shape, dtype, provider):
    energy, f, g_pos, g_neg = inputs(shape, dtype)
    moved = (energy.numel() + f.numel()) * f.element_size() + 2 * g_pos.numel() * 4

    def two_cosines():  # Eq. 1 as printed, F^r kept
        regions = region_pool_reference(energy, f)
        return 50 * (
            F.cosine_similarity(regions, g_pos, dim=-1)
            - F.cosine_similarity(regions, g_neg, dim=-1)
        )

    run = two_cosines
    if provider != "two cosines":
        match = provide(
            provider, lambda *args: kernels.region_match(*args, 50.0), region_match_reference
        )
        run = lambda: match(energy, f, g_pos, g_neg)  # noqa: E731
    bench("region_match", provider, "forward", shape, dtype, run, moved)


def one_by_one(energy, f, labels, bank, cursor, k):
    """Eq. 7 as one would write it down first: a loop over the known positives."""
    for c, b in (labels == 1).t().nonzero().tolist():
        n = energy[b, c].topk(min(k, energy.shape[2])).indices
        slot = (cursor[c] + torch.arange(len(n), device=n.device)) % bank.shape[1]
        bank[c, slot] = F.normalize(f[b, n].float(), dim=-1)
        cursor[c] += len(n)


@pytest.mark.parametrize("provider", ("one by one", "eager") + (("triton",) if GPU else ()))
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_prototypes(shape, provider):
    energy, f, _, _ = inputs(shape, DTYPES[0])
    B, C, _, D = SHAPES[shape]
    labels = torch.zeros(B * C, dtype=torch.int8, device=DEVICE)
    labels[::277] = 1  # 2.9 of 80 present, 10 % of them known
    labels = labels.view(B, C)
    bank, cursor = (
        torch.zeros(C, L, D, device=DEVICE),
        torch.zeros(C, dtype=torch.int64, device=DEVICE),
    )
    kernels.use("triton" if provider == "triton" else "reference")
    run = {
        "one by one": one_by_one,
        "eager": topk_prototypes_reference,
        "triton": kernels.topk_prototypes,
    }[provider]
    bench(
        "topk_prototypes",
        provider,
        "forward",
        shape,
        DTYPES[0],
        lambda: run(energy, f, labels, bank, cursor, K),
    )


@pytest.mark.parametrize("provider", ["double sum", "mean prototype"])
def test_similarity(provider):
    """Eq. 8-9: the mean cosine of a region to all L prototypes of its class, pair by pair and as
    one dot product."""
    B, (_, C, _, D) = 8, SHAPES["paper"]  # the loop over pairs is too slow for 128
    regions = torch.randn(B, C, D, device=DEVICE)
    bank = F.normalize(torch.randn(C, L, D, device=DEVICE), dim=-1)

    def double_sum():
        return torch.stack(
            [
                torch.stack(
                    [F.cosine_similarity(regions[b, c], bank[c], dim=-1).mean() for c in range(C)]
                )
                for b in range(B)
            ]
        )

    def mean_prototype():
        return (F.normalize(regions, dim=-1) * bank.mean(1)).sum(-1)

    torch.testing.assert_close(double_sum(), mean_prototype(), rtol=1e-4, atol=1e-5)
    bench(
        "similarity (Eq. 8-9)",
        provider,
        "forward",
        f"B {B} C {C} L {L} D {D}",
        torch.float32,
        double_sum if provider == "double sum" else mean_prototype,
    )


def test_compiler():
    """The compiler's word on every kernel at the paper's N and D. Times of Triton kernels come from
    a GPU alone."""
    pytest.importorskip("triton", reason="triton is not installed")
    for r in test_compile.table():
        name, _, what = r["kernel"].partition(", ")
        write(
            {
                "kernel": {
                    "pool": "region_pool",
                    "match": "region_match",
                    "topk": "topk_prototypes",
                }[name],
                "provider": "compiler",
                "pass": what or "forward",
                "shape": f"C {r['C']} N 196 D 512",
                "dtype": r["dtype"],
                "device": r["arch"],
                "registers": r["registers"],
                "spills": r["spills"],
                "shared_bytes": r["shared"],
                "tensor_core": r["tensor_core"],
                "p20_ms": NOT_YET,
                "p50_ms": NOT_YET,
                "p80_ms": NOT_YET,
            }
        )


@gpu
def test_bars():
    """At the paper's size in bfloat16: 75 % of a copy, twice eager, never behind torch.compile;
    prototypes 5 x eager."""
    with open(CSV, newline="") as file:
        p = {
            (r["kernel"], r["provider"], r["pass"]): r
            for r in csv.DictReader(file)
            if r["device"] == NAME and r["shape"] == "paper" and r["dtype"] == "bfloat16"
        }

    def took(kernel, provider, what="forward"):
        return float(p[kernel, provider, what]["p50_ms"])

    assert float(p["region_pool", "triton", "forward"]["copy_share"]) >= 0.75
    assert took("region_pool", "eager") >= 2 * took("region_pool", "triton")
    assert took("topk_prototypes", "eager") >= 5 * took("topk_prototypes", "triton")
    for what in ("forward", "backward", "both"):
        assert took("region_pool", "triton", what) <= took("region_pool", "compile", what)


def test_plot():
    """runs/kernels.png from the rows of this device."""
    plt = pytest.importorskip("matplotlib.pyplot")
    with open(CSV, newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["device"] == NAME]
    bars = [f"{r['kernel']} {r['pass']} {r['shape']} {r['dtype']} - {r['provider']}" for r in rows]
    colours = [f"C{sorted({r['provider'] for r in rows}).index(r['provider'])}" for r in rows]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.2 * len(rows)))
    axes.barh(bars, [float(r["p50_ms"]) for r in rows], color=colours)
    axes.set(xscale="log", xlabel="p50, ms", title=NAME)
    axes.invert_yaxis()
    (ROOT / "runs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "runs" / "kernels.png", dpi=110, bbox_inches="tight")
    plt.close(figure)
