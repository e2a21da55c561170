"""Frozen CLIP features of images, batch by batch: computed on the fly, or kept on disk.

    for index, f, x in FeatureLoader(images, clip).batches(epoch): ...

index (B,) int64, f (B, N, D) dense and x (B, D) global features. The backbone never learns, so the
features of view v of image i never change. With `views=V` they are written once, bf16, to a
memory-mapped file of V * n * (1 + N) * D * 2 bytes (the global feature first, then the N
locations), and epoch e reads view e mod V. The file's name is a hash of the images, the transform
and CLIP's weights; labels and masks do not enter. A cache is complete or absent.
"""
import hashlib
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

from support import UserError
from support.cli import end_with_parent
from support.distributed import barrier

CHUNK = 64  # images that enter the cache together
ON_CPU = 4  # images at once on a core: what a layer leaves is still in its cache for the next


def epoch_order(n, epoch, seed):
    """The order of the images in an epoch: (n,) int64. (seed, epoch) is all that resuming needs."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def autocast_dtype(amp, device):
    """--amp -> autocast's dtype, None for float32. "auto": bf16 on a GPU that has it in hardware.

    Tells torch, too, whether float32 products may use TF32; "none" means IEEE float32.
    """
    if amp == "auto":
        hardware = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if hardware else "none"
    torch.set_float32_matmul_precision("highest" if amp == "none" else "high")
    torch.backends.cudnn.allow_tf32 = amp != "none"
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def prefetch(function, items):
    """map(function, items), one item ahead in a thread: the disk reads while the GPU computes."""
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            ready, coming = coming, pool.submit(function, item)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def worker_init(_):
    warnings.simplefilter("ignore")
    end_with_parent()


class FeatureLoader:
    """images: Dataset, (epoch, index) -> (float32 (3, size, size), index), that tells its split,
    size, augment and seed; its fingerprint() names all that the pixels depend on

    clip: clip.CLIP, whose mean and std the images then take;  batch: images over all processes
    workers: processes that decode;  views: 0 computes on the fly, V > 0 caches V augmented views
    amp: autocast's dtype or None;  rank of world: this process
    need_global: whether x is wanted (the attention pool is skipped otherwise, and x is None)
    """

    def __init__(self, images, clip, batch=128, workers=0, views=0, cache="generated/features",
                 device="cpu", amp=None, rank=0, world=1, need_global=True):
        self.images, self.split, self.clip, self.batch = images, images.split, clip, batch
        self.workers, self.device, self.amp = workers, torch.device(device), amp
        self.rank, self.world, self.need_global = rank, world, need_global
        self.pinned = self.device.type == "cuda"  # copies that do not wait: CUDA's alone
        self.keys, self.loader, self.waited = [], None, 0.0
        images.mean, images.std = clip.mean, clip.std
        self.stored = self.cached(Path(cache), views) if views else None  # (V, n, 1+N, D)

    def __len__(self):
        return len(self.images)

    def batches(self, epoch, shuffle=True):
        """One pass. f is float32, or autocast's dtype when training (shuffle).

        Training: all processes get equally many rows; the last ones of a batch that does not divide
        repeat its first image, and distributed.gather cuts them off again. Evaluation covers each
        image once. `waited` counts the seconds spent waiting for data.
        """
        n = len(self)
        order = epoch_order(n, epoch, self.images.seed) if shuffle else torch.arange(n)
        parts = order.split(self.batch)
        if shuffle:
            parts = [torch.cat([part, part[:1].expand(-len(part) % self.world)]) for part in parts]
        parts = [part[self.rank::self.world] for part in parts]
        parts = [part for part in parts if len(part)]
        dtype = self.amp if shuffle and self.amp else torch.float32
        if self.stored is not None:
            view = self.stored[epoch % len(self.stored)]  # (n, 1+N, D)
            read = prefetch(lambda part: (self.pin(view[part]), self.pin(part)), parts)
            for both, index in self.timed(read):
                both = both.to(self.device, non_blocking=self.pinned)  # (B, 1+N, D)
                index = index.to(self.device, non_blocking=self.pinned)
                yield index, both[:, 1:].to(dtype).contiguous(), both[:, 0].to(dtype)
            return
        for images, index in self.timed(self.load(epoch, parts)):
            f, x = self.encode(images, self.need_global)
            yield index.to(self.device, non_blocking=self.pinned), f.to(dtype), x
        if not shuffle:
            self.loader = None  # a split that is scored now and then needs no waiting processes

    def pin(self, t):
        return t.pin_memory() if self.pinned else t

    def load(self, epoch, parts):
        """Iterator over (images (B, 3, size, size), index (B,)). The workers stay for the next."""
        self.keys[:] = [[(epoch, i) for i in part.tolist()] for part in parts]
        if self.loader is None:
            self.loader = DataLoader(self.images, batch_sampler=self.keys, pin_memory=self.pinned,
                                     num_workers=self.workers, worker_init_fn=worker_init,
                                     persistent_workers=self.workers > 0,
                                     generator=torch.Generator())  # leaves the run's numbers alone
        return iter(self.loader)

    def timed(self, iterator):
        self.waited = 0.0
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator, None)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError("a process that decodes images was ended from outside, mostly for "
                                "want of memory (in a container also of shared memory: --shm-size):"
                                " use fewer --workers, or 0") from None
            self.waited += time.perf_counter() - start
            if item is None:
                return
            yield item

    def encode(self, images, need_global=True):
        """images (B, 3, H, W) -> f (B, N, D) and x (B, D) float32 or None. A CPU gives each core
        its own images: one layer's work is too small to share, 1.3 times as fast on two cores."""
        images = images.to(self.device, non_blocking=self.pinned,
                           memory_format=torch.channels_last)
        cores = torch.get_num_threads()
        if self.device.type != "cpu" or len(images) < cores:
            return self.encode_part(images, need_global)
        parts = images.split(min(ON_CPU, -(-len(images) // cores)))  # no core stays without work
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            f, x = zip(*pool.map(lambda part: self.encode_part(part, need_global), parts))
        return torch.cat(f), torch.cat(x) if need_global else None

    @torch.no_grad()
    def encode_part(self, images, need_global):
        """What `encode` returns, in one piece."""
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, self.amp is not None):
            if not need_global:
                return self.clip.encode_dense(images), None
            x, f = self.clip.encode(images)
        return f, x.float()

    def cached(self, folder, views):
        """The features of all views (one where nothing is augmented): (V, n, 1+N, D) bf16."""
        views = views if self.images.augment != "none" else 1
        h, w = self.clip.grid(self.images.size, self.images.size)
        shape = torch.Size((views, len(self), 1 + h * w, self.clip.D))
        depends_on = repr((tuple(shape), self.clip.sha256, str(self.amp))).encode()
        name = hashlib.sha256(self.images.fingerprint() + depends_on).hexdigest()[:24]
        file = folder / f"{name}.bf16"
        begun = [None if file.is_file() else time.time_ns()]
        if dist.is_initialized():
            dist.broadcast_object_list(begun)  # what the first process saw
        if begun[0]:
            self.fill(file, shape, file.with_name(f"{file.name}.{begun[0]}.part"))
        stored = torch.from_file(str(file), False, shape.numel(), dtype=torch.bfloat16)
        return stored.view(shape)

    def fill(self, file, shape, temporary):
        """Writes the file under a temporary name, each process its chunks, then renames it."""
        views, n, _, _ = shape
        needed = shape.numel() * 2
        if self.rank == 0:
            print(f"features of {self.split.name}: {n} images x {views} views = "
                  f"{needed / 2**20:,.0f} MiB in {file.parent}", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            for part in file.parent.glob("*.part"):
                if time.time() - part.stat().st_mtime > 3600:  # of a process that was killed
                    part.unlink()
            free = shutil.disk_usage(file.parent).free
            if needed > free:
                raise UserError(f"the feature cache needs {needed / 2**30:.1f} GiB, {file.parent} "
                                f"has {free / 2**30:.1f} GiB free: choose fewer --cache-features "
                                "or another --cache-dir")
            temporary.touch()
        barrier()
        chunks = torch.arange(n).split(CHUNK)[self.rank::self.world]
        bar = tqdm(total=views * n, desc=f"features of {self.split.name}", leave=False,
                   disable=self.rank > 0 or not sys.stderr.isatty())
        try:
            with open(temporary, "r+b") as handle, bar:
                for view in range(views):
                    for images, index in self.timed(self.load(view, chunks)):
                        f, x = self.encode(images)
                        both = torch.cat([x[:, None], f.float()], 1).to(torch.bfloat16)
                        handle.seek((view * n + int(index[0])) * shape[2:].numel() * 2)
                        handle.write(both.cpu().view(torch.int16).numpy().data)
                        bar.update(len(index) * self.world)
            barrier()
            if self.rank == 0:
                temporary.replace(file)
            barrier()
        finally:
            temporary.unlink(missing_ok=True)
            self.loader = None  # nothing is decoded from now on
