"""How much zero-shot should weigh in the mixed score, by the positives that a category has: sheets
of 30 to 150 drawn photos, decided on 500 validation scenes. docs/readings.md holds the table.

    python tests/study_mixed_weight.py --masks 4 5 6 7

Each row: mean mAP over the masks and, in brackets, the lowest. Some 15 s of one core a sheet.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import train
from config import Config
from eval import Predictor, metrics
from tools import review
from tools.predictor import score_split
from tools.zero_shot import SURE

SHEETS = ((30, 0.3), (30, 1.0), (60, 0.3), (60, 1.0), (150, 0.15), (150, 0.3), (150, 1.0))
WEIGHTS = {"1 / 2": lambda n: n * 0 + 0.5,
           "(n + 3) / (2n + 3)": lambda n: (n + 3) / (2 * n + 3),
           "(n + 8) / (2n + 8)": lambda n: (n + 8) / (2 * n + 8),
           "(n^2 + 25) / (2n^2 + 25)": lambda n: (n**2 + 25) / (2 * n**2 + 25),
           "(n^2 + 64) / (2n^2 + 64)": lambda n: (n**2 + 64) / (2 * n**2 + 64)}


def study(photos, share, mask, root, place):
    """One sheet -> {rule: mAP} and the mean number of positives a category."""
    scenes = Config(data="scenes", root=root, ratio=share, seed=mask, train_images=450)
    train_split, val, _ = data.load(scenes)
    unseen = val.subset(np.arange(500))
    few = train_split.subset(np.arange(37 * mask, 37 * mask + photos) % 450)
    cell = {1: "1", -1: "0", 0: ""}
    rows = [[f"train2014/{Path(path).name}", *(cell[int(code)] for code in row)]
            for path, row in zip(few.paths, few.labels)]
    sheet = place / "labels.csv"
    sheet.write_bytes(review.csv_text(["image", *few.names], rows))
    words = ["--data", sheet, "--root", root, "--clip", "tiny", "--size", "256", "--workers", "0",
             "--out", place / "run", "--cache-dir", place / "features", "--seed", mask,
             "--eval-every", "40"]
    if train.main([str(word) for word in words]):
        sys.exit("training failed")
    predictor = Predictor(place / "run")
    scores, _ = score_split(predictor.model, predictor.g_pos, predictor.g_neg,
                            predictor.loader(unseen), predictor.g_zero)
    run, zero = scores["mean"].clamp(-SURE, SURE).numpy(), scores["zero-shot"].numpy()
    slope, offset, _ = predictor.zero_shot_scale.numpy()
    n = (predictor.splits()["train"].labels == 1).sum(0).astype(float)  # (C,)
    found = {"query": scores["query"].numpy(), "zero-shot": zero}
    for rule, weight in WEIGHTS.items():
        w = weight(n)
        found[rule] = (1 - w) * run + w * (slope * zero + offset)
    return {rule: metrics(p, unseen.truth)["mAP"] for rule, p in found.items()}, n.mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=str(ROOT / "generated" / "scenes"))
    parser.add_argument("--masks", type=int, nargs="+", default=[4, 5, 6, 7])
    args = parser.parse_args()
    torch.set_num_threads(1)  # one rounding everywhere
    lines = []
    for photos, share in SHEETS:
        runs = []
        for mask in args.masks:
            with tempfile.TemporaryDirectory() as place:
                runs.append(study(photos, share, mask, args.root, Path(place)))
        cells = [f"{np.mean(values):.1f} ({min(values):.1f})" for values in
                 zip(*(found.values() for found, _ in runs))]
        lines.append([f"{photos}, {100 * share:.0f} %", f"{np.mean([n for _, n in runs]):.0f}",
                      *cells])
    for row in (["photos, known", "n", *runs[0][0]], *lines):
        print("|", " | ".join(row), "|")


if __name__ == "__main__":
    main()
