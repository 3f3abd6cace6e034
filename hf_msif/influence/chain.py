"""`Link`: a stage bound to its place in a chain, with what it hands to the stage before."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import adapters, vectors
from ..adapters.functional import FunctionalModel, check_vocabulary
from ..adapters.split import Split
from ..curvature import Curvature
from ..curvature.base import _counts
from ..curvature.derivatives import Evaluation, reached
from ..curvature.sharded import Sliced
from ..engine.accelerated import Engine
from ..engine.checkpoints import Checkpoint, SolverCheckpoint
from ..engine.corpus import Stream, as_corpus, as_rows, first
from ..engine.hashing import digest, objective_fingerprint, tensors_fingerprint
from ..errors import InputError
from ..solvers import Dense, Identity, Solution, solve
from ..training.recording import Recording
from ..training.replay import Replay
from ..vectors import Block
from .stage import Stage


@dataclass(frozen=True)
class AlphaEstimate:
    """α̂ of eq. (12) from the finished parameters, see `Link.estimate`.

    Attributes:
        alpha: α̂.
        gradient_norm: ‖∇_W F‖ without the proximal term.
        distance: ‖W − W_before‖.
        remaining: ‖∇_W F + 2α̂ (W − W_before)‖ / ‖∇_W F‖: 0 where the parameters are a proximal optimum, near 1 where α̂
            explains next to nothing and the proximal model does not fit.
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


class Link:
    """A stage bound to its place in a chain: its roles, rows and curvature, and what it hands to the stage before.

    Attributes:
        split: the roles of its parameters; where the link is unrolled, a head that the run started with the values of
            the stage before is inherited too.
        recording: the run, where the link is unrolled.
        model: the stage's model as a function of its parameters.
        rows: the stage's data.
    """

    def __init__(self, stage: Stage, before: Link | None, engine: Engine):
        self.stage, self.before, self.engine = stage, before, engine
        self.split: Split = adapters.split(
            stage.name,
            stage.model,
            before.stage.model if before else None,
            stage.trainable,
            stage.resized,
            before.stage.name if before else "",
        )
        self._solver_states: dict[Any, Any] = {}
        self.model = FunctionalModel(stage.model, engine.device)
        what = f"the data of stage {stage.name!r}"
        found = as_corpus(stage.data, what) if before is None else None
        self.rows = found if isinstance(found, Stream) else as_rows(stage.data, what)
        if found is self.rows and (stage.curvature_samples is None or stage.link == "unrolled"):
            raise InputError(
                f"{what} is a stream, and curvature_samples is {stage.curvature_samples} and link {stage.link!r}; "
                "expected a number of rows on which to estimate the curvature, and a proximal link: through its run a "
                "stage needs all rows at hand."
            )
        self._check_finite()
        check_vocabulary(stage.name, stage.model, stage.objective)
        self._leave_out_what_the_loss_ignores()
        self.recording = Recording.from_pretrained(stage.run, stage.name) if stage.link == "unrolled" else None
        if self.recording is not None:
            self._check_run()
        self._check_link()

    def _leave_out_what_the_loss_ignores(self) -> None:
        """A trained tensor that the loss never reads has no curvature: the system would be singular in it."""
        trained = reached(self.model, self.stage.objective, first(self.rows, 2), self.split.trained)
        if not trained:
            raise InputError(f"stage {self.stage.name!r}: the loss depends on none of the trained parameters.")
        unused = {n: "the loss does not depend on it" for n in self.split.trained if n not in set(trained)}
        if unused:
            inherited = {n: source for n, source in self.split.inherited.items() if n not in unused}
            self.split = replace(
                self.split, trained=trained, inherited=inherited, left_out={**self.split.left_out, **unused}
            )

    def _check_finite(self) -> None:
        for name, parameter in self.model.parameters.items():
            if not parameter.isfinite().all():
                raise InputError(
                    f"stage {self.stage.name!r}: the parameter {name!r} holds NaN or inf: its training diverged, or "
                    "the checkpoint is damaged; load an earlier one."
                )

    def _check_run(self) -> None:
        """The recorded run is of the stage's rows and quadratic terms, starts from the stage before and ends at the
        stage's model; its `replay`, and what it inherited beside the encoder. (Whether its loss is the stage's
        objective is seen when it is replayed.)"""
        name, run = self.stage.name, self.recording
        if run.facts["rows"] != digest(self.rows):
            raise InputError(
                f"stage {name!r}: the run in {run.folder} was trained on other rows than the stage's data; expected "
                "the same rows in the same order, with the same example ids."
            )
        alpha = run.alpha if self.stage.alpha in (None, "auto") else self.stage.alpha
        if (run.weight_decay, run.alpha) != (self.stage.weight_decay, alpha):
            raise InputError(
                f"stage {name!r}: weight_decay={self.stage.weight_decay} and alpha={self.stage.alpha}, but the run in "
                f"{run.folder} was trained with {run.weight_decay} and {run.alpha}; expected the run's own."
            )
        if run.facts["omit"]:
            raise InputError(
                f"stage {name!r}: the run in {run.folder} left out the rows {run.facts['omit'][:5]} (omit); expected "
                "a run on all of the stage's data."
            )
        if set(run.trained) != set(self.split.trained):
            odd = sorted(set(run.trained) ^ set(self.split.trained))
            raise InputError(
                f"stage {name!r}: the run in {run.folder} and the stage's trainable do not agree on {odd[:3]}; "
                "expected the same trained parameters."
            )
        self.replay = Replay(
            self.model,
            self.stage.objective,
            self.rows,
            run,
            self.engine,
            self.split,
            self.before.model.parameters if self.before else None,
            name=name,
        )
        first = run.state(0, self.engine.device)["parameters"]
        last = run.state(run.steps, self.engine.device)["parameters"]
        for n, recorded in last.items():
            gap = float((self.model.parameters[n] - recorded).norm() / (recorded - first[n]).norm().clamp(min=1e-30))
            if gap > 1e-3:
                raise InputError(
                    f"stage {name!r}: {n!r} of its model is {gap:.1e} of the run's way off the end of the run in "
                    f"{run.folder}; expected the model as that run left it."
                )
        if self.before is None:
            return
        before = self.before.model.parameters
        for n, source in self.split.inherited.items():
            if n in first and not torch.allclose(self._leading(n, first[n]), before[source].to(first[n]), rtol=1e-6):
                raise InputError(
                    f"stage {name!r}: the run in {run.folder} did not start from stage {self.before.stage.name!r}: "
                    f"{n!r} differs; pair it with the checkpoint that it started from."
                )
        self.split = self.split.continuing(first, before)

    def _check_link(self) -> None:
        if self.split.proximal and self.stage.alpha is None and self.recording is None:
            raise InputError(
                f"stage {self.stage.name!r} trains {len(self.split.proximal)} inherited tensors (first "
                f"{self.split.proximal[0]!r}): give alpha, the α of eq. (12), or freeze them with trainable='head'."
            )
        for name in self.split.frozen:
            source = self.before.model.parameters[self.split.inherited[name]]
            own = self._leading(name, self.model.parameters[name])
            gap = float((own.double() - source.double()).norm() / source.double().norm().clamp(min=1e-30))
            if gap > 1e-6:
                raise InputError(
                    f"stage {self.stage.name!r}: {name!r} counts as frozen, but differs from stage "
                    f"{self.before.stage.name!r} (relative difference {gap:.1e}): it was trained, or adapters were "
                    "merged into it, or the checkpoint is another one. Use trainable='all' (or patterns) with alpha, "
                    "give the model with its adapters unmerged, or pair it with the checkpoint that it was finetuned "
                    "from."
                )

    def collate(self, rows: list[dict]) -> dict:
        """A batch of the stage's objective on the engine's device."""
        return self.engine.place(self.stage.objective.collate(rows))

    @cached_property
    def curvature_rows(self) -> list[dict]:
        """The fixed random subset on which `operator` is estimated."""
        return self.subset(self.stage.curvature_samples)

    @cached_property
    def operator(self) -> Curvature:
        """∂²F_k/∂trained² + weight decay + 2α on proximal names, on the curvature subset."""
        return self.curvature(self.curvature_rows)

    def curvature(self, rows: list[dict], ridge: Mapping[str, float | Tensor] | None = None) -> Curvature:
        """`operator` estimated on other rows, or with other quadratic terms."""
        stage, kind = self.stage, self.stage.curvature_class
        ridge = self.ridge if ridge is None else ridge
        return kind(self.model, stage.objective, rows, self.split.trained, self.engine, stage.batch_size, ridge)

    def solve(self, b: Block, solver: Any, checkpoint: Checkpoint | None = None) -> Solution:
        """The solver's system with the stage's curvature and right-hand sides b; Krylov vectors in slices where the
        engine is sharded."""
        engine, operator = self.engine, self.operator
        keeper = None
        with engine.solver_bar(self.stage.name, solver) as progress:
            if engine.sharded and not isinstance(solver, (Dense, Identity)):
                sliced = Sliced(operator, engine)
                if checkpoint is not None:
                    keeper = SolverCheckpoint(checkpoint, sliced.join_rows, sliced.cut_rows)
                with engine.slices():
                    state = self._solver_state(solver, sliced)
                    found = solve(sliced, sliced.cut(b), solver, state, progress, keeper)
                return replace(found, value=sliced.join(found.value))
            if checkpoint is not None:
                keeper = SolverCheckpoint(
                    checkpoint, vectors.flatten, lambda rows: vectors.unflatten(rows, b, rows.dtype)
                )
            return solve(operator, b, solver, self._solver_state(solver, operator), progress, keeper)

    def _solver_state(self, solver: Any, operator: Any) -> Any:
        """What the solver pays once per operator (damping, factorisation), kept for later queries."""
        if solver not in self._solver_states:
            self._solver_states[solver] = solver.init(operator)
        return self._solver_states[solver]

    @cached_property
    def _decays(self) -> list[str]:
        """The trained names that the stage's weight decay acts on."""
        if not self.stage.weight_decay:
            return []
        decayed = adapters.decayed_names(self.stage.model)
        return [name for name in self.split.trained if name in decayed]

    @cached_property
    def ridge(self) -> dict[str, float | Tensor]:
        """Diagonal of the quadratic terms of F_k."""
        ridge: dict[str, float | Tensor] = dict.fromkeys(self._decays, self.stage.weight_decay)
        for name in self.split.proximal:
            ridge[name] = ridge.get(name, 0.0) + self.tie(name)
        return ridge

    def tie(self, name: str) -> float | Tensor:
        """2α on the inherited rows of a proximal parameter, zero on rows that a resize added."""
        return self.split.tie(name, self.model.parameters[name], self.alpha)

    @cached_property
    def alpha(self) -> float | None:
        """α of eq. (12): the stage's, or its estimate.

        Warns:
            UserWarning: the estimate is not positive: the run did not end where a proximal term would have ended it.
        """
        if self.stage.alpha != "auto" or not self.split.proximal:
            return None if self.stage.alpha == "auto" else self.stage.alpha
        if self.estimate.alpha <= 0:
            warnings.warn(
                f"stage {self.stage.name!r}: {self.estimate}. It is not positive: no proximal term explains where "
                "training ended. Use link='unrolled' with the recorded run, or give alpha as a number.",
                stacklevel=2,
            )
        return self.estimate.alpha

    @cached_property
    def estimate(self) -> AlphaEstimate:
        """α̂ = −⟨∇_W F, W − W_before⟩ / (2 ‖W − W_before‖²), on all of the stage's rows: of all α that for which
        F + α ‖W − W_before‖² is the nearest to stationary in W.

        Raises:
            InputError: W is W_before.
        """
        slope = self.curvature(self.rows, {}).gradient()
        for name in self._decays:
            slope[name] += self.stage.weight_decay * self.model.parameters[name]
        slope = vectors.select(slope, self.split.proximal)
        shift = vectors.stack([{name: self._shift(name) for name in self.split.proximal}])
        distance, norm = float(vectors.norm(shift)), float(vectors.norm(slope))
        if distance == 0:
            raise InputError(
                f"stage {self.stage.name!r}: alpha is 'auto', but the inherited parameters are those of stage "
                f"{self.before.stage.name!r}; expected a finetuned model, or trainable='head'."
            )
        alpha = -float(vectors.dot(slope, shift)) / (2 * distance**2)
        rest = float(vectors.norm(vectors.add(slope, shift, 2 * alpha)))
        return AlphaEstimate(alpha, norm, distance, rest / norm if norm else 0.0)

    def subset(self, size: int | None) -> list[dict]:
        """So many random rows of the stage's data, the same for the same seed; None: all of them."""
        if isinstance(self.rows, Stream):
            return self.engine.sample(self.rows, size, self.stage.seed)
        if size is None or size >= len(self.rows):
            return self.rows
        return random.Random(self.stage.seed).sample(self.rows, size)

    @cached_property
    def count(self) -> float:
        """N_k = Σ count_i over *all* of the stage's data: the removal of an example has the effect −influence/N_k."""
        return self._size[0]

    @property
    def examples(self) -> int:
        """How many rows the stage's data have."""
        return self._size[1] if isinstance(self.rows, Stream) else len(self.rows)

    @cached_property
    def _size(self) -> tuple[float, int]:
        """N and the number of rows, by one pass over them."""
        built = vars(self).get("operator")  # a saved query is scored without one
        if built is not None and not isinstance(self.rows, Stream) and built.examples == len(self.rows):
            return built.count, built.examples
        total, examples, objective, size = 0.0, 0, self.stage.objective, self.stage.batch_size
        total_rows = None if isinstance(self.rows, Stream) else len(self.rows)
        bar = self.engine.bar(total=total_rows, desc=f"{self.stage.name}: counting", unit=" sentences")
        with bar, torch.no_grad(), self.model.evaluating():
            for rows in self.engine.rounds(self.rows, 64 * size * self.engine.processes):
                with self.engine.together():
                    for _, batch in self.engine.batches(rows, objective, size):
                        total += float(_counts(Evaluation(self.model, objective, batch)).double().sum())
                examples += len(rows)
                bar.update(len(rows))
        return sum(self.engine.gather([total])), examples

    @cached_property
    def gradient_norm(self) -> float:
        """‖∇F_k‖ in the trained parameters, on the curvature subset; one gradient pass.

        The implicit formulas, eqs. (9)–(15), differentiate ∇F_k = 0: they are exact where this is zero. (On a subset
        of the data it is not zero even where training has converged on all of them.)
        """
        total = self.operator.gradient()
        for name in self._decays:
            total[name] += self.stage.weight_decay * self.model.parameters[name]
        for name in self.split.proximal:
            total[name] += 2 * self.alpha * self._shift(name)
        return float(vectors.norm(total))

    @cached_property
    def question(self) -> str:
        """What the stage's pull-back depends on, beside the adjoint that it is given."""
        stage = self.stage
        settings = [
            stage.trainable,
            stage.weight_decay,
            stage.alpha,
            stage.link,
            stage.curvature_name,
            repr(stage.solver),
        ]
        rows = self.curvature_rows if self.recording is None else [self.recording.settings]
        return digest([self.fingerprint, repr(settings), objective_fingerprint(stage.objective), rows])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters, by which a saved query knows its model."""
        return tensors_fingerprint(self.model.parameters)

    def _shift(self, name: str) -> Tensor:
        """W − W_before, zero on rows that a resize added."""
        shift = torch.zeros_like(self.model.parameters[name])
        own = self._leading(name, self.model.parameters[name])
        self._leading(name, shift).copy_(own - self.before.model.parameters[self.split.inherited[name]].to(own))
        return shift

    def _leading(self, name: str, tensor: Tensor, axis: int = 0) -> Tensor:
        """The inherited rows of a tensor: all of them unless the stage resized it."""
        return tensor.narrow(axis, 0, self.split.resized[name]) if name in self.split.resized else tensor

    def carry(self, b: Mapping[str, Tensor]) -> Block:
        """An adjoint on this stage's inherited names as one on the stage before, there zero on the head."""
        before = self.before.model.parameters
        width = vectors.columns(b)
        carried = {name: p.new_zeros(width, *p.shape) for name, p in before.items()}
        for name, value in b.items():
            source = self.split.inherited[name]
            carried[source] += self._leading(name, value, axis=1).to(carried[source])
        return carried


def bind(stages: Sequence[Stage], engine: Engine) -> list[Link]:
    """The stages as a chain, first to last.

    Raises:
        InputError: no stage, a name used twice, or stages that do not fit together.
    """
    if not stages:
        raise InputError("a chain needs at least one stage; got none.")
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise InputError(f"stage names must differ; got {names}.")
    links: list[Link] = []
    for stage in stages:
        links.append(Link(stage, links[-1] if links else None, engine))
    return links
