"""COCO-size data from the first command to the suggestions, with the time and the peak memory of
each command: python tests/bench_coco.py

82,783 training images and annotations as many and as large as COCO's own, hard links to 40 JPEGs of
640 x 480; the small CLIP at 224 pixels. What a larger CLIP adds is its own time an image: the rest
of each command, which is what is measured here, does not depend on it. Some 20 minutes.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import fake_datasets as fake
from bench_data import ROOT, full_annotations

IMAGES, TEST = 82783, 500
FIRST_STEP = """import sys, time, resource
start = time.perf_counter()
import train
step = train.training_step
def first(*arguments):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"first step after {time.perf_counter() - start:.1f} s, {peak:.2f} GiB", flush=True)
    train.training_step = step
    return step(*arguments)
train.training_step = first
sys.exit(train.main(sys.argv[1:]))
"""


def draw(root):
    (root / "annotations").mkdir()
    photos = [root / f"{i}.jpg" for i in range(40)]
    for i, photo in enumerate(photos):
        fake.photo(photo, i, (640, 480), quality=90)
    for folder, count, notes in (("train2014", IMAGES, 604907), ("val2014", TEST + 702, 4000)):
        (root / folder).mkdir()
        for i in range(count):
            os.link(photos[i % 40], root / folder / f"COCO_train2014_{i:012d}.jpg")
        full_annotations(root / "annotations" / f"instances_{folder}.json", count, notes)


def timed(what, *command):
    """Runs a command, prints its time and the peak memory of its process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    # links: data.py rightly calls them the same pictures, and exits with 2
    assert os.waitstatus_to_exitcode(status) in (0, 2 * ("--no-decode" in command)), told[-2000:]
    print(f"{what}: {time.perf_counter() - start:.1f} s by the clock, {usage.ru_utime:.1f} s of "
          f"CPU, {usage.ru_maxrss / 2**20:.2f} GiB", flush=True)
    for line in told.splitlines():
        if line.startswith(("first step", "epoch", "seconds", "features of", "scoring")):
            print("   ", line)


def main():
    with tempfile.TemporaryDirectory() as folder:
        root, run = Path(folder, "coco"), str(Path(folder, "run"))
        root.mkdir()
        draw(root)
        settings = ["--data", "coco", "--root", str(root), "--ratio", "0.1", "--clip", "tiny",
                    "--size", "224", "--augment", "none", "--cache-features", "1", "--cache-dir",
                    str(Path(folder, "features")), "--epochs", "1", "--workers", "0"]
        timed("data.py, no decoding", "data.py", "coco", "--root", str(root), "--no-decode")
        timed("training for one epoch, features first", "-c", FIRST_STEP, *settings, "--out",
              str(Path(folder, "first")))
        timed("the same with the features there", "-c", FIRST_STEP, *settings, "--out", run)
        timed("suggestions", "eval.py", run, "--suggest", str(Path(folder, "suggested.csv")))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
