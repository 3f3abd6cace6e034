"""Regression: one number per text, or per pair of texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._base import Batch, LabelKind, Objective, Rows, Terms, logits_of
from .classification import check_problem, label_in, pair_content
from .tokens import check_length, encode


@dataclass(frozen=True)
class Regression(Objective):
    """A number for a whole text, or for a pair of texts: ℓ_i = (z_i − y_i)², z the model's one logit; count one.

    F is the mean squared error, as Hugging Face trains a head with `num_labels=1`.

    Args:
        tokenizer: the model's tokenizer.
        label_column: where the number y is.
        max_length: tokens after which a text is cut, and counted as truncated; defaults to the tokenizer's limit.
        text_column: where the text is. Rows without this column may hold `input_ids`, tokenised already.
        text_pair_column: where the second text of a pair is; None: texts have no second.

    Raises:
        InputError: a row without a text or a finite number; a model with several outputs, or one that was made for
            another `problem_type`.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    label_column: str = "label"
    max_length: int | None = None
    text_column: str = "text"
    text_pair_column: str | None = None

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    label_kind: ClassVar[LabelKind | None] = "number"
    problem_type: ClassVar[str | None] = "regression"

    def __post_init__(self):
        check_length(self.tokenizer, self.max_length, "Regression")

    def check_model(self, model: Any) -> None:
        """Refuses a head with several outputs, or one whose `problem_type` is that of another loss."""
        check_problem(model, "Regression", "regression", "the squared error")
        outputs = getattr(getattr(model, "config", None), "num_labels", None)
        if outputs not in (None, 1):
            raise InputError(
                f"the model has {outputs} outputs; Regression expects one: set num_labels=1 when making the model, or "
                "take objectives.SequenceClassification, whose head has one output per class."
            )

    def _label(self, row: Mapping[str, Any]) -> float:
        value = label_in(row, self.label_column)
        value = value.item() if isinstance(value, (np.generic, Tensor)) and value.ndim == 0 else value
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(
                f"row {row.get('example_id')!r} has the label {value!r}; expected a finite number: drop or mend such "
                "rows, or take objectives.SequenceClassification for names of classes."
            )
        return float(value)

    def outputs_for(self, row: Mapping[str, Any]) -> int:
        """One, after a look at the row's label."""
        self._label(row)
        return 1

    def collate(self, rows: Rows) -> Batch:
        labels = torch.tensor([self._label(row) for row in rows], dtype=torch.float64)
        batch, truncated = encode(self, rows, self.text_pair_column)
        return batch | {"labels": labels, "truncated": truncated}

    def content(self, row: Mapping[str, Any]) -> Any:
        """The text; of a pair both, with a bar between them."""
        return pair_content(super().content(row), row, self.text_pair_column)

    def counts(self, batch: Batch) -> Tensor:
        return torch.ones(len(batch["labels"]))

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        logits = logits_of(call(**inputs), "Regression", 2)
        if logits.shape[1] != 1:
            raise InputError(
                f"the model returned {logits.shape[1]} outputs per text; Regression expects one: set num_labels=1."
            )
        sums = (logits[:, 0] - batch["labels"].to(logits)) ** 2
        return sums, torch.ones_like(sums)

    def terms(self, call: Callable, batch: Batch) -> Terms:
        """The one term of each example."""
        losses, _ = self.losses(call, batch)
        return Terms(losses, torch.arange(len(losses), device=losses.device))
