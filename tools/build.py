"""What a run is made of, from its Config: data, loaders, and the model before its first step."""
import dataclasses
from pathlib import Path

import numpy as np
import torch

import data
import kernels
from clip.features import FeatureLoader, set_precision
from datasets.base import ASSUMED_NEGATIVE, NEGATIVE, UNKNOWN, tells_presence
from paper import captions
from support import UserError
from support.checkpoint import read_checkpoint, read_config
from tools.predictor import evaluation_loader
from trm import TRM, Prompts

FEW = 5  # photos: with fewer the scale is noise, with one it has no deviation (docs/readings.md)


def load_data(cfg):
    """(train, val or None, test or None): data.Split each."""
    splits = data.load(cfg)
    if cfg.images != "captions":
        return splits
    if cfg.score == "mixed" and not (splits[1] and len(splits[1].paths) >= FEW):
        raise UserError(f"--score mixed needs {FEW} photos held out: --val 0.2, or another --score")
    return captions.load(cfg, *splits[:2]), *splits[1:]


def settled(cfg, run, split, encoder, resume=False):
    """The Config with this run's folder and CLIP, and with --assume-negative decided."""
    if not encoder.name:  # from where a run's user loads it again
        raise UserError("expected a CLIP of clip.load, got clip.build's: save and load its weights")
    found = dict(out=str(run.absolute()), clip=encoder.name, activation=encoder.activation)
    told = split.truth  # what a mask hides changes nothing, unless it leaves no label "absent"
    if cfg.single_positive or not (split.labels == NEGATIVE).any():
        told = split.labels
    if resume:  # what it was begun with, although the sheet may have got its first 0s since
        found["assume_negative"] = read_config(run)["config"]["assume_negative"]
    elif cfg.assume_negative is None and tells_presence(told):
        found["assume_negative"] = ASSUMED_NEGATIVE
    return dataclasses.replace(cfg, **found)


def training_loader(cfg, split, encoder, device, rank, world):
    """What gives (index, f, x) of a batch: features of photos, or of captions in their place."""
    if cfg.images == "captions":
        return captions.Captions(split, encoder, cfg.batch, cfg.seed, device, rank, world)
    images = data.Images(split, cfg.size, cfg.augment, cfg.seed)
    # for so many images 20 s of compiling pay: then a GPU encodes 2.3 times as fast (docs/speed.md)
    many = not cfg.cache_features and len(images) * cfg.epochs >= 200_000
    return FeatureLoader(images, encoder, cfg.batch, cfg.workers, cfg.cache_features, cfg.cache_dir,
                         device, set_precision(cfg.amp, device), rank, world,
                         need_global=cfg.matching == "global",
                         compiled=many and kernels.runs_triton(torch.empty(0, device=device)))


def evaluation_loaders(cfg, splits, encoder, device, rank, world):
    """{name: loader} of the splits that an epoch is measured on. "train" is at most 1,000 photos:
    zero-shot scores get their scale from them where validation has fewer than FEW, and they help to
    choose the thresholds of the mixed score."""
    train_split, val_split, test_split = splits
    sample = None
    scaled = val_split and len(val_split.paths) >= FEW
    if cfg.images == "photos" and (not scaled or cfg.score == "mixed"):
        n = len(train_split.paths)
        sample = train_split.subset(range(0, n, -(-n // 1000)))  # spaced: a sheet may be sorted
        if cfg.assume_negative:
            sample.labels = np.where(sample.labels == UNKNOWN, NEGATIVE, sample.labels)
    named = {"val": val_split, "train": sample, "test": test_split}
    if not scaled:
        named = {"train": sample} | named  # the first one gives the scale
    return {name: evaluation_loader(cfg, split, encoder, device, rank, world)
            for name, split in named.items() if split}


def build_model(cfg, split, encoder):
    """The TRM of a run for the categories of a data.Split; a CARL of --carl-from is frozen."""
    queries = None
    if cfg.queries == "text":
        texts = [f"a photo of a {name}" for name in split.prompts]
        queries = encoder.encode_text(encoder.tokenize(texts))
    prompts = Prompts(encoder, split.prompts, cfg.context)
    model = TRM(len(split.names), encoder.D, prompts, cfg.matching, queries,
                contrastive=cfg.uses("mmcl"), dropout=cfg.dropout)
    if cfg.carl_from:
        model.carl.requires_grad_(False)
    return model


def load_carl(model, run, split, encoder):
    """Table 4: the region module of another run, one on complete labels, kept as it is."""
    other = read_checkpoint(Path(run) / "last.pt")
    carl = {key[5:]: value for key, value in other["model"].items() if key.startswith("carl.")}
    same = other["names"] == split.names and other["clip_sha256"] == encoder.sha256
    if not (carl and same):
        raise UserError("--carl-from expects a run with --matching carl on the same categories "
                        f"and CLIP, got {run}")
    model.carl.load_state_dict(carl)
