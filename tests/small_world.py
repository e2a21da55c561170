"""A world small enough for dozens of training runs: 24 drawn scenes of 64 pixels, a CLIP with
random weights, seconds a run."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import clip
from datasets import scenes
import train

ROOT = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, devices and signals are POSIX's")
_made = {}


@pytest.fixture
def world(tmp_path_factory):
    """Folder with scenes/ and clip-quickgelu.safetensors; made once a session."""
    if "folder" not in _made:
        _made["folder"] = make(tmp_path_factory.mktemp("world"))
    return _made["folder"]


def make(folder):
    scenes.write(folder / "scenes", train=24, val=12, test=12, size=64, workers=1)
    save_file(weights(), folder / "clip-quickgelu.safetensors")
    return folder


def weights():
    """A state dict of CLIP's smallest possible form, random."""
    torch.manual_seed(0)
    return clip.CLIP(layers=(1, 1, 1, 1), vision_width=8, patch=None, resolution=64, embed_dim=24,
                     context_length=20, vocab_size=2514,
                     text_width=64, text_heads=1, text_layers=1).state_dict()


def options(world, out, **changes):
    """The command line of a run of seconds; a change of None leaves an option out."""
    chosen = dict(data="scenes", root=world / "scenes", ratio=0.5,
                  clip=world / "clip-quickgelu.safetensors", size=64, epochs=3,
                  batch=8, context=4, queue=8, workers=0, cache_features=1,
                  amp="none",  # the same numbers on a GPU
                  cache_dir=world / "features", out=out) | changes
    return [str(word) for name, value in chosen.items() if value is not None
            for word in ("--" + name.replace("_", "-"), value)]


def run(world, out, **changes):
    """Trains in this process; returns the history."""
    cfg, _ = train.parse(options(world, out, **changes))
    with mock.patch("tools.report.curves"):  # matplotlib takes longer than all the rest
        return train.train(cfg)


@pytest.fixture
def trained(world):
    """A run of two epochs on the small world, made once."""
    if not (world / "trained").exists():
        run(world, world / "trained", epochs=2)
    return world / "trained"


@pytest.fixture
def sheet(world, tmp_path):
    """A run on a sheet: (run folder, labels.csv); the photos lie beside the sheet."""
    shutil.copytree(world / "scenes" / "train2014", tmp_path / "photos")
    file, cells = tmp_path / "labels.csv", np.random.RandomState(0).choice(["1", "0", ""], (24, 3))
    file.write_text(
        "image,sun,tree,cup\n"
        + "".join(
            f"photos/{p.name},{','.join(row)}\n"
            for p, row in zip(sorted((tmp_path / "photos").iterdir()), cells)
        )
    )
    run(world, tmp_path / "run", data=file, root=None, ratio=None, epochs=1, val=0.25)
    return tmp_path / "run", file


def snapshot(folder):
    """{file: its bytes} of all that lies below a folder."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(script, *arguments, **keywords):
    """`python SCRIPT ARGUMENTS` as a user would, output kept, one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=ROOT,
                            env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords)


def command(main, arguments, capfd):
    """main(arguments) -> (exit status, lines on stdout, lines on stderr)."""
    capfd.readouterr()
    status = main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return status, out.splitlines(), err.splitlines()


def one_line(main, arguments, capfd, *words):
    """The command is refused: status 2 and a single line on stderr that holds `words`. Returns that
    line."""
    status, _, err = command(main, arguments, capfd)
    assert status == 2, (status, err)
    assert len(err) == 1 and err[0].startswith("error: ") and len(err[0]) < 700, err
    for word in words:
        assert str(word) in err[0], err[0]
    return err[0]


def rows(folder):
    """metrics.jsonl without what a clock measured."""
    return timeless(json.loads(line)
                    for line in (folder / "metrics.jsonl").read_text().splitlines())


def timeless(history):
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
            for line in history]
