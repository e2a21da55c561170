"""The first hour on a GPU, in one command: `python -m pytest -s tests/bench_kernels.py`.

For each kernel, size and type: outputs are checked against the reference, then a captured CUDA
graph is timed with the L2 cache flushed, eager torch, torch.compile and Triton in turn. Rows go to
kernels/measured.csv; a rerun replaces its rows. `floor` is the time to move the bytes that have to
move, at the bandwidth of a copy measured in the same run. What the compiler says of the kernels is
in kernels/compiled.csv, and on a CPU that is all there is to say.
"""
import csv
import functools
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, gpu

import kernels
from kernels.match import match_reference
from kernels.region_pool import region_pool_reference
from kernels.topk_prototypes import topk_prototypes_reference
from support import UserError

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "kernels" / "measured.csv"
KEY = ("kernel", "pass", "shape", "dtype", "provider", "device")
FIELDS = (*KEY, "p20_us", "p50_us", "p80_us", "floor_us", "torch", "triton")
SHAPES = {"paper": (128, 80, 196, 512), "vg200": (128, 200, 196, 512),
          "c1000": (32, 1000, 196, 512), "small": (16, 20, 64, 128)}  # (B, C, N, D)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROVIDERS = ("eager", "compile", "triton")
L, K = 64, 3  # queue length, prototypes an image
each = (pytest.mark.parametrize("provider", PROVIDERS),
        pytest.mark.parametrize("dtype", DTYPES, ids=str),
        pytest.mark.parametrize("shape", SHAPES))


def every(test):
    for mark in each:
        test = mark(test)
    return gpu(test)


def write(row):
    rows = {}
    if CSV.exists():
        with open(CSV, newline="") as file:
            rows = {tuple(r[k] for k in KEY): r for r in csv.DictReader(file)}
    row |= {"torch": torch.__version__, "triton": kernels.dispatch.triton.__version__}
    rows[tuple(str(row[k]) for k in KEY)] = row
    with open(CSV, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[k] for k in sorted(rows))


def captured(fn):
    """fn as a replayed CUDA graph: no Python, no launches one by one."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def times(fn):
    """(p20, p50, p80) in us, the L2 cache flushed before each."""
    bench = kernels.dispatch.triton.testing.do_bench
    return [1e3 * t for t in bench(fn, quantiles=[0.2, 0.5, 0.8])]


@functools.cache
def bandwidth():
    """Bytes a microsecond of a large copy."""
    x = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / times(lambda: y.copy_(x))[1]


def bench(kernel, what, shape, dtype, provider, fn, moved):
    p20, p50, p80 = times(captured(fn))
    row = dict(zip(KEY, (kernel, what, shape, str(dtype)[6:], provider,
                         torch.cuda.get_device_name())))
    floor = moved / bandwidth()
    write(row | dict(p20_us=f"{p20:.1f}", p50_us=f"{p50:.1f}", p80_us=f"{p80:.1f}",
                     floor_us=f"{floor:.1f}"))
    print(f"\n{kernel} {what} {shape} {str(dtype)[6:]} {provider}: {p50:.1f} us, floor {floor:.1f}")


def provide(provider, public, reference):
    kernels.use("triton" if provider == "triton" else "reference")
    torch._dynamo.reset()  # every shape is compiled for itself
    return {"eager": reference, "compile": torch.compile(reference, dynamic=False),
            "triton": public}[provider]


@pytest.fixture(autouse=True)
def restore():
    earlier = kernels.use("auto")
    yield
    kernels.use(earlier)


def agree(got, expected, dtype):
    """Rounded sums in another order: a few units of the type's precision."""
    for a, b in zip(got, expected):
        close = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b.double(), rtol=close,
                                   atol=close * float(b.double().abs().max()))


@every
def test_region_pool(shape, dtype, provider):
    B, C, N, D = SHAPES[shape]
    # CARL hands its energies over transposed
    energy = torch.randn(B, N, C, device="cuda", dtype=dtype).mT.requires_grad_()
    f = torch.randn(B, N, D, device="cuda", dtype=dtype)
    up = torch.randn(B, C, D, device="cuda", dtype=dtype)
    pool = provide(provider, kernels.region_pool, region_pool_reference)

    def step(pool=pool):
        out = pool(energy, f)
        return out, *torch.autograd.grad(out, energy, up)

    agree(step(), step(region_pool_reference), dtype)
    size = f.element_size()
    moved = (energy.numel() + f.numel() + up.numel()) * size
    bench("region_pool", "forward", shape, dtype, provider,
          lambda: pool(energy.detach(), f), moved)
    bench("region_pool", "forward and backward", shape, dtype, provider, step,
          2 * moved + energy.numel() * size)


@every
def test_match(shape, dtype, provider):
    B, C, _, D = SHAPES[shape]
    x = torch.randn(B, C, D, device="cuda", dtype=dtype, requires_grad=True)
    toward = F.normalize(torch.randn(C, D, device="cuda"), dim=-1).requires_grad_()
    up = torch.randn(B, C, device="cuda")
    match = provide(provider, kernels.match, match_reference)

    def step(match=match):
        out = match(x, toward, 50.0)
        return out, *torch.autograd.grad(out, (x, toward), up)

    agree(step(), step(match_reference), dtype)
    moved = x.numel() * x.element_size()
    bench("match", "forward", shape, dtype, provider,
          lambda: match(x.detach(), toward.detach(), 50.0), moved)
    bench("match", "forward and backward", shape, dtype, provider, step, 3 * moved)


@gpu
@pytest.mark.parametrize("provider", ("eager", "triton"))
@pytest.mark.parametrize("shape", SHAPES)
def test_topk_prototypes(shape, provider):
    """Eager waits for the host and cannot be captured, so both are timed with their launches."""
    B, C, N, D = SHAPES[shape]
    energy = torch.randn(B, C, N, device="cuda", dtype=torch.bfloat16)
    f = torch.randn(B, N, D, device="cuda", dtype=torch.bfloat16)
    labels = torch.zeros(B * C, dtype=torch.int8, device="cuda")
    labels[::277] = 1  # 2.9 of 80 present, 10 % of them known
    labels = labels.view(B, C)

    def run(extract):
        bank = torch.zeros(C, L, D, device="cuda")
        cursor = torch.zeros(C, dtype=torch.int64, device="cuda")
        extract(energy, f, labels, bank, cursor, K)
        return bank

    extract = provide(provider, kernels.topk_prototypes, topk_prototypes_reference)
    agree([run(extract)], [run(topk_prototypes_reference)], torch.float32)
    p20, p50, p80 = times(lambda: run(extract))
    write(dict(zip(KEY, ("topk_prototypes", "forward", shape, "bfloat16", provider,
                         torch.cuda.get_device_name())))
          | dict(p20_us=f"{p20:.1f}", p50_us=f"{p50:.1f}", p80_us=f"{p80:.1f}"))


@gpu
@pytest.mark.parametrize("path", ("reference", "triton"))
def test_step(path):
    """A cached training step, stage two, at the paper's size: RN101, 448 pixels, B 128, C 80."""
    import train
    from clip import CLIP
    from config import Config
    from memory import MemoryBank
    from trm import TRM, Prompts
    kernels.use(path)
    B, C, N, D = SHAPES["paper"]
    encoder = CLIP(512, 224, (3, 4, 23, 3), 64, None, 77, 514, 512).cuda().fold()
    model = TRM(C, D, Prompts(encoder, [chr(97 + c % 26) for c in range(C)])).cuda()
    memory = MemoryBank(C, L, D).cuda()
    memory.set_text_prototypes(model.prompts(encoder)[0].detach())
    f = torch.randn(B, N, D, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(-1, 2, (B, C), device="cuda").to(torch.int8)
    cfg = Config(kernels=path)

    def step():
        loss, *_ = train.training_step(model, memory, encoder, cfg, f, None, labels, True,
                                       torch.bfloat16)
        loss.backward()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    took = 1e6 * (time.perf_counter() - start) / 20
    write(dict(zip(KEY, ("cached step", "forward and backward", "paper", "bfloat16",
                         "triton" if path == "triton" else "eager",
                         torch.cuda.get_device_name())))
          | dict(p50_us=f"{took:.0f}"))
    print(f"\ncached step, {path}: {took / 1000:.2f} ms")


@pytest.mark.skipif(GPU, reason="a GPU measures")
def test_what_a_cpu_can_tell():
    """The compiler's table is all there is without a GPU; asking for Triton says so."""
    with open(ROOT / "kernels" / "compiled.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    spilled = [row for row in rows if int(row["spills"]) and row["arch"] != "sm_75"]
    print(f"\nno CUDA device: kernels/compiled.csv holds {len(rows)} compiled kernels, "
          f"{len(spilled)} of them spill from sm_80 on; nothing was timed")
    assert not spilled
    if not kernels.interpreted():
        with pytest.raises(UserError, match="no CUDA device"):
            kernels.use("triton")
