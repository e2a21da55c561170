"""Frozen CLIP features of a split, batch by batch: computed on the fly, or kept on disk so that later epochs skip the backbone.

    Features(split, clip, size).batches(epoch) -> (index (B,) int64, f (B, N, D) dense, x (B, D) global)

The backbone never learns, so the features of view v of image i never change. With `views=V` they are written once, bf16, to a
memory-mapped file of V * n * (1 + N) * D * 2 bytes (global feature first, then the N locations), and epoch e reads view e mod V.
The folder's name is a hash of the images (path, size and time of change, as make and git judge), CLIP's weights, the transform
and its seed; labels and masks do not enter. More views later only add to it, and what was stopped goes on where it was.
"""
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import augment as transforms
from data import Images
from support.checkpoint import lock
from support import UserError

warnings.filterwarnings("ignore", message="This DataLoader will create")         # more --workers than cores: the user's choice

CHUNK = 64          # images that enter the cache together
FLUSH = 5.0         # seconds between two records of what is there: the most that a kill can cost


def order(n, epoch, seed):
    """The order of the images in an epoch: (n,) int64, a function of (seed, epoch) alone, so that resuming needs no state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)


def precision(amp, device):
    """--amp -> autocast's type, None for float32. "auto": bf16 on a GPU that has it in hardware, else float32.
    Tells torch, too, whether float32 products and convolutions may use TF32: with mixed precision; "none" means IEEE float32."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "none"
    torch.set_float32_matmul_precision("highest" if amp == "none" else "high")
    torch.backends.cudnn.allow_tf32 = amp != "none"
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def ahead(function, items):
    """map(function, items), one item ahead in a thread: the disk reads while the device computes."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            ready, coming = coming, pool.submit(function, item)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def quiet(_):
    """In a loader's process: its errors come by the queue; what its threads say once the main process has ended is no news."""
    sys.excepthook = lambda *_: None


class Features:
    """split: data.Split;  clip: clip.CLIP;  size: side of the input in pixels;  augment, seed: see data.Images
    batch: images over all ranks;  views: 0 computes on the fly, V > 0 caches V augmented views;  rank of world: this process
    amp: autocast's type or None;  whole: whether x is wanted (the attention pool is skipped otherwise, and x is None)
    """

    def __init__(self, split, clip, size, augment="none", seed=0, batch=128, workers=0, views=0, cache="generated/features",
                 device="cpu", amp=None, rank=0, world=1, whole=True):
        self.split, self.clip, self.batch, self.seed, self.rank, self.world = split, clip, batch, seed, rank, world
        self.images = Images(split, size, augment, seed)
        self.device, self.amp, self.workers, self.whole = torch.device(device), amp, workers, whole
        self.cuda = self.device.type == "cuda"                                     # pinned memory and copies that do not wait: CUDA's alone
        self.keys, self.loader, self.waited = [], None, 0.0
        h, w = clip.grid(size, size)
        self.shape = (views if augment != "none" else min(views, 1), len(split.paths), 1 + h * w, clip.D)   # (V, n, 1+N, D)
        self.stored = self._stored(self._folder(Path(cache), size, augment)) if views else None

    def __len__(self):
        return len(self.split.paths)

    def batches(self, epoch, shuffle=True):
        """One pass over the split. f is float32, or autocast's type when training (shuffle).

        Training: all ranks get equally many rows, the last ones of a batch that does not divide repeat its first image, and
        ranks.gather cuts them off again. Evaluation covers every image once. `waited` counts the seconds spent waiting for data.
        """
        parts = (order(len(self), epoch, self.seed) if shuffle else torch.arange(len(self))).split(self.batch)
        if shuffle:
            parts = [torch.cat([part, part[:1].expand(-len(part) % self.world)]) for part in parts]
        parts = [part for part in (part[self.rank:: self.world] for part in parts) if len(part)]
        dtype = self.amp if shuffle and self.amp else torch.float32
        if self.stored is not None:
            view = self.stored[epoch % self.shape[0]]                              # (n, 1+N, D)
            for both, part in self._timed(ahead(lambda part: (self._pin(view[part]), part), parts)):
                both = both.to(self.device, non_blocking=self.cuda)
                f, x = both[:, 1:].to(dtype).contiguous(), both[:, 0].to(dtype)
                yield self._pin(part).to(self.device, non_blocking=self.cuda), f, x
        else:
            for images, part in self._timed(self._load([(epoch, part) for part in parts])):
                f, x = self._encode(images, self.whole)
                yield part.to(self.device, non_blocking=self.cuda), f.to(dtype), x
            if not shuffle:
                self._end_workers()                                                # scored now and then: its processes need not wait for that

    def _pin(self, t):
        return t.pin_memory() if self.cuda else t                                  # a copy from pinned memory need not wait

    def _load(self, batches):
        """An iterator over (images (B, 3, size, size), index (B,)). The workers stay for the next call."""
        self.keys[:] = [[(epoch, i) for i in part.tolist()] for epoch, part in batches]
        if self.loader is None:                                                    # not `or`: that would ask for its length
            self.loader = DataLoader(self.images, batch_sampler=self.keys, num_workers=self.workers, pin_memory=self.cuda,
                                     persistent_workers=self.workers > 0, worker_init_fn=quiet,
                                     generator=torch.Generator())                  # leaves the run's state alone
        return iter(self.loader)

    def _end_workers(self):
        self.loader = None

    def _timed(self, iterator):
        self.waited = 0.0
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError("a process that decodes images was ended from outside, mostly because memory ran out: use fewer "
                                "--workers, or 0") from None
            self.waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    @torch.no_grad()
    def _encode(self, images, whole=True):
        images = images.to(self.device, non_blocking=self.cuda, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            x, f = self.clip.encode(images) if whole else (None, self.clip.encode_dense(images))
        return f, x if x is None else x.float()

    def _folder(self, cache, size, augment):
        """A folder named by everything that the features depend on."""
        try:
            files = [[path, stat.st_size, stat.st_mtime_ns] for path in self.split.paths for stat in (os.stat(path),)]
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; put the image back or take it off the list") from None
        weights = self.clip.sha256 or digest(*(t.cpu().numpy().tobytes() for t in self.clip.visual.state_dict().values()))
        transform = [size, augment, self.images.smallest_crop, self.seed if augment != "none" else 0, digest(Path(transforms.__file__).read_bytes())]
        folder = cache / digest(json.dumps([files, weights, transform, str(self.amp)]).encode())[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _stored(self, folder):
        """(V, n, 1+N, D) bf16, memory-mapped, complete. The ranks share the work in chunks; a byte of `done` says that a chunk is there."""
        views, n, rows, D = self.shape
        chunks, file, needed = -(-n // CHUNK), folder / "features.bf16", views * n * rows * D * 2
        with lock(folder / "lock") if self.rank == 0 else contextlib.nullcontext():   # another run waits, then finds all done
            if self.rank == 0:
                # Bytes up to the end of the last chunk that `done` calls finished: the file must reach that far.
                last = (folder / "done").read_bytes().rfind(1) if (folder / "done").exists() else -1
                end = (last // chunks * n + min(n, (last % chunks + 1) * CHUNK)) * rows * D * 2
                if (file.stat().st_size if file.exists() else 0) < end:            # deleted or cut since: what `done` tells is not there
                    (folder / "done").unlink()
                reserve(file, needed, f"features of {self.split.name}: {n} images x {views} views x {rows} x {D} bf16")
                reserve(folder / "done", views * chunks)
            self._barrier()
            stored = torch.from_file(str(file), shared=True, size=needed // 2, dtype=torch.bfloat16).view(self.shape)
            done = torch.from_file(str(folder / "done"), shared=True, size=views * chunks, dtype=torch.uint8)
            missing = (done != 1).nonzero().flatten().tolist()
            self._barrier()                                                        # now all ranks have seen the same state
            missing = missing[self.rank:: self.world]
            places = [(c // chunks, torch.arange(n)[c % chunks * CHUNK:][:CHUNK]) for c in missing]
            there, last = [], time.monotonic()

            def record():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())                                      # first the features, then the word that they are there
                done[there] = 1
                there.clear()

            try:
                batches = places and tqdm(self._timed(self._load(places)), f"features of {self.split.name}", len(places), leave=False,
                                          disable=self.rank > 0 or not sys.stderr.isatty())
                for chunk, (view, index), (images, _) in zip(missing, places, batches):
                    f, x = self._encode(images)
                    stored[view, index] = torch.cat([x[:, None], f.float()], 1).to(torch.bfloat16).cpu()
                    there.append(chunk)
                    if time.monotonic() - last >= FLUSH:
                        record()
                        last = time.monotonic()
            finally:
                record()
                batches = None
                self._end_workers()                                                # nothing is decoded from now on
            self._barrier()
        return stored

    def _barrier(self):
        if self.world > 1:
            dist.barrier()


def for_evaluation(cfg, split, clip, device, **more):
    """The Features of a split that is scored: no augmentation, and one cached view if the run (config.Config) caches at all."""
    return Features(split, clip, cfg.size, batch=cfg.batch, workers=cfg.workers, views=min(1, cfg.cache_features), cache=cfg.cache_dir,
                    device=device, amp=precision(cfg.amp, device), **more)


def digest(*parts):
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def reserve(file, needed, about=""):
    """Grows a file by zeros, never shorter, and takes its space at once, so that a full disk is noticed now and not in the middle,
    where a mapped file would end the process. Not left to torch.from_file, which clears the first byte of a file that it extends."""
    with open(file, "ab") as handle:
        size = handle.tell()
    if about and size < needed:
        print(f"{about} = {needed / 2**20:,.0f} MiB in {file.parent}", flush=True)
    try:
        if size < needed and needed - size > shutil.disk_usage(file.parent).free:
            raise OSError(errno.ENOSPC, "")
        with open(file, "rb+") as handle:
            handle.truncate(max(size, needed))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, needed)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):               # others: a file system that cannot reserve
            free = shutil.disk_usage(file.parent).free / 2**30
            raise UserError(f"the feature cache needs {(needed - size) / 2**30:.1f} GiB, {file.parent} has {free:.1f} GiB free: "
                            "choose fewer --cache-features or another --cache-dir") from None
