"""MS-COCO 2014's layout: annotations/instances_<split>.json beside the image folders.
https://cocodataset.org

Crowd annotations count as labels and give no box, as in the peers' code. N images, C categories.
"""
from pathlib import Path

import numpy as np

from datasets.base import NEGATIVE, POSITIVE, Split, find, read_json, require_files
from support import UserError, refused

NEEDS = {"images": "a file_name and an id of its own",
         "annotations": "a listed image_id and category_id; a bbox, if any, within the image"}


def load(root, cfg):
    """train2014 and val2014, which is the test set of this field."""
    largeloss, keep = cfg.single_positive == "largeloss", cfg.keep_unannotated
    return {"train": split(root, "train2014", keep, largeloss),
            "test": split(root, "val2014", keep)}


def split(root, folder, keep_unannotated=False, by_id=False):
    """One split in the JSON's order, images without any annotation unused: masks are drawn for them
    too. by_id: only annotated images, ordered by their id as a string (LargeLoss's order)."""
    listing, hint = f"annotations/instances_{folder}.json", ""
    if not Path(root, listing).exists() and any(Path(root).glob("*/*2017*")):
        hint = " (COCO 2017's lists are there; the field uses the split of 2014)"
    path = find(root, listing, hint=hint)
    images = find(root, folder, folders=("", "images"))
    content = read_json(path, object_hook=without_polygons)
    with refused(f"{path}: expected COCO's images, annotations, categories with id and name"):
        categories = sorted((c["id"], str(c["name"]).strip()) for c in content["categories"])
        listed, notes = list(content["images"]), list(content["annotations"])
    names = [name for _, name in categories]
    for name in names:
        ids = [key for key, other in categories if other == name]
        if not name or len(ids) > 1:
            raise UserError(f"{path}: the category {name!r} has the ids {ids}, expected a name and "
                            "one id: delete those that are not used")
    if not listed or not names:
        raise UserError(f"{path}: no images, or no categories: is it the file of {folder}?")

    column = {key: c for c, (key, _) in enumerate(categories)}  # ids run 1..90 with holes
    labels = np.full((len(listed), len(names)), NEGATIVE, np.int8)
    boxes, row, files, what = [[] for _ in listed], {}, [], "images"
    try:
        for i, record in enumerate(listed):
            files.append(record["file_name"])
            if row.setdefault(record["id"], i) != i:
                raise ValueError
        what = "annotations"
        for i, record in enumerate(notes):
            r, c = row[record["image_id"]], column[record["category_id"]]
            labels[r, c] = POSITIVE
            sized = listed[r].get("width") and listed[r].get("height")
            if sized and record.get("bbox") and not record.get("iscrowd"):
                x, y, w, h = record["bbox"]
                width, height = float(listed[r]["width"]), float(listed[r]["height"])
                box = x / width, y / height, (x + w) / width, (y + h) / height
                if not (-0.5 <= min(box) and max(box) <= 1.5 and w >= 0 and h >= 0):
                    raise ValueError  # nonsense; some real ones leave the image by a little
                boxes[r].append((c, *box))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise UserError(f"{path}: {what}[{i}] needs {NEEDS[what]}: {str(record)[:120]}") from None

    unused = ~(labels == POSITIVE).any(1) & (not keep_unannotated)
    found = Split(f"coco/{folder}", require_files(files, [images, images.parent], path), names,
                  labels, unused=unused, dropped={"without annotation": int(unused.sum())},
                  boxes=[np.array(part, np.float32).reshape(-1, 5) for part in boxes],
                  sizes=[(image.get("width"), image.get("height")) for image in listed])
    return found.subset(np.argsort([str(key) for key in row])).used() if by_id else found


def without_polygons(record):
    """Polygons are most of the file and never needed: parsing drops them, to save memory."""
    record.pop("segmentation", None)
    return record
