"""PASCAL VOC 2007 and 2012 (http://host.robots.ox.ac.uk/pascal/VOC), 20 categories. The labels come
from the lists ImageSets/Main/<class>_<split>.txt, or else from the XML files. N images."""
from xml.etree import ElementTree

import numpy as np

from datasets.base import NEGATIVE, POSITIVE, Split, find, read_bytes, read_lines, require_files
from support import refused

VOC = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike
         person pottedplant sheep sofa train tvmonitor""".split()


def load(root, cfg):
    """2007: trainval and test; 2012: train and val, as the peers use them. An object seen only as
    "difficult" is NEGATIVE, but POSITIVE in the lists of the SPLC setup."""
    year = int(cfg.data[3:])
    lists = zip(("train", "test"), ("trainval", "test") if year == 2007 else ("train", "val"))
    difficult = POSITIVE if cfg.single_positive == "splc" else NEGATIVE
    return {name: split(root, year, part, difficult) for name, part in lists}


def split(root, year, part, difficult=NEGATIVE):
    jpegs = find(root, "JPEGImages", folders=(f"VOCdevkit/VOC{year}", f"VOC{year}", ""))
    listing = jpegs.parent / f"ImageSets/Main/{part}.txt"
    ids = [line.split()[0] for line in read_lines(listing)]
    files = require_files([f"{name}.jpg" for name in ids], [jpegs], listing)
    lists = [listing.with_name(f"{name}_{part}.txt") for name in VOC]
    if lists[0].exists():
        labels = np.stack([class_list(file, ids, difficult) for file in lists], 1)
    else:
        notes = [jpegs.parent / f"Annotations/{name}.xml" for name in ids]
        labels = np.stack([annotation(file, difficult) for file in notes])
    unused = ~(labels == POSITIVE).any(1)  # the few whose objects are all difficult
    return Split(f"voc{year}/{part}", files, list(VOC), labels, unused=unused,
                 dropped={"without a positive": int(unused.sum())})


def class_list(path, ids, difficult):
    """Lines 'id 1', 'id 0' (difficult only) or 'id -1' -> (N,) int8 in the order of the ids."""
    code = {"1": POSITIVE, "0": difficult, "-1": NEGATIVE}
    with refused(f"{path}: expected 'ID 1', 'ID 0' or 'ID -1' for each image of the list"):
        value = dict(line.split() for line in read_lines(path))
        return np.array([code[value[key]] for key in ids], np.int8)


def annotation(path, difficult):
    """One XML file -> (20,) int8."""
    labels = np.full(len(VOC), NEGATIVE, np.int8)
    with refused(f"{path}: not an annotation of VOC's 20 classes"):
        tree = ElementTree.fromstring(read_bytes(path))
        for thing in tree.iter("object"):
            if difficult == POSITIVE or thing.findtext("difficult", "0").strip() != "1":
                labels[VOC.index(thing.findtext("name").strip().lower())] = POSITIVE
    return labels
