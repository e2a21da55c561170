"""What a run says about each category of a split, and the labels that look wrong."""
import numpy as np


def suspects(scores, truth):
    """Known labels that the scores deny, as confident learning finds them (Northcutt et al., 2021).

    A label "absent" is suspect where the probability reaches the mean of the images labelled
    present; a label "present" where it is as low as the mean of those labelled absent.
    scores (n, C), truth (n, C) in {1, -1, 0} -> list of (i, c), furthest beyond its mean first."""
    def mean(of):  # (C,); NaN, which nothing reaches, for a category without such a label
        count = of.sum(0)
        return np.where(of, scores, 0).sum(0) / np.where(count, count, np.nan)

    beyond = np.where(truth == -1, scores - mean(truth == 1), np.nan)
    beyond = np.where(truth == 1, mean(truth == -1) - scores, beyond)  # (n, C)
    found = np.argwhere(beyond >= 0)
    return sorted(map(tuple, found.tolist()), key=lambda cell: -beyond[cell])


def category_lines(split, scores, ap, threshold, rests_on):
    """Lines of text: the categories, the worst AP first, ten suspect labels, the worst five images.

    scores (n, C) probabilities, ap (C,) average precision in 0..1 or NaN, threshold (C,),
    rests_on (C,) known positives behind each threshold"""
    truth = split.truth
    known, positives = (truth != 0).sum(0), (truth == 1).sum(0)
    right = (((scores >= threshold) == (truth == 1)) & (truth != 0)).sum(0)  # (C,)
    width = max(8, *map(len, split.names))
    lines = [f"{'category':{width}}  known  positives     AP  threshold  of positives  right  "
             "wrong"]
    for c in np.argsort(ap, kind="stable"):  # NaN last: no positive
        told = "-" if np.isnan(ap[c]) else f"{100 * ap[c]:.2f}"
        lines += [f"{split.names[c]:{width}}  {known[c]:5}  {positives[c]:9} {told:>6}  "
                  f"{threshold[c]:9.3f}  {rests_on[c]:12}  {right[c]:5}  {known[c] - right[c]:5}"]
    doubted = suspects(scores, truth)
    lines.append(f"{len(doubted)} labels of {split.name} look wrong (--split asks about others); "
                 "the probability denies them" + (", the clearest first:" if doubted else ""))
    for i, c in doubted[:10]:
        label = "labelled present" if truth[i, c] == 1 else "labelled absent"
        if split.where and not split.labels[i, c] and truth[i, c] == -1:  # of ticks, or hidden
            label = "no label of training, counted as absent"
        place = f"{split.where[i]}, {split.paths[i]}" if split.where else split.paths[i]
        lines.append(f"  {place}: {split.names[c]} is {label}, probability {scores[i, c]:.2f}")
    error = np.where(truth == 0, 0, np.abs(scores - (truth == 1))).sum(1)  # (n,)
    lines.append("the images that it gets most wrong, |probability - label| summed over the known:")
    lines += [f"  {split.paths[i]}: {error[i]:.2f}" for i in np.argsort(-error)[:5]]
    return lines
