"""`Direction`: what a query holds of an implicit stage, u_k, and how it scores rows: I(x) = −⟨u_k, ∇ℓ_x⟩, eq. (6).

`Directions`: the same of a stage in segments, one direction for each: I(x) = −Σ_l ⟨u_l, ∇ℓ_x(θ_l)⟩.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..adapters.functional import FunctionalModel
from ..curvature.derivatives import Evaluation, directional_derivatives, example_gradients, term_derivatives
from ..curvature.layers import UnclearRowsError
from ..curvature.norms import Metric
from ..errors import InputError
from ..objectives import Objective
from ..scoring.layerwise import Layerwise
from ..scoring.scorable import RowInfluence
from ..scoring.token_scores import TermInfluence
from ..vectors import Block
from .differentiation import NamedTensors, StageCertificate

METHODS = ("auto", "forward", "layerwise")


@dataclass(eq=False)
class Direction(NamedTensors):
    """u_k of one stage: the influence of a row is the derivative of its loss along −u_k, eq. (6).

    Attributes:
        model: has the parameters at which the losses are differentiated.
        objective: the objective of the stage.
        u: u_k on the trained names, tensors of shape (Q, *parameter.shape).
        certificate: how well u_k was solved for.
        sample: returns a few rows of the stage, on which layer-wise scoring is compared with plain gradients first;
            without it, rows are scored by forward mode.
        method: how rows are scored; both are exact. "forward": by forward mode, about 3 forward passes per column, no
            gradient is stored. "layerwise": by the gradients of examples a layer at a time, 3 to 4 forward passes and
            about 0.1 more per column. "auto": layer by layer from two columns on, if each parameter has a layer that
            makes its gradient.
        norms: also the norm of each row's gradient, ‖∇ℓ_x‖. They take the gradients of examples, for one column too.
        metric: with the norms, ∇ℓ_xᵀ f(A) ∇ℓ_x of this quadratic form.
    """

    model: FunctionalModel
    objective: Objective
    u: Block
    certificate: StageCertificate
    sample: Callable[[], list[dict]] | None = None
    method: str = "auto"
    norms: bool = False
    metric: Metric | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; expected one of {list(METHODS)}.")
        if self.norms and self.method == "forward":
            raise InputError(
                "method is 'forward', which makes no gradients, but their norms are asked for; expected 'auto' or "
                "'layerwise'."
            )

    @property
    def columns(self) -> int:
        return vectors.columns(self.u)

    @staticmethod
    def joined(directions: Sequence[Direction]) -> Direction:
        """One direction with the columns of all, which are directions of the same losses."""
        u = {name: torch.cat([direction.u[name] for direction in directions]) for name in directions[0].u}
        return replace(directions[0], u=u)

    def column(self, q: int) -> Direction:
        """The direction of column q alone."""
        return replace(self, u={name: t[q : q + 1] for name, t in self.u.items()})

    def by(self, method: str, norms: bool = False, metric: Metric | None = None) -> Direction:
        """The same direction, which scores by another method."""
        same = method == self.method and norms == self.norms and metric is self.metric
        return self if same else replace(self, method=method, norms=norms, metric=metric)

    def with_objective(self, objective: Objective) -> Direction:
        """The same direction, which scores rows by their losses of another objective."""
        return replace(self, objective=objective)

    def influence(self, batch: dict[str, Any], rows: list[dict]) -> RowInfluence:
        """I(x) = −⟨u_k, ∇ℓ_x⟩ of each row, for all columns.

        Args:
            batch: B rows as the objective collates them, on the model's device.
            rows: the rows themselves.

        Returns:
            influence, (B, Q) in float64, positive where more of the row raises the test loss; losses, (B,), sums over
            terms; counts, (B,); the norms, (B, 1), with a metric (B, 2), if they are asked for.
        """
        if self._layerwise is not None:
            try:
                slopes, losses, counts, norms = self._layerwise.slopes(batch, len(rows), self.norms)
                return RowInfluence(-slopes.double(), losses, counts, norms=norms)
            except UnclearRowsError:
                if self.method == "layerwise":
                    raise
        evaluation = Evaluation(self.model, self.objective, batch)
        values = []
        for q in range(self.columns):
            column, losses, counts = directional_derivatives(evaluation, vectors.column(self.u, q))
            values.append(-column.double())
        return RowInfluence(torch.stack(values, dim=1), losses, counts, norms=self._norms(evaluation))

    def _norms(self, evaluation: Evaluation) -> Tensor | None:
        """The norms by a backward pass per row: for batches whose rows the layers do not tell apart."""
        if not self.norms:
            return None
        with torch.enable_grad():
            gradients = example_gradients(evaluation, self.u)
        columns = [vectors.norm(gradients)]
        if self.metric is not None:
            columns.append(self.metric.squares(gradients))
        return torch.stack(columns, dim=1)

    def term_influence(self, batch: dict[str, Any], rows: list[dict]) -> TermInfluence:
        """−⟨u_k, ∇ℓ_t⟩ of each term t of the rows, for all columns; those of a row sum to its `influence`.

        Forward mode takes a pass per column, layer-wise scoring one per term of the longest row; with "auto" whichever
        are fewer.

        Args:
            batch: B rows as the objective collates them, on the model's device.
            rows: the rows themselves.
        """
        evaluation = Evaluation(self.model, self.objective, batch)
        if self._layerwise is not None:
            with torch.no_grad():
                terms = evaluation.terms({})
            try:
                if self.method == "layerwise" or len(terms.numbers.unique()) < self.columns:
                    slopes = self._layerwise.term_slopes(batch, len(rows), terms)
                    return TermInfluence(-slopes.double(), terms)
            except UnclearRowsError:
                if self.method == "layerwise":
                    raise
        each = [term_derivatives(evaluation, vectors.column(self.u, q)) for q in range(self.columns)]
        return TermInfluence(-torch.stack([slopes.double() for slopes, _ in each], dim=1), each[0][1])

    def layer_influence(self, batch: dict[str, Any], rows: list[dict], layers: Sequence[Sequence[str]]) -> Tensor:
        """−Σ_{names of the layer} ⟨u_k, ∇ℓ_x⟩ of each row and layer for all columns, (B, layers, Q) in float64.

        By a backward pass per row, which serves all layers and columns; those of layers that have all trained
        parameters between them sum to the row's `influence`. B gradients are held.

        Args:
            batch: B rows as the objective collates them, on the model's device.
            rows: the rows themselves.
            layers: the names of each layer's parameters.
        """
        with torch.enable_grad():
            gradients = example_gradients(Evaluation(self.model, self.objective, batch), self.u)
        parts = [vectors.gram(vectors.select(gradients, names), vectors.select(self.u, names)) for names in layers]
        return -torch.stack(parts, dim=1)

    @cached_property
    def _layerwise(self) -> Layerwise | None:
        """None: forward mode."""
        chosen = self.method == "layerwise" or self.norms
        if self.method == "forward" or (not chosen and (self.columns == 1 or self.sample is None)):
            return None
        if self.sample is None:
            raise InputError(
                "method is 'layerwise', or norms are asked for, but this Direction has no sample of rows; expected "
                "Direction(sample=...)."
            )
        layerwise = Layerwise(self.model, self.objective, self.u, self.sample(), self.metric)
        # The rest takes forward mode over the whole model, which has all parameters for the same price.
        wasteful = layerwise.rest or (layerwise.layers.probes and self.columns == 2)
        return None if not chosen and wasteful else layerwise

    def prepare(self) -> None:
        """What all processes must do together before they score: choosing the method."""
        _ = self._layerwise

    @property
    def copied_bytes(self) -> int:
        """Bytes that scoring holds beside u and a batch's activations."""
        return 0 if self._layerwise is None else self._layerwise.copied_bytes

    @property
    def how(self) -> str:
        """The method in words, with what layer-wise scoring leaves to forward mode."""
        layerwise = self._layerwise
        if layerwise is None:
            return "forward mode"
        rest = list(layerwise.rest)
        without = f", and by forward mode for {len(rest)} tensors (first {rest[0]!r})" if rest else ""
        return f"the gradients of examples, layer by layer{without}"

    def tensors(self) -> dict[str, Tensor]:
        return self.u


@dataclass(eq=False)
class Directions(NamedTensors):
    """Directions at several states of a run; the influence of a row is the sum of theirs.

    Attributes:
        parts: the direction of each segment, first to last.
        final: the stage's model, whose losses are told with the influences.
        certificate: how well all of them are known.
    """

    parts: list[Direction]
    final: FunctionalModel
    certificate: StageCertificate

    @property
    def columns(self) -> int:
        return self.parts[0].columns

    @staticmethod
    def joined(each: Sequence[Directions]) -> Directions:
        """One with the columns of all, which are directions of the same losses."""
        of_segments = zip(*(directions.parts for directions in each), strict=True)
        return replace(each[0], parts=[Direction.joined(parts) for parts in of_segments])

    def column(self, q: int) -> Directions:
        """The directions of column q alone."""
        return replace(self, parts=[part.column(q) for part in self.parts])

    def by(self, method: str, norms: bool = False, metric: Metric | None = None) -> Directions:
        """The same, which scores by another method; norms are those of the gradients at the last state."""
        parts = [part.by(method) for part in self.parts[:-1]]
        return replace(self, parts=[*parts, self.parts[-1].by(method, norms, metric)])

    def with_objective(self, objective: Objective) -> Directions:
        """The same, which scores rows by their losses of another objective."""
        return replace(self, parts=[part.with_objective(objective) for part in self.parts])

    def prepare(self) -> None:
        """What all processes must do together before they score."""
        for part in self.parts:
            part.prepare()

    def influence(self, batch: dict[str, Any], rows: list[dict]) -> RowInfluence:
        """I(x) = −Σ_l ⟨u_l, ∇ℓ_x(θ_l)⟩ of each row, for all columns; as `Direction.influence`."""
        each = [part.influence(batch, rows) for part in self.parts]
        with torch.no_grad():
            losses, counts = Evaluation(self.final, self.parts[0].objective, batch).losses({})
        influence = torch.stack([one.influence for one in each]).sum(0)
        return RowInfluence(influence, losses, counts, norms=each[-1].norms)

    def term_influence(self, batch: dict[str, Any], rows: list[dict]) -> TermInfluence:
        """The same of each term of the rows, as `Direction.term_influence`."""
        each = [part.term_influence(batch, rows).influence for part in self.parts]
        with torch.no_grad():
            terms = Evaluation(self.final, self.parts[0].objective, batch).terms({})
        return TermInfluence(torch.stack(each).sum(0), terms)

    def layer_influence(self, batch: dict[str, Any], rows: list[dict], layers: Sequence[Sequence[str]]) -> Tensor:
        """The same of each row and layer, as `Direction.layer_influence`."""
        return torch.stack([part.layer_influence(batch, rows, layers) for part in self.parts]).sum(0)

    @property
    def copied_bytes(self) -> int:
        return sum(part.copied_bytes for part in self.parts)

    @property
    def how(self) -> str:
        return f"{self.parts[0].how}, at each of {len(self.parts)} states"

    def tensors(self) -> dict[str, Tensor]:
        """u_l by "l/name"."""
        return {f"{i}/{name}": t for i, part in enumerate(self.parts) for name, t in part.u.items()}
