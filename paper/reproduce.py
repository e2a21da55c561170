"""The paper's tables and figures, one a call: the paper's number beside the one measured here.

    python -m paper.reproduce --table 3 --jobs 2                        drawn scenes, 3 seeds
    python -m paper.reproduce --table 1 --data coco --root /data/coco   the real thing
    python -m paper.reproduce --table 5                                 parameters, multiply-adds
    python -m paper.reproduce --figure 4 --image photos/                regions of both methods
    python -m paper.reproduce --study kd                                where the paper is silent

Every option of train.py is accepted too and holds for all rows; a row changes some settings. The
numbers are mAP after the last epoch. Tables go to --out as Markdown, every seed's numbers as JSON.
"""
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np

from config import parse as parse_config
from eval import maps_of, metrics
from paper.run_table import Runs
from support import UserError
from support.checkpoint import save_atomically, write_atomically
from support.cli import make_parser, run_main, words
from tools.localise import localisation, upright_boxes
from tools.plots import region_tiles, save_grid, two_axes
from tools.predict import images_in
from tools.predictor import Predictor

# ---- the paper's numbers
# Table 1, known labels 10 % ... 90 %. "DualCoOp" is the authors' own rerun (their star).
PAPER_1 = {
    "coco": {"DualCoOp": (81.5, 82.7, 83.3, 83.8, 84.0, 84.2, 84.4, 84.4, 84.5),
             "TaI-DPT+DualCoOp": (81.5, 82.6, 83.3, 83.7, 83.9, 84.0, 84.2, 84.4, 84.5),
             "TRM-ML": (83.3, 84.5, 85.0, 85.3, 85.6, 85.8, 86.1, 86.4, 86.5)},
    "voc2007": {"DualCoOp": (91.8, 93.3, 93.7, 94.2, 94.2, 94.7, 94.8, 94.8, 94.9),
                "TaI-DPT+DualCoOp": (93.3, 94.6, 94.8, 94.9, 95.1, 95.0, 95.1, 95.3, 95.5),
                "TRM-ML": (93.9, 94.6, 94.9, 95.3, 95.4, 95.6, 95.6, 95.6, 95.7),
                "TaI-DPT+TRM-ML": (94.5, 95.0, 95.3, 95.4, 95.6, 95.7, 95.7, 95.8, 95.9)},
    "vg200": {"TRM-ML": (50.5, 51.9, 52.0, 53.0, 53.3, 53.5, 53.6, 53.7, 53.9)}}
# Table 2: LargeLoss's setup, SPLC's. Table 3: mean of 10-90 %. Table 4: 10-50 % without and with.
PAPER_2 = {"coco": (78.6, 79.2), "voc2012": (91.8, 92.2), "nuswide": (57.3, 63.4),
           "cub": (26.9, 27.6)}
PAPER_3 = {"coco": (77.7, 84.1, 84.4, 84.7, 85.0, 85.4),
           "voc2007": (90.8, 94.2, 94.6, 94.9, 94.7, 95.2)}
PAPER_4 = {"voc2007": ((92.0, 93.9, 94.4, 94.9, 95.0), (94.8, 94.9, 95.0, 95.1, 95.1)),
           "coco": ((80.8, 82.9, 83.7, 84.3, 84.6), (83.1, 83.8, 84.2, 84.5, 84.7))}
# Table 5: total and learnable parameters (2^20), multiply-adds (10^9). Table 6: mean of 10-50 %.
PAPER_5 = {"DualCoOp": (91.17, 1.25, 36.97), "TRM-ML": (96.72, 6.80, 37.50)}
PAPER_6 = {"voc2007": (93.24, 94.29, 94.15, 94.76)}
NINE = tuple(i / 10 for i in range(1, 10))
AVERAGE = "Avg."

# ---- the tables. Each gives {row: [settings of the runs whose scores are averaged]}, {column:
# settings}, and the paper's {row: {column: number}}.
DUALCOOP = dict(matching="dualcoop")


def nearest(printed, data):
    """The paper's numbers for this data set, else for MS-COCO, else the only ones there are."""
    return printed[next(name for name in (data, "coco", *printed) if name in printed)]


def at(ratios):
    return {f"{100 * ratio:.0f} %": dict(ratio=ratio) for ratio in ratios}


def table_1(base, ratios):
    rows = {"DualCoOp": [DUALCOOP], "TRM-ML": [{}]}
    if base.data in ("scenes", "coco") or base.captions:
        # TaI-DPT's two granularities are two runs on captions: five captions an image, so a fifth
        # of the epochs. In the sums both halves weigh the same.
        captions = dict(images="captions", ratio=1.0, epochs=max(1, base.epochs // 5))
        tai = [captions | dict(matching="global"), captions | dict(matching="dualcoop")]
        rows |= {"TaI-DPT": tai, "TaI-DPT+DualCoOp": [DUALCOOP] * 2 + tai,
                 "TaI-DPT+TRM-ML": [{}] * 2 + tai}
    printed = nearest(PAPER_1, base.data)
    paper = {row: dict(zip(at(NINE), numbers)) for row, numbers in printed.items()}
    return rows, at(ratios or NINE), paper


def table_2(base, ratios):
    """Single positive. The SPLC setup is defined by published lists, which scenes lack."""
    rows = {"DualCoOp": [DUALCOOP], "TRM-ML": [{}],
            "unknowns never negative": [dict(assume_negative=0.0)]}
    columns = {"LargeLoss setup": dict(single_positive="largeloss", ratio=1.0)}
    if base.data in PAPER_2:
        columns["SPLC setup"] = dict(single_positive="splc", ratio=1.0)
    return rows, columns, {"TRM-ML": dict(zip(columns, nearest(PAPER_2, base.data)))}


def table_3(base, ratios):
    rows = {"average feature": dict(matching="average"), "+CARL": dict(without="kd,mmcp,mmcl"),
            "+CARL +KD": dict(without="mmcp,mmcl"), "+CARL +KD +MMCP": dict(without="mmcl"),
            "+CARL +KD +MMCL": dict(without="mmcp"), "TRM-ML": {}}
    paper = {row: {AVERAGE: number} for row, number in zip(rows, nearest(PAPER_3, base.data))}
    rows |= {"global feature": dict(matching="global"), "DualCoOp": DUALCOOP,
             "DualCoOp, fixed spatial scale": dict(matching="dualcoop-fixed"),
             "all but KD": dict(without="kd")}
    rows = {row: [settings] for row, settings in rows.items()}
    if base.single_positive:  # the ladder in the other label setting, which the paper leaves out
        return rows, {f"single positive, {base.single_positive}": dict(ratio=1.0)}, {}
    return rows, at(ratios or (NINE if base.data != "scenes" else (0.1, 0.5, 0.9))), paper


def table_4(base, ratios):
    plain = dict(without="mmcp,mmcl")
    rows = {"w/o complete": [plain],
            "w complete": [plain | dict(carl_from=plain | dict(ratio=1.0))]}
    printed = zip(rows, nearest(PAPER_4, base.data))
    paper = {row: dict(zip(at(NINE), numbers)) for row, numbers in printed}
    return rows, at(ratios or NINE[:5]), paper


def table_6(base, ratios):
    rows = {"neither (CARL, KD)": "mmcp,mmcl", "text": "mmcl,visual", "visual": "mmcl,text",
            "text and visual": "mmcl"}
    paper = {row: {AVERAGE: number} for row, number in zip(rows, PAPER_6["voc2007"])}
    rows = {row: [dict(without=without)] for row, without in rows.items()}
    return rows, at(ratios or (NINE[:5] if base.data != "scenes" else (0.1, 0.3, 0.5))), paper


TABLES = {1: table_1, 2: table_2, 3: table_3, 4: table_4, 6: table_6}

# Where the paper is silent. Settings are chosen on validation, so a study shows that split.
STUDIES = {
    "kd": [dict(without="kd"), *(dict(kd=how, kd_temperature=t) for how in ("softmax", "bernoulli")
                                 for t in (1.0, 4.0))],
    "kd-teacher": [dict(kd_teacher=teacher, beta=beta) for teacher in ("region", "query", "both")
                   for beta in (0.05, 0.5)],
    "alpha": [dict(alpha=value) for value in (0.3, 1.0, 3.0)],
    "beta": [dict(beta=value) for value in (0.01, 0.05, 0.2)],
    "gamma": [dict(gamma=value) for value in (0.001, 0.01, 0.1, 1.0)],
    "stage-one": [dict(stage_one=value) for value in (0.0, 0.15, 1 / 3, 0.5)],
    "topk": [dict(topk=value) for value in (1, 3, 10)],
    "queue": [dict(queue=value) for value in (16, 64, 256)],
    "eta": [dict(eta=value) for value in (0.9, 0.99, 0.999)],
    "tau": [dict(tau=value) for value in (0.03, 0.07, 0.2)],
    "queries": [dict(queries=value) for value in ("random", "text")],
    "contrastive-labels": [dict(pseudo_in_contrastive=value) for value in (False, True)],
    "assume-negative": [dict(single_positive="largeloss", ratio=1.0, assume_negative=value)
                        for value in (0.0, 0.1, 0.3, 0.5, 1.0)]}


def study(name, ratios):
    rows = {}
    for settings in STUDIES[name]:
        told = [f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in settings.items() if key not in ("single_positive", "ratio")]
        rows[", ".join(told)] = [settings]
    return rows, at(ratios or (0.1,)), {}


# ---- measuring


def measure(runs, rows, columns, seeds, split="test"):
    """Trains what is missing -> {row: {column: {seed: mAP}}}, with the mean of the columns."""
    runs.train([(column | settings, seed) for seed in seeds for column in columns.values()
                for of_row in rows.values() for settings in of_row])
    measured = {}
    for row, of_row in rows.items():
        cells = {}
        for name, column in columns.items():
            wanted = [column | settings for settings in of_row]
            found = {seed: runs.mAP(wanted, seed, split) for seed in seeds}
            cells[name] = {seed: mAP for seed, mAP in found.items() if mAP is not None}
        if len(cells) > 1:
            whole = [seed for seed in seeds if all(seed in cell for cell in cells.values())]
            cells[AVERAGE] = {seed: float(np.mean([cell[seed] for cell in cells.values()]))
                              for seed in whole}
        measured[row] = cells
    return measured


def spread(by_seed):
    """Mean and sample standard deviation over the seeds."""
    values = list(by_seed.values())
    if not values:
        return "no run finished"
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


def markdown(measured, paper, zero_shot):
    """The table: a line a row, under it the paper's numbers where there are any."""
    columns = list(next(iter(measured.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, number in zero_shot.items():
        lines.append(f"| zero-shot CLIP, {name} |" + " |" * (len(columns) - 1) + f" {number:.2f} |")
    for row, cells in measured.items():
        told = " | ".join(spread(cells[column]) for column in columns)
        lines.append(f"| **{row}** | {told} |")
        printed = paper.get(row, {})
        if set(printed) & set(columns):
            numbers = [f"{printed[column]:.1f}" if column in printed else "" for column in columns]
            lines.append("| *the paper* | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def plot(measured, paper, about, file):
    """mAP over the share of known labels, mean and spread over the seeds; the paper's beside."""
    figure, (left, right) = two_axes(10, 3.8)
    for row, cells in measured.items():
        points = [(float(name[:-2]), list(cell.values())) for name, cell in cells.items()
                  if name != AVERAGE and cell]
        error = [np.std(values, ddof=1) if len(values) > 1 else 0 for _, values in points]
        left.errorbar([x for x, _ in points], [np.mean(values) for _, values in points], error,
                      marker=".", capsize=2, label=row)
    for row, cells in paper.items():
        right.plot([float(name[:-2]) for name in cells], list(cells.values()), marker=".",
                   label=row)
    for axis, title in ((left, f"measured here, {about}"), (right, "the paper")):
        axis.set(xlabel="known labels (%)", ylabel="mAP (%)", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    save_atomically(lambda buffer: figure.savefig(buffer, dpi=120, format="png"), file)


def table_5(size=448, C=80):
    """Parameters and multiply-adds of inference at RN101, from random weights.

    Total: CLIP without its token embedding and the attention pool's positions, and what is learned.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import clip
    from trm import TRM, Prompts
    model = clip.CLIP(512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512)
    model.eval().requires_grad_(False)
    left_out = (model.token_embedding.weight, model.visual.attnpool.positional_embedding)
    frozen = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in left_out)
    prompts = Prompts(model, ["cat"] * C)
    g_pos, g_neg = torch.nn.functional.normalize(torch.randn(2, C, model.D), dim=-1)
    learned, adds = {}, {"DualCoOp": [], "TRM-ML": []}
    for _ in range(2):  # as published, then folded
        for name, matching in (("DualCoOp", "dualcoop"), ("TRM-ML", "carl")):
            trm = TRM(C, model.D, prompts, matching).eval().requires_grad_(False)
            learned[name] = sum(p.numel() for p in trm.parameters())
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                trm(model.encode_dense(torch.zeros(1, 3, size, size)), None, g_pos, g_neg)
            adds[name].append(counter.get_total_flops() / 2 / 1e9)
        model.fold()
    lines = ["| | total (Mi) | paper | learned (Mi) | paper | multiply-adds (G) | folded | paper |",
             "|---|" + "---:|" * 7]
    for name, (total, own, flops) in PAPER_5.items():
        lines.append(f"| **{name}** | {(frozen + learned[name]) / 2**20:.2f} | {total:.2f} | "
                     f"{learned[name] / 2**20:.2f} | {own:.2f} | {adds[name][0]:.2f} | "
                     f"{adds[name][1]:.2f} | {flops:.2f} |")
    return "\n".join(lines)


def figure_4(runs, folders, images, file, top=3):
    """DualCoOp's row above TRM-ML's for each image, and how their maps sit on the test boxes."""
    predictors = {name: Predictor(run, "last", runs.device, runs.encoder)
                  for name, run in folders.items()}
    rows = []
    for path in images:
        for name, predictor in predictors.items():
            (_, p, maps), = predictor.iterate([path])
            first, *tiles = region_tiles(predictor, path, p, maps, top)
            rows.append([(first[0], f"{name}: {first[1]}"), *tiles])
    save_grid(rows, file)
    split = runs.splits[2]
    if not split.boxes:
        return f"The test split has no boxes: only the picture was drawn, {file}."
    boxes = upright_boxes(split)
    names = ("pointing", "small", "medium", "large", "mass", "present", "absent", "pairs")
    lines = ["| | mAP | pointing game (%) | small | medium | large | mass in boxes (%) "
             "| peak, present | peak, absent | pairs |", "|---|" + "---:|" * 9]
    for name, predictor in predictors.items():
        scores, maps = predictor.scores(runs.test, maps_of)
        where = localisation(next(iter(maps.values())), predictor.grid, boxes, split.truth)
        mAP = metrics(scores.get(predictor.cfg.score, scores["region"]), split.truth)["mAP"]
        told = " | ".join(str(where[key]) for key in names)
        lines.append(f"| **{name}** | {mAP:.2f} | {told} |")
    return "\n".join(lines)


# ---- command line


def parse(argv):
    """Command line -> its own options, and the Config that all rows start from."""
    parser = make_parser("paper.reproduce", __doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--table", type=int, choices=(1, 2, 3, 4, 5, 6))
    kind.add_argument("--figure", type=int, choices=(4,))
    kind.add_argument("--study", choices=sorted(STUDIES), help="where the paper is silent")
    parser.add_argument("--seeds", type=int, default=3,
                        help="runs a row, with seeds 0, 1, ... from --seed on (default: 3)")
    parser.add_argument("--ratios", type=float, nargs="+",
                        help="shares of known labels (default: the paper's; fewer on scenes)")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows that hold such a text")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at a time; two cores do most with 2 (default: 1)")
    parser.add_argument("--image", nargs="+", metavar="PATH",
                        help="--figure 4: photos or folders (default: test images)")
    parser.add_argument("--out", default="runs/tables", help="folder (default: runs/tables)")
    own, rest = parser.parse_known_args(words(argv))
    if min(own.seeds, own.jobs) < 1:
        raise UserError(f"--seeds and --jobs start at 1, got {own.seeds} and {own.jobs}")
    if own.ratios and len(at(own.ratios)) < len(own.ratios):
        raise UserError("--ratios expects shares that differ by a whole percent, got "
                        f"{' '.join(map(str, own.ratios))}")
    names = {word.split("=")[0] for word in rest}  # --clip RN101 and --clip=RN101
    rows_differ = {"--resume", "--ratio", "--matching", "--without", "--carl-from", "--images"}
    if wrong := names & rows_differ:
        raise UserError(f"{' '.join(sorted(wrong))}: the rows differ in that, and a stopped table "
                        "goes on by itself: drop it")
    base, _ = parse_config(rest)
    if base.data == "scenes" and base.train_images is None:
        base.train_images = 1000
    if own.table == 2 and base.data != "scenes" and "--clip" not in names:
        base.clip = "RN50"  # "All models adopt ResNet50"
    if own.table == 2 and "--assume-negative" not in names:
        base.assume_negative = 0.3  # single positive's default; the base has another label setting
    return own, base


def rows_of(own, base):
    """What the command asks for: {row: its settings}, the columns, the paper's numbers."""
    if own.figure or own.table == 5:
        return {}, [], {}
    if own.study:
        rows, columns, paper = study(own.study, own.ratios)
    else:
        rows, columns, paper = TABLES[own.table](base, own.ratios)
    rows = {row: settings for row, settings in rows.items()
            if not own.rows or any(part in row for part in own.rows)}
    if not rows:
        raise UserError(f"no row of this table holds {' or '.join(own.rows)}")
    return rows, columns, paper


def reproduce(argv):
    own, base = parse(argv)
    what = next(f"{name}-{value}" for name in ("table", "figure", "study")
                if (value := getattr(own, name)))
    out, start = Path(own.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{what}-{Path(base.data).stem}"
    rows, columns, paper = rows_of(own, base)
    text = table_5() if own.table == 5 else ""
    if not text:
        runs = Runs(base, out, own.jobs)
        train_split, val_split, test_split = runs.splits
        seeds = range(base.seed, base.seed + own.seeds)
        split = "val" if own.study and val_split else "test"
        about = (f"{base.data}, {len(train_split.paths)} training images, CLIP {base.clip} "
                 f"({runs.encoder.sha256[:12]}), {base.size} px, {base.epochs} epochs, seeds "
                 f"{seeds.start} to {seeds.stop - 1}; mAP of the {base.score} score on {split} in "
                 "%, last epoch, mean ± standard deviation.\n\n")
    if own.figure:
        ratio = dict(ratio=(own.ratios or [0.1])[0])
        pairs = {"DualCoOp": ratio | DUALCOOP, "TRM-ML": ratio}
        runs.train([(settings, base.seed) for settings in pairs.values()])
        folders = {name: runs.config(settings, base.seed).out for name, settings in pairs.items()}
        images = images_in(own.image) if own.image else test_split.paths[:4]
        text = about + figure_4(runs, folders, images, file.with_suffix(".png"))
    elif rows:
        measured = measure(runs, rows, columns, seeds, split)
        zero_shot = {name: metrics(score, test_split.truth)["mAP"]
                     for name, score in runs.zero_shot.items()} if own.table in (1, 3) else {}
        text = about + markdown(measured, paper, zero_shot)
        write_atomically(file.with_suffix(".json"), json.dumps(measured, indent=1))
        if own.table == 1:
            plot(measured, paper, base.data, file.with_suffix(".png"))
    text = f"`python -m paper.reproduce {shlex.join(argv)}`: {text}"
    write_atomically(file.with_suffix(".md"), text + "\n")
    print(f"\n{text}\n\nwrote {file}.md, {time.perf_counter() - start:.0f} s")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    return run_main(lambda: reproduce(argv), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
