"""Equations 1-15 against the loop transcriptions in oracles.py, at awkward sizes, in float64,
gradients included."""
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import kernels
import losses
import memory
import oracles
import trm

pytestmark = pytest.mark.paper

CASES = list(range(10))
# (B, C, N, D, L, K): the corners first, then draws in between
CORNERS = [(1, 1, 1, 3, 1, 1), (7, 9, 23, 16, 11, 5), (1, 9, 2, 3, 5, 5), (7, 1, 23, 5, 2, 5)]


@pytest.fixture(autouse=True)
def reference_path():
    """The equations are checked on the reference path; the kernels are compared to it elsewhere."""
    earlier, threads = kernels.use("reference"), torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a few hundred numbers: a second thread only waits
    yield
    torch.set_num_threads(threads)
    kernels.use(earlier)


def sizes(case):
    rng = np.random.RandomState(100 + case)
    if case < len(CORNERS):
        return rng, CORNERS[case]
    low, high = (1, 1, 1, 3, 1, 1), (7, 9, 23, 16, 11, 5)
    return rng, tuple(int(rng.randint(a, b + 1)) for a, b in zip(low, high))


def tensor(x, grad=False):
    return torch.tensor(x, dtype=torch.float64, requires_grad=grad)


def codes(rng, *shape):
    """Random labels with all three values."""
    return rng.choice([-1, 0, 1], size=shape).astype(np.int8)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def close(name, got, expected, rtol=1e-9, atol=1e-11):
    got = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    expected = np.asarray(expected)
    assert got.shape == expected.shape, f"{name}: shape {got.shape}, expected {expected.shape}"
    bad = ~np.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    if bad.any():
        gap = np.where(bad, np.abs(got.astype(float) - expected.astype(float)), -1.0)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(gap), np.inf, gap)), got.shape)
        pytest.fail(f"{name}: {bad.sum()} of {bad.size} differ, worst at {tuple(map(int, worst))}: "
                    f"got {got[worst]}, expected {expected[worst]}")


def slopes_agree(name, oracle, x, grad, rng, directions=2):
    """Autograd's gradient against central differences of the oracle along random directions."""
    for _ in range(directions):
        direction = rng.randn(*x.shape)
        close(f"{name}: slope", (grad.numpy() * direction).sum(),
              oracles.slope(oracle, x, direction), 2e-6, 1e-7)


# ---- Eq. 1 and 5

@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_match(case, scale):
    rng, (B, C, N, D, L, K) = sizes(case)
    g_pos, g_neg = unit(rng.randn(C, D)), unit(rng.randn(C, D))
    for lead in [(), (B,), (2, B)]:
        x = rng.randn(*lead, C, D)
        close(f"match {lead}", trm.match(tensor(x), tensor(g_pos), tensor(g_neg), scale),
              oracles.match(x, g_pos, g_neg, scale))


def test_match_is_a_cosine_whatever_the_lengths():
    rng = np.random.RandomState(0)
    x, g_pos, g_neg = rng.randn(3, 4, 5), 7 * rng.randn(4, 5), 0.1 * rng.randn(4, 5)
    expected = oracles.match(x, unit(g_pos), unit(g_neg), 50.0)
    close("match of 1000 x", trm.match(*map(tensor, (1000 * x, unit(g_pos), unit(g_neg))), 50.0),
          expected)
    close("match, text of any length", trm.match(*map(tensor, (x, g_pos, g_neg)), 50.0), expected)


@pytest.mark.parametrize("lengths", ["unit", "any"])
def test_match_gradients(lengths):
    """Text features of unit length: their gradient is compared along the sphere, which is all that
    their maker sees."""
    rng = np.random.RandomState(1)
    inputs = [rng.randn(2, 3, 4), rng.randn(3, 4), rng.randn(3, 4), np.array(5.0)]
    if lengths == "unit":
        inputs[1:3] = unit(inputs[1]), unit(inputs[2])
    up = rng.randn(2, 3)
    leaves = [tensor(v, grad=True) for v in inputs]
    (trm.match(*leaves) * tensor(up)).sum().backward()
    for i, name in enumerate(["x", "g_pos", "g_neg", "scale"]):
        def oracle(v, i=i):
            given = list(inputs)
            given[i] = v
            return (oracles.match(*given) * up).sum()
        grad = leaves[i].grad.numpy()
        if lengths == "unit" and name.startswith("g"):
            grad = grad - (grad * inputs[i]).sum(-1, keepdims=True) * inputs[i]
        close(f"d match / d {name}", grad, oracles.gradient(oracle, inputs[i]), 1e-6, 1e-7)


def test_match_of_a_zero_region_is_finite():
    x = torch.zeros(2, 3, 4, requires_grad=True)  # float32 energies of -200 pool to exactly nothing
    out = trm.match(x, torch.randn(3, 4), torch.randn(3, 4), 50.0)
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()


# ---- Eq. 2 and 4

@pytest.mark.parametrize("case", CASES)
def test_region_pool(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    energy, f, up = 3 * rng.randn(B, C, N), rng.randn(B, N, D), rng.randn(B, C, D)
    energy_t, f_t = tensor(energy, grad=True), tensor(f, grad=True)
    out = kernels.region_pool(energy_t, f_t)
    close("region_pool", out, oracles.region_pool(energy, f))
    (out * tensor(up)).sum().backward()
    slopes_agree("energy", lambda e: (oracles.region_pool(e, f) * up).sum(), energy, energy_t.grad,
                 rng, 1)
    slopes_agree("f", lambda v: (oracles.region_pool(energy, v) * up).sum(), f, f_t.grad, rng, 1)


def test_region_pool_every_gradient_entry():
    rng = np.random.RandomState(2)
    energy, f, up = rng.randn(2, 3, 5), rng.randn(2, 5, 4), rng.randn(2, 3, 4)
    energy_t, f_t = tensor(energy, grad=True), tensor(f, grad=True)
    (kernels.region_pool(energy_t, f_t) * tensor(up)).sum().backward()
    close("d energy", energy_t.grad,
          oracles.gradient(lambda e: (oracles.region_pool(e, f) * up).sum(), energy), 1e-6, 1e-8)
    close("d f", f_t.grad,
          oracles.gradient(lambda v: (oracles.region_pool(energy, v) * up).sum(), f), 1e-6, 1e-8)


def test_region_pool_of_extreme_energies():
    rng = np.random.RandomState(3)
    f = rng.randn(1, 2, 3)
    energy = np.array([[[100.0, -100.0], [-1000.0, 1000.0]]])
    energy_t = tensor(energy, grad=True)
    out = kernels.region_pool(energy_t, tensor(f))
    close("first location alone, second alone", out, f[:, [0, 1]])
    out.sum().backward()
    assert torch.isfinite(energy_t.grad).all()


# ---- Eq. 3

def carl(rng, C, D, queries=None, fresh=False):
    """A decoder in float64. Every parameter is made random, so that no bias or LayerNorm hides
    behind 0 or 1."""
    module = trm.CARL(C, D) if queries is None else trm.CARL(C, D, queries=tensor(queries))
    module = module.double().eval()
    if not fresh:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(tensor(0.3 * rng.randn(*parameter.shape)))
    return module


# LayerNorm's epsilon is 1e-5: features of size 100 make it invisible at these tolerances
@pytest.mark.parametrize("case", CASES)
def test_carl_shapes_and_region_output(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    f = 100 * rng.randn(B, N, D)
    energy, regions, queries = carl(rng, C, D)(tensor(f))
    assert energy.shape == (B, C, N) and queries.shape == (B, C, D)
    close("regions pool the raw f", regions, oracles.region_pool(energy.detach().numpy(), f), 1e-8,
          1e-9)


@pytest.mark.parametrize("case", CASES)
def test_carl_locations_permute(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    module, f, order = carl(rng, C, D), 100 * rng.randn(B, N, D), rng.permutation(N)
    energy, regions, queries = module(tensor(f))
    energy_p, regions_p, queries_p = module(tensor(f[:, order]))
    close("energy moves along", energy_p, energy.detach()[:, :, order], 1e-8, 1e-8)
    close("regions stay", regions_p, regions.detach(), 1e-8, 1e-8)
    close("queries stay", queries_p, queries.detach(), 1e-8, 1e-8)


@pytest.mark.parametrize("case", CASES)
def test_carl_classes_permute(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    while C % D == 0:  # then no weight or bias but the queries can have the shape (C, D)
        D += 1
    module, f, order = carl(rng, C, D), 100 * rng.randn(B, N, D), rng.permutation(C)
    energy, regions, queries = module(tensor(f))
    mine = [p for p in module.parameters() if p.shape == (C, D)]
    assert len(mine) == 1, "one (C, D) parameter: the category queries"
    with torch.no_grad():
        mine[0].copy_(mine[0][order].clone())
    energy_p, regions_p, queries_p = module(tensor(f))
    close("energy", energy_p, energy.detach()[:, order], 1e-8, 1e-8)
    close("regions", regions_p, regions.detach()[:, order], 1e-8, 1e-8)
    close("queries", queries_p, queries.detach()[:, order], 1e-8, 1e-8)


@pytest.mark.parametrize("case", CASES)
def test_carl_normalises_what_enters_the_decoder(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    module, f = carl(rng, C, D), 100 * rng.randn(B, N, D)
    energy, _, queries = module(tensor(f))
    for name, g in [("scaled", 3.7 * f),
                    ("scaled at each location", f * rng.uniform(1, 9, size=(B, N, 1))),
                    ("shifted at each location", f + 50 * rng.randn(B, N, 1))]:
        energy_g, regions_g, queries_g = module(tensor(g))
        close(f"energy, f {name}", energy_g, energy.detach(), 1e-5, 1e-5)
        close(f"queries, f {name}", queries_g, queries.detach(), 1e-5, 1e-5)
        close(f"regions, f {name}", regions_g, oracles.region_pool(energy_g.detach().numpy(), g),
              1e-8, 1e-8)


def test_carl_energy_is_a_product_of_query_and_key_before_any_softmax():
    rng = np.random.RandomState(4)
    C, D, N = 9, 3, 23
    module, f = carl(rng, C, D), 100 * rng.randn(1, N, D)
    energy = module(tensor(f))[0][0].detach()
    spectrum = torch.linalg.svdvals(energy)
    assert spectrum[D] < 1e-9 * spectrum[0], f"q.k has at most rank {D}: {spectrum.tolist()}"
    ones = torch.ones(C, dtype=energy.dtype)
    assert not torch.allclose(energy.sum(1), ones), "the energy went through a softmax"
    changed = f.copy()
    changed[0, 5:] = 100 * rng.randn(N - 5, D)
    close("an energy depends on its own location only", module(tensor(changed))[0][0, :, :5],
          energy[:, :5], 1e-9, 1e-9)


@pytest.mark.parametrize("B,C,N,D", [(1, 1, 1, 3), (2, 5, 7, 8), (3, 9, 4, 5)])
def test_carl_is_the_decoder_layer(B, C, N, D):
    rng = np.random.RandomState(23)
    module, f = carl(rng, C, D), rng.randn(B, N, D)
    energy, regions, queries = module(tensor(f))
    expected = oracles.decoder({k: v.numpy() for k, v in module.state_dict().items()}, f)
    close("energy", energy, expected[0], 1e-8, 1e-9)
    close("queries", queries, expected[1], 1e-8, 1e-9)
    # Table 5's 4.009 Mi: two attentions, a feed-forward of 4D, three LayerNorms; and the queries
    assert sum(p.numel() for p in module.parameters()) == 16 * D * D + 19 * D + C * D


def test_both_representations_meet_the_same_text():
    """Eq. 5: p^q = Matching(F^q, G), p^r = Matching(F^r, G), with one learnable tau that starts at
    exp(-3.91)."""
    rng = np.random.RandomState(24)
    B, C, N, D = 3, 4, 6, 7
    module = trm.TRM(C, D).double().eval()
    f, g_pos, g_neg = rng.randn(B, N, D), unit(rng.randn(C, D)), unit(rng.randn(C, D))
    out = module(tensor(f), tensor(rng.randn(B, D)), tensor(g_pos), tensor(g_neg))
    parameters = {k[len("carl."):]: v.numpy() for k, v in module.state_dict().items()
                  if k.startswith("carl.")}
    energy, queries = oracles.decoder(parameters, f)
    regions = oracles.region_pool(energy, f)
    close("logits_r", out.logits_r, oracles.match(regions, g_pos, g_neg, math.exp(3.91)), 1e-6,
          1e-6)
    close("logits_q", out.logits_q, oracles.match(queries, g_pos, g_neg, math.exp(3.91)), 1e-6,
          1e-6)


def test_carl_images_do_not_mix():
    rng = np.random.RandomState(5)
    module, f = carl(rng, 4, 6), 100 * rng.randn(3, 7, 6)
    whole = module(tensor(f))
    for b in range(3):
        for name, one, all_ in zip(("energy", "regions", "queries"), module(tensor(f[b:b + 1])),
                                   whole):
            close(f"{name} of image {b}", one[0], all_.detach()[b], 1e-8, 1e-8)


def test_carl_is_post_norm():
    rng = np.random.RandomState(6)
    queries = carl(rng, 5, 16, fresh=True)(tensor(100 * rng.randn(2, 7, 16)))[2].detach()
    close("mean of a normalised row", queries.mean(-1), np.zeros((2, 5)), 0, 1e-6)
    close("variance of a normalised row", queries.var(-1, unbiased=False), np.ones((2, 5)), 0, 1e-3)


def test_carl_takes_initial_queries_and_learns_them():
    rng = np.random.RandomState(7)
    given = rng.randn(5, 8).astype(np.float32)
    module = trm.CARL(5, 8, queries=torch.tensor(given))
    mine = [p for p in module.parameters() if p.shape == (5, 8)]
    assert len(mine) == 1 and mine[0].requires_grad
    close("initial queries", mine[0], given)
    energy, regions, queries = module(torch.randn(2, 6, 8))
    (queries.square().sum() + regions.square().sum()).backward()
    assert mine[0].grad is not None and mine[0].grad.abs().sum() > 0
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0
                   for m in module.modules()), "the paper names no dropout"


def test_carl_gradient_reaches_the_energy_through_the_regions():
    """Each parameter against central differences of the module itself: the fused paths may not cut
    the graph."""
    rng = np.random.RandomState(8)
    module, f = carl(rng, 3, 5), tensor(rng.randn(2, 4, 5))
    up_r, up_q = tensor(rng.randn(2, 3, 5)), tensor(rng.randn(2, 3, 5))

    def objective():
        energy, regions, queries = module(f)
        return (regions * up_r).sum() + (queries * up_q).sum() + energy.square().sum()

    objective().backward()
    for name, parameter in module.named_parameters():
        direction = tensor(rng.randn(*parameter.shape))
        with torch.no_grad():
            parameter.add_(1e-6 * direction)
            above = objective().item()
            parameter.sub_(2e-6 * direction)
            below = objective().item()
            parameter.add_(1e-6 * direction)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(f"d {name}", (grad * direction).sum(), (above - below) / 2e-6, 1e-5, 1e-5)


# ---- Eq. 6

@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("how", ["softmax", "bernoulli"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation(case, how, temperature):
    rng, (B, C, N, D, L, K) = sizes(case)
    r, q = 4 * rng.randn(B, C), 4 * rng.randn(B, C)
    r_t, q_t = tensor(r, grad=True), tensor(q, grad=True)
    loss = losses.distillation(r_t, q_t, how=how, temperature=temperature)
    close("L_KD", loss, oracles.distillation(r, q, how, temperature))
    loss.backward()
    assert r_t.grad is None or not r_t.grad.any(), "the teacher is detached"
    slopes_agree("student", lambda v: oracles.distillation(r, v, how, temperature), q, q_t.grad,
                 rng)


@pytest.mark.parametrize("how", ["softmax", "bernoulli"])
def test_distillation_special_cases(how):
    x = tensor(np.random.RandomState(9).randn(3, 4))
    close("equal predictions", losses.distillation(x, x, how=how), 0.0)
    if how == "softmax":
        close("a distribution over one class", losses.distillation(x[:, :1], x[:, 1:2], how=how),
              0.0)
    extreme = torch.tensor([[100.0, -100.0, 0.0, 100.0]])
    student = (-extreme).requires_grad_()
    loss = losses.distillation(extreme, student, how=how)
    loss.backward()
    close("extreme logits", loss, oracles.distillation(extreme.numpy(), -extreme.numpy(), how, 1.0),
          1e-5)
    assert torch.isfinite(student.grad).all()


def test_distillation_default_temperature_is_one():
    rng = np.random.RandomState(10)
    r, q = rng.randn(3, 4), rng.randn(3, 4)
    for how in ("softmax", "bernoulli"):
        close(how, losses.distillation(tensor(r), tensor(q), how=how),
              oracles.distillation(r, q, how, 1.0))


@pytest.mark.parametrize("how", ["softmax", "bernoulli"])
def test_distillation_by_another_teacher(how):
    rng = np.random.RandomState(11)
    r, q = rng.randn(3, 4), rng.randn(3, 4)
    r_t, q_t = tensor(r, grad=True), tensor(q, grad=True)
    loss = losses.distillation(r_t, q_t, how, 2.0, teacher="query")
    close("query teaches region", loss, oracles.distillation(q, r, how, 2.0))
    loss.backward()
    assert q_t.grad is None or not q_t.grad.any()
    slopes_agree("region learns", lambda v: oracles.distillation(q, v, how, 2.0), r, r_t.grad, rng)

    r_t, q_t = tensor(r, grad=True), tensor(q, grad=True)
    loss = losses.distillation(r_t, q_t, how, 2.0, teacher="both")
    close("as printed", loss, oracles.distillation(r, q, how, 2.0))
    loss.backward()
    slopes_agree("teacher learns", lambda v: oracles.distillation(v, q, how, 2.0), r, r_t.grad, rng)
    slopes_agree("student learns", lambda v: oracles.distillation(r, v, how, 2.0), q, q_t.grad, rng)


# ---- Eq. 7

def bank_of(C, L, D, **options):
    return memory.MemoryBank(C, L, D, **options).double()


def compare(bank, queues, name=""):
    close(f"{name} bank", bank.bank, queues.slots)
    assert bank.cursor.tolist() == [len(w) for w in queues.written], f"{name} cursor"
    C, L, D = queues.slots.shape
    means = [np.mean(queues.queue(c), axis=0) if queues.written[c] else np.zeros(D)
             for c in range(C)]
    close(f"{name} prototypes", bank.mean_prototypes(), np.stack(means))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_topk_prototypes_fill_and_wrap(case, tied):
    rng, (B, C, N, D, L, K) = sizes(case)
    bank, queues = bank_of(C, L, D), oracles.Queues(C, L, D)
    compare(bank, queues, "empty")
    for batch in range(5):
        energy, f, labels = rng.randn(B, C, N), rng.randn(B, N, D), codes(rng, B, C)
        if tied:
            energy = rng.randint(-1, 2, size=(B, C, N)).astype(float)
        if batch == 3:
            labels[labels == 1] = 0  # a batch without positives writes nothing
        bank.enqueue(tensor(energy), tensor(f), torch.tensor(labels), K)
        queues.enqueue(energy, f, labels, K)
        compare(bank, queues, f"batch {batch}")


@pytest.mark.parametrize("B,L,K,N", [
    (7, 2, 5, 9), (7, 11, 5, 9), (5, 3, 3, 4), (1, 2, 5, 23), (7, 1, 1, 3), (6, 11, 5, 2)])
def test_topk_prototypes_more_than_the_queue_holds(B, L, K, N):
    rng = np.random.RandomState(11)
    bank, queues = bank_of(3, L, 4), oracles.Queues(3, L, 4)
    for _ in range(3):
        energy, f = rng.randn(B, 3, N), rng.randn(B, N, 4)
        labels = np.stack([np.ones(B), rng.choice([-1, 1], B), -np.ones(B)], axis=1).astype(np.int8)
        bank.enqueue(tensor(energy), tensor(f), torch.tensor(labels), K)
        queues.enqueue(energy, f, labels, K)
        compare(bank, queues)


def test_topk_prototypes_equal_energies_take_the_lowest_location():
    f = np.random.RandomState(12).randn(1, 7, 3)
    bank = bank_of(2, 4, 3)
    energy = np.array([[[0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 0.0], [5.0] * 7]])
    bank.enqueue(tensor(energy), tensor(f), torch.ones(1, 2, dtype=torch.int8), 4)
    close("2 2 2 1, left to right", bank.bank[0], unit(f[0, [1, 3, 5, 2]]))
    close("all equal: the first four", bank.bank[1], unit(f[0, :4]))


def test_topk_prototypes_function_writes_in_place_and_keeps_no_graph():
    rng = np.random.RandomState(13)
    energy, f, labels = rng.randn(4, 3, 6), rng.randn(4, 6, 5), codes(rng, 4, 3)
    bank, cursor = torch.zeros(3, 2, 5, dtype=torch.float64), torch.tensor([0, 1, 7])
    queues = oracles.Queues(3, 2, 5)
    queues.written = [[None] * int(n) for n in cursor]
    queues.enqueue(energy, f, labels, 3)
    leaves = tensor(energy, grad=True), tensor(f, grad=True)
    out = kernels.topk_prototypes(*leaves, torch.tensor(labels), bank, cursor, 3)
    assert out is None and not bank.requires_grad
    close("slots", bank, queues.slots)
    assert cursor.tolist() == [len(w) for w in queues.written]


def test_unknown_and_negative_labels_write_nothing():
    rng = np.random.RandomState(14)
    bank = bank_of(2, 3, 4)
    for value in (0, -1):
        labels = torch.full((3, 2), value, dtype=torch.int8)
        bank.enqueue(tensor(rng.randn(3, 2, 5)), tensor(rng.randn(3, 5, 4)), labels, 2)
    assert bank.cursor.tolist() == [0, 0] and not bank.bank.any()


# ---- Eq. 8 and 9

def filled(rng, C, L, D, counts, eta=0.99):
    """A bank with counts[c] random prototypes of class c (some wrapped), the lists behind it, text
    prototypes."""
    bank, queues = bank_of(C, L, D, eta=eta), oracles.Queues(C, L, D)
    for c, count in enumerate(counts):
        for _ in range(int(count)):
            energy, f = rng.randn(1, C, 2), rng.randn(1, 2, D)
            labels = np.zeros((1, C), dtype=np.int8)
            labels[0, c] = 1
            bank.enqueue(tensor(energy), tensor(f), torch.tensor(labels), 1)
            queues.enqueue(energy, f, labels, 1)
    text = rng.randn(C, D)
    bank.set_text_prototypes(tensor(unit(text)))
    return bank, queues, text


@pytest.mark.parametrize("case", CASES)
def test_similarities_and_the_printed_double_sum(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    bank, queues, text = filled(rng, C, L, D, rng.randint(0, L + 3, size=C))
    regions, labels = 5 * rng.randn(B, C, D), codes(rng, B, C)
    lists = [queues.queue(c) for c in range(C)]
    s = bank.similarities(tensor(regions, grad=True))
    close("Eq. 8", s, oracles.similarities(regions, lists, text))
    bank.update_thresholds(s, torch.tensor(labels))
    assert not bank.theta.requires_grad, "thresholds carry no graph"
    close("Eq. 9, visual", bank.theta[0], oracles.batch_means(regions, labels, lists))
    close("Eq. 9, text", bank.theta[1], oracles.batch_means(regions, labels, text[:, None]))


def test_text_similarity_is_a_cosine_whatever_the_lengths():
    rng = np.random.RandomState(15)
    bank, regions, text = bank_of(3, 2, 4), rng.randn(2, 3, 4), 6 * rng.randn(3, 4)
    bank.set_text_prototypes(tensor(text))
    close("text", bank.similarities(tensor(regions))[1],
          oracles.similarities(regions, [[]] * 3, text)[1])


def test_a_class_without_prototypes_has_no_visual_similarity():
    rng = np.random.RandomState(16)
    bank, queues, text = filled(rng, 3, 4, 5, [2, 0, 1])
    s = bank.similarities(tensor(rng.randn(2, 3, 5)))
    assert torch.isnan(s[0, :, 1]).all()
    assert not torch.isnan(s[0, :, [0, 2]]).any() and not torch.isnan(s[1]).any()
    close("zeros stand in its row", bank.mean_prototypes()[1], np.zeros(5))


# ---- Eq. 11

@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("eta", [0.99, 0.5, 0.0])
def test_thresholds_follow_the_moving_average(case, eta):
    rng, (B, C, N, D, L, K) = sizes(case)
    bank = bank_of(C, L, D, eta=eta)
    assert bank.theta.shape == (2, 2, C) and torch.isnan(bank.theta).all()
    theta = np.full((2, 2, C), math.nan)
    for _ in range(6):
        s, labels = rng.uniform(-1, 1, size=(2, B, C)), codes(rng, B, C)
        s[0, :, rng.rand(C) < 0.2] = math.nan  # classes without a prototype in this batch
        bank.update_thresholds(tensor(s), torch.tensor(labels))
        for modality in range(2):
            means = np.full((2, C), math.nan)
            for c, (row, y) in itertools.product(range(C), enumerate((1, -1))):
                seen = [s[modality, b, c] for b in range(B) if labels[b, c] == y]
                means[row, c] = sum(seen) / len(seen) if seen else math.nan
            theta[modality] = oracles.ema(theta[modality], means, eta)
        close("theta", bank.theta, theta)


def test_thresholds_touch_only_classes_that_the_batch_holds():
    bank = bank_of(3, 2, 4)  # eta: the paper's 0.99
    start = np.arange(12.0).reshape(2, 2, 3)
    bank.theta.copy_(tensor(start))
    labels = torch.tensor([[1, 0, 0], [0, -1, 0]], dtype=torch.int8)
    bank.update_thresholds(torch.full((2, 2, 3), 100.0, dtype=torch.float64), labels)
    expected = start.copy()
    expected[:, 0, 0] = 0.99 * start[:, 0, 0] + 1.0  # a positive of class 0
    # a negative of class 1: Eq. 11's second line is theta_negative
    expected[:, 1, 1] = 0.99 * start[:, 1, 1] + 1.0
    close("theta", bank.theta, expected)
    bank.update_thresholds(torch.full((2, 2, 3), 100.0, dtype=torch.float64),
                           torch.zeros(2, 3, dtype=torch.int8))
    close("theta, nothing known", bank.theta, expected)


def test_a_missing_similarity_does_not_poison_a_threshold():
    bank = bank_of(1, 2, 3)
    bank.theta.fill_(0.25)
    s = torch.tensor([[[math.nan], [math.nan]], [[0.5], [0.1]]], dtype=torch.float64)
    bank.update_thresholds(s, torch.tensor([[1], [-1]], dtype=torch.int8))
    close("theta", bank.theta[:, :, 0], [[0.25, 0.25], [0.99 * 0.25 + 0.005, 0.99 * 0.25 + 0.001]])


# ---- Eq. 10 and 12

def decide(s_v, s_t, label, theta):
    """One cell through pseudo_labels: theta is ((visual pos, visual neg), (text pos, text neg))."""
    bank = bank_of(1, 2, 3)
    bank.theta.copy_(tensor(theta)[:, :, None])
    s = tensor([[[s_v]], [[s_t]]])
    return int(bank.pseudo_labels(s, torch.tensor([[label]], dtype=torch.int8)))


THETA = ((0.75, 0.25), (0.5, -0.5))
# verdict: (visual similarity, text similarity) that gives it
SIDE = {1: (0.8, 0.6), 0: (0.5, 0.0), -1: (0.2, -0.6)}


@pytest.mark.parametrize("visual,text", list(itertools.product((1, 0, -1), repeat=2)))
def test_both_verdicts_must_agree(visual, text):
    s_v, s_t = SIDE[visual][0], SIDE[text][1]
    assert oracles.verdict(s_v, *THETA[0]) == visual and oracles.verdict(s_t, *THETA[1]) == text
    assert decide(s_v, s_t, 0, THETA) == (visual if visual == text else 0)
    for known in (1, -1):
        assert decide(s_v, s_t, known, THETA) == 0, "only unknown cells are estimated"


def test_thresholds_themselves_count():
    assert decide(0.75, 0.5, 0, THETA) == 1
    assert decide(0.25, -0.5, 0, THETA) == -1
    assert decide(np.nextafter(0.75, 0), 0.5, 0, THETA) == 0
    assert decide(np.nextafter(0.25, 1), -0.5, 0, THETA) == 0


@pytest.mark.parametrize("modality,row", list(itertools.product(range(2), repeat=2)))
def test_no_pseudo_label_while_a_threshold_is_unknown(modality, row):
    theta = np.array(THETA)
    theta[modality, row] = math.nan
    assert decide(0.9, 0.9, 0, theta) == 0 and decide(-0.9, -0.9, 0, theta) == 0


@pytest.mark.parametrize("modality", range(2))
@pytest.mark.parametrize("pair", [(0.3, 0.3), (0.1, 0.4)])
def test_no_pseudo_label_where_thresholds_are_out_of_order(modality, pair):
    theta = np.array(THETA)
    theta[modality] = pair
    for s in (-0.9, 0.1, 0.2, 0.3, 0.4, 0.9):
        assert decide(s, 0.9, 0, theta) == 0 if modality == 0 else decide(0.9, s, 0, theta) == 0
        assert decide(s, -0.9, 0, theta) == 0 if modality == 0 else decide(-0.9, s, 0, theta) == 0


def test_no_pseudo_label_without_a_similarity():
    for s in (0.9, -0.9):
        assert decide(math.nan, s, 0, THETA) == 0 and decide(s, math.nan, 0, THETA) == 0


@pytest.mark.parametrize("case", CASES)
def test_pseudo_labels(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    bank = bank_of(C, L, D)
    for _ in range(4):
        s, labels = rng.uniform(-1, 1, size=(2, B, C)), codes(rng, B, C)
        theta = rng.uniform(-1, 1, size=(2, 2, C))
        flip = rng.rand(2, C) < 0.7  # most classes in order, some not
        theta = np.where(flip[:, None], np.sort(theta, axis=1)[:, ::-1], theta)
        theta[rng.rand(2, 2, C) < 0.1] = math.nan
        s[0, :, rng.rand(C) < 0.1] = math.nan
        bank.theta.copy_(tensor(theta.copy()))
        given = torch.tensor(labels)
        out = bank.pseudo_labels(tensor(s), given)
        assert out.shape == (B, C) and out.dtype == torch.int8 and torch.equal(given,
                                                                               torch.tensor(labels))
        close("pseudo-labels", out, oracles.pseudo_labels(s, labels, theta))


@pytest.mark.parametrize("case", CASES)
def test_a_stream_of_batches(case):
    """Section 3.4 as one: regions, similarities, thresholds, pseudo-labels and queues over several
    batches."""
    rng, (B, C, N, D, L, K) = sizes(case)
    bank, queues, text = filled(rng, C, L, D, rng.randint(0, 3, size=C), eta=0.8)
    theta = np.full((2, 2, C), math.nan)
    for _ in range(3):
        energy, f, labels = rng.randn(B, C, N), rng.randn(B, N, D) + 0.3, codes(rng, B, C)
        regions, given = oracles.region_pool(energy, f), torch.tensor(labels)
        lists = [queues.queue(c) for c in range(C)]
        theta[0] = oracles.ema(theta[0], oracles.batch_means(regions, labels, lists), 0.8)
        theta[1] = oracles.ema(theta[1], oracles.batch_means(regions, labels, text[:, None]), 0.8)
        expected = oracles.pseudo_labels(oracles.similarities(regions, lists, text), labels, theta)
        s = bank.similarities(kernels.region_pool(tensor(energy), tensor(f)))
        bank.update_thresholds(s, given)
        close("theta", bank.theta, theta)
        close("pseudo-labels", bank.pseudo_labels(s, given), expected)
        bank.enqueue(tensor(energy), tensor(f), given, K)
        queues.enqueue(energy, f, labels, K)
        compare(bank, queues)


def test_the_bank_is_saved_and_restored_whole():
    rng = np.random.RandomState(17)
    bank, _, _ = filled(rng, 3, 4, 5, [2, 0, 6])
    bank.theta.uniform_()
    other = bank_of(3, 4, 5)
    other.load_state_dict(bank.state_dict())
    for name in ("bank", "cursor", "theta", "text_prototypes"):
        close(name, getattr(other, name), getattr(bank, name))
    assert not list(bank.parameters()) and bank.cursor.dtype == torch.int64


# ---- Eq. 13

def contrastive_variants(anchors, samples, classes, tau):
    """In one piece, and in pieces of 1, 2 and 3 samples, whose logits are computed again."""
    yield "whole", losses.contrastive(anchors, samples, classes, tau)
    for size in (1, 2, 3):
        yield f"{size} at once", losses.contrastive(anchors, samples, classes, tau,
                                                    at_once=size * len(anchors))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tau", [1.0, 0.07])
def test_contrastive(case, tau):
    rng, (B, C, N, D, L, K) = sizes(case)
    anchors, samples, classes = rng.randn(C, D), 3 * rng.randn(N, D), rng.randint(0, C, size=N)
    expected = oracles.contrastive(anchors, samples, classes, tau)
    slopes = [rng.randn(C, D), rng.randn(N, D)]
    expected_slopes = [
        oracles.slope(lambda v: oracles.contrastive(v, samples, classes, tau), anchors, slopes[0]),
        oracles.slope(lambda v: oracles.contrastive(anchors, v, classes, tau), samples, slopes[1])]
    a, s = tensor(anchors, grad=True), tensor(samples, grad=True)
    for name, loss in contrastive_variants(a, s, torch.tensor(classes), tau):
        close(f"L_NCE {name}", loss, expected)
        a.grad = s.grad = None
        loss.backward()
        close(f"anchors {name}", (a.grad.numpy() * slopes[0]).sum(), expected_slopes[0], 1e-5, 1e-7)
        close(f"samples {name}", (s.grad.numpy() * slopes[1]).sum(), expected_slopes[1], 1e-5, 1e-7)


def test_contrastive_every_gradient_entry():
    rng = np.random.RandomState(18)
    # class 1: no positive
    anchors, samples, classes = rng.randn(4, 3), rng.randn(6, 3), np.array([0, 2, 2, 3, 0, 2])
    a, s = tensor(anchors, grad=True), tensor(samples, grad=True)
    losses.contrastive(a, s, torch.tensor(classes), 0.2).backward()
    expected = (oracles.gradient(lambda v: oracles.contrastive(v, samples, classes, 0.2), anchors),
                oracles.gradient(lambda v: oracles.contrastive(anchors, v, classes, 0.2), samples))
    close("d anchors", a.grad, expected[0], 1e-5, 1e-7)
    close("d samples", s.grad, expected[1], 1e-5, 1e-7)
    assert not a.grad[1].any(), "a class without positives has no term"


def test_contrastive_without_negatives_is_zero():
    rng = np.random.RandomState(19)
    a, s = tensor(rng.randn(3, 4), grad=True), tensor(rng.randn(5, 4), grad=True)
    for name, loss in contrastive_variants(a, s, torch.ones(5, dtype=torch.int64), 0.1):
        close(f"one class only, {name}", loss, 0.0)
        a.grad = s.grad = None
        loss.backward()
        assert not a.grad.any() and not s.grad.any()


def test_contrastive_without_samples_is_zero_with_a_graph():
    a, s = torch.randn(3, 4, requires_grad=True), torch.empty(0, 4, requires_grad=True)
    for name, loss in contrastive_variants(a, s, torch.empty(0, dtype=torch.int64), 0.1):
        assert loss.shape == () and loss.item() == 0.0
        a.grad = None
        loss.backward()
        assert a.grad is None or not a.grad.any()


def test_contrastive_sharp_temperature_is_finite():
    """At tau = 0.005 the exponents reach +-200: far over what exp holds in float32."""
    rng = np.random.RandomState(20)
    anchors, samples, classes = rng.randn(3, 4), rng.randn(9, 4), rng.randint(0, 3, size=9)
    samples[0] = anchors[classes[0]]
    samples[1] = -anchors[classes[1]]
    a, s = (torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (anchors, samples))
    loss = losses.contrastive(a, s, torch.tensor(classes), 0.005)
    loss.backward()
    close("L_NCE", loss, oracles.contrastive(anchors, samples, classes, 0.005), 1e-4)
    assert torch.isfinite(a.grad).all() and torch.isfinite(s.grad).all()


# ---- Eq. 14

ASL = [(1.0, 2.0, 0.05), (0.0, 0.0, 0.0), (0.0, 4.0, 0.05), (2.0, 1.0, 0.2), (1.0, 2.0, 0.0),
       (0.5, 0.5, 0.05)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gamma_pos,gamma_neg,shift", ASL)
@pytest.mark.parametrize("assume_negative", [0.0, 0.3])
def test_asymmetric(case, gamma_pos, gamma_neg, shift, assume_negative):
    rng, (B, C, N, D, L, K) = sizes(case)
    logits, labels = 3 * rng.randn(B, C), codes(rng, B, C)
    x = tensor(logits, grad=True)
    options = dict(gamma_pos=gamma_pos, gamma_neg=gamma_neg, shift=shift,
                   assume_negative=assume_negative)
    loss = losses.asymmetric(x, torch.tensor(labels), **options)
    close("L_cls", loss, oracles.asymmetric(logits, labels, **options))
    loss.backward()
    if not assume_negative:
        assert not x.grad[torch.tensor(labels == 0)].any(), "unknown labels pull at nothing"
    slopes_agree("logits", lambda v: oracles.asymmetric(v, labels, **options), logits, x.grad, rng)


def test_asymmetric_every_gradient_entry_and_defaults():
    rng = np.random.RandomState(21)
    logits, labels = 2 * rng.randn(5, 4), codes(rng, 5, 4)
    x = tensor(logits, grad=True)
    loss = losses.asymmetric(x, torch.tensor(labels))
    close("the paper's 1, 2, 0.05", loss, oracles.asymmetric(logits, labels, 1, 2, 0.05))
    loss.backward()
    close("d logits", x.grad,
          oracles.gradient(lambda v: oracles.asymmetric(v, labels, 1, 2, 0.05), logits), 1e-6, 1e-8)


@pytest.mark.parametrize("case", CASES)
def test_asymmetric_is_bce_at_zero_gammas_and_shift(case):
    rng, (B, C, N, D, L, K) = sizes(case)
    logits, labels = 5 * rng.randn(B, C), rng.choice([-1, 1], size=(B, C)).astype(np.int8)
    x, y = tensor(logits, grad=True), tensor(logits, grad=True)
    loss = losses.asymmetric(x, torch.tensor(labels), gamma_pos=0., gamma_neg=0., shift=0.)
    bce = binary_cross_entropy_with_logits(y, tensor((labels == 1) * 1.0), reduction="sum") / B
    close("BCE", loss, bce.detach(), 1e-13, 1e-13)
    loss.backward()
    bce.backward()
    close("gradient of BCE", x.grad, y.grad, 1e-12, 1e-13)


def test_asymmetric_unknown_labels():
    rng = np.random.RandomState(22)
    logits = rng.randn(4, 3)
    x = tensor(logits, grad=True)
    unknown = torch.zeros(4, 3, dtype=torch.int8)
    loss = losses.asymmetric(x, unknown)
    loss.backward()
    assert loss.item() == 0.0 and not x.grad.any()
    close("assumed negative at weight 1", losses.asymmetric(x, unknown, assume_negative=1.0),
          oracles.asymmetric(logits, -np.ones((4, 3)), 1, 2, 0.05))
    close("and at weight 0.3", losses.asymmetric(x, unknown, assume_negative=0.3),
          0.3 * oracles.asymmetric(logits, -np.ones((4, 3)), 1, 2, 0.05))


@pytest.mark.parametrize("gamma_pos,gamma_neg,shift", ASL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asymmetric_extreme_logits(gamma_pos, gamma_neg, shift, dtype):
    logits = np.array([[100.0, -100.0, 0.0, 100.0, -100.0, 0.0, 100.0, -100.0, -3.0]])
    labels = np.array([[1, 1, 1, -1, -1, -1, 0, 0, -1]], dtype=np.int8)
    x = torch.tensor(logits, dtype=dtype, requires_grad=True)
    options = dict(gamma_pos=gamma_pos, gamma_neg=gamma_neg, shift=shift)
    loss = losses.asymmetric(x, torch.tensor(labels), **options)
    loss.backward()
    close("L_cls", loss, oracles.asymmetric(logits, labels, **options), 1e-5)
    assert torch.isfinite(x.grad).all(), x.grad
    expected = oracles.gradient(lambda v: oracles.asymmetric(v, labels, **options), logits, 1e-4)
    close("d logits", x.grad, expected, 1e-4, 1e-5)


def test_asymmetric_never_turns_autograd_on():
    labels = torch.ones(2, 3, dtype=torch.int8)
    with torch.no_grad():
        x = torch.randn(2, 3, requires_grad=True)
        assert not losses.asymmetric(x, labels).requires_grad
        assert not torch.is_grad_enabled()
    assert losses.asymmetric(x, labels).requires_grad and torch.is_grad_enabled()


# ---- Eq. 15

def test_total():
    keys = ("L_q", "L_r", "L_KD", "L_NCE")
    values = dict(zip(keys, (1.5, 2.25, 3.125, 4.0625)))
    for size in range(5):
        for chosen in itertools.combinations(keys, size):
            terms = {k: values[k] for k in chosen}
            leaves = {k: tensor(v, grad=True) for k, v in terms.items()}
            loss = losses.total(leaves, 1.0, 0.05, 0.01)
            close(str(chosen), loss, oracles.total(terms, 1.0, 0.05, 0.01))
            if chosen:
                loss.backward()
            for k, leaf in leaves.items():
                close(f"d {k}", leaf.grad, {"L_q": 1.0, "L_r": 1.0, "L_KD": 0.05, "L_NCE": 0.01}[k])
    close("alpha, beta, gamma",
          losses.total({k: tensor(v) for k, v in values.items()}, 2.0, 3.0, 5.0),
          oracles.total(values, 2.0, 3.0, 5.0))
