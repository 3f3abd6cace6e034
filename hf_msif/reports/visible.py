"""`visible`: an untrusted text with a sign in the place of each character that a page cannot show."""

from __future__ import annotations

import re

_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def visible(text: str) -> str:
    """The text with pictures of control characters, and U+FFFD for what is no character.

    Tabs and line breaks stay, as do marks of the direction of writing: the page isolates every text, so that they
    change nothing outside of it.

    >>> visible("a\\x00b\\x7f\\ud800c")
    'a␀b␡�c'
    """
    return _UNSHOWN.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "�"
