"""`Solver`, the class to derive a solver from, and the checks of settings that solvers share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

from ..errors import InputError
from ..vectors import Block
from .certificate import Solution
from .damping import TRAINING, DampingSettings
from .operator import CountedOperator, Operator

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint

Progress = Callable[[int, float], None]


class Problem(NamedTuple):
    """What a solver may be chosen by.

    Attributes:
        parameters: P, the length of a vector.
        columns: Q, the number of right-hand sides.
        semidefinite: the operator is known to be positive semi-definite.
        closed_form: it has `inverse(b, damping)`.
        sharded: each process holds a shard of the vectors.
        element_size: bytes per number.
    """

    parameters: int
    columns: int
    semidefinite: bool = False
    closed_form: bool = False
    sharded: bool = False
    element_size: int = 4


class Solver:
    """Settings that define a linear system Su = c, most often (A + λI)u = b, and how it is solved.

    To write a solver, derive a frozen dataclass from this class, with its settings as fields, and define `compute`
    (and `init`, if something is computed once per operator). It is then used like any other:
    `Stage(..., solver=MySolver(...))`. A solver must be hashable, and two equal solvers must give equal solutions.
    Its `repr` should name all its settings: it is part of the key by which an interrupted solve is found again.

    The class attributes below are facts that others ask of a solver. State them where the default is not right.

    Attributes:
        vectors_held: blocks as large as the right-hand side that `compute` holds at a time beside it, from which the
            memory of a query is estimated. Defaults to 5.
        state_vectors: single vectors that the result of `init` holds, sharded where the blocks are. Defaults to 0.
        shardable: `compute` treats a block only through the functions of `vectors` that act on each entry, through
            `operator.matvec` and through `operator.dot`, so that a block may be this process's shard of longer
            vectors. Where it is False, the default, every process holds whole vectors.
        damped: the solver is a dataclass with a field `damping`, which a sweep may replace. Defaults to False.
        minibatches: it reads a mini-batch of the rows per step, so that the curvature does not hold the batches of all
            rows. Defaults to False.
    """

    vectors_held: ClassVar[int] = 5
    state_vectors: ClassVar[int] = 0
    shardable: ClassVar[bool] = False
    damped: ClassVar[bool] = False
    minibatches: ClassVar[bool] = False

    def chosen(self, problem: Problem) -> tuple[Solver, str | None]:
        """The solver that solves this problem, and why it was chosen. Defaults to itself, without a reason.

        `solve` asks it first; only a solver that leaves the choice open, as `Auto` does, defines it.
        """
        return self, None

    def init(self, operator: Operator) -> Any:
        """What is computed once per operator, such as a factorisation or the value of damping="auto".

        The result is the `state` of every `compute` with this operator. Defaults to None.
        """
        return None

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Any,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides; called by `solve`.

        Args:
            operator: A; its `matvec` checks each product and counts it in `operator.counts`.
            b: Q right-hand sides, tensors of shape (Q, *parameter.shape), known to be finite. Not to be written to.
            state: what `init` returned.
            progress: if given, to be called as `progress(iteration, residual)` once per iteration.
            checkpoint: if given, saves and loads the state of a long solve. A solver may ignore it.

        Returns:
            `Solution(value, certificate)`, where the residuals in the certificate are recomputed from `value`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no compute.")

    def products(self, parameters: int, columns: int) -> int:
        """The largest number of products with all columns that a solve takes, `init` included.

        Args:
            parameters: P, the length of a vector.
            columns: Q, the number of right-hand sides.

        Returns:
            Where the solver has a setting `max_iter`: max_iter + 1, one product per iteration and one to check.

        Raises:
            InputError: the solver has no `max_iter` and does not define this method.
        """
        if not hasattr(self, "max_iter"):
            raise InputError(
                f"{self} does not say how many products it takes; expected a setting max_iter, or a method "
                "products(parameters, columns)."
            )
        return self.max_iter + 1

    def spectral_filter(self, eigenvalues: Tensor, damping: float) -> Tensor:
        """What u has of b in a direction of each curvature σ ≥ 0, where the system is solved: 1 / (σ + λ) by default.

        Args:
            eigenvalues: σ, of any shape.
            damping: λ of the certificate.
        """
        return 1 / (eigenvalues + damping)

    def with_damping(self, damping: float) -> Solver:
        """The same settings with another λ; asked only of a solver that says it is `damped`."""
        return dataclasses.replace(self, damping=damping)  # type: ignore[type-var]  # a damped solver is a dataclass

    def extra_bytes(self, parameters: int) -> int:
        """Bytes that are held beside vectors, for P = `parameters`; of a matrix, for instance. Defaults to 0."""
        return 0


class AdaptedSolver(Solver):
    """An object that has `init` and `compute` and is no `Solver`, with the facts that it does not state itself."""

    def __init__(self, solver: object):
        self.solver = solver
        facts = (
            "vectors_held",
            "state_vectors",
            "shardable",
            "damped",
            "minibatches",
            "max_iter",
            "products",
            "extra_bytes",
            "spectral_filter",
        )
        for member in ("init", "compute", *facts):
            if hasattr(solver, member):
                setattr(self, member, getattr(solver, member))

    def with_damping(self, damping: float) -> Solver:
        return as_solver(dataclasses.replace(self.solver, damping=damping))  # type: ignore[type-var]

    def __repr__(self) -> str:
        return repr(self.solver)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdaptedSolver) and self.solver == other.solver

    def __hash__(self) -> int:
        return hash(self.solver)


def as_solver(solver: object) -> Solver:
    """The solver itself, or an object with `init` and `compute` made one.

    Raises:
        InputError: it has no `init` or no `compute`, or is not hashable.
    """
    if isinstance(solver, type) or not all(callable(getattr(solver, name, None)) for name in ("init", "compute")):
        raise InputError(
            f"solver is {solver!r}; expected a solver such as hf_msif.solvers.CG(), or an object with the methods "
            "init and compute."
        )
    try:
        hash(solver)
    except TypeError:
        raise InputError(
            f"solver is {solver!r}, which is not hashable; expected a frozen dataclass: @dataclass(frozen=True)."
        ) from None
    return solver if isinstance(solver, Solver) else AdaptedSolver(solver)


def check_settings(solver: DampingSettings, counts: tuple[str, ...]) -> None:
    """Raises InputError, naming the setting, unless λ ≥ 0 or one of its names, fraction > 0, tol ≥ 0, `counts` ≥ 1."""

    def require(name: str, expected: str, above: float = -1.0) -> None:
        value = getattr(solver, name)
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or value <= above or (name in counts and value != int(value)):
            raise InputError(f"{type(solver).__name__}({name}={value!r}): expected {expected}.")

    if solver.damping not in ("auto", TRAINING):
        require("damping", "a number >= 0, 'auto' or 'training'")
    require("damping_fraction", "a number > 0", above=0)
    require("tol", "a number >= 0")
    for name in counts:
        require(name, "a whole number >= 1", above=0)
