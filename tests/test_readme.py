"""The README's map from equation to line, and the commands it prints, must be true of the code."""
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| Eq\. ([\d, ]+?) \|.*?\[`([\w/]+\.py):(\d+)`\]\(([^)]+)\)", re.M)


def test_every_equation_is_mapped_to_the_line_that_cites_it():
    rows, wrong = ROW.findall(README), []
    for equations, file, line, link in rows:
        assert link == f"{file}#L{line}", f"the link of {file}:{line} goes to {link}"
        text = (ROOT / file).read_text().split("\n")
        for equation in re.findall(r"\d+", equations):
            cites = [i for i, t in enumerate(text, 1)
                     if any(equation in re.findall(r"\d+", c)
                            for c in re.findall(r"Eq\. ((?:\d+(?:, | and |-)?)+)", t))]
            if int(line) not in cites:
                wrong.append(f"Eq. {equation}: README says {file}:{line}, the file cites it in "
                             f"lines {cites}")
    assert not wrong, "\n".join(wrong)
    mapped = {int(n) for equations, *_ in rows for n in re.findall(r"\d+", equations)}
    assert mapped == set(range(1, 16)), f"equations without a row: {set(range(1, 16)) - mapped}"


def test_commands_name_files_and_flags_that_exist():
    import dataclasses
    from config import Config
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(Config)} | {"--resume",
                                                                                     "--help"}
    commands = re.findall(r"^(?:python|torchrun\b.*?) (train\.py[^#\n]*)", README, re.M)
    assert len(commands) >= 8
    for command in commands:
        unknown = set(re.findall(r"--[\w-]+", command)) - flags
        assert not unknown, f"`{command.strip()}` uses {unknown}, which train.py does not have"
