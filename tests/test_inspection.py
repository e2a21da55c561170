"""Predictor.inspect: what the method computes on one image, and nothing of the run is changed."""
import pytest
import torch
import torch.nn.functional as F
from small_world import run, world

import eval as evaluation
from support import UserError


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
    total = terms["L_q"] + terms["L_r"] + 0.05 * terms["L_KD"] + 0.01 * terms["L_NCE"]  # Eq. 15
    assert float(terms["L"]) == pytest.approx(float(total), rel=1e-5)
    ranked = predictor.predict([photo])[0]["scores"]
    assert ranked[predictor.names[0]] == pytest.approx(
        float(torch.sigmoid(seen["logits_q" if predictor.cfg.score == "query" else "logits_r"][0])),
        abs=1e-5)
    assert (tmp_path / "run"
            / "last.pt").read_bytes() == before and "losses" not in predictor.inspect(photo)


def test_a_baseline_has_no_regions_to_inspect(world, tmp_path):
    run(world, tmp_path / "run", epochs=1, matching="average")
    photo = str(sorted((world / "scenes" / "val2014").iterdir())[0])
    with pytest.raises(UserError, match="--matching carl"):
        evaluation.Predictor(tmp_path / "run", "last").inspect(photo)
