"""Your own images: a sheet `image,<class>,...` whose cells are 1 present, 0 absent, empty unknown.

    image,dog,cat,"red, small car"
    #prompt,dog,cat,small red car          (optional second row: the names to use in prompts)
    walk/1.jpg,1,,0                        (image names relative to the sheet, or absolute)

Other forms, the WORDS below among them: docs/data.md. What could mean two things is refused with
the option that settles it; `python data.py SHEET.csv` prints every problem."""
import csv
import functools
import io
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from datasets.base import (NEGATIVE, POSITIVE, UNKNOWN, Split, locate, read_text, tells_presence,
                           twins)
from support import UserError

EMPTY = ("", "na", "n/a", "#n/a", "<na>", "nan", "none", "null")  # as other programs write it
WORDS = {POSITIVE: ("1", "true", "yes", "y", "present", "x", "ja", "oui", "wahr", "vrai"),
         NEGATIVE: ("0", "false", "no", "n", "absent", "nein", "non", "falsch", "faux"),
         UNKNOWN: (*EMPTY, "?", "unknown")}
CODES = {word: code for code, words in WORDS.items() for word in words}
# by --minus-one: "absent", where 0 is unknown; "unknown", as CheXpert has it
MEANING = {None: CODES, "unknown": CODES | {"-1": UNKNOWN},
           "absent": CODES | {"0": UNKNOWN, "-1": NEGATIVE}}
FORMULA = re.compile(r"'*[=+\-@]")  # a spreadsheet computes such a cell; ' makes it text


@functools.lru_cache  # a sheet has many cells, and few words
def word(cell):
    """A cell as WORDS has it: "Yes" is yes; "1.0", and "1,00" where commas end no cell, are 1."""
    return re.sub(r"^(-?[01])[.,]0+$", r"\1", cell.lower())


def note(text):
    print(f"note: {text}", file=sys.stderr)  # stdout may be JSON


def csv_text(header, rows):
    """A CSV that a spreadsheet opens with its umlauts (a mark says UTF-8) and without formulas."""
    text = io.StringIO()
    writer = csv.writer(text)  # its line end is \r\n, so a name with \r or \n gets quotes
    for row in (header, *rows):
        writer.writerow([f"'{cell}" if FORMULA.match(str(cell)) else cell for cell in row])
    return text.getvalue().replace("\r\n", "\n").encode("utf-8-sig", errors="surrogateescape")


def split_names(text):
    """Names as a user gives them: a,"b, c" -> ["a", "b, c"]."""
    names = next(csv.reader([text], skipinitialspace=True))
    return [name.strip() for name in names if name.strip()]


def is_sheet(data):
    return str(data).lower().endswith((".csv", ".tsv"))


def load(root, cfg):
    """train, and val and test where cfg.val and cfg.test name sheets: the classes of the first one,
    in its order, and other images."""
    files = {"train": cfg.data, "val": cfg.val, "test": cfg.test}
    sheets = {name: Sheet(path) for name, path in files.items() if is_sheet(path)}
    columns = {name for sheet in sheets.values() for name in sheet.header}
    if missing := sorted({*split_names(cfg.ignore or "")} - columns):
        raise UserError(f"{cfg.data}: --ignore names {missing}, columns are {sorted(columns)[:20]}")
    train = read(sheets.pop("train"), root, cfg)
    ticked = [name for name, column in zip(train.names, train.labels.T)
              if {*column} == {POSITIVE, UNKNOWN}]
    if ticked and not tells_presence(train.labels):
        note(f"{cfg.data}: no 0 for {ticked[:5]}: a run would learn that all images have it")
    splits = {"train": train}
    for name, sheet in sheets.items():
        split = read(sheet, root, cfg, train.names)
        if differ := set(split.names) ^ set(train.names):
            raise UserError(f"{sheet.path}: its classes differ from --data's by {sorted(differ)}")
        others = [file for other in splits.values() for file in other.paths]
        first = twins(others + split.paths)[len(others):]  # a copy is the same image, too
        if both := [file for file, i in zip(split.paths, first) if i < len(others)]:
            raise UserError(f"{sheet.path}: {len(both)} images are in another sheet, first "
                            f"{both[0]}: take them out of one")
        order = [split.names.index(name) for name in train.names]
        split.labels = split.truth = split.labels[:, order]
        split.names, split.prompts = train.names, train.prompts
        splits[name] = split
    return splits


class Sheet:
    """A CSV. header: its cells; body: {line number: cells}, without blanks around cells, empty rows
    and end columns, short rows filled; prompts: {category: its name in prompts}. A merge writes it
    back: raw: {line number: cells as they stand} of all rows, text, delimiter, encoding."""

    def __init__(self, path):
        self.path = path
        self.text, self.encoding = read_text(path)
        sep = '(?i)(?:"?sep=([^"\r\n]?)[^\r\n]*(?:\r\n|\r|\n|$))?'  # Excel's line "sep=;"
        delimiter, first = re.match(sep + "([^\r\n]*)", self.text).groups()
        first = re.sub('"[^"]*("|$)', "", first) + ","  # the comma of "red, small car" ends no cell
        self.delimiter = delimiter or re.search("[,;\t]", first)[0]
        lines = io.StringIO(self.text, newline="")
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        try:
            self.raw = {reader.line_num: row for row in reader}
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not a CSV row ({error})") from None
        rows = {line: [cell.strip() for cell in row] for line, row in self.raw.items()
                if any(map(str.strip, row)) and (line > 1 or delimiter is None)}
        if not rows:
            raise UserError(f"{path}: the sheet is empty; expected a header 'image,<class>,...'")
        width = max(i + 1 for row in rows.values() for i, cell in enumerate(row) if cell)
        self.header = header = rows.pop(min(rows))[:width]
        if not header[1:] or ("." in header[0] and all(word(cell) in CODES for cell in header[1:])):
            raise UserError(f"{path}:1: expected a header 'image,<class>,...', got {header[:9]}")
        self.body = {line: row[:width] + [""] * (len(header) - len(row))
                     for line, row in rows.items()}
        has_prompts = rows and rows[min(rows)][0] == "#prompt"
        self.prompts = dict(zip(header, self.body.pop(min(rows)))) if has_prompts else {}


def read(sheet, root, cfg, names=()):
    """-> Split. root: where relative image names start, and what they must not leave (default: the
    sheet's folder). names: of the training sheet, where this is another; lists need not use all.
    UserError for the first problem; its attribute `problems` lists them all."""
    path = sheet.path
    root = os.path.realpath(root or os.path.dirname(os.path.realpath(path)))
    empty = NEGATIVE if cfg.unlisted == "absent" else UNKNOWN
    codes = MEANING[cfg.minus_one] | dict.fromkeys(EMPTY, empty)
    names, cells = categories(sheet, cfg, names, codes)
    problems = [f"{path}:{line}: {len(row)} cells, but the header has {len(sheet.header)}"
                for line, row in sheet.body.items() if len(row) > len(sheet.header)]
    for line, row in zip(sheet.body, cells):
        if bad := [f"{name}={cell!r}" for name, cell in zip(names, row) if word(cell) not in codes]:
            problems.append(f"{path}:{line}: {', '.join(bad[:3])}: a cell is 1 (present), 0 "
                            "(absent), empty (unknown), or -1 with --minus-one; a column that is "
                            "no category goes into --ignore (docs/data.md: lists)")
    prompts = [sheet.prompts.get(name) or name.replace("_", " ") for name in names]
    once = len({*map(str.lower, names)}) == len(names)
    problems += [f"{path}:1: the class {name!r} is there twice, capitals aside, or has no name"
                 for name, n in Counter(map(str.lower, prompts if once else names)).items()
                 if n > 1 or not name]
    if not (cells and names):
        problems.append(f"{path}: expected a row for each image, a column of labels per category: "
                        "1 present, 0 absent, empty unknown")
    files = image_files(sheet, root, problems)
    if problems:
        more = f" (and {len(problems) - 1} more; python data.py {path} lists them)"
        error = UserError(problems[0] + (more if len(problems) > 1 else ""))
        error.problems = problems
        raise error
    labels = [[codes[word(cell)] for cell in row] for row in cells]
    return Split(Path(path).stem, files, names, np.array(labels, np.int8), prompts=prompts,
                 listed=[row[0] for row in sheet.body.values()],
                 where=[f"{path}:{line}" for line in sheet.body])


def categories(sheet, cfg, names, codes):
    """-> (C names, N rows of their cells). names: of the training sheet, where this is another"""
    path, header, rows = sheet.path, sheet.header, sheet.body.values()
    first = not names  # the training sheet
    ignored = split_names(cfg.ignore or "")
    filled = {c: [word(row[c]) for row in rows if CODES.get(word(row[c])) != UNKNOWN]
              for c in range(1, len(header)) if header[c] not in ignored}
    # A column of three or more filled cells, none a label, is no category; the only column holds
    # lists, if --unlisted says so. In a second sheet, one that the first lacks is none either.
    texts = [c for c, words in filled.items() if not {*codes, "-1"} & {*words}
             and (len(words) > 2 or not (first or header[c] in names)
                  or (cfg.unlisted and len(filled) == 1 and words and first))]
    may_list = [header[c] for c in texts if re.search("(?i)label|tags?$|categ|class", header[c])]
    if may_list and len(filled) > 1:
        raise UserError(f"{path}: the column {may_list[0]!r} holds no labels, but may list them: "
                        f"--ignore {may_list[0]}, or the others (docs/data.md: lists, long)")
    if len(texts) == len(filled) == 1 and filled[texts[0]]:
        if cfg.unlisted is None:
            raise UserError(f"{path}: its cells are lists ({filled[texts[0]][0][:60]!r}): is what "
                            "they do not name absent or unknown? Say --unlisted absent or unknown")
        return lists(path, [row[texts[0]] for row in rows], names)
    if texts:
        note(f"{path}: no categories, since no cell is a label: {[header[c] for c in texts]}")
    columns = [c for c in filled if c not in texts]
    return [header[c] for c in columns], [[row[c] for c in columns] for row in rows]


def lists(path, cells, names):
    """A column of lists, such as `dog|cat` -> all names, and rows of the cells that a column for
    each would hold: 1, or empty, or the word in a list's place ("?": nothing is known)."""
    blank = [cell if CODES.get(word(cell)) == UNKNOWN else "" for cell in cells]
    cells = ["" if unknown else cell for cell, unknown in zip(cells, blank)]
    if odd := [cell for cell in cells if cell[:1] in ("[", "{", "(")]:
        raise UserError(f"{path}: {odd[0][:60]!r}: write a list as dog|cat (docs/data.md: lists)")
    separator = next((s for s in "|;" if any(s in cell for cell in cells)), ",")
    rows = [[name.strip() for name in cell.split(separator) if name.strip()] for cell in cells]
    names = sorted({*names}.union(*rows))
    note(f"{path}: one column of lists, {len(names)} categories: {', '.join(names)[:300]}")
    return names, [["1" if name in row else other for name in names]
                   for row, other in zip(rows, blank)]


def image_files(sheet, root, problems):
    """Absolute file names of the rows, links followed: one image, one row."""
    first = {}  # file: its line
    for line, (name, *_) in sheet.body.items():
        where = f"{sheet.path}:{line}"
        try:
            folder = Path(name).anchor or root  # "/" of an absolute name
            file = name and locate(name, [folder], where)
            if not file:
                raise UserError(f"{where}: no image '{name}' in {folder}, which --root sets; the "
                                "first column holds names with their ending (pandas: index=False)")
            file = os.path.realpath(file)
            if first.setdefault(file, line) != line:
                raise UserError(f"{where}: {name} is already on line {first[file]}; merge the two "
                                "rows (docs/data.md: long)")
        except UserError as error:
            problems.append(str(error))
    return list(first)
