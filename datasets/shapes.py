"""What scenes are made of: 24 things and some look-alikes, each written as shapes in a small
language, and the drawing.

A drawing is a list of shapes separated by `;`, each `[mirror | spinN | any] shape colour numbers`,
in the thing's own coordinates: x to the right, y down, -1 to 1.
  line w x y x y ..   a line of width w            oval x y rx [ry [tilt]]   an ellipse    rect x0
                      y0 x1 y1
  poly x y x y ..     a polygon                    dome x y rx ry            its upper half
                      crescent depth
`mirror` draws it also mirrored left to right, `spin8` eight times around the centre, `any` at a
random turn. Colours are `c` (the thing's main colour), `o` (its other colour) or a name of PAINT;
`c*.8` is c darker, `c*1.5` lighter. `a|b` is a random choice, ` or ` separates variants of the
whole drawing.
"""
import math
from typing import NamedTuple

COLOURS = {"red": (208, 48, 44), "orange": (238, 138, 40), "yellow": (243, 208, 60),
           "green": (66, 148, 64),
           "blue": (52, 100, 200), "purple": (136, 74, 168), "pink": (238, 138, 172),
           "brown": (132, 88, 54),
           "white": (242, 240, 234), "grey": (148, 150, 154), "black": (46, 46, 54)}
PAINT = COLOURS | {"ink": (40, 36, 40), "wood": (112, 74, 44), "cream": (245, 238, 214),
                   "glass": (205, 228, 240),
                   "glow": (252, 242, 172), "leaf": (62, 136, 56), "beak": (240, 140, 40),
                   "steel": (188, 188, 194)}
CIRCLE = [(math.cos(k * math.pi / 12), math.sin(k * math.pi / 12)) for k in range(24)]


class Kind(NamedTuple):
    """A category. colours: what its main colour may be. place: where it likes to be. turn: how far
    it rotates, in radians. company: the categories that tend to come with it. art: how to draw it
    (see `stamp`). other: a second colour."""
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
    Kind("moon", "yellow white grey", "sky", .7, "star star cloud",
         "crescent c .5|.65|.8"),
    Kind("cloud", "white grey pink", "sky", .1, "sun umbrella bird",
         "oval c -.5 .1 .38|.45 .36; oval c .5 .12 .36|.42 .34; oval c -.12 -.15 .5 .44; oval c "
         ".28 -.05 .4; oval c*.95 0 .26 .85 .22"),
    Kind("star", "yellow white orange blue red", "sky", 3, "moon moon house",
         "poly c 0 -1 .25 -.34 .95 -.31 .4 .13 .59 .81 0 .42 -.59 .81 -.4 .13 -.95 -.31 -.25 -.34"),
    Kind("tree", "green green orange yellow", "ground", .15, "house bird apple",
         "rect wood -.13 .2 .13 1; poly c*.8 -.75 .5 0 -.2 .75 .5; poly c*.9 -.6 .05 0 -.6 .6 .05; "
         "poly c -.46 -.4 0 -1 .46 -.4 or rect wood -.13 .2 .13 1; mirror oval c .35 -.1 .42; "
         "oval c*.9 0 -.5 .48; oval c*1.1 0 -.1 .45"),
    Kind("flower", "red pink purple yellow white blue orange", "ground", .3,
         "butterfly butterfly tree",
         "line leaf .1 0 0 0 1; oval leaf .25 .7 .26 .1 -.6; spin5|spin6|spin8 oval c 0 -.36 .16 "
         ".26; oval o 0 0 .2", "glow wood"),
    Kind("mushroom", "red brown orange purple", "ground", .25, "tree flower",
         "poly cream -.22 0 .22 0 .3 .95 -.3 .95; dome c 0 .1 .95 .95; oval cream -.5 -.14 .13; "
         "oval cream .05 -.5 .12; oval cream .48 -.18 .12; oval cream -.08 -.1 .1"),
    Kind("house", "white yellow red blue pink brown", "ground", .08, "tree car car",
         "rect o*.8 .35 -.9 .58 -.3; rect c -.78 -.15 .78 .95; poly o -.98 -.12 0 -.95 .98 -.12; "
         "rect wood -.17 .35 .17 .95; mirror rect glow .3 .12 .62 .45 or rect o*.8 .35 -.9 .58 "
         "-.3; rect c -.78 -.15 .78 .95; poly o -.98 -.12 0 -.95 .98 -.12; rect wood -.62 .35 -.28 "
         ".95; rect glow -.05 .12 .25 .45; rect glow .35 .12 .65 .45", "red brown grey black"),
    Kind("car", "red blue green yellow white black grey purple", "ground", .2, "bus house tree",
         "poly c -.5 -.1 -.3 -.5 .28 -.5 .58 -.1; poly glass -.38 -.1 -.24 -.4 -.03 -.4 -.03 -.1; "
         "poly glass .05 -.1 .05 -.4 .23 -.4 .43 -.1; poly c -.98 -.08 .85 -.12 1 .1 1 .36 -1 .36; "
         "rect glow .88 .02 1 .14; mirror oval ink .55 .36 .24; mirror oval steel .55 .36 .11"),
    Kind("bus", "red yellow blue green orange", "ground", .12, "car car umbrella",
         "rect c -1 -.62 1 .5; rect c*1.6 -1 .08 1 .2; rect glass -.9 -.48 -.58 -.06; "
         "rect glass -.48 -.48 -.16 -.06; rect glass -.06 -.48 .26 -.06; rect glass .36 -.48 .68 "
         "-.06; rect steel .76 -.48 .92 .5; mirror oval ink .53 .5 .22; "
         "mirror oval steel .53 .5 .1",
         plural="buses"),
    Kind("boat", "red brown blue white green black", "ground", .25, "fish fish bird",
         "line wood .09 0 -.95 0 .4; poly o .08 -.9 .75 .25 .08 .25; poly o*.9 -.08 -.7 -.6|-.3 "
         ".25 -.08 .25; poly c -1 .36 1 .36 .65 .85 -.65 .85", "white white red yellow orange"),
    Kind("fish", "orange blue red yellow green grey purple pink", "any", .6, "boat boat",
         "poly c*.8 -.4 0 -1 -.45 -.85 0 -1 .45; poly c*.8 -.2 -.3 .1 -.68 .35 -.28; oval c .2 0 "
         ".72 .42; rect c*1.5|c -.1 -.36 .04 .36; oval white .58 -.1 .13; oval ink .61 -.1 .07",
         plural="fish"),
    Kind("bird", "blue red brown black white yellow green", "any", .3, "tree cloud",
         "line beak .06 -.1 .4 -.1 .85; line beak .06 .12 .4 .12 .85; poly c*.75 -.45 .1 -1 -.1 "
         "-.95 .25; oval c -.05 .12 .58 .4 -.25; oval c .48 -.35 .3; poly beak .72 -.45 1.05 -.3 "
         ".72 -.22; poly c*.7 .15 0 -.55 -.5|.1 -.35 .3; oval ink .55 -.42 .07"),
    Kind("cat", "black orange grey white brown", "ground", .15, "chair bird lamp",
         "line c*.85 .16 .4 .85 .85 .7 .9 .2 .72 -.05; oval c 0 .5 .5; mirror poly c*.85 .5 -.98 "
         ".5 -.3 .05 -.65; oval c 0 -.35 .52 .44; mirror oval glow .2 -.42 .11 .13; mirror oval "
         "ink .2 -.42 .05 .11; mirror line c*1.7 .03 .15 -.18 .7 -.12; poly pink -.08 -.25 .08 "
         "-.25 0 -.15"),
    Kind("butterfly", "orange blue yellow purple pink red white", "any", .7, "flower flower",
         "mirror oval c .5 -.35 .5 .36 -.6; mirror oval c*.85 .4 .4 .38 .3 .6; mirror oval o .58 "
         "-.38 .16; mirror line ink .05 0 -.5 .25 -.95; oval ink 0 0 .09 .6",
         "yellow white black blue", "butterflies"),
    Kind("apple", "red green yellow", "any", .4, "cup tree",
         "line wood .12 0 -.4 .1 -.95; oval leaf .36 -.72 .28 .13 -.4; mirror oval c .3 .15 .55 "
         ".72; oval c*1.5 -.45 -.1 .12 .2 .4"),
    Kind("cup", "white blue red green yellow pink", "ground", .2, "chair apple lamp",
         "line c*.85 .15 .5 -.26 .75 -.2 .9 0 .9 .2 .75 .4 .5 .46; poly c -.7 -.5 .6 -.5 .45 .8 "
         "-.55 .8; oval c*1.4 -.05 -.5 .65 .17; oval wood -.05 -.48 .53 .12"),
    Kind("lamp", "yellow white red blue orange green", "ground", .12, "chair clock cat",
         "rect ink*1.3 -.06 -.1 .06 .9; oval ink*1.3 0 .88 .45 .12; poly c -.34 -.95 .34 -.95 .72 "
         "0 -.72 0; oval glow 0 0 .72 .09"),
    Kind("chair", "brown red blue white black green", "ground", .15, "lamp cup cat",
         "rect c*.75 -.6 .2 -.46 1; rect c*.75 .46 .2 .6 1; rect c -.62 -1 -.48 .2; rect c .2 -1 "
         ".34 .1; rect c -.55 -.9 .3 -.76; rect c -.55 -.6 .3 -.46; rect c -.55 -.3 .3 -.16; "
         "poly c*1.15 -.64 .08 .34 .08 .66 .32 -.64 .32"),
    Kind("umbrella", "red blue yellow purple green pink black", "any", .4, "cloud bus",
         "line ink .07 0 -.95 0 .75 .08 .92 .22 .92 .28 .75; dome c 0 .1 .98 .92; poly o 0 -.82 "
         ".33 .1 -.33 .1",
         "white yellow grey black"),
    Kind("balloon", "red blue yellow green pink purple orange", "sky", .2, "kite cat",
         "line ink .04 0 .3 .1 .5 -.1|.1 .75 .1 1; oval c 0 -.32 .54 .66; poly c*.8 0 .26 -.12 .44 "
         ".12 .44; oval c*1.6 -.2 -.6 .1 .18 .4"),
    Kind("kite", "red blue yellow green purple pink", "sky", .5, "balloon sun",
         "line ink .04 0 .3 .2 .6 -.1 .8 .15 1; poly c 0 -1 .6 -.4 0 .4 -.6 -.4; poly o 0 -1 .6 "
         "-.4 0 -.4; poly o 0 .4 -.6 -.4 0 -.4; poly c 0 .48 .32 .68 .32 .48 0 .68; poly c -.22 .7 "
         ".1 .9 .1 .7 -.22 .9",
         "yellow blue white red green"),
    Kind("snowman", "white", "ground", .12, "house tree star",
         "mirror line wood .06 .3 .05 .85 -.25; oval c*.94 0 .6 .48 .42; oval c 0 .05 .36 .34; "
         "oval c 0 -.45 .27; rect ink -.22 -1 .22 -.68; rect ink -.36 -.7 .36 -.62; poly beak 0 "
         "-.48 .36 -.4 0 -.36; mirror oval ink .1 -.52 .05; oval ink 0 0 .05; oval ink 0 .2 .05",
         plural="snowmen"),
    Kind("clock", "red black brown blue grey yellow", "any", .1, "lamp chair",
         "oval c 0 0 .95; oval cream*1.5 0 0 .76; spin12 line ink .07 0 -.6 0 -.7; any line ink "
         ".11 0 .05 0 -.38; any line ink .08 0 .05 0 -.58"))
NAMES = [kind.name for kind in KINDS]
IDS = [k + 1 + k // 5 for k in range(len(KINDS))]  # category ids with holes, as COCO's
DISTRACTORS = (  # unlabelled; most resemble something above
    "oval c 0 0 .7; oval c*1.4 -.25 -.25 .15",  # ball
    "oval c -.5 .2 .4 .34; oval c .05 .2 .55 .44; oval c .55 .2 .38 .3",  # bush, or rock
    "rect c -.1 -1 .1 1; rect c*.8 -.4 .88 .4 1",  # post
    "poly c -.9 .7 0 -.8 .9 .7; poly c*.6 -.2 .7 0 -.1 .2 .7",  # tent
    "rect c -.8 -.6 .8 .6; line c*.7 .12 -.8 -.6 .8 .6; line c*.7 .12 -.8 .6 .8 -.6",  # crate
    "spin12 line c .24 -.2 .75 .2 .75",  # ring
    "poly c 0 -.9 .6 0 0 .9 -.6 0",  # lozenge
    "oval c 0 0 1 .4; line c*.7 .06 -1 0 .9 0",  # leaf
    "dome c 0 -.2 .9 -.8",  # bowl
    "spin4 line c .2 0 0 0 -.9",  # cross
    "rect c -.9 -.5 .9 .5; mirror rect c*.7 .2 -.3 .7 0",  # wagon
    "line c .14 -1 .5 -.3 -.4 .3 .3 1 -.5")  # zigzag


def shade(colour, factor):
    """factor below 1 darkens, above 1 moves towards white by factor - 1."""
    return tuple(int(v * factor if factor <= 1 else v + (255 - v) * (factor - 1)) for v in colour)


def outline(shape, n):
    """The polygons of one shape with its numbers n, in an object's own coordinates: x right, y
    down, about -1..1."""
    if shape == "line":  # width, then points: one quadrangle a stretch
        points, polygons = list(zip(n[1::2], n[2::2])), []
        for (u, v), (s, t) in zip(points, points[1:]):
            du, dv = (n[0] / 2 / math.hypot(s - u, t - v) * d for d in (v - t, s - u))
            polygons.append([(u + du, v + dv), (s + du, t + dv), (s - du, t - dv),
                             (u - du, v - dv)])
        return polygons
    if shape == "oval":  # centre, radius or two radii, tilt
        x, y, rx, ry, tilt = (*n, *(n[2], 0)[len(n) - 3:])
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
    for row in r.choice(art.split(" or ")).split(";"):
        how, *words = [r.choice(word.split("|")) for word in row.split()]
        if how not in ("mirror", "any") and not how.startswith("spin"):
            how, words = "", [how, *words]
        tint, _, factor = words[1].partition("*")
        tint, around = shade(colours[tint],
                             float(factor or 1)), int(how[4:]) if how.startswith("spin") else 1
        for polygon in outline(words[0], [float(word) for word in words[2:]]):
            copies = [polygon, [(-u, v) for u, v in polygon]] if how == "mirror" else [polygon]
            for turn in [r.random()] if how == "any" else [k / around for k in range(around)]:
                c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
                for copy in copies:
                    turned = [(flip * (u * c - v * s), u * s + v * c) for u, v in copy]
                    points = [(x + a * u - b * v, y + b * u + a * v) for u, v in turned]
                    picture.polygon([(2 * u, 2 * v) for u, v in points], tint, shade(tint, 0.6)
                                    if edge else None)
                    mask.polygon(points, number)
