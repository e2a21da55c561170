"""Draws the embedded data set: scenes of 24 everyday things, in COCO's own layout, from nothing but a seed.

    python scenes.py --root generated/scenes        # 3,000 train2014, 1,000 tune2014 and 2,000 val2014 scenes of 256 px

What makes the scenes hard enough to matter: small things, rotation, occlusion, textured backgrounds, things that keep each
other company, and distractors: unlabelled shapes that look alike (a tent is not a house, a ring is not a clock).
Every image has its own seed (seed, split, index): splits cannot share a scene, and the number of workers changes no byte.

What is labelled: the box and the area are those of the pixels that are visible in the end; an object of which less than
VISIBLE of the drawn pixels, or fewer than MIN_AREA pixels, remain is not labelled. Captions name only labelled objects.
"""
import argparse
import json
import math
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

VERSION = 2                         # part of the marker: raised whenever a change here changes the pictures
SPLITS = ("train2014", "tune2014", "val2014")       # val2014 is the held-out test, as for COCO's peers; tune2014 is for tuning
VISIBLE, MIN_AREA = 0.4, 60         # share of an object's pixels, and number of pixels, that must stay visible
RADIUS = (14, 46)                   # half the extent of an object in pixels, whatever the size of the canvas
CROWD = 0.9                         # least distance of two centres, in radii of the larger object: less means more occlusion
COLOURS = {"red": (208, 48, 44), "orange": (238, 138, 40), "yellow": (243, 208, 60), "green": (66, 148, 64),
           "blue": (52, 100, 200), "purple": (136, 74, 168), "pink": (238, 138, 172), "brown": (132, 88, 54),
           "white": (242, 240, 234), "grey": (148, 150, 154), "black": (46, 46, 54)}
PAINT = COLOURS | {"ink": (40, 36, 40), "wood": (112, 74, 44), "cream": (245, 238, 214), "glass": (205, 228, 240),
                   "glow": (252, 242, 172), "leaf": (62, 136, 56), "beak": (240, 140, 40), "steel": (188, 188, 194)}
CIRCLE = [(math.cos(k * math.pi / 12), math.sin(k * math.pi / 12)) for k in range(24)]


class SceneError(ValueError):
    """A request that cannot be met; one line that says what was expected, what came and what to do."""


class Box(NamedTuple):
    """A labelled object: index into KINDS; x, y, w, h of its visible pixels; their number."""
    kind: int
    x: int
    y: int
    w: int
    h: int
    area: int


class Kind(NamedTuple):
    """A category. colours: what its main colour may be. place: where it likes to be. turn: how far it rotates, in radians.
    company: the categories that tend to come with it. art: how to draw it (see `stamp`). other: a second colour."""
    name: str
    colours: str
    place: str
    turn: float
    company: str
    art: str
    other: str = "white"
    plural: str = ""


KINDS = (
    Kind("sun", "yellow orange red", "sky", 3, "cloud kite flower",
         "spin8|spin10|spin12 poly c*.9 -.17 -.5 0 -1 .17 -.5; oval c 0 0 .58"),
    Kind("moon", "yellow white grey", "sky", .7, "star star cloud", "crescent c .5|.65|.8"),
    Kind("cloud", "white grey pink", "sky", .1, "sun umbrella bird",
         "oval c -.5 .1 .38|.45 .36; oval c .5 .12 .36|.42 .34; oval c -.12 -.15 .5 .44; oval c .28 -.05 .4; oval c*.95 0 .26 .85 .22"),
    Kind("star", "yellow white orange blue red", "sky", 3, "moon moon house",
         "poly c 0 -1 .25 -.34 .95 -.31 .4 .13 .59 .81 0 .42 -.59 .81 -.4 .13 -.95 -.31 -.25 -.34"),
    Kind("tree", "green green orange yellow", "ground", .15, "house bird apple",
         "rect wood -.13 .2 .13 1; poly c*.8 -.75 .5 0 -.2 .75 .5; poly c*.9 -.6 .05 0 -.6 .6 .05; poly c -.46 -.4 0 -1 .46 -.4 or "
         "rect wood -.13 .2 .13 1; mirror oval c .35 -.1 .42; oval c*.9 0 -.5 .48; oval c*1.1 0 -.1 .45"),
    Kind("flower", "red pink purple yellow white blue orange", "ground", .3, "butterfly butterfly tree",
         "line leaf .1 0 0 0 1; oval leaf .25 .7 .26 .1 -.6; spin5|spin6|spin8 oval c 0 -.36 .16 .26; oval o 0 0 .2", "glow wood"),
    Kind("mushroom", "red brown orange purple", "ground", .25, "tree flower",
         "poly cream -.22 0 .22 0 .3 .95 -.3 .95; dome c 0 .1 .95 .95; oval cream -.5 -.14 .13; oval cream .05 -.5 .12; "
         "oval cream .48 -.18 .12; oval cream -.08 -.1 .1"),
    Kind("house", "white yellow red blue pink brown", "ground", .08, "tree car car",
         "rect o*.8 .35 -.9 .58 -.3; rect c -.78 -.15 .78 .95; poly o -.98 -.12 0 -.95 .98 -.12; rect wood -.17 .35 .17 .95; "
         "mirror rect glow .3 .12 .62 .45 or rect o*.8 .35 -.9 .58 -.3; rect c -.78 -.15 .78 .95; poly o -.98 -.12 0 -.95 .98 -.12; "
         "rect wood -.62 .35 -.28 .95; rect glow -.05 .12 .25 .45; rect glow .35 .12 .65 .45", "red brown grey black"),
    Kind("car", "red blue green yellow white black grey purple", "ground", .2, "bus house tree",
         "poly c -.5 -.1 -.3 -.5 .28 -.5 .58 -.1; poly glass -.38 -.1 -.24 -.4 -.03 -.4 -.03 -.1; poly glass .05 -.1 .05 -.4 .23 -.4 .43 -.1; "
         "poly c -.98 -.08 .85 -.12 1 .1 1 .36 -1 .36; rect glow .88 .02 1 .14; mirror oval ink .55 .36 .24; mirror oval steel .55 .36 .11"),
    Kind("bus", "red yellow blue green orange", "ground", .12, "car car umbrella",
         "rect c -1 -.62 1 .5; rect c*1.6 -1 .08 1 .2; rect glass -.9 -.48 -.58 -.06; rect glass -.48 -.48 -.16 -.06; rect glass -.06 -.48 .26 -.06; "
         "rect glass .36 -.48 .68 -.06; rect steel .76 -.48 .92 .5; mirror oval ink .53 .5 .22; mirror oval steel .53 .5 .1", plural="buses"),
    Kind("boat", "red brown blue white green black", "ground", .25, "fish fish bird",
         "line wood .09 0 -.95 0 .4; poly o .08 -.9 .75 .25 .08 .25; poly o*.9 -.08 -.7 -.6|-.3 .25 -.08 .25; "
         "poly c -1 .36 1 .36 .65 .85 -.65 .85", "white white red yellow orange"),
    Kind("fish", "orange blue red yellow green grey purple pink", "any", .6, "boat boat",
         "poly c*.8 -.4 0 -1 -.45 -.85 0 -1 .45; poly c*.8 -.2 -.3 .1 -.68 .35 -.28; oval c .2 0 .72 .42; rect c*1.5|c -.1 -.36 .04 .36; "
         "oval white .58 -.1 .13; oval ink .61 -.1 .07", plural="fish"),
    Kind("bird", "blue red brown black white yellow green", "any", .3, "tree cloud",
         "line beak .06 -.1 .4 -.1 .85; line beak .06 .12 .4 .12 .85; poly c*.75 -.45 .1 -1 -.1 -.95 .25; oval c -.05 .12 .58 .4 -.25; "
         "oval c .48 -.35 .3; poly beak .72 -.45 1.05 -.3 .72 -.22; poly c*.7 .15 0 -.55 -.5|.1 -.35 .3; oval ink .55 -.42 .07"),
    Kind("cat", "black orange grey white brown", "ground", .15, "chair bird lamp",
         "line c*.85 .16 .4 .85 .85 .7 .9 .2 .72 -.05; oval c 0 .5 .5; mirror poly c*.85 .5 -.98 .5 -.3 .05 -.65; oval c 0 -.35 .52 .44; "
         "mirror oval glow .2 -.42 .11 .13; mirror oval ink .2 -.42 .05 .11; mirror line c*1.7 .03 .15 -.18 .7 -.12; poly pink -.08 -.25 .08 -.25 0 -.15"),
    Kind("butterfly", "orange blue yellow purple pink red white", "any", .7, "flower flower",
         "mirror oval c .5 -.35 .5 .36 -.6; mirror oval c*.85 .4 .4 .38 .3 .6; mirror oval o .58 -.38 .16; mirror line ink .05 0 -.5 .25 -.95; "
         "oval ink 0 0 .09 .6", "yellow white black blue", "butterflies"),
    Kind("apple", "red green yellow", "any", .4, "cup tree",
         "line wood .12 0 -.4 .1 -.95; oval leaf .36 -.72 .28 .13 -.4; mirror oval c .3 .15 .55 .72; oval c*1.5 -.45 -.1 .12 .2 .4"),
    Kind("cup", "white blue red green yellow pink", "ground", .2, "chair apple lamp",
         "line c*.85 .15 .5 -.26 .75 -.2 .9 0 .9 .2 .75 .4 .5 .46; poly c -.7 -.5 .6 -.5 .45 .8 -.55 .8; oval c*1.4 -.05 -.5 .65 .17; oval wood -.05 -.48 .53 .12"),
    Kind("lamp", "yellow white red blue orange green", "ground", .12, "chair clock cat",
         "rect ink*1.3 -.06 -.1 .06 .9; oval ink*1.3 0 .88 .45 .12; poly c -.34 -.95 .34 -.95 .72 0 -.72 0; oval glow 0 0 .72 .09"),
    Kind("chair", "brown red blue white black green", "ground", .15, "lamp cup cat",
         "rect c*.75 -.6 .2 -.46 1; rect c*.75 .46 .2 .6 1; rect c -.62 -1 -.48 .2; rect c .2 -1 .34 .1; rect c -.55 -.9 .3 -.76; rect c -.55 -.6 .3 -.46; "
         "rect c -.55 -.3 .3 -.16; poly c*1.15 -.64 .08 .34 .08 .66 .32 -.64 .32"),
    Kind("umbrella", "red blue yellow purple green pink black", "any", .4, "cloud bus",
         "line ink .07 0 -.95 0 .75 .08 .92 .22 .92 .28 .75; dome c 0 .1 .98 .92; poly o 0 -.82 .33 .1 -.33 .1", "white yellow grey black"),
    Kind("balloon", "red blue yellow green pink purple orange", "sky", .2, "kite cat",
         "line ink .04 0 .3 .1 .5 -.1|.1 .75 .1 1; oval c 0 -.32 .54 .66; poly c*.8 0 .26 -.12 .44 .12 .44; oval c*1.6 -.2 -.6 .1 .18 .4"),
    Kind("kite", "red blue yellow green purple pink", "sky", .5, "balloon sun",
         "line ink .04 0 .3 .2 .6 -.1 .8 .15 1; poly c 0 -1 .6 -.4 0 .4 -.6 -.4; poly o 0 -1 .6 -.4 0 -.4; poly o 0 .4 -.6 -.4 0 -.4; "
         "poly c 0 .48 .32 .68 .32 .48 0 .68; poly c -.22 .7 .1 .9 .1 .7 -.22 .9", "yellow blue white red green"),
    Kind("snowman", "white", "ground", .12, "house tree star",
         "mirror line wood .06 .3 .05 .85 -.25; oval c*.94 0 .6 .48 .42; oval c 0 .05 .36 .34; oval c 0 -.45 .27; rect ink -.22 -1 .22 -.68; "
         "rect ink -.36 -.7 .36 -.62; poly beak 0 -.48 .36 -.4 0 -.36; mirror oval ink .1 -.52 .05; oval ink 0 0 .05; oval ink 0 .2 .05", plural="snowmen"),
    Kind("clock", "red black brown blue grey yellow", "any", .1, "lamp chair",
         "oval c 0 0 .95; oval cream*1.5 0 0 .76; spin12 line ink .07 0 -.6 0 -.7; any line ink .11 0 .05 0 -.38; any line ink .08 0 .05 0 -.58"))
NAMES = [kind.name for kind in KINDS]
IDS = [k + 1 + k // 5 for k in range(len(KINDS))]   # category ids with holes, as COCO's
DISTRACTORS = ("oval c 0 0 .7; oval c*1.4 -.25 -.25 .15", "oval c -.5 .2 .4 .34; oval c .05 .2 .55 .44; oval c .55 .2 .38 .3",    # ball, bush
               "rect c -.1 -1 .1 1; rect c*.8 -.4 .88 .4 1", "poly c -.9 .7 0 -.8 .9 .7; poly c*.6 -.2 .7 0 -.1 .2 .7",           # post, tent
               "rect c -.8 -.6 .8 .6; line c*.7 .12 -.8 -.6 .8 .6; line c*.7 .12 -.8 .6 .8 -.6", "spin12 line c .24 -.2 .75 .2 .75",   # crate, ring
               "poly c 0 -.9 .6 0 0 .9 -.6 0", "oval c 0 0 1 .4; line c*.7 .06 -1 0 .9 0", "dome c 0 -.2 .9 -.8",               # lozenge, leaf, bowl
               "spin4 line c .2 0 0 0 -.9", "rect c -.9 -.5 .9 .5; mirror rect c*.7 .2 -.3 .7 0", "line c .14 -1 .5 -.3 -.4 .3 .3 1 -.5")  # cross, wagon, zigzag
SCENERY = {     # upper and lower colour (None: at random), a horizon or not, who is at home there, how captions call it
    "sky": ((120, 180, 235), (190, 220, 245), False, "sun cloud bird kite balloon", "in the sky"),
    "field": ((150, 200, 240), (110, 165, 80), True, "tree flower mushroom house butterfly apple", "on a green field"),
    "sea": ((165, 210, 240), (40, 110, 165), True, "boat fish", "by the sea"),
    "room": ((215, 200, 175), (150, 110, 80), True, "cat cup lamp chair clock", "in a room"),
    "street": ((190, 200, 210), (120, 120, 125), True, "car bus umbrella", "in the street"),
    "snow": ((160, 190, 220), (232, 236, 242), True, "snowman", "in the snow"),
    "night": ((24, 28, 62), (46, 56, 84), False, "moon star", "at night"),
    "plain": (None, None, False, "", "on a plain background"), "noise": (None, None, False, "", "")}
SHORT = ("a photo of {}.", "a picture of {}", "{}", "here we see {}", "an image of {}.", "a drawing of {}.", "{} {home}",
         "a photo of {} {home}.", "a scene with {}", "you can see {}")
LONG = ("in this picture {home} we can see {}.", "a view with several things: {}, all of them {home}.",
        "this is a picture that someone has made of {}, and there is nothing else to tell about it.",
        "look at this image, which has {} {home}", "here is a photo, taken on a fine day, of {} and of what is around it.")


def shade(colour, factor):
    """factor below 1 darkens, above 1 moves towards white by factor - 1."""
    return tuple(int(v * factor if factor <= 1 else v + (255 - v) * (factor - 1)) for v in colour)


def outline(shape, n):
    """The polygons of one shape with its numbers n, in an object's own coordinates: x right, y down, about -1..1."""
    if shape == "line":                             # width, then points: one quadrangle a stretch
        points, polygons = list(zip(n[1::2], n[2::2])), []
        for (u, v), (s, t) in zip(points, points[1:]):
            du, dv = (n[0] / 2 / math.hypot(s - u, t - v) * d for d in (v - t, s - u))
            polygons.append([(u + du, v + dv), (s + du, t + dv), (s - du, t - dv), (u - du, v - dv)])
        return polygons
    if shape == "oval":                             # centre, radius or two radii, tilt
        x, y, rx, ry, tilt = (*n, *(n[2], 0)[len(n) - 3:])
        c, s = math.cos(tilt), math.sin(tilt)
        return [[(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in CIRCLE]]
    if shape == "dome":                             # centre of the flat side, two radii
        return [[(n[0] + n[2] * u, n[1] + n[3] * v) for u, v in CIRCLE[12:] + CIRCLE[:1]]]
    if shape == "crescent":                         # depth of the hollow, which opens to the right
        outer = [(0.95 * u - 0.1, 0.95 * v) for u, v in CIRCLE[3:22]]
        return [outer + [(0.57 - n[0] * v, -0.67 * u) for u, v in CIRCLE[:13]]]
    if shape == "rect":
        return [[(n[0], n[1]), (n[2], n[1]), (n[2], n[3]), (n[0], n[3])]]
    return [list(zip(n[::2], n[1::2]))]             # poly


def stamp(picture, mask, number, art, colours, r, x, y, radius, angle):
    """Draws `art` at (x, y): in colour into the picture, which has twice the size (smooth edges), and as `number` into the mask.
    art: shapes separated by `;`, each `[mirror | spinN | any] shape colour numbers`: also mirrored left to right, N times around
    the centre, or at a random turn. `c*.8` is the main colour c, darker; `a|b` a random choice; ` or ` separates variants."""
    flip, edge, a, b = r.choice((1, -1)), r.random() < 0.4, radius * math.cos(angle), radius * math.sin(angle)
    for row in r.choice(art.split(" or ")).split(";"):
        how, *words = [r.choice(word.split("|")) for word in row.split()]
        if how not in ("mirror", "any") and not how.startswith("spin"):
            how, words = "", [how, *words]
        tint, _, factor = words[1].partition("*")
        tint, around = shade(colours[tint], float(factor or 1)), int(how[4:]) if how.startswith("spin") else 1
        for polygon in outline(words[0], [float(word) for word in words[2:]]):
            copies = [polygon, [(-u, v) for u, v in polygon]] if how == "mirror" else [polygon]
            for turn in [r.random()] if how == "any" else [k / around for k in range(around)]:
                c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
                for copy in copies:
                    turned = [(flip * (u * c - v * s), u * s + v * c) for u, v in copy]
                    points = [(x + a * u - b * v, y + b * u + a * v) for u, v in turned]
                    picture.polygon([(2 * u, 2 * v) for u, v in points], tint, shade(tint, 0.6) if edge else None)
                    mask.polygon(points, number)


@lru_cache(None)
def textures():
    """Two fixed (512, 512, 1) noises with values in about -1..1: soft blotches, and grain. Backgrounds crop them at random."""
    rng, soft = np.random.RandomState(0), np.zeros((512, 512), np.float32)
    for cells, weight in ((8, 0.5), (32, 0.3), (128, 0.3)):
        grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        soft += weight * np.asarray(grid.resize((512, 512), Image.BICUBIC))
    return soft[..., None], rng.uniform(-1, 1, (512, 512, 1)).astype(np.float32)


def background(r, size, scenery):
    """(size, size, 3) uint8: two colours that blend, or meet at a horizon, and noise."""
    by_chance, noisy = [r.uniform(60, 230) for _ in range(3)], scenery == "noise"
    top, bottom = (np.array([v + r.uniform(-18, 18) for v in colour or by_chance], np.float32) for colour in SCENERY[scenery][:2])
    ramp, (soft, grain) = np.linspace(0, 1, size, dtype=np.float32), textures()
    if SCENERY[scenery][2]:
        ramp = np.float32(0.9) * (ramp > r.uniform(0.35, 0.65)) + np.float32(0.1) * ramp
    ramp, (x, y, u, v) = ramp[:, None, None], (r.randint(0, 512 - size) for _ in range(4))
    picture = (top * (1 - ramp) + bottom * ramp + r.uniform(4, 60 if noisy else 22) * soft[y:y + size, x:x + size]
               + r.uniform(2, 50 if noisy else 12) * grain[v:v + size, u:u + size])
    return np.clip(picture, 0, 255).astype(np.uint8)


def choose(r, count):
    """`count` indices into KINDS: one of ten repeats what is there, six keep it company, three come by chance."""
    chosen = [r.randrange(len(KINDS))]
    while len(chosen) < count:
        friend, chance = r.choice(chosen), r.random()
        chosen.append(friend if chance < 0.1 else NAMES.index(r.choice(KINDS[friend].company.split())) if chance < 0.7
                      else r.randrange(len(KINDS)))
    return chosen


def scene(rng, size=256, objects=(1, 6)):
    """One scene. rng: a random.Random, or what seeds one; size: pixels of the square canvas, up to 512; objects: least and most.
    Returns (uint8 array (size, size, 3), list of Box, list of five captions).
    Objects have the same size in pixels on any canvas, so a small canvas holds few."""
    r = rng if isinstance(rng, random.Random) else random.Random(rng)
    wanted = choose(r, r.randint(*objects))
    home = [name for name, row in SCENERY.items() if NAMES[wanted[0]] in row[3].split()]
    scenery = home[0] if r.random() < 0.6 else r.choice(list(SCENERY))
    picture = Image.fromarray(background(r, size, scenery)).resize((2 * size, 2 * size), Image.NEAREST)
    mask = Image.new("L", (size, size))
    pens, placed, drawn = (ImageDraw.Draw(picture), ImageDraw.Draw(mask)), [], []
    jobs = wanted + [None] * r.choice((0, 1, 1, 2, 3) if size > 160 else (0, 0, 1))     # None: a distractor
    r.shuffle(jobs)
    for k in jobs:
        kind = Kind("", " ".join(COLOURS), "any", 3, "", r.choice(DISTRACTORS)) if k is None else KINDS[k]
        low, high = {"sky": (0, 0.55), "ground": (0.4, 1)}.get(kind.place if r.random() < 0.8 else "any", (0, 1))
        for _ in range(8):          # a place that leaves the others mostly visible, up to about a sixth outside; or none
            radius = math.exp(r.uniform(math.log(RADIUS[0]), math.log(RADIUS[1])))
            x, y = (min(max(v * size, 0.7 * radius), size - 0.7 * radius) for v in (r.random(), r.uniform(low, high)))
            if all(math.hypot(x - u, y - v) > CROWD * max(radius, q) + 0.1 * min(radius, q) for u, v, q in placed):
                break
        else:
            continue
        placed.append((x, y, radius))
        colour, number = r.choice(kind.colours.split()), len(placed)
        tint = tuple(min(255, max(0, int(v + r.uniform(-18, 18)))) for v in COLOURS[colour])
        stamp(*pens, number, kind.art, PAINT | {"c": tint, "o": PAINT[r.choice(kind.other.split())]}, r, x, y, radius,
              kind.turn * r.uniform(-1, 1))
        if k is not None:
            drawn.append((k, colour, radius, number, mask.histogram()[number]))
    numbers, boxes, told = np.asarray(mask), [], []
    for k, colour, radius, number, full in drawn:
        ys, xs = np.nonzero(numbers == number)
        if len(ys) >= max(MIN_AREA, VISIBLE * full):
            boxes.append(Box(k, int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1, len(ys)))
            told.append((k, colour, radius, xs.mean() / size, ys.mean() / size))
    if not boxes:                   # all lost to their neighbours: rare; the next numbers of r give another scene
        return scene(r, size, objects)
    return np.asarray(picture.reduce(2)), boxes, captions(r, told, SCENERY[scenery][4])


def captions(r, told, home):
    """Five captions for (kind, colour, radius, x, y) of the labelled objects: short and bare, then longer and fuller."""
    def phrase(k, colour, radius, x, y, detail):
        same = sum(k == other[0] for other in told)
        if same > 1 and r.random() < 0.7:
            return f"{('two', 'three', 'four', 'five', 'six')[same - 2]} {KINDS[k].plural or NAMES[k] + 's'}"
        words = ["small" if radius < 20 else "big" if radius > 34 else "", colour]
        words = [w for w in words if w and r.random() < detail] + [NAMES[k]]
        spots = ["at the top" if y < 0.35 else "at the bottom" if y > 0.65 else "",
                 "on the left" if x < 0.35 else "on the right" if x > 0.65 else ""]
        spots = ([s for s in spots if s] or ["in the middle"]) if r.random() < 0.7 * detail else []
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words, *spots])

    def tell(count, detail):
        some = list({item[0]: item for item in r.sample(told, len(told))}.values())[:count]     # one of a kind
        some = [phrase(*item, detail) for item in some]
        return " and ".join([r.choice((", ", ", and ", " and ")).join(some[:-1]), some[-1]] if some[1:] else some)

    plan = ((1, 0, SHORT), (1, 0.7, SHORT), (2, 0.3, SHORT), (3, 0.6, r.choice((SHORT, LONG))), (6, 0.9, LONG))
    return [" ".join(r.choice(style).format(tell(n, detail), home=home).split()) for n, detail, style in plan]


def seed_of(seed, split, index):
    """The seed of one image. It holds the split's name ("pretrain" is another), so no two splits share a scene."""
    return f"{seed}/{split}/{index}"


def draw(job):
    """job: (split, seed, first, last + 1, size, objects, folder) -> what `scene` gives for each index; where a folder is given,
    the pictures go into it as JPEG instead. At the top level of the module, so that worker processes find it."""
    split, seed, start, stop, size, objects, folder = job
    drawn = []
    for index in range(start, stop):
        picture, boxes, texts = scene(seed_of(seed, split, index), size, objects)
        if folder:
            Image.fromarray(picture).save(f"{folder}/COCO_{split}_{index + 1:012d}.jpg", quality=90)
        drawn.append((None if folder else picture, boxes, texts))
    return drawn


def draw_all(split, count, size, objects=(1, 6), seed=0, workers=None, folder=None):
    """Yields, in order, what `draw` gives for scenes 0..count-1 of a split, from `workers` processes (None: all cores)."""
    jobs = [(split, seed, k, min(k + 50, count), size, objects, folder) for k in range(0, count, 50)]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool, tqdm(total=count, desc=f"drawing {split}", unit="image") as bar:
        for drawn in pool.map(draw, jobs):
            bar.update(len(drawn))
            yield from drawn


def write(root, train=3000, val=1000, test=2000, size=256, seed=0, workers=None):
    """Draws train2014 (`train` images), tune2014 (`val`) and val2014 (`test`) under `root` in COCO's layout.
    A root that holds these very scenes is left as it is; SceneError for one that holds anything else.
    Everything is written beside `root` and renamed at the end: a root is complete or absent."""
    root, counts = Path(root), dict(zip(SPLITS, (train, val, test)))
    if not 64 <= size <= 512 or min(counts.values()) < 1:
        raise SceneError(f"expected at least 1 image a split and 64 to 512 pixels, got {counts} at {size} pixels")
    marker, note = {"version": VERSION, "size": size, "seed": seed, **counts}, root / "scenes.json"
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        found = json.loads(note.read_text()) if note.is_file() else "something else (no scenes.json)"
        if found == marker:
            return
        raise SceneError(f"{root} should hold scenes drawn with {marker}, but holds {found}: delete it or name another root")
    part = root.with_name(f"{root.name}.{os.getpid()}.part")
    try:
        (part / "annotations").mkdir(parents=True)
        for split, count in counts.items():
            (part / split).mkdir()
            annotate(part / "annotations", split, draw_all(split, count, size, seed=seed, workers=workers, folder=part / split), size)
        (part / "scenes.json").write_text(json.dumps(marker))
        if root.exists():
            root.rmdir()
        part.rename(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def annotate(folder, split, drawn, size):
    """Writes instances_<split>.json and captions_<split>.json, with COCO's fields; `drawn` gives (_, boxes, captions)."""
    images, instances, texts = [], [], []
    for i, (_, boxes, found) in enumerate(drawn, 1):
        images.append({"id": i, "file_name": f"COCO_{split}_{i:012d}.jpg", "width": size, "height": size})
        instances += [{"image_id": i, "category_id": IDS[b.kind], "bbox": [b.x, b.y, b.w, b.h], "area": b.area, "iscrowd": 0}
                      for b in boxes]
        texts += [{"image_id": i, "caption": text} for text in found]
    info = {"description": f"drawn by scenes.py, version {VERSION}"}
    for what, rows, more in (("instances", instances, {"categories": [{"id": i, "name": n} for i, n in zip(IDS, NAMES)]}),
                             ("captions", texts, {})):
        rows = [{"id": n, **row} for n, row in enumerate(rows, 1)]
        (folder / f"{what}_{split}.json").write_text(json.dumps({"info": info, "images": images, "annotations": rows, **more}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the embedded data set in COCO's layout.")
    parser.add_argument("--root", default="generated/scenes", help="folder to make; it must not hold anything else")
    parser.add_argument("--train", type=int, default=3000, help="training scenes (train2014)")
    parser.add_argument("--val", type=int, default=1000, help="validation scenes (tune2014)")
    parser.add_argument("--test", type=int, default=2000, help="held-out test scenes (val2014)")
    parser.add_argument("--size", type=int, default=256, help="pixels; objects keep their size, so less means more crowded")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws entirely other scenes")
    parser.add_argument("--workers", type=int, help="processes (all cores if absent); changes nothing but the time")
    try:
        write(**vars(parser.parse_args()))
    except SceneError as error:
        parser.exit(2, f"error: {error}\n")
