"""Where the data sets keep their images and labels: one function per layout, each returning `Table`s of complete labels.

Nothing here knows of masks, settings or training (data.py does). Every function takes the folder that the official
download unpacks to, tries the variants found in the wild, and raises DataError with one line when something is off.
Rows come in the order of the field's published code, because the published random masks are drawn in that order.

N images, C categories.
"""
import hashlib, json, os, tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

POSITIVE, NEGATIVE, UNKNOWN = 1, -1, 0  # the only label codes of this project; every other coding is converted here


class DataError(ValueError):
    """One line: what was expected, what came, what to do. Also when it was raised in a loader's worker process:
    torch rebuilds the exception there from a text that holds the whole traceback, of which the last line is kept."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).rsplit("DataError: ", 1)[-1].split()))


@dataclass
class Table:
    """The images of one official list with everything that is known about them."""
    files: list                       # N absolute paths
    labels: np.ndarray                # (N, C) int8, complete where the data set is; UNKNOWN where nobody knows
    names: list                       # C official names
    boxes: list = None                # N arrays (n, 5) float32: class, x0, y0, x1, y1 as fractions of the image
    drop: np.ndarray = None           # (N,) bool, rows that count for the mask but are not used
    notes: dict = field(default_factory=dict)  # what was dropped, and why

    def take(self, rows):
        """The same table with only these rows (indices, or a boolean per row)."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Table([self.files[i] for i in rows], self.labels[rows], self.names,
                     None if self.boxes is None else [self.boxes[i] for i in rows],
                     None if self.drop is None else self.drop[rows], self.notes)


# ---------------------------------------------------------------------------------------------------------- files
def find(root, *choices, what):
    """The first of `choices` (paths below root) that exists."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (expected the data set there; pass its folder as --root)")
    for choice in choices:
        if (root / choice).exists():
            return root / choice
    raise DataError(f"{root}: {what} not found (looked for {', '.join(map(str, choices))}); is --root right?")


def read_bytes(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_lines(path):
    """Non-empty lines without their ends; CRLF, a missing last newline and a byte-order mark are all fine."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def inside(folder, name, where):
    """folder/name, refused when `name` points out of the folder. Links that the user made on disk are followed."""
    name = str(name).replace("\\", "/")
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or "\0" in name or not path.startswith(os.path.join(os.path.normpath(folder), "")):
        raise DataError(f"{where}: the file name {name!r} leads out of {folder}; names must stay below that folder")
    return path


def present(paths):
    """(N,) bool: which files exist. Lists every folder once instead of asking for every file."""
    listed = {}
    found = np.zeros(len(paths), bool)
    for i, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder))
            except FileNotFoundError:
                listed[folder] = set()
            except OSError as error:
                raise DataError(f"{folder}: cannot be listed ({error.strerror})") from None
        found[i] = name in listed[folder]
    return found


def require(paths, where):
    missing = np.flatnonzero(~present(paths))
    if len(missing):
        raise DataError(f"{where}: {len(missing)} of {len(paths)} images are missing, first {paths[missing[0]]}; "
                        "complete the download or correct --root")


def cached(kind, files, parse):
    """parse() -> dict of arrays, kept in the user's cache folder under the sha256 of what `files` hold.

    Keyed by content, so an edited file is parsed again and a moved one is not. Never writes next to the data.
    """
    digest = hashlib.sha256(b"1" + kind.encode())  # the number is the version of the cached form
    for path in files:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    folder = Path(os.environ.get("TRM_CACHE") or Path.home() / ".cache" / "trm-ml")
    target = folder / f"{kind}-{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(target) as stored:
            return dict(stored)
    except Exception:
        pass  # absent, or spoilt by whatever cause: the original is at hand
    arrays = parse()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
            np.savez(part, **arrays)
        os.replace(part.name, target)
    except OSError:
        pass  # a full or read-only cache costs time only
    return arrays


# ----------------------------------------------------------------------------------------------------------- COCO
def read_json(path):
    def light(record):  # polygons are 95 % of the file and never needed: let go of them while parsing
        record.pop("segmentation", None)
        return record
    try:
        return json.loads(read_bytes(path), object_hook=light)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{path}: not valid JSON ({error}); the download is probably incomplete") from None


def parse_coco(path):
    """instances_*.json -> arrays. Crowd annotations count for labels and give no box, as in the peers' code."""
    content = read_json(path)
    try:
        images, notes, categories = content["images"], content["annotations"], content["categories"]
    except (KeyError, TypeError):
        raise DataError(f"{path}: expected COCO's keys images, annotations, categories") from None
    names, where = {}, f"{path}: categories"
    for category in categories:
        name, key = category.get("name"), category.get("id")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: category {key} has no name")
        if not isinstance(key, int) or key in names or name in names.values():
            raise DataError(f"{where}: {key} {name!r} has no integer id, or its id or name comes twice")
        names[key] = name
    column = {key: c for c, key in enumerate(sorted(names))}  # ids run 1..90 with holes: the index is the rank
    row, sizes = {}, []
    for i, image in enumerate(images):
        try:
            key, file = image["id"], image["file_name"]
            sizes.append((float(image["width"]), float(image["height"])))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: images[{i}] lacks one of id, file_name, width, height: {str(image)[:80]}") from None
        if key in row or not isinstance(file, str) or not file or "\n" in file or min(sizes[-1]) <= 0:
            raise DataError(f"{path}: images[{i}] has a repeated id, a bad file name or no size: {str(image)[:80]}")
        row[key] = i
    rows, columns, boxes = [], [], []
    for i, note in enumerate(notes):
        try:
            r, c = row[note["image_id"]], column[note["category_id"]]
            rows.append(r), columns.append(c)
            if not note.get("iscrowd"):
                (x, y, w, h), (width, height) = note["bbox"], sizes[r]
                boxes.append((r, c, x / width, y / height, (x + w) / width, (y + h) / height))
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: annotations[{i}] needs the image_id and category_id of a listed image and "
                            f"category, and a bbox of 4 numbers: {str(note)[:120]}") from None
    labels = np.full((len(images), len(names)), NEGATIVE, np.int8)
    labels[rows, columns] = POSITIVE
    annotated = np.zeros(len(images), bool)
    annotated[rows] = True
    boxes = np.array(boxes, np.float64).reshape(-1, 6)
    boxes = boxes[boxes[:, 0].argsort(kind="stable")]
    return {"files": np.array("\n".join(image["file_name"] for image in images)),
            "ids": np.array("\n".join(str(key) for key in row)), "names": np.array([names[k] for k in sorted(names)]),
            "labels": labels, "annotated": annotated, "boxes": boxes[:, 1:].astype(np.float32),
            "counts": np.bincount(boxes[:, 0].astype(int), minlength=len(images))}


def coco(root, split, cole=False, keep_unannotated=False):
    """One split of COCO 2014's layout: annotations/instances_<split>.json and the folder <split>/.

    cole=True: only annotated images, ordered by image id as a string (the single-positive setup's order).
    Otherwise JSON order; images without any annotation are marked in `drop`, since masks are drawn for them too.
    """
    path = find(root, f"annotations/instances_{split}.json", what=f"the annotations of {split}")
    folder = find(root, split, f"images/{split}", what=f"the image folder {split}")
    raw = cached("coco", [path], lambda: parse_coco(path))
    files = [inside(folder, name, path) for name in str(raw["files"]).split("\n")] if raw["files"].size else []
    if len(raw["labels"]) == 0 or raw["labels"].shape[1] == 0:
        raise DataError(f"{path}: lists no images or no categories")
    require(files, path)
    boxes = np.split(raw["boxes"], np.cumsum(raw["counts"])[:-1])
    drop = ~raw["annotated"] if not keep_unannotated else np.zeros(len(files), bool)
    table = Table(files, raw["labels"], [str(n) for n in raw["names"]], boxes, drop)
    if drop.any():
        table.notes["without annotation"] = int(drop.sum())
    if cole:
        ids = str(raw["ids"]).split("\n")
        table = table.take([i for i in sorted(range(len(ids)), key=ids.__getitem__) if raw["annotated"][i]])
    return table
