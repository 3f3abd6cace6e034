"""How an adjoint goes back through the segments of a run: the state of the sweep, one segment, and the certificate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..curvature.sharded import Sharded
from ..curvature.whitened import Whitened
from ..display import LINES, Curves, Displayed, Summary, Table, few_lines, few_rows, plural
from ..engine.accelerated import Engine
from ..engine.checkpoints import Checkpoint
from ..engine.files import flat_keys, nested_keys
from ..solvers._base import Progress
from ..solvers.matrix_functions import apply_functions
from ..training.optimisers import SGD
from ..training.response import responses
from ..training.trajectory import Segment
from ..vectors import Block

# A positive eigenvalue along which the linearised steps grow more than this in a segment: the run, which stayed where
# it was, answered it otherwise (curvature falls where steps oscillate), and is taken to have converged along it.
UNSTABLE = 10.0


@dataclass(frozen=True)
class SegmentReport:
    """How the adjoint went through one segment; lists have one entry per column.

    Attributes:
        begin, end, step: of `training.trajectory.Segment`.
        time: τ, in the coordinates of the preconditioner.
        iterations: products of each column; with momentum, the larger of its two vectors'.
        error: relative change of the last two iterates of u_l and λ, the larger one.
        smallest_ritz, largest_ritz: bounds of A_l's spectrum, from within.
        reach: the largest rate times the largest Ritz value; beyond 1 the limits of small rates do not hold.
        amplified: the largest factor by which the steps of the segment multiply an eigenvector.
        unstable: whether eigenvalues beyond the stability of the rates were taken for converged (`UNSTABLE`).
        growth: ‖λ‖ at the start of the segment, relative to ‖a‖; empty where it is not asked for.
    """

    begin: int
    end: int
    step: int
    time: float
    iterations: list[int]
    error: list[float]
    smallest_ritz: float
    largest_ritz: float
    reach: float
    amplified: float
    unstable: bool
    growth: list[float]


@dataclass(frozen=True, repr=False)
class SegmentsCertificate(Displayed):
    """What is known of a pull-back in segments.

    Attributes:
        tol: a column is solved where its error is at most tol in each segment.
        max_iter: products at most, in each segment.
        segments: one report for each segment, last first.
    """

    tol: float
    max_iter: int
    segments: list[SegmentReport] = field(default_factory=list)

    @property
    def error(self) -> list[float]:
        """The largest error of each column."""
        return [max(errors) for errors in zip(*(report.error for report in self.segments), strict=True)]

    @property
    def converged(self) -> list[bool]:
        return [error <= self.tol for error in self.error]

    @property
    def status(self) -> list[str]:
        return ["converged" if converged else "max_iter" for converged in self.converged]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return {**asdict(self), "converged": self.converged, "status": self.status}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SegmentsCertificate:
        """Inverse of `to_dict`."""
        reports = [SegmentReport(**report) for report in values["segments"]]
        return cls(values["tol"], values["max_iter"], reports)

    def __str__(self) -> str:
        lines = []
        for report in self.segments:
            line = (
                f"steps {report.begin + 1:,} to {report.end:,} at the state after {report.step:,}: τ = "
                f"{report.time:.3g}, eigenvalues {report.smallest_ritz:.2g} to {report.largest_ritz:.2g}, at most "
                f"{plural(max(report.iterations), 'iteration')}, error {max(report.error):.1e} (expected at most "
                f"{self.tol:g})"
            )
            if report.growth:
                line += f", adjoint {max(report.growth):.2g} times its size at the end"
            if report.unstable:
                line += "; directions too curved for the rates count as converged"
            lines.append(line)
        return "\n".join(few_lines(lines if len(lines) <= LINES else [self.summary().title, *lines]))

    def curves(self) -> Curves:
        ends = [report.end for report in self.segments]
        worst = [max(report.error) for report in self.segments]
        return Curves("last step of the segment", "error", {"the worst column": (ends, worst)}, limit=self.tol)

    def summary(self) -> Summary:
        title = (
            f"segments: {sum(self.converged)} of {plural(len(self.converged), 'column')} converged in "
            f"{plural(len(self.segments), 'segment')}, error at most {max(self.error, default=0.0):.1e} (expected "
            f"at most {self.tol:g})"
        )
        rows = [
            [
                f"{report.begin + 1:,} to {report.end:,}",
                f"{report.time:.3g}",
                str(max(report.iterations)),
                f"{max(report.error):.1e}",
            ]
            for report in self.segments
        ]
        return Summary(title, tables=[Table(["steps", "τ", "iterations", "error"], few_rows(rows))])


@dataclass
class Sweep:
    """A pull-back under way, between two segments.

    Attributes:
        slots: the adjoint of the parameters and of the optimiser's momentum, on the trained names.
        frozen: the adjoint of the frozen names.
        ties: what the tie to the stage before adds, on its names.
        u: number of a segment → u_l.
        reports: of the segments that are done, last first.
    """

    slots: list[Block]
    frozen: Block
    ties: Block
    u: dict[int, Block]
    reports: list[SegmentReport]

    def save(self, checkpoint: Checkpoint) -> None:
        parts = {"frozen": self.frozen, "ties": self.ties}
        parts |= {f"slot {i}": block for i, block in enumerate(self.slots)}
        parts |= {f"u {i}": block for i, block in self.u.items()}
        checkpoint.save(flat_keys(parts), {"segments": [asdict(report) for report in self.reports]})

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Sweep | None:
        """The sweep that was saved under the same cache key; None where there is none."""
        saved = checkpoint.load()
        if saved is None or "segments" not in saved[1]:
            return None
        parts: dict[str, Block] = {"frozen": {}, "ties": {}, **nested_keys(saved[0])}
        slots = [parts[f"slot {i}"] for i in range(sum(part.startswith("slot ") for part in parts))]
        u = {int(part[2:]): block for part, block in parts.items() if part.startswith("u ")}
        reports = [SegmentReport(**report) for report in saved[1]["segments"]]
        return cls(slots, parts["frozen"], parts["ties"], u, reports)


def go_back(
    segment: Segment,
    system: Whitened,
    descent: tuple[SGD, list[float]],
    slots: list[Block],
    carries: bool,
    tol: float,
    max_iter: int,
    engine: Engine,
    progress: Progress | None = None,
) -> tuple[Block, list[Block], SegmentReport]:
    """Takes an adjoint from the end of a segment to its start, by functions of A = P^½ H P^½.

    Args:
        segment: its steps.
        system: A.
        descent: the optimiser in the coordinates of P, and its rates, see `response.linear_form`.
        slots: λ on the parameters and on the momentum's buffer, Q columns each.
        carries: whether λ at the start is asked for; without it, the slots are returned as they came.
        tol, max_iter: of `apply_functions`.
        engine: shards the Krylov vectors where it is asked to.

    Returns:
        u; λ at the start; the report, with the growth of λ in this segment.
    """
    optimiser, rates = descent
    columns, number = vectors.columns(slots[0]), len(slots)
    outputs = 1 + number if carries else 1
    unstable, amplified = False, 0.0

    def functions(values: Tensor, numbers: list[int]) -> Tensor:
        nonlocal unstable, amplified
        slot, each = torch.tensor([q // columns for q in numbers]), torch.arange(len(numbers))
        # One walk through the schedule for all columns: along an eigenvalue it is the same for each.
        answers = responses(optimiser, rates, values.flatten()).unflatten(2, values.shape)
        response = answers[slot, :, each]
        too_curved = (values > 0) & ~(response[each, 1 + slot].abs() <= UNSTABLE)
        if too_curved.any():
            unstable = True
            converged = torch.zeros_like(response)
            converged[:, 0] = (slot == 0)[:, None] / values
            response = torch.where(too_curved[:, None], converged, response)
        growth = response[each, 1 + slot].abs().max().nan_to_num(nan=torch.inf)
        amplified = max(amplified, float(growth))
        return response[:, :outputs]

    # A linear function of the parameters φ is one of P^−½ φ with P^½ λ, and of the momentum the other way round.
    whitened = [system.scaled(slots[0]), *(system.unscaled(slot) for slot in slots[1:])]
    b = {name: torch.cat([block[name] for block in whitened]) for name in slots[0]}
    groups = [q % columns for q in range(columns * number)]
    if engine.sharded:
        sharded = Sharded(system, engine)
        results, report = apply_functions(sharded, sharded.cut(b), functions, tol, max_iter, groups, progress)
        results = [sharded.join(result) for result in results]
    else:
        results, report = apply_functions(system, b, functions, tol, max_iter, groups, progress)
    summed = [{name: t.unflatten(0, (number, columns)).sum(0) for name, t in result.items()} for result in results]
    u = system.scaled(summed[0])
    if carries:
        # What the run never moved (P = 0) keeps its adjoint.
        moved, *buffers = summed[1:]
        back = system.unscaled(moved)
        start = {name: torch.where(system.roots[name] > 0, back[name], slots[0][name]) for name in back}
        slots = [start, *(system.scaled(block) for block in buffers)]
    # A momentum that starts at zero shows nothing of the spectrum.
    shown = [i for i, count in enumerate(report.iterations) if count]
    smallest = min((report.smallest_ritz[i] for i in shown), default=0.0)
    largest = max((report.largest_ritz[i] for i in shown), default=0.0)
    by_column = [list(range(q, columns * number, columns)) for q in range(columns)]
    return (
        u,
        slots,
        SegmentReport(
            *segment,
            time=float(responses(optimiser, rates, torch.zeros(1))[0, 0, 0]),
            iterations=[max(report.iterations[i] for i in places) for places in by_column],
            error=[max(report.error[i] for i in places) for places in by_column],
            smallest_ritz=smallest,
            largest_ritz=largest,
            reach=max(rates) / (1 - optimiser.momentum) * largest,
            amplified=amplified,
            unstable=unstable,
            growth=[],
        ),
    )


def in_parts(slots: list[Block], width: int) -> list[list[Block]]:
    """The slots of at most `width` columns at a time."""
    columns = vectors.columns(slots[0])
    starts = range(0, columns, width)
    return [[{name: t[start : start + width] for name, t in slot.items()} for slot in slots] for start in starts]


def joined(parts: list[tuple[Block, list[Block], SegmentReport]]) -> tuple[Block, list[Block], SegmentReport]:
    """What `go_back` returns for all columns, from what it returned for parts of them."""
    if len(parts) == 1:
        return parts[0]

    def cat(blocks: Iterable[Block]) -> Block:
        blocks = list(blocks)
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    us, slots, reports = zip(*parts, strict=True)
    report = replace(
        reports[0],
        iterations=[count for each in reports for count in each.iterations],
        error=[error for each in reports for error in each.error],
        smallest_ritz=min(each.smallest_ritz for each in reports),
        largest_ritz=max(each.largest_ritz for each in reports),
        reach=max(each.reach for each in reports),
        amplified=max(each.amplified for each in reports),
        unstable=any(each.unstable for each in reports),
    )
    return cat(us), [cat(each) for each in zip(*slots, strict=True)], report
