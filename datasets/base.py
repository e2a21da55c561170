"""What all layouts share: label codes, the record of a split of N images and C categories, readers
that say what is wrong."""
import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np

from support import NotFound, UserError, refused

POSITIVE, NEGATIVE, UNKNOWN = 1, -1, 0  # the only label codes of this project
ASSUMED_NEGATIVE = 0.3  # weight of unknown labels as negatives where labels tell presence
# The SPLC setup's published lists, below --lists or --root; the second is a test list.
LISTS = {"coco": ["coco_train_singlelabel.txt"], "voc2012": ["voc_train.txt"],
         "cub": ["cub_train.txt"], "nuswide": ["nus_train_singlelabel.txt", "nus_val.txt"]}
PER_IMAGE = ("paths", "labels", "truth", "boxes", "unused", "listed", "where")


@dataclass
class Split:
    """The images of one list with their labels."""
    name: str  # "coco/train"
    paths: list  # N absolute file names; of Predictor.predict whatever augment.read takes
    names: list  # C category names, the data set's own
    labels: np.ndarray  # (N, C) int8: what training may see
    truth: np.ndarray | None = None  # (N, C) int8: all that is known
    prompts: list | None = None  # C names as they are put into prompts
    boxes: list | None = None  # N arrays (n, 5) float32: class, x0, y0, x1, y1, in 0..1
    unused: np.ndarray | None = None  # (N,) bool: rows that count for the mask but are not used
    dropped: dict = field(default_factory=dict)  # why rows are unused: {"photo missing": 3}
    listed: list | None = None  # N image names as a sheet writes them
    where: list | None = None  # N places to name in messages, such as "sheet.csv:12"
    mask_sha256: str = ""  # of data.load's seen cells, before rows are left out

    def __post_init__(self):
        self.truth = self.labels if self.truth is None else self.truth
        self.prompts = self.prompts or [name.replace("_", " ") for name in self.names]
        self.unused = np.zeros(len(self.paths), bool) if self.unused is None else self.unused

    def subset(self, rows):
        """The same split with only these rows (indices)."""
        def part(values):
            if isinstance(values, np.ndarray):
                return values[rows]
            return values and [values[i] for i in rows]

        return replace(self, **{name: part(getattr(self, name)) for name in PER_IMAGE})

    def used(self):
        return self.subset(np.flatnonzero(~self.unused))

    def measured(self):
        """The split for metrics: where most known labels are positive, unknown counts as absent.
        Call it before `subset`: few rows cannot tell."""
        if not tells_presence(self.truth):
            return self
        return replace(self, truth=np.where(self.truth == UNKNOWN, NEGATIVE, self.truth))

    @property
    def info(self):
        """Counts and hashes for config.json; sha256 covers all names, prompts, labels and truth."""
        files = [os.path.basename(path) for path in self.paths]
        names = json.dumps([self.names, self.prompts, files])
        content = names.encode() + self.labels.tobytes() + self.truth.tobytes()
        count = {code: int((self.labels == code).sum()) for code in (POSITIVE, NEGATIVE, UNKNOWN)}
        mask = {"mask_sha256": self.mask_sha256} if self.mask_sha256 else {}
        return dict(images=len(files), positives=count[POSITIVE], negatives=count[NEGATIVE],
                    unknowns=count[UNKNOWN], sha256=hashlib.sha256(content).hexdigest(), **mask,
                    dropped={why: n for why, n in self.dropped.items() if n})


def tells_presence(labels):
    """Whether labels (N, C) tell mostly what is present, as ticks do, and leave the rest unknown:
    at most half as many are absent as present (docs/readings.md)."""
    few_absent = 2 * (labels == NEGATIVE).sum() <= (labels == POSITIVE).sum()
    return few_absent and all((labels == code).any() for code in (POSITIVE, UNKNOWN))


def signed(present):
    """bool -> POSITIVE or NEGATIVE, int8."""
    return np.where(present, POSITIVE, NEGATIVE).astype(np.int8)


# ---- files

def find(root, *names, folders=("",), hint=""):
    """The first of `names` that is in one of `folders` (paths below root)."""
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; expected the data set there (--root)")
    places = [os.path.join(folder, name) for name in names for folder in folders]
    for place in places:
        if os.path.exists(os.path.join(root, place)):
            return Path(root, place)
    raise NotFound(f"{root}: {names[0]} not found{hint} (looked for {', '.join(places)})")


def read_bytes(path):
    with refused(f"{path}: cannot be read, check the path or complete the download", known=OSError):
        return Path(path).read_bytes()


def read_text(path):
    """(text, encoding: UTF-8 or UTF-16, with or without its mark)."""
    raw = read_bytes(path)
    marks = {b"\xef\xbb": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = marks.get(raw[:2], "utf-16-le" if raw[1:2] == b"\0" else "utf-8")
    try:
        return raw.decode(encoding), encoding
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: save it as UTF-8 ('CSV UTF-8')") from None


def read_lines(path, count=None):
    """Lines that are not empty, stripped. count: how many there must be."""
    lines = [line.strip() for line in read_text(path)[0].splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty: complete the download")
    if count not in (None, len(lines)):
        raise UserError(f"{path}: expected {count} lines, got {len(lines)}")
    return lines


def read_json(path, **options):
    with refused(f"{path}: not valid JSON, is the download complete?", known=ValueError):
        return json.loads(read_bytes(path), **options)


def zeros_and_ones(path, shape, column=None):
    """A text file of 0s and 1s, all of it or one column -> int8 of this shape, POSITIVE and
    NEGATIVE. With a column, lines may have more fields, and not all the same number."""
    with refused(f"{path}: expected {np.prod(shape)} values of 0 or 1"):
        file = io.BytesIO(read_bytes(path))
        values = np.loadtxt(file, encoding="utf-8-sig", usecols=column).reshape(shape)
        if not np.isin(values, (0, 1)).all():
            raise ValueError(f"got {np.unique(values)[:4]}")
    return signed(values == 1)


def read_array(path):
    """The array of a .npy, or the only one of a .npz; pickles are never loaded."""
    with refused(f"{path}: not an array file, .npy or .npz of one array"):
        found = np.load(io.BytesIO(read_bytes(path)), allow_pickle=False)
        array, = [found] if isinstance(found, np.ndarray) else found.values()
        return array


# ---- images

def locate(name, folders, where):
    """The file of this name in the first of `folders` that holds it, else None. A name that leads
    out of a folder is refused; the user's links are followed. A name in another Unicode normal form
    (macOS writes umlauts as two characters) is the same name."""
    name = str(name).replace("\\", "/")
    forms = dict.fromkeys((name, normalize("NFC", name), normalize("NFD", name)))
    for folder in map(os.path.normpath, folders):
        for form in forms:
            path = os.path.normpath(os.path.join(folder, form))
            if not path.startswith(os.path.join(folder, "")):
                raise UserError(f"{where}: the file name {name!r} leads out of {folder}")
            if os.path.isfile(path):
                return path


def require_files(names, folders, where):
    """The files of the names: every image is there, and listed once."""
    paths = [locate(name, folders, where) for name in names]
    if missing := [name for name, path in zip(names, paths) if path is None]:
        raise UserError(f"{where}: {len(missing)} of {len(names)} images are missing, first "
                        f"{missing[0]} of {folders[0]}; complete the download or correct --root")
    return require_unique(paths, where)


def require_unique(entries, where):
    for entry, count in Counter(entries).items():
        if count > 1:
            raise UserError(f"{where}: {entry} is listed twice: drop or rename one")
    return entries


def twins(paths):
    """For each file the index of the first one with the same bytes; reads files of equal size."""
    sizes = [os.path.getsize(path) for path in paths]
    count, seen, first = Counter(sizes), {}, []
    for i, (path, size) in enumerate(zip(paths, sizes)):
        content = hashlib.sha256(read_bytes(path)).digest() if count[size] > 1 else i
        first.append(seen.setdefault(content, i))
    return first


def splc_files(cfg):
    """The files of SPLC's published lists."""
    folder, lists = Path(cfg.lists or cfg.root or ""), list(LISTS[cfg.data])
    if folder.is_file():
        folder, lists[0] = folder.parent, folder.name
    return [find(folder, name, f"annotations/{name}", f"scpnet_{name}",
                 hint=": give its folder as --lists") for name in lists]


def positive_list(path, classes, single=False):
    """A list 'name.jpg,idx idx' -> names, (N, classes) int8: the listed classes POSITIVE, the rest
    NEGATIVE. single: each line has exactly one idx, and the rest is UNKNOWN."""
    names, _, listed = zip(*(line.rpartition(",") for line in read_lines(path)))
    labels = np.full((len(names), classes), UNKNOWN if single else NEGATIVE, np.int8)
    wanted = "one idx" if single else "idx idx .."
    for i, columns in enumerate(listed):
        with refused(f"{path}:{i + 1}: expected 'name.jpg,' and {wanted} below {classes}"):
            labels[i, int(columns) if single else [int(c) for c in columns.split()]] = POSITIVE
    return names, labels
