"""What is measured: mAP, CP..OF1, thresholds, and how well regions sit on boxes (paper, Sec. 4.1).

Only numpy; scores are probabilities or anything that ranks, truth is 1 present, -1 absent, 0 nobody knows.
n images, C categories, N = h*w locations.
"""
import numpy as np


def average_precision(scores, positive):
    """Plain AP of one category: sum over thresholds of (R_k - R_{k-1}) P_k, tied scores form one threshold (as scikit-learn).

    scores (n,) float, positive (n,) bool. NaN without a positive. The result does not depend on the order of the images.
    """
    positive = positive[np.argsort(-scores, kind="stable")]
    if not positive.any():
        return float("nan")
    last_of_tie = np.append(np.diff(np.sort(-scores)) != 0, True)
    true = np.cumsum(positive)[last_of_tie]
    precision = true / (np.flatnonzero(last_of_tie) + 1)
    return float((np.diff(true, prepend=0) * precision).sum() / true[-1])


def interpolated_precision(scores, positive):
    """VOC's AP (2010 and later; SARB's and the paper's author's code): precision made monotone, so never below the plain AP.

    Targets by rank 0, 1, 1, 0: plain (1/2 + 2/3) / 2 = 0.5833, interpolated (2/3 + 2/3) / 2 = 0.6667.
    """
    positive = positive[np.argsort(-scores, kind="stable")]
    if not positive.any():
        return float("nan")
    precision = np.cumsum(positive) / np.arange(1, len(positive) + 1)
    return float(np.maximum.accumulate(precision[::-1])[::-1][positive].mean())


def metrics(scores, truth, threshold=0.5):
    """scores (n, C) probabilities, truth (n, C) in {1, -1, 0}; 0 (nobody knows) is left out of every number.

    mAP       mean plain AP over the categories that have a positive; `left_out` counts the others
    mAP_voc   the interpolated one;  CP CR CF1 per category, OP OR OF1 over all decisions at `threshold` (scalar or (C,))
    All in percent.
    """
    known, positive = truth != 0, truth == 1
    ap, ap_voc = (np.array([one(scores[known[:, c], c], positive[known[:, c], c]) if positive[:, c].any() else np.nan
                            for c in range(truth.shape[1])]) for one in (average_precision, interpolated_precision))
    decided = (scores >= threshold) & known
    hit, said, exist = (decided & positive).sum(0), decided.sum(0), positive.sum(0)
    ratio = lambda a, b: float(a / b) if b else 0.0
    CP = float(np.mean(hit / np.maximum(said, 1)))                                 # a category never said counts as 0
    CR = float(np.mean((hit / np.maximum(exist, 1))[exist > 0])) if exist.any() else 0.0
    OP, OR = ratio(hit.sum(), said.sum()), ratio(hit.sum(), exist.sum())
    f1 = lambda p, r: ratio(2 * p * r, p + r)
    result = dict(mAP=np.nanmean(ap) if exist.any() else 0.0, mAP_voc=np.nanmean(ap_voc) if exist.any() else 0.0,
                  CP=CP, CR=CR, CF1=f1(CP, CR), OP=OP, OR=OR, OF1=f1(OP, OR))
    return {name: round(100 * float(value), 3) for name, value in result.items()} | {"left_out": int((exist == 0).sum())}


def best_thresholds(scores, truth):
    """(C,) threshold per category with the best F1 on a validation split; 0.5 for a category without a known positive there."""
    thresholds = np.full(truth.shape[1], 0.5)
    for c in range(truth.shape[1]):
        known = truth[:, c] != 0
        s, positive = scores[known, c], truth[known, c] == 1
        if positive.any():
            rank = np.argsort(-s, kind="stable")
            hit = np.cumsum(positive[rank])
            f1 = 2 * hit / (np.arange(1, len(s) + 1) + positive.sum())
            f1[np.append(np.diff(s[rank]) == 0, False)] = 0                        # a threshold cannot split a tie
            thresholds[c] = s[rank[f1.argmax()]]
    return thresholds


def localisation(maps, grid, split_boxes, truth):
    """How well maps (n, C, N) sit on the boxes of a split, over its present categories.

    grid      (h, w);  split_boxes: n arrays (k, 5) of category, x0, y0, x1, y1 as fractions of the image
    pointing  share of (image, category) whose highest cell has its centre in a box of the category (the pointing game), %
    small, medium, large   pointing by the area of the category's largest box: below 0.02 of the image, below 0.1, above
    mass      share of the map's sum that lies in the boxes (by cell centre), %
    present, absent        mean peak of the map where the category is there, and where it is not;  pairs: how many were there
    """
    h, w = grid
    cy, cx = [a.ravel() for a in np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")]
    hits, mass, sizes = [], [], []
    for i, boxes in enumerate(split_boxes):
        for c in np.unique(boxes[:, 0]).astype(int):
            own = boxes[boxes[:, 0] == c, 1:]                                      # (k, 4)
            inside = ((cx >= own[:, :1]) & (cy >= own[:, 1:2]) & (cx <= own[:, 2:3]) & (cy <= own[:, 3:])).any(0)     # (N,)
            m = np.clip(maps[i, c], 0, None)
            hits.append(inside[maps[i, c].argmax()])
            mass.append(m[inside].sum() / max(m.sum(), 1e-12))
            sizes.append(((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])).max())
    hits, sizes, peak = np.array(hits, float), np.array(sizes), maps.max(-1)
    of = lambda chosen: round(100 * float(hits[chosen].mean()), 2) if chosen.any() else None
    mean = lambda values: round(float(values.mean()), 3) if values.size else None
    return dict(pointing=of(sizes >= 0), small=of(sizes < 0.02), medium=of((sizes >= 0.02) & (sizes < 0.1)),
                large=of(sizes >= 0.1), mass=round(100 * float(np.mean(mass)), 2) if mass else None,
                present=mean(peak[truth == 1]), absent=mean(peak[truth == -1]), pairs=len(hits))
