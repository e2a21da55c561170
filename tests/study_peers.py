"""What differs from the peers' code, one difference at a time: mAP on the validation scenes.

    python tests/study_peers.py dualcoop        and: carl

1,000 training scenes, 10 % of the labels, last of 40 epochs, seeds 0 to 2; docs/readings.md holds
the table. Each difference replaces one function while a run is built; the project has no switch
for it.
"""
import math
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import clip
import losses
import train
import trm
from config import Config, preset
from tools import build


@contextmanager
def replaced(module, name, value):
    earlier = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, earlier)


def full_stop():
    """`name.` in the prompts, as all peers write it."""
    def prompts(encoder, texts, M):
        return trm.Prompts(encoder, [f"{text}." for text in texts], M)

    return replaced(build, "Prompts", prompts)


def stopped_gradient():
    """Eq. 14's focusing factors carry no gradient."""
    def asymmetric(logits, labels, gamma_pos, gamma_neg, shift, assume_negative):
        p = logits.sigmoid()
        p_m = (p - shift).clamp(min=0)
        positive = (1 - p).detach() ** gamma_pos * p.clamp(min=1e-8).log()
        negative = p_m.detach() ** gamma_neg * (1 - p_m).clamp(min=1e-8).log()
        loss = -torch.where(labels == 1, positive, negative)
        return torch.where(labels == 0, assume_negative * loss, loss).sum(1).mean()

    return replaced(losses, "asymmetric", asymmetric)


def fixed_temperature():
    """1 / tau is 100 and not learned, as in DualCoOp."""
    def build_model(*given):
        model = build.build_model(*given)
        model.log_scale.data.fill_(math.log(100))
        model.log_scale.requires_grad_(False)
        return model

    return replaced(train, "build_model", build_model)


def mean_token():
    """DualCoOp's own locations: the mean of the map is one of them."""
    def aggregation(f, *given):
        logits, similarity = one(torch.cat([f.mean(1, keepdim=True), f], 1), *given)
        return logits, similarity[..., 1:]

    one = trm.spatial_aggregation
    return replaced(trm, "spatial_aggregation", aggregation)


def study(matching, seeds=(0, 1, 2)):
    torch.set_num_threads(1)  # one rounding everywhere
    encoder = clip.load("tiny")
    differences = {"as it is": nullcontext, "full stop": full_stop,
                   "stopped gradient": stopped_gradient,
                   "1/tau fixed at 100": fixed_temperature}
    if matching == "dualcoop":
        differences["mean token among the locations"] = mean_token
    for name, difference in differences.items():
        found = {}
        for seed in seeds:
            out = Path("runs/study", f"{matching}-{seed}")
            shutil.rmtree(out, ignore_errors=True)
            cfg = Config(**preset("scenes") | dict(
                matching=matching, seed=seed, ratio=0.1, train_images=1000, eval_every=40,
                out=str(out)))
            splits = build.load_data(cfg)
            with difference():
                line = train.train(cfg, splits=(splits[0], splits[1], None), encoder=encoder)[-1]
            for score in ("region", "query", "mean", "mixed"):
                if f"mAP_{score}" in line["val"]:
                    found.setdefault(score, []).append(line["val"][f"mAP_{score}"])
        print(f"RESULT {matching}, {name}: " + "  ".join(
            f"{score} {mean(values):.2f} ± {stdev(values):.2f}"
            for score, values in found.items()), flush=True)


if __name__ == "__main__":
    study(sys.argv[1])
