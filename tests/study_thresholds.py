"""Rules that choose the thresholds of few labels, compared on the rounds of three_rounds.py.

    python tests/study_thresholds.py --masks 4 5 6 7 8 9

For each run, OF1 and CF1 on its 500 unseen scenes; docs/readings.md holds the table. The oracle of
a run is the better of 0.5 and the best k without resamples: nobody could know it.
n images, C categories.
"""
import argparse
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import three_rounds
from eval import best_thresholds, metrics


def logit(p):
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))


def sigmoid(t):
    return 1 / (1 + np.exp(-t))


def same(t):
    return t


def best(scores, present, midway):
    """The lowest score that passes at the best F1, or midway to the next. scores, present (n,)"""
    cuts = np.unique(scores)[::-1]
    said = scores[None] >= cuts[:, None]
    f1 = 2 * (said & present).sum(1) / (said.sum(1) + present.sum())
    return cuts[f1.argmax():][:1 + midway].mean()


def thresholds(p, labels, k, midway=True, scale=logit, centre=0.5):
    """p, labels (n, C) -> (C,), drawn towards the centre by k on the scale."""
    back = sigmoid if scale is logit else same
    found = np.full(p.shape[1], centre)
    for c, known in enumerate((labels != 0).T):
        present = labels[known, c] == 1
        if present.any() and (not present.all() or not midway):
            n, t = present.sum(), best(scale(p[known, c]), present, midway)
            found[c] = back((n * t + k * scale(np.float64(centre))) / (n + k))
    return found


def rules(val, train):
    """val, train: (p, labels) of the photos -> {rule: thresholds}."""
    both = [np.concatenate(parts) for parts in zip(val, train)]
    known = both[1] != 0
    pooled = best(both[0][known], both[1][known] == 1, True)
    found = {f"both, k = {k}": thresholds(*both, k) for k in (0, 0.5, 1, 2, 5, 20)}
    for k in (0, 0.25, 0.5, 1, 2):  # the rule of eval.py
        found[f"both, resampled, k = {k}"] = best_thresholds(*both, k)
    return found | {
        "always 0.5": 0.5,
        "validation, probabilities, no midway, k = 2": thresholds(*val, 2, False, same),
        "both, probabilities, no midway, k = 2": thresholds(*both, 2, False, same),
        "both, probabilities, k = 2": thresholds(*both, 2, True, same),
        "both, towards the threshold of all cells, k = 0.5": thresholds(*both, 0.5, centre=pooled),
        "training photos, k = 0.5": thresholds(*train, 0.5),
        "validation, k = 0.5": thresholds(*val, 0.5),
        "validation, k = 2": thresholds(*val, 2),
        "validation, resampled, k = 2": best_thresholds(*val, 2)}


def table(runs):
    """runs: a dict {rule: metrics} each -> lines of text."""
    OF1 = {rule: np.array([run[rule]["OF1"] for run in runs]) for rule in runs[0]}
    oracle = np.max([OF1[rule] for rule in OF1 if rule == "always 0.5" or rule[:6] == "both, " and
                     rule[6] == "k"], 0)
    yield f"{len(runs)} runs; below the oracle: mean, largest, runs with more than a point"
    for rule, values in OF1.items():
        below, CF1 = oracle - values, np.mean([run[rule]["CF1"] for run in runs])
        yield (f"{rule:50} {values.mean():.1f} / {CF1:.1f}  {below.mean():5.2f} {below.max():6.2f} "
               f"{(below > 1).sum():3d}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=str(three_rounds.ROOT / "generated" / "scenes"))
    parser.add_argument("--masks", type=int, nargs="+", default=[4, 5, 6, 7, 8, 9])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.15])
    args = parser.parse_args()
    args.rounds, args.unseen, args.train = 2, 500, three_rounds.RECIPE
    torch.set_num_threads(1)  # one rounding everywhere
    runs = []

    def compared(predictor, scores, truth):
        parts = [predictor.splits()[name] for name in ("val", "train")]
        found = rules(*((predictor.probabilities(part), part.labels)
                        for part in parts))
        runs.append({rule: metrics(scores, truth, t) for rule, t in found.items()})
        return {0: 0.0}

    with mock.patch.object(three_rounds, "OF1_of_each_shrink", compared):
        for share in args.shares:
            for mask in args.masks:
                with tempfile.TemporaryDirectory() as place:
                    list(three_rounds.study(mask, share, args, Path(place)))
    print(*table(runs), sep="\n")


if __name__ == "__main__":
    main()
