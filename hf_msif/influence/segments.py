"""The segments link: a stage pulled back through its training run as a few checkpoints show it.

Within each of L segments of the run, last to first, curvature H_l, preconditioner P_l (1 for SGD, 1/(√v̂ + ε) for
Adam) and example gradients are those of one checkpoint θ_l. In the eigenbasis of A_l = P_l^½ H_l P_l^½ the run is a
scalar recurrence of its true schedule (`training.response`), here for plain descent:

    u_l = P_l^½ f(A_l) P_l^½ λ                          f(σ) = Σ_t η_t Π_{s>t} (1 − η_s σ)
    I(x) = −Σ_l ⟨u_l, ∇ℓ_x(θ_l)⟩                        examples of the stage itself
    b    = a_frozen − Σ_l ∂/∂frozen ⟨∇_trained F(θ_l), u_l⟩ on frozen names
    λ   ← P_l^−½ p(A_l) P_l^½ λ                         p(σ) = Π_t (1 − η_t σ);  b = λ at the start on trained names

It is approximate unrolling (Bae, Lin, Lorraine & Grosse, "Training Data Attribution via Approximate Unrolling",
NeurIPS 2024), whose f = (1 − e^{−τσ})/σ and p = e^{−τσ}, τ = Σ η_t, are the limits of small rates. With one step per
segment it is the unrolled link, and it is exact where curvature and preconditioner do not change.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import training, vectors
from ..adapters.functional import FunctionalModel
from ..curvature import Curvature
from ..curvature.whitened import Whitened
from ..engine import Engine
from ..engine.checkpoints import Checkpoint
from ..engine.files import nested_keys
from ..engine.hashing import digest, tensors_fingerprint
from ..errors import InputError
from ..solvers import Auto
from ..training import optimisers
from ..training.objective import QuadraticTerms, without_terms
from ..training.optimisers import SGD
from ..training.record import learning_rates
from ..training.trajectory import Segment, Snapshot, Trajectory
from ..vectors import Block
from .backward import REMEDIES, growth_limit
from .chain import BoundStage
from .coordinates import whitened
from .cost import Cost
from .differentiation import Retraining, StageCertificate
from .direction import Direction, Directions
from .recorded import trajectory_of
from .sampled import Sampled
from .segment_sweep import SegmentsCertificate, Sweep, go_back, in_parts, joined
from .segments_cost import columns_at_a_time, segments_cost, solver_bytes, usual_iterations
from .stage import Stage
from .unrolled import RunAgain

SKETCH_ITERATIONS = 10


class Segments(Sampled):
    """Differentiates a stage by a few checkpoints of its training run.

    `Stage.checkpoints` says which: folders of a Trainer (a pattern), a `training.trajectory.Trajectory`, or the number
    of segments of the recorded run in `Stage.run`. The stage's solver gives `tol` and `max_iter`.

    Attributes:
        trajectory: the run in segments.

    Raises:
        InputError: neither checkpoints nor a run is given, or they are not those of the stage; the solver is not
            `solvers.Auto`, or has a damping; alpha is "auto".
    """

    bound: BoundStage

    def __init__(self, bound: BoundStage, trajectory: Trajectory | None = None):
        super().__init__(bound)
        stage = bound.stage
        if not isinstance(stage.solver, Auto) or stage.solver.damping != "auto":
            raise InputError(
                f"stage {stage.name!r}: link is 'segments' and solver is {stage.solver}; expected "
                "solvers.Auto(tol=..., max_iter=...) without a damping, whose place the training time takes."
            )
        if stage.alpha == "auto":
            raise InputError(
                f"stage {stage.name!r}: link is 'segments' and alpha is 'auto'; expected the α with which the stage "
                "was trained, or None where nothing tied it to the stage before."
            )
        self.tol, self.max_iter = stage.solver.tol, stage.solver.max_iter
        # A head that the run took over was not tied: the quadratic terms keep the roles without it.
        self._roles = bound.split
        self.trajectory = trajectory or trajectory_of(bound)
        self.alpha = self.trajectory.alpha if stage.alpha is None else stage.alpha
        self._snapshots: dict[int, Snapshot] = {}
        self._models: dict[int, FunctionalModel] = {}

    # --- the states

    def snapshot(self, i: int) -> Snapshot:
        """The state of segment i; checked, and held.

        Raises:
            InputError: a tensor is missing, has another shape, or holds NaN or inf; or a frozen one was moved.
        """
        if i not in self._snapshots:
            snapshot, bound = self.trajectory.load(i), self.bound
            for name, p in bound.model.parameters.items():
                value = snapshot.parameters.get(name)
                if value is None and name not in bound.split.trained:
                    continue
                if value is None or value.shape != p.shape or not value.isfinite().all():
                    raise InputError(
                        f"stage {bound.name!r}: {name!r} is missing, of another shape, or not finite in segment "
                        f"{i} of {self.trajectory.origin}; expected the stage's model at another time."
                    )
                if name not in bound.split.trained:
                    gap = float((value.to(p) - p).double().norm() / p.double().norm().clamp(min=1e-30))
                    if gap > 1e-5:
                        raise InputError(
                            f"stage {bound.name!r}: {name!r} is not trained, but changes along "
                            f"{self.trajectory.origin} (relative difference {gap:.1e}); expected a trainable that "
                            "names all that the run moved."
                        )
            self._snapshots[i] = snapshot
        return self._snapshots[i]

    def model(self, i: int) -> FunctionalModel:
        """The stage's model at the state of segment i."""
        if i not in self._models:
            snapshot = self.snapshot(i)
            self._models[i] = self.bound.model.at(snapshot.parameters, snapshot.buffers)
        return self._models[i]

    # --- curvature

    def curvature(self, rows: list[dict], i: int = -1) -> Curvature:
        """∂²F/∂trained² at the state of segment i (the last one by default), estimated on `rows`."""
        bound, number = self.bound, i % len(self.trajectory.segments)
        return self.curvature_kind[0](
            self.model(number),
            self.objective,
            rows,
            bound.split.trained,
            bound.engine,
            bound.batch_size,
            self.quadratic.ridge,
        )

    @cached_property
    def quadratic(self) -> QuadraticTerms:
        """The quadratic terms of F, with the SGD's own weight decay, which acts like that of F."""
        bound, stage = self.bound, self.bound.stage
        parameters = vectors.select(bound.model.parameters, bound.split.trained)
        alpha = self.alpha
        assert not isinstance(alpha, str)  # "auto" was refused
        before = bound.before.model.parameters if bound.before else None
        terms = QuadraticTerms.of(stage.model, self._roles, parameters, stage.weight_decay, alpha, before)
        optimiser = self.trajectory.optimiser
        if isinstance(optimiser, SGD) and optimiser.weight_decay:
            for name in self.trajectory.decayed & set(parameters):
                terms.decay[name] = terms.decay.get(name, 0.0) + optimiser.weight_decay
        return terms

    def whitened(self, operator: Curvature, i: int) -> Whitened:
        """A_i = P^½ H P^½."""
        return whitened(operator, self.trajectory, self.snapshot(i))

    # --- the pull-back

    def pull_back(self, adjoint: Block, checkpoint: Checkpoint | None = None) -> tuple[Directions, Block]:
        """Takes the adjoint back through the segments, last to first; all columns share the products.

        Args:
            adjoint: a = ∂f/∂φ_T on the trained and the frozen names, tensors of shape (Q, *parameter.shape).
            checkpoint: saves what is known after each segment, and loads it; None: nothing is saved.

        Returns:
            u_l of all segments; b on the inherited names.

        Raises:
            InputError: the adjoint grew beyond `Stage.max_growth`, or no row of the curvature's has a term.
        """
        bound, split, segments = self.bound, self.bound.split, self.trajectory.segments
        norms = vectors.norm(vectors.select(adjoint, split.trained)).clamp(min=torch.finfo(torch.float64).tiny)
        limit = bound.stage.max_growth or growth_limit(adjoint[split.trained[0]].dtype)
        sweep = (checkpoint and Sweep.load(checkpoint)) or self._start(adjoint)
        for i in reversed(range(len(segments))):
            if i in sweep.u:
                continue
            operator = self.curvature(self.curvature_rows, i)
            if not operator.count:
                raise without_terms(bound.name, operator.examples)
            if checkpoint is not None:
                operator.keep_in(checkpoint.path.parent)
            system, descent = self.whitened(operator, i), self.trajectory.descent(segments[i])
            carries = i > 0 or not set(split.inherited).isdisjoint(split.trained)
            with bound.engine.solver_bar(bound.name, bound.stage.solver) as progress:
                settings = (carries, self.tol, self.max_iter, bound.engine, progress)
                parts = [
                    go_back(segments[i], system, descent, slots, *settings)
                    for slots in in_parts(sweep.slots, columns_at_a_time(self, vectors.columns(adjoint)))
                ]
            u, sweep.slots, report = joined(parts)
            # Where nothing is handed on, by how much it would grow at most.
            growth = vectors.norm(sweep.slots[0]) / norms if carries else norms.new_full((1,), report.amplified)
            if not bool((growth <= limit).all()) or not all(bool(t.isfinite().all()) for t in u.values()):
                raise InputError(
                    f"stage {bound.name!r}: on the way back the adjoint grew {float(growth.max()):.1e} times up to "
                    f"step {segments[i].begin + 1}; expected at most {limit:.1e} (max_growth): take "
                    f"curvature='gauss_newton', whose eigenvalues are not negative; or {REMEDIES}."
                )
            sweep.reports.append(replace(report, growth=growth.tolist() if carries else []))
            if split.frozen:
                mixed = operator.mixed(u, split.frozen)
                sweep.frozen = {name: t - mixed[name] for name, t in sweep.frozen.items()}
            for name in sweep.ties:
                sweep.ties[name] = sweep.ties[name] + self.quadratic.tie[name] * u[name]
            sweep.u[i] = u
            if checkpoint is not None:
                sweep.save(checkpoint)
        inherited = {n: sweep.frozen[n] if n in sweep.frozen else sweep.slots[0][n] for n in split.inherited}
        for name, tie in sweep.ties.items():
            inherited[name] = inherited[name] + tie
        certificate = SegmentsCertificate(self.tol, self.max_iter, sweep.reports)
        return self.directions([sweep.u[i] for i in range(len(segments))], certificate), inherited

    def _start(self, adjoint: Block) -> Sweep:
        split = self.bound.split
        trained = vectors.select(adjoint, split.trained)
        slots = [trained, *(vectors.zeros_like(trained) for _ in range(self.slots - 1))]
        ties = vectors.zeros_like(vectors.select(trained, self.quadratic.tie))
        return Sweep(slots, vectors.select(adjoint, split.frozen), ties, {}, [])

    @property
    def slots(self) -> int:
        """Vectors of the state of a run: its parameters, and the momentum's buffer where there is one."""
        return 1 + len(self.trajectory.descent(self.trajectory.segments[0])[0].buffers)

    def directions(self, us: list[Block], certificate: StageCertificate) -> Directions:
        parts = [self.direction(u, certificate, i) for i, u in enumerate(us)]
        return Directions(parts, self.bound.model, certificate)

    def direction(self, u: Block, certificate: StageCertificate, i: int = -1) -> Direction:
        """u at the state of segment i, the last one by default."""
        bound, model = self.bound, self.model(i % len(self.trajectory.segments))
        return Direction(model, self.objective, u, certificate, lambda: bound.compared_rows)

    def load(self, tensors: dict[str, Tensor], certificate: dict[str, Any]) -> Directions:
        nested, numbers = nested_keys(tensors), range(len(self.trajectory.segments))
        parameters, trained = self.bound.model.parameters, self.bound.split.trained
        expected = {f"{i}/{name}": parameters[name].shape for i in numbers for name in trained}
        if {key: t.shape[1:] for key, t in tensors.items()} != expected:
            raise InputError(
                f"the saved solution of stage {self.bound.name!r} is not one of its {len(numbers)} segments and "
                "trained parameters; expected a query of this chain: query again."
            )
        # In memory of their own, as `Implicit.load` says.
        us = [vectors.clone(nested[str(i)]) for i in numbers]
        return self.directions(us, SegmentsCertificate.from_dict(certificate))

    def identity(self) -> dict[str, Any]:
        states = []
        for i in range(len(self.trajectory.segments)):
            snapshot = self.snapshot(i)
            moments = snapshot.second_moments or {}
            trained = {n: snapshot.parameters[n] for n in self.bound.split.trained}
            states.append([tensors_fingerprint(trained), tensors_fingerprint(dict(moments))])
        return {"the checkpoints of its run": digest([self.trajectory.settings, states])}

    def facts(self) -> dict[str, Any]:
        segments = [segment._asdict() for segment in self.trajectory.segments]
        return {
            "weight_decay": self.bound.stage.weight_decay,
            "alpha": self.alpha,
            "alpha_estimate": None,
            "curvature": self.bound.stage.curvature_name,
            "curvature_choice": self.curvature_kind[1],
            "curvature_examples": len(self.curvature_rows),
            "checkpoints": self.trajectory.origin,
            "steps": self.trajectory.steps,
            "time": self.trajectory.time(),
            "segments": segments,
        }

    def summary(self, certificate: StageCertificate, facts: Mapping[str, Any]) -> str:
        text = f"{facts['steps']:,} steps in {len(facts['segments'])} segments, {facts['checkpoints']}"
        chosen = facts.get("curvature_choice")
        return "\n".join([text, *([f"curvature='auto' took {chosen}"] if chosen else []), str(certificate)])

    # --- what it costs

    @classmethod
    def planned(cls, bound: BoundStage, arguments: Any) -> Segments:
        """The stage as its `TrainingArguments` will train it, at its present parameters."""
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        steps = arguments.max_steps
        if steps < 1:
            steps = math.ceil(arguments.num_train_epochs * math.ceil(bound.examples / batch))
        every = math.ceil(arguments.save_steps * steps) if arguments.save_steps < 1 else int(arguments.save_steps)
        ends = [0, *range(every, steps, every), steps]  # a Trainer saves the end of a run, too
        cut = [Segment(begin, end, end) for begin, end in itertools.pairwise(ends)]
        snapshot = Snapshot(bound.model.parameters, bound.model.buffers, None)
        optimiser, rates = optimisers.from_arguments(arguments, bound.name), learning_rates(arguments, steps)
        return cls(
            bound,
            Trajectory(optimiser, rates, tuple(cut), lambda i: snapshot, frozenset(), "a run to come", batch=batch),
        )

    def prepare(self) -> None:
        for i in range(len(self.trajectory.segments)):
            self.model(i)

    def memory(self, columns: int, free: int, processes: int) -> dict[str, int]:
        size = vectors.nbytes(self.bound.model.parameters)
        return {
            "the states of the run": len(self.trajectory.segments) * size,
            "the Krylov vectors": solver_bytes(self, columns, usual_iterations(self), processes),
        }

    def sketch(self, adjoint: Block) -> Block:
        """b after at most `SKETCH_ITERATIONS` iterations in each segment, or to an error of 0.1."""
        short = copy.copy(self)
        short.tol, short.max_iter = 0.1, SKETCH_ITERATIONS
        return short.pull_back(adjoint)[1]

    def cost(self, columns: int, processes: int = 1, adjoint: Block | None = None) -> Cost:
        """What a pull-back of Q = `columns` columns takes on each process, measured on a few batches."""
        return segments_cost(self, columns, processes)

    # --- proof by retraining

    @classmethod
    def retraining(cls, stage: Stage, before: Stage | None, engine: Engine) -> Retraining:
        return RunAgain(stage, before, engine) if stage.run is not None else TrainedAgain(stage, before, engine)


class TrainedAgain(Retraining):
    """Trains a stage from scratch, as its Trainer did."""

    polishes = False

    def warm_start(self, model: Any, terms: Mapping[str, Any], polish: Callable[..., Any], prepared: Any) -> None:
        raise InputError(
            f"stage {self.stage.name!r}: its run is known by checkpoints alone, and cannot be repeated step by step; "
            "expected a recorded run (Stage.run), or retraining from scratch."
        )

    def from_scratch(self, model: Any, arguments: Any, terms: Mapping[str, Any]) -> None:
        training.train(model, self.stage.objective, self.stage.data, arguments, **terms, progress=False)
