"""Timings of the data path: pytest -q -s tests/bench_data.py

COCO's annotations at full size (bars: 25 s and 3 GB to parse), images a second
and core at 448 from 640 x 480 JPEGs with and without augmentation, the augmentation by operation,
and what JPEG's draft mode would change. Photos: a folder that TRM_SAMPLES names, or else
drawn noise, which decodes slower.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import augment
import clip
from clip.model import MEAN, STD
import data
import fake_datasets as fake

ROOT = Path(data.__file__).resolve().parent
SAMPLES = Path(os.environ.get("TRM_SAMPLES", ROOT / "no samples"))


def full_annotations(path, images=82783, notes=604907):
    """instances_train2014.json's counts and about its size, written in pieces."""
    rng = np.random.RandomState(0)
    ids = [k for k in range(1, 91) if k not in fake.COCO_HOLES]
    owner, kind = rng.randint(0, images - 702, notes), rng.choice(ids, notes)
    polygon = np.round(rng.rand(997, 60) * 400, 2)
    with open(path, "w") as out:
        categories = [
            {"supercategory": "thing", "id": k, "name": n} for k, n in zip(ids, fake.COCO)
        ]
        out.write(
            '{"info": {}, "licenses": [], "categories": %s, "images": [' % json.dumps(categories)
        )
        out.write(
            ", ".join(
                json.dumps(
                    {
                        "license": 1,
                        "file_name": f"COCO_train2014_{i:012d}.jpg",
                        "height": 480,
                        "width": 640,
                        "coco_url": "http://images.cocodataset.org/train2014/"
                        f"COCO_train2014_{i:012d}.jpg",
                        "id": i,
                        "date_captured": "2013-11-14 17:02:52",
                        "flickr_url": "http://farm4.staticflickr.com/3153/2970773875_z.jpg",
                    }
                )
                for i in range(images)
            )
        )
        out.write('], "annotations": [')
        for n in range(notes):
            shape = polygon[n % 997, : 24 + 2 * (n % 19)].tolist()
            out.write(
                ("" if n == 0 else ", ")
                + json.dumps(
                    {
                        "segmentation": [shape],
                        "area": 702.1057,
                        "iscrowd": 0,
                        "image_id": int(owner[n]),
                        "bbox": [round(v / 2, 2) for v in shape[:4]],
                        "category_id": int(kind[n]),
                        "id": n + 1,
                    }
                )
            )
        out.write("]}")


PARSE = """import sys, time, resource
sys.path.insert(0, {root!r})
from datasets import coco
coco.require_files = lambda names, *_: names  # the photos of this benchmark do not exist
start, cpu = time.perf_counter(), time.process_time()
table = coco.split({folder!r}, "train2014")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(time.perf_counter() - start, time.process_time() - cpu, peak, len(table.paths),
      table.unused.sum())
"""


def test_coco_annotations_at_full_size(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2014").mkdir()
    path = tmp_path / "annotations/instances_train2014.json"
    full_annotations(path)
    code = PARSE.format(root=str(ROOT), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    wall, cpu, memory, images, dropped = map(float, run.stdout.split())
    print(
        f"\nCOCO annotations, {path.stat().st_size / 1e6:.0f} MB: parsed in {cpu:.1f} s of CPU "
        f"({wall:.1f} by the clock) with {memory:.2f} GB; {images:.0f} images, {dropped:.0f} "
        "without annotation"
    )
    assert cpu < 25 and memory < 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 JPEGs of 640 x 480."""
    found, root, paths = (
        sorted((SAMPLES / "coco2014_mini/train2014").glob("*.jpg")),
        tmp_path_factory.mktemp("photos"),
        [],
    )
    for i, path in enumerate(found):
        with Image.open(path) as image:
            if image.size == (640, 480) and len(paths) < 40:
                paths.append(str(path))
    for i in range(len(paths), 40 if not paths else 0):
        fake.photo(root / f"{i}.jpg", i, (640, 480), quality=90)
        paths.append(str(root / f"{i}.jpg"))
    return paths


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def per_second(call, items, seconds=3.0):
    call(items[0])
    # CPU time: images a second and core, whatever else runs here
    count, start = 0, time.process_time()
    while time.process_time() - start < seconds:
        call(items[count % len(items)])
        count += 1
    return count / (time.process_time() - start)


def test_images_per_second(photos):
    none = np.zeros((len(photos), 1), np.int8)
    split = data.Split("coco/train", photos, ["a"], none)
    print("\nimages a second and core, 448 from 640 x 480 JPEG:")
    for kind in ("none", "flip", "taidpt"):
        images, epochs = data.Images(split, 448, kind), iter(range(10**9))
        print(
            f"  {kind:8}{per_second(lambda i: images[(next(epochs), i)], range(len(photos))):7.1f}"
        )
    whole = [augment.read(path) for path in photos[:20]]
    small = [augment.resize(image, 448) for image in whole]
    rng = random.Random(0)
    steps = {
        "decode": (augment.read, photos),
        "resize (bicubic)": (lambda x: augment.resize(x, 448), whole),
        "resize (bilinear)": (lambda x: x.resize((448, 448), Image.BILINEAR), whole),
        "random crop": (lambda x: augment.random_crop(x, 448, rng), whole),
        "cutout": (lambda x: augment.cutout(x, rng), [x.copy() for x in small]),
        "policy (mean)": (lambda x: augment.policy(x, rng), small),
        "flip (mean)": (lambda x: augment.flip(x, rng), small),
        "normalise": (lambda x: augment.normalise(x, MEAN, STD), small),
    }
    for step, (call, items) in steps.items():
        print(f"  {step:20}{1000 / per_second(call, items, 0.7):7.2f} ms")
    print("  operations of the policy (level 7), ms and expected uses per image:")
    for operation in sorted({operation for row in augment.POLICIES for _, operation, _ in row}):
        share = sum(p for row in augment.POLICIES for p, name, _ in row if name == operation) / len(
            augment.POLICIES
        )
        rate = per_second(lambda x: augment.apply(x, operation, 7, rng), small, 0.3)
        print(f"    {operation}{1000 / rate:8.2f} ms x {share:.2f}")


def test_waiting_for_data(photos):
    """Two cores: one worker decodes and augments, the other core runs the smallest backbone there
    is, so the worst case. A training step does more (decoder, prompts, backward), which only lowers
    the share."""
    model = clip.load("tiny")
    none = np.zeros((len(photos), 1), np.int8)
    split = data.Split("coco/train", photos, ["a"], none)
    print()
    for kind in ("flip", "taidpt"):
        keys = [(epoch, i) for epoch in range(200) for i in range(len(photos))]
        loader = iter(DataLoader(data.Images(split, 448, kind), 16, sampler=keys, num_workers=1))
        next(loader)
        waited, start, steps = 0.0, time.perf_counter(), 0
        while time.perf_counter() - start < 6:
            before = time.perf_counter()
            x, _ = next(loader)
            waited += time.perf_counter() - before
            model.encode_dense(x)
            steps += 1
        took = time.perf_counter() - start
        print(
            f"small CLIP at 448, one worker, {kind}: {16 * steps / took:.1f} images/s, "
            f"{100 * waited / took:.0f} % of the step waits for data"
        )
        del loader


def test_draft_mode(photos):
    """What draft mode would change: it only ever halves, so at 448 it never applies to COCO's
    sizes."""
    for size in (448, 224, 128):
        differences = []
        for path in photos[:20]:
            with Image.open(path) as image:
                image.draft("RGB", (size, size))
                halved = image.size != (640, 480)
                drafted = augment.resize(image.convert("RGB"), size)
            full = augment.resize(augment.read(path), size)
            differences.append(np.abs(np.asarray(full, int) - np.asarray(drafted, int)))

        def decode(path):
            with Image.open(path) as image:
                image.draft("RGB", (size, size))
                image.load()

        d = np.stack(differences)
        print(
            f"\ndraft mode to {size}: {'applies' if halved else 'does not apply'}; "
            f"decode {1000 / per_second(decode, photos, 0.5):.2f} ms against "
            f"{1000 / per_second(augment.read, photos, 0.5):.2f}; pixel difference mean "
            f"{d.mean():.2f}, 99 % {np.quantile(d, 0.99):.0f}, max {d.max()} of 255"
        )
