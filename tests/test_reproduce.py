"""reproduce.py on a small world: every table runs, is resumed, and shares its runs; the paper's numbers agree with its own averages."""
import json
import os
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import command, one_line, options, world                          # noqa: F401

from paper import run_table as grid
from paper import reproduce
import train
from config import Config


@pytest.fixture
def call(world, capfd):                                                            # noqa: F811
    """call("--table", 3, ...) -> (stdout lines, folder). All calls share one folder of runs, as a user's would."""
    folder, threads = world / "tables", torch.get_num_threads()
    torch.set_num_threads(1)                                                       # so small a world is slower with two

    def work(*arguments, **changes):
        rest = options(world, folder, **dict(ratio=None, epochs=2, augment="none") | changes)
        with mock.patch("tools.plots.curves"):
            status, out, err = command(reproduce.main, [*arguments, "--seeds", 1, *rest], capfd)
        assert status == 0, err
        return out, folder
    yield work
    torch.set_num_threads(threads)


def measured(folder, name):
    """{row: {score: {column: {"last" or "best": {seed: mAP}}}}} as written; every number a percentage."""
    found = json.loads((folder / f"{name}-scenes.json").read_text())
    for row, scores in found.items():
        assert scores, row
        for numbers in scores.values():
            assert all(0 < mAP <= 100 for n in numbers.values() for by_seed in n.values() for mAP in by_seed.values()), row
    return found


def test_the_papers_numbers_agree_with_the_averages_that_it_prints():
    averages = {"coco": (83.6, 83.6, 85.4), "voc2007": (94.0, 94.8, 95.2, 95.4), "vg200": (52.8,)}
    for name, rows in reproduce.PAPER_1.items():
        assert all(len(row) == 9 for row in rows.values())
        assert np.allclose([np.mean(row) for row in rows.values()], averages[name], atol=0.13), name     # its means are not all exact
    for name, averages in {"voc2007": (94.0, 95.0), "coco": (83.3, 84.1)}.items():
        assert np.allclose([np.mean(row) for row in reproduce.PAPER_4[name]], averages, atol=0.06)
    assert np.allclose([np.mean([reproduce.PAPER_2[d][i] for d in reproduce.PAPER_2]) for i in (0, 1)], (63.7, 65.6), atol=0.06)
    assert np.allclose(np.mean(list(reproduce.PAPER_3.values()), 0), (84.3, 89.2, 89.5, 89.8, 89.9, 90.3), atol=0.06)


def test_table_3_is_the_ladder_and_is_not_trained_twice(call):
    out, folder = call("--table", 3, "--ratios", 0.5)
    found = measured(folder, "table-3")
    assert list(found) == ["zero-shot CLIP, global", "zero-shot CLIP, dense", "average feature", "+CARL", "+CARL +KD", "+CARL +KD +MMCP",
                           "+CARL +KD +MMCL", "all (TRM-ML)", "global feature", "DualCoOp", "DualCoOp, fixed spatial scale", "all but KD"]
    assert set(found["all (TRM-ML)"]) == {"region", "query", "mean"} and set(found["DualCoOp"]) == {"region"}
    text = (folder / "table-3-scenes.md").read_text()
    assert "| **+CARL +KD** | paper, coco, of 10-90 % |  | 84.4 |" in text and all(line in out for line in text.splitlines())
    runs = {cfg.parent.name: json.loads(cfg.read_text())["config"] for cfg in folder.glob("runs/*/config.json")}
    assert len(runs) == 10
    whole = next(folder / "runs" / name for name, c in runs.items() if c["matching"] == "carl" and not c["without"])
    line = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()][-1]["test"]
    assert found["all (TRM-ML)"]["query"]["50 %"]["last"]["0"] == line["mAP_query"]

    with mock.patch.object(train, "Run", side_effect=AssertionError("trained again")):                   # all is there: read
        assert not any("to train" in line for line in call("--table", 3, "--ratios", 0.5)[0])
        call("--study", "queries", "--ratios", 0.5, "--rows", "text")                                  # the default is a row of every table


def test_a_study_is_judged_on_validation(call):
    out, folder = call("--study", "queries", "--ratios", 0.5)
    numbers = measured(folder, "study-queries")["queries text"]["query"]["50 %"]
    run = next(cfg.parent for cfg in folder.glob("runs/*/config.json") if (c := json.loads(cfg.read_text())["config"])["queries"] == "text"
               and c["ratio"] == 0.5 and c["matching"] == "carl" and not c["without"])
    line = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert numbers["last"]["0"] == line["val"]["mAP_query"] != line["test"]["mAP_query"]
    assert any("mAP on validation in %" in text for text in out)


def test_the_ladder_of_single_positive_shares_its_runs_with_table_2(call):
    _, folder = call("--table", 3, "--single-positive", "largeloss", "--rows", "DualCoOp", "all (TRM")
    found = measured(folder, "table-3")
    assert set(found["all (TRM-ML)"]["region"]) == {"single positive, largeloss"}
    assert "paper" not in (folder / "table-3-scenes.md").read_text()
    out, _ = call("--table", 2, "--rows", "DualCoOp")
    assert not any("to train" in line for line in out)
    assert measured(folder, "table-2")["DualCoOp"]["region"]["LargeLoss setup"] == found["DualCoOp"]["region"]["single positive, largeloss"]


def test_a_stopped_row_goes_on_where_it_was(call):
    calls = []
    epoch = train.train_one_epoch

    def stop(state, *rest):
        if state.epoch == 1:
            raise KeyboardInterrupt
        return epoch(state, *rest)
    with mock.patch.object(train, "train_one_epoch", stop), pytest.raises(AssertionError):
        call("--table", 3, "--ratios", 0.7, "--rows", "average")
    with mock.patch.object(train, "train_one_epoch", lambda state, *rest: calls.append(state.epoch) or epoch(state, *rest)):
        call("--table", 3, "--ratios", 0.7, "--rows", "average")
    assert calls == [1]


def test_a_diverged_row_is_told_and_the_others_go_on(call):
    step = train.training_step

    def diverge(model, memory, encoder, cfg, *arguments):
        if cfg.matching == "global":
            raise FloatingPointError("the loss is not finite")
        return step(model, memory, encoder, cfg, *arguments)
    with mock.patch.object(train, "training_step", diverge):
        out, _ = call("--table", 3, "--ratios", 0.8, "--rows", "global feature", "average")
    assert any("global" in line and "diverged" in line for line in out)
    assert any(line.startswith("| **global feature** | no run finished") for line in out) and any("**average feature** | region" in line for line in out)


def test_table_1_averages_scores_with_prompts_of_captions(call):
    out, folder = call("--table", 1, "--ratios", 0.5, 0.9, "--rows", "DualCoOp", "TaI-DPT")
    found = measured(folder, "table-1")
    assert list(found) == ["DualCoOp", "TaI-DPT", "TaI-DPT+DualCoOp", "TaI-DPT+TRM-ML"]
    assert found["TaI-DPT"]["averaged"]["50 %"] == found["TaI-DPT"]["averaged"]["90 %"]                  # captions know no ratio
    abouts = [json.loads(cfg.read_text()) for cfg in folder.glob("runs/*captions*/config.json")]
    assert len(abouts) == 2 and all(about["data"]["captions"]["images"] > 40 and "scenes/train" not in about["data"] for about in abouts)
    avg = found["DualCoOp"]["region"]["Avg."]["last"]["0"]
    assert avg == pytest.approx(np.mean([found["DualCoOp"]["region"][c]["last"]["0"] for c in ("50 %", "90 %")]))
    assert any(line.startswith("| **TaI-DPT+DualCoOp** | paper, coco | 83.9 | 84.5 | 84.2 |") for line in out)
    assert Image.open(folder / "table-1-scenes.png").size[0] > 800


def test_tables_2_4_and_6(call):
    _, folder = call("--table", 2)
    assert set(measured(folder, "table-2")["TRM-ML"]["region"]) == {"LargeLoss setup"}                   # no lists of the SPLC setup
    _, folder = call("--table", 4, "--ratios", 0.5)
    found = measured(folder, "table-4")
    assert list(found) == ["w/o complete", "w complete"]
    configs = [json.loads(cfg.read_text())["config"] for cfg in folder.glob("runs/*/config.json")]
    frozen, = [c for c in configs if c["carl_from"]]
    source = json.loads((folder / "runs" / os.path.basename(frozen["carl_from"]) / "config.json").read_text())["config"]
    assert source["ratio"] == 1 and source["without"] == frozen["without"] == "mmcp,mmcl"
    _, folder = call("--table", 6, "--ratios", 0.5)
    assert list(measured(folder, "table-6")) == ["neither (CARL, KD)", "text", "visual", "text and visual"]


def test_table_5_counts_what_the_paper_counts(call):
    out, _ = call("--table", 5)
    row = next(line for line in out if "**TRM-ML**" in line).replace("|", "").split()[1:]
    total, of_paper, learned, learned_paper, adds, folded, adds_paper = map(float, row)
    assert (total, learned) == (of_paper, learned_paper) == (96.72, 6.80)
    assert abs(adds - adds_paper) < 0.01 * adds_paper and folded < adds_paper
    row = next(line for line in out if "**DualCoOp**" in line).replace("|", "").split()[1:]
    assert row[0] == row[1] == "91.17" and row[2] == row[3] == "1.25"


def test_figure_4_draws_both_methods_and_scores_their_maps(call):
    out, folder = call("--figure", 4, "--ratios", 0.5)
    width, height = Image.open(folder / "figure-4-scenes.png").size
    assert width > 4 * 192 and height > 8 * 192                                    # photo and three regions; two rows for four photos
    row = next(line for line in out if line.startswith("| **TRM-ML**")).split("|")
    assert 0 <= float(row[3]) <= 100 and int(row[-2]) > 10
    runs = [str(p) for p in sorted(folder.glob("runs/*-0.5-dualcoop-seed0*"))] + [str(p) for p in sorted(folder.glob("runs/*-0.5-carl-seed0*"))]
    out, _ = call("--figure", 4, "--runs", *runs[:1], runs[-1], "--image", folder.parent / "scenes" / "tune2014" / "COCO_tune2014_000000000001.jpg")
    assert Image.open(folder / "figure-4-scenes.png").size[1] < 3 * 192


def test_two_jobs_give_what_one_gives(call, world):                                # noqa: F811
    call("--table", 3, "--ratios", 0.3, "--rows", "average", "global feature")
    one = measured(world / "tables", "table-3")
    with mock.patch.object(grid.Runs, "FOLDER", "runs-of-two"):
        call("--table", 3, "--ratios", 0.3, "--rows", "average", "global feature", "--jobs", 2)
    assert measured(world / "tables", "table-3") == one and len(list(world.glob("tables/runs-of-two/*/last.pt"))) == 2


def test_every_study_is_made_of_settings_that_exist():
    for name, rows in reproduce.STUDIES.items():
        assert len(rows) == len(reproduce.study(name, [0.1])) > 1, name
        for cell in reproduce.study(name, [0.1]):
            Config(**cell.runs[0])
    score = {"without": "", "kd": "softmax"}
    assert any(all(getattr(Config(**run), k) == v for k, v in score.items()) for run in reproduce.STUDIES["kd"])


@pytest.mark.parametrize("arguments, words", [
    ([], ["--table"]), (["--table", 1, "--figure", 4], ["one of"]), (["--table", 7], ["choice", "7"]), (["--table", 3, "--seeds", 0], ["from 1"]),
    (["--table", 3, "--resume", "x"], ["--resume"]), (["--table", 3, "--epoch", 3], ["--epochs"]), (["--study", "luck"], ["luck"]),
    (["--table", 3, "--rows", "nobody"], ["nobody"]), (["--table", 3, "--data", "coco"], ["--root"])])
def test_a_wrong_call_is_one_line(arguments, words, world, tmp_path, capfd):       # noqa: F811
    one_line(reproduce.main, [*arguments, "--out", tmp_path, "--clip", world / "clip-quickgelu.safetensors"], capfd, *words)
