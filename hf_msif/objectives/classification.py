"""Classification of texts, of pairs of texts and of images: one label per example."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import InputError
from ._base import Batch, LabelKind, Objective, Rows, Terms, logits_of
from .images import channels_first, decoded, shrunk
from .tokens import check_length, encode


def class_of(value: Any, labels: Sequence[str | int] | None) -> int | None:
    """The number of the class that a value of the label column names; None where it names none.

    A value is a listed label if both read the same: 0 is "0". Other integers are numbers of classes, unless a listed
    label reads as an integer: then the labels say which there are.

    >>> class_of(0, ("1", "0")), class_of(1, ("Negative", "Positive")), class_of(0, ("1", "2"))
    (1, 1, None)
    """
    value = value.item() if isinstance(value, np.generic) else value
    names = [str(label) for label in labels or ()]
    if str(value) in names:
        return names.index(str(value))
    if isinstance(value, bool):
        return None
    if value in (labels or ()):  # 1.0 is 1
        return list(labels or ()).index(value)
    return value if isinstance(value, int) and not any(re.fullmatch(r"[+-]?\d+", name) for name in names) else None


# Which objective has the loss of a model's `problem_type`.
OF_PROBLEM = {
    "single_label_classification": "SequenceClassification",
    "regression": "Regression",
    "multi_label_classification": "MultiLabel",
}


def check_problem(model: Any, objective: str, problem: str, loss: str) -> None:
    """Raises an `InputError` where `config.problem_type` of a model is that of another loss."""
    found = getattr(getattr(model, "config", None), "problem_type", None)
    if found not in (None, problem):
        other = f"objectives.{OF_PROBLEM[found]}" if found in OF_PROBLEM else "an objective of your own"
        raise InputError(
            f"the model was made for problem_type={found!r}; {objective} expects {problem!r}, whose loss is {loss}: "
            f"give a model with such a head, or {other}, which has the loss that trained this one."
        )


def label_in(row: Mapping[str, Any], column: str) -> Any:
    """What a row's label column holds.

    Raises:
        InputError: the row has no such column.
    """
    if column not in row:
        raise InputError(f"the rows have no label column {column!r}; they have {sorted(row)}: pass label_column=.")
    return row[column]


def class_names(objective: Objective, model: Any) -> list[str] | None:
    """Names of the classes in the order of the logits: the objective's `labels`, else those in the model's
    configuration; None where neither has names."""
    if objective.labels:
        return [str(label) for label in objective.labels]
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(named.get(i)) for i in range(len(named))]
    return names if any(name != f"LABEL_{i}" for i, name in enumerate(names)) else None


def label_name(number: int, names: Sequence[str] | None) -> str:
    """The name of a class; its number where it has none.

    >>> label_name(1, ["Negative", "Positive"]), label_name(3, None)
    ('Positive', '3')
    """
    return names[number] if names is not None and 0 <= number < len(names) else str(number)


class _Classification(Objective):
    """What all classifications share: the classes of the model, and those of the rows."""

    label_kind: ClassVar[LabelKind | None] = "class"
    problem: ClassVar[str] = "single_label_classification"
    loss_name: ClassVar[str] = "softmax cross-entropy"
    label_column: str
    inputs: tuple[str, ...]

    def check_model(self, model: Any) -> None:
        """Compares the head, as `model.config` describes it, with the classes of the objective.

        Raises:
            InputError: `problem_type` is that of another loss; the number of classes is not that of `labels`, or below
                2; or `id2label` has the classes in another order. (Names such as LABEL_0 say nothing of the order.)
        """
        config = getattr(model, "config", None)
        check_problem(model, type(self).__name__, self.problem, self.loss_name)
        classes, names = getattr(config, "num_labels", None), getattr(config, "id2label", None) or {}
        if classes is not None:
            self._check_classes(classes)
        ours = [str(label) for label in self.labels or ()]
        theirs = [str(names.get(i)) for i in range(len(ours))]
        folded = [name.casefold() for name in theirs]
        for i, label in enumerate(ours):
            if label.casefold() in folded and folded[i] != label.casefold() and theirs[i] != f"LABEL_{i}":
                raise InputError(
                    f"labels lists the classes as {ours}, but the model's id2label has them as {theirs}; expected the "
                    "order of the model's classes."
                )

    def _check_classes(self, classes: int) -> None:
        """Raises where a head with as many classes cannot be that of `labels`."""
        if classes < 2:
            raise InputError(
                f"the model has {classes} class, and the softmax over one class is always 1; {type(self).__name__} "
                "expects at least 2: set num_labels when making the model, or take objectives.Regression, whose head "
                "has one output."
            )
        self._check_number(classes)

    def _check_number(self, classes: int) -> None:
        if self.labels and len(self.labels) != classes:
            raise InputError(
                f"labels lists {len(self.labels)} classes, {list(self.labels)}, but the model has {classes}; expected "
                "all classes in the order of the model's: list them, or set num_labels when making the model."
            )

    def _check_labels(self) -> None:
        """Raises where `labels` cannot be a list of classes."""
        labels, what = self.labels, type(self).__name__
        if labels is None:
            return
        if isinstance(labels, str) or len(labels) < 2:
            raise InputError(
                f"{what} got labels={labels!r}; expected all classes, at least 2, in the order of the model's."
            )
        names = [str(label) for label in labels]  # a row's 0 is "0"
        repeated = [label for i, label in enumerate(labels) if names[i] in names[:i]]
        if repeated:
            raise InputError(
                f"{what} got labels={list(labels)}, which has {repeated[0]!r} twice; expected each class once, in the "
                "order of the model's."
            )

    def _labels(self, rows: Rows) -> Tensor:
        return torch.tensor([self._label(row) for row in rows])

    def _label(self, row: Mapping[str, Any]) -> int:
        return self._class(label_in(row, self.label_column), row)

    def _class(self, value: Any, row: Mapping[str, Any]) -> int:
        """The class that a value in a row's label column names."""
        value = value.item() if isinstance(value, (np.generic, Tensor)) and value.ndim == 0 else value
        number = class_of(value, self.labels)
        if number is not None:
            return number
        raise InputError(
            f"row {row.get('example_id')!r} has the label {value!r}; expected an integer or one of "
            f"{list(self.labels or [])}: pass labels=[...] in the order of the model's classes."
        )

    def _run(self, call: Callable, batch: Batch, dimensions: int = 2) -> Tensor:
        inputs = {k: batch[k] for k in self.inputs if k in batch}
        return logits_of(call(**inputs), type(self).__name__, dimensions)

    def _cross_entropies(self, logits: Tensor, labels: Tensor) -> Tensor:
        """−log softmax(logits)[label], (M,), of logits (M, C) and labels (M,), which are compared with the head."""
        classes = logits.shape[1]
        self._check_classes(classes)
        if labels.numel() and (labels.max() >= classes or labels.min() < 0):
            raise InputError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes: "
                "set num_labels when loading it, or renumber the labels from 0."
            )
        return cross_entropy(logits, labels, reduction="none")


class _OfExamples(_Classification):
    """What the classification of texts and of images share: one label per example, cross-entropy, count one."""

    def counts(self, batch: Batch) -> Tensor:
        return torch.ones(batch["labels"].shape[0])

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        sums = self._cross_entropies(self._run(call, batch), batch["labels"])
        return sums, torch.ones_like(sums)

    def terms(self, call: Callable, batch: Batch) -> Terms:
        """The one term of each example."""
        losses, _ = self.losses(call, batch)
        return Terms(losses, torch.arange(len(losses), device=losses.device))

    def logits(self, call: Callable, batch: Batch) -> Tensor:
        """The logits of all classes, (B, C)."""
        return self._run(call, batch)

    def predictions(self, call: Callable, batch: Batch) -> Tensor:
        """The class with the largest logit, (B,)."""
        return self._run(call, batch).argmax(1)


def pair_content(text: Any, row: Mapping[str, Any], column: str | None) -> Any:
    """A text with that of the row's second column after it, which need not be there."""
    return text if column is None or column not in row else f"{text} | {row[column]}"


@dataclass(frozen=True)
class SequenceClassification(_OfExamples):
    """Classification of a whole text, or of a pair of texts: ℓ_i = −log p(label | text), count one.

    Args:
        tokenizer: the model's tokenizer.
        label_column: where the label is: an integer, or what `labels` lists.
        labels: the classes in the order of the logits; needed for strings, and for integers that are not 0, 1, ….
        max_length: tokens after which a text is cut, and counted as truncated; defaults to the tokenizer's limit.
        text_column: where the text is. Rows without this column may hold `input_ids`, tokenised already.
        text_pair_column: where the second text of a pair is (a hypothesis, an answer); None: texts have no second.

    Raises:
        InputError: fewer than 2 `labels`, or one of them twice; a row without a text, or with a label that is neither
            an integer nor one of `labels`; a model whose head has other classes; a `max_length` (or limit of the
            tokenizer) without room for an ordinary token.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    label_column: str = "label"
    labels: tuple[str | int, ...] | None = None
    max_length: int | None = None
    text_column: str = "text"
    text_pair_column: str | None = None

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def __post_init__(self):
        self._check_labels()
        check_length(self.tokenizer, self.max_length, "SequenceClassification")

    def collate(self, rows: Rows) -> Batch:
        labels = self._labels(rows)
        batch, truncated = encode(self, rows, self.text_pair_column)
        return batch | {"labels": labels, "truncated": truncated}

    def content(self, row: Mapping[str, Any]) -> Any:
        """The text; of a pair both, with a bar between them."""
        return pair_content(super().content(row), row, self.text_pair_column)


@dataclass(frozen=True)
class ImageClassification(_OfExamples):
    """Classification of an image: ℓ_i = −log p(label | image), count one.

    Images are PIL images, encoded bytes, arrays or nested lists of shape (H, W), (H, W, C) or (C, H, W). The batch
    has `pixel_values` of shape (B, C, H, W), from `processor` where one is given, otherwise (scale · image − mean) /
    std.

    Args:
        processor: a Hugging Face image processor (`AutoImageProcessor.from_pretrained(...)`), which then scales and
            normalises in the place of `scale`, `mean` and `std`. Random augmentation must be switched off in it.
        image_column: where the image is.
        label_column: where the label is: an integer, or what `labels` lists.
        labels: the classes in the order of the logits; needed for strings, and for integers that are not 0, 1, ….
        scale: factor of the raw numbers; 1/255 for bytes.
        mean, std: one number, or one per channel.
        mode: PIL mode to convert to ("RGB" also gives grey arrays three channels); None leaves images as they are.
        shrink: factor by which both sides of an image become shorter; each new pixel is the mean over a square of
            shrink × shrink pixels, and borders that make no whole square are cut.
        dtype: of the pixels, "float32" or "float64"; "float64" for a model in float64 that does not convert its input.

    Raises:
        InputError: settings out of range, fewer than 2 `labels`, or one of them twice; a row that holds no image,
            images of different sizes without a processor, or a label that is neither an integer nor one of `labels`;
            a model whose head has other classes.

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

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    text_column = None
    inputs = ("pixel_values",)

    def __post_init__(self):
        self._check_labels()
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
        images = [decoded(row[self.image_column], self.mode, i) for row, i in zip(rows, ids, strict=True)]
        if self.processor is not None:
            values = self.processor(images=images, return_tensors="pt")["pixel_values"]
        else:
            arrays = [self._normalised(channels_first(image, i)) for image, i in zip(images, ids, strict=True)]
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
                    "channels: give one number, or one per channel."
                )
        return (self.scale * shrunk(array, self.shrink) - mean) / std
