"""Writes a trained model to a folder, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..adapters.peft import has_adapters
from ..adapters.peft import save as save_with_adapters
from ..engine.files import disk_errors
from ..engine.folders import replaced


def save(
    model: nn.Module, tokenizer: Any | None, folder: str | os.PathLike, facts: Mapping[str, Any] | None = None
) -> None:
    """Writes model and tokenizer as `from_pretrained` reads them; replaces a folder that this function wrote before.

    The folder is written beside its place and then renamed, so that an interruption leaves the old one or the new one.
    Its file `.hf_msif.json` lists what was written.

    Args:
        model: a `PreTrainedModel`. One with adapters is written as `adapters.peft.load` reads it, encoder included.
        tokenizer: anything with `save_pretrained`, or None where there is none.
        folder: where they are written.
        facts: what else the folder's `.hf_msif.json` is to hold; JSON-able.

    Raises:
        InputError: a model with several adapters, or with adapters that are merged; a folder that holds files which
            this function did not write.
    """
    # A link to a folder elsewhere stays, and what it points to is replaced.
    with disk_errors(folder), replaced(Path(os.path.realpath(folder)), "model", facts) as part:
        save_with_adapters(model, part) if has_adapters(model) else cast(PreTrainedModel, model).save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
