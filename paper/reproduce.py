"""The paper's tables and figures, one a call: the paper's number beside the one measured here (Sec. 4, Tables 1-6, Fig. 4).

    python reproduce.py --table 3 --jobs 2                            drawn scenes, 1,000 training images, 3 seeds
    python reproduce.py --table 1 --data coco --root /data/coco       the real thing: RN101, 448, all images
    python reproduce.py --table 5                                     parameters and multiply-adds, nothing is trained
    python reproduce.py --figure 4 --image photos/                    regions of TRM-ML and DualCoOp, and how often they hit
    python reproduce.py --study kd                                    a point on which the paper is silent

Every option of train.py is accepted too and holds for all rows (--epochs 10, --batch 32, --cache-dir ...). A row is a run of
train.py with some settings changed. Its folder is recognised by its settings: what is finished is read, what was stopped goes
on, and a run that two tables share is trained once. Tables go to --out as Markdown, with the numbers of every seed as JSON.
"""
import json
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch

import clip
import data
import eval as evaluation
import train
from support import UserError
from support.checkpoint import save_atomically, write_atomically
from support.cli import make_parser, run_main, words
from paper.run_table import Runs, splits_of
from tools.localise import localisation
from tools.predict import images_in
from tools.plots import grid_of, region_tiles, two_axes

# ---------------------------------------------------------------------------------------------------------- the paper's numbers
# Table 1, known labels 10 % ... 90 %. "DualCoOp" is the authors' own rerun (their star), the stronger of the two they print.
PAPER_1 = {
    "coco": {"DualCoOp": (81.5, 82.7, 83.3, 83.8, 84.0, 84.2, 84.4, 84.4, 84.5),
             "TaI-DPT+DualCoOp": (81.5, 82.6, 83.3, 83.7, 83.9, 84.0, 84.2, 84.4, 84.5),
             "TRM-ML": (83.3, 84.5, 85.0, 85.3, 85.6, 85.8, 86.1, 86.4, 86.5)},
    "voc2007": {"DualCoOp": (91.8, 93.3, 93.7, 94.2, 94.2, 94.7, 94.8, 94.8, 94.9),
                "TaI-DPT+DualCoOp": (93.3, 94.6, 94.8, 94.9, 95.1, 95.0, 95.1, 95.3, 95.5),
                "TRM-ML": (93.9, 94.6, 94.9, 95.3, 95.4, 95.6, 95.6, 95.6, 95.7),
                "TaI-DPT+TRM-ML": (94.5, 95.0, 95.3, 95.4, 95.6, 95.7, 95.7, 95.8, 95.9)},
    "vg200": {"TRM-ML": (50.5, 51.9, 52.0, 53.0, 53.3, 53.5, 53.6, 53.7, 53.9)},
}
PAPER_2 = {"coco": (78.6, 79.2), "voc2012": (91.8, 92.2), "nuswide": (57.3, 63.4), "cub": (26.9, 27.6)}     # LargeLoss, SPLC
PAPER_3 = {"coco": (77.7, 84.1, 84.4, 84.7, 85.0, 85.4), "voc2007": (90.8, 94.2, 94.6, 94.9, 94.7, 95.2)}    # mean of 10-90 %
PAPER_4 = {"voc2007": ((92.0, 93.9, 94.4, 94.9, 95.0), (94.8, 94.9, 95.0, 95.1, 95.1)),                      # 10-50 %
           "coco": ((80.8, 82.9, 83.7, 84.3, 84.6), (83.1, 83.8, 84.2, 84.5, 84.7))}                          # without, with
PAPER_5 = {"DualCoOp": (91.17, 1.25, 36.97), "TRM-ML": (96.72, 6.80, 37.50)}         # total, learnable (Mi), multiply-adds (G)
PAPER_6 = {"voc2007": (93.24, 94.29, 94.15, 94.76)}                                  # neither, text, visual, both: mean of 10-50 %
AVERAGE = "Avg."          # of the ratios that are shown
NINE, FIVE = tuple(i / 10 for i in range(1, 10)), tuple(i / 10 for i in range(1, 6))


class Cell(NamedTuple):
    """One number of a table. runs: the settings of one run, or of several whose scores are averaged, or the name of a
    zero-shot score. A setting `carl_from` may hold the settings of another run, which is then trained before."""
    row: str
    column: str
    runs: object
    paper: Optional[float] = None


def nearest(printed, data_name):
    """The data set whose printed numbers stand beside those of `data_name`: itself, else MS-COCO, else the only one there is."""
    return next(name for name in (data_name, "coco", *printed) if name in printed)


def percent(ratios):
    return {f"{100 * r:.0f} %": dict(ratio=r) for r in ratios}


def cells_of(rows, columns, paper=None, of=NINE, zero_shot=False):
    """rows and columns {name: settings, of a row also a list of them}, paper {row: numbers at the ratios `of`, or one: their mean} -> Cells."""
    cells = [Cell(f"zero-shot CLIP, {kind}", AVERAGE, kind) for kind in ("global", "dense")] if zero_shot else []
    for name, runs in rows.items():
        runs, known = [runs] if isinstance(runs, dict) else runs, (paper or {}).get(name)
        at = dict(zip(percent(of), known)) if isinstance(known, tuple) else {}
        cells += [Cell(name, title, tuple(column | run for run in runs), at.get(title)) for title, column in columns.items()]
        if not at and known is not None:
            cells.append(Cell(name, AVERAGE, None, known))
    return cells


# ---------------------------------------------------------------------------------------------------------------- the tables
DUALCOOP = dict(matching="dualcoop")
PARTS_OFF = dict(without="kd,mmcp,mmcl")


def tai_dpt(base):
    """TaI-DPT's two granularities are two runs on captions: global prompts on sentences, local prompts on their words."""
    if base.data not in ("scenes", "coco") and not base.captions:
        return None                                                                # needs --captions FILE
    epochs = max(1, base.epochs // 5)                                              # five captions an image: the same number of steps
    return [dict(images="captions", ratio=1.0, epochs=epochs, matching=m) for m in ("global", "dualcoop")]


def table_1(base, ratios):
    rows, tai = {"DualCoOp": DUALCOOP, "TRM-ML": {}}, tai_dpt(base)
    if tai:                                                                        # equal halves: the run twice, the two granularities
        rows |= {"TaI-DPT": tai, "TaI-DPT+DualCoOp": [DUALCOOP] * 2 + tai, "TaI-DPT+TRM-ML": [{}] * 2 + tai}
    return cells_of(rows, percent(ratios or NINE), PAPER_1[nearest(PAPER_1, base.data)], zero_shot=True)


def table_2(base, ratios):
    """Single positive. RN50 unless --clip says otherwise. The SPLC setup is defined by published lists, which scenes lack."""
    printed = PAPER_2[nearest(PAPER_2, base.data)]
    rows = {"DualCoOp": DUALCOOP, "TRM-ML": {}, "TRM-ML, unknowns never negative": dict(assume_negative=0.0)}
    return [Cell(name, title, (dict(single_positive=setup) | run,), number if name == "TRM-ML" else None)
            for name, run in rows.items() for title, setup, number in zip(("LargeLoss setup", "SPLC setup"), ("largeloss", "splc"), printed)
            if setup == "largeloss" or base.data in data.LISTS]


def table_3(base, ratios):
    rows = {"average feature": dict(matching="average"), "+CARL": PARTS_OFF, "+CARL +KD": dict(without="mmcp,mmcl"),
            "+CARL +KD +MMCP": dict(without="mmcl"), "+CARL +KD +MMCL": dict(without="mmcp"), "all (TRM-ML)": {}}
    paper = dict(zip(rows, PAPER_3[nearest(PAPER_3, base.data)]))
    more = {"global feature": dict(matching="global"), "DualCoOp": DUALCOOP, "DualCoOp, fixed spatial scale": dict(matching="dualcoop-fixed"),
            "all but KD": dict(without="kd")}
    if base.single_positive:                                                       # the ladder in the other label setting, which the paper leaves out
        return cells_of(rows | more, {f"single positive, {base.single_positive}": dict(ratio=1.0)}, zero_shot=True)
    return cells_of(rows | more, percent(ratios or (NINE if base.data != "scenes" else (0.1, 0.5, 0.9))), paper, zero_shot=True)


def table_4(base, ratios):
    plain = dict(without="mmcp,mmcl")
    rows = {"w/o complete": plain, "w complete": plain | dict(carl_from=plain | dict(ratio=1.0))}
    return cells_of(rows, percent(ratios or FIVE), dict(zip(rows, PAPER_4[nearest(PAPER_4, base.data)])), FIVE)


def table_6(base, ratios):
    rows = {"neither (CARL, KD)": dict(without="mmcp,mmcl"), "text": dict(without="mmcl,visual"),
            "visual": dict(without="mmcl,text"), "text and visual": dict(without="mmcl")}
    return cells_of(rows, percent(ratios or (FIVE if base.data != "scenes" else (0.1, 0.3, 0.5))), dict(zip(rows, PAPER_6["voc2007"])))


TABLES = {1: (table_1, PAPER_1, ""), 2: (table_2, PAPER_2, ""), 3: (table_3, PAPER_3, ", of 10-90 %"), 4: (table_4, PAPER_4, ""),
          6: (table_6, PAPER_6, ", of 10-50 %")}

# Where the paper is silent. Settings are chosen on validation, so a study shows that split. The score of inference (region, query,
# mean) is in every table and needs no runs of its own.
STUDIES = {
    "kd": [dict(without="kd")] + [dict(kd=how, kd_temperature=t) for how in ("softmax", "bernoulli") for t in (1.0, 4.0)],
    "kd-teacher": [dict(kd_teacher=t, beta=b) for t in ("region", "query", "both") for b in (0.05, 0.5)] + [dict(kd_teacher="query", beta=2.0)],
    "alpha": [dict(alpha=a) for a in (0.3, 1.0, 3.0)],
    "beta": [dict(beta=b) for b in (0.01, 0.05, 0.2)],
    "gamma": [dict(gamma=g) for g in (0.001, 0.01, 0.1, 1.0)],
    "stage-one": [dict(stage_one=s) for s in (0.0, 0.15, 1 / 3, 0.5)],
    "topk": [dict(topk=k) for k in (1, 3, 10)],
    "queue": [dict(queue=n) for n in (16, 64, 256)],
    "eta": [dict(eta=e) for e in (0.9, 0.99, 0.999)],
    "tau": [dict(tau=t) for t in (0.03, 0.07, 0.2)],
    "queries": [dict(queries=q) for q in ("random", "text")],
    "contrastive-labels": [dict(pseudo_in_contrastive=p) for p in (False, True)],
    "assume-negative": [dict(single_positive="largeloss", ratio=1.0, assume_negative=w) for w in (0.0, 0.1, 0.3, 0.5, 1.0)],
}


def study(name, ratios):
    rows = {", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in run.items() if k not in ("single_positive", "ratio")): run
            for run in STUDIES[name]}
    return cells_of(rows, percent(ratios or (0.1,)))


# -------------------------------------------------------------------------------------------------------------------- tables
def table(cells, runs, seeds, paper="paper", split="test"):
    """Trains what is missing. Returns the Markdown table and {row: {score: {column: {"last" or "best": {seed: mAP}}}}}."""
    runs.train([runs.config(run, seed) for seed in seeds for cell in cells if isinstance(cell.runs, tuple) for run in cell.runs])
    columns = list(dict.fromkeys(cell.column for cell in cells if cell.column != AVERAGE))
    measured, printed = {}, {}
    for cell in cells:
        printed.setdefault(cell.row, {})[cell.column] = cell.paper
        of_row = measured.setdefault(cell.row, {})
        for score, numbers in runs.measure(cell.runs, seeds, split).items():
            of_row.setdefault(score, {})[cell.column] = numbers
    if len(columns) > 1:
        for row, scores in measured.items():
            if all(printed[row].get(c) is not None for c in columns):
                printed[row][AVERAGE] = float(np.mean([printed[row][c] for c in columns]))
            for numbers in scores.values():
                if all(c in numbers for c in columns):
                    numbers[AVERAGE] = {when: average(numbers, columns, when) for when in numbers[columns[0]]}
    if len(columns) > 1 or any(cell.column == AVERAGE for cell in cells):
        columns.append(AVERAGE)
    lines = [["", "mAP of"] + columns, ["---", "---"] + ["---:"] * len(columns)]
    for row, scores in measured.items():
        if any(number is not None for number in printed[row].values()):
            lines.append([f"**{row}**", paper] + ["" if (n := printed[row].get(c)) is None else f"{n:.1f}" for c in columns])
        for score, numbers in scores.items():
            lines.append([f"**{row}**", score] + [" / ".join(filter(None, map(spread, numbers.get(c, {}).values()))) for c in columns])
        if not scores:
            lines.append([f"**{row}**", "no run finished"] + [""] * len(columns))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines), measured


def average(numbers, columns, when):
    """{column: {when: {seed: mAP}}} -> {seed: mean over the columns}, of the seeds that no column lacks."""
    seeds = set.intersection(*(set(numbers[c][when]) for c in columns))
    return {seed: float(np.mean([numbers[c][when][seed] for c in columns])) for seed in sorted(seeds)}


def spread(by_seed):
    """Mean and sample standard deviation over the seeds."""
    values = list(by_seed.values())
    return "" if not values else f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def plot(measured, data_name, file):
    """mAP over the share of known labels, mean and spread over the seeds; the paper's curves beside them."""
    printed = nearest(PAPER_1, data_name)
    figure, (left, right) = two_axes(10, 3.8)
    for row, scores in measured.items():
        for score in [name for name in ("region", "query", "averaged") if name in scores]:
            points = [(float(column[:-2]), list(n["last"].values())) for column, n in scores[score].items() if column != AVERAGE]
            left.errorbar([x for x, _ in points], [np.mean(y) for _, y in points], [np.std(y, ddof=1) if len(y) > 1 else 0 for _, y in points],
                          marker=".", capsize=2, label=f"{row}, {score} score" if "query" in scores else row)
    for row, numbers in PAPER_1[printed].items():
        right.plot([100 * r for r in NINE], numbers, marker=".", label=row)
    for axis, title in ((left, f"measured here, {data_name}, last epoch"), (right, f"the paper, {printed}")):
        axis.set(xlabel="known labels (%)", ylabel="mAP (%)", title=title)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:                                    # none where all runs diverged
            axis.legend(fontsize=8)
    figure.tight_layout()
    save_atomically(lambda buffer: figure.savefig(buffer, dpi=120, format="png"), file)


# ------------------------------------------------------------------------------------------------------ Table 5 and Figure 4
def table_5(size=448, C=80):
    """Parameters (units of 2^20) and multiply-adds (10^9) of inference at RN101, from random weights: they need no training.

    Total: CLIP without its token embedding and without the attention pool's positional embedding, plus what is learned.
    """
    from torch.utils.flop_counter import FlopCounterMode
    model = clip.CLIP(512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512).eval().requires_grad_(False)
    frozen = sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel() - model.visual.attnpool.positional_embedding.numel()
    prompts = train.Prompts(model, ["cat"] * C)
    g_pos, g_neg = torch.nn.functional.normalize(torch.randn(2, C, model.D), dim=-1)
    count = lambda module: sum(p.numel() for p in module.parameters())
    lines = ["| | total (Mi) | paper | learned (Mi) | paper | multiply-adds (G) | after folding | paper |", "|---|" + "---:|" * 7]
    flops, image = {}, torch.zeros(1, 3, size, size)
    for folded in (False, True):
        for name, matching in (("DualCoOp", "dualcoop"), ("TRM-ML", "carl")):
            trm = train.TRM(C, model.D, prompts, matching).eval().requires_grad_(False)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                trm(model.encode_dense(image), None, g_pos, g_neg)
            flops[name, folded] = counter.get_total_flops() / 2 / 1e9
            if not folded:
                lines.append([name, frozen + count(trm), count(trm)])
        model.fold()
    for i, (name, total, learned) in enumerate(lines[2:], 2):
        of_paper = PAPER_5[name]
        lines[i] = (f"| **{name}** | {total / 2**20:.2f} | {of_paper[0]:.2f} | {learned / 2**20:.2f} | {of_paper[1]:.2f} | "
                    f"{flops[name, False]:.2f} | {flops[name, True]:.2f} | {of_paper[2]:.2f} |")
    return "\n".join(lines)


def figure_4(folders, images, runs, file, checkpoint="best", top=3):
    """DualCoOp's row above TRM-ML's for every image, as one picture; and how their maps sit on the boxes of the test split."""
    predictors = {name: evaluation.Predictor(run, checkpoint, runs.device, runs.encoder) for name, run in folders.items()}
    for name, predictor in predictors.items():
        same = (predictor.names, predictor.clip.sha256, predictor.cfg.size) == (runs.test.split.names, runs.encoder.sha256, runs.base.size)
        if not same or (predictor.cfg.matching == "carl") != (name == "TRM-ML"):
            raise UserError(f"{predictor.run} is no {name} run on {runs.base.data} with CLIP {runs.base.clip} at {runs.base.size} pixels: "
                              "give the options that it was trained with, DualCoOp's run first")
    rows = []
    for path in images:
        for name, predictor in predictors.items():
            (_, p, maps), = predictor.iterate([path])
            tiles = region_tiles(predictor, path, p, maps, np.argsort(-p, kind="stable")[:top])
            rows.append([(tiles[0][0], f"{name}: {tiles[0][1]}"), *tiles[1:]])
    save_atomically(lambda buffer: grid_of(rows).save(buffer, "PNG"), file)
    if not runs.test.split.boxes:
        return f"The test split has no boxes: only the picture was drawn, {file}."
    names = ("pointing", "small", "medium", "large", "mass", "present", "absent", "pairs")
    lines = ["| | mAP | pointing game (%) | small | medium | large | mass in boxes (%) | peak, present | peak, absent | pairs |",
             "|---|" + "---:|" * 9]
    for name, predictor in predictors.items():
        scores, maps = evaluation.score_split(predictor.model, predictor.g_pos, predictor.g_neg, runs.test, evaluation.maps_of)
        where = localisation(next(iter(maps.values())), predictor.grid, runs.test.split.boxes, runs.test.split.truth)
        mAP = runs.mAP(scores.get(predictor.cfg.score, scores["region"]))
        lines.append(f"| **{name}** | {mAP:.2f} | " + " | ".join(str(where[k]) for k in names) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- command line
def parse(argv):
    parser = make_parser("reproduce.py", __doc__)
    parser.add_argument("--table", type=int, choices=(1, 2, 3, 4, 5, 6))
    parser.add_argument("--figure", type=int, choices=(4,))
    parser.add_argument("--study", choices=sorted(STUDIES), help="alternatives where the paper is silent")
    parser.add_argument("--seeds", type=int, default=3, help="runs a row, with seeds 0, 1, ... from --seed on (default: 3)")
    parser.add_argument("--ratios", type=float, nargs="+", help="shares of known labels (default: the paper's; fewer on scenes)")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only the rows whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; two cores do most with 2, a GPU with 1 (default: 1)")
    parser.add_argument("--image", nargs="+", metavar="PATH", help="--figure 4: photos or folders (default: test images)")
    parser.add_argument("--runs", nargs=2, metavar=("DUALCOOP", "TRM"), help="--figure 4: two runs (default: Table 1's at 10 %%)")
    parser.add_argument("--out", default="runs/tables", help="folder of tables and runs (default: runs/tables)")
    own, rest = parser.parse_known_args(words(argv))
    if (own.table is not None) + (own.figure is not None) + (own.study is not None) != 1:
        raise UserError("expects one of --table 1..6, --figure 4, --study NAME")
    if not (1 <= own.seeds <= 1000 and 1 <= own.jobs <= 1000):
        raise UserError(f"--seeds and --jobs expect a number from 1 up to 1000, got {own.seeds} and {own.jobs}")
    if own.ratios and len(percent(own.ratios)) < len(own.ratios):
        raise UserError(f"--ratios expects shares that differ by a whole percent, got {' '.join(map(str, own.ratios))}")
    names = {word.split("=")[0] for word in rest}                                  # --clip RN101 and --clip=RN101
    if "--resume" in names:
        raise UserError("a table goes on by itself, drop --resume: give the command that was stopped")
    if rows := names & {"--ratio", "--matching", "--without", "--carl-from", "--images"}:
        raise UserError(f"{' '.join(sorted(rows))}: the rows differ in that, drop it (--ratios and --rows choose among them)")
    for name, fits in (("runs", own.figure), ("image", own.figure), ("rows", not own.figure), ("ratios", own.table not in (2, 5))):
        if getattr(own, name) and not fits:
            raise UserError(f"--{name} has no effect on this table, figure or study: drop it")
    base, _ = train.parse(rest)
    if base.data == "scenes" and base.train_images is None:
        base.train_images = 1000
    if own.table == 2 and base.data != "scenes" and "--clip" not in names:
        base.clip = "RN50"                                                         # "All models adopt ResNet50"
    if own.table == 2 and "--assume-negative" not in names:
        base.assume_negative = 0.3                                                 # single positive's default; the base has another label setting
    return own, base


def reproduce(argv):
    own, base = parse(argv)
    what = f"table-{own.table}" if own.table else f"figure-{own.figure}" if own.figure else f"study-{own.study}"
    out, start = Path(own.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    file, seeds, measured = out / f"{what}-{Path(base.data).stem}", range(base.seed, base.seed + own.seeds), None
    if own.table == 5:
        text = table_5()
    else:
        if not own.figure:
            rows, printed, average = (study, None, "") if own.study else TABLES[own.table]
            cells = [cell for cell in rows(own.study or base, own.ratios) if not own.rows or any(part in cell.row for part in own.rows)]
            if not cells:
                raise UserError(f"no row of this table holds {' or '.join(own.rows)}")
        runs = Runs(base, out, own.jobs)
        chosen_on = "validation" if splits_of(base)[1] else "test"                  # where the best epoch was chosen
        shown = chosen_on if own.study else "test"
        if own.figure:
            folders = dict(zip(("DualCoOp", "TRM-ML"), own.runs or ()))
            if not folders:
                ratio = dict(ratio=(own.ratios or [0.1])[0])
                rows = {name: runs.config(ratio | run, base.seed) for name, run in (("DualCoOp", DUALCOOP), ("TRM-ML", {}))}
                runs.train(list(rows.values()))
                folders = {name: configs[-1].out for name, configs in rows.items()}
            images = images_in(own.image) if own.image else runs.test.split.paths[:4]
            text = figure_4(folders, images, runs, file.with_suffix(".png"))
        else:
            text, measured = table(cells, runs, seeds, printed and f"paper, {nearest(printed, base.data)}{average}",
                                   "val" if shown == "validation" else "test")
            if own.table == 1:
                plot(measured, base.data, file.with_suffix(".png"))
        about = (f"{base.data}, {len(splits_of(base)[0].paths)} training images, CLIP {base.clip} ({runs.encoder.sha256[:12]}), {base.size} px, "
                 f"{base.epochs} epochs, seeds {seeds.start} to {seeds.stop - 1}; mAP on {shown} in %, "
                 f"mean ± standard deviation, of the last epoch / of the best epoch on {chosen_on}.")
        text = f"{about}\n\n{text}"
    text = f"`python reproduce.py {shlex.join(argv)}`: {text}" if own.table != 5 else f"`python reproduce.py --table 5`\n\n{text}"
    write_atomically(file.with_suffix(".md"), text + "\n")
    if measured is not None:
        write_atomically(file.with_suffix(".json"), json.dumps(measured, indent=1))
    print(f"\n{text}\n\nwrote {file}.md, {time.perf_counter() - start:.0f} s")


def main(argv=None):
    return run_main(lambda: reproduce(sys.argv[1:] if argv is None else argv), "stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
