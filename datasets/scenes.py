"""Draws the embedded data set: scenes of 24 everyday things, in COCO's own layout, from nothing but
a seed.

    python -m datasets.scenes --root generated/scenes     # 3,000 train2014, 1,000 tune2014, 2,000
    val2014 of 256 px

What makes the scenes hard enough to matter: small things, rotation, occlusion, textured
backgrounds, things that keep each other company, and distractors: unlabelled look-alikes (a tent is
not a house, a ring is not a clock). The things themselves are drawn in shapes.py. Every image has
its own seed (seed, split, index): splits share no scene, and the number of workers changes no byte.

What is labelled: box and area are those of the pixels that are visible in the end; an object of
which less than VISIBLE of the drawn pixels, or fewer than MIN_AREA pixels, remain is not labelled.
Captions name only labelled objects.
"""
import contextlib
import json
import math
import os
import random
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets import coco
from datasets.shapes import COLOURS, DISTRACTORS, IDS, KINDS, NAMES, PAINT, Kind, stamp
from support import UserError
from support.cli import end_with_parent, make_parser, run_main, words

VERSION = 4  # part of the marker: raised whenever a change here changes the pictures
# val2014 is the held-out test, as for COCO; tune2014 is for tuning
SPLITS = ("train2014", "tune2014", "val2014")
VISIBLE = 0.4  # share of an object's pixels that must stay visible
MIN_AREA = 60  # and how many
RADIUS = (14, 46)  # half the extent of an object in pixels, whatever the size of the canvas
OBJECTS = (1, 8)  # labelled objects of a scene, least and most
CROWD = 0.9  # least distance of centres, in radii of the larger object: less is more occlusion


def load(root, cfg):
    """The three splits as `write` drew them."""
    folders = {"train": "train2014", "val": "tune2014", "test": "val2014"}
    return {name: coco.split(root, folder) for name, folder in folders.items()}


class Box(NamedTuple):
    """A labelled object: index into KINDS; x, y, w, h of its visible pixels; their number."""
    kind: int
    x: int
    y: int
    w: int
    h: int
    area: int


# upper and lower colour (None: at random), a horizon or not, who is at home there, how captions
# call it
SCENERY = {
    "sky": ((120, 180, 235), (190, 220, 245), False, "sun cloud bird kite balloon", "in the sky"),
    "field": ((150, 200, 240), (110, 165, 80), True, "tree flower mushroom house butterfly apple",
              "on a green field"),
    "sea": ((165, 210, 240), (40, 110, 165), True, "boat fish", "by the sea"),
    "room": ((215, 200, 175), (150, 110, 80), True, "cat cup lamp chair clock", "in a room"),
    "street": ((190, 200, 210), (120, 120, 125), True, "car bus umbrella", "in the street"),
    "snow": ((160, 190, 220), (232, 236, 242), True, "snowman", "in the snow"),
    "night": ((24, 28, 62), (46, 56, 84), False, "moon star", "at night"),
    "plain": (None, None, False, "", "on a plain background"), "noise": (None, None, False, "", "")}
SHORT = ("a photo of {}.", "a picture of {}", "{}", "here we see {}", "an image of {}.",
         "a drawing of {}.",
         "{} {home}", "a photo of {} {home}.", "a scene with {}", "you can see {}")
LONG = ("in this picture {home} we can see {}.", "a view with several things: {}, all of them "
                                                 "{home}.",
        "this is a picture that someone has made of {}, "
        "and there is nothing else to tell about it.",
        "look at this image, which has {} {home}",
        "here is a photo, taken on a fine day, of {} and of what is around it.")


@lru_cache(None)
def textures():
    """Two fixed (512, 512) noises in about -1..1, cropped at random: soft blotches, and grain."""
    rng, soft = np.random.RandomState(0), np.zeros((512, 512), np.float32)
    for cells, weight in ((8, 0.5), (32, 0.3), (128, 0.3)):
        grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        soft += weight * np.asarray(grid.resize((512, 512), Image.BICUBIC))
    return soft, rng.uniform(-1, 1, (512, 512)).astype(np.float32)


def background(r, size, scenery):
    """(size, size, 3) uint8: two colours that blend, or meet at a horizon, and noise."""
    by_chance = [r.uniform(60, 230) for _ in range(3)]
    noisy = scenery == "noise"
    top, bottom = (np.array([[v + r.uniform(-18, 18)] for v in colour or by_chance], np.float32)
                   for colour in SCENERY[scenery][:2])  # (3, 1)
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    soft, grain = textures()
    if SCENERY[scenery][2]:
        ramp = np.float32(0.9) * (ramp > r.uniform(0.35, 0.65)) + np.float32(0.1) * ramp
    x, y, u, v = (r.randint(0, 512 - size) for _ in range(4))
    planes = (top * (1 - ramp) + bottom * ramp)[..., None]  # (3, size, 1)
    planes = planes + r.uniform(4, 60 if noisy else 22) * soft[y:y + size, x:x + size]
    planes += r.uniform(2, 50 if noisy else 12) * grain[v:v + size, u:u + size]
    return np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def choose(r, count):
    """`count` indices into KINDS: one of ten repeats what is there, six keep it company, three come
    by chance."""
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


def scene(rng, size=256, objects=OBJECTS):
    """One scene. rng: a random.Random, or what seeds one; size: pixels of the square canvas, up to
    512.

    Returns (uint8 array (size, size, 3), list of Box, list of five captions). objects: least, most.
    They have the same size in pixels on any canvas, so a small canvas holds few.
    """
    r = rng if isinstance(rng, random.Random) else random.Random(rng)
    wanted = choose(r, r.randint(*objects))
    home = [name for name, row in SCENERY.items() if NAMES[wanted[0]] in row[3].split()]
    scenery = home[0] if r.random() < 0.6 else r.choice(list(SCENERY))
    picture = Image.fromarray(background(r, size, scenery)).resize((2 * size, 2 * size),
                                                                   Image.NEAREST)
    mask = Image.new("L", (size, size))
    pens, placed, drawn = (ImageDraw.Draw(picture), ImageDraw.Draw(mask)), [], []
    # None: a distractor
    jobs = wanted + [None] * r.choice((1, 2, 3, 4, 5) if size > 160 else (0, 0, 1))
    r.shuffle(jobs)
    for k in jobs:
        kind = Kind("", " ".join(COLOURS), "any", 3, "",
                    r.choice(DISTRACTORS)) if k is None else KINDS[k]
        low, high = {"sky": (0, 0.55), "ground": (0.4, 1)}.get(kind.place if r.random() < 0.8
                                                               else "any", (0, 1))
        # a place, at most a sixth outside, that leaves the others mostly visible; or none
        for _ in range(8):
            radius = math.exp(r.uniform(math.log(RADIUS[0]), math.log(RADIUS[1])))
            x, y = (min(max(v * size, 0.7 * radius), size - 0.7 * radius)
                    for v in (r.random(), r.uniform(low, high)))
            if all(math.hypot(x - u, y - v) > CROWD * max(radius, q) + 0.1 * min(radius, q)
                   for u, v, q in placed):
                break
        else:
            continue
        placed.append((x, y, radius))
        colour, number = r.choice(kind.colours.split()), len(placed)
        tint = tuple(min(255, max(0, int(v + r.uniform(-18, 18)))) for v in COLOURS[colour])
        stamp(*pens, number, kind.art,
              PAINT | {"c": tint, "o": PAINT[r.choice(kind.other.split())]}, r, x, y, radius,
              kind.turn * r.uniform(-1, 1))
        if k is not None:
            drawn.append((k, colour, radius, number, mask.histogram()[number]))
    numbers, boxes, told = np.asarray(mask), [], []
    for k, colour, radius, number, full in drawn:
        ys, xs = np.divmod(np.flatnonzero(numbers == number), size)
        if len(ys) >= max(MIN_AREA, VISIBLE * full):
            boxes.append(Box(k, int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1,
                             int(np.ptp(ys)) + 1, len(ys)))
            told.append((k, colour, radius, xs.mean() / size, ys.mean() / size))
    if not boxes:  # all lost to their neighbours: rare; the next numbers of r give another scene
        return scene(r, size, objects)
    return np.asarray(picture.reduce(2)), boxes, captions(r, told, SCENERY[scenery][4])


def captions(r, told, home):
    """Five captions for (kind, colour, radius, x, y) of the labelled objects: short first, then
    fuller."""
    def phrase(k, colour, radius, x, y, detail):
        same = sum(k == other[0] for other in told)
        if same > 1 and r.random() < 0.7:
            number = ("two", "three", "four", "five", "six", "seven", "eight")[same - 2]
            return f"{number} {KINDS[k].plural or NAMES[k] + 's'}"
        words = ["small" if radius < 20 else "big" if radius > 34 else "", colour]
        words = [w for w in words if w and r.random() < detail] + [NAMES[k]]
        spots = ["at the top" if y < 0.35 else "at the bottom" if y > 0.65 else "",
                 "on the left" if x < 0.35 else "on the right" if x > 0.65 else ""]
        spots = ([s for s in spots if s] or ["in the middle"]) if r.random() < 0.7 * detail else []
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words, *spots])

    def tell(count, detail):
        # one of a kind
        some = list({item[0]: item for item in r.sample(told, len(told))}.values())[:count]
        some = [phrase(*item, detail) for item in some]
        return " and ".join([r.choice((", ", ", and ", " and ")).join(some[:-1]), some[-1]]
                            if some[1:] else some)

    plan = ((1, 0, SHORT), (1, 0.7, SHORT), (2, 0.3, SHORT), (3, 0.6, r.choice((SHORT, LONG))),
            (6, 0.9, LONG))
    return [" ".join(r.choice(style).format(tell(n, detail), home=home).split()) for n, detail,
            style in plan]


def seed_of(seed, split, index):
    """The seed of one image. It holds the split's name ("pretrain" is another), so no two splits
    share a scene."""
    return f"{seed}/{split}/{index}"


def draw(job):
    """job: (split, seed, first, last + 1, size, objects, folder) -> what `scene` gives for each
    index; where a folder is given, the pictures go into it as JPEG instead."""
    split, seed, start, stop, size, objects, folder = job
    drawn = []
    for index in range(start, stop):
        picture, boxes, texts = scene(seed_of(seed, split, index), size, objects)
        if folder:
            Image.fromarray(picture).save(f"{folder}/COCO_{split}_{index + 1:012d}.jpg", quality=90)
        drawn.append((None if folder else picture, boxes, texts))
    return drawn


def draw_all(split, count, size, objects=OBJECTS, seed=0, workers=None, folder=None):
    """Yields, in order, what `draw` gives for scenes 0..count-1, from `workers` processes (None:
    all cores)."""
    jobs = [(split, seed, k, min(k + 50, count), size, objects, folder)
            for k in range(0, count, 50)]
    pool = ProcessPoolExecutor(min(workers or os.cpu_count() or 1, 61), initializer=end_with_parent)
    try:
        with tqdm(total=count, desc=f"drawing {split}", unit="image") as bar:
            for drawn in pool.map(draw, jobs):
                bar.update(len(drawn))
                yield from drawn
    finally:
        pool.shutdown(cancel_futures=True)


def write(root, train=3000, val=1000, test=2000, size=256, seed=0, workers=None):
    """Draws train2014 (`train` images), tune2014 (`val`) and val2014 (`test`) under `root` in
    COCO's layout.

    A root that holds these very scenes is left as it is; UserError for one that holds anything
    else. All is written beside `root`, links followed, and renamed at the end: a root is complete
    or absent.
    """
    root = Path(os.path.realpath(root))
    counts = dict(zip(SPLITS, (train, val, test)))
    if not (64 <= size <= 512 and min(counts.values()) >= 1 and seed >= 0
            and (workers is None or workers >= 1)):
        raise UserError("expected at least 1 image a split, 64 to 512 pixels, a seed from 0 and "
                        f"at least 1 worker, got {counts} at {size} pixels, seed {seed}, workers "
                        f"{workers}")
    marker, note = {"version": VERSION, "size": size, "seed": seed, **counts}, root / "scenes.json"
    if os.path.lexists(root) and (not root.is_dir() or any(root.iterdir())):
        try:
            found = json.loads(note.read_text())
        except (OSError, ValueError):
            found = "something else (no scenes.json, or a broken one)"
        if found == marker:
            return
        raise UserError(f"{root} should hold scenes drawn with {marker}, but holds {found}: "
                        "delete it or name another root")
    for left in root.parent.glob(f"{root.name}.*.part"):  # of a process that was killed
        if not alive(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    part = root.with_name(f"{root.name}.{os.getpid()}.part")
    try:
        (part / "annotations").mkdir(parents=True)
        for split, count in counts.items():
            (part / split).mkdir()
            with contextlib.closing(draw_all(split, count, size, seed=seed, workers=workers,
                                             folder=part / split)) as drawn:
                annotate(part / "annotations", split, drawn, size)
        (part / "scenes.json").write_text(json.dumps(marker))
        try:
            if root.exists():
                root.rmdir()
            part.rename(root)
        except OSError:  # another process was faster: as good, if it drew the same
            if not note.is_file() or json.loads(note.read_text()) != marker:
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's, or a system that cannot tell
        pass
    return True


def annotate(folder, split, drawn, size):
    """Writes instances_<split>.json and captions_<split>.json, with COCO's fields; `drawn` gives
    (_, boxes, captions)."""
    images, instances, texts = [], [], []
    for i, (_, boxes, found) in enumerate(drawn, 1):
        images.append({"id": i, "file_name": f"COCO_{split}_{i:012d}.jpg", "width": size,
                       "height": size})
        instances += [{"image_id": i, "category_id": IDS[b.kind], "bbox": [b.x, b.y, b.w, b.h],
                       "area": b.area,
                       "iscrowd": 0} for b in boxes]
        texts += [{"image_id": i, "caption": text} for text in found]
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]
    for what, rows, more in (("instances", instances, {"categories": categories}),
                             ("captions", texts, {})):
        content = {"info": {"description": f"drawn by scenes.py, version {VERSION}"},
                   "images": images,
                   "annotations": [{"id": n, **row} for n, row in enumerate(rows, 1)], **more}
        (folder / f"{what}_{split}.json").write_text(json.dumps(content))


def main(argv=None):
    parser = make_parser("datasets.scenes", __doc__)
    parser.add_argument("--root", default="generated/scenes",
                        help="folder to make; it must not hold anything else")
    parser.add_argument("--train", type=int, default=3000, help="training scenes (train2014)")
    parser.add_argument("--val", type=int, default=1000, help="validation scenes (tune2014)")
    parser.add_argument("--test", type=int, default=2000, help="held-out test scenes (val2014)")
    parser.add_argument("--size", type=int, default=256,
                        help="pixels; objects keep theirs, so less is more crowded")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws entirely other "
                                                            "scenes")
    parser.add_argument("--workers", type=int, help="processes (default: all cores); changes "
                                                    "nothing but the time")
    return run_main(lambda: write(**vars(parser.parse_args(words(argv)))))


if __name__ == "__main__":
    sys.exit(main())
