"""How well the maps that a method shows sit on the boxes of a split (which training never sees).

n images, C categories, N = h*w locations.
"""
import numpy as np


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
