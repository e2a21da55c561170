"""Draws the default data set from a seed: scenes of 24 everyday things, in COCO's own layout.

    python -m datasets.scenes     3,000 train2014, 1,000 tune2014, 2,000 val2014 of 256 px

What makes them hard enough to matter: small things, rotation, occlusion, textured backgrounds,
things that keep each other company, and unlabelled look-alikes (a tent is not a house). What there
is to draw stands in scenes.ini. Every image has its own seed (seed, split, index): splits share no
scene, workers change no byte. Labels, boxes and captions are about what is visible in the end."""
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets import coco
from datasets.shapes import COLOURS, DISTRACTORS, IDS, INI, KINDS, NAMES, PAINT, sections, stamp
from support import UserError, refused
from support.cli import end_with_parent, make_parser, run_command, stop

VERSION = 4  # part of the marker: raised whenever a change here changes the pictures
SPLITS = {"train": "train2014", "val": "tune2014", "test": "val2014"}  # as for COCO
VISIBLE = 0.4  # share of an object's pixels that must stay visible for it to be labelled
MIN_AREA = 60  # pixels that must stay visible at least
RADIUS = (14, 46)  # half the extent of an object in pixels, whatever the size of the canvas
OBJECTS = (1, 8)  # labelled objects of a scene, least and most
CROWD = 0.9  # least distance of centres, in radii of the larger object: less is more occlusion
# a labelled object: index into KINDS; x, y, w, h of its visible pixels; their number
Box = namedtuple("Box", "kind x y w h area")
PLACES = sections("place")
SHORT, LONG = (INI["captions"][length].split("\n") for length in ("short", "long"))


def load(root, cfg):
    """The three splits as `write` drew them."""
    return {part: coco.split(root, folder) for part, folder in SPLITS.items()}


@lru_cache(None)
def textures():
    """Two fixed (512, 512) noises in about -1..1, cropped at random: soft blotches, and grain."""
    rng, soft = np.random.RandomState(0), np.zeros((512, 512), np.float32)
    for cells, weight in ((8, 0.5), (32, 0.3), (128, 0.3)):
        grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        soft += weight * np.asarray(grid.resize((512, 512), Image.BICUBIC))
    return soft, rng.uniform(-1, 1, (512, 512)).astype(np.float32)


def background(r, size, place):
    """(size, size, 3) uint8: two colours that blend, or meet at a horizon, and noise."""
    by_chance = [r.uniform(60, 230) for _ in range(3)]
    noisy = place == "noise"

    def colour(end):
        """(3, 1): the colour of the place's top or bottom, a little moved."""
        middle = PLACES[place].get(end, "").split() or by_chance
        return np.array([[float(v) + r.uniform(-18, 18)] for v in middle], np.float32)

    top, bottom = colour("top"), colour("bottom")
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    soft, grain = textures()
    if "horizon" in PLACES[place]:
        ramp = np.float32(0.9) * (ramp > r.uniform(0.35, 0.65)) + np.float32(0.1) * ramp
    x, y, u, v = (r.randint(0, 512 - size) for _ in range(4))
    planes = (top * (1 - ramp) + bottom * ramp)[..., None]  # (3, size, 1)
    planes = planes + r.uniform(4, 60 if noisy else 22) * soft[y:y + size, x:x + size]
    planes += r.uniform(2, 50 if noisy else 12) * grain[v:v + size, u:u + size]
    return np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def choose(r, count):
    """`count` indices into KINDS: 10 % repeat a chosen one, 60 % are company of one."""
    chosen = [r.randrange(len(KINDS))]
    while len(chosen) < count:
        friend = r.choice(chosen)
        chance = r.random()
        if chance < 0.1:
            chosen.append(friend)
        elif chance < 0.7:
            chosen.append(NAMES.index(r.choice(KINDS[friend].company.split())))
        else:
            chosen.append(r.randrange(len(KINDS)))
    return chosen


def scene(r, size=256, objects=OBJECTS):
    """One scene by a random.Random -> uint8 (size, size, 3), list of Box, list of five captions.
    size: pixels, up to 512; things are equally large on any canvas. objects: least, most."""
    wanted = choose(r, r.randint(*objects))
    home = [place for place in PLACES if NAMES[wanted[0]] in PLACES[place]["home"].split()]
    place = home[0] if r.random() < 0.6 else r.choice(list(PLACES))
    picture = Image.fromarray(background(r, size, place).repeat(2, 0).repeat(2, 1))
    mask = Image.new("L", (size, size))
    pens, placed, drawn = (ImageDraw.Draw(picture), ImageDraw.Draw(mask)), [], []
    jobs = wanted + [None] * r.choice((1, 2, 3, 4, 5) if size > 160 else (0, 0, 1))
    r.shuffle(jobs)
    for k in jobs:  # an index into KINDS, or None: a distractor
        kind = r.choice(DISTRACTORS) if k is None else KINDS[k]
        where = kind.place if r.random() < 0.8 else "any"
        low, high = {"sky": (0, 0.55), "ground": (0.4, 1)}.get(where, (0, 1))
        # eight tries to find a place, at most a sixth outside, where the others stay visible
        for _ in range(8):
            radius = math.exp(r.uniform(math.log(RADIUS[0]), math.log(RADIUS[1])))
            spot = np.array([r.random(), r.uniform(low, high)]) * size
            x, y = spot.clip(0.7 * radius, size - 0.7 * radius).tolist()
            if all(math.hypot(x - u, y - v) > CROWD * max(radius, q) + 0.1 * min(radius, q)
                   for u, v, q in placed):
                break
        else:
            continue
        placed.append((x, y, radius))
        colour, number = r.choice(kind.colours.split()), len(placed)
        tint = tuple(min(255, max(0, int(v + r.uniform(-18, 18)))) for v in COLOURS[colour])
        colours = PAINT | {"c": tint, "o": PAINT[r.choice(kind.other.split())]}
        angle = float(kind.turn) * r.uniform(-1, 1)
        stamp(*pens, number, kind.art, colours, r, x, y, radius, angle)
        if k is not None:
            drawn.append((k, colour, radius, number, mask.histogram()[number]))
    numbers, boxes, labelled = np.asarray(mask), [], []
    for k, colour, radius, number, full in drawn:
        ys, xs = np.nonzero(numbers == number)
        if len(ys) >= max(MIN_AREA, VISIBLE * full):
            x, y = int(xs.min()), int(ys.min())
            boxes.append(Box(k, x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1, len(ys)))
            labelled.append((k, colour, radius, xs.mean() / size, ys.mean() / size))
    if not boxes:  # all lost to their neighbours: rare; the next numbers of r give another scene
        return scene(r, size, objects)
    return np.asarray(picture.reduce(2)), boxes, captions(r, labelled, PLACES[place]["caption"])


def captions(r, labelled, home):
    """Five captions, fuller and fuller, of labelled objects (kind, colour, radius, x, y)."""
    def phrase(k, colour, radius, x, y, detail):
        same = sum(k == other[0] for other in labelled)
        if same > 1 and r.random() < 0.7:
            number = ("two", "three", "four", "five", "six", "seven", "eight")[same - 2]
            return f"{number} {KINDS[k].plural}"
        words = ["small" if radius < 20 else "big" if radius > 34 else "", colour]
        words = [w for w in words if w and r.random() < detail] + [NAMES[k]]
        row = "at the top" if y < 0.35 else "at the bottom" if y > 0.65 else ""
        column = "on the left" if x < 0.35 else "on the right" if x > 0.65 else ""
        spots = []
        if r.random() < 0.7 * detail:
            spots = [spot for spot in (row, column) if spot] or ["in the middle"]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words, *spots])

    def tell(count, detail):
        one_of_a_kind = {item[0]: item for item in r.sample(labelled, len(labelled))}.values()
        *some, last = [phrase(*item, detail) for item in list(one_of_a_kind)[:count]]
        return f"{r.choice((', ', ', and ', ' and ')).join(some)} and {last}" if some else last

    plan = ((1, 0, SHORT), (1, 0.7, SHORT), (2, 0.3, SHORT), (3, 0.6, r.choice((SHORT, LONG))),
            (6, 0.9, LONG))
    texts = [r.choice(style).format(tell(n, detail), home=home) for n, detail, style in plan]
    return [" ".join(text.split()) for text in texts]


def draw(split, size, objects, seed, folder, index):
    """What `scene` gives; where a folder is given, the picture goes into it as JPEG instead."""
    picture, boxes, texts = scene(random.Random(f"{seed}/{split}/{index}"), size, objects)
    if folder:
        Image.fromarray(picture).save(f"{folder}/COCO_{split}_{index + 1:012d}.jpg", quality=90)
        picture = None
    return picture, boxes, texts


def draw_all(split, count, size, objects=OBJECTS, seed=0, workers=None, folder=None):
    """Yields, in order, what `draw` gives for scenes 0..count-1. workers: None takes all cores."""
    draw_one = partial(draw, split, size, objects, seed, folder)
    pool = ProcessPoolExecutor(min(workers or os.cpu_count(), 61), initializer=end_with_parent)
    try:
        drawn = pool.map(draw_one, range(count), chunksize=50)
        for one in tqdm(drawn, f"drawing {split}", count, unit="image", disable=None):
            if stop.asked:  # in a fork, where Python loses the exception
                raise KeyboardInterrupt
            yield one
    except (OSError, RuntimeError, KeyboardInterrupt):  # nobody is left to tell them to end
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def write(root, train=3000, val=1000, test=2000, size=256, seed=0, workers=None):
    """Draws train2014 (`train` images), tune2014 (`val`), val2014 (`test`); size: 64 to 512 pixels.
    A root that holds these very scenes is left as it is, one that holds anything else is refused.
    All is written beside it, links followed, and renamed at the end: it is complete or absent. A
    hidden lock stays there: of two processes one draws, the other waits."""
    root = Path(os.path.realpath(root))
    counts = dict(zip(SPLITS.values(), (train, val, test)))
    marker = json.dumps({"version": VERSION, "size": size, "seed": seed, **counts})
    marker_file = root / "scenes.json"
    if marker_file.is_file() and marker_file.read_text(errors="replace") == marker:
        return
    if os.path.lexists(root) and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} should hold scenes drawn with {marker}, but holds something else: "
                        "delete it or name another root")
    part = root.with_name(f"{root.name}.part")
    root.parent.mkdir(parents=True, exist_ok=True)
    with refused(f"{root} cannot be locked, its disk knows no locks: name another root"):
        locked = FileLock(root.with_name(f".{root.name}.lock")).acquire()
    with locked:
        if marker_file.is_file():  # another process has drawn them meanwhile
            return
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        try:
            (part / "annotations").mkdir(parents=True)
            for split, count in counts.items():
                (part / split).mkdir()
                drawn = list(draw_all(split, count, size, OBJECTS, seed, workers, part / split))
                annotate(part / "annotations", split, drawn, size)
            (part / "scenes.json").write_text(marker)
            part.rename(root)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def annotate(folder, split, drawn, size):
    """instances_<split>.json and captions_<split>.json of what `draw` gave, with COCO's fields."""
    images, instances, texts = [], [], []
    for i, (_, boxes, found) in enumerate(drawn, 1):
        name = f"COCO_{split}_{i:012d}.jpg"
        images.append({"id": i, "file_name": name, "width": size, "height": size})
        instances += [{"image_id": i, "category_id": IDS[b.kind], "bbox": b[1:5], "area": b.area,
                       "iscrowd": 0} for b in boxes]
        texts += [{"image_id": i, "caption": text} for text in found]
    content = {"info": {"description": f"drawn by scenes.py, version {VERSION}"}, "images": images}
    for what, rows in (("captions", texts), ("instances", instances)):
        content["annotations"] = [{"id": n, **row} for n, row in enumerate(rows, 1)]
        if what == "instances":
            content["categories"] = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]
        (folder / f"{what}_{split}.json").write_text(json.dumps(content))


def main(argv=None):
    parser = make_parser("datasets.scenes", __doc__)
    parser.add_argument("--root", default="generated/scenes", help="folder to make (or empty)")
    return run_command(write, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
