"""Pictures: regions in the manner of the paper's Fig. 4, and the curves of a run.

N = h*w locations, C categories.
"""
import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datasets import augment
from support.checkpoint import save_atomically


def heat(image, mask, grid):
    """image PIL, mask (N,), grid (h, w) -> PIL: the mask over a greyed image, red at its own peak.

    Masks are scaled by their peak because those of CARL are low and would look empty.
    """
    m = np.clip(mask.reshape(grid) / max(mask.max(), 1e-6), 0, 1)
    m = Image.fromarray((255 * m).astype(np.uint8)).resize(image.size, Image.BICUBIC)
    m = np.asarray(m, dtype=np.float32)[..., None] / 255  # (H, W, 1)
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.6 + 80
    colour = np.concatenate([np.full_like(m, 235), 190 * (1 - m), 30 * (1 - m)], -1)
    mixed = grey * (1 - 0.75 * m) + colour * 0.75 * m
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def fit(image, side):
    """The image with its own aspect ratio, its longer side `side` pixels."""
    scale = side / max(image.size)
    return image.resize([max(1, round(scale * length)) for length in image.size], Image.BICUBIC)


def region_tiles(predictor, path, p, maps, categories, truth=None, side=192):
    """A row of `grid_of`: the photo, then the regions of `categories` with what they say.

    p (C,) probabilities, maps (C, N) of the image, as Predictor.iterate gives them; truth (C,) in
    {1, -1, 0} marks each verdict (probability against the category's threshold) as + right,
    x wrong or ? unknown. A map that its own peak would paint red everywhere is called flat.
    """
    image = fit(augment.read(path), side)
    name = Path(path).name[-32:] if isinstance(path, (str, Path)) else "image"
    tiles = [(image, name)]
    for c in categories:
        present = p[c] >= predictor.threshold[c]
        mark = ""
        if truth is not None:
            mark = "? " if truth[c] == 0 else "+ " if present == (truth[c] == 1) else "x "
        peak = maps[c].max()
        flat = np.mean(maps[c] > peak / 2) > 0.8  # share of the locations that look marked
        verdict = f"{p[c]:.2f}{'>' if present else '<'}{predictor.threshold[c]:.2f}"
        told = f"{predictor.names[c]} {verdict} {'flat' if flat else 'peak'} {peak:.2f}"
        tiles.append((heat(image, maps[c], predictor.grid), mark + told))
    return tiles


def grid_of(rows, side=192):
    """rows: lists of (PIL image, caption) -> one PIL image, a grid with captions below."""
    line, gap = 15, 6
    width = (side + gap) * max(map(len, rows)) + gap
    canvas = Image.new("RGB", (width, (side + line + gap) * len(rows) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        for c, (tile, caption) in enumerate(row):
            x, y = gap + c * (side + gap), gap + r * (side + line + gap)
            tile = fit(tile.convert("RGB"), side)
            canvas.paste(tile, (x + (side - tile.width) // 2, y + (side - tile.height) // 2))
            caption = " ".join(caption.split()).encode("latin-1", "replace").decode("latin-1")
            while draw.textlength(caption) > side:  # a long name must not reach the next tile
                caption = caption[:-1]
            draw.text((x + 2, y + side + 1), caption, fill="black")
    return canvas


def save_regions(predictor, split, file, images=6, top=3):
    """Fig. 4 as a PNG: a row an image, the photo and then the regions of its `top` categories."""
    paths = split.paths[:images]
    rows = [region_tiles(predictor, paths[i], p, maps, np.argsort(-p, kind="stable")[:top],
                         split.truth[i])
            for i, p, maps in predictor.iterate(paths)]
    picture = grid_of(rows)
    save_atomically(lambda buffer: picture.save(buffer, "PNG"), file)


def two_axes(width, height):
    """-> matplotlib's figure, without a window, and its two axes side by side."""
    os.environ.pop("MPLBACKEND", None)  # a name that it does not know would stop the import
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # about a home that cannot be written
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(1, 2)


def curves(history, file, weights=None, best=None):
    """metrics.jsonl's lines -> a PNG: the losses, and mAP where it was measured.

    weights  {"L_r": alpha, ...} of Eq. 15, so that the terms that are drawn sum to L
    best     the best epoch, if one was chosen
    """
    figure, (left, right) = two_axes(9, 3.2)
    for name in ("L", "L_q", "L_r", "L_KD", "L_NCE"):
        weight = (weights or {}).get(name, 1)
        points = [(line["epoch"], weight * line[name]) for line in history if name in line]
        if points and weight:
            left.plot(*zip(*points), label=name if weight == 1 else f"{weight:g} {name}")
    for split in ("val", "test"):
        for score in ("mAP_region", "mAP_query", "mAP_mixed", "mAP_zero-shot"):
            points = [(line["epoch"], line[split][score]) for line in history
                      if score in line.get(split, {})]
            if points:
                right.plot(*zip(*points), label=f"{split} {score[4:]}")
    left.set(xlabel="epoch", ylabel="loss", yscale="log", xlim=(0, history[-1]["epoch"]))
    right.set(xlabel="epoch", ylabel="mAP (%)", xlim=(0, history[-1]["epoch"]))
    two = [line["epoch"] for line in history if line["stage"] == 2]
    for axis in (left, right):
        if two and two[0] > 1:
            axis.axvline(two[0] - 0.5, color="grey", linestyle="--", label="stage two")
        if best and axis is right:
            axis.axvline(best, color="grey", linestyle=":", label=f"best epoch {best}")
        if axis.lines:
            axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save_atomically(lambda buffer: figure.savefig(buffer, dpi=110, format="png"), file)
