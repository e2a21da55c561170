"""The paper's tables and figures, one a call: the paper's number beside the one measured here.

    python -m paper.reproduce --table 3 --jobs 2                        drawn scenes, 3 seeds
    python -m paper.reproduce --table 1 --data coco --root /data/coco   the real thing
    python -m paper.reproduce --table 5                                 parameters, multiply-adds
    python -m paper.reproduce --figure 4 --image photos/                regions of both methods
    python -m paper.reproduce --study kd                                where the paper is silent

The options of train.py hold for all rows, but for what the rows set (--ratio, --matching, ...). mAP
is that of the last epoch. Tables go to --out as Markdown, every seed's numbers as JSON; beside such
files of another command the new ones get a number. Two commands at once want two --out.
"""
import copy
import dataclasses
import itertools
import json
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import clip
from config import parse as parse_config
from data import load
from datasets.base import read_json
from datasets.csv_sheet import is_sheet, note
from eval import compare, metrics
from paper import captions
from paper.run_table import Runs
from support import NotFound, UserError
from support.checkpoint import read_config, write_atomically
from support.cli import best_device, make_parser, run_main, words
from tools.plots import region_tiles, save_grid, two_axes
from tools.predict import images_in
from tools.predictor import evaluation_loader
from tools.zero_shot import zero_shot, zero_shot_text
from trm import TRM, Prompts

# Of each table: "rows" {row: [settings of runs whose scores are averaged]}, columns ("ratios" of
# known labels, or "setups"), and the "paper" {data set: {row: mAPs of the "printed" columns}};
# "defaults" are settings below the data set's preset, "mean" says what a printed mean is of.
TABLES = read_json(Path(__file__).with_name("tables.json"))
# Our own studies, in the same form. They report validation, because settings are chosen on it.
STUDIES = {name: dict(about="", ratios=[0.1], printed=[], paper={"coco": {}}) | study
           for name, study in read_json(Path(__file__).with_name("studies.json")).items()}
ASKED = TABLES | STUDIES
AVERAGE = "Avg."


def rows_of(args, base):
    """-> {row: [settings]}, {column: settings}, {row: {column: the paper's}}, its data set"""
    asked = ASKED[args.table or args.study]
    known = asked["paper"]  # where the data set is not in it, another's numbers are shown
    data = next(name for name in (base.data, "coco", *known) if name in known)
    captions_work = base.captions or base.data in ("scenes", "coco")
    if base.score == "mixed" and not (base.val or base.data == "scenes" or is_sheet(base.data)):
        captions_work = False  # the mixed score is scaled on photos, and there are none
    texts = args.rows or [""]
    parts = [text for text in texts if text not in asked["rows"]]  # choose all rows that hold them
    rows = {row: runs for row, runs in asked["rows"].items()
            if (row in texts or any(part in row for part in parts))
            and (captions_work or "TaI-DPT" not in row)}
    if not rows:
        raise UserError(f"no row of this table holds {' or '.join(args.rows)} (those of TaI-DPT "
                        "need --captions, except on coco and scenes, and --val for --score mixed)")
    if base.single_positive:  # which Table 3 leaves out
        return rows, {f"single positive, {base.single_positive}": dict(ratio=1.0)}, {}, data
    paper = {row: dict(zip(asked["printed"], mAPs)) for row, mAPs in known[data].items()
             if row in rows}
    ratios = args.ratios or asked.get(f"ratios of {base.data}", asked["ratios"])
    columns = {f"{100 * ratio:g} %": dict(ratio=ratio) for ratio in ratios}
    for name, setup in asked.get("setups", {}).items():  # each has published files of its own
        try:
            load(dataclasses.replace(base, **setup))
            columns[name] = setup
        except NotFound as error:
            note(f"the {name} is left out: {error}")
    if not columns:
        raise UserError(f"{base.data} has the files of no setup of this table (docs/data.md)")
    return rows, columns, paper, data


# ---- measuring

def measure(runs, rows, columns, seeds):
    """Trains what is missing -> {row: {column: {seed: mAP}}}, with the mean of the columns."""
    runs.train([(column | settings, seed) for seed in seeds for column in columns.values()
                for of_row in rows.values() for settings in of_row])
    measured = {}
    for row, of_row in rows.items():
        cells = measured[row] = {}
        for name, column in columns.items():
            found = {seed: runs.mAP([column | one for one in of_row], seed) for seed in seeds}
            cells[name] = {seed: mAP for seed, mAP in found.items() if mAP is not None}
        if len(columns) > 1:
            cells[AVERAGE] = {seed: float(np.mean([cell[seed] for cell in cells.values()]))
                              for seed in seeds if all(seed in cell for cell in cells.values())}
    return measured


def spread(by_seed, seeds=0):
    """Mean and sample standard deviation over the seeds; how many of `seeds`, if not all."""
    values = list(by_seed.values())
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    some = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return f"{np.mean(values):.2f}{deviation}{some}" if values else "no run finished"


def markdown(columns, rows):
    """rows: lists of a name and its cells, texts."""
    head = f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}"
    return "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows)])


def plot(measured, paper, titles, file):
    """mAP over the share of known labels, mean and spread over the seeds; the paper's beside."""
    colours = {row: f"C{k}" for k, row in enumerate(measured)}
    with two_axes(file, 12, 3.8, dpi=120) as (left, right):
        for row, cells in measured.items():
            points = {float(name[:-2]): list(cell.values()) for name, cell in cells.items()
                      if name != AVERAGE and cell}
            error = [np.std(values, ddof=min(1, len(values) - 1)) for values in points.values()]
            left.errorbar(list(points), [np.mean(values) for values in points.values()], error,
                          marker=".", capsize=2, label=row, color=colours[row])
        for row, cells in paper.items():
            points = [(float(name[:-2]), mAP) for name, mAP in cells.items() if name != AVERAGE]
            right.plot(*zip(*points), ".-", label=row, color=colours[row])
        for axis, title in zip((left, right), titles):
            axis.set(xlabel="known labels (%)", ylabel="mAP (%)", title=title)


def settings_of(runs, seeds):
    base = runs.base
    only = " (of a baseline its only one)" if base.score in ("query", "mean") else ""
    return (f"{base.data}, {len(runs.splits[0].paths)} training images, CLIP {base.clip} "
            f"({runs.encoder.sha256[:12]}), {base.size} px, {base.epochs} epochs, seeds "
            f"{seeds.start} to {seeds.stop - 1}; mAP of the {base.score} score on {runs.split} in "
            f"%{only}, last epoch, mean ± standard deviation.")


# ---- what is reproduced: own options, Config of all rows, file of the table -> Markdown

def mAP_table(args, base, file):
    """A line per row, under it the paper's numbers where there are any."""
    asked = ASKED[args.table or args.study]
    rows, columns, paper, data = rows_of(args, base)
    base = dataclasses.replace(base, **next(iter(columns.values())))  # setups have their own lists
    runs = Runs(base, args.out, args.jobs, bool(args.study))
    seeds = range(base.seed, base.seed + args.seeds)
    if any("TaI-DPT" in row for row in rows) and not captions.file_of(base).is_file():
        raise UserError(f"{captions.file_of(base)}, from which TaI-DPT learns, is missing: put it "
                        "there, give --captions, or choose other --rows")
    measured = measure(runs, rows, columns, seeds)
    write_atomically(file.with_suffix(".json"), json.dumps(measured, indent=1))
    if args.table == "1":
        titles = f"measured here, {base.data}", f"the paper, {data}"
        plot(measured, paper, titles, file.with_suffix(".png"))
    names = list(next(iter(measured.values())))
    lines = []
    if args.table in ("1", "3"):
        test_split = runs.splits[2]
        loader = evaluation_loader(base, test_split, runs.encoder, best_device())
        g = zero_shot_text(runs.encoder, test_split.prompts)
        for name, score in zero_shot(g, loader.batches(0, shuffle=False)).items():
            mAP = metrics(score, test_split.truth)["mAP"]
            lines.append([f"zero-shot CLIP, {name}", *[""] * (len(names) - 1), f"{mAP:.2f}"])
    for row, cells in measured.items():
        lines.append([f"**{row}**", *(spread(cells[name], args.seeds) for name in names)])
        known = paper.get(row, {})
        same = set(known) in ({AVERAGE}, set(names))  # a mean is shown beside one of its columns
        beside = [str(known.get(name, "")) if same or name != AVERAGE else "" for name in names]
        if any(beside):
            lines.append([f"*the paper, {data}{asked.get('mean', '')}*", *beside])
    about = settings_of(runs, seeds), asked["about"], markdown(names, lines)
    return "\n\n".join(filter(None, about))


def table_5(*_):
    """Parameters and multiply-adds of inference at RN101, from random weights. The total counts
    CLIP, without its token embedding and the attention pool's positions, and what is learned."""
    C = 80
    published = clip.CLIP(512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512)
    published.eval().requires_grad_(False)
    folded = copy.deepcopy(published).fold()
    left_out = (published.token_embedding.weight, published.visual.attnpool.positional_embedding)
    frozen = sum(p.numel() for p in published.parameters()) - sum(p.numel() for p in left_out)
    prompts = Prompts(published, ["cat"] * C)
    g = torch.zeros(C, published.D)  # what is counted depends on shapes alone
    rows = []
    for name, (total, own, flops) in TABLES["5"]["paper"].items():
        trm = TRM(C, published.D, prompts, "carl" if name == "TRM-ML" else "dualcoop")
        trm.eval().requires_grad_(False)
        learned, adds = sum(p.numel() for p in trm.parameters()), []
        for model in (published, folded):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                trm(model.encode_dense(torch.zeros(1, 3, 448, 448)), None, g, g)
            adds.append(counter.get_total_flops() / 2e9)
        numbers = ((frozen + learned) / 2**20, total, learned / 2**20, own, *adds, flops)
        rows.append([f"**{name}**", *(f"{number:.2f}" for number in numbers)])
    return "\n\n" + markdown(["total (Mi)", "paper", "trained (Mi)", "paper", "multiply-adds (G)",
                              "folded", "paper"], rows)


def figure_4(args, base, file):
    """DualCoOp's row above TRM-ML's for each image; prints how their maps sit on the boxes."""
    runs, file = Runs(base, args.out, args.jobs), file.with_suffix(".png")
    split = runs.splits[2]
    images = images_in(args.image) if args.image else split.paths[:4]
    ratio = dict(ratio=(args.ratios or [0.1])[0])
    methods = {"DualCoOp": ratio | dict(matching="dualcoop"), "TRM-ML": ratio}
    configs = {name: runs.config(settings, base.seed) for name, settings in methods.items()}
    for cfg in configs.values():  # a table may have trained it
        there = Path(cfg.out, "config.json").exists()
        chosen_for = read_config(Path(cfg.out))["config"]["score"] if there else cfg.score
        if chosen_for != cfg.score:
            raise UserError(f"{cfg.out} chose its thresholds for --score {chosen_for}: say so, or "
                            f"train others with --score {cfg.score} in another --out")
    runs.train([(settings, base.seed) for settings in methods.values()])
    predictors = {name: runs.predictor(cfg.out) for name, cfg in configs.items()}
    rows = []
    for path in images:
        for name, predictor in predictors.items():
            (_, p, maps), = predictor.iterate([path])
            (photo, caption), *tiles = region_tiles(predictor, path, p, maps, 3)
            rows.append([(photo, f"{name}\n{caption}"), *tiles])
    save_grid(rows, file)
    compare(list(predictors.values()), split)
    return settings_of(runs, range(base.seed, base.seed + 1)) + f"\n\n{file} is drawn."


# ---- command line

def parse(argv):
    """Command line -> its own options, and the Config that all rows start from."""
    parser = make_parser("paper.reproduce", __doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--table", choices=sorted(TABLES))
    kind.add_argument("--figure", type=int, choices=(4,))
    kind.add_argument("--study", choices=sorted(STUDIES), help="where the paper is silent")
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="runs per row, from --seed on (default: 3)")
    add("--ratios", type=float, nargs="+", help="known shares (the paper's, or fewer on scenes)")
    add("--rows", nargs="+", metavar="TEXT", help="rows of these names, or with such words")
    add("--jobs", type=int, default=1, help="runs at a time; best one a core (default: 1)")
    add("--image", nargs="+", metavar="PATH", help="of --figure 4 (default: test images)")
    add("--out", default="runs/tables", help="folder (default: runs/tables)")
    args, rest = parser.parse_known_args(argv)  # the rest is train.py's
    asked = ASKED.get(args.table or args.study, {})
    if min(args.seeds, args.jobs) < 1:
        raise UserError(f"--seeds and --jobs start at 1, got {args.seeds} and {args.jobs}")
    by_row = {"--resume", "--ratio", "--mask", "--matching", "--without", "--carl-from", "--images"}
    if wrong := by_row & {word.split("=")[0] for word in rest}:  # --mask x and --mask=x
        raise UserError(f"drop it: rows set {' '.join(wrong)}, and a stopped table just goes on")
    base, _ = parse_config(rest, **asked.get("defaults", {}))
    if base.single_positive and args.table != "3":
        raise UserError("--single-positive is for --table 3; Table 2 has its setups: drop it")
    of_figure = args.figure and len(args.ratios or ()) > 1
    useless = {"ratios": asked.get("ratios") == [] or base.single_positive or of_figure,
               "rows": args.table == "5" or args.figure, "image": not args.figure}
    if wrong := [f"--{name}" for name in useless if useless[name] and getattr(args, name)]:
        raise UserError(f"{' '.join(wrong)} would change nothing here: drop it")
    if base.data == "scenes" and base.train_images is None:
        base.train_images = 1000
    return args, base


def reproduce(argv):
    # After a stop Python's tracker of semaphores, which a progress bar starts, would warn of some.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    args, base = parse(argv)
    start = time.perf_counter()
    kind = "table" if args.table else "figure" if args.figure else "study"
    command = f"`python -m paper.reproduce {shlex.join(argv)}`: "
    name = f"{kind}-{getattr(args, kind)}-{Path(base.data).stem}"
    for number in itertools.count(1):  # what another command has written stays
        file = Path(args.out, name + f"-{number}" * (number > 1) + ".md")
        if not file.exists() or file.read_text(encoding="utf-8").startswith(command):
            break
    file.parent.mkdir(parents=True, exist_ok=True)
    work = figure_4 if args.figure else table_5 if args.table == "5" else mAP_table
    text = command + work(args, base, file)
    write_atomically(file, text + "\n")
    print(f"\n{text}\n\nwrote {file}, {time.perf_counter() - start:.0f} s")


def main(argv=None):
    return run_main(lambda: reproduce(words(argv)), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
