"""A task's per-example losses: masked, causal and bidirectional LM, classification of texts and of images.

An objective is any object with two methods: `collate(rows) -> batch`, where rows are dicts that carry `example_id`
and a batch is a dict of tensors, and `losses(call, batch) -> (sums, counts)`, both of shape (B,), where
`call(**inputs)` runs the model with the parameters under study. ℓ_i is the *sum* over the counted terms of example i,
so that the stage's objective is Σ ℓ_i / Σ counts: one division at the end, never a mean of batch means. A third
method, `counts(batch)`, is optional and spares a forward pass where only N is wanted. An attribute `text_column` names
the text by whose length rows are put into batches. On a GPU `collate` is called by another thread, one call at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from . import pixels
from .errors import InputError

# In files of their own; loaded on first use, since they take this one's helpers.
_HOMES = {"SkipGram": ".skipgram"}

Batch = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _texts(rows: Rows, column: str) -> list[str]:
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


def _tokenize(tokenizer, texts: list[str], max_length: int | None, **settings) -> tuple[Batch, Tensor]:
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
    return _tokenize(objective.tokenizer, _texts(rows, objective.text_column), objective.max_length)[0]


def ordinary_tokens(tokenizer, encoded: Batch) -> np.ndarray:
    """Where the tokens of `_tokenize` are neither padding nor special, (B, T)."""
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


def _reduce(sums: Tensor, counts: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """ "token" keeps sums and counts; "example" turns each example into its mean with weight one."""
    if reduction == "example":
        return sums / counts.clamp(min=1), (counts > 0).to(counts)
    return sums, counts


def _check_reduction(reduction: str) -> None:
    if reduction not in ("token", "example"):
        raise InputError(
            f"reduction is {reduction!r}; expected 'token' (one weight a token) or 'example' (one an example)."
        )


def _logits(output, objective: str, dimensions: int) -> Tensor:
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


@dataclass(frozen=True)
class MaskedLM:
    """Masked language modelling with masks that are a pure function of (seed, example id, draw).

    ℓ_i = (1/D) Σ_draws Σ_masked −log p(token | masked sentence). Of a sentence's n ordinary tokens max(1, round(p·n))
    are chosen; of these 80 % become `[MASK]`, 10 % a random token, 10 % stay (Devlin et al., 2019). The head runs on
    them only.

    Args:
        tokenizer: a tokenizer with a mask token.
        seed: of the masks.
        mask_probability: p.
        draws: D, masks a sentence whose losses are averaged (variance of the score falls as 1/D, cost grows as D).
        first_draw: number of the first draw; training counts it up with the epochs.
        static: training keeps the same masks in every epoch instead.
        max_length: longer sentences are cut (and counted); default: the tokenizer's limit.
        reduction: "token" (N counts masked tokens, as Hugging Face trains) or "example".
        text_column: where the sentence is.
    """

    tokenizer: Any
    seed: int = 0
    mask_probability: float = 0.15
    draws: int = 1
    first_draw: int = 0
    static: bool = False
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"

    def __post_init__(self):
        _check_reduction(self.reduction)
        if self.tokenizer.mask_token_id is None:
            raise InputError(
                "MaskedLM needs a tokenizer with a mask token; this one has none: use CausalLM for this model."
            )
        if not 0 < self.mask_probability <= 1 or self.draws < 1:
            raise InputError(
                f"MaskedLM got mask_probability={self.mask_probability} and draws={self.draws}; expected a "
                "probability in (0, 1] and at least one draw."
            )

    def collate(self, rows: Rows) -> Batch:
        encoded, truncated = _tokenize(self.tokenizer, _texts(rows, self.text_column), self.max_length)
        ids, vocabulary = encoded["input_ids"].numpy(), len(self.tokenizer)
        inputs = np.repeat(ids, self.draws, axis=0)
        lines, columns, actions, substitutes = [], [], [], []
        for i, (row, ordinary) in enumerate(zip(rows, ordinary_tokens(self.tokenizer, encoded), strict=True)):
            (candidates,) = ordinary.nonzero()
            if len(candidates) == 0:
                continue
            number = max(1, round(self.mask_probability * len(candidates)))
            for d in range(self.draws):
                generator = seeded(self.seed, row["example_id"], self.first_draw + d)
                lines += [i * self.draws + d] * number
                columns.append(np.sort(generator.choice(candidates, size=number, replace=False)))
                actions.append(generator.random(number))
                substitutes.append(generator.integers(vocabulary, size=number))
        where = np.array(lines, dtype=np.int64), np.concatenate([np.zeros(0, dtype=np.int64), *columns])
        labels = inputs[where]
        if columns:
            action, substitute = np.concatenate(actions), np.concatenate(substitutes)
            mask = self.tokenizer.mask_token_id
            inputs[where] = np.where(action < 0.8, mask, np.where(action < 0.9, substitute, labels))
        batch = {key: value.repeat_interleave(self.draws, dim=0) for key, value in encoded.items()}
        batch["input_ids"] = torch.from_numpy(inputs)
        batch |= {"rows": torch.from_numpy(where[0]), "columns": torch.from_numpy(where[1])}
        return batch | {"labels": torch.from_numpy(labels), "truncated": truncated}

    def _raw_counts(self, batch: Batch) -> Tensor:
        size = batch["input_ids"].shape[0]
        counted = torch.bincount(batch["rows"], minlength=size).to(torch.get_default_dtype())
        return counted.view(-1, self.draws).mean(1)

    def counts(self, batch: Batch) -> Tensor:
        counts = self._raw_counts(batch)
        return _reduce(torch.zeros_like(counts), counts, self.reduction)[1]

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        logits = _logits(call(**inputs, positions=(batch["rows"], batch["columns"])), "MaskedLM", 2)
        terms = cross_entropy(logits, batch["labels"], reduction="none")
        sums = terms.new_zeros(batch["input_ids"].shape[0]).index_add(0, batch["rows"], terms)
        counts = self._raw_counts(batch).to(sums.dtype)
        return _reduce(sums.view(-1, self.draws).mean(1), counts, self.reduction)


def of_epoch(objective: Any, epoch: int) -> Any:
    """The objective with the masks of an epoch of training, where it has masks that are not static."""
    if not hasattr(objective, "first_draw") or getattr(objective, "static", False):
        return objective
    return replace(objective, first_draw=objective.first_draw + epoch * objective.draws)


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction: ℓ_i = Σ_t −log p(token_t | tokens before it), over the real tokens after the first.

    Arguments as in `MaskedLM`.
    """

    tokenizer: Any
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"

    def __post_init__(self):
        _check_reduction(self.reduction)

    def collate(self, rows: Rows) -> Batch:
        batch, truncated = _tokenize(self.tokenizer, _texts(rows, self.text_column), self.max_length)
        return batch | {"truncated": truncated}

    def counts(self, batch: Batch) -> Tensor:
        counts = batch["attention_mask"][:, 1:].sum(1).to(torch.get_default_dtype())
        return _reduce(torch.zeros_like(counts), counts, self.reduction)[1]

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = _logits(call(input_ids=ids, attention_mask=mask), "CausalLM", 3)
        terms = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        sums = (terms * mask[:, 1:]).sum(1)
        return _reduce(sums, mask[:, 1:].sum(1).to(sums.dtype), self.reduction)


@dataclass(frozen=True)
class BidirectionalLM:
    """Both neighbours of every token, ELMo's task: ℓ_i = Σ_t −log p(token_t | all before it) − log p(token_t | all
    after it), each over the full vocabulary, a sentence's end as the last target of either direction.

    A sentence of n words has 2 (n + 1) terms. Where no derivative goes backward, the logits are not kept.

    Args:
        tokenizer: an `ElmoTokenizer` with a vocabulary of words.
        max_length: longer sentences are cut (and counted), ends included; default: none is.
        reduction, text_column: as in `MaskedLM`.
    """

    tokenizer: Any
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"

    def __post_init__(self):
        _check_reduction(self.reduction)
        if not getattr(self.tokenizer, "words", None):
            raise InputError(
                f"BidirectionalLM got a {type(self.tokenizer).__name__} without words to predict; expected an "
                "ElmoTokenizer with a vocabulary: build one with ElmoTokenizer.train, or `python -m "
                "hf_msif.models.elmo.vocabulary`."
            )

    def collate(self, rows: Rows) -> Batch:
        texts = _texts(rows, self.text_column)
        batch, truncated = _tokenize(self.tokenizer, texts, self.max_length, return_labels=True)
        return batch | {"truncated": truncated}

    def counts(self, batch: Batch) -> Tensor:
        counts = 2 * batch["attention_mask"][:, 1:].sum(1).to(torch.get_default_dtype())
        return _reduce(torch.zeros_like(counts), counts, self.reduction)[1]

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        output, real = call(**inputs, output_logits=torch.is_grad_enabled()), batch["attention_mask"][:, 1:].bool()
        terms = getattr(output, "losses", None)
        if terms is None:
            logits = _logits(output, "BidirectionalLM", 3)
            targets = torch.stack([batch["labels"][:, 1:][real], batch["labels"][:, :-1][real]])
            terms = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        sums = terms.new_zeros(len(real)).index_add(0, real.nonzero()[:, 0], terms.sum(0))
        return _reduce(sums, 2 * real.sum(1).to(sums), self.reduction)


class _Classification:
    """What the classification of texts and of images share: one label an example, cross-entropy, count one."""

    def _labels(self, rows: Rows) -> Tensor:
        return torch.tensor([self._label(row) for row in rows])

    def _label(self, row: Mapping[str, Any]) -> int:
        if self.label_column not in row:
            raise InputError(
                f"the rows have no label column {self.label_column!r}; they have {sorted(row)}: pass label_column=."
            )
        value = row[self.label_column]
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, bool):
            if self.labels and value in self.labels:
                return list(self.labels).index(value)
            if isinstance(value, int) and not any(isinstance(label, int) for label in self.labels or ()):
                return value
        raise InputError(
            f"row {row.get('example_id')!r} has the label {value!r}; expected an integer or one of "
            f"{list(self.labels or [])}: pass labels=[...] in the order of the model's classes."
        )

    def _run(self, call: Callable, batch: Batch) -> Tensor:
        inputs = {k: batch[k] for k in self.inputs if k in batch}
        return _logits(call(**inputs), type(self).__name__, 2)

    def counts(self, batch: Batch) -> Tensor:
        return torch.ones(batch["labels"].shape[0])

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self._run(call, batch)
        classes = logits.shape[1]
        if batch["labels"].max() >= classes or batch["labels"].min() < 0:
            raise InputError(
                f"labels run from {int(batch['labels'].min())} to {int(batch['labels'].max())}, but the model has "
                f"{classes} classes: set num_labels when loading it, or renumber the labels from 0."
            )
        sums = cross_entropy(logits, batch["labels"], reduction="none")
        return sums, torch.ones_like(sums)

    def predictions(self, call: Callable, batch: Batch) -> Tensor:
        """The class with the largest logit, (B,)."""
        return self._run(call, batch).argmax(1)


@dataclass(frozen=True)
class SequenceClassification(_Classification):
    """Classification of a whole text: ℓ_i = −log p(label | text), count one.

    Args:
        tokenizer: the model's tokenizer.
        label_column: where the label is: an integer, or what `labels` lists.
        labels: the classes in the order of the logits; needed for strings, and for integers that are not 0, 1, ….
        max_length, text_column: as in `MaskedLM`.
    """

    tokenizer: Any
    label_column: str = "label"
    labels: tuple[str | int, ...] | None = None
    max_length: int | None = None
    text_column: str = "text"

    inputs: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids")

    def collate(self, rows: Rows) -> Batch:
        labels = self._labels(rows)
        batch, truncated = _tokenize(self.tokenizer, _texts(rows, self.text_column), self.max_length)
        return batch | {"labels": labels, "truncated": truncated}


@dataclass(frozen=True)
class ImageClassification(_Classification):
    """Classification of an image: ℓ_i = −log p(label | image), count one.

    Images are PIL images, encoded bytes, arrays or nested lists of shape (H, W), (H, W, C) or (C, H, W). The batch
    has `pixel_values` of shape (B, C, H, W), from `processor` where one is given, otherwise (scale · image − mean) /
    std.

    Args:
        processor: a Hugging Face image processor (`AutoImageProcessor.from_pretrained(...)`); `scale`, `mean` and
            `std` are then its own affair. Its own random augmentation, if it has any, must be switched off.
        image_column: where the image is.
        label_column, labels: as in `SequenceClassification`.
        scale: factor of the raw numbers; 1/255 for bytes.
        mean, std: a number, or one a channel.
        mode: PIL mode to convert to ("RGB" also gives grey arrays three channels); None leaves images as they are.
        shrink: sides of an image become so many times shorter, each number the mean over a square; borders that make
            no whole square are cut.
        dtype: of the pixels; "float64" for a model in float64 that does not convert its input.

    >>> objective = ImageClassification(scale=0.5, mean=1.0, std=2.0)
    >>> batch = objective.collate([{"example_id": 0, "image": [[0, 2], [4, 6]], "label": 1}])
    >>> batch["pixel_values"].shape, batch["pixel_values"].flatten().tolist()
    (torch.Size([1, 1, 2, 2]), [-0.5, 0.0, 0.5, 1.0])
    """

    processor: Any = None
    image_column: str = "image"
    label_column: str = "label"
    labels: tuple[str | int, ...] | None = None
    scale: float = 1 / 255
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    mode: str | None = None
    shrink: int = 1
    dtype: str = "float32"

    inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def __post_init__(self):
        if self.dtype not in ("float32", "float64"):
            raise InputError(f"ImageClassification(dtype={self.dtype!r}): expected 'float32' or 'float64'.")
        if self.shrink < 1 or (self.shrink > 1 and self.processor is not None):
            raise InputError(f"ImageClassification(shrink={self.shrink}): expected 1 or more, and 1 with a processor.")
        if np.any(np.asarray(self.std) <= 0) or not self.scale:
            raise InputError(
                f"ImageClassification got scale={self.scale} and std={self.std}; expected numbers other than 0, and "
                "positive standard deviations."
            )

    def collate(self, rows: Rows) -> Batch:
        labels = self._labels(rows)
        if self.image_column not in rows[0]:
            raise InputError(
                f"the rows have no column {self.image_column!r}; they have {sorted(rows[0])}: pass image_column=."
            )
        ids = [row.get("example_id") for row in rows]
        images = [pixels.decoded(row[self.image_column], self.mode, i) for row, i in zip(rows, ids, strict=True)]
        if self.processor is not None:
            values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        else:
            arrays = [self._normalised(pixels.channels_first(image, i)) for image, i in zip(images, ids, strict=True)]
            for array, i in zip(arrays, ids, strict=True):
                if array.shape != arrays[0].shape:
                    raise InputError(
                        f"row {i!r} has an image of (channels, height, width) {array.shape}, row {ids[0]!r} one of "
                        f"{arrays[0].shape}: give a processor that resizes, or mode='RGB' where only channels differ."
                    )
            values = torch.from_numpy(np.stack(arrays))
        return {"pixel_values": values.to(getattr(torch, self.dtype)), "labels": labels}

    def _normalised(self, array: np.ndarray) -> np.ndarray:
        mean, std = (np.reshape(np.asarray(x, dtype=np.float64), (-1, 1, 1)) for x in (self.mean, self.std))
        for name, value in (("mean", mean), ("std", std)):
            if len(value) not in (1, len(array)):
                raise InputError(
                    f"ImageClassification has {len(value)} values of {name}, but the images have {len(array)} "
                    "channels: give one number, or one a channel."
                )
        return (self.scale * pixels.shrunk(array, self.shrink) - mean) / std
