"""A person's three rounds by script: train on a half-filled sheet, suggest, review, merge, train
again.

    python tests/three_rounds.py --masks 0 1 2 3 --shares 0.3 0.15

150 drawn photos, 24 categories; of their cells `share` is known. A round trains the way that
`--train` says, scores 500 scenes that are never shown, and answers the cells of the review page
with the truth: keys are counted as the page asks for them (one a cell; A for what is left of a
group once its wrong ones are answered). Prints a line a round and writes JSON lines.
"""
import argparse
import csv
import json
import shlex
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import eval as evaluation
import train
from config import Config
from eval import Predictor, best_thresholds, metrics
from tools import review

RECIPE = "--clip tiny --size 256 --workers 0"
SHRINKS = (0, 0.5, 1, 2, 5, 20, 1e9)  # the last gives 0.5
# of a person: a key that is decided on; a tile of a group that is looked over
SECONDS = {"key": 1.5, "look": 0.5}


def keys_pressed(cells, truth):
    """cells of the page in its order, {(image, category): 1 or -1} -> keys of a person who makes no
    mistake."""
    keys = 0
    for (_, kind), group in groupby(cells, key=lambda cell: (cell["category"], cell["kind"])):
        suggested = -1 if kind == "absent" else 1
        wrong = [truth[cell["image"], cell["category"]] != suggested for cell in group]
        last = max((n for n, one in enumerate(wrong, 1) if one), default=0)
        keys += last + (last < len(wrong))  # R or W up to the last wrong one, then A
    return keys


def OF1_of_each_shrink(predictor, scores, truth):
    """{k: OF1} on unseen scenes, scores (n, C), of the sheet's thresholds shrunk by k. Their
    maximum is an oracle: no user could choose k so."""
    parts = [predictor.splits()[name] for name in ("val", "train")]
    rated = np.concatenate([predictor.probabilities(part) for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return {k: metrics(scores, truth, best_thresholds(rated, labels, k))["OF1"] for k in SHRINKS}


def study(mask, share, args, place):
    scenes = Config(data="scenes", root=args.root, ratio=share, seed=mask, train_images=150)
    photos, _, unseen = data.load(scenes)
    unseen = unseen.subset(np.arange(args.unseen))
    names = [f"train2014/{Path(path).name}" for path in photos.paths]
    truth = {(name, category): int(code) for name, row in zip(names, photos.truth)
             for category, code in zip(photos.names, row)}
    sheet = place / "labels.csv"
    cell = {1: "1", -1: "0", 0: ""}
    review.write_atomically(sheet, review.csv_text(["image", *photos.names], [
        [name, *(cell[int(code)] for code in row)] for name, row in zip(names, photos.labels)]))
    looked = 0
    for number in range(args.rounds):
        out = place / f"round{number}"
        words = ["--data", sheet, "--root", args.root, *shlex.split(args.train), "--out", out,
                 "--cache-dir", place / "features",
                 "--seed", mask]
        start = time.time()
        if train.main([str(word) for word in words]):
            sys.exit("training failed")
        line = dict(mask=mask, share=share, round=number,
                    known=int((csv_labels(sheet) != "").sum()), looked=looked,
                    seconds=round(time.time() - start))
        predictor = Predictor(out)
        scores, _ = predictor.all_scores(unseen)
        line |= {name: metrics(p, unseen.truth)["mAP"] for name, p in scores.items()}
        for at, threshold in (("thresholds", predictor.threshold), ("0.5", 0.5)):
            decided = metrics(scores["mixed"], unseen.truth, threshold)
            line |= {f"OF1 {at}": decided["OF1"], f"CF1 {at}": decided["CF1"]}
        by_shrink = OF1_of_each_shrink(predictor, scores["mixed"], unseen.truth)
        line |= {"OF1 by shrink": by_shrink, "OF1 oracle": max(by_shrink.values())}
        if evaluation.main([str(out), "--suggest", str(place / f"round{number}.csv")]):
            sys.exit("suggesting failed")
        cells = page_cells(place / f"round{number}.html")
        right = [(truth[c["image"], c["category"]] == 1) == (c["kind"] != "absent") for c in cells
                 if c["kind"] != "uncertain"]
        answers = [[c["image"], c["category"], int(truth[c["image"], c["category"]] == 1)]
                   for c in cells]
        review.write_atomically(place / "answers.csv",
                                review.csv_text(["image", "category", "label"], answers))
        review.main(["merge", str(sheet), str(place / "answers.csv")])
        looked += len(cells)
        keys = keys_pressed(cells, truth)
        minutes = (keys * SECONDS["key"] + len(cells) * SECONDS["look"]) / 60
        line |= dict(shown=len(cells), suggested_right=round(100 * float(np.mean(right)), 1),
                     keys=keys, minutes=round(minutes, 1))
        yield line


def csv_labels(sheet):
    return np.array([row[1:] for row in csv.reader(open(sheet, encoding="utf-8-sig"))][1:])


def page_cells(page):
    text = page.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start:text.index("</script>", start)])["cells"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=str(ROOT / "generated" / "scenes"))
    parser.add_argument("--masks", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.15])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unseen", type=int, default=500)
    parser.add_argument("--train", default=RECIPE, help="options of train.py beside the sheet")
    parser.add_argument("--out", default="three_rounds.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)  # one rounding everywhere
    with open(args.out, "a") as results:
        for share in args.shares:
            for mask in args.masks:
                with tempfile.TemporaryDirectory() as place:
                    for line in study(mask, share, args, Path(place)):
                        print(line, flush=True)
                        results.write(json.dumps(line) + "\n")
                        results.flush()
