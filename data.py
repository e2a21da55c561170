"""Labels, masks, data sets (section 4.1 of the paper): what training may see, and the images that go with it.

    python data.py coco --root /data/coco        checks a data set or a CSV and prints what is in it

`load` gives train, val and test `Split`s in the two settings of the paper: partial labels (each cell kept with
probability `ratio`) and single positive (one positive a training image). `Images` turns a Split into tensors.

N images, C categories.
"""
import hashlib, random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import augment as transforms
import datasets
from datasets import NEGATIVE, POSITIVE, UNKNOWN, DataError

SCENES = Path(__file__).resolve().parent / "generated" / "scenes"


@dataclass
class Split:
    name: str           # e.g. "coco/train"
    paths: list         # N absolute file names
    names: list         # C category names, the data set's own
    prompts: list       # C category names as they are put into prompts
    labels: np.ndarray  # (N, C) int8: what training may see
    truth: np.ndarray   # (N, C) int8: everything that is known
    boxes: list = None  # N arrays (n, 5) float32: class, x0, y0, x1, y1 as fractions of the image
    info: dict = field(default_factory=dict)  # counts, hash of the mask, dropped images; goes into JSON as it is


def partial_mask(shape, ratio, seed=0):
    """(N, C) bool. SARB's masks bit for bit at seed 0; one array of numbers serves all ratios, so 0.1 lies within 0.2."""
    return np.random.RandomState(seed).random_sample(shape) < ratio


def as_split(name, table, prompts, observed=None):
    labels = table.labels if observed is None else observed
    keep = np.ones(len(labels), bool) if table.drop is None else ~table.drop
    labels, table = labels[keep], table.take(keep)
    info = {"images": len(labels), "positives": int((labels == POSITIVE).sum()),
            "negatives": int((labels == NEGATIVE).sum()), "unknowns": int((labels == UNKNOWN).sum()),
            "dropped": table.notes}
    return Split(name, table.files, table.names, prompts, labels, table.labels, table.boxes, info)


def load(data, root=None, ratio=1.0, single_positive=None, seed=0, train_images=None, mask=None, val=None, names=None):
    """(train, val, test) Splits."""
    if data == "scenes":
        root = root or SCENES
        if Path(root) == SCENES and not (SCENES / "annotations" / "instances_val2014.json").exists():
            import scenes
            scenes.write(SCENES)
    tables = {"train": datasets.coco(root, "train2014"), "test": datasets.coco(root, "val2014")}
    tables["val"] = datasets.coco(root, "tune2014") if data == "scenes" else None
    full = tables["train"].labels
    kept = partial_mask(full.shape, ratio, seed) if ratio < 1 else np.ones(full.shape, bool)
    train = as_split(f"{data}/train", tables["train"], tables["train"].names, full * kept)
    train.info["mask_sha256"] = hashlib.sha256(kept.tobytes()).hexdigest()
    if train_images is not None:
        for key in ("paths", "labels", "truth", "boxes"):
            setattr(train, key, getattr(train, key)[:train_images])
    rest = [tables[k] and as_split(f"{data}/{k}", tables[k], tables[k].names) for k in ("val", "test")]
    return train, *rest


def read_image(path):
    """Any image file as RGB, upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); replace the file or take it off the list") from None


class Images:
    """Images of a Split as (float32 (3, size, size), index); a key is (epoch, index), or an index (epoch 0).

    All randomness comes from (seed, epoch, index), so any number of workers gives the same images.
    """

    def __init__(self, split, size, augment="none", seed=0):
        self.split, self.size, self.augment, self.seed = split, size, augment, seed

    def __len__(self):
        return len(self.split.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = transforms.squash(read_image(self.split.paths[index]), self.size)
        if self.augment != "none":
            image = transforms.flip(image, random.Random(f"{self.seed},{epoch},{index}"))
        return transforms.normalise(image), index
