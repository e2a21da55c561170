"""Draws the things that scenes are made of. scenes.ini lists them, and explains its language."""
import configparser
import math
from collections import namedtuple
from pathlib import Path

INI = configparser.ConfigParser(interpolation=None)
INI.read(Path(__file__).with_name("scenes.ini"), encoding="utf-8")
COLOURS = {name: tuple(map(int, rgb.split())) for name, rgb in INI["colours"].items()}
PAINT = COLOURS | {name: tuple(map(int, rgb.split())) for name, rgb in INI["paint"].items()}
CIRCLE = [(math.cos(k * math.pi / 12), math.sin(k * math.pi / 12)) for k in range(24)]
# a category, or a look-alike; scenes.ini says what the fields mean
Kind = namedtuple("Kind", "name art colours other place turn company plural",
                  defaults=(" ".join(COLOURS), "white", "any", "3", "", ""))


def sections(title):
    """The sections [title name] of scenes.ini -> {name: {key: value}}."""
    return {key.split()[1]: dict(INI[key]) for key in INI if key.startswith(title + " ")}


KINDS = [Kind(name, **fields) for name, fields in sections("thing").items()]
DISTRACTORS = [Kind(name, **fields) for name, fields in sections("look-alike").items()]
NAMES = [kind.name for kind in KINDS]
IDS = [k + 1 + k // 5 for k in range(len(KINDS))]  # category ids with holes, as COCO's


def shade(colour, factor):
    """factor below 1 darkens, above 1 moves towards white by factor - 1."""
    return tuple(int(v * factor if factor <= 1 else v + (255 - v) * (factor - 1)) for v in colour)


def outline(shape, n):
    """The polygons of one shape with its numbers n, in the thing's own coordinates."""
    if shape == "line":  # width, then points: one quadrangle per stretch
        points, polygons = list(zip(n[1::2], n[2::2])), []
        for (u, v), (s, t) in zip(points, points[1:]):
            half = n[0] / 2 / math.hypot(s - u, t - v)
            du, dv = half * (v - t), half * (s - u)
            polygons.append([(u + du, v + dv), (s + du, t + dv), (s - du, t - dv),
                             (u - du, v - dv)])
        return polygons
    if shape == "oval":  # centre, radius or two radii, tilt
        x, y, rx = n[:3]
        ry = n[3] if len(n) > 3 else rx
        tilt = n[4] if len(n) > 4 else 0
        c, s = math.cos(tilt), math.sin(tilt)
        return [[(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in CIRCLE]]
    if shape == "dome":  # centre of the flat side, two radii
        return [[(n[0] + n[2] * u, n[1] + n[3] * v) for u, v in CIRCLE[12:] + CIRCLE[:1]]]
    if shape == "crescent":  # depth of the hollow, which opens to the right
        outer = [(0.95 * u - 0.1, 0.95 * v) for u, v in CIRCLE[3:22]]
        return [outer + [(0.57 - n[0] * v, -0.67 * u) for u, v in CIRCLE[:13]]]
    if shape == "rect":
        return [[(n[0], n[1]), (n[2], n[1]), (n[2], n[3]), (n[0], n[3])]]
    return [list(zip(n[::2], n[1::2]))]  # poly


def stamp(picture, mask, number, art, colours, r, x, y, radius, angle):
    """Draws `art` at (x, y) with two ImageDraw pens: in colour into the picture, which has twice
    the size for smooth edges, and as `number` into the mask. colours: PAINT with "c" and "o";
    radius in pixels of the mask; r: a random.Random."""
    flip = r.choice((1, -1))
    edge = r.random() < 0.4
    a, b = radius * math.cos(angle), radius * math.sin(angle)
    for row in r.choice(art.split("\nor\n")).split("\n"):
        how, *words = [r.choice(word.split("|")) for word in row.split()]
        copies = [(1, 0)]  # mirrored (-1) or not, and which part of a full turn
        if how == "mirror":
            copies = [(1, 0), (-1, 0)]
        elif how == "any":
            copies = [(1, r.random())]
        elif how.startswith("spin"):
            copies = [(1, k / int(how[4:])) for k in range(int(how[4:]))]
        else:
            words = [how, *words]
        shape, tint, *numbers = words
        name, _, factor = tint.partition("*")
        tint = shade(colours[name], float(factor or 1))
        for polygon in outline(shape, [float(word) for word in numbers]):
            for side, turn in copies:
                c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
                turned = [(flip * (side * u * c - v * s), side * u * s + v * c) for u, v in polygon]
                points = [(x + a * u - b * v, y + b * u + a * v) for u, v in turned]
                picture.polygon([(2 * u, 2 * v) for u, v in points], tint,
                                shade(tint, 0.6) if edge else None)
                mask.polygon(points, number)
