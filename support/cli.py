"""The edge of every command: options, one-line errors, exit status, Ctrl-C and SIGTERM, device.

    0 done    2 one line on stderr about something the user can mend    130 stopped
"""
import argparse
import difflib
import os
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor

from support import UserError


def make_parser(prog, about, **options):
    """argparse with one-line errors. about: the docstring of the file that is run."""
    first, _, rest = about.partition("\n")
    parser = argparse.ArgumentParser(prog=prog, description=first, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     **options)

    def refuse(message):
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            known = parser._option_string_actions
            near = difflib.get_close_matches(unknown.split("=")[0], known, 1)
            message = f"unknown option {unknown}" + (f", did you mean {near[0]}?" if near else "")
        raise UserError(f"{message} ({prog} --help lists the options)")
    parser.error = refuse
    return parser


def words(argv):
    """The command line without its program. An empty word (--out "$OUT" without OUT) is refused."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    for before, word in zip(["the command", *argv], argv):
        if word == "" or word.startswith("--") and word.endswith("="):
            raise UserError(f"{word or before} expects a value, got an empty one")
    return argv


class Stop:
    """Ctrl-C and SIGTERM. Python drops an exception that meets a fork: `asked` remembers it."""
    asked = False

    def __call__(self, *_):
        self.asked = True
        raise KeyboardInterrupt

    def check(self):
        if self.asked:
            raise KeyboardInterrupt


stop = Stop()


def run_main(work, stopped="stopped"):
    """work() -> exit status. What `failed` does not list is our fault and keeps its traceback."""
    stop.asked = False
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)  # what schedulers send ends a run as Ctrl-C does
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that a terminal cannot show stops nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except BaseException as error:
        if not (stop.asked or isinstance(error, KeyboardInterrupt)):
            return failed(error)
        print(f"\n{stopped}", file=sys.stderr)
        return 130


def failed(error):
    """One line for what the user can mend; anything else is raised again. -> exit status."""
    try:
        raise error
    except UnicodeEncodeError as error:  # a file name under a locale that does not know its letters
        name = ascii(error.object[error.start:error.end])
        line = f"the locale cannot write {name} of a file name: set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
    except (UserError, FloatingPointError) as error:
        line = str(error)
    except BrokenExecutor:
        line = "a worker process was ended, mostly for want of memory: fewer --jobs or --workers"
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "allocate memory" in str(error)
                or "out of memory" in str(error)):
            raise
        reason = str(error).split(". ")[0][:150]
        line = f"too little memory: lower --batch, --size or --queue ({reason})"
    except OSError as error:
        line = (f"{error.filename or 'input or output'}: {error.strerror or error}: check path, "
                "rights and free space")
    print("error: " + " ".join(line.split()), file=sys.stderr)
    return 2


def end_with_parent():
    """For worker processes: Ctrl-C is the parent's; when it is gone, even by kill -9, they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def best_device(rank=0, world=1):
    """CUDA's device of this rank; Apple's mps for a single process; else the CPU."""
    import torch
    if torch.cuda.is_available():
        return torch.device(f"cuda:{rank}")
    return torch.device("mps" if world == 1 and torch.backends.mps.is_available() else "cpu")


def peak_memory():
    """The most memory that this process held so far, for the log."""
    import torch
    try:
        import resource  # not on Windows
    except ImportError:
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    if torch.cuda.is_available():
        return f"{peak:.2f} GiB, GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    return f"{peak:.2f} GiB"
