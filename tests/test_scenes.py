"""The drawn data set: deterministic, disjoint splits, valid COCO, honest boxes and captions."""

import hashlib
import json
import os
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from datasets import scenes

SMALL = dict(train=110, val=60, test=60, size=256, seed=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("drawn") / "scenes"
    scenes.write(path, workers=2, **SMALL)
    return path


def read(root, what, split):
    return json.loads((root / "annotations" / f"{what}_{split}.json").read_text())


def digests(root):
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file()
    }


def test_the_number_of_workers_changes_no_byte(root, tmp_path):
    scenes.write(tmp_path / "scenes", workers=1, **SMALL)
    assert digests(tmp_path / "scenes") == digests(root)


def test_a_scene_depends_on_its_seed_alone():
    one, two, other = (scenes.scene(random.Random(seed), 128, (1, 3)) for seed in "aab")
    assert (one[0] == two[0]).all() and one[1:] == two[1:]
    assert (one[0] != other[0]).any()


def test_no_split_shares_a_picture(root):
    pictures = [h for name, h in digests(root).items() if name.endswith(".jpg")]
    assert len(set(pictures)) == len(pictures) == 230


@pytest.mark.parametrize("split, count", [("train2014", 110), ("tune2014", 60), ("val2014", 60)])
def test_coco_layout(root, split, count):
    instances, texts = read(root, "instances", split), read(root, "captions", split)
    images = {row["id"]: row for row in instances["images"]}
    assert len(images) == count and texts["images"] == instances["images"]
    for row in images.values():
        with Image.open(root / split / row["file_name"]) as picture:
            assert (
                picture.size == (row["width"], row["height"]) == (256, 256)
                and picture.mode == "RGB"
            )
    ids = [row["id"] for row in instances["categories"]]
    assert [row["name"] for row in instances["categories"]] == scenes.NAMES and len(ids) == len(
        set(ids)
    ) == 24
    assert max(ids) > 24, "ids have holes, as COCO's, so that nobody takes an id for an index"
    assert len({row["id"] for row in instances["annotations"]}) == len(instances["annotations"])
    for row in instances["annotations"]:
        x, y, w, h = row["bbox"]
        assert row["image_id"] in images and row["category_id"] in ids and row["iscrowd"] == 0
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= 256 and y + h <= 256
        assert scenes.MIN_AREA <= row["area"] <= w * h
    assert {row["image_id"] for row in texts["annotations"]} == set(images) and len(
        texts["annotations"]
    ) == 5 * count


def test_every_category_appears_and_small_ones_too(root):
    rows = read(root, "instances", "train2014")["annotations"]
    assert {row["category_id"] for row in rows} == set(scenes.IDS)
    extents = [max(row["bbox"][2:]) for row in rows]
    assert min(extents) < 32 and max(extents) > 80


def test_captions_name_only_what_is_there(root):
    words = {form: k.name for k in scenes.KINDS for form in (k.name, k.plural or k.name + "s")}
    for split in scenes.SPLITS.values():
        instances = read(root, "instances", split)
        name = {row["id"]: row["name"] for row in instances["categories"]}
        present = {}
        for row in instances["annotations"]:
            present.setdefault(row["image_id"], set()).add(name[row["category_id"]])
        full = 0
        for row in read(root, "captions", split)["annotations"]:
            told = {words[w] for w in re.findall("[a-z]+", row["caption"]) if w in words}
            assert told and told <= present[row["image_id"]], row
            assert "{" not in row["caption"] and "  " not in row["caption"]
            full += told == present[row["image_id"]]
        assert 0.2 < full / (5 * len(instances["images"])) < 0.8, (
            "most captions leave something out, some do not"
        )


def test_boxes_are_tight_around_what_is_drawn():
    """A lone object on a canvas without distractors: its pixels differ from the background's inside
    the box only."""
    for k, kind in enumerate(scenes.KINDS):
        picture, mask = Image.new("RGB", (200, 200)), Image.new("L", (100, 100))
        pens = scenes.ImageDraw.Draw(picture), scenes.ImageDraw.Draw(mask)
        scenes.stamp(
            *pens,
            1,
            kind.art,
            scenes.PAINT | {"c": (250, 60, 60), "o": (60, 250, 60)},
            random.Random(k),
            50,
            50,
            40,
            0.1,
        )
        coloured, numbered = np.asarray(picture.reduce(2)).sum(2) > 100, np.asarray(mask) == 1
        for axis in (0, 1):
            seen, told = (np.flatnonzero(a.any(axis)) for a in (coloured, numbered))
            assert abs(seen[0] - told[0]) <= 2 and abs(seen[-1] - told[-1]) <= 2, kind.name


def test_things_keep_company():
    """Boats come with fish far more often than chance has it, and no row names a category that is
    not there."""
    for kind in scenes.KINDS:
        assert set(kind.company.split()) <= set(scenes.NAMES) - {kind.name}
    r, rows = random.Random(0), np.zeros((4000, 24), bool)
    for row in rows:
        row[scenes.choose(r, 3)] = True
    boat, fish = rows[:, scenes.NAMES.index("boat")], rows[:, scenes.NAMES.index("fish")]
    assert (boat & fish).mean() > 2 * boat.mean() * fish.mean()


def test_captions_of_all_lengths():
    """Prompts of 16 learned tokens and a name end at positions 17 to 22 of the text: captions must
    train those, and later ones."""
    from clip import Tokenizer

    texts = [
        t for i in range(60) for t in scenes.draw("pretrain", 128, (1, 3), 0, None, i)[2]
    ]
    lengths = Tokenizer(4514)(texts, 77).argmax(1)
    assert (
        lengths.min() < 8
        and (lengths > 18).float().mean() > 0.25
        and (lengths > 30).float().mean() > 0.05
    )


def test_crowded_canvas_still_draws():
    for i in range(20):
        picture, boxes, texts = scenes.scene(random.Random(f"crowd/{i}"), 64, (6, 6))
        assert picture.shape == (64, 64, 3) and boxes and len(texts) == 5


def test_a_root_is_complete_or_absent(root, tmp_path, monkeypatch):
    before = digests(root)
    scenes.write(root, **SMALL)  # the very same: left alone
    assert digests(root) == before
    with pytest.raises(scenes.UserError, match="delete it or name another root"):
        scenes.write(root, **{**SMALL, "seed": 4})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(scenes.UserError, match="something else"):
        scenes.write(tmp_path / "mine", **SMALL)
    monkeypatch.setattr(scenes, "annotate", lambda *a: 1 / 0)  # dies on the way
    with pytest.raises(ZeroDivisionError):
        scenes.write(tmp_path / "killed", **SMALL)
    assert visible(tmp_path) == ["mine"]


def visible(folder):
    """Without the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "root.part" / "train2014").mkdir(parents=True)
    scenes.write(tmp_path / "root", **SMALL)
    assert visible(tmp_path) == ["root"]


def test_two_that_draw_the_same_root_at_once_draw_it_once(tmp_path, monkeypatch):
    few, annotate, drawn = dict(train=2, val=2, test=2, size=64, workers=1), scenes.annotate, []
    monkeypatch.setattr(scenes, "annotate", lambda folder, split, *rest: (
        drawn.append(split), annotate(folder, split, *rest)))
    with ThreadPoolExecutor(2) as pool:
        [*pool.map(lambda _: scenes.write(tmp_path / "root", **few), range(2))]
    assert drawn == [*scenes.SPLITS.values()] and visible(tmp_path) == ["root"]


def test_processes_that_draw_have_ended_before_what_they_drew_is_removed(tmp_path, monkeypatch):
    def interrupted(drawn, *_, **__):
        yield next(drawn)
        raise KeyboardInterrupt

    ended, end, remove = [], scenes.ProcessPoolExecutor.shutdown, scenes.shutil.rmtree
    monkeypatch.setattr(scenes, "tqdm", interrupted)
    monkeypatch.setattr(
        scenes.ProcessPoolExecutor,
        "shutdown",
        lambda *a, **k: (end(*a, **k), ended.append("processes")),
    )
    monkeypatch.setattr(
        scenes.shutil, "rmtree", lambda *a, **k: (ended.append("files"), remove(*a, **k))
    )
    with pytest.raises(KeyboardInterrupt):
        scenes.write(tmp_path / "s", 400, 1, 1, 64, workers=2)
    # the first removal is of what a killed process may have left
    assert ended == ["files", "processes", "files"] and visible(tmp_path) == []
