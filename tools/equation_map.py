"""Writes the README's map from equations to lines: `make map`.

A line of code that computes an equation cites it as `Eq. n`. The rows below say in which file the
line of an equation is looked for and what it says; the generator finds its number.
"""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- map: written by `make map` -->", "<!-- end of map -->"
ROWS = (  # equation, file, what the citing line holds, what it is
    (1, "trm.py", "def match", "match: tau-normalised cosine, dual prompts"),
    (2, "kernels/region_pool.py", "energy.sigmoid()", "the soft region: sigmoid of the energies"),
    (3, "trm.py", "energy = (x @", "cross-attention scores: the energies"),
    (3, "trm.py", "return energy, self.norm3", "the decoder's output: query representation"),
    (4, "kernels/region_pool.py", "torch.bmm(mask, f)", "region pooling"),
    (5, "trm.py", "match(regions", "text-region matching"),
    (5, "trm.py", "match(queries", "text-query matching"),
    (6, "losses.py", "def distillation", "distillation"),
    (7, "kernels/topk_prototypes.py", "bank[c[:, None]", "prototypes into the FIFO queues"),
    (8, "memory.py", "def similarities", "similarity to all prototypes of a category"),
    (9, "memory.py", "s_bar =", "mean similarity of known positives and negatives"),
    (10, "memory.py", "present.to(torch.int8)", "verdict of one modality"),
    (11, "memory.py", "moved =", "moving thresholds"),
    (12, "memory.py", "agree =", "both modalities must agree"),
    (13, "losses.py", "def contrastive", "multimodal contrastive loss"),
    (14, "losses.py", "def asymmetric", "asymmetric loss"),
    (15, "losses.py", "L_q + alpha", "the one line where the terms are summed"),
    (15, "train.py", "losses.total", "where it is called, at the end of Section 3 read aloud"))


def cited(text):
    """The numbers of the equations that a text cites: "Eq. 1-3, 5" -> {1, 2, 3, 5}."""
    listed = " ".join(re.findall(r"Eq\. ((?:\d+(?:-|, | and )?)+)", text))
    spans = re.findall(r"(\d+)(?:-(\d+))?", listed)
    return {n for first, last in spans for n in range(int(first), int(last or first) + 1)}


def line_of(equation, file, holds):
    """The line that holds the words and cites the equation, on it or on the two lines around it."""
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines):
        if holds in line and equation in cited(" ".join(lines[max(0, i - 1):i + 2])):
            return i + 1
    raise ValueError(f"{file} has no line with {holds!r} that cites Eq. {equation}")


def written(text):
    """README's text with the map as the code has it now."""
    rows = [BEGIN, "| equation | where | what |", "|---|---|---|"]
    for equation, file, holds, what in ROWS:
        number = line_of(equation, file, holds)
        rows.append(f"| Eq. {equation} | [`{file}:{number}`]({file}#L{number}) | {what} |")
    return text.split(BEGIN)[0] + "\n".join([*rows, END]) + text.split(END)[1]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(encoding="utf-8")), encoding="utf-8")
