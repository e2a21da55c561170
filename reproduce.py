"""The paper's tables and figures, one a call: the paper's number beside the one measured here (Sec. 4, Tables 1-6, Fig. 4).

    python reproduce.py --table 3 --jobs 2                            drawn scenes, 1,000 training images, 3 seeds
    python reproduce.py --table 1 --data coco --root /data/coco       the real thing: RN101, 448, all images
    python reproduce.py --table 5                                     parameters and multiply-adds, nothing is trained
    python reproduce.py --figure 4 --image photos/                    regions of TRM-ML and DualCoOp, and how often they hit
    python reproduce.py --study kd                                    a point on which the paper is silent

Every option of train.py is accepted too and holds for all rows (--epochs 10, --batch 32, --cache-dir ...). A row is a run of
train.py with some settings changed. Its folder is recognised by its settings: what is finished is read, what was stopped goes
on, and a run that two tables share is trained once. Tables go to --out as Markdown, with the numbers of every seed as JSON.
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch

import clip
import data
import eval as evaluation
import train
from features import Features
from files import ConfigError, Parser, best_device, guarded
from metrics import localisation, metrics
from photos import images_in
from pictures import picture
from train import Config

# ---------------------------------------------------------------------------------------------------------- the paper's numbers
# Table 1, known labels 10 % ... 90 %. "DualCoOp" is the authors' own rerun (their star), the stronger of the two they print.
PAPER_1 = {
    "coco": {"DualCoOp": (81.5, 82.7, 83.3, 83.8, 84.0, 84.2, 84.4, 84.4, 84.5),
             "TaI-DPT+DualCoOp": (81.5, 82.6, 83.3, 83.7, 83.9, 84.0, 84.2, 84.4, 84.5),
             "TRM-ML": (83.3, 84.5, 85.0, 85.3, 85.6, 85.8, 86.1, 86.4, 86.5)},
    "voc2007": {"DualCoOp": (91.8, 93.3, 93.7, 94.2, 94.2, 94.7, 94.8, 94.8, 94.9),
                "TaI-DPT+DualCoOp": (93.3, 94.6, 94.8, 94.9, 95.1, 95.0, 95.1, 95.3, 95.5),
                "TRM-ML": (93.9, 94.6, 94.9, 95.3, 95.4, 95.6, 95.6, 95.6, 95.7),
                "TaI-DPT+TRM-ML": (94.5, 95.0, 95.3, 95.4, 95.6, 95.7, 95.7, 95.8, 95.9)},
    "vg200": {"TRM-ML": (50.5, 51.9, 52.0, 53.0, 53.3, 53.5, 53.6, 53.7, 53.9)},
}
PAPER_2 = {"coco": (78.6, 79.2), "voc2012": (91.8, 92.2), "nuswide": (57.3, 63.4), "cub": (26.9, 27.6)}     # LargeLoss, SPLC
PAPER_3 = {"coco": (77.7, 84.1, 84.4, 84.7, 85.0, 85.4), "voc2007": (90.8, 94.2, 94.6, 94.9, 94.7, 95.2)}    # mean of 10-90 %
PAPER_4 = {"voc2007": ((92.0, 93.9, 94.4, 94.9, 95.0), (94.8, 94.9, 95.0, 95.1, 95.1)),                      # 10-50 %
           "coco": ((80.8, 82.9, 83.7, 84.3, 84.6), (83.1, 83.8, 84.2, 84.5, 84.7))}                          # without, with
PAPER_5 = {"DualCoOp": (91.17, 1.25, 36.97), "TRM-ML": (96.72, 6.80, 37.50)}         # total, learnable (Mi), multiply-adds (G)
PAPER_6 = {"voc2007": (93.24, 94.29, 94.15, 94.76)}                                  # neither, text, visual, both: mean of 10-50 %
AVERAGE = "Avg."          # of the shown ratios; the paper's, where it prints no more than that, of 10-90 % (Table 3) or 10-50 % (Table 6)
NINE, FIVE = tuple(i / 10 for i in range(1, 10)), tuple(i / 10 for i in range(1, 6))


class Cell(NamedTuple):
    """One number of a table. runs: the settings of one run, or of several whose scores are averaged, or the name of a
    zero-shot score. A setting `carl_from` may hold the settings of another run, which is then trained before."""
    row: str
    column: str
    runs: object
    paper: Optional[float] = None


def nearest(printed, data_name):
    """The data set whose printed numbers stand beside those of `data_name`: itself, else MS-COCO, else the only one there is."""
    return next(name for name in (data_name, "coco", *printed) if name in printed)


def grid(rows, ratios, paper=None, of=NINE, zero_shot=False):
    """rows {name: settings or list of settings}, paper {name: numbers at the ratios `of`, or one: their mean} -> Cells."""
    cells = [Cell(f"zero-shot CLIP, {kind}", AVERAGE, kind) for kind in ("global", "dense")] if zero_shot else []
    for name, runs in rows.items():
        runs, known = [runs] if isinstance(runs, dict) else runs, (paper or {}).get(name)
        at = dict(zip(of, known)) if isinstance(known, tuple) else {}
        cells += [Cell(name, f"{100 * r:.0f} %", tuple(dict(ratio=r) | run for run in runs), at.get(r)) for r in ratios]
        if not at and known is not None:
            cells.append(Cell(name, AVERAGE, None, known))
    return cells


# ---------------------------------------------------------------------------------------------------------------- the tables
DUALCOOP = dict(matching="dualcoop")
PARTS_OFF = dict(without="kd,mmcp,mmcl")


def tai_dpt(base):
    """TaI-DPT's two granularities are two runs on captions: global prompts on sentences, local prompts on their words."""
    if base.data not in ("scenes", "coco") and not base.captions:
        return None                                                                # needs --captions FILE
    epochs = max(1, base.epochs // 5)                                              # five captions an image: the same number of steps
    return [dict(images="captions", ratio=1.0, epochs=epochs, matching=m) for m in ("global", "dualcoop")]


def table_1(base, ratios):
    rows, tai = {"DualCoOp": DUALCOOP, "TRM-ML": {}}, tai_dpt(base)
    if tai:                                                                        # equal halves: the run twice, the two granularities
        rows |= {"TaI-DPT": tai, "TaI-DPT+DualCoOp": [DUALCOOP] * 2 + tai, "TaI-DPT+TRM-ML": [{}] * 2 + tai}
    return grid(rows, ratios or NINE, PAPER_1[nearest(PAPER_1, base.data)], zero_shot=True)


def table_2(base, ratios):
    """Single positive. RN50 unless --clip says otherwise. The SPLC setup is defined by published lists, which scenes lack."""
    weight, printed = base.assume_negative or 0.3, PAPER_2[nearest(PAPER_2, base.data)]
    rows = {"DualCoOp": DUALCOOP, "TRM-ML": {}, "TRM-ML, unknowns never negative": dict(assume_negative=0.0)}
    return [Cell(name, title, (dict(single_positive=setup, assume_negative=weight) | run,), number if name == "TRM-ML" else None)
            for name, run in rows.items() for title, setup, number in zip(("LargeLoss setup", "SPLC setup"), ("largeloss", "splc"), printed)
            if setup == "largeloss" or base.data in data.LISTS]


def table_3(base, ratios):
    rows = {"average feature": dict(matching="average"), "+CARL": PARTS_OFF, "+CARL +KD": dict(without="mmcp,mmcl"),
            "+CARL +KD +MMCP": dict(without="mmcl"), "+CARL +KD +MMCL": dict(without="mmcp"), "all (TRM-ML)": {}}
    paper = dict(zip(rows, PAPER_3[nearest(PAPER_3, base.data)]))
    more = {"global feature": dict(matching="global"), "DualCoOp": DUALCOOP, "DualCoOp, fixed spatial scale": dict(matching="dualcoop-fixed"),
            "all but KD": dict(without="kd")}
    return grid(rows | more, ratios or (NINE if base.data != "scenes" else (0.1, 0.5, 0.9)), paper, zero_shot=True)


def table_4(base, ratios):
    plain = dict(without="mmcp,mmcl")
    rows = {"w/o complete": plain, "w complete": plain | dict(carl_from=plain | dict(ratio=1.0))}
    return grid(rows, ratios or FIVE, dict(zip(rows, PAPER_4[nearest(PAPER_4, base.data)])), FIVE)


def table_6(base, ratios):
    rows = {"neither (CARL, KD)": dict(without="mmcp,mmcl"), "text": dict(without="mmcl,visual"),
            "visual": dict(without="mmcl,text"), "text and visual": dict(without="mmcl")}
    return grid(rows, ratios or (FIVE if base.data != "scenes" else (0.1, 0.3, 0.5)), dict(zip(rows, PAPER_6["voc2007"])))


TABLES = {1: (table_1, PAPER_1), 2: (table_2, PAPER_2), 3: (table_3, PAPER_3), 4: (table_4, PAPER_4), 6: (table_6, PAPER_6)}

# Where the paper is silent. The score of inference (region, query, mean) is in every table and needs no runs of its own.
STUDIES = {
    "kd": [dict(without="kd")] + [dict(kd=how, kd_temperature=t, beta=b) for how in ("softmax", "bernoulli") for t in (1.0, 2.0, 4.0) for b in (0.05, 1.0)],
    "stage-one": [dict(stage_one=s) for s in (0.0, 0.1, 0.2, 1 / 3, 0.5, 0.75)],
    "topk": [dict(topk=k) for k in (1, 3, 5, 10, 20)],
    "queue": [dict(queue=n) for n in (1, 8, 16, 32, 64, 128, 256)],
    "eta": [dict(eta=e) for e in (0.0, 0.5, 0.9, 0.99, 0.999)],
    "tau": [dict(tau=t) for t in (0.02, 0.05, 0.07, 0.1, 0.2, 0.5)],
    "queries": [dict(queries=q) for q in ("random", "text")],
    "contrastive-labels": [dict(pseudo_in_contrastive=p) for p in (False, True)],
    "alpha": [dict(alpha=a) for a in (0.0, 0.1, 0.5, 1.0, 2.0)],
    "gamma": [dict(gamma=g) for g in (0.0, 0.001, 0.01, 0.05, 0.1, 0.5, 1.0)],
    "beta": [dict(beta=b) for b in (0.0, 0.01, 0.05, 0.2, 1.0)],
    "assume-negative": [dict(single_positive="largeloss", ratio=1.0, assume_negative=w) for w in (0.0, 0.1, 0.3, 0.5, 1.0)],
    "assume-negative-partial": [dict(assume_negative=w) for w in (0.0, 0.01, 0.05, 0.1, 0.3)],
}


def study(name, ratios):
    rows = {", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in run.items() if k not in ("single_positive", "ratio")): run
            for run in STUDIES[name]}
    return grid(rows, ratios or (0.1,))


# --------------------------------------------------------------------------------------------------------------- running rows
NOT_THE_RESULT = {"out", "workers", "cache_dir", "kernels"}                        # settings that leave the numbers alone


def key(cfg, sha256):
    return json.dumps([sha256, {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_THE_RESULT}], sort_keys=True)


class Runs:
    """The run folders below `out`: which settings are there, which are missing, and training of those."""
    FOLDER = "runs"

    def __init__(self, base, out, jobs):
        self.base, self.out, self.jobs = base, out, jobs
        self.device = best_device()
        self.encoder = clip.load(base.clip, activation=base.activation).to(self.device)
        self.folders = {}
        for file in sorted(self.out.glob(f"{self.FOLDER}/*/config.json")):
            with contextlib.suppress(train.ConfigError, json.JSONDecodeError):     # a folder of another version
                self.folders[key(train.load_config(file.parent), json.loads(file.read_text()).get("clip_sha256"))] = file.parent

    def config(self, settings, seed):
        """Settings of a row -> its Config with its folder in `out`, and the Configs that it needs first."""
        settings, before = dict(settings), []
        if isinstance(settings.get("carl_from"), dict):
            before = self.config(settings["carl_from"], seed)
            settings["carl_from"] = before[-1].out
        cfg = dataclasses.replace(self.base, **settings, seed=seed)
        identity = key(cfg, self.encoder.sha256)
        if identity not in self.folders:
            name = [Path(cfg.data).stem, cfg.single_positive or f"{cfg.ratio:g}", "captions" if cfg.images == "captions" else "", cfg.matching,
                    cfg.without and "no-" + cfg.without.replace(",", "-"), f"seed{seed}", hashlib.sha256(identity.encode()).hexdigest()[:8]]
            self.folders[identity] = self.out / self.FOLDER / "-".join(filter(None, name))
        return before + [dataclasses.replace(cfg, out=str(self.folders[identity]))]

    def train(self, wanted):
        """Trains what is missing among `wanted` (lists of Configs as from `config`), those that others need first."""
        for depth in range(max(map(len, wanted), default=0)):
            todo = {configs[depth].out: configs[depth] for configs in wanted if len(configs) > depth}
            todo = [cfg for cfg in todo.values() if len(history(cfg.out)) < cfg.epochs]
            todo.sort(key=lambda cfg: cfg.seed)                                    # one whole seed after the other
            if todo:
                self._train(todo)

    def _train(self, todo):
        start, count = time.perf_counter(), 0
        print(f"{len(todo)} runs to train, {self.jobs} at a time", flush=True)

        def finished(seconds, cfg):
            nonlocal count
            count += 1
            left = (time.perf_counter() - start) / count * (len(todo) - count)
            rows = history(cfg.out)
            told = f"mAP {rows[-1]['test']['mAP']:.2f}" if len(rows) == cfg.epochs else "diverged"
            print(f"[{count}/{len(todo)}] {Path(cfg.out).name}: {told}, {seconds:.0f} s, about {left / 60:.0f} minutes left", flush=True)

        if self.jobs == 1:
            for cfg in todo:
                finished(train_one(cfg), cfg)
            return
        pool = ProcessPoolExecutor(self.jobs, get_context("spawn"), share_cores, (self.jobs,))
        try:
            futures = {pool.submit(train_one, cfg): cfg for cfg in todo}
            for future in as_completed(futures):
                finished(future.result(), futures[future])
        finally:
            pool.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------------------------------------------------ reading them
    @functools.cached_property
    def test(self):
        """The features of the test split, which all rows of a table share."""
        b, split = self.base, splits_of(self.base)[2]
        if split is None:
            raise data.DataError(f"{b.data} has no test split: nothing can be compared")
        return Features(split, self.encoder, b.size, batch=b.batch, workers=b.workers, views=min(1, b.cache_features), cache=b.cache_dir,
                        device=self.device)

    @functools.cached_property
    def zero_shot(self):
        return evaluation.zero_shot(self.encoder, self.test.split.prompts, self.test)

    def mAP(self, scores):
        return metrics(scores, self.test.split.truth)["mAP"]

    def scores(self, run, checkpoint):
        """(n, C) test scores of a run, kept beside its checkpoint."""
        kept, file = Path(run) / f"test-{checkpoint}.npy", Path(run) / f"{checkpoint}.pt"
        if not kept.exists() or kept.stat().st_mtime < file.stat().st_mtime:
            predictor = evaluation.Predictor(run, checkpoint, self.device, self.encoder)
            np.save(kept, evaluation.run_scores(predictor, self.test)[0])
        return np.load(kept)

    def measure(self, cell, seeds):
        """{score: {"last": {seed: mAP}, "best": {seed: mAP}}}; empty for a cell of the paper alone, or whose runs diverged."""
        if isinstance(cell.runs, str):
            return {"similarity": {"last": {0: self.mAP(self.zero_shot[cell.runs])}}}
        found = {}
        for seed in seeds if cell.runs else ():
            runs = [self.config(run, seed)[-1] for run in cell.runs]
            if any(len(history(cfg.out)) < cfg.epochs for cfg in runs):
                continue
            for checkpoint in ("last", "best"):
                if len(runs) > 1:
                    numbers = {"averaged": self.mAP(np.mean([self.scores(cfg.out, checkpoint) for cfg in runs], 0))}
                else:
                    line = chosen(runs[0].out, checkpoint)["test"]
                    numbers = {score: line[f"mAP_{score}"] for score in ("region", "query", "mean") if f"mAP_{score}" in line}
                for score, number in numbers.items():
                    found.setdefault(score, {}).setdefault(checkpoint, {})[seed] = number
        return found


def history(run):
    """Lines of a run's metrics, one an epoch; none before the first epoch."""
    file = Path(run) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def chosen(run, checkpoint):
    """The line of the last epoch, or of the best one on validation (on test where a data set has no validation split)."""
    lines = [line for line in history(run) if "test" in line]
    judge = "val" if "val" in lines[-1] else "test"
    return lines[-1] if checkpoint == "last" else max(lines, key=lambda line: line[judge]["mAP"])


# What follows runs in a process of its own when --jobs asks for several.
SPLIT_SETTINGS = ("data", "root", "ratio", "single_positive", "seed", "train_images", "mask", "val", "names")


@functools.lru_cache(maxsize=4)
def _splits(settings):
    return train.load_data(Config(**dict(settings)))


def splits_of(cfg):
    return _splits(tuple((name, getattr(cfg, name)) for name in SPLIT_SETTINGS))


encoder_of = functools.lru_cache(maxsize=1)(clip.load)


def share_cores(jobs):
    signal.signal(signal.SIGINT, signal.SIG_DFL)                                   # Ctrl-C ends a worker at once; its checkpoint is whole
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def train_one(cfg):
    """Trains a row, or goes on with it; returns the seconds. What it prints goes to its folder. A diverged run stays unfinished."""
    start, folder = time.perf_counter(), Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    resume = folder if (folder / "config.json").exists() else None
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            train.Run(cfg, resume, splits_of(cfg), encoder_of(cfg.clip, activation=cfg.activation)).train()
        except FloatingPointError as error:
            print(error)
    return time.perf_counter() - start


# -------------------------------------------------------------------------------------------------------------------- tables
def table(cells, runs, seeds, paper="paper"):
    """Trains what is missing. Returns the Markdown table and {row: {score: {column: {"last" or "best": {seed: mAP}}}}}."""
    runs.train([runs.config(run, seed) for seed in seeds for cell in cells if isinstance(cell.runs, tuple) for run in cell.runs])
    columns = list(dict.fromkeys(cell.column for cell in cells if cell.column != AVERAGE))
    measured, printed = {}, {}
    for cell in cells:
        printed.setdefault(cell.row, {})[cell.column] = cell.paper
        of_row = measured.setdefault(cell.row, {})
        for score, numbers in runs.measure(cell, seeds).items():
            of_row.setdefault(score, {})[cell.column] = numbers
    if len(columns) > 1:
        for row, scores in measured.items():
            if all(printed[row].get(c) is not None for c in columns):
                printed[row][AVERAGE] = float(np.mean([printed[row][c] for c in columns]))
            for numbers in scores.values():                                        # seed by seed, where no column lacks it
                if all(c in numbers for c in columns):
                    numbers[AVERAGE] = {when: {seed: float(np.mean([numbers[c][when][seed] for c in columns])) for seed in by_seed
                                               if all(seed in numbers[c][when] for c in columns)} for when, by_seed in numbers[columns[0]].items()}
    if len(columns) > 1 or any(cell.column == AVERAGE for cell in cells):
        columns.append(AVERAGE)
    lines = [["", "mAP of"] + columns, ["---", "---"] + ["---:"] * len(columns)]
    for row, scores in measured.items():
        if any(number is not None for number in printed[row].values()):
            lines.append([f"**{row}**", paper] + ["" if (n := printed[row].get(c)) is None else f"{n:.1f}" for c in columns])
        for score, numbers in scores.items():
            lines.append([f"**{row}**", score] + [" / ".join(filter(None, map(spread, numbers.get(c, {}).values()))) for c in columns])
        if not scores:
            lines.append([f"**{row}**", "no run finished"] + [""] * len(columns))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines), measured


def spread(by_seed):
    """Mean and sample standard deviation over the seeds."""
    values = list(by_seed.values())
    return "" if not values else f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def plot(measured, data_name, file):
    """mAP over the share of known labels, mean and spread over the seeds; the paper's curves beside them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    printed = nearest(PAPER_1, data_name)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for row, scores in measured.items():
        numbers = scores.get("region") or scores.get("averaged") or {}
        points = [(float(column[:-2]), list(n["last"].values())) for column, n in numbers.items() if column != AVERAGE]
        if points:
            left.errorbar([x for x, _ in points], [np.mean(y) for _, y in points], [np.std(y) for _, y in points], marker=".", capsize=2, label=row)
    for row, numbers in PAPER_1[printed].items():
        right.plot([100 * r for r in NINE], numbers, marker=".", label=row)
    for axis, title in ((left, f"measured here, {data_name}, last epoch"), (right, f"the paper, {printed}")):
        axis.set(xlabel="known labels (%)", ylabel="mAP (%)", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------ Table 5 and Figure 4
def table_5(size=448, C=80):
    """Parameters (units of 2^20) and multiply-adds (10^9) of inference at RN101, from random weights: they need no training.

    Total: CLIP without its token embedding and without the attention pool's positional embedding, plus what is learned.
    """
    from torch.utils.flop_counter import FlopCounterMode
    model = clip.CLIP(512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512).eval().requires_grad_(False)
    frozen = sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel() - model.visual.attnpool.positional_embedding.numel()
    prompts = train.Prompts(model, ["cat"] * C)
    g_pos, g_neg = torch.nn.functional.normalize(torch.randn(2, C, model.D), dim=-1)
    count = lambda module: sum(p.numel() for p in module.parameters())
    lines = ["| | total (Mi) | paper | learned (Mi) | paper | multiply-adds (G) | after folding | paper |", "|---|" + "---:|" * 7]
    flops, image = {}, torch.zeros(1, 3, size, size)
    for folded in (False, True):
        for name, matching in (("DualCoOp", "dualcoop"), ("TRM-ML", "carl")):
            trm = train.TRM(C, model.D, prompts, matching).eval().requires_grad_(False)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                trm(model.encode_dense(image), None, g_pos, g_neg)
            flops[name, folded] = counter.get_total_flops() / 2 / 1e9
            if not folded:
                lines.append([name, frozen + count(trm), count(trm)])
        model.fold()
    for i, (name, total, learned) in enumerate(lines[2:], 2):
        of_paper = PAPER_5[name]
        lines[i] = (f"| **{name}** | {total / 2**20:.2f} | {of_paper[0]:.2f} | {learned / 2**20:.2f} | {of_paper[1]:.2f} | "
                    f"{flops[name, False]:.2f} | {flops[name, True]:.2f} | {of_paper[2]:.2f} |")
    return "\n".join(lines)


def figure_4(folders, images, runs, file, checkpoint="best", top=3):
    """DualCoOp's row above TRM-ML's for every image, as one picture; and how their maps sit on the boxes of the test split."""
    predictors = {name: evaluation.Predictor(run, checkpoint, runs.device, runs.encoder) for name, run in folders.items()}
    rows = []
    for path in images:
        for name, predictor in predictors.items():
            (_, p, maps), = predictor.over([path])
            tiles = predictor.tiles(path, p, maps, np.argsort(-p, kind="stable")[:top])
            rows.append([(tiles[0][0], f"{name}: {tiles[0][1]}"), *tiles[1:]])
    picture(rows).save(file)
    if not runs.test.split.boxes:
        return f"The test split has no boxes: only the picture was drawn, {file}."
    names = ("pointing", "small", "medium", "large", "mass", "present", "absent", "pairs")
    lines = ["| | mAP | pointing game (%) | small | medium | large | mass in boxes (%) | peak, present | peak, absent | pairs |", "|---|" + "---:|" * 9]
    for name, predictor in predictors.items():
        scores, maps = evaluation.run_scores(predictor, runs.test, maps=True)
        where = localisation(maps, predictor.grid, runs.test.split.boxes, runs.test.split.truth)
        lines.append(f"| **{name}** | {runs.mAP(scores):.2f} | " + " | ".join(str(where[k]) for k in names) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- command line
def parse(argv):
    parser = Parser(prog="reproduce.py", description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="\n".join(__doc__.split("\n")[2:]), allow_abbrev=False)
    parser.add_argument("--table", type=int, choices=(1, 2, 3, 4, 5, 6))
    parser.add_argument("--figure", type=int, choices=(4,))
    parser.add_argument("--study", choices=sorted(STUDIES), help="alternatives where the paper is silent")
    parser.add_argument("--seeds", type=int, default=3, help="runs a row, with seeds 0, 1, ... from --seed on (default: 3)")
    parser.add_argument("--ratios", type=float, nargs="+", help="shares of known labels (default: the paper's; fewer on scenes)")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only the rows whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; two cores do most with 2, a GPU with 1 (default: 1)")
    parser.add_argument("--image", nargs="+", metavar="PATH", help="--figure 4: photos or folders (default: test images)")
    parser.add_argument("--runs", nargs=2, metavar=("DUALCOOP", "TRM"), help="--figure 4: two runs (default: Table 1's at 10 %%)")
    parser.add_argument("--out", default="runs/tables", help="folder of tables and runs (default: runs/tables)")
    own, rest = parser.parse_known_args(argv)
    if (own.table is not None) + (own.figure is not None) + (own.study is not None) != 1:
        raise ConfigError("expects one of --table 1..6, --figure 4, --study NAME")
    if own.seeds < 1 or own.jobs < 1:
        raise ConfigError(f"--seeds and --jobs expect a number from 1, got {min(own.seeds, own.jobs)}")
    if "--resume" in rest:
        raise ConfigError("a table goes on by itself, drop --resume: give the command that was stopped")
    base, _ = train.parse(rest)
    if base.data == "scenes" and base.train_images is None:
        base.train_images = 1000
    if own.table == 2 and base.data != "scenes" and "--clip" not in rest:
        base.clip = "RN50"                                                         # "All models adopt ResNet50"
    return own, base


def reproduce(argv):
    own, base = parse(argv)
    what = f"table-{own.table}" if own.table else f"figure-{own.figure}" if own.figure else f"study-{own.study}"
    out, start = Path(own.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    file, seeds, measured = out / f"{what}-{Path(base.data).stem}", range(base.seed, base.seed + own.seeds), None
    if own.table == 5:
        text = table_5()
    else:
        runs = Runs(base, out, own.jobs)
        if own.figure:
            folders = dict(zip(("DualCoOp", "TRM-ML"), own.runs or ()))
            if not folders:
                rows = {name: runs.config(dict(ratio=(own.ratios or [0.1])[0]) | run, base.seed) for name, run in (("DualCoOp", DUALCOOP), ("TRM-ML", {}))}
                runs.train(list(rows.values()))
                folders = {name: configs[-1].out for name, configs in rows.items()}
            images = images_in(own.image) if own.image else runs.test.split.paths[:4]
            text = figure_4(folders, images, runs, file.with_suffix(".png"))
        else:
            rows, printed = (study, None) if own.study else TABLES[own.table]
            cells = rows(own.study or base, own.ratios)
            cells = [cell for cell in cells if not own.rows or any(part in cell.row for part in own.rows)]
            if not cells:
                raise ConfigError(f"no row of this table holds {' or '.join(own.rows)}")
            text, measured = table(cells, runs, seeds, printed and f"paper, {nearest(printed, base.data)}")
            if own.table == 1:
                plot(measured, base.data, file.with_suffix(".png"))
        about = (f"{base.data}, {len(splits_of(base)[0].paths)} training images, CLIP {base.clip} ({runs.encoder.sha256[:12]}), {base.size} px, "
                 f"{base.epochs} epochs, seeds {seeds.start} to {seeds.stop - 1}; mAP on test in %, mean ± standard deviation, of the last epoch "
                 f"/ of the best epoch on {'validation' if splits_of(base)[1] else 'the test split, as there is no other'}.")
        text = f"{about}\n\n{text}"
    text = f"`python reproduce.py {' '.join(argv)}`: {text}" if own.table != 5 else f"`python reproduce.py --table 5`\n\n{text}"
    file.with_suffix(".md").write_text(text + "\n")
    if measured is not None:
        file.with_suffix(".json").write_text(json.dumps(measured, indent=1))
    print(f"\n{text}\n\nwrote {file}.md, {time.perf_counter() - start:.0f} s")


def main(argv=None):
    return guarded(lambda: reproduce(sys.argv[1:] if argv is None else argv), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
