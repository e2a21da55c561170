"""CLIP as other libraries publish it: names of tensors, and the configuration beside them.

    open_clip (github.com/mlfoundations/open_clip)      open_clip_config.json
    CLIPModel (github.com/huggingface/transformers)     config.json, preprocessor_config.json

What a configuration says is obeyed (heads, activation, mean and std of the pixels) or refused.
"""
import json
import re
from pathlib import Path

import torch

from clip.model import MEAN, STD
from support import UserError, refused

TOKENS = r"(text_model\.embeddings\.|text\.)?token_embedding\.weight$"  # a name that all CLIPs have
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())
RENAMED = TABLES["renamed"]  # parts of CLIPModel's names, in this order, and OpenAI's
FREE = TABLES["free"]  # open_clip's settings that are not checked: obeyed, or training's alone


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
        if mean is None or std is None:
            mean, std = MEAN, STD
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} of three channels")
        return activation, heads, mean, std


def agree(given, strict, **expected):
    """Refuses a setting that is not as expected; if strict, also one that is not known here."""
    for key, value in given.items():
        checked = key in expected or strict and value and key not in FREE
        if checked and value not in (None, expected.get(key)):
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
            pixels = json.loads((folder / name).read_bytes())
            pixels = pixels.get("image_processor", pixels)
    activation = text.get("hidden_act", "quick_gelu")
    agree(content, False, model_type="clip")
    agree(text, False, hidden_size=shape.text_width, num_hidden_layers=shape.text_layers,
          hidden_act="gelu" if activation == "gelu" else "quick_gelu", layer_norm_eps=1e-5)
    agree({"hidden_act": "quick_gelu"} | vision, False, hidden_act=activation, layer_norm_eps=1e-5,
          hidden_size=shape.vision_width, num_hidden_layers=shape.layers, patch_size=shape.patch)
    agree(pixels, False, do_normalize=True, do_rescale=True, resample=3)
    activation = {"quick_gelu": "quickgelu", "gelu": "gelu"}[activation]
    heads = dict(text_heads=text.get("num_attention_heads", 8),
                 vision_heads=vision.get("num_attention_heads", 12))
    return activation, heads, pixels.get("image_mean"), pixels.get("image_std")
