"""Pre-training of the small CLIP: its loss, its score, and a run on a handful of canvases."""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from clip import build
from tools import pretrain

LITTLE = dict(embed_dim=16, resolution=64, layers=(1, 1, 1, 1), vision_width=8, patch=None,
              context_length=77, vocab_size=1514, text_width=32, text_layers=1)


def test_info_nce_against_loops():
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(5, 8, generator=g), torch.randn(5, 8, generator=g)
    same = torch.eye(5, dtype=torch.bool)
    same[0, 3] = same[4, 1] = True
    total = 0.0
    for i in range(5):
        cosine = [[10 * F.cosine_similarity(image[a], text[b], dim=0) for b in range(5)]
                  for a in range(5)]
        row = [cosine[i][j].exp() for j in range(5) if j == i or not same[i, j]]
        column = [cosine[j][i].exp() for j in range(5) if j == i or not same[j, i]]
        total -= (cosine[i][i].exp() / sum(row)).log() + (cosine[i][i].exp() / sum(column)).log()
    torch.testing.assert_close(pretrain.info_nce(image, text, 10.0, same), total / 10)


def test_a_small_run_learns_and_writes(tmp_path, capsys):
    out = tmp_path / "little.safetensors"
    score = pretrain.pretrain(out, canvases=96, epochs=3, batch=16, lr=3e-3, tune=16, amp=False,
                              dimensions=LITTLE, command="a test")
    losses = [float(line.split("loss ")[1].split(",")[0])
              for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert 0 < score["global"] < 100 and 0 < score["dense"] < 100
    with safe_open(out, "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
    assert metadata["command"] == "a test" and json.loads(metadata["dimensions"])["embed_dim"] == 16
    assert float(metadata["zero_shot_tune2014_global"]) == pytest.approx(score["global"], abs=0.01)
    assert all(t.isfinite().all() for t in tensors.values()) and build(tensors).D == 16
    assert [p.name for p in tmp_path.iterdir()] == [out.name], "nothing half-written stays behind"


def test_the_shipped_weights():
    """They fit their size, and the file says how they were made and that they are good enough to
    compare methods with."""
    assert pretrain.TINY.stat().st_size <= 8_000_000
    with safe_open(pretrain.TINY, "pt") as file:
        metadata = file.metadata()
    assert float(metadata["zero_shot_tune2014_global"]) >= 80
    assert metadata["command"].startswith("python -m clip.pretrain")
    captions = pretrain.draw("pretrain", 50, json.loads(metadata["dimensions"])["resolution"],
                             (1, 3))[2]
    assert metadata["captions_sha256"] == pretrain.captions_sha256(captions)  # drawn as then
