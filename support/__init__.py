"""What any program needs: the error class here; checkpoint.py, distributed.py, cli.py beside it."""


class UserError(ValueError):
    """Something that the user can mend. One line: what was expected, what came, what to do."""

    def __init__(self, message):  # a loader's process sends its traceback: the last line is kept
        super().__init__(" ".join(str(message).rsplit("UserError: ", 1)[-1].split()))
