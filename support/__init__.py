"""What any program needs: the error class here; checkpoint.py, distributed.py, cli.py beside it."""


class UserError(ValueError):
    """Something that the user can mend. One line: what was expected, what came, what to do.

    A loader's process hands its errors over as text that holds the whole traceback: the last line
    of it is kept.
    """

    def __init__(self, message):
        super().__init__(" ".join(str(message).rsplit("UserError: ", 1)[-1].split()))
