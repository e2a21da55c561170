"""A run as one file for other programs gives the Predictor's numbers for any batch."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_world import ROOT, command, one_line, run, trained, world

import clip
import data
import trm
from tools import export
from tools.predictor import Predictor


@pytest.fixture(params=("region", "mixed"))
def case(request, world, tmp_path):
    """(run folder, images (5, 3, H, W), {n: probabilities of the first n by the Predictor}): the
    same batch, since the mixed score's slope multiplies the rounding of the cosines; so much with a
    random CLIP, whose cosines hardly differ, that this is the one that ships."""
    folder = tmp_path / "run"
    run(world, folder, epochs=1, score=request.param, clip="tiny")
    predictor = Predictor(folder, device="cpu")  # where an export is made
    split = predictor.splits()["test"].subset(range(5))
    images = data.Images(split, predictor.cfg.size)
    images.mean, images.std = predictor.encoder.mean, predictor.encoder.std
    want = {n: np.array([[row["scores"][name] for name in predictor.names]
                         for row in predictor.predict(split.paths[:n])]) for n in (1, 2, 5)}
    return folder, torch.stack([images[i][0] for i in range(5)]), want


def test_torch_export_with_any_batch(case, tmp_path, capfd):
    folder, images, want = case
    assert command(export.main, [folder, tmp_path / "m.pt2"], capfd)[0] == 0
    program = torch.export.load(tmp_path / "m.pt2").module()
    for n in (1, 2, 5):
        p, energy = program(images[:n])
        assert np.abs(p.numpy() - want[n]).max() < 1e-5 and energy.shape[:2] == p.shape
    about = json.loads((tmp_path / "m.pt2.json").read_text())
    assert about["categories"] == Predictor(folder).names and about["size"] == images.shape[-1]
    one_line(export.main, [folder, tmp_path / "m.pt2"], capfd, "is there already")
    one_line(export.main, [folder, tmp_path / "m.pth"], capfd, ".onnx")


def test_many_categories_are_exported_for_any_batch(case, tmp_path, capfd, monkeypatch):
    """Training takes 1,024 images of 80 categories and 512 dimensions in parts; so few here."""
    folder, images, want = case
    monkeypatch.setattr(trm.CARL, "at_once", 2**12)
    assert command(export.main, [folder, tmp_path / "m.pt2"], capfd)[0] == 0
    program = torch.export.load(tmp_path / "m.pt2").module()
    for n in (1, 2, 5):
        assert np.abs(program(images[:n])[0].numpy() - want[n]).max() < 1e-5


def test_a_transformer_is_exported_for_any_batch(world, tmp_path, capfd):
    vit = clip.CLIP(layers=2, vision_width=64, patch=16, resolution=64, embed_dim=24,
                    context_length=20, vocab_size=2514, text_width=64, text_layers=1)
    save_file(vit.state_dict(), tmp_path / "vit-quickgelu.safetensors")
    run(world, tmp_path / "run", epochs=1, clip=tmp_path / "vit-quickgelu.safetensors")
    assert command(export.main, [tmp_path / "run", tmp_path / "m.pt2"], capfd)[0] == 0
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert [program(torch.zeros(n, 3, 64, 64))[0].shape[0] for n in (1, 3)] == [1, 3]


def test_a_full_disk_is_told_in_one_line(world, trained, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("support.checkpoint.os.fsync", full)
    one_line(export.main, [trained, tmp_path / "m.pt2"], capfd, "No space left on device", "m.pt2")
    assert not list(tmp_path.iterdir())


def test_onnx_with_any_batch(case, tmp_path, capfd):
    runtime = pytest.importorskip("onnxruntime", reason="ONNX needs onnx, onnxscript, onnxruntime")
    pytest.importorskip("onnxscript")
    folder, images, want = case
    assert command(export.main, [folder, tmp_path / "m.onnx"], capfd)[0] == 0
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    for n in (1, 2, 5):
        p, _ = session.run(None, {"images": images[:n].numpy()})
        assert np.abs(p - want[n]).max() < 1e-5


def test_onnx_without_its_packages_says_what_to_install(tmp_path):
    # in a process of its own: here torch may have imported them already. There is no run: it is
    # told before one is read and traced, which takes minutes for a large CLIP.
    script = ("import sys; sys.modules['onnxscript'] = None; from tools import export; "
              "sys.exit(export.main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "run", tmp_path / "m.onnx"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install onnx" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("m.onnx*"))


def test_weights_that_moved_are_exported(world, tmp_path, capfd):
    weights = tmp_path / "quickgelu.safetensors"
    shutil.copy(world / "clip-quickgelu.safetensors", weights)
    run(world, tmp_path / "run", epochs=1, clip=weights)
    weights.rename(tmp_path / "moved-quickgelu.safetensors")
    one_line(export.main, [tmp_path / "run", tmp_path / "m.pt2"], capfd, "is no file")
    there = ["--clip", tmp_path / "moved-quickgelu.safetensors"]
    assert command(export.main, [tmp_path / "run", tmp_path / "m.pt2", *there], capfd)[0] == 0
