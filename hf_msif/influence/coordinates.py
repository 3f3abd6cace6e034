"""A stage's curvature in the coordinates of its optimiser: P^½ H P^½, P = 1/(√v̂ + ε) for AdamW."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import vectors
from ..curvature import Curvature
from ..curvature.derivatives import Evaluation, example_gradients
from ..curvature.whitened import Whitened
from ..training.optimisers import SGD
from ..training.trajectory import Snapshot, Trajectory
from ..vectors import Block

MOMENT_ROWS = 256  # on which second moments that are not known are estimated


def whitened(operator: Curvature, trajectory: Trajectory, snapshot: Snapshot) -> Whitened:
    """A = P^½ H P^½ at a state of a run, with AdamW's decoupled weight decay on its diagonal; P = 1 for SGD.

    Where the run's second moments are not known, v̂ is estimated (`_mean_squares`).
    """
    optimiser, parameters = trajectory.optimiser, operator.parameters
    if isinstance(optimiser, SGD):
        return Whitened(operator, {name: torch.ones_like(p) for name, p in parameters.items()})
    if snapshot.second_moments is None:
        snapshot = snapshot._replace(second_moments=_mean_squares(operator, trajectory.batch or 1))
    known = trajectory.roots(snapshot)
    roots = {name: known[name].to(p) for name, p in parameters.items()}
    decay = optimiser.weight_decay
    return Whitened(operator, roots, {name: decay for name in trajectory.decayed if name in roots and decay})


def _mean_squares(operator: Curvature, rows_per_step: int) -> dict[str, Tensor]:
    """E[g_B²] of the gradients g_B of batches of B = `rows_per_step` rows: ḡ² + (E[g_x²] − ḡ²)/B.

    g_x is the gradient of a row's loss, in units of the mean number of terms. It is what AdamW's second moments
    average along a run, here on at most `MOMENT_ROWS` of the operator's rows.
    """
    engine, objective, names = operator.engine, operator.objective, tuple(operator.parameters)
    rows, counts = operator.rows[:MOMENT_ROWS], []
    like = vectors.stack([operator.parameters, operator.parameters])

    def sums() -> Iterator[Block]:
        for _, batch in engine.batches(rows, objective, operator.batch_size):
            evaluation = Evaluation(operator.model, objective, batch)
            with torch.no_grad():
                counts.append(float(evaluation.losses({})[1].double().sum()))
            slopes = example_gradients(evaluation, names)
            yield {name: torch.stack([g.sum(0), g.square().sum(0)]) for name, g in slopes.items()}

    with operator.model.evaluating():
        total = engine.sum(like, sums())
    unit = len(rows) / max(sum(engine.gather([sum(counts)])), 1.0)
    moments = {}
    for name, (first, second) in total.items():
        squared, mean = (unit * first / len(rows)) ** 2, unit**2 * second / len(rows)
        moments[name] = squared + (mean - squared).clamp(min=0) / rows_per_step
    return moments
