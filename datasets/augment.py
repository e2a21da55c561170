"""From image files to tensors: decoding, the test transform, and the training augmentation of
TaI-DPT, which the paper follows (Sec. 4.1): a random crop or cutout, one of 117 colour and shape
policies, mirroring. All randomness comes from the random.Random that is passed in. H, W: pixels."""
import contextlib
import io
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin

with contextlib.suppress(ImportError):  # HEIC, the photos of iPhones, where the package is there
    from pillow_heif import register_heif_opener
    register_heif_opener()

GREY = (128, 128, 128)
EXIF_TURN = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
             5: Image.TRANSPOSE, 6: Image.ROTATE_270, 7: Image.TRANSVERSE, 8: Image.ROTATE_90}
Image.MAX_IMAGE_PIXELS = 150_000_000  # Pillow refuses twice as many: 300 megapixels are some 1 GB
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20  # profiles, notes
PngImagePlugin.ChunkStream.crc = PngImagePlugin.ChunkStream.crc_skip  # some are damaged
warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF, many pixels: the pixels are fine


def read(source):
    """An image as upright RGB, uint8. source: file name, bytes, file object, PIL image, array. Its
    content tells the format, not its name; of an animation the first frame counts; the camera's
    orientation mark is applied; 16-bit grey is scaled to 8 bits (PIL would cut it off at 255);
    transparency is laid over white. JPEG's draft mode moves pixels and gains nothing."""
    if isinstance(source, np.ndarray):
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        return upright(source)
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not hasattr(source, "read") and not os.path.isfile(source):  # a pipe would block forever
        raise ValueError("not a regular file" if os.path.exists(source) else "no such file")
    with Image.open(source) as image:
        return upright(image)


def refuse_thumbnail(image):
    if getattr(image, "tag_v2", {}).get(254, 0) & 1:  # a TIFF's NewSubfileType
        raise ValueError("its first picture is a thumbnail, as in raw photos; convert it")


def upright(image):
    refuse_thumbnail(image)
    image.load()  # Pillow turns a TIFF here, and its mark goes
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("32 bits a pixel have no defined white; convert it to 8 bits")
    if 0 in image.size:
        raise ValueError("it has no pixels")
    key = image.info.get("transparency")  # a colour that is transparent
    with contextlib.suppress(Exception):  # no mark, or whatever damaged EXIF makes Pillow raise
        image = image.transpose(EXIF_TURN[np.ravel(image.getexif()[0x0112])[0]])
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        if key is not None:
            image.info["transparency"] = key // 257
    elif isinstance(key, tuple) and max(key) > 255:  # of 16 bits, as its pixels were
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image, size):
    """The test transform: bicubic to size x size, whatever the aspect ratio, no crop."""
    return image.resize((size, size), Image.BICUBIC)


def normalise(image, mean, std):
    """RGB image -> (3, H, W) float32; mean and std are of pixels in 0..1. By numpy: torch would
    start threads in each of the loader's processes."""
    out = np.empty((3, image.height, image.width), np.float32)
    for plane, band, m, s in zip(out, image.split(), mean, std):
        np.multiply(np.asarray(band), np.float32(1 / (255 * s)), out=plane)
        plane -= np.float32(m / s)
    return torch.from_numpy(out)


def flip(image, rng):
    return image.transpose(Image.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def random_crop(image, size, rng, smallest=0.5):
    """A part of `smallest`..1 of the area, aspect 3/4..4/3, bicubic to size x size. When ten parts
    do not fit, the largest central one of a permitted aspect (torchvision's RandomResizedCrop)."""
    W, H = image.size
    for _ in range(10):
        area = W * H * rng.uniform(smallest, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            x, y = rng.randint(0, W - w), rng.randint(0, H - h)
            break
    else:
        w, h = max(1, min(W, round(H * 4 / 3))), max(1, min(H, round(W / (3 / 4))))
        x, y = (W - w) // 2, (H - h) // 2
    return resize(image.crop((x, y, x + w, y + h)), size)


def cutout(image, rng, factor=0.4):
    """In place: one rectangle of factor x the sides, in one random colour, centred anywhere."""
    W, H = image.size
    w, h = int(factor * W + 0.5), int(factor * H + 0.5)
    x, y = rng.randrange(W) - w // 2, rng.randrange(H) - h // 2
    image.paste(tuple(rng.randint(0, 255) for _ in range(3)), (x, y, x + w, y + h))
    return image


# ---- the policies

ROWS = Path(__file__).with_name("policies.txt").read_text(encoding="utf-8").splitlines()
POLICIES = [[(float(step[:-4]), step[-4:-1], int(step[-1])) for step in row.split()]
            for row in ROWS if not row.startswith("#")]
ENHANCE = {"col": ImageEnhance.Color, "con": ImageEnhance.Contrast, "sha": ImageEnhance.Sharpness,
           "bri": ImageEnhance.Brightness}
PLAIN = {"aut": ImageOps.autocontrast, "equ": ImageOps.equalize, "inv": ImageOps.invert}
TONES = {"sol": ImageOps.solarize, "pos": ImageOps.posterize}
# Values of the levels 0..9: slope of a shear, shift as a share of the side, factor 1 +- change;
# degrees, threshold of solarize, bits of posterize.
SLOPE, SHIFT, FACTOR = (np.linspace(0, top, 10) for top in (0.3, 150 / 331, 0.9))
SIGNED = {"shX": SLOPE, "shY": SLOPE, "trX": SHIFT, "trY": SHIFT, **dict.fromkeys(ENHANCE, FACTOR)}
LEVELS = SIGNED | {"rot": np.linspace(0, 30, 10), "sol": np.linspace(256, 0, 10),
                   "pos": np.round(np.linspace(8, 4, 10)).astype(int)}


def apply(image, operation, level, rng):
    if operation in PLAIN:
        return PLAIN[operation](image)
    m = LEVELS[operation][level].item()
    if operation in SIGNED:
        m *= rng.choice((-1, 1))
    if operation in ENHANCE:
        return ENHANCE[operation](image).enhance(1 + m)
    if operation in TONES:
        return TONES[operation](image, m)
    if operation == "rot":
        return image.rotate(m, fillcolor=GREY)  # always counter-clockwise
    # the output pixel (x, y) is taken from (a x + b y + c, d x + e y + f)
    matrix = {"shX": (1, m, 0, 0, 1, 0), "trX": (1, 0, m * image.width, 0, 1, 0),
              "shY": (1, 0, 0, m, 1, 0), "trY": (1, 0, 0, 0, 1, m * image.height)}[operation]
    filling = Image.BICUBIC if operation[:2] == "sh" else Image.NEAREST
    return image.transform(image.size, Image.AFFINE, matrix, filling, fillcolor=GREY)


def policy(image, rng):
    """One of the 117 policies."""
    for probability, operation, level in rng.choice(POLICIES):
        if rng.random() < probability:
            image = apply(image, operation, level, rng)
    return image


def transform(image, how, size, rng, smallest_crop):
    """What happens to an image before `normalise`. how: "none", "flip", or the paper's "taidpt"."""
    if how != "taidpt":
        image = resize(image, size)
        return flip(image, rng) if how == "flip" else image
    if rng.random() < 0.5:
        image = random_crop(image, size, rng, smallest_crop)
    else:
        image = cutout(image.resize((size, size), Image.BILINEAR), rng)
    return flip(policy(image, rng), rng)
