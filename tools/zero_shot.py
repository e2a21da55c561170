"""What CLIP says without training, and the mixed score, which adds it to a run's (not the paper's).

n images, B of a batch, C categories, N locations, D dims. Studies: docs/readings.md.
"""
import torch
import torch.nn.functional as F

TEMPLATES = ("a photo of a {}", "a picture of a {}", "a drawing of a {}",
             "there is a {} in the scene")
SURE = 13.8  # a logit; beyond it (a probability of 1e-6) a run is not surer


@torch.no_grad()
def zero_shot_text(encoder, prompts, templates=TEMPLATES):
    """(C, D) unit mean of the text features of all templates."""
    tokens = [encoder.tokenize([t.format(p) for p in prompts]) for t in templates]
    g = sum(F.normalize(encoder.encode_text(of_template), dim=-1) for of_template in tokens)
    return F.normalize(g, dim=-1)


def zero_shot_score(f, x, g):
    """The cosine of the whole image plus that of its best location.
    f (B, N, D), x (B, D), g (C, D) unit -> (B, C)"""
    return F.normalize(x, dim=-1) @ g.T + (F.normalize(f, dim=-1) @ g.T).amax(1)


@torch.no_grad()
def zero_shot(g, batches):
    """batches, the (index, f, x) of a loader -> {"global": cosine of the whole image to g (C, D),
    "dense": that of its best location, "both": their sum}, each (n, C)."""
    pairs = [(F.normalize(x, dim=-1) @ g.T, zero_shot_score(f, x, g)) for _, f, x in batches]
    whole, both = (torch.cat(parts).cpu().numpy() for parts in zip(*pairs))
    return {"global": whole, "dense": both - whole, "both": both}


def scores_of(out, f, x, g):
    """trm.Output of a batch -> {score: (B, C)}: the logits "region" (the paper's, and a baseline's
    only one), "query" and "mean", and the "zero-shot" cosines."""
    scores = {"region": out.logits_r}
    if out.logits_q is not None:
        scores |= {"query": out.logits_q, "mean": (out.logits_r + out.logits_q) / 2}
    return scores | {"zero-shot": zero_shot_score(f, x, g)}


def probabilities(scores, scale):
    """Logits as probabilities; mixed too where there is a scale; the zero-shot cosines stay."""
    if scale is not None:
        scores = scores | {"mixed": mixed(scores, scale)}
    return {name: one if name == "zero-shot" else one.sigmoid() for name, one in scores.items()}


def probability_arrays(scores, scale):
    """The same of a split on the CPU, numpy float64: float32 rounds the probability of each logit
    above 16.6 to 1, and what is equal cannot be ranked."""
    exact = {name: score.double() for name, score in scores.items()}
    return {name: p.numpy() for name, p in probabilities(exact, scale).items()}


def zero_shot_scale(scores, positives):
    """What `mixed` needs -> (3, C) float32: slope and offset, which give the zero-shot score the
    mean and the deviation of the run's logit over some images, and its weight for n known positives
    in training, (n^2 + 25) / (2 n^2 + 25): two thirds for five, half for many (docs/readings.md). A
    run may deny all images alike: the deviation is 1 at least, so that zero-shot still ranks them;
    and where no positive is known the scale is that of a score without a run, 2 (z - 1), so that
    some images pass.
    scores: those images' as `scores_of` gives them, positives (C,)"""
    logit, zero = scores.get("mean", scores["region"]).clamp(-SURE, SURE), scores["zero-shot"]
    n = torch.as_tensor(positives, dtype=torch.float32)
    mean = logit.mean(0).where(n > 0, -2)
    deviation = logit.std(0, correction=0).clamp(min=1).where(n > 0, 2)
    slope = deviation / zero.std(0, correction=0).clamp(min=1e-6)
    return torch.stack([slope, mean - slope * zero.mean(0), (n**2 + 25) / (2 * n**2 + 25)])


def mixed(scores, scale):
    """The weighted mean of the run's logit and the zero-shot score on its scale: a logit (n, C).
    scores: as `scores_of` gives them, scale (3, C)"""
    slope, offset, weight = scale.to(scores["zero-shot"].device)
    logit = scores.get("mean", scores["region"]).clamp(-SURE, SURE)
    return (1 - weight) * logit + weight * (slope * scores["zero-shot"] + offset)
