"""Evaluate a run, predict on your own photos, suggest missing labels (paper, Sec. 4.1 metrics, Fig. 4).

    python eval.py runs/demo                                  the table of its test split
    python eval.py runs/demo --image photo.jpg folder/        ranked categories and pictures of their regions
    python eval.py runs/demo --suggest suggested.csv          which unknown training labels it now believes
    python eval.py runs/demo --compare runs/other             zero-shot CLIP and runs side by side, regions against boxes
    python eval.py runs/demo --ensemble runs/other            averaged scores of several runs

From Python, three lines; only the run folder and CLIP's image encoder are needed, no text encoder and no training data:
    from eval import Predictor
    model = Predictor("runs/demo")
    print(model.predict(["photo.jpg"]))

A probability is the sigmoid of Eq. 5's logit. The asymmetric loss (Eq. 14) and the few known labels leave it uncalibrated:
it ranks, it is no frequency. What is called present passes the category's threshold, the one of best F1 on validation.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets import augment
import clip
import data
from config import restored
from clip.features import FeatureLoader, autocast_dtype
from support import UserError
from support.checkpoint import read_checkpoint
from support.cli import best_device, make_parser, run_main, words
from support.distributed import gather_scores
from metrics import localisation, metrics
from tools.predict import images_in, predict, suggest
from tools.plots import fit, heat
from trm import TRM


# ------------------------------------------------------------------------------------------------------------------- runs
class Photos(data.Images):
    """Images in which an unreadable file becomes zeros under a negative index: it must not cost the other photos."""

    def __getitem__(self, key):
        try:
            return super().__getitem__(key)
        except UserError:
            return torch.zeros(3, self.size, self.size), -1 - key[1]


class Predictor:
    """A trained run, ready to score images: Predictor("runs/demo"). checkpoint "best" (chosen on validation) or "last"; None:
    best, or last where there was no validation to choose on."""

    def __init__(self, run, checkpoint=None, device=None, encoder=None):
        file = Path(run) / f"{checkpoint or ('best' if (Path(run) / 'best.pt').exists() else 'last')}.pt"
        state = read_checkpoint(file)
        self.run, self.cfg = Path(run), restored(json.loads(state["config"]), file)
        self.names, self.epoch = state["names"], state["epoch"]
        self.device = torch.device(device) if device else best_device()
        same = encoder is not None and encoder.sha256 == state["clip_sha256"]
        self.clip = (encoder if same else clip.load(self.cfg.clip, activation=self.cfg.activation)).to(self.device)
        if self.clip.sha256 != state["clip_sha256"]:
            raise UserError(f"{run} was trained on CLIP {state['clip_sha256'][:12]}..., {self.cfg.clip} is now "
                                 f"{self.clip.sha256[:12]}...: put the same weights back, or train again")
        self.grid = self.clip.grid(self.cfg.size, self.cfg.size)                 # (h, w)
        try:
            self.g_pos, self.g_neg = (state[name].view(len(self.names), self.clip.D).to(self.device) for name in ("g_pos", "g_neg"))
            self.threshold = np.asarray(state["threshold"], float).reshape(len(self.names))      # (C,) chosen on validation, else 0.5
            self.model = TRM(*self.g_pos.shape, matching=self.cfg.matching, contrastive=False).to(self.device).eval()
            self.model.load_state_dict({k: v for k, v in state["model"].items() if not k.startswith(("prompts.", "heads."))})
        except (RuntimeError, TypeError, ValueError, AttributeError):
            raise UserError(f"{file} holds another model than its settings tell: restore it, or train again") from None

    @torch.no_grad()
    def score(self, f, x):
        """f (B, N, D), x (B, D) -> probabilities of the configured head (B, C), and trm.Output."""
        out = self.model(f, x, self.g_pos, self.g_neg)
        return torch.sigmoid(pick(out, self.cfg.score)), out

    def scores_of(self, features):
        """(n, C) probabilities of the configured head on a split."""
        scores, _ = sweep(self.model, self.g_pos, self.g_neg, features)
        return scores.get(self.cfg.score, scores["region"])

    def predict(self, paths, batch=32, workers=0):
        """paths: image files -> list of {"image", "scores": {category: probability}, "present": [category]}, most
        probable first. UserError for a file that is no image."""
        if isinstance(paths, (str, Path)):
            raise UserError(f"expected a list of image files, got {str(paths)!r}: put it in brackets")
        unreadable = []
        rows = [self.row(paths[i], p) for i, p, _ in self.over(paths, batch, workers, unreadable)]
        if unreadable:
            raise UserError(f"{unreadable[0]}: not a readable image; take it off the list")
        return rows

    def row(self, path, p):
        """One image's probabilities (C,) as predict returns them."""
        ranked = np.argsort(-p, kind="stable")
        return {"image": str(path), "scores": {self.names[c]: float(p[c]) for c in ranked},
                "present": [self.names[c] for c in ranked if p[c] >= self.threshold[c]]}

    def over(self, paths, batch=32, workers=0, unreadable=None, progress=False):
        """Yields (index, probabilities (C,), region maps (C, N)) of each image file, numpy; one pass of the network.

        Files that cannot be decoded are appended to the list `unreadable`; without one they raise UserError.
        """
        nothing = np.zeros((len(paths), len(self.names)), np.int8)
        split = data.Split("images", [str(p) for p in paths], self.names, nothing)
        images = (data.Images if unreadable is None else Photos)(split, self.cfg.size)
        features = FeatureLoader(images, self.clip, batch, workers, device=self.device,
                                 amp=autocast_dtype(self.cfg.amp, self.device))
        with tqdm(total=len(paths), disable=not (progress and sys.stderr.isatty()), leave=False, unit="image") as bar:
            for index, f, x in features.batches(0, shuffle=False):
                p, out = self.score(f, x)
                p, maps = p.float().cpu().numpy(), mask_of(out, self.cfg.matching).float().cpu().numpy()
                for i, *of_image in zip(index.tolist(), p, maps):
                    if i < 0:
                        unreadable.append(paths[-1 - i])
                    else:
                        yield i, *of_image
                bar.update(len(index))

    def tiles(self, path, p, maps, categories, side=192):
        """A row of pictures.picture: the photo, then the regions of `categories` with probability and peak of the mask."""
        image = fit(augment.read(path), side)
        return [(image, Path(path).name[-32:])] + [
            (heat(image, maps[c], self.grid), f"{self.names[c]} {p[c]:.2f}  peak {maps[c].max():.2f}") for c in categories]

    def splits(self):
        """{"train", "val", "test"}: the splits that the run was trained on, None where its data has none."""
        parts = data.load(self.cfg)
        if parts[0].names != self.names:
            changed = sorted(set(parts[0].names) ^ set(self.names))
            raise UserError(f"{self.cfg.root or self.cfg.data} has other categories than {self.run} was trained on "
                              f"({', '.join(changed[:5]) or 'in another order'}): put the data back, or train anew")
        return dict(zip(("train", "val", "test"), parts))

    def split(self, name):
        split = self.splits()[name]
        if split is None:
            raise UserError(f"{self.cfg.data} has no {name} split: choose another --split")
        return split

    def features(self, split):
        return evaluation_loader(self.cfg, split, self.clip, self.device)


def pick(out, score):
    """The paper infers with the region score; "query" and "mean" are measured beside it."""
    if score == "region" or out.logits_q is None:
        return out.logits_r
    return out.logits_q if score == "query" else (out.logits_r + out.logits_q) / 2


def mask_of(out, matching):
    """The map (B, C, N) that a method shows as its region: the sigmoid mask of Eq. 2, or DualCoOp's positive similarity."""
    return out.energy.sigmoid() if matching == "carl" else out.energy


def region_rows(predictor, paths, top=3):
    """Fig. 4: a row per image for pictures.picture: the photo, then the regions of its `top` categories."""
    return [predictor.tiles(paths[i], p, maps, np.argsort(-p, kind="stable")[:top]) for i, p, maps in predictor.over(paths)]


@torch.no_grad()
def sweep(model, g_pos, g_neg, features, maps=False):
    """One pass over a split -> scores {"region", "query", "mean": (n, C) probabilities, a baseline: "region" alone} and, when
    asked for, maps {name: (n, C, N)}, every map that the method could show as its regions (float16 on the way). numpy float32."""
    model.eval()
    scores, kept = {}, {}
    for _, f, x in features.batches(0, shuffle=False):
        out = model(f, x, g_pos, g_neg)
        for name in ("region", "query", "mean") if out.logits_q is not None else ("region",):
            scores.setdefault(name, []).append(pick(out, name).sigmoid())
        for name, part in maps_of(out, model).items() if maps else ():
            kept.setdefault(name, []).append(part.half().cpu())
    return ({name: torch.cat(parts).float().cpu().numpy() for name, parts in scores.items()},
            {name: torch.cat(parts).float().numpy() for name, parts in kept.items()})


def evaluation_loader(cfg, split, encoder, device, rank=0, world=1):
    """Features of a split that is scored: no augmentation; one cached view where the run caches at all."""
    images = data.Images(split, cfg.size)
    return FeatureLoader(images, encoder, cfg.batch, cfg.workers, min(1, cfg.cache_features), cfg.cache_dir,
                         device, autocast_dtype(cfg.amp, device), rank, world)


@torch.no_grad()
def evaluate(model, g_pos, g_neg, loaders, score):
    """{split: metrics of the score "region", "query" or "mean", and mAP of all three}, {split: scores (n, C)}."""
    numbers, chosen = {}, {}
    for name, loader in loaders.items():
        scores, _ = sweep(model, g_pos, g_neg, loader)
        scores = gather_scores(scores, len(loader), loader.batch)
        truth = loader.split.truth
        chosen[name] = scores.get(score, scores["region"])
        numbers[name] = metrics(chosen[name], truth)
        numbers[name] |= {f"mAP_{kind}": metrics(p, truth)["mAP"] for kind, p in scores.items()}
    return numbers, chosen


class PseudoCount:
    """Pseudo-labels of an epoch against the truth that training may not see, in percent.

    pseudo_pos, pseudo_neg   how many were given;  ..._precision: how many of them are right
    ..._coverage             the share of the hidden positives (negatives) that got the right one
    pseudo_coverage          the share of all unknown cells that got any
    """

    def __init__(self, device):
        self.count = torch.zeros(6, dtype=torch.int64, device=device)  # hidden, given, right; of 1, then of -1

    def add(self, pseudo, labels, truth):
        """pseudo, labels, truth (B, C) int8 of a batch."""
        unknown = (labels == 0) & (truth != 0)
        self.count += torch.stack([
            (unknown & cell).sum() for sign in (1, -1)
            for cell in (truth == sign, pseudo == sign, (pseudo == sign) & (truth == sign))])

    def report(self):
        def share(a, b):
            return round(100 * a / b, 2) if b else None

        line, counts = {}, self.count.view(2, 3).tolist()
        if not counts[0][0] + counts[1][0]:
            return {}  # nothing was hidden, or there was no estimate
        for name, (hidden, given, right) in zip(("pos", "neg"), counts):
            line |= {f"pseudo_{name}": given, f"pseudo_{name}_precision": share(right, given),
                     f"pseudo_{name}_coverage": share(right, hidden)}
        (hidden_pos, given_pos, _), (hidden_neg, given_neg, _) = counts
        return line | dict(pseudo_coverage=share(given_pos + given_neg, hidden_pos + hidden_neg))


# Of the zero-shot rows of all tables. clip/pretrain.py scores its model with the templates that its captions were made of.
TEMPLATES = ("a photo of a {}", "a picture of a {}", "a drawing of a {}", "there is a {} in the scene")


@torch.no_grad()
def zero_shot(encoder, prompts, features):
    """CLIP without any training: {"global": (n, C), "dense": (n, C)} cosines to the mean text feature; dense = best location."""
    unit = torch.nn.functional.normalize
    g = sum(unit(encoder.encode_text(encoder.tokenize([t.format(p) for p in prompts])), dim=-1) for t in TEMPLATES)
    g = unit(g, dim=-1)                                                            # (C, D)
    rows = [(unit(x, dim=-1) @ g.T, (unit(f, dim=-1) @ g.T).amax(1)) for _, f, x in features.batches(0, shuffle=False)]
    return {name: torch.cat(value).cpu().numpy() for name, value in zip(("global", "dense"), zip(*rows))}


# ---------------------------------------------------------------------------------------------------------------- commands
def load_runs(runs, checkpoint, root=None):
    """Predictors of several runs on the same categories; they share CLIP where it is the same."""
    predictors = [Predictor(runs[0], checkpoint)]
    for run in runs[1:]:
        predictors.append(Predictor(run, checkpoint, encoder=predictors[0].clip))
        if predictors[-1].names != predictors[0].names:
            raise UserError(f"{run} has other categories than {runs[0]}: they cannot be compared or averaged")
    for predictor in predictors if root else ():
        predictor.cfg.root = root
    return predictors


def table(predictors, split_name):
    """The metrics of a run, or of the averaged probabilities of several."""
    split = predictors[0].split(split_name)
    scores = np.mean([member.scores_of(member.features(split)) for member in predictors], 0)
    return split, metrics(scores, split.truth, np.mean([member.threshold for member in predictors], 0))


@torch.no_grad()
def compare(predictors, split_name):
    """Zero-shot CLIP and several runs on one split, side by side; where boxes exist, how well each map sits on them."""
    split = predictors[0].split(split_name)
    print(f"\n{split.name}, {len(split.paths)} images, {len(split.names)} categories\n"
          f"{'':38s}   mAP   pointing  mass in boxes  peak present / absent")
    for name, score in zero_shot(predictors[0].clip, split.prompts, predictors[0].features(split)).items():
        print(f"{f'zero-shot CLIP, {name}':38s} {metrics(score, split.truth)['mAP']:5.2f}")
    for predictor in predictors:
        scores, maps = sweep(predictor.model, predictor.g_pos, predictor.g_neg, predictor.features(split), bool(split.boxes))
        for name, score in scores.items():
            print(f"{f'{predictor.run}, {name} score':38s} {metrics(score, split.truth)['mAP']:5.2f}")
        for name, of_split in maps.items():
            where = localisation(of_split, predictor.grid, split.boxes, split.truth)
            if where["pairs"]:
                print(f"{f'{predictor.run}, {name}':38s}         {where['pointing']:6.1f} %  {where['mass']:9.1f} %     "
                      f"{where['present']:.2f} / {where['absent']:.2f}")


def maps_of(out, model):
    """Every map (B, C, N) that a method could show as its regions: the one it does show, and DualCoOp's weights."""
    weights = {"softmax weights": (model.log_spatial_scale.exp() * out.energy).softmax(-1)} if model.matching.startswith("dualcoop") else {}
    return {"mask" if model.matching == "carl" else "similarity map": mask_of(out, model.matching)} | weights


# Default of an option, and the commands that it belongs to.
BELONGS = {"top": (5, "--image"), "out": (None, "--image"), "csv": (None, "--image"), "json": (False, "--image --ensemble table"),
           "batch": (32, "--image --suggest"), "workers": (0, "--image --suggest"), "pictures": (None, "--image --suggest"),
           "split": ("test", "--ensemble --compare table"), "root": (None, "--suggest --ensemble --compare table")}


def main(argv=None):
    parser = make_parser("eval.py", __doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="best: the epoch chosen on validation (default, where there was one)")
    parser.add_argument("--split", choices=("train", "val", "test"), help="of the table and of --compare (default: test)")
    parser.add_argument("--root", help="the data set's folder, when it moved since training")
    parser.add_argument("--image", nargs="+", metavar="PATH", help="photos or folders: ranked categories and region pictures")
    parser.add_argument("--suggest", metavar="FILE", help="write the unknown training labels that the model believes to this CSV")
    parser.add_argument("--ensemble", nargs="+", metavar="RUN", help="average the probabilities with these runs")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="zero-shot, this run and these, side by side")
    parser.add_argument("--top", type=int, help="categories shown an image (default: 5)")
    parser.add_argument("--pictures", type=int, help="pictures drawn at most (default: every --image, 100 of --suggest)")
    parser.add_argument("--out", help="folder of the pictures of --image (default: RUN/regions)")
    parser.add_argument("--csv", metavar="FILE", help="with --image: all probabilities as a sheet, image,<category>,...")
    parser.add_argument("--json", action="store_true", default=None, help="print JSON, with --image an object a line")
    parser.add_argument("--batch", type=int, help="images at once, of --image and --suggest: lower it when memory is short (default: 32)")
    parser.add_argument("--workers", type=int, help="processes that decode them; a GPU wants some (default: 0)")

    def work():
        args = parser.parse_args(words(argv))
        given = [name for name in ("image", "suggest", "ensemble", "compare") if getattr(args, name)]
        if len(given) > 1:
            raise UserError("--image, --suggest, --ensemble and --compare are four commands: give one of them")
        command = f"--{given[0]}" if given else "table"
        for name, (default, commands) in BELONGS.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
            elif command not in commands.split():
                raise UserError(f"--{name} has no effect on the command {command}, it belongs to {commands}: drop it, or add what is missing")
        for name, low, high in (("top", 1, 2**31), ("batch", 1, 2**31), ("workers", 0, 1000), ("pictures", 0, 2**31)):
            if (value := getattr(args, name)) is not None and not low <= value <= high:
                raise UserError(f"--{name} expects a number from {low} up to {high}, got {value}")
        predictors = load_runs([args.run, *(args.ensemble or args.compare or ())], args.checkpoint, args.root)
        if args.image:
            unreadable = predict(predictors[0], images_in(args.image), args)
            if unreadable:
                raise UserError(f"{len(unreadable)} files are no readable images and were skipped: {', '.join(unreadable[:5])}"
                                     f"{' ...' if len(unreadable) > 5 else ''}")
        elif args.suggest:
            suggest(predictors[0], args)
        elif args.compare:
            compare(predictors, args.split)
        else:
            split, numbers = table(predictors, args.split)
            print(json.dumps(numbers) if args.json else f"{split.name}, {len(split.paths)} images, epoch {predictors[0].epoch}: "
                  + "  ".join(f"{name} {value}" for name, value in numbers.items()))
    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
