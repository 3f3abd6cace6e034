"""Texts of rows as padded tokens, which of those tokens are ordinary, and the random numbers of an example."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._base import Batch, Objective, Rows


def texts_of(rows: Rows, column: str | None) -> list[str]:
    """The texts of the rows.

    Raises:
        InputError: there is no such column, or a row holds something other than a string.
    """
    if column is None or column not in rows[0]:
        raise InputError(f"the rows have no column {column!r}; they have {sorted(rows[0])}: name the text column.")
    texts = [row[column] for row in rows]
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise InputError(
                f"row {row.get('example_id')!r} has {text!r} in column {column!r}; expected a string: drop or fill "
                "such rows."
            )
    return texts


def check_length(tokenizer: Any, max_length: int | None, objective: str, ordinary: int = 1, tokens: int = 1) -> None:
    """Checks that texts are not cut to nothing.

    Args:
        tokenizer: adds `num_special_tokens_to_add()` special tokens to a text, where it has this method.
        max_length: tokens after which a text is cut; None: the tokenizer's own limit.
        objective: name of the objective's class, for the message.
        ordinary: least number of ordinary tokens that the objective needs beside the special ones.
        tokens: least number of tokens in all.

    Raises:
        InputError: the limit leaves no room for them.
    """
    limit = getattr(tokenizer, "model_max_length", None) if max_length is None else max_length
    special = tokenizer.num_special_tokens_to_add() if hasattr(tokenizer, "num_special_tokens_to_add") else 0
    least = max(special + ordinary, tokens)
    if limit is not None and limit < least:
        what = "the tokenizer's model_max_length" if max_length is None else "max_length"
        raise InputError(
            f"{objective}: {what} is {limit}; expected at least {least} tokens, since the tokenizer adds {special} to "
            f"a text: give max_length={least} or more."
        )


def tokenize(tokenizer, texts: list[str], max_length: int | None, **settings) -> tuple[Batch, Tensor]:
    """Right-padded token ids, (B, T), or (B, T, C) where a token is a list of C characters; and which rows were cut,
    (B,).

    Left padding would shift the absolute positions of a sentence by the length of its neighbours in the batch.
    """
    limit = tokenizer.model_max_length if max_length is None else max_length
    settings["return_attention_mask"] = True  # it tells tokens from padding, also where the model reads none
    encoded = tokenizer(texts, truncation=False, padding=False, verbose=False, **settings)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    truncated = torch.from_numpy(lengths > limit)
    if truncated.any():
        encoded = tokenizer(texts, truncation=True, max_length=limit, padding=False, **settings)
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    if "truncated" in encoded:  # the tokenizer cut characters inside a word
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


def tokenized(objective: Objective, rows: Rows) -> Batch:
    """The unmasked texts of rows as the model of an objective with a tokenizer reads them: ids and attention masks."""
    return tokenize(objective.tokenizer, texts_of(rows, objective.text_column), objective.max_length)[0]


def ordinary_tokens(tokenizer, encoded: Batch) -> np.ndarray:
    """Which tokens of `tokenize` are neither padding nor special, (B, T)."""
    ids, real = encoded["input_ids"].numpy(), encoded["attention_mask"].numpy().astype(bool)
    ordinary = ~np.isin(ids, np.array(tokenizer.all_special_ids, dtype=ids.dtype))
    # An unknown word is a token of the sentence like any other: it is predicted too.
    if tokenizer.unk_token_id is not None:
        ordinary |= ids == tokenizer.unk_token_id
    return ordinary & real


def seeded(seed: int, example_id: Any, draw: int) -> np.random.Generator:
    """A generator of random numbers that depends on the seed, the example and the number of the draw alone."""
    digest = hashlib.sha256(f"{seed}\x1f{example_id}\x1f{draw}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
