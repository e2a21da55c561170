"""The image branch alone, what each choice brings: python tests/bench_image.py [--backbone RN101]

Dense features of 448-pixel images by a ResNet of OpenAI's architecture, random weights, one thread
(OMP_NUM_THREADS=1), CPU time, the versions in turns in one process; all have to agree with the
first to 1e-4 of the largest feature, bfloat16 to 3e-2.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import torch
from bench_step import BACKBONES, random_clip


def versions(model, images, compile):
    """{what: a call that gives f (B, N, D)}, each with one more choice than the one before."""
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    folded = copy.deepcopy(plain).fold()
    nhwc = images.to(memory_format=torch.channels_last)

    def chunked(size):
        return lambda: torch.cat([folded.encode_dense(part) for part in nhwc.split(size)])

    def bf16():
        with torch.autocast("cpu", torch.bfloat16):
            return torch.cat([folded.encode_dense(part) for part in nhwc.split(4)])

    calls = {"as published": lambda: plain.encode_dense(images),
             "channels-last": lambda: last.encode_dense(nhwc),
             "and folded, all at once": chunked(len(images)),
             **{f"folded, chunks of {size}": chunked(size) for size in (8, 4, 2, 1)},
             "folded, chunks of 4, bf16": bf16}
    if compile:
        fast = torch.compile(folded.encode_dense)
        calls["folded, chunks of 4, torch.compile"] = lambda: torch.cat(
            [fast(part) for part in nhwc.split(4)])
    return calls


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="RN101", choices=BACKBONES)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="torch.compile too: a minute more")
    args = parser.parse_args()
    images = torch.randn(args.batch, 3, args.size, args.size)
    calls = versions(random_clip(args.backbone), images, args.compile)
    expected = calls["as published"]()
    for what, call in calls.items():
        error = float((call().float() - expected).abs().max() / expected.abs().max())
        assert error < (3e-2 if "bf16" in what else 1e-4), (what, error)
    took = {what: [] for what in calls}
    for _ in range(args.repeats):
        for what, call in calls.items():
            start = time.process_time()
            call()
            took[what].append(time.process_time() - start)
    first = statistics.median(took["as published"])
    for what, values in took.items():
        median = statistics.median(values)
        print(f"{what:36s} {1000 * median / args.batch:8.1f} ms an image  "
              f"{first / median:5.2f} times", flush=True)


if __name__ == "__main__":
    main()
