"""Which unknown cells are suggested, how they are listed, and from which features."""
import csv
import io
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from small_world import command, one_line, run, trained, world

import data
import eval as evaluation
from clip.features import FeatureLoader
from config import Config
from eval import Predictor
from tools import review
from tools.suggest import choose_cells, suggest


def rows_of(file):
    return list(csv.DictReader(open(file, encoding="utf-8-sig")))


def page_of(file):
    """What the page holds: cells, photos, grid."""
    text = file.read_text(encoding="utf-8")
    start = text.index('id="data">') + len('id="data">')
    return json.loads(text[start:text.index("</script>", start)])


def test_certain_cells_and_cells_near_the_threshold():
    rng = np.random.RandomState(0)
    p = rng.rand(40, 5).astype(np.float32)
    labels = rng.choice([1, -1, 0, 0, 0], (40, 5)).astype(np.int8)
    threshold = np.array([0.2, 0.5, 0.5, 0.8, 0.0])  # 0: every cell passes
    chosen = choose_cells(p, labels, threshold)
    passed = int(((p >= threshold) & (labels == 0)).sum())
    every = [cell for cells in chosen.values() for cell in zip(*cells)]
    assert len(set(every)) == len(every) and all(labels[cell] == 0 for cell in every)
    assert len(chosen["uncertain"][0]) == passed // 2

    def distance(cells):
        odds = [np.log(np.clip(x, 1e-6, 1) / np.clip(1 - x, 1e-6, 1))
                for x in (p[cells], threshold[cells[1]])]
        return np.abs(odds[0] - odds[1])
    for kind in ("present", "absent"):
        assert distance(chosen["uncertain"]).max() <= distance(chosen[kind]).min()
    assert (np.diff(p[chosen["present"]]) <= 0).all() and (np.diff(p[chosen["absent"]]) >= 0).all()
    assert (p[chosen["present"]] >= threshold[chosen["present"][1]]).all()
    assert (p[chosen["absent"]] < threshold[chosen["absent"][1]]).all()
    assert all(len(cells[0]) <= 3 for cells in choose_cells(p, labels, threshold, 3).values())


def test_as_many_are_suggested_absent_as_reach_the_threshold():
    """Of a hundred cells thirty pass, one of them just so: half as many are uncertain, and the
    thirty least probable are absent."""
    p = np.concatenate([[0.5], np.linspace(0.6, 0.99, 29), np.linspace(0.01, 0.4, 70)])[:, None]
    chosen = choose_cells(p, np.zeros((100, 1), np.int8), np.array([0.5]))
    assert len(chosen["uncertain"][0]) == 15
    assert chosen["absent"][0].tolist() == list(range(30, 60))


def test_the_list_of_a_benchmark_and_its_page(trained, tmp_path, capfd):
    arguments = [trained, "--suggest", tmp_path / "s.csv", "--pictures", 20]
    status, out, err = command(evaluation.main, arguments, capfd)
    assert status == 0 and err == []
    model = Predictor(trained)
    split = model.splits()["train"]
    rows = rows_of(tmp_path / "s.csv")
    assert list(rows[0]) == ["image", "category", "label", "probability", "kind"]
    at = {os.path.relpath(path, model.cfg.root): i for i, path in enumerate(split.paths)}
    p = model.probabilities(split)
    listed = [(at[row["image"]], model.names.index(row["category"])) for row in rows]
    assert len(set(listed)) == len(rows) and all(split.labels[cell] == 0 for cell in listed)
    assert {row["kind"]: row["label"] for row in rows} == {"present": "1", "uncertain": "",
                                                           "absent": "0"}
    assert all(abs(float(row["probability"]) - p[cell]) < 1e-3 for row, cell in zip(rows, listed))

    page = page_of(tmp_path / "s.html")
    assert page["grid"] == list(model.grid) and len(page["cells"]) <= 20
    shown = {(cell["image"], cell["category"], cell["kind"]) for cell in page["cells"]}
    assert shown <= {(row["image"], row["category"], row["kind"]) for row in rows}
    assert len({kind for _, _, kind in shown}) == 3
    assert {str(cell["photo"]) for cell in page["cells"]} == set(page["photos"])
    for cell in page["cells"]:
        _, _, maps = next(model.iterate([split.paths[at[cell["image"]]]]))
        mask = maps[model.names.index(cell["category"])]
        assert np.allclose(cell["region"], 255 * mask / mask.max(), atol=1)
    text = (tmp_path / "s.html").read_text()
    assert "://" not in text and text.count("<script") == 2  # asks the network for nothing


def test_cached_features_are_used_and_the_backbone_runs_for_the_page_alone(
        trained, tmp_path, monkeypatch):
    assert evaluation.main([str(trained), "--suggest", str(tmp_path / "first.csv")]) == 0

    monkeypatch.setattr(FeatureLoader, "load", None)  # what reads photos and runs the backbone
    assert evaluation.main([str(trained), "--suggest", str(tmp_path / "second.csv"),
                            "--pictures", "0"]) == 0
    assert rows_of(tmp_path / "first.csv") == rows_of(tmp_path / "second.csv")


@pytest.mark.parametrize("cached", (0, 1))
def test_a_half_filled_sheet_is_trained_suggested_for_merged_and_trained_again(
        world, tmp_path, capfd, cached):
    images = sorted((world / "scenes" / "train2014").iterdir())[:24]
    (tmp_path / "in").mkdir()
    lines, rng = ["image,sun, a tree ,=Hünd"], np.random.RandomState(0)
    for i, image in enumerate(images):
        name = f"größe{i}.jpg" if i % 2 else f"-{i}.jpg"
        shutil.copy(image, tmp_path / "in" / name)
        lines.append(",".join([f"in/{name}", *rng.choice(["1", "0", "", ""], 3)]))
    sheet = tmp_path / "labels.csv"
    sheet.write_text("\n".join(lines), encoding="utf-8")
    run(world, tmp_path / "run", data=sheet, root=None, ratio=None, epochs=2, cache_features=cached)
    before = [line.split(",") for line in lines[1:]]
    status, out, err = command(evaluation.main,
                               [tmp_path / "run", "--suggest", tmp_path / "more.csv"], capfd)
    assert status == 0 and err == []
    # validation's rows too
    assert f"of {sum(row.count('') for row in before)} unknown labels" in out[-1]
    raw = (tmp_path / "more.csv").read_bytes()
    assert raw.startswith(b"\xef\xbb\xbf")
    cells = [cell for row in csv.reader(io.StringIO(raw.decode("utf-8-sig"))) for cell in row]
    assert not any(cell[:1] in ("=", "+", "-", "@") for cell in cells)

    suggested = [row for row in rows_of(tmp_path / "more.csv") if row["label"]]
    assert command(review.main, ["merge", sheet, tmp_path / "more.csv"], capfd)[0] == 0
    after = [line.split(",") for line in sheet.read_text(encoding="utf-8").splitlines()[1:]]
    empty_before, empty_after = (sum(row.count("") for row in rows) for rows in (before, after))
    assert empty_before - empty_after == len(suggested)
    column = {"sun": 1, "a tree": 2, "'=Hünd": 3}
    filled = {row[0]: row for row in after}
    assert all(filled[row["image"]][column[row["category"]]] == row["label"] for row in suggested)
    run(world, tmp_path / "again", data=sheet, root=None, ratio=None, epochs=1, cache_features=0)


def test_an_empty_sheet_is_suggested_for_by_clip_alone(world, tmp_path, capfd):
    photos = shutil.copytree(world / "scenes" / "train2014", tmp_path / "photos")
    sheet = photos / "labels.csv"
    six = "sun,tree,car,bus,cup,dog"
    assert command(review.main, ["new-sheet", photos, "--categories", six], capfd)[0] == 0
    settings = ["--data", sheet, "--clip", world / "clip-quickgelu.safetensors"]
    assert command(evaluation.main, ["--zero-shot", *settings, "--size", 64, "--suggest",
                                     tmp_path / "s.csv"], capfd)[0] == 0
    rows = rows_of(tmp_path / "s.csv")
    p = {(row["image"], row["category"]): float(row["probability"]) for row in rows
         if row["kind"] == "present"}
    assert p and min(p.values()) >= 0.5
    assert {row["kind"] for row in rows} == {"present", "uncertain", "absent"}
    assert all(len(cell["region"]) == 4 for cell in page_of(tmp_path / "s.html")["cells"])
    assert command(review.main, ["merge", sheet, tmp_path / "s.csv"], capfd)[0] == 0
    assert len(data.complete(Config(data=str(sheet)))["train"].labels.nonzero()[0]) == len(
        [row for row in rows if row["label"]])


@pytest.mark.parametrize("given, weight", (("1 ", True), (" ", False), ("10", False)))
def test_clip_alone_tells_the_weight_that_the_answers_would_end(world, tmp_path, given, weight,
                                                                capfd):
    """A sheet of ticks is trained with 0.3 by default, until answers bring it many 0s."""
    photos = shutil.copytree(world / "scenes" / "train2014", tmp_path / "photos")
    rows = [f"{p.name},{given[i % len(given)].strip()},"
            for i, p in enumerate(sorted(photos.iterdir()))]
    (photos / "labels.csv").write_text("\n".join(["image,sun,cup", *rows]))
    words = ["--zero-shot", "--data", photos / "labels.csv", "--size", 64, "--clip",
             world / "clip-quickgelu.safetensors", "--suggest", tmp_path / "s.csv"]
    status, out, _ = command(evaluation.main, words, capfd)
    assert status == 0 and ("train again with --assume-negative 0.3" in out[-1]) == weight
    then = page_of(tmp_path / "s.html")["then"]
    assert "train again" in then and ("--assume-negative 0.3" in then) == weight


def test_photos_of_a_validation_sheet_are_not_suggested_for(world, trained, tmp_path):
    """Their names may be the training sheet's: the answers would go into its cells."""
    for part in ("train", "val"):
        shutil.copytree(world / "scenes" / f"{part}2014", tmp_path / part)
        rows = [f"{name}," for name in sorted(os.listdir(tmp_path / part))]
        (tmp_path / f"{part}.csv").write_text("\n".join(["image,sun", *rows]))
    model = Predictor(trained)
    model.cfg = Config(data=str(tmp_path / "train.csv"), root=str(tmp_path / "train"), size=64)
    model.names, model.threshold = ["sun"], np.zeros(1)
    splits = data.complete(model.cfg)
    model.cfg.root = str(tmp_path / "val")
    val = data.complete(Config(data=str(tmp_path / "val.csv"), root=model.cfg.root))["train"]
    model.splits = lambda: {"train": splits["train"], "val": val}
    model.probabilities = lambda split: np.full((len(split.paths), 1), 0.5)
    model.cfg.val = str(tmp_path / "val.csv")
    suggest(model, SimpleNamespace(suggest=tmp_path / "s.csv", pictures=0))
    assert {row["image"] for row in rows_of(tmp_path / "s.csv")} == set(splits["train"].listed)


def test_only_a_sheet_with_a_column_a_category_is_told_to_take_answers(trained, tmp_path, capfd):
    _, out, _ = command(evaluation.main, [trained, "--suggest", tmp_path / "s.csv"], capfd)
    assert "tools.review merge" not in out[-1]
    photos = sorted((trained.parent / "scenes" / "val2014").iterdir())
    for name, head, cell in (("lists", "tags", "sun"), ("columns", "sun", "1")):
        rows = [f"{photo},{cell}" for photo in photos]
        (tmp_path / "x.csv").write_text("\n".join([f"image,{head}", *rows]))
        model = Predictor(trained)
        model.cfg = Config(data=str(tmp_path / "x.csv"), root="/", size=64, unlisted="unknown")
        model.names, model.threshold = ["sun"], np.zeros(1)
        model.probabilities = lambda split: np.full((len(split.paths), 1), 0.5)
        model.splits = lambda: {"train": data.complete(model.cfg)["train"]}
        suggest(model, SimpleNamespace(suggest=tmp_path / f"{name}.csv", pictures=0))
        last = capfd.readouterr().out.splitlines()[-1]
        assert ("tools.review merge" in last) == (name == "columns")
        assert ("takes no answers" in last) == (name == "lists")  # before they are given
        assert page_of(tmp_path / f"{name}.html")["then"] in last


def test_without_a_run_a_sheet_is_read_as_its_options_say(world, tmp_path, capfd):
    """What names --ignore, --minus-one and --activation as the remedy has to take them."""
    photos = shutil.copytree(world / "scenes" / "train2014", tmp_path / "photos")
    sheet = photos / "labels.csv"
    rows = [f"{p.name},ann,{i % 3 - 1},," for i, p in enumerate(sorted(photos.iterdir()))]
    sheet.write_text("\n".join(["image,who labels,sun,tree,car", *rows]))
    weights = shutil.copy(world / "clip-quickgelu.safetensors", tmp_path / "x.safetensors")
    words = ["--zero-shot", "--data", sheet, "--clip", weights, "--size", 64, "--suggest",
             tmp_path / "s.csv"]
    for option in (["--ignore", "who labels"], ["--minus-one", "absent"],
                   ["--activation", "quickgelu"]):
        one_line(evaluation.main, words, capfd, option[0])
        words += option
    assert command(evaluation.main, words, capfd)[0] == 0
    assert {row["category"] for row in rows_of(tmp_path / "s.csv")} <= {"sun", "tree", "car"}
    one_line(evaluation.main, ["run", "--minus-one", "absent"], capfd, "--minus-one belongs to")


def test_the_list_is_a_csv(trained, tmp_path, capfd):
    one_line(evaluation.main, [trained, "--suggest", tmp_path / "x.html"], capfd, "expects a .csv")


@pytest.mark.parametrize("names",
                         (["./in/{}", "in//{}", "in/../in/{}"], ["{here}/in/{}"], ["link/{}"]))
@pytest.mark.parametrize("root", (None, ".", "../work"))
def test_suggestions_name_the_images_as_the_sheet_does(trained, tmp_path, monkeypatch, names, root):
    shutil.copytree(trained.parent / "scenes" / "val2014", tmp_path / "work" / "in")
    (tmp_path / "work" / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path / "work")
    photos = sorted(os.listdir("in"))
    rows = [names[i % len(names)].format(photo, here=tmp_path / "work")
            for i, photo in enumerate(photos)]
    lines = ["image,sun,cup", *(f"{row},{i % 2}," for i, row in enumerate(rows))]
    (tmp_path / "work" / "x.csv").write_text("\n".join(lines))
    model = Predictor(trained)
    model.cfg = Config(data=str(tmp_path / "work" / "x.csv"), root=root, size=64, workers=0)
    model.names = ["sun", "cup"]
    model.threshold = np.zeros(2)
    model.probabilities = lambda split: np.full((len(split.paths), 2), 0.5)
    suggest(model, SimpleNamespace(suggest="s.csv", pictures=0))
    assert {row["image"] for row in rows_of("s.csv")} == set(rows)


def test_zero_shot_leaves_out_what_is_not_used(tmp_path, capfd):
    """NUS-WIDE lists photos that Flickr has lost."""
    import fake_datasets as fake

    fake.nuswide(tmp_path / "nus")
    options = ["--data", "nuswide", "--root", tmp_path / "nus", "--clip", "tiny", "--size", 32]
    assert command(evaluation.main, ["--zero-shot", *options, "--suggest", tmp_path / "s.csv"],
                   capfd)[0] == 0
