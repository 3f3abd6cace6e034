"""Writes a trained model to a folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..adapters.peft import has_adapters
from ..adapters.peft import save as save_with_adapters


def save(model: nn.Module, tokenizer: Any | None, folder: str | os.PathLike) -> None:
    """Writes model and tokenizer as `from_pretrained` reads them; replaces what the folder held.

    The folder is written beside its place and then renamed, so that an interruption leaves the old one or the new one.

    Args:
        model: a `PreTrainedModel`. One with adapters is written as `adapters.peft.load` reads it, encoder included.
        tokenizer: anything with `save_pretrained`, or None where there is none.
        folder: where they are written.

    Raises:
        InputError: a model with several adapters, or with adapters that are merged.
    """
    folder = Path(folder)
    part, old = (folder.with_name(folder.name + end) for end in (".part", ".old"))
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        save_with_adapters(model, part) if has_adapters(model) else cast(PreTrainedModel, model).save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
