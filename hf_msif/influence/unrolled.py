"""The unrolled link: a stage's adjoint pulled back through its own training run instead of a linear system.

With steps φ_{t+1} = Φ_t(φ_t), φ_0 = (W_before, Θ_0), and λ_T = a = ∂f/∂φ_T:

    λ_t = (∂Φ_t/∂φ)ᵀ λ_{t+1}                                plain SGD: λ_t = λ_{t+1} − η_t ∇²F_{B_t}(φ_t) λ_{t+1}
    b   = λ_0 on inherited trained names,  a_frozen + Σ_t (∂Φ_t/∂frozen)ᵀ λ_{t+1} on frozen ones
    I(x) = N Σ_t ⟨λ_{t+1}, ∂Φ_t/∂w_x⟩                       SGD: −(N/|B|) Σ_{t: x ∈ B_t} η_t ⟨λ_{t+1}, ∇ℓ_x(φ_t)⟩

This is exact for the run as it was, converged or not. States between two kept ones are computed again: about 2√T of
them are held at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import training, vectors
from ..adapters.split import write
from ..curvature.derivatives import Evaluation
from ..engine import Engine
from ..engine.checkpoints import Checkpoint
from ..engine.corpus import Stream
from ..engine.files import flat_keys, nested_keys
from ..engine.hashing import digest, tensors_fingerprint
from ..errors import InputError
from ..scoring.scorer import RowInfluence
from ..training.optimisers import Slots, start
from ..training.record import compose, rerun
from ..training.recording import Recording
from ..training.replay import Adjoint, Replay
from ..vectors import Block
from .chain import BoundStage
from .cost import Cost, best_seconds, model_bytes, size_text, time_text
from .differentiation import Differentiation, Retraining, register
from .stage import Stage

REPRODUCED = 3e-2  # largest difference of a replayed state, relative to how far the run went between two states
SAVE_EVERY = 60.0  # seconds between two copies of a backward sweep that is under way

REMEDIES = (
    "the run is too sensitive for a first-order answer: train it with a smaller learning rate, larger batches, more "
    "warm-up, weight averaging or fewer steps, or differentiate it implicitly (link='implicit')"
)


@dataclass(frozen=True)
class RunCertificate:
    """What is known about a pull-back through a run; lists have one entry per column.

    - `steps`: T. `norms`: [[t, ‖λ_t‖ / ‖a‖ of each column], ...] on the parameters, at the kept states, last first.
    - `growth`: the largest such ratio at any step; `limit`: above it the pull-back is refused.
    - `replay_difference`: the largest ‖φ_replayed − φ_recorded‖ / ‖φ_recorded − φ_before‖ over the segments between
      kept states, of the parameters and of each of the optimiser's buffers (a loss on another scale leaves Adam's
      steps as they are, but not its moments); 0 where the run repeats itself bit for bit.
    """

    steps: int
    growth: list[float]
    limit: float
    replay_difference: float
    norms: list[list[Any]]

    @property
    def converged(self) -> list[bool]:
        """Nothing is iterated: an answer is exact, or refused."""
        return [True] * len(self.growth)

    @property
    def status(self) -> list[str]:
        return ["exact"] * len(self.growth)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunCertificate:
        """Inverse of `to_dict`."""
        return cls(**values)

    def __str__(self) -> str:
        first = self.norms[-1][1]
        return "\n".join(
            f"unrolled, column {q}: {self.steps} steps; adjoint grew at most {growth:.2g} times (limit "
            f"{self.limit:.1g}), {first[q]:.2g} at the start; replay differs by {self.replay_difference:.1e}"
            for q, growth in enumerate(self.growth)
        )


@dataclass
class RowWeights:
    """∂f/∂w_i of the weight of each row of a stage in its run: I(x_i) = N ∂f/∂w_i is looked up.

    Attributes:
        bound: the stage.
        weights: (Q, rows), float64.
        certificate: of the pull-back.
    """

    bound: BoundStage
    weights: Tensor
    certificate: RunCertificate

    @property
    def columns(self) -> int:
        return len(self.weights)

    def influence(self, batch: Mapping[str, Any], rows: list[dict]) -> RowInfluence:
        """N ∂f/∂w of the rows, which must be the stage's own; one forward pass adds their losses.

        Raises:
            InputError: a row that the run did not see.
        """
        places = self._places
        for row in rows:
            if places.get(row["example_id"], ("", ""))[1] != digest(row):
                raise InputError(
                    f"the row {row['example_id']!r} is not one of the rows that stage {self.bound.name!r} was trained "
                    "on: through its run (link='unrolled') only those have an influence. Score rows of its data, or "
                    "use link='implicit'."
                )
        with torch.no_grad():
            losses, counts = Evaluation(self.bound.model, self.bound.objective, batch).losses({})
        columns = self.weights[:, [places[row["example_id"]][0] for row in rows]]
        return RowInfluence(self.bound.count * columns.T, losses, counts)

    def tensors(self) -> dict[str, Tensor]:
        return {"weights": self.weights}

    @cached_property
    def _places(self) -> dict[Any, tuple[int, str]]:
        """example_id → its number and its digest."""
        return {row["example_id"]: (i, digest(row)) for i, row in enumerate(self.bound.rows)}


def held_bytes(recording: Recording, parameters: Mapping[str, Any], columns: int) -> int:
    """Most bytes that a pull-back holds at a time, beside the graph of one step.

    A segment's states; while they are made, the recorded end beside the one that they lead to; on the way back the
    gradient and what it is clipped to, and for each column the adjoints of a state and of the two gradients.
    """
    state = recording.bytes_of(parameters)
    own = state // (1 + len(recording.optimiser.buffers))
    backward = recording.interval * state + 2 * own + columns * (state + 2 * own)
    return max(backward, (recording.interval + 2) * state + columns * state)


def growth_limit(dtype: torch.dtype) -> float:
    """Growth of the adjoint beyond which rounding of the run itself, so much enlarged, reaches 0.1 %."""
    return 1e-3 / torch.finfo(dtype).eps


@register("unrolled")
class Unrolled(Differentiation):
    """A stage whose training run was recorded (`training.record`, `RecordCallback`), step by step.

    Attributes:
        recording: the run.
        replay: its steps, forward and backward.
    """

    needs_run = True
    bound: BoundStage

    def __init__(self, bound: BoundStage, recording: Recording | None = None):
        super().__init__(bound)
        if isinstance(bound.rows, Stream):
            raise InputError(
                f"the data of stage {bound.name!r} is a stream, and link is 'unrolled'; expected a list or a dataset, "
                "since through its run a stage needs all rows at hand, or an implicit link."
            )
        if recording is not None:  # of a run that is still to come
            self.recording, self.replay = recording, self._replay(recording)
            return
        self.recording = Recording.from_pretrained(bound.stage.run, bound.name)
        self._check_settings()
        self.replay = self._replay(self.recording)
        self._check_ends()

    def _replay(self, recording: Recording) -> Replay:
        bound = self.bound
        before = bound.before.model.parameters if bound.before else None
        return Replay(
            bound.model,
            bound.objective,
            bound.rows,
            recording,
            bound.engine,
            bound.split,
            before,
            name=bound.name,
        )

    def _check_settings(self) -> None:
        """The run is of the stage's rows and quadratic terms. (Whether its loss is the stage's objective is seen when
        it is replayed.)"""
        stage, run, name = self.bound.stage, self.recording, self.bound.name
        if run.facts["rows"] != digest(self.bound.rows):
            raise InputError(
                f"stage {name!r}: the run in {run.folder} was trained on other rows than the stage's data; expected "
                "the same rows in the same order, with the same example ids."
            )
        alpha = run.alpha if stage.alpha in (None, "auto") else stage.alpha
        if (run.weight_decay, run.alpha) != (stage.weight_decay, alpha):
            raise InputError(
                f"stage {name!r}: weight_decay={stage.weight_decay} and alpha={stage.alpha}, but the run in "
                f"{run.folder} was trained with {run.weight_decay} and {run.alpha}; expected the run's own."
            )
        if run.facts["omit"]:
            raise InputError(
                f"stage {name!r}: the run in {run.folder} left out the rows {run.facts['omit'][:5]} (omit); expected "
                "a run on all of the stage's data."
            )
        if set(run.trained) != set(self.bound.split.trained):
            names = sorted(set(run.trained) ^ set(self.bound.split.trained))
            raise InputError(
                f"stage {name!r}: the run in {run.folder} and the stage's trainable do not agree on {names[:3]}; "
                "expected the same trained parameters."
            )

    def _check_ends(self) -> None:
        """The run starts from the stage before and ends at the stage's model. A head that starts with the values of
        the stage before is inherited, too."""
        bound, run, name = self.bound, self.recording, self.bound.name
        first = run.state(0, bound.engine.device)["parameters"]
        last = run.state(run.steps, bound.engine.device)["parameters"]
        for n, recorded in last.items():
            gap = float((bound.model.parameters[n] - recorded).norm() / (recorded - first[n]).norm().clamp(min=1e-30))
            if gap > 1e-3:
                raise InputError(
                    f"stage {name!r}: {n!r} of its model is {gap:.1e} of the run's way off the end of the run in "
                    f"{run.folder}; expected the model as that run left it."
                )
        if bound.before is None:
            return
        before = bound.before.model.parameters
        for n, source in bound.split.inherited.items():
            if n in first and not torch.allclose(bound.leading(n, first[n]), before[source].to(first[n]), rtol=1e-6):
                raise InputError(
                    f"stage {name!r}: the run in {run.folder} did not start from stage {bound.before.name!r}: {n!r} "
                    "differs; pair it with the checkpoint that it started from."
                )
        bound.split = bound.split.continuing(first, before)

    # --- the pull-back

    def pull_back(self, adjoint: Block, checkpoint: Checkpoint | None = None) -> tuple[RowWeights, Block]:
        """Back through the run; all columns share one backward sweep.

        A sweep that was interrupted goes on from its last copy, which lies in the run's folder.

        Args:
            adjoint: a = ∂f/∂φ_T on the trained and the frozen names, (Q, *parameter.shape).
            checkpoint: its cache key says what `adjoint` is the answer to, by which a copy of an interrupted sweep is
                known; None: it is known by `adjoint` itself, which differs by rounding on another number of processes.

        Returns:
            ∂f/∂w_i of every row; b on the inherited names.

        Raises:
            InputError: the adjoint grew beyond `Stage.max_growth`, or replaying does not lead from state to state.
        """
        recording, replay, name = self.recording, self.replay, self.bound.name
        key = checkpoint.question + name if checkpoint else None
        limit = self.bound.stage.max_growth or growth_limit(replay.dtype)
        size = vectors.norm(vectors.select(adjoint, recording.trained)).clamp(min=torch.finfo(torch.float64).tiny)
        sweep = _Sweep(recording, replay, adjoint, key)
        segments = list(itertools.pairwise(recording.saved_steps))
        bar = self.bound.engine.bar(desc=f"{name}: back through the run", total=recording.steps, unit=" steps")
        with bar:
            bar.update(recording.steps - sweep.step)
            for begin, end in reversed(segments):
                if begin >= sweep.step:
                    continue
                states, difference = _segment(recording, replay, begin, end)
                sweep.difference = max(sweep.difference, difference)
                if not sweep.difference <= REPRODUCED:
                    raise InputError(
                        f"stage {name!r}: replaying steps {begin + 1} to {end} ends {sweep.difference:.1e} of their "
                        f"length away from the recorded state; expected at most {REPRODUCED:.0e}. The run had another "
                        "loss than the stage's objective (as many models' own loss is under gradient accumulation), "
                        "data or random numbers that were not recorded, or attention kernels with dropout of their "
                        "own (attn_implementation='eager')."
                    )
                for t in reversed(range(begin, end)):
                    replay.backward(states.pop(), t, sweep.adjoint)
                    growth = (vectors.norm(sweep.adjoint.slots["parameters"]) / size).tolist()
                    sweep.growth = [max(pair) for pair in zip(sweep.growth, growth, strict=True)]
                    if not all(math.isfinite(x) and x <= limit for x in growth):
                        raise InputError(
                            f"stage {name!r}: on the way back the adjoint grew {max(growth):.1e} times at step "
                            f"{t + 1} of {recording.steps}; expected at most {limit:.1e} (max_growth): {REMEDIES}."
                        )
                    bar.set_postfix(growth=f"{max(growth):.1e}", refresh=False)
                    bar.update()
                sweep.step = begin
                sweep.norms.append([begin, growth])
                sweep.keep()
        sweep.copy.forget()
        adjoint_before = replay.gather(sweep.adjoint)
        trained = adjoint_before.slots["parameters"]
        frozen = adjoint_before.frozen
        inherited = {n: frozen[n] if n in frozen else trained[n] for n in self.bound.split.inherited}
        for n, anchored in adjoint_before.anchors.items():
            inherited[n] = inherited[n] + anchored
        certificate = RunCertificate(recording.steps, sweep.growth, limit, sweep.difference, sweep.norms)
        return RowWeights(self.bound, adjoint_before.weights, certificate), inherited

    def load(self, tensors: dict[str, Tensor], certificate: dict[str, Any]) -> RowWeights:
        return RowWeights(self.bound, tensors["weights"], RunCertificate.from_dict(certificate))

    def cache_key(self) -> Any:
        return [self.recording.settings]

    def facts(self) -> dict[str, Any]:
        return {
            "weight_decay": self.recording.weight_decay,
            "alpha": self.recording.alpha,
            "alpha_estimate": None,
        }

    # --- what it costs

    @classmethod
    def planned(cls, bound: BoundStage, arguments: Any) -> Unrolled:
        stage = bound.stage
        return cls(
            bound, compose(bound.model, stage.objective, bound.rows, arguments, bound.split, stage.weight_decay)
        )

    def memory(self, columns: int, free: int, processes: int) -> dict[str, int]:
        return {"states of the run and adjoints": held_bytes(self.recording, self.bound.model.parameters, columns)}

    def cost(self, columns: int, processes: int = 1) -> Cost:
        """From two steps of the run, there and back."""
        bound, run, replay = self.bound, self.recording, self.replay
        parameters = bound.model.parameters
        slots = start(run.optimiser, {name: parameters[name] for name in run.trained})
        names = (*bound.split.trained, *bound.split.frozen)
        a = vectors.rademacher({name: parameters[name] for name in names}, columns, seed=0)
        adjoint, last = replay.adjoint(a), run.steps - 1
        forward = best_seconds(replay.forward, slots, 0)
        backward = best_seconds(replay.backward, slots, min(1, last), adjoint)
        state, step_rows = run.bytes_of(parameters), max(map(len, run.schedule.rows))
        held, states = held_bytes(run, parameters, columns), run.interval + 2
        training_seconds, solve_seconds = run.steps * forward, run.steps * (forward + backward)
        text = (
            f"run of {run.steps:,} steps of up to {step_rows} rows: {time_text(training_seconds)} to train; back "
            f"through it with {columns} column(s) {time_text(solve_seconds)}",
            f"{states} states of {size_text(state)} held at a time, with adjoints {size_text(held)}; model "
            f"{size_text(model_bytes(parameters))}; {len(run.saved_steps)} states on disk, "
            f"{size_text(len(run.saved_steps) * state)}",
        )
        return Cost(
            solve_seconds=solve_seconds,
            score_seconds=forward / step_rows / 3 / columns,
            memory_bytes=held,
            model_bytes=model_bytes(parameters),
            vector_bytes=8 * columns * len(bound.rows),
            disk_bytes=len(run.saved_steps) * state,
            details={
                "steps": run.steps,
                "step_rows": step_rows,
                "training_seconds": training_seconds,
                "state_bytes": state,
                "states_held": states,
                "states_kept": len(run.saved_steps),
                "solver_bytes": held,
            },
            text=text,
        )

    # --- proof by retraining

    @classmethod
    def retraining(cls, stage: Stage, before: Stage | None, engine: Engine) -> RunAgain:
        return RunAgain(stage, before, engine)


class RunAgain(Retraining):
    """A recorded run is repeated step by step, from where the stage before now ends."""

    polishes = False

    def __init__(self, stage: Stage, before: Stage | None, engine: Engine):
        super().__init__(stage, before, engine)
        self.recording = Recording.from_pretrained(stage.run, stage.name)
        if before is not None:
            first = self.recording.state(0)["parameters"]
            self.roles = self.roles.continuing(first, dict(before.model.named_parameters()))

    def settings(self) -> Any:
        return self.recording.settings

    def handed_on(self) -> Collection[str]:
        return self.roles.inherited

    def begin(self, model: nn.Module) -> None:
        write(model, self.recording.state(0)["parameters"])

    def warm_start(self, model: nn.Module, terms: Mapping[str, Any], polish, prepared) -> None:
        terms = {key: value for key, value in terms.items() if key not in ("weight_decay", "alpha")}  # the run's own
        rerun(self.recording, model, self.stage.objective, self.stage.data, engine=self.engine, **terms)

    def from_scratch(self, model: nn.Module, arguments: Any, terms: Mapping[str, Any]) -> None:
        terms = {**terms, **{key: getattr(self.recording, key) for key in ("weight_decay", "alpha", "dropout")}}
        training.record(model, self.stage.objective, self.stage.data, arguments, None, **terms, progress=False)


def _segment(recording: Recording, replay: Replay, begin: int, end: int) -> tuple[list[Slots], float]:
    """The states before each of the steps between two kept ones, and how far they lead from the recorded end."""
    device = replay.engine.device
    states = [recording.state(begin, device)]
    for t in range(begin, end):
        states.append(replay.forward(states[-1], t))
    replayed, recorded = states.pop(), recording.state(end, device)
    return states, max(_gap(replayed[slot], recorded[slot], states[0][slot]) for slot in recorded)


def _gap(replayed: Mapping, recorded: Mapping, first: Mapping) -> float:
    """‖replayed − recorded‖ / ‖recorded − first‖."""

    def distance(x: Mapping, y: Mapping) -> float:
        return math.sqrt(sum(float((x[n].double() - y[n].double()).square().sum()) for n in x))

    gap = distance(replayed, recorded)
    return gap / max(distance(recorded, first), 1e-300) if gap else gap


def check_replay(bound: BoundStage) -> float:
    """Replays the whole run of an unrolled stage from its first state.

    Returns:
        ‖φ_replayed − φ_T‖ / ‖φ_T − φ_0‖, 0 where the run repeats itself bit for bit. (Rounding grows along a run; the
        pull-back itself restarts at every kept state, and checks each of these stretches.)
    """
    recording, replay, device = bound.differentiation.recording, bound.differentiation.replay, bound.engine.device
    slots = first = recording.state(0, device)
    with bound.engine.bar(desc=f"{bound.name}: replaying", total=recording.steps, unit=" steps") as bar:
        for t in range(recording.steps):
            slots = replay.forward(slots, t)
            bar.update()
    last = recording.state(recording.steps, device)
    return _gap(slots["parameters"], last["parameters"], first["parameters"])


class _Sweep:
    """A backward sweep under way, and its copy in the run's folder.

    `cache_key` says what `a` is the answer to; None: `a` itself does.
    """

    def __init__(self, recording: Recording, replay: Replay, a: Block, cache_key: str | None):
        self.step, self.difference, self.replay = recording.steps, 0.0, replay
        width = vectors.columns(a)
        self.growth, self.norms = [1.0] * width, [[recording.steps, [1.0] * width]]
        key = f"{cache_key or tensors_fingerprint(a)} {recording.settings}"
        key = hashlib.sha256(key.encode()).hexdigest()
        self.copy = Checkpoint(recording.folder / f"sweep-{key[:16]}.safetensors", key, replay.engine, SAVE_EVERY)
        self.adjoint = self._load() or replay.adjoint(a)

    def keep(self) -> None:
        if not self.copy.due() or self.step == 0:
            return
        adjoint = self.replay.gather(self.adjoint)
        parts = {"frozen": adjoint.frozen, "anchors": adjoint.anchors, "weights": {"": adjoint.weights}}
        parts |= {f"slot {slot}": block for slot, block in adjoint.slots.items()}
        progress = {key: getattr(self, key) for key in ("step", "difference", "growth", "norms")}
        self.copy.save(flat_keys(parts), progress)

    def _load(self) -> Adjoint | None:
        """The copy's adjoint; None where there is none, or where it is damaged or has another cache key."""
        copy = self.copy.load()
        if copy is None:
            return None
        tensors, progress = copy
        vars(self).update({key: progress[key] for key in ("step", "difference", "growth", "norms")})
        device = self.replay.engine.device
        parts: dict[str, Block] = {"frozen": {}, "anchors": {}}
        parts |= nested_keys({key: t.to(device) for key, t in tensors.items()})
        weights = parts.pop("weights")[""]
        slots = {part.removeprefix("slot "): block for part, block in parts.items() if part.startswith("slot ")}
        return self.replay.scatter(Adjoint(slots, parts["frozen"], parts["anchors"], weights))
