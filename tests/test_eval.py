"""What a practitioner does with a run: predictions, pictures, tables; and what is refused."""

import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_world import command, one_line, run, sheet, trained, weights, world

import clip
from clip.features import FeatureLoader
import data
import eval as evaluation
from tools.predict import images_in
import train
from eval import Predictor
from eval import best_thresholds
from support import UserError
from tools.predictor import region_map
from tools.zero_shot import scores_of
from trm import Output, Prompts


@pytest.fixture
def photos(tmp_path):
    """Photos as people have them: sizes, modes, formats and marks."""
    folder, rng = tmp_path / "photos", np.random.RandomState(0)
    folder.mkdir()
    rgb = Image.fromarray(rng.randint(0, 256, (90, 140, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by the camera
    for name, image, how in (
        ("wide.jpg", rgb.resize((900, 40)), {}),
        ("tall.png", rgb.resize((3, 200)), {}),
        ("one.bmp", rgb.resize((1, 1)), {}),
        ("grey.png", rgb.convert("L"), {}),
        ("grey16.png", Image.fromarray(rng.randint(0, 65536, (50, 60)).astype(np.uint16)), {}),
        ("alpha.png", rgb.convert("RGBA"), {}),
        ("palette.gif", rgb.convert("P"), {}),
        ("print.jpg", rgb.convert("CMYK"), {}),
        ("bits.png", rgb.convert("1"), {}),
        ("turned.jpg", rgb, dict(exif=exif)),
        ("scan.tif", rgb, {}),
        ("web.webp", rgb, {}),
        ("größe π.JPG", rgb, {}),
    ):
        image.save(folder / name, **how)
    (folder / "notes.txt").write_text("not an image, and not taken for one")
    return folder


def test_few_positives_choose_no_epoch(monkeypatch):
    """Ten a category on average let validation choose; test's best is told, and never kept."""
    monkeypatch.setattr(evaluation, "ENOUGH", 10)
    for split, positives, noted, kept in (("val", 19, False, False), ("val", 20, True, True),
                                          ("test", 1, True, False), ("test", 0, False, False)):
        state = SimpleNamespace(memory=SimpleNamespace(cursor=[0, 0]), best=None, epoch=3)
        assert evaluation.note_best(state, {split: dict(positives=positives, mAP=50.0)}) == kept
        assert (state.best is not None) == noted


def test_validation_chooses_the_epoch_and_of_equal_ones_the_first():
    state = SimpleNamespace(memory=SimpleNamespace(cursor=[0]), best=None, epoch=0)
    chosen = []
    for on_val, on_test in ((50, 90), (60, 10), (60, 99), (55, 99)):
        state.epoch += 1
        numbers = {"val": dict(positives=9, mAP=on_val), "test": dict(positives=9, mAP=on_test)}
        chosen.append(evaluation.note_best(state, numbers))
    assert chosen == [True, True, False, False]
    assert state.best == {"epoch": 2, "chosen_on": "val", "mAP": 60}


def test_the_mean_score_lies_between_the_two_that_it_is_of():
    one, three = torch.tensor([[1.0]]), torch.tensor([[3.0]])
    features = torch.ones(1, 2, 4), torch.ones(1, 4), torch.full((1, 4), 0.5)  # f, x, g: cosines 1
    scores = scores_of(Output(one, three), *features)
    assert scores == {"region": 1, "query": 3, "mean": 2, "zero-shot": 2}
    assert scores_of(Output(one), *features) == {"region": 1, "zero-shot": 2}  # a baseline


def test_the_map_of_the_method_is_the_mask_and_that_of_a_baseline_its_similarity():
    out = Output(torch.zeros(1, 1), energy=torch.tensor([[[0.0, 2.0]]]))
    assert region_map(out, "carl").tolist() == [[[0.5, pytest.approx(1 / (1 + np.exp(-2)))]]]
    assert region_map(out, "dualcoop").tolist() == [[[0.0, 2.0]]]


def test_an_ensemble_averages_probabilities_and_thresholds(capsys):
    """Two runs, one category: their means .475 .55 .53 .51 against .52 are all right, while the
    larger probability, one run's threshold or 0.5 would each be wrong about an image."""
    first, second = [[0.9], [0.4], [0.6], [0.51]], [[0.05], [0.7], [0.46], [0.51]]
    members = [SimpleNamespace(loader=lambda split: None, cfg=SimpleNamespace(score="query"),
                               all_scores=lambda _, p=p: ({"query": np.array(p),
                                                           "zero-shot": -np.array(p)}, {}),
                               threshold=np.array([limit]))
               for p, limit in ((first, 0.44), (second, 0.6))]
    split = SimpleNamespace(truth=np.array([[-1], [1], [1], [-1]], np.int8))
    evaluation.table(members, split, SimpleNamespace(json=True))
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["mAP"] == numbers["CP"] == numbers["CR"] == 100
    assert numbers["mAP_zero-shot"] == pytest.approx(100 * (1 + 2 / 3) / 2, abs=1e-3)


def test_the_clearest_suspect_comes_first_and_the_mean_itself_is_suspect():
    """Labelled present: .75 and .75. Of those labelled absent, one is as high and one is higher.
    Where no image is labelled present, nothing says how high that would be."""
    from tools.categories import suspects
    scores = np.array([[0.75, 0.9], [0.75, 0.9], [0.25, 0.9], [0.75, 0.9], [1.0, 0.9], [0.25, 0.9]])
    truth = np.array([[1, -1], [1, -1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]], np.int8)
    assert suspects(scores, truth) == [(4, 0), (3, 0)]


def test_no_cell_of_the_csv_is_a_formula(trained, photos, tmp_path, capfd, monkeypatch):
    (tmp_path / "=cmd.png").write_bytes(sorted(photos.glob("*.png"))[0].read_bytes())
    monkeypatch.chdir(tmp_path)
    sheet = tmp_path / "all.csv"
    status, _, _ = command(evaluation.main, [trained, "--image", "=cmd.png", "--csv", sheet,
                                             "--pictures", 0], capfd)
    assert status == 0 and sheet.read_bytes().decode("utf-8-sig").splitlines()[1][:9] == "'=cmd.png"


def test_every_size_and_mode_is_predicted_pictured_and_written(trained, photos, tmp_path, capfd):
    sheet, pictures = tmp_path / "all.csv", tmp_path / "pictures"
    status, out, err = command(
        evaluation.main,
        [
            trained,
            "--image",
            photos,
            "--json",
            "--csv",
            sheet,
            "--out",
            pictures,
            "--top",
            3,
            "--batch",
            4,
        ],
        capfd,
    )
    assert (
        status == 0
        and len(err) == 2
        and "1 of 14 files are no readable images and were skipped" in err[0]
        and "notes.txt (cannot identify" in err[1]
    )
    found = [json.loads(line) for line in out]
    images = sorted(p for p in photos.iterdir() if p.suffix != ".txt")
    assert [row["image"] for row in found] == [str(p) for p in images] and len(images) == 13
    rows = list(csv.DictReader(open(sheet, encoding="utf-8-sig")))
    names = Predictor(trained).names
    assert [row.pop("image") for row in rows] == [str(p) for p in images] and list(rows[0]) == names
    for row, wide in zip(found, rows):
        shown = list(row["scores"].values())
        assert (
            len(shown) == 3
            and shown == sorted(shown, reverse=True)
            and all(0 < p < 1 for p in shown)
        )
        best = sorted((float(p) for p in wide.values()), reverse=True)[:3]
        assert np.allclose(shown, best, atol=1e-4)
        with Image.open(row["picture"]) as picture:
            assert picture.size == (4 * 198 + 6, 243)
    assert len(list(pictures.iterdir())) == 13

    status, out, err = command(
        evaluation.main,
        [trained, "--image", photos / "grey.png", "--pictures", 0, "--out", tmp_path / "none"],
        capfd,
    )
    assert (
        status == 0
        and len(out) == 2
        and out[1].startswith(f"{photos / 'grey.png'}: ")
        and not (tmp_path / "none").exists()
    )


def test_a_picture_says_whether_its_verdicts_are_right_and_which_maps_are_flat(photos):
    from types import SimpleNamespace
    from tools.plots import region_tiles
    predictor = SimpleNamespace(names=["a", "b", "c", "d"], grid=(2, 3),
                                threshold=np.array([0.5, 0.5, 0.2, 0.2]))
    maps = np.full((4, 6), 0.9)
    maps[0, :5], maps[3, 5] = 0.1, 0.04
    maps[3, :5] = 0.001
    p, truth = np.array([0.7, 0.4, 0.3, 0.3]), np.array([1, 1, -1, 0])
    tiles = region_tiles(predictor, photos / "grey.png", p, maps, 4, truth)
    assert [caption for _, caption in tiles] == [
        "grey.png", "a\npresent: 0.70 >= 0.50, right\nregion: peak 0.90, area 17 %",
        "b\nabsent: 0.40 < 0.50, wrong\nregion: peak 0.90, area 100 %, flat",
        "c\npresent: 0.30 >= 0.20, wrong\nregion: peak 0.90, area 100 %, flat",
        "d\npresent: 0.30 >= 0.20, truth unknown\nregion: peak 0.04, area 17 %, flat"]


def test_one_pass_of_the_network_in_batches(trained, photos, tmp_path, capfd, monkeypatch):
    sizes, encode = [], FeatureLoader.encode
    monkeypatch.setattr(
        FeatureLoader,
        "encode",
        lambda self, x, *need: sizes.append(len(x)) or encode(self, x, *need),
    )
    assert (
        evaluation.main(
            [str(trained), "--image", str(photos), "--batch", "5", "--out", str(tmp_path)]
        )
        == 0
    )
    assert sizes == [5, 5, 4]  # one of them is no image


def test_no_image_gives_no_prediction(trained):
    assert Predictor(trained).predict([]) == []


def test_batches_workers_and_neighbours_do_not_change_a_prediction(trained, photos):
    model, paths = Predictor(trained), [p for p in images_in([photos]) if not p.endswith(".txt")]
    rows = model.predict(paths, batch=32)
    for other in (model.predict(paths, batch=1), model.predict(paths, batch=3, workers=2)):
        for a, b in zip(rows, other):
            assert a["image"] == b["image"]
            # a GPU sums other batches in another order
            close = 1e-4 if model.device.type == "cuda" else 1e-5
            assert all(abs(p - b["scores"][name]) < close for name, p in a["scores"].items())

def test_an_image_may_be_a_path_bytes_a_file_object_a_pil_image_or_an_array(trained, photos):
    path = photos / "grey.png"
    with Image.open(path) as image:
        upright = np.asarray(image.convert("RGB"))
        image.load()
        given = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), image, upright]
        found = Predictor(trained).predict(given)
    for row in found:
        assert row["scores"] == pytest.approx(found[0]["scores"], abs=1e-5)
    assert [row["image"] for row in found[2:4]] == ["bytes", "BytesIO"]


def test_files_of_one_name_keep_their_own_pictures(trained, photos, tmp_path, capfd):
    (tmp_path / "more").mkdir()
    for name in ("grey.png", "GREY.png"):
        shutil.copy(photos / "grey.png", tmp_path / "more" / name)
    arguments = [
        trained,
        "--image",
        photos / "grey.png",
        tmp_path / "more",
        photos / "grey.png",
        "--out",
        tmp_path / "out",
        "--json",
    ]
    status, out, _ = command(evaluation.main, arguments, capfd)
    drawn = {json.loads(line)["picture"].lower() for line in out}
    assert (
        status == 0 and len(out) == len(drawn) == 4 and len(list((tmp_path / "out").iterdir())) == 4
    )


def test_unreadable_photos_cost_only_themselves(trained, photos, tmp_path, capfd):
    (photos / "broken.jpg").write_bytes((photos / "turned.jpg").read_bytes()[:700])
    (photos / "empty.png").write_bytes(b"")
    status, out, err = command(
        evaluation.main,
        [trained, "--image", photos, "--json", "--out", tmp_path, "--workers", 1],
        capfd,
    )
    assert status == 0 and len(out) == 13
    assert len(err) == 4 and err[0] == "3 of 16 files are no readable images and were skipped:"
    assert "broken.jpg (" in err[1] and "empty.png (" in err[2]
    strict = command(
        evaluation.main,
        [trained, "--image", photos, "--strict", "--out", tmp_path / "again"],
        capfd,
    )
    assert strict[0] == 2 and strict[2][-1].startswith("error: 3 of 16")
    with pytest.raises(UserError, match="broken.jpg"):
        Predictor(trained).predict([photos / "grey.png", photos / "broken.jpg"])
    with pytest.raises(UserError, match="put it in brackets"):
        Predictor(trained).predict(photos / "grey.png")
    with pytest.raises(UserError, match="put it in brackets"):
        Predictor(trained).predict(Image.open(photos / "grey.png"))
    with pytest.raises(UserError, match=r"got ndarray. .*several: list\(images\)"):
        Predictor(trained).predict(np.zeros((2, 64, 64, 3), np.uint8))


def test_thresholds_come_from_validation_and_decide_what_is_present(trained, capfd):
    state = torch.load(trained / "last.pt", weights_only=True)
    model = Predictor(trained, "last")
    val = model.splits()["val"]
    scores = model.probabilities(val)
    assert np.allclose(model.threshold, best_thresholds(scores, val.truth, k=2), atol=1e-6)
    assert state["threshold"] == model.threshold.tolist() and len(set(state["threshold"])) > 2
    assert state["rests_on"] == (val.truth == 1).sum(0).tolist() == model.rests_on
    row = model.row("x", np.where(np.arange(len(model.names)) % 2, 1.0, 0.0))
    assert row["present"] == model.names[1::2]
    assert set(model.row("x", model.threshold)["present"]) == set(model.names)
    assert model.row("x", np.nextafter(model.threshold, 0))["present"] == []


def test_a_checkpoint_holds_the_texts_of_its_prompts(trained):
    """Present first: swapped, every score would be turned round, here as in training."""
    state = torch.load(trained / "last.pt", weights_only=True)
    predictor = Predictor(trained, "last")
    prompts = Prompts(predictor.encoder, predictor.splits()["train"].prompts, predictor.cfg.context)
    prompts.load_state_dict({"context": state["model"]["prompts.context"]})
    prompts.to(predictor.device)
    for g, saved, used in zip(prompts(predictor.encoder), (state["g_pos"], state["g_neg"]),
                              (predictor.g_pos, predictor.g_neg)):
        assert torch.allclose(g.cpu(), saved, atol=1e-5) and torch.equal(saved, used.cpu())


def test_inference_needs_the_run_folder_and_the_image_encoder_only(
    world, photos, tmp_path, monkeypatch
):
    shutil.copytree(world / "scenes", tmp_path / "scenes")
    run(world, tmp_path / "run", root=tmp_path / "scenes", epochs=1, cache_dir=tmp_path / "cache")
    before = Predictor(tmp_path / "run").predict([photos / "grey.png"])
    shutil.rmtree(tmp_path / "scenes")
    shutil.rmtree(tmp_path / "cache")
    for kept in (tmp_path / "run").iterdir():
        if kept.is_dir():  # tensorboard, where it is installed
            shutil.rmtree(kept)
        elif kept.name != "best.pt":
            kept.unlink()

    def never(*_, **__):
        raise AssertionError("the text encoder was asked")

    for name in ("encode_text", "tokenize"):
        monkeypatch.setattr(clip.CLIP, name, never)
    # meta: a check of shapes
    monkeypatch.setattr(
        clip.CLIP,
        "encode_prompts",
        lambda _, embeddings, __: None if embeddings.is_meta else never(),
    )
    monkeypatch.setattr(data, "load", never)
    assert Predictor(tmp_path / "run").predict([photos / "grey.png"]) == before


def test_the_evaluated_table_is_the_one_of_training(trained, capfd):
    status, out, err = command(evaluation.main, [trained, "--checkpoint", "last", "--json"], capfd)
    stored = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])["test"]
    got = json.loads(out[-1])
    assert (
        status == 0
        and got["mAP"] == pytest.approx(stored["mAP"], abs=0.01)
        and got["left_out"] == stored["left_out"]
    )
    assert got["mAP_zero-shot"] == pytest.approx(stored["mAP_zero-shot"], abs=0.01)
    _, out, _ = command(evaluation.main, [trained, "--checkpoint", "last"], capfd)
    told = "warning: on scenes/test the run is below CLIP without any training" in out[-1]
    assert told == (got["mAP"] < got["mAP_zero-shot"])
    status, out, _ = command(
        evaluation.main, [trained, "--ensemble", trained, "--checkpoint", "last", "--json"], capfd
    )
    assert status == 0 and json.loads(out[-1])["mAP"] == pytest.approx(stored["mAP"], abs=0.01)
    status, out, _ = command(evaluation.main, [trained, "--compare", trained], capfd)
    assert (
        status == 0
        and [line.split(",")[0].split(" ")[0] for line in out[-13:]]
        == ["zero-shot"] * 3 + [str(trained)] * 10
    )
    assert all(
        f"{trained}, {what} " in line
        for what,
        line in zip(("region score", "query score", "mean score", "mixed score", "mask"), out[-5:])
    )


def test_maps_of_a_split_keep_their_highest_cell(trained):
    """Two cells of a saturated mask differ by less than float16 can tell."""
    predictor = Predictor(trained)
    split = predictor.splits()["test"]

    def nearly_alike(out, model):
        energy = out.energy.flatten(2)
        return {"mask": 0.99 + 1e-5 * torch.arange(energy.shape[-1]).expand_as(energy)}

    _, maps = predictor.all_scores(split, nearly_alike)
    assert (maps["mask"].argmax(-1) == maps["mask"].shape[-1] - 1).all()


def test_the_columns_of_compare_stand_below_their_names(trained, tmp_path, capfd):
    long = tmp_path / ("a-name-" * 6)
    shutil.copytree(trained, long)
    _, out, _ = command(evaluation.main, [long, "--compare", trained], capfd)
    head, *rows = out[2:]
    assert len(rows) > 8
    for row in rows:
        if "%" in row:
            pointing, mass = (at.end() for at in re.finditer(" %", row))
            assert head.index("pointing") < pointing <= head.index("pointing") + len("pointing  ")
            assert head.index("mass") < mass <= head.index("mass") + len("mass in boxes")
        else:
            assert row.rindex(".") == head.index("mAP")


def test_a_compared_run_that_may_have_learned_from_the_images_is_named(sheet, world, capfd):
    folder, file = sheet
    other = folder.with_name("other")
    run(world, other, data=file, root=None, ratio=None, epochs=1, val=0)
    _, out, err = command(evaluation.main, [folder, "--compare", other], capfd)
    assert err == [f"note: labels/val is not what {other} was trained with: it may have learned "
                   "from these images"]
    for split in ("train", "val"):
        assert command(evaluation.main, [folder, "--compare", folder, "--split", split],
                       capfd)[2] == []
    _, out, err = command(evaluation.main, [folder, "--split", "val"], capfd)
    assert err == [] and "chosen on these labels" in out[0]
    _, out, err = command(evaluation.main, [folder, "--split", "train"], capfd)
    assert err == [] and "mixed score" in out[0] and "chosen on these labels" in out[0]
    file.write_text(file.read_text().replace(",1,", ",0,"))
    _, out, err = command(evaluation.main, [folder, "--split", "val"], capfd)
    assert "other names, prompts or labels" in err[0] and "chosen on these labels" not in out[0]
    _, out, err = command(evaluation.main, [folder, "--split", "train"], capfd)
    assert "other names, prompts or labels" in err[0] and "chosen on these labels" not in out[0]


def test_a_split_that_a_run_does_not_have_is_told(sheet, capfd):
    one_line(evaluation.main, [sheet[0], "--split", "test"], capfd, "has no test split",
             "choose another --split")


def test_runs_whose_columns_are_in_another_order_are_not_averaged(sheet, world, capfd):
    folder, file = sheet
    rows = [line.split(",") for line in file.read_text().splitlines()]
    turned = file.with_name("turned.csv")
    turned.write_text("\n".join(",".join([name, *cells[::-1]]) for name, *cells in rows))
    other = folder.with_name("turned")
    run(world, other, data=turned, root=None, ratio=None, epochs=1)
    status, _, err = command(evaluation.main, [folder, "--ensemble", other], capfd)
    assert status == 2 and "other categories than" in err[-1] and "another order" in err[-1]


def test_the_processes_that_decode_can_be_chosen_for_a_run(trained, monkeypatch, capfd):
    asked, begun = [], FeatureLoader.__init__
    monkeypatch.setattr(FeatureLoader, "__init__", lambda self, *given, **how: (
        begun(self, *given, **how), asked.append(self.workers))[0])
    assert evaluation.main([str(trained), "--workers", "1"]) == 0
    assert asked == [1]


def test_a_run_on_another_clip_than_the_first_one_loads_its_own(trained):
    shared = SimpleNamespace(sha256="of other weights")
    own = Predictor(trained).encoder.sha256
    assert Predictor(trained, encoder=shared).encoder.sha256 == own != shared.sha256


def test_a_line_a_category_the_worst_first_and_planted_wrong_labels_are_found(trained, tmp_path,
                                                                              capfd):
    from datasets.base import Split
    from tools.categories import category_lines, suspects
    truth = np.where(np.random.RandomState(0).random_sample((60, 3)) < 0.4, 1, -1).astype(np.int8)
    scores = np.where(truth == 1, 0.8, 0.1) + np.random.RandomState(1).random_sample((60, 3)) / 10
    for planted in ((5, 1), (9, 2)):
        scores[planted] = 0.95 if truth[planted] == 1 else 0.05
        truth[planted] *= -1
    truth[7], scores[7] = 0, 0.3
    assert sorted(suspects(scores, truth)) == [(5, 1), (9, 2)]
    split = Split("x", [f"{i}.png" for i in range(60)], ["a", "b", "c"], truth)
    lines = category_lines(split, scores, np.array([0.9, np.nan, 0.2]), np.full(3, 0.5), [4, 0, 7])
    assert [line.split()[0] for line in lines[1:4]] == ["c", "a", "b"]
    assert lines[1].split()[-3:] == ["7", "58", "1"] and lines[2].split()[-2:] == ["59", "0"]
    assert any("9.png: c" in line for line in lines[5:7])
    sheet = Split("x", split.paths, split.names, truth.copy(), truth, where=["x.csv:2"] * 60)
    for i, c in ((5, 1), (9, 2)):  # nobody filled the cell, or --ratio has hidden it
        sheet.labels[i, c] = 0
        told = "\n".join(category_lines(sheet, scores, np.zeros(3), np.full(3, 0.5), [4, 0, 7]))
        what = "labelled present" if truth[i, c] == 1 else "no label of training, counted as absent"
        assert f"{i}.png: {'abc'[c]} is {what}, " in told
    assert sorted(truth[[5, 9], [1, 2]]) == [-1, 1]
    worst = [line.split(".png")[0].strip() for line in lines[8:]]  # not the unknown image 7
    assert len(worst) == 5 and set(worst[:2]) == {"5", "9"} and "7" not in worst

    status, out, _ = command(evaluation.main, [trained, "--categories"], capfd)
    names = Predictor(trained).names
    assert status == 0 and {line.split("  ")[0] for line in out[-99:]} >= set(names)
    one_line(evaluation.main, [trained, "--categories", "--json"], capfd, "--categories")
    words = [trained, "--suggest", tmp_path / "out.csv", "--json"]
    one_line(evaluation.main, words, capfd, "drop --json")
    assert not (tmp_path / "out.csv").exists()


def test_a_sheet_without_a_test_split_is_scored_on_its_validation_rows(trained, world, tmp_path,
                                                                       capfd):
    photos = sorted((world / "scenes" / "val2014").iterdir())
    sheet = tmp_path / "sheet.csv"
    lines = [f"{photo},{i % 2},{i % 3 // 2}" for i, photo in enumerate(photos)]
    sheet.write_text("\n".join(["image,dog,cat", *lines]) + "\n")
    run(world, tmp_path / "run", data=sheet, root=None, ratio=None, val=0.4, epochs=1)
    status, out, _ = command(evaluation.main, [tmp_path / "run"], capfd)
    assert status == 0 and "/val, " in out[-2] and "positives " in out[-1]


# ---- refusals
def test_what_is_asked_wrongly_ends_in_one_line(trained, photos, tmp_path, capfd):
    bad = lambda *arguments, words: one_line(evaluation.main, arguments, capfd, *words)
    bad(trained, "--imgae", "x.jpg", words=["--imgae", "did you mean --image"])
    bad(trained, "--top", "x", words=["--top"])
    bad(words=["run"])
    bad(tmp_path / "nowhere", words=["nowhere", "run folder"])
    bad(trained, "--image", tmp_path / "gone.jpg", words=["gone.jpg"])
    (tmp_path / "empty").mkdir()
    bad(trained, "--image", tmp_path / "empty", words=["found no file"])
    bad(trained, "--image", photos, "--top", 0, words=["--top"])
    (tmp_path / "file").write_text("")
    bad(trained, "--image", photos, "--out", tmp_path / "file" / "x", words=["Not a directory"])
    nowhere = [trained, "--image", photos, "--out", tmp_path / "file" / "x", "--pictures", 0]
    assert command(evaluation.main, nowhere, capfd)[0] == 0  # no picture needs no folder
    bad(trained, "--image", photos, "--batch", 0, words=["--batch"])
    both = [trained, "--image", photos, "--suggest", tmp_path / "s.csv"]
    bad(*both, words=["--suggest", "not allowed with"])
    bad(
        trained,
        "--suggest",
        tmp_path / "no" / "s.csv",
        "--pictures",
        0,
        words=["s.csv", "cannot be written"],
    )
    bad(trained, "--image", photos / "grey.png", "--out", photos / "grey.png", words=["grey.png"])
    bad(trained, "--root", tmp_path / "moved", words=["moved"])
    bad(trained, "--split", "val", "--root", tmp_path, words=[str(tmp_path)])
    # its guesses are for the training images
    bad(trained, "--suggest", tmp_path / "t.csv", "--split", "test", words=["drop --split"])
    bad(trained, "--image", photos, "--split", "test", words=["drop --split"])


@pytest.mark.parametrize(
    "damage",
    (
        "truncated",
        "empty",
        "text",
        "pickle",
        "foreign",
        "folder",
        "names",
        "threshold",
        "model",
        "config",
        "settings",
    ),
)
def test_a_damaged_checkpoint_ends_in_one_line(trained, tmp_path, capfd, damage):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "best.pt"
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("<html>404</html>")
    elif damage == "pickle":
        file.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    # parts that do not fit each other
    elif damage in ("names", "threshold", "model", "config", "settings"):
        state = torch.load(file, weights_only=True)
        state.update(
            {
                "names": dict(names=state["names"][1:]),
                "threshold": dict(threshold=[0.5]),
                "model": dict(model={}),
                "config": dict(config="{"),
                "settings": dict(config=json.dumps({"colour": 1})),
            }[damage]
        )
        torch.save(state, file)
    elif damage == "foreign":
        torch.save({"model": {"weight": torch.zeros(3)}}, file)
    else:
        file.unlink()
        file.mkdir()
    one_line(evaluation.main, [tmp_path / "run"], capfd, "best.pt")
    assert not (tmp_path / "ran").exists()


def test_present_categories_beyond_the_top_are_counted(trained, world, tmp_path, capfd):
    photo = sorted((world / "scenes" / "val2014").iterdir())[0]
    words = [trained, "--image", photo, "--top", 1, "--pictures", 0]
    (line,) = (line for line in command(evaluation.main, words, capfd)[1] if photo.name in line)
    found = json.loads(command(evaluation.main, [*words, "--json"], capfd)[1][-1])
    more = len(set(found["present"]) - set(found["scores"]))
    assert more > 0 and line.endswith(f"  +{more} present")


def test_json_stands_alone_where_features_have_to_be_made(world, tmp_path, capfd):
    run(world, tmp_path / "run", epochs=1, cache_dir=tmp_path / "features")
    shutil.rmtree(tmp_path / "features")
    status, out, _ = command(evaluation.main, [tmp_path / "run", "--json"], capfd)
    assert status == 0 and json.loads("\n".join(out))["mAP"] > 0


def test_another_clip_is_refused(trained, world, tmp_path, capfd):
    from safetensors.torch import save_file

    run(
        world,
        tmp_path / "run",
        epochs=1,
        clip=shutil.copy(
            world / "clip-quickgelu.safetensors", tmp_path / "mine-quickgelu.safetensors"
        ),
    )
    save_file(
        {k: v + (0.1 if v.is_floating_point() else 0) for k, v in weights().items()},
        tmp_path / "mine-quickgelu.safetensors",
    )
    one_line(evaluation.main, [tmp_path / "run"], capfd, "was trained on CLIP")
    one_line(train.main, ["--resume", tmp_path / "run"], capfd, "CLIP weights")


# ---- platforms
def test_the_device_is_chosen_and_every_module_works_without_optional_packages(
    world, trained, monkeypatch
):
    from support.cli import best_device

    if not torch.cuda.is_available():
        assert best_device().type == ("mps" if torch.backends.mps.is_available() else "cpu")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        assert best_device().type == "mps" and best_device(2).type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(best_device(4)) == "cuda"


def test_without_triton_a_run_trains_and_predicts(world, tmp_path):
    """As on Windows and macOS: the packages are hidden from a fresh interpreter."""
    import subprocess
    from small_world import ROOT, options

    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import train, eval\n"
        f"assert train.main({options(world, tmp_path / 'run', epochs=1)!r}) == 0\n"
        f"assert eval.main([{str(tmp_path / 'run')!r}, '--image', "
        f"{str(world / 'scenes' / 'val2014')!r}, '--pictures', '1']) == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout
    assert (tmp_path / "run" / "last.pt").exists()


def test_memory_of_a_split_that_is_scored_does_not_grow_with_its_batches():
    # in a process of its own: its heap is new
    script = """
import torch
from types import SimpleNamespace
from bench_step import peak
from tools.predictor import score_split
from trm import TRM

class Loader:
    batch = 128
    def __len__(self):
        return 64 * 128
    def batches(self, epoch, shuffle):
        for _ in range(64):
            yield None, torch.randn(128, 49, 128), torch.randn(128, 128)

torch.set_num_threads(1)
model, g = TRM(80, 128), torch.randn(3, 80, 128)
print(peak(lambda: score_split(model, *g[:2], Loader(), g[2])))
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONPATH=f"{root}:{root / 'tests'}",
                                   CUDA_VISIBLE_DEVICES=""))
    mib = float(done.stdout)
    if math.isnan(mib):
        pytest.skip("no Linux: the peak is not known")
    # 10 MiB of scores and the work of one batch: 130 to 140; 380 to 460 where each batch stays
    assert mib < 250, done.stderr


def test_a_pattern_that_the_shell_left_alone_and_a_folder_with_brackets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p/a.jpg", "p/b.jpg", "p/c.png", "p[1]/a.jpg", "p[1]/b[2].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert images_in(["p/[ac]*"]) == ["p/a.jpg", "p/c.png"]
    assert images_in(["p[1]/*.jpg"]) == ["p[1]/a.jpg", "p[1]/b[2].jpg"] == images_in(["p[1]"])
    assert images_in(["p[1]/b[2].jpg"]) == ["p[1]/b[2].jpg"]
    (tmp_path / "p1").mkdir()
    (tmp_path / "p1" / "d.jpg").touch()
    assert images_in(["p[1]/*.jpg"]) == ["p1/d.jpg"]  # as a shell has it
    with pytest.raises(UserError, match="expected images at p/.x.., found no file"):
        images_in(["p/[x]*"])
    Path("p/folder.jpg").mkdir()
    assert images_in(["p/*.jpg"]) == ["p/a.jpg", "p/b.jpg"]


def test_what_is_left_out_of_a_folder_is_told_and_heic_names_its_package(trained, photos, tmp_path,
                                                                         capfd):
    for name in ("._grey.jpg", "Thumbs.db", "phone.heic"):
        (photos / name).write_bytes(b"?")
    (photos / "linked").symlink_to(tmp_path)
    _, _, err = command(evaluation.main, [trained, "--image", photos, "--pictures", "0"], capfd)
    assert err[0].startswith("left out (hidden, no photos, links to folders): 3 in ")
    if not find_spec("pillow_heif"):
        assert any("phone.heic (" in line and "pip install pillow-heif" in line for line in err)


def test_heic_is_read_where_its_package_is_installed(tmp_path):
    pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    from datasets import augment
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.heic")
    assert augment.read(tmp_path / "a.heic").size == (64, 48)
