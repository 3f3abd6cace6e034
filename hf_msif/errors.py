"""Exceptions for what a user can mend: the command line prints their one sentence, no traceback, and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: the message says what was passed, what was expected, and the way out."""


class DivergedError(InputError):
    """The loss or the weights of a training stopped being finite: no result of that training is usable."""


class ProcessError(RuntimeError):
    """Another process of the launch failed, not because of bad input; the message repeats what that process said."""


class FileError(InputError, OSError):
    """A file could not be written, or cannot be read as what it should be: the message names it."""


LONGEST = 300  # characters of another library's message


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, without its full stop; the error's class if it has no text.

    A line that ends in a colon is followed by the next one, and a key that was not found is said to be one.

    >>> first_line(KeyError()), first_line(ValueError("bad shape.\\nDetails follow."))
    ('KeyError', 'bad shape')
    >>> first_line(ValueError("bad field 'x':\\n   expected int.\\nDetails follow.")), first_line(KeyError("gelo"))
    ("bad field 'x': expected int", "KeyError: 'gelo'")
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0]
    for line in lines[1:3]:
        if not text.endswith(":"):
            break
        text = f"{text} {line}"
    text = text.rstrip(".:")
    if isinstance(error, KeyError) and error.args:
        text = f"KeyError: {text}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


class Complaints:
    """Collects refusals, so that several mistakes of one input are told at once.

    >>> complaints = Complaints()
    >>> for seed in (1, -1, -2):
    ...     with complaints.collected():
    ...         if seed < 0:
    ...             raise InputError(f"seed is {seed}; expected at least 0.")
    >>> complaints.tell()
    Traceback (most recent call last):
        ...
    hf_msif.errors.InputError: 2 mistakes: (1) seed is -1; expected at least 0. (2) seed is -2; expected at least 0.
    """

    MOST = 8  # that are told

    def __init__(self, sentences: Iterable[str] = ()):
        self.sentences = list(sentences)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, an `InputError` ends the block and is kept."""
        try:
            yield
        except InputError as error:
            self.sentences.append(str(error))

    def tell(self) -> None:
        """Raises what was collected, if anything was.

        Raises:
            InputError: one sentence as it is; several of them numbered.
        """
        distinct = list(dict.fromkeys(self.sentences))
        if len(distinct) == 1:
            raise InputError(distinct[0])
        if distinct:
            told = " ".join(f"({number}) {sentence}" for number, sentence in enumerate(distinct[: self.MOST], 1))
            more = len(distinct) - self.MOST
            raise InputError(f"{len(distinct)} mistakes: {told}" + (f" And {more} more." if more > 0 else ""))
