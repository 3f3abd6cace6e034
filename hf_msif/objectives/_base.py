"""`Objective`, the base class of every per-example loss, and what sums over the terms of an example share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor

from ..errors import InputError

Batch = dict[str, Any]
LabelKind = Literal["class", "classes", "number"]
Rows = Sequence[Mapping[str, Any]]


def numbers_within(owners: Tensor) -> Tensor:
    """The number of each entry among those of equal value, from 0.

    >>> numbers_within(torch.tensor([1, 0, 1, 1, 0]))
    tensor([0, 0, 1, 2, 1])
    """
    order, counts = owners.argsort(stable=True), owners.bincount()
    starts = (counts.cumsum(0) - counts)[owners[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) - starts)


class Terms(NamedTuple):
    """The terms of which the losses of a batch are sums: ℓ_i = Σ losses_t over the terms t with owners_t = i.

    Attributes:
        losses: (M,) the terms, each divided by all that ℓ_i divides it by (such as the number of masks per sentence).
        owners: (M,) the row of the batch that each term belongs to; terms of one row keep their order.
        positions: (M,) which token of its row a term predicts, counted from 0 over all tokens, special ones included;
            None: the objective does not say.
        targets: (M,) the id of that token, for `Objective.token_texts`; None: no token is predicted.
    """

    losses: Tensor
    owners: Tensor
    positions: Tensor | None = None
    targets: Tensor | None = None

    @property
    def numbers(self) -> Tensor:
        """(M,) the number of each term among those of its row, from 0."""
        return numbers_within(self.owners)


class Objective(ABC):
    """What a stage minimises: one loss ℓ_i per example, a sum over the example's terms.

    The data term of F is Σ_i ℓ_i / Σ_i count_i over all examples: one division at the end, never a mean of batch
    means. A subclass writes `collate` and `losses`. Every other member has a default, which a subclass may override by
    a class attribute, a dataclass field, a property or a method.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Squares(Objective):
    ...     scale: float = 1.0
    ...     def collate(self, rows):
    ...         return {key: torch.tensor([float(row[key]) for row in rows]) for key in ("x", "y")}
    ...     def losses(self, call, batch):
    ...         sums = self.scale * (call(x=batch["x"]) - batch["y"]) ** 2
    ...         return sums, torch.ones_like(sums)
    >>> objective = Squares(scale=0.5)
    >>> objective.losses(lambda x: 3 * x, objective.collate([{"x": 1, "y": 1}, {"x": 2, "y": 3}]))
    (tensor([2.0000, 4.5000]), tensor([1., 1.]))
    """

    # --- to be written

    @abstractmethod
    def collate(self, rows: Rows) -> Batch:
        """The rows as a batch: a dict of tensors, on the CPU.

        It depends on nothing but the objective and the rows, so that every pass over the data sees the same numbers.
        Where a GPU is used, another thread calls it, one call at a time.

        Args:
            rows: dicts of plain values, each with an `example_id`.
        """

    @abstractmethod
    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        """ℓ_i and count_i of every example of the batch, both of shape (B,).

        Args:
            call: `call(**inputs)` runs the model with the parameters under study and returns its output.
            batch: what `collate` made, on the device of the model.
        """

    # --- read by passes over the data

    counts: Callable[[Batch], Tensor] | None = None
    """Method `counts(batch) -> (B,)`: the count_i of `losses` without running the model. None: counts need the losses.
    Training with several micro-batches or processes per step needs the method."""

    predictions: Callable[[Callable, Batch], Tensor] | None = None
    """Method `predictions(call, batch) -> (B,)`: the predicted class of each example, to be compared with
    `batch["labels"]`. None: the objective predicts no classes, and no accuracy is reported."""

    terms: Callable[[Callable, Batch], Terms] | None = None
    """Method `terms(call, batch) -> Terms`: the terms whose sums are the ℓ_i of `losses`. None: rows are scored whole,
    and `Query.token_scores` is refused."""

    inputs_per_row: int | None = 1
    """How many inputs of the model (places on the first axis of its tensors) a row has in a batch, one row's after
    another's; None: it differs from row to row. Scoring layer by layer must know which inputs are whose."""

    def inputs_of(self, row: Mapping[str, Any]) -> int:
        """How many inputs of the model count as this row's where batches are limited to a number of inputs."""
        return self.inputs_per_row or 1

    logits: Callable[[Callable, Batch], Tensor] | None = None
    """Method `logits(call, batch) -> (B, C)`: one logit per example and class, for measurements of a class
    (`influence.measurements`), which find the classes of the rows in `batch["labels"]`. None: the objective has no
    classes of examples."""

    def token_texts(self, targets: Sequence[int]) -> list[str]:
        """The tokens with the ids `Terms.targets`, as the tokenizer writes them; the ids themselves without one."""
        return [str(i) for i in targets] if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(targets)

    def of_epoch(self, epoch: int) -> Objective:
        """The objective with the random numbers (masks, negatives) of an epoch of training. Defaults to itself."""
        return self

    def for_influence(self, rounds: int = 1) -> Objective:
        """The objective of curvature, gradients and scores, where `of_epoch` gives that of training. Defaults to
        itself.

        An objective with random numbers may give one whose losses have the same expectation but for a constant
        factor, and less noise.

        Args:
            rounds: of random numbers per row; each covers a row once, independently of the others, so that the
                variance of a loss falls as 1/rounds.
        """
        return self

    # --- which columns of the rows it reads

    text_column: str | None = "text"
    """Column with the text, by whose length rows are put into batches; None: the rows have no text."""

    image_column: str | None = None
    """Column with the image; None: the rows have no image."""

    @property
    def content_column(self) -> str:
        """Column that is written beside an example's scores: the text, or the image where there is no text."""
        return self.text_column or self.image_column or "text"

    def content(self, row: Mapping[str, Any]) -> Any:
        """What is written beside a row's scores, and by which equal rows are known: its text, or its image; of a row
        that is tokenised already, the text of its tokens."""
        value = row.get(self.content_column)
        if value is None and "input_ids" in row and hasattr(self.tokenizer, "decode"):
            return self.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        return "" if value is None else value

    columns: ClassVar[tuple[str, ...]] = ()
    """Further columns that it needs, as `data.columns` of a configuration names them."""

    # --- how it reads them

    tokenizer: Any = None
    """Tokenizer of the texts; part of the objective's fingerprint. (A dataclass that requires one declares `tokenizer:
    Any = field()`, since a bare annotation would take this default.)"""

    max_length: int | None = None
    """Tokens after which a text is cut; None: the tokenizer's own limit."""

    processor: Any = None
    """Image processor of Hugging Face; part of the objective's fingerprint."""

    causal: ClassVar[bool] = False
    """Whether each term depends on no token after its own: a model that looks ahead is then refused when a stage is
    bound. The batch needs `input_ids`, and the model's output `logits`, (B, T, V)."""

    pads: bool = True
    """Whether rows of different lengths may share a batch, the shorter ones padded. See `unpadded`."""

    def unpadded(self) -> Self:
        """The objective, except that a batch holds rows of one length, so that no row is padded.

        For models into whose losses padding reaches. (Of one length are rows whose batches of one have equal shapes.)
        """
        changed = copy.copy(self)
        object.__setattr__(changed, "pads", False)  # most objectives are frozen
        return changed

    inputs: tuple[str, ...] | None = None
    """Keys of a batch that the encoder reads; None: all keys but "labels"."""

    labels: tuple[str | int, ...] | None = None
    """Values of the label column in the order of the model's classes; None: integers from 0."""

    # --- constants that are estimated from the stage's rows, and what a configuration asks

    @property
    def is_fitted(self) -> bool:
        """Whether `collate` can be called; where it is False, a configuration calls `fitted` with the stage's rows."""
        return True

    def fitted(self, rows: Iterable[Mapping[str, Any]]) -> Objective:
        """The objective with constants estimated from these rows. Defaults to itself."""
        return self

    def check_model(self, model: Any) -> None:  # noqa: B027  (not abstract: most objectives take any model)
        """Asked once, before a stage is trained or differentiated. Defaults to accepting every model.

        Args:
            model: a `PreTrainedModel`, also with PEFT adapters.

        Raises:
            InputError: the model cannot be one that this objective trained.
        """

    auto_class: ClassVar[str | None] = None
    """Auto class of transformers whose models it takes, e.g. "AutoModelForMaskedLM"; only read for a configuration's
    `task: mypackage.mymodule:MyObjective`."""

    label_kind: ClassVar[LabelKind | None] = None
    """What `data.label_column` of a configuration holds. "class": one class per row, and a new model gets a head with
    as many classes; "classes": a list of classes per row, and likewise; "number": a number, and a head with one
    output. None: rows have no label."""

    outputs_for: Callable[[Mapping[str, Any]], int] | None = None
    """Method `outputs_for(row) -> int`: how many outputs a head needs for the labels of a row, where `label_kind` is
    "classes" or "number"; it raises an `InputError` where these cannot be read."""

    words: ClassVar[bool] = False
    """Whether the text column holds lists of words."""

    problem_type: ClassVar[str | None] = None
    """`config.problem_type` of a new model, where the same class of models is trained on several losses."""


def with_losses(objective: Objective, losses: Callable) -> Objective:
    """The objective with another method `losses(call, batch)`."""
    changed = copy.copy(objective)
    object.__setattr__(changed, "losses", losses)  # most objectives are frozen
    return changed


class SumOfTerms(Objective):
    """An objective whose loss sums over terms: `_terms(call, batch)` makes them, `_numbers(batch)`, (B,), counts them.

    With the field `reduction` "token", sums and counts are kept; with "example", each example is the mean of its terms
    and counts once.
    """

    reduction: str

    def counts(self, batch: Batch) -> Tensor:
        numbers = self._numbers(batch)
        return self._reduce(torch.zeros_like(numbers), numbers)[1]

    def losses(self, call: Callable, batch: Batch) -> tuple[Tensor, Tensor]:
        terms, numbers = self._terms(call, batch), self._numbers(batch)
        sums = terms.losses.new_zeros(len(numbers)).index_add(0, terms.owners, terms.losses)
        return self._reduce(sums, numbers.to(sums.dtype))

    def terms(self, call: Callable, batch: Batch) -> Terms:
        """The terms of `losses`."""
        terms = self._terms(call, batch)
        numbers = self._numbers(batch).to(terms.losses)[terms.owners]
        return terms._replace(losses=self._reduce(terms.losses, numbers)[0])

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The terms before they are reduced."""
        raise NotImplementedError

    def _numbers(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def _reduce(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        if self.reduction == "example":
            return sums / counts.clamp(min=1), (counts > 0).to(counts)
        return sums, counts

    def _check_reduction(self) -> None:
        if self.reduction not in ("token", "example"):
            raise InputError(
                f"reduction is {self.reduction!r}; expected 'token' (one weight per token) or 'example' (one weight "
                "per example)."
            )


def logits_of(output: Any, objective: str, dimensions: int) -> Tensor:
    """The logits of a model's output.

    Raises:
        InputError: there are none, or their number of dimensions is not `dimensions`.
    """
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
