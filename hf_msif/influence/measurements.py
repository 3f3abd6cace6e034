"""What a query explains: a number f per test row, by default its loss.

The sign of an influence is that of f: I(x) = ∂f/∂ε > 0 means that more of x *raises* f. Of a loss that is harmful; of
a log-probability or a margin it is the opposite.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.hashing import contents
from ..errors import InputError
from ..objectives import MaskedLM, Objective, with_losses
from ..objectives.classification import class_of

PREDICTED = "predicted"


class Measurement(ABC):
    """A number f(φ) per test row. `str` of it is its name for people."""

    @abstractmethod
    def applied(self, objective: Objective) -> Objective:
        """The objective of the last stage, whose `losses` are f.

        Raises:
            InputError: the objective has nothing of that kind.
        """

    @property
    def identity(self) -> Any:
        """Plain values by which two measurements are told apart."""
        return str(self)


@dataclass(frozen=True)
class Loss(Measurement):
    """f = ℓ, the row's loss, a sum over its terms."""

    def __str__(self) -> str:
        return "loss"

    def applied(self, objective: Objective) -> Objective:
        return objective


@dataclass(frozen=True)
class _OfClass(Measurement):
    """A number that the logits z, (C,), of a row say of a class y.

    Args:
        label: the class: None for the label of the row, "predicted" for that of the largest logit, or a label as rows
            have it.
    """

    label: str | int | None = None
    name = ""

    def __str__(self) -> str:
        of: dict[Any, str] = {None: "the row's label", PREDICTED: "the predicted class"}
        return f"{self.name} of {of.get(self.label, repr(self.label))}"

    def applied(self, objective: Objective) -> Objective:
        if objective.logits is None:
            raise InputError(
                f"the measurement is the {self}, but {type(objective).__name__} has no classes of rows; expected "
                "'loss', the log-probability of a span (SpanLogProbability) for language models, or a function."
            )
        number = None
        if self.label not in (None, PREDICTED):
            number = class_of(self.label, objective.labels)
            if number is None:
                raise InputError(
                    f"the measurement is the {self}, which is no class; expected an integer, one of "
                    f"{list(objective.labels or [])}, 'predicted', or None for the row's label."
                )
        return with_losses(objective, partial(self._measured, objective, number))

    def _measured(
        self, objective: Objective, number: int | None, call: Callable, batch: dict
    ) -> tuple[Tensor, Tensor]:
        assert objective.logits is not None
        logits = objective.logits(call, batch)
        if number is not None and not 0 <= number < logits.shape[1]:
            raise InputError(
                f"the measurement is the {self}; expected one of the model's {logits.shape[1]} classes, from 0."
            )
        if number is not None:
            classes = torch.full((len(logits),), number, device=logits.device)
        else:
            classes = logits.detach().argmax(1) if self.label == PREDICTED else batch["labels"]
        values = self._of(logits, classes.unsqueeze(1))
        return values, torch.ones_like(values)

    @abstractmethod
    def _of(self, logits: Tensor, classes: Tensor) -> Tensor:
        """f of the logits, (B, C), and the classes, (B, 1)."""


@dataclass(frozen=True)
class LogProbability(_OfClass):
    """f = log p(y | row) = z_y − log Σ_c exp z_c, of a class y.

    >>> str(LogProbability("predicted")), str(LogProbability("Positive"))
    ('log-probability of the predicted class', "log-probability of 'Positive'")
    """

    name = "log-probability"

    def _of(self, logits: Tensor, classes: Tensor) -> Tensor:
        return logits.log_softmax(1).gather(1, classes)[:, 0]


@dataclass(frozen=True)
class LogitMargin(_OfClass):
    """f = z_y − max_{c ≠ y} z_c, of a class y: positive where the model predicts y."""

    name = "logit margin"

    def _of(self, logits: Tensor, classes: Tensor) -> Tensor:
        others = logits.scatter(1, classes, -torch.inf)
        return logits.gather(1, classes)[:, 0] - others.amax(1)


@dataclass(frozen=True)
class SpanLogProbability(Measurement):
    """f = Σ_{t ∈ span} log p(token_t | what the model reads), of a language model.

    A causal model reads the tokens before t; a sequence-to-sequence model the text and the target before t, in which
    the span is; a masked one the sentence with the whole span masked.

    Args:
        span: words of the text, of which the first occurrence is meant, and all tokens that overlap with it; or (first
            token, one after the last), counted from 0 over all tokens, special ones included; None: each row has
            either in its column `span`.
    """

    span: str | tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"log-probability of the span {self.span!r}" if self.span is not None else "log-probability of the span"

    def applied(self, objective: Objective) -> Objective:
        if objective.terms is None or objective.tokenizer is None:
            raise InputError(
                f"the measurement is the {self}, but {type(objective).__name__} predicts no tokens; expected the "
                "objective of a language model, 'loss', or a function."
            )
        changed: Any = copy.copy(objective)
        for name, value in (("reduction", "token"), ("draws", 1)):
            if hasattr(changed, name):
                object.__setattr__(changed, name, value)
        if type(objective) is MaskedLM:
            changed = replace(changed, chunk=None, masks="random")
            collate: Callable = changed.collate_masked
        else:
            collate = partial(_with_spans, changed)
        losses = partial(self._measured, changed)
        changed = with_losses(changed, losses)
        object.__setattr__(changed, "collate", lambda rows: collate(rows, [self._tokens(objective, r) for r in rows]))
        return changed

    def _measured(self, objective: Objective, call: Callable, batch: dict) -> tuple[Tensor, Tensor]:
        assert objective.terms is not None
        terms, spans = objective.terms(call, batch), batch["spans"]
        if terms.positions is None or terms.targets is None:
            raise InputError(
                f"the measurement is the {self}, but the terms of {type(objective).__name__} are no tokens of a text; "
                "expected the objective of a language model, 'loss', or a function."
            )
        inside = (spans[terms.owners, 0] <= terms.positions) & (terms.positions < spans[terms.owners, 1])
        values = terms.losses.new_zeros(len(spans)).index_add(0, terms.owners[inside], -terms.losses[inside])
        numbers = torch.bincount(terms.owners[inside], minlength=len(spans))
        return values, numbers.to(values)

    def _tokens(self, objective: Objective, row: Mapping[str, Any]) -> tuple[int, int]:
        """The first token of the row's span, and one after its last."""
        span = row.get("span") if self.span is None else self.span
        if isinstance(span, (tuple, list)) and len(span) == 2 and all(isinstance(n, int) for n in span):
            return span[0], span[1]
        name = f"row {row.get('example_id')!r}"
        column = getattr(objective, "target_column", objective.text_column)
        text = None if column is None else row.get(column)
        if not isinstance(span, str) or not span or not isinstance(text, str):
            raise InputError(
                f"the measurement is the {self}, and {name} has the span {span!r} of {text!r}; expected words of its "
                f"text, or two numbers of tokens: name the span, or give rows a column 'span'."
            )
        if not getattr(objective.tokenizer, "is_fast", False):
            raise InputError(
                f"{type(objective.tokenizer).__name__} does not say where its tokens are in a text; expected a fast "
                "tokenizer, or a span of two numbers of tokens."
            )
        start = text.find(span)
        if start < 0:
            raise InputError(f"{name}: its text {text!r} does not hold the span {span!r}; expected words of it.")
        key = "text_target" if column != objective.text_column else "text"
        offsets = objective.tokenizer(**{key: text}, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        places = [k for k, (a, b) in enumerate(offsets) if a < b and a < start + len(span) and b > start]
        return (places[0], places[-1] + 1) if places else (0, 0)


def _with_spans(objective: Objective, rows: Sequence[Mapping[str, Any]], spans: list[tuple[int, int]]) -> dict:
    return objective.collate(rows) | {"spans": torch.tensor(spans)}


@dataclass(frozen=True)
class Function(Measurement):
    """f = function(call, batch), (B,): of a call of the model and a batch of the objective's `collate`."""

    function: Callable[[Callable, dict], Tensor]

    def __str__(self) -> str:
        kind = self.function
        module = getattr(kind, "__module__", type(kind).__module__)
        return f"{module}:{getattr(kind, '__qualname__', type(kind).__qualname__)}"

    @property
    def identity(self) -> Any:
        return contents(self.function)

    def applied(self, objective: Objective) -> Objective:
        return with_losses(objective, self._measured)

    def _measured(self, call: Callable, batch: dict) -> tuple[Tensor, Tensor]:
        values = self.function(call, batch)
        if not isinstance(values, Tensor) or values.dim() != 1 or not values.is_floating_point():
            what = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise InputError(f"the measurement {self} returned {what}; expected a tensor of one number per row.")
        return values, torch.ones_like(values)


NAMES: dict[str, Callable[..., Measurement]] = {
    "loss": Loss,
    "log_probability": LogProbability,
    "logit_margin": LogitMargin,
    "span_log_probability": SpanLogProbability,
}


def as_measurement(value: Any) -> Measurement:
    """A `Measurement`; of a name in `NAMES` that one with its defaults, of a function `Function`.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(value, Measurement):
        return value
    if isinstance(value, str) and value in NAMES:
        return NAMES[value]()
    if callable(value) and not isinstance(value, type):
        return Function(value)
    raise InputError(
        f"measurement is {value!r}; expected one of {list(NAMES)}, an object of hf_msif.influence.measurements, or a "
        "function (call, batch) -> one number per row."
    )
