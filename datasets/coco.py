"""MS-COCO 2014's layout: annotations/instances_<split>.json beside the image folders. https://cocodataset.org

Crowd annotations count as labels and give no box, as in the peers' code. N images, C categories.
"""
import numpy as np

from datasets.base import NEGATIVE, POSITIVE, Split, find, read_json, require_files, safe_join
from support import UserError


def load(root, cfg):
    """train2014 and val2014, which is the test set of this field."""
    largeloss = cfg.single_positive == "largeloss"
    return {"train": split(root, "train2014", by_id=largeloss, keep_unannotated=cfg.keep_unannotated),
            "test": split(root, "val2014", keep_unannotated=cfg.keep_unannotated)}


def split(root, folder, by_id=False, keep_unannotated=False):
    """One split. by_id: only annotated images, ordered by their id as a string (LargeLoss's order).

    Otherwise the JSON's order; images without any annotation are marked as unused, since masks are drawn for
    them too.
    """
    path = find(root, f"annotations/instances_{folder}.json",
                what=f"the annotations of {folder}{layout_of(root)}")
    images = find(root, folder, f"images/{folder}", what=f"the image folder {folder}")
    content = read_json(path, object_hook=without_polygons)
    try:
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        row = {image["id"]: i for i, image in enumerate(content["images"])}
        files = [safe_join(images, image["file_name"], path) for image in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: expected COCO's images (id, file_name), annotations and categories (id, name); "
                        f"{error!r}") from None
    if len(row) < len(files):
        raise UserError(f"{path}: {len(files) - len(row)} image ids come twice; an id names one image")
    names = [categories[key] for key in sorted(categories)]
    for name in names:
        if names.count(name) > 1:
            twice = [key for key in sorted(categories) if categories[key] == name]
            raise UserError(f"{path}: the category {name!r} comes twice, with the ids {twice}: delete the one that is "
                            "not used (some exporters add a parent category with id 0)")
    column = {key: c for c, key in enumerate(sorted(categories))}  # ids run 1..90 with holes

    labels = np.full((len(files), len(names)), NEGATIVE, np.int8)
    boxes = [[] for _ in files]
    for i, note in enumerate(content["annotations"]):
        try:
            r, c = row[note["image_id"]], column[note["category_id"]]
            labels[r, c] = POSITIVE
            if note.get("bbox") and not note.get("iscrowd"):
                x, y, w, h = note["bbox"]
                width, height = content["images"][r]["width"], content["images"][r]["height"]
                boxes[r].append((c, x / width, y / height, (x + w) / width, (y + h) / height))
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            raise UserError(f"{path}: annotations[{i}] needs the image_id of a listed image and the category_id of a "
                            f"listed category, and a bbox of 4 numbers if any; it is {str(note)[:120]}") from None
    annotated = (labels == POSITIVE).any(1)
    unused = ~annotated & (not keep_unannotated)
    found = Split(f"coco/{folder}", require_files(files, path), names, labels, unused=unused,
                  boxes=[np.array(part, np.float32).reshape(-1, 5) for part in boxes],
                  dropped={"without annotation": int(unused.sum())} if unused.any() else {})
    if by_id:
        ids = [str(key) for key in row]
        return found.subset(sorted(range(len(ids)), key=ids.__getitem__)).used()
    return found


def without_polygons(record):
    """Polygons are most of the file and never needed: they are let go of while parsing."""
    record.pop("segmentation", None)
    return record


def layout_of(root):
    """A hint where the folder is COCO's, but of another year."""
    try:
        find(root, "annotations/instances_train2017.json", "annotations/instances_val2017.json", what="")
    except UserError:
        return ""
    return " (these are COCO 2017's; the field uses the split of 2014: the images are the same, the lists are not)"
