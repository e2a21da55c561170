"""A run folder: what is there is never overwritten; where its data lie may change, the data not."""
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from small_world import (command, one_line, options, posix, rows,
                         run, sheet, snapshot, trained, world, weights)

import clip
import eval as evaluation
from clip import features
import train
from config import Config
from support.checkpoint import new_run
from tools import build


def test_nothing_that_is_there_is_overwritten(sheet, tmp_path, capfd):
    folder, labels = sheet
    (tmp_path / "link.csv").symlink_to(labels)
    (tmp_path / "edited").mkdir()
    photo = sorted((tmp_path / "photos").iterdir())[0]
    (tmp_path / "edited" / f"{photo.stem}-1.png").write_text("by hand")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a-1.png").symlink_to(photo)
    (tmp_path / "a.png").symlink_to(photo)
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
    for image, out in ((photo, "edited"), (tmp_path / "a.png", "linked")):
        one_line(
            evaluation.main,
            [folder, "--image", image, "--out", tmp_path / out],
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


def test_a_run_with_a_frozen_region_module_goes_on_without_its_source(
    world, trained, tmp_path, capfd
):
    shutil.copytree(trained, tmp_path / "source")
    run(world, tmp_path / "run", epochs=1, carl_from=tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    assert command(train.main, ["--resume", tmp_path / "run"], capfd)[0] == 0


def test_runs_without_a_folder_of_their_own_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = Config(data="coco", ratio=0.3)
    for name in ("coco-0.3-carl-seed0", "coco-0.3-carl-seed0-2", "coco-0.3-carl-seed0-3"):
        found = new_run(cfg)
        assert found == Path("runs", name)
        found.mkdir(parents=True)
        (found / "best.pt").touch()


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


@pytest.mark.parametrize("name", ("curves.png", "regions.png"))
def test_pictures_in_a_new_run_folder_are_not_overwritten(world, tmp_path, capfd, name):
    (tmp_path / name).write_text("by hand")
    one_line(train.main, options(world, tmp_path), capfd, "holds a run already")
    assert (tmp_path / name).read_text() == "by hand"


def test_other_weights_are_not_resumed(world, trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "run")
    state = {name: value + 1e-3 if name == "logit_scale" else value
             for name, value in weights().items()}
    save_file(state, tmp_path / "other-quickgelu.safetensors")
    one_line(train.main, ["--resume", tmp_path / "run", "--clip",
                          tmp_path / "other-quickgelu.safetensors"], capfd,
             "was begun on other CLIP weights: give --clip the same file")
    assert snapshot(tmp_path / "run") == {tmp_path / "run" / file.relative_to(trained): content
                                          for file, content in snapshot(trained).items()}


def test_the_same_sheet_under_another_name_is_the_same_data(sheet, tmp_path, capfd):
    folder, labels = sheet
    labels.rename(tmp_path / "renamed.csv")
    there = ["--data", tmp_path / "renamed.csv"]
    status, _, err = command(evaluation.main, [folder, *there], capfd)
    assert status == 0 and not err
    assert command(train.main, ["--resume", folder, *there], capfd)[0] == 0
    lines = (tmp_path / "renamed.csv").read_text().splitlines()
    (tmp_path / "renamed.csv").write_text("\n".join(lines[:-1]))
    assert "other names, prompts" in command(evaluation.main, [folder, *there], capfd)[2][0]
    one_line(train.main, ["--resume", folder, *there], capfd, "was begun on other data")


def test_the_same_weights_under_another_name_need_no_activation(world, tmp_path, capfd):
    shutil.copy(world / "clip-quickgelu.safetensors", tmp_path / "my-quickgelu.safetensors")
    run(world, tmp_path / "run", epochs=1, clip=tmp_path / "my-quickgelu.safetensors")
    (tmp_path / "my-quickgelu.safetensors").rename(tmp_path / "other.safetensors")
    there = ["--clip", tmp_path / "other.safetensors"]
    assert command(evaluation.main, [tmp_path / "run", *there], capfd)[0] == 0
    assert command(train.main, ["--resume", tmp_path / "run", *there], capfd)[0] == 0


def test_a_folder_that_holds_data_and_run_may_be_moved(sheet, tmp_path, capfd, monkeypatch):
    folder, _ = sheet
    (tmp_path / "new").mkdir()
    for name in ("run", "labels.csv", "photos"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    monkeypatch.chdir(tmp_path / "new")
    status, _, err = command(evaluation.main, ["run"], capfd)
    assert status == 0 and not err
    assert command(train.main, ["--resume", "run"], capfd)[0] == 0
    (tmp_path / "new" / "labels.csv").rename(tmp_path / "other.csv")
    one_line(evaluation.main, ["run"], capfd, "labels.csv", "cannot be read")
