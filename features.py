"""Frozen CLIP features of a split, batch by batch: computed on the fly, or kept on disk so that later epochs skip the backbone.

    Features(split, clip, size).batches(epoch) -> (index (B,) int64, f (B, N, D) dense, x (B, D) global)

The backbone never learns, so the features of view v of image i never change. With `views=V` they are written once, bf16, to a
memory-mapped file of V * n * (1 + N) * D * 2 bytes (global feature first, then the N locations), and epoch e reads view e mod V.
"""
import hashlib
import json
import os
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import DataError, Images


def order(n, epoch, seed):
    """The order of the images in an epoch: (n,) int64, a function of (seed, epoch) alone, so that resuming needs no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def _alone(file):
    """Waits until no other process holds the file; returns it open. Closing it, or the end of the process, lets the next one in."""
    handle = open(file, "w")
    try:
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_EX)
    except ImportError:
        pass                                                                       # no such lock on Windows
    return handle


class Features:
    """split: data.Split;  clip: clip.CLIP;  size: side of the input in pixels;  augment, seed: see data.Images
    batch: images over all ranks;  views: 0 computes on the fly, V > 0 caches V augmented views;  rank of world: this process
    """

    def __init__(self, split, clip, size, augment="none", seed=0, batch=128, workers=0, views=0, cache="generated/features",
                 device="cpu", amp=None, rank=0, world=1):
        self.split, self.clip, self.batch, self.seed, self.rank, self.world = split, clip, batch, seed, rank, world
        self.images = Images(split, size, augment, seed)
        self.device, self.amp, self.workers = torch.device(device), amp, workers
        h, w = clip.grid(size, size)
        self.shape = (views, len(split.paths), 1 + h * w, clip.D)
        self.stored = self._stored(Path(cache), size, augment) if views else None

    def __len__(self):
        return len(self.split.paths)

    def batches(self, epoch, shuffle=True):
        """One pass over the split. Training (shuffle) keeps every rank's share equal; evaluation covers every image once."""
        n = len(self)
        index = order(n, epoch, self.seed) if shuffle else torch.arange(n)
        parts = [part[self.rank:: self.world] for part in index.split(self.batch)]
        if shuffle and self.world > 1:                                             # a tail that does not divide among the ranks
            parts[-1] = parts[-1][: n % self.batch // self.world] if n % self.batch else parts[-1]
        parts = [part for part in parts if len(part)]
        if self.stored is not None:
            for part in parts:
                both = self.stored[epoch % self.shape[0], part].to(self.device, non_blocking=True).float()
                yield part.to(self.device), both[:, 1:], both[:, 0]
        else:
            for images, part in self._loader([[(epoch, int(i)) for i in part] for part in parts]):
                yield part.to(self.device, non_blocking=True), *self._encode(images)

    def _loader(self, keys):
        return DataLoader(self.images, batch_sampler=keys, num_workers=self.workers, pin_memory=self.device.type == "cuda",
                          prefetch_factor=4 if self.workers else None)

    @torch.no_grad()
    def _encode(self, images):
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            x, f = self.clip.encode(images.to(self.device, non_blocking=True, memory_format=torch.channels_last))
        return f.float(), x.float()

    def _stored(self, cache, size, augment):
        views, n, rows, D = self.shape
        files = [[path, os.path.getsize(path)] for path in self.split.paths]
        views_key = views if augment != "none" else 1                              # without augmentation all views are the same
        self.shape = (views_key, n, rows, D)
        key = json.dumps([files, self.clip.sha256, size, augment, self.seed if augment != "none" else 0, views_key])
        folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        bytes_needed, done_file = views_key * n * rows * D * 2, folder / "done.json"
        total, file = views_key * n, folder / "features.bf16"
        if not file.exists():
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            print(f"features: {n} images x {views_key} views x {rows} x {D} bf16 = {bytes_needed / 2**20:,.0f} MiB in {folder}")
            if free < bytes_needed:
                raise DataError(f"the feature cache needs {bytes_needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} GiB free: "
                                f"choose fewer --cache-features or another --cache-dir")
        lock = _alone(folder / ".lock")                                            # a second process waits, then finds all done
        done = json.loads(done_file.read_text())["images"] if done_file.exists() else 0
        stored = torch.from_file(str(file), shared=True, size=total * rows * D, dtype=torch.bfloat16).view(total, rows, D)
        keys = [(i // n, i % n) for i in range(done, total)]
        keys = [keys[i: i + self.batch] for i in range(0, len(keys), self.batch)]
        for images, _ in tqdm(self._loader(keys), desc=f"features of {self.split.name}", disable=not keys, leave=False):
            f, x = self._encode(images)
            stored[done: done + len(x)] = torch.cat([x[:, None], f], 1).to(torch.bfloat16).cpu()
            done += len(x)
            temporary = done_file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"images": done}))
            os.replace(temporary, done_file)
        lock.close()
        return stored.view(self.shape)
