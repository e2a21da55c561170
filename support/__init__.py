"""What any program needs. Here: the errors; a check that `clip` and `datasets` are ours."""
import contextlib
import os
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
for name in ("clip", "datasets"):  # other packages have these names, too
    if not os.path.realpath(str(find_spec(name).origin)).startswith(os.path.join(ROOT, name)):
        raise ImportError(f"another package called {name!r} is found before the project's: write "
                          "`from trm_ml import Predictor`, or put the project's folder first with "
                          "sys.path.insert(0, folder)")


class UserError(ValueError):
    """Something that the user can mend. One line: what was expected, what came, what to do."""

    def __init__(self, message):  # a loader's process sends its traceback: the last line is kept
        super().__init__(" ".join(str(message).rsplit("UserError: ", 1)[-1].split()))


@contextlib.contextmanager
def refused(message):
    """Whatever a damaged or foreign file makes a reader raise becomes UserError(message)."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{message} ({str(error)[:150]})") from None
