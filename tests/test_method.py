"""What the method does beside its equations: starts, order of a step, dropout, clipping, stages."""
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_world import run, weights, world

import losses
import oracles
import train
from clip import build
from config import Config
from memory import MemoryBank
from support import UserError
from support.checkpoint import read_checkpoint
from tools.predictor import Predictor
from trm import CARL, TRM, Prompts, spatial_aggregation

pytestmark = pytest.mark.paper


def test_the_energies_start_as_clips_own_similarity():
    """The values start as in torch's attention: Xavier's weights, no bias."""
    torch.manual_seed(0)
    random_queries = CARL(200, 64).Q.detach()
    assert float(random_queries.std()) == pytest.approx(1, rel=0.05)
    carl = CARL(3, 64)
    for linear in (carl.q, carl.k):
        assert torch.equal(linear.weight, torch.eye(64))
    bound = (6 / (64 + 64)) ** 0.5
    assert 0.99 * bound < float(carl.v.weight.detach().abs().max()) <= bound
    for linear in (carl.q, carl.k, carl.v, carl.out):
        assert not linear.bias.any()


def test_the_defaults_are_the_papers():
    """Sec. 4.1 and, for Eq. 14, Sec. 3.6. The functions' own defaults say the same as the run's."""
    cfg = Config()
    assert dict(clip="RN101", size=448, context=16, augment="taidpt", epochs=40, batch=128, lr=5e-4,
                matching="carl", score="region", without="", alpha=1.0, beta=0.05, gamma=0.01,
                gamma_pos=1.0, gamma_neg=2.0, shift=0.05).items() <= vars(cfg).items()
    for function, settings in (
            (losses.total, dict(alpha=cfg.alpha, beta=cfg.beta, gamma=cfg.gamma)),
            (losses.asymmetric, dict(gamma_pos=cfg.gamma_pos, gamma_neg=cfg.gamma_neg,
                                     shift=cfg.shift,
                                     assume_negative=cfg.assume_negative or 0.0)),
            (losses.distillation, dict(how=cfg.kd, temperature=cfg.kd_temperature,
                                       teacher=cfg.kd_teacher)),
            (losses.contrastive, dict(tau=cfg.tau)),
            (Prompts, dict(M=cfg.context)),
            (MemoryBank, dict(eta=cfg.eta))):
        found = inspect.signature(function).parameters
        assert {name: found[name].default for name in settings} == settings, function


def test_what_follows_from_other_settings():
    """A baseline has no part of the method."""
    assert Config().uses("mmcp") and not Config(matching="average").uses("mmcp")


def test_the_context_starts_as_the_paper_says():
    """N(0, 0.02), Sec. 4.1."""
    clip = build(weights())
    context = Prompts(clip, ["cat", "dog"] * 20, 8).context
    assert context.shape == (2, 40, 8, clip.W)
    assert float(context.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_a_prompt_may_be_as_long_as_clip_reads_and_no_longer():
    clip = build(weights())
    name = int(clip.tokenize(["cat"])[0].argmax()) + 1  # SOT, the name, EOT
    M = clip.context_length - name
    assert Prompts(clip, ["cat"], M)(clip)[0].isfinite().all()
    with pytest.raises(UserError, match="use fewer"):
        Prompts(clip, ["cat"], M + 1)


def test_text_features_have_unit_length():
    """Eq. 8 and DualCoOp's matching take their dot products for cosines."""
    clip = build(weights())
    for g in Prompts(clip, ["cat", "dog"], 4)(clip):
        assert torch.allclose(g.norm(dim=-1), torch.ones(2), atol=1e-6)


def test_what_is_computed_again_for_the_gradient_changes_nothing(monkeypatch):
    """Too many prompts, or images, for one piece are taken piece by piece: the same values and
    gradients."""
    torch.manual_seed(0)
    clip, carl, f = build(weights()), CARL(3, 8), torch.randn(5, 4, 8)
    prompts = Prompts(clip, ["cat", "traffic light", "dog"], 4)
    found = []
    for of_prompts, of_images in ((512, 2**25), (4, 2 * carl.Q.numel()), (1, 1)):
        monkeypatch.setattr(Prompts, "at_once", of_prompts)
        monkeypatch.setattr(CARL, "at_once", of_images)
        made = [*prompts(clip), *carl(f)]
        sum((part * part.detach().cos()).sum() for part in made).backward()
        found.append([*(part.detach() for part in made), prompts.context.grad, carl.k.weight.grad])
        prompts.context.grad = carl.k.weight.grad = None
    for parts in found[1:]:
        for one, other in zip(found[0], parts):
            assert one.any() and torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_learned_tokens_in_the_place_of_words_give_the_words_features():
    """[SOT] w_1 ... w_M [name] [EOT]: with the embeddings of "a photo of a" as context, the text
    features are those of the sentence, read at its EOT."""
    clip = build(weights())
    names = ["cat", "traffic light"]
    words = clip.tokenize(["a photo of a"])  # SOT, four words, EOT
    M = int(words[0].argmax()) - 1
    prompts = Prompts(clip, names, M)
    with torch.no_grad():
        prompts.context.copy_(clip.token_embedding(words[:, 1:M + 1]).expand(2, 2, -1, -1))
        want = clip.encode_text(clip.tokenize([f"a photo of a {name}" for name in names]))
        for g in prompts(clip):
            assert torch.allclose(g, F.normalize(want, dim=-1), atol=1e-5)


def test_dropout_acts_on_the_attention_the_three_residuals_and_the_feed_forward():
    class Counted(torch.nn.Module):
        shapes = []

        def forward(self, x):
            self.shapes.append(tuple(x.shape))
            return x

    carl = CARL(3, 8, dropout=0.5)
    assert carl.dropout.p == carl.mlp[2].p == 0.5
    carl.dropout = Counted()
    carl.mlp[2] = Counted()
    carl(torch.randn(2, 5, 8))
    # self-attention's residual; attention weights; cross-attention's; feed-forward inside, outside
    assert Counted.shapes == [(1, 3, 8), (2, 3, 5), (2, 3, 8), (2, 3, 32), (2, 3, 8)]


def test_dualcoop_weights_its_locations_by_the_positive_similarity():
    torch.manual_seed(0)
    f = torch.randn(2, 4, 6)
    g_pos, g_neg = F.normalize(torch.randn(2, 3, 6), dim=-1)
    logits, shown = spatial_aggregation(f, g_pos, g_neg, 50.0, 20.0)
    for b in range(2):
        for c in range(3):
            pos = [float(F.cosine_similarity(f[b, n], g_pos[c], dim=0)) for n in range(4)]
            neg = [float(F.cosine_similarity(f[b, n], g_neg[c], dim=0)) for n in range(4)]
            weight = np.exp(20 * np.array(pos)) / np.exp(20 * np.array(pos)).sum()
            want = 50 * sum(w * (p - q) for w, p, q in zip(weight, pos, neg))
            assert float(logits[b, c]) == pytest.approx(want, abs=1e-4)
            assert shown[b, c].tolist() == pytest.approx(pos, abs=1e-5)


def test_a_baseline_without_regions_matches_one_feature_of_the_whole_image():
    """Table 3's first row, "omitting the attention module": the mean of the dense features."""
    torch.manual_seed(0)
    f, x = torch.randn(3, 7, 16), torch.randn(3, 16)
    g_pos, g_neg = F.normalize(torch.randn(2, 4, 16), dim=-1)
    for matching, whole in (("average", sum(f[:, n] for n in range(7)) / 7), ("global", x)):
        model = TRM(4, 16, matching=matching)
        logits, _, shown, _ = model(f, x, g_pos, g_neg)
        assert shown is None  # pictures are not drawn in training
        shown = model.eval()(f, x, g_pos, g_neg).energy  # (B, C, N)
        assert torch.allclose(shown, F.cosine_similarity(f[:, None], g_pos[:, None], dim=-1),
                              atol=1e-5)
        for b in range(3):
            cosines = [[float(F.cosine_similarity(whole[b], g[c], dim=0)) for c in range(4)]
                       for g in (g_pos, g_neg)]
            want = float(np.exp(3.91)) * (np.array(cosines[0]) - cosines[1])
            assert np.allclose(logits[b].detach(), want, atol=1e-4), matching


@pytest.mark.parametrize("matching, learned", (("dualcoop", True), ("dualcoop-fixed", False)))
def test_dualcoops_spatial_temperature_starts_at_a_twentieth_and_is_learned_or_not(matching,
                                                                                   learned):
    model = TRM(4, 16, matching=matching)
    scale = model.log_spatial_scale
    assert scale.exp().item() == pytest.approx(20) and scale.requires_grad == learned
    f, (g_pos, g_neg) = torch.randn(2, 7, 16), F.normalize(torch.randn(2, 4, 16), dim=-1)
    want, _ = spatial_aggregation(f, g_pos, g_neg, float(np.exp(3.91)), 20.0)
    assert torch.allclose(model(f, None, g_pos, g_neg).logits_r, want, atol=1e-3)


def test_the_contrastive_heads_are_no_linear_maps():
    """Sec. 3.5: "an additional multilayer perceptron"; of a linear map the sum below is 0."""
    x = torch.randn(5, 16)
    for name, head in TRM(4, 16).heads.items():
        bent = head(x) + head(-x) - 2 * head(torch.zeros_like(x))
        assert bent.abs().max() > 0.01, name


def test_a_slot_is_filled_from_the_first_row_on_and_not_before():
    memory = MemoryBank(4, 3, 2)
    memory.cursor.copy_(torch.tensor([0, 1, 3, 7]))
    assert memory.filled().sum(1).tolist() == [0, 1, 3, 3]
    assert memory.filled()[1].tolist() == [True, False, False]


def test_energies_rank_even_where_their_sigmoids_are_equal():
    memory, f = MemoryBank(1, 1, 2), torch.eye(2)[None]
    memory.enqueue(torch.tensor([[[30.0, 40.0]]]), f, torch.tensor([[1]]), 1)  # sigmoid: 1, 1
    assert torch.equal(memory.bank[0, 0], f[0, 1])


def test_an_empty_slot_is_no_sample_of_the_contrastive_loss():
    class Model:
        heads = torch.nn.ModuleDict({name: torch.nn.Identity() for name in ("region", "pixel")})

    memory = MemoryBank(2, 3, 4)
    memory.cursor.copy_(torch.tensor([1, 0]))
    memory.bank[0, 0] = 1
    present = torch.tensor([[True, False], [False, True]])
    regions = torch.randn(2, 2, 4)
    samples, classes = TRM.contrastive_samples(Model, regions, present, memory)
    assert classes.tolist() == [0, 1, 0]
    assert torch.equal(samples, torch.stack([regions[0, 0], regions[1, 1], memory.bank[0, 0]]))


@pytest.mark.parametrize("scaled", (False, True))
def test_an_update_takes_the_clipped_gradient_of_its_own_batch_at_the_rate_of_its_step(scaled):
    """By hand, with plain gradient descent; a scaled loss, as float16 has it, changes nothing."""
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (0.1, 0.5, 9.0)[step])
    state = SimpleNamespace(optimizer=optimizer, scheduler=schedule,
                            scaler=torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled))
    cfg = SimpleNamespace(clip_grad=1.0)
    norm = train.update(state, 3 * w[0] + 4 * w[1], cfg)  # (3, 4) is clipped to (0.6, 0.8)
    assert float(norm) == pytest.approx(5)
    assert w.tolist() == pytest.approx([1 - 0.1 * 0.6, 2 - 0.1 * 0.8], abs=1e-5)
    norm = train.update(state, 0.3 * w[0] + 0.4 * w[1], cfg)  # short enough as it is
    assert float(norm) == pytest.approx(0.5)
    assert w.tolist() == pytest.approx([0.94 - 0.5 * 0.3, 1.92 - 0.5 * 0.4], abs=1e-5)


def test_an_update_clips_all_groups_of_the_optimizer_together():
    a, b = (torch.nn.Parameter(torch.tensor(0.0)) for _ in range(2))
    optimizer = torch.optim.SGD([dict(params=[a]), dict(params=[b], lr=10.0)], lr=1.0)
    state = SimpleNamespace(optimizer=optimizer, scheduler=SimpleNamespace(step=int),
                            scaler=torch.amp.GradScaler("cpu", enabled=False))
    norm = train.update(state, 30 * a + 40 * b, SimpleNamespace(clip_grad=1.0))
    assert float(norm) == pytest.approx(50)
    assert (a.item(), b.item()) == pytest.approx((-0.6, -8.0), abs=1e-5)


@pytest.mark.parametrize("settings", ({}, dict(pseudo_in_contrastive=True), dict(without="mmcp"),
                                      dict(without="mmcl"), dict(without="kd"),
                                      dict(without="visual"), dict(without="text"),
                                      dict(assume_negative=0.3),
                                      dict(kd="bernoulli", kd_teacher="query")))
def test_two_training_steps_are_section_3_by_the_oracles(settings):
    """Terms, pseudo-labels and total of two batches of stage two, from energies and texts on."""
    B, C, N, D, k = 12, 6, 5, 8, 2
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(2, C, D), dim=-1)
    model = TRM(C, D, prompts=lambda encoder: texts)
    memory = MemoryBank(C, 4, D, eta=0.6)
    memory.set_text_prototypes(torch.randn(C, D))
    cfg = Config(topk=k, alpha=0.7, beta=0.3, gamma=0.2, tau=0.3, kd_temperature=2.0, gamma_pos=1.5,
                 gamma_neg=3.0, shift=0.1, **settings)
    queues, theta = oracles.Queues(C, 4, D), np.full((2, 2, C), np.nan)
    prototypes, (g_pos, g_neg) = memory.text_prototypes.numpy(), texts.numpy()
    modalities = [i for i, name in enumerate(("visual", "text")) if cfg.uses(name)]
    scale, estimated = float(model.log_scale.detach().exp()), 0

    def mlp(name, x):
        return model.heads[name](torch.tensor(np.array(x), dtype=torch.float32)).detach().numpy()

    for _ in range(2):
        f = torch.randn(B, N, D)
        labels = torch.randint(-1, 2, (B, C), dtype=torch.int8)
        loss, terms, pseudo = train.training_step(model, memory, None, cfg, f, None, labels, True)

        energy, _, f_q = (part.detach().numpy() for part in model.carl(f))
        known = labels.numpy()
        f_r = oracles.region_pool(energy, f.numpy())
        logits_r, logits_q = (oracles.match(x, g_pos, g_neg, scale) for x in (f_r, f_q))
        queues.enqueue(energy, f.numpy(), known, k)
        lists = [queues.queue(c) for c in range(C)]
        completed = known
        if cfg.uses("mmcp"):
            assumed = np.where(known == 0, -1, known) if cfg.assume_negative else known
            for i, part in enumerate((lists, prototypes[:, None])):
                theta[i] = oracles.ema(theta[i], oracles.batch_means(f_r, assumed, part), 0.6)
            s, bounds = oracles.similarities(f_r, lists, prototypes), theta
            if len(modalities) == 1:  # the one that is left agrees with itself
                s, bounds = s[modalities * 2], theta[modalities * 2]
            guessed = oracles.pseudo_labels(s, known, bounds)
            assert (pseudo.numpy() == guessed).all()
            estimated += np.count_nonzero(guessed)
            completed = np.where(known == 0, guessed, known)
        want = {name: oracles.asymmetric(logits, completed, 1.5, 3, 0.1, cfg.assume_negative or 0)
                for name, logits in (("L_r", logits_r), ("L_q", logits_q))}
        if cfg.uses("kd"):
            teacher, student = logits_r, logits_q
            if cfg.kd_teacher == "query":
                teacher, student = student, teacher
            want["L_KD"] = oracles.distillation(teacher, student, cfg.kd, 2.0)
        if cfg.uses("mmcl"):
            present = (completed if cfg.pseudo_in_contrastive else known) == 1
            samples = np.concatenate([mlp("region", f_r[present]),
                                      mlp("pixel", [v for queue in lists for v in queue])])
            classes = [*present.nonzero()[1], *(c for c in range(C) for _ in lists[c])]
            want["L_NCE"] = oracles.contrastive(mlp("text", g_pos), samples, classes, 0.3)
        want["L"] = oracles.total(want, 0.7, 0.3, 0.2)
        found = {name: float(value.detach()) for name, value in (terms | {"L": loss}).items()}
        assert found == pytest.approx(want, rel=1e-4)
    assert estimated or not cfg.uses("mmcp")


def test_stage_one_fills_the_bank_and_does_no_more():
    """"Trained in the first stage" (Sec. 3.4): no estimate and no Eq. 13, but prototypes."""
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(2, 6, 8), dim=-1)
    model, memory = TRM(6, 8, prompts=lambda encoder: texts), MemoryBank(6, 4, 8)
    labels = torch.randint(-1, 2, (12, 6), dtype=torch.int8)
    _, terms, pseudo = train.training_step(model, memory, None, Config(topk=2),
                                           torch.randn(12, 5, 8), None, labels, False)
    assert pseudo is None and set(terms) == {"L_r", "L_q", "L_KD"}
    assert memory.theta.isnan().all()
    assert memory.cursor.tolist() == (2 * (labels == 1).sum(0)).tolist()


def test_what_each_loss_teaches():
    """Which parameters a term of Eq. 15 has a gradient for: tau is learned by all that match with
    the texts; the region scores do not need the decoder's feed-forward, and teach it in Eq. 6;
    Eq. 13 moves texts and regions, each through its own MLP, and has a temperature of its own."""
    B, C, D = 12, 6, 8
    torch.manual_seed(0)
    texts = F.normalize(torch.randn(2, C, D), dim=-1).requires_grad_()
    model = TRM(C, D, prompts=lambda encoder: texts)
    memory = MemoryBank(C, 4, D)
    memory.set_text_prototypes(torch.randn(C, D))
    labels = torch.randint(-1, 2, (B, C), dtype=torch.int8)
    _, terms, _ = train.training_step(model, memory, None, Config(), torch.randn(B, 5, D), None,
                                      labels, True)
    taught = {"texts": texts, "tau": model.log_scale, "category queries": model.carl.Q,
              "keys": model.carl.k.weight, "feed-forward": model.carl.mlp[0].weight,
              **{f"{name} MLP": head[0].weight for name, head in model.heads.items()}}
    matched = {"texts", "tau", "category queries", "keys"}
    want = {"L_r": matched, "L_q": matched | {"feed-forward"}, "L_KD": matched | {"feed-forward"},
            "L_NCE": {"texts", "category queries", "keys", "text MLP", "region MLP", "pixel MLP"}}
    for term, names in want.items():
        gradients = torch.autograd.grad(terms[term], list(taught.values()), retain_graph=True,
                                        allow_unused=True)
        found = {name for name, gradient in zip(taught, gradients)
                 if gradient is not None and gradient.abs().max() > 0}
        assert found == names, term


def test_the_order_of_a_step_and_what_happens_once(world, tmp_path, monkeypatch):
    """The bank, then the thresholds, then the verdict; prototypes of the text once, at the end of
    stage one; other dropout in each epoch; the gradient's norm clipped in each step."""
    calls, seeds, norms, texts = [], [], [], []
    for name in ("enqueue", "similarities", "update_thresholds", "pseudo_labels",
                 "set_text_prototypes"):
        def recorded(self, *arguments, name=name, original=getattr(MemoryBank, name)):
            calls.append(name)
            if name == "set_text_prototypes":
                assert arguments[0] is texts[-1][0]  # the positive texts
            return original(self, *arguments)
        monkeypatch.setattr(MemoryBank, name, recorded)
    prompts = Prompts.forward
    monkeypatch.setattr(Prompts, "forward",
                        lambda self, clip: texts.append(prompts(self, clip)) or texts[-1])
    seed, clip_norm = torch.manual_seed, torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch, "manual_seed", lambda value: seeds.append(value) or seed(value))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda parameters, norm: norms.append(norm) or clip_norm(parameters, norm))
    chosen = []
    for place, name in ((torch.optim, "AdamW"), (torch.optim.lr_scheduler, "OneCycleLR")):
        def noted(*given, original=getattr(place, name), **named):
            chosen.append(named)
            return original(*given, **named)
        monkeypatch.setattr(place, name, noted)
    step, trains = train.training_step, []
    monkeypatch.setattr(train, "training_step", lambda model, *given: (
        trains.append(model.training) or step(model, *given)))
    run(world, tmp_path / "run", epochs=3, clip_grad=0.5, lr=2e-4, weight_decay=0.03)
    assert trains == [True] * 9  # with dropout, also after an evaluation
    assert (chosen[0]["lr"], chosen[0]["weight_decay"]) == (2e-4, 0.03)
    assert chosen[1] == dict(max_lr=2e-4, total_steps=9)
    assert calls.count("set_text_prototypes") == 1
    second = calls[calls.index("set_text_prototypes") + 1:]
    order = ["enqueue", "similarities", "update_thresholds", "pseudo_labels"]
    assert second == order * 6  # two epochs of three steps
    assert len(norms) == 9 and set(norms) == {0.5}
    assert len(set(seeds[-3:])) == 3


def test_assumed_negatives_give_the_negative_threshold(world, tmp_path):
    """With a single positive an image nothing else could: without them theta_neg never exists."""
    for weight, there in ((0.3, True), (0.0, False)):
        run(world, tmp_path / f"run-{weight}", ratio=None, single_positive="largeloss", epochs=2,
            stage_one=0, assume_negative=weight)
        theta = read_checkpoint(tmp_path / f"run-{weight}" / "last.pt")["memory"]["theta"]
        assert bool(theta[:, 1].isfinite().any()) == there


def test_known_positives_alone_enter_the_bank(world, tmp_path):
    """Eq. 7: K rows for each known positive of each epoch, also in stage one."""
    run(world, tmp_path / "run", epochs=2, topk=3)
    predictor = Predictor(tmp_path / "run", "last")
    known = (predictor.splits()["train"].labels == 1).sum(0)  # (C,)
    cursor = read_checkpoint(tmp_path / "run" / "last.pt")["memory"]["cursor"]
    assert cursor.tolist() == (2 * 3 * known).tolist()
