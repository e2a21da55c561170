"""The feature cache: equal to what it stands for, found again, never mistaken, unharmed by a kill;
and the loader around it."""
import dataclasses
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import pytest
import torch
from PIL import Image

import data
from clip import features
from clip.model import MEAN, STD
from conftest import gpu
from datasets import augment
from clip.features import FeatureLoader, epoch_order
from fake_datasets import photo
from small_world import start
from test_clip import small

import clip
from support import UserError

SIZE = 64


def make_split(folder, n=21, seed=0):
    paths = [str(folder / f"{i}.png") for i in range(n)]
    for i, path in enumerate(paths):
        photo(path, seed + i, size=(70, 60))
    labels = np.ones((n, 2), np.int8)
    return data.Split("photos", paths, ["a", "b"], labels)


def make_clip():
    made = clip.build(small("resnet"), fold=True)
    made.sha256 = "of a file"
    return made


@pytest.fixture
def made(tmp_path, monkeypatch):
    # 21 images: five full chunks and one of a single image
    monkeypatch.setattr(features, "CHUNK", 4)
    torch.set_num_threads(1)
    return SimpleNamespace(split=make_split(tmp_path), clip=make_clip(), folder=tmp_path / "cache")


def cached(made, augment="taidpt", size=SIZE, seed=0, **changes):
    images = data.Images(made.split, size, augment, seed)
    options = dict(views=2, batch=8, cache=made.folder) | changes
    return FeatureLoader(images, made.clip, **options)


def encoded_images(made, monkeypatch, **changes):
    """How many images the backbone sees while such a cache is opened."""
    seen, encode = [0], FeatureLoader.encode

    def counting(self, images, need_global=True):
        seen[0] += len(images)
        return encode(self, images, need_global)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureLoader, "encode", counting)
        cached(made, **changes)
    return seen[0]


@pytest.mark.parametrize("views", [0, 2])
def test_autocast_leaves_the_global_features_float32(made, views):
    _, f, x = next(cached(made, views=views, amp=torch.bfloat16).batches(0))
    assert f.dtype == torch.bfloat16 and x.dtype == torch.float32


@pytest.mark.parametrize("shuffle", [True, False])
def test_cached_equals_uncached_up_to_bf16(made, shuffle):
    with_cache, without = cached(made), cached(made, views=0)
    for epoch in (0, 1, 2):  # view 0, view 1, and view 0 again
        rows = 0
        for (i, f, x), (j, g, y) in zip(with_cache.batches(epoch, shuffle),
                                        without.batches(epoch % 2, shuffle)):
            rows += len(i)
            if epoch < 2:
                assert torch.equal(i, j) and f.dtype == torch.float32
                for a, b in ((f, g), (x, y)):  # bf16 keeps 8 bits: half a unit is 2^-9
                    assert ((a - b).abs() <= 2**-8 * b.abs() + 1e-5).all()
        assert rows == 21
    first = [next(iter(with_cache.batches(epoch))) for epoch in (0, 2)]
    a, b = (dict(zip(index.tolist(), f)) for index, f, _ in first)
    assert all(torch.equal(a[i], b[i]) for i in a.keys() & b.keys())


def test_found_again(made, monkeypatch):
    assert encoded_images(made, monkeypatch) == 42
    assert encoded_images(made, monkeypatch) == 0
    assert encoded_images(made, monkeypatch, batch=5) == 0  # the batch does not matter
    # without augmentation there is one view
    assert encoded_images(made, monkeypatch, views=7, augment="none") == 21


def test_mask_and_labels_do_not_matter(made, monkeypatch):
    cached(made)
    made.split = dataclasses.replace(made.split, labels=np.zeros((21, 2), np.int8))
    assert encoded_images(made, monkeypatch) == 0


def test_all_of_the_transform_stands_in_the_file_that_the_key_hashes(made, monkeypatch):
    grey = Image.new("RGB", (64, 64), (7, 7, 7))
    monkeypatch.setattr(augment, "transform", lambda *_: grey)
    for how in ("none", "flip", "taidpt"):
        pixels, index = data.Images(made.split, 64, how)[2, 5]
        assert index == 5 and (pixels == augment.normalise(grey, MEAN, STD)).all(), how


def test_key(made, monkeypatch):
    folders = lambda: {p.name for p in made.folder.iterdir()}
    seen = set()

    def is_new(**changes):
        cached(made, views=1, **changes)
        now = folders()
        assert len(now - seen) == 1, changes
        seen.update(now)

    is_new()
    is_new(seed=1)
    is_new(augment="flip")
    is_new(augment="none")
    is_new(size=96)
    cached(made, views=1, augment="none", seed=5)  # what is not random does not depend on the seed
    assert folders() == seen
    made.clip.sha256 = "another file"
    is_new()
    changed = made.folder.parent / "model.py"  # docs/change-one-thing.md: another backbone
    changed.write_text(Path(features.model.__file__).read_text() + "# changed")
    monkeypatch.setattr(features.model, "__file__", str(changed))
    is_new()
    (made.folder.parent / "mine.py").write_text("SIDE = 3")  # which the new model.py imports
    is_new()
    photo(made.split.paths[20], seed=99, size=(70, 60))  # another picture under the same name
    is_new()
    made.split = dataclasses.replace(made.split, paths=made.split.paths[:20],
                                     labels=made.split.labels[:20])
    is_new()


def test_images_are_normalised_as_this_clip_wants_them(made):
    """Another mean and std than OpenAI's: other pixels, and another cache."""
    (_, f, _), = cached(made, views=0, batch=21).batches(0, shuffle=False)
    cached(made, views=1)
    made.clip.mean, made.clip.std = (0.5, 0.5, 0.5), (0.25, 0.5, 1.0)
    loader = cached(made, views=0, batch=21)
    image, _ = loader.images[0, 3]
    made.clip.mean, made.clip.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    pixels, _ = cached(made, views=0).images[0, 3]
    for channel, std in enumerate((0.25, 0.5, 1.0)):
        assert torch.allclose(image[channel], (pixels[channel] - 0.5) / std, atol=1e-6)
    assert 0 <= pixels.min() and 0.5 < pixels.max() <= 1
    (_, g, _), = cached(made, views=0, batch=21).batches(0, shuffle=False)
    assert not torch.allclose(f, g, rtol=1e-2)
    cached(made, views=1)
    assert len(list(made.folder.iterdir())) == 2


def test_disk_need_is_told_before_and_a_full_disk_refused(made, capsys, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="the feature cache needs .* GiB, .* has 0.0: lower"):
        cached(made)
    monkeypatch.undo()
    cached(made)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "MiB" in line][-1:]
    f = cached(made)
    assert "21 images x 2 views" in line and str(made.folder) in line
    assert f.stored.shape[:2] == (2, 21)
    assert capsys.readouterr().out == ""  # nothing to announce the second time


def test_a_cache_is_complete_or_absent(made, monkeypatch):
    """Stopped in the middle by an error or a kill, nothing is left that a later run would read."""
    def stops(self, images, need_global=True):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FeatureLoader, "encode", stops)
        with pytest.raises(KeyboardInterrupt):
            cached(made)
    assert list(made.folder.iterdir()) == []
    process = start(__file__, Path(made.split.paths[0]).parent, made.folder)
    assert process.stdout.readline().startswith("features of photos")
    process.kill()
    process.wait()
    assert not list(made.folder.glob("*.bf16"))
    left = made.folder / "name.bf16.1.part"  # as a kill in the middle leaves it
    left.touch()
    cached(made, seed=1)
    assert left.exists()  # another process may be writing it
    os.utime(left, (0, 0))
    (made.folder / "gone.part").symlink_to("nowhere")  # as when another run is quicker
    whole = cached(made).stored
    assert not left.exists()
    assert torch.equal(whole, cached(made, cache=made.folder / "anew").stored)


def test_two_at_once(made):
    """Two processes fill the same cache at the same time: each reads a complete one."""
    process = start(__file__, Path(made.split.paths[0]).parent, made.folder)
    assert process.stdout.readline().startswith("features of photos")
    mine = cached(made)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert torch.equal(mine.stored, cached(made, cache=made.folder / "anew").stored)


def test_workers_stay_and_change_nothing(made):
    alone, helped = cached(made, views=0), cached(made, views=0, workers=2)
    workers = []
    for epoch in (0, 1):
        for (i, f, x), (j, g, y) in zip(alone.batches(epoch), helped.batches(epoch)):
            assert torch.equal(i, j) and torch.equal(f, g) and torch.equal(x, y)
        workers.append([w.pid for w in helped.loader._iterator._workers])
    assert workers[0] == workers[1]
    next(iter(helped.batches(2)))  # left in the middle, then begun anew
    seen = torch.cat([index for index, _, _ in helped.batches(3, shuffle=False)])
    assert sorted(seen.tolist()) == list(range(21))


def test_a_broken_image_is_one_line_from_workers_too(made):
    Path(made.split.paths[7]).write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(UserError) as error:
            list(cached(made, views=0, workers=workers).batches(0))
        assert "\n" not in str(error.value) and str(error.value).startswith(made.split.paths[7])
    os.remove(made.split.paths[7])
    with pytest.raises(OSError, match="7.png"):
        cached(made)


def test_attention_pool_is_skipped_unless_asked_for(made):
    (_, f, x), (_, g, y) = (next(iter(cached(made, views=0, need_global=wanted).batches(0)))
                            for wanted in (True, False))
    assert torch.equal(f, g) and x is not None and y is None


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cores_share_the_images_of_a_batch_and_change_nothing(made, threads):
    images = torch.randn(11, 3, SIZE, SIZE)  # no multiple of a part
    f, x = made.clip.encode(images)
    torch.set_num_threads(threads)
    loader = cached(made, views=0)
    try:
        found, whole = loader.encode(images)
        assert torch.get_num_threads() == threads and not found.requires_grad
        torch.testing.assert_close(found, f, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole, x, atol=1e-5, rtol=1e-4)
        assert loader.encode(images[:1], need_global=False)[1] is None
    finally:
        torch.set_num_threads(1)


def test_a_cache_needs_a_clip_that_is_known(made):
    made.clip.sha256 = ""  # as clip.build gives it: all of these would share one file
    with pytest.raises(UserError, match="a CLIP of clip.load"):
        cached(made)


@pytest.mark.parametrize("views, workers", ((0, 0), (0, 2), (1, 0)))
def test_two_passes_at_once_are_refused(made, views, workers):
    """Both shared a list of keys: a loop that scored its own loader saw images twice or never."""
    loader = cached(made, views=views, workers=workers)
    outer = loader.batches(0)
    next(outer)
    whole = [index for index, *_ in loader.batches(0, shuffle=False)]
    assert torch.cat(whole).tolist() == [*range(len(loader))]
    with pytest.raises(UserError, match="another pass"):
        next(outer)


def test_loaders_of_the_same_images_keep_their_own_mean(made):
    images = data.Images(made.split, SIZE)
    first = FeatureLoader(images, made.clip)
    expected = next(first.batches(0))[1]
    other = make_clip()
    other.mean, other.std = (0.1, 0.1, 0.1), (1.0, 1.0, 1.0)
    FeatureLoader(images, other)
    assert torch.equal(next(first.batches(0))[1], expected)


@pytest.mark.parametrize("views", (0, 1))
def test_no_pass_waits_for_the_end_of_a_thread(made, monkeypatch, views):
    """A Ctrl-C in that wait counts the thread as ended (Python below 3.13); it then runs on while
    the interpreter ends, and torch aborts: exit status -6 in about 1 of 100 stopped runs."""
    loader = cached(made, views=views)
    monkeypatch.setattr(threading.Thread, "join", lambda *_: pytest.fail("waited for a thread"))
    assert len(list(loader.batches(0))) == len(list(loader.batches(1))) == 3


def test_the_runs_random_numbers_are_untouched(made):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(cached(made, views=0, workers=1).batches(0))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_of_the_ranks(made, ranks):
    """Equal shares that interleave to the batch, padded by its first image."""
    feeds = [cached(made, views=0, rank=rank, world=ranks, batch=6) for rank in range(ranks)]
    for f in feeds:
        f.encode = lambda images, need_global: (images.new_zeros(len(images), 1, 1), None)
    for shuffle, order in ((True, epoch_order(21, 1, 0)), (False, torch.arange(21))):
        shares = [[i for i, _, _ in f.batches(1, shuffle)] for f in feeds]
        for b, batch in enumerate(order.split(6)):
            parts = [share[b] for share in shares]
            assert len({len(part) for part in parts}) == 1
            rows = torch.stack(parts, 1).flatten()
            assert torch.equal(rows[: len(batch)], batch) and (rows[len(batch):] == batch[0]).all()


def test_precision():
    cpu = torch.device("cpu")
    found = [features.set_precision(amp, cpu) for amp in ("auto", "none", "bf16", "fp16")]
    assert found == [None, None, torch.bfloat16, torch.float16]


@gpu
@pytest.mark.parametrize("amp", ["auto", "none", "fp16"])
def test_a_step_never_waits_for_the_gpu(made, amp):
    """Training steps of both stages, fed from the backbone and from the cache, without a single
    host synchronisation."""
    import train
    from small_world import make, options
    folder = make(made.folder.parent / "world")
    for cache in (0, 1):
        # Without Eq. 13, whose number of samples the host has to know.
        cfg, _ = train.parse(options(folder, folder / f"run-{amp}-{cache}", amp=amp,
                                     cache_features=cache, without="mmcl"))
        step, calls = train.training_step, []

        def strict(*arguments):
            calls.append(1)
            if len(calls) in (1, 4):  # compiles, allocates
                return step(*arguments)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return step(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        with mock.patch.object(train, "training_step", strict):
            train.train(cfg)
        allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert allowed == (amp != "none", amp != "none")


@gpu
def test_auto_is_bf16_where_the_gpu_has_it():
    device = torch.device("cuda")
    has_it = torch.cuda.get_device_capability()[0] >= 8
    assert features.set_precision("auto", device) is (torch.bfloat16 if has_it else None)


@gpu
@pytest.mark.parametrize("amp", (None, torch.bfloat16, torch.float16), ids=str)
def test_texts_replayed_as_a_graph_are_the_same(amp):
    from support.replay import replayed
    from trm import Prompts
    encoder = make_clip().cuda()
    prompts = Prompts(encoder, ["dog", "traffic light", "cup"], 4).cuda()
    plain, replay = prompts.forward, replayed(prompts, encoder, amp)
    up = torch.randn(2, 3, encoder.D, device="cuda")

    def both(forward):
        with torch.autocast("cuda", amp or torch.bfloat16, amp is not None):
            g = torch.stack(forward(encoder))
        return g.detach(), torch.autograd.grad(g, prompts.context, up)[0]

    first = both(replay)
    assert all(torch.equal(a, b) for a, b in zip(first, both(plain)))
    kept = first[0].clone()
    with torch.no_grad():  # as an optimizer does it
        prompts.context.add_(1.0)
    second = both(replay)
    assert all(torch.equal(a, b) for a, b in zip(second, both(plain)))
    assert torch.equal(first[0], kept) and not torch.equal(first[0], second[0])
    with torch.no_grad():  # an evaluation is in float32
        assert torch.equal(torch.stack(replay(encoder)), torch.stack(plain(encoder)))


@gpu
@pytest.mark.parametrize("amp", (None, torch.bfloat16), ids=str)
def test_a_compiled_encoder_gives_the_same_features(made, amp):
    made.clip.cuda()
    found = [[f for _, f, _ in cached(made, views=0, device="cuda", amp=amp, need_global=False,
                                      compiled=compiled).batches(0, shuffle=False)]
             for compiled in (False, True)]  # 8 + 8 + 5 images
    for eager, compiled in zip(*found):
        assert float((eager - compiled).norm() / eager.norm()) < (1e-5 if amp is None else 2e-2)


def test_only_the_encoder_of_many_images_is_compiled(made, monkeypatch):
    import train
    from small_world import make, options
    from tools import build
    folder = make(made.folder.parent / "world")
    cfg, _ = train.parse(options(folder, folder / "run", cache_features=0))
    split = build.load_data(cfg)[0]
    monkeypatch.setattr(build.kernels, "runs_triton", lambda _: True)
    for epochs, views, compiled in ((9_000, 0, True), (9_000, 1, False), (8_000, 0, False)):
        cfg.epochs, cfg.cache_features = epochs, views
        loader = build.training_loader(cfg, split, made.clip, "cpu", 0, 1)
        assert (loader.encode_dense != made.clip.encode_dense) == compiled


@pytest.mark.parametrize("matching, wanted", (("carl", False), ("average", False),
                                              ("global", True)))
def test_training_looks_at_the_global_feature_where_it_is_matched(made, matching, wanted):
    """The attention pool costs time: of the others nobody reads what it gives."""
    from config import Config
    from tools import build
    loader = build.training_loader(Config(matching=matching, size=SIZE, workers=0),
                                   made.split, made.clip, torch.device("cpu"), 0, 1)
    assert loader.need_global == wanted


if __name__ == "__main__":  # a process to kill: fills the cache, slowly
    features.CHUNK = 4
    torch.set_num_threads(1)
    encode = FeatureLoader.encode

    def slowly(self, images, need_global=True):
        time.sleep(0.3)
        return encode(self, images, need_global)

    FeatureLoader.encode = slowly
    folder = Path(sys.argv[1])
    paths = [str(folder / f"{i}.png") for i in range(21)]
    split = data.Split("photos", paths, ["a", "b"], np.ones((21, 2), np.int8))
    FeatureLoader(data.Images(split, SIZE, "taidpt"), make_clip(), batch=8, views=2,
                  cache=Path(sys.argv[2]))


@pytest.mark.parametrize("size, images", ((64, 4), (224, 4), (256, 4), (448, 1), (1024, 1)))
def test_a_core_takes_fewer_large_images_at_once(size, images):
    from clip.features import at_once
    assert at_once(torch.empty(2, 3, size, size)) == images


@pytest.mark.parametrize("method, stay", (("fork", False), ("spawn", True), ("forkserver", True)))
def test_processes_that_are_slow_to_start_stay_between_evaluations(monkeypatch, method, stay):
    from clip import features

    class Loader(features.FeatureLoader):
        stored, world, rank, batch, amp, pinned, workers = None, 1, 0, 2, None, False, 2
        device = torch.device("cpu")

        def __init__(self):
            self.images, self.loader, self.need_global = range(4), "processes", False

        def load(self, epoch, parts):
            return iter([(torch.zeros(2), torch.arange(2))])

        def encode(self, images, need_global):
            return torch.zeros(2, 1, 3), None

    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda: method)
    loader = Loader()
    assert len(list(loader.batches(0, shuffle=False))) == 1
    assert (loader.loader is not None) == stay


def test_no_two_epochs_or_seeds_share_an_order():
    orders = [tuple(epoch_order(50, epoch, seed).tolist())
              for seed in range(4) for epoch in range(4)]
    assert len({*orders}) == 16 and all(sorted(order) == [*range(50)] for order in orders)
