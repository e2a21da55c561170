"""A split or photos, scored by a model; a trained run that does it (paper, Eq. 5; inference).

n images, B of a batch, C categories, N = h*w locations, D dims.
"""
import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import clip
import data
from clip.features import FeatureLoader, autocast_dtype
from config import restored
from support import UserError
from support.checkpoint import read_checkpoint
from support.cli import best_device
from support.run_folder import begun
from tools import inspection
from tools.zero_shot import mixed, mixed_scores, zero_shot, zero_shot_score, zero_shot_text
from trm import TRM, Output


def evaluation_loader(cfg, split, encoder, device, rank=0, world=1):
    """Features of a split that is scored: not augmented; one cached view where the run caches."""
    return FeatureLoader(data.Images(split, cfg.size), encoder, cfg.batch, cfg.workers,
                         min(1, cfg.cache_features), cfg.cache_dir, device,
                         autocast_dtype(cfg.amp, device), rank, world)


def logits_of(out):
    """trm.Output -> {score: logits (B, C)}. The paper has "region"; a baseline has no other."""
    if out.logits_q is None:
        return {"region": out.logits_r}
    return {"region": out.logits_r, "query": out.logits_q,
            "mean": (out.logits_r + out.logits_q) / 2}


def region_map(out, matching):
    """The map (B, C, N) that a method shows: the mask of Eq. 2, or a similarity map."""
    return out.energy.sigmoid() if matching == "carl" else out.energy


@torch.no_grad()
def score_split(model, g_pos, g_neg, loader, g_zero, maps=None):
    """One pass -> {score: (n, C) probabilities}, with "zero-shot" by the texts g_zero (C, D), and
    {name: (n, C, N)} of maps(out, model), if given. numpy float32."""
    model.eval()
    scores, kept, done = {}, defaultdict(list), 0
    for _, f, x in loader.batches(0, shuffle=False):
        out = model(f, x, g_pos, g_neg)
        found = {name: logit.sigmoid() for name, logit in logits_of(out).items()}
        found["zero-shot"] = zero_shot_score(f, x, g_zero)
        for name, part in found.items():  # (B, C)
            # Into one tensor: small ones, kept each among the batch's large ones, keep the heap
            # from giving those back (3 GiB at COCO's size).
            if name not in scores:
                scores[name] = part.new_empty(len(loader), part.shape[1])
            scores[name][done:done + len(part)] = part
        done += len(f)
        for name, part in maps(out, model).items() if maps else ():
            kept[name].append(part.half().cpu())  # many: half the memory
    return ({name: whole[:done].float().cpu().numpy() for name, whole in scores.items()},
            {name: torch.cat(parts).float().numpy() for name, parts in kept.items()})


class Predictor:
    """A trained run that scores images. checkpoint: "best" (chosen on validation), "last", or None:
    best where there is one. places: settings that say where data and weights lie now."""
    inspect = inspection.inspect

    def __init__(self, run, checkpoint=None, device=None, encoder=None, places=None):
        self.run = Path(run)
        kind = checkpoint or ("best" if (self.run / "best.pt").exists() else "last")
        file = self.run / f"{kind}.pt"
        state = read_checkpoint(file)
        cfg = restored(json.loads(state["config"]), file, places or {})
        self.cfg, self.names, self.epoch = cfg, state["names"], state["epoch"]
        self.device = torch.device(device or best_device())
        if encoder is None or encoder.sha256 != state["clip_sha256"]:
            encoder = clip.load(cfg.clip, activation=cfg.activation)
        self.clip = encoder.to(self.device)
        if self.clip.sha256 != state["clip_sha256"]:
            raise UserError(f"{run} was trained on CLIP {state['clip_sha256'][:12]}..., {cfg.clip} "
                            f"is {self.clip.sha256[:12]}...: give --clip the same weights")
        self.grid = self.clip.grid(cfg.size, cfg.size)  # (h, w)
        self.g_pos, self.g_neg, self.g_zero = (  # (C, D) each, the last of zero-shot CLIP
            state[name].to(self.device) for name in ("g_pos", "g_neg", "g_zero"))
        self.scale = state["zero_shot_scale"]  # (3, C) of the mixed score, or None
        if cfg.score == "mixed" and self.scale is None:
            raise UserError(f"{run} had no photos to bring zero-shot to its scale: choose another "
                            "--score than mixed")
        self.threshold = np.asarray(state["threshold"])  # (C,)
        self.rests_on = state["rests_on"]  # (C,) validation positives behind each threshold
        self.model = TRM(*self.g_pos.shape, matching=cfg.matching,
                         contrastive=cfg.uses("mmcl")).to(self.device).eval()
        self.model.load_state_dict({name: value for name, value in state["model"].items()
                                    if not name.startswith("prompts.")})

    @torch.no_grad()
    def score(self, f, x):
        """f (B, N, D), x (B, D) -> probabilities (B, C) of the run's score, and trm.Output."""
        out = self.model(f, x, self.g_pos, self.g_neg)
        logits = logits_of(out)
        if self.cfg.score == "mixed":
            zero = zero_shot_score(f, x, self.g_zero)
            return mixed(logits.get("mean", out.logits_r), zero, self.scale.to(f.device)), out
        return logits.get(self.cfg.score, out.logits_r).sigmoid(), out

    def scores(self, loader, maps=None):
        """All scores and maps of a split as `score_split` gives them, "mixed" among them."""
        scores, kept = score_split(self.model, self.g_pos, self.g_neg, loader, self.g_zero, maps)
        if self.scale is not None:
            scores["mixed"] = mixed_scores(scores, self.scale)
        return scores, kept

    def score_split(self, loader):
        """(n, C) probabilities of the run's score."""
        scores, _ = self.scores(loader)
        return scores.get(self.cfg.score, scores["region"])

    def predict(self, images, batch=32, workers=0):
        """images: list of files, bytes, file objects, PIL images or (H, W, 3) uint8 arrays -> list
        of {"image", "scores": {category: probability}, "present": [category]}, most probable first.
        UserError for one that is no image."""
        if isinstance(images, (str, Path)):
            raise UserError(f"expected a list of images, got {str(images)!r}: put it in brackets")
        return [self.row(images[i], p) for i, p, _ in self.iterate(images, batch, workers)]

    def row(self, image, p):
        """One image's probabilities (C,) as `predict` returns them."""
        ranked = np.argsort(-p, kind="stable")
        name = str(image) if isinstance(image, (str, Path)) else type(image).__name__
        return {"image": name, "scores": {self.names[c]: float(p[c]) for c in ranked},
                "present": [self.names[c] for c in ranked if p[c] >= self.threshold[c]]}

    def iterate(self, images, batch=32, workers=0, unreadable=None):
        """Yields (index, probabilities (C,), region maps (C, N)) of each image, numpy. One that
        cannot be decoded goes into the list `unreadable`; without a list it raises UserError."""
        labels = np.zeros((len(images), len(self.names)), np.int8)
        split = data.Split("images", images, self.names, labels)
        pixels = data.Images(split, self.cfg.size, lenient=unreadable is not None)
        loader = FeatureLoader(pixels, self.clip, batch, workers, device=self.device,
                               amp=autocast_dtype(self.cfg.amp, self.device),
                               need_global=self.cfg.needs_global)
        for index, f, x in loader.batches(0, shuffle=False):
            p, out = self.score(f, x)
            maps = region_map(out, self.cfg.matching).float().cpu().numpy()
            for i, *of_image in zip(index.tolist(), p.float().cpu().numpy(), maps):
                if i < 0:
                    unreadable.append(images[-1 - i])
                else:
                    yield i, *of_image

    def splits(self):
        """{"train", "val", "test"}: data.Split or None, as the run was trained on."""
        parts = data.load(self.cfg)
        if parts[0].names != self.names:
            changed = ", ".join(sorted(set(parts[0].names) ^ set(self.names))[:5])
            raise UserError(f"{self.cfg.root or self.cfg.data} has other categories than {self.run}"
                            f" ({changed or 'in another order'}): put the data back, or train anew")
        before = begun(self.run)["data"]
        for split in parts:
            if split and before.get(split.name, {}).get("sha256") != split.info["sha256"]:
                print(f"note: {split.name} is not what {self.run} was trained with: names, labels "
                      "or images have changed", file=sys.stderr)
        return dict(zip(("train", "val", "test"), parts))

    def loader(self, split):
        return evaluation_loader(self.cfg, split, self.clip, self.device)


class ZeroShot(Predictor):
    """CLIP without training in the place of a run, for a sheet whose labels are still to come.

    A probability is sigmoid(2 (z - 1)): z is the zero-shot score of a category, standardised over
    the images of the split. The region is the map of the cosines.
    """

    def __init__(self, cfg):
        self.cfg, self.device = dataclasses.replace(cfg, matching="average"), best_device()
        self.parts = dict.fromkeys(("train", "val", "test")) | data.complete(self.cfg)
        self.names = self.parts["train"].names
        self.threshold = np.full(len(self.names), 0.5)
        self.clip = clip.load(cfg.clip, activation=cfg.activation).to(self.device)
        self.grid = self.clip.grid(cfg.size, cfg.size)
        self.g = zero_shot_text(self.clip, data.prompts_for(cfg, self.parts["train"]))  # (C, D)

    def splits(self):
        return self.parts

    def score_split(self, loader):
        score = zero_shot(self.g, loader.batches(0, shuffle=False))["both"]  # (n, C)
        z = (score - score.mean(0)) / np.maximum(score.std(0), 1e-6)
        return 1 / (1 + np.exp(-2 * (z - 1)))

    def score(self, f, x):
        energy = self.g @ F.normalize(f, dim=-1).mT  # (B, C, N)
        return energy.amax(-1), Output(energy.amax(-1), energy=energy)
