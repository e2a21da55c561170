"""The four losses and their sum (paper, Sec. 3.3, 3.5, 3.6; Eq. 6, 13, 14, 15). Every one returns a scalar.

B images, C categories, E width of the contrastive space, S samples. Labels: 1 present, -1 absent, 0 unknown.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def asymmetric(logits, labels, gamma_pos=1.0, gamma_neg=2.0, shift=0.05, assume_negative=0.0):
    """Eq. 14, asymmetric loss: known labels only, easy ones damped. The sign is explicit (the print omits it).

    logits (B, C) float;  labels (B, C) int, 1 / -1 / 0;  shift: the paper's c
    assume_negative   weight of the negative term on unknown labels (0: they contribute nothing, the paper's partial setting)
    returns the sum over the categories, mean over the images. With gammas and shift 0 it is binary cross-entropy exactly.
    """
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)                 # (B, C)
    p = log_p.exp()
    if shift > 0:
        p_m = (p - shift).clamp(min=0)                                             # very easy negatives vanish
        log_not_p_m = torch.log1p(-p_m)
    else:
        p_m, log_not_p_m = p, log_not_p
    positive = _power(1 - p, gamma_pos) * log_p
    negative = _power(p_m, gamma_neg) * log_not_p_m
    loss = -torch.where(labels == 1, positive, negative)
    return torch.where(labels == 0, assume_negative * loss, loss).sum(1).mean()


def _power(base, exponent):
    """base ** exponent with gradient 0, not infinity, where the base is 0 and the exponent below 1."""
    return torch.where(base > 0, base, 1.0) ** exponent * (base > 0) if 0 < exponent < 1 else base**exponent


def distillation(logits_r, logits_q, how="softmax", temperature=1.0, teacher="region"):
    """Eq. 6, KL(p^r || p^q): the region scores teach the query scores. No gradient reaches the teacher.

    logits_r, logits_q (B, C);  how "softmax": as printed, p over the C categories; "bernoulli": present / absent per category, summed.
    teacher   "region" as in the paper; "query": KL(p^q || p^r) instead; "both": as "region", but the gradient reaches both
    Multiplied by temperature squared, so that its gradient keeps its size (Hinton et al., 2015). Mean over the images.
    ValueError for another `how` or `teacher`.
    """
    if how not in ("softmax", "bernoulli") or teacher not in ("region", "query", "both"):
        raise ValueError("distillation expects how='softmax' or 'bernoulli' and teacher='region', 'query' or 'both', "
                         f"got {how!r} and {teacher!r}")
    logits = (logits_q, logits_r) if teacher == "query" else (logits_r, logits_q)  # teacher, student
    if how == "bernoulli":
        logits = [torch.stack([x, torch.zeros_like(x)], -1) for x in logits]       # (B, C, 2)   present, absent
    log_t, log_s = ((x / temperature).log_softmax(-1) for x in logits)
    if teacher != "both":
        log_t = log_t.detach()
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)                                   # (B,) or (B, C)
    return temperature**2 * (kl.sum(1) if how == "bernoulli" else kl).mean()


def contrastive(anchors, samples, classes, tau=0.07, chunk=2**26):
    """Eq. 13, InfoNCE with the text of category c as anchor, against regions and prototypes.

    anchors (C, E) one a category;  samples (S, E);  classes (S,) int: category of each sample, -1 = an empty place
    Positives P of anchor c are the samples of category c, negatives those of all others. Each positive stands alone against the
    negatives: -log(e^p / (e^p + sum e^n)) = softplus(logsumexp(n) - p). Mean over P, then over the categories that have any.
    chunk bounds the (anchors, samples) logits held at once; beyond it they are recomputed in the backward pass.
    """
    anchors, samples = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (anchors, samples))
    anchors, C, S = anchors / tau, len(anchors), len(samples)
    valid, row = (classes >= 0).to(samples.dtype), classes.clamp(min=0)            # (S,)

    def logits(samples, valid, row):                                               # of S' samples -> p (S',), logsumexp of n (C,)
        s = torch.addmm((valid - 1) * 1e9, anchors, samples.T)                     # (C, S')   an empty place is nobody's negative
        p = s.gather(0, row[None])[0]                                              # (S',)     a sample is the positive of one anchor
        return p, s.scatter(0, row[None], -1e9).logsumexp(1)                       #           and a negative of all others

    if C * S <= chunk:
        p, log_n = logits(samples, valid, row)
    else:
        parts = [checkpoint(logits, *part, use_reentrant=False, preserve_rng_state=False)
                 for part in zip(*(x.split(max(1, chunk // C)) for x in (samples, valid, row)))]
        p, log_n = torch.cat([p for p, _ in parts]), torch.stack([n for _, n in parts]).logsumexp(0)
    count = valid.new_zeros(C).index_add_(0, row, valid)                           # |P| of each category
    weight = valid / count.clamp(min=1)[row] / (count > 0).sum().clamp(min=1)      # mean over P, mean over the categories
    return (weight * F.softplus(log_n[row] - p)).sum()


def total(terms, alpha=1.0, beta=0.05, gamma=0.01):
    """terms: dict of the scalars L_q, L_r, L_KD, L_NCE -> their weighted sum; a missing one counts as 0."""
    L_q, L_r, L_KD, L_NCE = (terms.get(k, 0.0) for k in ("L_q", "L_r", "L_KD", "L_NCE"))
    return L_q + alpha * L_r + beta * L_KD + gamma * L_NCE                         # Eq. 15
