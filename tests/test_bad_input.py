"""Commands that are slips: a value left empty, an output that is an input, a file cut or edited by
hand, a reader that went away. Each was once silently wrong, destroyed work, or ended in a
traceback. tests/test_bad_data.py has the bad data sets."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import ROOT, command, one_line, options, rows, run, start, weights, world

import clip
import data
from tools import check
import fake_datasets as fake
import eval as evaluation
from clip import features
from support import distributed as ranks
from paper import reproduce
from datasets import scenes
import train
from tools import build
from tools import pretrain
from config import Config
from support import UserError
from support.checkpoint import write_atomically
from support.cli import run_main

posix = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and signals are POSIX's")


@pytest.fixture
def trained(world):
    if not (world / "trained").exists():
        run(world, world / "trained", epochs=2)
    return world / "trained"


@pytest.fixture
def sheet(world, tmp_path):
    """A run on a sheet: (run folder, labels.csv); the photos lie beside the sheet."""
    shutil.copytree(world / "scenes" / "train2014", tmp_path / "photos")
    file, cells = tmp_path / "labels.csv", np.random.RandomState(0).choice(["1", "0", ""], (24, 3))
    file.write_text(
        "image,sun,tree,cup\n"
        + "".join(
            f"photos/{p.name},{','.join(row)}\n"
            for p, row in zip(sorted((tmp_path / "photos").iterdir()), cells)
        )
    )
    run(world, tmp_path / "run", data=file, root=None, ratio=None, epochs=1, val=0.25)
    return tmp_path / "run", file


def snapshot(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- outputs that are inputs
def test_nothing_that_is_there_is_overwritten(sheet, tmp_path, capfd):
    folder, labels = sheet
    (tmp_path / "link.csv").symlink_to(labels)
    (tmp_path / "edited").mkdir()
    photo = sorted((tmp_path / "photos").iterdir())[0]
    (tmp_path / "edited" / f"{photo.stem}.png").write_text("by hand")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(photo)
    before = snapshot(tmp_path)
    for place in (
        labels,
        photo,
        tmp_path / "link.csv",
        folder / "best.pt",
        folder / "config.json",
        tmp_path,
    ):
        one_line(
            evaluation.main,
            [folder, "--suggest", place],
            capfd,
            "--suggest",
            place,
            "is there already",
        )
        one_line(
            evaluation.main,
            [folder, "--image", photo, "--csv", place],
            capfd,
            "--csv",
            place,
            "is there already",
        )
    for images, out in ((photo, "edited"), (tmp_path / "linked", "linked")):
        one_line(
            evaluation.main,
            [folder, "--image", images, "--out", tmp_path / out],
            capfd,
            "--out",
            "is there already",
        )
    assert snapshot(tmp_path) == before
    for _ in range(2):  # RUN/regions is the run's own
        assert command(evaluation.main, [folder, "--image", photo], capfd)[0] == 0
    assert command(evaluation.main, [folder, "--suggest", tmp_path / "s.csv"], capfd)[0] == 0
    (tmp_path / "s.csv").unlink()  # its page is still there
    one_line(
        evaluation.main, [folder, "--suggest", tmp_path / "s.csv"], capfd, "s.html is there already"
    )


def test_a_run_finds_its_data_from_any_folder(sheet, tmp_path, capfd, monkeypatch):
    """Relative names are those of the folder that the training was started in."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(tmp_path)
    config = json.loads((sheet[0] / "config.json").read_text())["config"]
    arguments = [
        word
        for k in ("clip", "size", "epochs", "batch", "workers")
        for word in (f"--{k}", config[k])
    ]
    assert (
        command(
            train.main,
            ["--data", "labels.csv", "--root", ".", *arguments, "--val", 0.25, "--out", "moved"],
            capfd,
        )[0]
        == 0
    )
    shutil.copy("labels.csv", here / "labels.csv")  # not the run's sheet
    (here / "labels.csv").write_text("image,sun,tree,cup\n")
    monkeypatch.chdir(here)
    status, out, _ = command(evaluation.main, [tmp_path / "moved", "--suggest", "s.csv"], capfd)
    assert status == 0 and len((here / "s.csv").read_text().splitlines()) > 3
    assert command(train.main, ["--resume", tmp_path / "moved"], capfd)[0] == 0


def test_a_place_for_no_file_is_told_before_the_work(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(evaluation.Predictor, "splits", None)  # not reached
    one_line(
        evaluation.main,
        [trained, "--suggest", tmp_path / "none" / "s.csv"],
        capfd,
        "--suggest",
        "folder is missing",
    )
    one_line(
        evaluation.main, [trained, "--suggest", "x" * 300], capfd, "too long", "check path"
    )
    one_line(
        evaluation.main,
        [
            trained,
            "--image",
            sorted(trained.parent.glob("scenes/val2014/*"))[0],
            "--csv",
            tmp_path / "none" / "s.csv",
        ],
        capfd,
        "--csv",
        "folder is missing",
    )


@posix
def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            write_atomically(place, "text")
    assert (tmp_path / "pipe").is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


# ---- options and their values
@pytest.mark.parametrize(
    "main, arguments",
    [
        (train.main, ["--resume", ""]),
        (train.main, ["--root="]),
        (train.main, ["--data", ""]),
        (evaluation.main, [""]),
        (evaluation.main, ["x", "--image", ""]),
        (reproduce.main, ["--table", 3, "--rows", ""]),
    ],
)
def test_an_empty_value_is_refused(main, arguments, capfd):
    """--resume "$RUN" without a RUN would start a default training."""
    one_line(main, arguments, capfd, "empty")


@pytest.mark.parametrize(
    "main, arguments, words",
    [
        (train.main, ["--epochs", 10**30], ["--epochs", "up to"]),
        (train.main, ["--queue", 2**40], ["--queue", "up to"]),
        (train.main, ["--workers", 5000], ["--workers", "1000"]),
        (train.main, ["--val", "x.csv"], ["val", "x.csv"]),
        (evaluation.main, ["x", "--image", "a", "--top", 0], ["--top", "from 1"]),
        (evaluation.main, ["x", "--image", "a", "--workers", -1], ["--workers"]),
        (evaluation.main, ["x", "--csv", "all.csv"], ["--csv", "--image"]),
        (evaluation.main, ["x", "--out", "d"], ["--out", "--image"]),
        (reproduce.main, ["--table", 3, "--ratio=0.3"], ["--ratio", "drop it"]),
        (reproduce.main, ["--table", 3, "--without", "kd"], ["--without"]),
        (reproduce.main, ["--table", 3, "--seeds", 0], ["--seeds"]),
        (reproduce.main, ["--table", 3, "--ratios", 0.501, 0.504], ["--ratios", "0.501 0.504"]),
        (reproduce.main, ["--table", 3, "--ratios", 0.5, 0.5], ["--ratios"]),
        (reproduce.main, ["--table", 3, "--resume=x"], ["--resume"]),
    ],
)
def test_a_value_that_cannot_be_is_refused(world, tmp_path, main, arguments, words, capfd):
    more = {
        train.main: options(world, tmp_path / "run")[2:],
        reproduce.main: ["--root", world / "scenes", "--out", tmp_path],
    }.get(main, [])
    one_line(main, [*more, *arguments], capfd, *words)


def test_clip_of_table_2_is_the_one_that_is_given(tmp_path):
    parsed = [
        reproduce.parse(["--table", "2", "--data", "coco", "--root", str(tmp_path), *given])[1].clip
        for given in ([], ["--clip", "RN101"], ["--clip=RN101"])
    ]
    assert parsed == ["RN50", "RN101", "RN101"]


@pytest.mark.parametrize("val", ("none", "of unknowns", "of negatives"))
def test_without_a_validation_that_can_judge_the_last_epoch_is_taken(
    sheet, world, tmp_path, capfd, val
):
    lines = sheet[1].read_text().splitlines()
    held = fake.load(sheet[1], val=0.25)[1].listed
    for i, line in enumerate(lines):
        if val != "none" and line.split(",")[0] in held:
            lines[i] = line.split(",")[0] + (",0,0,0" if val == "of negatives" else ",,,")
    sheet[1].write_text("\n".join(lines))
    run(
        world,
        tmp_path / "r",
        data=sheet[1],
        root=None,
        ratio=None,
        epochs=3,
        val=0 if val == "none" else 0.25,
    )
    assert "no best epoch" in capfd.readouterr().out and not (tmp_path / "r" / "best.pt").exists()
    assert evaluation.Predictor(tmp_path / "r").epoch == 3
    one_line(
        evaluation.main,
        [tmp_path / "r", "--suggest", tmp_path / "s.csv", "--checkpoint", "best"],
        capfd,
        "use last",
    )


@pytest.mark.parametrize(
    "name, value", [("WORLD_SIZE", "2"), ("WORLD_SIZE", "two"), ("LOCAL_RANK", "abc")]
)
def test_torchruns_variables_without_torchrun(world, tmp_path, capfd, monkeypatch, name, value):
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    if name == "LOCAL_RANK":  # it means nothing to a single process
        assert command(train.main, options(world, tmp_path / "run", epochs=1), capfd)[0] == 0
    else:
        one_line(train.main, options(world, tmp_path / "run"), capfd, "torchrun", "WORLD_SIZE")


@pytest.mark.parametrize("change, word", (("reordered", "another order"), ("renamed", "mug")))
def test_a_run_is_not_scored_against_other_categories(sheet, tmp_path, capfd, change, word):
    folder, file = sheet
    lines = [line.split(",") for line in file.read_text().splitlines()]
    if change == "reordered":
        lines = [[line[0], line[2], line[1], line[3]] for line in lines]
    else:
        lines[0][3] = "mug"
    file.write_text("\n".join(map(",".join, lines)))
    one_line(evaluation.main, [folder, "--split", "val"], capfd, "categories", word)
    one_line(evaluation.main, [folder, "--suggest", tmp_path / "s.csv"], capfd, "categories", word)
    assert not (tmp_path / "s.csv").exists()


def test_rows_that_forget_the_header_or_the_image(tmp_path):
    for name in "abc":
        Image.new("RGB", (40, 30)).save(tmp_path / f"{name}.png")
    file = tmp_path / "x.csv"
    file.write_text("a.png,1,0\nb.png,0,1\n")
    with pytest.raises(UserError, match="x.csv:1: expected a header"):
        fake.load(file)
    file.write_text("image,cup,sun\n,1,0\nb.png,0,1\n")  # once read as the row of prompts
    with pytest.raises(UserError, match="x.csv:2: no image name"):
        fake.load(file)
    file.write_text("image,cup,sun\n#prompt,a cup,the sun\nb.png,0,1\na.png,1,0\n")
    assert fake.load(file, val=0.0)[0].prompts == ["a cup", "the sun"]


@posix
def test_one_image_under_two_paths_is_one_image(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to("real")
    Image.new("RGB", (40, 30)).save(tmp_path / "real" / "a.png")
    (tmp_path / "x.csv").write_text(f"image,cup\na.png,1\n{tmp_path / 'real' / 'a.png'},0\n")
    monkeypatch.chdir(tmp_path)
    for root in ("real", "linked", tmp_path / "linked"):
        with pytest.raises(UserError, match="x.csv:3: .* already on line 2"):
            fake.load("x.csv", root)
    (tmp_path / "real" / "link.png").symlink_to("a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "real" / "b.png")
    (tmp_path / "x.csv").write_text("image,cup\na.png,1\nlink.png,0\n")
    with pytest.raises(UserError, match="x.csv:3: link.png is already on line 2"):
        fake.load("x.csv", "real")
    (tmp_path / "x.csv").write_text("image,cup\na.png,1\nb.png,0\n")
    (tmp_path / "val.csv").write_text("image,cup\nlink.png,1\n")
    with pytest.raises(UserError, match="keep them apart"):
        fake.load("x.csv", "real", val="val.csv")


@pytest.mark.parametrize("content", ("object", "text", "huge", "1e400", "zip", "two"))
def test_odd_mask_files(world, tmp_path, content):
    file = tmp_path / (
        "mask.txt"
        if content in ("huge", "1e400")
        else "mask.npz"
        if content in ("zip", "two")
        else "mask.npy"
    )
    if content in ("huge", "1e400"):
        file.write_text("99999999999999999999999 1\n" if content == "huge" else "1e400 1\n")
    elif content == "zip":
        file.write_bytes(b"PK\x03\x04 no archive")
    elif content == "two":
        np.savez(file, a=np.ones((24, 28)), b=np.ones((24, 28)))
    else:
        np.save(
            file, np.array([["a", "b"]]) if content == "text" else np.array([{}]), allow_pickle=True
        )
    with pytest.raises(UserError, match="mask") as error:
        fake.load("scenes", world / "scenes", mask=file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_captions_that_cannot_be_searched(world, tmp_path):
    file = tmp_path / "captions.json"
    file.write_text("[" * 100000)
    with pytest.raises(UserError, match="not valid JSON"):
        fake.captions(file, "cup")
    shutil.copy(world / "scenes" / "annotations" / "captions_train2014.json", file)
    with pytest.raises(UserError, match="猫.*rename"):
        fake.captions(file, "cup", "猫")


# ---- damaged files
@pytest.mark.parametrize(
    "change, word",
    [("integers", "int64"), ("sparse", "dense"), ("nan", "finite"), ("key", "missing|Missing")],
)
def test_weights_that_are_no_numbers(tmp_path, change, word):
    state = weights()
    name = "visual.conv1.weight"
    value = state.pop(name)
    state[7 if change == "key" else name] = {
        "integers": value.long(),
        "sparse": value.to_sparse(),
        "nan": value * float("nan"),
        "key": value,
    }[change]
    torch.save(state, tmp_path / "clip-quickgelu.pt")
    with pytest.raises(UserError, match=word) as error:
        clip.load(tmp_path / "clip-quickgelu.pt")
    assert name in str(error.value)


@pytest.mark.parametrize("content", ('{"config": {}}', "[]", '{"config": []}', "{", ""))
def test_an_empty_config_is_no_default_run(trained, tmp_path, capfd, content):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    before = snapshot(tmp_path)
    one_line(train.main, ["--resume", tmp_path / "run"], capfd, "config.json", "restore it")
    assert snapshot(tmp_path) == before


def spoil(file, **changes):
    torch.save(torch.load(file, weights_only=True) | changes, file)


@pytest.mark.parametrize(
    "part, value",
    [
        ("model", {}),
        ("model", 7),
        ("memory", {}),
        ("optimizer", {}),
        ("scheduler", None),
        ("history", "{"),
        ("history", "[]"),
        ("history", "[1, 2]"),
        ("epoch", "two"),
        ("best", {"epoch": 77}),
        ("best", 5),
        ("best", {"epoch": 1}),
        ("best", {"epoch": 1, "mAP": "9"}),
        ("scheduler", {}),
        ("scheduler", {"last_epoch": 5000}),
        ("scheduler", {"total_steps": 3}),
        ("config", "[]"),
        ("clip_sha256", "0" * 64),
        ("names", ["x", *"abcdefghijklmnopqrstuvwxyz1"]),
    ],
)
def test_parts_of_a_checkpoint_that_do_not_fit_are_not_resumed(
    world, trained, tmp_path, capfd, part, value
):
    shutil.copytree(trained, tmp_path / "run")
    if part == "scheduler" and value:
        value = torch.load(tmp_path / "run" / "last.pt", weights_only=True)[part] | value
    spoil(tmp_path / "run" / "last.pt", **{part: value})
    before = snapshot(tmp_path)
    one_line(train.main, ["--resume", tmp_path / "run"], capfd, "last.pt", "restore it")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "part, value",
    [
        ("model", 7),
        ("g_pos", [1] * 28),
        ("g_neg", torch.zeros(28, 3)),
        ("threshold", ["a"] * 28),
        ("threshold", [[0.5, 0.5]] * 28),
        ("config", "[]"),
        ("threshold", [float("nan")] * 28),
        ("g_pos", torch.full((28, 24), torch.nan)),
        ("clip_sha256", None),
        ("names", list(range(28))),
        ("names", ["a"] * 28),
        ("names", 5),
        ("config", 5),
        ("g_pos", torch.zeros(28, 24, dtype=torch.int64)),
    ],
)
def test_parts_of_a_checkpoint_that_do_not_fit_are_not_evaluated(
    trained, tmp_path, capfd, part, value
):
    shutil.copytree(trained, tmp_path / "run")
    spoil(tmp_path / "run" / "best.pt", **{part: value})
    one_line(evaluation.main, [tmp_path / "run"], capfd, "best.pt")


@pytest.mark.parametrize("change", ("empty", "number", "shape", "gone"))
def test_a_frozen_region_module_that_does_not_fit(
    world, trained, tmp_path, capfd, change, monkeypatch
):
    shutil.copytree(trained, tmp_path / "source")
    file = tmp_path / "source" / "last.pt"
    model = torch.load(file, weights_only=True)["model"]
    if change == "gone":
        file.unlink()
    else:
        spoil(
            file,
            model={
                "empty": {},
                "number": 7,
                "shape": {k: v[:1] if k.startswith("carl.") else v for k, v in model.items()},
            }[change],
        )
    monkeypatch.setattr(build, "FeatureLoader", None)  # told before anything is decoded
    one_line(
        train.main, options(world, tmp_path / "run", carl_from=tmp_path / "source"), capfd, "source"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_frozen_region_module_goes_on_without_its_source(
    world, trained, tmp_path, capfd
):
    shutil.copytree(trained, tmp_path / "source")
    run(world, tmp_path / "run", epochs=1, carl_from=tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    assert command(train.main, ["--resume", tmp_path / "run"], capfd)[0] == 0


def test_a_name_too_long_for_clip_is_told_before_the_images_are_decoded(
    world, tmp_path, capfd, monkeypatch
):
    names = json.loads((world / "scenes/annotations/instances_train2014.json").read_text())[
        "categories"
    ]
    (tmp_path / "names.txt").write_text(
        "\n".join(" ".join("abcdefghijklmnopqrstuvwxyz") + str(i) for i, _ in enumerate(names))
    )
    monkeypatch.setattr(build, "FeatureLoader", None)
    one_line(
        train.main, options(world, tmp_path / "run", names=tmp_path / "names.txt"), capfd, "tokens"
    )


# ---- names and terminals
@posix
def test_names_that_a_picture_or_a_terminal_cannot_show(trained, tmp_path):
    photo = sorted((trained.parent / "scenes" / "val2014").iterdir())[0]
    (tmp_path / "p").mkdir()
    for name in ("two\nlines.jpg", "猫.jpg", os.fsdecode(b"caf\xe9.jpg")):
        shutil.copy(photo, tmp_path / "p" / name)
    arguments = [
        "eval.py",
        trained,
        "--image",
        tmp_path / "p",
        "--out",
        tmp_path / "out",
        "--csv",
        tmp_path / "all.csv",
    ]
    for encoding in ("ascii", "utf-8"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "all.csv").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert done.returncode == 0 and done.stderr == b"", done.stderr
        assert (
            len(list((tmp_path / "out").iterdir())) == 3
            and b"caf\xe9.jpg" in (tmp_path / "all.csv").read_bytes()
        )


@posix
def test_what_lies_among_photos_costs_only_itself(trained, tmp_path, capfd):
    photo = sorted((trained.parent / "scenes" / "val2014").iterdir())[0]
    (tmp_path / "p" / "folder.jpg").mkdir(parents=True)
    (tmp_path / "p" / "broken.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "p" / "pipe.jpg")
    for name in ("a" * 251 + ".jpg", "猫" * 83 + ".jpg", "b.jpg"):
        shutil.copy(photo, tmp_path / "p" / name)
    status, out, err = command(
        evaluation.main, [trained, "--image", tmp_path / "p", "--out", tmp_path / "out"], capfd
    )
    assert status == 0 and len(out) == 4 and len(list((tmp_path / "out").iterdir())) == 3
    assert (
        len(err) == 1
        and "2 of 5 files are no readable images" in err[0]
        and "broken.jpg" in err[0]
        and "pipe.jpg" in err[0]
    )


@posix
def test_a_reader_that_goes_away_and_a_closed_stderr(trained, tmp_path):
    photos, pictures = trained.parent / "scenes" / "val2014", tmp_path / "out"
    first = start(
        "eval.py", trained, "--image", photos, "--out", pictures, "--pictures", 0, "--batch", 1
    )
    assert first.stdout.readline().startswith("probabilities")
    first.stdout.close()  # as `| head -1`
    assert first.stderr.read() == "" and first.wait() == 141


@posix
def test_a_photo_of_a_hundred_megapixels_is_a_photo(trained, tmp_path, capfd):
    Image.new("RGB", (10000, 9500)).save(tmp_path / "large.png")
    done = subprocess.run(
        [
            sys.executable,
            "eval.py",
            trained,
            "--image",
            tmp_path / "large.png",
            "--out",
            tmp_path / "o",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr == "" and "large.png" in done.stdout


# ---- the commands beside the main ones
@pytest.mark.parametrize(
    "words, told",
    [
        ([scenes.main, "--train", "x"], "--train"),
        ([scenes.main, "--train", "0"], "at least 1 image"),
        ([scenes.main, "--workers", "0"], "workers"),
        ([scenes.main, "--tarin", "5"], "--train"),
        ([scenes.main, "--seed", "-1"], "seed"),
        ([scenes.main, "--root", "README.md"], "README.md"),
        ([check.main], "data"),
        ([check.main, "coco", "--rot", "x"], "--root"),
        ([check.main, "x.csv"], "x.csv"),
        ([check.main, "vg200", "--objects", "x.json"], "--root"),
        ([pretrain.main, "--epochs", "5"], "--epochs"),
    ],
)
def test_a_wrong_call_of_a_side_command_is_one_line(words, told, capfd, monkeypatch):
    main, *arguments = words
    monkeypatch.chdir(ROOT)
    one_line(main, arguments, capfd, told)


def test_scenes_beside_a_broken_note_are_left_alone(tmp_path):
    (tmp_path / "scenes.json").write_text("{")
    done = subprocess.run(
        [sys.executable, "scenes.py", "--root", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and (tmp_path / "scenes.json").read_text() == "{"
    )


def test_a_run_that_began_while_another_one_decoded_is_not_overwritten(world, tmp_path, capfd):
    def slow(split, *arguments, **options):
        if not (tmp_path / "run").exists():
            with mock.patch.object(build, "FeatureLoader", features.FeatureLoader):
                run(world, tmp_path / "run", epochs=2)
        return features.FeatureLoader(split, *arguments, **options)

    with mock.patch.object(build, "FeatureLoader", slow):
        one_line(
            train.main,
            options(world, tmp_path / "run", epochs=1, seed=9),
            capfd,
            "holds a run already",
        )
    assert len(rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("left", ("last.pt", "best.pt", "metrics.jsonl"))
def test_a_folder_that_lost_its_config_is_not_trained_into(world, trained, tmp_path, capfd, left):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / left, tmp_path / "run")
    one_line(train.main, options(world, tmp_path / "run"), capfd, "holds a run already")
    assert snapshot(tmp_path / "run") == {tmp_path / "run" / left: (trained / left).read_bytes()}


@pytest.mark.parametrize(
    "old, new",
    (("image,sun,tree", "image,tree,sun"), ("cup", "mug"), ("cup\n", "cup\n#prompt,a,b,c\n")),
)
def test_a_sheet_whose_words_changed_is_not_resumed(sheet, capfd, old, new):
    folder, file = sheet
    file.write_text(file.read_text().replace(old, new, 1))
    one_line(train.main, ["--resume", folder], capfd, "begun on other data")


def test_data_that_moved_are_resumed_with_root(world, tmp_path, capfd):
    shutil.copytree(world / "scenes", tmp_path / "old")
    run(world, tmp_path / "run", epochs=1, root=tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    one_line(train.main, ["--resume", tmp_path / "run"], capfd, "--root")
    assert (
        command(train.main, ["--resume", tmp_path / "run", "--root", tmp_path / "new"], capfd)[0]
        == 0
    )


def test_activations_of_one_file_do_not_share_features(world):
    file = next(world.glob("*.safetensors"))
    shutil.copy(file, world / "untold.pt")
    told, other = (clip.load(world / "untold.pt", activation=a) for a in ("quickgelu", "gelu"))
    assert told.sha256 != other.sha256 and clip.load(file).sha256 == clip.weights.sha256(file)


def test_zero_is_a_value_of_table_2(tmp_path):
    parsed = [
        reproduce.parse(["--table", "2", *given])[1].assume_negative
        for given in ([], ["--assume-negative", "0"])
    ]
    assert parsed == [0.3, 0.0]


def test_a_rank_without_an_image_leaves_the_scores_to_the_others(monkeypatch):
    parts = [{"region": np.zeros((1, 3))}, {"region": np.ones((1, 3))}, {}]
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(
        ranks.dist, "all_gather_object", lambda into, _: into.__setitem__(slice(None), parts)
    )
    assert ranks.gather_scores({}, 2, 6)["region"].tolist() == [[0, 0, 0], [1, 1, 1]]


@posix
@pytest.mark.parametrize("delay", (0.02, 0.06, 0.1, 0.15, 0.22))
def test_ctrl_c_while_loader_processes_begin(world, tmp_path, delay):
    arguments = options(world, tmp_path / "run", workers=2, cache_features=0, epochs=500)
    at_work = start("train.py", *arguments, start_new_session=True)
    assert at_work.stdout.readline()  # the line before the first epoch
    time.sleep(delay)
    os.killpg(at_work.pid, signal.SIGINT)
    out, err = at_work.communicate(timeout=60)
    assert at_work.returncode == 130 and "stopped; last.pt holds what was finished" in err, err


@pytest.mark.parametrize("name", ("curves.png", "regions.png"))
def test_pictures_in_a_new_run_folder_are_not_overwritten(world, tmp_path, capfd, name):
    (tmp_path / name).write_text("by hand")
    one_line(train.main, options(world, tmp_path), capfd, "holds a run already")
    assert (tmp_path / name).read_text() == "by hand"
