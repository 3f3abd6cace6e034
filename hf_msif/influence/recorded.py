"""The run of a stage, recorded or known by checkpoints: checked, and the damping that its training time implies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import InputError
from ..solvers import Operator, Solver
from ..solvers.lanczos import largest_eigenvalue
from ..training.recording import Recording
from ..training.trainer_folders import of_trainer
from ..training.trajectory import Trajectory, of_recording
from .chain import BoundStage

SEGMENTS = 3  # of a recorded run, where `Stage.checkpoints` does not say how many


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


def inherit_head(bound: BoundStage, run: Recording, first: dict[str, Tensor]) -> None:
    """Refuses a run that does not start from the stage before; a head that starts with that stage's values counts as
    inherited, too.

    Args:
        bound: the stage, whose split is replaced.
        run: its recorded run.
        first: the parameters that the run started from.
    """
    if bound.before is None:
        return
    before = bound.before.model.parameters
    for n, source in bound.split.inherited.items():
        if n in first and not torch.allclose(bound.leading(n, first[n]), before[source].to(first[n]), rtol=1e-6):
            raise InputError(
                f"stage {bound.name!r}: the run in {run.folder} did not start from stage {bound.before.name!r}: {n!r} "
                "differs; pair it with the checkpoint that it started from."
            )
    bound.split = bound.split.with_inherited_head(first, before)


def trajectory_of(bound: BoundStage, final: bool = False) -> Trajectory:
    """The run of a stage as `Stage.checkpoints` or `Stage.run` give it.

    Args:
        bound: the stage; inherited heads of a recorded run become inherited names of its split.
        final: one segment with the state at the end of a recorded run, for which checkpoints need not say a number.

    Raises:
        InputError: neither is given, or they are not of the stage.
    """
    stage, checkpoints = bound.stage, bound.stage.checkpoints
    if isinstance(checkpoints, Trajectory):
        return checkpoints
    if checkpoints == 0 or isinstance(checkpoints, bool):
        raise InputError(f"stage {stage.name!r}: checkpoints is {checkpoints!r}; expected at least 1 segment.")
    if checkpoints is not None and not isinstance(checkpoints, int):
        return of_trainer(checkpoints, stage.model, bound.split.trained, stage.name)
    if stage.run is None:
        raise InputError(
            f"stage {stage.name!r}: neither checkpoints nor run is given; expected "
            "checkpoints='.../checkpoint-*', the folders that a Trainer saved, or run, the folder of a recorded run."
        )
    run, first = recorded_run(bound)
    if final:
        return of_recording(run, 0)
    inherit_head(bound, run, first)
    states = min(run.steps, len(run.saved_steps) - 1)
    return of_recording(run, min(SEGMENTS, states) if checkpoints is None else checkpoints)


@dataclass(frozen=True)
class TrainingDamping:
    """λ = 1/τ, where a stage was trained for the time τ = Σ_t η_t (damping="training").

    Along an eigenvector of curvature σ ≥ 0, training answers a loss that is added with weight ε by −ε f(σ) times its
    slope, f(σ) = Σ_t η_t Π_{s>t} (1 − η_s σ), and (1 − e^{−τσ})/σ for small rates: 1/σ where training has converged,
    and τ where it has hardly begun. Damping has 1/(σ + λ) in its place, which is τ at σ = 0 if λ = 1/τ. Then

        1 ≤ f(σ) · (σ + 1/τ) ≤ max_x (1 − e^{−x})(1 + 1/x) = 1.2985 for small rates, and ≤ 2 wherever all η_t σ ≤ 1:

    no direction is off by more than that, and those far from σ = 1/τ hardly at all. (Bae et al., 2024, have f.)

    AdamW descends in the coordinates of P = 1/(√v̂ + ε), where the curvature is P^½ H P^½: there λ is added, so that
    the system is (H + P⁻¹/τ) u = a, with v̂ as the end of the run left it (`coordinates.whitened`).

    Attributes:
        value: λ.
        time: τ, see `Trajectory.time`.
        steps: T.
        optimiser: "SGD" or "AdamW".
        clip: the norm to which gradients were clipped, which makes τ an upper bound; None: they were not.
        run: SHA-256 of the settings of the run.
        largest_eigenvalue: of the stage's curvature; None: it was not measured.
        automatic: what damping="auto" would have taken; None: it was not measured, or the curvature may be
            indefinite.
    """

    value: float
    time: float
    steps: int
    optimiser: str
    clip: float | None
    run: str
    largest_eigenvalue: float | None = None
    automatic: float | None = None

    @classmethod
    def of(cls, bound: BoundStage, trajectory: Trajectory) -> TrainingDamping:
        """That of the stage's run.

        Raises:
            InputError: the run has no training time.
        """
        time = trajectory.time()
        if not time > 0:
            raise InputError(
                f"stage {bound.name!r}: damping is 'training', but the learning rates of {trajectory.origin} sum to "
                f"{time:g}; expected a run that trained the stage."
            )
        kind = type(trajectory.optimiser).__name__
        return cls(1 / time, time, trajectory.steps, kind, trajectory.clip, digest(trajectory.settings))

    def compared(self, operator: Operator, solver: Solver) -> TrainingDamping:
        """The same beside what `solver` would take for an operator by damping="auto", where that is semidefinite; at
        most 16 products."""
        largest, fraction = largest_eigenvalue(operator), getattr(solver, "damping_fraction", 0.0)
        automatic = fraction * largest if getattr(operator, "semidefinite", False) else None
        return replace(self, largest_eigenvalue=largest, automatic=automatic)

    def __str__(self) -> str:
        text = f"damping {self.value:.3g} = 1/τ, for the training time τ = {self.time:.4g} of {self.steps:,} steps"
        if self.optimiser == "AdamW":
            text += " in the coordinates of AdamW"
        if self.clip is not None:
            text += f" (at most: gradients were clipped at {self.clip:g})"
        if self.largest_eigenvalue:
            share = self.value / self.largest_eigenvalue
            text += f"; {share:.3g} × the largest eigenvalue {self.largest_eigenvalue:.3g}"
        if self.automatic:
            text += f", {self.value / self.automatic:.3g} × what damping='auto' takes"
        return text
