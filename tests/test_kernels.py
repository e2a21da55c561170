"""All kernels against float64 and the torch reference, in Triton's interpreter without a GPU and
natively with one.

Tolerance is derived: an element may be off by twice the reference's largest error in the same dtype
(it sums in another order) plus one unit in the last place.
"""

import itertools
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import gpu
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels.match import match_reference
from kernels.region_pool import grad_op, pool_op, region_pool_reference
from kernels.topk_prototypes import topk_op
from support import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1, 1),
    (3, 3, 20, 20),
    (2, 20, 196, 80),
    (1, 80, 81, 196),
    (2, 81, 80, 3),
    (1, 3, 1023, 81),
    (2, 1, 3, 1023),
    (1, 196, 20, 81),
    (1, 1023, 1, 20),
]  # (B, C, N, D)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def assert_close(name, got, reference, exact, terms=0.0):
    """terms: size of what cancels in a sum, whose float32 rounding stays."""
    assert got.dtype == reference.dtype and got.shape == exact.shape, (
        f"{name}: {got.dtype} {tuple(got.shape)}"
    )
    limits = torch.finfo(got.dtype)
    got, reference = got.detach().cpu().double(), reference.detach().cpu().double()
    allowed = 2 * (reference - exact).abs().max() + limits.eps * exact.abs().clamp(min=limits.tiny)
    allowed = allowed + 4 * torch.finfo(torch.float32).eps * terms  # some four roundings each
    excess = (got - exact).abs() - allowed
    wrong = ~(excess <= 0)  # NaN is wrong too
    if wrong.any():
        worst = int(excess.nan_to_num(torch.inf).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
        pytest.fail(
            f"{name}: {int(wrong.sum())} of {got.numel()} elements off, worst at {index}: "
            f"kernel {got[index]:.9g}, float64 {exact[index]:.9g}, allowed "
            f"{allowed[index]:.3g}"
        )


def inputs(shape, dtype, device="cpu", spread=3.0):
    B, C, N, D = shape
    generator = torch.Generator().manual_seed(B + C + N + D)
    energy = (spread * torch.randn(B, C, N, generator=generator)).to(device, dtype)
    f = torch.randn(B, N, D, generator=generator).to(device, dtype)
    return energy, f, generator


@pytest.fixture
def launched(triton_path, monkeypatch):
    """The names of the Triton kernels that were launched, in order."""
    names = []
    for module in ("kernels.region_pool", "kernels.match", "kernels.topk_prototypes"):
        for name, kernel in vars(sys.modules[module]).items():
            if name.endswith("_kernel"):

                def run(*args, _name=name, _run=kernel.run, **kwargs):
                    names.append(_name)
                    return _run(*args, **kwargs)

                monkeypatch.setattr(kernel, "run", run)
    return names


# ---- region_pool, match


@each_dtype
@each_shape
def test_region_pool(shape, dtype, triton_path, launched):
    # float32 sums show the smallest slip; users get the reference for it, so the interpreter alone
    single = dtype == torch.float32
    if single and triton_path == "cuda":
        pytest.skip("no GPU runs this kernel on float32")
    energy, f, generator = inputs(shape, dtype, triton_path)
    upstream = torch.randn(shape[0], shape[1], shape[3], generator=generator).to(triton_path, dtype)
    results = []
    for pool, to in (
        (pool_op if single else kernels.region_pool, dtype),
        (region_pool_reference, dtype),
        (region_pool_reference, torch.float64),
    ):
        e, x = (
            t.to("cpu" if to == torch.float64 else triton_path, to).requires_grad_()
            for t in (energy, f)
        )
        out = pool(e, x)
        results.append((out, *torch.autograd.grad(out, (e, x), upstream.to(out))))
    assert launched == ["pool_kernel", "grad_kernel", "pool_kernel"]
    for name, got, reference, exact in zip(("F^r", "d energy", "d f"), *results):
        assert_close(name, got, reference, exact.detach())


@pytest.mark.parametrize("wanted, kernel", [("energy", "grad_kernel"), ("f", "pool_kernel")])
def test_only_the_gradients_that_are_asked_for(wanted, kernel, triton_path, launched):
    energy, f, _ = inputs((2, 3, 20, 8), torch.bfloat16, triton_path)
    kernels.region_pool(
        energy.requires_grad_(wanted == "energy"), f.requires_grad_(wanted == "f")
    ).sum().backward()
    assert launched == ["pool_kernel", kernel] and (energy.grad is None) == (wanted == "f")


@each_dtype
@pytest.mark.parametrize("shape", [  # the interpreter walks the categories, 1023 take a minute
    *(shape for shape in SHAPES if shape[1] < 1000), (35, 2, 1, 130)  # more than a tile holds
], ids=str)
def test_match(shape, dtype, triton_path, launched):
    B, C, _, D = shape
    generator = torch.Generator().manual_seed(B + C + D)
    x = torch.randn(B, C, D, generator=generator).to(triton_path, dtype)
    difference = torch.randn(C, D, generator=generator).to(triton_path)
    upstream = torch.randn(B, C, generator=generator).to(triton_path)
    results = []
    for match, to in ((kernels.match, None), (match_reference, None),
                      (exact_match, torch.float64)):
        x_, difference_, scale = (
            t.detach().to("cpu" if to else triton_path, to or t.dtype).requires_grad_()
            for t in (x, difference, torch.tensor(50.0, device=triton_path))
        )
        out = match(x_, difference_, scale)
        results.append((out, *torch.autograd.grad(out, (x_, difference_, scale),
                                                  upstream.to(out))))
    assert launched == ["match_kernel", "match_grad_kernel"]
    x, difference, upstream = (t.cpu().double() for t in (x, difference, upstream))
    per_row = (50 * upstream / x.norm(dim=-1)).abs()[..., None] * difference.norm(dim=-1)[:, None]
    terms = (0.0, per_row, 0.0, (upstream * results[2][0].detach() / 50).abs().sum())
    for name, size, got, reference, exact in zip(("logits", "d x", "d difference", "d scale"),
                                                 terms, *results):
        assert_close(name, got, reference, exact.detach(), size)


def exact_match(x, difference, scale):
    """Eq. 1, row by row, in float64."""
    return torch.stack([torch.stack([scale * (row @ toward) / row.square().sum().sqrt()
                                     for row, toward in zip(image, difference)]) for image in x])


def test_mixed_types_strides_and_extreme_energies(triton_path, launched):
    energy, f, _ = inputs((2, 20, 81, 20), torch.float32, triton_path, spread=200.0)
    energy[0, 0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    half = f.half()
    for e, x in (
        (energy, f.bfloat16()),
        (energy.mT.contiguous().mT, half.mT.contiguous().mT),
        (energy[:, ::2], half),
    ):
        exact = region_pool_reference(e.cpu().double(), x.cpu().double())
        assert_close("F^r", kernels.region_pool(e, x), region_pool_reference(e, x), exact)
    assert launched == ["pool_kernel"] * 3


def test_gradients_lie_as_carls_energies_do(triton_path, launched):
    energy, f, generator = inputs((2, 20, 81, 24), torch.bfloat16, triton_path)
    up = torch.randn(2, 20, 24, generator=generator).to(f)
    plain, turned = (torch.autograd.grad(kernels.region_pool(e, f), e, up)[0]
                     for e in (energy.clone().requires_grad_(),
                               energy.mT.contiguous().mT.requires_grad_()))
    assert torch.equal(plain, turned) and turned.mT.is_contiguous()
    assert launched == ["pool_kernel", "grad_kernel"] * 2


def test_float32_regions_take_the_reference(triton_path, launched):
    energy, f, _ = inputs((2, 20, 81, 20), torch.float32, triton_path)
    assert torch.equal(kernels.region_pool(energy, f), region_pool_reference(energy, f))
    assert not launched


def test_forward_derivatives_are_the_references(triton_path):
    """A Triton operator has no forward derivative: it would be 0 without a word."""
    energy, f = torch.randn(2, 3, 5), torch.randn(2, 5, 4).bfloat16()
    x, difference = torch.randn(2, 3, 4), torch.randn(3, 4)
    for fused, reference, at in (
            (lambda e: kernels.region_pool(e, f), lambda e: region_pool_reference(e, f), energy),
            (lambda x: kernels.match(x, difference, 50.0),
             lambda x: match_reference(x, difference, 50.0), x)):
        tangent = torch.randn_like(at)
        got, want = (torch.func.jvp(one, (at,), (tangent,))[1] for one in (fused, reference))
        assert want.abs().sum() > 0 and torch.equal(got, want)


@each_dtype
def test_the_reference_takes_lengths_and_products_in_float32(dtype):
    """A length rounded to bfloat16 would move a logit of 50 by 0.1."""
    torch.manual_seed(0)
    x, toward = torch.randn(4, 3, 64).to(dtype), torch.randn(3, 64)
    exact = exact_match(x.double(), toward.double(), 50.0)
    assert torch.allclose(match_reference(x, toward, 50.0).double(), exact, rtol=1e-4, atol=1e-4)


def test_a_zero_feature_matches_nothing(triton_path, launched):
    x, toward = torch.zeros(2, 3, 8, device=triton_path), torch.randn(3, 8, device=triton_path)
    assert torch.equal(kernels.match(x, toward, 50.0), torch.zeros(2, 3, device=triton_path))
    assert launched == ["match_kernel"]


def test_one_feature_for_all_categories_takes_the_reference(triton_path, launched):
    x, toward = torch.randn(2, 1, 8, device=triton_path), torch.randn(3, 8, device=triton_path)
    assert kernels.match(x, toward, 1.0).shape == (2, 3) and not launched


def test_flops(triton_path):
    energy, f, _ = inputs((2, 3, 20, 8), torch.bfloat16, triton_path)
    with FlopCounterMode(display=False) as counter:
        kernels.region_pool(energy.requires_grad_(), f.requires_grad_()).sum().backward()
    # forward, two gradients: 2 B C N D each
    assert counter.get_total_flops() == 3 * 2 * 2 * 3 * 20 * 8


# ---- topk_prototypes

@pytest.mark.parametrize("shape", ((0, 3, 4, 8), (2, 3, 0, 8)))
def test_sizes_of_zero_change_nothing(triton_path, shape):
    B, C, N, D = shape
    bank, cursor = torch.zeros(C, 4, D), torch.zeros(C, dtype=torch.int64)
    kernels.topk_prototypes(torch.zeros(B, C, N), torch.zeros(B, N, D),
                            torch.ones(B, C, dtype=torch.int8), bank, cursor, 2)
    assert not bank.any() and not cursor.any()


def by_hand(energy, f, labels, bank, cursor, k):
    """Eq. 7, one row at a time."""
    bank, cursor, f = bank.double().clone(), cursor.clone(), f.double()
    for c, b in itertools.product(range(labels.shape[1]), range(labels.shape[0])):
        if labels[b, c] == 1:
            e = [-torch.inf if x != x else x for x in energy[b, c].tolist()]
            for n in sorted(range(len(e)), key=lambda n: (-e[n], n))[:k]:
                bank[c, int(cursor[c]) % bank.shape[1]] = f[b, n] / f[b, n].norm().clamp(min=1e-12)
                cursor[c] += 1
    return bank, cursor


def run_topk(energy, f, labels, L, k, dtype=torch.float32, calls=1, path="triton", start=0):
    """(bank, cursor) after some calls, on the given path and by hand; untouched slots keep their
    poison."""
    C, D = labels.shape[1], f.shape[2]
    bank, cursor = torch.full((C, L, D), 7.0, dtype=dtype), torch.full((C,), start)
    exact = bank.clone(), cursor.clone()
    bank, cursor = bank.to(energy.device), cursor.to(energy.device)
    kernels.use(path)
    for _ in range(calls):
        kernels.topk_prototypes(energy, f, labels.to(energy.device), bank, cursor, k)
        exact = by_hand(energy.cpu().float(), f.cpu(), labels, *exact, k)
    assert torch.equal(cursor.cpu(), exact[1]), (
        f"cursor {cursor.tolist()}, expected {exact[1].tolist()}"
    )
    assert_close("bank", bank, exact[0].to(dtype), exact[0])
    return bank, cursor


@each_dtype
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (3, 20, 20, 3),
        (20, 3, 81, 80),
        (2, 3, 1023, 20),
        (3, 1, 196, 1023),
        (1, 196, 3, 1),
        (80, 1, 1, 20),
        (81, 1, 3, 3),
        (1, 80, 80, 81),
    ],
    ids=str,
)
def test_topk(shape, dtype, triton_path, launched):
    B, C, N, D = shape
    # half precision brings many equal energies
    energy, f, generator = inputs(shape, dtype, triton_path)
    labels = torch.randint(-1, 2, (B, C), generator=generator, dtype=torch.int8)
    labels[0, 0] = 1
    L, k = (7, 3) if N % 2 else (64, 5)  # wraps round, K > N, more rows than slots
    run_topk(energy, f, labels, L, k, calls=2)
    run_topk(energy, f, labels, L, k, calls=2, path="reference")
    assert launched == ["topk_kernel"] * 2


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_topk_special_cases(path, triton_path):
    device, inf, nan = triton_path, torch.inf, torch.nan
    f = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    # all equal; NaN ranks last
    energy = torch.tensor(
        [
            [[1.0, 1, 1, 1, 1, 1], [nan, 2, nan, 3, nan, nan]],
            # -inf and NaN are equal
            [[-inf, 0, -inf, 0, nan, 0], [inf, -inf, inf, 0, 1, 2]],
            [[0.0, -0.0, 0.0, -0.0, -1, 5], [nan] * 6],  # 0.0 equals -0.0
            [[-inf] * 6, [5.0, 4, 3, 2, 1, 0]],
        ]
    ).to(device)
    ones = torch.ones(4, 2, dtype=torch.int8)
    some = torch.tensor([[1, -1], [0, 1], [1, 0], [1, 1]], dtype=torch.int8)
    # L < K, one row, K > N
    for labels, L, k in itertools.product((ones, some), (1, 2, 5, 24, 30), (1, 2, 4, 9)):
        run_topk(energy, f, labels, L, k, path=path, start=3)
    run_topk(energy, f * 0, ones, 8, 2, path=path)  # zero rows stay zero
    run_topk(energy, f, ones * 0, 8, 2, path=path)  # nothing known
    run_topk(energy, f, -ones, 8, 2, path=path)
    run_topk(energy, f, ones, 8, 2, path=path, start=2**31 - 3)  # rows past 2^31
    run_topk(energy, f, ones, 8, 2, path=path, dtype=torch.bfloat16)  # a bank in half precision
    # strided inputs
    run_topk(energy.mT.contiguous().mT, f.mT.contiguous().mT, ones, 8, 2, path=path)


def test_topk_does_not_depend_on_the_order_of_programs(triton_path, monkeypatch):
    energy, f, generator = inputs((20, 3, 20, 8), torch.float32, triton_path)
    labels = torch.randint(-1, 2, (20, 3), generator=generator, dtype=torch.int8)
    expected = run_topk(energy, f, labels, 11, 3)
    if triton_path == "cuda":  # the hardware shuffles
        for _ in range(50):
            assert torch.equal(run_topk(energy, f, labels, 11, 3)[0], expected[0])
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    step = builder.set_grid_idx
    for order in (torch.arange(59, -1, -1), torch.randperm(60, generator=generator)):
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: step(int(order[x]), y, z))
        bank, cursor = run_topk(energy, f, labels, 11, 3)
        assert torch.equal(bank, expected[0]) and torch.equal(cursor, expected[1])


# ---- torch.library


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_opcheck(path, triton_path):
    energy, f, generator = inputs((2, 3, 20, 8), torch.float32, triton_path)
    kernels.use(path)
    g = torch.randn(2, 3, 8, generator=generator).to(triton_path)
    bank, cursor = (
        torch.zeros(3, 4, 8, device=triton_path),
        torch.zeros(3, dtype=torch.int64, device=triton_path),
    )
    torch.library.opcheck(
        topk_op,
        (energy, f, torch.ones(2, 3, dtype=torch.int8, device=triton_path), bank, cursor, 3),
    )
    if path == "triton":
        torch.library.opcheck(grad_op, (g, energy, f))
        torch.library.opcheck(pool_op, (energy.requires_grad_(), f.requires_grad_()))


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_torch_compile_sees_whole_graphs(path, triton_path):
    energy, f, generator = inputs((2, 3, 20, 8), torch.bfloat16, triton_path)
    labels = torch.tensor([[1, 0, -1], [1, 1, -1]], dtype=torch.int8, device=triton_path)
    toward = torch.randn(3, 8, generator=generator).to(triton_path)
    kernels.use(path)

    def step(energy, f, bank, cursor):
        kernels.topk_prototypes(energy, f, labels, bank, cursor, 3)
        logits = kernels.match(kernels.region_pool(energy, f), toward, 2.0)
        return logits.square().sum(), bank.sum()

    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        e = energy.clone().requires_grad_()
        bank, cursor = (
            torch.zeros(3, 4, 8, device=triton_path),
            torch.zeros(3, dtype=torch.int64, device=triton_path),
        )
        loss, total = run(e, f, bank, cursor)
        loss.backward()
        results.append((loss.detach(), total, e.grad, bank, cursor))
    for name, eager, compiled in zip(("loss", "sum", "d energy", "bank", "cursor"), *results):
        torch.testing.assert_close(compiled, eager, msg=lambda text: f"{name}: {text}")


# ---- the choice of path


def test_choice_of_path(triton_path):
    assert kernels.chosen() == "kernels: triton (asked for)"
    assert kernels.use("reference") == "triton"
    assert kernels.chosen() == "kernels: reference (asked for)"
    assert not kernels.runs_triton(torch.zeros(1, device=triton_path))
    assert kernels.use("triton") == "reference" and not kernels.runs_triton(torch.zeros(1).double())
    kernels.use("auto")
    assert kernels.runs_triton(torch.zeros(1, device=triton_path)) == (triton_path == "cuda")


@pytest.mark.parametrize("capability, compiler, path", (
    ((7, 5), True, "reference (the GPU is older"), ((8, 0), True, "triton ("),
    ((8, 0), False, "reference (Triton needs a C compiler")))
def test_what_is_told_is_what_runs_on_a_gpu(monkeypatch, capability, compiler, path):
    monkeypatch.setattr(kernels.dispatch, "COMPILER", compiler)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(kernels.dispatch, "triton", kernels.dispatch)  # any: it is installed
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    first, second = (SimpleNamespace(is_cuda=True, dtype=torch.float32, get_device=lambda i=i: i)
                     for i in range(2))
    assert kernels.runs_triton(first) == path.startswith("triton")
    assert not kernels.runs_triton(second)  # Predictor(run, device="cuda:1"): an illegal address
    assert kernels.chosen().startswith(f"kernels: {path}")
    if path.startswith("reference"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(UserError, match="asked for, but .*; use auto"):
            kernels.use("triton")


def test_the_fixture_restores_the_choice():
    assert kernels.dispatch._path == "auto" and "asked for" not in kernels.chosen()


WITHOUT = """
import sys, torch
if {blocked}: sys.modules["triton"] = None
import kernels
print(kernels.chosen())
print(kernels.region_pool(torch.zeros(1, 2, 3), torch.ones(1, 3, 4)).sum().item())
try: kernels.use("triton")
except ValueError as error: print(error)
"""


@pytest.mark.parametrize(
    "blocked, reason", [(True, "triton is not installed"), (False, "no CUDA device")]
)
def test_without_triton_or_gpu_the_reference_runs_and_one_line_says_so(blocked, reason):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(blocked=blocked)],
        env=env,
        text=True,
        capture_output=True,
        cwd=os.path.dirname(os.path.dirname(__file__)),
    )
    first, value, error = run.stdout.splitlines()
    # torch's CUDA builds miss it aloud
    said = [line for line in run.stderr.splitlines() if "triton not found" not in line]
    assert first == f"kernels: reference ({reason})" and value == "12.0" and not said, run.stderr
    assert error.startswith("kernels: triton was asked for, but")


def test_wrong_shapes_are_named():
    energy, f = torch.zeros(2, 3, 5), torch.zeros(2, 5, 4)
    with pytest.raises(
        ValueError,
        match=r"expected energy \(B, C, N\) and f \(B, N, D\), got \(2, "
        r"3, 5\)",
    ):
        kernels.region_pool(energy, f.mT)
    bank, cursor, labels = (
        torch.zeros(3, 7, 4),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int8),
    )
    for wrong in (
        (labels.mT, bank, cursor, 1),
        (labels, bank, cursor, 0),
        (labels, bank, cursor.int(), 1),
        (labels, bank.mT.contiguous().mT, cursor, 1),
        (labels, bank[:2], cursor, 1),
    ):
        with pytest.raises(ValueError, match="expected|contiguous"):
            kernels.topk_prototypes(energy, f, *wrong)


# ---- only on a GPU


@gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_native_at_the_papers_size(dtype, triton_path, launched):
    energy, f, generator = inputs((128, 80, 196, 512), dtype, "cuda")
    exact = region_pool_reference(energy.cpu().double(), f.cpu().double())
    assert_close("F^r", kernels.region_pool(energy, f), region_pool_reference(energy, f), exact)


@gpu
def test_prototypes_do_not_make_the_host_wait(triton_path):
    energy, f, _ = inputs((4, 3, 20, 8), torch.float32, "cuda")
    bank, cursor = (
        torch.zeros(3, 4, 8, device="cuda"),
        torch.zeros(3, dtype=torch.int64, device="cuda"),
    )
    labels = torch.ones(4, 3, dtype=torch.int8, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.topk_prototypes(energy, f, labels, bank, cursor, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or pytest.skip(
        "GPU case: compute-sanitizer is not installed"
    )
    wanted = "test_region_pool or test_match or test_topk_special_cases"
    run = subprocess.run(
        [
            sanitizer,
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "pytest",
            "-q",
            __file__,
            "-k",
            wanted,
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
