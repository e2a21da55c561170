"""Draws the embedded data set: scenes of 24 everyday things, in COCO's own layout, from nothing but a seed.

    python scenes.py --root generated/scenes        # 3,000 train2014, 1,000 tune2014, 2,000 val2014 scenes of 256 px

What makes the scenes hard enough to matter: small things, rotation, occlusion, textured backgrounds, things that keep
company (AFFINITY), and distractors: unlabelled shapes that look alike (a tent is not a house, a ring is not a clock).
Every image has its own seed (seed, split, index), so splits cannot share a scene, and the number of workers changes no byte.

Which objects are labelled: the box and the area are those of the pixels that remain visible at the end; an object of
which less than VISIBLE of the drawn pixels, or fewer than MIN_AREA pixels, remain is not labelled (and not captioned).
Captions name only labelled objects, and mostly not all of them.
"""
import argparse
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

VERSION = 1                        # part of the marker: raise it whenever a change here changes the pictures
SPLITS = ("train2014", "tune2014", "val2014")      # val2014 is the held-out test, as for COCO's peers; tune2014 tunes
VISIBLE, MIN_AREA = 0.4, 60        # share of an object's pixels, and number of pixels, that must stay visible
RADIUS = (14, 46)                  # half the extent of an object in pixels, whatever the size of the canvas
COLOURS = {"red": (208, 48, 44), "orange": (238, 138, 40), "yellow": (243, 208, 60), "green": (66, 148, 64),
           "blue": (52, 100, 200), "purple": (136, 74, 168), "pink": (238, 138, 172), "brown": (132, 88, 54),
           "white": (242, 240, 234), "grey": (148, 150, 154), "black": (46, 46, 54)}
INK, WOOD, CREAM = (40, 36, 40), (112, 74, 44), (245, 238, 214)
CIRCLE = [(math.cos(k * math.pi / 12), math.sin(k * math.pi / 12)) for k in range(24)]


class SceneError(ValueError):
    """A root that cannot be used; one line that says what was expected, what came and what to do."""


class Box(NamedTuple):
    """A labelled object: index into KINDS, the visible pixels' box x, y, w, h, and their number."""
    kind: int
    x: int
    y: int
    w: int
    h: int
    area: int


def shade(colour, factor):
    """factor < 1 darkens, > 1 moves towards white by factor - 1."""
    return tuple(int(v * factor if factor <= 1 else v + (255 - v) * (factor - 1)) for v in colour)


class Pen:
    """Draws shapes given in an object's own coordinates (x right, y down, within about -1..1), moved, turned and scaled,
    both in colour (at twice the size, for smooth edges) and as the object's number in the mask (at its true size)."""

    def __init__(self, picture, mask, number, x, y, radius, angle=0.0, flip=False, edge=False):
        self.picture, self.mask, self.number, self.x, self.y, self.radius = picture, mask, number, x, y, radius
        self.a, self.b = radius * math.cos(angle), radius * math.sin(angle)
        self.sign, self.edge = -1 if flip else 1, edge

    def poly(self, colour, *points):
        points = [(self.x + self.a * self.sign * u - self.b * v, self.y + self.b * self.sign * u + self.a * v)
                  for u, v in points]
        self.picture.polygon([(2 * u, 2 * v) for u, v in points], colour, shade(colour, 0.6) if self.edge else None)
        self.mask.polygon(points, self.number)

    def line(self, colour, width, *points):
        for (u, v), (s, t) in zip(points, points[1:]):
            d = max(math.hypot(s - u, t - v), 1e-6)
            w = max(width, 0.9 / self.radius) / 2            # never thinner than about a pixel
            du, dv = -(t - v) / d * w, (s - u) / d * w
            self.poly(colour, (u + du, v + dv), (s + du, t + dv), (s - du, t - dv), (u - du, v - dv))

    def rect(self, colour, x0, y0, x1, y1):
        self.poly(colour, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def oval(self, colour, x, y, rx, ry=None, tilt=0.0):
        ry, c, s = ry or rx, math.cos(tilt), math.sin(tilt)
        self.poly(colour, *[(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in CIRCLE])


def polar(radius, turn, x=0.0, y=0.0):
    """The point at `turn` (1 = once around, from the top, clockwise)."""
    return x + radius * math.sin(2 * math.pi * turn), y - radius * math.cos(2 * math.pi * turn)


# ---- the things: each takes the pen, its main colour, and a random generator for its variations ----

def sun(p, c, r):
    n = r.choice((8, 10, 12))
    for k in range(n):
        p.poly(shade(c, 0.9), polar(0.5, (k - 0.3) / n), polar(1.0, k / n), polar(0.5, (k + 0.3) / n))
    p.oval(c, 0, 0, 0.58)

def moon(p, c, r):
    outer, depth = [polar(0.95, t / 40, 0.1) for t in range(5, 36)], r.uniform(0.5, 0.85)
    inner = [(0.1 + 0.67 * math.sin(t), -0.67 + depth * abs(math.cos(t))) for t in np.linspace(-math.pi / 2, math.pi / 2, 12)]
    p.poly(c, *[(-v, u) for u, v in outer + inner])          # a ring that opens to the right, closed by a flatter arc

def cloud(p, c, r):
    lump = r.uniform(0.36, 0.48)
    for x, y, s in ((-0.5, 0.1, 0.9), (0.5, 0.12, 0.85), (-0.12, -0.15, 1.15), (0.28, -0.05, 0.9)):
        p.oval(c, x, y, lump * s, lump * s * 0.9)
    p.oval(shade(c, 0.95), 0, 0.26, 0.85, 0.22)

def star(p, c, r):
    inner = r.uniform(0.38, 0.46)
    p.poly(c, *[polar(inner if k % 2 else 1.0, k / 10) for k in range(10)])

def tree(p, c, r):
    p.rect(WOOD, -0.13, 0.2, 0.13, 1.0)
    if r.random() < 0.5:
        for k in range(3):
            p.poly(shade(c, 0.8 + 0.1 * k), (-0.75 + 0.14 * k, 0.5 - 0.45 * k), (0, -0.2 - 0.4 * k), (0.75 - 0.14 * k, 0.5 - 0.45 * k))
    else:
        for x, y, s in ((-0.35, -0.1, 0.42), (0.35, -0.1, 0.42), (0, -0.5, 0.48), (0, -0.1, 0.45)):
            p.oval(shade(c, r.uniform(0.85, 1.1)), x, y, s)

def flower(p, c, r):
    green, n = (58, 130, 56), r.choice((5, 6, 8))
    p.line(green, 0.1, (0, -0.3), (0, 1.0))
    p.oval(green, 0.25, 0.6, 0.26, 0.1, -0.6)
    for k in range(n):
        x, y = polar(0.36, k / n, 0, -0.4)
        p.oval(shade(c, 1.0 if k % 2 else 0.9), x, y, 0.26, 0.16, 2 * math.pi * k / n - math.pi / 2)
    p.oval((250, 214, 70) if c != COLOURS["yellow"] else WOOD, 0, -0.4, 0.19)

def mushroom(p, c, r):
    p.poly(CREAM, (-0.22, -0.1), (0.22, -0.1), (0.3, 0.95), (-0.3, 0.95))
    p.poly(c, *[(0.95 * x, 0.1 + 0.95 * y) for x, y in CIRCLE[12:]], (0.95, 0.1))
    for x, y in ((-0.5, -0.12), (0.05, -0.5), (0.48, -0.18), (-0.1, -0.1)):
        p.oval(CREAM, x, y, 0.12, 0.1)

def house(p, c, r):
    roof = COLOURS[r.choice(("red", "brown", "grey", "black"))]
    p.rect(shade(roof, 0.8), 0.35, -0.9, 0.58, -0.3)
    p.rect(c, -0.78, -0.15, 0.78, 0.95)
    p.poly(roof, (-0.98, -0.12), (0, -0.95), (0.98, -0.12))
    door = r.choice((-0.45, 0.0))
    p.rect(WOOD, door - 0.17, 0.35, door + 0.17, 0.95)
    for x in ((-0.48, 0.48) if door == 0 else (0.1, 0.5)):
        p.rect((250, 240, 170), x - 0.15, 0.12, x + 0.15, 0.45)

def wheel(p, x, y, s):
    p.oval(INK, x, y, s)
    p.oval((190, 190, 195), x, y, s * 0.45)

def car(p, c, r):
    p.poly(c, (-0.5, -0.1), (-0.3, -0.5), (0.28, -0.5), (0.58, -0.1))
    p.poly((205, 228, 240), (-0.38, -0.1), (-0.24, -0.4), (-0.03, -0.4), (-0.03, -0.1))
    p.poly((205, 228, 240), (0.05, -0.1), (0.05, -0.4), (0.23, -0.4), (0.43, -0.1))
    p.poly(c, (-0.98, -0.08), (0.85, -0.12), (1.0, 0.1), (1.0, 0.36), (-1.0, 0.36))
    p.rect((250, 240, 170), 0.88, 0.02, 1.0, 0.14)
    wheel(p, -0.55, 0.36, 0.24)
    wheel(p, 0.55, 0.36, 0.24)

def bus(p, c, r):
    p.rect(c, -1.0, -0.62, 1.0, 0.5)
    p.rect(shade(c, 1.6), -1.0, 0.08, 1.0, 0.2)
    for k in range(4):
        p.rect((205, 228, 240), -0.9 + 0.42 * k, -0.48, -0.58 + 0.42 * k, -0.06)
    p.rect((170, 200, 215), 0.76, -0.48, 0.92, 0.5)
    wheel(p, -0.55, 0.5, 0.22)
    wheel(p, 0.5, 0.5, 0.22)

def boat(p, c, r):
    p.line(WOOD, 0.09, (0, -0.95), (0, 0.4))
    sail = shade(COLOURS[r.choice(("white", "white", "red", "yellow", "orange"))], 1.1)
    p.poly(sail, (0.08, -0.9), (0.75, 0.25), (0.08, 0.25))
    if r.random() < 0.7:
        p.poly(shade(sail, 0.9), (-0.08, -0.7), (-0.6, 0.25), (-0.08, 0.25))
    p.poly(c, (-1.0, 0.36), (1.0, 0.36), (0.65, 0.85), (-0.65, 0.85))

def fish(p, c, r):
    p.poly(shade(c, 0.8), (-0.4, 0), (-1.0, -0.45), (-0.85, 0), (-1.0, 0.45))
    p.poly(shade(c, 0.8), (-0.2, -0.3), (0.1, -0.68), (0.35, -0.28))
    p.oval(c, 0.2, 0, 0.72, 0.42)
    if r.random() < 0.5:
        p.rect(shade(c, 1.5), -0.1, -0.36, 0.04, 0.36)
    p.oval((250, 250, 250), 0.58, -0.1, 0.13)
    p.oval(INK, 0.61, -0.1, 0.07)

def bird(p, c, r):
    for x in (-0.1, 0.12):
        p.line((200, 120, 40), 0.06, (x, 0.4), (x, 0.85))
    p.poly(shade(c, 0.75), (-0.45, 0.1), (-1.0, -0.1), (-0.95, 0.25))
    p.oval(c, -0.05, 0.12, 0.58, 0.4, -0.25)
    p.oval(c, 0.48, -0.35, 0.3)
    p.poly((240, 150, 40), (0.72, -0.45), (1.05, -0.3), (0.72, -0.22))
    p.poly(shade(c, 0.7), (0.15, 0.0), (-0.55, -0.5 if r.random() < 0.5 else 0.1), (-0.35, 0.3))
    p.oval(INK, 0.55, -0.42, 0.07)

def cat(p, c, r):
    p.line(shade(c, 0.85), 0.16, (0.4, 0.85), (0.85, 0.7), (0.9, 0.2), (0.72, -0.05))
    p.oval(c, 0, 0.5, 0.5, 0.5)
    for s in (-1, 1):
        p.poly(shade(c, 0.85), (s * 0.5, -0.98), (s * 0.5, -0.3), (s * 0.05, -0.65))
    p.oval(c, 0, -0.35, 0.52, 0.44)
    for s in (-1, 1):
        p.oval((170, 220, 90), s * 0.2, -0.42, 0.11, 0.13)
        p.oval(INK, s * 0.2, -0.42, 0.05, 0.11)
        p.line(shade(c, 1.7), 0.03, (s * 0.15, -0.18), (s * 0.7, -0.12))
    p.poly((230, 130, 140), (-0.08, -0.25), (0.08, -0.25), (0, -0.15))

def butterfly(p, c, r):
    spot = shade(COLOURS[r.choice(("yellow", "white", "black", "blue"))], 1.0)
    for s in (-1, 1):
        p.oval(c, s * 0.5, -0.35, 0.5, 0.36, s * -0.6)
        p.oval(shade(c, 0.85), s * 0.4, 0.4, 0.38, 0.3, s * 0.6)
        p.oval(spot, s * 0.58, -0.38, 0.16)
        p.line(INK, 0.05, (0, -0.5), (s * 0.25, -0.95))
    p.oval(INK, 0, 0, 0.09, 0.6)

def apple(p, c, r):
    p.line(WOOD, 0.12, (0, -0.4), (0.1, -0.95))
    p.oval((84, 160, 60), 0.36, -0.72, 0.28, 0.13, -0.4)
    p.oval(c, -0.3, 0.15, 0.55, 0.72)
    p.oval(c, 0.3, 0.15, 0.55, 0.72)
    p.oval(shade(c, 1.5), -0.45, -0.1, 0.12, 0.2, 0.4)

def cup(p, c, r):
    p.line(shade(c, 0.85), 0.15, *[(0.5 + 0.42 * math.sin(t), 0.1 - 0.36 * math.cos(t)) for t in (0.0, 0.6, 1.2, 1.9, 2.5, 3.1)])
    p.poly(c, (-0.7, -0.5), (0.6, -0.5), (0.45, 0.8), (-0.55, 0.8))
    p.oval(shade(c, 1.4), -0.05, -0.5, 0.65, 0.17)
    p.oval((92, 58, 38), -0.05, -0.48, 0.53, 0.12)

def lamp(p, c, r):
    p.rect(shade(INK, 1.3), -0.06, -0.1, 0.06, 0.9)
    p.oval(shade(INK, 1.3), 0, 0.88, 0.45, 0.12)
    p.poly(c, (-0.34, -0.95), (0.34, -0.95), (0.72, 0.0), (-0.72, 0.0))
    p.oval((255, 244, 180), 0, 0.0, 0.72, 0.09)

def chair(p, c, r):
    d = shade(c, 0.75)
    p.rect(d, -0.6, 0.2, -0.46, 1.0)
    p.rect(d, 0.46, 0.2, 0.6, 1.0)
    p.rect(c, -0.62, -1.0, -0.48, 0.2)
    p.rect(c, 0.2, -1.0, 0.34, 0.1)
    for y in (-0.9, -0.6, -0.3):
        p.rect(c, -0.55, y, 0.3, y + 0.14)
    p.poly(shade(c, 1.15), (-0.64, 0.08), (0.34, 0.08), (0.66, 0.32), (-0.64, 0.32))

def umbrella(p, c, r):
    p.line(INK, 0.07, (0, -0.95), (0, 0.75), (0.08, 0.92), (0.22, 0.92), (0.28, 0.75))
    other = r.choice((shade(c, 0.75), COLOURS["white"], COLOURS["yellow"]))
    dome = [(0.98 * x, 0.1 + 0.92 * y) for x, y in CIRCLE[12:]] + [(0.98, 0.1)]
    p.poly(c, *dome, (0.65, -0.02), (0.33, 0.1), (0, -0.02), (-0.33, 0.1), (-0.65, -0.02))
    p.poly(other, (0, -0.82), (0.33, 0.1), (0, -0.02), (-0.33, 0.1))

def balloon(p, c, r):
    w = r.uniform(-0.12, 0.12)
    p.line(INK, 0.04, (0, 0.3), (w, 0.5), (-w, 0.75), (w, 1.0))
    p.oval(c, 0, -0.32, 0.54, 0.66)
    p.poly(shade(c, 0.8), (0, 0.26), (-0.12, 0.44), (0.12, 0.44))
    p.oval(shade(c, 1.6), -0.2, -0.6, 0.1, 0.18, 0.4)

def kite(p, c, r):
    other = COLOURS[r.choice(("yellow", "blue", "white", "red", "green"))]
    p.line(INK, 0.04, (0, 0.3), (0.2, 0.6), (-0.1, 0.8), (0.15, 1.0))
    p.poly(c, (0, -1.0), (0.6, -0.4), (0, 0.4), (-0.6, -0.4))
    p.poly(other, (0, -1.0), (0.6, -0.4), (0, -0.4))
    p.poly(other, (0, 0.4), (-0.6, -0.4), (0, -0.4))
    for x, y in ((0.16, 0.58), (-0.06, 0.8)):
        p.poly(c, (x - 0.16, y - 0.1), (x + 0.16, y + 0.1), (x + 0.16, y - 0.1), (x - 0.16, y + 0.1))

def snowman(p, c, r):
    for s in (-1, 1):
        p.line(WOOD, 0.06, (s * 0.3, 0.05), (s * 0.85, -0.25))
    p.oval(shade(c, 0.94), 0, 0.6, 0.48, 0.42)
    p.oval(c, 0, 0.05, 0.36, 0.34)
    p.oval(c, 0, -0.45, 0.27)
    p.rect(INK, -0.22, -1.0, 0.22, -0.68)
    p.rect(INK, -0.36, -0.7, 0.36, -0.62)
    p.poly((240, 130, 40), (0, -0.48), (0.36, -0.4), (0, -0.36))
    for x, y in ((-0.1, -0.52), (0.1, -0.52), (0, 0.0), (0, 0.2)):
        p.oval(INK, x, y, 0.05)

def clock(p, c, r):
    p.oval(c, 0, 0, 0.95)
    p.oval((248, 246, 240), 0, 0, 0.76)
    for k in range(12):
        p.line(INK, 0.07, polar(0.6, k / 12), polar(0.7, k / 12))
    hour = r.random()
    p.line(INK, 0.11, (0, 0), polar(0.38, hour))
    p.line(INK, 0.08, (0, 0), polar(0.58, hour * 12))


class Kind(NamedTuple):
    """A category: how it is drawn, the colours it comes in, where it likes to be, how far it may turn (radians)."""
    name: str
    draw: callable
    colours: str
    place: str
    turn: float
    plural: str

    @property
    def id(self):
        """COCO-style category ids: from 1, with holes."""
        index = NAMES.index(self.name)
        return index + 1 + index // 5


def kind(draw, colours, place, turn=0.15, plural=None):
    return Kind(draw.__name__, draw, colours, place, turn, plural or draw.__name__ + "s")


KINDS = (
    kind(sun, "yellow orange red", "sky", 3), kind(moon, "yellow white grey", "sky", 0.7),
    kind(cloud, "white grey pink", "sky", 0.1), kind(star, "yellow white orange blue red", "sky", 3),
    kind(tree, "green green orange yellow", "ground"), kind(flower, "red pink purple yellow white blue orange", "ground", 0.3),
    kind(mushroom, "red brown orange purple", "ground", 0.25), kind(house, "white yellow red blue pink brown", "ground", 0.08),
    kind(car, "red blue green yellow white black grey purple", "ground", 0.2),
    kind(bus, "red yellow blue green orange", "ground", 0.12, "buses"),
    kind(boat, "red brown blue white green black", "ground", 0.25), kind(fish, "orange blue red yellow green grey purple pink", "any", 0.6, "fish"),
    kind(bird, "blue red brown black white yellow green", "any", 0.3), kind(cat, "black orange grey white brown", "ground"),
    kind(butterfly, "orange blue yellow purple pink red white", "any", 0.7, "butterflies"),
    kind(apple, "red green yellow", "any", 0.4), kind(cup, "white blue red green yellow pink", "ground", 0.2),
    kind(lamp, "yellow white red blue orange green", "ground", 0.12), kind(chair, "brown red blue white black green", "ground", 0.15),
    kind(umbrella, "red blue yellow purple green pink black", "any", 0.4),
    kind(balloon, "red blue yellow green pink purple orange", "sky", 0.2), kind(kite, "red blue yellow green purple pink", "sky", 0.5),
    kind(snowman, "white", "ground", 0.12, "snowmen"), kind(clock, "red black brown blue grey yellow", "any", 0.1))
NAMES = [k.name for k in KINDS]
AFFINITY = {    # who keeps whose company: the next object is drawn from a present object's row six times in ten
    "sun": "cloud kite flower", "moon": "star star cloud", "cloud": "sun umbrella bird", "star": "moon moon house",
    "tree": "house bird apple", "flower": "butterfly butterfly tree", "mushroom": "tree flower", "house": "tree car car",
    "car": "bus house tree", "bus": "car car umbrella", "boat": "fish fish bird", "fish": "boat boat", "bird": "tree cloud",
    "cat": "chair bird lamp", "butterfly": "flower flower", "apple": "cup tree", "cup": "chair apple lamp",
    "lamp": "chair clock cat", "chair": "lamp cup cat", "umbrella": "cloud bus", "balloon": "kite cat", "kite": "balloon sun",
    "snowman": "house tree star", "clock": "lamp chair"}
SCENERY = {     # background -> who is at home there, how captions call it
    "sky": ("sun cloud bird kite balloon", "in the sky"), "field": ("tree flower mushroom house butterfly apple", "on a green field"),
    "sea": ("boat fish", "by the sea"), "room": ("cat cup lamp chair clock", "in a room"), "street": ("car bus umbrella", "in the street"),
    "snow": ("snowman", "in the snow"), "night": ("moon star", "at night"), "plain": ("", "on a plain background"), "noise": ("", "")}


def distractor(p, c, r):
    """Unlabelled look-alikes, one each: ball, bush or rock, pole, tent, crate, ring, lozenge, leaf, bowl, moon-like ring, cone."""
    shape = r.randrange(10)
    if shape == 0:
        p.oval(c, 0, 0, 0.7)
        p.oval(shade(c, 1.4), -0.25, -0.25, 0.15)
    elif shape == 1:
        for x, s in ((-0.5, 0.4), (0.05, 0.55), (0.55, 0.38)):
            p.oval(shade(c, 0.9), x, 0.2, s, s * 0.8)
    elif shape == 2:
        p.rect(c, -0.1, -1.0, 0.1, 1.0)
        p.rect(shade(c, 0.8), -0.4, 0.88, 0.4, 1.0)
    elif shape == 3:
        p.poly(c, (-0.9, 0.7), (0, -0.8), (0.9, 0.7))
        p.poly(shade(c, 0.6), (-0.2, 0.7), (0, -0.1), (0.2, 0.7))
    elif shape == 4:
        p.rect(c, -0.8, -0.6, 0.8, 0.6)
        p.line(shade(c, 0.7), 0.12, (-0.8, -0.6), (0.8, 0.6))
        p.line(shade(c, 0.7), 0.12, (-0.8, 0.6), (0.8, -0.6))
    elif shape == 5:
        p.line(c, 0.24, *[polar(0.75, k / 12) for k in range(13)])
    elif shape == 6:
        p.poly(c, (0, -0.9), (0.6, 0), (0, 0.9), (-0.6, 0))
    elif shape == 7:
        p.poly(c, (-1.0, 0), (-0.4, -0.4), (0.3, -0.38), (1.0, 0), (0.3, 0.38), (-0.4, 0.4))
        p.line(shade(c, 0.7), 0.06, (-1.0, 0), (0.9, 0))
    elif shape == 8:
        p.poly(c, *[(0.9 * x, -0.2 + 0.8 * y) for x, y in CIRCLE[:13]])
    else:
        for k in range(4):
            p.line(c, 0.2, (0, 0), polar(0.9, k / 4 + 0.06))


@lru_cache(None)
def tiles():
    """Two fixed 512 x 512 x 1 noises with values in about -1..1: soft blotches, and grain. Backgrounds crop them at random."""
    rng, soft = np.random.RandomState(0), np.zeros((512, 512), np.float32)
    for cells, weight in ((8, 0.5), (32, 0.3), (128, 0.3)):
        grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        soft += weight * np.asarray(grid.resize((512, 512), Image.BICUBIC))
    return soft[..., None], rng.uniform(-1, 1, (512, 512, 1)).astype(np.float32)


def background(r, size, scenery):
    """(size, size, 3) uint8: two colours that meet at a horizon or blend, plus noise."""
    def jitter(colour, by=18):
        return np.array([v + r.uniform(-by, by) for v in colour], np.float32)
    any_colour = [r.uniform(60, 230) for _ in range(3)]
    top, bottom = {"sky": ((120, 180, 235), (190, 220, 245)), "field": ((150, 200, 240), (110, 165, 80)),
                   "sea": ((165, 210, 240), (40, 110, 165)), "room": ((215, 200, 175), (150, 110, 80)),
                   "street": ((190, 200, 210), (120, 120, 125)), "snow": ((160, 190, 220), (232, 236, 242)),
                   "night": ((24, 28, 62), (46, 56, 84))}.get(scenery, (any_colour, any_colour))
    top, bottom, ramp = jitter(top), jitter(bottom), np.linspace(0, 1, size, dtype=np.float32)
    if scenery in ("field", "sea", "room", "street", "snow"):
        ramp = (ramp > r.uniform(0.35, 0.65)) * np.float32(0.9) + 0.1 * ramp
    ramp, (soft, grain) = ramp[:, None, None], tiles()
    x, y, u, v = (r.randrange(512 - size) if size < 512 else 0 for _ in range(4))
    rough = 45 if scenery == "noise" else r.uniform(4, 22)
    picture = (top * (1 - ramp) + bottom * ramp + rough * soft[y:y + size, x:x + size]
               + r.uniform(2, 12 if scenery != "noise" else 40) * grain[v:v + size, u:u + size])
    return np.clip(picture, 0, 255).astype(np.uint8)


def choose(r, count):
    """`count` indices into KINDS; company comes by AFFINITY, one in ten repeats what is there."""
    chosen = [r.randrange(len(KINDS))]
    while len(chosen) < count:
        friend, chance = r.choice(chosen), r.random()
        chosen.append(friend if chance < 0.1 else NAMES.index(r.choice(AFFINITY[NAMES[friend]].split()))
                      if chance < 0.7 else r.randrange(len(KINDS)))
    return chosen


def where(r, place, size, radius):
    """A centre: sky things mostly above, ground things mostly below; up to a quarter of the extent may leave the canvas."""
    low, high = {"sky": (0.0, 0.55), "ground": (0.4, 1.0)}.get(place if r.random() < 0.8 else "any", (0.0, 1.0))
    inset = 0.7 * radius
    return r.uniform(inset, size - inset), min(max(r.uniform(low, high) * size, inset), size - inset)


def scene(rng, size=256, objects=(1, 6)):
    """One scene. rng: a random.Random, or anything that seeds one; size: pixels of the square canvas (up to 512);
    objects: fewest and most objects. Returns (uint8 array (size, size, 3), list of Box, list of captions).
    Objects have the same size in pixels on any canvas, so a small canvas holds few."""
    r = rng if isinstance(rng, random.Random) else random.Random(rng)
    wanted = choose(r, r.randint(*objects))
    home = [s for s, (who, _) in SCENERY.items() if NAMES[wanted[0]] in who.split()]
    scenery = home[0] if home and r.random() < 0.6 else r.choice(list(SCENERY))
    picture = Image.fromarray(background(r, size, scenery)).resize((2 * size, 2 * size), Image.NEAREST)
    mask = Image.new("L", (size, size))
    pens = ImageDraw.Draw(picture), ImageDraw.Draw(mask)
    jobs = wanted + [None] * r.choice((0, 1, 1, 2, 3) if size > 160 else (0, 0, 1))
    r.shuffle(jobs)
    placed, drawn = [], []                          # (x, y, radius) of all, (kind, colour, radius, number) of the labelled
    for k in jobs:
        thing = KINDS[k] if k is not None else None
        for _ in range(8):                          # a place that leaves most of what is there visible, or none
            radius = math.exp(r.uniform(math.log(RADIUS[0]), math.log(RADIUS[1])))
            x, y = where(r, thing.place if thing else "any", size, radius)
            if all(math.hypot(x - u, y - v) > 0.9 * max(radius, q) + 0.1 * min(radius, q) for u, v, q in placed):
                break
        else:
            continue
        colour = r.choice(thing.colours.split()) if thing else r.choice(list(COLOURS))
        tint = tuple(min(255, max(0, int(v + r.uniform(-18, 18)))) for v in COLOURS[colour])
        turn = (thing.turn if thing else 3) * r.uniform(-1, 1)
        placed.append((x, y, radius))
        pen = Pen(*pens, len(placed), x, y, radius, turn, r.random() < 0.5, r.random() < 0.4)
        (thing.draw if thing else distractor)(pen, tint, r)
        if thing:
            drawn.append((k, colour, radius, len(placed), mask.histogram()[len(placed)]))
    numbers, boxes, told = np.asarray(mask), [], []
    for k, colour, radius, number, full in drawn:
        ys, xs = np.nonzero(numbers == number)
        if len(ys) >= max(MIN_AREA, VISIBLE * full):
            x, y = int(xs.min()), int(ys.min())
            boxes.append(Box(k, x, y, int(xs.max()) - x + 1, int(ys.max()) - y + 1, len(ys)))
            told.append((k, colour, radius, (xs.mean() / size, ys.mean() / size)))
    if not boxes:                                   # all lost to the border or to a neighbour: rare, so draw another
        return scene(r, size, objects)
    return np.asarray(picture.reduce(2)), boxes, captions(r, told, SCENERY[scenery][1])


def captions(r, told, home):
    """Five captions from (kind, colour, radius, centre) of the labelled objects: bare and short, then longer and fuller."""
    def article(words):
        return ("an " if words[0] in "aeiou" else "a ") + words

    def phrase(k, colour, radius, centre, detail):
        same = sum(k == other[0] for other in told)
        if same > 1 and r.random() < 0.7:
            return f"{('two', 'three', 'four', 'five', 'six')[same - 2]} {KINDS[k].plural}"
        extent = "small" if radius < 20 else "big" if radius > 34 else ""
        words = " ".join(w for w in (extent if r.random() < detail else "", colour if r.random() < detail else "",
                                     KINDS[k].name) if w)
        (x, y), spot = centre, []
        if r.random() < detail * 0.7:
            spot = ["at the top" if y < 0.35 else "at the bottom" if y > 0.65 else "",
                    "on the left" if x < 0.35 else "on the right" if x > 0.65 else ""]
            spot = [s for s in spot if s] or ["in the middle"]
        return " ".join([article(words)] + spot)

    def tell(count, detail):
        seen, some = set(), []
        for item in r.sample(told, len(told)):
            if item[0] not in seen and len(some) < count:
                seen.add(item[0])
                some.append(phrase(*item, detail))
        return some[0] if len(some) == 1 else r.choice((", ", ", and ", " and ")).join(some[:-1]) + " and " + some[-1]

    short = ("a photo of {}.", "a picture of {}", "{}", "here we see {}", "an image of {}.", "a drawing of {}.", "{} {home}",
             "a photo of {} {home}.", "a scene with {}", "you can see {}")
    long = ("in this picture {home} we can see {}.", "a view with several things: {}, all of them {home}.",
            "this is a picture that someone has made of {}, and there is nothing else to tell about it.",
            "look at this image, which has {} {home}", "here is a photo, taken on a fine day, of {} and of what is around it.")
    plan = ((1, 0.0, short), (1, 0.7, short), (2, 0.3, short), (3, 0.6, long if r.random() < 0.5 else short), (6, 0.9, long))
    return [" ".join(r.choice(style).format(tell(n, detail), home=home).split()) for n, detail, style in plan]


def seed_of(seed, split, index):
    """The seed of one image. It holds the split's name, so no two splits share a scene."""
    return f"{seed}/{split}/{index}"


def _draw(job):
    """Worker: draws scenes start..stop of a split into `folder`; returns per image its boxes and captions."""
    folder, seed, split, start, stop, size = job
    told = []
    for index in range(start, stop):
        picture, boxes, texts = scene(seed_of(seed, split, index), size)
        Image.fromarray(picture).save(f"{folder}/COCO_{split}_{index + 1:012d}.jpg", quality=90)
        told.append((boxes, texts))
    return told


def write(root, train=3000, val=1000, test=2000, size=256, seed=0, workers=None):
    """Draws train2014 (`train` images), tune2014 (`val`) and val2014 (`test`) under `root` in COCO's layout.
    A root that holds the same scenes already is left as it is; SceneError for one that holds anything else.
    Everything is written beside `root` first and renamed at the end, so a root is complete or absent."""
    root, counts = Path(root), dict(zip(SPLITS, (train, val, test)))
    marker = {"version": VERSION, "size": size, "seed": seed, **counts}
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        found = json.loads((root / "scenes.json").read_text()) if (root / "scenes.json").is_file() else "no scenes.json"
        if found == marker:
            return
        raise SceneError(f"{root}: expected scenes drawn with {marker}, found {found}: delete it or name another --root")
    part = root.with_name(f"{root.name}.{os.getpid()}.part")
    try:
        (part / "annotations").mkdir(parents=True)
        for split in SPLITS:
            (part / split).mkdir()
        jobs = [(str(part / s), seed, s, k, min(k + 50, n), size) for s, n in counts.items() for k in range(0, n, 50)]
        done = {s: [] for s in SPLITS}
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool, \
                tqdm(total=sum(counts.values()), desc="drawing scenes", unit="image") as bar:
            for job, told in zip(jobs, pool.map(_draw, jobs)):
                done[job[2]] += told
                bar.update(len(told))
        for split, told in done.items():
            _annotate(part / "annotations", split, told, size)
        (part / "scenes.json").write_text(json.dumps(marker))
        if root.exists():
            root.rmdir()
        part.rename(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _annotate(folder, split, told, size):
    """instances_<split>.json and captions_<split>.json, with COCO's fields."""
    images = [{"id": i + 1, "file_name": f"COCO_{split}_{i + 1:012d}.jpg", "width": size, "height": size}
              for i in range(len(told))]
    boxes = [(i + 1, box) for i, (found, _) in enumerate(told) for box in found]
    instances = [{"id": n + 1, "image_id": i, "category_id": KINDS[b.kind].id, "bbox": [b.x, b.y, b.w, b.h],
                  "area": b.area, "iscrowd": 0} for n, (i, b) in enumerate(boxes)]
    texts = [(i + 1, text) for i, (_, found) in enumerate(told) for text in found]
    info = {"description": f"drawn by scenes.py, version {VERSION}"}
    for kind_of, rows, more in (("instances", instances, {"categories": [{"id": k.id, "name": k.name} for k in KINDS]}),
                                ("captions", [{"id": n + 1, "image_id": i, "caption": t} for n, (i, t) in enumerate(texts)], {})):
        (folder / f"{kind_of}_{split}.json").write_text(json.dumps({"info": info, "images": images, "annotations": rows, **more}))


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
        sys.exit(f"error: {error}")
