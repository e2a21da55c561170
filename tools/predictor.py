"""Scores a split or photos with a model (Eq. 5; Sec. 3.6, inference), and Predictor, a trained run.

n images, B of a batch, C categories, N = h*w locations, D dims.
"""
import dataclasses
import functools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import clip
import data
from clip.features import FeatureLoader, set_precision
from config import restored
from datasets.csv_sheet import note
from support import UserError
from support.checkpoint import changed, read_checkpoint, writable
from support.cli import best_device
from support.distributed import gather
from tools import inspection
from tools.zero_shot import probabilities, probability_arrays, scores_of, zero_shot, zero_shot_text
from trm import TRM, Output


def evaluation_loader(cfg, split, encoder, device, rank=0, world=1):
    """Features of a split that is scored: not augmented; one cached view where the run caches."""
    views = int(cfg.cache_features > 0 and writable(Path(cfg.cache_dir)))
    return FeatureLoader(data.Images(split, cfg.size), encoder, cfg.batch, cfg.workers, views,
                         cfg.cache_dir, device, set_precision(cfg.amp, device), rank, world)


def region_map(out, matching):
    """The map (B, C, N) that a method shows: the mask of Eq. 2, or a similarity map."""
    return out.energy.sigmoid() if matching == "carl" else out.energy


@torch.no_grad()
def score_split(model, g_pos, g_neg, loader, g_zero, maps=None):
    """One pass -> {score: (n, C)} as `scores_of` has them, by the texts g_zero (C, D) of zero-shot,
    float32 on the CPU, and {name: (n, C, N)} of maps(out, model), if given, numpy."""
    model.eval()
    scores, kept, n = {}, defaultdict(list), len(loader)
    for i, (_, f, x) in enumerate(loader.batches(0, shuffle=False)):
        rows = slice(i * loader.batch, min(n, (i + 1) * loader.batch))  # of all processes
        out = model(f, x, g_pos, g_neg)
        for name, part in scores_of(out, f, x, g_zero).items():  # (B, C)
            # one tensor a split: small ones, one a batch, would keep 3 GiB from being freed (COCO)
            if name not in scores:
                scores[name] = part.new_empty(n, part.shape[1])
            scores[name][rows] = gather(part, rows.stop - rows.start)
        if maps:
            for name, part in maps(out, model).items():
                kept[name].append(part.float().cpu())
    return ({name: whole.float().cpu() for name, whole in scores.items()},
            {name: torch.cat(parts).numpy() for name, parts in kept.items()})


class Predictor:
    """A trained run that scores images. checkpoint: "best" (chosen on validation), "last", or None:
    best where there is one. places: settings that say where data and weights lie now."""
    inspect = inspection.inspect
    memory = functools.cached_property(inspection.memory_of)

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
        self.encoder = encoder.to(self.device)
        if self.encoder.sha256 != state["clip_sha256"]:
            raise UserError(f"{run} was trained on CLIP {state['clip_sha256'][:12]}..., {cfg.clip} "
                            f"is {self.encoder.sha256[:12]}...: give --clip the same weights")
        self.grid = self.encoder.grid(cfg.size, cfg.size)  # (h, w)
        self.g_pos, self.g_neg, self.g_zero = (  # (C, D) each, the last of zero-shot CLIP
            state[name].to(self.device) for name in ("g_pos", "g_neg", "g_zero"))
        self.zero_shot_scale = state["zero_shot_scale"]  # (3, C) of the mixed score, or None
        if cfg.score == "mixed" and self.zero_shot_scale is None:
            raise UserError(f"{file}: the mixed score needs photos (train with another --score), "
                            "and an epoch that was evaluated (--resume the run)")
        self.threshold = np.asarray(state["threshold"])  # (C,)
        self.rests_on = state["rests_on"]  # (C,) known positives behind each threshold
        self.model = TRM(*self.g_pos.shape, matching=cfg.matching,
                         contrastive=cfg.uses("mmcl")).to(self.device).eval()
        self.model.load_state_dict({name: value for name, value in state["model"].items()
                                    if not name.startswith("prompts.")})

    @torch.no_grad()
    def score_batch(self, f, x):
        """f (B, N, D), x (B, D) -> probabilities (B, C) of the run's score, and trm.Output."""
        out = self.model(f, x, self.g_pos, self.g_neg)
        scores = probabilities(scores_of(out, f, x, self.g_zero), self.zero_shot_scale)
        return scores[self.cfg.score], out

    def all_scores(self, split, maps=None):
        """{score: (n, C)} of a split, "mixed" among them, and {name: (n, C, N)} of maps. numpy."""
        scores, kept = score_split(self.model, self.g_pos, self.g_neg, self.loader(split),
                                   self.g_zero, maps)
        return probability_arrays(scores, self.zero_shot_scale), kept

    def probabilities(self, split):
        """(n, C) probabilities of the run's score."""
        return self.all_scores(split)[0][self.cfg.score]

    def predict(self, images, batch=32, workers=0):
        """images: list of files, bytes, file objects, PIL images or (H, W, 3) uint8 arrays -> list
        of {"image", "scores": {category: probability}, "present": [category]}, most probable first.
        UserError for one that is no image."""
        if not isinstance(images, (list, tuple)):
            raise UserError(f"expected a list of images, got {type(images).__name__}. One image: "
                            "put it in brackets; several: list(images)")
        return [self.row(images[i], p) for i, p, _ in self.iterate(images, batch, workers)]

    def row(self, image, p):
        """One image's probabilities (C,) as `predict` returns them."""
        ranked = np.argsort(-p, kind="stable")
        return {"image": data.name_of(image),
                "scores": {self.names[c]: float(p[c]) for c in ranked},
                "present": [self.names[c] for c in ranked if p[c] >= self.threshold[c]]}

    def iterate(self, images, batch=32, workers=0, unreadable=None):
        """Yields (index, probabilities (C,), region maps (C, N)) of each image, numpy; of ZeroShot
        cosines. One that cannot be decoded goes into the list `unreadable`, else UserError."""
        split = data.Split("images", images, self.names, labels=None)
        pixels = data.Images(split, self.cfg.size, lenient=unreadable is not None)
        loader = FeatureLoader(pixels, self.encoder, batch, workers, device=self.device,
                               amp=set_precision(self.cfg.amp, self.device))
        for index, f, x in loader.batches(0, shuffle=False):
            p, out = self.score_batch(f, x)
            maps = region_map(out, self.cfg.matching).float().cpu().numpy()
            for i, row, of_image in zip(index.tolist(), p.float().cpu().numpy(), maps):
                if i < 0:  # data.Images could not decode it
                    unreadable.append(images[-1 - i])
                else:
                    yield i, row, of_image

    def splits(self):
        """{"train", "val", "test"}: data.Split or None, as the run was trained on."""
        splits = data.load(self.cfg)
        if splits[0].names != self.names:
            differ = ", ".join(sorted(set(splits[0].names) ^ set(self.names))[:5])
            raise UserError(f"{self.cfg.root or self.cfg.data} has other categories than {self.run}"
                            f" ({differ or 'in another order'}): put the data back, or train anew")
        photos = splits if self.cfg.images == "photos" else splits[1:]  # it learned from captions
        for name in changed(self.run, photos):
            note(f"{name} is not what {self.run} was trained with: other names, prompts or labels")
        return dict(zip(("train", "val", "test"), splits))

    def loader(self, split):
        return evaluation_loader(self.cfg, split, self.encoder, self.device)


class ZeroShot(Predictor):
    """CLIP without training in the place of a run, for a sheet whose labels are still to come. A
    probability is sigmoid(2 (z - 1)), z a category's zero-shot score standardised over the images
    of the split; the region is the map of the cosines."""

    def __init__(self, cfg):
        # "average": region_map then shows the cosines as they are
        self.cfg, self.device = dataclasses.replace(cfg, matching="average"), best_device()
        self.complete = {name: split.used() for name, split in data.complete(self.cfg).items()}
        self.names = self.complete["train"].names
        self.threshold = np.full(len(self.names), 0.5)
        self.encoder = clip.load(cfg.clip, activation=cfg.activation).to(self.device)
        self.grid = self.encoder.grid(cfg.size, cfg.size)
        self.g = zero_shot_text(self.encoder, self.complete["train"].prompts)  # (C, D)

    def splits(self):
        return self.complete

    def probabilities(self, split):
        score = zero_shot(self.g, self.loader(split).batches(0, shuffle=False))["both"]  # (n, C)
        z = (score - score.mean(0)) / np.maximum(score.std(0), 1e-6)
        return 1 / (1 + np.exp(-2 * (z - 1)))

    def score_batch(self, f, x):
        """Cosines (B, C), not probabilities, and trm.Output."""
        energy = self.g @ F.normalize(f, dim=-1).mT  # (B, C, N)
        return energy.amax(-1), Output(energy.amax(-1), energy=energy)
