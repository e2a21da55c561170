"""Your own images: a CSV `image,<class>,<class>,...` in which a cell is 1 present, 0 absent, empty unknown.

    image,dog,cat,"red, small car"
    #prompt,dog,cat,small red car          (optional second row: the names to use in prompts)
    walk/1.jpg,1,,0                        (image names relative to the sheet, or absolute)

Sheets full of unknowns are the point. Nothing is guessed: any other cell, a short row, an image that is missing or
listed twice is refused with its line (`python data.py SHEET.csv` prints every problem).
"""
import csv, io, os

import numpy as np

from datasets.base import NEGATIVE, POSITIVE, UNKNOWN, Table, inside, read_bytes, read_lines
from support import UserError

CODES = {"1": POSITIVE, "0": NEGATIVE, "": UNKNOWN}


def is_sheet(data):
    return str(data).lower().endswith(".csv")


def sheet(path, root=None):
    """-> Table. root: where relative image names start (default: the sheet's folder), and what they must not leave.
    UserError for the first problem; its attribute `problems` lists them all."""
    root, problems = os.path.realpath(root or os.path.dirname(os.path.realpath(path))), []

    def problem(line, text):
        problems.append(f"{path}:{line}: {text}")
    read_lines(path)  # says where it is not text
    files, listed, cells, lines, first = [], [], [], [], {}
    try:
        reader = csv.reader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(c.strip() for c in row)]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a CSV row ({error})") from None
    if not rows:
        raise UserError(f"{path}: the sheet is empty; expected a header 'image,<class>,<class>,...'")
    names = rows[0][1][1:]
    if not names:
        raise UserError(f"{path}:1: expected a header 'image,<class>,...' with commas, got {rows[0][1][0][:80]!r}")
    if set(names) <= set(CODES) and "" not in names:
        problem(1, f"expected a header 'image,<class>,...', got what looks like a row of labels ({rows[0][1][0]}): put the header above it")
    for c, name in enumerate(names):
        if not name or name in names[:c]:
            problem(1, f"column {c + 2} has no class name" if not name else f"class {name!r} comes twice")
    body, prompts = rows[1:], list(names)
    if body and body[0][1][0] == "#prompt":
        line, row = body.pop(0)
        prompts = row[1:]
        if len(prompts) != len(names) or not all(prompts):
            problem(line, f"the row of prompt names needs {len(names)} names")
    for line, row in body:
        bad = [f"{names[c]}={cell!r}" for c, cell in enumerate(row[1:len(names) + 1]) if cell not in CODES]
        if len(row) != len(names) + 1:
            problem(line, f"{len(row)} cells, but the header has {len(names) + 1}")
        elif bad:
            problem(line, f"a cell is 1 (present), 0 (absent) or empty (unknown), got {', '.join(bad[:3])}")
        elif not row[0]:
            problem(line, "no image name in the first column")
        else:
            try:
                absolute = os.path.isabs(row[0]) and "\0" not in row[0]
                file = os.path.realpath(row[0] if absolute else inside(root, row[0], f"{path}:{line}"))
            except UserError as error:
                problems.append(str(error))
                continue
            if file in first:                                                      # links followed: one image, one row
                problem(line, f"{row[0]} is already on line {first[file]}; merge the two rows")
            elif not os.path.isfile(file):
                problem(line, f"no image {file} ({'a folder' if os.path.isdir(file) else 'missing'})")
            first.setdefault(file, line)
            files.append(file)
            listed.append(row[0])
            lines.append(line)
            cells.append([CODES[cell] for cell in row[1:]])
    labels = np.array(cells, np.int8).reshape(-1, len(names))
    if not problems and not (labels == POSITIVE).any():
        problem(1, f"no cell is 1 in {len(labels)} rows: there is nothing to learn; mark what is present")
    if problems:
        more = f" (and {len(problems) - 1} more; python data.py {path} lists them)" if len(problems) > 1 else ""
        error = UserError(problems[0] + more)
        error.problems = problems
        raise error
    return Table(files, labels, names, prompts=prompts, where=[f"{path}:{line}" for line in lines], listed=listed)


def second_sheet(path, root, first, first_path):
    """A sheet for validation: the classes of the first one in any order, and none of its images."""
    table = sheet(path, root)
    if sorted(table.names) != sorted(first.names):
        raise UserError(f"{path}: its classes differ from those of {first_path}: "
                        f"{sorted(set(table.names) ^ set(first.names))}")
    both = set(table.files) & set(first.files)
    if both:
        raise UserError(f"{path}: {len(both)} images are in {first_path} too, first {min(both)}; keep them apart")
    table.labels, table.names = table.labels[:, [table.names.index(name) for name in first.names]], first.names
    return table
