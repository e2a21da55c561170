"""Many runs of train.py: which are there already, training of the missing ones, their numbers.

A run is known by its settings and the content of weights and data, wherever they lie: tables that
share a run train it once, a finished one is only read, a stopped one goes on. --jobs N trains N at
a time, in processes that share the feature cache and split the cores.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import clip
import data
import train
from clip.weights import sha256
from config import MACHINE, PLACES, is_path
from eval import metrics
from paper import captions
from support import UserError
from support.checkpoint import read_config
from support.cli import best_device, end_with_parent
from tools.build import load_data
from tools.predictor import Predictor


class Runs:
    """The runs below `out`/runs. base: the Config of all rows; its score is what is reported, on
    the test split, or on validation where a study asks for it and there is one."""

    def __init__(self, base, out, jobs, study=False):
        self.base, self.out, self.jobs = base, Path(out), jobs
        self.splits = load_data(base)
        self.split = "val" if study and self.splits[1] else "test"
        if self.split == "test" and self.splits[2] is None:
            raise UserError(f"{base.data} has no test split to compare on: give a sheet's, --test")
        self.encoder = clip.load(base.clip, activation=base.activation).to(best_device())
        self.sha256 = functools.cache(sha256)  # of a file; a table asks again and again

    @functools.cache
    def content(self, single_positive):
        """{"train": sha256 of names and labels, none hidden, ...; "sizes": of the photos' sizes}"""
        whole = data.complete(dataclasses.replace(self.base, single_positive=single_positive))
        found = {name: split.info["sha256"] for name, split in whole.items()}
        sizes = [os.path.getsize(path) for split in whole.values() for path in split.used().paths]
        return found | {"sizes": hashlib.sha256(repr(sizes).encode()).hexdigest()}

    def config(self, settings, seed):
        """Settings of a row -> its Config with a folder of its own. `carl_from` may hold the
        settings of another run (Table 4), which is trained first."""
        if "carl_from" in settings:
            settings = settings | dict(carl_from=self.config(settings["carl_from"], seed).out)
        if settings.get("images") == "captions":  # five an image: a fifth gives as many steps
            settings = settings | dict(epochs=max(1, self.base.epochs // 5))
        cfg = dataclasses.replace(self.base, **settings, seed=seed)
        files = [cfg.names] if cfg.names else []  # what else is read counts by its content
        if cfg.images == "captions":
            files.append(captions.file_of(cfg))
        if cfg.single_positive == "splc":
            files += data.splc_files(cfg)
        ignored = MACHINE | PLACES - {"val"} | {"out", "score"}  # val may be a share
        result = {name: value for name, value in dataclasses.asdict(cfg).items()
                  if name not in ignored and not is_path(name, value)}
        identity = json.dumps([self.encoder.sha256, self.content(cfg.single_positive), result,
                               [self.sha256(file) for file in files],
                               os.path.basename(cfg.carl_from or "")], sort_keys=True)
        labels = "captions" if cfg.images == "captions" else cfg.single_positive or f"{cfg.ratio:g}"
        words = [Path(cfg.data).stem, labels, cfg.matching, cfg.without.replace(",", "-"),
                 f"seed{seed}", hashlib.sha256(identity.encode()).hexdigest()[:8]]
        cfg.out = str(self.out / "runs" / "-".join(filter(None, words)))
        return cfg

    def train(self, wanted):
        """Trains what is missing among (settings, seed), what others need first."""
        if first := [(settings["carl_from"], seed) for settings, seed in wanted
                     if "carl_from" in settings]:
            self.train(first)
        configs = {cfg.out: cfg for cfg in (self.config(*pair) for pair in wanted)}
        todo = [cfg for cfg in configs.values() if not finished(cfg)
                and (not cfg.carl_from or finished(cfg, cfg.carl_from))]  # it may have diverged
        trained = map(train_one, todo) if self.jobs == 1 else in_processes(todo, self.jobs)
        for count, cfg in enumerate(tqdm(trained, "runs", len(todo), disable=None), 1):
            lines = history(cfg.out)
            told = f"mAP {lines[-1][self.split]['mAP']:.2f}" if finished(cfg) else "diverged"
            tqdm.write(f"[{count}/{len(todo)}] {Path(cfg.out).name}: {told}")

    def predictor(self, run):
        """A run's last epoch, with the score that is reported, on this machine."""
        now = {name: getattr(self.base, name) for name in MACHINE | {"score"}}
        return Predictor(run, "last", encoder=self.encoder, places=now)

    @functools.cache
    def scores(self, run):
        """(n, C) probabilities of a run on the test split."""
        return self.predictor(run).probabilities(self.splits[2])

    def mAP(self, settings, seed):
        """Of a run's last epoch, or of the mean scores of several runs; None if one diverged."""
        configs = [self.config(one, seed) for one in settings]
        if not all(map(finished, configs)):
            return None
        if len(configs) > 1:
            mean = np.mean([self.scores(cfg.out) for cfg in configs], 0)
            return metrics(mean, self.splits[2].truth)["mAP"]
        numbers = history(configs[0].out)[-1][self.split]
        return numbers.get(f"mAP_{self.base.score}", numbers["mAP_region"])


def history(run):
    """Lines of a run's metrics, one an epoch; none before the first epoch."""
    file = Path(run, "metrics.jsonl")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def finished(cfg, run=None):
    return len(history(run or cfg.out)) == cfg.epochs


def in_processes(todo, jobs):
    """What train_one returns, as the runs end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, share_cores, (jobs,)) as pool:
        try:
            for future in as_completed([pool.submit(train_one, cfg) for cfg in todo]):
                yield future.result()
        except BaseException:  # Ctrl-C, or a row that cannot be: the others can go on later
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def share_cores(jobs):
    end_with_parent()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def train_one(cfg):
    """Trains a row, or goes on with it; what it prints goes to its folder. -> cfg"""
    run = Path(cfg.out)
    run.mkdir(parents=True, exist_ok=True)
    resume = (run / "config.json").exists()
    if resume:  # its score chose its best epoch and its thresholds; a table reads any score
        cfg = dataclasses.replace(cfg, score=read_config(run)["config"]["score"])
    with open(run / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            train.train(cfg, resume=run if resume else None)
        except FloatingPointError as error:
            print(error)  # the row stays unfinished
    return cfg
