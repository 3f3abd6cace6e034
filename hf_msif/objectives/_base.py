"""What objectives share: texts to padded tokens, random numbers of an example's own, sums and counts, logits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

Batch = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]


def texts_of(rows: Rows, column: str) -> list[str]:
    if column not in rows[0]:
        raise InputError(f"the rows have no column {column!r}; they have {sorted(rows[0])}: name the text column.")
    texts = [row[column] for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(
                f"row {row.get('example_id')!r} has {text!r} in column {column!r}; expected a string: drop or fill "
                "such rows."
            )
    return texts


def tokenize(tokenizer, texts: list[str], max_length: int | None, **settings) -> tuple[Batch, Tensor]:
    """Right-padded token ids (a token may have a list of them, its characters), and which rows were cut.

    Left padding would shift a sentence's absolute positions by the length of its padding partner.
    """
    limit = max_length or tokenizer.model_max_length
    encoded = tokenizer(texts, truncation=False, padding=False, verbose=False, **settings)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    truncated = torch.from_numpy(lengths > limit)
    if truncated.any():
        encoded = tokenizer(texts, truncation=True, max_length=limit, padding=False, **settings)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    if "truncated" in encoded:  # inside of words
        truncated |= torch.tensor(encoded["truncated"])
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    real = np.arange(max(1, lengths.max())) < lengths[:, None]
    batch = {}
    for key, fill in (("input_ids", pad), ("attention_mask", 0), ("token_type_ids", 0), ("labels", -100)):
        if key in encoded:
            values = np.array([value for row in encoded[key] for value in row], dtype=np.int64)
            padded = np.full(real.shape + values.shape[1:], fill, dtype=np.int64)
            padded[real] = values
            batch[key] = torch.from_numpy(padded)
    return batch, truncated


def tokenized(objective: Any, rows: Rows) -> Batch:
    """The whole, unmasked texts of rows as a text objective's model reads them: token ids and their masks."""
    return tokenize(objective.tokenizer, texts_of(rows, objective.text_column), objective.max_length)[0]


def ordinary_tokens(tokenizer, encoded: Batch) -> np.ndarray:
    """Where the tokens of `tokenize` are neither padding nor special, (B, T)."""
    ids, real = encoded["input_ids"].numpy(), encoded["attention_mask"].numpy().astype(bool)
    ordinary = ~np.isin(ids, np.array(tokenizer.all_special_ids, dtype=ids.dtype))
    # The vocabulary's own [UNK] is a token of the sentence like any other: it is predicted too.
    if tokenizer.unk_token_id is not None:
        ordinary |= ids == tokenizer.unk_token_id
    return ordinary & real


def seeded(seed: int, example_id: Any, draw: int) -> np.random.Generator:
    """Random numbers that are a pure function of the three."""
    digest = hashlib.sha256(f"{seed}\x1f{example_id}\x1f{draw}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def reduced(sums: Tensor, counts: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """ "token" keeps sums and counts; "example" turns each example into its mean with weight one."""
    if reduction == "example":
        return sums / counts.clamp(min=1), (counts > 0).to(counts)
    return sums, counts


class SumOfTerms:
    """What objectives share whose `_terms(batch)`, (B,), says how many terms an example's loss sums."""

    def counts(self, batch: Batch) -> Tensor:
        terms = self._terms(batch)
        return reduced(torch.zeros_like(terms), terms, self.reduction)[1]

    def _reduced(self, sums: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return reduced(sums, self._terms(batch).to(sums.dtype), self.reduction)


def check_reduction(reduction: str) -> None:
    if reduction not in ("token", "example"):
        raise InputError(
            f"reduction is {reduction!r}; expected 'token' (one weight a token) or 'example' (one an example)."
        )


def logits_of(output, objective: str, dimensions: int) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise InputError(
            f"{objective} needs a model with its head, but the model returned {type(output).__name__} without "
            "logits: load it with the AutoModelFor... class of the task."
        )
    if logits.dim() != dimensions:
        raise InputError(
            f"{objective} expects logits with {dimensions} dimensions, but the model returned shape "
            f"{tuple(logits.shape)}: its head is that of another task."
        )
    return logits
