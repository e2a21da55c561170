"""PASCAL VOC 2007 and 2012: lists and labels in ImageSets/Main. N images, C = 20 categories.
http://host.robots.ox.ac.uk/pascal/VOC
"""
from itertools import zip_longest

import numpy as np

from datasets.base import NEGATIVE, POSITIVE, Split, find, read_lines, require_files
from support import UserError

VOC = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
         person pottedplant sheep sofa train tvmonitor""".split()


def load(root, cfg):
    """2007: trainval and test; 2012: train and val, as the peers use them.

    An object seen only as "difficult" is NEGATIVE, but POSITIVE in the lists of the SPLC setup.
    """
    year = int(cfg.data[3:])
    lists = ("trainval", "test") if year == 2007 else ("train", "val")
    difficult = POSITIVE if cfg.single_positive == "splc" else NEGATIVE
    train, test = (split(root, year, part, difficult) for part in lists)
    return {"train": train, "test": test}


def split(root, year, part, difficult=NEGATIVE):
    jpegs = find(root, "JPEGImages", folders=(f"VOCdevkit/VOC{year}", f"VOC{year}", ""))
    main = jpegs.parent / "ImageSets" / "Main"
    listing = main / f"{part}.txt"
    ids = [line.split()[0] for line in read_lines(listing)]
    files = require_files([f"{name}.jpg" for name in ids], [jpegs], listing)
    labels = np.stack([class_list(main / f"{name}_{part}.txt", ids, difficult) for name in VOC], 1)
    unused = ~(labels == POSITIVE).any(1)  # the few whose objects are all difficult
    return Split(f"voc{year}/{part}", files, list(VOC), labels, unused=unused,
                 dropped={"without a positive": int(unused.sum())})


def class_list(path, ids, difficult):
    """Lines 'id 1', 'id 0' (difficult only) or 'id -1' in the list's order -> (N,) int8."""
    code = {"1": POSITIVE, "0": difficult, "-1": NEGATIVE}
    lines = [line.split() for line in read_lines(path)]
    for number, (line, key) in enumerate(zip_longest(lines, ids), 1):
        if line not in [[key, value] for value in code]:
            raise UserError(f"{path}:{number}: expected {key!r} and 1, 0 or -1, got {line}")
    return np.array([code[value] for _, value in lines], np.int8)
