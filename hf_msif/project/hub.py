"""Models and data of the Hugging Face Hub: where it cannot be reached, its cache is used at once, without retries."""

from __future__ import annotations

import os

from ..engine.repository import is_reachable


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
