"""Every setting of a run, as `python train.py --help` lists them: the defaults are the paper's
(Sec. 4.1), where it says one."""
import argparse
import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

from clip.weights import FILES
from datasets.csv_sheet import is_sheet
from support import UserError, refused
from support.checkpoint import read_config
from support.cli import make_parser, words

OF_SHEETS = ("ignore", "minus_one", "unlisted")
PARTS = ("kd", "mmcp", "mmcl", "visual", "text")
CLIPS = ("tiny", *FILES)


def option(default, help, choices=None, low=0, high=2**31, above=None):
    """A setting, of its type or None, and its help. A word is one of choices, "a|b"; a number is
    from low to high, and more than `above` where that is given."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, above=above,
                                                choices=choices))


@dataclass
class Config:
    """Where the paper is silent, docs/readings.md says why the default is what it is. The presets
    of scenes and sheets are added by `parse`."""
    # ---- data
    data: str = option("scenes", "scenes coco voc2007 voc2012 vg200 nuswide cub, or a CSV")
    root: str = option(None, "folder of the data set")
    ratio: float = option(1.0, "share of the training labels that is known", above=0, high=1)
    single_positive: str = option(None, "one positive per image", "largeloss|splc")
    assume_negative: float = option(None, "weight of unknown labels as negatives; default: 0.3 if "
                                    "at most half as many are absent as present, else 0", high=1)
    mask: str = option(None, "file of the known cells, instead of drawing them")
    val: str = option(None, "validation CSV, or a share of the training rows such as 0.2")
    test: str = option(None, "test CSV of a sheet")
    ignore: str = option(None, "columns of a sheet that are no category: a,b")
    minus_one: str = option(None, "what a sheet's -1 is (absent: 0 is unknown)", "absent|unknown")
    unlisted: str = option(None, "meaning of empty cells, and of what lists lack", "absent|unknown")
    names: str = option(None, "file of prompt names (vg200: of categories), one a line")
    prompt_names: str = option("peers", "whose category words the prompts use", "peers|official")
    lists: str = option(None, "folder or training list of the splc setup (else --root)")
    keep_unannotated: bool = option(False, "keep COCO's images without any annotation")
    train_images: int = option(None, "use only the first n training images", low=1)
    images: str = option("photos", "what is learned from", "photos|captions")
    captions: str = option(None, "captions_*.json (default: that of the data set)")
    size: int = option(448, "side of the input in pixels", low=32, high=4096)
    augment: str = option("taidpt", "augmentation of training images", "none|flip|taidpt")
    # ---- model
    clip: str = option("RN101", " ".join(CLIPS) + ", a file, a folder, a cached Hugging Face repo")
    activation: str = option(None, "of a CLIP that does not name its own", "quickgelu|gelu")
    matching: str = option("carl", "carl is the paper's method, the others its baselines",
                           "carl|dualcoop|dualcoop-fixed|average|global")
    without: str = option("", "parts to leave out: any of kd,mmcp,mmcl or a prototype, visual,text")
    carl_from: str = option(None, "run whose region module is kept frozen (Table 4)")
    dropout: float = option(0.1, "of the region module; raise it against overfitting", high=0.9)
    queries: str = option("text", "start of the category queries", "random|text")
    context: int = option(16, "learned tokens of a prompt", low=1)
    score: str = option("region", "score of inference; mixed: the run's and zero-shot CLIP's",
                        "region|query|mean|mixed")
    # ---- losses
    alpha: float = option(1.0, "weight of the region score's loss (Eq. 15)")
    beta: float = option(0.05, "weight of distillation (Eq. 15)")
    gamma: float = option(0.01, "weight of the contrastive loss (Eq. 15)")
    gamma_pos: float = option(1.0, "gamma+ of Eq. 14")
    gamma_neg: float = option(2.0, "gamma- of Eq. 14: raise it when negatives dominate")
    shift: float = option(0.05, "c of Eq. 14, the margin of easy negatives", high=0.99)
    kd: str = option("softmax", "Eq. 6: as printed, or per category", "softmax|bernoulli")
    kd_teacher: str = option("region", "teacher of Eq. 6; both: it learns too", "region|query|both")
    kd_temperature: float = option(1.0, "temperature of Eq. 6", above=0)
    tau: float = option(0.07, "temperature of Eq. 13 (not Eq. 1's)", above=0)
    # ---- memory
    topk: int = option(3, "K of Eq. 7: locations that enter the bank; 1 to 10 score alike", low=1)
    queue: int = option(64, "L: prototypes kept per category; 16 to 256 score alike", low=1)
    eta: float = option(0.99, "moving average of the thresholds (Eq. 11)", high=1)
    stage_one: float = option(1 / 3, "share of the epochs before mmcp and mmcl join", high=1)
    pseudo_in_contrastive: bool = option(False, "let pseudo-labelled regions into Eq. 13 too")
    # ---- optimisation
    epochs: int = option(40, "epochs; more do not help few photos", low=1)
    batch: int = option(128, "images per step over all GPUs; of a sheet rows / 8, 16 to 128", low=1)
    lr: float = option(5e-4, "peak of OneCycleLR; lower it when the loss is not finite", above=0)
    weight_decay: float = option(0.01, "weight decay of AdamW")
    clip_grad: float = option(1.0, "largest norm of the gradient", above=0)
    seed: int = option(0, "of masks, initialisation, order and augmentation")
    eval_every: int = option(1, "epochs between evaluations", low=1)
    # ---- machine
    amp: str = option("auto", "auto: bf16 on a GPU that has it", "auto|none|bf16|fp16")
    kernels: str = option("auto", "auto takes Triton on a GPU", "auto|reference|triton")
    workers: int = option(min(8, os.cpu_count() or 1), "processes that decode; 0: none", high=1000)
    cache_features: int = option(0, "augmented views whose features stay on disk: quicker epochs")
    cache_dir: str = option("generated/features", "folder of the cached features")
    out: str = option(None, "run folder")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if (value := getattr(self, f.name)) is not None:
                check(f, value)
                if is_path(f.name, value):  # a run is used from other folders, too
                    setattr(self, f.name, os.path.abspath(value))
        if self.matching != "carl" and self.score in ("query", "mean"):
            self.score = "region"  # a baseline's only one
        if unknown := self.left_out - set(PARTS):
            raise UserError(f"--without expects any of {','.join(PARTS)}, got {','.join(unknown)}")
        if {"visual", "text"} <= self.left_out:
            raise UserError("--without visual,text leaves no prototype: say --without mmcp")
        if (self.without or self.carl_from) and self.matching != "carl":
            given = "--carl-from" if self.carl_from else "--without"
            raise UserError(f"{given} needs --matching carl, got {self.matching}")
        if self.images == "captions" and (self.ratio != 1 or self.single_positive or self.mask):
            raise UserError("captions bring their labels: drop --ratio, --single-positive, --mask")
        if not is_sheet(self.data):
            self.data = self.data.lower()  # COCO is coco
            if given := [flag(name) for name in OF_SHEETS if getattr(self, name) is not None]:
                raise UserError(f"{' '.join(given)} is for .csv or .tsv, got {self.data}: drop it")
        if self.test and not (is_sheet(self.data) and is_sheet(self.test)):
            raise UserError(f"--test needs sheets, .csv or .tsv; got {self.data} and {self.test}")

    @property
    def left_out(self):
        return set(filter(None, self.without.split(",")))

    def uses(self, part):
        """Whether a component (kd, mmcp, mmcl) or a modality of MMCP (visual, text) takes part."""
        return self.matching == "carl" and part not in self.left_out

    @property
    def modalities(self):
        """The modalities whose verdicts must agree (Eq. 12): of 0 visual, 1 text."""
        return [i for i, name in enumerate(("visual", "text")) if self.uses(name)]

    @property
    def asl(self):
        """The arguments of losses.asymmetric (Eq. 14)."""
        return dict(gamma_pos=self.gamma_pos, gamma_neg=self.gamma_neg, shift=self.shift,
                    assume_negative=self.assume_negative or 0.0)


def flag(name):
    return "--" + name.replace("_", "-")


def check(f, value):
    """UserError for a value that a field cannot have."""
    choices, low, high, above = (f.metadata[rule] for rule in ("choices", "low", "high", "above"))
    if choices and value not in choices.split("|"):
        raise UserError(f"{flag(f.name)} expects one of {choices}, got {value!r}")
    if f.type in (int, float) and not (low <= value <= high and (above is None or value > above)):
        least = f"from {low}" if above is None else f"above {above}"
        raise UserError(f"{flag(f.name)} expects a number {least} up to {high}, got {value}")


# What --resume takes anew: it changes nothing that is computed (kernels: up to rounding).
PLACES = {"data", "root", "mask", "val", "test", "names", "lists", "captions", "clip", "carl_from"}
MACHINE = {"workers", "cache_dir", "kernels"}

# A data set may bring a smaller recipe than the paper's; what the command line says still wins.
PRESETS = {"scenes": dict(clip="tiny", size=256, augment="flip", batch=64, lr=1e-3, dropout=0.2,
                          score="query", cache_features=2, workers=0),
           "sheet": dict(augment="flip", lr=1e-3, dropout=0.2, score="mixed", cache_features=2)}


def preset(data):
    """The recipe of a data set. A sheet's batch grows with its rows: 150, of which a fifth is held
    out, take 280 steps."""
    if not is_sheet(data):
        return PRESETS.get(data.lower(), {})
    rows = Path(data).read_bytes().count(b"\n") if Path(data).is_file() else 0
    return PRESETS["sheet"] | dict(batch=min(128, max(16, rows // 8)))


def parse(argv, about="", **defaults):
    """-> (Config, run to resume): of command line, else preset, else `defaults`, else Config's."""
    parser = make_parser("train.py", about, argument_default=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run and its "
                        "settings; say where things lie now: --data, --root, --clip, ...")
    for f in dataclasses.fields(Config):
        how = dict(type=f.type, metavar=f.metadata["choices"])
        if f.type is bool:
            how = dict(action="store_true")
        others = "".join(f"; {data}: {recipe[f.name]}" for data, recipe in PRESETS.items()
                         if f.name in recipe)
        default = "" if f.default in (None, "") else f" (default: {f.default}{others})"
        parser.add_argument(flag(f.name), help=f.metadata["help"] + default, **how)
    given = vars(parser.parse_args(words(argv)))
    run = given.pop("resume", None)
    if run is None:
        return Config(**defaults | preset(given.get("data", "scenes")) | given), None
    if kept := given.keys() - PLACES - MACHINE:
        raise UserError(f"drop {' '.join(map(flag, sorted(kept)))}: --resume keeps the settings")
    return restored(read_config(run)["config"], run / "config.json", given), run


def is_path(name, value):
    """Whether a setting names a file or folder; data, val and clip may hold something else."""
    if name in ("data", "val"):
        return is_sheet(value)
    return name in PLACES and (name != "clip" or (value not in CLIPS and os.path.exists(value)))


def restored(settings, file, given):
    """Settings that `file` holds, and those given anew, dicts -> Config; the rest is default. Where
    a folder with run and data was moved, the data are found as they lay beside the run."""
    run = settings.get("out") or ""  # where the folder lay when it was written
    for name in PLACES:
        place = settings.get(name) or ""
        on_its_drive = os.path.splitdrive(place)[0] == os.path.splitdrive(run)[0]
        if os.path.isabs(place) and on_its_drive and not os.path.exists(place):
            near = os.path.abspath(file.parent / os.path.relpath(place, run))
            if os.path.exists(near):
                settings = settings | {name: near}
    with refused(f"{file} is of another version: restore it", known=TypeError):  # unknown settings
        return Config(**(settings | given))
