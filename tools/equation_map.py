"""Writes the README's map from equations to lines: `make map`.

A line of code that computes an equation cites it as `Eq. n`. equation_map.txt says in which file
the line of an equation is looked for and what it holds; the generator finds its number.
"""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- map: written by `make map` -->", "<!-- end of map -->"
# Equation, file, what the citing line holds, what it is.
ROWS = [line.split(" | ") for line in
        Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()]


def cited(text):
    """The numbers of the equations that a text cites: "Eq. 1-3, 5" -> {1, 2, 3, 5}."""
    listed = " ".join(re.findall(r"Eq\. ((?:\d+(?:-|, | and )?)+)", text))
    spans = re.findall(r"(\d+)(?:-(\d+))?", listed)
    return {n for first, last in spans for n in range(int(first), int(last or first) + 1)}


def line_of(equation, file, holds):
    """The line that holds the words and cites the equation, on it or on the two lines around it."""
    lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
    for i, line in enumerate(lines):
        if holds in line and int(equation) in cited(" ".join(lines[max(0, i - 1):i + 2])):
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
