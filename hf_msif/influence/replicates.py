"""`Replicates`: the solutions of one stage by independent repetitions of a query, whose scatter is its sampling noise.

Replicate r of R has the masks (or negatives) of its own round of draws, `Objective.of_epoch(r)`, and its own part of
each stage's curvature sample. Everything that follows from them is done again: solves, what they hand on to the stage
before, and the losses of the rows that are scored. I(x) is the mean of the replicates' I_r(x); `scoring.noise.Noise`
makes standard errors of their scatter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .. import vectors
from ..curvature.norms import Metric
from ..display import LINES, Curves, Displayed, Summary, Table, few_lines, few_rows, plural
from ..engine import Engine
from ..engine.corpus import first_rows
from ..engine.files import flat_keys, nested_keys
from ..engine.stream import Stream
from ..objectives import Objective
from ..scoring.noise import SAMPLE_ROWS, Noise
from ..scoring.scorable import RowInfluence, Scorable, measure
from ..scoring.token_scores import TermInfluence
from .chain import BoundStage
from .cost import Cost
from .differentiation import Differentiation, StageCertificate, StageSolution
from .direction import Direction, Directions
from .sampled import drawn


@dataclass(frozen=True, repr=False)
class ReplicatesCertificate(Displayed):
    """The certificates of all replicates; its lists have the columns of one after those of another."""

    each: Sequence[StageCertificate]

    @property
    def converged(self) -> list[bool]:
        return [value for certificate in self.each for value in certificate.converged]

    @property
    def status(self) -> list[str]:
        return [value for certificate in self.each for value in certificate.status]

    def to_dict(self) -> dict[str, Any]:
        both = {"converged": self.converged, "status": self.status}
        return {**both, "replicates": [certificate.to_dict() for certificate in self.each]}

    def __str__(self) -> str:
        most = max(2, LINES // len(self.each))
        texts = [f"replicate {r}: {certificate}".splitlines() for r, certificate in enumerate(self.each)]
        return "\n".join(few_lines([line for lines in texts for line in few_lines(lines, most)]))

    def curves(self) -> Curves | None:
        each = [certificate.curves() if isinstance(certificate, Displayed) else None for certificate in self.each]
        lines = {
            f"replicate {r}: {name}": line
            for r, curves in enumerate(each)
            if curves is not None
            for name, line in curves.lines.items()
        }
        return None if each[0] is None else replace(each[0], lines=lines)

    def summary(self) -> Summary:
        title = (
            f"{plural(len(self.each), 'replicate')}: {sum(self.converged)} of {plural(len(self.converged), 'column')} "
            "converged"
        )
        rows = [[str(r), few_lines(str(certificate).splitlines(), 2)[0]] for r, certificate in enumerate(self.each)]
        return Summary(title, tables=[Table(["replicate", "certificate"], few_rows(rows))])


@dataclass(frozen=True)
class Replicates:
    """The solutions of a stage by R replicates of a query; see `StageSolution`.

    Attributes:
        each: one solution per replicate.
        objectives: the objective by whose losses each scores rows.
        engine: has the device.
    """

    each: Sequence[StageSolution]
    objectives: Sequence[Objective]
    engine: Engine

    @property
    def certificate(self) -> ReplicatesCertificate:
        return ReplicatesCertificate([solution.certificate for solution in self.each])

    @property
    def columns(self) -> int:
        return self.each[0].columns

    def column(self, q: int) -> Replicates:
        """The same directions, of column q alone."""
        return replace(self, each=[solution.column(q) for solution in self._directions])

    def by(self, method: str, norms: bool = False, metric: Metric | None = None) -> Replicates:
        """The same directions, whose rows are scored by another method."""
        return replace(self, each=[solution.by(method, norms, metric) for solution in self._directions])

    def with_objective(self, objective: Objective) -> Replicates:
        """The same, which scores rows by their losses of another objective, each with its own round of its draws."""
        objectives = [drawn(objective, r) for r in range(len(self.each))]
        each = [part.with_objective(own) for part, own in zip(self._directions, objectives, strict=True)]
        return replace(self, each=each, objectives=objectives)

    def prepare(self) -> None:
        """What all processes must do together before they score."""
        for solution, _ in self._passes:
            if isinstance(solution, Direction | Directions):
                solution.prepare()

    def influence(self, batch: dict[str, Any], rows: list[dict]) -> RowInfluence:
        """The mean influence of each row, its mean loss, number of terms and norms, and the replicates' influences.

        Args:
            batch: B rows as the stage's objective collates them, on the engine's device.
            rows: the rows themselves.
        """
        batches = [(solution, self._batch(objective, batch, rows)) for solution, objective in self._passes]
        passes = [solution.influence(own_batch, rows) for solution, own_batch in batches]
        replicates = torch.cat([measured.influence for measured in passes], dim=1)
        replicates = replicates.unflatten(1, (len(self.each), self.columns))
        losses, counts = (torch.stack(values).mean(0) for values in list(zip(*passes, strict=True))[1:3])
        each = [measured.norms for measured in passes if measured.norms is not None]
        norms = torch.stack(each).mean(0) if each else None
        return RowInfluence(replicates.mean(1), losses, counts, replicates, norms)

    def term_influence(self, batch: dict[str, Any], rows: list[dict]) -> TermInfluence:
        """The terms of all replicates, divided by R: those of a row sum to its `influence`. Of directions only."""
        number, parts = len(self._passes), []
        for solution, objective in self._passes:
            assert isinstance(solution, Direction | Directions)
            parts.append(solution.term_influence(self._batch(objective, batch, rows), rows))
        columns = len(self.each) // number  # replicates that share a pass
        values = [part.influence.unflatten(1, (columns, self.columns)).mean(1) / number for part in parts]
        losses, owners, positions, targets = zip(*(part.terms for part in parts), strict=True)
        terms = parts[0].terms._replace(
            losses=torch.cat(losses) / number,
            owners=torch.cat(owners),
            positions=None if positions[0] is None else torch.cat(positions),
            targets=None if targets[0] is None else torch.cat(targets),
        )
        return TermInfluence(torch.cat(values), terms)

    def layer_influence(self, batch: dict[str, Any], rows: list[dict], layers: Sequence[Sequence[str]]) -> Tensor:
        """The mean over the replicates, (B, layers, Q). Of directions only."""
        parts = []
        for solution, objective in self._passes:
            assert isinstance(solution, Direction | Directions)
            parts.append(solution.layer_influence(self._batch(objective, batch, rows), rows, layers))
        return torch.cat(parts, dim=2).unflatten(2, (len(self.each), self.columns)).mean(2)

    def tensors(self) -> dict[str, Tensor]:
        # Cloned, since u of several replicates may be the same memory (as for `solvers.Identity`): no file holds that.
        return flat_keys({str(r): vectors.clone(solution.tensors()) for r, solution in enumerate(self.each)})

    @cached_property
    def _passes(self) -> list[tuple[StageSolution, Objective]]:
        """The solutions with the objectives of their rows; where all have the same, one solution with R·Q columns."""
        first = self.objectives[0]
        if self._directions and all(objective is first for objective in self.objectives):
            joined = type(self._directions[0]).joined
            return [(joined(self._directions), first)]
        return list(zip(self.each, self.objectives, strict=True))

    @property
    def _directions(self) -> list[Any]:
        """The solutions where they are `Direction`s or `Directions`."""
        return [solution for solution in self.each if isinstance(solution, Direction | Directions)]

    def _batch(self, objective: Objective, batch: dict[str, Any], rows: list[dict]) -> dict[str, Any]:
        return batch if objective is self.objectives[0] else self.engine.to_device(objective.collate(rows))


def joined(differentiations: Sequence[Differentiation], solutions: Sequence[StageSolution]) -> StageSolution:
    """The `Replicates` of a stage; the solution itself where all replicates have the same one."""
    if all(solution is solutions[0] for solution in solutions):
        return solutions[0]
    return Replicates(solutions, [d.objective for d in differentiations], differentiations[0].bound.engine)


def is_direction(solution: StageSolution) -> TypeGuard[Direction | Directions | Replicates]:
    """Whether rows are scored by derivatives of their losses, in every replicate."""
    each = solution.each if isinstance(solution, Replicates) else [solution]
    return all(isinstance(one, Direction | Directions) for one in each)


def measured_noise(bound: BoundStage, scorable: Scorable) -> Noise:
    """How replicates scatter on `SAMPLE_ROWS` random rows of a stage, the first ones of a stream.

    Args:
        bound: the stage.
        scorable: its question, whose solution has replicates.
    """
    rows = first_rows(bound.rows, SAMPLE_ROWS) if isinstance(bound.rows, Stream) else bound.subset(SAMPLE_ROWS)
    progress = bound.engine.bar(total=len(rows), desc=f"comparing the replicates of {bound.name}", unit=" rows")
    with bound.model.evaluating(), progress as bar:
        return Noise.measured(measure(scorable, rows, scorable.batch_size, None, bar).replicates)


def replicated(
    cost: Cost,
    bound: BoundStage,
    replicates: int,
    onwards: Sequence[Differentiation],
    processes: int = 1,
    compare: bool = True,
) -> Cost:
    """The cost of a stage's replicates, and of comparing them on a sample of its rows (`measured_noise`).

    Each replicate has its part of the curvature's rows where these are a sample, and all of them otherwise; its own
    solution, and its own losses of the rows that are scored. It is `cost` itself where the stage has one replicate.

    Args:
        cost: of one replicate.
        bound: the stage.
        replicates: R of the query.
        onwards: the stage's differentiation, and those of the stages after it.
        processes: that share the work.
        compare: whether the query compares them.
    """
    if replicates == 1 or not any(differentiation.draws for differentiation in onwards):
        return cost
    each = 1 if onwards[0].sampled_rows is not None else replicates
    before, compared = cost.details.get("fixed_seconds", 0.0), 0.0
    if compare:
        rows = SAMPLE_ROWS if isinstance(bound.rows, Stream) else min(SAMPLE_ROWS, len(bound.rows))
        compared = replicates * cost.score_seconds_per_row * rows / processes
    fixed = replicates * before + compared
    details = {**cost.details, "replicates": replicates, "fixed_seconds": fixed}
    if "usual_solve_seconds" in details:
        details["usual_solve_seconds"] = each * (details["usual_solve_seconds"] - before) + fixed
    return replace(
        cost,
        solve_seconds=each * (cost.solve_seconds - before) + fixed,
        score_seconds_per_row=replicates * cost.score_seconds_per_row,
        vector_bytes=replicates * cost.vector_bytes,
        details=details,
    )


def load(differentiation: Differentiation, tensors: dict[str, Tensor], certificate: dict[str, Any]) -> StageSolution:
    """The solution of which `tensors` and `certificate` were saved, with or without replicates."""
    certificates = certificate.get("replicates")
    if certificates is None:
        return differentiation.load(tensors, certificate)
    parts = nested_keys(tensors)
    differentiations = [differentiation.replicate(r, len(certificates)) for r in range(len(certificates))]
    loaded = [
        differentiation.load(parts.get(str(r), {}), certificates[r])
        for r, differentiation in enumerate(differentiations)
    ]
    return joined(differentiations, loaded)
