"""Damaged or foreign checkpoints, configs and weights end in one line."""
import shutil

import pytest
import torch
from small_world import one_line, options, run, snapshot, trained, weights, world

import clip
import eval as evaluation
import train
from tools import build
from support import UserError


@pytest.mark.parametrize(
    "change, word",
    [("integers", "int64"), ("sparse", "dense"), ("nan", "finite")],
)
def test_weights_that_are_no_numbers(tmp_path, change, word):
    state = weights()
    name = "visual.conv1.weight"
    value = state[name]
    state[name] = {
        "integers": value.long(),
        "sparse": value.to_sparse(),
        "nan": value * float("nan"),
    }[change]
    torch.save(state, tmp_path / "clip-quickgelu.pt")
    with pytest.raises(UserError, match=word) as error:
        clip.load(tmp_path / "clip-quickgelu.pt")
    assert name in str(error.value)


@pytest.mark.parametrize("content", ("[]", '{"config": []}', '{"config": {}}', "{", ""))
def test_a_damaged_config_is_no_run(trained, tmp_path, capfd, content):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content)
    before = snapshot(tmp_path)
    one_line(train.main, ["--resume", tmp_path / "run"], capfd, "config.json", "restore it")
    one_line(evaluation.main, [tmp_path / "run"], capfd, "config.json", "restore it")
    assert snapshot(tmp_path) == before


def spoil(file, **changes):
    torch.save(torch.load(file, weights_only=True) | changes, file)


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
