"""How well the maps that a method shows sit on the boxes of a split (which training never sees).

n images, C categories, N = h*w locations.
"""
import sys

import numpy as np
from PIL import Image

from datasets import augment

# x0, y0, x1, y1 after the quarter turn of an orientation mark
QUARTER = {Image.TRANSPOSE: lambda x0, y0, x1, y1: (y0, x0, y1, x1),
           Image.ROTATE_270: lambda x0, y0, x1, y1: (1 - y1, x0, 1 - y0, x1),
           Image.TRANSVERSE: lambda x0, y0, x1, y1: (1 - y1, 1 - x1, 1 - y0, 1 - x0),
           Image.ROTATE_90: lambda x0, y0, x1, y1: (y0, 1 - x1, y1, 1 - x0)}


def upright_boxes(split):
    """The boxes of a split, n arrays (k, 5), in the frame of its upright pixels: where the list
    gives an image's size as stored, before its orientation mark turns it, its boxes turn too."""
    found, odd = [], []
    for path, boxes, size in zip(split.paths, split.boxes, split.sizes):
        if len(boxes):
            with Image.open(path) as image:
                turn, stored = augment.turn_of(image), image.size
            upright = stored[::-1] if turn in QUARTER else stored
            if size == stored != upright:
                boxes = np.stack([boxes[:, 0], *QUARTER[turn](*boxes[:, 1:].T)], 1)
            elif size != upright:
                odd.append(path)
        found.append(boxes)
    if odd:
        print(f"note: {len(odd)} images have another size than their list says, first {odd[0]}: "
              "their boxes may be wrong", file=sys.stderr)
    return found


def localisation(maps, grid, split_boxes, truth):
    """How well maps (n, C, N) sit on the boxes of a split, over its present categories.

    grid (h, w); split_boxes: n arrays (k, 5) of category, x0, y0, x1, y1 in 0..1, not all empty
    pointing  (the pointing game) share of (image, category) whose highest cell is in a box, %
    mass      share of the map's sum that lies in the boxes, %; a cell lies where its centre is
    present, absent   mean peak of the map where the category is there, and where it is not
    """
    cy, cx = (np.indices(grid).reshape(2, -1) + 0.5) / np.array(grid)[:, None]  # (N,) each: centres
    hits, mass = [], []
    for of_image, boxes in zip(maps, split_boxes):
        for c in np.unique(boxes[:, 0]).astype(int):
            x0, y0, x1, y1 = boxes[boxes[:, 0] == c, 1:].T[..., None]  # (k, 1) each
            inside = ((cx >= x0) & (cy >= y0) & (cx <= x1) & (cy <= y1)).any(0)  # (N,)
            m = np.clip(of_image[c], 0, None)
            hits.append(inside[of_image[c].argmax()])
            mass.append(m[inside].sum() / max(m.sum(), 1e-12))
    peak = maps.max(-1)  # (n, C)
    return dict(pointing=100 * np.mean(hits), mass=100 * np.mean(mass),
                present=peak[truth == 1].mean(), absent=peak[truth == -1].mean())
