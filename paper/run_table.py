"""Many runs of train.py at once: which are there already, training of the missing ones, their numbers. For reproduce.py.

A run is known by its settings, CLIP's weights and the data, so tables that share a run train it once, a finished one is only read, and
one that was stopped goes on. --jobs N trains N at a time, in processes that share the feature cache and split the cores.
"""
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import clip
import data
import eval as evaluation
import train
from support import UserError
from support.checkpoint import save_atomically
from support.cli import best_device
from tools.predictor import Predictor, evaluation_loader
from eval import metrics
from config import NOT_THE_RESULT, Config, load_config


def key(cfg, clip_sha256, data_sha256):
    """What a run is known by: its settings, CLIP's weights, and the data ({split: sha256 of its names, labels and truth})."""
    return json.dumps([clip_sha256, data_sha256, {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NOT_THE_RESULT}], sort_keys=True)


class Runs:
    """The run folders below `out`: which settings are there, which are missing, and training of those."""
    FOLDER = "runs"

    def __init__(self, base, out, jobs):
        self.base, self.out, self.jobs = base, out, jobs
        if splits_of(base)[2] is None:
            raise UserError(f"{base.data} has no test split: nothing can be compared")
        self.device = best_device()
        self.encoder = clip.load(base.clip, activation=base.activation).to(self.device)
        self.folders = {}
        for file in sorted(self.out.glob(f"{self.FOLDER}/*/config.json")):
            with contextlib.suppress(Exception):                                   # a folder of another version, or nothing of ours
                about = json.loads(file.read_text())
                hashes = {name: info["sha256"] for name, info in about["data"].items()}
                self.folders[key(load_config(file.parent), about["clip_sha256"], hashes)] = file.parent

    def config(self, settings, seed):
        """Settings of a row -> its Config with its folder in `out`, and the Configs that it needs first."""
        settings, before = dict(settings), []
        if isinstance(settings.get("carl_from"), dict):
            before = self.config(settings["carl_from"], seed)
            settings["carl_from"] = before[-1].out
        cfg = dataclasses.replace(self.base, **settings, seed=seed)
        identity = key(cfg, self.encoder.sha256, _hashes(of_the_data(cfg)))
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
        pool = ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), share_cores, (self.jobs,))
        try:
            futures = {pool.submit(train_one, cfg): cfg for cfg in todo}
            for future in as_completed(futures):
                finished(future.result(), futures[future])
        except BaseException:                                                      # Ctrl-C, or a row that cannot be: the others can go on later
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    # ------------------------------------------------------------------------------------------------------------ reading them
    @functools.cached_property
    def test(self):
        """The features of the test split, which all rows of a table share."""
        return evaluation_loader(self.base, splits_of(self.base)[2], self.encoder, self.device)

    @functools.cached_property
    def zero_shot(self):
        return evaluation.zero_shot(self.encoder, evaluation.zero_shot_text(self.encoder, self.test.split.prompts), self.test)

    def mAP(self, scores):
        return metrics(scores, self.test.split.truth)["mAP"]

    def scores(self, run, checkpoint):
        """(n, C) test scores of a run, kept beside its checkpoint."""
        kept, file = Path(run) / f"test-{checkpoint}.npy", Path(run) / f"{checkpoint}.pt"
        with contextlib.suppress(OSError, ValueError, EOFError):                   # absent, or cut by a kill: measured anew
            if kept.stat().st_mtime >= file.stat().st_mtime:
                scores = np.load(kept)
                if scores.dtype.kind == "f" and scores.shape == self.test.split.truth.shape and np.isfinite(scores).all():
                    return scores
        scores = Predictor(run, checkpoint, self.device, self.encoder).score_split(self.test)
        save_atomically(lambda buffer: np.save(buffer, scores), kept)
        return scores

    def measure(self, of, seeds, split="test"):
        """{score: {"last": {seed: mAP}, "best": {seed: mAP}}} on a split; empty for runs that diverged.

        of   the settings of one run, or of several whose scores are averaged; or the name of a zero-shot score; or None
        """
        if isinstance(of, str):
            return {"similarity": {"last": {0: self.mAP(self.zero_shot[of])}}}
        found = {}
        for seed in seeds if of else ():
            runs = [self.config(settings, seed)[-1] for settings in of]
            if any(len(history(cfg.out)) < cfg.epochs for cfg in runs):
                continue
            for checkpoint in ("last", "best"):
                if len(runs) > 1:
                    numbers = {"averaged": self.mAP(np.mean([self.scores(cfg.out, checkpoint) for cfg in runs], 0))}
                else:
                    line = chosen(runs[0].out, checkpoint)[split]
                    numbers = {score: line[f"mAP_{score}"] for score in ("region", "query", "mean") if f"mAP_{score}" in line}
                for score, number in numbers.items():
                    found.setdefault(score, {}).setdefault(checkpoint, {})[seed] = number
        return found


def history(run):
    """Lines of a run's metrics, one an epoch; none before the first epoch."""
    file = Path(run) / "metrics.jsonl"
    try:
        return [dict(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: delete it, python train.py --resume {run} writes it anew from last.pt") from None


def chosen(run, checkpoint):
    """The line of the last epoch, or of the best one on validation (on test where a data set has no validation split)."""
    lines = [line for line in history(run) if "test" in line]
    judge = "val" if lines and "val" in lines[-1] else "test"
    try:
        best = max(lines, key=lambda line: line[judge]["mAP"] + 0 * line["test"]["mAP"])
        return best if checkpoint == "best" else lines[-1]
    except (ValueError, IndexError, KeyError, TypeError):
        raise UserError(f"{run}/metrics.jsonl holds no epoch with a test score: python train.py --resume {run} writes it anew "
                          "from last.pt") from None


# What follows runs in a process of its own when --jobs asks for several.
OF_THE_DATA = ("data", "root", "ratio", "single_positive", "seed", "train_images", "mask", "val", "test", "ignore", "minus_one",
               "unlisted", "names", "lists", "prompt_names", "keep_unannotated", "images", "captions")


@functools.lru_cache(maxsize=4)
def _splits(settings):
    return train.load_data(Config(**dict(settings)))


@functools.lru_cache(maxsize=None)
def _hashes(settings):
    return {split.name: split.info["sha256"] for split in _splits(settings) if split}


def of_the_data(cfg):
    return tuple((name, getattr(cfg, name)) for name in OF_THE_DATA)


def splits_of(cfg):
    return _splits(of_the_data(cfg))


encoder_of = functools.lru_cache(maxsize=1)(clip.load)


def share_cores(jobs):
    signal.signal(signal.SIGINT, signal.SIG_DFL)                                   # Ctrl-C ends a worker at once; its checkpoint is whole
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    tqdm.set_lock(threading.RLock())                                               # its default, shared by processes, would outlive this one
    parent = os.getppid()

    def watch():                                                                   # the process that shares out the rows may be killed
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def train_one(cfg):
    """Trains a row, or goes on with it; returns the seconds. What it prints goes to its folder. A diverged run stays unfinished."""
    start, folder = time.perf_counter(), Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    resume = folder if (folder / "config.json").exists() else None
    with open(folder / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            train.train(cfg, resume, splits_of(cfg), encoder_of(cfg.clip, activation=cfg.activation))
        except FloatingPointError as error:
            print(error)
    return time.perf_counter() - start
