"""Slow transcriptions of the paper's equations, one loop per sum sign, in float64. Tests compare
the project to these.

    Ma et al., "Text-Region Matching for Multi-Label Image Recognition with Missing Labels" (ACM MM
    2024), section 3.

Every function quotes its equation as printed and, where the print is a misprint or leaves a gap,
the reading taken. Nothing here shares code with the project: numpy arrays and Python floats in, the
same out.

B images, C classes, N locations, D dims, L queue length, K top-k, S samples, E dims of the
contrastive space labels: 1 positive, -1 negative, 0 unknown
"""
import math

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def dot(u, v):
    total = 0.0
    for a, b in zip(u, v):
        total += float(a) * float(b)
    return total


def norm(u):
    return math.sqrt(dot(u, u))


def cosine(u, v):
    """Eq. 8: s = f.v / (|f| |v|)."""
    return dot(u, v) / (norm(u) * norm(v))


# ---- section 3.1 and 3.2

def match(x, g_pos, g_neg, scale):
    """Eq. 1 and 5: p(y_c | f_c, g_c) = f_c.g_c / (|f_c| |g_c|) / tau.

    Reading: two prompts a class, so the logit is the difference of the two matchings; scale =
    1/tau. x (..., C, D), g_pos and g_neg (C, D) -> (..., C)
    """
    out = np.zeros(x.shape[:-1])
    for place in np.ndindex(*x.shape[:-1]):
        c = place[-1]
        out[place] = scale * (cosine(x[place], g_pos[c]) - cosine(x[place], g_neg[c]))
    return out


def region_pool(energy, f):
    """Eq. 2: r_c = (p_c, sigmoid(e_c)).   Eq. 4: f_c^r = sum_{(p_c, e_c) in R} e_c . f.

    Reading: R holds sigmoid(e_c) (Eq. 2), so the e_c that weighs f in Eq. 4 is the sigmoid of the
    energy. energy (B, C, N), f (B, N, D) -> (B, C, D)
    """
    (B, C, N), D = energy.shape, f.shape[2]
    out = np.zeros((B, C, D))
    for b in range(B):
        for c in range(C):
            for n in range(N):
                e = sigmoid(float(energy[b, c, n]))
                for d in range(D):
                    out[b, c, d] += e * f[b, n, d]
    return out


def attention(q, k, v):
    """Softmax attention with one head: softmax_n(q_c.k_n / sqrt(D)) v_n. Returns the outcome and
    the scaled products.

    q (C, D), k and v (N, D) -> (C, D), (C, N)
    """
    D = q.shape[1]
    out, energy = np.zeros((len(q), D)), np.zeros((len(q), len(k)))
    for c in range(len(q)):
        for n in range(len(k)):
            energy[c, n] = dot(q[c], k[n]) / math.sqrt(D)
        largest = max(energy[c])
        weights = [math.exp(e - largest) for e in energy[c]]
        for n in range(len(k)):
            for d in range(D):
                out[c, d] += weights[n] / sum(weights) * v[n, d]
    return out, energy


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    """Each row to mean 0 and variance 1 (biased), then an affine map where one is given."""
    out = np.zeros(x.shape)
    for place in np.ndindex(*x.shape[:-1]):
        row = [float(v) for v in x[place]]
        mean = sum(row) / len(row)
        variance = sum((v - mean) ** 2 for v in row) / len(row)
        for d, v in enumerate(row):
            scaled = (v - mean) / math.sqrt(variance + eps)
            out[place + (d,)] = scaled if weight is None else scaled * weight[d] + bias[d]
    return out


def linear(x, weight, bias):
    """Rows x (R, D_in), weight (D_out, D_in), bias (D_out,) -> (R, D_out)."""
    out = np.zeros((len(x), len(weight)))
    for r in range(len(x)):
        for o in range(len(weight)):
            out[r, o] = dot(x[r], weight[o]) + bias[o]
    return out


def decoder(p, f):
    """Eq. 3: R = Cross_Att(Q, f);  F^q = Cross_Att(Q, f) + MLP(Cross_Att(Q, f))   (the print has O
                                    for the second Q).

    Reading: one decoder layer with one head, normalised after each sum: self-attention of the
    queries, cross-attention to the normalised features, a two-layer ReLU network. R are its scaled
    products q.k / sqrt(D) before the softmax. p: parameters by name, f (B, N, D) -> energy (B, C,
    N), queries (B, C, D)
    """
    energies, queries = [], []
    Q = p["Q"]
    w_q, w_k, w_v = np.split(p["self_att.in_proj_weight"], 3)
    b_q, b_k, b_v = np.split(p["self_att.in_proj_bias"], 3)
    mixed, _ = attention(linear(Q, w_q, b_q), linear(Q, w_k, b_k), linear(Q, w_v, b_v))
    mixed = linear(mixed, p["self_att.out_proj.weight"], p["self_att.out_proj.bias"])
    first = layer_norm(Q + mixed, p["norm1.weight"], p["norm1.bias"])
    for image in f:
        memory = layer_norm(image)
        q, k, v = (linear(x, p[f"{name}.weight"], p[f"{name}.bias"])
                   for name, x in (("q", first), ("k", memory), ("v", memory)))
        crossed, energy = attention(q, k, v)
        second = layer_norm(first + linear(crossed, p["out.weight"], p["out.bias"]),
                            p["norm2.weight"], p["norm2.bias"])
        hidden = np.maximum(linear(second, p["mlp.0.weight"], p["mlp.0.bias"]), 0.0)
        third = second + linear(hidden, p["mlp.3.weight"], p["mlp.3.bias"])
        energies.append(energy)
        queries.append(layer_norm(third, p["norm3.weight"], p["norm3.bias"]))
    return np.stack(energies), np.stack(queries)


# ---- section 3.3

def distillation(logits_r, logits_q, how, temperature):
    """Eq. 6: KL(p^r || p^q) = sum_i^C p_i^r log(p_i^r / p_i^q), teacher p^r, student p^q.

    Reading "softmax": as printed, a distribution over the C classes. Reading "bernoulli": each
    class has a distribution over present and absent, and the C divergences are added. Logits are
    divided by the temperature and the result
    multiplied with its square; mean over the images.   logits (B, C) -> float
    """
    B, C = logits_r.shape
    total = 0.0
    for b in range(B):
        r = [float(v) / temperature for v in logits_r[b]]
        q = [float(v) / temperature for v in logits_q[b]]
        if how == "softmax":
            log_z_r = max(r) + math.log(sum(math.exp(v - max(r)) for v in r))
            log_z_q = max(q) + math.log(sum(math.exp(v - max(q)) for v in q))
            for i in range(C):
                total += math.exp(r[i] - log_z_r) * ((r[i] - log_z_r) - (q[i] - log_z_q))
        else:
            for i in range(C):
                total += sigmoid(r[i]) * (log_sigmoid(r[i]) - log_sigmoid(q[i]))
                total += sigmoid(-r[i]) * (log_sigmoid(-r[i]) - log_sigmoid(-q[i]))
    return total / B * temperature ** 2


# ---- section 3.4

class Queues:
    """Eq. 7: V_c = TopK(r_c) . f goes into the c-th of C first-in-first-out queues of length L.

    Reading: for every known positive in image order, the features at the K largest energies (at
    most N of them, equal energies by lowest location), unit length, largest energy first. Each
    class has a plain list; `slots` also keeps what a ring buffer holds after the same writes.
    """

    def __init__(self, C, L, D):
        self.L = L
        self.written = [[] for _ in range(C)]  # everything that was ever enqueued, oldest first
        self.slots = np.zeros((C, L, D))

    def enqueue(self, energy, f, labels, k):
        B, C, N = energy.shape
        for b in range(B):
            for c in range(C):
                if labels[b, c] != 1:
                    continue
                taken = set()
                for _ in range(min(k, N)):
                    best = None
                    for n in range(N):
                        if n not in taken and (best is None
                                               or energy[b, c, n] > energy[b, c, best]):
                            best = n
                    taken.add(best)
                    length = norm(f[b, best])
                    prototype = np.array([v / length for v in f[b, best]])
                    self.slots[c, len(self.written[c]) % self.L] = prototype
                    self.written[c].append(prototype)

    def queue(self, c):
        """What is left of class c: the last L prototypes, oldest first."""
        return self.written[c][-self.L:]


def similarities(regions, queues, text):
    """Eq. 8 averaged over the queue as Eq. 9-10 ask ("average cosine similarity", j in [1, l]); the
    text has one.

    Reading: the average runs over the prototypes that exist; a class without any has no similarity
    (NaN). regions (B, C, D), queues: list of C lists of (D,), text (C, D) -> (2, B, C): visual,
    text
    """
    B, C, _ = regions.shape
    s = np.zeros((2, B, C))
    for b in range(B):
        for c in range(C):
            total = 0.0
            for v in queues[c]:
                total += cosine(regions[b, c], v)
            s[0, b, c] = total / len(queues[c]) if len(queues[c]) else math.nan
            s[1, b, c] = cosine(regions[b, c], text[c])
    return s


def batch_means(regions, labels, queues):
    """Eq. 9 for one modality, the printed double sum: images of D_c with y = 1 (then y = -1),
    prototypes j in [1, l].

        s_c^p = 1/|D_c^p| sum_{m in D_c^p} s_{i,j}^c y_i^c        s_c^n = -1/|D_c^n| sum_{m in
        D_c^n} s_{i,j}^c y_i^c

    Reading: |D_c| counts the (i, j) pairs of the sum, so that both are averages. -> (2, C):
    positive, negative; NaN where the batch has no such label or the class no prototype.
    """
    B, C, _ = regions.shape
    means = np.full((2, C), math.nan)
    for c in range(C):
        for row, (sign, y) in enumerate(((1.0, 1), (-1.0, -1))):
            total, pairs = 0.0, 0
            for i in range(B):
                if labels[i, c] != y:
                    continue
                for v in queues[c]:
                    total += cosine(regions[i, c], v) * y
                    pairs += 1
            if pairs:
                means[row, c] = sign * total / pairs
    return means


def ema(theta, means, eta):
    """Eq. 11: theta_positive <- eta theta_positive + (1 - eta) s^p;
               theta_positive <- eta theta_negative + (1 - eta) s^n.

    Reading: the second line updates theta_negative (misprint). Per class, only where the batch gave
    a mean; the first
    mean is taken as it is.   theta, means (2, C) -> (2, C)
    """
    out = np.array(theta, dtype=float)
    for row in range(2):
        for c in range(out.shape[1]):
            if math.isnan(means[row, c]):
                continue
            known = not math.isnan(out[row, c])
            out[row, c] = eta * out[row, c] + (1.0 - eta) * means[row, c] if known else means[row,
                                                                                              c]
    return out


def verdict(s, theta_pos, theta_neg):
    """Eq. 10: 1 if s >= theta_positive and s <= theta_negative; -1 if s >= theta_negative and s <=
    theta_positive; 0 otherwise.

    Reading: a misprint, since +1 would need theta_positive <= s <= theta_negative and -1 the middle
    ground. Meant: +1 if s >= theta_positive, -1 if s <= theta_negative, else 0. No verdict while a
    threshold or s is unknown (NaN), nor where the two thresholds are not in order.
    """
    if math.isnan(s) or math.isnan(theta_pos) or math.isnan(theta_neg) or theta_pos <= theta_neg:
        return 0
    if s >= theta_pos:
        return 1
    if s <= theta_neg:
        return -1
    return 0


def pseudo_labels(s, labels, theta):
    """Eq. 12: 1 where visual and text verdicts are both 1, -1 where both are -1.

    Reading: anything else is 0, and only unknown labels are estimated.
    s (2, B, C), labels (B, C), theta (2 visual/text, 2 positive/negative, C) -> (B, C)
    """
    _, B, C = s.shape
    out = np.zeros((B, C), dtype=np.int8)
    for b in range(B):
        for c in range(C):
            if labels[b, c] != 0:
                continue
            y_v = verdict(s[0, b, c], theta[0, 0, c], theta[0, 1, c])
            y_t = verdict(s[1, b, c], theta[1, 0, c], theta[1, 1, c])
            if y_v == 1 and y_t == 1:
                out[b, c] = 1
            if y_v == -1 and y_t == -1:
                out[b, c] = -1
    return out


# ---- section 3.5 and 3.6

def contrastive(anchors, samples, classes, tau):
    """Eq. 13: L_NCE = 1/|P| sum_{q+ in P} -log(exp(p_a.q+/tau) / (exp(p_a.q+/tau) + sum_{q- in N}
    exp(p_a.q-/tau))).

    Reading: p_a and q have unit length; one such loss for each class that has positives, averaged
    over those classes;
    0 when there are none.   anchors (C, E), samples (S, E), classes (S,) -> float
    """
    losses = []
    for c in range(len(anchors)):
        positives = [q for q, y in zip(samples, classes) if y == c]
        negatives = [q for q, y in zip(samples, classes) if y != c]
        if not positives:
            continue
        total = 0.0
        for q_plus in positives:
            up = cosine(anchors[c], q_plus) / tau
            others = [cosine(anchors[c], q_minus) / tau for q_minus in negatives]
            largest = max([up] + others)
            z = math.exp(up - largest)
            for other in others:
                z += math.exp(other - largest)
            total += -(up - largest - math.log(z))
        losses.append(total / len(positives))
    return sum(losses) / len(losses) if losses else 0.0


def asymmetric(logits, labels, gamma_pos, gamma_neg, shift, assume_negative=0.0):
    """Eq. 14: L_cls = (1-p)^gamma+ log(p) if y = 1;  (p_m)^gamma- log(1-p_m) if y = -1;  p_m =
    max(p - c, 0).

    Reading: the sign is missing (as printed it would be maximised), so each term is negated; summed
    over classes, mean over images; unknown labels count nothing, or `assume_negative` times the
    negative term.
    """
    B, C = logits.shape
    total = 0.0
    for b in range(B):
        for c in range(C):
            x = float(logits[b, c])
            p, one_minus_p = sigmoid(x), sigmoid(-x)
            positive = -(one_minus_p ** gamma_pos) * log_sigmoid(x)
            p_m = max(p - shift, 0.0)
            # 1 - p_m = (1 - p) + shift where p > shift: the sum keeps the digits that 1 - p loses
            # near p = 1
            log_rest = 0.0 if p_m == 0.0 else (log_sigmoid(-x) if shift == 0
                                               else math.log(one_minus_p + shift))
            negative = -(p_m ** gamma_neg) * log_rest
            if labels[b, c] == 1:
                total += positive
            elif labels[b, c] == -1:
                total += negative
            else:
                total += assume_negative * negative
    return total / B


def total(terms, alpha, beta, gamma):
    """Eq. 15 with section 3.6's first sentence: L = L_q + alpha L_r + beta L_KD + gamma L_NCE; a
    missing term is 0."""
    return (terms.get("L_q", 0.0) + alpha * terms.get("L_r", 0.0)
            + beta * terms.get("L_KD", 0.0) + gamma * terms.get("L_NCE", 0.0))


# ---- derivatives

def slope(function, x, direction, step=1e-6):
    """Central difference of a scalar function of an array along a direction."""
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


def gradient(function, x, step=1e-6):
    """Central differences, one entry at a time."""
    out = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        direction = np.zeros(x.shape)
        direction[place] = 1.0
        out[place] = slope(function, x, direction, step)
    return out
