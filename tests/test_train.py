"""train.py end to end on a small world: the loss falls, resuming is bit-exact, wrong settings and
files end in one line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from kill_train import same_run
from PIL import Image
from safetensors.torch import load_file, save_file
from small_world import (ROOT, command, one_line, options, rows, run, sheet, start, timeless,
                         trained, world)

import train
from support.checkpoint import read_checkpoint


@pytest.fixture
def whole(world):
    """An uninterrupted run of four epochs that decodes its images every time, made once."""
    if not (world / "whole").exists():
        run(world, world / "whole", epochs=4, cache_features=0, augment="taidpt")
    return world / "whole"


def test_from_scratch_the_loss_falls_and_every_term_is_finite(world, tmp_path):
    history = run(world, tmp_path / "run", epochs=11, lr=2e-3, ratio=1.0)
    assert rows(tmp_path / "run") == timeless(history)
    assert [line["epoch"] for line in history] == list(range(1, 12))
    assert [line["stage"] for line in history] == [1] * 4 + [2] * 7  # a third, to the nearest
    for line in history:
        terms = {name: value for name, value in line.items() if name.startswith("L")}
        assert set(terms) == {"L", "L_r", "L_q", "L_KD"} | (
            {"L_NCE"} if line["stage"] == 2 else set()
        )
        assert all(math.isfinite(value) for value in terms.values())
        # Eq. 15
        want = terms["L_q"] + terms["L_r"] + 0.05 * terms["L_KD"] + 0.01 * terms.get("L_NCE", 0)
        assert terms["L"] == pytest.approx(want, abs=1e-4)
    assert (
        history[-1]["L_r"] < 0.75 * history[0]["L_r"]
        and history[-1]["L_q"] < 0.75 * history[0]["L_q"]
    )
    assert history[-1]["L_NCE"] < history[4]["L_NCE"]
    folder = tmp_path / "run"
    assert {"config.json", "metrics.jsonl", "last.pt", "best.pt", "regions.png"} <= {
        p.name for p in folder.iterdir()
    }
    assert not list(folder.glob("*.tmp")) and Image.open(folder / "regions.png").size[0] > 700
    best = max(history, key=lambda line: line["val"]["mAP"])
    assert (
        read_checkpoint(folder / "best.pt")["epoch"] == best["epoch"]
        and read_checkpoint(folder / "last.pt")["epoch"] == 11
    )


def test_the_rate_that_is_told_is_that_of_the_last_step(world, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(train, "update", lambda state, *rest, update=train.update: (
        used.append(state.optimizer.param_groups[0]["lr"]), update(state, *rest))[1])
    history = run(world, tmp_path / "run")
    assert [line["lr"] for line in history] == used[2::3]  # three steps an epoch


def test_a_run_of_one_step_has_a_rate(world, tmp_path):
    """OneCycleLR's only step of one would be its last, at a millionth of the rate."""
    line, = run(world, tmp_path / "run", epochs=1, batch=1000, lr=1e-3)
    assert line["lr"] > 5e-4


def test_the_curves_draw_the_terms_of_the_total_and_mark_stage_two_and_the_best_epoch(
        world, whole, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    from tools.plots import curves
    history = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    drawn = {}
    axvline, plot = Axes.axvline, Axes.plot
    monkeypatch.setattr(Axes, "axvline", lambda axis, x, **how: drawn.update({how["label"]: x})
                        or axvline(axis, x, **how))
    monkeypatch.setattr(Axes, "plot", lambda axis, x, y, style, label, **how:
                        drawn.update({label: y}) or plot(axis, x, y, style, label=label, **how))
    curves(history, tmp_path / "curves.png", dict(L_r=1.0, L_KD=0.05, L_NCE=0.01), best=2)
    last = sum(drawn[name][-1] for name in ("L_q", "L_r", "0.05 L_KD", "0.01 L_NCE"))
    assert last == pytest.approx(drawn["L"][-1], abs=1e-4)  # what is drawn sums to the total
    first = next(line["epoch"] for line in history if line["stage"] == 2)
    assert first == 2  # a third of four epochs is one
    assert drawn["val mean"] == tuple(line["val"]["mAP_mean"] for line in history)
    assert drawn["stage two"] == first - 0.5 and drawn["best epoch 2"] == 2
    assert Image.open(tmp_path / "curves.png").size[0] > 500
    drawn.clear()
    curves(history[:first - 1], tmp_path / "without.png", dict(L_KD=0.0), best=None)
    assert "L_q" in drawn and not any(word in name for name in drawn
                                      for word in ("L_KD", "stage two", "best"))


def test_the_backend_of_a_notebook_does_not_stop_a_run_that_it_starts(tmp_path):
    pytest.importorskip("matplotlib")
    backend = os.environ | {"MPLBACKEND": "module://of.a.notebook"}
    code = ("from pathlib import Path; from tools.plots import two_axes\n"
            f"with two_axes(Path({str(tmp_path)!r}, 'curves.png'), 1, 1, 100): pass")
    subprocess.run([sys.executable, "-c", code],
                   cwd=ROOT, env=backend, check=True)


@pytest.mark.parametrize(
    "changes",
    [
        dict(matching="dualcoop"),
        dict(matching="average"),
        dict(matching="global"),
        dict(without="kd,mmcl"),
        dict(without="mmcp"),
        dict(without="visual"),
        dict(queries="text", kd="bernoulli", score="mean"),
        dict(ratio=None, single_positive="largeloss"),
        dict(eval_every=2, stage_one=0, batch=24),
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_baseline_and_switch_trains(world, tmp_path, changes):
    history = run(world, tmp_path / "run", **{"epochs": 2} | changes)
    assert (
        len(history) == 2
        and all(math.isfinite(line["L"]) for line in history)
        and 0 < history[-1]["test"]["mAP"] <= 100
    )


def test_one_image_one_step_one_epoch(world, tmp_path):
    history = run(world, tmp_path / "run", epochs=1, train_images=1, ratio=1.0)
    assert math.isfinite(history[0]["L"])


# ---- resuming
def test_two_runs_of_one_seed_are_equal_and_workers_do_not_matter(world, whole, tmp_path):
    run(world, tmp_path / "again", epochs=4, cache_features=0, augment="taidpt", workers=2)
    assert rows(whole) == rows(tmp_path / "again")
    a, b = read_checkpoint(whole / "last.pt"), read_checkpoint(tmp_path / "again" / "last.pt")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    run(world, tmp_path / "other", epochs=1, cache_features=0, augment="taidpt", seed=1)
    assert rows(tmp_path / "other")[0]["L"] != rows(whole)[0]["L"]


@pytest.mark.parametrize("epoch", (1, 3))
def test_resuming_is_bit_exact(world, whole, tmp_path, monkeypatch, epoch):
    """Stopped in the middle of an epoch, stage one and stage two; a clock that jumps back changes
    nothing."""
    step, seen = train.training_step, []

    def stop(*arguments):
        seen.append(1)
        if len(seen) == 3 * epoch + 2:  # three steps an epoch
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", stop)
        assert (
            train.main(
                options(world, tmp_path / "run", epochs=4, cache_features=0, augment="taidpt")
            )
            == 130
        )
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == epoch
    monkeypatch.setattr(time, "time", lambda: 1.0)  # 1970
    monkeypatch.setattr("tools.report.curves", lambda *_: None)
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    same_run(whole, tmp_path / "run")


def test_resuming_a_finished_or_an_unbegun_run(world, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.report.curves", lambda *_: None)
    shutil.copytree(whole, tmp_path / "done")
    (tmp_path / "done" / "metrics.jsonl").unlink()  # a kill between last.pt and metrics.jsonl
    assert train.main(["--resume", str(tmp_path / "done")]) == 0
    same_run(whole, tmp_path / "done")
    (tmp_path / "begun").mkdir()
    shutil.copy(whole / "config.json", tmp_path / "begun")
    assert train.main(["--resume", str(tmp_path / "begun")]) == 0
    same_run(whole, tmp_path / "begun")


@pytest.mark.parametrize("rows, batch", ((10, 16), (150, 18), (800, 100), (5000, 128)))
def test_a_sheet_brings_its_recipe(tmp_path, rows, batch):
    (tmp_path / "photos.csv").write_text("image,dog\n" + "a.jpg,1\n" * (rows - 1))
    cfg, _ = train.parse(["--data", str(tmp_path / "photos.csv")])
    assert cfg.batch == batch and cfg.score == "mixed" and cfg.cache_features == 2
    cfg, _ = train.parse(["--data", str(tmp_path / "photos.csv"), "--batch", "7"])
    assert cfg.batch == 7


@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_ctrl_c_and_sigterm_leave_a_checkpoint_and_one_sentence(world, tmp_path, sent):
    process = start("train.py", *options(world, tmp_path / "run", epochs=500))
    while not (tmp_path / "run" / "last.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines() == [
        "stopped; if the run had begun, --resume RUN goes on after its last finished epoch"
    ]
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] >= 1


def test_a_notebook_whose_call_failed_goes_on(world, tmp_path):
    """It keeps the traceback, and with it the frame and the lock of the run."""
    def fail(state, line):
        raise KeyError("mine")

    cfg, _ = train.parse(options(world, tmp_path / "run", epochs=2))
    with pytest.raises(KeyError) as kept:
        train.train(cfg, on_epoch=fail)
    assert len(train.train(cfg, resume=tmp_path / "run")) == 2 and kept


def test_pseudo_labels_are_counted_against_the_hidden_truth():
    """Two batches by hand: 1 of 3 positives given is wrong, the negative is right."""
    cells = lambda *rows: torch.tensor(rows, dtype=torch.int8)
    # right, wrong, missed; known
    count = train.count_pseudo(cells([1, 1, 0, 0]), cells([0, 0, 0, 1]), cells([1, -1, 1, 1]))
    # right, right, nobody knows; known
    count += train.count_pseudo(cells([1, -1, 1, 0]), cells([0, 0, 0, -1]), cells([1, -1, 0, -1]))
    assert train.pseudo_numbers(count) == dict(
        pseudo_pos=3,
        pseudo_pos_precision=66.67,
        pseudo_neg=1,
        pseudo_neg_precision=100.0,
    )
    assert train.pseudo_numbers(count * 0) == {}


# ---- refusals
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(gama=1), ["--gama", "did you mean --gamma?"]),
        (dict(ratio=0), ["--ratio", "above 0 up to 1", "got 0"]),
        (dict(ratio=1.5), ["--ratio", "1.5"]),
        (dict(ratio=-0.1), ["--ratio"]),
        (dict(ratio="nan"), ["--ratio", "nan"]),
        (dict(ratio="most"), ["--ratio", "most"]),
        (dict(epochs=0), ["--epochs expects a number from 1 up to 2147483648, got 0"]),
        (dict(epochs=2.5), ["--epochs", "2.5"]),
        (dict(lr=0), ["--lr expects a number above 0"]),
        (dict(lr="inf"), ["--lr"]),
        (dict(batch=0), ["--batch"]),
        (dict(size=16), ["--size"]),
        (dict(data="cocoo"), ["cocoo", "expected scenes, coco"]),
        (dict(data="coco", root=None), ["--root"]),
        (dict(data="sheet.csv", root=None, ratio=None), ["sheet.csv"]),
        (dict(root="nowhere"), ["nowhere", "--root"]),
        (dict(matching="carls"), ["--matching expects one of carl"]),
        (dict(without="kd,mcl"), ["--without", "mcl"]),
        (dict(without="visual,text"), ["mmcp"]),
        (dict(clip="RN102"), ["RN102", "tiny"]),
        (dict(clip="nowhere.pt"), ["nowhere.pt"]),
        (dict(single_positive="largeloss"), ["--single-positive", "--ratio"]),
        (dict(context=60), ["context tokens", "use fewer"]),
        (dict(carl_from="nowhere"), ["nowhere"]),
        (dict(carl_from="nowhere", matching="average"), ["--carl-from needs --matching carl"]),
        (dict(without="kd", matching="dualcoop"), ["--without needs --matching carl"]),
        (dict(kernels="cuda"), ["--kernels"]),
        (dict(mask="nowhere.npy", ratio=None), ["nowhere.npy"]),
        (dict(seed=2**33), ["--seed", "up to 2147483648"]),
        (dict(size=100_000), ["--size", "up to 4096"]),
        (dict(queue=10**9), ["too little memory", "--queue"]),
        (dict(images="captions"), ["captions bring their labels", "drop --ratio"]),
        (dict(out="/proc/run"), ["/proc"]),
        (dict(out=ROOT / "LICENSE" / "run"), ["LICENSE"]),
        (dict(cache_dir=ROOT / "LICENSE" / "features"), ["LICENSE"]),
    ],
    ids=lambda v: " ".join(f"{k}={v}" for k, v in v.items()) if isinstance(v, dict) else "",
)
def test_a_wrong_setting_ends_in_one_line_and_writes_nothing(
    world, tmp_path, capfd, changes, words
):
    one_line(train.main, options(world, **{"out": tmp_path / "run"} | changes), capfd, *words)
    assert not (tmp_path / "run").exists()


def test_resume_is_refused_with_what_is_wrong(world, whole, tmp_path, capfd):
    one_line(train.main, ["--resume", tmp_path], capfd, "config.json")
    one_line(train.main, ["--resume", whole, "--epochs", 9], capfd, "drop --epochs")
    one_line(train.main, options(world, whole), capfd, "holds a run already", "--resume")
    for content, word in (
        ("{", "config.json"),
        ('{"config": {"colour": 1}, "clip_sha256": "1", "data": {"train": 1}}', "colour"),
        ("[]", "config.json"),
    ):
        (tmp_path / "config.json").write_text(content)
        one_line(train.main, ["--resume", tmp_path], capfd, word)
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut" / "last.pt").write_bytes((whole / "last.pt").read_bytes()[:5000])
    one_line(train.main, ["--resume", tmp_path / "cut"], capfd, "last.pt is damaged")


def test_resume_on_changed_data_is_refused(world, tmp_path, capfd):
    sheet = tmp_path / "labels.csv"
    images = sorted((world / "scenes" / "train2014").iterdir())[:10]
    sheet.write_text(
        "\n".join(["image,a,b"] + [f"{p},{i % 2},{(i + 1) % 2}" for i, p in enumerate(images)])
    )
    run(world, tmp_path / "run", data=sheet, root=None, ratio=None, epochs=1)
    sheet.write_text(sheet.read_text().replace(f"{images[0]},0,1", f"{images[0]},,1"))
    one_line(train.main, ["--resume", tmp_path / "run"], capfd, "begun on other data")


@pytest.mark.parametrize(
    "damage",
    ("truncated", "empty", "text", "a tensor less", "other shape", "not CLIP", "folder", "pickle"),
)
def test_a_wrong_weights_file_ends_in_one_line(world, tmp_path, capfd, damage):
    good, bad = world / "clip-quickgelu.safetensors", tmp_path / "clip-quickgelu.safetensors"
    content, state = good.read_bytes(), load_file(good)
    if damage in ("a tensor less", "other shape", "not CLIP"):
        if damage == "a tensor less":
            state.pop("visual.layer2.0.conv1.weight")
        elif damage == "other shape":
            state["text_projection"] = state["text_projection"][:, :7].contiguous()
        save_file({"weight": torch.zeros(2)} if damage == "not CLIP" else state, bad)
    elif damage == "folder":
        bad.mkdir()
    elif damage == "pickle":
        bad.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    else:
        bad.write_bytes(
            {"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage]
        )
    one_line(train.main, options(world, tmp_path / "run", clip=bad), capfd, str(bad))
    assert not (tmp_path / "run").exists() and not (tmp_path / "ran").exists()


def test_weights_by_name_offline_end_in_one_line(world, tmp_path, capfd, monkeypatch):
    from clip import weights

    monkeypatch.setattr(weights, "BASE", "http://127.0.0.1:9/models")  # nobody answers there
    monkeypatch.setenv("HOME", str(tmp_path))
    one_line(
        train.main,
        options(world, tmp_path / "run", clip="RN50"),
        capfd,
        "RN50",
        "give the path of a weights file",
    )
    assert not (tmp_path / "run").exists() and not list((tmp_path / ".cache/clip").glob("*"))


@pytest.mark.parametrize(
    "damage, cached, workers",
    (("cut", 0, 0), ("cut", 0, 2), ("cut", 1, 0), ("text", 0, 0), ("gone", 1, 0)),
)
def test_an_image_that_cannot_be_read_ends_in_one_line(
    world, tmp_path, capfd, damage, cached, workers
):
    shutil.copytree(world / "scenes", tmp_path / "scenes")
    image = sorted((tmp_path / "scenes" / "train2014").iterdir())[3]
    if damage == "gone":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes()[:600] if damage == "cut" else b"<html>404</html>")
    arguments = options(
        world,
        tmp_path / "run",
        root=tmp_path / "scenes",
        cache_features=cached,
        workers=workers,
        cache_dir=tmp_path / "f",
    )
    one_line(train.main, arguments, capfd, image.name)
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("cell, word", (("2", "sun='2'"), ("maybe", "'maybe'"), ("-1", "'-1'")))
def test_an_unknown_label_or_category_in_a_sheet_ends_in_one_line(
    world, tmp_path, capfd, cell, word
):
    image = sorted((world / "scenes" / "train2014").iterdir())[0]
    (tmp_path / "labels.csv").write_text(f"image,sun,tree\n{image},{cell},1\n")
    one_line(
        train.main,
        options(world, tmp_path / "run", data=tmp_path / "labels.csv", root=None, ratio=None),
        capfd,
        "labels.csv:2",
        word,
    )


def test_a_category_that_nobody_declared_ends_in_one_line(world, tmp_path, capfd):
    shutil.copytree(world / "scenes", tmp_path / "scenes")
    file = tmp_path / "scenes" / "annotations" / "instances_train2014.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 999
    file.write_text(json.dumps(content))
    one_line(
        train.main,
        options(world, tmp_path / "run", root=tmp_path / "scenes"),
        capfd,
        "instances_train2014.json",
        "999",
    )
    assert not (tmp_path / "run").exists()


def test_a_sheet_without_a_test_split_gets_its_picture(tmp_path, capsys):
    """One class, one image: regions.png is drawn from what there is, and only files that exist are
    announced."""
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    (tmp_path / "one.csv").write_text("image,cup\na.png,1\n")
    arguments = [
        "--data",
        tmp_path / "one.csv",
        "--root",
        tmp_path,
        "--clip",
        "tiny",
        "--size",
        64,
        "--augment",
        "none",
        "--workers",
        0,
        "--epochs",
        1,
        "--val",
        0,
        "--out",
        tmp_path / "run",
    ]
    assert train.main([str(a) for a in arguments]) == 0
    announced = capsys.readouterr().out.splitlines()[-1].split(": ")[1].split()
    assert "regions.png" in announced and all(
        (tmp_path / "run" / name).is_file() for name in announced
    )


def test_loader_processes_end_without_a_word(world, tmp_path):
    process = start("train.py", *options(world, tmp_path / "run", epochs=1, workers=2,
                                         cache_features=0))
    assert process.communicate()[1] == "" and process.returncode == 0


def test_the_region_module_of_another_run_stays_as_it_is(world, trained, tmp_path):
    """Table 4: neither gradients nor weight decay reach it, the rest learns."""
    run(world, tmp_path / "run", epochs=1, carl_from=trained)
    before, after = (read_checkpoint(folder / "last.pt")["model"]
                     for folder in (trained, tmp_path / "run"))
    kept = {name: torch.equal(before[name], after[name]) for name in after}
    assert all(same == name.startswith("carl.") for name, same in kept.items())


def test_a_region_module_of_other_categories_or_of_a_baseline_is_refused(sheet, world, tmp_path,
                                                                         capfd):
    run(world, tmp_path / "baseline", epochs=1, matching="average")
    for other in (sheet[0], tmp_path / "baseline"):
        one_line(train.main, options(world, tmp_path / "new", carl_from=other), capfd,
                 "--carl-from expects a run with --matching carl on the same cat", str(other))


def test_a_step_that_fp16_leaves_out_spoils_no_number(world, tmp_path):
    """The scaler begins too high: the first gradients are infinite, and NaN is not JSON."""
    run(world, tmp_path / "run", epochs=1, amp="fp16")
    line, = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert found["gradient_norm"] >= 0
