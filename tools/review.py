"""Brings a run's suggestions to a person, and the person's answers into the sheet.

    python -m tools.review new-sheet photos --categories dog,cat     an empty photos/labels.csv
    python eval.py RUN --suggest out.csv                             out.html asks, saves answers
    python -m tools.review merge photos/labels.csv answers.csv       fills the sheet's empty cells
    python -m tools.review export out.csv tasks.json                 the same for Label Studio
    python -m tools.review merge photos/labels.csv export.json       its answers, JSON as it exports

A merge fills empty cells only; delimiter, encoding and line ends stay, and a copy of the sheet is
kept. Where an answer contradicts the sheet, the sheet keeps its label and the conflict is printed.
"""
import collections
import csv
import hashlib
import io
import itertools
import json
import posixpath
import re
import sys
import urllib.parse
from pathlib import Path
from unicodedata import normalize
from xml.sax.saxutils import quoteattr

from PIL import Image

from datasets import augment
from datasets.base import NEGATIVE, POSITIVE, UNKNOWN, read_json, require_unique
from datasets.csv_sheet import CODES, FORMULA, MEANING, Sheet, csv_text, split_names, word
from support import UserError, refused
from support.checkpoint import write_atomically
from support.cli import make_parser, run_command
from tools.predict import images_in, require_new, why_not


def write_page(file, title, cells, photos, grid, then):
    """cells: list of dicts photo, image, category, kind, probability, region (N values 0..255);
    photos {photo: base64 JPEG}; grid (h, w); then: what to do with ANSWERS, the saved file."""
    cells = sorted(cells, key=lambda cell: cell["category"])  # kinds stay in their order
    # answers are kept in the browser under the name of the list
    key = hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:16]
    text = json.dumps(dict(title=title, cells=cells, photos=photos, grid=grid, key=key, then=then,
                           save=f"{file.stem}-answers.csv")).replace("<", "\\u003c")
    template = Path(__file__).with_name("review.html").read_text(encoding="utf-8")
    write_atomically(file, template.replace("{{DATA}}", text))


# ---- answers into the sheet

def read_answers(path):
    """Yields (image, category, code) of a CSV with image, category, label: suggestions, answers."""
    sheet, columns = Sheet(path), ("image", "category", "label")
    if missing := set(columns) - set(sheet.header):
        raise UserError(f"{path}: no column {', '.join(sorted(missing))}")
    for line, row in sheet.body.items():
        row = [re.sub(f"^'(?={FORMULA.pattern})", "", cell) for cell in row]  # csv_text put it
        image, category, label = map(dict(zip(sheet.header, row)).get, columns)
        if word(label) not in CODES:
            raise UserError(f"{path}:{line}: a label is 1, 0 or empty, got {label!r}: correct it")
        yield image, category, CODES[word(label)]


def row_of(address, rows, uploads):
    """The image that a task of Label Studio shows: one of `rows`, the sheet's, or else its path;
    what stands before it, or None. /data/local-files/?d=photos/in/a.jpg, or any URL, ends in its
    name; an uploaded one is /data/upload/1/0f3a9c21-a.jpg. uploads: {that name: [rows]}"""
    if "://" in address and "?d=" not in address:
        address = address.split("?")[0]  # a signature
    path = nfc(urllib.parse.unquote(address.split("?d=")[-1]))
    if upload := re.search(r"/data/upload/\d+/[0-9a-f]{8}-([^/]+)$", path):
        found = uploads.get(upload[1], [path])
        if len(found) > 1:
            raise UserError(f"{address} may be {found[0]} or {found[1]}: upload with other names")
        return found[0], None
    parts = path.split("/")
    ends = ["/".join(parts[k:]) for k in range(len(parts))]  # the longest first
    end = next((end for end in ends if end in rows), None)
    return (path, None) if end is None else (end, path.removesuffix(end))


def named(result, names):
    """The categories that a result of Label Studio names: a choice, or the label of a box and the
    like. Nested ones are paths: the last counts, and of the others those of `names`."""
    kind = result["type"]
    if kind not in ("choices", "taxonomy") and not kind.endswith("labels"):
        return []
    values = result["value"].get(kind) or result["value"].get("labels", ())
    paths = [[value] if isinstance(value, str) else value for value in values]
    return [folded(name) for path in paths for name in path
            if name == path[-1] or folded(name) in names]


def read_label_studio(path, names, rows, unlisted):
    """The same of its JSON: an annotation names what is present. The rest of the categories that
    could have been chosen, by `export` or else all of `names`, is `unlisted`."""
    if unlisted is None:
        raise UserError(f"{path}: what was not chosen is --unlisted absent or --unlisted unknown?")
    rest = NEGATIVE if unlisted == "absent" else UNKNOWN
    shown, starts, uploads = {}, set(), collections.defaultdict(list)
    for row in rows:
        name = posixpath.basename(row).replace(" ", "_")  # as Django names an uploaded file
        uploads[re.sub(r"[^-\w.]", "", name)].append(row)
    with refused(f"{path}: expected Label Studio's export as JSON, not JSON-MIN, each task with "
                 "data.image and annotations"):
        for task in read_json(path):
            address = task["data"]["image"]
            image, start = row_of(address, rows, uploads)
            if shown.setdefault(image, address) != address:
                raise UserError(f"{path}: two tasks show {image}: {shown[image]} and {address}; "
                                "delete one")
            offered = {*map(folded, task["data"].get("offered", names))}
            done = [note for note in task["annotations"] if not note.get("was_cancelled")]
            starts |= {start} - {None} if done else set()
            # of two that differ the first counts
            for note in sorted(done, key=lambda note: not note.get("ground_truth")):
                chosen = {name for result in note["result"] for name in named(result, names)}
                for name in sorted(chosen | offered):
                    yield image, name, POSITIVE if name in chosen else rest
    if len(starts) > 1:  # a camera gives the same names again
        raise UserError(f"{path}: its photos start from {' and '.join(sorted(starts))}, those of a "
                        "sheet from one folder: export that one's tasks")


def nfc(name):
    """A name in one form: macOS writes an umlaut as two characters, Windows .\\a.jpg for a.jpg."""
    return normalize("NFC", name.strip()).replace("\\", "/").removeprefix("./")


def folded(category):
    return nfc(category).lower()  # Dog is dog, as in a sheet


def merge(sheet, answers, minus_one, unlisted):
    """Fills empty cells of the sheet with the answers."""
    path, file, sheet = Path(sheet), answers, Sheet(sheet)
    image = {nfc(row[0]): line for line, row in sheet.body.items()}
    cells = [{word(row[c]) for row in sheet.body.values()} for c in range(len(sheet.header))]
    labels = {text for text, code in CODES.items() if code != UNKNOWN} | {"-1"}
    column = {folded(name): c for c, name in enumerate(sheet.header)  # notes, ages: no category
              if c and name and (cells[c] & labels or cells[c] <= CODES.keys())}
    if minus_one is None and any("-1" in cells[c] for c in column.values()):
        raise UserError(f"{path}: what does -1 mean? Say --minus-one absent (then 0 is unknown) "
                        "or --minus-one unknown")
    answers = (read_label_studio(file, column, image, unlisted) if file.lower().endswith(".json")
               else read_answers(file))
    answers = [answer for answer in answers if answer[2] != UNKNOWN]

    codes = MEANING[minus_one]
    written = {POSITIVE: "1", NEGATIVE: "-1" if minus_one == "absent" else "0"}
    filled, same, strangers, conflicts = 0, 0, [], []
    for name, category, code in answers:
        line, c = image.get(nfc(name)), column.get(folded(category))
        said = codes.get(word(sheet.body[line][c])) if line and c else None
        if said is None:  # no such image or category, or the cell is no label
            strangers.append(f"{name}, {category}")
        elif said == UNKNOWN:
            raw = sheet.raw[line]
            raw += [""] * (c + 1 - len(raw))  # Excel left the cell out
            raw[c] = sheet.body[line][c] = written[code]
            filled += 1
        elif said == code:
            same += 1
        else:
            conflicts.append(f"{name}, {category}: sheet {sheet.body[line][c]}, answer "
                             f"{written[code]}")
    if strangers and len(strangers) == len(answers):
        raise UserError(f"{file}: none of its {len(answers)} answers has a cell in {path} "
                        f"(first {strangers[0]}): is it the answers' sheet? A sheet with "
                        "one column of lists takes none")
    if filled:
        backups = (path.with_name(f"{path.name}.{k}.bak") for k in itertools.count(1))
        kept = next(file for file in backups if not file.exists())
        write_atomically(kept, path.read_bytes())
        merged = io.StringIO()  # \r\n ends its lines; so a cell with \r or \n gets quotes
        csv.writer(merged, delimiter=sheet.delimiter).writerows(sheet.raw.values())
        line_end = re.search("\r\n|\r|\n", re.sub('"[^"]*"', "", sheet.text))[0]
        write_atomically(path, merged.getvalue().replace("\r\n", line_end).encode(sheet.encoding))
        print(f"{path}: {filled} cells filled; what it was is kept as {kept}")
    print(f"{len(answers)} answers: {filled} new, {same} were there, {len(conflicts)} conflicts, "
          f"{len(strangers)} without a cell")
    for line in conflicts[:50] + strangers[:50]:
        print("  " + line)


# ---- other doors

def new_sheet(folder, categories):
    """FOLDER/labels.csv: a row per image that Pillow opens, every cell empty."""
    folder = Path(folder)
    file = require_new(folder / "labels.csv", "the sheet")
    rows, skipped = [], []
    categories = split_names(categories)
    require_unique([name.lower() for name in categories], "--categories")
    for path in images_in([folder]):
        name = Path(path).relative_to(folder).as_posix()
        if FORMULA.match(name) or name[0].isspace():  # a reader strips blanks
            name = f"./{name}"  # the same file, and no formula
        try:
            if "\\" in name or name != name.rstrip():
                raise ValueError("a reader would take it for another name")
            name.encode()  # raises where it is not UTF-8
            with Image.open(path) as image:
                augment.refuse_thumbnail(image)
            rows.append([name, *[""] * len(categories)])
        except Exception:  # whatever a decoder raises, too
            skipped.append(path)
    reasons = [f"{path} ({why_not(path) or 'a sheet cannot hold its name: rename it'})"
               for path in skipped[:5]]
    told = f"{len(skipped)} files were left out, first {', '.join(reasons)}"
    if not (rows and categories):
        raise UserError(f"expected images in {folder} and names in --categories; got {len(rows)} "
                        f"images and {len(categories)} names{'; ' + told if skipped else ''}")
    write_atomically(file, csv_text(["image", *categories], rows))
    print(f"{file}: {len(rows)} images, {len(categories)} categories, every cell empty")
    if skipped:
        print(told)


def export(suggestions, tasks, folder):
    """Suggestions -> Label Studio's tasks; what is likely present is chosen beforehand."""
    file = require_new(tasks, "TASKS")
    answers = [*read_answers(suggestions)]
    categories = sorted({category for _, category, _ in answers})
    chosen = {image: [] for image, _, _ in answers}  # one without a positive is a task, too
    for image, category, code in answers:
        if code == POSITIVE:
            chosen[image].append(category)
    tasks = []
    for image, names in chosen.items():
        result = {"from_name": "category", "to_name": "image", "type": "choices",
                  "value": {"choices": names}}
        place = posixpath.normpath(posixpath.join(folder, image.replace("\\", "/")))
        address = "/data/local-files/?d=" + urllib.parse.quote(place)
        data = {"image": address, "offered": categories}  # these for the way back
        tasks.append({"data": data, "predictions": [{"result": [result]}]})
    write_atomically(file, json.dumps(tasks, indent=1))
    choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in categories)
    print(f"{file}: {len(tasks)} tasks. The labelling interface of the project:\n"
          '<View><Image name="image" value="$image"/><Choices name="category" toName="image" '
          f'choice="multiple">{choices}</Choices></View>')


def main(argv=None):
    parser = make_parser("tools.review", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    known = dict(choices=("absent", "unknown"), help="as train.py has it")
    options = {"--categories": dict(required=True, help="a,b,c"), "--minus-one": known,
               "--unlisted": known, "--folder": dict(default="", help="of the photos, as it is "
                                                     "called below Label Studio's document root")}
    for work, arguments in ((new_sheet, ("folder", "--categories")),
                            (merge, ("sheet", "answers", "--minus-one", "--unlisted")),
                            (export, ("suggestions", "tasks", "--folder"))):
        command = commands.add_parser(work.__name__.replace("_", "-"), help=work.__doc__)
        command.set_defaults(work=work)
        command.error = parser.error
        for name in arguments:
            command.add_argument(name, **options.get(name, {}))
    return run_command(lambda work, **given: work(**given), parser, argv)


if __name__ == "__main__":
    sys.exit(main())
