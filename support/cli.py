"""The edge of every command: options, one-line errors, exit status, Ctrl-C and SIGTERM, device.

    0 done    2 one line on stderr about something the user can mend    130 stopped
    141 nobody reads the output any more (`| head`)
"""
import argparse
import difflib
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
from concurrent.futures import BrokenExecutor

from support import UserError


def make_parser(prog, about, **more):
    """argparse with one-line errors. about: the docstring of the file that is run."""
    first, _, rest = (about or "").partition("\n")  # None under python -OO
    parser = argparse.ArgumentParser(prog=prog, description=first, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def refuse(message):
        unknown = message.partition("unrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        near = difflib.get_close_matches(unknown, parser._option_string_actions, 1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"{message}{hint} ({prog} --help lists the options)")
    parser.error = refuse
    return parser


def words(argv):
    """The command line without its program. An empty word (--out "$OUT" without OUT) is refused."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    for before, word in zip(["the command", *argv], argv):
        if word == "" or (word.startswith("--") and word.endswith("=")):
            raise UserError(f"{word or before} expects a value, got an empty one")
    home = os.path.expanduser("~").replace("\\", "/")  # the shell leaves it in --out=~/runs
    return [re.sub("^(--[a-z-]+=)?~/", rf"\1{home}/", word) for word in argv]


def stop(*_):
    """Ctrl-C and SIGTERM. Python loses an exception raised in a fork: `asked` remembers it."""
    if os.getpid() != stop.process:  # a forked worker that has not set its own handler yet
        os._exit(1)
    stop.asked = True
    if hasattr(signal, "SIGCHLD"):  # torch would raise for each worker that the same signal ends
        signal.signal(signal.SIGCHLD, lambda *_: None)
    raise KeyboardInterrupt


stop.asked, stop.process = False, None


def run_command(work, parser, argv):
    """work(option=value, ...) of a command whose options are all of its parser's -> exit status."""
    return run_main(lambda: work(**vars(parser.parse_args(words(argv)))))


def run_main(work, stopped="stopped"):
    """work() -> exit status, 0 where it returns none. An error that `explain` does not know is a
    fault of the project and keeps its traceback."""
    stop.asked, stop.process = False, os.getpid()
    if threading.current_thread() is threading.main_thread():  # no other one may hear signals
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)  # what schedulers send ends a run as Ctrl-C does
    streams = [stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr)]
    sys.stdout, sys.stderr = streams  # one that is closed (>&-) is None
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # a name that a terminal cannot show stops nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        status = work()
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except BaseException as error:
        if stop.asked or isinstance(error, KeyboardInterrupt):
            print(f"\n{stopped}", file=sys.stderr)
            return 130
        line = explain(error)
        if line is None:
            raise
        sys.unraisablehook = str  # prints nothing: half-built loaders raise in their destructors
    finally:
        stop.asked = False  # a notebook that was stopped trains again
    print("error: " + " ".join(line.split()), file=sys.stderr)
    return 2


def explain(error):
    """The line about something that the user can mend; None for anything else."""
    text = str(error)
    if isinstance(error, UnicodeEncodeError):  # a file name under a locale without its letters
        return f"the locale cannot write {error.object!a}: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    if isinstance(error, (UserError, FloatingPointError)):
        return text
    limits = r"DataLoader worker \(|shared memory|ancdata|start new thread|cannot join thread"
    if isinstance(error, BrokenExecutor) or re.search(limits, text):
        return ("a worker was ended or could not start: fewer --jobs, --workers 0, more memory (in "
                "a container also shared memory: --shm-size) or higher limits (ulimit -a)")
    if isinstance(error, RuntimeError) and " by peer" in text:  # gloo's words
        return "another process of this training has ended: its own message says why"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing: pip install {error.name}"
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return f"too little memory: lower --batch, --size or --queue ({text[:150]})"
    if isinstance(error, OSError):
        where = error.filename or "output, or a worker process (fewer --jobs, --workers 0)"
        return f"{where}: {error.strerror or text}: check path, rights, space, limits (ulimit -a)"


def end_with_parent(_=None):
    """For worker processes: Ctrl-C is the parent's; when it is gone, even by kill -9, they end."""
    gc.freeze()  # what the parent left is not theirs to destroy: a CUDA graph would end them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():
        multiprocessing.parent_process().join()  # not getppid(): that may be Python's fork server
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def best_device(world=1):
    """This process's GPU (distributed.start chose it); Apple's, for one process; else the CPU."""
    import torch  # not above: processes that draw scenes start without it
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if world == 1 and torch.backends.mps.is_available() else "cpu")
