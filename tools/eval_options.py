"""The command line of eval.py."""
from config import OF_SHEETS, PLACES, flag
from support import UserError
from support.cli import make_parser, words

WITHOUT_RUN = ("size", "activation", *OF_SHEETS)  # what a run has settled
MOVED = sorted(PLACES - {"captions", "carl_from"})  # these two only training reads


def parse(argv, about):
    """-> options; `places` are the settings of the run that were given anew"""
    parser = make_parser("eval.py", about)
    add = parser.add_argument
    add("run", nargs="?", help="run folder")
    command = parser.add_mutually_exclusive_group().add_argument
    command("--image", nargs="+", metavar="PATH", help="photos or folders")
    command("--suggest", metavar="FILE", help="CSV of its guesses for unknown labels, and its page")
    command("--compare", nargs="+", metavar="RUN", help="zero-shot, this run and these")
    command("--categories", action="store_true", help="a line per category, labels that look wrong")
    command("--ensemble", nargs="+", metavar="RUN", help="average probabilities with these runs")
    add("--zero-shot", action="store_true", help="--suggest by CLIP without training: --data, ...")
    add("--size", type=int, help="--zero-shot: side of the input in pixels")
    for name in WITHOUT_RUN[1:]:
        add(flag(name), help="--zero-shot: as train.py has it")
    add("--checkpoint", choices=("best", "last"), help="default: best, where there is a best.pt")
    add("--split", choices=("train", "val", "test"), help="measured (default: test, else val)")
    add("--top", type=int, default=5, help="--image: categories shown (default: 5)")
    add("--pictures", type=int, help="--image: most pictures drawn; --suggest: cells on the page")
    add("--out", help="--image: folder of the pictures (default: RUN/regions)")
    add("--csv", metavar="FILE", help="--image: all probabilities as image,<category>,...")
    add("--strict", action="store_true", help="--image: fail where a photo cannot be read")
    add("--json", action="store_true", help="print JSON")
    add("--batch", type=int, default=32, help="--image: images at once (default: 32)")
    add("--workers", type=int, help="processes that decode (default: the run's; --image: 0)")
    for name in MOVED:
        add(flag(name), help="where it lies now, if it moved since training")

    args = parser.parse_args(words(argv))
    if args.json and (args.categories or args.compare or args.suggest):
        raise UserError("--categories, --compare and --suggest print lines for people: drop --json")
    if not args.image and (args.csv or args.out or args.strict):
        raise UserError("--csv, --out and --strict belong to --image: add it, or drop them")
    if args.split and (args.image or args.suggest):
        raise UserError("--image is of photos, --suggest of the training images: drop --split")
    if min(args.top, args.batch) < 1 or min(args.workers or 0, args.pictures or 0) < 0:
        raise UserError("--top and --batch count from 1, --workers and --pictures from 0")
    cold = args.zero_shot and args.suggest and args.data and not args.run
    args.places = {name: value for name in (*MOVED, *WITHOUT_RUN, "workers")
                   if (value := getattr(args, name)) is not None}
    if not cold and (extra := [flag(name) for name in WITHOUT_RUN if name in args.places]):
        raise UserError(f"{' '.join(extra)} belongs to --zero-shot, a run has its own: drop it")
    if not cold and (args.zero_shot or not args.run):
        raise UserError("expected a run, or --zero-shot with --data and --suggest")
    return args
