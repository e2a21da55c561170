"""reproduce.py on a small world: every table runs, is resumed, and shares its runs; the paper's
numbers agree with its own averages."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
import fake_datasets as fake
from small_world import command, one_line, options, world

from paper import reproduce, run_table
import train
from config import Config
from support import UserError


@pytest.fixture
def call(world, capfd):
    """call("--table", 3, ...) -> (stdout lines, folder). All calls share one folder of runs, as a
    user's would."""
    folder, threads = world / "tables", torch.get_num_threads()
    torch.set_num_threads(1)  # so small a world is slower with two

    def work(*arguments, **changes):
        rest = options(world, folder, **dict(ratio=None, epochs=2, augment="none") | changes)
        with mock.patch("tools.report.curves"):
            status, out, err = command(reproduce.main, ["--seeds", 1, *arguments, *rest], capfd)
        assert status == 0, err
        return out, folder

    yield work
    torch.set_num_threads(threads)


def newest(folder, pattern):
    return max(folder.glob(pattern), key=lambda file: file.stat().st_mtime_ns)


def measured(folder, name):
    """{row: {column: {seed: mAP}}} as written; every number a percentage."""
    found = json.loads(newest(folder, f"{name}-scenes*.json").read_text())
    for row, cells in found.items():
        assert all(0 < mAP <= 100 for by_seed in cells.values() for mAP in by_seed.values()), row
    return found


def configs(folder):
    return {
        file.parent: json.loads(file.read_text())["config"]
        for file in folder.glob("runs/*/config.json")
    }


def last_line(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_papers_numbers_agree_with_the_averages_that_it_prints():
    numbers = {
        name: {data: np.array([*rows.values()]) for data, rows in printed}
        for name in "12346"
        for printed in [reproduce.TABLES[name]["paper"].items()]
    }
    averages = {"coco": (83.6, 83.6, 85.4), "voc2007": (94.0, 94.8, 95.2, 95.4), "vg200": (52.8,)}
    for name, rows in numbers["1"].items():
        assert rows.shape[1] == 10 and tuple(rows[:, 9]) == averages[name]
        # its means are not all exact
        assert np.allclose(rows[:, :9].mean(1), averages[name], atol=0.13), name
    for name, averages in {"voc2007": (94.0, 95.0), "coco": (83.3, 84.1)}.items():
        assert tuple(numbers["4"][name][:, 5]) == averages
        assert np.allclose(numbers["4"][name][:, :5].mean(1), averages, atol=0.06)
    setups = np.mean([*numbers["2"].values()], 0)[0]
    assert np.allclose(setups, (63.7, 65.6), atol=0.06)
    ladder = np.mean([*numbers["3"].values()], 0)[:, 0]
    assert np.allclose(ladder, (84.3, 89.2, 89.5, 89.8, 89.9, 90.3), atol=0.06)


def test_table_3_is_the_ladder_and_is_not_trained_twice(call):
    out, folder = call("--table", 3, "--ratios", 0.51, 0.52, "--rows", "average", "CARL", "TRM")
    found = measured(folder, "table-3")
    assert list(found) == [
        "average feature",
        "+CARL",
        "+CARL +KD",
        "+CARL +KD +MMCP",
        "+CARL +KD +MMCL",
        "TRM-ML",
    ]
    assert list(found["TRM-ML"]) == ["51 %", "52 %", "Avg."]
    text = newest(folder, "table-3-scenes*.md").read_text()
    assert "| *the paper, coco, of 10-90 %* |  |  | 84.4 |" in text
    assert all(line in out for line in text.splitlines())
    whole = next(
        run
        for run, c in configs(folder).items()
        if c["matching"] == "carl" and not c["without"] and c["ratio"] == 0.51
    )
    # the scenes' score
    assert found["TRM-ML"]["51 %"]["0"] == last_line(whole)["test"]["mAP_query"]

    with mock.patch.object(train, "train_one_epoch", side_effect=AssertionError("trained again")):
        again, _ = call("--table", 3, "--ratios", 0.51, 0.52, "--rows", "average", "CARL", "TRM")
        assert not any("to train" in line for line in again)
        # the default is a row of every table
        call("--study", "queries", "--ratios", 0.51, "--rows", "text")
        # another score, the same runs
        call("--table", 3, "--ratios", 0.51, 0.52, "--rows", "TRM", "--score", "region")
    assert (
        measured(folder, "table-3")["TRM-ML"]["51 %"]["0"] == last_line(whole)["test"]["mAP_region"]
    )


def test_a_study_is_judged_on_validation(call):
    out, folder = call("--study", "queries", "--ratios", 0.5)
    number = measured(folder, "study-queries")["queries text"]["50 %"]["0"]
    run = next(
        run
        for run, c in configs(folder).items()
        if (c["queries"], c["ratio"], c["matching"], c["without"]) == ("text", 0.5, "carl", "")
    )
    assert number == last_line(run)["val"]["mAP_query"] != last_line(run)["test"]["mAP_query"]
    assert any("score on val in %" in text for text in out)


def test_the_ladder_of_single_positive_shares_its_runs_with_table_2(call):
    _, folder = call("--table", 3, "--single-positive", "largeloss", "--rows", "DualCoOp", "TRM")
    found = measured(folder, "table-3")
    assert set(found["TRM-ML"]) == {"single positive, largeloss"}
    assert "paper*" not in newest(folder, "table-3-scenes*.md").read_text()
    out, _ = call("--table", 2, "--rows", "DualCoOp")
    assert not any("to train" in line for line in out)
    assert (
        measured(folder, "table-2")["DualCoOp"]["LargeLoss setup"]
        == found["DualCoOp"]["single positive, largeloss"]
    )


def test_table_2_of_nuswide_needs_its_setups_files_alone(call, tmp_path):
    fake.nuswide(tmp_path / "nus")
    shutil.rmtree(tmp_path / "nus/ImageList")
    shutil.rmtree(tmp_path / "nus/Groundtruth")
    out, folder = call("--table", 2, "--rows", "DualCoOp", data="nuswide", root=tmp_path / "nus",
                       epochs=1, clip="tiny")
    cells = json.loads((folder / "table-2-nuswide.json").read_text())["DualCoOp"]
    assert all(len(cells[setup]) == 1 for setup in ("LargeLoss setup", "SPLC setup"))


def test_other_prompt_names_under_the_same_path_are_other_runs(world, tmp_path):
    cfg, _ = train.parse(options(world, tmp_path, names=tmp_path / "names.txt"))
    folders = set()
    for words in ("thing", "object"):
        (tmp_path / "names.txt").write_text("".join(f"{words} {c}\n" for c in range(24)))
        folders.add(run_table.Runs(cfg, tmp_path, 1).config({}, 0).out)
    assert len(folders) == 2


def test_rows_are_chosen_by_name_or_by_a_part_of_names(world):
    def rows(*words):
        own = SimpleNamespace(table="1", study=None, rows=words, ratios=None)
        return list(reproduce.rows_of(own, Config(data="coco"))[0])

    assert rows("DualCoOp", "TRM-ML") == ["DualCoOp", "TRM-ML"]
    assert rows("TaI") == ["TaI-DPT", "TaI-DPT+DualCoOp", "TaI-DPT+TRM-ML"]


def test_missing_captions_are_told_before_anything_is_trained(world, tmp_path, capfd):
    root = shutil.copytree(world / "scenes", tmp_path / "coco")
    (root / "annotations" / "captions_train2014.json").unlink()
    words = options(world, tmp_path / "out", data="coco", root=root, ratio=None)
    one_line(reproduce.main, ["--table", 1, *words], capfd, "captions_train2014.json", "--rows")
    assert not (tmp_path / "out" / "runs").exists()


def test_a_mixed_score_leaves_out_rows_without_a_photo(world):
    own = SimpleNamespace(table="1", study=None, rows=None, ratios=None)
    base = Config(data="coco", score="mixed")
    assert not any("TaI" in row for row in reproduce.rows_of(own, base)[0])
    assert any("TaI" in row for row in reproduce.rows_of(own, Config(data="coco"))[0])
    sheet = Config(data="a.csv", score="mixed", captions="a.json")  # it holds a fifth out
    assert any("TaI" in row for row in reproduce.rows_of(own, sheet)[0])


def test_a_stopped_row_goes_on_where_it_was(call):
    calls = []
    epoch = train.train_one_epoch

    def stop(state, *rest):
        if state.epoch == 1:
            raise KeyboardInterrupt
        return epoch(state, *rest)

    with mock.patch.object(train, "train_one_epoch", stop), pytest.raises(AssertionError):
        call("--table", 3, "--ratios", 0.7, "--rows", "average")
    with mock.patch.object(
        train,
        "train_one_epoch",
        lambda state, *rest: calls.append(state.epoch) or epoch(state, *rest),
    ):
        call("--table", 3, "--ratios", 0.7, "--rows", "average")
    assert calls == [1]


def test_a_stopped_row_keeps_the_score_that_it_was_begun_with(call):
    """Its thresholds and best epoch are of that score; the table shows the one that is asked."""
    epoch = train.train_one_epoch

    def stop(state, *rest):
        if state.epoch == 1:
            raise KeyboardInterrupt
        return epoch(state, *rest)

    words = "--table", 3, "--ratios", 0.65, "--rows", "TRM-ML"
    with mock.patch.object(train, "train_one_epoch", stop), pytest.raises(AssertionError):
        call(*words, score="query")
    out, folder = call(*words, score="region")
    run, = (run for run, cfg in configs(folder).items() if cfg["ratio"] == 0.65)
    state = torch.load(run / "last.pt", weights_only=True)
    assert configs(folder)[run]["score"] == json.loads(state["config"])["score"] == "query"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]
    assert last["mAP"] == last["mAP_query"]
    assert f"| **TRM-ML** | {last['mAP_region']:.2f} |" in out


def test_a_table_says_how_many_seeds_a_cell_rests_on(call):
    step = train.training_step

    def diverge(model, memory, encoder, cfg, *arguments):
        if (cfg.seed, cfg.ratio) == (0, 0.72):
            raise FloatingPointError("the loss is not finite")
        return step(model, memory, encoder, cfg, *arguments)

    with mock.patch.object(train, "training_step", diverge):
        out, folder = call("--table", 3, "--ratios", 0.72, 0.75, "--rows", "average", "--seeds", 2)
    row, = (line for line in out if line.startswith("| **average feature**"))
    cells = measured(folder, "table-3")["average feature"]
    assert [list(cell) for cell in cells.values()] == [["1"], ["0", "1"], ["1"]]
    told = ["(1 of 2 seeds)" in cell for cell in row.split("|")[2:-1]]
    assert told == [True, False, True]  # the mean of the columns, too


def test_a_diverged_row_is_told_and_the_others_go_on(call):
    step = train.training_step

    def diverge(model, memory, encoder, cfg, *arguments):
        if cfg.matching == "global":
            raise FloatingPointError("the loss is not finite")
        return step(model, memory, encoder, cfg, *arguments)

    with mock.patch.object(train, "training_step", diverge):
        out, _ = call("--table", 3, "--ratios", 0.8, "--rows", "global feature", "average")
    assert any("global" in line and "diverged" in line for line in out)
    assert any(line.startswith("| **global feature** | no run finished") for line in out)
    assert any(line.startswith("| **average feature** | ") and "no run" not in line for line in out)


def test_no_row_rests_on_a_region_module_that_diverged(call):
    """Table 4: half a module on complete labels gave a number, and kept it."""
    step, broken = train.training_step, True

    def diverge(model, memory, encoder, cfg, *arguments):
        if broken and cfg.ratio == 1:
            raise FloatingPointError("the loss is not finite")
        return step(model, memory, encoder, cfg, *arguments)

    with mock.patch.object(train, "training_step", diverge):
        for told in (True, False):
            broken = told
            out, _ = call("--table", 4, "--ratios", 0.6, lr=3e-3)
            row, = (line for line in out if line.startswith("| **w complete**"))
            assert ("no run finished" in row) == told
            row, = (line for line in out if line.startswith("| **w/o complete**"))
            assert "no run" not in row


def test_table_1_averages_scores_with_prompts_of_captions(call):
    out, folder = call("--table", 1, "--ratios", 0.5, 0.9, "--rows", "DualCoOp", "TaI")
    found = measured(folder, "table-1")
    assert list(found) == ["DualCoOp", "TaI-DPT", "TaI-DPT+DualCoOp", "TaI-DPT+TRM-ML"]
    assert found["TaI-DPT"]["50 %"] == found["TaI-DPT"]["90 %"]  # captions know no ratio
    abouts = [json.loads(file.read_text()) for file in folder.glob("runs/*captions*/config.json")]
    assert len(abouts) == 2 and all(about["data"]["captions"]["images"] > 40 for about in abouts)
    cells = found["DualCoOp"]
    assert cells["Avg."]["0"] == pytest.approx((cells["50 %"]["0"] + cells["90 %"]["0"]) / 2)
    printed = out[
        next(i for i, line in enumerate(out) if line.startswith("| **TaI-DPT+DualCoOp**")) + 1
    ]
    assert printed.startswith("| *the paper, coco* | 83.9 | 84.5 |  |")
    assert Image.open(folder / "table-1-scenes.png").size[0] > 800


def test_captions_are_five_an_image_and_take_a_fifth_of_the_epochs():
    runs = SimpleNamespace(out=Path("out"), encoder=SimpleNamespace(sha256="a"),
                           content=lambda _: {},
                           sha256=str)
    for epochs, fifth in ((40, 8), (12, 2), (2, 1)):
        runs.base = Config(epochs=epochs)
        assert run_table.Runs.config(runs, dict(images="captions"), seed=0).epochs == fifth
        assert run_table.Runs.config(runs, {}, seed=0).epochs == epochs


def test_a_run_is_known_by_what_it_reads_not_by_where_that_lies(tmp_path):
    """Captions and lists that changed under their path gave the old numbers; data that moved, and
    a table's folder that did, trained everything again."""
    def folder(root, settings, out="out", **base):
        runs = SimpleNamespace(out=Path(out), base=Config(root=str(root), **base),
                               encoder=SimpleNamespace(sha256="a"), content=lambda _: {},
                               sha256=lambda file: Path(file).read_text())
        runs.config = lambda *pair: run_table.Runs.config(runs, *pair)
        return Path(runs.config(settings, 0).out).name

    for place, content in (("here", "1"), ("moved", "1"), ("changed", "2")):
        (tmp_path / place / "annotations").mkdir(parents=True)
        for name in ("annotations/captions_train2014.json", "voc_train.txt"):
            (tmp_path / place / name).write_text(content)
    for base, settings in (({}, dict(images="captions")),
                           (dict(data="voc2012"), dict(single_positive="splc"))):
        names = [folder(tmp_path / place, settings, **base)
                 for place in ("here", "moved", "changed")]
        assert names[0] == names[1] != names[2]
    (tmp_path / "words.txt").write_text("a")
    names = [folder(tmp_path, {}, names=str(tmp_path / "words.txt"))]
    (tmp_path / "words.txt").write_text("b")
    assert folder(tmp_path, {}, names=str(tmp_path / "words.txt")) not in names
    table_4 = dict(carl_from=dict(ratio=1.0), ratio=0.1)
    assert folder(tmp_path, table_4) == folder(tmp_path, table_4, out=tmp_path / "elsewhere")
    assert folder(tmp_path, table_4) != folder(tmp_path, dict(ratio=0.1))
    assert folder(tmp_path, {}, val="0.2") != folder(tmp_path, {}, val="0.3")
    # what this row does not read, or another name of the same place
    plain = folder(tmp_path, {})
    assert folder(tmp_path, {}, captions="more.json", lists="lists") == plain
    assert folder(tmp_path, {}, clip="RN101.pt", test=None) == plain
    here, moved = (dict(data=f"{place}/x.csv", val=f"{place}/y.csv") for place in ("a", "b"))
    assert folder(tmp_path, {}, **here) == folder(tmp_path, {}, **moved)


def test_other_photos_of_the_same_names_are_other_data(world, tmp_path):
    root = shutil.copytree(world / "scenes", tmp_path / "scenes")
    cfg, _ = train.parse(options(world, tmp_path / "run", root=root))
    before = run_table.Runs(cfg, tmp_path, 1).config({}, 0).out
    assert run_table.Runs(cfg, tmp_path, 1).config({}, 0).out == before
    photo = next((root / "train2014").iterdir())
    Image.open(photo).resize((99, 99)).save(photo)
    assert run_table.Runs(cfg, tmp_path, 1).config({}, 0).out != before


def test_table_2_has_the_setups_whose_files_are_there(tmp_path, capfd):
    args = SimpleNamespace(table="2", study=None, rows=None, ratios=None)
    fake.nuswide(tmp_path)
    cfg = Config(data="nuswide", root=str(tmp_path))
    setups = ["LargeLoss setup", "SPLC setup"]
    assert list(reproduce.rows_of(args, cfg)[1]) == setups
    (tmp_path / "nus_val.txt").rename(tmp_path / "list")
    assert list(reproduce.rows_of(args, cfg)[1]) == setups[:1]
    assert "the SPLC setup is left out: " in (told := capfd.readouterr().err)
    assert "nus_val.txt not found" in told
    (tmp_path / "list").rename(tmp_path / "nus_val.txt")
    (tmp_path / "formatted_train_images.npy").unlink()
    assert list(reproduce.rows_of(args, cfg)[1]) == setups[1:]
    assert "the LargeLoss setup is left out: " in capfd.readouterr().err
    content = (tmp_path / "nus_val.txt").read_text()
    (tmp_path / "nus_val.txt").write_text("a.jpg, 999\n")  # damaged, not missing
    with pytest.raises(UserError, match="nus_val.txt:1"):
        reproduce.rows_of(args, cfg)
    (tmp_path / "nus_val.txt").write_text(content)
    with pytest.raises(UserError, match="--val: SPLC's list"):
        reproduce.rows_of(args, Config(data="nuswide", root=str(tmp_path), val="0.2"))
    (tmp_path / "nus_val.txt").unlink()
    with pytest.raises(UserError, match="nuswide has the files of no setup"):
        reproduce.rows_of(args, cfg)
    assert "formatted_train_images.npy not found" in capfd.readouterr().err
    with pytest.raises(UserError, match="^nuswide: say with --root"):
        reproduce.rows_of(args, Config(data="nuswide"))


def test_photos_of_nuswide_that_come_back_are_other_data_in_each_of_its_setups(tmp_path):
    fake.nuswide(tmp_path)
    cfg = Config(data="nuswide", root=str(tmp_path), clip="tiny", single_positive="largeloss")
    photo = tmp_path / "images" / "00003_3_m.jpg"  # of the SPLC lists alone

    def folder(setup):
        return run_table.Runs(cfg, tmp_path, 1).config(dict(single_positive=setup), 0).out

    before = {setup: folder(setup) for setup in ("largeloss", "splc")}
    photo.rename(tmp_path / "gone.jpg")
    assert folder("largeloss") == before["largeloss"] and folder("splc") != before["splc"]


def test_a_study_of_single_positives_says_so(call):
    _, folder = call("--study", "assume-negative", "--rows", "assume_negative 0.3")
    assert list(measured(folder, "study-assume-negative")["assume_negative 0.3"]) == [
        "single positive, largeloss"]


def test_the_mean_of_the_columns_is_of_seeds_that_finished_in_all_of_them():
    class Fake:
        def train(self, wanted):
            assert len(wanted) == 2 * len(columns)

        def mAP(self, settings, seed):
            (one,) = settings
            return None if (one["ratio"], seed) == (0.2, 1) else 100 * one["ratio"] + seed

    columns = {"10 %": dict(ratio=0.1), "20 %": dict(ratio=0.2)}
    found = reproduce.measure(Fake(), {"row": [{}]}, columns, range(2))
    assert found == {"row": {"10 %": {0: 10, 1: 11}, "20 %": {0: 20}, "Avg.": {0: 15}}}
    del columns["10 %"]  # the mean of one column would tell nothing new
    found = reproduce.measure(Fake(), {"row": [{}]}, columns, range(2))
    assert found == {"row": {"20 %": {0: 20}}}


def test_tables_2_4_and_6(call):
    _, folder = call("--table", 2)
    # no lists of the SPLC setup
    assert set(measured(folder, "table-2")["TRM-ML"]) == {"LargeLoss setup"}
    _, folder = call("--table", 4, "--ratios", 0.5)
    assert list(measured(folder, "table-4")) == ["w/o complete", "w complete"]
    (frozen,) = [c for c in configs(folder).values() if c["carl_from"] and c["ratio"] == 0.5]
    source = configs(folder)[folder / "runs" / os.path.basename(frozen["carl_from"])]
    assert source["ratio"] == 1 and source["without"] == frozen["without"] == "mmcp,mmcl"
    _, folder = call("--table", 6, "--ratios", 0.5)
    assert list(measured(folder, "table-6")) == [
        "neither (CARL, KD)",
        "text",
        "visual",
        "text and visual",
    ]


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
    assert width > 4 * 192 and height > 8 * 192  # photo and three regions; two rows for four photos
    row = next(line for line in out if "-carl-" in line and ", mask " in line)
    assert 0 <= float(row.split(", mask ")[1].split("%")[0]) <= 100
    photo = folder.parent / "scenes" / "tune2014" / "COCO_tune2014_000000000001.jpg"
    call("--figure", 4, "--ratios", 0.5, "--image", photo)
    assert Image.open(newest(folder, "figure-4-scenes*.png")).size[1] < 3 * 192


def test_a_command_leaves_the_files_of_another_one(call, world):
    """Table 3 and its last column, or two sheets of one name, wrote the same files."""
    for file in world.glob("tables/table-3-*"):
        file.unlink()
    for score in ("region", "query", "query"):
        call("--table", 3, "--ratios", 0.5, "--rows", "TRM-ML", "--score", score)
    found = {file.stem: file.read_text() for file in world.glob("tables/table-3-*.md")}
    assert set(found) == {"table-3-scenes", "table-3-scenes-2"}
    assert "the region score" in found["table-3-scenes"]
    assert (world / "tables" / "table-3-scenes-2.json").is_file()


def test_figure_4_needs_runs_whose_thresholds_are_of_its_score(call, world, capfd):
    call("--figure", 4, "--ratios", 0.5)
    chosen = json.loads(next(world.glob("tables/runs/*0.5-carl-*/config.json")).read_text())
    other = {"region": "query", "query": "region"}[chosen["config"]["score"]]
    one_line(reproduce.main, ["--figure", 4, *options(world, world / "tables", ratio=None, epochs=2,
                                                      augment="none"),
                              "--ratios", 0.5, "--score", other], capfd, "chose its thresholds")


def test_figure_4_asks_the_baseline_too_and_before_it_trains(call, world, capfd):
    """A table of the mixed score has trained DualCoOp alone: its thresholds are no probabilities of
    the region score."""
    call("--table", 3, "--ratios", 0.45, "--rows", "DualCoOp", "--score", "mixed")
    words = options(world, world / "tables", ratio=None, epochs=2, augment="none")
    one_line(reproduce.main, ["--figure", 4, *words, "--ratios", 0.45, "--score", "query"], capfd,
             "chose its thresholds for --score mixed")
    assert not list(world.glob("tables/runs/*0.45-carl-*/last.pt"))


def test_a_study_needs_validation_alone(world, tmp_path, capfd):
    photos = shutil.copytree(world / "scenes" / "train2014", tmp_path / "photos")
    rows = [f"photos/{p.name},{i % 2},{i // 2 % 2}" for i, p in enumerate(sorted(photos.iterdir()))]
    (tmp_path / "my.v1.csv").write_text("\n".join(["image,sun,cup", *rows]))
    words = options(world, tmp_path / "tables", data=tmp_path / "my.v1.csv", root=None, ratio=None,
                    epochs=1, val=0.5)
    status, out, _ = command(reproduce.main, ["--study", "tau", "--rows", "0.07", "--seeds", 1,
                                              *words], capfd)
    assert status == 0 and out[-1].startswith(f"wrote {tmp_path}/tables/study-tau-my.v1.md")
    assert (tmp_path / "tables" / "study-tau-my.v1.json").is_file()
    one_line(reproduce.main, ["--table", 3, *words], capfd, "no test split", "--test")


def test_two_jobs_give_what_one_gives(call, world):
    call("--table", 3, "--ratios", 0.3, "--rows", "average", "global feature")
    one = measured(world / "tables", "table-3")
    (world / "tables" / "runs").rename(world / "tables" / "runs-of-one")
    call("--table", 3, "--ratios", 0.3, "--rows", "average", "global feature", "--jobs", 2)
    assert measured(world / "tables", "table-3") == one
    assert len(list(world.glob("tables/runs/*/last.pt"))) == 2


def test_every_study_is_made_of_settings_that_exist():
    for name, study in reproduce.STUDIES.items():
        assert len(study["rows"]) > 1, name
        for settings, *others in study["rows"].values():
            assert Config(**settings) and not others


def test_the_papers_mean_says_which_columns_it_is_of(call):
    out, _ = call("--table", 6, "--rows", "text and visual", "--ratios", 0.3, 0.5, epochs=1)
    assert "| *the paper, voc2007, of 10-50 %* |  |  | 94.76 |" in out
    for ratios, told in (((0.3, 0.5), False), ((0.1, 0.2, 0.3, 0.4, 0.5), True),
                         ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6), False)):
        out, _ = call("--table", 4, "--rows", "w/o complete", "--ratios", *ratios, epochs=1)
        printed, = [line for line in out if line.startswith("| *the paper")]
        assert printed.endswith("|  |") != told  # the mean of Table 4 is of its five columns


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--table", 2, "--ratios", 0.1], ["--ratios would change nothing"]),
        (["--table", 3, "--ratios", 0.1, "--single-positive", "largeloss"], ["--ratios"]),
        (["--table", 5, "--rows", "TRM-ML"], ["--rows would change nothing"]),
        (["--table", 3, "--image", "x.jpg"], ["--image would change nothing"]),
        (["--table", 1, "--single-positive", "largeloss"], ["is for --table 3"]),
        ([], ["--table"]),
        (["--table", 1, "--figure", 4], ["not allowed with"]),
        (["--table", 7], ["choice", "7"]),
        (["--table", 3, "--seeds", 0], ["start at 1"]),
        (["--table", 3, "--resume", "x"], ["--resume"]),
        (["--table", 3, "--mask", "x.npy"], ["--mask"]),
        (["--study", "assume-negative", "--ratios", 0.5], ["--ratios would change nothing"]),
        (["--table", 3, "--epoch", 3], ["--epochs"]),
        (["--study", "luck"], ["luck"]),
        (["--table", 3, "--rows", "nobody"], ["nobody"]),
        (["--table", 3, "--data", "coco"], ["--root"]),
    ],
)
def test_a_wrong_call_is_one_line(arguments, words, world, tmp_path, capfd):
    one_line(
        reproduce.main,
        [*arguments, "--out", tmp_path, "--clip", world / "clip-quickgelu.safetensors"],
        capfd,
        *words,
    )


def test_the_spread_is_the_sample_deviation_of_the_seeds():
    assert reproduce.spread({0: 80.0, 1: 82.0}) == "81.00 ± 1.41"  # sqrt(2), not 1
    assert reproduce.spread({0: 80.0}) == "80.00" and reproduce.spread({}) == "no run finished"
