"""Multi-label classification: any number of classes per text, each decided by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import InputError
from ._base import Batch, LabelKind, Rows, Terms
from .classification import _Classification, label_in, pair_content
from .tokens import check_length, encode


@dataclass(frozen=True)
class MultiLabel(_Classification):
    """Several classes per text, or per pair of texts: ℓ_i = (1/C) Σ_c −log p(y_ic), p(1) = sigmoid(z_c); count one.

    F is the mean binary cross-entropy, as Hugging Face trains `problem_type="multi_label_classification"`.

    Args:
        tokenizer: the model's tokenizer.
        label_column: where the classes of a row are: a list of those that apply (integers, or what `labels` lists), or
            C floats 0.0 and 1.0, as Hugging Face has them.
        labels: the C classes in the order of the logits; needed for strings.
        max_length: tokens after which a text is cut, and counted as truncated; defaults to the tokenizer's limit.
        text_column: where the text is. Rows without this column may hold `input_ids`, tokenised already.
        text_pair_column: where the second text of a pair is; None: texts have no second.

    Raises:
        InputError: fewer than 2 `labels`, or one of them twice; a row without a text or a list of classes; a model
            whose head has other classes or was made for another `problem_type`.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    label_column: str = "labels"
    labels: tuple[str | int, ...] | None = None
    max_length: int | None = None
    text_column: str = "text"
    text_pair_column: str | None = None

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    label_kind: ClassVar[LabelKind | None] = "classes"
    problem_type: ClassVar[str | None] = "multi_label_classification"
    problem: ClassVar[str] = "multi_label_classification"
    loss_name: ClassVar[str] = "a binary cross-entropy per class"
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def __post_init__(self):
        self._check_labels()
        check_length(self.tokenizer, self.max_length, "MultiLabel")

    def _check_classes(self, classes: int) -> None:
        self._check_number(classes)

    def collate(self, rows: Rows) -> Batch:
        """`labels`, (M,), are the classes that apply and `rows`, (M,), their rows; `width`, (B,), is the length of a
        row's floats, −1 where the row lists classes."""
        classes, width = zip(*(self._classes(row) for row in rows), strict=True)
        owners = [i for i, numbers in enumerate(classes) for _ in numbers]
        labels = torch.tensor([number for numbers in classes for number in numbers], dtype=torch.int64)
        batch, truncated = encode(self, rows, self.text_pair_column)
        batch |= {"labels": labels, "rows": torch.tensor(owners, dtype=torch.int64)}
        return batch | {"width": torch.tensor(width), "truncated": truncated}

    def _classes(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        values = label_in(row, self.label_column)
        values = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else values
        if not isinstance(values, (list, tuple)):
            raise InputError(
                f"row {row.get('example_id')!r} has the labels {values!r}; expected a list of the classes that apply, "
                "or one float 0.0 or 1.0 per class."
            )
        if values and all(isinstance(value, float) for value in values):
            if set(values) - {0.0, 1.0}:
                raise InputError(
                    f"row {row.get('example_id')!r} has the labels {values}; expected floats 0.0 and 1.0, one per "
                    "class, or a list of the classes that apply."
                )
            return [c for c, value in enumerate(values) if value], len(values)
        return sorted({self._class(value, row) for value in values}), -1

    def outputs_for(self, row: Mapping[str, Any]) -> int:
        """The number of its floats, or one more than its largest class."""
        classes, width = self._classes(row)
        return max(width, 1 + max(classes, default=0))

    def content(self, row: Mapping[str, Any]) -> Any:
        """The text; of a pair both, with a bar between them."""
        return pair_content(super().content(row), row, self.text_pair_column)

    def counts(self, batch: Batch) -> Tensor:
        return torch.ones(len(batch["width"]))

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        sums = self._entropies(call, batch).mean(1)
        return sums, torch.ones_like(sums)

    def terms(self, call: Callable, batch: Batch) -> Terms:
        """One term per class."""
        losses = self._entropies(call, batch)
        size, classes = losses.shape
        owners = torch.arange(size, device=losses.device).repeat_interleave(classes)
        return Terms(losses.flatten() / classes, owners)

    def _entropies(self, call: Callable, batch: Batch) -> Tensor:
        """(B, C)"""
        logits, labels, width = self._run(call, batch), batch["labels"], batch["width"]
        classes = logits.shape[1]
        self._check_classes(classes)
        wrong, largest = width[(width >= 0) & (width != classes)], int(labels.max()) if len(labels) else 0
        if len(wrong) or largest >= classes or (len(labels) and labels.min() < 0):
            given = f"{int(wrong[0])} floats" if len(wrong) else f"classes from {int(labels.min())} to {largest}"
            raise InputError(
                f"the labels of a row have {given}, but the model has {classes} classes: set num_labels when loading "
                "it, or number the classes from 0."
            )
        targets = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
        targets[batch["rows"], labels] = 1.0
        return binary_cross_entropy_with_logits(logits, targets, reduction="none")
