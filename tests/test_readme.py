"""What the README says of the code must be true: the map of equations, the commands, the links."""
import dataclasses
import re
from pathlib import Path

from config import Config
from tools.equation_map import ROWS, written

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_of_equations_is_the_one_of_the_code():
    assert written(README) == README, "the map is stale: run make map"
    assert {int(row[0]) for row in ROWS} == set(range(1, 16))


def test_commands_name_files_and_flags_that_exist():
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(Config)}
    commands = re.findall(r"^(?:python|torchrun\b.*?) (train\.py[^#\n]*)", README, re.M)
    assert len(commands) >= 4
    for command in commands:
        unknown = set(re.findall(r"--[\w-]+", command)) - flags - {"--resume", "--help"}
        assert not unknown, f"`{command.strip()}` uses {unknown}, which train.py does not have"
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_links_lead_to_files():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_pages_name_what_is_there():
    """Names of code in backticks: one outlived its function."""
    written = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("**/*.py")
                      if ".venv" not in file.parts)
    elsewhere = {"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT"}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`([A-Za-z]+_\w+)(?:\(\))?`", page.read_text(encoding="utf-8")):
            assert name in written or name in elsewhere, f"{page.name}: `{name}` is not in the code"


def test_the_readme_is_short():
    assert len(README.split()) <= 1800
