"""CLIP's weights as people have them, always as float32. No code is run but OpenAI's own. What a
configuration beside them says is obeyed (heads, activation, mean and std) or refused.

    clip.load("tiny")                                  the small CLIP that ships (tools/pretrain.py)
    clip.load("RN101")                                 OpenAI's, downloaded once into ~/.cache/clip
    clip.load("openai/clip-vit-base-patch32")          in Hugging Face's local cache
    clip.load("model.safetensors", activation="gelu")  a file, or a folder with its configuration
"""
import hashlib
import json
import math
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file

from clip.model import CLIP, MEAN, STD
from support import UserError, refused

TINY = Path(__file__).with_name("tiny.safetensors")
BASE = "https://openaipublic.azureedge.net/clip/models"  # BASE/sha256/file
FILES = json.loads(TINY.with_name("openai.json").read_text())  # {name: sha256}
IN_FOLDER = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENS = r"(text_model\.embeddings\.|text\.)?token_embedding\.weight$"  # a name that all CLIPs have
TABLES = json.loads(TINY.with_name("formats.json").read_text())
RENAMED = TABLES["renamed"]  # parts of CLIPModel's names, in this order, and OpenAI's
FREE = TABLES["free"]  # open_clip's settings that are not checked: obeyed, or training's alone


def sha256(file):
    return hashlib.sha256(np.memmap(file, mode="r")).hexdigest()


def download(name):
    """One of FILES -> its path in the cache. Only a complete file of its sha256 gets this name."""
    file = re.sub("[/@]", "-", name) + ".pt"
    path = Path("~/.cache/clip").expanduser() / file  # as OpenAI's own package
    url = f"{BASE}/{FILES[name]}/{file}"
    with refused(f"could not get CLIP {name} from {url}: try again online, put the file at {path}, "
                 "or give the path of a weights file"):
        if not path.is_file() or sha256(path) != FILES[name]:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path, FILES[name], progress=sys.stderr.isatty())
    return path


def find(name):
    """A name in FILES, "tiny", a path or a repository in the local hub cache -> file or folder."""
    if name == "tiny":
        return TINY
    if name in FILES:
        return download(name)
    if Path(name).exists():
        return Path(name)
    home = os.environ.get("HF_HOME", os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    repository = hub / ("models--" + name.removeprefix("hf-hub:").replace("/", "--"))
    main = repository / "refs" / "main"  # holds the name of a snapshot
    if main.is_file():
        return repository / "snapshots" / main.read_text().strip()
    raise UserError(f"{name!r} is no file and no folder, not one of tiny, {', '.join(FILES)}, and "
                    f"no owner/repository that was downloaded into {hub}")


def weights_in(path):
    """A weights file, an index of shards, or a folder: its first of IN_FOLDER -> files to read."""
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not found:
            raise UserError(f"it holds none of {', '.join(IN_FOLDER)}")
        path = found[0]
    if not path.name.endswith(".index.json"):
        return [path]
    shards = json.loads(path.read_bytes())["weight_map"].values()
    return [path.with_name(shard) for shard in sorted(set(shards))]


def read(file):
    """What a weights file holds. Its kind is told from its bytes, not from its name."""
    with open(file, "rb") as handle:
        head = handle.read(40)
    if head.isascii() and b"\0" not in head:  # the page of a server, or a pointer
        raise ValueError(f"it is text ({head.decode()!r}): download it again, or git lfs pull")
    if head[8:9] == b"{":
        return load_file(file)
    parts = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
    if any(part.filename.endswith("constants.pkl") for part in parts):
        if sha256(file) not in FILES.values():  # TorchScript holds code that runs while it loads
            raise UserError("it is TorchScript, not one of OpenAI's, and loading it runs its code: "
                            "to trust it, torch.save(torch.jit.load(FILE).state_dict(), 'new.pt')")
        return torch.jit.load(file, map_location="cpu").state_dict()
    return torch.load(file, map_location="cpu", weights_only=True)


# ---- names and configurations of github.com/mlfoundations/open_clip and huggingface/transformers

def openai_names(saved):
    """What a file holds -> CLIP's state dict with OpenAI's names, and whether Hugging Face named
    it. A training program may have put it under a key, and its names under a prefix."""
    saved = saved.get("state_dict") or saved
    found = [part for part in (saved, *saved.values()) if isinstance(part, dict)
             and any(re.search(TOKENS, str(name)) for name in part)]
    if len(found) != 1:
        raise UserError(f"it holds {', '.join(map(str, saved))[:80] or 'nothing'}, expected one "
                        "state dict of CLIP: save that alone")
    prefix = next(re.sub(TOKENS, "", n) for n in found[0] if re.search(TOKENS, n))  # "module."
    state = {str(name).removeprefix(prefix).removeprefix("text."): t
             for name, t in found[0].items() if isinstance(t, torch.Tensor)}
    if not any(name.startswith("text_model.") for name in state):
        return state, False
    renamed = {}
    for name, t in state.items():
        if re.search(r"position_ids$|[kv]_proj\.(weight|bias)$", name):
            continue
        if ".q_proj." in name:
            t = torch.cat([state[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"])
        elif name.endswith("_projection.weight"):
            t = t.T.contiguous()
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        renamed[name] = t
    return renamed, True


def configuration(folder, hugging_face, shape):
    """What the configuration in `folder` says: activation (None without one), heads, mean, std.
    shape: model.dimensions of the tensors, as attributes."""
    file = folder / ("config.json" if hugging_face else "open_clip_config.json")
    if not file.is_file():
        return None, {}, MEAN, STD
    with refused(f"{file.name} is no configuration of CLIP: get the weights' own, or take it away"):
        of_them = of_hugging_face if hugging_face else of_open_clip
        activation, heads, mean, std = of_them(json.loads(file.read_bytes()), shape, folder)
        return activation, heads, tuple(map(float, mean or MEAN)), tuple(map(float, std or STD))


def agree(given, strict, **expected):
    """Refuses a setting that is not as expected; if strict, also one that is not known here."""
    for key, value in given.items():
        if key in expected:
            wrong = value not in (None, expected[key])
        else:
            wrong = strict and value and key not in FREE
        if wrong:
            raise UserError(f"its configuration says {key} {json.dumps(value)[:80]}, this CLIP has "
                            f"{expected.get(key, 'no such setting')}: take other weights")


def of_open_clip(content, shape, _):
    model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
    text, vision = model["text_cfg"], model["vision_cfg"]
    agree(model, True, embed_dim=shape.embed_dim)
    agree(text, True, width=shape.text_width, layers=shape.text_layers, vocab_size=shape.vocab_size,
          context_length=shape.context_length, pool_type="argmax", proj_type="linear")
    agree(vision, True, width=shape.vision_width, layers=shape.layers, patch_size=shape.patch,
          pool_type="tok", pos_embed_type="learnable")
    if shape.patch is None:  # a ResNet's attention pool
        agree(vision, False, head_width=64)
    agree(pixels, True, mode="RGB", interpolation="bicubic")
    activation = "quickgelu" if model.get("quick_gelu") in (True, "true") else "gelu"
    heads = dict(text_heads=text.get("heads", 8),
                 vision_heads=shape.vision_width // vision.get("head_width", 64))
    return activation, heads, pixels.get("mean"), pixels.get("std")


def of_hugging_face(content, shape, folder):
    text, vision = content.get("text_config", {}), content.get("vision_config", {})
    pixels = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            with refused(f"{name} is no configuration: get the weights' own, or take it away"):
                pixels = json.loads((folder / name).read_bytes())
                pixels = pixels.get("image_processor", pixels)
    activation = text.get("hidden_act", "quick_gelu")
    agree(content, False, model_type="clip")
    agree(text, False, hidden_size=shape.text_width, num_hidden_layers=shape.text_layers,
          hidden_act="gelu" if activation == "gelu" else "quick_gelu", layer_norm_eps=1e-5)
    agree({"hidden_act": "quick_gelu"} | vision, False, hidden_act=activation, layer_norm_eps=1e-5,
          hidden_size=shape.vision_width, num_hidden_layers=shape.layers, patch_size=shape.patch)
    agree(pixels, False, do_normalize=True, do_rescale=True, rescale_factor=1 / 255, resample=3)
    heads = dict(text_heads=text.get("num_attention_heads", 8),
                 vision_heads=vision.get("num_attention_heads", 12))
    return activation.replace("_", ""), heads, pixels.get("image_mean"), pixels.get("image_std")


# ---- the model

def dimensions(state):
    """State dict with OpenAI's names -> the keyword arguments of CLIP, read off the shapes."""
    def depth(prefix):  # number of blocks prefix0., prefix1., ...
        return len({name[len(prefix):].split(".")[0] for name in state if name.startswith(prefix)})

    blocks = "transformer.resblocks."
    text_width, embed_dim = state["text_projection"].shape
    shape = dict(embed_dim=embed_dim, context_length=len(state["positional_embedding"]),
                 vocab_size=len(state["token_embedding.weight"]), text_width=text_width,
                 text_layers=depth(blocks), text_mlp=len(state[blocks + "0.mlp.c_fc.weight"]))
    if "visual.proj" in state:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
        mlp = len(state[f"visual.{blocks}0.mlp.c_fc.weight"])
        return shape | dict(layers=depth("visual." + blocks), vision_width=width, vision_mlp=mlp,
                            patch=patch, resolution=grid * patch)
    grid = math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1)
    layers = [depth(f"visual.layer{i}.") for i in (1, 2, 3, 4)]
    width = len(state["visual.layer1.0.conv1.weight"])
    return shape | dict(layers=layers, vision_width=width, patch=None, resolution=32 * grid)


def build(state_dict, fold=False, activation="quickgelu", **heads):
    """State dict with OpenAI's names -> CLIP in evaluation mode, float32, tensors copied. Raises
    where one is missing, left over, not finite or does not fit. heads: text_heads, vision_heads."""
    skipped = ("input_resolution", "context_length", "vocab_size", "attn_mask", "logit_bias")
    state = {name: t for name, t in state_dict.items()  # the encoders' weights alone
             if name not in skipped and not name.endswith("num_batches_tracked")}
    for name, t in state.items():
        dense = t.numel() and t.layout == torch.strided and t.is_floating_point()
        if not (dense and t.isfinite().all()):
            raise ValueError(f"{name} is {tuple(t.shape)} {t.dtype}, expected dense finite numbers")
    model = CLIP(**dimensions(state), activation=activation, **heads).eval()
    model.load_state_dict(state)
    return model.fold() if fold else model


def load(name_or_path="tiny", activation=None):
    """What `find` finds -> CLIP, float32 on the CPU, folded (CLIP.fold). activation: "quickgelu" or
    "gelu", where neither file nor configuration tells; it cannot be seen in the weights."""
    path = find(str(name_or_path))
    try:
        model = from_files(path, activation)
        model.name = str(name_or_path)
        return model
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever a damaged or foreign file leads to
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:300]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors, or none: torch.save its state dict alone"
        raise UserError(f"{path} is no CLIP, or it is incomplete: {reason}; expected weights of "
                        "OpenAI, of open_clip, or of Hugging Face's CLIPModel") from None


def from_files(path, activation):
    files = weights_in(path)
    digests = [sha256(file) for file in files]
    saved = {key: value for file in files for key, value in read(file).items()}
    state, hugging_face = openai_names(saved)
    told, heads, mean, std = "quickgelu", {}, MEAN, STD
    if path != TINY and "input_resolution" not in state:  # OpenAI's carry it beside the weights
        shape = SimpleNamespace(**dimensions(state))
        told, heads, mean, std = configuration(files[0].parent, hugging_face, shape)
    named = re.search("quick_?gelu|openai", path.name, re.IGNORECASE)
    if activation and told not in (None, activation):
        raise UserError(f"it computes with {told}: drop --activation {activation}")
    activation = activation or told or (named and "quickgelu")
    if not activation:
        raise UserError("it does not tell its activation: put its configuration beside it, or add "
                        "--activation quickgelu (OpenAI, open_clip's -quickgelu) or gelu (others)")
    model = build(state, True, activation, **heads)
    model.sha256, model.mean, model.std = digests[0], mean, std
    described = (digests, activation, heads, mean, std)
    if described != (digests[:1], "quickgelu", {}, MEAN, STD):  # the file alone does not tell all
        model.sha256 = hashlib.sha256(repr(described).encode()).hexdigest()
    return model
