"""docs/walkthrough.html: the paper's Section 3 beside the code beside live tensors.

    python -m paper.walkthrough           trains runs/walkthrough first, if it is missing
    python -m paper.walkthrough --text    text and code anew, the tensors as they are in the page

C categories, N = h*w locations, n validation scenes, T epochs.
"""
import ast
import base64
import html
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from latex2mathml.converter import convert
from markdown import Markdown
from matplotlib.figure import Figure
from PIL import Image

import losses
from config import Config, preset
from paper.run_table import history
from support.checkpoint import save_atomically, write_atomically
from support.cli import make_parser, run_command
from tools.build import training_loader
from tools.equation_map import ROOT, cited
from tools.inspection import origins
from tools.plots import heat
from tools.predictor import Predictor
from tools.suggest import jpeg
from train import train

RUN = Path("runs/walkthrough")
PAGE = ROOT / "docs" / "walkthrough.html"
METHOD = ("trm.py", "memory.py", "losses.py", "kernels/match.py", "kernels/region_pool.py",
          "kernels/topk_prototypes.py", "train.py")
EQUATIONS, IDEA = PAGE.with_name("equations.md"), PAGE.with_name("idea.png")
CODE = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr, ast.Return)
SEEN = ("text_pixel", "energy", "mask", "topk", "logits_r", "logits_q", "s", "truth", "losses")
CROPS = 12  # prototypes shown of each category


def train_filmed():
    """A run on the demo's scenes; film/1, film/2, ... keep what last.pt was after each epoch."""
    def keep(state, line):
        frame = RUN / "film" / str(state.epoch)
        frame.mkdir(parents=True)
        shutil.copy(RUN / "last.pt", frame)

    train(Config(**preset("scenes"), ratio=0.1, train_images=1000, eval_every=4, out=str(RUN)),
          on_epoch=keep)


# ---- code, by its marks

def listing(file, equation, longest=35):
    """What cites an equation in a file, as HTML below links to where it stands: functions, and of
    those of more than `longest` lines the statements."""
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
    shown, covered = {}, set()
    for node in ast.walk(ast.parse("\n".join(lines))):  # outer ones first
        if not isinstance(node, CODE) or isinstance(getattr(node, "value", None), ast.Constant):
            continue  # a docstring is no statement
        first = node.lineno - lines[node.lineno - 2].strip().startswith("#")
        span = range(first, node.end_lineno + 1)
        code = textwrap.dedent("\n".join(lines[n - 1] for n in span))
        if first in covered or len(span) > longest or equation not in cited(code):
            continue
        covered.update(span)
        code = re.sub("(^|  )(# .*)$", r"\1<i>\2</i>", html.escape(code, quote=False), flags=re.M)
        marked = [f"<b>{row}</b>" if equation in cited(row) else row for row in code.split("\n")]
        shown[first] = (f'<p class="where"><a href="../{file}#L{first}">{file}:{first}</a></p>'
                        f'<pre data-file="{file}" data-first="{first}">' + "\n".join(marked) +
                        "</pre>")
    return "".join(shown[first] for first in sorted(shown))


def article():
    """docs/equations.md as HTML: below `### Eq. n` left the text, right its code and its oracle."""
    text = EQUATIONS.read_text(encoding="utf-8")
    for formula, display in ((r"\$\$(.+?)\$\$", "block"), (r"\$(.+?)\$", "inline")):
        text = re.sub(formula, lambda found: convert(found[1], display=display), text)
    renderer = Markdown()
    renderer.block_level_elements.remove("math")  # most formulas stand within a line
    parts = []
    for part in re.split("^(?=##)", text, flags=re.M):
        heading, body = (renderer.convert(piece) for piece in part.split("\n", 1))
        if found := re.match(r"<h3>Eq\. (\d+)", heading):
            code, oracle = ("".join(listing(file, int(found[1])) for file in files)
                            for files in (METHOD, ["tests/oracles.py"]))
            heading = f'<section id="eq{found[1]}">{heading}'
            body = (f"<div>{body}</div><div>{code}<details><summary>The same, slowly: one loop for "
                    f"each sum sign</summary>{oracle}</details></div></section>")
        parts += [heading, body]
    picture = base64.b64encode(IDEA.read_bytes()).decode()
    return "".join(parts).replace(IDEA.name, f"data:image/png;base64,{picture}")


# ---- tensors

def choose(p, peak, verdicts, truth, area):
    """Six scenes by rule: [(rule, image, category)], no image twice. Verdicts (n, 2, C), else
    (n, C); peak: of the mask, area: share of the image that the category's boxes cover."""
    present, absent, differ = truth == 1, truth == -1, verdicts[:, 0] != verdicts[:, 1]
    pseudo, company = np.where(differ, 0, verdicts[:, 0]), present.sum(1, keepdims=True)
    easy, wrong = present & (pseudo == 1) & (area > 0.05), (pseudo != 0) & (pseudo != truth)
    rules = (  # of the eligible the one with the highest score
        ("easy: large, little else is there, and both prototypes say present", easy, p - company),
        ("small: present and recognised, with the smallest box", present & (p > 0.5), -area),
        ("look-alike: absent, but the most probable of all absent categories", absent, p),
        ("absent: both prototypes say so; the flattest region", absent & (pseudo == -1), -peak),
        ("modalities disagree: it is present, but not both say so", present & differ, p),
        ("wrong pseudo-label: both agree, and are wrong", wrong, np.where(present, p, 1 - p)))
    chosen = []
    for rule, eligible, score in rules:
        score = np.where(eligible, score, -np.inf)
        score[[image for _, image, _ in chosen]] = -np.inf
        chosen.append((rule, *map(int, np.unravel_index(score.argmax(), score.shape))))
    return chosen


def crops_of(predictor, split):
    """For each category JPEGs of its newest prototypes: the location and what surrounds it."""
    cfg, encoder = predictor.cfg, predictor.encoder
    memory, (h, w) = predictor.memory, predictor.grid
    loader = training_loader(cfg, split, encoder, predictor.device, 0, 1)
    mean, std = (torch.tensor(part)[:, None, None] for part in (encoder.mean, encoder.std))
    crops = []
    for places, cursor in zip(origins(memory, loader).tolist(), memory.cursor.tolist()):
        crops.append([])
        for newest in range(1, CROPS + 1):
            image, location, view = places[(cursor - newest) % len(places)]
            pixels = (255 * (loader.images[view, image][0] * std + mean)).clamp(0, 255).byte()
            x, y = (location % w + 0.5) * cfg.size / w, (location // w + 0.5) * cfg.size / h
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            crops[-1].append(jpeg(picture.crop((x - 40, y - 40, x + 40, y + 40)), 56))
    return crops


# ---- the page

def numbers(array):
    """What JSON does not know, a tensor or an array, as lists of numbers."""
    return torch.as_tensor(array).cpu().double().numpy().round(4).tolist()


def each_loss(cfg, logits, labels):
    """Eq. 14 of each logit alone: (n,) each -> n numbers."""
    return [losses.asymmetric(*pair, **cfg.asl) for pair in zip(logits.view(-1, 1, 1), labels)]


@torch.no_grad()
def contents():
    """All that the page draws, as `inspect` sees it; draws docs/idea.png beside."""
    predictor = Predictor(RUN, "last")
    cfg, (train_split, val, _) = predictor.cfg, predictor.splits().values()
    frames = [Predictor(RUN / "film" / str(epoch), "last", encoder=predictor.encoder)
              for epoch in range(1, cfg.epochs + 1)]
    every = [predictor.inspect(*pair) for pair in zip(val.paths, val.truth)]
    logits, mask, s, verdicts = (torch.stack([seen[name] for seen in every]).cpu()
                                 for name in ("logits_r", "mask", "s", "verdicts"))  # (n, ...)
    p, peak = logits.sigmoid().numpy(), mask.amax(-1).numpy()  # (n, C) each
    area = np.array([np.bincount(boxes[:, 0].astype(int), np.prod(boxes[:, 3:] - boxes[:, 1:3], 1),
                                 len(val.names)) for boxes in val.boxes])  # (n, C)
    scenes = []
    for rule, i, c in choose(p, peak, verdicts.numpy(), val.truth, area):
        seen, film = every[i], [frame.inspect(val.paths[i]) for frame in frames]
        scenes.append({name: seen[name] for name in SEEN} | dict(
            rule=rule, category=c, photo=jpeg(val.paths[i]), film=[shot["s"] for shot in film],
            masks=[(100 * shot["mask"]).byte().tolist() for shot in film],  # (T, C, N) in percent
            loss=each_loss(cfg, seen["logits_r"], seen["truth"]),
            p_r=seen["logits_r"].softmax(0), p_q=seen["logits_q"].softmax(0),
            cosines=F.normalize(seen["regions"], dim=-1) @ predictor.g_pos.T))  # (C, C)
        if rule.startswith("easy"):
            idea(seen, Image.open(val.paths[i]), c, predictor)
    heads = predictor.model.heads  # of Eq. 13
    text = F.normalize(heads["text"](predictor.g_pos), dim=-1)
    pixel = F.normalize(heads["pixel"](predictor.memory.bank), dim=-1)  # (C, L, D), full by now
    return dict(names=predictor.names, scenes=scenes, epochs=history(RUN), s=s, truth=val.truth,
                theta=predictor.memory.theta, thetas=[shot["theta"] for shot in film],
                crops=crops_of(predictor, train_split),
                contrast=text @ pixel.mean(1).T,  # (C, C)
                loss=[each_loss(cfg, torch.linspace(0.01, 0.99, 99).logit(), torch.full((99,), y))
                      for y in (1, -1)],
                weights=dict(L_q=1, L_r=cfg.alpha, L_KD=cfg.beta, L_NCE=cfg.gamma, L=1))


def idea(seen, photo, c, predictor):
    """docs/idea.png: one scene and one category through Eq. 2 to 12."""
    h, w = predictor.grid
    mask, cosine, top = (seen[name][c].numpy() for name in ("mask", "text_pixel", "topk"))
    similar, region = heat(photo, cosine - cosine.min(), (h, w)), heat(photo, mask, (h, w))
    titles = ("a scene", f"cosine to the text: {predictor.names[c]}", "its soft region, Eq. 2-4",
              "top-K to the bank, Eq. 7")
    figure = Figure(figsize=(12, 2.6), dpi=110, layout="constrained")
    *tiles, scale = figure.subplots(1, 5, width_ratios=(1, 1, 1, 1, 1.2))
    for axis, title, picture in zip(tiles, titles, (photo, similar, region, region)):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    tiles[3].plot((top % w + 0.5) * photo.width / w, (top // w + 0.5) * photo.height / h, "x",
                  color="black", markersize=9, markeredgewidth=2)
    scale.plot(seen["s"][:, c], (0, 1), "o", color="tab:blue", markersize=9)
    for theta, colour in zip(seen["theta"][..., c].T, ("tab:green", "tab:red")):
        scale.plot(theta, (0, 1), "|", color=colour, markersize=26, markeredgewidth=3)
    scale.set(yticks=(0, 1), yticklabels=("visual\nprototypes", "text\nprototype"),
              ylim=(-0.7, 1.7), xlabel="similarity, and the two thresholds")
    scale.set_title("both above: label guessed, Eq. 8-12", fontsize=9)
    save_atomically(lambda buffer: figure.savefig(buffer, format="png"), IDEA)


def write(text):
    """Writes the page from its template, walkthrough.html beside this file."""
    if text:
        content = PAGE.read_text(encoding="utf-8").split("const data = ")[1].split(";</script>")[0]
    else:
        if not (RUN / "film" / str(Config.epochs)).is_dir():
            shutil.rmtree(RUN, ignore_errors=True)  # of a build that was stopped
            train_filmed()
        content = json.dumps(contents(), separators=(",", ":"), default=numbers)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_atomically(PAGE, template.replace("{{TEXT}}", article()).replace("{{DATA}}", content))
    print(f"{PAGE}: {PAGE.stat().st_size / 2**20:.2f} MB")


if __name__ == "__main__":
    parser = make_parser("paper.walkthrough", __doc__)
    parser.add_argument("--text", action="store_true", help="no tensors, only text and code anew")
    sys.exit(run_command(write, parser, None))
