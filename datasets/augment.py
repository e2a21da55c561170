"""From image files to tensors: decoding, the test transform, and the training augmentation of
TaI-DPT, which the paper follows (section 4.1): a random crop or cutout, one of 117 colour and shape
policies, mirroring, CLIP's normalisation.

PIL and numpy only. All randomness comes from the `random.Random` that is passed in. H, W: pixels.
"""
import io
import math
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin

GREY = (128, 128, 128)
TURNED = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
          5: Image.TRANSPOSE,
          6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}  # EXIF's orientation
Image.MAX_IMAGE_PIXELS = 150_000_000  # Pillow refuses twice as many: 300 megapixels are some 1 GB
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # colour profiles and notes of some MB are common
warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF, many pixels: the pixels are fine


def read(source):
    """An image as upright RGB, uint8. source: file name, bytes, file object, PIL image, array.

    Where formats leave a choice: 16-bit grey is scaled to 8 bits (PIL would cut it off at 255);
    transparency is laid over white; of an animation the first frame counts; the camera's
    orientation mark is applied, if it can be read; the format is told from the content, not the
    name. Decoding is full: JPEG's draft mode moves pixels and gains nothing at 640 x 480
    (tests/bench_data.py).
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")
    if isinstance(source, Image.Image):
        return upright(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not hasattr(source, "read") and not os.path.isfile(source):  # a pipe would block forever
        raise ValueError("not a regular file" if os.path.exists(source) else "no such file")
    with Image.open(source) as image:
        image.load()
        if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
            raise ValueError("an image of 32 bits a pixel has no defined white; convert it to 8 "
                             "bits")
        return upright(image)


def turn_of(image):
    """PIL's transposition that the orientation mark of an image asks for, or None."""
    try:
        mark = image.getexif().get(0x0112)
        return TURNED.get(mark[0] if isinstance(mark, tuple) else mark)
    except Exception:  # whatever damaged EXIF makes Pillow raise: no turn
        return None


def upright(image):
    turn = turn_of(image)
    key = image.info.get("transparency")  # a colour that is transparent
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64) // 257
        image = Image.fromarray(deep.clip(0, 255).astype(np.uint8))
        if key is not None:
            image.info["transparency"] = key // 257
    elif isinstance(key, tuple) and max(key) > 255:  # of 16 bits, as its pixels were
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image, size):
    """The test transform: bicubic to size x size, whatever the aspect ratio, no crop."""
    return image.resize((size, size), Image.BICUBIC)


def normalise(image, mean, std):
    """RGB image -> (3, H, W) float32, mean and std of pixels in 0..1. numpy, as torch's threads
    would quarrel with the loader's processes."""
    out = np.empty((3, image.height, image.width), np.float32)
    for plane, band, m, s in zip(out, image.split(), mean, std):
        np.multiply(np.asarray(band), np.float32(1 / (255 * s)), out=plane)
        plane -= np.float32(m / s)
    return torch.from_numpy(out)


def flip(image, rng):
    return image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def random_crop(image, size, rng, smallest=0.5):
    """A part of `smallest`..1 of the area, aspect 3/4..4/3, bicubic to size x size. After ten
    misfits the largest central part of a permitted aspect (torchvision's RandomResizedCrop)."""
    W, H = image.size
    for _ in range(10):
        area, aspect = W * H * rng.uniform(smallest,
                                           1), math.exp(rng.uniform(math.log(3 / 4),
                                                                    math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            x, y = rng.randint(0, W - w), rng.randint(0, H - h)
            break
    else:
        w, h = max(1, min(W, round(H * 4 / 3))), max(1, min(H, round(W / (3 / 4))))
        x, y = (W - w) // 2, (H - h) // 2
    return resize(image.crop((x, y, x + w, y + h)), size)


def cutout(image, rng, factor=0.4):
    """In place: one rectangle of factor x the sides in one random colour, its centre anywhere in
    the image."""
    (W, H), x, y = image.size, rng.randrange(image.size[0]), rng.randrange(image.size[1])
    w, h = int(factor * W + 0.5), int(factor * H + 0.5)
    colour = tuple(rng.randint(0, 255) for _ in range(3))
    box = max(0, x - w // 2), max(0, y - h // 2), min(W, x - w // 2 + w), min(H, y - h // 2 + h)
    image.paste(colour, box)
    return image


# ----
# the 117 policies AutoAugment's 25 ImageNet policies and 92 of its CIFAR-10 ones, as MLC_Policy of
# TaI-DPT has them: each applies its first operation with the first probability, then the second.
# "0.4pos8" = probability 0.4, posterize, level 8. shX shY shear, trX trY translate, rotate, color,
# contrast, sharpness, brightness, posterize, solarize, autocontrast, equalize, invert; level 0..9.
TABLE = """
0.4pos8 0.6rot9 | 0.6sol5 0.6aut5 | 0.8equ8 0.6equ3 | 0.6pos7 0.6pos6 | 0.4equ7 0.2sol4 | 0.4equ4 0.8rot8 |
0.6sol3 0.6equ7 | 0.8pos5 1equ2 | 0.2rot3 0.6sol8 | 0.6equ8 0.4pos6 | 0.8rot8 0.4col0 | 0.4rot9 0.6equ2 |
0equ7 0.8equ8 | 0.6inv4 1equ8 | 0.6col4 1con8 | 0.8rot8 1col2 | 0.8col8 0.8sol7 | 0.4sha7 0.6inv8 | 0.6shX5 1equ9 |
0.4col0 0.6equ3 | 0.4equ7 0.2sol4 | 0.6sol5 0.6aut5 | 0.6inv4 1equ8 | 0.6col4 1con8 | 0.8equ8 0.6equ3 |
0.1inv7 0.2con6 | 0.7rot2 0.3trX9 | 0.8sha1 0.9sha3 | 0.5shY8 0.7trY9 | 0.5aut8 0.9equ2 | 0.4sol5 0.9aut3 |
0.9trY9 0.7trY9 | 0.9aut2 0.8sol3 | 0.8equ8 0.1inv3 | 0.7trY9 0.9aut1 | 0.4sol5 0aut2 | 0.7trY9 0.7trY9 |
0.9aut0 0.4sol3 | 0.7equ5 0.1inv3 | 0.7trY9 0.7trY9 | 0.4sol5 0.9aut1 | 0.8trY9 0.9trY9 | 0.8aut0 0.7trY9 |
0.2trY7 0.9col6 | 0.7equ6 0.4col9 | 0.2shY7 0.3pos7 | 0.4col3 0.6bri7 | 0.3sha9 0.7bri9 | 0.6equ5 0.5equ1 |
0.6con7 0.6sha5 | 0.3bri7 0.5aut8 | 0.9aut4 0.5aut6 | 0.3sol5 0.6equ5 | 0.2trY4 0.3sha3 | 0bri8 0.8col8 |
0.2sol6 0.8col6 | 0.2sol6 0.8aut1 | 0.4sol1 0.6equ5 | 0bri0 0.5sol2 | 0.9aut5 0.5bri3 | 0.7con5 0bri2 |
0.2sol8 0.1sol5 | 0.5con1 0.2trY9 | 0.6aut5 0trY9 | 0.9aut4 0.8equ4 | 0bri7 0.4equ7 | 0.2sol5 0.7equ5 |
0.6equ8 0.6col2 | 0.3col7 0.2col4 | 0.5aut2 0.7sol2 | 0.2aut0 0.1equ0 | 0.6shY5 0.6equ5 | 0.9bri3 0.4aut1 |
0.8equ8 0.7equ7 | 0.7equ7 0.5sol0 | 0.8equ4 0.8trY9 | 0.8trY9 0.6trY9 | 0.9trY0 0.5trY9 | 0.5aut3 0.3sol4 |
0.5sol3 0.4equ4 | 0.7col7 0.5trX8 | 0.3equ7 0.4aut8 | 0.4trY3 0.2sha6 | 0.9bri6 0.2col8 | 0.5sol2 0inv3 |
0.1aut5 0bri0 | 0.7equ7 0.6aut4 | 0.1col8 0.2shY3 | 0.4shY2 0.7rot0 | 0.1shY3 0.9aut5 | 0.5equ0 0.6sol6 |
0.3aut5 0.2rot7 | 0.8equ2 0.4inv0 | 0.9equ5 0.7col0 | 0.1equ1 0.1shY3 | 0.7aut3 0.7equ0 | 0.5bri1 0.1con7 |
0.1con4 0.6sol5 | 0.2sol3 0shX0 | 0.3trX0 0.6trX0 | 0.5equ9 0.6trY7 | 0.1shX0 0.5sha1 | 0.8equ6 0.3inv6 |
0.4shX4 0.9aut2 | 0shX3 0pos3 | 0.4sol3 0.2col4 | 0.1equ4 0.7equ6 | 0.3equ8 0.4aut3 | 0.6sol4 0.7aut6 |
0.2aut9 0.4bri8 | 0.1equ0 0equ6 | 0.8equ4 0equ4 | 0.5equ5 0.1aut2 | 0.5sol5 0.9aut5 | 0.6aut1 0.7aut8 |
0.2equ0 0.1aut2 | 0.6equ9 0.4equ4
"""
POLICIES = [[(float(step[:-4]), step[-4:-1], int(step[-1])) for step in row.split()]
            for row in TABLE.split("|")]

ENHANCE = {"col": ImageEnhance.Color, "con": ImageEnhance.Contrast, "sha": ImageEnhance.Sharpness,
           "bri": ImageEnhance.Brightness}
LEVELS = {"sh": np.linspace(0, 0.3, 10), "tr": np.linspace(0, 150 / 331, 10),
          "rot": np.linspace(0, 30, 10),
          "pos": np.round(np.linspace(8, 4, 10)).astype(int), "sol": np.linspace(256, 0, 10),
          **dict.fromkeys(ENHANCE, np.linspace(0, 0.9, 10))}


def magnitude(operation, level):
    """What a level 0..9 means: slope, share of the side, degrees, change of the factor 1, bits,
    threshold; or None."""
    table = LEVELS.get(operation, LEVELS.get(operation[:2]))
    return None if table is None else table[level].item()


def apply(image, operation, level, rng):
    m = magnitude(operation, level)
    # "sh" takes in sharpness, which is signed as well
    if operation[:2] in ("sh", "tr") or operation in ENHANCE:
        m *= rng.choice((-1, 1))
    if operation in ENHANCE:
        return ENHANCE[operation](image).enhance(1 + m)
    # the output pixel (x, y) is taken from (x + ax y + tx, y + ay x + ty)
    if operation[:2] in ("sh", "tr"):
        ax, tx, ay, ty = {"shX": (m, 0, 0, 0), "trX": (0, m * image.width, 0, 0),
                          "shY": (0, 0, m, 0), "trY": (0, 0, 0, m * image.height)}[operation]
        return image.transform(image.size, Image.AFFINE, (1, ax, tx, ay, 1, ty),
                               Image.BICUBIC if operation[1] == "h" else Image.NEAREST,
                               fillcolor=GREY)
    if operation == "rot":
        return image.rotate(m, fillcolor=GREY)  # always counter-clockwise
    if operation == "pos":
        return ImageOps.posterize(image, m)
    if operation == "sol":
        return ImageOps.solarize(image, m)
    return {"aut": ImageOps.autocontrast, "equ": ImageOps.equalize,
            "inv": ImageOps.invert}[operation](image)


def policy(image, rng):
    """One of the 117 policies."""
    for probability, operation, level in rng.choice(POLICIES):
        if rng.random() < probability:
            image = apply(image, operation, level, rng)
    return image


def taidpt(image, size, rng, smallest_crop=0.5):
    """The training augmentation of the paper's partial-label setting, without the normalisation."""
    if rng.random() < 0.5:
        image = random_crop(image, size, rng, smallest_crop)
    else:
        image = cutout(image.resize((size, size), Image.BILINEAR), rng)
    return flip(policy(image, rng), rng)
