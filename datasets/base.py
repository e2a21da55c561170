"""What all layouts share: label codes, the record of a split, readers that say what is wrong.

N images, C categories.
"""
import collections
import hashlib
import io
import json
import os
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

import numpy as np

from support import UserError

POSITIVE, NEGATIVE, UNKNOWN = 1, -1, 0  # the only label codes of this project


@dataclass
class Split:
    """The images of one list with their labels."""
    name: str  # "coco/train"
    paths: list  # N absolute file names
    names: list  # C category names, the data set's own
    labels: np.ndarray  # (N, C) int8: what training may see
    truth: Optional[np.ndarray] = None  # (N, C) int8: all that is known
    prompts: Optional[list] = None  # C names as they are put into prompts
    boxes: Optional[list] = None  # N arrays (n, 5) float32: class, x0, y0, x1, y1, in 0..1
    sizes: Optional[list] = None  # N (width, height) that the list gives, the frame of its boxes
    unused: Optional[np.ndarray] = None  # (N,) bool: rows that count for the mask but are not used
    dropped: dict = field(default_factory=dict)  # why rows are unused: {"photo missing": 3}
    listed: Optional[list] = None  # N image names as a sheet writes them
    where: Optional[list] = None  # N places to name in messages, such as "sheet.csv:12"
    mask_sha256: str = ""  # of the seen cells, before any row is left out

    def __post_init__(self):
        self.truth = self.labels if self.truth is None else self.truth
        self.prompts = self.prompts or list(self.names)
        self.unused = np.zeros(len(self.paths), bool) if self.unused is None else self.unused

    def subset(self, rows):
        """The same split with only these rows (indices)."""
        def part(values):
            return [values[i] for i in rows] if values else None

        return replace(self, paths=part(self.paths) or [], labels=self.labels[rows],
                       truth=self.truth[rows], unused=self.unused[rows], boxes=part(self.boxes),
                       sizes=part(self.sizes), listed=part(self.listed), where=part(self.where))

    def used(self):
        return self.subset(np.flatnonzero(~self.unused))

    @property
    def info(self):
        """Counts and hashes for config.json; sha256 covers all names, prompts, labels and truth."""
        names = json.dumps([self.names, self.prompts,
                            [os.path.basename(path) for path in self.paths]])
        content = names.encode() + self.labels.tobytes() + self.truth.tobytes()
        counts = {"images": len(self.paths), "positives": int((self.labels == POSITIVE).sum()),
                  "negatives": int((self.labels == NEGATIVE).sum()),
                  "unknowns": int((self.labels == UNKNOWN).sum())}
        mask = {"mask_sha256": self.mask_sha256} if self.mask_sha256 else {}
        return counts | {"dropped": self.dropped,
                         "sha256": hashlib.sha256(content).hexdigest()} | mask


def find(root, *choices, what):
    """The first of `choices` (paths below root) that exists."""
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; expected the data set there (--root)")
    for choice in choices:
        if os.path.exists(Path(root, choice)):
            return Path(root, choice)
    raise UserError(f"{root}: {what} not found (looked for {', '.join(map(str, choices))})")


def read_bytes(path):
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")  # a pipe would be waited for without end
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_lines(path, names=None):
    """Lines that are not empty, stripped. names: how many different ones there must be."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: save it as UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty: complete the download")
    if names and not len(set(lines)) == len(lines) == names:
        raise UserError(f"{path}: expected {names} distinct names, one a line; got {len(lines)}, "
                        f"{len(set(lines))} distinct")
    return lines


def read_json(path, **options):
    try:
        return json.loads(read_bytes(path), **options)
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8
        raise UserError(f"{path}: not valid JSON ({error}); is the download complete?") from None


def read_array(path):
    """The array of a .npy, or the only one of a .npz; pickles are never loaded."""
    try:
        found = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        array, = [found] if isinstance(found, np.ndarray) else found.values()
        return np.asarray(array)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UserError(f"{path}: not an array file, .npy or .npz of one array "
                        f"({str(error)[:150]}); save it again") from None


def safe_join(folder, name, where):
    """folder/name, refused when `name` leads out of the folder. The user's links are followed."""
    name = str(name).replace("\\", "/")
    path = os.path.normpath(os.path.join(folder, name))
    below = path.startswith(os.path.join(os.path.normpath(folder), ""))
    if os.path.isabs(name) or "\0" in name or not below:
        raise UserError(f"{where}: the file name {name!r} leads out of {folder}")
    return path


def locate(paths):
    """The paths as their folders write them, None where there is no file.

    A name in another Unicode normal form (as macOS writes umlauts) is the same name.
    """
    listed, found = {}, []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            entries = os.listdir(folder) if os.path.isdir(folder) else []
            listed[folder] = {unicodedata.normalize("NFC", entry): entry for entry in entries}
        real = listed[folder].get(unicodedata.normalize("NFC", name))
        found.append(real and os.path.join(folder, real))
    return found


def twins(paths):
    """For each file the index of the first one with the same bytes; only files of equal size are
    read."""
    sizes = [os.path.getsize(path) for path in paths]
    count, seen = collections.Counter(sizes), {}
    return [seen.setdefault(hashlib.sha256(read_bytes(path)).digest() if count[size] > 1 else i, i)
            for i, (path, size) in enumerate(zip(paths, sizes))]


def require_unique(entries, where):
    """Nothing is listed twice."""
    seen = set()
    for entry in entries:
        if entry in seen:
            raise UserError(f"{where}: {entry} is listed twice; keep one of the two rows")
        seen.add(entry)


def require_files(paths, where):
    """The paths as `locate` finds them: every image is there, and listed once."""
    require_unique(paths, where)
    found = locate(paths)
    missing = [path for path, real in zip(paths, found) if real is None]
    if missing:
        raise UserError(f"{where}: {len(missing)} of {len(paths)} images are missing, first "
                        f"{missing[0]}; complete the download or correct --root")
    return found


def positive_list(path, classes, single=False):
    """A list 'name.jpg,idx idx' -> names, (N, classes) int8: the listed classes POSITIVE, the rest
    UNKNOWN. single: each line has exactly one idx (the lists of the SPLC setup)."""
    lines = read_lines(path)
    names, labels = [], np.full((len(lines), classes), UNKNOWN, np.int8)
    for i, line in enumerate(lines):
        name, _, listed = line.rpartition(",")
        columns = listed.split()
        fits = all(c.isdecimal() and int(c) < classes for c in columns)
        if not name or not fits or single and len(columns) != 1:
            wanted = "one idx" if single else "idx idx ..."
            raise UserError(f"{path}:{i + 1}: expected 'name.jpg,' and {wanted} below {classes}")
        names.append(name)
        labels[i, [int(c) for c in columns]] = POSITIVE
    return names, labels
