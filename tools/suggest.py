"""Which unknown labels of the training images a run believes: `eval.py RUN --suggest FILE`."""
import csv
import io
import os
import re
from pathlib import Path

import numpy as np

import data
from support.checkpoint import save_atomically, write_atomically
from tools.plots import grid_of, region_tiles
from tools.predict import new


def suggest(predictor, args):
    """Rows image, category, label, probability, region, to check by eye.

    First label 1, all unknown cells whose probability passes the category's threshold, most
    probable first; then label 0, the least probable unknown cells, as many. The first --pictures
    rows come with a picture of the region. Rows kept out of a sheet for validation are included.
    """
    file = new(args.suggest, "--suggest")
    folder = new(file.with_name(f"{file.stem}-regions"), "--suggest")
    splits = predictor.splits()
    parts = [part for part in (splits["train"], splits["val"]) if part]
    paths = [path for part in parts for path in part.paths]
    labels = np.concatenate([part.labels for part in parts])  # (n, C)
    truth = np.concatenate([part.truth for part in parts])
    p = np.empty(labels.shape, np.float32)
    for i, row, _ in predictor.iterate(paths, args.batch, args.workers, progress=True):
        p[i] = row
    image, category = np.nonzero(labels == data.UNKNOWN)
    order = np.argsort(-p[image, category], kind="stable")
    believed = (p[image, category] >= predictor.threshold[category])[order]
    present = order[believed]
    absent = order[~believed][::-1][:len(present)]

    regions, shown = {}, present[:100 if args.pictures is None else args.pictures]
    drawn = np.unique(image[shown])
    if len(drawn):
        folder.mkdir()
    for k, row, maps in predictor.iterate([paths[i] for i in drawn], args.batch, args.workers):
        for rank in np.flatnonzero(image[shown] == drawn[k]):
            c = category[shown[rank]]
            name = f"{rank + 1:04d}_{Path(paths[drawn[k]]).stem[:30]}_{predictor.names[c][:20]}.png"
            name = re.sub(r"[^\w.-]+", "_", name)
            tiles = grid_of([region_tiles(predictor, paths[drawn[k]], row, maps, [c])])
            save_atomically(lambda buffer: tiles.save(buffer, "PNG"), folder / name)
            regions[shown[rank]] = f"{folder.name}/{name}"

    # images are named as the sheet does, or below the root
    root = predictor.cfg.root or data.SCENES
    listed = [name for part in parts
              for name in part.listed or [os.path.relpath(path, root) for path in part.paths]]
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(["image", "category", "label", "probability", "region"])
    for label, cells in ((1, present), (0, absent)):
        for cell in cells:
            i, c = image[cell], category[cell]
            writer.writerow([listed[i], predictor.names[c], label, f"{p[i, c]:.4f}",
                             regions.get(cell, "")])
    write_atomically(file, sheet.getvalue())

    print(f"{file}: of {len(order)} unknown labels {len(present)} are likely present (label 1, "
          f"most probable first) and the {len(absent)} least probable are listed as absent (label "
          f"0); {len(regions)} pictures in {folder}/")
    for word, cells, code in (("present", present, 1), ("absent", absent, -1)):
        known = truth[image[cells], category[cells]]
        known = known[known != data.UNKNOWN]
        if len(known):  # a benchmark whose labels were hidden
            print(f"suggested {word}: {100 * np.mean(known == code):.1f} % of {len(known)} agree "
                  "with the hidden labels")
    print("A probability ranks, it is no frequency: look at the rows, fill the right ones into the "
          "sheet, train again.")
