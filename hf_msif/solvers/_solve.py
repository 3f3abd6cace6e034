"""`solve`: the one verb of solvers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import vectors
from ..errors import InputError
from ..vectors import Block
from ._base import Problem, Progress, Solver, as_solver
from .certificate import Solution
from .operator import CountedOperator, Operator, dimension

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint


def solve(
    operator: Operator,
    b: Block,
    solver: Solver,
    state: Any = None,
    progress: Progress | None = None,
    checkpoint: SolverCheckpoint | None = None,
) -> Solution:
    """Solves the system that `solver` defines, (A + λI)u = b for most, for each of the Q columns of `b` independently.

    Args:
        operator: any object with `matvec(block) -> block`, linear and symmetric, and `parameters: dict[str, Tensor]`;
            see `Operator` for what else it may have.
        b: Q right-hand sides, `dict[str, Tensor]` of shapes (Q, *parameter.shape), dtype and device of the parameters.
        solver: `CG(...)`, `SquaredCG(...)`, `MinRes(...)`, `Identity()`, `Dense(...)`, `ClosedForm(...)`,
            `Stochastic(...)`, or a `Solver` of your own.
        state: `solver.init(operator)`, when several blocks are solved with the same operator and solver.
        progress: called as `progress(iteration, residual)` once per iteration, with the largest relative residual
            (as the recurrence estimates it) among the columns that were still running.
        checkpoint: where a Krylov solver saves its state from time to time; a state that was saved for the same system
            is loaded, and the solve continues from there.

    Returns:
        `Solution(value, certificate)`. A column that did not converge is *reported* in the certificate, never raised.

    Raises:
        InputError: NaN or inf in `b` or in a product; `b` and `operator.parameters` disagree; no solver.

    >>> import torch
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, 4.0], dtype=torch.float64)}
    >>> from hf_msif.solvers import CG
    >>> b = {"w": torch.tensor([[1.0, 2.0]], dtype=torch.float64)}
    >>> solution = solve(Diagonal(), b, CG(damping=0.0))
    >>> solution.value["w"].round(decimals=6).tolist()
    [[1.0, 0.5]]
    >>> solution.certificate.converged, solution.certificate.iterations
    ([True], [2])
    """
    solver, parameters = as_solver(solver), operator.parameters
    if set(b) != set(parameters) or not b:
        unmatched = sorted(set(b) ^ set(parameters))
        raise InputError(f"b and operator.parameters must name the same parameters, but differ in {unmatched[:5]}.")
    columns = vectors.columns(b)
    for name, p in parameters.items():
        expected = ((columns, *p.shape), p.dtype, p.device)
        actual = (tuple(b[name].shape), b[name].dtype, b[name].device)
        if actual != expected:
            raise InputError(f"b[{name!r}] has shape, dtype and device {actual}, the operator expects {expected}.")
    solver, why = solver.chosen(problem(operator, columns))
    counted = CountedOperator(operator, columns)
    b = {name: b[name].detach() for name in parameters}
    counted.check_finite(b, "b")
    if state is None:
        state = solver.init(operator)
    solution = solver.compute(counted, b, state, progress, checkpoint)
    return solution if why is None else replace(solution, certificate=replace(solution.certificate, choice=why))


def problem(operator: Operator, columns: int, sharded: bool = False) -> Problem:
    """What a solver may be chosen by, for Q = `columns` right-hand sides.

    An operator that is known to be positive semi-definite says so by an attribute `semidefinite`.

    Args:
        operator: A.
        columns: Q.
        sharded: each process is to hold a shard of the vectors.
    """
    inner = getattr(operator, "operator", operator)  # of a `Sharded` one
    return Problem(
        parameters=dimension(operator),
        columns=columns,
        semidefinite=getattr(inner, "semidefinite", False),
        closed_form=hasattr(operator, "inverse"),
        sharded=sharded or inner is not operator,
        element_size=next(iter(operator.parameters.values())).element_size(),
    )
