"""`curvature="auto"`: the exact Gauss-Newton matrix where a solve with it takes reasonable time, else EK-FAC."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import Engine
from ..objectives import Objective
from .base import Curvature
from .ekfac import EKFAC
from .gauss_newton import GaussNewton

BUDGET = 3600.0  # seconds of a solve for one test row
PRODUCTS = 100  # of conjugate gradients with damping="auto"; they are at most 178
PRODUCT_FORWARD_PASSES = 5
# Operations per second that matrix products of middling size reach on one core, and on one GPU. They are not measured,
# so that the choice does not depend on what else the machine does.
SPEEDS = {"cpu": 5e10, "cuda": 2e13}


def chosen(
    model: FunctionalModel, objective: Objective, some_rows: list[dict], number: int, engine: Engine
) -> tuple[type[Curvature], str]:
    """`GaussNewton`, if conjugate gradients with it would take at most `BUDGET` per test row, else `EKFAC`; and why.

    The time is estimated from the numbers of parameters, rows, tokens, processes and cores, and from nominal speeds.

    Args:
        model: the model.
        objective: makes batches of rows.
        some_rows: a few of the curvature's rows, for their number of tokens.
        number: of the curvature's rows.
        engine: its processes share the rows.
    """
    with engine.raising_together():
        batch = objective.collate(some_rows)
    shapes = [t.shape for t in batch.values() if isinstance(t, Tensor) and t.dim() > 1]
    tokens = max((shape[0] * shape[1] for shape in shapes), default=len(some_rows)) / len(some_rows)
    tables = {id(module.weight) for module in model.model.modules() if isinstance(module, torch.nn.Embedding)}
    size = sum(p.numel() for p in model.model.parameters() if id(p) not in tables)
    speed = SPEEDS["cpu"] * torch.get_num_threads() if engine.device.type == "cpu" else SPEEDS["cuda"]
    work = 2.0 * size * tokens * number * PRODUCT_FORWARD_PASSES * PRODUCTS
    hours = work / speed / engine.processes / 3600
    exact = f"a solve with the exact matrix of {number:,} rows takes about {hours:.2g} h per test row"
    if hours * 3600 <= BUDGET:
        return GaussNewton, f"gauss_newton, since {exact}"
    return EKFAC, (
        f"ekfac, an approximation, since {exact}, more than {BUDGET / 3600:.2g} h; with fewer curvature_samples it "
        "would be exact"
    )


def auto(*arguments: Any, **settings: Any) -> Curvature:
    """What stands for the name where few rows are looked at; a stage asks `chosen` for the whole of its rows."""
    return GaussNewton(*arguments, **settings)
