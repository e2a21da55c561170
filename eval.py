"""Metrics, evaluation after an epoch, and the command that uses a run (paper, Sec. 4.1).

    python eval.py runs/demo                                  the table of its test split
    python eval.py runs/demo --categories                     a line per category, doubtful labels
    python eval.py runs/demo --image photo.jpg folder/        ranked categories, their regions
    python eval.py runs/demo --suggest suggested.csv          its guesses for unknown labels
    python eval.py --zero-shot --data sheet.csv --suggest suggested.csv       without a run
    python eval.py runs/demo --compare runs/other             zero-shot CLIP and runs side by side
    python eval.py runs/demo --ensemble runs/other            averaged scores of several runs

A probability, the sigmoid of Eq. 5's logit, ranks images but is no frequency: the asymmetric loss
and the few labels leave it uncalibrated. "Present" is what passes a category's threshold.
n images, C categories, N = h*w locations. Labels: 1 present, -1 absent, 0 unknown.
"""
import json
import sys
from contextlib import redirect_stdout

import numpy as np
import torch

from config import Config, preset
from datasets.csv_sheet import is_sheet
from support import UserError
from support.checkpoint import changed
from support.cli import run_main
from tools.categories import category_lines
from tools.eval_options import parse
from tools.predict import images_in, predict
from tools.predictor import Predictor, ZeroShot, region_map, score_split
from tools.report import warn_if_below
from tools.suggest import suggest
from tools.zero_shot import probability_arrays, zero_shot, zero_shot_scale, zero_shot_text

ENOUGH = 10  # positives a category, for validation to choose the best epoch (docs/readings.md)

# ---- metrics; scores are probabilities or anything that ranks

def average_precision(scores, positive, interpolated=False):
    """Plain AP of one category: sum of (R_k - R_{k-1}) P_k; tied scores form one threshold, as in
    scikit-learn. scores (n,) float, positive (n,) bool, one True at least. interpolated: VOC's AP
    (2010 and later; SARB's code), at each recall the best precision from there on. Absent, present,
    present, absent, as ranked: (2/3 + 2/3) / 2; the plain AP (1/2 + 2/3) / 2."""
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    last_of_tie = np.append(scores[1:] != scores[:-1], True)
    true = np.cumsum(positive)[last_of_tie]
    precision = true / (np.flatnonzero(last_of_tie) + 1)
    if interpolated:
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(true, prepend=0) * precision).sum() / true[-1])


def ap_per_category(scores, truth, interpolated=False):
    """(C,) AP of each category over the images where it is known; NaN without a positive."""
    return np.array([average_precision(s[t != 0], t[t != 0] == 1, interpolated)
                     if (t == 1).any() else np.nan for s, t in zip(scores.T, truth.T)])


def metrics(scores, truth, threshold=0.5):
    """scores (n, C) probabilities, truth (n, C) in {1, -1, 0}; 0 is left out of every number.

    mAP       mean plain AP over the categories that have a positive; mAP_voc: the interpolated AP
    CP CR CF1 of the decisions at `threshold` (a number, or (C,)): mean precision of all categories
              (0 where nothing is found), mean recall of those with a positive, and the harmonic
              mean of the two; OP OR OF1 of all decisions together. All in percent
    left_out  categories without a positive; positives: the number of positive labels"""
    positive = truth == 1
    exist = positive.sum(0)  # (C,)
    there = exist > 0
    count = max(there.sum(), 1)
    decided = (scores >= threshold) & (truth != 0)
    hit, said = (decided & positive).sum(0), decided.sum(0)  # (C,) each
    CP, CR = np.mean(hit / np.maximum(said, 1)), (hit[there] / exist[there]).sum() / count
    OP, OR = hit.sum() / max(said.sum(), 1), hit.sum() / max(exist.sum(), 1)
    CF1, OF1 = (2 * P * R / max(P + R, 1e-12) for P, R in ((CP, CR), (OP, OR)))
    mAP, mAP_voc = (ap_per_category(scores, truth, interpolated)[there].sum() / count
                    for interpolated in (False, True))
    result = dict(mAP=mAP, mAP_voc=mAP_voc, CP=CP, CR=CR, CF1=CF1, OP=OP, OR=OR, OF1=OF1)
    percent = {name: round(100 * float(value), 3) for name, value in result.items()}
    return percent | {"left_out": int((~there).sum()), "positives": int(exist.sum())}


def best_threshold(scores, positive):
    """The threshold of the best F1 of one category, midway to the next lower score.
    scores (n,), positive (n,) bool, one True at least"""
    rank = np.argsort(-scores, kind="stable")
    scores, positive = scores[rank], positive[rank]
    f1 = 2 * np.cumsum(positive) / (np.arange(1, len(scores) + 1) + positive.sum())
    f1[np.append(np.diff(scores) == 0, False)] = 0  # a threshold cannot split a tie
    best = f1.argmax()
    return scores[best:best + 2].mean()


def best_thresholds(scores, truth, k):
    """(C,) thresholds with the best F1, 0.5 where all known labels are alike. Few labels say
    little, so two steps follow on the scale of logits (docs/readings.md): t is the mean over 25
    resamples (Breiman's bagging, 1996), then n positives draw it towards 0.5, to n t / (n + k).
    scores (n, C) probabilities, truth (n, C) in {1, -1, 0}"""
    logits = torch.as_tensor(scores).logit(eps=1e-6).numpy()  # (n, C)
    thresholds = np.full(truth.shape[1], 0.5)
    for c, known in enumerate((truth != 0).T):
        s, positive = logits[known, c], truth[known, c] == 1
        n = positive.sum()
        if 0 < n < len(s):
            order = np.lexsort((positive, s))  # the order of the images does not matter
            s, positive = s[order], positive[order]
            drawn = np.random.RandomState(0).randint(len(s), size=(25, len(s)))
            t = np.mean([best_threshold(s[rows], positive[rows]) for rows in drawn
                         if positive[rows].any()])
            thresholds[c] = 1 / (1 + np.exp(-n * t / (n + k)))
    return thresholds


def localisation(maps, grid, split_boxes, truth):
    """How well maps (n, C, N) sit on the boxes of a split, over its present categories.

    grid (h, w); split_boxes: n arrays (k, 5) of category, x0, y0, x1, y1 in 0..1, not all empty
    pointing  (the pointing game) share of (image, category) whose highest cell is in a box, %
    mass      share of the map's sum that lies in the boxes, %; a cell lies where its centre is
    present, absent   mean peak of the map where the category is there, and where it is not"""
    cy, cx = (np.indices(grid).reshape(2, -1) + 0.5) / np.array(grid)[:, None]  # (N,) each: centres
    hits, mass = [], []
    for of_image, boxes in zip(maps, split_boxes):
        for c in np.unique(boxes[:, 0]).astype(int):
            x0, y0, x1, y1 = boxes[boxes[:, 0] == c, 1:].T[..., None]  # (k, 1) each
            inside = ((cx >= x0) & (cy >= y0) & (cx <= x1) & (cy <= y1)).any(0)  # (N,)
            m = np.clip(of_image[c], 0, None)
            hits.append(inside[of_image[c].argmax()])
            mass.append(m[inside].sum() / max(m.sum(), 1e-12))
    peak = maps.max(-1)  # (n, C)
    return dict(pointing=100 * np.mean(hits), mass=100 * np.mean(mass),
                present=peak[truth == 1].mean(), absent=peak[truth == -1].mean())


# ---- in training

def count_pseudo(pseudo, labels, truth):
    """Pseudo-labels of a batch against the truth that training may not see, (B, C) int8 each ->
    (2, 2): how many positives were given and how many of them are right; the same of negatives."""
    given = torch.stack([pseudo == 1, pseudo == -1]) & (labels == 0) & (truth != 0)  # (2, B, C)
    return torch.stack([given, given & (pseudo == truth)], 1).sum((2, 3))


def pseudo_numbers(count):
    """The counts of an epoch, (2, 2), and precisions in percent; empty where none was given."""
    line = {}
    for name, (given, right) in zip(("pos", "neg"), count.tolist()):
        line |= {f"pseudo_{name}": given,
                 f"pseudo_{name}_precision": round(100 * right / given, 2) if given else None}
    return line if count.any() else {}


@torch.no_grad()
def evaluate(model, encoder, g_zero, train_split, loaders, score):
    """Scores the splits of `loaders`, {name: loader} -> three dicts:

    {name: metrics of `score`, and mAP of every score}
    the texts g_pos and g_neg (C, D)
    zero_shot_scale (3, C) or None; threshold (C,), chosen on validation, for the mixed score also
    on training photos; rests_on (C,), the known positives behind each threshold"""
    g_pos, g_neg = model.prompts(encoder)
    positives = (train_split.labels == 1).sum(0)  # (C,)
    numbers, scale = {}, None
    rated = labels = np.zeros((0, len(g_pos)))  # for the thresholds
    for name, loader in loaders.items():
        scores, _ = score_split(model, g_pos, g_neg, loader, g_zero)
        if scale is None and name != "test":
            scale = zero_shot_scale(scores, positives)
        scores = probability_arrays(scores, scale)
        truth = loader.split.truth  # (n, C)
        chosen = scores[score]  # (n, C)
        if name == "val" or (name == "train" and score == "mixed"):
            rated = np.concatenate([rated, chosen])
            labels = np.concatenate([labels, truth if name == "val" else loader.split.labels])
        if name != "train":
            AP = ap_per_category(chosen, truth).tolist()
            numbers[name] = metrics(chosen, truth)
            numbers[name] |= {f"mAP_{kind}": metrics(p, truth)["mAP"] for kind, p in scores.items()}
            numbers[name]["AP"] = [None if np.isnan(one) else round(100 * one, 2) for one in AP]
    threshold = best_thresholds(rated, labels, k=0.5 if score == "mixed" else 2)
    return numbers, dict(g_pos=g_pos.cpu(), g_neg=g_neg.cpu()), dict(
        zero_shot_scale=scale, threshold=threshold.tolist(), rests_on=(labels == 1).sum(0).tolist())


def note_best(state, numbers):
    """Notes the best epoch so far: by validation, or by test where there is no validation. Returns
    whether best.pt is written: an epoch chosen on test is only printed, as prior work does."""
    split = "val" if "val" in numbers else "test"
    enough = max(1, ENOUGH * len(state.memory.cursor)) if split == "val" else 1  # of C categories
    if (split not in numbers or numbers[split]["positives"] < enough
            or (state.best and numbers[split]["mAP"] <= state.best["mAP"])):
        return False
    state.best = {"epoch": state.epoch, "chosen_on": split, "mAP": numbers[split]["mAP"]}
    return split == "val"


# ---- command line

def compare(predictors, split):
    """Prints mAP of zero-shot CLIP and of each score of runs; with boxes, how maps sit on them."""
    def tell(what, scores):
        print(f"{what:{width}} {metrics(scores, split.truth)['mAP']:5.2f}")

    width = max(38, *(len(f"{one.run}, softmax weights") for one in predictors))
    boxed = split.boxes and any(map(len, split.boxes))
    print(f"\n{split.name}, {len(split.paths)} images, {len(split.names)} categories\n"
          f"{'':{width}}   mAP   pointing  mass in boxes  peak present / absent")
    g = zero_shot_text(predictors[0].encoder, split.prompts)
    for name, scores in zero_shot(g, predictors[0].loader(split).batches(0, shuffle=False)).items():
        tell(f"zero-shot CLIP, {name}", scores)
    for predictor in predictors:
        found, maps = predictor.all_scores(split, maps_of if boxed else None)
        for name, scores in found.items():
            if name != "zero-shot":
                tell(f"{predictor.run}, {name} score", scores)
        for name, of_split in maps.items():
            where = localisation(of_split, predictor.grid, split.boxes, split.truth)
            label = f"{predictor.run}, {name}"
            print(f"{label:{width}}         {where['pointing']:6.1f} %  "
                  f"{where['mass']:9.1f} %     {where['present']:.2f} / {where['absent']:.2f}")


def maps_of(out, model):
    """Every map (B, C, N) that a method could show: the one it does, and DualCoOp's weights."""
    name = "mask" if model.matching == "carl" else "similarity map"
    maps = {name: region_map(out, model.matching)}
    if model.matching.startswith("dualcoop"):
        maps["softmax weights"] = (model.log_spatial_scale.exp() * out.energy).softmax(-1)
    return maps


def table(predictors, split, args, seen=False):
    """The metrics of a split, of one run or of several whose probabilities are averaged. seen:
    whether the first run was trained with the split as it is."""
    with redirect_stdout(sys.stderr if args.json else sys.stdout):  # no word beside the JSON
        found = [member.all_scores(split)[0] for member in predictors]
    scores = np.mean([one[member.cfg.score] for member, one in zip(predictors, found)], 0)
    threshold = np.mean([member.threshold for member in predictors], 0)
    numbers = metrics(scores, split.truth, threshold)
    numbers |= {f"mAP_{name}": metrics(one, split.truth)["mAP"] for name, one in found[0].items()
                if len(found) == 1 or name == "zero-shot"}  # the first run's
    if args.json:
        return print(json.dumps(numbers))
    first = predictors[0]
    # thresholds of the mixed score are chosen on photos of training, too
    chosen_here = seen and (split.name.endswith("/val")
                            or split.name.endswith("/train") and first.cfg.score == "mixed")
    who = (f"{first.cfg.score} score, epoch {first.epoch}" if len(found) == 1
           else f"mean of {len(found)} runs")
    print(f"{split.name}, {len(split.paths)} images, {who}, CP to OF1 at the run's thresholds"
          f"{', chosen on these labels' if chosen_here else ''}:")
    print("  ".join(f"{name} {value}" for name, value in numbers.items()))
    warn_if_below(split.name, numbers, first.cfg)
    if args.categories:
        ap = ap_per_category(scores, split.truth)
        print(*category_lines(split, scores, ap, threshold, first.rests_on), sep="\n")


def run(args):
    """What `python eval.py` does with its options."""
    if args.zero_shot:
        unlisted = {"unlisted": "unknown"} if is_sheet(args.data) else {}
        cfg = Config(**preset(args.data) | unlisted | args.places)
        return suggest(ZeroShot(cfg), args)
    predictors = []
    for name in (args.run, *(args.ensemble or args.compare or ())):
        encoder = predictors[0].encoder if predictors else None  # shared where it is the same
        predictors.append(Predictor(name, args.checkpoint, encoder=encoder, places=args.places))
        if predictors[-1].names != predictors[0].names:
            raise UserError(f"{name}: other categories than {args.run}, or another order: drop it")
    if args.image:
        return predict(predictors[0], images_in(args.image), args)
    if args.suggest:
        return suggest(predictors[0], args)
    splits = predictors[0].splits()
    name = args.split or ("test" if splits["test"] else "val")
    if not (split := splits[name]):
        raise UserError(f"{args.run} has no {name} split: choose another --split")
    strange = [one.run for one in predictors if changed(one.run, [split])]
    others = [str(run) for run in strange if run != predictors[0].run]  # of which `splits` tells
    if name == "train":
        split = split.measured()  # data.load has done it for val and test
    elif others:
        print(f"note: {split.name} is not what {', '.join(others)} was trained with: it may have "
              "learned from these images", file=sys.stderr)
    if args.compare:
        return compare(predictors, split)
    table(predictors, split, args, seen=predictors[0].run not in strange)


def main(argv=None):
    return run_main(lambda: run(parse(argv, __doc__)))


if __name__ == "__main__":
    sys.exit(main())
