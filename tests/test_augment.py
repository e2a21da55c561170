"""The augmentation: the policy table, every operation against its plain PIL form, and the same
images in any loader."""

import json
import os
import random
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader

from clip.model import MEAN, STD
from datasets import augment
import data
import fake_datasets as fake

SAMPLES = Path(os.environ.get("TRM_SAMPLES", "no samples"))
FULL = {
    "shX": "shearx",
    "shY": "sheary",
    "trX": "translatex",
    "trY": "translatey",
    "rot": "rotate",
    "col": "color",
    "con": "contrast",
    "sha": "sharpness",
    "bri": "brightness",
    "pos": "posterize",
    "sol": "solarize",
    "aut": "autocontrast",
    "equ": "equalize",
    "inv": "invert",
}


def picture(size=(64, 48), seed=0):
    small = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.BICUBIC)


def test_table_counts():
    assert len(augment.POLICIES) == 117 and len({str(row) for row in augment.POLICIES}) == 111
    uses = Counter(FULL[operation] for row in augment.POLICIES for _, operation, _ in row)
    assert uses == dict(
        equalize=56,
        autocontrast=36,
        solarize=31,
        translatey=22,
        color=19,
        brightness=13,
        rotate=9,
        invert=9,
        contrast=8,
        sharpness=8,
        posterize=7,
        sheary=7,
        shearx=5,
        translatex=4,
    )


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real samples: set TRM_SAMPLES to their folder")
def test_table_is_the_published_one():
    published = json.loads((SAMPLES / "mlc_policy_table.json").read_text())
    ours = [
        [value for p, operation, level in row for value in (p, FULL[operation], level)]
        for row in augment.POLICIES
    ]
    assert ours == published["rows"]
    for short, name in FULL.items():
        levels = published["magnitude_by_level"].get(name)
        assert list(augment.LEVELS.get(short, ())) == pytest.approx(levels or [], abs=1e-6)


def test_levels_run_from_nothing_to_autoaugments_strongest():
    ends = {"shX": (0, 0.3), "shY": (0, 0.3), "trX": (0, 150 / 331), "trY": (0, 150 / 331),
            "rot": (0, 30), "sol": (256, 0), "pos": (8, 4), "col": (0, 0.9), "con": (0, 0.9),
            "sha": (0, 0.9), "bri": (0, 0.9)}
    assert augment.LEVELS.keys() == ends.keys()
    for name, levels in augment.LEVELS.items():
        assert (levels[0], levels[9]) == pytest.approx(ends[name]), name


def test_a_policy_is_drawn_from_all_and_each_operation_by_its_own_probability(monkeypatch):
    applied = []
    monkeypatch.setattr(augment, "apply", lambda image, operation, level, rng: (
        applied.append((operation, level)) or image))

    class Drawn:
        def choice(self, options):
            assert len(options) == 117
            return [(0.4, "rot", 2), (0.6, "inv", 5), (1.0, "sol", 7)]

        def random(self):
            return 0.5

    augment.policy(picture(), Drawn())
    assert applied == [("inv", 5), ("sol", 7)]


def test_half_of_the_images_are_mirrored():
    image = picture()
    plain, mirrored = image.tobytes(), Image.fromarray(np.asarray(image)[:, ::-1]).tobytes()
    rng = random.Random(0)
    seen = Counter(augment.flip(image, rng).tobytes() for _ in range(1000))
    assert set(seen) == {plain, mirrored} and 440 < seen[mirrored] < 560


def test_a_training_image_is_cropped_or_cut_out_then_changed_by_a_policy_and_mirrored(monkeypatch):
    """TaI-DPT's order; what is cut out of is resized bilinearly, as torchvision's default was."""
    image, calls = picture(), []
    for name in ("random_crop", "cutout", "policy", "flip"):
        monkeypatch.setattr(augment, name, lambda image, *_, name=name: calls.append(name) or image)
    cropped, rng = 0, random.Random(0)
    for _ in range(400):
        calls.clear()
        out = augment.transform(image, "taidpt", 32, rng, 0.5)
        assert calls[0] in ("random_crop", "cutout") and calls[1:] == ["policy", "flip"]
        cropped += calls[0] == "random_crop"
        if calls[0] == "cutout":
            assert out.tobytes() == image.resize((32, 32), Image.BILINEAR).tobytes()
    assert 160 < cropped < 240


class Fixed(random.Random):
    """choice() always takes the first: the sign is -1."""

    def choice(self, options):
        return options[0]


@pytest.mark.parametrize("operation", list(FULL))
@pytest.mark.parametrize("level", [0, 4, 9])
def test_operations(operation, level):
    image = picture()
    out = augment.apply(image.copy(), operation, level, Fixed())
    assert out.size == image.size and out.mode == "RGB"
    a, b = np.asarray(image).astype(int), np.asarray(out).astype(int)
    m = augment.LEVELS[operation][level] if operation in augment.LEVELS else None
    if level == 0 and operation not in ("aut", "equ", "inv"):
        assert (a == b).all() or operation == "pos"  # magnitude 0 changes nothing
    if operation == "inv":
        assert (b == 255 - a).all()
    if operation == "sol":
        assert (b == np.where(a < m, a, 255 - a)).all()
    if operation == "pos":
        assert (b == (a >> (8 - m)) << (8 - m)).all()
    if operation == "bri":
        assert np.abs(b - a * (1 - m)).max() <= 1
    if operation == "trX" and level:
        moved = np.full_like(a, 128)
        shift = m * 64  # nearest pixel, to the right for sign -1
        for x in range(64):
            if 0 <= x + 0.5 - shift < 64:
                moved[:, x] = a[:, int(x + 0.5 - shift)]
        assert (moved == b).mean() > 0.97
    if operation in ("shX", "shY"):  # sign -1
        slopes = (1, -m, 0, 0, 1, 0) if operation == "shX" else (1, 0, 0, -m, 1, 0)
        sheared = image.transform(image.size, Image.AFFINE, slopes, Image.BICUBIC,
                                  fillcolor=(128, 128, 128))
        assert (np.asarray(sheared) == b).all()
    if operation == "rot":  # the published form goes through RGBA and a composite
        turned = image.convert("RGBA").rotate(m)
        grey = Image.new("RGBA", turned.size, (128,) * 4)
        assert (np.asarray(Image.composite(turned, grey, turned).convert("RGB")) == b).all()


def test_signs_are_random_except_for_rotation():
    image = picture()
    for operation in ("shX", "shY", "trX", "trY", "col", "con", "sha", "bri", "rot"):
        seen = {augment.apply(image, operation, 9, random.Random(k)).tobytes() for k in range(8)}
        assert len(seen) == (1 if operation == "rot" else 2), operation


def test_cutout_is_one_rectangle_of_one_colour():
    for seed in range(200):
        image = Image.new("RGB", (448, 448), (1, 2, 3))
        out = np.asarray(augment.cutout(image, random.Random(seed)))
        changed = (out != (1, 2, 3)).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].reshape(-1, 3)
        assert (box == box[0]).all() and changed.sum() == len(box)
        assert len(rows) <= 179 and len(columns) <= 179 and min(len(rows), len(columns)) >= 89
    drawn = Image.new("RGB", (448, 448))  # 179 pixels, as the published code's inclusive rectangle
    ImageDraw.Draw(drawn).rectangle([200 - 89, 200 - 89, 200 + 89, 200 + 89], fill=(9, 9, 9))
    assert (np.asarray(drawn).any(2).sum(0) > 0).sum() == 179 == int(0.4 * 448 + 0.5)


def test_random_crop_statistics(monkeypatch):
    boxes = []
    image = Image.new("RGB", (640, 480))
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or self)
    monkeypatch.setattr(augment, "resize", lambda image, size: image)
    for seed in range(1500):
        augment.random_crop(image, 448, random.Random(seed), 0.5)
    x0, y0, x1, y1 = np.array(boxes).T
    area, aspect = (x1 - x0) * (y1 - y0) / (640 * 480), (x1 - x0) / (y1 - y0)
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= 640 and y1.max() <= 480
    assert (
        0.495 < area.min() < 0.51
        and 0.93 < area.max() <= 1
        and aspect.min() > 0.745
        and aspect.max() < 1.345
    )
    boxes.clear()
    for seed in range(1500):  # of a square image as many parts are wide as are tall
        augment.random_crop(Image.new("RGB", (600, 600)), 448, random.Random(seed), 0.5)
    wide = [x1 - x0 > y1 - y0 for x0, y0, x1, y1 in boxes]
    assert 0.46 < np.mean(wide) < 0.54
    boxes.clear()
    for size in ((1000, 10), (10, 1000), (1, 1)):  # nothing fits: the largest central part
        augment.random_crop(Image.new("RGB", size), 448, random.Random(0))
    assert boxes == [(493, 0, 506, 10), (0, 493, 10, 506), (0, 0, 1, 1)]


def test_the_test_transform_is_bicubic_to_a_square_and_cuts_nothing_off():
    image = picture((90, 40))
    assert augment.resize(image, 32).tobytes() == image.resize((32, 32), Image.BICUBIC).tobytes()


def test_normalise_is_clips():
    image = picture((20, 30))
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(value).double().view(3, 1, 1) for value in (MEAN, STD))
    x = (x - mean) / std
    out = augment.normalise(image, MEAN, STD)
    assert (
        out.dtype == torch.float32
        and out.is_contiguous()
        and torch.allclose(out.double(), x, atol=1e-6)
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    paths = []
    for i in range(12):
        fake.photo(root / f"{i}.jpg", i, (64, 48))
        paths.append(str(root / f"{i}.jpg"))
    none = np.zeros((12, 1), np.int8)
    return data.Split("photos/train", paths, ["a"], none)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8")
def test_the_same_images_with_any_number_of_workers(split):
    images = data.Images(split, 32, "taidpt", seed=7)
    keys = [(epoch, i) for epoch in (0, 3) for i in np.random.RandomState(0).permutation(12)]
    runs = []
    for workers in (0, 1, 8):
        loader = DataLoader(images, batch_size=5, sampler=keys, num_workers=workers)
        random.seed(workers), np.random.seed(workers), torch.manual_seed(workers)
        runs.append([torch.cat(parts) for parts in zip(*loader)])
    for x, index in runs[1:]:
        assert torch.equal(x, runs[0][0]) and torch.equal(index, runs[0][1])
    resumed = torch.stack([images[key][0] for key in keys[12:]])  # started in the middle
    assert torch.equal(resumed, runs[0][0][12:])


def test_seed_epoch_and_index_all_matter(split):
    def digest(seed, key):
        return data.Images(split, 32, "taidpt", seed)[key][0].numpy().tobytes()

    assert digest(0, (0, 4)) == digest(0, 4)
    assert len({digest(seed, (epoch, 4)) for seed in range(3) for epoch in range(4)}) >= 11
    plain, flipping = data.Images(split, 32), data.Images(split, 32, "flip")
    flips = [np.array_equal(flipping[(e, 0)][0], plain[0][0]) for e in range(60)]
    assert 15 < sum(flips) < 45
    of_an_epoch = [np.array_equal(flipping[(0, i)][0], plain[i][0]) for i in range(12)]
    assert 0 < sum(of_an_epoch) < 12  # each image has its own draw


def test_smallest_crop_follows_the_data_set(split, monkeypatch):
    used, crop = set(), augment.random_crop
    monkeypatch.setattr(augment, "random_crop", lambda image, size, rng, smallest: (
        used.add(smallest) or crop(image, size, rng, smallest)))
    for name, smallest in (("coco/train", 0.5), ("nuswide/train", 0.6)):
        used.clear()
        images = data.Images(data.Split(name, split.paths, ["a"], split.labels), 32, "taidpt")
        for i in range(12):
            images[i]
        assert used == {smallest}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_even_where_the_exif_cannot_be_rewritten(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 255, (12, 20, 3), np.uint8))
    photo.save(tmp_path / "a.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    with mock.patch.object(
        Image.Exif,
        "tobytes",
        side_effect=AttributeError("'IFDRational' object has no attribute 'encode'"),
    ):
        assert np.array_equal(np.asarray(augment.read(tmp_path / "a.png")), np.asarray(upright))
