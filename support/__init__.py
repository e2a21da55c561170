"""What any program needs: the errors here; checkpoint.py, cli.py, distributed.py, ... beside it."""
import contextlib


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
