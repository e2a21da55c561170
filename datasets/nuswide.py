"""NUS-WIDE's 81 concepts. Photos vanish from Flickr: missing ones are left out, counted and told.
https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html
"""
from pathlib import Path, PureWindowsPath

import numpy as np

from datasets.base import (Split, find, locate, positive_list, read_array, read_lines, signed,
                           splc_files, zeros_and_ones)
from support import UserError


def load(root, cfg):
    """The official split; in the LargeLoss setup formatted_{train,val}_*.npy, whose rows without a
    positive stay; in the SPLC setup its two lists, of which the first tells one label per image."""
    if cfg.single_positive == "splc":
        train, test = splc_files(cfg)
        return {"train": photos(root, *positive_list(train, 81, single=True), train),
                "test": photos(root, *positive_list(test, 81), test)}
    if cfg.single_positive == "largeloss":
        return {"train": arrays(root, "train"), "test": arrays(root, "val")}
    return {"train": official(root, "Train"), "test": official(root, "Test")}


def concepts(root):
    return read_lines(find(root, "Concepts81.txt", folders=("ConceptsList", "", "ImageList")), 81)


def photos(root, names, labels, where):
    """N image names as a list writes them, labels (N, 81) -> Split; missing photos are unused. They
    are looked for below Flickr/ or images/ as the list writes them, or all in one flat folder."""
    folders = [Path(root, folder) for folder in ("Flickr", "images", "Flickr/images", ".")]
    paths = [locate(name, folders, where) or locate(PureWindowsPath(name).name, folders, where)
             for name in names]
    unused = np.array([path is None for path in paths])
    if unused.all():
        raise UserError(f"{where}: its photos are not in Flickr/ or images/ of {root}: {names[0]}")
    return Split("nuswide", [path or name for path, name in zip(paths, names)], concepts(root),
                 labels, unused=unused, dropped={"photo missing": int(unused.sum())})


def official(root, part):
    """ImageList/<part>Imagelist.txt, and a file of 0/1 a concept or one of 81 columns."""
    path = find(root, f"{part}Imagelist.txt", folders=("ImageList", ""))
    images, merged = read_lines(path), Path(root, "Groundtruth", f"Labels_{part}.txt")
    if merged.exists():
        labels = zeros_and_ones(merged, (len(images), 81))
    else:
        files = [find(root, f"TrainTestLabels/Labels_{name}_{part}.txt",
                      folders=("Groundtruth", "")) for name in concepts(root)]
        labels = np.stack([zeros_and_ones(file, len(images)) for file in files], 1)
    return photos(root, images, labels, path)


def arrays(root, part):
    """formatted_<part>_images.npy and _labels.npy, as the LargeLoss setup publishes them."""
    images, labels = (find(root, f"formatted_{part}_{kind}.npy", folders=("", "Flickr"))
                      for kind in ("images", "labels"))
    names = [str(name) for name in read_array(images).ravel()]
    found = read_array(labels)
    if found.shape != (len(names), 81):
        raise UserError(f"{labels}: expected {len(names)} images x 81 concepts, got {found.shape}")
    return photos(root, names, signed(found == 1), images)
