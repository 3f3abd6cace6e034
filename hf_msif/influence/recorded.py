"""The recorded run of a stage: checked against the stage, and the damping λ = 1/τ that its training time implies."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..curvature import Curvature
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import InputError
from ..solvers import Solver
from ..solvers.lanczos import largest_eigenvalue
from ..training.optimisers import SGD
from ..training.recording import Recording
from .chain import BoundStage


def recorded_run(bound: BoundStage) -> tuple[Recording, dict[str, Tensor]]:
    """The run in the folder `Stage.run`, and the parameters that it started from.

    Raises:
        InputError: it was trained on other rows than the stage's data, or on a part of them; it moved other
            parameters, or minimised other quadratic terms; or it does not end at the stage's model. (Whether its loss
            was the stage's objective, an unrolled stage finds out when the run is replayed.)
    """
    stage, name = bound.stage, bound.name
    assert stage.run is not None  # `Stage` has asked for it
    run = Recording.from_pretrained(stage.run, name)
    if isinstance(bound.rows, Stream) or run.facts["rows"] != digest(bound.rows):
        raise InputError(
            f"stage {name!r}: the run in {run.folder} was trained on other rows than the stage's data; expected "
            "the same rows in the same order, with the same example ids."
        )
    if run.facts["omit"]:
        raise InputError(
            f"stage {name!r}: the run in {run.folder} left out the rows {run.facts['omit'][:5]} (omit); expected "
            "a run on all of the stage's data."
        )
    if set(run.trained) != set(bound.split.trained):
        names = sorted(set(run.trained) ^ set(bound.split.trained))
        raise InputError(
            f"stage {name!r}: the run in {run.folder} and the stage's trainable do not agree on {names[:3]}; "
            "expected the same trained parameters."
        )
    alpha = run.alpha if stage.alpha in (None, "auto") else stage.alpha
    if (run.weight_decay, run.alpha) != (stage.weight_decay, alpha):
        raise InputError(
            f"stage {name!r}: weight_decay={stage.weight_decay} and alpha={stage.alpha}, but the run in "
            f"{run.folder} was trained with {run.weight_decay} and {run.alpha}; expected the run's own."
        )
    first = run.state(0, bound.engine.device)["parameters"]
    last = run.state(run.steps, bound.engine.device)["parameters"]
    for n, recorded in last.items():
        moved = (recorded - first[n]).norm().clamp(min=1e-30)
        difference = float((bound.model.parameters[n] - recorded).norm() / moved)
        if difference > 1e-3:
            raise InputError(
                f"stage {name!r}: {n!r} of its model differs from the end of the run in {run.folder} by "
                f"{difference:.1e} of how far the run moved it; expected the model as that run left it."
            )
    return run, first


@dataclass(frozen=True)
class TrainingDamping:
    """λ = 1/τ, where a stage was trained for the time τ = Σ_t η_t by gradient descent (damping="training").

    Along an eigenvector of curvature σ ≥ 0, training answers a loss that is added with weight ε by −ε f(σ) times its
    slope, f(σ) = Σ_t η_t Π_{s>t} (1 − η_s σ), and (1 − e^{−τσ})/σ for small rates: 1/σ where training has converged,
    and τ where it has hardly begun. Damping has 1/(σ + λ) in its place, which is τ at σ = 0 if λ = 1/τ. Then

        1 ≤ f(σ) · (σ + 1/τ) ≤ max_x (1 − e^{−x})(1 + 1/x) = 1.2985 for small rates, and ≤ 2 wherever all η_t σ ≤ 1:

    no direction is off by more than that, and those far from σ = 1/τ hardly at all. (Bae et al., 2024, have f.)

    Attributes:
        value: λ.
        time: τ, see `Recording.time`.
        steps: T.
        clip: the norm to which gradients were clipped, which makes τ an upper bound; None: they were not.
        run: SHA-256 of the settings of the run.
        largest_eigenvalue: of the stage's curvature; None: it was not measured.
        automatic: what damping="auto" would have taken; None: it was not measured, or the curvature may be
            indefinite.
    """

    value: float
    time: float
    steps: int
    clip: float | None
    run: str
    largest_eigenvalue: float | None = None
    automatic: float | None = None

    @classmethod
    def of(cls, bound: BoundStage) -> TrainingDamping:
        """That of the stage's recorded run.

        Raises:
            InputError: the run is not that of the stage, or not one of SGD.
        """
        run, _ = recorded_run(bound)
        if not isinstance(run.optimiser, SGD):
            raise InputError(
                f"stage {bound.name!r}: damping is 'training', but the run in {run.folder} was made by "
                f"{type(run.optimiser).__name__}, for which 1/τ is another number for every parameter, (√v̂ + eps)/τ; "
                "expected a run of SGD: give damping as a number, or go back through the run by link='unrolled'."
            )
        if not run.time > 0:
            raise InputError(
                f"stage {bound.name!r}: damping is 'training', but the learning rates of the run in {run.folder} sum "
                f"to {run.time:g}; expected a run that trained the stage."
            )
        return cls(1 / run.time, run.time, run.steps, run.clip, digest(run.settings))

    def compared(self, operator: Curvature, solver: Solver) -> TrainingDamping:
        """The same beside what `solver` would take for an operator by damping="auto", where that is semidefinite; at
        most 16 products."""
        largest, fraction = largest_eigenvalue(operator), getattr(solver, "damping_fraction", 0.0)
        automatic = fraction * largest if operator.semidefinite else None
        return replace(self, largest_eigenvalue=largest, automatic=automatic)

    def __str__(self) -> str:
        text = f"damping {self.value:.3g} = 1/τ, for the training time τ = {self.time:.4g} of {self.steps:,} steps"
        if self.clip is not None:
            text += f" (at most: gradients were clipped at {self.clip:g})"
        if self.largest_eigenvalue:
            share = self.value / self.largest_eigenvalue
            text += f"; {share:.3g} × the largest eigenvalue {self.largest_eigenvalue:.3g}"
        if self.automatic:
            text += f", {self.value / self.automatic:.3g} × what damping='auto' takes"
        return text
