"""Rows as padded tokens, which of those tokens are ordinary, and the random numbers of an example."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
        raise InputError(
            f"the rows have no column {column!r}; they have {sorted(rows[0])}: name the text column, or give rows "
            "with 'input_ids'."
        )
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


def tokenize(
    tokenizer, texts: list[str], max_length: int | None, pairs: list[str] | None = None, **settings
) -> tuple[Batch, Tensor]:
    """Right-padded token ids, (B, T), or (B, T, C) where a token is a list of C characters; and which rows were cut,
    (B,).

    Left padding would shift the absolute positions of a sentence by the length of its neighbours in the batch.

    Args:
        tokenizer: of the texts.
        texts: one per row.
        max_length: tokens after which a row is cut; None: the tokenizer's own limit.
        pairs: a second text per row, which the tokenizer puts after the first; of a pair that is too long, the longer
            text is cut.
        settings: of the tokenizer's call.
    """
    limit = tokenizer.model_max_length if max_length is None else max_length
    both = (texts,) if pairs is None else (texts, pairs)
    settings["return_attention_mask"] = True  # it tells tokens from padding, also where the model reads none
    encoded = tokenizer(*both, truncation=False, padding=False, verbose=False, **settings)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    truncated = torch.from_numpy(lengths > limit)
    if truncated.any():
        encoded = tokenizer(*both, truncation=True, max_length=limit, padding=False, **settings)
    if "truncated" in encoded:  # the tokenizer cut characters inside a word
        truncated |= torch.tensor(encoded["truncated"])
    return padded(tokenizer, encoded), truncated


def padded(tokenizer: Any, encoded: Mapping[str, list]) -> Batch:
    """Lists of one length per row as right-padded tensors: ids, masks, types, and labels where there are some."""
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    real = np.arange(max(1, lengths.max())) < lengths[:, None]
    batch = {}
    for key, fill in (
        ("input_ids", padding_id(tokenizer)),
        ("attention_mask", 0),
        ("token_type_ids", 0),
        ("labels", -100),
    ):
        if key in encoded:
            values = np.array([value for row in encoded[key] for value in row], dtype=np.int64)
            filled = np.full(real.shape + values.shape[1:], fill, dtype=np.int64)
            filled[real] = values
            batch[key] = torch.from_numpy(filled)
    return batch


def padding_id(tokenizer: Any) -> int:
    """The id that stands where a row has no token; no loss reads it."""
    pad = tokenizer.pad_token_id
    return (tokenizer.eos_token_id or 0) if pad is None else pad


def are_tokenized(rows: Rows, column: str | None) -> bool:
    """Whether rows hold token ids in the place of a text: `input_ids`, and no such column."""
    return column not in rows[0] and "input_ids" in rows[0]


def token_ids(tokenizer: Any, rows: Rows) -> dict[str, list[list[int]]]:
    """What rows that are tokenised already hold, as a tokenizer returns it: `input_ids`, `attention_mask`, and
    `token_type_ids` where all have them. Tokens that a row's own `attention_mask` masks are left out.

    Raises:
        InputError: a row without whole numbers, or with one that is the id of no token.
    """
    size = len(tokenizer)
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    has_types = all(row.get("token_type_ids") is not None for row in rows)
    if has_types:
        encoded["token_type_ids"] = []
    for row in rows:
        ids = np.asarray(row.get("input_ids"))
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise InputError(
                f"row {row.get('example_id')!r} has {row.get('input_ids')!r} in 'input_ids'; expected a list of whole "
                "numbers, as a tokenizer makes it of one text."
            )
        wrong = ids[(ids < 0) | (ids >= size)] if ids.size else ids
        if len(wrong):
            raise InputError(
                f"row {row.get('example_id')!r} has the token id {int(wrong[0])} in 'input_ids'; expected ids from 0 "
                f"to {size - 1}, those of the objective's tokenizer: tokenise the rows with this one."
            )
        mask = row.get("attention_mask")
        real = np.ones(len(ids), dtype=bool) if mask is None else np.asarray(mask).astype(bool)
        if real.shape != ids.shape:
            raise InputError(
                f"row {row.get('example_id')!r} has {len(ids)} 'input_ids' and an 'attention_mask' of shape "
                f"{real.shape}; expected one number per token."
            )
        encoded["input_ids"].append(ids[real].tolist())
        encoded["attention_mask"].append([1] * int(real.sum()))
        if has_types:
            encoded["token_type_ids"].append(np.asarray(row["token_type_ids"])[real].tolist())
    return encoded


def encode(objective: Objective, rows: Rows, pair_column: str | None = None, **settings) -> tuple[Batch, Tensor]:
    """The tokens of rows, (B, T), and which rows were cut, (B,): of the objective's texts, or, where rows have no such
    column, of their `input_ids`, to which no special token is added.

    Args:
        objective: has the tokenizer, the text column and the limit.
        rows: of one kind, with texts or with ids.
        pair_column: column of a second text.
        settings: of the tokenizer's call.
    """
    tokenizer, limit = objective.tokenizer, objective.max_length
    if not are_tokenized(rows, objective.text_column):
        texts = texts_of(rows, objective.text_column)
        pairs = None if pair_column is None else texts_of(rows, pair_column)
        return tokenize(tokenizer, texts, limit, pairs, **settings)
    encoded = token_ids(tokenizer, rows)
    limit = int(min(tokenizer.model_max_length if limit is None else limit, 10**9))
    truncated = torch.tensor([len(ids) > limit for ids in encoded["input_ids"]])
    return padded(tokenizer, {key: [row[:limit] for row in values] for key, values in encoded.items()}), truncated


def tokenized(objective: Objective, rows: Rows) -> Batch:
    """The unmasked texts of rows as the model of an objective with a tokenizer reads them: ids and attention masks.
    Words in a list are joined by blanks."""
    column = objective.text_column
    if column is not None and isinstance(rows[0].get(column), (list, tuple)):
        rows = [{**row, column: " ".join(row[column])} for row in rows]
    return encode(objective, rows)[0]


def token_spans(objective: Objective, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
    """The ids of a text's tokens as `collate` reads them, special ones included, and where each stands in the text:
    from which character to before which one, both 0 for a special token. None: the tokenizer does not tell.

    Args:
        objective: has the tokenizer and the limit; a document in windows is not cut.
        text: of one row.
    """
    tokenizer = objective.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        return None
    limit = int(min(tokenizer.model_max_length if objective.max_length is None else objective.max_length, 10**9))
    cut = {} if getattr(objective, "chunk", None) is not None else {"truncation": True, "max_length": limit}
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False, **cut)
    return encoded["input_ids"], encoded["offset_mapping"]


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
