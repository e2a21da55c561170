"""MS-COCO 2014's layout: annotations/instances_<split>.json beside the image folders.
https://cocodataset.org

Crowd annotations count as labels and give no box, as in the peers' code. N images, C categories.
"""
import numpy as np

from datasets.base import NEGATIVE, POSITIVE, Split, find, read_json, require_files, safe_join
from support import UserError


def load(root, cfg):
    """train2014 and val2014, which is the test set of this field."""
    largeloss = cfg.single_positive == "largeloss"
    return {"train": split(root, "train2014", by_id=largeloss,
                           keep_unannotated=cfg.keep_unannotated),
            "test": split(root, "val2014", keep_unannotated=cfg.keep_unannotated)}


def split(root, folder, by_id=False, keep_unannotated=False):
    """One split in the JSON's order, images without any annotation unused: masks are drawn for them
    too. by_id: only annotated images, ordered by their id as a string (LargeLoss's order)."""
    path = find(root, f"annotations/instances_{folder}.json",
                what=f"the annotations of {folder}{layout_of(root)}")
    images = find(root, folder, f"images/{folder}", what=f"the image folder {folder}")
    content = read_json(path, object_hook=without_polygons)
    try:
        categories = sorted((c["id"], c["name"]) for c in content["categories"])
        listed, notes = list(content["images"]), list(content["annotations"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected COCO's images, annotations and categories with id and "
                        f"name; {error!r}") from None
    if not listed or not categories:
        raise UserError(f"{path}: no images, or no categories: is it the file of {folder}?")
    names = [str(name).strip() for _, name in categories]
    for name in names:
        if not name or names.count(name) > 1:
            ids = [key for key, other in categories if str(other).strip() == name]
            raise UserError(f"{path}: the category {name!r} has the ids {ids}, expected one: "
                            "delete those that are not used")
    column = {key: c for c, (key, _) in enumerate(categories)}  # ids run 1..90 with holes
    row, files = {}, []
    for i, image in enumerate(listed):
        try:
            files.append(safe_join(images, image["file_name"], path))
            if row.setdefault(image["id"], i) != i:
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: images[{i}] needs a file_name and an id of its own; it is "
                            f"{str(image)[:120]}") from None

    labels = np.full((len(files), len(names)), NEGATIVE, np.int8)
    boxes = [[] for _ in files]
    for i, note in enumerate(notes):
        try:
            r, c = row[note["image_id"]], column[note["category_id"]]
            labels[r, c] = POSITIVE
            if note.get("bbox") and not note.get("iscrowd"):
                x, y, w, h = note["bbox"]
                width, height = float(listed[r]["width"]), float(listed[r]["height"])
                box = x / width, y / height, (x + w) / width, (y + h) / height
                if not (-0.5 <= min(box) and max(box) <= 1.5 and w >= 0 and h >= 0):
                    raise ValueError  # nonsense; some real ones leave the image by a little
                boxes[r].append((c, *box))
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
            raise UserError(f"{path}: annotations[{i}] needs a listed image_id and category_id, "
                            "and a bbox, if any, of 4 numbers within the image; it is "
                            f"{str(note)[:120]}") from None
    annotated = (labels == POSITIVE).any(1)
    unused = ~annotated & (not keep_unannotated)
    found = Split(f"coco/{folder}", require_files(files, path), names, labels, unused=unused,
                  boxes=[np.array(part, np.float32).reshape(-1, 5) for part in boxes],
                  sizes=[(image.get("width"), image.get("height")) for image in listed],
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
        find(root, "annotations/instances_train2017.json", "annotations/instances_val2017.json",
             what="")
    except UserError:
        return ""
    return " (these are COCO 2017's lists; the field uses the split of 2014)"
