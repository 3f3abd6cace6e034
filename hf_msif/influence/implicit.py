"""The implicit link: a stage is taken for a minimum of F, and pulled back by one inverse-curvature-vector product.

u_k = (∂²F_k/∂trained² + 2α P_prox + λ)⁻¹ a_trained
b   = a_frozen − ∂/∂frozen ⟨∇_trained F_k, u_k⟩         on frozen names: Case 1, eq. (11)
b   = 2α u_k                                            on proximal names: Case 2, eqs. (13)–(15)
I(x) = −⟨u_k, ∇ℓ_x⟩                                     eq. (6)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import training, vectors
from ..adapters.functional import FunctionalModel, memo_bytes
from ..curvature import Curvature
from ..curvature.base import MEMO_BYTES
from ..curvature.derivatives import Evaluation, directional_derivatives
from ..curvature.sharded import Sharded
from ..engine import Engine
from ..engine.checkpoints import Checkpoint, SolverCheckpoint
from ..engine.corpus import first_rows
from ..engine.stream import Stream
from ..errors import InputError
from ..objectives import Objective
from ..scoring.scorer import RowInfluence
from ..solvers import Certificate, Operator, Solution, Solver, solve
from ..training.objective import QuadraticTerms, missing_alpha, without_terms
from ..training.polish import PolishReport
from ..vectors import Block
from .chain import BoundStage
from .cost import Cost, activation_bytes, attended, best_seconds, size_text, time_text
from .differentiation import Differentiation, Retraining, StageCertificate
from .stage import Stage

# Float32 blocks that a product holds: the whole vector, its sum in float64 (as large as two), one batch's part of it.
PRODUCT_BLOCKS = 4
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


@dataclass
class Direction:
    """u_k of one stage: the influence of a row is the derivative of its loss along −u_k, eq. (6).

    Attributes:
        model: has the parameters at which the losses are differentiated.
        objective: the objective of the stage.
        u: u_k on the trained names, tensors of shape (Q, *parameter.shape).
        certificate: how well u_k was solved for.
    """

    model: FunctionalModel
    objective: Objective
    u: Block
    certificate: StageCertificate

    @property
    def columns(self) -> int:
        return vectors.columns(self.u)

    def influence(self, batch: dict[str, Any], rows: list[dict]) -> RowInfluence:
        """I(x) = −⟨u_k, ∇ℓ_x⟩ of each row, by one forward-mode pass per column; it costs about three forward passes.

        Args:
            batch: B rows as the objective collates them, on the model's device.
            rows: the rows themselves; not used.

        Returns:
            influence, (B, Q) in float64, positive where more of the row raises the test loss; losses, (B,), sums over
            terms; counts, (B,).
        """
        evaluation = Evaluation(self.model, self.objective, batch)
        values = []
        for q in range(self.columns):
            slopes, losses, counts = directional_derivatives(evaluation, vectors.column(self.u, q))
            values.append(-slopes.double())
        return RowInfluence(torch.stack(values, dim=1), losses, counts)

    def tensors(self) -> dict[str, Tensor]:
        return self.u


class Implicit(Differentiation):
    """Differentiates a stage that ended at a stationary point of F_k, with the curvature and solver of its `Stage`.

    Attributes:
        solver: solves the linear systems.

    Raises:
        InputError: the data are a stream and `curvature_samples` is None, or inherited parameters are trained and
            `alpha` is None.
    """

    needs_run = False
    bound: BoundStage

    def __init__(self, bound: BoundStage):
        super().__init__(bound)
        self.solver = bound.stage.solver
        self._solver_states: dict[Solver, Any] = {}
        stage, split = bound.stage, bound.split
        if isinstance(bound.rows, Stream) and stage.curvature_samples is None:
            raise InputError(
                f"the data of stage {stage.name!r} is a stream, and curvature_samples is None; expected the number of "
                "rows on which the curvature is estimated."
            )
        if split.proximal and stage.alpha is None:
            raise missing_alpha(split)

    # --- curvature

    @cached_property
    def curvature_rows(self) -> list[dict]:
        """The fixed random subset on which `operator` is estimated."""
        return self.bound.subset(self.bound.stage.curvature_samples)

    @cached_property
    def operator(self) -> Curvature:
        """∂²F_k/∂trained² + weight decay + 2α on proximal names, on the curvature subset."""
        return self.curvature(self.curvature_rows)

    def curvature(self, rows: list[dict], ridge: Mapping[str, float | Tensor] | None = None) -> Curvature:
        """The curvature estimated on `rows`; `ridge`, the diagonal of the quadratic terms, defaults to that of F_k."""
        bound, stage = self.bound, self.bound.stage
        ridge = self.ridge if ridge is None else ridge
        return stage.curvature_class(
            bound.model, bound.objective, rows, bound.split.trained, bound.engine, stage.batch_size, ridge
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
            inherited |= {name: adjoint[name] - mixed[name] for name in split.frozen}
        inherited |= {name: self.quadratic.tie[name] * u[name] for name in split.proximal}
        return Direction(self.bound.model, self.bound.objective, u, solution.certificate), inherited

    def solve(self, b: Block, checkpoint: Checkpoint | None = None) -> Solution:
        """Solves the solver's system, with the stage's curvature, for the right-hand sides b.

        The solver's vectors are sharded over the processes if the engine asks for it and the solver allows it.
        """
        engine, operator, solver = self.bound.engine, self.operator, self.solver
        solver_checkpoint = None
        if checkpoint is not None:
            operator.keep_in(checkpoint.path.parent)
        with engine.solver_bar(self.bound.name, solver) as progress:
            if engine.sharded and solver.shardable:
                sharded = Sharded(operator, engine)
                if checkpoint is not None:
                    solver_checkpoint = SolverCheckpoint(checkpoint, sharded.join_rows, sharded.cut_rows)
                state = self._solver_state(sharded)
                solution = solve(sharded, sharded.cut(b), solver, state, progress, solver_checkpoint)
                return replace(solution, value=sharded.join(solution.value))
            if checkpoint is not None:
                solver_checkpoint = SolverCheckpoint(
                    checkpoint, vectors.flatten, lambda rows: vectors.unflatten(rows, b, rows.dtype)
                )
            return solve(operator, b, solver, self._solver_state(operator), progress, solver_checkpoint)

    def _solver_state(self, operator: Operator) -> Any:
        """What the solver computes once per operator (damping, factorisation); later queries use it again."""
        if self.solver not in self._solver_states:
            self._solver_states[self.solver] = self.solver.init(operator)
        return self._solver_states[self.solver]

    def with_solver(self, solver: Solver) -> Implicit:
        """The same differentiation with another solver; both share the operator."""
        _ = self.operator  # so that it is made once, for both
        changed = copy.copy(self)
        changed.solver = solver
        return changed

    def damped(self, damping: float) -> Implicit:
        if not self.solver.damped:
            raise InputError(
                f"stage {self.bound.name!r} is solved by {self.solver}, which has no damping to sweep: use CG."
            )
        return self.with_solver(self.solver.with_damping(damping))

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
        return Direction(self.bound.model, self.bound.objective, tensors, Certificate.from_dict(certificate))

    def identity(self) -> dict[str, Any]:
        return {}

    # --- the certificate

    def facts(self) -> dict[str, Any]:
        stage = self.bound.stage
        estimated = stage.alpha == "auto" and self.bound.split.proximal
        return {
            "weight_decay": stage.weight_decay,
            "alpha": self.alpha,
            "alpha_estimate": asdict(self.estimate) if estimated else None,
            "curvature": stage.curvature_name,
            "curvature_examples": len(self.curvature_rows),
            "gradient_norm": self.gradient_norm,
        }

    def summary(self, certificate: StageCertificate, facts: Mapping[str, Any]) -> str:
        lines = [str(certificate)]
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
        parameters = self.operator_parameters
        vector = columns * vectors.nbytes(parameters)
        solver = self.solver
        blocks, extra = solver.vectors_held, solver.extra_bytes(sum(p.numel() for p in parameters.values()))
        if self.bound.engine.sharded and solver.shardable:
            return -(-blocks * vector // processes) + PRODUCT_BLOCKS * vector + extra
        return (blocks + PRODUCT_BLOCKS) * vector + extra

    @property
    def operator_parameters(self) -> dict[str, Tensor]:
        """The trained parameters, without making an operator."""
        return {name: self.bound.model.parameters[name] for name in self.bound.split.trained}

    def prepare(self) -> None:
        _ = self.operator

    def memory(self, columns: int, free: int, processes: int) -> dict[str, int]:
        vectors_held = self.solver_bytes(columns, processes)
        # They are measured only where the vectors leave room for it.
        active = activation_bytes(self.operator) if vectors_held < free else 0
        held = self.operator.held_bytes()
        parts = {"the solver's vectors": vectors_held, "a batch's activations": active}
        return parts | ({"the curvature's bases": held} if held else {})

    def cost(self, columns: int, processes: int = 1) -> Cost:
        """What a pull-back of Q = `columns` columns takes on each process, measured on at most four batches.

        A product is timed on one batch of medium length, and scaled to a pass over all curvature rows by the ratio of
        the forward passes. The first product is timed apart: later ones find outputs of frozen modules in the memo.
        """
        bound, stage = self.bound, self.bound.stage
        batch_size, samples = stage.batch_size, stage.curvature_samples
        if isinstance(bound.rows, Stream):
            assert samples is not None
            examples = samples
        else:
            examples = min(samples or len(bound.rows), len(bound.rows))
        sample_size = min(4 * batch_size, examples)
        rows = first_rows(bound.rows, sample_size) if isinstance(bound.rows, Stream) else bound.subset(sample_size)
        batches = list(bound.engine.batches(rows, bound.objective, batch_size))
        indices, batch = batches[len(batches) // 2]
        widest, _ = max(batches, key=lambda pair: attended(pair[1]))
        operator = self.curvature([rows[i] for i in indices])
        v = vectors.rademacher(operator.parameters, columns, seed=0)
        evaluation, size = Evaluation(bound.model, bound.objective, batch), vectors.numel(v)
        with torch.no_grad(), bound.model.evaluating():
            operator.count, evaluation.losses({})  # the first pass pays for what later ones find ready
            batch_seconds = best_seconds(evaluation.losses, {})
            pass_seconds = sum(best_seconds(replace(evaluation, batch=batch).losses, {}) for _, batch in batches)
            pass_seconds *= examples / len(rows)
            scored = best_seconds(directional_derivatives, evaluation, vectors.column(v, 0)) / batch_seconds
            score_seconds = scored * pass_seconds / examples
        first = best_seconds(operator.matvec, v, once=True)
        memo = sum(memo_bytes(e.memo or {}) for e in operator.evaluations) / len(indices) * examples
        later = best_seconds(operator.matvec, v) if memo or first < 0.2 else first
        memo_share = min(1.0, MEMO_BYTES / memo) if memo else 0.0
        if operator.holds_batches:
            first_seconds = (first if memo else later) * pass_seconds / batch_seconds
            later_seconds = later * pass_seconds / batch_seconds
            product_seconds = memo_share * later_seconds + (1 - memo_share) * first_seconds
        else:  # the first product fits the curvature, and later ones read no row
            fixed, later = operator.fixed_seconds, best_seconds(operator.matvec, v)
            first_seconds = max(0.0, first - later - fixed) * pass_seconds / batch_seconds + fixed + later
            product_seconds = later
        products = self.solver.products(size, columns)
        mixed_seconds = pass_seconds * (3 + 4 * columns) if bound.split.frozen else 0.0  # derivatives.hessian_product
        pass_seconds, first_seconds, product_seconds, mixed_seconds = (
            seconds / processes for seconds in (pass_seconds, first_seconds, product_seconds, mixed_seconds)
        )
        solver_bytes = self.solver_bytes(columns, processes)
        activations = activation_bytes(self.curvature([rows[i] for i in widest]))
        held_memo, model_bytes = int(memo_share * memo) if products else 0, vectors.nbytes(bound.model.parameters)
        first_extra = first_seconds - product_seconds if products else 0.0
        solve_seconds = products * product_seconds + first_extra + mixed_seconds
        text = (
            f"one pass of {examples:,} rows: {time_text(pass_seconds)} forward, {time_text(product_seconds)} per "
            f"curvature product with {columns} column(s)",
            f"solve: at most {products:,} products, {time_text(solve_seconds)}",
            *(f"curvature: {line}" for line in operator.approximations()),
            f"memory on each of {processes} process(es): vectors {size_text(solver_bytes)}, model "
            f"{size_text(model_bytes)}, a batch's activations {size_text(activations)}"
            + (f", outputs of the frozen encoder {size_text(held_memo)}" if held_memo else ""),
        )
        return Cost(
            solve_seconds=solve_seconds,
            score_seconds_per_row=score_seconds,
            memory_bytes=solver_bytes + activations + operator.held_bytes(),
            model_bytes=model_bytes,
            vector_bytes=vectors.nbytes(v),
            details={
                "forward_seconds": pass_seconds,
                "curvature_examples": examples,
                "first_product_seconds": first_seconds,
                "product_seconds": product_seconds,
                "products": products,
                "solver_bytes": solver_bytes,
                "activation_bytes": activations,
                "memo_bytes": held_memo,
            },
            text=text,
        )

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
