"""What a pull-back through an implicit stage costs: times of a few batches, and a forecast of its products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import vectors
from ..adapters.functional import memo_bytes
from ..curvature.base import MEMO_BYTES
from ..curvature.derivatives import Evaluation, example_gradients
from ..curvature.whitened import Whitened
from ..engine.corpus import first_rows
from ..engine.stream import Stream
from ..solvers import Solver
from ..solvers.forecast import STEPS, Forecast, can_forecast, forecast
from ..vectors import Block
from .cost import Cost, activation_bytes, attended, best_seconds, size_text, time_text

GRADIENT_PASSES = 3  # forward passes that the gradient of the certificate takes
FORECAST_SECONDS = 60.0  # of the Lanczos run of a forecast; fewer rows are taken where it would take longer


@dataclass(frozen=True)
class Passes:
    """Seconds on one process, over all curvature rows; those that are `fixed` do not grow with the rows."""

    forward: float
    fixed: float
    first_product: float
    product: float
    score_per_row: float
    forward_passes_per_score: float
    how: str
    copied_bytes: int
    held_memo: int
    activations: int
    curvature_bytes: int
    approximations: list[str]


# `Any` stands for `implicit.Implicit`, whose module imports this one.
def implicit_cost(implicit: Any, columns: int, processes: int, adjoint: Block | None, brief: bool = False) -> Cost:
    """What a pull-back of Q = `columns` columns takes on each process.

    A product is timed on one batch of medium length, and scaled to a pass over all curvature rows by the ratio of the
    forward passes. The first product is timed apart: later ones find outputs of frozen modules in the memo. How many
    products the solver will take is foretold by its first `STEPS` iterations at `adjoint`, or at the gradients of rows
    where that is None; on all curvature rows, or on as many as `FORECAST_SECONDS` allow. A `brief` cost has times
    alone, for all products that the solver may take: nothing is foretold, and the memory of a batch is not measured.
    """
    bound, (solver, why) = implicit.bound, implicit.solver_for(columns)
    examples = curvature_examples(implicit)
    passes = measure(implicit, columns, examples, memory=not brief)
    parameters = implicit.operator_parameters
    size = sum(p.numel() for p in parameters.values())
    worst = usual = solver.products(size, columns)
    damping = implicit.training_damping
    if damping is not None:
        damping = damping.compared(implicit.in_coordinates(implicit.curvature(_few_rows(implicit, examples))), solver)
    found, rows = _forecast(implicit, solver, passes, columns, examples, adjoint) if not brief else (None, 0)
    if found is not None:
        before = worst - found.most  # of `Solver.init`
        usual, worst = before + max(found.usual), before + found.worst
    mixed_seconds = passes.forward * (3 + 4 * columns) if bound.split.frozen else 0.0  # derivatives.hessian_product
    extra = passes.first_product - passes.product if worst else 0.0
    extra += mixed_seconds + GRADIENT_PASSES * passes.forward
    solve, at_most = ((n * passes.product + extra) / processes for n in (usual, worst))
    solver_bytes, model_bytes = implicit.solver_bytes(columns, processes), vectors.nbytes(bound.model.parameters)
    held_memo = passes.held_memo if worst else 0
    foretold = "" if found is None else f"usually {usual:,} products, {time_text(solve)}, judging by its first {STEPS}"
    if found is not None and rows < examples:
        foretold += f" with {rows:,} of the rows"
    text = (
        f"one pass of {examples:,} rows: {time_text(passes.forward / processes)} forward, "
        f"{time_text(passes.product / processes)} per curvature product with {columns} column(s)",
        *([] if implicit.curvature_kind[1] is None else [f"curvature='auto' takes {implicit.curvature_kind[1]}"]),
        *([] if why is None else [f"solver='auto' takes {why}"]),
        f"solve: {foretold}{'; ' if foretold else ''}at most {worst:,} products, {time_text(at_most)}",
        *([] if damping is None else [f"damping='training' is {damping}"]),
        *(f"curvature: {line}" for line in passes.approximations),
        f"scoring: {passes.forward_passes_per_score:.1f} forward passes per row with {columns} column(s), by "
        f"{passes.how}" + (f"; copies of columns {size_text(passes.copied_bytes)}" if passes.copied_bytes else ""),
        f"memory on each of {processes} process(es): vectors {size_text(solver_bytes)}, model "
        f"{size_text(model_bytes)}, a batch's activations {size_text(passes.activations)}"
        + (f", outputs of the frozen encoder {size_text(held_memo)}" if held_memo else ""),
    )
    return Cost(
        solve_seconds=at_most,
        score_seconds_per_row=passes.score_per_row,
        memory_bytes=solver_bytes + passes.activations + passes.curvature_bytes,
        model_bytes=model_bytes,
        vector_bytes=columns * vectors.nbytes(parameters),
        details={
            "forward_seconds": passes.forward / processes,
            "curvature_examples": examples,
            "fixed_seconds": passes.fixed / processes,
            "first_product_seconds": passes.first_product / processes,
            "product_seconds": passes.product / processes,
            "products": worst,
            "usual_products": usual,
            "usual_solve_seconds": solve,
            "solver_bytes": solver_bytes,
            "activation_bytes": passes.activations,
            "memo_bytes": held_memo,
            "score_bytes": columns * vectors.nbytes(parameters) + passes.copied_bytes + passes.activations,
        },
        text=text,
    )


def curvature_examples(implicit: Any) -> int:
    """The number of rows on which the curvature is estimated, without reading them."""
    samples, rows = implicit.bound.stage.curvature_samples, implicit.bound.rows
    if isinstance(rows, Stream):
        assert samples is not None
        return samples
    return min(samples or len(rows), len(rows))


def _some_rows(implicit: Any, size: int) -> list[dict]:
    bound = implicit.bound
    return first_rows(bound.rows, size) if isinstance(bound.rows, Stream) else bound.subset(size)


def _few_rows(implicit: Any, examples: int) -> list[dict]:
    """About four batches."""
    return _some_rows(implicit, min(4 * implicit.bound.batch_size, examples))


def measure(implicit: Any, columns: int, examples: int, memory: bool = True) -> Passes:
    """Times on at most four batches, scaled to all curvature rows; without `memory`, a batch's activations count as
    nothing."""
    from .differentiation import DirectCertificate

    bound = implicit.bound
    rows = _few_rows(implicit, examples)
    batches = list(bound.engine.batches(rows, bound.objective, bound.batch_size))
    indices, batch = batches[len(batches) // 2]
    widest, _ = max(batches, key=lambda pair: attended(pair[1]))
    operator = implicit.curvature([rows[i] for i in indices])
    v = vectors.rademacher(operator.parameters, columns, seed=0)
    evaluation = Evaluation(bound.model, bound.objective, batch)
    scorer = implicit.direction(v, DirectCertificate("random", columns))
    scored_rows: Any = [rows[i] for i in indices]
    with torch.no_grad(), bound.model.evaluating():
        operator.count, evaluation.losses({})  # the first pass pays for what later ones find ready
        batch_seconds = best_seconds(evaluation.losses, {})
        forward = sum(best_seconds(replace(evaluation, batch=batch).losses, {}) for _, batch in batches)
        forward *= examples / len(rows)
        scorer.influence(batch, scored_rows)
        scored = best_seconds(scorer.influence, batch, scored_rows) / batch_seconds
    first = best_seconds(operator.matvec, v, once=True)
    memo = sum(memo_bytes(e.memo or {}) for e in operator.evaluations) / len(indices) * examples
    later = best_seconds(operator.matvec, v) if memo or first < 0.2 else first
    memo_share = min(1.0, MEMO_BYTES / memo) if memo else 0.0
    fixed = operator.fixed_seconds
    if operator.holds_batches:
        later_seconds = later * forward / batch_seconds
        first_seconds = first * forward / batch_seconds if memo else later_seconds
        product = memo_share * later_seconds + (1 - memo_share) * first_seconds
    else:  # the first product fits the curvature, and later ones read no row
        product = best_seconds(operator.matvec, v)
        first_seconds = max(0.0, first - product - fixed) * forward / batch_seconds + fixed + product
    return Passes(
        forward=forward,
        fixed=fixed,
        first_product=first_seconds,
        product=product,
        score_per_row=scored * forward / examples,
        forward_passes_per_score=scored,
        how=scorer.how,
        copied_bytes=scorer.copied_bytes,
        held_memo=int(memo_share * memo),
        activations=activation_bytes(implicit.curvature([rows[i] for i in widest]), columns) if memory else 0,
        curvature_bytes=operator.held_bytes(),
        approximations=operator.approximations(),
    )


def _forecast(
    implicit: Any, solver: Solver, passes: Passes, columns: int, examples: int, adjoint: Block | None
) -> tuple[Forecast | None, int]:
    """The solver's products, and the number of rows on which they are foretold; None where nothing foretells them."""
    if not can_forecast(solver):
        return None, 0
    bound = implicit.bound
    rows = max(1, min(examples, int(examples * FORECAST_SECONDS / (STEPS * max(passes.product, 1e-9)))))
    operator = implicit.operator if rows == examples else implicit.curvature(_some_rows(implicit, rows))
    if adjoint is not None:
        b = vectors.select(adjoint, bound.split.trained)
    else:
        batch = bound.collate(_some_rows(implicit, columns))
        with bound.model.evaluating():
            b = example_gradients(Evaluation(bound.model, bound.objective, batch), bound.split.trained)
    system = implicit.in_coordinates(operator)
    if isinstance(system, Whitened):
        b = system.scaled(b)
    return forecast(system, b, solver), rows
