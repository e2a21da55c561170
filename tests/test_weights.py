"""CLIP as people have it: every kind of file gives the same model, damage is refused in one line,
no code of a file is run, downloads are safe."""
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import numpy as np
import torch
from safetensors.torch import save_file
from test_clip import TEXTS, images, kinds, small

import clip
from clip import weights
from clip.weights import sha256
from config import parse
from support import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def features(model):
    x = images(64, 80)
    with torch.no_grad():
        return [*model.encode(x), model.encode_text(model.tokenize(TEXTS))]


def equal(model, want):
    return all(torch.equal(a, b) for a, b in zip(features(model), want))


def refused(path, *words, **options):
    """clip.load refuses the path in one line that holds `words`."""
    with warnings.catch_warnings(), pytest.raises(UserError) as error:
        warnings.simplefilter("error")
        clip.load(path, **options)
    line = str(error.value)
    assert "\n" not in line and len(line) < 900
    for word in words:
        assert word in line, line


# ---- names of tensors, and files

class Node(torch.nn.Module):
    """A tree of modules that holds a state dict under its own names."""

    def forward(self, x):
        return x + 1


def archive(state, file):
    """As OpenAI published its weights: TorchScript, with three numbers beside the weights."""
    numbers = {"input_resolution": 64, "context_length": 20, "vocab_size": 2514}
    root = Node()
    for key, value in (state | {k: torch.tensor(v) for k, v in numbers.items()}).items():
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


@kinds
def test_archive_state_dict_and_safetensors_load_to_identical_outputs(kind, tmp_path, monkeypatch):
    half = small(kind, half=True)
    archive(half, tmp_path / "archive.pt")
    monkeypatch.setitem(weights.FILES, "OURS", sha256(tmp_path / "archive.pt"))
    torch.save(half, tmp_path / "state-openai.pt")
    save_file(half, tmp_path / "plain-quickgelu.safetensors")
    want = features(clip.build(half, fold=True))
    for path in tmp_path.iterdir():
        model = clip.load(path)
        assert equal(model, want), path.name
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert model.sha256 == sha256(path)
        assert (model.mean, model.std) == (clip.model.MEAN, clip.model.STD)


def prefixed(state, prefix):
    return {prefix + name: t for name, t in state.items()}


def custom_text(state):
    """The names of open_clip's CustomTextCLIP, as trained with a bias of the logits."""
    renamed = {name if name.startswith(("visual", "logit")) else "text." + name: t
               for name, t in state.items()}
    return renamed | {"logit_bias": torch.tensor(-10.0)}


@kinds
@pytest.mark.parametrize("wrap", [
    lambda s: prefixed(s, "module."),
    lambda s: {"epoch": torch.tensor(3), "state_dict": prefixed(s, "module._orig_mod."),
               "optimizer": {"state": {}}},
    lambda s: {"model": prefixed(s, "clip."), "step": 7},
    lambda s: {"model_state_dict": s, "args": ["x"]},
    custom_text,
    lambda s: {"state_dict": prefixed(custom_text(s), "module.")},
    lambda s: s | {"attn_mask": torch.zeros(20, 20), "logit_bias": torch.tensor(-10.0)},
    lambda s: s | {"epoch": 3, "state_dict": None},
], ids=["module", "checkpoint", "key", "state", "custom", "custom-module", "stray", "beside"])
def test_names_and_wrappings(kind, wrap, tmp_path):
    torch.save(wrap(small(kind)), tmp_path / "w.pt")
    want = features(clip.build(small(kind), fold=True))
    assert equal(clip.load(tmp_path / "w.pt", activation="quickgelu"), want)


def hugging_face(state):
    """OpenAI's names -> those of Hugging Face's CLIPModel."""
    out = {"logit_scale": state["logit_scale"],
           "text_projection.weight": state["text_projection"].T,
           "visual_projection.weight": state["visual.proj"].T,
           "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
           "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
           "text_model.embeddings.position_ids": torch.arange(20)[None],
           "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
           "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
           "vision_model.embeddings.position_embedding.weight":
               state["visual.positional_embedding"]}
    layers = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm",
             "visual.ln_post": "vision_model.post_layernorm",
             "ln_final": "text_model.final_layer_norm"}
    for part in ("weight", "bias"):
        out |= {f"{theirs}.{part}": state[f"{ours}.{part}"] for ours, theirs in norms.items()}
        for ours, theirs, depth in (("", "text_model", 2), ("visual.", "vision_model", 3)):
            for i in range(depth):
                block = f"{ours}transformer.resblocks.{i}"
                layer = f"{theirs}.encoder.layers.{i}"
                out |= {f"{layer}.{b}.{part}": state[f"{block}.{a}.{part}"]
                        for a, b in layers.items()}
                joint = state[f"{block}.attn.in_proj_{part}"].chunk(3)
                out |= {f"{layer}.self_attn.{letter}_proj.{part}": t
                        for letter, t in zip("qkv", joint)}
    return {name: t.contiguous().clone() for name, t in out.items()}


def hf_config(**changes):
    text = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=512)
    vision = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=3, patch_size=16)
    return dict(model_type="clip", text_config=text, vision_config=vision) | changes


def hf_folder(folder, config=None, pixels=None, shards=1, kind="safetensors"):
    """A folder as CLIPModel.save_pretrained leaves it; more shards than one have an index."""
    folder.mkdir(parents=True, exist_ok=True)
    state = hugging_face(small("vit"))
    (folder / "config.json").write_text(json.dumps(config or hf_config()))
    if pixels:
        (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    files = [f"{stem}-{i + 1:05}-of-{shards:05}.{kind}" for i in range(shards)]
    if shards == 1:
        files = [f"{stem}.{kind}"]
    else:
        index = {name: files[i % shards] for i, name in enumerate(state)}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": index}))
    for i, file in enumerate(files):
        part = {name: t for k, (name, t) in enumerate(state.items()) if k % shards == i}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_folder(kind, shards, tmp_path):
    folder = hf_folder(tmp_path / "a", shards=shards, kind=kind)
    want = features(clip.build(small("vit"), fold=True))
    model = clip.load(folder)
    assert equal(model, want)
    assert model.sha256 == clip.load(folder).sha256
    file = next(iter(sorted(folder.glob("*.index.json"))), next(iter(folder.glob(f"*.{kind}"))))
    assert equal(clip.load(file), want)  # the file alone, its configuration beside it
    (folder / "config.json").unlink()
    refused(file, "does not tell its activation", "--activation quickgelu")
    assert equal(clip.load(file, activation="quickgelu"), want)
    if shards > 1:
        sorted(folder.glob(f"*.{kind}"))[1].unlink()
        refused(folder, "00002-of-00003", activation="gelu")


def test_a_repository_of_the_local_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    repository = tmp_path / "hub" / "models--openai--clip-tiny"
    hf_folder(repository / "snapshots" / "abc123")
    refused("openai/clip-tiny", "no owner/repository that was downloaded into", str(tmp_path))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    want = features(clip.build(small("vit"), fold=True))
    for name in ("openai/clip-tiny", "hf-hub:openai/clip-tiny"):
        model = clip.load(name)
        assert equal(model, want)
    cfg, _ = parse(["--clip", "openai/clip-tiny"])
    assert cfg.clip == "openai/clip-tiny"  # no path below this folder
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    assert equal(clip.load("openai/clip-tiny"), want)


# ---- configurations

def test_hugging_face_configuration_is_obeyed(tmp_path):
    state = small("vit")
    config = hf_config()
    config["text_config"] |= dict(hidden_act="gelu", num_attention_heads=4)
    config["vision_config"] |= dict(hidden_act="gelu", num_attention_heads=8)
    pixels = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.1], resample=3)
    model = clip.load(hf_folder(tmp_path, config, pixels))
    want = clip.build(state, fold=True, activation="gelu", text_heads=4, vision_heads=8)
    assert equal(model, features(want))
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    refused(tmp_path, "computes with gelu", activation="quickgelu")
    names = {model.sha256}
    (tmp_path / "preprocessor_config.json").unlink()
    names.add(clip.load(tmp_path).sha256)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": pixels}))
    assert clip.load(tmp_path).mean == (0.5, 0.4, 0.3)
    (tmp_path / "config.json").unlink()
    names.add(clip.load(tmp_path, activation="quickgelu").sha256)
    assert len(names) == 3 and sha256(tmp_path / "model.safetensors") in names  # the file alone


@pytest.mark.parametrize("change, says", [
    (dict(model_type="siglip"), 'model_type "siglip", this CLIP has clip'),
    (dict(text_config=dict(hidden_act="relu")), 'hidden_act "relu", this CLIP has quick_gelu'),
    (dict(text_config=dict(hidden_act="gelu_new"), vision_config=dict(hidden_act="gelu_new")),
     'hidden_act "gelu_new", this CLIP has quick_gelu'),
    (dict(text_config=dict(hidden_act="gelu")), "hidden_act"),  # the images' is quick_gelu
    (dict(text_config=dict(num_hidden_layers=12)), "num_hidden_layers 12, this CLIP has 2"),
    (dict(vision_config=dict(layer_norm_eps=1e-6)), "layer_norm_eps"),
    (dict(vision_config=dict(patch_size=32)), "patch_size 32, this CLIP has 16"),
    (dict(vision_config=dict(num_attention_heads=5)), "is no CLIP"),
    (dict(text_config="none"), "no configuration of CLIP"),
])
def test_a_hugging_face_configuration_of_another_model_is_refused(change, says, tmp_path):
    refused(hf_folder(tmp_path, hf_config(**change)), says, str(tmp_path))


def test_pixels_that_are_not_normalised_are_refused(tmp_path):
    refused(hf_folder(tmp_path, pixels=dict(do_normalize=False)), "do_normalize false")
    refused(hf_folder(tmp_path, pixels=dict(rescale_factor=1 / 127.5)), "rescale_factor 0.00784")
    clip.load(hf_folder(tmp_path, pixels=dict(rescale_factor=0.00392156862745098)))


def oc_folder(folder, state, kind="vit", custom=False, **changes):
    """A folder as open_clip publishes it; changes: {"vision_cfg": {...}} and so on."""
    folder.mkdir(exist_ok=True)
    vision = {"vit": dict(image_size=48, layers=3, width=128, patch_size=16),
              "resnet": dict(image_size=64, layers=[1, 2, 1, 1], width=8, patch_size=None)}[kind]
    text = dict(context_length=20, vocab_size=2514, width=128, heads=2, layers=2)
    pixels = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="shortest")
    model = dict(embed_dim=24, vision_cfg=vision | changes.pop("vision_cfg", {}),
                 text_cfg=text | changes.pop("text_cfg", {}))
    pixels |= changes.pop("preprocess_cfg", {})
    config = dict(model_cfg=model | changes, preprocess_cfg=pixels)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(custom_text(state) if custom else state, folder / "open_clip_model.safetensors")
    return folder


@kinds
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("custom", [True, False])
def test_open_clip_folder(kind, quick, custom, tmp_path):
    state = small(kind)
    model = clip.load(oc_folder(tmp_path, state, kind, custom, custom_text=custom,
                                quick_gelu=quick))
    want = clip.build(state, fold=True, activation="quickgelu" if quick else "gelu")
    assert equal(model, features(want))
    assert model.mean == model.std == (0.5, 0.5, 0.5)
    (tmp_path / "model.safetensors").write_bytes(b"of another library")
    assert equal(clip.load(tmp_path), features(want))
    half = clip.load(oc_folder(tmp_path, state, kind, custom, preprocess_cfg={"std": None}))
    assert (half.mean, half.std) == ((0.5, 0.5, 0.5), clip.model.STD)  # as open_clip takes them


def test_wide_transformers_of_open_clip(tmp_path):
    """bigG: an MLP that is not four times as wide, heads that are not 64 wide."""
    torch.manual_seed(0)
    shape = dict(embed_dim=24, resolution=48, layers=3, vision_width=104, patch=16, vision_mlp=512,
                 context_length=20, vocab_size=2514, text_width=128, text_layers=2, text_mlp=300)
    state = clip.CLIP(**shape, vision_heads=2).state_dict()
    assert weights.dimensions(state) == shape
    folder = oc_folder(tmp_path, state, vision_cfg=dict(width=104, head_width=52, mlp_ratio=4.9231))
    model = clip.load(folder)
    assert model.visual.transformer.resblocks[0].attn.num_heads == 2
    assert equal(model, features(clip.build(state, True, "gelu", vision_heads=2)))


@pytest.mark.parametrize("width, heads", [(768, 12), (1024, 16), (1280, 16), (1664, 16)])
def test_heads_of_released_models_without_a_configuration(width, heads):
    """ViT-B, L, H and bigG: 64, 64, 80 and 104 channels a head."""
    with torch.device("meta"):
        model = clip.CLIP(24, 28, 1, width, 14, 20, 600, 64, text_layers=1)
    assert model.visual.transformer.resblocks[0].attn.num_heads == heads


@pytest.mark.parametrize("change, says", [
    (dict(vision_cfg=dict(pool_type="avg")), 'pool_type "avg", this CLIP has tok'),
    (dict(vision_cfg=dict(attentional_pool=True)), "attentional_pool true"),
    (dict(vision_cfg=dict(global_average_pool=True)), "global_average_pool"),
    (dict(vision_cfg=dict(no_ln_pre=True)), "no_ln_pre"),
    (dict(vision_cfg=dict(timm_model_name="vit")), "timm_model_name"),
    (dict(vision_cfg=dict(layers=12)), "layers 12, this CLIP has 3"),
    (dict(vision_cfg=dict(norm_kwargs=dict(eps=1e-6))), "norm_kwargs"),
    (dict(vision_cfg=dict(something_new=3)), "something_new"),
    (dict(text_cfg=dict(no_causal_mask=True)), "no_causal_mask"),
    (dict(text_cfg=dict(pool_type="last")), "pool_type"),
    (dict(text_cfg=dict(hf_tokenizer_name="x/y")), "hf_tokenizer_name"),
    (dict(text_cfg=dict(tokenizer_kwargs=dict(clean="canonicalize"))), "tokenizer_kwargs"),
    (dict(multimodal_cfg=dict(layers=1)), "multimodal_cfg"),
    (dict(preprocess_cfg=dict(interpolation="bilinear")), "interpolation"),
    (dict(preprocess_cfg=dict(mean="grey")), "no configuration of CLIP"),
])
def test_an_open_clip_configuration_that_this_clip_cannot_obey_is_refused(change, says, tmp_path):
    folder = oc_folder(tmp_path, small("vit"), **change)
    refused(folder, says, str(folder))
    assert clip.load(oc_folder(tmp_path, small("vit"), vision_cfg=dict(attentional_pool=False,
                                                                       patch_dropout=0.5)))


def test_an_attention_pool_of_open_clip_with_other_heads_is_refused(tmp_path):
    folder = oc_folder(tmp_path, small("resnet"), "resnet", vision_cfg=dict(head_width=32))
    refused(folder, "head_width 32, this CLIP has 64")


def test_each_configuration_is_blamed_by_its_name(tmp_path):
    hf_folder(tmp_path, pixels={})
    (tmp_path / "preprocessor_config.json").write_text("{")
    refused(tmp_path, "preprocessor_config.json is no configuration")


def test_an_activation_against_the_configuration_is_refused(tmp_path):
    folder = oc_folder(tmp_path, small("vit"), quick_gelu=False)
    refused(folder, "it computes with gelu: drop --activation quickgelu", activation="quickgelu")
    assert clip.load(folder, activation="gelu").activation == "gelu"


def test_a_configuration_that_is_none(tmp_path):
    folder = oc_folder(tmp_path, small("vit"))
    for text in ("[]", "{}", '{"model_cfg": []}', "{", "[" * 100_000, "x" * (1 << 24)):
        (folder / "open_clip_config.json").write_text(text + " ")
        refused(folder, "no configuration of CLIP", "take it away")


def test_activation_is_told_or_asked_for(tmp_path):
    path = tmp_path / "vit_b_32-laion.pt"
    torch.save(small("vit"), path)
    refused(path, "does not tell its activation: ", "add --activation quickgelu")
    quick, gelu = clip.load(path, activation="quickgelu"), clip.load(path, activation="gelu")
    assert not torch.allclose(*(m.encode_image(images(48, 48)) for m in (quick, gelu)))
    assert quick.sha256 == sha256(path) != gelu.sha256
    for name in ("ViT-B-32-quickgelu-laion400m.pt", "ViT_B_16_OpenAI.bin"):
        torch.save(small("vit"), tmp_path / name)
        assert equal(clip.load(tmp_path / name), features(quick))
    torch.save(small("vit") | {"input_resolution": torch.tensor(48)}, path)  # of OpenAI's archive
    assert equal(clip.load(path), features(quick))
    torch.save({"model.layer.weight": torch.ones(2)}, path)  # names first
    refused(path, "it holds model.layer.weight")


# ---- what is refused

def test_build_has_its_own_copy():
    state = {k: v.clone() for k, v in small("vit").items()}
    model = clip.build(state)
    before = features(model)
    for v in state.values():
        v.zero_()
    assert equal(model, before)


def edited(**changes):
    state = dict(small("resnet"))
    for key, value in changes.items():
        key = key.replace("__", ".")
        state.pop(key, None) if value is None else state.update({key: value})
    return state


def without(word):
    return {name: t for name, t in small("resnet").items() if word not in name}


@pytest.mark.parametrize("state, says", [
    (edited(visual__conv2__weight=None), "visual.conv2.weight"),
    (edited(head__weight=torch.ones(1)), "head.weight"),
    (edited(ln_final__bias=torch.ones(5)), "ln_final.bias"),
    (edited(ln_final__bias=torch.full((128,), float("nan"))), "ln_final.bias"),
    (edited(ln_final__bias=torch.ones(128, dtype=torch.int8)), "ln_final.bias"),
    (edited(text_projection=None), "no CLIP, or it is incomplete: 'text_projection' is missing"),
    (edited(positional_embedding=torch.tensor(1.0)), "is no CLIP"),
    (edited(text_projection=torch.ones(0, 24)), "text_projection is (0, 24)"),
    (without("transformer.resblocks"), "is no CLIP"),
    (without("layer4"), "layer4"),
    ({"model.layer.weight": torch.ones(2)}, "holds model.layer.weight, expected one state dict"),
    ({}, "holds nothing"),
    ({"epoch": 3, "optimizer": {}}, "holds epoch, optimizer"),
    ({"model": small("vit"), "ema": small("vit")}, "holds model, ema"),
    ([1], "is no CLIP"),
    (torch.ones(3), "is no CLIP"),
])
def test_what_a_file_holds_is_said(state, says, tmp_path):
    torch.save(state, tmp_path / "openai.pt")
    refused(tmp_path / "openai.pt", says, str(tmp_path / "openai.pt"))


@pytest.mark.parametrize("text", ("<!DOCTYPE html><title>404</title>", '{"error": "denied"}', "no"))
def test_the_page_of_a_server_is_no_weights_file(text, tmp_path):
    (tmp_path / "openai.pt").write_text(text)
    refused(tmp_path / "openai.pt", "it is text", text[:20], "download it again")


def test_numbers_of_numpy_beside_the_weights_say_what_to_save(tmp_path):
    torch.save({"epoch": np.float64(3), "state_dict": small("vit")}, tmp_path / "openai.pt")
    refused(tmp_path / "openai.pt", "torch.save its state dict alone")


@pytest.mark.parametrize("width", (129, 200))
def test_a_width_that_no_heads_divide_is_refused(width, tmp_path):
    torch.manual_seed(0)
    state = clip.CLIP(16, 32, (1, 1, 1, 1), 4, None, 20, 600, width, text_heads=1,
                      text_layers=1).state_dict()
    torch.save(state, tmp_path / "quickgelu.pt")
    refused(tmp_path / "quickgelu.pt", "is no CLIP", "divisible")


def test_damaged_and_foreign_files(tmp_path):
    torch.save(small("vit"), tmp_path / "state.pt")
    save_file(small("vit"), tmp_path / "plain.safetensors")
    for path in list(tmp_path.iterdir()):
        whole = path.read_bytes()
        for size in (0, 1, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            refused(path, "incomplete", activation="gelu")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    refused(tmp_path / "page.pt", "is no CLIP")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"
                                                "oid sha256:4d7a\nsize 605157884\n")
    refused(tmp_path / "model.safetensors", "git-lfs.github.com", "git lfs pull")
    refused(tmp_path, "git lfs pull")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "it holds none of", "pytorch_model.bin")
    for name in ("RN18", tmp_path / "absent.pt"):
        refused(name, "is no file and no folder, not one of tiny, RN50", "ViT-L/14@336px")


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.target),)


def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path):
    Evil.target = tmp_path / "ran"
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "more than tensors")
    torch.save(clip.build(small("vit")), tmp_path / "module.pt")  # a whole module, pickled
    refused(tmp_path / "module.pt", "more than tensors")
    assert not Evil.target.exists()


class Writes(torch.nn.Module):
    """TorchScript that overwrites a file of the user while it is loaded."""

    def __init__(self, victim: str):
        super().__init__()
        self.victim = victim

    @torch.jit.export
    def __getstate__(self):
        return self.victim, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.victim = state[0]
        self.training = state[1]
        mapped = torch.from_file(state[0], True, 5, dtype=torch.uint8)
        mapped.fill_(33)
        self.training = bool(mapped[0] == 33)

    def forward(self, x):
        return x


class NeverEnds(torch.nn.Module):
    @torch.jit.export
    def __getstate__(self):
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool):
        self.training = state
        while True:
            self.training = not self.training

    def forward(self, x):
        return x


def test_an_archive_that_is_not_openais_is_not_run(tmp_path):
    victim = tmp_path / "profile"
    victim.write_text("alias")
    writes, hangs = tmp_path / "writes.pt", tmp_path / "hangs.pt"
    torch.jit.script(Writes(str(victim))).save(writes)
    torch.jit.script(NeverEnds()).save(hangs)
    start = time.monotonic()
    for path in (writes, hangs):
        refused(path, "not one of OpenAI's", "runs its code", "torch.jit.load")
        refused(path, "not one of OpenAI's", activation="quickgelu")
    assert victim.read_text() == "alias" and time.monotonic() - start < 30
    torch.jit.load(writes)
    assert victim.read_text() == "!!!!!"  # the archive is what this test takes it for


def test_a_header_that_is_longer_than_the_file_is_refused(tmp_path):
    header = (1 << 60).to_bytes(8, "little") + b"{" + b" " * 100
    (tmp_path / "header.safetensors").write_bytes(header)
    refused(tmp_path / "header.safetensors", "is no CLIP")


def test_the_missing_small_clip_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "TINY", tmp_path / "tiny.safetensors")
    refused("tiny", str(weights.TINY))
    save_file(small("resnet"), weights.TINY)
    assert equal(clip.load(), features(clip.build(small("resnet"), fold=True)))


# ---- downloads, from a server on this machine

@pytest.fixture
def server(monkeypatch, tmp_path):
    """Serves `server.body` under every address, cut to `server.cut` bytes; the cache is below
    tmp_path."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            s.asked.append(self.path)
            if s.barrier:
                s.barrier.wait(60)
            self.send_response(s.status)
            self.send_header("Content-Length", str(len(s.body)))
            self.end_headers()
            self.wfile.write(s.body[:s.cut])

        def log_message(self, *args):
            pass

    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    archive(small("vit", half=True), tmp_path / "archive.pt")
    s.body, s.digest = (tmp_path / "archive.pt").read_bytes(), sha256(tmp_path / "archive.pt")
    s.cut, s.status, s.barrier, s.asked = None, 200, None, []
    s.base = f"http://127.0.0.1:{s.server_address[1]}/clip"
    s.cache = tmp_path / ".cache" / "clip"
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(weights, "BASE", s.base)
    monkeypatch.setitem(weights.FILES, "RN50", s.digest)
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


def test_nine_names_with_whole_hashes():
    assert len(weights.FILES) == 9 and len(set(weights.FILES.values())) == 9
    assert all(len(digest) == 64 and int(digest, 16) for digest in weights.FILES.values())


def test_download_once_then_from_the_cache(server):
    model = clip.load("RN50")
    assert model.sha256 == server.digest
    assert server.asked == [f"/clip/{server.digest}/RN50.pt"]
    clip.load("RN50")
    assert len(server.asked) == 1
    kept = server.cache / "RN50.pt"
    kept.write_bytes(b"rot")  # a damaged file in the cache is fetched again
    clip.load("RN50")
    assert sha256(kept) == server.digest
    assert [p.name for p in server.cache.iterdir()] == [kept.name]


@pytest.mark.parametrize("fault, says", [
    (dict(cut=1000), "hash"), (dict(cut=0), "hash"), (dict(body=b"other bytes"), "hash"),
    (dict(status=404), "Not Found"), (dict(status=500), "Internal Server Error"),
])
def test_a_bad_download_leaves_nothing(server, fault, says):
    for key, value in fault.items():
        setattr(server, key, value)
    refused("RN50", says, "put the file at", str(server.cache / "RN50.pt"))
    assert list(server.cache.iterdir()) == []


def test_offline_says_what_to_do(server, monkeypatch):
    monkeypatch.setattr(weights, "BASE", "http://127.0.0.1:9/clip")  # nothing listens there
    refused("RN50", "could not get CLIP RN50", "refused", "put the file at", "RN50.pt")


def test_a_cache_that_cannot_be_written(server):
    server.cache.parent.mkdir(parents=True)
    server.cache.write_text("a file where the folder should be")
    refused("RN50", "could not get CLIP RN50")


def test_two_processes_at_once(server, tmp_path):
    """Both are downloading before either is answered; both load, one file stays."""
    server.barrier = threading.Barrier(2)
    code = ("import sys, clip; from clip import weights; weights.BASE = sys.argv[1]; "
            "weights.FILES['RN50'] = sys.argv[2]; print(clip.load('RN50').sha256)")
    pair = [subprocess.Popen([sys.executable, "-c", code, server.base, server.digest], text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"},
                             cwd=Path(__file__).resolve().parent.parent,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in pair:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == server.digest, err
    assert len(server.asked) == 2 and [p.name for p in server.cache.iterdir()] == ["RN50.pt"]
