"""Train TRM-ML, a baseline or an ablation; every random number follows from --seed (paper, Sec. 3.6 and 4.1, Eq. 15).

    python train.py --data scenes --ratio 0.1                       the embedded default, minutes on two CPU cores
    python train.py --data coco --root /data/coco --ratio 0.3       the paper's setting: RN101, 448, batch 128, 40 epochs
    python train.py --resume runs/NAME                              goes on where it was stopped, bit for bit
    torchrun --nproc-per-node 4 train.py --data coco ...            several GPUs

A run folder holds config.json, metrics.jsonl (a line an epoch), last.pt, best.pt, curves.png, regions.png.
"""
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from paper import captions
import clip
import data
import eval as evaluation
import kernels
import losses
from config import NOT_THE_RESULT, parse
from clip.features import Features, for_evaluation, precision
from support import UserError
from support.checkpoint import lock, read_checkpoint, save_atomically, save_checkpoint, write_atomically
from support.cli import best_device, peak_memory, run_main
from memory import MemoryBank
from metrics import best_thresholds, metrics
from tools.plots import curves, picture
from support.distributed import average_gradients, gather, in_order
from step import PseudoCount, step_terms
from trm import TRM, Output, Prompts


def run_folder(cfg):
    setting = "captions" if cfg.images == "captions" else cfg.single_positive or f"{cfg.ratio:g}"
    left_out = f"-no-{cfg.without.replace(',', '-')}" if cfg.without else ""
    name = f"{Path(cfg.data).stem}-{setting}-{cfg.matching}{left_out}-seed{cfg.seed}"
    run = Path(cfg.out or f"runs/{name}")
    for i in range(2, 1000):
        if not taken(run):
            above = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
            if not above.is_dir() or not os.access(above, os.W_OK):                # told now, not after an hour of decoding
                raise UserError(f"{above} cannot be written into: choose another --out")
            return run
        if cfg.out:
            refuse(run)
        run = Path(f"runs/{name}-{i}")


def taken(run):
    return any((run / name).exists() for name in ("config.json", "last.pt", "best.pt", "metrics.jsonl", "curves.png", "regions.png"))


def refuse(run):
    raise UserError(f"{run} holds a run already: continue it with --resume {run}, or choose another --out")


def load_data(cfg):
    splits = data.load_for(cfg)
    if cfg.images == "photos":
        return splits
    if not cfg.captions and cfg.data not in ("scenes", "coco"):
        raise UserError(f"--images captions: {cfg.data} brings none, give the file with --captions")
    file = cfg.captions or Path(cfg.root or data.SCENES) / "annotations" / "captions_train2014.json"
    return captions.load(file, splits[0].names, splits[0].prompts, cfg.train_images), *splits[1:]


class Run:
    """Everything a run holds while it trains. `Run(cfg).train()`."""

    def __init__(self, cfg, resume=None, splits=None, encoder=None):
        self.cfg, self.rank, self.world = cfg, 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = best_device(int(os.environ.get("LOCAL_RANK", 0)) if self.world > 1 else 0, self.world)
        if self.world > 1 and cfg.batch % self.world:
            raise UserError(f"--batch {cfg.batch} does not divide among {self.world} processes")
        try:
            kernels.use(cfg.kernels)
        except ValueError as error:
            raise UserError(error) from None
        self.folder = resume or run_folder(cfg)
        if self.world > 1:
            dist.barrier()                                                         # before rank 0 writes what makes a folder taken
        self.train_split, self.val_split, self.test_split = splits or load_data(cfg)
        self.clip = (encoder or clip.load(cfg.clip, activation=cfg.activation)).to(self.device)
        self.amp = amp = precision(cfg.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)
        torch.manual_seed(cfg.seed)
        self.model = self._model().to(self.device)                                 # before the images: it may refuse a name or --carl-from
        self.memory = MemoryBank(len(self.train_split.names), cfg.queue, self.clip.D, cfg.eta).to(self.device)
        share = dict(rank=self.rank, world=self.world, whole=cfg.matching == "global")
        self.clock, start = {"training": 0.0, "evaluation": 0.0}, time.perf_counter()
        if cfg.images == "captions":
            self.feed = captions.Captions(self.train_split, self.clip, cfg.batch, cfg.seed, self.device, self.rank, self.world)
        else:
            self.feed = Features(self.train_split, self.clip, cfg.size, cfg.augment, cfg.seed, cfg.batch, cfg.workers, cfg.cache_features,
                                 cfg.cache_dir, self.device, amp, **share)
        self.feeds = {name: for_evaluation(cfg, split, self.clip, self.device, **share)
                      for name, split in (("val", self.val_split), ("test", self.test_split)) if split is not None}
        self.clock["features"] = time.perf_counter() - start                       # seconds to fill the cache, 0 without one
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        self.steps = -(-len(self.feed) // cfg.batch)                               # of an epoch
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=cfg.lr, total_steps=cfg.epochs * self.steps)
        self.labels = torch.from_numpy(self.train_split.labels).to(self.device)
        self.truth = torch.from_numpy(self.train_split.truth).to(self.device)
        self.epoch, self.best, self.history = 0, None, []
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder / ".lock")
            if not resume and taken(self.folder):                                  # by a run that began and ended while this one decoded
                refuse(self.folder)
        # Through JSON, so that what a later run reads back compares equal.
        about = json.loads(json.dumps({"config": dataclasses.asdict(cfg), "clip_sha256": self.clip.sha256, "data": {
            s.name: s.info for s in (self.train_split, self.val_split, self.test_split) if s}}))
        if resume:
            self._load(about)
        elif self.rank == 0:
            write_atomically(self.folder / "config.json", json.dumps(about, indent=1))

    def _model(self):
        cfg, split = self.cfg, self.train_split
        queries = None
        if cfg.queries == "text":
            queries = self.clip.encode_text(self.clip.tokenize([f"a photo of a {p}" for p in split.prompts]))
        try:
            prompts = Prompts(self.clip, split.prompts, cfg.context)
        except ValueError as error:                                                # a name too long for CLIP
            raise UserError(error) from None
        model = TRM(len(split.names), self.clip.D, prompts, cfg.matching, queries,
                    contrastive=cfg.uses("mmcl"), dropout=cfg.dropout)
        if cfg.carl_from and not (self.folder / "last.pt").is_file():              # else it is in there
            state = read_checkpoint(Path(cfg.carl_from) / "last.pt")
            if state["names"] != split.names or state["clip_sha256"] != self.clip.sha256:
                raise UserError(f"--carl-from {cfg.carl_from} was trained on other categories than {cfg.data}, or on another CLIP")
            carl = {k[5:]: v for k, v in state["model"].items() if k.startswith("carl.")}
            if not carl:
                raise UserError(f"--carl-from {cfg.carl_from} is a run without regions: give one with --matching carl")
            try:
                model.carl.load_state_dict(carl)
            except RuntimeError:
                raise UserError(f"--carl-from {cfg.carl_from} holds a region module of another size: restore it, or train it anew") from None
        if cfg.carl_from:
            model.carl.requires_grad_(False)
        return model

    def text_features(self):
        return self.model.prompts(self.clip)

    def step(self, index, f, x, stage_two, B=None):
        """One update. index, f (., N, D), x (., D): this rank's share of B images. Returns the terms as detached scalars."""
        labels, B = self.labels[index], B or len(index) * self.world
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            g_pos, g_neg = self.text_features()
            out = self.model(f, x, g_pos, g_neg)
        if self.cfg.uses("mmcp") or self.cfg.uses("mmcl"):                         # Eq. 7 alone needs the energies and f, without a gradient
            out, f = out._replace(energy=out.energy.detach()), gather(f, B)
        else:
            out = out._replace(energy=None)
        out = Output(*(part if part is None else gather(part.float(), B) for part in out))
        labels, truth = gather(labels, B), gather(self.truth[index], B)
        terms, pseudo = step_terms(self.model, self.memory, self.cfg, out, f, g_pos, labels, stage_two)
        loss = losses.total(terms, self.cfg.alpha, self.cfg.beta, self.cfg.gamma)                             # Eq. 15
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        average_gradients(self.learned)                                            # first: one rank's overflow is then seen by all
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.learned, self.cfg.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        if pseudo is not None:
            self.pseudo.add(pseudo, labels, truth)
        return {name: term.detach() for name, term in (terms | {"L": loss}).items()}

    def train_epoch(self):
        cfg, sums, start = self.cfg, {}, time.perf_counter()
        stage_two = self.epoch >= round(cfg.stage_one * cfg.epochs)
        if stage_two and self.memory.T.isnan().any():
            with torch.no_grad():
                self.memory.set_text_prototypes(self.text_features()[0])           # "the text representation trained in the first stage"
        self.model.train()
        torch.manual_seed((cfg.seed * 1_000_003 + self.epoch) * 1009 + self.rank)   # of dropout: an epoch needs no state of the one before
        self.pseudo = PseudoCount(self.device)
        check = 1 if self.device.type == "cpu" else 50                             # a GPU is asked rarely: asking waits for it
        bar = tqdm(self.feed.batches(self.epoch), total=self.steps, desc=f"epoch {self.epoch + 1}/{cfg.epochs}", leave=False,
                   disable=self.rank > 0 or not sys.stderr.isatty())
        for i, (index, f, x) in enumerate(bar):
            terms = self.step(index, f, x, stage_two, min(cfg.batch, len(self.feed) - i * cfg.batch))
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term
            if i % check == 0 or i == self.steps - 1:
                if not torch.isfinite(sums["L"]):
                    raise self._diverged(f"the loss is not finite after step {i + 1} of {self.steps}", terms)
                bar.set_postfix(loss=f"{float(sums['L']) / (i + 1):.3f}")
        if not all(parameter.isfinite().all() for parameter in self.learned):      # finite losses, yet a gradient was not
            raise self._diverged("a weight is not finite after the last step", terms)
        seconds = time.perf_counter() - start
        speed = dict(images_per_second=round(len(self.feed) / seconds, 1), seconds=round(seconds, 2), waiting=round(self.feed.waited / seconds, 3))
        terms = {k: round(float(v) / self.steps, 6) for k, v in sums.items()}
        return dict(epoch=self.epoch + 1, stage=2 if stage_two else 1) | terms | self.pseudo.report() | speed

    def _diverged(self, what, terms):
        kept = f"{self.folder / 'last.pt'} holds epoch {self.epoch}" if self.epoch else "no epoch was finished"
        return FloatingPointError(f"epoch {self.epoch + 1}: {what} ({', '.join(f'{k} {float(v):g}' for k, v in terms.items())}); {kept}; "
                                  "train anew with a lower --lr or --amp none, and look at the images if that does not help")

    @torch.no_grad()
    def evaluate(self):
        """{"val": metrics, "test": metrics} of the configured score, and mAP of every score; the raw scores of each split."""
        g, numbers, raw = self.text_features(), {}, {}
        for name, feed in self.feeds.items():
            scores = in_order(evaluation.sweep(self.model, *g, feed)[0], len(feed), self.cfg.batch)
            truth = feed.split.truth
            chosen = scores.get(self.cfg.score, scores["region"])
            numbers[name] = metrics(chosen, truth) | {f"mAP_{score}": metrics(p, truth)["mAP"] for score, p in scores.items()}
            raw[name] = chosen
        return numbers, raw

    def train(self):
        cfg = self.cfg
        if self.rank == 0:
            print(f"{self.folder}: {data.describe(self.train_split)}; {len(self.train_split.names)} categories, "
                  f"{sum(p.numel() for p in self.learned) / 2**20:.2f} Mi learned; {kernels.chosen()}")
        while self.epoch < cfg.epochs:
            line = self.train_epoch()
            last = self.epoch + 1 == cfg.epochs
            self.clock["training"] += line["seconds"]
            if (self.epoch + 1) % cfg.eval_every == 0 or last:
                start = time.perf_counter()
                numbers, raw = self.evaluate()
                self.clock["evaluation"] += time.perf_counter() - start
                line |= numbers
                judge = "val" if "val" in numbers else "test"
                judged = judge in numbers and numbers[judge]["left_out"] < len(self.train_split.names)   # else no category has a positive
                improved = judged and (self.best is None or numbers[judge]["mAP"] > self.best["mAP"])
                if improved:
                    self.best = {"epoch": self.epoch + 1, "chosen_on": judge, "mAP": numbers[judge]["mAP"]}
            else:
                improved, raw = False, {}
            self.epoch += 1
            self.history.append(line)
            if self.rank == 0:
                self._save(improved, raw.get("val"))
                self._say(line)
        if self.rank == 0:
            self._finish()
        return self.history

    def _say(self, line):
        terms = "  ".join(f"{k} {v:.3f}" for k, v in line.items() if k.startswith("L"))
        scores = "  ".join(f"{split} mAP {line[split]['mAP']:.2f}" for split in ("val", "test") if split in line)
        print(f"epoch {line['epoch']:>3}/{self.cfg.epochs} stage {line['stage']}  {terms}  {scores}  {line['images_per_second']:.0f} images/s",
              flush=True)

    @torch.no_grad()
    def _save(self, improved, val_scores):
        g_pos, g_neg = self.text_features()
        C = len(self.train_split.names)
        threshold = np.full(C, 0.5) if val_scores is None else best_thresholds(val_scores, self.val_split.truth)
        inference = dict(
            config=json.dumps(dataclasses.asdict(self.cfg)),
            names=list(self.train_split.names),
            clip_sha256=self.clip.sha256,
            model=self.model.state_dict(),
            g_pos=g_pos.cpu(), g_neg=g_neg.cpu(),                                  # so that inference needs no text encoder
            threshold=threshold.tolist(),
            epoch=self.epoch)
        if improved:
            save_checkpoint(inference, self.folder / "best.pt")
        parts = {name: getattr(self, name).state_dict() for name in ("memory", "optimizer", "scheduler", "scaler")}
        state = inference | parts | dict(best=self.best, history=json.dumps(self.history))
        save_checkpoint(state, self.folder / "last.pt")
        self._write_history()

    def _write_history(self):
        write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))

    def _load(self, about):
        file, begun = self.folder / "last.pt", json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        for what, now in about.items():
            if begun.get(what, now) != now and what != "config":
                raise UserError(f"{self.folder} was begun on other {'data' if what == 'data' else 'CLIP weights'} than are there now "
                                  f"(config.json tells which): put them back, or train anew")
        if not file.is_file():
            return                                                                 # stopped before its first epoch ended: start anew
        state = read_checkpoint(file, self.device)
        lacking = {"memory", "optimizer", "scheduler", "scaler", "best", "history"} - set(state)
        if lacking:
            raise UserError(f"{file} lacks {', '.join(sorted(lacking))}: it is no last.pt; put that back, or train anew")
        trained = json.loads(state["config"])
        changed = [k for k, v in about["config"].items() if trained.get(k, v) != v and k not in NOT_THE_RESULT | {"root", "eval_every"}]
        if changed:
            raise UserError(f"{self.folder / 'config.json'} has another {', '.join(changed)} than {file}, which was trained with "
                              f"{', '.join(str(trained[k]) for k in changed)}: restore it, or train anew into another --out")
        try:
            self.model.load_state_dict(state["model"])
            for name in ("memory", "optimizer", "scheduler", "scaler"):
                if state[name].keys() != getattr(self, name).state_dict().keys():
                    raise ValueError
                getattr(self, name).load_state_dict(state[name])
            self.epoch, self.best, self.history = state["epoch"], state["best"], json.loads(state["history"])
            best = self.best or dict(epoch=0, mAP=0.0)
            if [line["epoch"] for line in self.history] != [*range(1, self.epoch + 1)] or not 0 <= best["epoch"] <= self.epoch \
                    or not 0 <= best["mAP"] <= 100 or self.scheduler.last_epoch != self.epoch * self.steps \
                    or self.scheduler.total_steps != self.cfg.epochs * self.steps or not float(self.optimizer.param_groups[0]["lr"]) > 0 \
                    or any(kept[k].shape != p.shape for p, kept in self.optimizer.state.items() for k in ("exp_avg", "exp_avg_sq")) \
                    or state["names"] != self.train_split.names or state["clip_sha256"] != self.clip.sha256:
                raise ValueError
        except Exception:                                                          # whatever an edited file makes them raise
            raise UserError(f"{file} does not hold what its settings tell: restore it, or train anew into another --out") from None
        if self.rank == 0:
            self._write_history()                                                  # a kill may have come between the two files

    def _finish(self):
        cfg, last = self.cfg, self.history[-1]
        for split in ("val", "test"):
            if split in last:
                row = last[split]
                print(f"last epoch, {split}: " + "  ".join(f"{k} {v:.2f}" for k, v in row.items() if k != "left_out")
                      + (f"  ({row['left_out']} categories without a positive left out)" if row["left_out"] else ""))
        if self.best:
            chosen = next(line for line in self.history if line["epoch"] == self.best["epoch"])
            print(f"best epoch {self.best['epoch']}, chosen on {self.best['chosen_on']}: "
                  + "  ".join(f"{split} mAP {chosen[split]['mAP']:.2f}" for split in ("val", "test") if split in chosen))
        else:
            print("no best epoch: there is no known positive to choose it on; eval.py takes the last one")
        try:
            curves(self.history, self.folder / "curves.png")
        except ImportError:
            print("curves.png needs matplotlib: pip install matplotlib")
        shown = self.test_split or self.val_split or (self.train_split if cfg.images == "photos" else None)      # a sheet has no test split
        if shown:
            predictor = evaluation.Predictor(self.folder, "last", self.device, self.clip)
            regions = picture(evaluation.region_rows(predictor, shown.paths[:6]))
            save_atomically(lambda buffer: regions.save(buffer, "PNG"), self.folder / "regions.png")
        print("seconds: " + "  ".join(f"{name} {value:.0f}" for name, value in self.clock.items()) + f"; peak memory {peak_memory()}")
        written = ("metrics.jsonl", "last.pt", "best.pt", "curves.png", "regions.png")
        print(f"wrote {self.folder}/: {' '.join(name for name in written if (self.folder / name).exists())}")


def main(argv=None):
    def work():
        cfg, resume = parse(argv, __doc__)
        world, *others = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"))
        if world not in ("", "1"):
            if not all(number.isdecimal() for number in (world, *others)) or "MASTER_ADDR" not in os.environ:
                raise UserError(f"WORLD_SIZE is {world!r} without torchrun's other variables as numbers: start with torchrun, or unset it")
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            Run(cfg, resume).train()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return run_main(work, "stopped; what was finished is in last.pt of the run folder: go on with --resume")


if __name__ == "__main__":
    sys.exit(main())
