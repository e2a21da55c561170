"""What a run says about photos: `eval.py RUN --image photo.jpg folder/`."""
import csv
import glob
import io
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support import UserError
from support.checkpoint import save_atomically, write_atomically
from tools.plots import grid_of, region_tiles

NO_PHOTOS = {"@eadir", "__macosx", "thumbs.db", "desktop.ini"}  # of file systems and photo programs


def images_in(paths):
    """Files, folders and patterns such as *.jpg -> files; hidden ones and thumbnails are no
    photos."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            inside = sorted(p for p in Path(path).rglob("*") if not p.is_dir() and not any(
                part.startswith(".") or part.lower() in NO_PHOTOS
                for part in p.relative_to(path).parts))
            if not inside:
                raise UserError(f"expected images in {path}, found no file")
            found += inside
        elif os.path.lexists(path):
            found.append(path)
        # a pattern that the shell left alone
        elif matching := sorted(glob.glob(path, recursive=True)):
            found += matching
        else:
            raise UserError(f"expected an image file, found nothing at {path}: check the path")
    return [str(path) for path in found]


def new(file, option):
    """A file to write at the end, checked before the work: nothing that is there is replaced."""
    file = Path(file)
    try:
        os.lstat(file)
    except FileNotFoundError:
        if file.parent.is_dir():
            return file
        raise UserError(f"{option} {file} cannot be written, its folder is missing: make it, or "
                        "give another path") from None
    raise UserError(f"{option} {file} is there already and would be lost: choose another name, or "
                    "delete it")


def picture_names(paths):
    """Names of the pictures, each its own: a.jpg and a.png make a.png and a-2.png."""
    taken, names = {}, []
    for path in paths:
        stem = Path(path).stem[:60]  # with up to 4 bytes each, 255 are the limit
        for k in itertools.count(taken.get(stem.lower(), 0) + 1):
            name = f"{stem}-{k}.png" if k > 1 else f"{stem}.png"
            if name.lower() not in taken:
                break
        taken[stem.lower()] = k
        taken[name.lower()] = 1
        names.append(name)
    return names


def predict(predictor, paths, args):
    """A line a photo as soon as its batch is done, its picture, and a row of --csv. -> exit
    status."""
    folder = Path(args.out or predictor.run / "regions")
    pictures = [folder / name for name in picture_names(paths)][:args.pictures]
    if args.out and folder.is_dir():
        for file in pictures:
            new(file, "--out")
    if args.csv:
        new(args.csv, "--csv")
    try:
        if pictures:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another --out, or "
                        "--pictures 0 to draw none") from None
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["image", *predictor.names])
    if not args.json:
        tqdm.write("probabilities; * = present, by the category's threshold")
    unreadable = []
    for i, p, maps in predictor.iterate(paths, args.batch, args.workers, unreadable, progress=True):
        row = predictor.row(paths[i], p)
        top = dict(list(row["scores"].items())[:args.top])
        picture = pictures[i] if i < len(pictures) else None
        if picture:
            ranked = np.argsort(-p, kind="stable")[:args.top]
            tiles = grid_of([region_tiles(predictor, paths[i], p, maps, ranked)])
            save_atomically(lambda buffer: tiles.save(buffer, "PNG"), picture)
        writer.writerow([row["image"], *(f"{value:.4f}" for value in p)])
        if args.json:
            tqdm.write(json.dumps(row | {"scores": top, "picture": picture and str(picture)}))
        else:
            marks = (f"{name}{'*' * (name in row['present'])} {value:.2f}" for name,
                     value in top.items())
            tqdm.write(f"{row['image']}: {'  '.join(marks)}")
    if args.csv:
        write_atomically(Path(args.csv), sheet.getvalue())
    if unreadable:
        told = f"{', '.join(unreadable[:5])}{' ...' if len(unreadable) > 5 else ''}"
        text = (f"{len(unreadable)} of {len(paths)} files are no readable images and were "
                f"skipped: {told}")
        if args.strict or len(unreadable) == len(paths):
            raise UserError(text)
        print(text, file=sys.stderr)
    return 0
