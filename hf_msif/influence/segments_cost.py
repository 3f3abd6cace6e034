"""What a pull-back in segments costs: times of a few batches, and the iterations that the spectrum asks for."""

from __future__ import annotations

import math
from typing import Any

from .. import vectors
from ..solvers.lanczos import largest_eigenvalue
from .cost import Cost, size_text, time_text
from .implicit_cost import curvature_examples, measure

KRYLOV_BYTES = 4 * 2**30
PRODUCT_BLOCKS = 4  # as those of an implicit stage, beside the Krylov vectors


# `Any` stands for `segments.Segments` in this module, whose module imports this one.
def usual_iterations(link: Any) -> int:
    """About √(τ σ) · ln(2/tol), σ the largest eigenvalue on a few rows: the degree of a polynomial that is as near to
    e^{−τσ} on the spectrum (Hochbruck & Lubich, 1997)."""
    known = vars(link).get("_usual_iterations")
    if known is None:
        segments = link.trajectory.segments
        rows = link.bound.subset(min(4 * link.bound.stage.batch_size, curvature_examples(link)))
        reach = 1.0
        for i in {0, len(segments) - 1}:
            system = link.whitened(link.curvature(rows, i), i)
            reach = max(reach, largest_eigenvalue(system) * link.trajectory.time(segments[i]))
        known = link._usual_iterations = min(link.max_iter, math.ceil(math.sqrt(reach) * math.log(2 / link.tol)))
    return known


def columns_at_a_time(link: Any, columns: int) -> int:
    """How many of the columns share a Krylov pass, so that their vectors fit into `KRYLOV_BYTES`; at least one."""
    column = link.slots * vectors.nbytes(vectors.select(link.bound.model.parameters, link.bound.split.trained))
    if link.bound.engine.sharded:
        column = -(-column // link.bound.engine.processes)
    if columns * column * link.max_iter <= KRYLOV_BYTES:
        return columns
    return max(1, min(columns, KRYLOV_BYTES // (column * usual_iterations(link))))


def solver_bytes(link: Any, columns: int, iterations: int, processes: int) -> int:
    """Bytes of the Krylov vectors, and of what a product holds, on each process."""
    vector = vectors.nbytes(vectors.select(link.bound.model.parameters, link.bound.split.trained))
    held = columns_at_a_time(link, columns) * link.slots * (iterations + 2) * vector
    if link.bound.engine.sharded:
        held = -(-held // processes)
    return held + PRODUCT_BLOCKS * columns * link.slots * vector


def segments_cost(link: Any, columns: int, processes: int) -> Cost:
    """What a pull-back of Q = `columns` columns takes on each process."""
    bound, examples, number = link.bound, curvature_examples(link), len(link.trajectory.segments)
    passes, iterations = measure(link, columns * link.slots, examples), usual_iterations(link)
    mixed = passes.forward * (3 + 4 * columns) if bound.split.frozen else 0.0  # derivatives.hessian_product
    usual, most = (number * (n * passes.product + mixed) / processes for n in (iterations, link.max_iter))
    model_bytes, held = vectors.nbytes(bound.model.parameters), solver_bytes(link, columns, iterations, processes)
    vector_bytes = number * columns * vectors.nbytes(vectors.select(bound.model.parameters, bound.split.trained))
    per_score = number * passes.forward_passes_per_score / link.slots + 1
    text = (
        f"one pass of {examples:,} rows: {time_text(passes.forward / processes)} forward, "
        f"{time_text(passes.product / processes)} per curvature product with {columns} column(s)",
        f"solve: {number} segments, usually {iterations} products each, {time_text(usual)}; at most {link.max_iter} "
        f"each, {time_text(most)}",
        f"scoring: about {per_score:.1f} forward passes per row with {columns} column(s), by {passes.how}, at each of "
        f"{number} states",
        f"memory on each of {processes} process(es): Krylov vectors {size_text(held)}, {number} states of "
        f"{size_text(model_bytes)}, a batch's activations {size_text(passes.activations)}",
    )
    return Cost(
        solve_seconds=most,
        score_seconds_per_row=per_score * passes.forward / examples,
        memory_bytes=held + number * model_bytes + passes.activations + passes.curvature_bytes,
        model_bytes=model_bytes,
        vector_bytes=vector_bytes,
        details={
            "forward_seconds": passes.forward / processes,
            "curvature_examples": examples,
            "product_seconds": passes.product / processes,
            "segments": number,
            "usual_products": number * iterations,
            "products": number * link.max_iter,
            "usual_solve_seconds": usual,
            "solver_bytes": held,
            "activation_bytes": passes.activations,
            "score_bytes": vector_bytes + passes.activations,
        },
        text=text,
    )
