"""CUB-200-2011's 312 attributes as categories. https://www.vision.caltech.edu/datasets/cub_200_2011
attributes.txt lies beside or in CUB_200_2011/; the label is is_present: peers ignore certainty."""
import numpy as np

from datasets.base import Split, find, read_lines, require_files, require_unique, zeros_and_ones
from support import refused

FOLDERS = ("CUB_200_2011/CUB_200_2011", "CUB_200_2011", "")


def load(root, cfg):
    index = find(root, "images.txt", folders=FOLDERS)
    base = index.parent
    attributes = find(root, "attributes.txt", "attributes/attributes.txt", folders=(*FOLDERS, ".."))
    images, names = numbered(index), require_unique(numbered(attributes), attributes)
    sides = numbered(base / "train_test_split.txt", len(images))
    # lines 'image attribute 0|1 ...', image after image, some with stray fields after these
    labels = zeros_and_ones(base / "attributes/image_attribute_labels.txt",
                            (len(images), len(names)), column=2)
    prompts = [prompt(name) for name in names] if cfg.prompt_names == "peers" else None
    whole = Split("cub", require_files(images, [base / "images"], index), names, labels,
                  prompts=prompts)
    return {"train": whole.subset(np.flatnonzero(np.array(sides) == "1")),
            "test": whole.subset(np.flatnonzero(np.array(sides) == "0"))}


def prompt(name):
    """SCPNet's rule: 'has_bill_shape::curved_(up_or_down)' -> 'curved bill', else as it is."""
    group, _, value = name.partition("::")
    if value and "_" in group:
        # as there, the whole name is split: 'has_size::large_(16_-_32_in)' -> 'large size::large'
        name = f"{value.split('_(')[0]} {name.split('_')[1]}"
    return name.replace("_", " ")


def numbered(path, count=None):
    """Lines 'id value' with ids 1, 2, 3, ... -> values."""
    with refused(f"{path}: expected lines 'id value' with ids 1, 2, 3, ..."):
        value = dict(line.split() for line in read_lines(path, count))
        return [value[str(i)] for i in range(1, len(value) + 1)]
