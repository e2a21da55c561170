"""Every setting of a run, in one typed dataclass: its defaults are the paper's (Sec. 4.1), its options are train.py's.

    python train.py --help
"""
import argparse
import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from clip.weights import FILES
from support import UserError
from support.cli import make_parser
from datasets.csv_sheet import is_sheet
from trm import TRM


def option(default, help, **rules):
    return field(default=default, metadata={"help": help, **rules})


@dataclass
class Config:
    """Every setting of a run. Defaults are the paper's; where it is silent, the README's table of readings says why."""
    data: str = option("scenes", "scenes coco voc2007 voc2012 vg200 nuswide cub, or a CSV")
    root: Optional[str] = option(None, "folder of the data set")
    ratio: float = option(1.0, "share of the training labels that is known, in (0, 1]", low=0, open=True, high=1)
    single_positive: Optional[str] = option(None, "one known positive an image, in the setup of", choices=("largeloss", "splc"))
    assume_negative: Optional[float] = option(None, "weight of unknown labels as negatives; 0.3 for single positive, else 0: raise it "
                                              "when known negatives are missing, lower it when recall suffers", low=0, high=1)
    mask: Optional[str] = option(None, "file of the known cells, instead of drawing them")
    val: Optional[str] = option(None, "validation CSV, or a share of the training rows such as 0.2 (CSV data only)")
    names: Optional[str] = option(None, "file of prompt names, one category a line")
    prompt_names: str = option("peers", "category words in the prompts: the peers', the official ones, or joined words split",
                               choices=("peers", "official", "words"))
    lists: Optional[str] = option(None, "folder or training list of the splc setup (default: --root)")
    keep_unannotated: bool = option(False, "keep COCO's images without any annotation")
    train_images: Optional[int] = option(None, "use only the first n training images", low=1)
    images: str = option("photos", "what is learned from: photos, or captions as images (captions.py; masks do not apply)",
                         choices=("photos", "captions"))
    captions: Optional[str] = option(None, "captions_*.json of --images captions (default: that of the data set's training images)")
    clip: str = option("RN101", "tiny RN50 RN101 RN50x4 RN50x16 ViT-B/32 ViT-B/16 ViT-L/14, or a weights file")
    activation: Optional[str] = option(None, "of CLIP, where its file does not tell", choices=("quickgelu", "gelu"))
    size: int = option(448, "side of the input in pixels", low=32, high=4096)
    augment: str = option("taidpt", "training images", choices=("none", "flip", "taidpt"))

    matching: str = option("carl", "carl is the paper's method, the others its baselines", choices=TRM.MATCHING)
    without: str = option("", "components to leave out: any of kd,mmcp,mmcl,visual,text (the last two: one prototype of MMCP)")
    carl_from: Optional[str] = option(None, "run whose region module is loaded and kept frozen (Table 4)")
    dropout: float = option(0.1, "of the region module; raise it when the model memorises its few known labels", low=0, high=0.9)
    queries: str = option("text", "start of the category queries", choices=("random", "text"))
    alpha: float = option(1.0, "weight of the region score's loss (Eq. 15)", low=0)
    beta: float = option(0.05, "weight of distillation (Eq. 15)", low=0)
    gamma: float = option(0.01, "weight of the contrastive loss (Eq. 15)", low=0)
    gamma_pos: float = option(1.0, "gamma+ of Eq. 14", low=0)
    gamma_neg: float = option(2.0, "gamma- of Eq. 14: raise it when negatives dominate", low=0)
    shift: float = option(0.05, "c of Eq. 14, the margin of easy negatives", low=0, high=0.99)
    kd: str = option("softmax", "Eq. 6 over the categories (as printed) or per category", choices=("softmax", "bernoulli"))
    kd_teacher: str = option("region", "who teaches in Eq. 6: the region scores (the paper), the query scores, or both learn",
                             choices=("region", "query", "both"))
    kd_temperature: float = option(1.0, "temperature of Eq. 6", low=0, open=True, high=1000)
    tau: float = option(0.07, "temperature of Eq. 13", low=0, open=True)
    context: int = option(16, "learned tokens of a prompt", low=1)
    topk: int = option(3, "K of Eq. 7: locations of a region that become prototypes", low=1)
    queue: int = option(64, "L: prototypes kept a category", low=1)
    eta: float = option(0.99, "moving average of the thresholds (Eq. 11)", low=0, high=1)
    stage_one: float = option(1 / 3, "share of the epochs before the prototypes and the contrastive loss join", low=0, high=1)
    pseudo_in_contrastive: bool = option(False, "let pseudo-labelled regions into Eq. 13 too")
    score: str = option("region", "score of inference", choices=("region", "query", "mean"))

    epochs: int = option(40, "epochs", low=1)
    batch: int = option(128, "images a step, over all GPUs", low=1)
    lr: float = option(5e-4, "peak of OneCycleLR", low=0, open=True)
    weight_decay: float = option(0.01, "of AdamW", low=0)
    clip_grad: float = option(1.0, "largest norm of the gradient", low=0, open=True)
    seed: int = option(0, "of masks, initialisation, order and augmentation", low=0, high=2**31)
    eval_every: int = option(1, "epochs between evaluations", low=1)

    amp: str = option("auto", "mixed precision: auto takes bf16 on a GPU that has it, else none; none is IEEE float32 throughout; "
                      "bf16 also serves CPUs that have it in hardware",
                      choices=("auto", "none", "bf16", "fp16"))
    kernels: str = option("auto", "auto takes Triton on a GPU", choices=("auto", "reference", "triton"))
    workers: int = option(min(8, os.cpu_count() or 1), "processes that decode and augment images; 0 decodes in the main one", low=0, high=1000)
    cache_features: int = option(0, "keep the frozen features of this many augmented views on disk; 0 runs the backbone every epoch", low=0)
    cache_dir: str = option("generated/features", "where they are kept")
    out: Optional[str] = option(None, "run folder")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, rules = getattr(self, f.name), f.metadata
            kind = f.type.__args__[0] if hasattr(f.type, "__args__") else f.type
            if value is None and kind is not f.type:
                continue
            if kind is float and type(value) is int:
                value = float(value)
                setattr(self, f.name, value)
            if type(value) is not kind or kind is str and "\0" in value:
                raise UserError(f"--{f.name.replace('_', '-')} expects {kind.__name__}, got {value!r}")
            low, high = rules.get("low"), rules.get("high", 2**31 if kind is int else None)
            if "choices" in rules and value not in rules["choices"]:
                raise UserError(f"--{f.name.replace('_', '-')} expects one of {' '.join(rules['choices'])}, got {value!r}")
            if not ((low is None or value > low or (value == low and not rules.get("open")))
                    and (high is None or value <= high) and (kind is not float or math.isfinite(value))):
                raise UserError(f"--{f.name.replace('_', '-')} expects a number {'above' if rules.get('open') else 'from'} {low}"
                                  f"{f' up to {high}' if high is not None else ''}, got {value}")
        unknown = self.parts_left_out - {"kd", "mmcp", "mmcl", "visual", "text"}
        if unknown:
            raise UserError(f"--without expects any of kd,mmcp,mmcl,visual,text, got {','.join(sorted(unknown))}")
        if {"visual", "text"} <= self.parts_left_out:
            raise UserError("--without visual,text leaves no prototype: say --without mmcp")
        if self.carl_from and self.matching != "carl":
            raise UserError(f"--carl-from needs --matching carl, got {self.matching}")
        if self.images == "captions" and (self.ratio != 1 or self.single_positive or self.mask):
            raise UserError("--images captions takes its labels from the words of the captions: drop --ratio, --single-positive and --mask")
        if self.captions and self.images != "captions":
            raise UserError("--captions belongs to --images captions: add it, or drop --captions")
        if self.lists and self.single_positive != "splc":
            raise UserError("--lists belongs to --single-positive splc: add it, or drop --lists")
        if self.assume_negative is None:
            self.assume_negative = 0.3 if self.single_positive else 0.0

    @property
    def parts_left_out(self):
        return set(filter(None, self.without.split(",")))

    def uses(self, part):
        return self.matching == "carl" and part not in self.parts_left_out


NOT_THE_RESULT = {"out", "workers", "cache_dir", "kernels"}                        # settings that do not change the numbers

# A data set may bring a smaller recipe than the paper's; what the command line says still wins.
PRESETS = {"scenes": dict(clip="tiny", size=256, augment="flip", batch=64, lr=1e-3, epochs=40, dropout=0.2, score="query",
                          cache_features=2, workers=0)}


def parse(argv, about=""):
    """Command line -> (Config, run to resume or None). Order: command line, preset of the data set, the paper's defaults."""
    parser = make_parser("train.py", about, argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", metavar="RUN", help="go on with a run and its settings; --root, --cache-dir and --workers may be given anew")
    for f in dataclasses.fields(Config):
        kind = f.type.__args__[0] if hasattr(f.type, "__args__") else f.type
        choices = f.metadata.get("choices")
        how = dict(action="store_true") if kind is bool else dict(type=kind, metavar=choices and "{%s}" % ",".join(choices))
        parser.add_argument("--" + f.name.replace("_", "-"), help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    given |= {name: os.path.abspath(value) for name, value in given.items() if is_path(name, value)}     # a run is used from other folders, too
    resume = given.pop("resume", None)
    if resume:
        kept = given.keys() - {"root", "cache_dir", "workers"}                     # these three may change: the data moved
        if kept:
            raise UserError(f"--resume takes its settings from the run, drop {' '.join('--' + k.replace('_', '-') for k in sorted(kept))}")
        return dataclasses.replace(load_config(Path(resume)), **given), Path(resume)
    return Config(**PRESETS.get(given.get("data", "scenes"), {}) | given), None


def is_path(name, value):
    """Whether a setting names a file or folder that the run reads; data, val and clip may hold a name or a number instead."""
    if name in ("data", "val"):
        return is_sheet(value)
    return name in ("root", "mask", "names", "lists", "captions", "carl_from") or name == "clip" and value not in ("tiny", *FILES)


def load_config(run):
    file = run / "config.json"
    if not file.is_file():
        raise UserError(f"expected a run folder, found no {file}: give the folder that an earlier run printed")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))["config"]
        if not stored or not isinstance(stored, dict):
            raise ValueError                                                       # it would be a run of defaults
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is no config.json of train.py: restore it, or train into another --out") from None
    return checked(stored, file)


def checked(stored, file):
    """The settings (dict) that `file` holds -> Config; one that is missing takes its default."""
    unknown = set(stored) - {f.name for f in dataclasses.fields(Config)}
    if unknown:
        raise UserError(f"{file} holds unknown settings {', '.join(sorted(unknown))}: it was written by another version")
    return Config(**stored)
