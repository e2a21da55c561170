"""What a run says about photos: `eval.py RUN --image` and `eval.py RUN --suggest`, both on an eval.Predictor.

C categories, N = h*w locations.
"""
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from files import ConfigError, save_picture, write_atomically
from pictures import picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def images_in(paths):
    """Files and folders -> image files, sorted within a folder; a folder without any is an error."""
    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise data.DataError(f"expected images in {path}, found no {' '.join(SUFFIXES)}")
        missing = [p for p in inside if not p.is_file()]
        if missing:
            raise data.DataError(f"expected an image file, found nothing at {missing[0]}: check the path")
        found += inside
    return [str(p) for p in found]


def not_an_input(predictor, file, option, photos=()):
    """Refuses to write over the sheet that the run learned from, or over a photo; and what is no place for a file, before the work."""
    c, file = predictor.config, Path(file)
    if file.resolve() in {Path(path).resolve() for path in (c["data"], c["val"], c["names"], c["mask"], *photos) if path}:
        raise ConfigError(f"{option} {file} would overwrite that file, which is an input: choose another name")
    if not file.parent.is_dir() or file.is_dir() or file.exists() and not file.is_file():
        raise ConfigError(f"{option} {file} cannot be written: its folder is missing or it is no regular file; give another path")


def predict(predictor, paths, args):
    """--image: a line an image as soon as its batch is done, its picture, and a row of --csv. Returns the unreadable files."""
    folder, taken, unreadable, sheet = Path(args.out or predictor.run / "regions"), set(), [], io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["image", *predictor.names])
    if folder.resolve() in {Path(path).resolve().parent for path in paths}:
        raise ConfigError(f"--out {folder} is the folder of the photos, which the pictures would overwrite: choose another --out")
    if args.csv:
        not_an_input(predictor, args.csv, "--csv", paths)
    folder.mkdir(parents=True, exist_ok=True)
    if not args.json:
        tqdm.write("probabilities; * = present, by the category's threshold")
    for count, (i, p, maps) in enumerate(predictor.over(paths, args.batch, args.workers, unreadable, progress=True)):
        row, drawn = predictor.row(paths[i], p), None
        top = list(row["scores"].items())[: args.top]
        if args.pictures is None or count < args.pictures:
            stem = Path(paths[i]).stem
            drawn = folder / next(name for name in (f"{stem}{n}.png" for n in ["", *(f"-{k}" for k in range(2, len(paths) + 2))])
                                  if name.lower() not in taken)                    # a.jpg and a.png, or a.jpg of two folders
            taken.add(drawn.name.lower())
            tiles = predictor.tiles(paths[i], p, maps, np.argsort(-p, kind="stable")[: args.top])
            save_picture(lambda buffer: picture([tiles]).save(buffer, "PNG"), drawn)
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
    config, splits, file = predictor.config, predictor.splits(), Path(args.suggest)
    not_an_input(predictor, file, "--suggest")
    parts, folder = [s for s in (splits["train"], splits["val"]) if s], file.with_name(file.stem + "-regions")
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
            name = re.sub(r"[^\w.-]+", "_", f"{rank + 1:04d}_{Path(paths[drawn[i]]).stem}_{predictor.names[category]}.png")
            tiles = predictor.tiles(paths[drawn[i]], row, maps, [category])
            save_picture(lambda buffer: picture([tiles]).save(buffer, "PNG"), folder / name)
            regions[shown[rank]] = f"{folder.name}/{name}"

    home = Path(config["root"] or (Path(config["data"]).resolve().parent if data.is_sheet(config["data"]) else data.SCENES))
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["image", "category", "label", "probability", "region"])
    for label, cells in ((1, present), (0, absent)):
        for cell in cells:
            path = Path(paths[image[cell]])                                        # named as the sheet names it
            writer.writerow([path.relative_to(home).as_posix() if path.is_relative_to(home) else path, predictor.names[c[cell]],
                             label, f"{p[image[cell], c[cell]]:.4f}", regions.get(cell, "")])
    write_atomically(file, sheet.getvalue())

    print(f"{file}: of {len(order)} unknown labels {len(present)} are likely present (label 1, most probable first) and the "
          f"{len(absent)} least probable are listed as absent (label 0); {len(regions)} pictures in {folder}/")
    for word, cells, code in (("present", present, 1), ("absent", absent, -1)):
        known = truth[image[cells], c[cells]]
        known = known[known != data.UNKNOWN]
        if len(known):                                                             # a benchmark whose labels were hidden
            print(f"suggested {word}: {100 * np.mean(known == code):.1f} % of {len(known)} agree with the hidden labels")
    print("A probability ranks, it is no frequency: look at the rows, fill the right ones into the sheet, train again.")
