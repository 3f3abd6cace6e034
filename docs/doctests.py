"""Doctests in docstrings as blocks of code: Markdown alone would read `>>>` as quotations."""

import re

import griffe

BLOCK = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)


def fenced(docstring: str) -> str:
    """The docstring with a fence around each doctest.

    >>> print(fenced("Adds.\\n\\n>>> 1 + 1\\n2"))
    Adds.
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    return BLOCK.sub(lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```", docstring)


class FencedDoctests(griffe.Extension):
    """Fences the doctests of all docstrings."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
