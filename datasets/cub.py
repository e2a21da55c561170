"""CUB-200-2011's 312 attributes as categories. https://www.vision.caltech.edu/datasets/cub_200_2011

CUB_200_2011/ with attributes.txt beside or in it; is_present is the label, certainty is ignored by
all peers.
"""
import numpy as np

from datasets.base import (NEGATIVE, POSITIVE, UNKNOWN, Split, find, read_bytes, read_lines,
                           require_files, require_unique)
from support import UserError

FOLDERS = ("CUB_200_2011/CUB_200_2011", "CUB_200_2011", "")


def load(root, cfg):
    index = find(root, "images.txt", folders=FOLDERS, what="CUB's images.txt")
    base = index.parent
    attributes = find(root, "attributes.txt", "attributes/attributes.txt",
                      folders=(*FOLDERS, ".."), what="attributes.txt (the 312 names)")
    images, names = numbered(index), require_unique(numbered(attributes), attributes)
    sides = numbered(base / "train_test_split.txt")
    if len(sides) != len(images) or set(sides) - {"0", "1"}:
        raise UserError(f"{base / 'train_test_split.txt'}: expected 0 or 1 for all {len(images)} "
                        f"images, got {len(sides)} lines of {sorted(set(sides))[:5]}")
    labels = image_labels(base / "attributes/image_attribute_labels.txt", len(images), len(names))
    whole = Split("cub", require_files(images, [base / "images"], index), names, labels)
    return {"train": whole.subset(np.flatnonzero(np.array(sides) == "1")),
            "test": whole.subset(np.flatnonzero(np.array(sides) == "0"))}


def numbered(path):
    """Lines 'id value' with ids 1, 2, 3, ... -> values."""
    pairs = [line.split() for line in read_lines(path)]
    if any(len(pair) != 2 or pair[0] != str(i) for i, pair in enumerate(pairs, 1)):
        raise UserError(f"{path}: expected lines 'id value' with ids 1, 2, 3, ...")
    return [pair[1] for pair in pairs]


def image_labels(path, N, C):
    """Lines 'image attribute 0|1 ...', some with stray fields after these -> (N, C) int8."""
    labels = np.full((N, C), UNKNOWN, np.int8)
    code = {b"0": NEGATIVE, b"1": POSITIVE}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            image, attribute, value = line.split(None, 3)[:3]
            row, column = int(image) - 1, int(attribute) - 1
            if min(row, column) < 0 or labels[row, column] != UNKNOWN:
                raise ValueError
            labels[row, column] = code[value]
        except (ValueError, KeyError, IndexError):
            raise UserError(f"{path}:{number}: expected 'image attribute 0|1 ...', each pair once, "
                            f"got {line[:80]!r}") from None
    if (labels == UNKNOWN).any():
        raise UserError(f"{path}: {(labels == UNKNOWN).sum()} of {labels.size} cells have no line")
    return labels
