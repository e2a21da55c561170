"""The six layouts: on faithful fakes everywhere, and on real samples where TRM_SAMPLES
names a folder of them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from tools import check
from datasets import base as datasets
from datasets import cub, vg200, voc, nuswide
import fake_datasets as fake
from data import NEGATIVE, POSITIVE, UNKNOWN
from support import UserError

ROOT = Path(data.__file__).resolve().parent
SAMPLES = Path(os.environ.get("TRM_SAMPLES", ROOT / "no samples"))
samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="no real samples: set TRM_SAMPLES to their folder"
)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    for name, make in fake.MAKERS.items():
        make(root / name)
    return root


def expected(count, classes):
    labels = np.full((count, classes), NEGATIVE)
    for i in range(count):
        labels[i, fake.positives(i, classes)] = POSITIVE
    return labels


@pytest.mark.parametrize(
    "name,classes,drop",
    [
        ("coco", 80, 2),
        ("voc2007", 20, None),
        ("voc2012", 20, None),
        ("vg200", 200, None),
        ("nuswide", 81, 4),
        ("cub", 312, None),
    ],
)
def test_layouts(trees, name, classes, drop):
    train, val, test = fake.load(name, trees / name)
    assert val is None
    for split, count in ((train, fake.TRAIN), (test, fake.TEST)):
        labels = expected(count, classes)
        if name == "nuswide":
            labels[1] = NEGATIVE
        rows = [i for i in range(count) if i != drop]
        assert split.labels.dtype == np.int8 and (split.labels == labels[rows]).all()
        assert (split.truth == split.labels).all() and len(split.names) == len(
            split.prompts
        ) == classes
        assert len(split.paths) == len(rows) and all(
            os.path.isabs(p) and os.path.exists(p) for p in split.paths
        )
        assert sum(split.info["dropped"].values()) == (drop is not None)
        json.dumps(split.info)
    partial = fake.load(name, trees / name, ratio=0.5)[0]
    kept = data.partial_mask((fake.TRAIN, classes), 0.5)[
        [i for i in range(fake.TRAIN) if i != drop]
    ]
    # drawn for every row of the list, dropped after
    assert (partial.labels == train.labels * kept).all()
    image, index = data.Images(train, 32, "taidpt")[(1, 3)]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and index == 3


def test_every_seed_draws_its_own_mask(trees):
    """--ratio: the seed is that of the mask; single positive: Cole's 1200 plus the seed."""
    whole = fake.load("voc2007", trees / "voc2007")[0].labels
    for seed in (0, 3):
        part = fake.load("voc2007", trees / "voc2007", ratio=0.5, seed=seed)[0].labels
        assert (part == whole * data.partial_mask(whole.shape, 0.5, seed)).all()
        single = fake.load("voc2007", trees / "voc2007", single_positive="largeloss", seed=seed)[0]
        rows = data.hold_out(len(whole), 0.2)[0]
        assert (single.labels == data.single_positives(whole, 1200 + seed)[rows]).all()


def test_an_image_without_annotation_is_not_held_out(trees):
    """It counts for the mask and for the draw of the rows, and then it is left out on each side."""
    whole = fake.load("coco", trees / "coco", keep_unannotated=True)[0]
    train, val, _ = fake.load("coco", trees / "coco", val=0.5)
    (unannotated,) = {p for p, row in zip(whole.paths, whole.labels) if not (row == POSITIVE).any()}
    assert unannotated not in {*train.paths, *val.paths}
    assert len(train.paths) + len(val.paths) == len(whole.paths) - 1
    few = fake.load("coco", trees / "coco", train_images=4)[0]  # four that are used
    assert few.paths == fake.load("coco", trees / "coco")[0].paths[:4]
    assert whole.paths.index(unannotated) < 4


@pytest.mark.parametrize("name", list(fake.MAKERS))
def test_single_positive_largeloss(trees, name):
    train, val, test = fake.load(name, trees / name, single_positive="largeloss")
    assert len(train.paths) + len(val.paths) == fake.TRAIN - (name in ("coco", "nuswide"))
    assert ((train.labels == POSITIVE).sum(1) <= 1).all() and (train.labels != NEGATIVE).all()
    assert (val.labels != UNKNOWN).all() and (val.labels == val.truth).all()
    assert (train.truth[train.labels == POSITIVE] == POSITIVE).all()
    assert not set(train.paths) & set(val.paths)
    # rows ordered by the id as a string, the unannotated image gone before the sampler starts
    if name == "coco":
        ids = sorted(str(int(Path(p).stem[-12:])) for p in train.paths)
        assert [str(int(Path(p).stem[-12:])) for p in train.paths] == ids


@pytest.mark.parametrize("name, lost", (("voc2012", False), ("nuswide", True)))
def test_whose_rows_move_the_stream_of_single_positives(name, lost, monkeypatch):
    """Cole et al. left out images without labels before they sampled; a photo that has been lost
    since (NUS-WIDE) was still there."""
    labels = np.where(np.random.RandomState(0).rand(30, 6) < 0.5, POSITIVE, NEGATIVE)
    labels, unused = labels.astype(np.int8), np.arange(30) == 4
    whole = data.Split(name, [f"{i}.jpg" for i in range(30)], list("abcdef"), labels, unused=unused)
    monkeypatch.setattr(data, "complete", lambda cfg: {"train": whole})
    train, _, _ = fake.load(name, "somewhere", single_positive="largeloss", val=0)
    with_it = data.single_positives(labels)[~unused]
    without_it = data.single_positives(labels[~unused])
    assert (with_it != without_it).any()
    assert (train.labels == (with_it if lost else without_it)).all()


@pytest.mark.parametrize("name,last", [("coco", 0), ("voc2012", -1), ("nuswide", 0), ("cub", 1)])
def test_single_positive_splc(trees, name, last):
    train, val, test = fake.load(name, trees / name, single_positive="splc")
    assert val is None and len(train.paths) == fake.TRAIN - (name == "coco")
    assert ((train.labels == POSITIVE).sum(1) == 1).all() and (train.labels != NEGATIVE).all()
    if name == "coco":  # the list's own order
        assert (
            Path(train.paths[0]).name
            == datasets.read_lines(trees / "coco/coco_train_singlelabel.txt")[0].split(",")[0]
        )
    else:
        picks = [fake.positives(i, len(train.names))[last] for i in range(fake.TRAIN)]
        assert train.labels.argmax(1).tolist() == picks
    if name == "voc2012":  # objects that are all difficult count here, and only here
        plain = fake.load(name, trees / name)[2]
        assert (test.truth == POSITIVE).sum() > (plain.truth == POSITIVE).sum()
    with pytest.raises(UserError, match="use largeloss"):
        fake.load("voc2007", trees / "voc2007", single_positive="splc")


def test_voc_from_xml_equals_the_class_files(trees, tmp_path):
    fake.voc(tmp_path, class_files=False)
    for a, b in zip(fake.load("voc2007", tmp_path), fake.load("voc2007", trees / "voc2007")):
        assert a is b is None or (a.labels == b.labels).all()


def test_the_sampler_of_cole_et_al_draws_from_annotated_images(trees):
    """A row without a label moves its random stream."""
    kept, own = (fake.load("coco", trees / "coco", single_positive="largeloss",
                           keep_unannotated=keep) for keep in (True, False))
    assert kept[0].paths == own[0].paths and (kept[0].labels == own[0].labels).all()
    assert len(kept[2].paths) == len(own[2].paths) + 1  # the test set keeps them


def test_boxes_are_fractions_and_crowds_have_none(trees):
    train = fake.load("coco", trees / "coco")[0]
    assert len(train.boxes) == len(train.paths)
    assert np.allclose(train.boxes[0][:, 1:], [0.1, 0.1, 0.6, 0.6])
    assert sorted(train.boxes[0][:, 0].astype(int)) == fake.positives(0, 80)
    assert len(train.boxes[2]) == len(fake.positives(3, 80)) - 1 and (
        train.labels[2] == POSITIVE
    ).sum() == len(fake.positives(3, 80))
    everything = fake.load("coco", trees / "coco", keep_unannotated=True)[0]
    assert len(everything.paths) == fake.TRAIN and (everything.labels[2] == NEGATIVE).all()


def test_scenes_layout_has_validation(tmp_path):
    import shutil

    fake.coco(tmp_path)
    shutil.copytree(tmp_path / "val2014", tmp_path / "tune2014")
    shutil.copy(
        tmp_path / "annotations/instances_val2014.json",
        tmp_path / "annotations/instances_tune2014.json",
    )
    train, val, test = fake.load("scenes", tmp_path, single_positive="largeloss")
    assert len(train.paths) == fake.TRAIN - 1 and len(val.paths) == len(test.paths) == fake.TEST - 1
    assert "tune2014" in val.paths[0] and "val2014" in test.paths[0]


def test_prompt_names(trees, tmp_path):
    def prompts(name, **options):
        return fake.load(name, trees / name, **options)[0].prompts

    assert prompts("coco")[3:5] == ["motor bike", "aeroplane"]
    assert prompts("coco", prompt_names="official")[3:5] == ["motorcycle", "airplane"]
    assert prompts("voc2007")[10] == "diningtable"
    assert {"blue bill", "large wing", "owl-like upper", "blue upper"} <= set(prompts("cub"))
    assert prompts("cub", prompt_names="official")[1] == "has bill color::large (16 - 32 in)"
    fake.write(tmp_path / "names.txt", "\n".join(f"my {c}" for c in range(20)))
    assert prompts("voc2007", names=tmp_path / "names.txt")[19] == "my 19"
    assert fake.load("voc2007", trees / "voc2007", names=tmp_path / "names.txt")[0].names == list(
        voc.VOC
    )


def test_vg_names_by_matching(tmp_path):
    """The matching finds the name of every index from objects.json alone."""
    fake.vg200(tmp_path)
    index = json.loads((tmp_path / "vg_category_500_labels_index.json").read_text())
    things = [
        {"image_id": int(k[:-4]), "objects": [{"names": [f"Thing {c} "]} for c in v if c < 200]}
        for k, v in index.items()
    ]
    fake.write(tmp_path / "objects.json", json.dumps(things))
    fake.write(tmp_path / "object_alias.txt", "thing zero,thing 0\n")
    found, seen = (
        vg200.match_names(tmp_path, tmp_path / "objects.json"),
        {c for v in index.values() for c in v if c < 200},
    )
    labels = np.concatenate([vg200.listed(tmp_path, split)[2] for split in ("train", "test")]).T
    for c in seen:  # classes with the very same images cannot be told apart, here or anywhere
        same = {w for w in seen if (labels[w] == labels[c]).all()}
        assert found[c] in {"thing zero" if w == 0 else f"thing {w}" for w in same}


def test_sheet(tmp_path):
    fake.sheet(tmp_path)
    train, val, test = fake.load(tmp_path / "photos.csv")
    assert test is None and (len(train.paths), len(val.paths)) == (11, 1)
    assert train.names == ["dog", "cat", "red, small car"] and train.prompts[2] == "small red car"
    whole = fake.load(str(tmp_path / "photos.csv"), val=0.0)[0]
    assert (
        whole.labels[:3].tolist() == [[1, -1, 0], [-1, 0, 1], [0, 1, -1]]
        and whole.name == "photos/train"
    )
    assert fake.load(tmp_path / "photos.csv")[1].paths == val.paths
    lines = (tmp_path / "photos.csv").read_text().splitlines()
    absolute = [line.replace("my photos", str(tmp_path / "my photos")) for line in lines[2:5]]
    (tmp_path / "sub").mkdir()
    fake.write(
        tmp_path / "sub/more.csv",
        "\n".join(['image,cat,dog,"red, small car"', *absolute, "", ",,,"]) + "\n",
    )
    fake.write(tmp_path / "rest.csv", "\n".join(lines[:2] + lines[5:]))
    train, val, _ = fake.load(tmp_path / "rest.csv", val=tmp_path / "sub/more.csv")
    # columns in the first sheet's order
    assert len(train.paths) == 9 and val.labels[0].tolist() == [-1, 1, 0]
    fake.write(tmp_path / "sub/relative.csv", "image,dog\nmy photos/1.jpg,1\nmy photos/2.jpg,0\n")
    assert len(fake.load(tmp_path / "sub/relative.csv", root=tmp_path, val=0.0)[0].paths) == 2
    single = fake.load(tmp_path / "photos.csv", single_positive="largeloss", val=0.0)[0]
    assert ((single.labels == POSITIVE).sum(1) == 1).all()


def sides(folder, rows, **options):
    """{image: "train" or "val"} of a sheet with these rows."""
    fake.write(folder / "s.csv", "image,dog\n" + "".join(f"{row}\n" for row in rows))
    train, val, _ = fake.load(folder / "s.csv", **options)
    return {Path(path).name: side for side, split in (("train", train), ("val", val))
            for path in split.paths}


def test_rows_that_come_go_or_move_leave_the_others_on_their_side(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(400):
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{i % 2}" for i in range(400)]
    before = sides(tmp_path, rows[:300])
    assert 40 < list(before.values()).count("val") < 80  # a fifth of 300
    for changed in (rows, rows[:300][::-1], rows[50:300]):
        after = sides(tmp_path, changed)
        assert all(after[name] == side for name, side in before.items() if name in after)
    share = list(sides(tmp_path, rows, val=0.5).values()).count("val")
    assert 160 < share < 240


def test_one_picture_under_two_names_is_on_one_side(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(60):
        Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"copy{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    rows = [f"{name}{i}.png,{i % 2}" for name in ("", "copy") for i in range(60)]
    side = sides(tmp_path, rows, val=0.5)
    assert all(side[f"{i}.png"] == side[f"copy{i}.png"] for i in range(60))
    assert set(side.values()) == {"train", "val"} and sides(tmp_path, rows[::-1], val=0.5) == side


def test_held_out_share_and_limits(trees):
    train, val, test = fake.load("voc2007", trees / "voc2007", ratio=0.4, val=0.3)
    assert (len(train.paths), len(val.paths)) == (7, 3) and (val.labels != UNKNOWN).all()
    assert len(fake.load("voc2007", trees / "voc2007", train_images=3)[0].paths) == 3


def test_checker(trees, tmp_path, capsys):
    def checker(*arguments):
        return check.main([*map(str, arguments)]), *capsys.readouterr()

    fake.sheet(tmp_path)
    code, out, err = checker(tmp_path / "photos.csv")
    assert code == 0 and "no problems found" in out and "red, small car" in out and err == ""
    (tmp_path / "my photos/3.jpg").write_bytes((tmp_path / "my photos/3.jpg").read_bytes()[:300])
    code, out, err = checker(tmp_path / "photos.csv")
    assert code == 2 and "photos.csv:6: " in err and "not a readable image" in err
    assert checker(tmp_path / "photos.csv", "--no-decode")[0] == 0
    fake.write(
        tmp_path / "bad.csv",
        "image,dog,cat\nmy photos/0.jpg,1,1,1\nmy photos/1.jpg,maybe,0\nnone.jpg,1,1\n",
    )
    code, out, err = checker(tmp_path / "bad.csv")
    assert code == 2 and [f"bad.csv:{n}:" in err for n in (2, 3, 4)] == [True] * 3
    # most of its 80 classes are in no image
    code, out, err = checker("coco", "--root", trees / "coco")
    assert code == 2 and "none to learn" in err and len(err.splitlines()) == 1
    assert checker("coco")[0] == 2


def test_checker_in_its_own_process(tmp_path):
    fake.write(tmp_path / "bad.csv", "image,dog\nnone.jpg,1\n")
    run = subprocess.run(
        [sys.executable, "data.py", tmp_path / "bad.csv"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        run.returncode == 2
        and run.stderr.startswith("error: ")
        and run.stderr.count("\n") == 1
        and run.stdout == ""
    )


# ---- training
@pytest.fixture
def one_thread():
    """Batches this small lose more to a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name,setting",
    [(name, setting) for name in fake.MAKERS for setting in ("partial", "largeloss")]
    + [(name, "splc") for name in data.LISTS]
    + [("sheet", "partial"), ("sheet", "largeloss")],
)
def test_one_epoch_through_the_command_line(trees, tmp_path, name, setting, capsys, one_thread):
    import train

    if name == "sheet":
        fake.sheet(tmp_path)
    where = (
        ["--data", tmp_path / "photos.csv"]
        if name == "sheet"
        else ["--data", name, "--root", trees / name]
    )
    labels = ["--ratio", 0.5] if setting == "partial" else ["--single-positive", setting]
    code = train.main(
        [
            str(a)
            for a in (
                *where,
                *labels,
                "--clip",
                "tiny",
                "--epochs",
                1,
                "--size",
                64,
                "--batch",
                5,
                "--context",
                4,
                "--workers",
                0,
                "--out",
                tmp_path / "run",
            )
        ]
    )
    assert code == 0, capsys.readouterr().err
    about = json.loads((tmp_path / "run/config.json").read_text())["data"]
    info = about["photos/train" if name == "sheet" else f"{name}/train"]
    assert len(info["mask_sha256"]) == 64 and info["images"] > 0 and info["unknowns"] > 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["L"])


# ---- real samples
@samples
def test_real_coco():
    train, _, test = fake.load("coco", SAMPLES / "coco2014_mini", keep_unannotated=True)
    assert (len(train.paths), len(test.paths)) == (59, 24) and train.names == fake.COCO
    _, _, test = fake.load("coco", SAMPLES / "coco2014_mini")
    assert len(test.paths) == 22 and test.info["dropped"] == {"without annotation": 2}
    assert not {226111, 58636} & {int(Path(p).stem[-12:]) for p in test.paths}
    for split in (train, test):
        assert ((split.labels == POSITIVE).sum(1) > 0).all()
        boxes = np.concatenate(split.boxes)
        assert boxes[:, 1:].min() >= 0 and boxes[:, 1:].max() <= 1.001
        for i in (0, 5):
            assert set(split.boxes[i][:, 0].astype(int)) <= set(
                np.flatnonzero(split.labels[i] == POSITIVE)
            )
    image, _ = data.Images(train, 64)[0]
    assert torch.isfinite(image).all() and -2.2 < image.min() and image.max() < 2.8


@samples
def test_real_voc2007_lists(tmp_path):
    """The complete official lists: counts of DATASETS.md, which SARB's published files confirm."""
    base = tmp_path / "VOCdevkit/VOC2007"
    (base / "JPEGImages").mkdir(parents=True)
    (base / "ImageSets").symlink_to(SAMPLES / "voc2007_lists/ImageSets")
    for split in ("trainval", "test"):
        for name in datasets.read_lines(base / f"ImageSets/Main/{split}.txt"):
            (base / "JPEGImages" / f"{name}.jpg").touch()
    train, _, test = fake.load("voc2007", tmp_path, ratio=0.5)
    per_class = {
        "train": [
            238,
            243,
            330,
            181,
            244,
            186,
            713,
            337,
            445,
            141,
            200,
            421,
            287,
            245,
            2008,
            245,
            96,
            229,
            261,
            256,
        ],
        "test": [
            204,
            239,
            282,
            172,
            212,
            174,
            721,
            322,
            417,
            127,
            190,
            418,
            274,
            222,
            2007,
            224,
            97,
            223,
            259,
            229,
        ],
    }
    for split, images, total in ((train, 5011, 7306), (test, 4952, 7013)):
        assert split.truth.shape == (images, 20) and (split.truth == POSITIVE).sum() == total
        assert (split.truth == POSITIVE).sum(0).tolist() == per_class[split.name.split("/")[1]]
    assert (train.labels != UNKNOWN).sum() == 50163
    both = [voc.split(tmp_path, 2007, split, POSITIVE).labels for split in ("trainval", "test")]
    # cells only difficult
    assert [int((a == POSITIVE).sum() - t) for a, t in zip(both, (7306, 7013))] == [607, 619]


@samples
def test_real_voc_xml(tmp_path):
    import shutil

    shutil.copytree(SAMPLES / "voc/VOCdevkit", tmp_path / "VOCdevkit")
    main = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main"
    os.chmod(main, 0o755)
    (main / "trainval.txt").write_text("000001\r\n")
    labels = voc.split(tmp_path, 2007, "trainval").labels
    assert {voc.VOC[c] for c in np.flatnonzero(labels[0] == POSITIVE)} == {"dog", "person"}


@samples
@pytest.mark.parametrize(
    "name,classes,single",
    [
        ("coco_train_singlelabel", 80, True),
        ("scpnet_voc_train", 20, True),
        ("scpnet_voc_val", 20, False),
        ("scpnet_cub_train", 312, True),
        ("nus_val", 81, False),
    ],
)
def test_real_lists(name, classes, single):
    names, labels = datasets.positive_list(SAMPLES / f"lists/{name}.head200.txt", classes)
    assert len(names) == 200 == len(set(names)) and all(name.endswith(".jpg") for name in names)
    assert (
        ((labels == POSITIVE).sum(1) == 1).all()
        if single
        else ((labels == POSITIVE).sum(1) >= 1).all()
    )


@samples
def test_real_names():
    assert (
        nuswide.concepts(SAMPLES / "nuswide")[:3] == ["airport", "animal", "beach"]
        and len(nuswide.concepts(SAMPLES / "nuswide")) == 81
    )
    names = [line.split()[1] for line in datasets.read_lines(SAMPLES / "cub/attributes.txt")]
    prompts = [cub.prompt(name) for name in names]
    assert len(prompts) == 312 and prompts[0] == "curved bill" and prompts[6] == "all-purpose bill"
    assert {
        "blue upper",
        "blue under",
        "forked tail tail",
        "large size::large",
        "owl-like shape::owl-like",
    } <= set(prompts)
    assert datasets.read_lines(SAMPLES / "vg200/train_list_500.head200.txt")[0] == "2360596.jpg"


@pytest.mark.parametrize("part, value", (
    ("names", ["dog", "cow"]), ("prompts", ["dog", "kitten"]), ("paths", ["x/a.jpg", "x/c.jpg"]),
    ("labels", np.array([[1, 0], [0, 0]], np.int8)),
    ("truth", np.array([[1, -1], [0, 0]], np.int8))))
def test_a_splits_hash_covers_all_that_a_resumed_run_must_find_again(part, value):
    split = data.Split("s", ["x/a.jpg", "x/b.jpg"], ["dog", "cat"],
                       np.array([[1, 0], [0, 1]], np.int8),
                       truth=np.array([[1, -1], [0, 1]], np.int8))
    moved = dataclasses.replace(split, paths=["elsewhere/a.jpg", "elsewhere/b.jpg"])
    assert moved.info["sha256"] == split.info["sha256"]
    assert dataclasses.replace(split, **{part: value}).info["sha256"] != split.info["sha256"]
