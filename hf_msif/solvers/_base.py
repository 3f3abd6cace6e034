"""What every solver does with an operator: counted products, its size, its mean eigenvalue, λ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import vectors
from ..errors import InputError
from ..vectors import Block


class Operator(Protocol):
    """A symmetric linear map A on the space of `parameters` (plain tensors, no column axis), P scalars in all.

    It may also have `trace() -> float`; without one, `damping="auto"` estimates the trace from four more products.
    """

    parameters: Mapping[str, Tensor]

    def matvec(self, block: Block) -> Block:
        """A v for each column of a block, tensors of shape (Q, *parameter.shape); Q varies from call to call."""
        ...


class Counted:
    """The operator as the solvers use it: every product is checked, and counted for the columns it was spent on."""

    def __init__(self, operator: Operator, like: Block):
        first = next(iter(like.values()))
        self.operator = operator
        self.counts = torch.zeros(first.shape[0], dtype=torch.long, device=first.device)

    def __call__(self, v: Block, index: Tensor) -> Block:
        """A v for a block v that holds the columns `index`. Not to be written to: it may be the operator's own."""
        if not len(index):
            return v
        self.counts[index] += 1
        product = self.operator.matvec(v)
        product = {name: product[name].detach() for name in v}
        check_finite(product, "a product of the operator (matvec)")
        return product


def check_finite(x: Block, what: str) -> None:
    """Raises InputError when `what`, the block x, holds NaN or inf."""
    for name, t in x.items():
        bad = (~t.isfinite().all()).double().reshape(1)
        if vectors.whole(bad)[0]:  # on every process, where each holds a slice
            raise InputError(f"{what} holds NaN or inf in parameter {name!r}.")


def dimension(operator: Operator) -> int:
    """P, the number of scalars among the operator's parameters (of the whole vectors, where it works on slices)."""
    if hasattr(operator, "dimension"):
        return operator.dimension
    return sum(p.numel() for p in operator.parameters.values())


def eps(x: Mapping[str, Tensor]) -> float:
    """Rounding unit of the coarsest dtype in x."""
    return max(torch.finfo(t.dtype).eps for t in x.values())


class Damping(NamedTuple):
    """λ in force, and the mean eigenvalue it was derived from (None when λ was given)."""

    value: float
    mean_eigenvalue: float | None


def damping(solver: Any, operator: Operator, squared: bool = False) -> Damping:
    """`solver.damping`, or `solver.damping_fraction` × mean eigenvalue for "auto".

    The mean eigenvalue is trace/P. The trace is the operator's own where it has one, else Hutchinson's (1990) mean of
    vᵀAv over four seeded Rademacher vectors. `squared` takes the mean of ‖Av‖² instead: the trace of A², estimated.
    """
    if solver.damping != "auto":
        return Damping(float(solver.damping), None)
    if hasattr(operator, "trace") and not squared:
        trace = float(operator.trace())
    else:
        sliced = getattr(operator, "random", None)
        v = sliced(4) if sliced else vectors.rademacher(operator.parameters, columns=4, seed=0)
        product = Counted(operator, v)(v, torch.arange(4))
        trace = vectors.dot(product if squared else v, product).mean().item()
    mean = trace / dimension(operator)
    if not 0 < mean < math.inf:
        raise InputError(
            f"damping='auto' needs a positive mean eigenvalue, but the trace is {trace:.3g}: use MinRes(damping=0.0) "
            "or curvature='gauss_newton', or give damping as a number."
        )
    return Damping(solver.damping_fraction * mean, mean)


def check_settings(solver: Any, counts: tuple[str, ...]) -> None:
    """Raises InputError, naming the setting, unless λ ≥ 0 or "auto", fraction > 0, tol ≥ 0 and the `counts` ≥ 1."""

    def require(name: str, expected: str, above: float = -1.0) -> None:
        value = getattr(solver, name)
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or value <= above or (name in counts and value != int(value)):
            raise InputError(f"{type(solver).__name__}({name}={value!r}): expected {expected}.")

    if solver.damping != "auto":
        require("damping", "a number >= 0 or 'auto'")
    require("damping_fraction", "a number > 0", above=0)
    require("tol", "a number >= 0")
    for name in counts:
        require(name, "a whole number >= 1", above=0)
