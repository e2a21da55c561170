"""What a run says about photos: `eval.py RUN --image` and `eval.py RUN --suggest`, both on an eval.Predictor.

C categories, N = h*w locations.
"""
import csv
import io
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from support import UserError
from support.checkpoint import save_atomically, write_atomically
from tools.plots import picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def images_in(paths):
    """Files and folders -> image files, sorted within a folder; a folder without any is an error."""
    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir()) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"expected images in {path}, found no {' '.join(SUFFIXES)}")
        if not os.path.lexists(inside[0]):
            raise UserError(f"expected an image file, found nothing at {path}: check the path")
        found += inside
    return [str(p) for p in found]


def new(file, option):
    """A file to write at the end, refused before the work: nothing that is there is replaced, be it a sheet, a photo or a checkpoint."""
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        if not Path(file).parent.is_dir():
            raise UserError(f"{option} {file} cannot be written, its folder is missing: make it, or give another path") from None
        return Path(file)
    raise UserError(f"{option} {file} is there already and would be lost: choose another name, or delete it")


def picture_names(paths):
    """Names of the pictures of image files, each its own: a.jpg and a.png, or a.jpg of two folders, make a.png and a-2.png."""
    taken, names = set(), []
    for path in paths:
        stem = Path(path).stem[:60]                                                # with up to 4 bytes each, 255 are the limit
        free = (name for k in itertools.count(1) if (name := f"{stem}-{k}.png" if k > 1 else f"{stem}.png").lower() not in taken)
        names.append(next(free))
        taken.add(names[-1].lower())
    return names


def predict(predictor, paths, args):
    """--image: a line an image as soon as its batch is done, its picture, and a row of --csv. Returns the unreadable files."""
    folder, unreadable, sheet = Path(args.out or predictor.run / "regions"), [], io.StringIO()
    pictures = [folder / name for name in picture_names(paths)][: args.pictures]
    for file in pictures if args.out and folder.is_dir() else ():
        new(file, "--out")
    if args.csv:
        new(args.csv, "--csv")
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["image", *predictor.names])
    folder.mkdir(parents=True, exist_ok=True)
    if not args.json:
        tqdm.write("probabilities; * = present, by the category's threshold")
    for i, p, maps in predictor.over(paths, args.batch, args.workers, unreadable, progress=True):
        row, drawn = predictor.row(paths[i], p), pictures[i] if i < len(pictures) else None
        top = list(row["scores"].items())[: args.top]
        if drawn:
            tiles = predictor.tiles(paths[i], p, maps, np.argsort(-p, kind="stable")[: args.top])
            save_atomically(lambda buffer: picture([tiles]).save(buffer, "PNG"), drawn)
        writer.writerow([row["image"], *(f"{value:.4f}" for value in p)])
        tqdm.write(json.dumps(row | {"scores": dict(top), "picture": drawn and str(drawn)}) if args.json else f"{row['image']}: "
                   + "  ".join(f"{name}{'*' * (name in row['present'])} {value:.2f}" for name, value in top))
    if args.csv:
        write_atomically(Path(args.csv), sheet.getvalue())
    return unreadable


def suggest(predictor, args):
    """--suggest: the unknown labels of the training images, believed ones first, as a sheet to check by eye.

    Rows image, category, label, probability, region. First label 1, all unknown cells whose probability passes the category's
    threshold, most probable first; then label 0, the least probable unknown cells, as many. The first --pictures
    rows come with a picture of the region that made the model believe it. Rows kept out of a sheet for validation are included.
    """
    file = new(args.suggest, "--suggest")
    folder, splits = new(file.with_name(f"{file.stem}-regions"), "--suggest"), predictor.splits()
    parts = [s for s in (splits["train"], splits["val"]) if s]
    paths = [path for part in parts for path in part.paths]
    labels, truth = (np.concatenate([getattr(part, which) for part in parts]) for which in ("labels", "truth"))      # (n, C)
    p = np.empty(labels.shape, np.float32)
    for i, row, _ in predictor.over(paths, args.batch, args.workers, progress=True):
        p[i] = row
    image, c = np.nonzero(labels == data.UNKNOWN)
    believed, order = p[image, c] >= predictor.threshold[c], np.argsort(-p[image, c], kind="stable")
    present = order[believed[order]]
    absent = order[~believed[order]][::-1][: len(present)]

    regions, shown = {}, present[: 100 if args.pictures is None else args.pictures]
    drawn = np.unique(image[shown]).tolist()
    if drawn:
        folder.mkdir(parents=True, exist_ok=True)
    for i, row, maps in predictor.over([paths[i] for i in drawn], args.batch, args.workers) if drawn else ():
        for rank in np.flatnonzero(image[shown] == drawn[i]):
            category = c[shown[rank]]
            name = re.sub(r"[^\w.-]+", "_", f"{rank + 1:04d}_{Path(paths[drawn[i]]).stem[:30]}_{predictor.names[category][:20]}.png")
            tiles = predictor.tiles(paths[drawn[i]], row, maps, [category])
            save_atomically(lambda buffer: picture([tiles]).save(buffer, "PNG"), folder / name)
            regions[shown[rank]] = f"{folder.name}/{name}"

    root = predictor.cfg.root or data.SCENES                                       # images are named as the sheet names them, or below the root
    listed = [name for part in parts for name in part.listed or [os.path.relpath(path, root) for path in part.paths]]
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["image", "category", "label", "probability", "region"])
    for label, cells in ((1, present), (0, absent)):
        for cell in cells:
            writer.writerow([listed[image[cell]], predictor.names[c[cell]], label, f"{p[image[cell], c[cell]]:.4f}", regions.get(cell, "")])
    write_atomically(file, sheet.getvalue())

    print(f"{file}: of {len(order)} unknown labels {len(present)} are likely present (label 1, most probable first) and the "
          f"{len(absent)} least probable are listed as absent (label 0); {len(regions)} pictures in {folder}/")
    for word, cells, code in (("present", present, 1), ("absent", absent, -1)):
        known = truth[image[cells], c[cells]]
        known = known[known != data.UNKNOWN]
        if len(known):                                                             # a benchmark whose labels were hidden
            print(f"suggested {word}: {100 * np.mean(known == code):.1f} % of {len(known)} agree with the hidden labels")
    print("A probability ranks, it is no frequency: look at the rows, fill the right ones into the sheet, train again.")
