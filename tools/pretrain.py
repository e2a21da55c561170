"""Trains the small CLIP that ships, from nothing: pairs of a drawn scene and a caption, CLIP's
contrastive loss.

    python -m tools.pretrain        # writes clip/tiny.safetensors: the weights, how they were made,
                                    how well they do; 20 minutes on two cores

The pictures are small canvases (128 px, 1 to 3 objects of the same pixel size as on the 256 px
scenes it will see later), so an image costs a quarter and the features still fit; the global
feature's positions are interpolated. Their seeds hold the word "pretrain", so that no scene of
train2014, tune2014 or val2014 can be among them.

B pairs of a batch, D joint dimension, C categories.
"""
import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as as_bytes
from tqdm import tqdm

from datasets import scenes
from support import UserError
from support.checkpoint import write_atomically
from support.cli import make_parser, run_main, words
from clip.model import CLIP, build

TINY = Path(__file__).resolve().parents[1] / "clip" / "tiny.safetensors"
DIMENSIONS = dict(embed_dim=128, resolution=128, layers=(1, 1, 1, 1), vision_width=16, patch=None,
                  context_length=77, vocab_size=512 + 4000 + 2, text_width=128, text_layers=2)
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
TEMPLATES = ("a photo of a {}.", "a picture of a {}", "a {}", "an image of a {}.",
             "a drawing of a {}.")


def draw(split, count, size, objects, seed=0):
    """-> pictures (count, size, size, 3) uint8, the Boxes of each, its five captions."""
    pictures, boxes, captions = np.empty((count, size, size, 3), np.uint8), [], []
    for k, (pictures[k], found,
            texts) in enumerate(scenes.draw_all(split, count, size, objects, seed)):
        boxes.append(found)
        captions.append(texts)
    return torch.from_numpy(pictures), boxes, captions


def told(captions):
    """sha256 of the captions of the first 50 canvases: shows whether scenes.py still draws what the
    weights learned from."""
    return hashlib.sha256("\n".join(text for texts in captions[:50]
                                    for text in texts).encode()).hexdigest()


def normalised(pictures):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 as CLIP wants it, channels-last in memory."""
    return (pictures.permute(0, 3, 1, 2) / 255 - MEAN) / STD


def encode_text(model, tokens):
    """tokens (B, S) -> (B, D), as model.encode_text, but short texts do not pay for the longest
    one: they are encoded in four groups by length, cut to multiples of 8 because the bfloat16 kernels are compiled anew for each shape."""
    eot = tokens.argmax(1)
    order = eot.argsort()
    groups = [model.encode_prompts(model.embed(tokens[rows, :int(eot[rows].max()) // 8 * 8 + 8]),
                                   eot[rows])
              for rows in order.chunk(4)]
    return torch.cat(groups)[order.argsort()]


def info_nce(image, text, scale, same):
    """CLIP's symmetric loss. image, text (B, D); scale = 1/temperature; same (B, B) bool: text j is
    one of image i's own captions word for word, so off the diagonal it is no negative and is left
    out."""
    # (B, B)
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    logits = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool), -torch.inf)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def average_precision(scores, truth):
    """scores (n,) float, truth (n,) bool -> mean precision at each positive, from the highest score
    down."""
    hits = truth[scores.argsort(descending=True)]
    return ((hits.cumsum(0) / torch.arange(1, len(hits) + 1))[hits]).mean().item()


@torch.no_grad()
def zero_shot(model, pictures, boxes):
    """mAP in per cent without training: cosine of the mean feature of a category's TEMPLATES with
    the global feature, and with the best location of the dense features. -> {"global": mAP, "dense": mAP, "classes": {name: AP, global}}"""
    text = torch.stack([F.normalize(model.encode_text(model.tokenize([t.format(n)
                                                                      for t in TEMPLATES])),
                                                                      dim=1).mean(0)
                        # (C, D)
                        for n in scenes.NAMES])
    text, scores = F.normalize(text, dim=1), {"global": [], "dense": []}
    for batch in pictures.split(100):
        whole, dense = model.encode(normalised(batch))
        # (B, C)
        scores["global"].append(F.normalize(whole, dim=1) @ text.T)
        # (B, C)
        scores["dense"].append((F.normalize(dense, dim=2) @ text.T).amax(1))
    truth = torch.tensor([[any(b.kind == k for b in found) for k in range(len(scenes.KINDS))]
                          for found in boxes])
    ap = {how: {name: 100 * average_precision(torch.cat(s)[:, k], truth[:, k])
                for k, name in enumerate(scenes.NAMES) if truth[:, k].any()} for how,
                s in scores.items()}
    return {how: sum(values.values()) / len(values) for how,
            values in ap.items()} | {"classes": ap["global"]}


def save(model, path, metadata):
    """Matrices in float16, vectors in float32. Returns the model as it is stored."""
    tensors = {k: v.half().contiguous() if v.ndim > 1 else v.contiguous()
               for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    model = build(tensors)  # refuses what is not finite, before it replaces what is there
    write_atomically(Path(path),
                     as_bytes(tensors, metadata={k: str(v) for k, v in metadata.items()}))
    return model


def pretrain(out=TINY, canvases=50000, epochs=6, batch=128, lr=1e-3, seed=0, tune=1000, amp=True,
             dimensions=DIMENSIONS, command=""):
    """Draws, trains, and writes `out` after every epoch, with its zero-shot score on `tune` scenes
    of tune2014, 256 px. amp: bfloat16 where it is safe; about twice as fast on CPUs that compute in it, slower on others."""
    start = time.time()
    torch.manual_seed(seed)
    model = CLIP(**dimensions).to(memory_format=torch.channels_last)
    pictures, _, captions = draw("pretrain", canvases, dimensions["resolution"], (1, 3), seed)
    held_out = draw("tune2014", tune, 256, scenes.OBJECTS, seed)[:2]
    source = told(captions)
    ids = {text: k for k,
           text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
    tokens = model.tokenize(list(ids)).to(torch.int16 if dimensions["vocab_size"] < 2 ** 15
                                          else torch.int32)
    # (canvases, 5)
    captions = torch.tensor([[ids[text] for text in texts] for texts in captions])
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0}],
                                  lr=lr, betas=(0.9, 0.98), eps=1e-6)
    steps = epochs * (canvases // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer,
                                                 lambda step: min((step + 1) / min(200, steps), 1)
                                                 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    for epoch in range(epochs):
        model.train()
        order, losses = torch.randperm(canvases)[:canvases // batch * batch].split(batch), []
        for rows in (bar := tqdm(order, desc=f"epoch {epoch + 1}/{epochs}")):
            # (B, 5)
            own = captions[rows]
            # (B, 1)
            text = own.gather(1, torch.randint(own.shape[1], (batch, 1)))
            # (B, B)
            same = (own[:, None, :] == text[None, :, :]).any(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                image = model.encode_image(normalised(pictures[rows]))
                text = encode_text(model, tokens[text[:, 0]].long())
            loss = info_nce(image.float(), text.float(), model.logit_scale.exp(), same)
            if not loss.isfinite():
                raise FloatingPointError(f"epoch {epoch + 1}: the loss is {loss.item()}; lower --lr")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=math.log(100))
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
        # scored as it is stored, then stored again with the score
        stored = save(model, out, {})
        score = zero_shot(stored, *held_out)
        seconds = round(time.time() - start)
        save(model, out,
             dict(command=command, seed=seed, epochs=f"{epoch + 1} of {epochs}", canvases=canvases,
                              seconds=seconds, captions_sha256=source,
                              dimensions=json.dumps(dimensions),
                              zero_shot_tune2014_global=round(score["global"], 2),
                              zero_shot_tune2014_dense=round(score["dense"], 2)))
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, zero-shot mAP on {tune} "
              f"scenes of tune2014: global {score['global']:.1f}, dense {score['dense']:.1f}; "
              f"{seconds} s, written to {out}", flush=True)
    return score


def main(argv=None):
    parser = make_parser("tools.pretrain", __doc__)
    parser.add_argument("--out", default=str(TINY), help="the file to write")
    parser.add_argument("--canvases", type=int, default=50000,
                        help="drawn pictures, kept in memory: 49 KB each")
    parser.add_argument("--epochs", type=int, default=6,
                        help="passes over them; more raises zero-shot slowly")
    parser.add_argument("--batch", type=int, default=128, help="pairs per step")
    parser.add_argument("--lr", type=float, default=1e-3,
                        help="highest learning rate, after warm-up, before the cosine")
    parser.add_argument("--seed", type=int, default=0, help="of drawing, initialisation and order")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True,
                        help="bfloat16; --no-amp on CPUs that do not compute in it")

    def work():
        options = vars(parser.parse_args(words(argv)))
        if not (1 <= options["batch"] <= options["canvases"] <= 10**7
                and 1 <= options["epochs"] <= 10**6
                and 0 < options["lr"] < math.inf and 0 <= options["seed"] < 2**31):
            raise UserError("expected --epochs and --seed as whole numbers, --lr above 0, --batch "
                            "up to --canvases and that up to 10 million; got "
                              + ", ".join(f"--{k} {options[k]}"
                                          for k in ("epochs", "seed", "lr", "batch", "canvases")))
        out = Path(options["out"])
        # told now, not after the first epoch
        if not out.parent.is_dir() or not os.access(out.parent, os.W_OK) or out.is_dir():
            raise UserError(f"--out {out} cannot be written: give a file in a folder that is there")
        given = " ".join("--no-amp" if k == "amp" else f"--{k} {v}" for k, v in options.items()
                         if v != parser.get_default(k) and k != "out")
        pretrain(**options, command=f"python -m tools.pretrain {given}".strip())
    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
