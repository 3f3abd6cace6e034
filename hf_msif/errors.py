"""Exceptions for what a user can mend: the command line prints their one sentence, no traceback, and exits with 2."""


class InputError(ValueError):
    """Bad input: the message says what was passed, what was expected, and the way out."""


class DivergedError(InputError):
    """The loss or the weights of a training stopped being finite: no result of that training is usable."""


class ProcessError(RuntimeError):
    """Another process of the launch failed, not because of bad input; the message repeats what that process said."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, without its full stop; the error's class if it has no text.

    >>> first_line(KeyError()), first_line(ValueError("bad shape.\\nDetails follow."))
    ('KeyError', 'bad shape')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
