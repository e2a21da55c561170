"""clip/weights.py: every kind of file gives the same model, damage is refused in one line, downloads are safe."""
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_clip import TEXTS, images, kinds, small

import clip
from clip import weights
from clip.weights import find_activation, sha256
from support import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


class Node(torch.nn.Module):
    """A tree of modules that holds a state dict under its own names, to be saved as a TorchScript archive."""

    def forward(self, x):
        return x + 1


OPENAI = {"input_resolution": 64, "context_length": 20, "vocab_size": 2514}  # in its archives, beside the weights


def archive(state, file, extra=OPENAI):
    root = Node()
    state = state | {k: torch.tensor(v) for k, v in extra.items()}
    for key, value in state.items():
        *path, name = key.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]
        if value.is_floating_point() and "running" not in name:
            node.register_parameter(name, torch.nn.Parameter(value))
        else:
            node.register_buffer(name, value)
    torch.jit.save(torch.jit.trace(root, torch.zeros(1)), file)


def features(model):
    x = images(64, 80)
    with torch.no_grad():
        return [*model.encode(x), model.encode_text(model.tokenize(TEXTS))]


@kinds
def test_archive_state_dict_and_safetensors_load_to_identical_outputs(kind, tmp_path):
    half = small(kind, half=True)
    archive(half, tmp_path / "archive.pt")
    torch.save({"module." + k: v for k, v in half.items()}, tmp_path / "state-openai.pt")
    torch.save({"epoch": 3, "name": "run", "state_dict": {"module._orig_mod." + k: v.float() for k, v in half.items()},
                "optimizer": {}}, tmp_path / "epoch_3_quickgelu.bin")
    save_file(half, tmp_path / "plain.safetensors", metadata={"activation": "quickgelu"})
    want = features(clip.build(half, fold=True))
    for path in tmp_path.iterdir():
        model = clip.load(path)
        assert all(torch.equal(a, b) for a, b in zip(features(model), want)), path.name
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and model.name == str(path)
    archive(half, tmp_path / "traced.pt", extra={"attn_mask": 0.0})  # as open_clip traces its models
    assert torch.equal(features(clip.load(tmp_path / "traced.pt", activation="quickgelu"))[1], want[1])
    with pytest.raises(UserError, match="does not tell its activation"):
        clip.load(tmp_path / "traced.pt")
    unfolded = clip.load(path, fold=False)
    assert not any(p.requires_grad for p in unfolded.parameters()) and unfolded.state_dict().keys() == half.keys()


def test_build_has_its_own_copy():
    state = {k: v.clone() for k, v in small("vit").items()}
    model = clip.build(state)
    before = features(model)
    for v in state.values():
        v.zero_()
    assert all(torch.equal(a, b) for a, b in zip(features(model), before))


def test_activation_is_told_or_asked_for(tmp_path):
    path = tmp_path / "vit_b_32-laion.pt"
    torch.save(small("vit"), path)
    with pytest.raises(UserError, match="does not tell its activation"):
        clip.load(path)
    quick, gelu = clip.load(path, activation="quickgelu"), clip.load(path, activation="gelu")
    assert not torch.allclose(*(m.encode_image(images(48, 48)) for m in (quick, gelu)))
    with pytest.raises(UserError, match="quickgelu, gelu, not 'relu'"):
        clip.load(path, activation="relu")
    config = tmp_path / "open_clip_config.json"  # as open_clip publishes beside its weights
    for text, found in [({"quick_gelu": True}, "quickgelu"), ({}, "gelu")]:
        config.write_text(json.dumps({"model_cfg": text}))
        assert find_activation(path, "", {}, {}) == found
        assert clip.load(path).visual.transformer.resblocks[0].activation == found
    config.write_text("[]")
    with pytest.raises(UserError, match="no configuration of open_clip"):
        clip.load(path)


@pytest.mark.parametrize("name, digest, state, metadata, found", [
    ("x.pt", "", {}, {}, None), ("x.pt", "", {"input_resolution": 224}, {}, "quickgelu"),
    ("x.pt", weights.FILES["RN50"][1], {}, {}, "quickgelu"),
    ("ViT-B-32-quickgelu-laion400m.pt", "", {}, {}, "quickgelu"), ("ViT_B_16_OpenAI.bin", "", {}, {}, "quickgelu"),
    ("x.safetensors", "", {}, {"activation": "gelu"}, "gelu"),
    ("x.safetensors", "", {}, {"model": "RN50-quickgelu"}, "quickgelu"),
])
def test_what_tells_the_activation(name, digest, state, metadata, found, tmp_path):
    assert find_activation(tmp_path / name, digest, state, metadata) == found


def edited(**changes):
    state = dict(small("resnet"))
    for key, value in changes.items():
        key = key.replace("__", ".")
        state.pop(key, None) if value is None else state.update({key: value})
    return state


@pytest.mark.parametrize("state, says", [
    (edited(visual__conv2__weight=None), "1 tensors do not fit .*visual.conv2.weight missing"),
    (edited(logit_bias=torch.ones(1)), "logit_bias unexpected"),
    (edited(ln_final__bias=torch.ones(5)), r"ln_final.bias is \(5,\), expected \(128,\)"),
    (edited(visual__layer3__0__conv1__weight=None, visual__layer3__0__bn1__weight=None), "2 tensors do not fit"),
    (edited(text_projection=None), "not a CLIP .*'text_projection' is missing"),
    (edited(positional_embedding=torch.tensor(1.0)), "not a CLIP"),
    ({"model.layer.weight": torch.ones(2)}, "not a CLIP .* 1 tensors"),
    ({}, "not a CLIP"),
    (torch.ones(3), "holds a Tensor, expected a state dict"),
])
def test_mismatch_is_loud(state, says, tmp_path):
    path = tmp_path / "openai.pt"
    torch.save(state, path)
    with pytest.raises(UserError, match=says) as e:
        clip.load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 600


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.target),)


def test_damaged_and_foreign_files_are_refused_and_run_nothing(tmp_path):
    torch.save(small("vit"), tmp_path / "state.pt")
    archive(small("vit", half=True), tmp_path / "archive.pt")
    save_file(small("vit"), tmp_path / "plain.safetensors")
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for size in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError) as e:
                clip.load(path, activation="gelu")
            assert "incomplete" in str(e.value) and "\n" not in str(e.value)
    Evil.target = tmp_path / "ran"
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "page.html.pt").write_text("<html>not found</html>")
    for name in ("evil.pt", "page.html.pt"):
        with pytest.raises(UserError, match="no readable weights file"):
            clip.load(tmp_path / name)
    assert not Evil.target.exists()
    for name in ("RN18", tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UserError, match="neither a weights file nor one of tiny, RN50, .*ViT-L/14@336px"):
            clip.load(name)


def test_the_missing_small_clip_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "TINY", tmp_path / "tiny.safetensors")
    with pytest.raises(UserError, match="python -m clip.pretrain"):
        clip.load()
    save_file(small("resnet"), weights.TINY)
    assert clip.load().name == "tiny"


# ---- downloads, from a server on this machine

@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves `server.body` under every address, cut to `server.cut` bytes; the cache is tmp_path/.cache/clip."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            s.asked.append(self.path)
            if s.barrier:
                s.barrier.wait(60)
            self.send_response(s.status)
            self.send_header("Content-Length", s.length or str(len(s.body)))
            self.end_headers()
            self.wfile.write(s.body[:s.cut])

        def log_message(self, *args):
            pass

    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    buffer = io.BytesIO()
    torch.save(small("vit", half=True), buffer)
    s.body, s.cut, s.status, s.length, s.barrier, s.asked = buffer.getvalue(), None, 200, None, None, []
    s.base, s.digest = f"http://127.0.0.1:{s.server_address[1]}/clip", hashlib.sha256(s.body).hexdigest()
    s.cache = tmp_path / ".cache" / "clip"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(weights, "BASE", s.base)
    monkeypatch.setattr(weights, "cache", lambda: s.cache)
    monkeypatch.setitem(weights.FILES, "RN50", ("RN50.pt", s.digest))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def test_nine_names_with_whole_hashes():
    assert len(weights.FILES) == 9 and len({digest for _, digest in weights.FILES.values()}) == 9
    assert all(len(digest) == 64 and int(digest, 16) for _, digest in weights.FILES.values())


def test_download_once_then_from_the_cache(server):
    model = clip.load("RN50")
    assert (model.name, model.sha256) == ("RN50", server.digest)
    assert server.asked == [f"/clip/{server.digest}/RN50.pt"]
    clip.load("RN50")
    assert len(server.asked) == 1
    kept = server.cache / "RN50.pt"
    kept.write_bytes(b"rot")  # a damaged file in the cache is fetched again
    clip.load("RN50")
    assert sha256(kept) == server.digest and [p.name for p in server.cache.iterdir()] == [kept.name]


@pytest.mark.parametrize("fault, says", [
    (dict(cut=1000), "1000 of"), (dict(cut=0), "0 of"), (dict(body=b"other bytes"), "sha256 .* expected"),
    (dict(status=404), "Not Found"), (dict(status=500), "Internal Server Error"),
    (dict(length="abc"), "abc"),
])
def test_a_bad_download_leaves_nothing(server, fault, says):
    for key, value in fault.items():
        setattr(server, key, value)
    with pytest.raises(UserError, match=says) as e:
        clip.load("RN50")
    assert "\n" not in str(e.value) and str(server.cache / "RN50.pt") in str(e.value)
    assert list(server.cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(server, monkeypatch):
    class Bar:
        def __init__(self, **kw): pass
        def __enter__(self): return self
        def __exit__(self, *args): pass
        def update(self, n): raise KeyboardInterrupt
    monkeypatch.setattr(weights, "tqdm", Bar)
    with pytest.raises(KeyboardInterrupt):
        clip.load("RN50")
    assert list(server.cache.iterdir()) == []


def test_another_file_in_its_place_is_told_offline(server, monkeypatch):
    server.cache.mkdir(parents=True)
    (server.cache / "RN50.pt").write_bytes(b"another model")
    monkeypatch.setattr(weights, "BASE", "http://127.0.0.1:9/clip")
    with pytest.raises(UserError, match="RN50.pt is another file .sha256 differs.; could not get"):
        clip.load("RN50")
    assert (server.cache / "RN50.pt").read_bytes() == b"another model"


def test_offline_says_what_to_do(server, monkeypatch):
    monkeypatch.setattr(weights, "BASE", "http://127.0.0.1:9/clip")  # nothing listens there
    with pytest.raises(UserError, match="could not get CLIP RN50 .*refused.*put the file at .*RN50.pt"):
        clip.load("RN50")


def test_a_cache_that_cannot_be_written(server):
    server.cache.parent.mkdir(parents=True)
    server.cache.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not get CLIP RN50"):
        clip.load("RN50")


def test_two_processes_at_once(server, tmp_path):
    """Both are downloading before either is answered; both load, one file stays."""
    server.barrier = threading.Barrier(2)
    code = ("import sys, clip; from clip import weights; weights.BASE = sys.argv[1]; "
            "weights.FILES['RN50'] = ('RN50.pt', sys.argv[2]); print(clip.load('RN50').sha256)")
    env = os.environ | {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "no_proxy": "*", "OMP_NUM_THREADS": "1"}
    pair = [subprocess.Popen([sys.executable, "-c", code, server.base, server.digest], env=env, text=True,
                             cwd=Path(__file__).resolve().parent.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)]
    for process in pair:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == server.digest, err
    assert len(server.asked) == 2 and [p.name for p in server.cache.iterdir()] == ["RN50.pt"]


@pytest.mark.parametrize("change", [
    lambda s: {k: v for k, v in s.items() if not k.startswith("transformer.resblocks")},
    lambda s: {k: v for k, v in s.items() if "layer4" not in k},
    lambda s: s | {"visual.attnpool.positional_embedding": s["visual.attnpool.positional_embedding"][:1]},
    lambda s: s | {"text_projection": s["text_projection"][:0]},
    lambda s: s | {"visual.layer1.0.conv1.weight": s["visual.layer1.0.conv1.weight"][:0]}])
def test_parts_that_are_missing_altogether_are_refused_when_loaded(tmp_path, change):
    torch.save(change(small("resnet")), tmp_path / "clip-quickgelu.pt")
    with warnings.catch_warnings(), pytest.raises(UserError, match="clip-quickgelu.pt") as error:
        warnings.simplefilter("error")
        clip.load(tmp_path / "clip-quickgelu.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("heads", (129, 200))
def test_a_width_that_no_heads_divide_is_refused(heads):
    torch.manual_seed(0)
    state = clip.CLIP(16, 32, (1, 1, 1, 1), 4, None, 20, 600, heads, text_heads=1, text_layers=1).state_dict()
    with pytest.raises(UserError, match="these sizes"):
        clip.model.build(state)
