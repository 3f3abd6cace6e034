"""The one exception for what a user can mend: on the command line one sentence and exit code 2, no traceback."""


class InputError(ValueError):
    """Bad input: the message says what was given, what was expected, and the way out."""


class DivergedError(InputError):
    """A training whose loss or weights stopped being finite: nothing of it is worth keeping."""


class ProcessError(RuntimeError):
    """Another process of the launch failed, not by bad input; the message is its own."""
