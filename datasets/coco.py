"""MS-COCO 2014's layout (https://cocodataset.org): annotations/instances_<split>.json beside the
image folders. Crowd annotations count as labels and give no box, as in the peers' code."""
import numpy as np

from datasets.base import NEGATIVE, POSITIVE, Split, find, read_json, require_files, require_unique
from support import UserError, refused

PEERS = {"motorcycle": "motor bike", "airplane": "aeroplane"}  # as TaI-DPT calls them in prompts


def load(root, cfg):
    """train2014 and val2014, which is the test set of this field."""
    largeloss, keep = cfg.single_positive == "largeloss", cfg.keep_unannotated
    splits = {"train": split(root, "train2014", keep and not largeloss, by_id=largeloss),
              "test": split(root, "val2014", keep)}
    if cfg.prompt_names == "peers":
        for one in splits.values():
            one.prompts = [PEERS.get(name, name) for name in one.prompts]
    return splits


def split(root, folder, keep_unannotated=False, by_id=False):
    """One split in the JSON's order, images without any annotation unused: masks are drawn for them
    too. by_id: only annotated images, ordered by their id as a string (LargeLoss's order)."""
    path = find(root, f"annotations/instances_{folder}.json",
                hint=" (COCO 2017 has other lists of the same images: the field uses 2014)")
    photos = find(root, folder, folders=("", "images"))
    content = read_json(path, object_hook=without_polygons)
    with refused(f"{path}: expected COCO's images with file_name and id, annotations, categories "
                 "with id and name"):
        categories = sorted((c["id"], str(c["name"]).strip()) for c in content["categories"])
        images, notes = list(content["images"]), list(content["annotations"])
        files, ids = [image["file_name"] for image in images], [image["id"] for image in images]
    names = require_unique([name for _, name in categories], f"{path}: category")

    row = {key: i for i, key in enumerate(require_unique(ids, f"{path}: image id"))}
    column = {key: c for c, (key, _) in enumerate(categories)}  # ids run 1..90 with holes
    labels = np.full((len(images), len(names)), NEGATIVE, np.int8)
    sizes = [(image.get("width"), image.get("height")) for image in images]
    boxes = [[] for _ in images]
    try:
        for note in notes:
            r, c = row[note["image_id"]], column[note["category_id"]]
            labels[r, c] = POSITIVE
            if all(sizes[r]) and note.get("bbox") and not note.get("iscrowd"):
                (x, y, w, h), (width, height) = note["bbox"], map(float, sizes[r])
                boxes[r].append((c, x / width, y / height, (x + w) / width, (y + h) / height))
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise UserError(f"{path}: an annotation needs a listed image_id and category_id, and a "
                        f"bbox, if any, of four numbers; got {str(note)[:120]}") from None

    unused = ~(labels == POSITIVE).any(1) & (not keep_unannotated)
    found = Split(f"coco/{folder}", require_files(files, [photos, photos.parent], path), names,
                  labels, unused=unused, dropped={"without annotation": int(unused.sum())},
                  boxes=[np.array(part, np.float32).reshape(-1, 5) for part in boxes])
    return found.subset(np.argsort([str(key) for key in ids])).used() if by_id else found


def without_polygons(record):
    """Polygons are most of the file and never needed: parsing drops them, to save memory."""
    record.pop("segmentation", None)
    return record
