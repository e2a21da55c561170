"""docs/walkthrough.html: the paper's Section 3 beside the code beside live tensors.

    python -m paper.walkthrough                     trains runs/walkthrough first, if it is missing
    python -m paper.walkthrough --root FOLDER       where the drawn scenes lie

C categories, N = h*w locations, n validation scenes, T epochs.
"""
import ast
import base64
import html
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from latex2mathml.converter import convert
from matplotlib.figure import Figure
from PIL import Image

import clip
import data
from config import Config, preset
from support.checkpoint import save_atomically, write_atomically
from support.cli import best_device, make_parser, run_main, words
from tools.build import training_loader
from tools.inspection import inspect, origins, training_parts
from tools.plots import heat
from tools.predictor import Predictor, evaluation_loader
from tools.suggest import jpeg
from train import train

ROOT = Path(__file__).resolve().parents[1]
METHOD = ("trm.py", "memory.py", "losses.py", "kernels/match.py", "kernels/region_pool.py",
          "kernels/topk_prototypes.py", "train.py")
MARK = re.compile(r"Eq\. ((?:\d+(?:-|, | and )?)+)")
LONGEST = 34  # lines of a function that is shown whole
FILMED = 200  # validation scenes whose regions are kept after every epoch
CROPS = 12  # prototypes shown of each category


def train_filmed(run, root=None):
    """The demo's run, which also keeps film.npz: after each epoch the first FILMED validation
    scenes' masks (T, n, C, N) uint8, similarities (T, n, 2, C) and thresholds (T, 2, 2, C)."""
    cfg = Config(**preset("scenes"), ratio=0.1, train_images=1000, eval_every=4, root=root,
                 out=str(run))
    encoder, splits = clip.load(cfg.clip), data.load(cfg)
    loader = evaluation_loader(cfg, splits[1].subset(range(FILMED)), encoder, best_device())
    frames = []

    @torch.no_grad()
    def on_epoch(state, line):
        state.model.eval()
        device = state.memory.bank.device
        g_pos, g_neg = state.model.prompts(encoder)
        masks, s = [], []
        for _, f, x in loader.batches(0, shuffle=False):
            out = state.model(f.to(device), x.to(device), g_pos, g_neg)
            masks.append((255 * out.energy.sigmoid()).byte().cpu())
            s.append(state.memory.similarities(out.regions).transpose(0, 1).cpu())
        frames.append((torch.cat(masks), torch.cat(s), state.memory.theta.cpu().clone()))

    train(cfg, splits=splits, encoder=encoder, on_epoch=on_epoch)
    film = {name: torch.stack(part).numpy()
            for name, part in zip(("masks", "s", "theta"), zip(*frames))}
    save_atomically(lambda buffer: np.savez_compressed(buffer, **film), Path(run) / "film.npz")


# ---- code, by its marks


def cited(line):
    """The numbers of the equations that a line cites: "Eq. 1-3, 5" -> {1, 2, 3, 5}."""
    numbers = set()
    for listed in MARK.findall(line):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", listed):
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def passages(file, equation):
    """[(first line, last line, marked lines)] of the functions of a file that cite an equation: a
    short function whole, of a long one only the marked statements."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.split("\n")
    found = []
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.FunctionDef, ast.ClassDef) if file == "tests/oracles.py" else ast.FunctionDef
        if not isinstance(node, kinds) or "jit" in ast.unparse(node.decorator_list[:1]):
            continue
        marked = [i for i in range(node.lineno, node.end_lineno + 1)
                  if equation in cited(lines[i - 1])]
        longest = {"train.py": 0, "tests/oracles.py": 100}.get(file, LONGEST)
        if marked and node.end_lineno - node.lineno < longest:
            found.append((node.lineno, node.end_lineno, marked))
            continue
        for part in ast.walk(node):
            if isinstance(part, (ast.Assign, ast.Expr, ast.Return)):
                first = part.lineno - lines[part.lineno - 2].strip().startswith("#")
                if any(first <= i <= part.end_lineno for i in marked):
                    found.append((first, part.end_lineno, marked))
    return found


def listing(file, first, last, marked):
    """Lines of a file as HTML, under a link to where they stand."""
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")[first - 1:last]
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    rows = []
    for number, line in enumerate(lines, first):
        code = re.sub(r"(^|  )(# .*)$", r"\1<i>\2</i>", html.escape(line[indent:], quote=False))
        rows.append(f"<b>{code}</b>" if number in marked else code)
    return (f'<p class="where"><a href="../{file}#L{first}">{file}:{first}</a></p>'
            f'<pre data-file="{file}" data-first="{first}">' + "\n".join(rows) + "</pre>")


def code_of(equation):
    """The code of an equation, and its transcription from the tests to unfold."""
    shown = [listing(file, *place) for file in METHOD for place in passages(file, equation)]
    slow = [listing("tests/oracles.py", *place)
            for place in passages("tests/oracles.py", equation)]
    return ("".join(shown) + "<details><summary>The same, slowly: one loop for each sum sign"
            f"</summary>{''.join(slow)}</details>")


def typeset(text):
    """$$...$$ and $...$ -> MathML; {code 4} -> the code of Eq. 4."""
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1], display="block"), text, flags=re.S)
    text = re.sub(r"\$(.+?)\$", lambda m: convert(m[1]), text)
    return re.sub(r"\{code (\d+)\}", lambda m: code_of(int(m[1])), text)


# ---- tensors


def pack(array):
    """An array as JSON: base64 of int16 steps, NaN as the lowest; of uint8 where it is uint8."""
    array = np.asarray(array)
    if array.dtype == np.uint8:
        return {"step": 0, "data": base64.b64encode(array.tobytes()).decode()}
    step = max(float(np.nanmax(np.abs(array))), 1e-9) / 32000
    steps = np.where(np.isnan(array), -32768, np.round(array / step)).astype("<i2")
    return {"step": step, "data": base64.b64encode(steps.tobytes()).decode()}


@torch.no_grad()
def measure(predictor, memory, split):
    """The validation scenes in one pass: {"p", "peak": (n, C), "s": (2, n, C)}, numpy."""
    p, peak, s = [], [], []
    for _, f, x in predictor.loader(split).batches(0, shuffle=False):
        out = predictor.model(f, x, predictor.g_pos, predictor.g_neg)
        p.append(out.logits_r.sigmoid())
        peak.append(out.energy.sigmoid().amax(-1))
        s.append(memory.similarities(out.regions))
    parts = dict(p=torch.cat(p), peak=torch.cat(peak), s=torch.cat(s, 1))
    return {name: part.cpu().numpy() for name, part in parts.items()}


def choose(seen, verdicts, pseudo, truth, area):
    """Six of the first FILMED scenes by rule: [(title, rule, image, category)], no image twice.
    Verdicts (2, n, C), else (n, C); area: share of the image that the category's boxes cover."""
    p, present, absent = seen["p"], truth == 1, truth == -1
    differ = verdicts[0] != verdicts[1]
    rules = (
        ("easy", "present, large, and both prototypes say so",
         present & (pseudo == 1) & (area > 0.05), p - present.sum(1, keepdims=True)),
        ("small object", "present and recognised, with the smallest box",
         present & (p > 0.5), -area),
        ("look-alike", "absent, but the most probable of all absent categories", absent, p),
        ("absent", "absent, and both prototypes say so; the flattest region",
         absent & (pseudo == -1), -seen["peak"]),
        ("modalities disagree", "present; visual and text prototypes come to different verdicts",
         present & differ, p),
        ("wrong pseudo-label", "both prototypes agree, and both are wrong",
         (pseudo != 0) & (pseudo != truth), np.where(present, p, 1 - p)))
    chosen, used = [], []
    for title, rule, eligible, score in rules:
        score = np.where(eligible, score, -np.inf)[:FILMED]
        score[used] = -np.inf
        image, category = np.unravel_index(score.argmax(), score.shape)
        used.append(image)
        chosen.append((title, rule, int(image), int(category)))
    return chosen


def crops_of(memory, predictor, split):
    """For each category JPEGs of its newest prototypes: the location and what surrounds it."""
    cfg, (height, width) = predictor.cfg, predictor.grid
    loader = training_loader(cfg, split, predictor.clip, predictor.device, 0, 1)
    where = origins(memory, loader).tolist()
    mean, std = (torch.tensor(part)[:, None, None] for part in (predictor.clip.mean,
                                                                predictor.clip.std))
    crops = []
    for places, cursor in zip(where, memory.cursor.tolist()):
        newest = [places[r % len(places)] for r in range(cursor - 1, -1, -1)]
        crops.append([])
        for image, location, view in newest[:CROPS]:
            pixels = (255 * (loader.images[view, image][0] * std + mean)).clamp(0, 255).byte()
            y = (location // width + 0.5) * cfg.size / height
            x = (location % width + 0.5) * cfg.size / width
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            crops[-1].append(jpeg(picture.crop((x - 40, y - 40, x + 40, y + 40)), 56))
    return crops


def contrast(predictor, memory, heads):
    """(C, C) mean cosine of a text, through its MLP, to each category's prototypes: Eq. 13."""
    filled = memory.filled()
    text = F.normalize(heads["text"](predictor.g_pos), dim=-1)
    pixel = F.normalize(heads["pixel"](memory.bank), dim=-1) * filled[..., None]
    return text @ (pixel.sum(1) / filled.sum(1).clamp(min=1)[:, None]).T


# ---- the page


@torch.no_grad()
def contents(run, root):
    """All that the page draws, as JSON takes it."""
    predictor = Predictor(run, "last", places={"root": root} if root else None)
    splits = predictor.splits()
    val, film = splits["val"], np.load(Path(run) / "film.npz")
    memory, heads = training_parts(predictor)
    seen = measure(predictor, memory, val)
    s = torch.from_numpy(seen["s"])
    verdicts = memory.verdicts(s).numpy()
    pseudo = memory.pseudo_labels(s, torch.zeros(s.shape[1:], dtype=torch.int8)).numpy()
    area = np.zeros(val.truth.shape)
    for row, boxes in zip(area, val.boxes):
        for c, x0, y0, x1, y1 in boxes:
            row[int(c)] += (x1 - x0) * (y1 - y0)
    scenes = []
    for title, rule, i, c in choose(seen, verdicts, pseudo, val.truth, area):
        one = inspect(predictor, val.paths[i], val.truth[i])
        arrays = {name: pack(one[name].cpu().numpy()) for name in
                  ("text_pixel", "energy", "topk", "logits_r", "logits_q", "s", "regions")}
        losses = {name: round(float(value), 4) for name, value in one["losses"].items()}
        scenes.append(arrays | dict(title=title, rule=rule, category=c, photo=jpeg(val.paths[i]),
                                    image=i, truth=val.truth[i].tolist(), losses=losses,
                                    masks=pack(film["masks"][:, i]), film=pack(film["s"][:, i])))
    history = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    told = ("stage", "pseudo_pos", "pseudo_pos_precision", "pseudo_neg", "pseudo_neg_precision")
    epochs = [{name: line.get(name) for name in told} for line in history]
    cfg = predictor.cfg
    return dict(names=predictor.names, grid=predictor.grid, scenes=scenes, epochs=epochs,
                theta=pack(memory.theta.cpu()), thetas=pack(film["theta"]), s=pack(seen["s"]),
                truth=pack((val.truth + 1).astype(np.uint8)), n=len(val.paths),
                crops=crops_of(memory, predictor, splits["train"]),
                contrast=pack(contrast(predictor, memory, heads).cpu()),
                asl=[cfg.gamma_pos, cfg.gamma_neg, cfg.shift],
                weights=[cfg.alpha, cfg.beta, cfg.gamma])


def idea(content, file):
    """One scene through Eq. 2 to 12, as a picture."""
    scene, (h, w) = content["scenes"][0], content["grid"]
    c, C = scene["category"], len(content["names"])
    photo = Image.open(io.BytesIO(base64.b64decode(scene["photo"])))

    def unpack(part, *shape):
        steps = np.frombuffer(base64.b64decode(part["data"]), "<i2")
        return np.where(steps == -32768, np.nan, steps * part["step"]).reshape(shape)

    energy = unpack(scene["energy"], C, h * w)[c]
    similar = unpack(scene["text_pixel"], C, h * w)[c]
    s, theta = unpack(scene["s"], 2, C)[:, c], unpack(content["theta"], 2, 2, C)[..., c]
    figure = Figure(figsize=(12, 2.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, 5, width_ratios=(1, 1, 1, 1, 1.2))
    mask = 1 / (1 + np.exp(-energy))
    name = content["names"][c]
    for axis, picture, title in (
            (axes[0], photo, "a scene"),
            (axes[1], heat(photo, similar - similar.min(), (h, w)), f"cosine to the text: {name}"),
            (axes[2], heat(photo, mask, (h, w)), "its soft region, Eq. 2-4"),
            (axes[3], heat(photo, mask, (h, w)), "top-K to the bank, Eq. 7")):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    for k in unpack(scene["topk"], C, -1)[c].astype(int):
        axes[3].plot((k % w + 0.5) * photo.width / w, (k // w + 0.5) * photo.height / h, "x",
                     color="black", markersize=9, markeredgewidth=2)
    for row, modality in enumerate(("visual", "text")):
        axes[4].plot(s[row], row, "o", color="tab:blue", markersize=9)
        axes[4].plot(theta[row, 0], row, "|", color="tab:green", markersize=26, markeredgewidth=3)
        axes[4].plot(theta[row, 1], row, "|", color="tab:red", markersize=26, markeredgewidth=3)
    axes[4].set(yticks=(0, 1), yticklabels=("visual\nprototypes", "text\nprototype"),
                ylim=(-0.7, 1.7), xlabel="similarity, and the two thresholds")
    axes[4].set_title("both above: label guessed, Eq. 8-12", fontsize=9)
    save_atomically(lambda buffer: figure.savefig(buffer, format="png"), file)


def main(argv=None):
    parser = make_parser("paper.walkthrough", __doc__)
    parser.add_argument("run", nargs="?", default="runs/walkthrough", help="run folder")
    parser.add_argument("--root", help="folder of the drawn scenes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "walkthrough.html")
    parser.add_argument("--text", action="store_true",
                        help="only text and code anew, with the tensors of the page that is there")

    def work():
        args = parser.parse_args(words(argv))
        file, picture = args.out, args.out.with_name("idea.png")
        start = time.perf_counter()
        if args.text:
            page = file.read_text(encoding="utf-8")
            content = page.partition('id="data">')[2].partition("</script>")[0]
        else:
            if not (Path(args.run) / "film.npz").is_file():
                train_filmed(args.run, args.root)
            start, content = time.perf_counter(), contents(args.run, args.root)
            idea(content, picture)
            content = json.dumps(content)
        template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        text, mark, script = template.partition("<script")
        text = typeset(text).replace("{{IDEA}}", base64.b64encode(picture.read_bytes()).decode())
        write_atomically(file, text + mark + script.replace("{{DATA}}", content))
        print(f"{file}: {file.stat().st_size / 2**20:.2f} MB, {time.perf_counter() - start:.0f} s")
    return run_main(work)


if __name__ == "__main__":
    sys.exit(main())
