"""CLIP's zero-shot score as a term inside the model that training corrects, beside the mixed score,
which adds it outside: mAP on the validation scenes.

    python tests/study_zero_shot_term.py

sigmoid(logit + w (z - 1)): z is the zero-shot score of a category, standardised over the training
images, w fixed at 0.5, 1 or 2, or one trained w a category, which starts at 1. Last of 40 epochs,
seeds 0 to 2; docs/readings.md holds the table. The term stands in no file of the project: a model
is replaced while a run is built.

B images, C categories, N locations, D dims.
"""
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import nn

import clip
import train
from config import Config, preset
from study_peers import replaced
from tools import build, report
from tools.predictor import evaluation_loader
from tools.zero_shot import zero_shot, zero_shot_score, zero_shot_text
from trm import TRM

# training scenes, share of known labels, batch: of a sheet's recipe, or of the scenes'
SETTINGS = ((150, 0.3, 18), (150, 0.15, 18), (1000, 0.1, 64))
WEIGHTS = (0.5, 1, 2, "one a category")
SCORES = ("region", "query", "mean", "mixed")


class Corrected(TRM):
    """TRM whose logits of regions and of queries have the term w (z - 1)."""

    def zero_shot_term(self, g, scores, w):
        """g (C, D) unit text features; scores (n, C) of the training images; w: see above."""
        self.g, self.mean, self.deviation = g, scores.mean(0), scores.std(0, correction=0)
        self.w = nn.Parameter(torch.ones(len(g))) if w == WEIGHTS[-1] else w

    def forward(self, f, x, g_pos, g_neg):
        out = super().forward(f, x, g_pos, g_neg)
        z = (zero_shot_score(f, x, self.g) - self.mean) / self.deviation  # (B, C)
        term = self.w * (z - 1)
        return out._replace(logits_r=out.logits_r + term, logits_q=out.logits_q + term)


def term_inside(w, built):
    """Replaces the model of the next run; it is appended to the list `built`."""
    def build_model(cfg, split, encoder):
        with replaced(build, "TRM", Corrected):
            model = build.build_model(cfg, split, encoder)
        g = zero_shot_text(encoder, split.prompts)
        loader = evaluation_loader(cfg, split, encoder, torch.device("cpu"))
        scores = zero_shot(g, loader.batches(0, shuffle=False))["both"]  # (n, C)
        model.zero_shot_term(g, torch.from_numpy(scores), w)
        built.append(model)
        return model

    return replaced(train, "build_model", build_model)


def no_pictures(*_):
    """In the place of report.of_run, which knows the project's models alone."""


def one_run(images, ratio, batch, seed, encoder, w, built):
    """{score: mAP on validation} of a run; w None: the model as it is."""
    out = Path("runs/study", f"term-{seed}")
    shutil.rmtree(out, ignore_errors=True)
    cfg = Config(**preset("scenes") | dict(seed=seed, ratio=ratio, train_images=images,
                                           batch=batch, eval_every=40, out=str(out)))
    train_split, val_split, _ = build.load_data(cfg)
    inside = nullcontext() if w is None else term_inside(w, built)
    with inside, replaced(report, "of_run", no_pictures):
        line = train.train(cfg, splits=(train_split, val_split, None), encoder=encoder)[-1]
    return {score: line["val"][f"mAP_{score}"] for score in SCORES}


def study(images, ratio, batch, encoder, w, seeds=(0, 1, 2)):
    """Prints mean, deviation and lowest seed of every score."""
    built = []
    runs = [one_run(images, ratio, batch, seed, encoder, w, built) for seed in seeds]
    print(f"RESULT {images} scenes, {100 * ratio:.0f} %, w {w}:", end="")
    for score in SCORES:
        values = [run[score] for run in runs]
        print(f"  {score} {mean(values):.2f} ± {stdev(values):.2f} ({min(values):.2f})", end="")
    print(flush=True)
    if w == WEIGHTS[-1]:
        trained = torch.cat([model.w.detach() for model in built])
        print(f"RESULT its w after training: {trained.min():.2f} to {trained.max():.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # one rounding everywhere
    for setting in SETTINGS:
        for weight in (None, *WEIGHTS):
            study(*setting, clip.load("tiny"), weight)
