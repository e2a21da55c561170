"""What training may see (Sec. 4.1): splits, hidden labels, and the images that go with them.

    python data.py coco --root /data/coco     checks a data set and prints what is in it
    python data.py photos.csv                 your own sheet; each problem with its line

`load` gives train, val and test in the paper's two settings: partial labels (each cell is kept with
probability `ratio`) and single positive (one positive a training image). `Images` turns a Split
into tensors. N images, C categories."""
import hashlib
import os
import random
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from clip.model import MEAN, STD
from datasets import augment, coco, csv_sheet, cub, nuswide, scenes, vg200, voc
from datasets.base import (LISTS, NEGATIVE, POSITIVE, UNKNOWN, Split, positive_list, read_array,
                           read_lines, splc_files, twins)
from datasets.csv_sheet import is_sheet
from support import NotFound, UserError, refused

LAYOUTS = {"scenes": scenes.load, "coco": coco.load, "voc2007": voc.load, "voc2012": voc.load,
           "vg200": vg200.load, "nuswide": nuswide.load, "cub": cub.load}
SCENES = Path(__file__).resolve().parent / "generated" / "scenes"


# ---- which labels are seen

def partial_mask(shape, ratio, seed=0):
    """(N, C) bool, the seen cells; those of ratio 0.1 are seen at 0.2 too. Seed 0: SARB's masks."""
    return np.random.RandomState(seed).random_sample(shape) < ratio


def single_positives(labels, seed=1200):
    """(N, C) int8 with one POSITIVE per row, if it has any, the rest UNKNOWN. Cole et al.'s sampler
    (CVPR 2021) bit for bit: it shuffles the negatives, too, which only moves the random stream."""
    rng = np.random.RandomState(seed)
    observed = np.zeros_like(labels)
    for row, seen in zip(labels, observed):
        positives = np.flatnonzero(row == POSITIVE)
        negatives = np.flatnonzero(row == NEGATIVE)
        rng.shuffle(positives)
        rng.shuffle(negatives)
        seen[positives[:1]] = POSITIVE
    return observed


def hold_out(count, share, seed=1200):
    """(train rows, validation rows), sorted: Cole et al.'s split, 20 % in the LargeLoss setup."""
    order = np.random.RandomState(seed).permutation(count)
    held = int(round(share * count))
    return np.sort(order[:count - held]), np.sort(order[count - held:])


def hold_out_by_name(split, share):
    """The same for a sheet: a hash of its name says on which side an image is, whatever other rows
    come or go. Copies of one picture go where the first of their names, by the alphabet, goes."""
    first, name = twins(split.paths), {}  # name: of each picture, the first of its copies'
    for i, listed in zip(first, split.listed):
        name[i] = min(listed, name.get(i, listed))
    place = [int(hashlib.sha256(name[i].encode(errors="surrogateescape")).hexdigest()[:8], 16)
             for i in first]
    held = np.array(place) < share * 2**32
    return np.flatnonzero(~held), np.flatnonzero(held)


def read_mask(path, split):
    """(N, C) bool from a .npy, .npz or text file, rows as in the official list: 0/1 for the cells
    that are seen, or the label codes 1, -1, 0 (SARB's files), which must agree with the data."""
    if Path(path).suffix in (".npy", ".npz"):
        array = read_array(path)
    else:
        rows = [line.replace(",", " ").split() for line in read_lines(path)]
        with refused(f"{path}: not a mask file, .npy, .npz or text"):
            array = np.array(rows, float)
    if array.shape != split.labels.shape:
        raise UserError(f"{path}: expected {split.labels.shape} rows x classes, got {array.shape}")
    if len(odd := array[~np.isin(array, (-1, 0, 1))]):
        raise UserError(f"{path}: a cell is 1, 0 or -1, got {odd[0]}")
    wrong = (array != split.labels) & (array != UNKNOWN)
    if (array == NEGATIVE).any() and wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(f"{path}: {int(wrong.sum())} known cells disagree with the data set, first "
                        f"row {row + 1}, class {split.names[column]!r}: {array[row, column]}")
    return array != UNKNOWN


# ---- the data sets

def complete(cfg):
    """{"train", "val", "test"} -> Split with all known labels; some of the three may be absent."""
    root = cfg.root
    layout = csv_sheet.load if is_sheet(cfg.data) else LAYOUTS.get(cfg.data)
    if layout is None:
        raise UserError(f"unknown data set {cfg.data!r}: expected {', '.join(LAYOUTS)}, or a .csv")
    if cfg.data == "scenes" and root is None:
        root = SCENES
        scenes.write(root)  # leaves them alone when they are there
    elif root is None and cfg.data in LAYOUTS:
        raise UserError(f"{cfg.data}: say with --root which folder holds it; see docs/data.md")
    splits = layout(root, cfg)
    if len({tuple(split.names) for split in splits.values()}) > 1:
        raise UserError(f"{cfg.root}: its splits name different classes")
    if cfg.names and cfg.data != "vg200":  # vg200 has read them as its category names
        for split in splits.values():
            split.prompts = read_lines(cfg.names, len(split.names))
    return splits


def splc_labels(cfg, train):
    """SPLC's list names the training images and one positive of each -> train, its labels."""
    if cfg.data == "nuswide":  # complete labels are not published: the list is all there is
        return train, train.labels
    path = splc_files(cfg)[0]
    names, observed = positive_list(path, len(train.names), single=True)
    row = {Path(file).name: i for i, file in enumerate(train.paths)}
    if absent := [name for name in names if Path(name).name not in row]:
        raise UserError(f"{path}: {len(absent)} of its images are not in {cfg.data}'s training "
                        f"set, first {absent[0]}")
    train = train.subset([row[Path(name).name] for name in names])
    if ((observed == POSITIVE) & (train.labels != POSITIVE)).any():
        raise UserError(f"{path}: the annotations deny labels of it: is it the published list?")
    return train, observed


def observed_labels(cfg, train):
    """The setting's images of train (Split) -> train, its (N, C) int8 labels that are seen. Seed 0
    gives the published masks; Cole's sampler starts at 1200 + seed."""
    if cfg.single_positive == "splc":
        return splc_labels(cfg, train)
    if cfg.single_positive == "largeloss":
        # Cole et al. left out images without labels before they sampled. Rows of NUS-WIDE whose
        # photo is lost stay: each row takes its random numbers.
        train = train if cfg.data == "nuswide" else train.used()
        return train, single_positives(train.labels, 1200 + cfg.seed)
    if cfg.mask:
        return train, train.labels * read_mask(cfg.mask, train)
    return train, train.labels * partial_mask(train.labels.shape, cfg.ratio, cfg.seed)


def load(cfg):
    """A config.Config -> (train, val or None, test or None) Splits. Labels are hidden before
    train_images cuts the rows. Where cfg.val is None, scenes have their own val, sheets and
    "largeloss" hold out a fifth, the others nothing; val keeps all labels."""
    if [cfg.single_positive is not None, cfg.mask is not None, cfg.ratio != 1].count(True) > 1:
        raise UserError("expected one of --single-positive, --mask and a --ratio below 1")
    if cfg.single_positive == "splc" and cfg.data not in LISTS:
        raise NotFound(f"--single-positive splc needs one of {', '.join(LISTS)}: use largeloss")
    sheet, share = is_sheet(cfg.data), None
    if cfg.val is not None and not (sheet and is_sheet(cfg.val)):
        with refused(f"--val expects a share in [0, 1), or for a sheet a CSV; got {cfg.val}"):
            share = float(cfg.val)
            if not 0 <= share < 1:
                raise ValueError("out of range")
    if share and (cfg.data, cfg.single_positive) == ("nuswide", "splc"):
        raise UserError("--val: SPLC's list of NUS-WIDE tells one label per image: drop it")
    whole = complete(cfg)
    train, labels = observed_labels(cfg, whole["train"])
    rows = np.arange(len(labels))
    val, test = (split and split.measured() for split in (whole.get("val"), whole.get("test")))
    if share is None and val is None and (sheet or cfg.single_positive == "largeloss"):
        share = 0.2
    if share is not None:
        rows, held_rows = hold_out_by_name(train, share) if sheet else hold_out(len(rows), share)
        val = train.measured().subset(held_rows) if len(held_rows) else None
        if cfg.val and share and not val:
            raise UserError(f"--val {share} of {len(labels)} training images holds none out")
    rows = rows[~train.unused[rows]][:cfg.train_images]
    mask_sha256 = hashlib.sha256((labels != UNKNOWN).tobytes()).hexdigest()
    train = replace(train, labels=labels, mask_sha256=mask_sha256).subset(rows)
    if cfg.images == "photos" and not (train.labels == POSITIVE).any():
        raise UserError(f"{cfg.data}: no positive label is left in {len(rows)} training images: "
                        "raise --ratio or --train-images, lower --val, or fill in the sheet")
    splits = train, val and val.used(), test and test.used()
    for name, split in zip(("train", "val", "test"), splits):
        if split:
            split.name = f"{Path(cfg.data).stem}/{name}"
    return splits


def describe(split):
    """One line for the log."""
    info = split.info
    dropped = "".join(f"; {n} of the list dropped ({why})" for why, n in info["dropped"].items())
    mask = f"; mask {split.mask_sha256[:16]}" if split.mask_sha256 else ""
    return (f"{split.name}: {info['images']} images, {info['positives']} positive, "
            f"{info['negatives']} negative and {info['unknowns']} unknown cells{dropped}{mask}")


# ---- images

def name_of(image):
    """How an image is named where it is told: by its path, or else by its type."""
    return str(image) if isinstance(image, (str, Path)) else type(image).__name__


class Images(Dataset):
    """A Split's images: key (epoch, index), or index alone -> (float32 (3, size, size),
    CLIP-normalised; index).

    augment: "none" (the test transform: bicubic to size x size), "flip" (half of the images
    mirrored too) or "taidpt" (datasets/augment.py). All randomness comes from (seed, epoch, index):
    any number of workers, or a resumed run, gives the same images. An unreadable image raises, or
    if lenient, is zeros under the negative index -1 - index.
    """

    def __init__(self, split, size, augment="none", seed=0, lenient=False):
        self.split, self.size, self.augment, self.seed = split, size, augment, seed
        self.lenient = lenient
        self.mean, self.std = MEAN, STD  # a FeatureLoader sets those of its CLIP
        # share of the area; TaI-DPT's rn101_nus.yaml
        self.smallest_crop = 0.6 if split.name.startswith("nuswide") else 0.5

    def __len__(self):
        return len(self.split.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path = self.split.paths[index]
        rng = random.Random(f"{self.seed},{epoch},{index}")  # the same numbers on every machine
        try:
            image = augment.read(path)
        except Exception as error:  # whatever a broken file makes a decoder raise
            if self.lenient:
                return torch.zeros(3, self.size, self.size), -1 - index
            name = name_of(path)
            raise UserError(f"{name}: not a readable image ({error}): replace it") from None
        image = augment.transform(image, self.augment, self.size, rng, self.smallest_crop)
        return augment.normalise(image, self.mean, self.std), index

    def fingerprint(self):
        """bytes that name all that the pixels depend on: files (path, size, time), transform."""
        stats = [(path, os.stat(path)) for path in self.split.paths]
        files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        code = hashlib.sha256(Path(augment.__file__).read_bytes()).hexdigest()
        seed = self.seed if self.augment != "none" else 0
        transform = (self.size, self.augment, self.smallest_crop, seed, self.mean, self.std,
                     augment.POLICIES, code)
        return repr((files, transform)).encode()


if __name__ == "__main__":
    runpy.run_module("tools.check", run_name="__main__")
