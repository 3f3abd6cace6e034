"""The implicit link: a stage is taken for a minimum of F, and pulled back by one inverse-curvature-vector product.

u_k = (∂²F_k/∂trained² + 2α P_prox + λ)⁻¹ a_trained
b   = a_frozen − ∂/∂frozen ⟨∇_trained F_k, u_k⟩         on frozen names: Case 1, eq. (11)
b   = 2α u_k                                            on proximal names: Case 2, eqs. (13)–(15)
I(x) = −⟨u_k, ∇ℓ_x⟩                                     eq. (6)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from .. import training, vectors
from ..curvature import EKFAC, Curvature
from ..curvature.norms import Metric
from ..curvature.sharded import Sharded
from ..curvature.whitened import Whitened
from ..engine import Engine
from ..engine.checkpoints import Checkpoint, SolverCheckpoint
from ..engine.hashing import tensors_fingerprint
from ..engine.stream import Stream
from ..errors import InputError
from ..solvers import Auto, Certificate, Operator, Solution, Solver, problem, solve
from ..solvers.damping import TRAINING
from ..solvers.lanczos import largest_eigenvalue
from ..training.objective import QuadraticTerms, missing_alpha, without_terms
from ..training.polish import PolishReport
from ..vectors import Block
from .chain import BoundStage
from .coordinates import whitened
from .cost import Cost, activation_bytes
from .differentiation import Retraining, StageCertificate
from .direction import Direction
from .implicit_cost import implicit_cost
from .recorded import TrainingDamping, trajectory_of
from .sampled import Sampled
from .stage import Stage

# Float32 blocks that a product holds: the whole vector, its sum in float64 (as large as two), one batch's part of it.
PRODUCT_BLOCKS = 4
SKETCH_ITERATIONS = 10
SWEPT_FRACTIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Share of the gradient that α̂ leaves, above which the proximal model does not fit.
UNEXPLAINED = 0.9


@dataclass(frozen=True)
class AlphaEstimate:
    """α̂ of eq. (12), estimated from the finished parameters by `Implicit.estimate`.

    Attributes:
        alpha: α̂.
        gradient_norm: ‖∇_W F‖ without the proximal term.
        distance: ‖W − W_before‖.
        remaining: ‖∇_W F + 2α̂ (W − W_before)‖ / ‖∇_W F‖. It is 0 where the parameters are a proximal optimum, and near
            1 where α̂ explains almost nothing of the gradient, so that the proximal model does not fit.
    """

    alpha: float
    gradient_norm: float
    distance: float
    remaining: float

    def __str__(self) -> str:
        return (
            f"alpha = {self.alpha:.4g} estimated from the checkpoints, at ‖W − W_before‖ = {self.distance:.3g}: it "
            f"leaves {self.remaining:.0%} of the gradient {self.gradient_norm:.2g} (0 % at a proximal optimum)"
        )


class Implicit(Sampled):
    """Differentiates a stage that ended at a stationary point of F_k, with the curvature and solver of its `Stage`.

    Attributes:
        solver: solves the linear systems.
        training_damping: λ of the stage's recorded run, which the solver has in the place of damping="training".

    Raises:
        InputError: the data are a stream and `curvature_samples` is None; inherited parameters are trained and
            `alpha` is None; or damping is "training" and the run is not that of the stage.
    """

    needs_run = False
    bound: BoundStage

    def __init__(self, bound: BoundStage):
        super().__init__(bound)
        self.solver = bound.stage.solver
        self._solver_states: dict[Solver, Any] = {}
        stage, split = bound.stage, bound.split
        if split.proximal and stage.alpha is None:
            raise missing_alpha(split)
        self.training_damping: TrainingDamping | None = None
        if getattr(self.solver, "damping", None) == TRAINING:
            self.trajectory = trajectory_of(bound, final=True)
            self.training_damping = TrainingDamping.of(bound, self.trajectory)
            self.solver = self.solver.with_damping(self.training_damping.value)

    # --- replicates

    of_rows = (*Sampled.of_rows, "operator", "system", "gradient_norm", "_compared_damping")

    def _prepare_replicates(self) -> None:
        super()._prepare_replicates()
        _ = self.alpha

    def _copy(self) -> Implicit:
        changed = super()._copy()
        changed._solver_states = {}
        return changed

    # --- curvature

    @cached_property
    def operator(self) -> Curvature:
        """∂²F_k/∂trained² + weight decay + 2α on proximal names, on the curvature subset."""
        operator = self.curvature(self.curvature_rows)
        if self.solver.minibatches:
            operator.holds_batches = False  # type: ignore[misc]  # its own value
        return operator

    @cached_property
    def system(self) -> Curvature | Whitened:
        """What is solved: `operator`, or with damping="training" that in the coordinates of the run's optimiser."""
        return self.in_coordinates(self.operator)

    def in_coordinates(self, operator: Curvature) -> Curvature | Whitened:
        """An operator of the stage, in the coordinates in which it is solved."""
        if self.training_damping is None or self.training_damping.optimiser == "SGD":
            return operator
        return whitened(operator, self.trajectory, self.trajectory.load(len(self.trajectory.segments) - 1))

    def curvature(self, rows: list[dict], ridge: Mapping[str, float | Tensor] | None = None) -> Curvature:
        """The curvature estimated on `rows`; `ridge`, the diagonal of the quadratic terms, defaults to that of F_k."""
        bound = self.bound
        ridge = self.ridge if ridge is None else ridge
        return self.curvature_kind[0](
            bound.model, self.objective, rows, bound.split.trained, bound.engine, bound.batch_size, ridge
        )

    # --- the quadratic terms of F_k

    @cached_property
    def quadratic(self) -> QuadraticTerms:
        """Weight decay and α ‖W − W_before‖², eq. (12), in the trained parameters."""
        return self._quadratic(self.alpha)

    def _quadratic(self, alpha: float | None) -> QuadraticTerms:
        bound, stage = self.bound, self.bound.stage
        parameters = vectors.select(bound.model.parameters, bound.split.trained)
        before = bound.before.model.parameters if bound.before else None
        return QuadraticTerms.of(stage.model, bound.split, parameters, stage.weight_decay, alpha, before)

    @property
    def ridge(self) -> dict[str, float | Tensor]:
        """Diagonal of the quadratic terms of F_k."""
        return self.quadratic.ridge

    @cached_property
    def alpha(self) -> float | None:
        """α of eq. (12): the number in `Stage.alpha`, or its estimate for "auto"; None where nothing is tied.

        Warns:
            UserWarning: the estimate is not positive, or leaves more than `UNEXPLAINED` of the gradient: no proximal
                term explains where training ended.
        """
        stage = self.bound.stage
        if not isinstance(stage.alpha, str):
            return stage.alpha
        if not self.bound.split.proximal:
            return None
        estimate, reason = self.estimate, None
        if estimate.alpha <= 0:
            reason = "It is not positive"
        elif estimate.remaining > UNEXPLAINED:
            reason = "It explains almost nothing of the gradient"
        if reason is not None:
            warnings.warn(
                f"stage {stage.name!r}: {estimate}. {reason}: no proximal term explains where training ended. Use "
                "link='unrolled' with the recorded run, freeze the encoder (trainable='head'), or give alpha as a "
                "number.",
                stacklevel=2,
            )
        return estimate.alpha

    @cached_property
    def estimate(self) -> AlphaEstimate:
        """α̂ = −⟨∇_W F, W − W_before⟩ / (2 ‖W − W_before‖²), on all of the stage's rows.

        This α minimises the norm of the gradient of F + α ‖W − W_before‖² in W.

        Raises:
            InputError: W equals W_before.
        """
        bound = self.bound
        assert bound.before is not None
        assert not isinstance(bound.rows, Stream)  # which only a first stage reads
        data, parameters = self.curvature(bound.rows, {}).gradient(), bound.model.parameters
        slope = vectors.select(self._quadratic(None).gradient(parameters, data), bound.split.proximal)
        shift = vectors.stack([self._quadratic(1.0).shift(parameters)])
        distance, norm = float(vectors.norm(shift)), float(vectors.norm(slope))
        if distance == 0:
            raise InputError(
                f"stage {bound.name!r}: alpha is 'auto', but the inherited parameters are those of stage "
                f"{bound.before.name!r}; expected a finetuned model, or trainable='head'."
            )
        alpha = -float(vectors.dot(slope, shift)) / (2 * distance**2)
        rest = float(vectors.norm(vectors.add(slope, shift, 2 * alpha)))
        return AlphaEstimate(alpha, norm, distance, rest / norm if norm else 0.0)

    @cached_property
    def gradient_norm(self) -> float:
        """‖∇F_k‖ in the trained parameters, on the curvature subset; one gradient pass.

        The implicit formulas, eqs. (9)–(15), differentiate ∇F_k = 0: they are exact where this norm is zero. (On a
        subset of the data it is not zero, even where training has converged on all rows.)
        """
        slopes = self.quadratic.gradient(self.bound.model.parameters, self.operator.gradient())
        return float(vectors.norm(slopes))

    # --- the pull-back

    def pull_back(self, adjoint: Block, checkpoint: Checkpoint | None = None) -> tuple[Direction, Block]:
        """Solves for u_k, and carries the adjoint on to what the stage inherited: eqs. (9)–(15).

        Args:
            adjoint: a = ∂f/∂φ_k on the trained and the frozen names, tensors of shape (Q, *parameter.shape).
            checkpoint: saves and loads the state of a long solve; None: nothing is saved.

        Returns:
            u_k as a `Direction`; b = ∂f/∂W_before on the inherited names: a − ∂/∂frozen ⟨∇F_k, u_k⟩ on frozen ones,
            2α u_k on proximal ones.

        Raises:
            InputError: no row of the curvature's has a term to predict.
        """
        split = self.bound.split
        if not self.operator.count:
            raise without_terms(self.bound.name, self.operator.examples)
        solution = self.solve(vectors.select(adjoint, split.trained), checkpoint)
        u = solution.value
        inherited: Block = {}
        if split.frozen:
            mixed = self.operator.mixed(u, split.frozen)
            inherited |= {name: mixed[name].neg_().add_(adjoint[name]) for name in split.frozen}
        inherited |= {name: self.quadratic.tie[name] * u[name] for name in split.proximal}
        return self.direction(u, solution.certificate), inherited

    def direction(self, u: Block, certificate: StageCertificate) -> Direction:
        bound = self.bound
        return Direction(bound.model, self.objective, u, certificate, lambda: bound.compared_rows)

    def solve(self, b: Block, checkpoint: Checkpoint | None = None) -> Solution:
        """Solves the solver's system, with the stage's curvature, for the right-hand sides b.

        The solver's vectors are sharded over the processes if the engine asks for it and the solver allows it.
        """
        engine, operator, system = self.bound.engine, self.operator, self.system
        if isinstance(system, Whitened):
            b = system.scaled(b)
        solver, why = self.solver_for(vectors.columns(b))
        solver_checkpoint = None
        if checkpoint is not None:
            operator.keep_in(checkpoint.path.parent)
        with engine.solver_bar(self.bound.name, solver) as progress:
            if engine.sharded and solver.shardable:
                sharded = Sharded(system, engine)
                if checkpoint is not None:
                    solver_checkpoint = SolverCheckpoint(checkpoint, sharded.join_rows, sharded.cut_rows)
                state = self._solver_state(solver, sharded)
                solution = solve(sharded, sharded.cut(b), solver, state, progress, solver_checkpoint)
                solution = replace(solution, value=sharded.join(solution.value))
            else:
                if checkpoint is not None:
                    solver_checkpoint = SolverCheckpoint(
                        checkpoint, vectors.flatten, lambda rows: vectors.unflatten(rows, b, rows.dtype)
                    )
                state = self._solver_state(solver, system)
                solution = solve(system, b, solver, state, progress, solver_checkpoint)
        if isinstance(system, Whitened):
            solution = replace(solution, value=system.scaled(solution.value))
        return solution if why is None else replace(solution, certificate=replace(solution.certificate, choice=why))

    @cached_property
    def _ekfac(self) -> EKFAC:
        operator = self.operator
        return operator if isinstance(operator, EKFAC) else EKFAC.of(operator)

    def metric(self, certificate: StageCertificate) -> Metric:
        if isinstance(self.system, Whitened):
            raise InputError(
                f"stage {self.bound.name!r} is solved in the coordinates of AdamW (damping='training'), in which "
                "EK-FAC has no closed form; expected norms='gradient', or MultiStageInfluence.self_influence for a "
                "few rows."
            )
        solver, damping = self.solver_for(1)[0], cast(Certificate, certificate).damping
        return Metric(self._ekfac, lambda eigenvalues: solver.spectral_filter(eigenvalues, damping))

    def self_solve(self, gradients: Block) -> tuple[Tensor, StageCertificate]:
        solution = self.solve(gradients)
        return vectors.dot(gradients, solution.value), solution.certificate

    def solver_for(self, columns: int) -> tuple[Solver, str | None]:
        """The solver for Q = `columns` right-hand sides, and why `solvers.Auto` chose it (None: it was given)."""
        return self.solver.chosen(problem(self.system, columns, self.bound.engine.sharded))

    def _solver_state(self, solver: Solver, operator: Operator) -> Any:
        """What the solver computes once per operator (damping, factorisation); later queries use it again."""
        if solver not in self._solver_states:
            self._solver_states[solver] = solver.init(operator)
        return self._solver_states[solver]

    def with_solver(self, solver: Solver) -> Implicit:
        """The same differentiation with another solver; both share the operator."""
        _ = self.operator  # so that it is made once, for both
        changed = super()._copy()  # with the solver states
        changed.solver = solver
        return changed

    def damped(self, damping: float) -> Implicit:
        if not self.solver.damped:
            raise InputError(
                f"stage {self.bound.name!r} is solved by {self.solver}, which has no damping to sweep: use CG."
            )
        changed = self.with_solver(self.solver.with_damping(damping))
        if self.training_damping is not None:  # in other coordinates nothing is as it was
            changed.training_damping, changed._solver_states = None, {}
            vars(changed).pop("system", None)
        return changed

    def dampings(self) -> list[float]:
        """`SWEPT_FRACTIONS` × the largest eigenvalue of the curvature."""
        self.damped(1.0)
        largest = largest_eigenvalue(self.operator)
        return [fraction * largest for fraction in SWEPT_FRACTIONS]

    def load(self, tensors: dict[str, Tensor], certificate: dict[str, Any]) -> Direction:
        expected = self.bound.split.trained
        if set(tensors) != set(expected):
            names = sorted(set(tensors) ^ set(expected))
            raise InputError(
                f"the saved u of stage {self.bound.name!r} and its trained parameters differ in {names[:3]}; expected "
                "a query of this chain: query again."
            )
        for name in expected:
            shape, parameter = tensors[name].shape, self.bound.model.parameters[name]
            if shape[1:] != parameter.shape:
                raise InputError(
                    f"the saved u of stage {self.bound.name!r} has the shape {tuple(shape)} at {name!r}; expected "
                    f"(columns, *{tuple(parameter.shape)}), the parameter's: query again."
                )
        # In memory of their own: those of a file begin anywhere, and products of them differ in the last digit.
        u = vectors.clone(tensors)
        return self.direction(u, Certificate.from_dict(certificate))

    def identity(self) -> dict[str, Any]:
        if self.training_damping is None:
            return {}
        identity = {"the recorded run": self.training_damping.run}
        if self.training_damping.optimiser != "SGD":
            moments = self.trajectory.load(len(self.trajectory.segments) - 1).second_moments
            identity["the second moments of its run"] = tensors_fingerprint(dict(moments or {}))
        return identity

    # --- the certificate

    def facts(self) -> dict[str, Any]:
        stage = self.bound.stage
        estimated = stage.alpha == "auto" and self.bound.split.proximal
        return {
            "weight_decay": stage.weight_decay,
            "alpha": self.alpha,
            "alpha_estimate": asdict(self.estimate) if estimated else None,
            "curvature": stage.curvature_name,
            "curvature_choice": self.curvature_kind[1],
            "curvature_examples": len(self.curvature_rows),
            "training_damping": None if self.training_damping is None else asdict(self._compared_damping),
            "gradient_norm": self.gradient_norm,
        }

    @cached_property
    def _compared_damping(self) -> TrainingDamping:
        assert self.training_damping is not None
        return self.training_damping.compared(self.system, self.solver)

    def summary(self, certificate: StageCertificate, facts: Mapping[str, Any]) -> str:
        lines = [str(certificate)]
        if facts.get("curvature_choice"):
            lines.insert(0, f"curvature='auto' took {facts['curvature_choice']}")
        if facts.get("training_damping"):
            lines.append(str(TrainingDamping(**facts["training_damping"])))
        if facts["alpha_estimate"]:
            lines.append(str(AlphaEstimate(**facts["alpha_estimate"])))
        lines.append(
            f"norm of the objective's gradient {facts['gradient_norm']:.1e} on {facts['curvature_examples']:,} "
            "examples (the formulas are exact where it is 0)"
        )
        return "\n".join(lines)

    def known_size(self) -> tuple[float, int] | None:
        operator = vars(self).get("operator")  # there is none where a saved query is scored
        rows = self.bound.rows
        if operator is None or isinstance(rows, Stream) or operator.examples != len(rows):
            return None
        return operator.count, operator.examples

    # --- what it costs

    def solver_bytes(self, columns: int, processes: int) -> int:
        """Bytes of the solver's vectors on each process."""
        parameters, (solver, _) = self.operator_parameters, self.solver_for(columns)
        vector = vectors.nbytes(parameters)
        held = (columns * solver.vectors_held + solver.state_vectors) * vector
        if self.bound.engine.sharded and solver.shardable:
            held = -(-held // processes)
        extra = solver.extra_bytes(sum(p.numel() for p in parameters.values()))
        return held + PRODUCT_BLOCKS * columns * vector + extra

    @property
    def operator_parameters(self) -> dict[str, Tensor]:
        """The trained parameters, without making an operator."""
        return {name: self.bound.model.parameters[name] for name in self.bound.split.trained}

    def prepare(self) -> None:
        _ = self.operator

    def memory(self, columns: int, free: int, processes: int) -> dict[str, int]:
        vectors_held = self.solver_bytes(columns, processes)
        # They are measured only where the vectors leave room for it.
        active = activation_bytes(self.operator, columns) if vectors_held < free else 0
        held = self.operator.held_bytes()
        parts = {"the solver's vectors": vectors_held, "a batch's activations": active}
        return parts | ({"the curvature's bases": held} if held else {})

    def sketch(self, adjoint: Block) -> Block:
        """b after at most `SKETCH_ITERATIONS` iterations, to a residual of 0.1."""
        solver = Auto(damping=getattr(self.solver, "damping", "auto"), tol=0.1, max_iter=SKETCH_ITERATIONS)
        return self.with_solver(solver).pull_back(adjoint)[1]

    def cost(self, columns: int, processes: int = 1, adjoint: Block | None = None) -> Cost:
        """What a pull-back of Q = `columns` columns takes on each process, measured on a few batches."""
        return implicit_cost(self, columns, processes, adjoint)

    # --- proof by retraining

    @classmethod
    def retraining(cls, stage: Stage, before: Stage | None, engine: Engine) -> PolishedAgain:
        return PolishedAgain(stage, before, engine)


class PolishedAgain(Retraining):
    """Polishes a stage at a stationary point of F again: without the omitted rows the minimum has moved."""

    def prepare(self, polish: Callable[..., PolishReport]) -> Any:
        """Polishes the finished stage and factorises its Hessian there: the preconditioner of every warm start."""
        return polish((), factorise=True).preconditioner

    def warm_start(
        self, model: nn.Module, terms: Mapping[str, Any], polish: Callable[..., PolishReport], prepared: Any
    ) -> PolishReport:
        return polish(terms["omit"], preconditioner=prepared)

    def from_scratch(self, model: nn.Module, arguments: Any, terms: Mapping[str, Any]) -> None:
        training.train(model, self.stage.objective, self.stage.data, arguments, **terms, progress=False)
