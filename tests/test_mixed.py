"""The mixed score: the run's logit and what CLIP knows without training, on one scale."""
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_world import command, options, run, sheet, world

import clip
import data
import eval as evaluation
import oracles
import train
from config import Config
from datasets.base import tells_presence
from eval import best_thresholds, metrics
from paper.run_table import history
from support import UserError
from support.checkpoint import read_checkpoint, read_config
from tools import build, report
from tools.predictor import Predictor
from tools.zero_shot import (mixed, probability_arrays, zero_shot, zero_shot_scale,
                             zero_shot_score, zero_shot_text)


def spread(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def test_zero_shot_is_the_whole_image_plus_its_best_location():
    torch.manual_seed(0)
    f, x, g = torch.randn(2, 5, 4), torch.randn(2, 4), F.normalize(torch.randn(3, 4), dim=-1)
    got = zero_shot_score(f, x, g)
    parts = zero_shot(g, [(None, f, x)])
    for b in range(2):
        for c in range(3):
            best = max(oracles.cosine(f[b, n].numpy(), g[c].numpy()) for n in range(5))
            whole = oracles.cosine(x[b].numpy(), g[c].numpy())
            assert float(got[b, c]) == pytest.approx(whole + best, abs=1e-5)
            assert parts["global"][b, c] == pytest.approx(whole, abs=1e-5)
            assert parts["dense"][b, c] == pytest.approx(best, abs=1e-5)


def test_each_template_counts_the_same_and_the_mean_has_unit_length():
    """Whatever the lengths of the text features: (10, 0) and (0, 1) have (1, 1) / sqrt 2 between
    them."""
    features = {"a dog": [10.0, 0.0], "the dog": [0.0, 1.0]}
    encoder = SimpleNamespace(tokenize=list, encode_text=lambda texts: torch.tensor(
        [features[text] for text in texts]))
    got = zero_shot_text(encoder, ["dog"], ("a {}", "the {}"))
    assert torch.allclose(got, torch.full((1, 2), 0.5**0.5))


def test_the_cosine_takes_the_mean_and_deviation_of_the_logit():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, (7, 3)).astype(np.float32)
    cosine = rng.normal(0.2, 0.02, (7, 3)).astype(np.float32)
    scores = {"region": torch.from_numpy(p).logit(), "zero-shot": torch.from_numpy(cosine)}
    known = (0, 1, 40)
    got = mixed(scores, zero_shot_scale(scores, known)).sigmoid()
    for c in range(3):
        logit = [math.log(v / (1 - v)) for v in p[:, c].tolist()]
        (m, s), (mz, sz) = spread(logit), spread(cosine[:, c].tolist())
        for i in range(7):
            z, n = (cosine[i, c] - mz) / sz, known[c]
            moved = m + s * z if n else 2 * (z - 1)  # no known positive: as without a run
            mean = (n * n * logit[i] + (n * n + 25) * moved) / (2 * n * n + 25)
            assert got[i, c] == pytest.approx(1 / (1 + math.exp(-mean)), abs=1e-5)


def test_a_category_without_spread_breaks_nothing():
    scores = {"region": torch.full((4, 1), 0.3), "zero-shot": torch.zeros(4, 1)}
    assert np.allclose(mixed(scores, zero_shot_scale(scores, [5])), 0.3, atol=1e-6)


def test_a_category_that_the_run_always_denies_is_ranked_by_zero_shot():
    """It has no known positive: the run's probabilities are all too small to tell apart."""
    zero = torch.tensor([[0.1], [0.3], [0.2], [0.4]])
    scores = {"region": torch.full((4, 1), -27.0), "zero-shot": zero}
    for known in (0, 1, 50):
        got = mixed(scores, zero_shot_scale(scores, [known]))
        assert (got.argsort(0) == zero.argsort(0)).all() and len(np.unique(got)) == 4


@pytest.fixture
def trained(world, tmp_path):
    run(world, tmp_path / "trained", epochs=2, score="mixed", cache_features=0)
    return tmp_path / "trained"


def test_one_photo_is_scored_as_in_its_split(trained):
    predictor = Predictor(trained, "last")
    split = predictor.splits()["test"]
    whole = predictor.probabilities(split)
    for i, p, _ in predictor.iterate(split.paths[:3]):
        assert np.allclose(p, whole[i], atol=1e-4)


def test_zero_shot_stands_beside_every_score(trained):
    predictor = Predictor(trained, "last")
    split = predictor.splits()["test"]
    loader = predictor.loader(split)
    g = zero_shot_text(predictor.encoder, split.prompts)
    found = zero_shot(g, loader.batches(0, shuffle=False))
    assert np.allclose(found["global"] + found["dense"], found["both"], atol=1e-6)
    mAP = metrics(found["both"], split.truth)["mAP"]
    for line in (trained / "metrics.jsonl").read_text().splitlines():
        test = json.loads(line)["test"]
        assert test["mAP_zero-shot"] == pytest.approx(mAP, abs=0.01)
        assert test["mAP"] == test["mAP_mixed"]
        assert f" categories, zero-shot {test['mAP_zero-shot']:.2f})" in report.mAPs({"test": test})
        told = report.mAPs({"val": test})
        categories = (split.truth == 1).any(0).sum()
        assert f"({(split.truth == 1).sum()} positives of {categories} categories, zero" in told


@pytest.mark.parametrize("val, which", ((None, "val"), (0, "train")))
def test_the_scale_is_never_of_the_test_split(world, tmp_path, val, which):
    run(world, tmp_path / "run", epochs=1, **({} if val is None else dict(val=val)))
    predictor = Predictor(tmp_path / "run", "last")
    scores, _ = predictor.all_scores(predictor.splits()[which])
    scores = {name: torch.from_numpy(p) for name, p in scores.items()}
    scores = {name: (p if name == "zero-shot" else p.logit()).float() for name, p in scores.items()}
    positives = (predictor.splits()["train"].labels == 1).sum(0)
    assert torch.allclose(zero_shot_scale(scores, positives), predictor.zero_shot_scale, rtol=1e-3,
                          atol=1e-3)


@pytest.mark.parametrize("ratio", (1.0, 0.5))
@pytest.mark.parametrize("val", (None, 0))
def test_thresholds_of_the_mixed_score_rest_on_training_photos_too(world, tmp_path, ratio, val):
    """On the labels that training sees, not on the hidden ones."""
    given = {} if val is None else dict(val=val)
    run(world, tmp_path / "run", epochs=1, score="mixed", ratio=ratio, **given)
    predictor = Predictor(tmp_path / "run", "last")
    splits = [split for name, split in predictor.splits().items() if split and name != "test"]
    p = np.concatenate([predictor.probabilities(split) for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    assert len(splits) == (1 if val == 0 else 2)
    assert predictor.rests_on == (labels == 1).sum(0).tolist()
    assert np.allclose(predictor.threshold, best_thresholds(p, labels, k=0.5), atol=1e-4)


def test_the_thousand_training_photos_come_from_the_whole_list(world, tmp_path):
    cfg, _ = train.parse(options(world, tmp_path / "run", score="mixed"))
    split = data.Split("many", [f"{i}.jpg" for i in range(2100)], ["dog"],
                       np.ones((2100, 1), np.int8))
    with mock.patch.object(build, "evaluation_loader", lambda cfg, split, *_: split):
        few = build.evaluation_loaders(cfg, (split, split, None), None, None, 0, 1)["train"]
    assert few.paths == [f"{i}.jpg" for i in range(0, 2100, 3)]


def test_rows_that_changed_since_training_are_told(trained, tmp_path, capfd):
    Predictor(trained, "last").splits()
    assert "note:" not in capfd.readouterr().err
    file = trained / "config.json"
    about = json.loads(file.read_text())
    about["data"]["scenes/val"]["sha256"] = "of other rows"
    file.write_text(json.dumps(about))
    Predictor(trained, "last").splits()
    assert "note: scenes/val is not what" in capfd.readouterr().err


def test_without_photos_there_is_no_mixed_score(trained, tmp_path):
    state = read_checkpoint(trained / "last.pt")
    from support.checkpoint import save_checkpoint
    save_checkpoint(state | {"zero_shot_scale": None}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="other --?.*|another --score"):
        Predictor(tmp_path, "last")
    assert Predictor(tmp_path, "last", places={"score": "region"}).cfg.score == "region"


@pytest.mark.parametrize("zero_shot_mAP, below", ((100.0, True), (0.0, False)))
def test_a_run_below_zero_shot_is_warned_of(world, tmp_path, capfd, monkeypatch, zero_shot_mAP,
                                            below):
    evaluate = train.evaluate

    def evaluated(*arguments):
        numbers, *others = evaluate(*arguments)
        for of_split in numbers.values():
            of_split["mAP_zero-shot"] = zero_shot_mAP
        return numbers, *others

    monkeypatch.setattr(train, "evaluate", evaluated)
    run(world, tmp_path / "run", epochs=1)
    out = capfd.readouterr().out
    for split in ("val", "test"):
        assert (f"warning: on {split} the run is below CLIP" in out) == below


def test_an_epoch_that_is_not_due_keeps_scale_and_thresholds(world, tmp_path):
    """A run of --eval-every 2 that is stopped after its third epoch, and goes on."""
    cfg, _ = train.parse(options(world, tmp_path / "run", epochs=5, eval_every=2, score="mixed"))
    seen = {}

    def stop(state, line):
        seen[line["epoch"]] = read_checkpoint(tmp_path / "run" / "last.pt")
        if line["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(cfg, on_epoch=stop)
    assert seen[1]["zero_shot_scale"] is None and set(seen[1]["threshold"]) == {0.5}
    assert torch.equal(seen[2]["zero_shot_scale"], seen[3]["zero_shot_scale"])
    assert seen[2]["threshold"] == seen[3]["threshold"] != seen[1]["threshold"]
    assert not torch.equal(seen[2]["g_pos"], seen[3]["g_pos"])
    assert Predictor(tmp_path / "run", "last").cfg.score == "mixed"
    with mock.patch("tools.report.curves"):
        train.train(*train.parse(["--resume", str(tmp_path / "run")]))
        whole, _ = train.parse(options(world, tmp_path / "whole", epochs=5, eval_every=2,
                                       score="mixed"))
        train.train(whole)
    ends = [read_checkpoint(tmp_path / name / "last.pt") for name in ("run", "whole")]
    assert torch.equal(*(end["zero_shot_scale"] for end in ends))


def test_a_run_whose_epochs_were_never_due_says_so(world, tmp_path):
    cfg, _ = train.parse(options(world, tmp_path / "run", epochs=5, eval_every=2, score="mixed"))

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(cfg, on_epoch=stop)
    with pytest.raises(UserError, match="an epoch that was evaluated .--resume"):
        Predictor(tmp_path / "run", "last")


@pytest.mark.parametrize("more, weight", (
    ({}, None), (dict(ratio=1.0, single_positive="largeloss"), 0.3),
    (dict(ratio=1.0, single_positive="largeloss", assume_negative=0), 0.0)))
def test_unknown_counts_as_absent_where_no_label_is_known_to_be_absent(world, tmp_path, more,
                                                                       weight):
    run(world, tmp_path / "run", epochs=1, **more)
    assert read_config(tmp_path / "run")["config"]["assume_negative"] == weight
    settings = json.loads(read_checkpoint(tmp_path / "run" / "last.pt")["config"])
    assert settings["assume_negative"] == weight


def only_ticks(sheet):
    """The sheet without its zeros: a person may tick what is there, and no more."""
    _, file = sheet
    file.write_text(file.read_text().replace(",0", ","))
    return file


@pytest.mark.parametrize("unlisted, code", ((None, 0), ("unknown", 0), ("absent", -1)))
def test_a_sheet_that_tells_only_what_is_present(world, tmp_path, sheet, capfd, unlisted, code):
    """A run that sees no absent label says yes to all, and its mAP was 100."""
    file = only_ticks(sheet)
    given = {} if unlisted is None else dict(unlisted=unlisted)
    line = run(world, tmp_path / "ticks", data=file, root=None, ratio=None, epochs=1, val=0.25,
               score="mixed", **given)[-1]
    said = "unknown labels count as absent, with weight 0.3" in capfd.readouterr().out
    assert said == (unlisted != "absent")
    predictor = Predictor(tmp_path / "ticks", "last")
    train_split, val_split, _ = predictor.splits().values()
    assert sorted({*train_split.labels.ravel().tolist()}) == sorted({1, code})
    assert {*val_split.truth.ravel().tolist()} == {1, -1} and line["val"]["mAP"] < 100
    assert {*val_split.labels.ravel().tolist()} == {1, code}  # a suggestion may ask for them
    p = np.concatenate([predictor.probabilities(split)
                        for split in (val_split, train_split)])
    labels = np.concatenate([val_split.labels, train_split.labels])
    labels = np.where(labels == 1, 1, -1)
    assert np.allclose(predictor.threshold, best_thresholds(p, labels, k=0.5), atol=1e-4)


@pytest.mark.parametrize("absent, mostly", ((0, True), (2, True), (3, False)))
def test_labels_tell_presence_up_to_half_as_many_absent_as_present(absent, mostly):
    labels = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], np.int8)
    labels[1, :absent] = -1
    assert tells_presence(labels) == mostly


def test_a_mask_makes_no_sheet_of_ticks(world, tmp_path, sheet, capfd):
    """Of a complete sheet some cells are hidden: what is present may well be known more often."""
    file = sheet[1]
    header, *rows = file.read_text().splitlines()
    full = [",".join([row.split(",")[0], "1", "1", "01"[i % 2]]) for i, row in enumerate(rows)]
    file.write_text("\n".join([header, *full]))
    run(world, tmp_path / "masked", data=file, root=None, ratio=0.6, epochs=1, val=0.25)
    assert "count as absent" not in capfd.readouterr().out


@pytest.mark.parametrize("whole, weight", ((0, 0.3), (1, None)))
def test_a_mask_of_ones_own_single_positives_leaves_nothing_absent(world, tmp_path, whole, weight):
    """Such a run said yes to all: 15 mAP in the place of 79, with complete labels behind it."""
    cfg, _ = train.parse(options(world, tmp_path / "run", ratio=None))
    mask = data.single_positives(data.load(cfg)[0].labels, 7) != 0
    mask[:whole] = True  # these images tell all
    np.save(tmp_path / "mask.npy", mask)
    cfg = dataclasses.replace(cfg, mask=str(tmp_path / "mask.npy"))
    split = data.load(cfg)[0]
    assert (split.labels == -1).any() == (weight is None)
    assert build.settled(cfg, tmp_path, split, clip.load(cfg.clip)).assume_negative == weight


def test_a_clip_of_unknown_weights_is_refused(world, tmp_path):
    """Two such shared one cache of features, and no file could open their runs again."""
    from clip.weights import TINY, read
    cfg, _ = train.parse(options(world, tmp_path / "run"))
    with pytest.raises(UserError, match="expected a CLIP of clip.load"):
        train.train(cfg, encoder=clip.build(read(TINY), fold=True))


def test_images_of_sure_logits_are_still_ranked():
    """In float32 all three probabilities are 1, one threshold: mAP was 1/3."""
    p = probability_arrays({"region": torch.tensor([[20.0], [25.0], [30.0]])}, None)["region"]
    assert metrics(p, np.array([[-1], [-1], [1]]))["mAP"] == 100


def test_a_run_knows_the_clip_that_it_was_given(world, tmp_path):
    """Its settings named another one, which Predictor then looked for."""
    cfg, _ = train.parse(options(world, tmp_path / "run", epochs=1))
    encoder = clip.load(cfg.clip)
    train.train(dataclasses.replace(cfg, clip="RN101"), encoder=encoder)
    assert Predictor(tmp_path / "run").encoder.sha256 == encoder.sha256


def test_splits_of_one_name_are_refused_before_training(world, tmp_path):
    """Each split is known by its name when a run goes on."""
    cfg, _ = train.parse(options(world, tmp_path / "run", epochs=1))
    split = data.load(cfg)[0]
    parts = split.subset(range(12)), split.subset(range(12, 24)), None
    with pytest.raises(UserError, match="splits of different names"):
        train.train(cfg, splits=parts)
    named = dataclasses.replace(parts[1], name="scenes/rest")
    other = dataclasses.replace(named, names=named.names[::-1])
    with pytest.raises(UserError, match="same classes in the same order"):
        train.train(cfg, splits=(parts[0], None, other))
    assert len(train.train(cfg, splits=(parts[0], named, None))) == 1
    assert len(train.train(cfg, resume=str(tmp_path / "run"), splits=(parts[0], named, None))) == 1


def test_a_run_that_was_begun_without_the_assumption_goes_on_so(world, tmp_path, sheet):
    cfg, _ = train.parse(options(world, tmp_path / "run", data=only_ticks(sheet), root=None,
                                 ratio=None))
    split, encoder = data.load(cfg)[0], clip.load(cfg.clip)
    assert build.settled(cfg, tmp_path, split, encoder).assume_negative == 0.3
    for weight in (None, 0.3):  # a table goes on with the Config of its row, which says None
        about = {"config": {"assume_negative": weight}, "clip_sha256": "", "data": {}}
        (tmp_path / "config.json").write_text(json.dumps(about))
        assert build.settled(cfg, tmp_path, split, encoder, True).assume_negative == weight


def test_a_few_zeros_make_no_half_filled_sheet_of_ticks(world, tmp_path, sheet, capfd):
    """They turned the assumption off, and a run said yes to all: validation 97 mAP, test 53."""
    file = only_ticks(sheet)
    header, *rows = file.read_text().splitlines()
    for zeros, said in ((1, True), (2, True), (len(rows), False)):
        some = [row.split(",")[0] + ",0,0,0" for row in rows[:zeros]] + rows[zeros:]
        some[-1] = some[-1].split(",")[0] + ",1,1,1"
        file.write_text("\n".join([header, *some]))
        out = tmp_path / f"run{zeros}"
        run(world, out, data=file, root=None, ratio=None, epochs=1, val=0.25)
        assert ("count as absent, with weight 0.3" in capfd.readouterr().out) == said
        split = Predictor(out, "last").splits()["val"]
        assert ((split.labels == 0) & (split.truth == -1)).any() == said


def test_ticks_alone_are_measured_so_whatever_other_sheets_tell(sheet):
    _, file = sheet
    tested = file.with_name("test.csv")
    header, *rows = file.read_text().splitlines()
    tested.write_text("\n".join([header, *rows[12:]]))
    file.write_text("\n".join([header, *rows[:12]]))
    only_ticks(sheet)
    _, val_split, test_split = data.load(Config(data=str(file), test=str(tested), val="0.4"))
    assert {*val_split.truth.ravel().tolist()} == {1, -1}
    assert {*test_split.truth.ravel().tolist()} == {1, -1, 0}  # what is unknown there stays so


def test_the_training_photos_of_ticks_alone_are_measured_so_too(world, tmp_path, sheet, capfd):
    run(world, tmp_path / "ticks", data=only_ticks(sheet), root=None, ratio=None, epochs=1)
    words = [tmp_path / "ticks", "--split", "train", "--json"]
    status, out, err = command(evaluation.main, words, capfd)
    assert status == 0 and json.loads(out[-1])["mAP"] < 100, (out, err)


@pytest.mark.parametrize("score", ("mixed", "region"))
@pytest.mark.parametrize("held", (1, 2))
def test_a_validation_of_one_photo_gives_no_scale(world, tmp_path, sheet, capfd, held, score):
    """Its deviation is 0, or noise: the training photos give the scale."""
    _, file = sheet
    header, *rows = file.read_text().splitlines()
    for name, part in (("val", rows[:held]), ("train", rows[held:])):
        file.with_name(f"{name}.csv").write_text("\n".join([header, *part]))
    run(world, tmp_path / "few", data=file.with_name("train.csv"), root=None, ratio=None,
        val=file.with_name("val.csv"), epochs=1, score=score)
    run(world, tmp_path / "none", data=file.with_name("train.csv"), root=None, ratio=None,
        val=0, epochs=1, score=score)
    few, none = (read_checkpoint(tmp_path / name / "last.pt")["zero_shot_scale"]
                 for name in ("few", "none"))
    assert torch.allclose(few, none)
    status, out, _ = command(evaluation.main, [tmp_path / "few", "--split", "val", "--json"], capfd)
    told, line = json.loads(out[-1]), history(tmp_path / "few")[-1]["val"]
    assert all(told[name] == pytest.approx(line[name], abs=0.01) for name in told
               if name.startswith("mAP"))


def test_validation_is_measured_alike_in_training_and_later(world, tmp_path, sheet, capfd):
    """Ticks, but for one training row: what is unknown stays so."""
    file = only_ticks(sheet)
    kept = data.load(Config(data=str(file), val="0.4"))[0].listed[0]
    file.write_text("\n".join(f"{kept},1,0,0" if line.startswith(f"{kept},") else line
                              for line in file.read_text().splitlines()))
    line = run(world, tmp_path / "alike", data=file, root=None, ratio=None, epochs=1, val=0.4)[-1]
    status, out, err = command(evaluation.main, [tmp_path / "alike", "--split", "val", "--json"],
                               capfd)
    assert status == 0, err
    assert json.loads(out[-1])["mAP"] == pytest.approx(line["val"]["mAP"], abs=0.01)


def test_suggestions_for_ticks_alone_agree_with_no_hidden_label(world, tmp_path, sheet, capfd):
    file = only_ticks(sheet)
    run(world, tmp_path / "ticks", data=file, root=None, ratio=None, epochs=1, val=0.25)
    assert evaluation.main([str(tmp_path / "ticks"), "--suggest", str(tmp_path / "s.csv")]) == 0
    assert "agree" not in capfd.readouterr().out


def test_ticks_and_lists_are_suggested_for_without_a_run(tmp_path, sheet, capfd):
    file = only_ticks(sheet)
    lists = file.with_name("lists.csv")
    names = [line.split(",")[0] for line in file.read_text().splitlines()[1:]]
    lists.write_text("image,tags\n" + "".join(f"{name},sun|cup\n" for name in names))
    for data_file in (file, lists):
        words = ["--zero-shot", "--data", data_file, "--clip", "tiny", "--size", 64,
                 "--suggest", tmp_path / f"{data_file.stem}-s.csv"]
        assert evaluation.main([str(word) for word in words]) == 0, capfd.readouterr().err


def test_what_a_half_filled_sheet_does_not_know_of_validation_stays_unknown(sheet):
    """A few rows may by chance know of nothing absent, where the sheet does."""
    _, file = sheet
    cfg = Config(data=str(file), val="0.25")
    header, *rows = file.read_text().splitlines()
    held = {Path(name).name for name in data.load(cfg)[1].paths}
    file.write_text("\n".join([header, *(
        row.replace(",0", ",") if Path(row.split(",")[0]).name in held else row for row in rows)]))
    train_split, val_split, _ = data.load(cfg)
    assert -1 in train_split.truth and {*val_split.truth.ravel().tolist()} == {0, 1}
