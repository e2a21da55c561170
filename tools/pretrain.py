"""Trains the small CLIP that ships, from nothing: drawn scenes and captions, CLIP's loss.

    python -m tools.pretrain        # writes clip/tiny.safetensors; 20 to 40 minutes on two cores

The file tells how it was made and how well it does without further training. The pictures are small
canvases (128 px, 1 to 3 objects, as large in pixels as on the 256 px scenes that it will see), so
an image costs a quarter. Their seeds hold the word "pretrain": no scene of train2014, tune2014 or
val2014 can be among them. B pairs of a batch, D joint dimension, C categories.
"""
import hashlib
import json
import math
import sys
import time
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as as_bytes
from tqdm import tqdm

from clip.model import CLIP, MEAN, STD
from clip.weights import TINY, build
from datasets import scenes
from eval import metrics
from support.checkpoint import write_atomically
from support.cli import make_parser, run_command
from tools.zero_shot import zero_shot, zero_shot_text

DIMENSIONS = dict(embed_dim=128, resolution=128, layers=(1, 1, 1, 1), vision_width=16, patch=None,
                  context_length=77, vocab_size=512 + 4000 + 2, text_width=128, text_layers=2)
CAPTION_TEMPLATES = ("a photo of a {}.", "a picture of a {}", "a {}", "an image of a {}.",
                     "a drawing of a {}.")  # captions begin so, too


def draw(split, count, size, objects, seed=0):
    """-> pictures (count, size, size, 3) uint8, kinds (count, C) 1 or -1, five captions each."""
    pictures = np.empty((count, size, size, 3), np.uint8)
    truth = np.full((count, len(scenes.KINDS)), -1, np.int8)
    captions = [None] * count
    for k, drawn in enumerate(scenes.draw_all(split, count, size, objects, seed)):
        pictures[k], boxes, captions[k] = drawn
        truth[k, [box.kind for box in boxes]] = 1
    return torch.from_numpy(pictures), truth, captions


def captions_sha256(captions):
    """Of the first 50 canvases: shows whether scenes.py still draws what the weights saw."""
    return hashlib.sha256("\n".join(chain(*captions[:50])).encode()).hexdigest()


def normalised(pictures):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 as CLIP wants it, channels-last in memory."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (pictures.permute(0, 3, 1, 2) / 255 - mean) / std


def info_nce(image, text, scale, same):
    """CLIP's symmetric loss. image, text (B, D); scale = 1/temperature; same (B, B) bool: text j is
    one of image i's own captions word for word, so off the diagonal it is no negative."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (B, B)
    logits = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def score(model, pictures, truth):
    """{"global": mAP, "dense": mAP} without further training, in percent."""
    g = zero_shot_text(model, scenes.NAMES, CAPTION_TEMPLATES)  # (C, D)
    features = (model.encode(normalised(part)) for part in pictures.split(100))
    found = zero_shot(g, ((None, f, x) for f, x in features))
    return {how: metrics(cosines, truth)["mAP"] for how, cosines in found.items()}


def pretrain(out=TINY, canvases=50000, epochs=6, batch=128, lr=1e-3, seed=0, tune=1000, amp=True,
             dimensions=DIMENSIONS, command="python -m tools.pretrain"):
    """Draws, trains, and writes `out` after every epoch, with its zero-shot mAP on `tune` scenes of
    tune2014, 256 px. amp: bfloat16; twice as fast on CPUs that compute in it, slower on others."""
    start = time.time()
    torch.manual_seed(seed)
    model = CLIP(**dimensions).to(memory_format=torch.channels_last)
    pictures, _, captions = draw("pretrain", canvases, dimensions["resolution"], (1, 3), seed)
    held_out = draw("tune2014", tune, 256, scenes.OBJECTS, seed)[:2]
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
    steps = epochs * (canvases // batch)

    def rate(step):
        warm_up = min((step + 1) / min(200, steps), 1)
        return warm_up * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for epoch in range(1, epochs + 1):
        model.train()
        losses = []
        order = torch.randperm(canvases)[:canvases // batch * batch].split(batch)
        for rows in (bar := tqdm(order, desc=f"epoch {epoch}/{epochs}", disable=None)):
            own = [captions[row] for row in rows]  # five an image
            texts = [five[k] for five, k in zip(own, torch.randint(5, (batch, 1)))]
            same = torch.tensor([[text in five for text in texts] for five in own])  # (B, B)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                image = model.encode_image(normalised(pictures[rows]))
                text = model.encode_text(model.tokenize(texts))
            loss = info_nce(image.float(), text.float(), model.logit_scale.exp(), same)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=math.log(100))
            losses.append(loss.item())
            bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
        tensors = {name: (t.half() if t.ndim > 1 else t).contiguous()  # matrices in float16
                   for name, t in model.state_dict().items() if "num_batches" not in name}
        mAP = score(build(tensors), *held_out)
        seconds = round(time.time() - start)
        about = dict(command=command, seed=seed, canvases=canvases, epochs=f"{epoch} of {epochs}",
                     dimensions=json.dumps(dimensions), captions_sha256=captions_sha256(captions),
                     seconds=seconds, zero_shot_tune2014_global=mAP["global"],
                     zero_shot_tune2014_dense=mAP["dense"])
        write_atomically(out, as_bytes(tensors, {k: str(v) for k, v in about.items()}))
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}, zero-shot mAP on tune2014: global "
              f"{mAP['global']:.1f}, dense {mAP['dense']:.1f}; {seconds} s -> {out}", flush=True)
    return mAP


def main(argv=None):
    return run_command(pretrain, make_parser("tools.pretrain", __doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
