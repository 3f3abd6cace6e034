"""`BoundStage`: a stage in its place in a chain; `Chain`: all of them, and the test loss at their end."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..adapters.fingerprint import model_identity
from ..adapters.functional import FunctionalModel, check_vocabulary, precision_advice
from ..adapters.split import Split, split
from ..curvature.base import _counts
from ..curvature.derivatives import Evaluation, gradient_and_losses, parameters_in_use
from ..curvature.padding import SEARCHED_ROWS, rows_of_all_lengths
from ..engine import Engine
from ..engine.corpus import as_corpus, as_rows, first_rows
from ..engine.hashing import digest, objective_identity
from ..engine.stream import Stream
from ..errors import InputError
from ..objectives import Objective
from ..registry import CHECKS
from ..training.objective import without_terms
from ..vectors import Block
from .differentiation import Differentiation
from .findings import Finding, check
from .measurements import as_measurement
from .stage import Stage

SEARCHED_ROWS_OF_STREAM = 64  # for the compared rows; every process reads them


class BoundStage:
    """A stage in its place in a chain: the roles of its parameters, its rows, and how it is differentiated.

    Attributes:
        stage: the settings of the stage.
        before: the bound stage before, or None.
        engine: runs all passes over the rows.
        split: the roles of the parameters; tensors on which the loss does not depend are left out.
        model: the model as a function of its parameters.
        rows: the stage's data, each row with an `example_id`.
        objective: that of influence (`Stage.influence_objective`); batches of rows of equal length where padding
            reaches the loss.
        differentiation: what `stage.link` makes for this bound stage.
        findings: what the checks found.

    Raises:
        InputError: the model does not fit to the stage before (the message names the first tensor that differs), holds
            NaN or inf, or cannot be one that the objective trained; the loss depends on none of its trained
            parameters; or a check refuses the stage.

    Warns:
        UserWarning: `requires_grad` is False in tensors that `Stage.trainable` names; they count as held constant. Or
            padding reaches the loss.
    """

    def __init__(self, stage: Stage, before: BoundStage | None, engine: Engine):
        self.stage, self.before, self.engine = stage, before, engine
        self.objective: Objective = stage.influence_objective
        self.split: Split = split(
            stage.name,
            stage.model,
            before.stage.model if before else None,
            stage.trainable,
            stage.resized,
            before.name if before else "",
        )
        self.model = FunctionalModel(stage.model, engine.device)
        what = f"the data of stage {stage.name!r}"
        corpus = as_corpus(stage.data, what) if before is None else None
        self.rows = corpus if isinstance(corpus, Stream) else as_rows(stage.data, what)
        self._check_finite()
        check_vocabulary(stage.name, stage.model, stage.objective)
        self._check_model()
        # Before any other pass, which a model that keeps a state would remember.
        first, *others = CHECKS
        self.findings: list[Finding] = check(self, [first])
        assert self.batch_size  # known to all processes from here on
        self._leave_out_what_the_loss_ignores()
        self.differentiation: Differentiation = stage.differentiation(self)
        self._check_frozen()
        self._warn_of_held()
        self.findings += check(self, others)

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def batch_size(self) -> int:
        """Rows per batch: `Stage.batch_size` inputs of the model, as the longest of some rows has them."""
        return max(1, self.stage.batch_size // (self.objective.inputs_per_row or self._inputs_of_a_row))

    @cached_property
    def _inputs_of_a_row(self) -> int:
        return max(self.objective.inputs_of(row) for row in self.compared_rows)

    def _warn_of_held(self) -> None:
        held = self.split.held
        if held:
            warnings.warn(
                f"stage {self.name!r}: requires_grad is False in {len(held)} of the tensors that "
                f"trainable={self.stage.trainable!r} names (first {held[0]!r}); they count as held constant. Call "
                "requires_grad_(True) on those that the stage trained.",
                stacklevel=5,
            )

    def _check_model(self) -> None:
        try:
            self.objective.check_model(self.stage.model)
        except InputError as error:
            raise InputError(f"stage {self.name!r}: {error}") from error

    def _check_finite(self) -> None:
        for name, parameter in self.model.parameters.items():
            if not parameter.isfinite().all():
                raise InputError(
                    f"stage {self.name!r}: the parameter {name!r} holds NaN or inf: its training diverged, or the "
                    "checkpoint is damaged; load an earlier one."
                )

    def _leave_out_what_the_loss_ignores(self) -> None:
        """A trained tensor that the loss never reads has no curvature: the system would be singular in it."""
        try:
            trained = parameters_in_use(self.model, self.objective, first_rows(self.rows, 2), self.split.trained)
        except InputError as error:
            raise InputError(f"stage {self.name!r}: {error}") from error
        if not trained:
            names = list(self.split.trained[:3])
            raise InputError(
                f"stage {self.name!r}: the loss depends on none of the trained parameters {names}; expected a "
                "trainable that names parameters which the objective's model uses."
            )
        unused = {n: "the loss does not depend on it" for n in self.split.trained if n not in set(trained)}
        if unused:
            inherited = {n: source for n, source in self.split.inherited.items() if n not in unused}
            self.split = replace(
                self.split, trained=trained, inherited=inherited, left_out={**self.split.left_out, **unused}
            )

    def _check_frozen(self) -> None:
        for name in self.split.frozen:
            assert self.before is not None
            source = self.before.model.parameters[self.split.inherited[name]]
            value = self.leading(name, self.model.parameters[name])
            gap = float((value.double() - source.double()).norm() / source.double().norm().clamp(min=1e-30))
            if gap > 1e-6:
                raise InputError(
                    f"stage {self.name!r}: {name!r} counts as frozen, but differs from stage {self.before.name!r} "
                    f"(relative difference {gap:.1e}): it was trained, or adapters were merged into it, or the "
                    "checkpoint is another one. Use trainable='all' (or patterns) with alpha, call "
                    "requires_grad_(True) on what was trained, give the model with its adapters unmerged, or pair "
                    "it with the checkpoint that it was finetuned from."
                )

    # --- rows

    def collate(self, rows: list[dict]) -> dict:
        """A batch of the stage's objective on the engine's device."""
        return self.engine.to_device(self.objective.collate(rows))

    def subset(self, size: int | None) -> list[dict]:
        """`size` random rows of the stage's data, the same for the same `Stage.seed`; None: all rows."""
        if isinstance(self.rows, Stream):
            assert size is not None  # `Implicit` refuses a stream without curvature_samples
            return self.engine.sample(self.rows, size, self.stage.seed)
        if size is None or size >= len(self.rows):
            return self.rows
        return random.Random(self.stage.seed).sample(self.rows, size)

    @cached_property
    def compared_rows(self) -> list[dict]:
        """Rows of the stage from a short to a long one, which the checks compare; its first row where none has a
        term."""
        rows = first_rows(self.rows, SEARCHED_ROWS_OF_STREAM if isinstance(self.rows, Stream) else SEARCHED_ROWS)
        with self.engine.raising_together():
            compared = rows_of_all_lengths(rows, self.objective)
        return compared or rows[:1]

    @cached_property
    def count(self) -> float:
        """N_k = Σ_i count_i over *all* of the stage's data. Removing an example has the effect −influence/N_k.

        Raises:
            InputError: it is 0.
        """
        count, rows = self._size
        if not count:
            raise without_terms(self.name, rows)
        return count

    @property
    def examples(self) -> int:
        """Number of rows of the stage's data."""
        return self._size[1] if isinstance(self.rows, Stream) else len(self.rows)

    def remember_size(self, count: float, examples: int) -> None:
        """Takes N and the number of rows as known, so that no pass is made to count them (a saved query has both)."""
        vars(self).setdefault("_size", (count, examples))

    @cached_property
    def _size(self) -> tuple[float, int]:
        """N and the number of rows, by a pass over them unless one has been made already."""
        known = self.differentiation.known_size()
        if known is not None:
            return known
        total, examples, objective, size = 0.0, 0, self.objective, self.batch_size
        total_rows = None if isinstance(self.rows, Stream) else len(self.rows)
        bar = self.engine.bar(total=total_rows, desc=f"{self.name}: counting", unit=" rows")
        with bar, torch.no_grad(), self.model.evaluating():
            for rows in self.engine.rounds(self.rows, 64 * size * self.engine.processes):
                with self.engine.raising_together():
                    for _, batch in self.engine.batches(rows, objective, size):
                        total += float(_counts(Evaluation(self.model, objective, batch)).double().sum())
                examples += len(rows)
                bar.update(len(rows))
        return sum(self.engine.gather([total])), examples

    # --- parameters

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the stage's pull-back depends on, beside its adjoint: name for people → plain value, or
        SHA-256 of weights, rows and tokenizer. A saved query is refused by the name of what has changed."""
        identity = {
            **model_identity(self.stage.model),
            "the number of rows": None if isinstance(self.rows, Stream) else len(self.rows),
            "the data": self._rows_fingerprint(),
            **self.stage.settings,
            "held constant by requires_grad": list(self.split.held),
            **objective_identity(self.objective),
            **self.differentiation.identity(),
        }
        return json.loads(json.dumps(identity, default=repr))  # as it is after it was saved

    def _rows_fingerprint(self) -> str:
        if not isinstance(self.rows, Stream):
            return digest(self.rows)
        with self.engine.raising_together():
            fingerprint = self.rows.fingerprint() if self.engine.is_main else ""
        return self.engine.broadcast_object(fingerprint)

    @cached_property
    def cache_key(self) -> str:
        """SHA-256 of `identity`, by which checkpoints of the pull-back are known."""
        return digest(self.identity)

    def leading(self, name: str, tensor: Tensor, axis: int = 0) -> Tensor:
        """The inherited rows of the tensor `name`: all of them, unless the stage resized it."""
        return tensor.narrow(axis, 0, self.split.resized[name]) if name in self.split.resized else tensor

    def carry(self, b: Mapping[str, Tensor]) -> Block:
        """Carries an adjoint from this stage's inherited names to all names of the stage before; zero on its head.

        Args:
            b: ∂f/∂W_before, tensors of shape (Q, *parameter.shape).

        Returns:
            a of the stage before, tensors of shape (Q, *parameter.shape), parameter being that of the stage before.
            They share memory with `b` where nothing changes.
        """
        assert self.before is not None
        before = self.before.model.parameters
        carried: Block = {}
        for name, value in b.items():
            source = self.split.inherited[name]
            value = self.leading(name, value, axis=1).to(before[source]).contiguous()
            carried[source] = carried[source] + value if source in carried else value
        width = vectors.columns(b)
        return {n: carried[n] if n in carried else p.new_zeros(width, *p.shape) for n, p in before.items()}


class Chain:
    """Stages bound to one another, first (pretraining) to last (the finetuning whose predictions are explained).

    Attributes:
        stages: the bound stages.
        engine: runs all passes.

    Raises:
        InputError: no stage, a name used twice, or stages that do not fit together; the message names the first tensor
            that differs.
    """

    def __init__(self, stages: Sequence[Stage], engine: Engine):
        if not stages:
            raise InputError("a chain needs at least one stage; got none.")
        names = [stage.name for stage in stages]
        if len(set(names)) != len(names):
            raise InputError(f"stage names must differ; got {names}.")
        self.engine = engine
        self.stages: list[BoundStage] = []
        for stage in stages:
            self.stages.append(BoundStage(stage, self.stages[-1] if self.stages else None, engine))

    def stage(self, name: str | None = None) -> BoundStage:
        """The bound stage of that name; defaults to the first one."""
        if name is None:
            return self.stages[0]
        by_name = {bound.name: bound for bound in self.stages}
        if name not in by_name:
            raise InputError(f"there is no stage {name!r}; the stages are {list(by_name)}.")
        return by_name[name]

    def measurement(
        self, rows: list[dict], aggregate: str | None = None, measurement: Any = "loss"
    ) -> tuple[Block, list[float]]:
        """a = ∇f at the final parameters of the last stage, and f of each test row: its loss, a sum over its terms, or
        another measurement.

        Args:
            rows: test rows of the last stage.
            aggregate: None: one column per row; "sum" or "mean": one column for all of them, eq. (8).
            measurement: f, as `measurements.as_measurement` reads it.

        Returns:
            a on the trained and the frozen names, tensors of shape (Q, *parameter.shape); f, one number per row.

        Raises:
            InputError: another `aggregate`, a measurement that the objective does not have, a row without text or
                without a term to predict, or f is not finite.
        """
        if aggregate not in (None, "sum", "mean"):
            raise InputError(f"aggregate is {aggregate!r}; expected None, 'sum' or 'mean'.")
        last, measured = self.stages[-1], as_measurement(measurement)
        _check_texts(rows, last.objective.text_column)
        objective = measured.applied(last.objective)
        names = (*last.split.trained, *last.split.frozen)
        # One backward pass per example: it goes through the whole batch, so a batch of one example costs least.
        size = 1 if aggregate is None else last.batch_size
        like = vectors.select(last.model.parameters, names)
        values_by_index: list[tuple[int, float, float]] = []

        def gradients() -> Iterator[tuple[int, dict[str, Tensor]]]:
            for indices, batch in self.engine.batches(rows, objective, size):
                evaluation = Evaluation(last.model, objective, batch)
                slopes, sums, counts = gradient_and_losses(evaluation, names)
                values_by_index.extend(zip(indices, sums.tolist(), counts.tolist(), strict=True))
                yield indices[0], slopes

        with last.model.evaluating():
            if aggregate is None:
                adjoint = self.engine.columns(like, len(rows), gradients())
            else:
                adjoint = self.engine.sum(vectors.stack([like]), (vectors.stack([g]) for _, g in gradients()))
        by_index = sorted(self.engine.gather(values_by_index))
        values = [value for _, value, _ in by_index]
        silent = [rows[i]["example_id"] for i, _, count in by_index if not count]
        if silent:
            raise InputError(
                f"the test examples with example_id {silent[:5]} have no term to predict, so their {measured} says "
                "nothing; leave them out, or raise max_length where it cut all of their words."
            )
        not_finite = [row["example_id"] for row, value in zip(rows, values, strict=True) if not math.isfinite(value)]
        if not_finite:
            raise InputError(
                f"the {measured} of the test examples with example_id {not_finite[:5]} is not finite; expected "
                "numbers: leave them out, check the last stage's "
                f"model{precision_advice(next(iter(adjoint.values())).dtype)}."
            )
        return (vectors.scale(adjoint, 1.0 / len(rows)) if aggregate == "mean" else adjoint), values

    def losses(self, rows: list[dict]) -> list[float]:
        """The loss of each test row at the final parameters of the last stage, a sum over its terms."""
        last, found = self.stages[-1], list[tuple[int, float]]()
        with torch.no_grad(), last.model.evaluating():
            for indices, batch in self.engine.batches(rows, last.objective, last.batch_size):
                sums, _ = Evaluation(last.model, last.objective, batch).losses({})
                found += zip(indices, sums.tolist(), strict=True)
        return [loss for _, loss in sorted(self.engine.gather(found))]

    def sketched_adjoints(
        self, rows: list[dict], aggregate: str | None = None, measurement: Any = "loss"
    ) -> dict[str, Block]:
        """About the adjoint from which each stage's pull-back will start, by name; for `Differentiation.cost`.

        Exact for the last stage. A stage below one that has no `sketch` is left out. Arguments as for `measurement`.
        """
        adjoint: Block | None = self.measurement(rows, aggregate, measurement)[0]
        adjoints: dict[str, Block] = {}
        for bound in reversed(self.stages):
            if adjoint is None:
                break
            adjoints[bound.name] = adjoint
            inherited = bound.differentiation.sketch(adjoint) if bound.before is not None else None
            adjoint = None if inherited is None else bound.carry(inherited)
        return adjoints


def _check_texts(rows: list[dict], column: str | None) -> None:
    empty = [row["example_id"] for row in rows if isinstance(text := row.get(column), str) and not text.strip()]
    if empty:
        raise InputError(
            f"the test examples with example_id {empty[:5]} have no text in {column!r}; expected a sentence: leave "
            "them out."
        )
