"""Photos as people have them: read rightly, or refused with the reason."""
import copy
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import augment
import data
import fake_datasets as fake
from support import UserError


def png(chunks):
    body = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        body += (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )
    return body


def image_file(folder, case):
    path = folder / f"{case}.jpg"
    fake.photo(path, 1, (64, 48))
    whole = path.read_bytes()
    if case == "missing":
        path.unlink()
    elif case == "folder":
        path.unlink()
        path.mkdir()
    elif case == "zero bytes":
        path.write_bytes(b"")
    elif case == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif case == "text":
        path.write_text("<html>404 not found</html>")
    elif case == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif case == "link loop":
        path.unlink()
        path.symlink_to(path)
    elif case == "bomb":
        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        path.write_bytes(
            png([(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")])
        )
    elif case == "bad zlib":
        header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
        path.write_bytes(png([(b"IHDR", header), (b"IDAT", b"nonsense" * 20), (b"IEND", b"")]))
    elif case == "float tiff":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(path, "TIFF")
    return path


REFUSED = {
    "missing": "no such file",
    "folder": "not a regular file",
    "zero bytes": "cannot identify",
    "truncated": "truncated",
    "text": "cannot identify",
    "pipe": "not a regular file",
    "link loop": "no such file",
    "bomb": "decompression bomb",
    "bad zlib": "not a readable image",
    "float tiff": "32 bits",
}


@pytest.mark.parametrize("case,workers", [*((case, 0) for case in REFUSED), ("truncated", 1)])
def test_unreadable_images(tmp_path, case, workers):
    path, none = image_file(tmp_path, case), np.zeros((1, 1), np.int8)
    images = data.Images(data.Split("x/train", [str(path)], ["a"], none), 32, "taidpt")
    with pytest.raises(UserError, match=REFUSED[case]) as error:
        next(iter(DataLoader(images, num_workers=workers)))
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("source", (b"no image " * 1000, {"image": None}, torch.zeros(3, 99, 99)))
def test_what_is_no_image_is_named_by_its_type(source):
    """A row of Hugging Face's datasets, say: its content would fill the screen."""
    images = data.Images(data.Split("x", [source], ["a"], np.zeros((1, 1), np.int8)), 32)
    with pytest.raises(UserError, match=f"^{type(source).__name__}: not a readable") as error:
        images[0]
    assert len(str(error.value)) < 200


def test_formats_with_a_documented_treatment(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    colour = Image.fromarray(np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8))

    def read(image, kind, **options):
        image.save(tmp_path / "x.jpg", kind, **options)  # the name says jpg whatever is inside
        out = augment.read(tmp_path / "x.jpg")
        assert out.mode == "RGB"
        return np.asarray(out).astype(int)

    assert (read(colour, "PNG") == np.asarray(colour)).all()  # a PNG named jpg
    assert (read(colour, "BMP") == np.asarray(colour)).all()
    assert (read(grey, "PNG")[..., 0] == np.asarray(grey)).all()
    # 16 bits: scaled, not cut off at 255
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert (read(wide, "PNG")[..., 1] == np.asarray(grey)).all()
    assert (read(wide, "TIFF")[..., 1] == np.asarray(grey)).all()
    cmyk = read(colour.resize((64, 64), Image.BICUBIC).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(cmyk - np.asarray(colour.resize((64, 64), Image.BICUBIC))).mean() < 12
    frames = [Image.new("P", (8, 8), c) for c in (0, 1)]
    for frame in frames:
        frame.putpalette([10, 200, 30, 250, 0, 0] + [0] * 762)
    # first frame
    assert (read(frames[0], "GIF", save_all=True, append_images=frames[1:]) == (10, 200, 30)).all()
    clear = colour.convert("RGBA")
    clear.putalpha(0)
    assert (read(clear, "PNG") == 255).all()  # transparent is white, not what it hides
    half = Image.new("LA", (4, 4), (0, 128))
    assert np.abs(read(half, "PNG") - 127).max() <= 1
    palette = colour.convert("P")
    assert (read(palette, "PNG", transparency=palette.getpixel((3, 5)))[5, 3] == 255).all()
    with pytest.raises(ValueError, match="no pixels"):
        augment.read(Image.new("RGB", (0, 5)))
    alpha = clear.quantize(4)  # whose palette is of RGBA
    assert (np.asarray(augment.read(alpha)) == 255).all()
    assert (read(Image.new("1", (4, 4), 1), "PNG") == 255).all()
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    turned = read(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert turned.shape == (40, 20, 3)
    Image.new("RGB", (40, 20)).save(tmp_path / "x.tif", exif=exif)  # Pillow turns it itself
    with Image.open(tmp_path / "x.tif") as opened:
        assert augment.read(opened).size == augment.read(tmp_path / "x.tif").size == (20, 40)
    tiny = data.Split("x/train", [str(tmp_path / "x.jpg")], ["a"], np.zeros((1, 1), np.int8))
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "x.jpg", "PNG")
    assert data.Images(tiny, 32, "taidpt")[0][0].shape == (3, 32, 32)
    Image.new("RGB", (3000, 2), (9, 9, 9)).save(tmp_path / "x.jpg", "PNG")
    assert data.Images(tiny, 32, "taidpt")[(5, 0)][0].shape == (3, 32, 32)


def test_a_transparent_colour_of_16_bits_is_that_colour_in_8():
    pixel, header = struct.pack(">3H", 300, 400, 500), struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    for key, seen in ((300, 255), (900, 1)):
        file = png([(b"IHDR", header), (b"tRNS", struct.pack(">3H", key, 400, 500)),
                    (b"IDAT", zlib.compress(b"\0" + pixel)), (b"IEND", b"")])
        assert np.asarray(augment.read(file)).tolist() == [[[seen] * 3]]


def test_photos_with_large_notes_or_odd_exif_are_read(tmp_path):
    """A 3 MiB note in a PNG, an orientation mark that does not exist."""
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    fake.photo(tmp_path / "a.png", 0)
    raw = (tmp_path / "a.png").read_bytes()
    note = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * (3 << 20)))
    (tmp_path / "note.png").write_bytes(raw[:33] + note + raw[33:])
    assert augment.read(tmp_path / "note.png").size == augment.read(tmp_path / "a.png").size
    image = Image.open(tmp_path / "a.png").convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 9
    image.save(tmp_path / "odd.jpg", exif=exif)
    assert augment.read(tmp_path / "odd.jpg").size == image.size


def test_pixels_of_32_bits_are_refused_wherever_they_come_from(tmp_path):
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "x.tiff")
    for source in (grey, Image.fromarray(grey), tmp_path / "x.tiff"):
        with pytest.raises(ValueError, match="32 bits a pixel"):
            augment.read(source)


@pytest.mark.parametrize("kind, content", ((b"tEXt", b"Comment\0hi"), (b"iCCP", b"p\0\0damaged"),
                                           (b"eXIf", b"damaged")))
def test_a_damaged_note_or_profile_says_nothing_about_the_pixels(tmp_path, kind, content):
    fake.photo(tmp_path / "a.png", 0)
    raw = (tmp_path / "a.png").read_bytes()
    chunk = struct.pack(">I", len(content)) + kind + content + b"\0\0\0\0"  # no checksum
    (tmp_path / "b.png").write_bytes(raw[:33] + chunk + raw[33:])
    same = np.asarray(augment.read(tmp_path / "b.png")) == np.asarray(
        augment.read(tmp_path / "a.png"))
    assert same.all()
    damaged = bytearray(raw)
    damaged[len(raw) // 2] ^= 255  # among the pixels
    (tmp_path / "c.png").write_bytes(damaged)
    with pytest.raises(Exception):
        augment.read(tmp_path / "c.png")


def test_a_raw_photo_is_not_read_as_its_thumbnail(tmp_path):
    """NEF and DNG are TIFFs whose first picture is small; the photo stands in another one."""
    Image.new("RGB", (16, 12), "red").save(tmp_path / "a.nef", "TIFF", tiffinfo={254: 1})
    with pytest.raises(ValueError, match="thumbnail"):
        augment.read(tmp_path / "a.nef")
    Image.new("RGB", (16, 12), "red").save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as photo:  # a copy, as workers get it, has lost its tags
        assert augment.read(copy.deepcopy(photo)).size == (16, 12)
