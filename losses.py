"""Three losses and their sum, scalars (paper, Sec. 3.3, 3.5, 3.6; Eq. 6, 13, 14, 15).

B images, C categories, E width of the contrastive space, S samples.
Labels: 1 present, -1 absent, 0 unknown.
"""
import torch
import torch.nn.functional as F

from support.recompute import checkpointed


def asymmetric(logits, labels, gamma_pos=1.0, gamma_neg=2.0, shift=0.05, assume_negative=0.0):
    """Eq. 14, asymmetric loss: easy labels are damped. The paper omits the minus.

    logits (B, C) float;  labels (B, C) int, 1 / -1 / 0;  shift: the paper's c
    assume_negative   weight of the negative term on unknown labels (0: they contribute nothing)
    returns the sum over the categories, mean over the images

    With gammas and shift 0 it is exactly binary cross-entropy.
    """
    log_p = F.logsigmoid(logits)  # (B, C)
    log_not_p = F.logsigmoid(-logits)  # (B, C)
    p = log_p.exp()
    p_m = p
    if shift > 0:  # very easy negatives vanish
        p_m = (p - shift).clamp(min=0)
        log_not_p = torch.log1p(-p_m)
    # at least 1e-12: for an exponent below 1 the gradient of 0 ** exponent is infinite
    positive = (1 - p).clamp(min=1e-12) ** gamma_pos * log_p
    negative = p_m.clamp(min=1e-12) ** gamma_neg * log_not_p
    loss = -torch.where(labels == 1, positive, negative)  # Eq. 14   (B, C)
    return torch.where(labels == 0, assume_negative * loss, loss).sum(1).mean()


def distillation(logits_r, logits_q, how="softmax", temperature=1.0, teacher="region"):
    """Eq. 6, KL(p^r || p^q), mean over B: the region scores teach the query scores.

    logits_r, logits_q (B, C)
    how       "softmax": as printed, p over the C categories; "bernoulli": one KL of (present,
              absent) per category, summed
    teacher   "region": p^r teaches p^q, as in the paper; "query": p^q teaches p^r; "both": as
              "region", but the teacher learns too. Else the teacher gets no gradient
    Multiplied by temperature squared, so that the gradient keeps its size (Hinton et al., 2015).
    """
    # (teacher, student)
    logits = (logits_q, logits_r) if teacher == "query" else (logits_r, logits_q)
    if how == "bernoulli":  # (B, C, 2)  present, absent
        logits = [torch.stack([x, torch.zeros_like(x)], -1) for x in logits]
    log_t, log_s = ((x / temperature).log_softmax(-1) for x in logits)
    if teacher != "both":
        log_t = log_t.detach()
    kl = (log_t.exp() * (log_t - log_s)).sum(-1)  # Eq. 6   (B,), or (B, C) for "bernoulli"
    if how == "bernoulli":
        kl = kl.sum(1)
    return temperature**2 * kl.mean()


def contrastive(anchors, samples, classes, tau=0.07, at_once=2**26):
    """Eq. 13, InfoNCE with the text of category c as anchor, against regions and prototypes.

    anchors (C, E) one per category;  samples (S, E);  classes (S,) int: the category of each sample
    Positives P of anchor c are the samples of category c, negatives those of all others. Each
    positive stands alone against the negatives: -log(e^p / (e^p + sum e^n)) = softplus(logsumexp(n)
    - p). Mean over P, then over the categories that have any.
    at_once   most (anchor, sample) logits that are kept for the backward pass
    """
    wide = torch.promote_types(anchors.dtype, torch.float32)
    anchors = F.normalize(anchors.to(wide), dim=-1) / tau
    samples = F.normalize(samples.to(wide), dim=-1)
    C = len(anchors)

    def logits(samples, classes):  # of S' samples
        s = anchors @ samples.T  # (C, S')
        # Each sample is the positive of one anchor, and a negative of all the others.
        p = s[classes, torch.arange(len(classes), device=s.device)]  # (S',)
        s.scatter_(0, classes[None], -1e9)  # so it is left out of its own anchor's negatives
        return p, s.logsumexp(1)  # (S',), (C,)

    parts = list(zip(samples.split(max(1, at_once // C)), classes.split(max(1, at_once // C))))
    p, n = zip(*checkpointed(logits, parts))
    p = torch.cat(p)  # (S,)
    log_n = torch.stack(n).logsumexp(0)  # (C,)
    count = torch.bincount(classes, minlength=C).to(wide)  # |P| of each category
    weight = 1 / count[classes] / (count > 0).sum()  # mean over P, mean over the categories
    return (weight * F.softplus(log_n[classes] - p)).sum()  # Eq. 13


def total(terms, alpha=1.0, beta=0.05, gamma=0.01):
    """terms: dict of the scalars L_q, L_r, L_KD, L_NCE -> their weighted sum; missing: 0."""
    L_q, L_r, L_KD, L_NCE = (terms.get(name, 0.0) for name in ("L_q", "L_r", "L_KD", "L_NCE"))
    return L_q + alpha * L_r + beta * L_KD + gamma * L_NCE  # Eq. 15
