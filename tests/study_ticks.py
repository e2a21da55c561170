"""When should unknown cells of a sheet count as absent (--assume-negative 0.3)? Sheets of a person
who ticks what is there and writes few 0s, and sheets that were filled at random.

    python tests/study_ticks.py --seeds 0 1 2

150 drawn photos; mAP on 500 validation scenes, in %. "ticks" knows 70 % of what is
present, and as many absent cells as the number behind it says, as a share of the ticks; "random"
knows 30 % of all cells; "common" too, of four categories that are each six of the drawn ones,
present in about half of the photos. JSON lines: assumed, positives, negatives, mAPs.
"""
import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data
import train
from config import Config
from datasets.csv_sheet import csv_text

CELL = {1: "1", -1: "0", 0: ""}


def sheet(file, split, known):
    """Writes a sheet of a data.Split in which the cells `known` (N, C) bool are filled."""
    rows = [[path, *(CELL[int(code)] for code in row)]
            for path, row in zip(split.paths, split.labels * known)]
    file.write_bytes(csv_text(["image", *split.names], rows))


def common(split):
    """Four categories, each the union of six: present where any of them is."""
    labels = split.labels.reshape(len(split.labels), 4, 6).max(2)
    return replace(split, labels=labels, truth=labels, names=split.names[::6], prompts=None)


def layouts(split, rng):
    """Yields (name, data.Split, the known cells)."""
    ticks = (split.labels == 1) & (rng.rand(*split.labels.shape) < 0.7)
    absent = rng.permutation(np.flatnonzero(split.labels == -1))
    for share in (0, 0.2, 0.8, 1.5):
        known = ticks.copy()
        known.flat[absent[:round(share * ticks.sum())]] = True
        yield f"ticks {share}", split, known
    yield "random", split, rng.rand(*split.labels.shape) < 0.3
    few = common(split)
    yield "common", few, rng.rand(*few.labels.shape) < 0.3


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    for seed in args.seeds:
        photos, unseen, _ = data.load(Config(data="scenes", seed=seed))
        photos = photos.subset(np.arange(150 * seed, 150 * (seed + 1)))
        unseen = unseen.subset(np.arange(500))
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            for name, split, known in layouts(photos, np.random.RandomState(seed)):
                sheet(place / "x.csv", split, known)
                test = common(unseen) if name == "common" else unseen
                sheet(place / "test.csv", test, np.ones(test.labels.shape, bool))
                for weight in (0, 0.3):
                    words = f"--clip tiny --size 256 --workers 0 --eval-every {args.epochs} " \
                            f"--epochs {args.epochs} --seed {seed} --assume-negative {weight}"
                    cfg, _ = train.parse([*words.split(), "--data", str(place / "x.csv"), "--root",
                                          "/", "--test", str(place / "test.csv"), "--cache-dir",
                                          str(place / "features"), "--out",
                                          str(place / f"{name}{weight}")])
                    numbers = train.train(cfg)[-1]["test"]
                    print("RESULT", json.dumps(dict(
                        seed=seed, sheet=name, assumed=weight,
                        positives=int((split.labels * known == 1).sum()),
                        negatives=int((split.labels * known == -1).sum()),
                        mixed=numbers["mAP_mixed"], query=numbers["mAP_query"],
                        region=numbers["mAP_region"], zero_shot=numbers["mAP_zero-shot"],
                        OF1=numbers["OF1"])), flush=True)


if __name__ == "__main__":
    main()
