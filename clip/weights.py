"""CLIP's weights: by name (downloaded once, sha256 checked) or from a file, always as float32.

    clip.load("tiny")                                            the small CLIP that ships, see pretrain.py
    clip.load("RN101")                                           OpenAI's, kept in ~/.cache/clip
    clip.load("model.safetensors", activation="gelu")            a file of your own

A file is OpenAI's TorchScript archive, a state dict (torch.save) or safetensors, with the parameter names that OpenAI
and open_clip share. No code comes from a file, except what torch.jit.load needs for an archive; all else is tensors.
"""
import hashlib
import http.client
import json
import os
import pathlib
import pickle
import re
import tempfile
import urllib.request
import warnings
import zipfile

import safetensors
import torch
from tqdm import tqdm

from clip.model import ACTIVATIONS, build
from support import UserError

TINY = pathlib.Path(__file__).with_name("tiny.safetensors")
BASE = "https://openaipublic.azureedge.net/clip/models"  # BASE/sha256/file
FILES = {
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}


def sha256(path):
    """Hexadecimal sha256 of a file."""
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache():
    """Where downloads are kept; OpenAI's own package uses the same folder and file names."""
    try:
        return pathlib.Path.home() / ".cache" / "clip"
    except RuntimeError:
        raise UserError("this user has no home folder to keep the weights in: set HOME, or give the path of a weights file") from None


def download(name):
    """One of FILES -> path in the cache. The file gets its name only when it is complete and its sha256 is right; until
    then it is a temporary file of this process alone, so an interrupted or a second download cannot harm."""
    file, digest = FILES[name]
    url, path = f"{BASE}/{digest}/{file}", cache() / file
    if path.is_file() and sha256(path) == digest:
        return path
    there, part = f"{path} is another file (sha256 differs); " if path.is_file() else "", None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as source:
            size = int(source.headers.get("Content-Length") or 0)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=file, suffix=".part", delete=False) as target, \
                    tqdm(total=size or None, unit="B", unit_scale=True, desc=file, leave=False, disable=None) as bar:
                part, got = pathlib.Path(target.name), hashlib.sha256()
                while chunk := source.read(1 << 20):
                    target.write(chunk)
                    got.update(chunk)
                    bar.update(len(chunk))
        if got.hexdigest() != digest:
            raise OSError(f"{part.stat().st_size} of {size or 'unknown'} bytes came, "
                          f"sha256 {got.hexdigest()[:12]}..., expected {digest[:12]}...")
        os.replace(part, path)
        return path
    except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: a header or an address that is none
        raise UserError(f"{there}could not get CLIP {name} from {url} ({getattr(e, 'reason', None) or e}): try again online, "
                        f"put the file at {path}, or give the path of a weights file") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def read(path):
    """path -> (state dict, metadata). The kind of file is told from its bytes, not its name."""
    try:
        with open(path, "rb") as f:
            head = f.read(9)
        if head[8:] == b"{":  # safetensors: eight bytes of length, then JSON
            with safetensors.safe_open(path, "pt") as f:
                return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
        if head[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                script = any(n.endswith("/constants.pkl") for n in archive.namelist())
            if script:
                return torch.jit.load(path, map_location="cpu").state_dict(), {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged or foreign file makes a reader raise
        reason = (str(e).splitlines() or [type(e).__name__])[0][:160]
        reason = "more than tensors, or no tensors at all" if isinstance(e, pickle.UnpicklingError) else reason
        raise UserError(f"{path} is no readable weights file (TorchScript archive, state dict or safetensors), "
                        f"or it is incomplete: {reason}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # a training checkpoint
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, expected a state dict of CLIP")
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}, {}


def find_activation(path, digest, state, metadata):
    """QuickGELU or GELU cannot be seen in weights. What tells: a known file, the numbers that OpenAI's archives carry beside
    the weights, the file's metadata, the open_clip_config.json beside it, its name. None when nothing does."""
    config = path.with_name("open_clip_config.json")
    if path == TINY or "input_resolution" in state or digest in [known for _, known in FILES.values()]:
        return "quickgelu"
    if metadata.get("activation") in ACTIVATIONS:
        return metadata["activation"]
    if config.is_file():
        try:
            return "quickgelu" if json.loads(config.read_bytes())["model_cfg"].get("quick_gelu") in (True, "true") else "gelu"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{config} is no configuration of open_clip: expected JSON with a model_cfg") from None
    told = (path.name + "".join(metadata.values())).lower().replace("_", "")
    return "quickgelu" if "quickgelu" in told or "openai" in told else None


def load(name_or_path="tiny", fold=True, activation=None):
    """name_or_path: "tiny", a name in FILES or a path. fold: see CLIP.fold. activation: "quickgelu" or "gelu", needed only
    when the file does not tell -> CLIP in evaluation mode, float32 on the CPU, no gradients."""
    name = str(name_or_path)
    path = TINY if name == "tiny" else download(name) if name in FILES else pathlib.Path(name)
    if not path.is_file():
        raise UserError(f"{name!r} is neither a weights file nor one of tiny, {', '.join(FILES)}" if name != "tiny" else
                        f"{path} is missing: get it from the repository or train it with python -m clip.pretrain")
    state, metadata = read(path)
    digest = FILES[name][1] if name in FILES else sha256(path)
    told = find_activation(path, digest, state, metadata)
    activation = activation or told
    if activation is None:
        raise UserError(f"{path} does not tell its activation, QuickGELU (OpenAI's models, open_clip's '-quickgelu') or "
                        "GELU (open_clip's others): pass activation='quickgelu' or activation='gelu'")
    try:  # data-parallel and compiled models prefix their names
        model = build({re.sub(r"^((module|_orig_mod)\.)+", "", k): v for k, v in state.items()}, fold, activation)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    model.name, model.sha256 = name, digest if activation == told else hashlib.sha256((digest + activation).encode()).hexdigest()
    return model.requires_grad_(False)
