"""Stochastic Neumann iterations: (A + λI)u = b from products with mini-batches, where a pass over all rows is dear.

The idea of ASTRA (Wang et al., 2025): preconditioned steps on mini-batches of the whole data in the place of a fixed
sample of them. Averages of the steps (Polyak & Juditsky, 1992) let the noise of the mini-batches die out; true
residuals, from which the iteration starts anew, let the noise shrink with the error (Johnson & Zhang, 2013).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import vectors
from ..errors import InputError
from ..vectors import Block
from ._base import Progress, check_settings
from .certificate import Certificate, Solution
from .damping import Damping, damping, damping_products
from .lanczos import largest_eigenvalue
from .operator import CountedOperator, Operator
from .preconditioner import Preconditioned, Preconditioner, not_definite

if TYPE_CHECKING:
    from ..engine.checkpoints import SolverCheckpoint

SHORTEST = 16  # steps of the first window
POWER_STEPS = 16  # products of one column, by which the step size is found
GROUPS = 4  # of held-out mini-batches, whose scatter gives the error of an estimated residual
MOST_HALVINGS = 5  # of the step size, in a row


class Prepared(NamedTuple):
    """What `Stochastic.init` computes: λ, the preconditioner's state, and the step size η."""

    damping: Damping
    preconditioner: Any
    step_size: float


@dataclass(frozen=True)
class Stochastic(Preconditioned):
    """(A + λI)u = b by d ← d − η M⁻¹((A_B + λI)d − r), over mini-batches B of all rows of a curvature.

    A *stage* starts at d = 0 on r = b − (A + λI)u. It takes as many steps as there are mini-batches in an epoch, in
    windows that double their length. Each window starts at the average of the window before, so that the stage ends
    with the average over its last half, which is added to u. Then a pass over all rows gives the true residual, and
    another stage starts on it: its noise is proportional to ‖d‖, hence it falls with the residual. Until the epoch
    is over, the residual is estimated after each window on the mini-batches that come next, and the stage ends early
    where that estimate plus its standard error is at most `tol`.

    η = vᵀ(A + λ)v / E‖(A_B + λ)v‖²_M⁻¹ at the largest eigenvector v of M⁻¹(A + λI), found by power iterations on
    mini-batches: the step that shrinks v most in mean square. A stage after which the residual has grown is taken
    back, and the step size halved.

    Args:
        damping: λ ≥ 0, in units of the eigenvalues of A, or "auto": `damping_fraction` × the largest |eigenvalue| on
            `sample` rows.
        tol: a column is done when ‖(A + λI)u − b‖ ≤ tol ‖b‖.
        max_passes: the most work, in products with all rows; a product with a mini-batch counts as its share of the
            rows. The last check, and estimates of up to a quarter of an epoch, come on top.
        damping_fraction: used by damping="auto" alone.
        preconditioner: None, a name in `registry.PRECONDITIONERS`, or a `Preconditioner`. It is made on `sample` rows.
        rows: per mini-batch.
        sample: rows of the preconditioner and of the largest eigenvalue.
        whole: whether true residuals are computed on all rows. If not, there is one stage, and the residual in the
            certificate is the estimate plus its standard error.
        seed: of the mini-batches.

    Raises:
        InputError: a setting out of range; the steps diverge.

    An operator that has no `minibatch(step, rows, seed)` is taken for the one mini-batch that it consists of:

    >>> from hf_msif.solvers import solve
    >>> class Diagonal:
    ...     parameters = {"w": torch.zeros(2, dtype=torch.float64)}
    ...     def matvec(self, v):
    ...         return {"w": v["w"] * torch.tensor([1.0, 4.0], dtype=torch.float64)}
    >>> b = {"w": torch.tensor([[3.0, 6.0]], dtype=torch.float64)}
    >>> solution = solve(Diagonal(), b, Stochastic(damping=2.0, tol=1e-8, max_passes=500))
    >>> solution.value["w"].round(decimals=6).tolist(), solution.certificate.status
    ([[1.0, 1.0]], ['converged'])
    """

    damping: float | str = "auto"
    tol: float = 1e-2
    max_passes: float = 20.0
    damping_fraction: float = 1e-3
    preconditioner: Preconditioner | str | None = "nystrom"
    rows: int = 64
    sample: int = 256
    whole: bool = True
    seed: int = 0

    damped: ClassVar[bool] = True
    minibatches: ClassVar[bool] = True
    unpreconditioned: ClassVar[int] = 5 + GROUPS

    def __post_init__(self):
        check_settings(self, counts=("rows", "sample"))
        if not isinstance(self.max_passes, Real) or not 0 < self.max_passes < math.inf:
            raise InputError(f"Stochastic(max_passes={self.max_passes!r}): expected a number > 0.")
        self._name_preconditioner()

    def products(self, parameters: int, columns: int) -> int:
        """⌈max_passes⌉ + 2, and those of `init`, which takes them on `sample` rows or fewer."""
        first = damping_products(self, columns) + self._preconditioner.products(parameters, columns)
        return math.ceil(self.max_passes) + 2 + first + -(-POWER_STEPS // columns)

    def init(self, operator: Operator) -> Prepared:
        """λ and the preconditioner on a fixed sample, and the step size on mini-batches."""
        sample = operator.minibatch(0, self.sample, self.seed) if hasattr(operator, "minibatch") else operator
        value = damping(self, lambda: largest_eigenvalue(sample))
        prepared = self._preconditioner.init(sample, value.value)
        return Prepared(value, prepared, self._step_size(operator, value.value, prepared))

    def _step_size(self, operator: Operator, damping: float, prepared: Any) -> float:
        counted = CountedOperator(operator, 1)
        batches = MiniBatches(self, counted)
        v, rayleigh, square = counted.rademacher(self.seed), 0.0, 0.0
        for step in range(POWER_STEPS):
            product = vectors.add(batches.product(step, v), v, damping)
            w = self._preconditioner.apply(prepared, product)
            length = counted.dot(product, w)
            if not length > 0:
                raise not_definite(length.item())
            if step >= POWER_STEPS // 2:
                rayleigh += counted.dot(v, product).item()
                square += length.item()
            v = vectors.scale(w, length.rsqrt())
        return rayleigh / square

    def compute(
        self,
        operator: CountedOperator,
        b: Block,
        state: Prepared,
        progress: Progress | None = None,
        checkpoint: SolverCheckpoint | None = None,
    ) -> Solution:
        """Solves one block of right-hand sides; called by `solve`."""
        run = _Run(self, operator, b, state, progress)
        run.solve()
        counts = torch.full_like(operator.counts, math.ceil(run.passes))
        certificate = Certificate.from_residual(
            "stochastic",
            state.damping.value,
            self.tol,
            run.relative,
            counts,
            iterations=run.step,
            failure="stalled" if run.stalled else "max_iter",
            largest_eigenvalue=state.damping.largest_eigenvalue,
            residual_error=None if self.whole or not run.step else run.error.tolist(),
        )
        return Solution(run.u, certificate)


class MiniBatches:
    """The mini-batches of an operator, or the operator itself where it has none.

    Attributes:
        epoch: steps in which each row is taken once.
    """

    def __init__(self, solver: Stochastic, operator: CountedOperator):
        self.solver, self.operator = solver, operator
        self.whole: Any = operator.operator
        self.is_sum = hasattr(self.whole, "minibatch")
        self.epoch = -(-getattr(self.whole, "examples", 1) // solver.rows) if self.is_sum else 1

    def product(self, step: int, v: Block) -> Block:
        """A_B v, B the mini-batch of this step."""
        if not self.is_sum:
            return self.operator.matvec(v)
        batch = self.whole.minibatch(step, self.solver.rows, self.solver.seed)
        return CountedOperator(batch, vectors.columns(v)).matvec(v)


class _Run:
    """A solve: u, its residual r and ‖r‖ / ‖b‖, and the work so far, in products with all rows."""

    def __init__(
        self, solver: Stochastic, operator: CountedOperator, b: Block, state: Prepared, progress: Progress | None
    ):
        self.solver, self.operator, self.b, self.state, self.progress = solver, operator, b, state, progress
        self.batches = MiniBatches(solver, operator)
        self.damping, self.step_size = state.damping.value, state.step_size
        self.norms = operator.norm(b)
        self.u, self.r, self.relative = vectors.zeros_like(b), b, (self.norms > 0).double()
        self.error = torch.zeros_like(self.relative)
        self.step, self.passes, self.halvings, self.stalled = 0, 0.0, 0, False

    def solve(self) -> None:
        """Stages until all columns are solved, the work is spent, or nothing improves any more."""
        epoch = self.batches.epoch
        while (self.relative > self.solver.tol).any() and self.halvings <= MOST_HALVINGS:
            steps = int((self.solver.max_passes - self.passes) * epoch + 1e-9)
            if steps < 1:
                break
            self._stage(min(steps, max(SHORTEST, epoch)) if self.solver.whole else max(GROUPS, steps * 4 // 5))
        self.stalled = self.halvings > MOST_HALVINGS
        worst = self.relative.max().item()
        if not worst < 1 and self.norms.any():
            raise InputError(
                f"the stochastic iteration has not reduced the residual in {self.step:,} steps on {self.solver.rows} "
                "rows each; expected a relative residual below 1, which u = 0 has: give it more rows per step, more "
                "damping or more passes."
            )

    def _stage(self, steps: int) -> None:
        """Windows of steps for (A + λI)d = r; adds d to u in the columns where the residual fell."""
        d, estimate = vectors.zeros_like(self.r), None
        windows = _windows(steps)
        for number, length in enumerate(windows):
            d = self._window(d, length)
            if not self.operator.norm(d).isfinite().all():
                break
            last = number == len(windows) - 1
            if not (last and self.solver.whole):
                estimate = self._estimated(d, max(GROUPS, length // 4))
                if (estimate[0] + estimate[1] <= self.solver.tol).all():
                    break
        self._accept(d, estimate)

    def _window(self, d: Block, steps: int) -> Block:
        """The average over this many steps from d."""
        apply, prepared = self.solver._preconditioner.apply, self.state.preconditioner
        total = vectors.zeros_like(d)
        d = vectors.clone(d)
        for _ in range(steps):
            residual = self._residual(self.step, d)
            vectors.add_(d, apply(prepared, residual), self.step_size)
            vectors.add_(total, d, 1 / steps)
            self.step += 1
            if self.progress is not None:
                self.progress(self.step, self.relative.max().item())
        return total

    def _residual(self, step: int, d: Block) -> Block:
        """r − (A_B + λI)d on the mini-batch of a step."""
        self.passes += 1 / self.batches.epoch
        product = vectors.add(self.batches.product(step, d), d, self.damping)
        return vectors.add(self.r, product, -1.0)

    def _estimated(self, d: Block, number: int) -> tuple[Tensor, Tensor]:
        """‖r − (A + λI)d‖ / ‖b‖ of every column and its standard error, from the mini-batches that come next.

        ‖E r_B‖² is the mean of r_gᵀr_h over g ≠ h, the means of independent groups: ‖r_g‖² itself would add the
        variance. The standard error is that of the jackknife over the groups.
        """
        number = -(-number // GROUPS) * GROUPS
        means = []
        for group in range(GROUPS):
            mean = vectors.zeros_like(d)
            for step in range(self.step + group, self.step + number, GROUPS):
                vectors.add_(mean, self._residual(step, d), GROUPS / number)
            means.append(mean)
        dots = torch.stack([torch.stack([self.operator.dot(x, y) for y in means]) for x in means])
        dots[range(GROUPS), range(GROUPS)] = 0.0
        square = dots.sum((0, 1)) / (GROUPS * (GROUPS - 1))
        without = (dots.sum((0, 1)) - 2 * dots.sum(0)) / ((GROUPS - 1) * (GROUPS - 2))  # one group each
        error = ((GROUPS - 1) / GROUPS * (without - square).square().sum(0)).sqrt()
        scale = torch.where(self.norms > 0, 1 / self.norms, 0.0)
        estimate = square.clamp(min=0).sqrt()
        return estimate * scale, ((square.clamp(min=0) + error).sqrt() - estimate) * scale

    def _accept(self, d: Block, estimate: tuple[Tensor, Tensor] | None) -> None:
        """Adds d to u where the residual fell; where it grew in an unsolved column, halves the step size."""
        before = self.relative
        if not self.operator.norm(d).isfinite().all():
            after, u, r = torch.full_like(before, math.inf), self.u, self.r
        else:
            u, r = vectors.add(self.u, d), self.r
            if self.solver.whole:
                product = vectors.add(self.operator.matvec(u), u, self.damping)
                self.passes += 1
                r = vectors.add(self.b, product, -1.0)
                after = torch.where(self.norms > 0, self.operator.norm(r) / self.norms, 0.0)
            else:
                assert estimate is not None  # of the last window
                after, self.error = estimate[0] + estimate[1], estimate[1]
        better = after < before
        self.u, self.r = vectors.where(better, u, self.u), vectors.where(better, r, self.r)
        self.relative = torch.where(better, after, before)
        if (better | (before <= self.solver.tol)).all():
            self.halvings = 0
        else:
            self.step_size, self.halvings = self.step_size / 2, self.halvings + 1


def _windows(steps: int) -> list[int]:
    """Lengths that add up to `steps`; each is about the sum of those before, the first at most `SHORTEST`.

    >>> _windows(100)
    [12, 13, 25, 50]
    """
    windows = []
    while steps > SHORTEST:
        windows.append(steps - steps // 2)
        steps //= 2
    return [steps, *reversed(windows)]
