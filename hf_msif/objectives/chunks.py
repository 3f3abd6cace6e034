"""Rows as windows of tokens: one window per row, or a long document in strided chunks that count each token once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._base import Batch, Objective, Rows, SumOfTerms
from .tokens import are_tokenized, encode, padded, texts_of, token_ids


class Windows(NamedTuple):
    """The windows of all rows of a batch, one row's after another's.

    Attributes:
        batch: what the model reads, (I, T).
        truncated: (B,) which rows were cut.
        owners: (I,) the row of each window.
        counted: (I, T) the tokens that a window adds to its row: in the first window all, in a later one those that
            the window before did not have.
        starts: (I,) how many tokens of the row stand before the first place of the window.
        kept: (I,) whether the window is in the batch: a row of one chunk (`chunk_rows`) has that window alone.
    """

    batch: Batch
    truncated: Tensor
    owners: np.ndarray
    counted: np.ndarray
    starts: np.ndarray
    kept: np.ndarray


def one_window_per_row(batch: Batch, truncated: Tensor) -> Windows:
    """The windows of rows that are cut to one each, all of whose tokens count."""
    size = len(truncated)
    counted = batch["attention_mask"].numpy().astype(bool)
    return Windows(batch, truncated, np.arange(size), counted, np.zeros(size, int), np.ones(size, bool))


class InChunks(SumOfTerms):
    """A language model's objective with the fields `chunk` and `stride`: tokens of a window, special ones included,
    and how many of them the window has in common with the one before.

    The loss of a document is the sum over its chunks, ℓ = Σ_c ℓ_c, and ℓ_c sums over the tokens that chunk c has and
    the chunks before it have not: each token counts once.
    """

    chunk: int | None = None
    stride: int = 0
    least_stride: ClassVar[int] = 0

    def _check_chunk(self) -> None:
        if self.chunk is None:
            return
        what, special = f"{type(self).__name__} got chunk={self.chunk} and stride={self.stride}", self._special
        if self.max_length is not None:
            raise InputError(
                f"{what} and max_length={self.max_length}; expected one of chunk and max_length: a document in chunks "
                "is read whole."
            )
        if not self.least_stride <= self.stride < self.chunk - special:
            raise InputError(
                f"{what}; expected a stride from {self.least_stride} to below chunk − {special}, the tokens of a text "
                "in a window: the stride is what a window has in common with the one before."
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{what}, but {type(self.tokenizer).__name__} cuts no text into overlapping windows; expected a fast "
                "tokenizer, or rows with 'input_ids'."
            )

    @property
    def _special(self) -> int:
        tokenizer = self.tokenizer
        return tokenizer.num_special_tokens_to_add() if hasattr(tokenizer, "num_special_tokens_to_add") else 0

    def content(self, row: Mapping[str, Any]) -> Any:
        """The text of a row; of one chunk that of its window."""
        if self.chunk is None or "chunk" not in row:
            return super().content(row)
        found = self._windows([row])
        (ids,) = found.batch["input_ids"][found.kept]
        return self.tokenizer.decode(
            ids[found.batch["attention_mask"][found.kept][0].bool()], skip_special_tokens=True
        )

    def _windows(self, rows: Rows) -> Windows:
        if self.chunk is not None:
            return _chunks(self, rows, self.chunk, self.stride)
        return one_window_per_row(*encode(self, rows))


def chunk_rows(objective: Objective, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every chunk of documents, to be scored by itself: the scores of a document's chunks add up to its own.

    The row has the columns of the document, the `example_id` "DOCUMENT#NUMBER", and `document` and `chunk`, by which
    the objective reads that chunk alone. A stage whose documents are longer than one batch allows takes such rows as
    its data: F stays what it is.

    Args:
        objective: a `MaskedLM` or `CausalLM` with a `chunk`.
        rows: documents, each with its `example_id`.

    Raises:
        InputError: an objective without a `chunk`.
    """
    if not isinstance(objective, InChunks) or objective.chunk is None:
        raise InputError(f"{type(objective).__name__} has no chunk; expected one with chunk=..., stride=....")
    made = []
    for row in rows:
        (number,) = objective._windows([row]).kept.shape
        made += [
            {**row, "example_id": f"{row['example_id']}#{c}", "document": row["example_id"], "chunk": c}
            for c in range(number)
        ]
    return made


def document_of(row: Mapping[str, Any]) -> Any:
    """The id that seeds a row's random numbers: of a chunk that of its document."""
    return row.get("document", row["example_id"])


def _chunks(objective: InChunks, rows: Rows, chunk: int, stride: int) -> Windows:
    tokenizer, special = objective.tokenizer, objective._special
    if are_tokenized(rows, objective.text_column):
        encoded, owners, special = _slices(token_ids(tokenizer, rows), chunk, stride), None, 0
        owners = np.array(encoded.pop("owners"))
    else:
        encoded = dict(
            tokenizer(
                texts_of(rows, objective.text_column),
                truncation=True,
                max_length=chunk,
                stride=stride,
                padding=False,
                return_attention_mask=True,
                return_overflowing_tokens=True,
                return_special_tokens_mask=True,
            )
        )
        owners = np.array(encoded["overflow_to_sample_mapping"])
    batch = padded(tokenizer, encoded)
    first = np.r_[True, owners[1:] != owners[:-1]]
    last = np.r_[first[1:], True]
    numbers = np.arange(len(owners)) - np.maximum.accumulate(np.where(first, np.arange(len(owners)), 0))
    counted = np.zeros(batch["input_ids"].shape, bool)
    for i, ids in enumerate(encoded["input_ids"]):
        marks = encoded["special_tokens_mask"][i] if "special_tokens_mask" in encoded else [0] * len(ids)
        (places,) = np.nonzero(np.array(marks) == 0)
        begin = 0 if first[i] or not len(places) else places[min(stride, len(places) - 1)]
        end = len(ids) if last[i] or not len(places) else places[-1] + 1
        counted[i, begin:end] = True
    kept = np.array(
        [rows[owner].get("chunk", number) == number for owner, number in zip(owners, numbers, strict=True)]
    )
    for i, row in enumerate(rows):
        if not kept[owners == i].any():
            raise InputError(
                f"row {row.get('example_id')!r} is chunk {row['chunk']!r} of its document, which has "
                f"{(owners == i).sum()} chunks: make the rows again with objectives.chunk_rows."
            )
    starts = numbers * (chunk - special - stride)
    return Windows(batch, torch.zeros(len(rows), dtype=torch.bool), owners, counted, starts, kept)


def _slices(encoded: dict[str, list[list[int]]], chunk: int, stride: int) -> dict[str, list]:
    """Windows of rows that are tokenised already, and the row of each as `owners`."""
    slices: dict[str, list] = {key: [] for key in (*encoded, "owners")}
    for owner, ids in enumerate(encoded["input_ids"]):
        for start in range(0, max(1, len(ids) - stride), chunk - stride):
            slices["owners"].append(owner)
            for key, values in encoded.items():
                slices[key].append(values[owner][start : start + chunk])
    return slices
