"""VG-200: the 200 most frequent categories of Visual Genome (https://visualgenome.org), as SARB
published them: {train,test}_list_500.txt and the label JSON, over the folders VG_100K and
VG_100K_2. The category names were never published; `match_names` finds them in objects.json:

    python data.py vg200 --root DIR --objects objects.json > DIR/vg_category_200.txt
"""
from collections import defaultdict
from pathlib import Path

import numpy as np

from datasets.base import (NEGATIVE, POSITIVE, Split, find, read_json, read_lines, require_files,
                           require_unique)
from support import refused

FOLDERS = ("", "VG", "annotations")


def load(root, cfg):
    hint = ": give --names FILE or find it: python data.py vg200 --root DIR --objects objects.json"
    file = cfg.names or find(root, "vg_category_200.txt", folders=FOLDERS, hint=hint)
    names = require_unique(read_lines(file, 200), file)
    folders = [Path(root, above, folder) for folder in ("VG_100K", "VG_100K_2")
               for above in ("", "VG", "images")]
    lists = {part: listed(root, part) for part in ("train", "test")}
    return {part: Split(f"vg200/{part}", require_files(images, folders, path), names, labels)
            for part, (path, images, labels) in lists.items()}


def listed(root, part):
    """The list file, its N image names, (N, 200) labels. A JSON of 500 categories is cut at 200."""
    path = find(root, f"{part}_list_500.txt", folders=FOLDERS)
    index = find(root, "vg_category_200_labels_index.json", "vg_category_500_labels_index.json",
                 folders=FOLDERS)
    images, known = read_lines(path), read_json(index)
    labels = np.full((len(images), 200), NEGATIVE, np.int8)
    with refused(f"{index}: expected 'ID.jpg': [indices] for every image of {path.name}"):
        for i, image in enumerate(images):
            labels[i, [c for c in known[image] if c < 200]] = POSITIVE
    return path, images, labels


def match_names(root, objects):
    """200 object names: for each index the one whose images are most like its own (intersection
    over union). A guess, to be checked by eye. object_alias.txt may lie beside objects.json."""
    (_, train, known), (_, test, other) = listed(root, "train"), listed(root, "test")
    row = {name: i for i, name in enumerate(train + test)}
    positive = (np.concatenate([known, other]) == POSITIVE).astype(np.float32)  # (N, 200)
    aliases = Path(objects).with_name("object_alias.txt")
    groups = [line.split(",") for line in read_lines(aliases)] if aliases.exists() else []
    alias = {word: words[0] for words in groups for word in words}
    seen = defaultdict(list)  # name: the rows of its images
    with refused(f"{objects}: not Visual Genome's objects.json"):
        for image in read_json(objects):
            names = {name.strip().lower() for thing in image["objects"] for name in thing["names"]}
            for name in {alias.get(name, name) for name in names}:
                if (i := row.get(f"{image['image_id']}.jpg")) is not None:
                    seen[name].append(i)
    words = sorted(seen, key=lambda name: (-len(seen[name]), name))[:3000]
    both = np.stack([positive[seen[name]].sum(0) for name in words])  # (words, 200)
    count = np.array([len(seen[name]) for name in words])[:, None]
    return [words[w] for w in (both / (count + positive.sum(0) - both)).argmax(0)]
