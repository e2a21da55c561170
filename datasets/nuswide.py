"""NUS-WIDE's 81 concepts.
https://lms.comp.nus.edu.sg/wp-content/uploads/2019/research/nuswide/NUS-WIDE.html

Its photos vanish from Flickr: missing ones are left out, counted and told, never replaced.
N images, C = 81 categories.
"""
from pathlib import Path

import numpy as np

from datasets.base import (NEGATIVE, POSITIVE, Split, find, locate, read_array, read_bytes,
                           read_lines, require_unique, safe_join)
from support import UserError

FOLDERS = ("Flickr", "images", "Flickr/images", ".")


def load(root, cfg):
    """The official split; in the LargeLoss setup formatted_{train,val}_*.npy, whose rows without a
    positive stay. The SPLC setup's images and labels are all in its lists (data.splc_lists)."""
    if cfg.single_positive == "splc":
        return {}
    if cfg.single_positive == "largeloss":
        return {"train": arrays(root, "train"), "test": arrays(root, "val")}
    return {"train": official(root, "Train"), "test": official(root, "Test")}


def concepts(root):
    places = [f"{folder}Concepts81.txt" for folder in ("ConceptsList/", "", "ImageList/")]
    return read_lines(find(root, *places, what="the concepts"), 81)


def photos(root, names, labels, where):
    """Image names as a list writes them (N), labels (N, 81) -> Split; missing photos are unused.

    Looked for below Flickr/ or images/ as the list writes them, or all in one flat folder.
    """
    names = [name.replace("\\", "/") for name in names]
    best, lost = None, len(names)
    for flat in (False, True):
        for folder in (Path(root) / part for part in FOLDERS):
            paths = [safe_join(folder, Path(name).name if flat else name, where) for name in names]
            found = locate(paths)
            missing = sum(path is None for path in found)
            if missing < lost:
                best, lost = [real or path for real, path in zip(found, paths)], missing
                unused = np.array([path is None for path in found])
        if best:
            break
    if not best:
        raise UserError(f"{where}: none of its {len(names)} photos is in {root}/Flickr or "
                        f"{root}/images, e.g. {names[0]}")
    require_unique(best, where)
    return Split("nuswide", best, concepts(root), labels, unused=unused,
                 dropped={"photo missing": lost} if lost else {})


def official(root, part):
    """ImageList/<part>Imagelist.txt, and a file of 0/1 a concept or one of 81 columns."""
    path = find(root, f"ImageList/{part}Imagelist.txt", f"{part}Imagelist.txt",
                what=f"the {part} list")
    images = read_lines(path)
    merged = Path(root) / "Groundtruth" / f"Labels_{part}.txt"
    if merged.exists():
        present = zeros_and_ones(merged, len(images) * 81).reshape(-1, 81)
    else:
        files = [find(root, *(f"{folder}TrainTestLabels/Labels_{name}_{part}.txt"
                              for folder in ("Groundtruth/", "")),
                      what=f"label {name}") for name in concepts(root)]
        present = np.stack([zeros_and_ones(file, len(images)) for file in files], 1)
    return photos(root, images, np.where(present, POSITIVE, NEGATIVE).astype(np.int8), path)


def zeros_and_ones(path, count):
    tokens = read_bytes(path).split()
    if len(tokens) != count or set(tokens) - {b"0", b"1"}:
        raise UserError(f"{path}: expected {count} values of 0 or 1, got {len(tokens)} of "
                        f"{sorted(set(tokens))[:5]}")
    return np.array(tokens) == b"1"


def arrays(root, part):
    """formatted_<part>_images.npy and _labels.npy, as the LargeLoss setup publishes them."""
    def file(kind):
        places = [f"{folder}formatted_{part}_{kind}.npy" for folder in ("", "Flickr/")]
        return find(root, *places, what=f"the {part} {kind}")

    images, labels = file("images"), file("labels")
    names = [str(name) for name in read_array(images).ravel()]
    found = read_array(labels)
    if found.shape != (len(names), 81) or not np.isin(found, (0, 1)).all():
        raise UserError(f"{labels}: expected 0 or 1 for {len(names)} images x 81 concepts, got "
                        f"{found.shape} with the values {np.unique(found)[:5].tolist()}")
    return photos(root, names, np.where(found == 1, POSITIVE, NEGATIVE).astype(np.int8), images)
