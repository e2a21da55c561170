"""What any program needs: the errors here; checkpoint.py, cli.py, distributed.py, ... beside it."""
import contextlib


class UserError(ValueError):
    """Something that the user can mend. One line: what was expected, what came, what to do."""

    def __init__(self, message):  # a loader's process sends its traceback: the last line is kept
        super().__init__(" ".join(str(message).rsplit("UserError: ", 1)[-1].split()))


class NotFound(UserError):
    """The data set lacks the files of a setup."""


@contextlib.contextmanager
def refused(message, known=Exception):
    """What a damaged or foreign file makes a reader raise, one of `known`, becomes UserError."""
    try:
        yield
    except UserError:
        raise
    except known as error:
        raise UserError(f"{message} ({str(error)[:150]})") from None
