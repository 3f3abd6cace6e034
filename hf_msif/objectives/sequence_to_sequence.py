"""Sequence-to-sequence language models: a target is predicted from a text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import InputError
from ._base import Batch, Rows, SumOfTerms, Terms, logits_of
from .tokens import check_length, encode, texts_of, tokenize

IGNORED = -100  # Hugging Face's label of a token that does not count


@dataclass(frozen=True)
class Seq2SeqLM(SumOfTerms):
    """A target given a text, as T5 and BART are trained: ℓ_i = Σ_t −log p(target_t | text, targets before it).

    The decoder reads the targets shifted to the right by the model's own rule, which it applies to `labels`. All
    tokens of a target count, also its end.

    Args:
        tokenizer: the model's tokenizer; it reads targets by its argument `text_target`.
        max_length: tokens after which a text is cut, and counted as truncated; defaults to the tokenizer's limit.
        max_target_length: the same of a target.
        reduction: "token" (N counts target tokens, as Hugging Face trains) or "example" (each target is the mean of
            its terms and counts once).
        text_column: where the text is. Rows without this column may hold `input_ids`, tokenised already.
        target_column: where the target is.

    Raises:
        InputError: an unknown `reduction`, a row without text or target, or a model that is no encoder-decoder.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    max_length: int | None = None
    max_target_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"
    target_column: str = "target"

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    columns: ClassVar[tuple[str, ...]] = ("target",)
    inputs = ("input_ids", "attention_mask")

    def __post_init__(self):
        self._check_reduction()
        check_length(self.tokenizer, self.max_length, "Seq2SeqLM")
        check_length(self.tokenizer, self.max_target_length, "Seq2SeqLM")

    def check_model(self, model: Any) -> None:
        """Refuses a model that is no encoder-decoder."""
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"{type(model).__name__} is no encoder-decoder; Seq2SeqLM expects one, such as T5 or BART: take "
                "objectives.CausalLM or objectives.MaskedLM, or load the model with AutoModelForSeq2SeqLM."
            )

    def collate(self, rows: Rows) -> Batch:
        batch, truncated = encode(self, rows)
        batch = {key: batch[key] for key in self.inputs}
        targets = texts_of(rows, self.target_column)
        encoded, cut = tokenize(_Targets(self.tokenizer), targets, self.max_target_length)
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        return batch | {"labels": labels, "truncated": truncated | cut}

    def content(self, row: Mapping[str, Any]) -> Any:
        """The text, and the target after an arrow."""
        return f"{super().content(row)} → {row.get(self.target_column, '')}"

    def _numbers(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORED).sum(1).to(torch.get_default_dtype())

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The tokens of the target, in their order."""
        labels = batch["labels"]
        logits = logits_of(call(**{key: batch[key] for key in (*self.inputs, "labels")}), "Seq2SeqLM", 3)
        owners, places = (labels != IGNORED).nonzero(as_tuple=True)
        targets = labels[owners, places]
        losses = cross_entropy(logits[owners, places], targets, reduction="none")
        return Terms(losses, owners, places, targets)


class _Targets:
    """A tokenizer of targets, for `tokenize`."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        return self.tokenizer(text_target=texts, **settings)
