"""Evaluate a run, predict on your own photos, draw the regions (paper, Sec. 4.1 metrics, Fig. 4).

    python eval.py runs/demo                                  the table of its test split
    python eval.py runs/demo --image photo.jpg folder/        ranked categories and their regions
    python eval.py runs/demo --ensemble runs/other            averaged scores of several runs

From Python, three lines; only the run folder and CLIP's image encoder are needed, no text encoder and no training data:
    from eval import Predictor
    model = Predictor("runs/demo")
    print(model.predict(["photo.jpg"]))
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import clip
import data
from features import Features
from trm import TRM


# ---------------------------------------------------------------------------------------------------------------- metrics
def average_precision(scores, positive):
    """Plain AP of one category: sum over thresholds of (R_k - R_{k-1}) P_k, tied scores form one threshold (as scikit-learn).

    scores (n,) float, positive (n,) bool. NaN without a positive. The result does not depend on the order of the images.
    """
    positive = positive[np.argsort(-scores, kind="stable")]
    last_of_tie = np.append(np.diff(np.sort(-scores)) != 0, True)
    true = np.cumsum(positive)[last_of_tie]
    precision = true / (np.flatnonzero(last_of_tie) + 1)
    return float((np.diff(true, prepend=0) * precision).sum() / true[-1]) if true[-1] else float("nan")


def interpolated_precision(scores, positive):
    """VOC's AP (2010 and later; SARB's and the paper's author's code): precision made monotone, so never below the plain AP."""
    positive = positive[np.argsort(-scores, kind="stable")]
    if not positive.any():
        return float("nan")
    precision = np.cumsum(positive) / np.arange(1, len(positive) + 1)
    return float(np.maximum.accumulate(precision[::-1])[::-1][positive].mean())


def metrics(scores, truth, threshold=0.5):
    """scores (n, C) probabilities, truth (n, C) in {1, -1, 0}; 0 (nobody knows) is left out of every number.

    mAP       mean plain AP over the categories that have a positive; `left_out` counts the others
    mAP_voc   the interpolated one;  CP CR CF1 per category, OP OR OF1 over all decisions at `threshold` (scalar or (C,))
    All in percent.
    """
    known, positive = truth != 0, truth == 1
    ap, ap_voc = (np.array([one(scores[known[:, c], c], positive[known[:, c], c]) if positive[:, c].any() else np.nan
                            for c in range(truth.shape[1])]) for one in (average_precision, interpolated_precision))
    decided = (scores >= threshold) & known
    hit, said, exist = (decided & positive).sum(0), decided.sum(0), positive.sum(0)
    ratio = lambda a, b: float(a / b) if b else 0.0
    CP, CR = float(np.mean(hit / np.maximum(said, 1))), float(np.mean((hit / np.maximum(exist, 1))[exist > 0])) if exist.any() else 0.0
    OP, OR = ratio(hit.sum(), said.sum()), ratio(hit.sum(), exist.sum())
    f1 = lambda p, r: ratio(2 * p * r, p + r)
    result = dict(mAP=np.nanmean(ap) if exist.any() else 0.0, mAP_voc=np.nanmean(ap_voc) if exist.any() else 0.0,
                  CP=CP, CR=CR, CF1=f1(CP, CR), OP=OP, OR=OR, OF1=f1(OP, OR))
    return {name: round(100 * float(value), 3) for name, value in result.items()} | {"left_out": int((exist == 0).sum())}


# ------------------------------------------------------------------------------------------------------------------- runs
class Predictor:
    """A trained run, ready to score images: Predictor("runs/demo"). checkpoint "best" (chosen on validation) or "last"."""

    def __init__(self, run, checkpoint="best", device=None, encoder=None):
        file = Path(run) / f"{checkpoint}.pt"
        if not file.is_file():
            raise data.DataError(f"expected a run folder with {checkpoint}.pt, found none in {run}: train one with `python train.py --out {run}`")
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.run, self.config, self.names, self.epoch = Path(run), json.loads(state["config"]), state["names"], state["epoch"]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.clip = encoder or clip.load(self.config["clip"]).to(self.device)
        if self.clip.sha256 != state["clip_sha256"]:
            raise clip.ClipError(f"{run} was trained on CLIP {state['clip_sha256'][:12]}..., {self.config['clip']} is now "
                                 f"{self.clip.sha256[:12]}...: put the same weights back, or train again")
        self.g_pos, self.g_neg = state["g_pos"].to(self.device), state["g_neg"].to(self.device)
        self.threshold = np.asarray(state["threshold"])                            # (C,) chosen on validation, else 0.5
        self.model = TRM(*self.g_pos.shape, matching=self.config["matching"], contrastive=False).to(self.device).eval()
        learned = {k: v for k, v in state["model"].items() if not k.startswith(("prompts.", "heads."))}
        self.model.load_state_dict(learned)

    @torch.no_grad()
    def score(self, f, x):
        """f (B, N, D), x (B, D) -> probabilities of the configured head (B, C), and trm.Output."""
        out = self.model(f, x, self.g_pos, self.g_neg)
        return torch.sigmoid(pick(out, self.config["score"])), out

    def predict(self, paths, batch=32, progress=False):
        """paths: image files -> list of {"image", "scores": {category: probability}}, categories most probable first."""
        rows = []
        for i, p, _ in self.over(paths, batch, progress):
            for path, row in zip((paths[j] for j in i), p):
                ranked = sorted(zip(self.names, row.tolist()), key=lambda pair: -pair[1])
                rows.append({"image": str(path), "scores": dict(ranked)})
        return rows

    def over(self, paths, batch=32, progress=False):
        """Yields (indices, probabilities (B, C) numpy, trm.Output) over image files."""
        nothing = np.zeros((len(paths), len(self.names)), np.int8)
        split = data.Split("images", [str(p) for p in paths], self.names, self.names, nothing, nothing)
        for i, f, x in Features(split, self.clip, self.config["size"], batch=batch, device=self.device).batches(0, shuffle=False):
            p, out = self.score(f, x)
            yield i.tolist(), p.cpu().numpy(), out


def pick(out, score):
    """The paper infers with the region score; "query" and "mean" are measured beside it (NOTES.md)."""
    if score == "region" or out.logits_q is None:
        return out.logits_r
    return out.logits_q if score == "query" else (out.logits_r + out.logits_q) / 2


@torch.no_grad()
def scores_of(model, g_pos, g_neg, features):
    """All scores of a split: {"region": (n, C) probabilities, "query" and "mean": same, absent for a baseline} as numpy float32."""
    model.eval()
    rows = {}
    for _, f, x in features.batches(0, shuffle=False):
        out = model(f, x, g_pos, g_neg)
        for name in ("region", "query", "mean") if out.logits_q is not None else ("region",):
            rows.setdefault(name, []).append(pick(out, name).sigmoid().cpu())
    return {name: torch.cat(value).float().numpy() for name, value in rows.items()}


TEMPLATES = ("a photo of a {}", "a picture of a {}", "a drawing of a {}", "there is a {} in the scene")


@torch.no_grad()
def zero_shot(encoder, prompts, features):
    """CLIP without any training: {"global": (n, C), "dense": (n, C)} cosines to the mean text feature; dense = best location."""
    unit = torch.nn.functional.normalize
    g = sum(unit(encoder.encode_text(encoder.tokenize([t.format(p) for p in prompts]).to(features.device)), dim=-1) for t in TEMPLATES)
    g = unit(g, dim=-1)                                                            # (C, D)
    rows = [(unit(x, dim=-1) @ g.T, (unit(f, dim=-1) @ g.T).amax(1)) for _, f, x in features.batches(0, shuffle=False)]
    return {name: torch.cat(value).cpu().numpy() for name, value in zip(("global", "dense"), zip(*rows))}


def best_thresholds(scores, truth):
    """(C,) threshold per category with the best F1 on a validation split; 0.5 for a category without a known positive there."""
    thresholds = np.full(truth.shape[1], 0.5)
    for c in range(truth.shape[1]):
        known = truth[:, c] != 0
        s, positive = scores[known, c], truth[known, c] == 1
        if positive.any():
            rank = np.argsort(-s, kind="stable")
            hit = np.cumsum(positive[rank])
            f1 = 2 * hit / (np.arange(1, len(s) + 1) + positive.sum())
            f1[np.append(np.diff(s[rank]) == 0, False)] = 0                        # a threshold cannot split a tie
            thresholds[c] = s[rank[f1.argmax()]]
    return thresholds


# ---------------------------------------------------------------------------------------------------------------- regions
def mask_of(out, matching):
    """The map (B, C, N) that a method shows as its region: the sigmoid mask of Eq. 2, or DualCoOp's positive similarity."""
    return out.energy.sigmoid() if matching == "carl" else out.energy


def heat(image, mask, grid, peak=None):
    """image PIL, mask (N,) -> PIL: the mask over a greyed image, red at `peak` (default: its own maximum)."""
    m = np.clip(mask.reshape(grid) / (peak or max(mask.max(), 1e-6)), 0, 1)
    m = np.asarray(Image.fromarray((255 * m).astype(np.uint8)).resize(image.size, Image.BICUBIC), dtype=np.float32)[..., None] / 255
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.6 + 80
    colour = np.concatenate([np.full_like(m, 235), 190 * (1 - m), 30 * (1 - m)], -1)
    return Image.fromarray((grey * (1 - 0.75 * m) + colour * 0.75 * m).clip(0, 255).astype(np.uint8))


def picture(rows, side=192):
    """rows: list of lists of (PIL image, caption) -> one PIL image, a grid with captions below the tiles."""
    line, gap = 15, 6
    canvas = Image.new("RGB", ((side + gap) * max(map(len, rows)) + gap, (side + line + gap) * len(rows) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        for c, (tile, caption) in enumerate(row):
            x, y = gap + c * (side + gap), gap + r * (side + line + gap)
            canvas.paste(tile.convert("RGB").resize((side, side), Image.BICUBIC), (x, y))
            draw.text((x + 2, y + side + 1), caption, fill="black")
    return canvas


def region_rows(predictor, paths, top=3):
    """Fig. 4: a row per image: the photo, then the regions of its `top` categories with their scores.

    A mask is scaled by its own peak, which the caption gives: the sigmoid masks of CARL are low and would look empty otherwise.
    """
    size, rows = predictor.config["size"], []
    for i, p, out in predictor.over(paths):
        masks = mask_of(out, predictor.config["matching"]).cpu().numpy()
        for j, scores, mask in zip(i, p, masks):
            with Image.open(paths[j]) as opened:
                image = opened.convert("RGB").resize((size, size), Image.BICUBIC)
            row = [(image, Path(paths[j]).name[-28:])]
            for c in np.argsort(-scores)[:top]:
                row.append((heat(image, mask[c], predictor.clip.grid(size, size)),
                            f"{predictor.names[c]} {scores[c]:.2f}  peak {mask[c].max():.2f}"))
            rows.append(row)
    return rows


def localisation(maps, grid, split_boxes, truth):
    """How well maps (n, C, N) sit on the boxes of a split, over its present categories.

    pointing   share of (image, category) whose highest cell has its centre in a box of the category (the pointing game)
    mass       share of the map's sum that lies in the boxes (by cell centre);  `..._small` / `_medium` / `_large`: pointing by size of
               the largest box (under 1/9 of the side squared: small, under 1/9..1/3: medium, in area of the image: 0.02, 0.1)
    present, absent   mean peak of the map where the category is there, and where it is not
    """
    h, w = grid
    cy, cx = [a.ravel() for a in np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij")]
    hits, mass, sizes = [], [], []
    for i, boxes in enumerate(split_boxes):
        for c in np.unique(boxes[:, 0]).astype(int):
            own = boxes[boxes[:, 0] == c, 1:]
            inside = ((cx >= own[:, :1]) & (cy >= own[:, 1:2]) & (cx <= own[:, 2:3]) & (cy <= own[:, 3:])).any(0)
            m = np.clip(maps[i, c], 0, None)
            hits.append(inside[maps[i, c].argmax()])
            mass.append(m[inside].sum() / max(m.sum(), 1e-12))
            sizes.append(((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])).max())
    hits, sizes, peak = np.array(hits, float), np.array(sizes), maps.max(-1)
    of = lambda chosen: round(100 * float(hits[chosen].mean()), 2) if chosen.any() else None
    return dict(pointing=of(sizes >= 0), small=of(sizes < 0.02), medium=of((sizes >= 0.02) & (sizes < 0.1)), large=of(sizes >= 0.1),
                mass=round(100 * float(np.mean(mass)), 2), present=round(float(peak[truth == 1].mean()), 3),
                absent=round(float(peak[truth == -1].mean()), 3), pairs=len(hits))


# ----------------------------------------------------------------------------------------------------------- command line
def images_in(paths):
    """Files and folders -> image files, sorted within a folder; a folder without any is an error."""
    found = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in data.IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise data.DataError(f"expected images in {path}, found no {' '.join(sorted(data.IMAGE_SUFFIXES))}")
        missing = [p for p in inside if not p.is_file()]
        if missing:
            raise data.DataError(f"expected an image file, found nothing at {missing[0]}: check the path")
        found += inside
    return [str(p) for p in found]


def test_features(predictor, split):
    c = predictor.config
    return Features(split, predictor.clip, c["size"], batch=c["batch"], workers=c["workers"], views=min(1, c["cache_features"]),
                    cache=c["cache_dir"], device=predictor.device)


def split_of(config, name):
    """The split `name` of the data a run was trained on."""
    keys = ("ratio", "single_positive", "seed", "train_images", "mask", "val", "names")
    split = dict(zip(("train", "val", "test"), data.load(config["data"], config["root"], **{k: config[k] for k in keys})))[name]
    if split is None:
        raise data.DataError(f"{config['data']} has no {name} split: choose another --split")
    return split


def compare(runs, split_name, checkpoint):
    """Zero-shot CLIP and several runs on one split, side by side, with the localisation of their maps where boxes exist."""
    predictors = [Predictor(runs[0], checkpoint)]
    predictors += [Predictor(run, checkpoint, encoder=predictors[0].clip) for run in runs[1:]]
    split = split_of(predictors[0].config, split_name)
    features = test_features(predictors[0], split)
    rows = [(f"zero-shot CLIP, {name}", metrics(score, split.truth)["mAP"], None)
            for name, score in zero_shot(predictors[0].clip, split.prompts, features).items()]
    for predictor in predictors:
        scores, maps = run_scores(predictor, features, maps=bool(split.boxes))
        where = localisation(maps, predictor.clip.grid(predictor.config["size"], predictor.config["size"]), split.boxes, split.truth) if split.boxes else None
        rows.append((str(predictor.run), metrics(scores, split.truth)["mAP"], where))
    print(f"\n{split.name}, {len(split.paths)} images, {len(split.names)} categories\n{'':34s}  mAP   pointing  mass in boxes  peak present / absent")
    for name, mAP, where in rows:
        print(f"{name:34s} {mAP:5.2f}" + (f"   {where['pointing']:6.1f} %  {where['mass']:9.1f} %     {where['present']:.2f} / {where['absent']:.2f}" if where else ""))


@torch.no_grad()
def run_scores(predictor, features, maps=False):
    """(n, C) probabilities of a run on a split, and its maps (n, C, N) float16 when asked for."""
    scores, kept = [], []
    for _, f, x in features.batches(0, shuffle=False):
        p, out = predictor.score(f, x)
        scores.append(p.cpu())
        if maps:
            kept.append(mask_of(out, predictor.config["matching"]).half().cpu())
    return torch.cat(scores).numpy(), torch.cat(kept).float().numpy() if maps else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="\n".join(__doc__.split("\n")[2:]), allow_abbrev=False)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"), help="best: the epoch chosen on validation (default)")
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--root", help="the data set's folder, when it moved since training")
    parser.add_argument("--image", nargs="+", metavar="PATH", help="photos or folders: ranked categories and region pictures")
    parser.add_argument("--top", type=int, default=5, help="categories shown an image")
    parser.add_argument("--ensemble", nargs="+", metavar="RUN", help="average the scores with these runs")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="zero-shot, this run and these, side by side")
    parser.add_argument("--out", default=None, help="folder of the pictures (default: RUN/regions)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            compare([args.run, *args.compare], args.split, args.checkpoint)
            return 0
        predictor = Predictor(args.run, args.checkpoint)
        if args.root:
            predictor.config["root"] = args.root
        if args.image:
            paths = images_in(args.image)
            folder = Path(args.out or Path(args.run) / "regions")
            folder.mkdir(parents=True, exist_ok=True)
            for row, tiles in zip(predictor.predict(paths), (region_rows(predictor, [p], args.top)[0] for p in paths)):
                shown = dict(list(row["scores"].items())[: args.top])
                print(json.dumps({"image": row["image"], "scores": shown}) if args.json else
                      f"{row['image']}: " + "  ".join(f"{name} {p:.2f}" for name, p in shown.items()))
                picture([tiles]).save(folder / f"{Path(row['image']).stem}.png")
            return 0
        split = split_of(predictor.config, args.split)
        features = test_features(predictor, split)
        members = [predictor] + [Predictor(run, args.checkpoint, encoder=predictor.clip) for run in args.ensemble or ()]
        scores = np.mean([run_scores(member, features)[0] for member in members], 0)
        table = metrics(scores, split.truth, predictor.threshold)
        print(json.dumps(table) if args.json else f"{split.name}, {len(scores)} images, epoch {predictor.epoch}: " + "  ".join(f"{k} {v}" for k, v in table.items()))
        return 0
    except (data.DataError, clip.ClipError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
