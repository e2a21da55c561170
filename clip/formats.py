"""CLIP as other libraries publish it: names of tensors, and the configuration beside them.

    open_clip (github.com/mlfoundations/open_clip)      open_clip_config.json
    CLIPModel (github.com/huggingface/transformers)     config.json, preprocessor_config.json

What a configuration says is obeyed (heads, activation, mean and std of the pixels) or refused.
"""
import json
import re

import torch

from support import UserError

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


def openai_names(state):
    """State dict as open_clip or Hugging Face names it, or inside another module -> OpenAI's names,
    and whether it was Hugging Face's."""
    ending = r"(text_model\.embeddings\.|text\.)?token_embedding\.weight$"
    outside = [re.sub(ending, "", name) for name in state if re.search(ending, name)]
    prefix = outside[0] if outside else ""  # "module." of data-parallel training, for example
    state = {name.removeprefix(prefix).removeprefix("text."): t for name, t in state.items()}
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


def read_json(file):
    if file.stat().st_size > 1 << 24:
        raise ValueError("larger than 16 MB")
    return json.loads(file.read_bytes())


def configuration(folder, hugging_face, shape):
    """What the configuration in `folder` says: activation, text_heads, vision_heads, mean, std, as
    far as it says so; {} without one. shape: model.dimensions of the tensors."""
    file = folder / ("config.json" if hugging_face else "open_clip_config.json")
    if not file.is_file():
        return {}
    try:
        told = (of_hugging_face if hugging_face else of_open_clip)(folder, read_json(file), shape)
        if told["mean"] is None or told["std"] is None:
            return told | dict(mean=None, std=None)
        told |= {name: tuple(map(float, told[name])) for name in ("mean", "std")}
        if len(told["mean"]) != 3 or len(told["std"]) != 3 or min(told["std"]) <= 0:
            raise ValueError(f"mean {told['mean']} and std {told['std']} of three channels")
        return told
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file leads to
        raise UserError(f"{file.name} is no configuration of CLIP ({error!r:.80}): get the file "
                        "that belongs to the weights, or take it away") from None


def agree(given, expected, free=None):
    """Refuses a setting that is not as expected; unless it is free, any other that is set, too."""
    for key, value in given.items():
        other = free is not None and key not in expected and key not in free
        if other and value or key in expected and value not in (None, expected[key]):
            raise UserError(f"its configuration says {key} {json.dumps(value)[:80]}, this CLIP has "
                            f"{expected.get(key, 'no such setting')}: take other weights")


def of_open_clip(folder, content, shape):
    model = content["model_cfg"]
    text, vision = model["text_cfg"], model["vision_cfg"]
    pixels = content.get("preprocess_cfg", {})
    depth = shape["layers"] if shape["patch"] else list(shape["layers"])
    agree(model, {"embed_dim": shape["embed_dim"]}, FREE)
    agree(text, dict(context_length=shape["context_length"], vocab_size=shape["vocab_size"],
                     width=shape["text_width"], layers=shape["text_layers"], pool_type="argmax",
                     proj_type="linear"), FREE)
    agree(vision, dict(width=shape["vision_width"], patch_size=shape["patch"], layers=depth,
                       pool_type="tok", pos_embed_type="learnable"), FREE)
    agree(pixels, dict(mode="RGB", interpolation="bicubic"), FREE)
    quick = model.get("quick_gelu") in (True, "true")
    return dict(activation="quickgelu" if quick else "gelu", text_heads=text.get("heads", 8),
                vision_heads=shape["vision_width"] // vision.get("head_width", 64),
                mean=pixels.get("mean"), std=pixels.get("std"))


def of_hugging_face(folder, content, shape):
    text, vision = content.get("text_config", {}), content.get("vision_config", {})
    pixels = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            pixels = read_json(folder / name)
            pixels = pixels.get("image_processor", pixels)
    activation = text.get("hidden_act", "quick_gelu")
    agree(content, {"model_type": "clip"})
    agree({"hidden_act": vision.get("hidden_act", "quick_gelu")}, {"hidden_act": activation})
    agree(text, dict(hidden_size=shape["text_width"], num_hidden_layers=shape["text_layers"],
                     layer_norm_eps=1e-5))
    agree(vision, dict(hidden_size=shape["vision_width"], num_hidden_layers=shape["layers"],
                       patch_size=shape["patch"], layer_norm_eps=1e-5))
    agree(pixels, dict(do_normalize=True, do_rescale=True, resample=3))
    return dict(activation={"quick_gelu": "quickgelu", "gelu": "gelu"}[activation],
                text_heads=text.get("num_attention_heads", 8),
                vision_heads=vision.get("num_attention_heads", 12),
                mean=pixels.get("image_mean"), std=pixels.get("image_std"))
