"""Does it matter who resizes? PIL's bicubic against torch's antialiased one on uint8, in training
and in evaluation: mAP of the query score on validation, scenes of 256 pixels seen at 224.

    python tests/study_resize.py                    three seeds, some ten minutes on two cores
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import clip
import data
from config import Config, preset
from datasets import augment
from eval import metrics
from support.cli import best_device
from tools.predictor import Predictor
from train import train


def by_torch(image, size):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, H, W) uint8
    resized = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True)[0]
    return Image.fromarray(resized.permute(1, 2, 0).numpy())


RESIZE = {"PIL": augment.resize, "torch": by_torch}


def main():
    encoder, found = clip.load("tiny"), {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            for trained in RESIZE:
                augment.resize = RESIZE[trained]
                settings = dict(size=224, ratio=0.1, train_images=1000, seed=seed, epochs=30,
                                eval_every=30)
                cfg = Config(**preset("scenes") | settings, out=f"{folder}/{trained}-{seed}",
                             cache_dir=f"{folder}/features-{trained}")
                splits = data.load(cfg)[:2] + (None,)
                train(cfg, splits=splits, encoder=encoder)
                for seen in RESIZE:
                    augment.resize = RESIZE[seen]
                    places = dict(cache_dir=f"{folder}/features-{seen}")
                    run = Predictor(cfg.out, "last", best_device(), encoder, places)
                    scores = run.probabilities(splits[1])
                    mAP = metrics(scores, splits[1].truth)["mAP"]
                    found.setdefault((trained, seen), []).append(mAP)
    for (trained, seen), mAP in found.items():
        print(f"trained on {trained}'s pixels, evaluated on {seen}'s: {np.mean(mAP):.2f} ± "
              f"{np.std(mAP, ddof=1):.2f}  {[round(one, 2) for one in mAP]}")


if __name__ == "__main__":
    main()
