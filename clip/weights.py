"""CLIP's weights as people have them, always as float32. No code from a file is run.

    clip.load("tiny")                                  the small CLIP that ships (tools/pretrain.py)
    clip.load("RN101")                                 OpenAI's, downloaded once into ~/.cache/clip
    clip.load("openai/clip-vit-base-patch32")          in Hugging Face's local cache
    clip.load("model.safetensors", activation="gelu")  a file, or a folder with its configuration
"""
import hashlib
import http.client
import os
import pickle
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from clip.formats import configuration, openai_names, read_json
from clip.model import MEAN, STD, build, dimensions
from support import UserError

TINY = Path(__file__).with_name("tiny.safetensors")
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
    "ViT-L/14@336px": ("ViT-L-14-336px.pt",
                       "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
# What is looked for in a folder, in this order.
IN_FOLDER = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


QUICK = ("quickgelu", "openai")  # in a file's name, they tell its activation


def sha256(file):
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(name):
    """One of FILES -> its path in the cache. The file gets its name when it is complete and its
    sha256 is right, so an interrupted or a second download cannot harm."""
    file, digest = FILES[name]
    path = Path(os.path.expanduser("~/.cache/clip")) / file  # as OpenAI's own package
    if path.is_file() and sha256(path) == digest:
        return path
    url = f"{BASE}/{digest}/{file}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), digest, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"could not get CLIP {name} from {url} ({error}): try again online, put "
                        f"the file at {path}, or give the path of a weights file") from None
    return path


def find(name):
    """What the user gave -> a file or a folder."""
    if name == "tiny":
        return TINY
    if name in FILES:
        return download(name)
    if Path(name).exists():
        return Path(name)
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub"))
    repository = hub / ("models--" + name.removeprefix("hf-hub:").replace("/", "--"))
    if (repository / "refs" / "main").is_file():
        return repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
    raise UserError(f"{name!r} is no file and no folder, not one of tiny, {', '.join(FILES)}, and "
                    f"no owner/repository that was downloaded into {hub}")


def weights_in(path):
    """A weights file, an index of shards or a folder with one of IN_FOLDER -> the files to read."""
    if path.is_dir():
        inside = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not inside:
            raise UserError(f"{path} holds no weights: expected one of {', '.join(IN_FOLDER)}")
        path = inside[0]
    if not path.name.endswith(".index.json"):
        return [path]
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{path} is no index of shards: expected a weight_map")
    return [path.with_name(Path(str(shard)).name) for shard in sorted(set(shards.values()))]


def read(file):
    """One weights file -> its tensors. Its kind is told from its bytes, not from its name."""
    try:
        with open(file, "rb") as handle:
            head = handle.read(40)
        if head.startswith(b"version https://git-lfs"):
            raise UserError(f"{file} is Git LFS's pointer to the weights: run git lfs pull")
        if head[8:9] == b"{":
            return load_file(file)
        if head[:2] == b"PK":
            with zipfile.ZipFile(file) as archive:
                script = any(name.endswith("/constants.pkl") for name in archive.namelist())
                unpacked = sum(part.file_size for part in archive.infolist())
            if script:
                return read_archive(file)
            if unpacked > file.stat().st_size:  # torch.save does not compress
                raise ValueError(f"it would unpack to {unpacked} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is said below
            state = unwrap(file, torch.load(file, map_location="cpu", weights_only=True))
        if any(t.numel() * t.element_size() > file.stat().st_size for t in state.values()):
            raise ValueError("a tensor is larger than the file")
        return state
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes a reader raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors (save a state_dict), or none at all"
        raise UserError(f"{file} is no readable weights file (state dict, safetensors or OpenAI's "
                        f"archive), or it is incomplete: {reason}") from None


def read_archive(file):
    """A TorchScript archive holds code that runs while it is loaded: OpenAI's own are loaded."""
    if sha256(file) not in [digest for _, digest in FILES.values()]:
        raise UserError(f"{file} is a TorchScript archive, but not one of OpenAI's, and loading it "
                        "would run its code. If you trust it, convert it with python -c \"import "
                        f"torch; torch.save(torch.jit.load('{file}').state_dict(), 'clip.pt')\"")
    return torch.jit.load(file, map_location="cpu").state_dict()


def unwrap(file, state):
    """What torch.load gave -> {name: tensor}, also where a training program put it under a key."""
    def tensors(value):
        found = value.items() if isinstance(value, dict) else ()
        return {str(name): t for name, t in found if isinstance(t, torch.Tensor)}

    if tensors(state):
        return tensors(state)
    inside = {key: tensors(value) for key, value in state.items()} if isinstance(state, dict) else {}
    inside = {key: value for key, value in inside.items() if value}
    if len(inside) != 1 and "state_dict" not in inside:
        keys = ", ".join(map(str, inside or state or ["nothing"])) if isinstance(state, dict) else ""
        raise UserError(f"{file} holds a {type(state).__name__} ({keys[:80]}), expected one state "
                        "dict of CLIP: save that alone")
    return inside.get("state_dict") or inside.popitem()[1]


def load(name_or_path="tiny", fold=True, activation=None):
    """"tiny", a name in FILES, a repository in the local hub cache, a file or a folder -> CLIP in
    evaluation mode, float32 on the CPU, no gradients.

    fold: see CLIP.fold.  activation: "quickgelu" or "gelu", where neither file nor configuration
    tells; it cannot be seen in the weights.
    """
    name = str(name_or_path)
    path = find(name)
    files = weights_in(path)
    state = {}
    for file in files:
        state |= read(file)
    digests = [sha256(file) for file in files]
    known = (path == TINY or digests[0] in [digest for _, digest in FILES.values()]
             or "input_resolution" in state)  # OpenAI's archives carry it beside the weights
    try:
        state, hugging_face = openai_names(state)
        folder = path if path.is_dir() else path.parent
        told = {} if known else configuration(folder, hugging_face, dimensions(state))
        quick = known or any(word in path.name.lower().replace("_", "") for word in QUICK)
        activation = activation or told.get("activation") or ("quickgelu" if quick else None)
        if activation is None:
            raise UserError("it does not tell its activation: add --activation quickgelu (OpenAI's "
                            "models, open_clip's -quickgelu) or --activation gelu (its others)")
        heads = {key: told[key] for key in ("text_heads", "vision_heads") if key in told}
        model = build(state, fold, activation, **heads)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    model.mean, model.std = told.get("mean", MEAN), told.get("std", STD)
    model.name, model.sha256 = name, digests[0]
    described = (digests, activation, heads, model.mean, model.std)
    if described != (digests[:1], "quickgelu", {}, MEAN, STD):  # the file alone does not tell all
        model.sha256 = hashlib.sha256(repr(described).encode()).hexdigest()
    return model.requires_grad_(False)
