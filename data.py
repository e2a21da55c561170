"""Labels, masks, data sets (section 4.1 of the paper): what training may see, and the images that go with it.

    python data.py coco --root /data/coco         checks a data set and prints what is in it
    python data.py photos.csv                     the same for your own sheet; every problem with its line

`load` gives train, val and test `Split`s in the paper's two settings: partial labels (each cell kept with probability
`ratio`) and single positive (one positive a training image). `Images` turns a Split into tensors. The six layouts
are in datasets.py, your own CSV in sheets.py, the augmentation in augment.py.

N images, C categories.
"""
import hashlib, inspect, json, os, random, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

import numpy as np

from datasets import augment as transforms
from datasets import base as datasets
from datasets.base import NEGATIVE, POSITIVE, UNKNOWN
from datasets.csv_sheet import is_sheet, second_sheet, sheet
from support import UserError
from support.cli import make_parser, run_main, words

NAMES = ("scenes", "coco", "voc2007", "voc2012", "vg200", "nuswide", "cub")
SCENES = Path(__file__).resolve().parent / "generated" / "scenes"

# How a class is called in a prompt: "peers" (TaI-DPT, DualCoOp; the default), "official", or "words" (VOC's joined
# names split). Names that no table mentions stay as they are; CUB's attributes follow SCPNet's rule (cub_prompt).
PROMPTS = {
    ("coco", "peers"): {"motorcycle": "motor bike", "airplane": "aeroplane"},
    ("voc2007", "words"): {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"},
}
PROMPTS["voc2012", "words"] = PROMPTS["voc2007", "words"]

# Where the SPLC setup's lists are looked for, below --lists or --root; the second is a test list.
LISTS = {"coco": ("coco_train_singlelabel.txt",), "voc2012": ("voc_train.txt",), "cub": ("cub_train.txt",),
         "nuswide": ("nus_train_singlelabel.txt", "nus_val.txt")}


@dataclass
class Split:
    name: str           # e.g. "coco/train"
    paths: list         # N absolute file names
    names: list         # C category names, the data set's own
    prompts: list       # C category names as they are put into prompts
    labels: np.ndarray  # (N, C) int8: what training may see
    truth: np.ndarray   # (N, C) int8: everything that is known
    boxes: list = None  # N arrays (n, 5) float32: class, x0, y0, x1, y1 as fractions of the image
    listed: list = None  # N image names as a sheet writes them
    info: dict = field(default_factory=dict)  # counts, hash of the mask, dropped images; goes into JSON as it is


def cub_prompt(name):
    """SCPNet's rule: 'has_bill_shape::curved_(up_or_down)' -> 'curved bill' (and, as it is, 'blue upper')."""
    group, _, value = name.partition("::")
    return value.split("_(")[0] + " " + name.split("_")[1] if value and "_" in group else name


def prompts_for(data, names, style="peers", file=None):
    """What the classes `names` are called in prompts: what `file` says, one a line, or else `style`, see PROMPTS."""
    if style not in ("peers", "official", "words"):
        raise UserError(f"prompt_names is one of peers, official, words; got {style!r}")
    if file and data != "vg200":  # which read it as its own names
        prompts = datasets.read_lines(file)
        if len(prompts) != len(names):
            raise UserError(f"{file}: expected {len(names)} names, one a line, got {len(prompts)}")
        return prompts
    if data == "cub" and style != "official":
        names = [cub_prompt(name) for name in names]
    return [PROMPTS.get((data, style), {}).get(name, name).replace("_", " ") for name in names]


# ------------------------------------------------------------------------------------------ which labels are seen
def partial_mask(shape, ratio, seed=0):
    """(N, C) bool. At seed 0 SARB's published masks bit for bit. The same numbers serve all ratios: 0.1 is in 0.2."""
    return np.random.RandomState(seed).random_sample(shape) < ratio


def single_positives(labels, seed=1200):
    """(N, C) int8 with one POSITIVE a row, the rest UNKNOWN: the sampler of Cole et al. (CVPR 2021), bit for bit.

    It shuffles every row's negatives too, and takes none of them. That moves the random stream, so we do the same.
    A row without a positive stays UNKNOWN throughout."""
    rng, observed = np.random.RandomState(seed), np.zeros_like(labels)
    for row, seen in zip(labels, observed):
        positives, negatives = np.flatnonzero(row == POSITIVE), np.flatnonzero(row == NEGATIVE)
        rng.shuffle(positives)
        rng.shuffle(negatives)
        seen[positives[:1]] = POSITIVE
    return observed


def hold_out(count, share, seed=1200):
    """(train rows, validation rows), both sorted: the split of Cole et al., 20 % in the LargeLoss setup."""
    order, held = np.random.RandomState(seed).permutation(count), int(round(share * count))
    return np.sort(order[:count - held]), np.sort(order[count - held:])


def read_mask(path, table):
    """(N, C) bool from the user's .npy, .npz or text file (commas or blanks): booleans or 0/1 that say which cells are
    seen, or label codes 1, -1, 0 (SARB's files), which must agree with the data set. Rows as in the official list."""
    if Path(path).suffix in (".npy", ".npz"):
        array = datasets.read_array(path)
    else:
        lines = datasets.read_lines(path)
        try:
            array = np.array([line.replace(",", " ").split() for line in lines]).astype(int)
        except (ValueError, OverflowError) as error:
            raise UserError(f"{path}: not a mask file (.npy, .npz, or one line of {table.labels.shape[1]} numbers a row): "
                            f"{error}") from None
    if array.shape != table.labels.shape or array.dtype.kind not in "biuf":
        raise UserError(f"{path}: expected a mask for {table.labels.shape} images x classes, got {array.shape} of type {array.dtype}")
    if not np.isin(array, (-1, 0, 1)).all():
        raise UserError(f"{path}: a cell is 1, 0 or -1, got {array[~np.isin(array, (-1, 0, 1))][0]}")
    wrong = (array != table.labels) & (array != UNKNOWN)
    if (array == NEGATIVE).any() and wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(f"{path}: {int(wrong.sum())} known cells disagree with the data set, first row {row + 1}, "
                        f"class {table.names[column]!r}: {array[row, column]}; codes are 1 present, -1 absent, 0 unknown")
    return array != UNKNOWN


# ------------------------------------------------------------------------------------------------------- the sets
def tables(data, root=None, cole=False, splc=False, names=None, keep_unannotated=False, val=None):
    """{"train", "val", "test"} -> datasets.Table with all that is known; some of the three may be absent."""
    if data == "scenes":
        if root is None:
            from datasets import scenes
            scenes.write(SCENES)  # leaves them alone when they are there
        parts = {key: datasets.coco(root or SCENES, folder)
                 for key, folder in (("train", "train2014"), ("val", "tune2014"), ("test", "val2014"))}
    elif is_sheet(data):
        parts = {"train": sheet(data, root)}
        if val is not None and not isinstance(val, float):
            parts["val"] = second_sheet(val, root, parts["train"], data)
    elif data not in NAMES:
        raise UserError(f"unknown data set {data!r}: expected one of {', '.join(NAMES)}, or a path that ends in .csv")
    elif root is None:
        raise UserError(f"{data}: say where the data set lies with --root")
    elif data == "coco":
        parts = {key: datasets.coco(root, f"{folder}2014", cole and key == "train", keep_unannotated)
                 for key, folder in (("train", "train"), ("test", "val"))}
    elif data == "voc2007":
        parts = {"train": datasets.voc(root, 2007, "trainval"), "test": datasets.voc(root, 2007, "test")}
    elif data == "voc2012":
        hard = POSITIVE if splc else NEGATIVE  # the lists of the SPLC setup count difficult objects
        parts = {"train": datasets.voc(root, 2012, "train", hard), "test": datasets.voc(root, 2012, "val", hard)}
    elif data == "vg200":
        parts = {split: datasets.vg200(root, split, names) for split in ("train", "test")}
    elif data == "nuswide" and cole:
        parts = {"train": datasets.nus_arrays(root, "train"), "test": datasets.nus_arrays(root, "val")}
    elif data == "nuswide" and splc:
        parts = {}  # that setup's images and test labels are in its lists
    else:
        parts = {split: getattr(datasets, data)(root, split) for split in ("train", "test")}
    if len({tuple(table.names) for table in parts.values()}) > 1:
        raise UserError(f"{root}: its splits name different classes")
    return parts


def splc_lists(data, root, lists, parts):
    """The SPLC setup: published lists name the training images and their positive. -> (train, its labels, test)"""
    where = Path(lists or root)
    paths = [where if i == 0 and os.path.isfile(where) else
             datasets.find(where.parent if os.path.isfile(where) else where, name, f"annotations/{name}", f"scpnet_{name}",
                           what=f"the list {name} (pass its folder as --lists)") for i, name in enumerate(LISTS[data])]
    if data == "nuswide":  # the complete training labels are not among the lists: the truth is what they tell
        concepts = datasets.nus_names(root)
        (train_names, observed), (test_names, test) = (datasets.single_list(path, 81, path == paths[0]) for path in paths)
        train = datasets.photos(root, train_names, observed, concepts, paths[0])
        test = np.where(test == POSITIVE, test, NEGATIVE)
        return train, observed, datasets.photos(root, test_names, test, concepts, paths[1])
    names, observed = datasets.single_list(paths[0], len(parts["train"].names), single=True)
    row = {Path(file).name: i for i, file in enumerate(parts["train"].files)}
    absent = [name for name in names if Path(name).name not in row]
    if absent:
        raise UserError(f"{paths[0]}: {len(absent)} of its images are not in {data}'s training set, first {absent[0]}")
    train = parts["train"].take([row[Path(name).name] for name in names])
    datasets.once(train.files, paths[0])
    if (observed & (train.labels != POSITIVE)).any():
        i, c = np.argwhere(observed & (train.labels != POSITIVE))[0]
        raise UserError(f"{paths[0]}:{i + 1}: {names[i]} is listed as {train.names[c]!r}, which its annotation denies")
    train.drop[:] = False  # what the list holds counts
    return train, observed, parts["test"]


def load(data, root=None, ratio=1.0, single_positive=None, seed=0, train_images=None, mask=None, val=None, names=None,
         lists=None, prompt_names="peers", keep_unannotated=False):
    """(train, val or None, test or None) Splits.

    data              one of NAMES, or the path of a .csv sheet
    root              folder of the official download; for a sheet, where relative image names start
    ratio             share of the training labels that is seen, in (0, 1]
    single_positive   None, "largeloss" (Cole's sampler; 80/20 split with clean validation labels) or "splc" (`lists`)
    seed              of the mask; 0 gives the published ones in both settings (Cole's generator starts at 1200 + seed)
    train_images      keep the first n training images; the mask is drawn for all of them before
    mask              file with a mask of your own instead of ratio (see read_mask)
    val               share of the training images held out, with all their labels, or (sheets) a second sheet.
                      None: 0.2 for sheets and "largeloss", the drawn validation set for scenes, otherwise no validation
    names             file with the names to use in prompts, one a line (vg200 has none of its own and needs it)
    lists             folder or training list file of the "splc" setup; default: root
    prompt_names      "peers", "official" or "words", see PROMPTS
    keep_unannotated  keep COCO's 702 / 367 images without any annotation (the paper's counts leave them out)
    """
    if single_positive not in (None, "largeloss", "splc"):
        raise UserError(f"single_positive is largeloss or splc, got {single_positive!r}")
    if not (isinstance(ratio, Real) and 0 < ratio <= 1):
        raise UserError(f"ratio is a share in (0, 1], got {ratio!r}")
    if (single_positive is not None) + (mask is not None) + (ratio != 1) > 1:
        raise UserError("single_positive, mask and ratio < 1 exclude each other: choose one of them")
    if single_positive == "splc" and data not in LISTS:
        raise UserError(f"single_positive='splc' has lists for {', '.join(LISTS)}; for {data} use 'largeloss'")
    if not all(isinstance(n, Integral) and low <= n <= 2**31 for n, low in ((seed, 0), (1 if train_images is None else train_images, 1))):
        raise UserError(f"seed is 0 or more and train_images 1 or more, whole and up to 2**31, got {seed!r} and {train_images!r}")
    try:
        val = float(val)  # a share may come from the command line as text
    except (TypeError, ValueError, OverflowError):
        pass
    if val is not None and not (0 <= val < 1 if isinstance(val, float) else is_sheet(data) and isinstance(val, (str, Path))):
        raise UserError(f"val is a share in [0, 1) of the training images or, for a sheet, a second sheet; got {val}")
    cole, splc = single_positive == "largeloss", single_positive == "splc"
    parts = tables(data, root, cole, splc, names, keep_unannotated, val)
    if splc:
        train, labels, parts["test"] = splc_lists(data, root, lists, parts)
    elif cole:  # the published sampler never had a row for images without labels; for photos lost since, it had
        train = parts["train"] if data == "nuswide" else parts["train"].used()
        labels = single_positives(train.labels, 1200 + seed)
    else:
        train = parts["train"]
        kept = read_mask(mask, train) if mask else partial_mask(train.labels.shape, ratio, seed)
        labels = train.labels * kept
    digest = hashlib.sha256((labels != UNKNOWN).tobytes()).hexdigest()  # of all rows, before any is dropped

    prompts = train.prompts if train.prompts and not names else prompts_for(data, train.names, prompt_names, names)
    rows, held = np.arange(len(labels)), None if isinstance(val, float) else parts.get("val")
    if held is None:
        share = (0.2 if cole or is_sheet(data) else 0.0) if val is None else val
        rows, held_rows = hold_out(len(labels), share)
        held_rows = held_rows[~train.drop[held_rows]]
        if val and not len(held_rows):
            raise UserError(f"val {val} of {len(labels)} training images holds none out: raise it, or give 0 for no validation")
        held = train.take(held_rows) if len(held_rows) else None
    rows = rows[~train.drop[rows]][:train_images]
    label = Path(data).stem if is_sheet(data) else data
    first = as_split(f"{label}/train", train.take(rows), prompts, labels[rows])
    first.info["mask_sha256"] = digest
    if not first.info["positives"]:
        raise UserError(f"{data}: no positive label is left in {len(rows)} training images; raise ratio or train_images"
                        + (", or lower val" if val and isinstance(val, float) else ""))
    return first, *(table and as_split(f"{label}/{name}", table.used(), prompts)
                    for name, table in (("val", held), ("test", parts.get("test"))))


def load_for(cfg):
    """`load` with the settings of a run (config.Config)."""
    return load(**{name: getattr(cfg, name) for name in inspect.signature(load).parameters})


def as_split(name, table, prompts, labels=None):
    labels = table.labels if labels is None else labels
    named = json.dumps([table.names, prompts, [os.path.basename(file) for file in table.files]])
    info = {"images": len(labels), "positives": int((labels == POSITIVE).sum()),
            "negatives": int((labels == NEGATIVE).sum()), "unknowns": int((labels == UNKNOWN).sum()),
            "dropped": table.notes, "sha256": hashlib.sha256(named.encode() + labels.tobytes() + table.labels.tobytes()).hexdigest()}
    return Split(name, table.files, table.names, prompts, labels, table.labels, table.boxes, table.listed, info)


def describe(split):
    """One line for the log."""
    info = split.info
    return (f"{split.name}: {info['images']} images, {info['positives']} positive, {info['negatives']} negative and "
            f"{info['unknowns']} unknown cells"
            + "".join(f"; {count} dropped ({why})" for why, count in info["dropped"].items())
            + (f"; mask {info['mask_sha256'][:16]}" if "mask_sha256" in info else ""))


# --------------------------------------------------------------------------------------------------------- images
class Images:
    """A Split's images as (float32 (3, size, size) CLIP-normalised, index); a key is (epoch, index), or index (epoch 0).

    augment: "none" (the test transform: bicubic to size x size), "flip" (the same and half the images mirrored) or
    "taidpt" (see augment.py). All randomness comes from (seed, epoch, index): any number of workers, or a resumed
    run, gives the same images. Labels are looked up by index, so they never travel through the loader."""

    def __init__(self, split, size, augment="none", seed=0):
        if augment not in ("none", "flip", "taidpt"):
            raise UserError(f"augment is none, flip or taidpt, got {augment!r}")
        self.paths, self.size, self.augment, self.seed = split.paths, size, augment, seed
        self.smallest_crop = 0.6 if split.name.startswith("nuswide") else 0.5  # of the area; TaI-DPT's rn101_nus.yaml

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = random.Random(f"{self.seed},{epoch},{index}")  # text, because Python seeds from it alike on every machine
        try:
            image = transforms.read(self.paths[index])
        except Exception as error:  # decoders raise whatever a broken file makes them: one message for all of it
            raise UserError(f"{self.paths[index]}: not a readable image ({error}); "
                            "replace it or take it off the list") from None
        if self.augment == "taidpt":
            image = transforms.taidpt(image, self.size, rng, self.smallest_crop)
        else:
            image = transforms.squash(image, self.size)
            image = transforms.flip(image, rng) if self.augment == "flip" else image
        return transforms.normalise(image), index


# -------------------------------------------------------------------------------------------------------- checker
def check(data, root=None, names=None, decode=True):
    """Prints what is in a data set or sheet; returns the problems, one line each."""
    try:
        parts = tables(data, root, names=names)
        prompts_for(data, parts["train"].names, file=names)
    except UserError as error:
        return getattr(error, "problems", [str(error)])
    problems = []
    for name, table in parts.items():
        table = table.used()
        positive = (table.labels == POSITIVE).astype(np.float32)
        counts = positive.sum(0)
        print(f"\n{describe(as_split(f'{data} {name}', table, table.names))}")
        print(f"{'class':32}{'present':>9}{'absent':>9}{'unknown':>9}")
        for c, category in enumerate(table.names):
            column = table.labels[:, c]
            print(f"{category[:31]:32}{int(counts[c]):9}{(column == NEGATIVE).sum():9}{(column == UNKNOWN).sum():9}")
        never = [category for category, count in zip(table.names, counts) if not count]
        if never and name == "train":
            problems.append(f"{data} {name}: no image has {', '.join(map(repr, never[:5]))}"
                            f"{f' and {len(never) - 5} more' if len(never) > 5 else ''}: nothing to learn from")
        together = np.triu(positive.T @ positive, 1)
        lift = np.where(together >= 3, together * len(positive) / np.maximum(np.outer(counts, counts), 1), 0)
        print("seen together most, beyond chance:")
        for pair in np.argsort(lift, axis=None)[::-1][:8]:
            a, b = np.unravel_index(pair, lift.shape)
            if lift[a, b] > 1:
                print(f"  {table.names[a]} + {table.names[b]}: {together[a, b]:.0f} images, {lift[a, b]:.1f} times chance")
        if decode:
            def unreadable(i):
                try:
                    transforms.read(table.files[i])
                except Exception as error:
                    place = f"{table.where[i]}: " if table.where else ""
                    return f"{place}{table.files[i]}: not a readable image ({error})"
            with ThreadPoolExecutor() as pool:  # decoding leaves the interpreter free
                problems += [line for line in pool.map(unreadable, range(len(table.files))) if line]
    return problems


def main(argv=None):
    parser = make_parser("data.py", __doc__)
    parser.add_argument("data", help=f"{', '.join(NAMES)}, or a .csv: image,<class>,... with cells 1, 0 or empty")
    parser.add_argument("--root", help="folder of the download; for a sheet, where relative image names start")
    parser.add_argument("--names", help="file of prompt names, one a line (vg200 needs it)")
    parser.add_argument("--no-decode", action="store_true", help="do not open every image (COCO: minutes saved)")
    parser.add_argument("--objects", help="vg200: Visual Genome's objects.json; prints the 200 names found by matching")

    def work():
        args = parser.parse_args(words(argv))
        if args.objects:
            if not args.root or args.data != "vg200":
                raise UserError("--objects needs vg200 and --root, the folder of Visual Genome")
            return print("\n".join(datasets.vg_match(args.root, args.objects)))
        problems = check(args.data, args.root, args.names, not args.no_decode)
        for line in problems:
            print("error: " + " ".join(line.split()), file=sys.stderr)                # a cell of a sheet may hold line breaks
        if problems:
            return 2
        print("\nno problems found")
    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
