"""Small but faithful trees of the six data sets, quirks included: for tests of the loaders and of
training.

Every maker fills `root` and returns nothing; the same seed gives the same tree. Labels follow from
`positives(i, C)`.
"""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from config import Config
from datasets.voc import VOC
from support import UserError

COCO = """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,
stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,
umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,
skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,
sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,
toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,
clock,vase,scissors,teddy bear,hair drier,toothbrush""".replace("\n", "").split(",")
COCO_HOLES = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # category ids 1..90 that do not exist
TRAIN, TEST = 10, 6


def write(path, text, newline="\n"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.replace("\n", newline).encode())


def photo(path, seed=0, size=(80, 60), **options):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.RandomState(seed)
    small = Image.fromarray(rng.randint(0, 256, (4, 5, 3), np.uint8))
    small.resize(size, Image.BILINEAR).save(path, **options)


def positives(i, classes):
    """Two or three classes for image i; every class turns up somewhere when there are enough
    images."""
    return sorted({(7 * i) % classes, (7 * i + 3) % classes, (11 * i + 1) % classes})


def coco(root):
    root, ids = Path(root), [k for k in range(1, 91) if k not in COCO_HOLES]
    categories = [{"supercategory": "thing", "id": k, "name": name} for k, name in zip(ids, COCO)]
    for split, count in (("train2014", TRAIN), ("val2014", TEST)):
        images, notes = [], []
        for i in range(count):
            # ids of different length: string order differs
            key = (17 * i + 9) % 1000 + (100000 if i % 2 else 0)
            name = f"COCO_{split}_{key:012d}.jpg"
            photo(root / split / name, i)
            images.append({"id": key, "file_name": name, "width": 80, "height": 60, "license": 1})
            if i == 2:
                continue  # an image without any annotation
            for n, c in enumerate(positives(i, 80)):
                crowd = int(i == 3 and n == 0)
                shape = (
                    {"counts": [10, 4790], "size": [60, 80]}
                    if crowd
                    else [[8.0, 6.0, 48.0, 6.0, 48.0, 36.0]]
                )
                notes.append(
                    {
                        "segmentation": shape,
                        "area": 1.0,
                        "iscrowd": crowd,
                        "image_id": key,
                        "bbox": [8.0, 6.0, 40.0, 30.0],
                        "category_id": ids[c],
                        "id": len(notes) + 1,
                    }
                )
        notes = notes[::-1]  # annotation order is not image order
        write(
            root / f"annotations/instances_{split}.json",
            json.dumps(
                {
                    "info": {},
                    "images": images,
                    "licenses": [],
                    "annotations": notes,
                    "categories": categories,
                }
            ),
        )
    write(
        root / "coco_train_singlelabel.txt",
        "".join(
            f"COCO_train2014_{(17 * i + 9) % 1000 + 100000 * (i % 2):012d}.jpg,"
            f"{positives(i, 80)[0]}\n"
            for i in reversed(range(TRAIN))
            if i != 2
        ),
    )


def voc(root, year=2007, class_files=True):
    base = Path(root) / "VOCdevkit" / f"VOC{year}"
    lists = (
        (("trainval", TRAIN), ("test", TEST)) if year == 2007 else (("train", TRAIN), ("val", TEST))
    )
    start = 0
    for split, count in lists:
        ids = [
            f"{start + i:06d}" if year == 2007 else f"2008_{start + i:06d}" for i in range(count)
        ]
        start += count
        codes = np.full((count, 20), -1)
        for i, name in enumerate(ids):
            photo(base / "JPEGImages" / f"{name}.jpg", i)
            codes[i, positives(i, 20)] = 1
            # seen only as difficult
            codes[i, (5 * i + 2) % 20] = max(codes[i, (5 * i + 2) % 20], 0)
            things = "".join(
                f"<object><name>{VOC[c].capitalize() if c == 1 else VOC[c]}</name>"
                f"<difficult>{int(codes[i, c] == 0)}</difficult></object>"
                for c in np.flatnonzero(codes[i] >= 0)
            )
            write(
                base / "Annotations" / f"{name}.xml",
                f"<annotation><filename>{name}.jpg</filename>{things}</annotation>",
            )
        write(base / f"ImageSets/Main/{split}.txt", "\n".join(ids), "\r\n")  # CRLF, no last newline
        for c in range(20) if class_files else ():
            write(
                base / f"ImageSets/Main/{VOC[c]}_{split}.txt",
                "".join(f"{n} {v:2d}\n" for n, v in zip(ids, codes[:, c])),
                "\r\n",
            )
        if year == 2012 and split == "train":
            write(
                Path(root) / "voc_train.txt",
                "".join(f"{n}.jpg,{positives(i, 20)[-1]}\n" for i, n in enumerate(ids)),
            )


def vg200(root):
    root, labels = Path(root), {}
    for split, count, start in (("train", TRAIN, 0), ("test", TEST, 100)):
        names = [f"{(start + i) * 37 % 1009}.jpg" for i in range(count)]
        write(root / f"{split}_list_500.txt", "".join(f"{n}\n" for n in names))
        for i, name in enumerate(names):
            photo(root / ("VG_100K", "VG_100K_2")[i % 2] / name, i)
            labels[name] = [*positives(i, 200), 300]  # the 500-category file goes on beyond 200
    write(root / "vg_category_500_labels_index.json", json.dumps(labels))
    write(root / "vg_category_200.txt", "".join(f"thing {c}\n" for c in range(200)))


def nuswide(root):
    root = Path(root)
    concepts = [f"concept{c:02d}" for c in range(81)]
    write(root / "ConceptsList/Concepts81.txt", "\n".join(concepts) + "\n", "\r\n")
    for part, count, start in (("Train", TRAIN, 0), ("Test", TEST, 50)):
        names = [f"folder{i % 2}\\{i:04d}_{start + i}.jpg" for i in range(count)]
        labels = np.zeros((count, 81), int)
        for i, name in enumerate(names):
            labels[i, positives(i, 81)] = i != 1  # one image without any label
            if i != 4:  # one photo is gone
                photo(root / "Flickr" / name.replace("\\", "/"), i)
        write(root / f"ImageList/{part}Imagelist.txt", "\n".join(names) + "\n", "\r\n")
        for c, concept in enumerate(concepts):
            write(
                root / f"Groundtruth/TrainTestLabels/Labels_{concept}_{part}.txt",
                "".join(f"{v}\n" for v in labels[:, c]),
            )
        split = {"Train": "train", "Test": "val"}[part]
        np.save(
            root / f"formatted_{split}_images.npy", np.array([n.replace("\\", "/") for n in names])
        )
        np.save(root / f"formatted_{split}_labels.npy", labels.astype(float))
        flat = [f"{i:05d}_{start + i}_m.jpg" for i in range(count)]
        for i, name in enumerate(flat):
            photo(root / "images" / name, i)
        if part == "Train":
            write(
                root / "nus_train_singlelabel.txt",
                "".join(f"{n},{positives(i, 81)[0]}\n" for i, n in enumerate(flat)),
            )
        else:
            write(
                root / "nus_val.txt",
                "".join(
                    f"{n}, {' '.join(map(str, positives(i, 81)))}\n" for i, n in enumerate(flat)
                ),
            )


def cub(root):
    root, total = Path(root), TRAIN + TEST
    base = root / "CUB_200_2011"
    names = [
        f"has_{part}_{kind}::{value}"
        for part in ("bill", "wing", "upper_tail", "crown")
        for kind in ("color", "shape")
        for value in ("blue", "large_(16_-_32_in)", "owl-like", *(f"value{v}" for v in range(36)))
    ]
    files = [f"{i % 3 + 1:03d}.Bird_{i % 3}/Bird_{i:04d}.jpg" for i in range(total)]
    for i, file in enumerate(files):
        photo(base / "images" / file, i)
    write(base / "images.txt", "".join(f"{i + 1} {f}\n" for i, f in enumerate(files)))
    write(
        base / "train_test_split.txt", "".join(f"{i + 1} {int(i < TRAIN)}\n" for i in range(total))
    )
    # beside the folder, as released
    write(root / "attributes.txt", "".join(f"{a + 1} {n}\n" for a, n in enumerate(names)))
    lines = []
    for i in range(total):
        held = set(positives(i if i < TRAIN else i - TRAIN, 312))
        lines += [
            f"{i + 1} {a + 1} {int(a in held)} {a % 4 + 1} "
            f"3.5{' 0 7' if (i, a) == (4, 9) else ''}\n"
            for a in range(312)
        ]
    write(base / "attributes/image_attribute_labels.txt", "".join(lines))
    write(
        root / "cub_train.txt",
        "".join(f"{f}, {positives(i, 312)[1]}\n" for i, f in enumerate(files[:TRAIN])),
    )


def sheet(root, rows=12, name="photos.csv"):
    """A half-filled sheet of your own photos."""
    lines = ['image,dog,cat,"red, small car"', "#prompt,dog,cat,small red car"]
    for i in range(rows):
        photo(Path(root) / "my photos" / f"{i}.jpg", i)
        lines.append(
            f"my photos/{i}.jpg," + ",".join(("1", "0", "")[(i + c) % 3] for c in range(3))
        )
    write(Path(root) / name, "\n".join(lines) + "\n")


MAKERS = {
    "coco": coco,
    "voc2007": voc,
    "voc2012": lambda root: voc(root, 2012),
    "vg200": vg200,
    "nuswide": nuswide,
    "cub": cub,
}


def load(name, root=None, val=None, **settings):
    """data.load with a run's settings given by name."""
    paths = {key: str(value) for key, value in settings.items() if isinstance(value, Path)}
    return data.load(
        Config(
            data=str(name),
            root=root and str(root),
            val=None if val is None else str(val),
            **settings | paths,
        )
    )


def captions(file, *names, images=None):
    """The captions of `file` as a Split for these categories."""
    from paper import captions
    cfg = SimpleNamespace(captions=file, root=None, train_images=images)
    return captions.load(cfg, SimpleNamespace(names=list(names), prompts=list(names)))


def refused(match, *arguments, call=load, **options):
    """The call is refused in one short line that matches, and warns of nothing. Returns it."""
    with pytest.raises(UserError, match=match) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        call(*arguments, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)
