"""One training step and one evaluation pass: ours against the way of this field's published code,
in one process.

    python tests/bench_step.py                                          RN50, 224 px, C = 80, every
    optimisation in turn
    python tests/bench_step.py --backbone RN101 --size 448 --classes 200 --batch 4 --ends
    make bench                                                          a small grid, plain and ours
    only

The rival computes the same mathematics with the same weights on the same batch, as the peers'
repositories do: prompts of 77 tokens, BatchNorm as layers, v_proj and c_proj one after the other,
an attention pool whose result is thrown away, self-attention of the queries for every image, keys
and values projected at every location, a cosine for every prototype, a loop over the pairs of Eq.
13. It has today's fused attention where torch gives it by itself. `stages` switches the
optimisations on one after the other; versions take turns (A, B, ..., A, B, ...) and medians are
compared, so a busy machine slows both; OMP_NUM_THREADS=1 counts CPU time. Losses have to agree to
1e-5. Memory: the most that one step takes beyond what was there before it. Rows go to
runs/bench_step.csv.
"""

import argparse
import copy
import csv
import ctypes
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import pytest
import torch
import torch.nn.functional as F

import losses
import train
from clip.features import at_once
from clip.model import CLIP
from config import Config
from fake_datasets import COCO
from memory import MemoryBank
from trm import TRM, Output, Prompts, match

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKBONES = {
    "RN50": dict(embed_dim=1024, layers=(3, 4, 6, 3)),
    "RN101": dict(embed_dim=512, layers=(3, 4, 23, 3)),
    "small": dict(
        embed_dim=128, layers=(1, 1, 1, 1), vision_width=16, text_width=128, text_layers=2
    ),
}


def random_clip(backbone, **changes):
    """CLIP of a published size with random weights; BatchNorm's statistics are random too, so that
    folding has work to do."""
    torch.manual_seed(0)
    model = (
        CLIP(
            **(
                dict(
                    resolution=224,
                    vision_width=64,
                    patch=None,
                    context_length=77,
                    vocab_size=49408,
                    text_width=512,
                )
                | BACKBONES[backbone]
                | changes
            )
        )
        .eval()
        .requires_grad_(False)
    )
    for bn in model.modules():
        if isinstance(bn, torch.nn.BatchNorm2d):
            (
                bn.weight.uniform_(0.3, 0.9),
                bn.bias.normal_(0, 0.1),
                bn.running_mean.normal_(0, 0.1),
                bn.running_var.uniform_(0.5, 1.5),
            )
    return model.to(DEVICE)


# ---- the plain version
def plain_block(block, x, mask):
    """OpenAI's residual block: torch's multi-head attention with an additive mask, QuickGELU in two
    operations. x (S, T, W)"""
    a, y = block.attn, block.ln_1(x)
    x = (
        x
        + F.multi_head_attention_forward(
            y,
            y,
            y,
            x.shape[-1],
            a.num_heads,
            a.in_proj_weight,
            a.in_proj_bias,
            None,
            None,
            False,
            0.0,
            a.out_proj.weight,
            a.out_proj.bias,
            training=False,
            need_weights=False,
            attn_mask=mask,
        )[0]
    )
    h = block.mlp["c_fc"](block.ln_2(x))
    return x + block.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


def plain_text(clip, prompts, length=None):
    """All positions, through all blocks. length: 77 as published, or None: cut after the longest
    prompt."""
    x = torch.cat(
        [
            prompts.sot.expand(2, -1, -1, -1),
            prompts.context,
            prompts.name_eot.expand(2, -1, -1, -1),
        ],
        2,
    ).flatten(0, 1)
    x = F.pad(x, (0, 0, 0, (length or x.shape[1]) - x.shape[1]))
    mask = torch.full((x.shape[1],) * 2, -torch.inf, device=x.device).triu_(1)
    x = (x + clip.positional_embedding[: x.shape[1]]).transpose(0, 1)
    for block in clip.transformer.resblocks:
        x = plain_block(block, x, mask)
    x = clip.ln_final(x.transpose(0, 1))
    g = x[torch.arange(len(x), device=x.device), prompts.eot.repeat(2)] @ clip.text_projection
    return F.normalize(g, dim=-1).chunk(2)


@torch.no_grad()
def plain_image(clip, images):
    x = clip.visual.trunk(images)
    clip.visual.attnpool(x)  # computed and not used
    return clip.visual.dense(x)


def plain_carl(carl, f):
    """A decoder layer on (B, C, D) queries, the way nn.TransformerDecoderLayer runs it."""
    B, D = len(f), f.shape[-1]
    Q = carl.Q.expand(B, -1, -1)
    Q = carl.norm1(Q + carl.self_att(Q, Q, Q, need_weights=False)[0])
    x = F.layer_norm(f, (D,))
    energy = carl.q(Q) @ carl.k(x).mT / D**0.5
    h = carl.norm2(Q + carl.out(energy.softmax(-1) @ carl.v(x)))
    return energy, torch.sigmoid(energy) @ f, carl.norm3(h + carl.mlp(h))


@torch.no_grad()
def plain_similarities(memory, regions):
    """Eq. 8 as printed: a cosine to every prototype, then their mean."""
    visual = (
        sum(
            F.cosine_similarity(regions, memory.bank[:, j], dim=-1)
            for j in range(memory.bank.shape[1])
        )
        / memory.bank.shape[1]
    )
    return torch.stack([visual, F.cosine_similarity(regions, memory.text_prototypes, dim=-1)])


@torch.no_grad()
def einsum_similarities(memory, regions):
    """A stronger rival: all cosines at once, as one product."""
    visual = torch.einsum("bcd,cld->bcl", F.normalize(regions, dim=-1), memory.bank).mean(-1)
    return torch.stack([visual, F.cosine_similarity(regions, memory.text_prototypes, dim=-1)])


def plain_contrastive(anchors, samples, classes, tau):
    """Eq. 13 pair by pair; the similarities at least come from one product."""
    s = F.normalize(anchors, dim=-1) @ F.normalize(samples, dim=-1).T / tau
    means = []
    for c in classes.unique():
        negatives = s[c][classes != c]
        means.append(
            torch.stack(
                [
                    torch.logsumexp(torch.cat([p[None], negatives]), 0) - p
                    for p in s[c][classes == c]
                ]
            ).mean()
        )
    return torch.stack(means).mean()


# ---- the versions
def stages(folded):
    """[(name, the parts that change)]: each line keeps what the lines above it switched on."""

    @torch.no_grad()
    def folded_with_pool(_, images):
        return folded.encode(images.contiguous(memory_format=torch.channels_last))[0]

    @torch.no_grad()
    def ours(_, images):
        return folded.encode_dense(images.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def chunked(_, images):
        images = images.contiguous(memory_format=torch.channels_last)
        return torch.cat([folded.encode_dense(part) for part in images.split(at_once(images))])

    return [
        (
            "plain",
            dict(
                text=partial(plain_text, length=77),
                image=plain_image,
                carl=plain_carl,
                similarities=plain_similarities,
                contrastive=plain_contrastive,
                optimizer=torch.optim.AdamW,
            ),
        ),
        ("prompts cut after the longest", dict(text=plain_text)),
        (
            "last text block for one token, one-pass activation",
            dict(text=lambda clip, prompts: prompts(clip)),
        ),
        ("BatchNorm and projections folded, channels-last", dict(image=folded_with_pool)),
        ("no attention pool", dict(image=ours)),
        ("images in parts that fit a core's cache", dict(image=chunked)),
        (
            "self-attention once, queries projected instead of locations",
            dict(carl=lambda carl, f: carl(f)),
        ),
        (
            "similarity to the mean prototype",
            dict(similarities=lambda memory, regions: memory.similarities(regions)),
        ),
        ("Eq. 13 without a loop over pairs", dict(contrastive=losses.contrastive)),
        (
            "train.py's step: fused AdamW",
            dict(optimizer=partial(torch.optim.AdamW, fused=True), whole_step=True),
        ),
    ]


class Version:
    """A copy of what is learned and of the memory, stepped by its own parts."""

    def __init__(self, parts, case):
        self.__dict__.update(parts)
        self.clip, self.case, self.cfg = case.clip, case, Config(topk=3, stage_one=0.0, amp="none")
        self.model, self.memory = copy.deepcopy(case.model), copy.deepcopy(case.memory)
        self.learned = list(self.model.parameters())
        self.optimizer = self.optimizer(self.learned, lr=1e-4)
        self.labels = case.labels
        self.state = SimpleNamespace(
            optimizer=self.optimizer,
            scaler=torch.amp.GradScaler(DEVICE.type, enabled=False),
            scheduler=SimpleNamespace(step=lambda: None),
        )

    def text_features(self):
        return self.text(self.clip, self.model.prompts)

    def step(self):
        f = self.image(self.clip, self.case.images)
        if hasattr(self, "whole_step"):
            loss, terms, _ = train.training_step(
                self.model, self.memory, self.clip, self.cfg, f, None, self.labels, True
            )
            train.update(self.state, loss, self.cfg)
            return {name: term.detach() for name, term in (terms | {"L": loss}).items()}
        g_pos, g_neg = self.text_features()
        energy, regions, queries = self.carl(self.model.carl, f)
        scale, labels, cfg, memory = self.model.log_scale.exp(), self.labels, self.cfg, self.memory
        out = Output(
            match(regions, g_pos, g_neg, scale),
            match(queries, g_pos, g_neg, scale),
            energy,
            regions,
        )
        memory.enqueue(energy, f, labels, cfg.topk)
        s = self.similarities(memory, regions)
        memory.update_thresholds(s, labels)
        pseudo = memory.pseudo_labels(s, labels)
        filled = torch.where(labels == 0, pseudo, labels)
        present, ids = labels == 1, torch.arange(labels.shape[1], device=DEVICE)
        samples = torch.cat(
            [
                self.model.heads["region"](regions[present]),
                self.model.heads["pixel"](memory.bank.flatten(0, 1)),
            ]
        )
        classes = torch.cat(
            [ids.expand_as(labels)[present], ids.repeat_interleave(memory.bank.shape[1])]
        )
        terms = {
            "L_r": losses.asymmetric(out.logits_r, filled),
            "L_q": losses.asymmetric(out.logits_q, filled),
            "L_KD": losses.distillation(out.logits_r, out.logits_q),
            "L_NCE": self.contrastive(self.model.heads["text"](g_pos), samples, classes, cfg.tau),
        }
        terms["L"] = losses.total(terms)
        self.optimizer.zero_grad()
        terms["L"].backward()
        torch.nn.utils.clip_grad_norm_(self.learned, cfg.clip_grad)
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def scores(self, g):
        f = self.image(self.clip, self.case.images)
        return match(self.carl(self.model.carl, f)[1], *g, self.model.log_scale.exp())


def make_case(backbone, size, C, batch, L=64, clip=None, end=""):
    """clip: in the place of a random one; end: what follows a category's name in its prompt."""
    clip = clip or random_clip(backbone)
    names, D = [COCO[c % 80] for c in range(C)], clip.D
    case = SimpleNamespace(
        clip=clip,
        folded=copy.deepcopy(clip).fold(),
        names=names,
        name=f"{backbone} {size} C {C} B {batch} {DEVICE.type}",
    )
    torch.manual_seed(1)
    case.model = TRM(C, D, Prompts(clip, [name + end for name in names])).to(DEVICE)
    case.memory = MemoryBank(C, L, D).to(DEVICE)
    # as in the later epochs: queues are full
    case.memory.bank.copy_(F.normalize(torch.randn(C, L, D), dim=-1))
    case.memory.cursor.fill_(L)
    case.memory.text_prototypes.copy_(F.normalize(torch.randn(C, D), dim=-1))
    # not the batch's own means: ties would flip by rounding
    case.memory.theta.copy_(torch.tensor([[0.0], [-1e-4]]).expand_as(case.memory.theta))
    case.images = torch.randn(batch, 3, size, size, device=DEVICE)
    truth = torch.where(torch.rand(batch, C) < 0.05, 1, -1)
    case.labels = torch.where(torch.rand(batch, C) < 0.3, truth, 0).to(torch.int8).to(DEVICE)
    return case


# ---- measurement
def seconds(work):
    """By the clock; on a single CPU thread its own CPU time, which other processes do not
    lengthen."""
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None
    clock = (
        time.process_time
        if DEVICE.type == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )
    wait()
    start = clock()
    work()
    wait()
    return clock() - start


def interleaved(works, repeats, warm=True):
    """Medians of works that take turns; the first turn warms up, unless that has been done."""
    rounds = [[seconds(work) for work in works] for _ in range(repeats + warm)][warm:]
    return [statistics.median(times) for times in zip(*rounds)]


def peak(work):
    """MiB that work() takes at its peak beyond what was there before; NaN where neither CUDA nor
    Linux can tell."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the earlier peak
    except (OSError, AttributeError):
        return float("nan")
    kib = lambda key: next(
        int(line.split()[1])
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(key)
    )
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) / 1024


def write_rows(name, rows):
    """Rows (dicts) into runs/NAME; a rerun of the same case replaces its rows."""
    file = Path(__file__).resolve().parent.parent / "runs" / name
    file.parent.mkdir(exist_ok=True)
    key = lambda row: tuple(str(row[k]) for k in list(rows[0])[:3])
    old = list(csv.DictReader(file.open())) if file.exists() else []
    new = {key(row) for row in rows}
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(
            [row for row in old if all(k in row for k in list(rows[0])[:3]) and key(row) not in new]
            + rows
        )


def compare(case, repeats=3, ends=False):
    """Prints and returns the rows of one case; ends: the plain version and ours only."""
    steps, parts = [], {}
    for name, change in stages(case.folded):
        parts = parts | change
        steps.append((name, parts))
    versions = [
        (name, Version(parts, case))
        for name, parts in (steps[:: len(steps) - 1] if ends else steps)
    ]
    first, memory = [], []
    for _, version in versions:  # the step that warms up tells losses and memory
        memory.append(peak(lambda: first.append(version.step())))
    plain, ours = versions[0][1], versions[-1][1]
    times = interleaved([version.step for _, version in versions], repeats, warm=False)
    rows, device = (
        [],
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
    )
    print(
        f"\n{case.name}, {device}, torch {torch.__version__}\n{'':61}  s/step  x plain    MiB   "
        "max loss difference"
    )
    for (name, _), t, mib, terms in zip(versions, times, memory, first):
        gap = max(float(abs(terms[k] - first[0][k]) / abs(first[0][k]).clamp(min=1)) for k in terms)
        rows.append(
            dict(
                case=case.name,
                what="step",
                version=name,
                device=device,
                seconds=t,
                ratio=times[0] / t,
                MiB=mib,
                gap=gap,
            )
        )
        print(f"{name:61} {t:7.3f} {times[0] / t:8.2f} {mib:6.0f}   {gap:.1e}")

    def text(version):
        version.model.zero_grad()
        g_pos, g_neg = version.text_features()
        (g_pos - g_neg).square().sum().backward()

    with torch.no_grad():
        g, regions = (
            plain.text_features(),
            torch.randn(len(case.images), *case.memory.text_prototypes.shape, device=DEVICE),
        )
    L = case.memory.bank.shape[1]
    similarity = [
        partial(how, case.memory, regions)
        for how in (plain_similarities, einsum_similarities, MemoryBank.similarities)
    ]
    for what, works, kept in (
        ("text branch, forward and backward", [partial(text, plain), partial(text, ours)], 1),
        ("evaluation, text features kept", [partial(plain.scores, g), partial(ours.scores, g)], 1),
        (f"prototype similarity, L {L}", [similarity[0], similarity[2]], 20),
        (f"prototype similarity, L {L}, against one product", [similarity[1], similarity[2]], 20),
    ):
        a, b = interleaved([lambda w=w: [w() for _ in range(kept)] for w in works], repeats)
        rows.append(
            dict(
                case=case.name,
                what=what,
                version="ours",
                device=device,
                seconds=b / kept,
                ratio=a / b,
                MiB="",
                gap="",
            )
        )
        print(f"{what:61} {b / kept:7.4f} {a / b:8.2f}")
    write_rows("bench_step.csv", rows)
    return rows


@pytest.mark.parametrize(
    "backbone, size, C, batch",
    [
        ("RN50", 224, 20, 8),
        ("RN50", 224, 80, 8),
        ("RN50", 224, 200, 8),
        ("RN101", 224, 80, 8),
        ("RN50", 448, 80, 4),
        ("RN101", 448, 80, 4),
    ],
)
def test_step(backbone, size, C, batch):
    rows = compare(
        make_case(backbone, size, C, batch if DEVICE.type == "cpu" else 128), ends=True, repeats=2
    )
    assert rows[1]["gap"] < 1e-5 and rows[1]["ratio"] > 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="RN50", choices=BACKBONES)
    for name, default in (("size", 224), ("classes", 80), ("batch", 16), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ends", action="store_true", help="the plain version and ours only")
    args = parser.parse_args()
    compare(make_case(args.backbone, args.size, args.classes, args.batch), args.repeats, args.ends)
