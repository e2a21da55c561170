"""CLIP as other libraries publish it: names of tensors, and the configuration beside them.

    open_clip (github.com/mlfoundations/open_clip)      open_clip_config.json
    CLIPModel (github.com/huggingface/transformers)     config.json, preprocessor_config.json

What a configuration says is obeyed (heads, activation, mean and std of the pixels) or refused.
"""
import json
import re

import torch

from support import UserError

RENAMED = (("text_model.embeddings.token_embedding", "token_embedding"),
           ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
           ("text_model.final_layer_norm", "ln_final"),
           ("text_model.encoder.layers", "transformer.resblocks"),
           ("text_projection.weight", "text_projection"),
           ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
           ("vision_model.embeddings.patch_embedding", "visual.conv1"),
           ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
           ("vision_model.pre_layrnorm", "visual.ln_pre"),
           ("vision_model.post_layernorm", "visual.ln_post"),
           ("vision_model.encoder.layers", "visual.transformer.resblocks"),
           ("visual_projection.weight", "visual.proj"),
           ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
           ("mlp.fc2", "mlp.c_proj"), ("self_attn.q_proj.", "attn.in_proj_"),
           ("self_attn", "attn"))  # Hugging Face's -> OpenAI's
# Of open_clip's settings: those that the tensors tell, and those that matter in training alone.
IGNORED = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "image_size",
           "mlp_ratio", "head_width", "heads", "patch_dropout", "output_tokens", "output_dict",
           "init_logit_scale", "init_logit_bias", "cast_dtype", "pad_id", "eos_id",
           "attn_pooler_queries", "attn_pooler_heads")


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
        if name.endswith(("position_ids", "k_proj.weight", "k_proj.bias", "v_proj.weight",
                          "v_proj.bias")):
            continue
        if ".q_proj." in name:
            parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            t = torch.cat([state[part] for part in parts if part in state])
        elif name.endswith("_projection.weight"):
            t = t.T.contiguous()
        for theirs, ours in RENAMED:
            name = name.replace(theirs, ours)
        renamed[name] = t
    return renamed, True


def read_json(file):
    try:
        if file.stat().st_size > 1 << 24:
            raise ValueError("larger than 16 MB")
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is no configuration of CLIP ({error}): get the file that "
                        "belongs to the weights, or take it away") from None


def agree(file, given, expected, ignored=None):
    """Refuses a setting that is not as expected; given `ignored`, any other that is set, too."""
    for key, value in given.items():
        unknown = ignored is not None and key not in expected and key not in ignored
        if unknown and value or key in expected and value not in (None, expected[key]):
            raise UserError(f"{file.name}: {key} is {json.dumps(value)[:80]}, this CLIP has "
                            f"{expected.get(key, 'no such setting')}: take another model")


def configuration(folder, hugging_face, shape):
    """What the configuration in `folder` says: activation, text_heads, vision_heads, mean, std, as
    far as it says so; {} without one. shape: model.dimensions of the tensors."""
    file = folder / ("config.json" if hugging_face else "open_clip_config.json")
    if not file.is_file():
        return {}
    try:
        return (from_hugging_face if hugging_face else from_open_clip)(file, read_json(file), shape)
    except UserError:
        raise
    except (TypeError, AttributeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{file} is no configuration of CLIP ({error}): get the file that belongs "
                        "to the weights, or take it away") from None


def from_open_clip(file, content, shape):
    model = content["model_cfg"]
    text, vision = model["text_cfg"], model["vision_cfg"]
    pixels = content.get("preprocess_cfg", {})
    layers = shape["layers"]
    agree(file, model, {"embed_dim": shape["embed_dim"]}, IGNORED)
    agree(file, text, dict(context_length=shape["context_length"], vocab_size=shape["vocab_size"],
                           width=shape["text_width"], layers=shape["text_layers"],
                           pool_type="argmax", proj_type="linear"), IGNORED)
    agree(file, vision, dict(width=shape["vision_width"], patch_size=shape["patch"],
                             layers=layers if isinstance(layers, int) else list(layers),
                             pool_type="tok", pos_embed_type="learnable"), IGNORED)
    agree(file, pixels, dict(mode="RGB", interpolation="bicubic"),
          ("size", "mean", "std", "resize_mode", "fill_color"))
    quick = model.get("quick_gelu") in (True, "true")
    return dict(activation="quickgelu" if quick else "gelu", text_heads=text.get("heads", 8),
                vision_heads=shape["vision_width"] // vision.get("head_width", 64),
                **moments(file, pixels.get("mean"), pixels.get("std")))


def from_hugging_face(file, content, shape):
    text, vision = content.get("text_config", {}), content.get("vision_config", {})
    pixels = {}
    for other in ("processor_config.json", "preprocessor_config.json"):  # of 2025; before
        if (beside := file.with_name(other)).is_file():
            pixels = read_json(beside)
            pixels = pixels.get("image_processor", pixels)
    activation = text.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise UserError(f"{file.name}: hidden_act is {activation}, expected quick_gelu or gelu")
    agree(file, content, {"model_type": "clip"})
    agree(file, text, dict(hidden_size=shape["text_width"], layer_norm_eps=1e-5,
                           num_hidden_layers=shape["text_layers"]))
    agree(file, vision, dict(hidden_size=shape["vision_width"], layer_norm_eps=1e-5,
                             num_hidden_layers=shape["layers"], patch_size=shape["patch"]))
    agree(file, {"hidden_act": vision.get("hidden_act", "quick_gelu")}, {"hidden_act": activation})
    agree(file, pixels, dict(do_normalize=True, do_rescale=True, resample=3))
    return dict(activation=activation.replace("_", ""),
                text_heads=text.get("num_attention_heads", 8),
                vision_heads=vision.get("num_attention_heads", 12),
                **moments(file, pixels.get("image_mean"), pixels.get("image_std")))


def moments(file, mean, std):
    """Mean and std of the pixels' channels, {} where the configuration does not give them."""
    if mean is None or std is None:
        return {}
    mean, std = tuple(map(float, mean)), tuple(map(float, std))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"{file.name}: expected mean and std of three channels, got {mean} and {std}")
    return dict(mean=mean, std=std)
