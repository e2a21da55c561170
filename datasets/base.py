"""Where the data sets keep images and labels: one function per layout, each returning a `Table` of complete labels.

Nothing here knows of masks, settings or training (data.py does). Every function takes the folder that the official
download unpacks to, tries the variants found in the wild, and raises UserError with one line when something is off.
Rows come in the order of the field's published code, because the published random masks are drawn in that order.

N images, C categories.
"""
import hashlib, io, json, math, os, tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from support import UserError

POSITIVE, NEGATIVE, UNKNOWN = 1, -1, 0  # the only label codes of this project; every other coding is converted here


@dataclass
class Table:
    """The images of one official list with everything that is known about them."""
    files: list                       # N absolute paths
    labels: np.ndarray                # (N, C) int8, complete where the data set is; UNKNOWN where nobody knows
    names: list                       # C official names
    boxes: list = None                # N arrays (n, 5) float32: class, x0, y0, x1, y1 as fractions of the image
    drop: np.ndarray = None           # (N,) bool: rows that count for the mask but are not used
    notes: dict = field(default_factory=dict)  # what is dropped, and why: {"photo missing": 3}
    prompts: list = None              # C names for prompts, where a sheet gives them
    where: list = None                # N places to name in messages, such as "sheet.csv:12"
    listed: list = None               # N image names as a sheet writes them

    def __post_init__(self):
        self.drop = np.zeros(len(self.files), bool) if self.drop is None else self.drop

    def take(self, rows):
        """The same table with only these rows (indices)."""
        boxes, where, listed = ([part[i] for i in rows] if part else None for part in (self.boxes, self.where, self.listed))
        return replace(self, files=[self.files[i] for i in rows], labels=self.labels[rows], drop=self.drop[rows],
                       boxes=boxes, where=where, listed=listed)

    def used(self):
        return self.take(np.flatnonzero(~self.drop))


# ---------------------------------------------------------------------------------------------------------- files
def find(root, *choices, what):
    """The first of `choices` (paths below root) that exists."""
    if not os.path.isdir(root):  # Path's own would raise for a name that is too long
        raise UserError(f"{root}: no such folder (expected the data set there; pass its folder as --root)")
    for choice in choices:
        if os.path.exists(Path(root, choice)):
            return Path(root, choice)
    raise UserError(f"{root}: {what} not found (looked for {', '.join(map(str, choices))}); is --root right?")


def read_bytes(path):
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")  # a pipe would be waited for without end
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_array(path):
    """The array of a .npy, or the only one of a .npz, whichever of the two the file is; pickles are never loaded."""
    content = io.BytesIO(read_bytes(path))
    try:
        found = np.load(content, allow_pickle=False)
        array, = [found] if isinstance(found, np.ndarray) else found.values()  # of two, which is meant?
        return np.asarray(array)
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise UserError(f"{path}: not a plain array file, .npy or .npz of one array ({str(error)[:150]}); save it again") from None


def read_lines(path, names=None):
    """Lines that are not empty, without their ends; CRLF, a missing last newline and a byte-order mark are all fine.
    names: how many different ones there must be."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path}: the file is empty; expected a line for each entry: write it, or complete the download")
    if names and not len(set(lines)) == len(lines) == names:
        raise UserError(f"{path}: expected {names} distinct names, one a line; got {len(lines)} ({len(set(lines))} distinct)")
    return lines


def inside(folder, name, where):
    """folder/name, refused when `name` points out of the folder. Links that the user made on disk are followed."""
    name = str(name).replace("\\", "/")
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or "\0" in name or not path.startswith(os.path.join(os.path.normpath(folder), "")):
        raise UserError(f"{where}: the file name {name!r} leads out of {folder}; names must stay below that folder")
    return path


def present(paths):
    """(N,) bool: which files exist. Lists every folder once instead of asking for every file."""
    listed = {}
    found = np.zeros(len(paths), bool)
    for i, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder))
            except FileNotFoundError:
                listed[folder] = set()
            except OSError as error:
                raise UserError(f"{folder}: cannot be listed ({error.strerror})") from None
        found[i] = name in listed[folder]
    return found


def once(entries, where):
    """Nothing is listed twice."""
    seen = set()
    twice = [entry for entry in entries if entry in seen or seen.add(entry)]
    if twice:
        raise UserError(f"{where}: {twice[0]} is listed twice; keep one of the two rows")


def require(paths, where):
    """Every image is there, and listed once."""
    once(paths, where)
    missing = np.flatnonzero(~present(paths))
    if len(missing):
        raise UserError(f"{where}: {len(missing)} of {len(paths)} images are missing, first {paths[missing[0]]}; "
                        "complete the download or correct --root")


def noted(why, drop):
    return {why: int(drop.sum())} if drop.any() else {}


def cached(kind, files, parse, keys):
    """parse() -> dict of arrays with these `keys`, kept in the user's cache folder under the sha256 of what `files` hold.

    Keyed by content, so an edited file is parsed again and a moved one is not. Never writes next to the data.
    """
    digest = hashlib.sha256(b"2" + kind.encode())  # the number is the version of the cached form and of what is refused
    for path in files:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    home = os.path.expanduser("~")  # of a user without a home "~", which is no folder
    folder = Path(os.environ.get("TRM_CACHE") or Path(tempfile.gettempdir() if home == "~" else home, ".cache", "trm-ml"))
    target = folder / f"{kind}-{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(target) as stored:
            return {key: stored[key] for key in keys.split()}
    except Exception:
        pass  # absent, or spoilt by whatever cause: the original is at hand
    arrays, part = parse(), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
            np.savez(part, **arrays)
        os.replace(part.name, target)
    except OSError:  # a full or read-only cache costs time only
        if part:
            Path(part.name).unlink(missing_ok=True)
    return arrays


# ----------------------------------------------------------------------------------------------------------- COCO
def parse_coco(path):
    """instances_*.json -> arrays. Crowd annotations count for labels and give no box, as in the peers' code."""
    def light(record):  # polygons are most of the file and never needed: let go of them while parsing
        record.pop("segmentation", None)
        return record
    try:
        content = json.loads(read_bytes(path), object_hook=light)
    except (ValueError, RecursionError) as error:  # broken JSON and broken UTF-8 are both ValueErrors
        raise UserError(f"{path}: not valid JSON ({error}); the download is probably incomplete") from None
    try:
        images, notes = list(content["images"]), list(content["annotations"])
        names = {category["id"]: category["name"] for category in content["categories"]}
        if len(names) < len(content["categories"]) or len(set(names.values())) < len(names):
            raise UserError(f"{path}: a category's id or name comes twice")
        if not images or not names or not all(isinstance(n, str) and n.strip() for n in names.values()):
            raise UserError(f"{path}: no images, no categories, or a category without a name: {str(names)[:200]}")
        column = {key: c for c, key in enumerate(sorted(names))}  # ids run 1..90 with holes: the index is the rank
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected COCO's images, annotations, categories with id and name; {error!r}") from None
    row, sizes = {}, []
    for i, image in enumerate(images):
        try:
            sizes.append((float(image["width"]), float(image["height"])))
            text = str(image["id"]) + image["file_name"]
            if image["id"] in row or not text.isprintable() or not 0 < min(sizes[i]) <= max(sizes[i]) < math.inf:
                raise ValueError
            row[image["id"]] = i
        except (KeyError, TypeError, ValueError, OverflowError):
            raise UserError(f"{path}: images[{i}] needs a unique id, a file_name, a width and a height; it is {str(image)[:120]}") from None
    rows, columns, boxes, crowd = [], [], [], {None: False, 0: False, 1: True}
    for i, note in enumerate(notes):
        try:
            r, c = row[note["image_id"]], column[note["category_id"]]
            rows.append(r)
            columns.append(c)
            if not crowd[note.get("iscrowd")]:
                (x, y, w, h), (width, height) = note["bbox"], sizes[r]
                x0, y0, x1, y1 = x / width, y / height, (x + w) / width, (y + h) / height
                if not (-0.5 <= x0 <= x1 <= 1.5 and -0.5 <= y0 <= y1 <= 1.5):      # nonsense; some real ones leave the image by a little, some are flat
                    raise ValueError
                boxes.append((r, c, x0, y0, x1, y1))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise UserError(f"{path}: annotations[{i}] needs the image_id of a listed image, the category_id of a listed category, an "
                            f"iscrowd of 0 or 1 and a bbox of 4 numbers within the image; it is {str(note)[:120]}") from None
    labels = np.full((len(images), len(names)), NEGATIVE, np.int8)
    labels[rows, columns] = POSITIVE
    boxes = np.array(boxes, np.float64).reshape(-1, 6)
    boxes = boxes[boxes[:, 0].argsort(kind="stable")]
    return {"files": np.array("\n".join(image["file_name"] for image in images)),
            "ids": np.array("\n".join(map(str, row))), "names": np.array([names[key] for key in column]),
            "labels": labels, "annotated": np.bincount(rows, minlength=len(images)) > 0,
            "boxes": boxes[:, 1:].astype(np.float32),
            "counts": np.bincount(boxes[:, 0].astype(int), minlength=len(images))}


def coco(root, split, cole=False, keep_unannotated=False):
    """One split of COCO 2014's layout: annotations/instances_<split>.json and the folder <split>/.

    cole=True: only annotated images, ordered by image id as a string (the single-positive setup's order).
    Otherwise JSON order; images without any annotation are marked in `drop`, since masks are drawn for them too.
    """
    path = find(root, f"annotations/instances_{split}.json", what=f"the annotations of {split}")
    folder = find(root, split, f"images/{split}", what=f"the image folder {split}")
    raw = cached("coco", [path], lambda: parse_coco(path), "files ids names labels annotated boxes counts")
    files = [inside(folder, name, path) for name in str(raw["files"]).split("\n")]
    require(files, path)
    boxes = np.split(raw["boxes"], np.cumsum(raw["counts"])[:-1])
    drop = ~raw["annotated"] & (not keep_unannotated)
    table = Table(files, raw["labels"], raw["names"].tolist(), boxes, drop, noted("without annotation", drop))
    ids = str(raw["ids"]).split("\n")
    return table.take(sorted(range(len(ids)), key=ids.__getitem__)).used() if cole else table


# ------------------------------------------------------------------------------------------------------------ VOC
VOC = """aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant
         sheep sofa train tvmonitor""".split()


def voc(root, year, split, difficult=NEGATIVE):
    """One list of VOCdevkit/VOC<year>. An object class seen only as `difficult` is NEGATIVE in all peers but the
    lists of the SPLC setup, where it is POSITIVE. Labels come from Main/<class>_<split>.txt, or else from the XML."""
    jpegs = find(root, f"VOCdevkit/VOC{year}/JPEGImages", f"VOC{year}/JPEGImages", "JPEGImages", what=f"VOC{year}")
    base, main = jpegs.parent, jpegs.parent / "ImageSets" / "Main"
    ids = [line.split()[0] for line in read_lines(main / f"{split}.txt")]
    files = [inside(jpegs, f"{name}.jpg", main / f"{split}.txt") for name in ids]
    require(files, main / f"{split}.txt")
    labels = np.full((len(ids), 20), NEGATIVE, np.int8)
    if (main / f"dog_{split}.txt").exists():
        code = {"1": POSITIVE, "0": difficult, "-1": NEGATIVE}
        for c, name in enumerate(VOC):
            path, left = main / f"{name}_{split}.txt", {key: i for i, key in enumerate(ids)}
            for number, line in enumerate(read_lines(path), 1):
                try:
                    key, value = line.split()
                    labels[left.pop(key), c] = code[value]
                except (ValueError, KeyError):
                    raise UserError(f"{path}:{number}: expected an id of {split}.txt, once, and 1, 0 or -1, got {line[:80]!r}") from None
            if left:
                raise UserError(f"{path}: {len(ids) - len(left)} lines, but {split}.txt lists {len(ids)} images; complete the download")
    else:
        for i, name in enumerate(ids):
            path = base / "Annotations" / f"{name}.xml"
            try:
                tree = ElementTree.fromstring(read_bytes(path))
                if tree.tag != "annotation":
                    raise ValueError(f"it is <{tree.tag}>")
                for thing in tree.iter("object"):
                    if difficult == POSITIVE or thing.findtext("difficult", "0").strip() != "1":
                        labels[i, VOC.index(thing.findtext("name").strip().lower())] = POSITIVE
            except (ElementTree.ParseError, ValueError, AttributeError, LookupError) as error:  # LookupError: an unknown encoding
                raise UserError(f"{path}: not an annotation of VOC's 20 classes ({error})") from None
    drop = ~(labels == POSITIVE).any(1)  # none in 2007; in 2012 the few whose objects are all difficult
    return Table(files, labels, list(VOC), None, drop, noted("without a positive", drop))


# ------------------------------------------------------------------------------------------------- Visual Genome
VG_FOLDERS = ("", "VG/", "annotations/")


def vg_labels(root, split):
    """The list file, its image names and (N, 200) labels. The JSON of 500 categories cut at 200 is the one of 200."""
    path = find(root, *(f"{h}{split}_list_500.txt" for h in VG_FOLDERS), what=f"the {split} list")
    index = find(root, *(f"{h}vg_category_{n}_labels_index.json" for n in (200, 500) for h in VG_FOLDERS),
                 what="the label JSON")

    def parse():
        images, count = read_lines(path), int(index.name.split("_")[2])
        labels = np.full((len(images), 200), NEGATIVE, np.int8)
        try:
            known = json.loads(read_bytes(index))
            for i, image in enumerate(images):
                if not all(type(c) is int and 0 <= c < count for c in known[image]):  # bool and float are no index
                    raise ValueError(f"{image}: {known[image]}"[:120])
                labels[i, [c for c in known[image] if c < 200]] = POSITIVE
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise UserError(f"{index}: expected {{'<id>.jpg': [class indices below {count}]}} for every image of {path.name}; "
                            f"{error!r}") from None
        return {"files": np.array("\n".join(images)), "labels": labels}
    raw = cached("vg200", [path, index], parse, "files labels")
    return path, str(raw["files"]).split("\n"), raw["labels"]


def vg200(root, split, names=None):
    """{train,test}_list_500.txt over the folders VG_100K and VG_100K_2. The names were never published: `names`."""
    path, images, labels = vg_labels(root, split)
    try:
        names = names or find(root, *(f"{h}vg_category_200.txt" for h in VG_FOLDERS), what="the category names")
    except UserError:
        raise UserError(f"{root}: VG-200's category names are not part of the public files: put them, one a line, into "
                        "vg_category_200.txt there or pass --names FILE (python data.py vg200 --root DIR --objects "
                        "objects.json finds them from Visual Genome's objects.json)") from None
    names = read_lines(names, 200)
    folders = [Path(root) / h / k for h in ("", "VG", "images") for k in ("VG_100K", "VG_100K_2")]
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise UserError(f"{root}: neither VG_100K nor VG_100K_2 is there; unpack Visual Genome's two image archives")
    files = np.array([inside(folders[0], name, path) for name in images], object)
    for folder in folders[1:]:
        missing = np.flatnonzero(~present(files))
        files[missing] = [inside(folder, images[i], path) for i in missing]
    require(files.tolist(), path)
    return Table(files.tolist(), labels, names)


def vg_match(root, objects):
    """For every index the object name whose set of images is most like the index's (intersection over union), from
    Visual Genome's objects.json, and object_alias.txt where it lies beside it. Look the result over before use."""
    parts = [vg_labels(root, split)[1:] for split in ("train", "test")]
    row = {name: i for i, name in enumerate(parts[0][0] + parts[1][0])}
    positive = (np.concatenate([part[1] for part in parts]) == POSITIVE).astype(np.float32)
    aliases = Path(objects).with_name("object_alias.txt")
    groups = [line.split(",") for line in read_lines(aliases)] if aliases.exists() else []
    alias = {word: words[0] for words in groups for word in words}
    seen = {}
    try:
        for image in json.loads(read_bytes(objects), object_hook=lambda r: r if "objects" in r else r["names"]):
            i = row.get(f"{image['image_id']}.jpg")
            for name in {alias.get(n.strip().lower(), n.strip().lower()) for names in image["objects"] for n in names}:
                if i is not None:
                    seen.setdefault(name, []).append(i)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{objects}: not Visual Genome's objects.json ({error!r})") from None
    if not seen:
        raise UserError(f"{objects}: none of its images with objects is in the lists of {root}; is it Visual Genome's?")
    words = sorted(seen, key=lambda name: -len(seen[name]))[:3000]
    both = np.stack([positive[seen[name]].sum(0) for name in words])                          # (words, 200)
    total = np.array([len(seen[name]) for name in words])[:, None] + positive.sum(0) - both
    return [words[w] for w in (both / total).argmax(0)]


# ------------------------------------------------------------------------------------------------------- NUS-WIDE
def nus_names(root):
    return read_lines(find(root, *(f"{h}Concepts81.txt" for h in ("ConceptsList/", "", "ImageList/")), what="the concepts"), 81)


def photos(root, names, labels, concepts, where):
    """NUS-WIDE's photos vanish from Flickr: the missing ones are dropped, counted and told, never replaced."""
    names = [name.replace("\\", "/") for name in names]
    for folder in (Path(root) / f for f in ("Flickr", "images", "Flickr/images", ".")):
        files = [inside(folder, name, where) for name in names]
        lost = ~present(files)
        if not lost.all():
            once(files, where)
            return Table(files, labels, concepts, None, lost, noted("photo missing", lost))
    raise UserError(f"{where}: none of its {len(names)} photos is in {root}/Flickr or {root}/images, e.g. {names[:1]}")


def nuswide(root, split):
    """The official split: ImageList/<split>Imagelist.txt (with backslashes) and one file of 0/1 per concept, or one
    merged file of 81 columns."""
    part, concepts = split.capitalize(), nus_names(root)
    path = find(root, f"ImageList/{part}Imagelist.txt", f"{part}Imagelist.txt", what=f"the {split} list")
    merged = Path(root) / "Groundtruth" / f"Labels_{part}.txt"
    columns = [merged] if merged.exists() else [
        find(root, *(f"{h}TrainTestLabels/Labels_{name}_{part}.txt" for h in ("Groundtruth/", "")), what=f"label {name}")
        for name in concepts]

    def parse():
        images, values = read_lines(path), []
        for column in columns:
            tokens = read_bytes(column).split()
            if len(tokens) * len(columns) != len(images) * len(concepts) or set(tokens) - {b"0", b"1"}:
                raise UserError(f"{column}: expected {len(images)} lines of 0 or 1 as in {path.name}, "
                                f"got {len(tokens)} values of {sorted(set(tokens))[:5]}")
            values.append(np.array(tokens) == b"1")
        present_ = values[0].reshape(len(images), -1) if merged.exists() else np.stack(values, 1)
        return {"files": np.array("\n".join(images)), "labels": np.where(present_, POSITIVE, NEGATIVE).astype(np.int8)}
    raw = cached("nus", [path, *columns], parse, "files labels")
    return photos(root, str(raw["files"]).split("\n"), raw["labels"], concepts, path)


def nus_arrays(root, split):
    """The split of the LargeLoss setup: formatted_{train,val}_{images,labels}.npy. Rows without a positive stay."""
    paths = [find(root, *(f"{h}formatted_{split}_{kind}.npy" for h in ("", "Flickr/")), what=f"the {split} {kind}")
             for kind in ("images", "labels")]
    images, labels = map(read_array, paths)
    images = [str(name) for name in images.ravel()]
    if labels.shape != (len(images), 81) or labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
        raise UserError(f"{paths[1]}: expected 0/1 for {len(images)} images x 81 concepts, got {labels.shape} with the values "
                        f"{np.unique(labels)[:5].tolist()}")
    labels = np.where(labels == 1, POSITIVE, NEGATIVE).astype(np.int8)
    return photos(root, images, labels, nus_names(root), paths[0])


# ------------------------------------------------------------------------------------------------------------ CUB
def cub(root, split):
    """CUB_200_2011/ with attributes.txt beside or in it; is_present is the label, certainty is ignored by all."""
    up = ("CUB_200_2011/CUB_200_2011/", "CUB_200_2011/", "")
    index = find(root, *(f"{h}images.txt" for h in up), what="CUB's images.txt")
    base = index.parent
    attributes = find(root, *(f"{h}{f}" for h in up for f in ("attributes.txt", "attributes/attributes.txt")),
                      "../attributes.txt", what="attributes.txt (the 312 names)")
    files = [base / f for f in ("train_test_split.txt", "attributes/image_attribute_labels.txt")]

    def parse():
        tables = []
        for path in (index, attributes, files[0]):
            pairs = [line.split() for line in read_lines(path)]
            if any(len(pair) != 2 or pair[0] != str(i) for i, pair in enumerate(pairs, 1)):
                raise UserError(f"{path}: expected lines 'id value' with ids 1, 2, 3, ...")
            tables.append([pair[1] for pair in pairs])
        images, names, sides = tables
        once(images, index)
        once(names, attributes)
        if len(sides) != len(images) or set(sides) - {"0", "1"}:
            raise UserError(f"{files[0]}: expected 0 or 1 for all {len(images)} images, got {len(sides)} lines of {sorted(set(sides))[:5]}")
        row, column = ({b"%d" % i: i - 1 for i in range(1, count + 1)} for count in (len(images), len(names)))
        labels = np.full((len(images), len(names)), UNKNOWN, np.int8)
        code = {b"0": NEGATIVE, b"1": POSITIVE}
        for number, line in enumerate(read_bytes(files[1]).splitlines(), 1):
            try:
                image, attribute, value = line.split(None, 3)[:3]  # some lines carry stray fields after these
                cell = row[image], column[attribute]
                if labels[cell] != UNKNOWN:
                    raise ValueError
                labels[cell] = code[value]
            except (ValueError, KeyError):
                if line.strip():
                    raise UserError(f"{files[1]}:{number}: expected 'image attribute 0|1 ...', each pair once, got {line[:80]!r}") from None
        if (labels == UNKNOWN).any():
            raise UserError(f"{files[1]}: {(labels == UNKNOWN).sum()} of {labels.size} cells have no line; is it complete?")
        return {"files": np.array("\n".join(images)), "names": np.array(names), "labels": labels,
                "train": np.array(sides) == "1"}
    raw = cached("cub", [index, attributes, *files], parse, "files names labels train")
    names = str(raw["files"]).split("\n")
    rows = np.flatnonzero(raw["train"] == (split == "train"))
    paths = [inside(base / "images", names[i], index) for i in rows]
    require(paths, index)
    return Table(paths, raw["labels"][rows], raw["names"].tolist())


# ------------------------------------------------------------------------------------- the lists of the SPLC setup
def single_list(path, classes, single=False):
    """A list of the SPLC setup, 'name.jpg,idx idx' (single: one idx a line): names, and (N, C) int8, the listed classes POSITIVE."""
    names, lines, column = [], read_lines(path), {str(c): c for c in range(classes)}
    labels = np.full((len(lines), classes), UNKNOWN, np.int8)
    for i, line in enumerate(lines):
        try:
            name, listed = line.rsplit(",", 1)
            names.append(name)
            columns = [column[c] for c in listed.split()]
            if single and len(columns) != 1:
                raise ValueError
            labels[i, columns] = POSITIVE
        except (ValueError, KeyError):
            raise UserError(f"{path}:{i + 1}: expected 'name.jpg,' and {'one idx' if single else 'idx idx ...'} below {classes}, "
                            f"got {line[:80]!r}") from None
    return names, labels
