"""Pictures: regions in the manner of the paper's Fig. 4, and the curves of a run.

N = h*w locations, C categories.
"""
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from datasets import augment
from support.checkpoint import save_atomically

SIDE = 192  # of a tile, in pixels


def heat(image, mask, grid):
    """image PIL, mask (N,), grid (h, w) -> PIL: the mask over a greyed image, red at its own peak,
    because the masks of CARL are low and would look empty."""
    m = np.clip(mask.reshape(grid) / max(mask.max(), 1e-6), 0, 1)
    m = Image.fromarray((255 * m).astype(np.uint8)).resize(image.size, Image.BICUBIC)
    grey = image.convert("L").point(lambda value: 0.6 * value + 80).convert("RGB")
    colour = ImageOps.colorize(m, black=(235, 190, 30), white=(235, 0, 0))
    return Image.composite(colour, grey, m.point(lambda value: 0.75 * value))


def fit(image, side):
    """The image with its own aspect ratio, its longer side `side` pixels."""
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * length)) for length in image.size], Image.BICUBIC)


def region_tiles(predictor, path, p, maps, top, truth=None):
    """A row of `save_grid`: the photo, then the regions of its `top` categories and what they say.

    p (C,) probabilities, maps (C, N) of the image, as Predictor.iterate gives them; truth (C,) in
    {1, -1, 0} tells which verdicts are right. "area" is the share of the locations above half the
    peak. "flat": over 80 % of them are, or the peak is below 0.05; it says nothing of a place,
    although `heat`, which scales by the peak, draws it red."""
    image = fit(augment.read(path), SIDE)
    tiles = [(image, Path(path).name[-32:])]
    for c in np.argsort(-p, kind="stable")[:top]:
        present = p[c] >= predictor.threshold[c]
        verdict = f"present: {p[c]:.2f} >=" if present else f"absent: {p[c]:.2f} <"
        verdict += f" {predictor.threshold[c]:.2f}"
        if truth is not None:
            right = "right" if (truth[c] == 1) == present else "wrong"
            verdict += f", {right if truth[c] else 'truth unknown'}"
        peak = maps[c].max()
        area = np.mean(maps[c] > peak / 2)
        flat = ", flat" if area > 0.8 or peak < 0.05 else ""
        region = f"region: peak {peak:.2f}, area {100 * area:.0f} %{flat}"
        tiles.append((heat(image, maps[c], predictor.grid),
                      f"{predictor.names[c]}\n{verdict}\n{region}"))
    return tiles


def save_grid(rows, file):
    """rows: lists of (PIL image, caption of up to three lines) -> a PNG, a grid with captions."""
    height, gap = SIDE + 39, 6
    size = (SIDE + gap) * max(map(len, rows)) + gap, (height + gap) * len(rows) + gap
    canvas = Image.new("RGB", size, "white")
    for r, row in enumerate(rows):
        for c, (tile, caption) in enumerate(row):
            card = Image.new("RGB", (SIDE, height), "white")  # which cuts off a long caption
            card.paste(tile, ((SIDE - tile.width) // 2, (SIDE - tile.height) // 2))
            caption = caption.encode("latin-1", "replace").decode("latin-1")
            ImageDraw.Draw(card).text((2, SIDE), caption, fill="black", spacing=3)
            canvas.paste(card, (gap + c * (SIDE + gap), gap + r * (height + gap)))
    save_atomically(lambda buffer: canvas.save(buffer, "PNG"), file)


@contextmanager
def two_axes(file, width, height, dpi):
    """Two axes to draw into, side by side; what was drawn is then written as a PNG."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's backend may be unknown here
    from matplotlib import figure, style  # takes a second to load
    with style.context("default"):  # a user's matplotlibrc may ask for LaTeX
        drawn = figure.Figure(figsize=(width, height))
        yield drawn.subplots(1, 2)
        for axis in drawn.axes:
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))  # beside it
        drawn.tight_layout()
        save_atomically(lambda buffer: drawn.savefig(buffer, dpi=dpi, format="png"), file)


def curves(history, file, weights, best):
    """metrics.jsonl's lines -> a PNG: the losses times their weights in Eq. 15, {"L_r": alpha ...},
    so that they sum to L; mAP where it was measured; best: the best epoch, or None."""
    with two_axes(file, 10.5, 3.2, dpi=110) as (left, right):
        for name in ("L", "L_q", "L_r", "L_KD", "L_NCE"):
            weight = weights.get(name, 1)
            points = [(line["epoch"], weight * line[name]) for line in history if name in line]
            if points and weight:
                left.plot(*zip(*points), ".-", label=name if weight == 1 else f"{weight:g} {name}")
        for split, style in (("val", ".:"), ("test", ".-")):
            for k, score in enumerate(("region", "query", "mixed", "zero-shot", "mean")):
                points = [(line["epoch"], line[split][f"mAP_{score}"]) for line in history
                          if f"mAP_{score}" in line.get(split, {})]
                if score == "zero-shot":  # which training does not change
                    points = [(0, level) for _, level in points[:1]] + points
                if points:
                    right.plot(*zip(*points), style, color=f"C{k}", label=f"{split} {score}")
        stage_one = sum(line["stage"] == 1 for line in history)  # epochs
        for axis in (left, right):
            axis.set(xlabel="epoch", xlim=(0, history[-1]["epoch"] + 0.5))
            if 0 < stage_one < history[-1]["epoch"]:
                axis.axvline(stage_one + 0.5, color="grey", linestyle="--", label="stage two")
        if best:
            right.axvline(best, color="grey", linestyle=":", label=f"best epoch {best}")
        left.set(ylabel="loss", yscale="log")
        right.set(ylabel="mAP (%)")
