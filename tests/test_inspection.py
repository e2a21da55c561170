"""Predictor.inspect: what the method computes on one image, and nothing of the run is changed."""
import pytest
import torch
import torch.nn.functional as F
from small_world import run, world

import eval as evaluation
import oracles
from memory import MemoryBank
from support import UserError
from tools.inspection import origins
from tools.predictor import Predictor


def test_every_tensor_follows_from_the_ones_before_it(world, tmp_path):
    run(world, tmp_path / "run", epochs=3)
    predictor = evaluation.Predictor(tmp_path / "run", "last")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    photo = str(sorted((world / "scenes" / "val2014").iterdir())[0])
    C = len(predictor.names)
    labels = torch.ones(C, dtype=torch.int8)
    labels[1::2] = -1
    seen = predictor.inspect(photo, labels)
    f, energy = seen["f"], seen["energy"]
    N, D = f.shape
    assert seen["regions"].shape == seen["queries"].shape == (C, D) and energy.shape == (C, N)
    assert torch.allclose(seen["mask"], torch.sigmoid(energy))  # Eq. 2
    for c in range(C):
        region = sum(seen["mask"][c, n] * f[n] for n in range(N))  # Eq. 4
        assert torch.allclose(seen["regions"][c], region, atol=1e-4)
        assert sorted(seen["topk"][c].tolist()) == sorted(energy[c].argsort()[-3:].tolist())
    text = torch.stack([F.cosine_similarity(f, g[None], dim=1) for g in seen["g_pos"]])
    assert torch.allclose(seen["text_pixel"], text, atol=1e-5)
    s, theta = seen["s"], seen["theta"]
    for c in range(C):  # Eq. 10, 12
        said = []
        for modality in (0, 1):
            positive, negative = theta[modality, 0, c], theta[modality, 1, c]
            verdict = int(s[modality, c] >= positive) - int(s[modality, c] <= negative)
            said.append(verdict if positive > negative else 0)
        assert seen["verdicts"][:, c].tolist() == said
        assert int(seen["pseudo"][c]) == (said[0] if said[0] == said[1] else 0)
    terms = seen["losses"]
    known, model = labels[None].numpy(), predictor.model
    for name, logits in (("L_r", seen["logits_r"]), ("L_q", seen["logits_q"])):  # Eq. 14
        want = oracles.asymmetric(logits[None].numpy(), known, 1, 2, 0.05)
        assert float(terms[name]) == pytest.approx(want, rel=1e-4)
    want = oracles.distillation(seen["logits_r"][None].numpy(), seen["logits_q"][None].numpy(),
                                "softmax", 1.0)  # Eq. 6
    assert float(terms["L_KD"]) == pytest.approx(want, rel=1e-3, abs=1e-6)
    memory, heads = predictor.memory, model.heads
    kept = [(c, row) for c in range(C)
            for row in memory.bank[c, :int(memory.cursor[c].clamp(max=memory.bank.shape[1]))]]
    classes = [c for c in range(C) if labels[c] == 1] + [c for c, _ in kept]
    with torch.no_grad():
        samples = torch.cat([heads["region"](seen["regions"][labels == 1]),
                             heads["pixel"](torch.stack([row for _, row in kept]))])
        texts = heads["text"](seen["g_pos"])
    want = oracles.contrastive(texts.numpy(), samples.numpy(), classes, 0.07)  # Eq. 13
    assert float(terms["L_NCE"]) == pytest.approx(want, rel=1e-4)
    total = terms["L_q"] + terms["L_r"] + 0.05 * terms["L_KD"] + 0.01 * terms["L_NCE"]  # Eq. 15
    assert float(terms["L"]) == pytest.approx(float(total), rel=1e-5)
    ranked = predictor.predict([photo])[0]["scores"]
    assert ranked[predictor.names[0]] == pytest.approx(
        float(torch.sigmoid(seen["logits_q" if predictor.cfg.score == "query" else "logits_r"][0])),
        abs=1e-5)
    assert (tmp_path / "run"
            / "last.pt").read_bytes() == before and "losses" not in predictor.inspect(photo)


def test_what_a_run_leaves_out_is_not_inspected(world, tmp_path):
    run(world, tmp_path / "run", epochs=3, without="kd,text")
    predictor = evaluation.Predictor(tmp_path / "run", "last")
    labels = torch.ones(len(predictor.names), dtype=torch.int8)
    guessed = 0
    for photo in sorted((world / "scenes" / "val2014").iterdir())[:6]:
        seen = predictor.inspect(photo, labels)
        assert torch.equal(seen["pseudo"], seen["verdicts"][0])  # the visual prototypes alone
        assert torch.equal(seen["truth"], labels)
        terms = seen["losses"]
        assert set(terms) == {"L_q", "L_r", "L_NCE", "L"}
        assert torch.allclose(terms["L"], terms["L_q"] + terms["L_r"] + 0.01 * terms["L_NCE"])
        guessed += int((seen["verdicts"][0] != seen["verdicts"][1]).sum())
    assert guessed  # with both prototypes something else would have come out


def test_more_prototypes_are_asked_for_than_there_are_locations(world, tmp_path):
    run(world, tmp_path / "run", epochs=1, topk=50)
    predictor = Predictor(tmp_path / "run", "last")
    image = predictor.splits()["test"].paths[0]
    assert predictor.inspect(image)["topk"].shape[1] == predictor.grid[0] * predictor.grid[1]


def test_a_baseline_has_no_regions_to_inspect(world, tmp_path):
    run(world, tmp_path / "run", epochs=1, matching="average")
    photo = str(sorted((world / "scenes" / "val2014").iterdir())[0])
    with pytest.raises(UserError, match="--matching carl"):
        evaluation.Predictor(tmp_path / "run", "last").inspect(photo)


def test_a_prototype_is_found_in_the_photo_it_came_from():
    """By image, location and view; features have any length, and an empty slot came from none."""
    torch.manual_seed(0)
    f = torch.randn(2, 5, 3, 8) * torch.tensor([1.0, 90.0, 5.0])[:, None]  # view, image, location

    class Loader:
        stored = f

        def batches(self, view, shuffle):
            for index in (torch.tensor([3, 1, 0]), torch.tensor([2, 4])):
                yield index, f[view][index], None

    memory = MemoryBank(2, 3, 8)
    came_from = {(0, 0): [4, 2, 1], (1, 0): [0, 1, 0], (1, 1): [2, 0, 1]}
    for slot, (image, location, view) in came_from.items():
        memory.bank[slot] = F.normalize(f[view, image, location], dim=0)
    memory.cursor.copy_(torch.tensor([1, 2]))
    found = origins(memory, Loader())
    for c in range(2):
        for row in range(3):
            assert found[c, row].tolist() == came_from.get((c, row), [-1, -1, -1])
