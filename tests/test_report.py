"""What a run notes and tells while it trains."""
import json
import sys
from types import ModuleType

import pytest
from small_world import options, run, world

import train
from config import Config
from eval import Predictor, ap_per_category


def test_a_line_holds_rate_gradient_and_ap(world, tmp_path):
    run(world, tmp_path / "run", epochs=2, cache_features=0)
    lines = [json.loads(line) for line in
             (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["lr"] < lines[0]["lr"] and all(line["gradient_norm"] > 0 for line in lines)
    predictor = Predictor(tmp_path / "run", "last")
    split = predictor.splits()["test"]
    ap = 100 * ap_per_category(predictor.probabilities(split), split.truth)
    assert [one is None for one in lines[1]["test"]["AP"]] == (ap != ap).tolist()
    assert [one for one in lines[1]["test"]["AP"] if one is not None] == pytest.approx(
        ap[ap == ap].tolist(), abs=0.01)


def test_epoch_0_tells_what_clip_knows_without_training(world, tmp_path, capsys):
    history = run(world, tmp_path / "run", epochs=2)
    told = next(line for line in capsys.readouterr().out.splitlines() if "epoch   0/2" in line)
    for split in ("val", "test"):
        assert f"{split} mAP {history[0][split]['mAP_zero-shot']:.2f}" in told


def test_the_curves_get_the_weights_of_the_total_and_the_best_epoch(world, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("tools.report.curves", lambda *arguments: given.append(arguments))
    cfg, _ = train.parse(options(world, tmp_path / "run", epochs=2, alpha=2, beta=0.5, gamma=0.25))
    history = train.train(cfg)
    best = max(history, key=lambda line: line["val"]["mAP"])["epoch"]
    assert given == [(history, tmp_path / "run" / "curves.png",
                      {"L_r": 2, "L_KD": 0.5, "L_NCE": 0.25}, best)]


def test_tensorboard_gets_the_numbers_where_it_is_installed(world, tmp_path, monkeypatch):
    noted = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == tmp_path / "run" / "tensorboard"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_scalar(self, name, value, epoch):
            noted.append((name, epoch))

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "tensorboard")
    run(world, tmp_path / "run", epochs=2)
    assert {("L", 1), ("L", 2), ("test/mAP", 2), ("lr", 1)} <= set(noted)


def test_a_data_set_is_known_in_capitals():
    assert Config(data="COCO", root="/x").data == "coco"
    assert train.parse(["--data", "Photos.CSV"])[0].data.endswith("Photos.CSV")


@pytest.mark.parametrize("error", (ImportError("no tensorboard"), TypeError("Descriptors cannot")))
def test_a_tensorboard_that_cannot_be_loaded_stops_no_run(world, tmp_path, monkeypatch, error):
    class Broken:
        def __getattr__(self, _):
            raise error

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken())
    assert len(run(world, tmp_path / "run", epochs=2)) == 2


def test_curves_do_not_depend_on_the_users_matplotlibrc(tmp_path):
    import matplotlib
    from tools.plots import curves

    history = [{"epoch": 1, "stage": 1, "L": 1.0}]
    curves(history, tmp_path / "plain.png", {}, None)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "red"}):
        curves(history, tmp_path / "theirs.png", {}, None)
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "theirs.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
