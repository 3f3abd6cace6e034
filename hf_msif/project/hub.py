"""Whether the Hugging Face Hub can be reached: where it cannot, its cache is used at once, without retries."""

from __future__ import annotations

import os
import socket
import threading
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 3.0  # after which a machine without an answer counts as offline


def prepare(source: str) -> str:
    """Call it before a library loads a model, tokenizer or dataset from `source`, a folder or a Hub id.

    Returns:
        The source, with `~` resolved.
    """
    path = os.path.expanduser(source)
    if not os.path.exists(path) and not is_reachable():
        from datasets import config
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    return path


def reason(error: BaseException) -> str:
    """What a message about something on the Hub adds where the Hub cannot be reached and `error` does not say so."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE or constants.ENDPOINT in str(error):
        return ""
    return f"; {constants.ENDPOINT} cannot be reached, and it is not in the cache"


@cache
def is_reachable() -> bool:
    """Whether a connection to the Hub can be opened. A proxy is taken for one that reaches it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    endpoint, answers = urlsplit(constants.ENDPOINT), list[bool]()
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)

    def connect() -> None:
        try:
            socket.create_connection((endpoint.hostname or "", port), timeout=SECONDS).close()
            answers.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # the search for an address has no time limit of its own
    thread.start()
    thread.join(SECONDS)
    return bool(answers)
