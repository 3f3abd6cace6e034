"""Preconditioners: what they are, and what the solvers that take one share."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from ..errors import InputError
from ..registry import PRECONDITIONERS, registered
from ..vectors import Block
from ._base import Solver
from ._krylov import KrylovSolver, LinearSystem
from .damping import Damping, bound_of
from .operator import CountedOperator, Operator


class Preconditioner:
    """Settings of an M ≈ A + λI, up to a factor, of which M⁻¹ is cheap: symmetric and positive definite.

    Conjugate gradients then take as many iterations as the condition of M⁻¹(A + λI) asks for. To write one, derive a
    frozen dataclass from this class, with its settings as fields, and define `init` and `apply`. Two equal ones must
    give equal states; the `repr` names all settings.

    Attributes:
        vectors_held: blocks as large as the right-hand side that `apply` holds at a time beside it. Defaults to 1.
        state_vectors: single vectors that the state holds, whatever the number of right-hand sides; where the solver's
            vectors are sharded, these must be, too. Defaults to 0.
    """

    vectors_held: int = 1
    state_vectors: int = 0

    def init(self, operator: Operator, damping: float) -> Any:
        """The state, computed once per operator and shared by all right-hand sides.

        Args:
            operator: A, as the solver was given it: a curvature, or a `Sharded` one with its `operator`, `cut` and
                `join`.
            damping: λ.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no init.")

    def apply(self, state: Any, block: Block) -> Block:
        """M⁻¹r for each column r of a block, which must not be written to."""
        raise NotImplementedError(f"{type(self).__name__} defines no apply.")

    def products(self, parameters: int, columns: int) -> int:
        """Products of `init` in units of products with Q = `columns` columns, rounded up. Defaults to 0."""
        return 0

    def extra_bytes(self, parameters: int) -> int:
        """Bytes of the state beside vectors, for P = `parameters`. Defaults to 0."""
        return 0


def as_preconditioner(value: Any) -> Preconditioner | None:
    """The preconditioner that a name in `registry.PRECONDITIONERS` stands for with its defaults, or the object itself.

    Raises:
        InputError: an unknown name, an object that is no `Preconditioner`, or one that is not hashable.
    """
    if isinstance(value, str) and value in PRECONDITIONERS:
        value = registered(PRECONDITIONERS, value)()
    if value is None or (isinstance(value, Preconditioner) and type(value).__hash__ is not None):
        return value
    names = ", ".join(map(repr, PRECONDITIONERS))
    raise InputError(
        f"preconditioner is {value!r}; expected None, one of {names}, or a frozen dataclass that derives from "
        "hf_msif.solvers.Preconditioner."
    )


class Prepared(NamedTuple):
    """What `PreconditionedSolver.init` computes: λ, and the state of the preconditioner (None without one)."""

    damping: Damping
    preconditioner: Any


class Preconditioned(Solver):
    """A solver with a setting `preconditioner`, and the facts that follow from it.

    Attributes:
        unpreconditioned: `vectors_held` without a preconditioner.
    """

    preconditioner: Preconditioner | str | None
    unpreconditioned: ClassVar[int]

    def _name_preconditioner(self) -> None:
        """Replaces the name of a preconditioner by the object; called once, when the settings are made."""
        object.__setattr__(self, "preconditioner", as_preconditioner(self.preconditioner))

    @property
    def _preconditioner(self) -> Preconditioner:
        assert not isinstance(self.preconditioner, str)  # __post_init__ has replaced names
        return self.preconditioner or NONE

    @property
    def vectors_held(self) -> int:  # type: ignore[override]  # a setting decides what is a constant elsewhere
        return self.unpreconditioned + self._preconditioner.vectors_held

    @property
    def state_vectors(self) -> int:  # type: ignore[override]
        return self._preconditioner.state_vectors

    def extra_bytes(self, parameters: int) -> int:
        """Bytes of the preconditioner's state beside vectors."""
        return self._preconditioner.extra_bytes(parameters)


class PreconditionedSolver(Preconditioned, KrylovSolver):
    """A Krylov solver with a setting `preconditioner`."""

    def __post_init__(self):
        super().__post_init__()
        self._name_preconditioner()

    def products(self, parameters: int, columns: int) -> int:
        """max_iter + 1, the products of the Lanczos run for the damping, and those of the preconditioner."""
        return super().products(parameters, columns) + self._preconditioner.products(parameters, columns)

    def init(self, operator: Operator) -> Prepared:  # type: ignore[override]
        """λ, and the preconditioner for it."""
        damping = super().init(operator)
        return Prepared(damping, self._preconditioner.init(operator, damping.value))

    def system(self, operator: CountedOperator, b: Block, state: Prepared) -> LinearSystem:
        """The system (A + λI)u = b with this preconditioner."""
        preconditioner, prepared = self._preconditioner, state.preconditioner
        precondition = None if preconditioner is NONE else lambda block: preconditioner.apply(prepared, block)
        return LinearSystem(operator, operator.matvec, b, state.damping.value, precondition=precondition)

    def damping_facts(self, damping: Damping) -> dict[str, Any]:
        """What the certificate says of λ; a preconditioned system has no bound that is known beforehand."""
        bound = bound_of(damping, self.tol) if self.preconditioner is None else None
        return {"largest_eigenvalue": damping.largest_eigenvalue, "iteration_bound": bound}


class _Nothing(Preconditioner):
    """M = I; conjugate gradients do not apply it."""

    vectors_held = 0

    def init(self, operator: Operator, damping: float) -> None:
        return None

    def apply(self, state: None, block: Block) -> Block:
        return block


NONE = _Nothing()


def not_definite(value: float) -> InputError:
    """The error where rᵀM⁻¹r is `value`, which is not positive."""
    return InputError(
        f"the preconditioner is not positive definite: rᵀM⁻¹r = {value:.3g} for a residual r; expected a positive "
        "number. Solve without it, or with more damping."
    )
