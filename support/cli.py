"""The edge of every command: its options, one-line errors and exit status, Ctrl-C and SIGTERM, the device, the memory.

    0 done    2 one line on stderr about something the user can mend    130 stopped (Ctrl-C, SIGTERM)
"""
import argparse
import difflib
import os
import signal
import sys
from concurrent.futures import BrokenExecutor

from support import UserError


def make_parser(prog, about, **options):
    """argparse with one-line errors. about: the docstring of the file that is run."""
    first, _, rest = about.partition("\n")
    parser = argparse.ArgumentParser(prog=prog, description=first, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def refuse(message):
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            near = difflib.get_close_matches(unknown.split("=")[0], parser._option_string_actions, 1)
            message = f"unknown option {unknown}" + (f", did you mean {near[0]}?" if near else "")
        raise UserError(f"{message} ({prog} --help lists the options)")

    parser.error = refuse
    return parser


def words(argv):
    """The command line without its program. An empty word (--out "$OUT" without an OUT) is refused."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "" in argv:
        before = argv[argv.index("") - 1] if argv.index("") else "the command"
        raise UserError(f"{before} expects a value, got an empty one: give it, or drop the option")
    return argv


def stop(*_):
    raise KeyboardInterrupt


def run_main(work, stopped="stopped"):
    """work() -> exit status. What is raised but not listed here is a fault of this code and keeps its traceback."""
    try:
        signal.signal(signal.SIGTERM, stop)                     # schedulers send it: it ends a run as Ctrl-C does
    except ValueError:
        pass                                                    # not in the main thread: no handler is allowed there
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")       # a name that the terminal cannot show stops nothing
    try:
        status = work() or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    except (UserError, FloatingPointError) as error:
        line = str(error)
    except BrokenExecutor:
        line = "a process that works for this one was ended from outside, mostly for want of memory: lower --jobs, --workers"
    except BrokenPipeError:                                     # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)):
            raise
        line = f"too little memory: lower --batch, --size or --queue ({str(error).split('. ')[0][:150]})"
    except OSError as error:
        line = f"{error.filename or 'input or output'}: {error.strerror or error}; check the path, rights and free space"
    print("error: " + " ".join(line.split()), file=sys.stderr)
    return 2


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
        import resource                                         # not on Windows
    except ImportError:
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    gpu = f", GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if torch.cuda.is_available() else ""
    return f"{peak:.2f} GiB{gpu}"
