"""What a run says about photos: `eval.py RUN --image photo.jpg folder/`."""
import contextlib
import glob
import json
import os
import sys
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from datasets import augment
from datasets.csv_sheet import csv_text
from support import UserError
from support.checkpoint import write_atomically
from tools.plots import region_tiles, save_grid

NO_PHOTOS = (".", "@eadir", "__macosx", "thumbs.db", "desktop.ini")  # of systems and programs


def images_in(paths):
    """Files, folders and patterns that the shell left alone (*.jpg) -> files, those of a folder
    without hidden ones and thumbnails; how many these are is printed."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            below = {p for p in Path(path).rglob("*") if p.is_symlink() or not p.is_dir()}
            hidden = {p for p in below if p.is_dir() or any(part.lower().startswith(NO_PHOTOS)
                                                            for part in p.relative_to(path).parts)}
            if hidden:
                print(f"left out (hidden, no photos, links to folders): {len(hidden)} in {path}, "
                      f"first {min(hidden)}", file=sys.stderr)
            files = sorted(below - hidden)
        else:
            literal = path.replace("[", "[[]")  # photos[1]/*.jpg may mean a folder of that name
            matches = glob.glob(path, recursive=True) or glob.glob(literal, recursive=True)
            files = [path] if os.path.lexists(path) else sorted(
                match for match in matches if not os.path.isdir(match))
        if not files:
            raise UserError(f"expected images at {path}, found no file: check the path")
        found += map(str, files)
    return found


def require_new(file, option):
    """A file to write at the end, checked before the work: nothing that is there is replaced."""
    file = Path(file)
    with contextlib.suppress(FileNotFoundError):
        file.lstat()  # raises for what can be no file's name, which exists() may pass over
        raise UserError(f"{option} {file} is there already: choose another name, or move it away")
    if not file.parent.is_dir():
        raise UserError(f"{option} {file} cannot be written, its folder is missing: make it")
    return file


def predict(predictor, paths, args):
    """A line per photo as soon as its batch is done, its picture, and a row of --csv."""
    folder = Path(args.out or predictor.run / "regions")
    # a number, since a.jpg may lie beside a.png; of 255 bytes a character may need four
    pictures = [folder / f"{Path(path).stem[:60]}-{number}.png"
                for number, path in enumerate(paths[:args.pictures], 1)]
    if args.csv:
        require_new(args.csv, "--csv")
    if pictures:
        folder.mkdir(parents=True, exist_ok=True)
    if args.out:
        for file in pictures:
            require_new(file, "--out")
    if not args.json:
        tqdm.write("probabilities; * = present, by the category's threshold")
    unreadable, rows = [], []
    scored = predictor.iterate(paths, args.batch, args.workers or 0, unreadable)
    for i, p, maps in tqdm(scored, total=len(paths), unit="image", leave=False, disable=None):
        row = predictor.row(paths[i], p)
        top = dict(list(row["scores"].items())[:args.top])
        picture = str(pictures[i]) if i < len(pictures) else None
        if picture:
            save_grid([region_tiles(predictor, paths[i], p, maps, args.top)], pictures[i])
        rows.append([row["image"], *(f"{value:.4f}" for value in p)])
        if args.json:
            tqdm.write(json.dumps(row | {"scores": top, "picture": picture}))
        else:
            marks = (f"{name}{'*' if name in row['present'] else ''} {value:.2f}"
                     for name, value in top.items())
            others = len(set(row["present"]) - set(top))
            more = f"  +{others} present" if others else ""
            tqdm.write(f"{row['image']}: {'  '.join(marks)}{more}")
    if args.csv:
        write_atomically(Path(args.csv), csv_text(["image", *predictor.names], rows))
    if unreadable:
        skipped = [f"{path} ({why_not(path)})" for path in unreadable]
        text = f"{len(skipped)} of {len(paths)} files are no readable images and were skipped:"
        if args.strict or len(skipped) == len(paths):
            raise UserError(f"{text} {', '.join(skipped[:5])}{' ...' if len(skipped) > 5 else ''}")
        print(text, *skipped, sep="\n  ", file=sys.stderr)


def why_not(path):
    """Why a photo cannot be read; None where it can."""
    try:
        augment.read(path)
    except Exception as error:  # whatever a broken file makes a decoder raise
        heic = str(path).lower().endswith((".heic", ".heif")) and os.path.isfile(path)
        missing = heic and ".heic" not in Image.registered_extensions()
        return f"{error}{': pip install pillow-heif' if missing else ''}"
