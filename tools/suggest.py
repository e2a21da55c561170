"""A run's guesses for the unknown labels of its training images: `eval.py RUN --suggest out.csv`.

out.csv lists the cells; out.html is the page on which a person reviews them (tools/review.py).
n images, C categories, N = h*w locations.
"""
import base64
import io
import os
from pathlib import Path

import numpy as np
import torch

import data
from datasets import augment
from datasets.base import ASSUMED_NEGATIVE, tells_presence
from datasets.csv_sheet import Sheet, csv_text, is_sheet
from support import UserError
from support.checkpoint import write_atomically
from tools.plots import fit
from tools.predict import require_new
from tools.review import write_page

LABELS = {"present": 1, "uncertain": "", "absent": 0}


def choose_cells(p, labels, threshold, most=10_000):
    """p (n, C) probabilities, labels (n, C) int8, threshold (C,) -> {kind: (image, category)} of
    unknown cells, at most `most` of a kind:

    present    passes its category's threshold; the most probable first
    uncertain  nearest to the threshold on the scale of logits; half as many as pass, at least 10
    absent     the least probable, as many as pass"""
    unknown = np.flatnonzero(labels == data.UNKNOWN)  # of the n * C cells, row after row
    of_scores, of_threshold = (torch.as_tensor(x).logit(eps=1e-6) for x in (p, threshold))
    margin = (of_scores - of_threshold).numpy().ravel()[unknown]
    order = np.argsort(-p.ravel()[unknown], kind="stable")
    passes = margin[order] >= 0
    nearest = np.argsort(np.abs(margin), kind="stable")[:max(10, passes.sum() // 2)]
    chosen = {"present": order[passes], "uncertain": nearest,
              "absent": order[~passes][::-1][:passes.sum()]}
    for kind in ("present", "absent"):
        chosen[kind] = chosen[kind][~np.isin(chosen[kind], nearest)]
    return {kind: np.divmod(unknown[cells[:most]], p.shape[1]) for kind, cells in chosen.items()}


def jpeg(photo, side=256):
    """A photo, as augment.read takes it, as the text of a small JPEG."""
    buffer = io.BytesIO()
    fit(augment.read(photo), side).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def suggest(predictor, args):
    """Writes the list and its page. Rows kept out of a sheet for validation are included."""
    file = require_new(args.suggest, "--suggest")
    if file.suffix.lower() != ".csv":
        raise UserError(f"--suggest expects a .csv to write, got {file}")
    page = require_new(file.with_suffix(".html"), "--suggest")
    splits = predictor.splits()
    parts = [splits["train"]]
    if splits.get("val") and not is_sheet(predictor.cfg.val):  # answers go into the first sheet
        parts.append(splits["val"])
    labels = np.concatenate([part.labels for part in parts])
    print(f"scoring {len(labels):,} images", flush=True)
    p = np.concatenate([predictor.probabilities(part) for part in parts])  # (n, C)
    chosen = choose_cells(p, labels, predictor.threshold)
    root = predictor.cfg.root or data.SCENES
    paths, listed = [], []
    for part in parts:  # images are named as in the sheet, or else below the root
        paths += part.paths
        listed += part.listed or [os.path.relpath(path, root) for path in part.paths]

    most = 200 if args.pictures is None else args.pictures  # cells on the page
    rows, shown = [], []
    for kind, (images, categories) in chosen.items():
        cells = list(zip(images.tolist(), categories.tolist()))
        rows += [[listed[i], predictor.names[c], LABELS[kind], f"{p[i, c]:.4f}", kind]
                 for i, c in cells]
        shown += [(kind, i, c) for i, c in cells[:most // (2 if kind == "present" else 4)]]
    photos = {i: jpeg(paths[i]) for i in sorted({i for _, i, _ in shown})}
    scored = predictor.iterate([paths[i] for i in photos])
    maps = {i: of_image for i, (_, _, of_image) in zip(photos, scored)}  # (C, N) each
    cells = []
    for kind, i, c in shown:
        # scaled by its peak; cosines, which a method without a mask shows, are nearly alike
        region = maps[i][c] - (0 if predictor.cfg.matching == "carl" else maps[i][c].min())
        region = region / max(region.max(), 1e-6)
        cells.append({"photo": i, "image": listed[i], "category": predictor.names[c], "kind": kind,
                      "probability": round(float(p[i, c]), 2),
                      "region": (255 * region).astype(int).tolist()})
    then, sheet = "", predictor.cfg.data
    if is_sheet(sheet):
        minus_one = f" --minus-one {predictor.cfg.minus_one}" if predictor.cfg.minus_one else ""
        then = f", then python -m tools.review merge SHEET ANSWERS{minus_one}, and train again"
        weight = predictor.cfg.assume_negative
        if weight is None and tells_presence(parts[0].truth):  # no run has settled it yet
            weight = ASSUMED_NEGATIVE
        if weight:  # the answers' 0s may end it as a default
            then += f" with --assume-negative {weight}"
        if not set(predictor.names) <= set(Sheet(sheet).header):
            then = "; a sheet with a column of lists takes no answers: write a column per category"
    write_atomically(file, csv_text(["image", "category", "label", "probability", "kind"], rows))
    write_page(page, Path(sheet).name, cells, photos, predictor.grid, then)

    counts = ", ".join(f"{len(image)} {kind}" for kind, (image, _) in chosen.items())
    print(f"{file}: of {int((labels == data.UNKNOWN).sum())} unknown labels {counts}; "
          f"{len(shown)} of them to look at in {page}{then}")
