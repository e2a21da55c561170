"""CLIP as other libraries publish it: names of tensors, and the configuration beside them.

    open_clip (github.com/mlfoundations/open_clip)      open_clip_config.json
    CLIPModel (github.com/huggingface/transformers)     config.json, preprocessor_config.json

What a configuration says is obeyed (heads, activation, mean and std of the pixels) or refused.
"""
import json
import re

import torch

from clip.model import MEAN, STD
from support import UserError

TOKENS = r"(text_model\.embeddings\.|text\.)?token_embedding\.weight$"  # a name that all CLIPs have
# Parts of CLIPModel's names, in this order, and what OpenAI calls them.
RENAMED = (("visual_projection.weight", "visual.proj"), ("projection.weight", "projection"),
           ("text_model.", ""), ("vision_model.", "visual."), ("embeddings.", ""),
           ("patch_embedding", "conv1"), ("position_embedding.weight", "positional_embedding"),
           ("encoder.layers", "transformer.resblocks"), ("final_layer_norm", "ln_final"),
           ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post"), ("layer_norm", "ln_"),
           ("self_attn.q_proj.", "attn.in_proj_"), ("self_attn", "attn"), ("fc1", "c_fc"),
           ("fc2", "c_proj"))
# Settings of open_clip that the tensors tell, that are obeyed here, or that matter in training.
FREE = ("vision_cfg", "text_cfg", "quick_gelu", "custom_text", "image_size", "mlp_ratio", "heads",
        "head_width", "patch_dropout", "output_tokens", "output_dict", "init_logit_scale",
        "init_logit_bias", "cast_dtype", "pad_id", "eos_id", "attn_pooler_queries",
        "attn_pooler_heads", "size", "mean", "std", "resize_mode", "fill_color")


def openai_names(saved):
    """What a file holds -> CLIP's state dict with OpenAI's names, and whether it had Hugging Face's.
    It may lie under a key of a training program, its names under one prefix."""
    saved = saved.get("state_dict", saved)
    found = [part for part in (saved, *saved.values()) if isinstance(part, dict)
             and any(re.search(TOKENS, str(name)) for name in part)]
    if len(found) != 1:
        raise UserError(f"it holds {', '.join(map(str, saved))[:80] or 'nothing'}, expected one "
                        "state dict of CLIP: save that alone")
    name = next(name for name in found[0] if re.search(TOKENS, name))
    prefix = re.sub(TOKENS, "", name)  # "module." of data-parallel training, for example
    state = {name.removeprefix(prefix).removeprefix("text."): t for name, t in found[0].items()}
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
    """What the configuration in `folder` says: activation, heads, mean, std; None without one.
    shape: model.dimensions of the tensors."""
    file = folder / ("config.json" if hugging_face else "open_clip_config.json")
    if not file.is_file():
        return None, {}, MEAN, STD
    try:
        reader = of_hugging_face if hugging_face else of_open_clip
        activation, heads, mean, std = reader(folder, json.loads(file.read_bytes()), shape)
        mean, std = tuple(map(float, mean or MEAN)), tuple(map(float, std or STD))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean {mean} and std {std} of three channels")
        return activation, heads, mean, std
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file leads to
        raise UserError(f"{file.name} is no configuration of CLIP ({error!r:.80}): get the file "
                        "that belongs to the weights, or take it away") from None


def agree(given, expected, strict=False):
    """Refuses a setting that is not as expected; if strict, also one that is not known here."""
    for key, value in given.items():
        checked = key in expected or strict and value and key not in FREE
        if checked and value not in (None, expected.get(key)):
            raise UserError(f"its configuration says {key} {json.dumps(value)[:80]}, this CLIP has "
                            f"{expected.get(key, 'no such setting')}: take other weights")


def of_open_clip(folder, content, shape):
    model, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
    text, vision = model["text_cfg"], model["vision_cfg"]
    depth = shape["layers"] if shape["patch"] else list(shape["layers"])
    agree(model, dict(embed_dim=shape["embed_dim"]), strict=True)
    agree(text, dict(context_length=shape["context_length"], vocab_size=shape["vocab_size"],
                     width=shape["text_width"], layers=shape["text_layers"], pool_type="argmax",
                     proj_type="linear"), strict=True)
    agree(vision, dict(width=shape["vision_width"], patch_size=shape["patch"], layers=depth,
                       pool_type="tok", pos_embed_type="learnable"), strict=True)
    agree(pixels, dict(mode="RGB", interpolation="bicubic"), strict=True)
    quick = model.get("quick_gelu") in (True, "true")
    heads = dict(text_heads=text.get("heads", 8),
                 vision_heads=shape["vision_width"] // vision.get("head_width", 64))
    return "quickgelu" if quick else "gelu", heads, pixels.get("mean"), pixels.get("std")


def of_hugging_face(folder, content, shape):
    text, vision = content.get("text_config", {}), content.get("vision_config", {})
    pixels = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            pixels = json.loads((folder / name).read_bytes())
            pixels = pixels.get("image_processor", pixels)
    activation = text.get("hidden_act", "quick_gelu")
    agree(content, dict(model_type="clip"))
    agree(text, dict(hidden_size=shape["text_width"], num_hidden_layers=shape["text_layers"],
                     layer_norm_eps=1e-5))
    agree({"hidden_act": "quick_gelu"} | vision,
          dict(hidden_act=activation, hidden_size=shape["vision_width"], patch_size=shape["patch"],
               num_hidden_layers=shape["layers"], layer_norm_eps=1e-5))
    agree(pixels, dict(do_normalize=True, do_rescale=True, resample=3))
    heads = dict(text_heads=text.get("num_attention_heads", 8),
                 vision_heads=vision.get("num_attention_heads", 12))
    activation = {"quick_gelu": "quickgelu", "gelu": "gelu"}[activation]
    return activation, heads, pixels.get("image_mean"), pixels.get("image_std")
