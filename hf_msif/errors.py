"""The one exception for what a user can mend: a clear sentence instead of a traceback on the command line (exit code
2)."""


class InputError(ValueError):
    """Bad input: the message says what was given, what was expected, and the way out."""
