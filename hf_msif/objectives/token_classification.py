"""Token classification: one label per word."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._base import Batch, LabelKind, Rows, SumOfTerms, Terms
from .classification import _Classification
from .tokens import check_length, padded

IGNORED = -100  # Hugging Face's label of a word that does not count


@dataclass(frozen=True)
class TokenClassification(SumOfTerms, _Classification):
    """A label per word, such as a part of speech or an entity: ℓ_i = Σ_words −log p(label | sentence).

    The logits of a word are those of its first sub-token. A word with the label −100 does not count.

    Args:
        tokenizer: the model's tokenizer, a fast one, which knows the word of each sub-token.
        label_column: where the labels are: a list as long as that of the words, of integers or of what `labels` lists.
        labels: the classes in the order of the logits; needed for strings.
        max_length: tokens after which a sentence is cut, and counted as truncated; defaults to the tokenizer's limit.
        reduction: "token" (N counts words, as Hugging Face trains) or "example" (each sentence is the mean of its
            terms and counts once).
        text_column: where the words are, a list of strings.

    Raises:
        InputError: a tokenizer that is not fast; fewer than 2 `labels`, or one of them twice; a row without words,
            with labels that are not as many, or with a word of which no token is made; a model whose head has other
            classes.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    label_column: str = "labels"
    labels: tuple[str | int, ...] | None = None
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "tokens"

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    label_kind: ClassVar[LabelKind | None] = "classes"
    words: ClassVar[bool] = True
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def __post_init__(self):
        self._check_reduction()
        self._check_labels()
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"TokenClassification got a {type(self.tokenizer).__name__}, which does not say of which word a token "
                "is; expected a fast tokenizer."
            )
        check_length(self.tokenizer, self.max_length, "TokenClassification")

    def collate(self, rows: Rows) -> Batch:
        """`rows` and `columns`, (M,), are the places of the words' first sub-tokens, `labels`, (M,), their classes."""
        pairs = [self._words(row) for row in rows]
        words = [row_words for row_words, _ in pairs]
        limit = self.tokenizer.model_max_length if self.max_length is None else self.max_length
        encoded = self.tokenizer(
            words, is_split_into_words=True, truncation=False, padding=False, verbose=False, add_special_tokens=True
        )
        truncated = torch.tensor([len(ids) > limit for ids in encoded["input_ids"]])
        whole = [set(encoded.word_ids(i)) for i in range(len(rows))]
        for row, row_words, numbers in zip(rows, words, whole, strict=True):
            lost = [word for k, word in enumerate(row_words) if k not in numbers]
            if lost:
                raise InputError(
                    f"row {row.get('example_id')!r} has the word {lost[0]!r}, of which the tokenizer makes no token, "
                    "so that its label has no place; expected words: leave it and its label out."
                )
        if truncated.any():
            encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit, padding=False)
        places: list[tuple[int, int, int]] = []
        for i, (_, labels) in enumerate(pairs):
            firsts: dict[int, int] = {}
            for column, word in enumerate(encoded.word_ids(i)):
                if word is not None:
                    firsts.setdefault(word, column)
            places += [(i, column, labels[word]) for word, column in firsts.items() if labels[word] != IGNORED]
        where = torch.from_numpy(np.array(places, dtype=np.int64).reshape(-1, 3))
        batch = {"rows": where[:, 0], "columns": where[:, 1], "labels": where[:, 2], "truncated": truncated}
        return padded(self.tokenizer, encoded) | batch

    def _words(self, row: Mapping[str, Any]) -> tuple[list[str], list[int]]:
        """The words of a row and their classes."""
        name = f"row {row.get('example_id')!r}"
        for column, key in ((self.text_column, "text_column"), (self.label_column, "label_column")):
            if column not in row:
                raise InputError(f"the rows have no column {column!r}; they have {sorted(row)}: pass {key}=.")
        words = list(row[self.text_column]) if not isinstance(row[self.text_column], str) else None
        if words is None or not all(isinstance(word, str) for word in words):
            raise InputError(
                f"{name} has {row[self.text_column]!r} in column {self.text_column!r}; expected a list of words."
            )
        values = row[self.label_column]
        values = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else values
        if not isinstance(values, (list, tuple)) or len(values) != len(words):
            number = f"{len(values)} labels" if isinstance(values, (list, tuple)) else f"the labels {values!r}"
            raise InputError(f"{name} has {len(words)} words and {number}; expected a list of one label per word.")
        return words, [IGNORED if value == IGNORED else self._class(value, row) for value in values]

    def outputs_for(self, row: Mapping[str, Any]) -> int:
        """One more than its largest class."""
        return 1 + max([0, *self._words(row)[1]])

    def content(self, row: Mapping[str, Any]) -> Any:
        """The words, with blanks between them."""
        words = super().content(row)
        return words if isinstance(words, str) else " ".join(words)

    def _numbers(self, batch: Batch) -> Tensor:
        numbers = torch.bincount(batch["rows"], minlength=len(batch["truncated"]))
        return numbers.to(torch.get_default_dtype())

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The words that count, in their order; their targets are classes, which are no tokens."""
        logits = self._run(call, batch, 3)[batch["rows"], batch["columns"]]
        return Terms(self._cross_entropies(logits, batch["labels"]), batch["rows"], batch["columns"])
