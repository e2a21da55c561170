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
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from latex2mathml.converter import convert
from matplotlib.figure import Figure
from PIL import Image

import clip
import data
import losses
from config import Config, preset
from datasets import augment
from paper.run_table import history
from support.checkpoint import save_atomically, write_atomically
from support.cli import best_device, make_parser, run_command
from tools.build import training_loader
from tools.equation_map import ROOT, cited
from tools.inspection import memory_of, origins
from tools.plots import heat
from tools.predictor import Predictor, evaluation_loader
from tools.suggest import jpeg
from train import train

RUN = Path("runs/walkthrough")
PAGE = ROOT / "docs" / "walkthrough.html"
METHOD = ("trm.py", "memory.py", "losses.py", "kernels/match.py", "kernels/region_pool.py",
          "kernels/topk_prototypes.py", "train.py")
EQUATIONS = ROOT / "docs" / "equations.md"
# What of Markdown it uses, and blocks that are no paragraphs
MARKUP = ((r"\$\$(.+?)\$\$", lambda found: convert(found[1], display="block")),
          (r"\$(.+?)\$", lambda found: convert(found[1])),
          (r"\*\*(.+?)\*\*", r"<b>\1</b>"), ("`(.+?)`", r"<code>\1</code>"),
          (r"^> (.+)$", r'<div class="printed">\1</div>'))
OWN_BLOCK = re.compile('<(div|pre|math [^>]*"block")')
LONGEST = 35  # lines of a function that is shown whole
CODE = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr, ast.Return)
SEEN = ("text_pixel", "energy", "mask", "topk", "logits_r", "logits_q", "s", "truth", "losses")
CROPS = 12  # prototypes shown of each category


def train_filmed():
    """A run on the demo's scenes, which also keeps frames.npz of the validation scenes after each
    epoch: region probabilities p (T, n, C), masks (T, n, C, N) in percent, similarities s
    (T, n, 2, C) and thresholds theta (T, 2, 2, C)."""
    cfg = Config(**preset("scenes"), ratio=0.1, train_images=1000, eval_every=4, out=str(RUN))
    encoder, splits = clip.load(cfg.clip), data.load(cfg)
    loader = evaluation_loader(cfg, splits[1], encoder, best_device())
    film = []

    @torch.no_grad()
    def on_epoch(state, line):
        model, memory = state.model.eval(), state.memory
        g_pos, g_neg = model.prompts(encoder)
        found = []
        for _, f, x in loader.batches(0, shuffle=False):
            out = model(f, x, g_pos, g_neg)
            s = memory.similarities(out.regions).transpose(0, 1)
            found.append((out.logits_r.sigmoid(), (100 * out.energy.sigmoid()).byte(), s))
        film.append([*map(torch.cat, zip(*found)), memory.theta.clone()])

    train(cfg, splits=splits, encoder=encoder, on_epoch=on_epoch)
    p, masks, s, theta = (torch.stack(frames).cpu().numpy() for frames in zip(*film))
    save_atomically(lambda buffer: np.savez_compressed(buffer, p=p, masks=masks, s=s, theta=theta),
                    RUN / "frames.npz")


# ---- code, by its marks

def listing(file, equation):
    """What cites an equation in a file, as HTML below links to where it stands: functions, and of
    those that are longer than LONGEST the statements."""
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
    shown, covered = {}, set()
    for node in ast.walk(ast.parse("\n".join(lines))):  # outer ones first
        if not isinstance(node, CODE) or isinstance(getattr(node, "value", None), ast.Constant):
            continue  # a docstring is no statement
        first = node.lineno - lines[node.lineno - 2].strip().startswith("#")
        span = range(first, node.end_lineno + 1)
        code = textwrap.dedent("\n".join(lines[n - 1] for n in span))
        if first in covered or len(span) > LONGEST or equation not in cited(code):
            continue
        covered.update(span)
        code = re.sub("(^|  )(# .*)$", r"\1<i>\2</i>", html.escape(code, quote=False), flags=re.M)
        marked = [f"<b>{row}</b>" if equation in cited(row) else row for row in code.split("\n")]
        shown[first] = (f'<p class="where"><a href="../{file}#L{first}">{file}:{first}</a></p>'
                        f'<pre data-file="{file}" data-first="{first}">' + "\n".join(marked) +
                        "</pre>")
    return "".join(shown[first] for first in sorted(shown))


def article():
    """docs/equations.md as HTML: below `### Eq. n` the text stands left, right its code and, to
    unfold, its slow oracle."""
    parts = []
    for part in re.split("^(?=##)", EQUATIONS.read_text(encoding="utf-8"), flags=re.M)[1:]:
        for mark, markup in MARKUP:
            part = re.sub(mark, markup, part, flags=re.M)
        heading, *blocks = part.strip().split("\n\n")
        text = "".join(block if OWN_BLOCK.match(block) else f"<p>{block}</p>" for block in blocks)
        if found := re.match(r"### Eq\. (\d+)", heading):
            code, oracle = ("".join(listing(file, int(found[1])) for file in files)
                            for files in (METHOD, ["tests/oracles.py"]))
            text = (f'<section id="eq{found[1]}"><h3>{heading[4:]}</h3><div>{text}</div><div>{code}'
                    "<details><summary>The same, slowly: one loop for each sum sign</summary>"
                    f"{oracle}</details></div></section>")
        else:
            text = f"<h2>{heading[3:]}</h2>{text}"
        parts.append(text)
    return "".join(parts)


# ---- tensors

def choose(p, peak, verdicts, truth, area):
    """Six scenes by rule: [(rule, image, category)], no image twice. Verdicts (2, n, C), else
    (n, C); peak: of the mask, area: share of the image that the category's boxes cover."""
    present, absent, differ = truth == 1, truth == -1, verdicts[0] != verdicts[1]
    pseudo = np.where(differ, 0, verdicts[0])
    rules = (  # of the eligible the one with the highest score
        ("easy: present, large, little else is there, and both prototypes say so",
         present & (pseudo == 1) & (area > 0.05), p - present.sum(1, keepdims=True)),
        ("small: present and recognised, with the smallest box", present & (p > 0.5), -area),
        ("look-alike: absent, but the most probable of all absent categories", absent, p),
        ("absent: both prototypes say so; the flattest region", absent & (pseudo == -1), -peak),
        ("modalities disagree: present; visual and text prototypes come to different verdicts",
         present & differ, p),
        ("wrong pseudo-label: both prototypes agree, and both are wrong",
         (pseudo != 0) & (pseudo != truth), np.where(present, p, 1 - p)))
    chosen = []
    for rule, eligible, score in rules:
        score = np.where(eligible, score, -np.inf)
        score[[image for _, image, _ in chosen]] = -np.inf
        image, category = np.unravel_index(score.argmax(), score.shape)
        chosen.append((rule, int(image), int(category)))
    return chosen


def crops_of(memory, predictor, split):
    """For each category JPEGs of its newest prototypes: the location and what surrounds it."""
    cfg, encoder, (h, w) = predictor.cfg, predictor.clip, predictor.grid
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
    """All that the page draws; draws docs/idea.png beside."""
    predictor = Predictor(RUN, "last")
    cfg, splits, film = predictor.cfg, predictor.splits(), dict(np.load(RUN / "frames.npz"))
    val, memory = splits["val"], memory_of(predictor)
    s = torch.from_numpy(film["s"][-1]).transpose(0, 1)  # (2, n, C)
    verdicts = memory.verdicts(s.to(predictor.device)).cpu().numpy()
    area = np.array([np.bincount(boxes[:, 0].astype(int), np.prod(boxes[:, 3:] - boxes[:, 1:3], 1),
                                 len(val.names)) for boxes in val.boxes])  # (n, C)
    peak = film["masks"][-1].max(-1).astype(float)  # (n, C)
    scenes = []
    for rule, i, c in choose(film["p"][-1], peak, verdicts, val.truth, area):
        seen = predictor.inspect(val.paths[i], val.truth[i])
        scenes.append({name: seen[name] for name in SEEN} | dict(
            rule=rule, category=c, photo=jpeg(val.paths[i]), film=film["s"][:, i],
            masks=film["masks"][:, i].tolist(),  # (T, C, N) in percent
            loss=each_loss(cfg, seen["logits_r"], seen["truth"]),
            p_r=seen["logits_r"].softmax(0), p_q=seen["logits_q"].softmax(0),
            cosines=F.normalize(seen["regions"], dim=-1) @ predictor.g_pos.T))  # (C, C)
        if rule.startswith("easy"):
            idea(seen, augment.read(val.paths[i]), c, predictor)
    heads = predictor.model.heads  # of Eq. 13
    text = F.normalize(heads["text"](predictor.g_pos), dim=-1)
    pixel = F.normalize(heads["pixel"](memory.bank), dim=-1)  # the bank (C, L, D) is full by now
    return dict(names=predictor.names, scenes=scenes, epochs=history(RUN), theta=memory.theta,
                thetas=film["theta"], s=s, truth=val.truth.tolist(),
                crops=crops_of(memory, predictor, splits["train"]),
                contrast=text @ pixel.mean(1).T,  # (C, C)
                loss=[each_loss(cfg, torch.linspace(0.01, 0.99, 99).logit(), torch.full((99,), y))
                      for y in (1, -1)],
                weights=[("L_q", 1), ("L_r", cfg.alpha), ("L_KD", cfg.beta), ("L_NCE", cfg.gamma),
                         ("L", 1)])


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
    save_atomically(lambda buffer: figure.savefig(buffer, format="png"), PAGE.with_name("idea.png"))


def write(text_only):
    """Writes the page from its template, walkthrough.html beside this file."""
    if text_only:
        page = PAGE.read_text(encoding="utf-8")
        content = page.partition("const data = ")[2].partition(";</script>")[0]
    else:
        if not (RUN / "frames.npz").is_file():
            train_filmed()
        content = json.dumps(contents(), separators=(",", ":"), default=numbers)
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    picture = base64.b64encode(PAGE.with_name("idea.png").read_bytes()).decode()
    for name, part in (("IDEA", picture), ("TEXT", article()), ("DATA", content)):
        template = template.replace(f"{{{{{name}}}}}", part)
    write_atomically(PAGE, template)
    print(f"{PAGE}: {PAGE.stat().st_size / 2**20:.2f} MB")


def main(argv=None):
    parser = make_parser("paper.walkthrough", __doc__)
    parser.add_argument("--text", action="store_true", dest="text_only",
                        help="no tensors, only text and code anew")
    return run_command(write, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
