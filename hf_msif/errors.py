"""The one exception for what a user can mend: on the command line one sentence and exit code 2, no traceback."""


class InputError(ValueError):
    """Bad input: the message says what was given, what was expected, and the way out."""


class DivergedError(InputError):
    """A training whose loss or weights stopped being finite: nothing of it is worth keeping."""


class ProcessError(RuntimeError):
    """Another process of the launch failed, not by bad input; the message is its own."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
