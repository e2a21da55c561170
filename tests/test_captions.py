"""captions.py: which categories a caption names, and its features in place of an image's."""

import json
import os
import re

import numpy as np
import pytest
import torch
from small_world import command, one_line, options, run, sheet, world

import eval as evaluation
from paper import captions
import clip
import data
import fake_datasets as fake
from config import PRESETS, Config
from datasets import coco
from paper.captions import Captions, forms, mentioned, vocabulary
from support import UserError
from tools import build
import train

COCO = [
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
]
VOC = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]


@pytest.fixture(autouse=True)
def one_thread():  # so small a world is slower with two
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named(text, names):
    return {names[c] for c in next(mentioned([text], vocabulary(names)))}


@pytest.mark.parametrize(
    "text, categories",
    [
        ("Two men ride motorbikes past a parked lorry.", {"person", "motorcycle", "truck"}),
        ("a hot dog and a Teddy-bear on a bench", {"hot dog", "teddy bear", "bench"}),
        ("Dogs, sheep, geese and knives", {"dog", "sheep", "bird", "knife"}),
        ("buses, benches, couches, sandwiches, boxes", {"bus", "bench", "couch", "sandwich"}),
        ("puppies; ponies; babies", {"dog", "horse", "person"}),
        ("a woman plays soccer, the soccer ball is far", {"person", "sports ball"}),
        ("three wineglasses and some wine glasses", {"wine glass"}),
        ("a pair of scissors, skis and a ski", {"scissors", "skis"}),
        ("a carpet, a catalogue, business, grass, glass", set()),
        ("", set()),
        ("!?", set()),
    ],
)
def test_categories_are_found_by_word_and_not_by_letters(text, categories):
    assert named(text, COCO) == categories


def test_a_phrase_takes_its_words_with_it_even_for_names_that_do_not_hold_it():
    assert (
        named("a hot dog", VOC) == set()
        and named("a dog", VOC) == {"dog"}
        and named("a polar bear, a teddy bear", COCO) == {"bear", "teddy bear"}
    )


def test_every_name_and_its_plural_is_found():
    for names in (COCO, VOC):
        phrases = vocabulary(names)
        for c, name in enumerate(names):
            assert next(mentioned([f"a photo of a {name}."], phrases)) == {c}, name
            plural = {
                "person": "people",
                "sheep": "sheep",
                "knife": "knives",
                "mouse": "mouse",
                "skis": "skis",
            }.get(name) or (
                name
                if name.endswith("s") and not name.endswith("ss") and name != "bus"
                else name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")
            )
            assert next(mentioned([f"two {plural}"], phrases)) == {c}, plural
    assert {
        n for n in VOC if len({p for p, cs in vocabulary(VOC).items() if VOC.index(n) in cs}) > 1
    } >= {"person", "sofa", "tvmonitor", "pottedplant"}


@pytest.mark.parametrize(
    "word, plural",
    [
        ("butterfly", "butterflies"),
        ("toy", "toys"),
        ("bus", "buses"),
        ("snowman", "snowmen"),
        ("wine glass", "wine glasses"),
        ("dish", "dishes"),
        ("box", "boxes"),
        ("horse", "horses"),
        ("knife", "knives"),
        ("calf", "calves"),
        ("giraffe", "giraffes"),
        ("cliff", "cliffs"),
        ("baseball glove", "baseball gloves"),
    ],
)
def test_plurals(word, plural):
    assert forms(word) == {word, plural}


def test_the_drawn_scenes_captions_name_only_what_is_there(world):
    table = coco.split(world / "scenes", "train2014")
    raw = json.loads((world / "scenes/annotations/captions_train2014.json").read_text())
    row = {image["id"]: i for i, image in enumerate(raw["images"])}
    phrases, hits = vocabulary(table.names), 0
    texts = [a["caption"] for a in raw["annotations"]]
    for a, found in zip(raw["annotations"], mentioned(texts, phrases)):
        assert all(table.labels[row[a["image_id"]], c] == 1 for c in found), a
        hits += len(found)
    assert hits > len(raw["annotations"])  # more than one a caption


def test_captions_become_a_split(tmp_path):
    file = tmp_path / "captions.json"
    file.write_text(
        json.dumps(
            {
                "images": [{"id": 7}, {"id": 3}],
                "annotations": [
                    {"image_id": 7, "caption": "a dog"},
                    {"image_id": 3, "caption": "two cats"},
                    {"image_id": 7, "caption": "rain"},
                ],
            }
        )
    )
    split = fake.captions(file, "cat", "dog")
    assert (
        split.paths == ["a dog", "two cats"]
        and np.array_equal(split.labels, [[-1, 1], [1, -1]])
        and split.labels.dtype == np.int8
    )
    assert split.info["dropped"] == {"captions that name no category": 1} and json.dumps(split.info)
    # of the first image only
    assert fake.captions(file, "cat", "dog", images=1).paths == ["a dog"]
    for text, words in (
        ("{", "JSON"),
        ('{"images": []}', "annotations"),
        (file.read_text().replace("cats", "mats").replace("dog", "fog"), "none of its 3"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=words):
            fake.captions(tmp_path / "bad.json", "cat", "dog")
    with pytest.raises(UserError, match="nowhere.json"):
        fake.captions(tmp_path / "nowhere.json", "cat")


def test_captions_of_photos_that_were_held_out_are_not_learned_from(world):
    cfg = Config(**PRESETS["scenes"], root=str(world / "scenes"), images="captions", val="0.5")
    train_split, val_split, _ = data.load(cfg)
    raw = json.loads((world / "scenes/annotations/captions_train2014.json").read_text())
    name = {image["id"]: image["file_name"] for image in raw["images"]}
    kept = {os.path.basename(path) for path in train_split.paths}
    texts = [row["caption"] for row in raw["annotations"] if name[row["image_id"]] in kept]
    split = build.load_data(cfg)[0]
    assert len(val_split.paths) > 5 and 0 < len(split.paths) <= len(texts)
    assert set(split.paths) <= set(texts)


def feed(folder, texts, **more):
    encoder = clip.load(str(folder / "clip-quickgelu.safetensors"))
    labels = np.ones((len(texts), 1), np.int8)
    return Captions(data.Split("captions", texts, ["x"], labels), encoder, **more), encoder


def test_the_sentence_is_clips_text_feature_and_words_are_its_tokens(world, monkeypatch):
    monkeypatch.setattr(captions, "epoch_order", lambda n, *_: torch.arange(n))
    texts = ["a red boat", "cat", "a drawing of two boats and a clock"]
    features, encoder = feed(world, texts, batch=2)
    rows = list(features.batches(0))
    assert [index.tolist() for index, _, _ in rows] == [[0, 1], [2]]
    x = torch.cat([x for _, _, x in rows])
    assert (
        torch.allclose(x, encoder.encode_text(encoder.tokenize(texts)), atol=1e-5)
        and not x.requires_grad
    )
    _, f, x = rows[0]
    # without the start; the end is the last
    words = len(encoder.tokenize(texts[:1])[0].nonzero()) - 1
    assert f.shape == (2, words, encoder.D) and torch.equal(f[0, -1], x[0])
    # "cat", end, "cat", end, ...
    assert torch.equal(f[1, 0], f[1, 2]) and torch.equal(f[1, 1], x[1])
    for text in ("a", "a red", "a red boat"):  # causal: a word knows what stands before it
        tokens = encoder.tokenize([text])
        ids = len(tokens[0].nonzero()) - 2
        alone = encoder.encode_prompts(encoder.token_embedding(tokens), torch.tensor([ids]))
        assert torch.allclose(f[0, ids - 1], alone[0], atol=1e-5), text


def test_long_captions_lose_their_end_and_ranks_share_a_batch(world):
    texts = ["boat " * 500, "a cat", "a dog", "a clock", "the sun"]
    features, encoder = feed(world, texts, batch=4)
    assert features.tokens.shape == (5, encoder.context_length) and len(features) == 5
    whole = [index.tolist() for index, _, _ in features.batches(3)]
    parts = [
        [
            index.tolist()
            for index, _, _ in feed(world, texts, batch=4, rank=r, world=2)[0].batches(3)
        ]
        for r in (0, 1)
    ]
    assert sorted(sum(whole, [])) == list(range(5)) and whole != [
        i.tolist() for i in torch.arange(5).split(4)
    ]
    assert (
        parts[0][0] == whole[0][::2]
        and parts[1][0] == whole[0][1::2]
        and parts[0][1] == parts[1][1] == whole[1]
    )


def test_processes_get_features_of_the_same_shape(world):
    """What one gathers from all: a batch's longest caption says how many words all have."""
    texts = ["a cat", "a dog and a cat and a clock on a table"]
    shapes = {f.shape[1] for r in (0, 1)
              for _, f, _ in feed(world, texts, batch=2, rank=r, world=2)[0].batches(0)}
    assert len(shapes) == 1


def test_a_sheet_brings_no_captions(sheet, tmp_path, world, capfd):
    """Those of the drawn scenes are not taken in their place."""
    words = options(world, tmp_path / "out", data=sheet[1], root=None, images="captions",
                    ratio=None, val=0.2)
    one_line(train.main, words, capfd, "needs --captions FILE")


def test_captions_bring_the_labels_of_a_sheet_that_has_none(sheet, tmp_path, world, capfd):
    sheet[1].write_text(re.sub(",[01]*,[01]*,[01]*\n", ",,,\n", sheet[1].read_text()))
    words = options(world, tmp_path / "out", data=sheet[1], root=None, images="captions", epochs=1,
                    captions=world / "scenes" / "annotations" / "captions_train2014.json",
                    ratio=None, score="query")
    status, out, err = command(train.main, words, capfd)
    assert status == 0 and any(line.startswith("epoch   1/1") for line in out), err
    one_line(train.main, options(world, tmp_path / "photos", data=sheet[1], root=None, ratio=None),
             capfd, "no positive label is left")


def test_a_mixed_score_without_a_photo_is_refused_before_the_training(world, tmp_path, capfd):
    for val in (0, 0.03):  # of a single photo everything looks alike
        words = options(world, tmp_path / "run", images="captions", ratio=None, score="mixed",
                        val=val)
        one_line(train.main, words, capfd, "mixed", "--val")
    assert not (tmp_path / "run").exists()


def test_captions_have_another_order_in_each_epoch_and_the_same_again_when_resumed(world):
    features, _ = feed(world, [f"a cat and {n} dogs" for n in range(8)], batch=8)
    orders = [tuple(next(iter(features.batches(epoch)))[0].tolist()) for epoch in (0, 1, 2, 1)]
    assert len(set(orders)) == 3 and orders[3] == orders[1]


@pytest.mark.parametrize("matching", ("global", "dualcoop", "carl"))
def test_prompts_learn_from_captions_and_are_tested_on_photos(world, tmp_path, matching, capfd):
    history = run(
        world, tmp_path / "run", images="captions", matching=matching, epochs=6, ratio=None, lr=5e-3
    )
    assert history[-1]["L_r"] < history[0]["L_r"] and 0 < history[-1]["test"]["mAP"] <= 100
    about = json.loads((tmp_path / "run/config.json").read_text())
    assert about["data"]["captions"]["unknowns"] == 0 and about["data"]["captions"]["images"] > 40
    # no word of changed photos: it was trained with none
    assert command(evaluation.main, [tmp_path / "run"], capfd)[::2] == (0, [])
