"""Frozen CLIP features of images, batch by batch: computed on the fly, or kept on disk.

    for index, f, x in FeatureLoader(images, encoder).batches(epoch): ...

One pass at a time. index (B,) int64, f (B, N, D) dense and x (B, D) global features. With `views=V`
those of V augmented views are kept, bf16, in a memory-mapped file of V * n * (1 + N) * D * 2 bytes
(x before f), complete or absent; epoch e reads view e mod V. Its name is a hash of images,
transform, CLIP's file and code (clip/*.py), --amp and shape, not of labels and masks; a CLIP
changed in Python needs views=0."""
import contextlib
import copy
import hashlib
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip import model
from support import UserError
from support.cli import end_with_parent
from support.distributed import barrier

CHUNK = 64  # images that enter the cache together


def epoch_order(n, epoch, seed):
    """The order of the images in an epoch: (n,) int64. (seed, epoch) is all that resuming needs."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def set_precision(amp, device):
    """--amp -> autocast's dtype, None for float32. "auto": bf16 on a GPU that has it in hardware.
    Tells torch, too, whether float32 products may use TF32; "none" means IEEE float32."""
    if amp == "auto":
        hardware = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if hardware else "none"
    torch.set_float32_matmul_precision("highest" if amp == "none" else "high")
    torch.backends.cudnn.allow_tf32 = amp != "none"
    return {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def at_once(images):
    """How many of images (B, 3, H, W) a core encodes at a time: 4 of 256 pixels, 1 of 448, so that
    what a layer leaves is still in its cache for the next (docs/speed.md)."""
    return max(1, min(4, 2**18 // images[0, 0].numel()))


class FeatureLoader:
    """images: a data.Images (split, size, augment, seed, fingerprint()); a copy gets encoder's
    mean and std
    batch: images over all processes;  workers: processes that decode
    views: 0 computes on the fly, V > 0 caches V augmented views;  amp: autocast's dtype or None
    rank of world: this process;  need_global: without it x may be None, its pool not computed
    compiled: whether encode_dense goes through torch.compile"""

    def __init__(self, images, encoder, batch=128, workers=0, views=0, cache="generated/features",
                 device="cpu", amp=None, rank=0, world=1, need_global=True, compiled=False):
        self.images = images = copy.copy(images)  # another loader of them may have another CLIP
        self.split, self.encoder, self.batch = images.split, encoder, batch
        self.workers, self.device, self.amp = workers, torch.device(device), amp
        self.rank, self.world, self.need_global = rank, world, need_global
        self.pinned = self.device.type == "cuda"  # copies that do not wait: CUDA's alone
        self.keys, self.loader = [], None
        # Threads stay: below Python 3.13 a Ctrl-C while one is joined lets it run on while the
        # interpreter ends, which torch answers with an abort.
        self.reader = ThreadPoolExecutor(1)
        self.cores = torch.get_num_threads()
        self.threads = ThreadPoolExecutor(self.cores, initializer=torch.set_num_threads,
                                          initargs=(1,))
        encode = encoder.encode_dense
        self.encode_dense = torch.compile(encode) if compiled else encode
        images.mean, images.std = encoder.mean, encoder.std
        self.stored = self.cached(Path(cache), views) if views else None  # (V, n, 1+N, D)

    def __len__(self):
        return len(self.images)

    def batches(self, epoch, shuffle=True):
        """One pass. f and x are float32; in training (shuffle) f has autocast's dtype. Processes
        get equally many rows: a batch is filled up with its first image, which gather cuts off."""
        n = len(self)
        order = epoch_order(n, epoch, self.images.seed) if shuffle else torch.arange(n)
        padded = (torch.cat([part, part[:1].expand(-len(part) % self.world)])
                  for part in order.split(self.batch) if len(part))
        parts = [part[self.rank::self.world] for part in padded]
        dtype = self.amp if shuffle and self.amp else torch.float32
        source = self.load(epoch, parts) if self.stored is None else self.read(epoch, parts)
        self.latest = this = object()
        for data, index in source:
            if self.stored is None:
                f, x = self.encode(data, self.need_global)
            else:
                data = self.moved(data)  # (B, 1+N, D)
                f, x = data[:, 1:].contiguous(), data[:, 0].float()
            yield self.moved(index), f.to(dtype), x
            if self.latest is not this:  # both would get a part of the images
                raise UserError("another pass over this loader has begun: make a second loader")
        if not shuffle and self.workers and torch.multiprocessing.get_start_method() == "fork":
            self.loader = None  # a split that is scored now and then needs no waiting processes

    def moved(self, t, **how):
        return t.to(self.device, non_blocking=self.pinned, **how)

    def read(self, epoch, parts):
        """Iterator over (stored features (B, 1+N, D), index (B,)). A thread reads one batch ahead,
        while the GPU computes."""
        view = self.stored[epoch % len(self.stored)]  # (n, 1+N, D)

        def ready(part):
            return [t.pin_memory() if self.pinned else t for t in (view[part], part)]

        jobs = (self.reader.submit(ready, part) for part in parts)
        for job, _ in pairwise(chain(jobs, [None])):  # the next one is submitted first
            yield job.result()

    def load(self, epoch, parts):
        """Iterator over (images (B, 3, size, size), index (B,)). The workers stay for the next."""
        # in place: the DataLoader holds this list
        self.keys[:] = [[(epoch, i) for i in part.tolist()] for part in parts]
        if self.loader is None:
            self.loader = DataLoader(self.images, batch_sampler=self.keys, pin_memory=self.pinned,
                                     num_workers=self.workers, worker_init_fn=end_with_parent,
                                     persistent_workers=self.workers > 0,
                                     generator=torch.Generator())  # leaves the run's numbers alone
        return iter(self.loader)

    def encode(self, images, need_global=True):
        """images (B, 3, H, W) -> f (B, N, D) and x (B, D) float32 or None. A CPU gives each core
        its own images: one layer's work is too small to share, 1.3 times as fast on two cores."""
        images = self.moved(images, memory_format=torch.channels_last)
        if self.device.type != "cpu" or len(images) < self.cores:
            return self.encode_part(images, need_global)
        share = -(-len(images) // self.cores)  # no core stays without work
        parts = images.split(min(at_once(images), share))
        f, x = zip(*self.threads.map(lambda part: self.encode_part(part, need_global), parts))
        return torch.cat(f), torch.cat(x) if need_global else None

    @torch.no_grad()
    def encode_part(self, images, need_global):
        """What `encode` returns, in one piece."""
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, self.amp is not None):
            if not need_global:
                return self.encode_dense(images), None
            f, x = self.encoder.encode(images)
        return f, x.float()

    def cached(self, folder, views):
        """The features of all views (one where nothing is augmented): (V, n, 1+N, D) bf16."""
        views = views if self.images.augment != "none" else 1
        h, w = self.encoder.grid(self.images.size, self.images.size)
        shape = (views, len(self), 1 + h * w, self.encoder.D)
        if not self.encoder.sha256:
            raise UserError("a cache needs a CLIP of clip.load, got one of clip.build: views=0")
        code = [file.read_bytes() for file in sorted(Path(model.__file__).parent.glob("*.py"))]
        depends_on = repr((shape, self.encoder.sha256, str(self.amp), code)).encode()
        name = hashlib.sha256(self.images.fingerprint() + depends_on).hexdigest()[:24]
        file = folder / f"{name}.bf16"
        # The first process says whether the file has to be made, and under which temporary name.
        made_as = [None if file.is_file() else f"{file.name}.{time.time_ns()}.part"]
        if dist.is_initialized():
            dist.broadcast_object_list(made_as)
        if made_as[0]:
            self.fill(file, folder / made_as[0], shape)
        return torch.from_file(str(file), False, math.prod(shape), dtype=torch.bfloat16).view(shape)

    def fill(self, file, temporary, shape):
        """Writes the file under a temporary name, each process its chunks, then renames it."""
        views, n, *of_image = shape
        row = 2 * math.prod(of_image)  # bytes
        size, folder = views * n * row, file.parent
        name = f"features of {self.split.name}"
        if self.rank == 0:
            print(f"{name}: {n} images x {views} views = {size / 2**20:,.0f} MiB in {folder}",
                  flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            for part in folder.glob("*.part"):
                with contextlib.suppress(FileNotFoundError):  # another run was quicker
                    if time.time() - part.stat().st_mtime > 3600:  # of a process that was killed
                        part.unlink()
            free = shutil.disk_usage(folder).free
            if size > free:
                raise UserError(f"the feature cache needs {size / 2**30:.1f} GiB, {folder} has "
                                f"{free / 2**30:.1f}: lower --cache-features or change --cache-dir")
            temporary.touch()
        barrier()
        chunks = torch.arange(n).split(CHUNK)[self.rank::self.world]
        bar = tqdm(total=views * n, desc=name, leave=False, disable=self.rank > 0 or None)
        try:
            with open(temporary, "r+b") as handle, bar:
                for view in range(views):
                    for images, index in self.load(view, chunks):
                        f, x = self.encode(images)
                        both = torch.cat([x[:, None], f.float()], 1).to(torch.bfloat16)
                        handle.seek((view * n + int(index[0])) * row)
                        handle.write(both.cpu().view(torch.int16).numpy())
                        bar.update(len(index) * self.world)
            barrier()
            if self.rank == 0:
                temporary.replace(file)
            barrier()
        finally:
            temporary.unlink(missing_ok=True)
            self.loader = None  # nothing is decoded from now on
