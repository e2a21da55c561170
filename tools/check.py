"""Checks a data set or a sheet, each problem with its line: `python data.py DATA`."""
import sys
from concurrent.futures import ThreadPoolExecutor

import data
from config import Config
from datasets import vg200
from datasets.base import NEGATIVE, POSITIVE, UNKNOWN, twins
from support import UserError
from support.cli import make_parser, run_command
from tools.predict import why_not


def check(cfg, decode=True):
    """Prints what is in a data set; yields the problems, a line each."""
    try:
        splits = data.complete(cfg)
    except UserError as error:
        yield from getattr(error, "problems", [str(error)])
        return
    for name, split in splits.items():
        split = split.used()
        print(f"\n{name}: {data.describe(split)}")
        print(f"{'class':32}{'present':>9}{'absent':>9}{'unknown':>9}")
        counts = [(split.labels == code).sum(0) for code in (POSITIVE, NEGATIVE, UNKNOWN)]  # (C,)
        for category, present, absent, unknown in zip(split.names, *counts):
            print(f"{category[:31]:32}{present:9}{absent:9}{unknown:9}")
        never = [category for category, n in zip(split.names, counts[0]) if not n]
        if never and name == "train":
            yield f"train: {len(never)} categories are in no image, none to learn: {never[:5]}"
        for i, first in enumerate(twins(split.paths)):
            if first != i:
                differ = (split.labels[first] * split.labels[i] < 0).any()
                yield (f"{split.paths[i]}, {split.paths[first]}: the same picture, "
                       f"{'and their labels disagree: ' if differ else ''}keep one")
        if decode:
            where = split.where or [cfg.data] * len(split.paths)
            with ThreadPoolExecutor() as pool:  # decoding leaves the interpreter free
                reasons = pool.map(why_not, split.paths)
                yield from (f"{place}: {path}: not a readable image ({reason})"
                            for place, path, reason in zip(where, split.paths, reasons) if reason)


def main(argv=None):
    parser = make_parser("data.py", data.__doc__)
    parser.add_argument("data", help=f"{', '.join(data.LAYOUTS)}, or a sheet")
    parser.add_argument("--root", help="folder of the download, or where a sheet's names start")
    parser.add_argument("--names", help="file of prompt names, one a line; vg200: of categories")
    for name in ("ignore", "minus-one", "unlisted"):
        parser.add_argument(f"--{name}", help="of sheets, as for train.py")
    parser.add_argument("--no-decode", action="store_true", help="do not open every image")
    parser.add_argument("--objects", help="vg200: objects.json, to find the names in")
    return run_command(report, parser, argv)


def report(objects, no_decode, **settings):
    """What `python data.py` does with its options -> exit status."""
    cfg = Config(**settings)
    if objects:
        if not cfg.root or cfg.data != "vg200":
            raise UserError("--objects needs vg200 and --root, the folder of Visual Genome")
        return print("\n".join(vg200.match_names(cfg.root, objects)))
    problems = list(check(cfg, not no_decode))
    for line in problems:  # a cell of a sheet may hold line breaks
        print("error: " + " ".join(line.split()), file=sys.stderr)
    if problems:
        return 2
    print("\nno problems found")


if __name__ == "__main__":
    sys.exit(main())
