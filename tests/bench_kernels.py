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
from types import SimpleNamespace

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


def write(line):
    rows = {}
    if CSV.exists():
        with open(CSV, newline="") as file:
            rows = {tuple(r[k] for k in KEY): r for r in csv.DictReader(file)}
    line |= {"torch": torch.__version__, "triton": kernels.dispatch.triton.__version__}
    rows[tuple(str(line[k]) for k in KEY)] = line
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
    """(p20, p50, p80) in us of the GPU, the L2 cache flushed before each."""
    bench = kernels.dispatch.triton.testing.do_bench
    return [1e3 * t for t in bench(fn, quantiles=[0.2, 0.5, 0.8])]


def by_the_clock(fn, calls=50):
    """(p20, p50, p80) in us of fn with its launches, until the GPU has done it."""
    took = []
    for _ in range(3 + calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        took.append(1e6 * (time.perf_counter() - start))
    return torch.tensor(took[3:]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()


@functools.cache
def bandwidth():
    """Bytes a microsecond of a large copy of random numbers."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * 4 * x.numel() / times(lambda: y.copy_(x))[1]


def row(kernel, what, shape, dtype, provider, took, floor=None):
    """Writes one line of measured.csv and prints it."""
    p20, p50, p80 = (f"{t:.1f}" for t in took)
    device = torch.cuda.get_device_name()
    write(dict(zip(KEY, (kernel, what, shape, dtype, provider, device)))
          | dict(p20_us=p20, p50_us=p50, p80_us=p80, floor_us=floor and f"{floor:.1f}"))
    print(f"\n{kernel}, {what}, {shape} {dtype} {provider}: {p50} us"
          + (f", floor {floor:.1f}" if floor else ""))


def bench(kernel, what, shape, dtype, provider, fn, moved):
    row(kernel, what, shape, str(dtype)[6:], provider, times(captured(fn)), moved / bandwidth())


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
    if dtype == torch.float32 and provider == "triton":
        pytest.skip("float32 regions take the reference")
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
    """Eager waits for the host and cannot be captured: both are timed by the clock."""
    B, C, N, D = SHAPES[shape]
    energy = torch.randn(B, N, C, device="cuda", dtype=torch.bfloat16).mT
    f = torch.randn(B, N, D, device="cuda", dtype=torch.bfloat16)
    labels = torch.zeros(B * C, dtype=torch.int8, device="cuda")
    labels[::277] = 1  # 2.9 of 80 present, 10 % of them known
    labels = labels.view(B, C)
    extract = provide(provider, kernels.topk_prototypes, topk_prototypes_reference)
    bank = torch.zeros(C, L, D, device="cuda")
    cursor = torch.zeros(C, dtype=torch.int64, device="cuda")
    expected, cursor_too = bank.clone(), cursor.clone()
    extract(energy, f, labels, bank, cursor, K)
    topk_prototypes_reference(energy, f, labels, expected, cursor_too, K)
    agree([bank, cursor], [expected, cursor_too], torch.float32)
    row("topk_prototypes", "forward, by the clock", shape, "bfloat16", provider,
        by_the_clock(lambda: extract(energy, f, labels, bank, cursor, K)))
    if provider == "triton":
        row("topk_prototypes", "forward", shape, "bfloat16", provider,
            times(captured(lambda: extract(energy, f, labels, bank, cursor, K))))


@gpu
@pytest.mark.parametrize("provider", ("eager", "triton", "as train.py"))
@pytest.mark.parametrize("source", ("cached", "computed"))
def test_step(source, provider):
    """A training step of stage two with its update, by the clock, at the paper's size: RN101, 448
    pixels, B 128, C 80; its features come from the cache or from the backbone. train.py replays the
    texts as a graph and, for many images, compiles the encoder."""
    from bench_step import make_case

    import train
    from config import Config
    from support.replay import replayed
    kernels.use("reference" if provider == "eager" else "triton")
    B, C, N, D = SHAPES["paper"]
    case = make_case("RN101", 448, C, B, L=L)
    model, memory, encoder = case.model, case.memory, case.folded
    images, encode_dense = case.images.to(memory_format=torch.channels_last), encoder.encode_dense
    if provider == "as train.py":
        model.prompts.forward = replayed(model.prompts, encoder, torch.bfloat16)
        encode_dense = torch.compile(encode_dense)
    stored = torch.randn(B, N, D, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    state = SimpleNamespace(optimizer=optimizer, scaler=torch.amp.GradScaler(enabled=False),
                            scheduler=SimpleNamespace(step=lambda: None))

    def step():
        f = stored
        if source == "computed":
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                f = encode_dense(images).to(torch.bfloat16)
        loss, *_ = train.training_step(model, memory, encoder, Config(), f, None, case.labels, True,
                                       torch.bfloat16)
        train.update(state, loss, Config())

    torch.cuda.reset_peak_memory_stats()
    took = by_the_clock(step, 20)
    row(f"step, features {source}", "forward, backward, update", "paper", "bfloat16", provider,
        took)
    print(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


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
