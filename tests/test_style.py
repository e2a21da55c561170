"""How the code is written: width, one statement a line, imports that run one way."""
import ast
import re
import subprocess
from pathlib import Path

import pytest
from mutants import MUTANTS

from tools.equation_map import cited

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for path in sorted(ROOT.rglob("*.py"))
         if not {".venv", "generated", "runs"} & set(path.relative_to(ROOT).parts)]
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
OTHERS = [ROOT / name for name in ("paper/walkthrough.html", "tools/review.html", "Makefile",
                                   ".ci/run", "pyproject.toml", "datasets/scenes.ini")]
# A file may import what stands on its own floor or below.
FLOORS = (("support",), ("clip", "kernels", "datasets"),
          ("config", "data", "trm", "memory", "losses"),
          ("tools", "eval", "train", "paper"))
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports(path):
    """Modules of the project that a file imports, late ones too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for length in range(len(parts), 0, -1):
                file = "/".join(parts[:length]) + ".py"
                if file in NAMES or f"{'/'.join(parts[:length])}/__init__.py" in NAMES:
                    found.add(file if file in NAMES else f"{'/'.join(parts[:length])}/__init__.py")
                    break
    return found


@pytest.mark.parametrize("path", FILES + OTHERS,
                         ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_are_at_most_100_columns(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    long = [i for i, line in enumerate(lines, 1) if len(line) > 100]
    assert not long, f"lines {long}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_one_statement_a_line(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    starts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    twice = {line for line in starts if starts.count(line) > 1}
    assert not twice, f"lines {sorted(twice)}"


def test_imports_run_one_way():
    wrong = []
    for path, name in zip(FILES, NAMES):
        own = FLOOR.get(name.split("/")[0].removesuffix(".py"))
        for other in imports(path) if own is not None else ():
            if FLOOR.get(other.split("/")[0].removesuffix(".py"), -1) > own:
                wrong.append(f"{name} imports {other}")
    assert not wrong, wrong


def test_no_import_circle():
    graph = {name: imports(path) - {name} for path, name in zip(FILES, NAMES)
             if not name.startswith("tests")}

    def visit(name, above):
        assert name not in above, " -> ".join([*above[above.index(name):], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*above, name])
            done.add(name)

    done = set()
    for name in sorted(graph):
        visit(name, [])


def test_seven_files_at_the_top():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a checkout of git")
    top = [name for name in tracked.stdout.split() if "/" not in name]
    assert top == ["config.py", "data.py", "eval.py", "losses.py", "memory.py", "train.py",
                   "trm.py"]


def test_names_of_equations_are_cited_in_the_method():
    found = set()
    for name in ("trm.py", "memory.py", "losses.py", "train.py", "kernels/region_pool.py"):
        comments = re.findall("#(.*)", (ROOT / name).read_text(encoding="utf-8"))
        found |= cited("\n".join(comments))  # beside the line that computes it
    assert found >= set(range(1, 16))


@pytest.mark.parametrize("file, old", sorted({mutant[:2] for mutant in MUTANTS}))
def test_the_words_of_a_mutant_stand_in_its_file(file, old):
    assert old in (ROOT / file).read_text(encoding="utf-8"), "mend tests/mutants.py"
