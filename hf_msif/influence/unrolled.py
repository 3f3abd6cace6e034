"""The unrolled link: a stage's adjoint pulled back through its own training run instead of a linear system.

With steps φ_{t+1} = Φ_t(φ_t), φ_0 = (W_before, Θ_0), and λ_T = a = ∂f/∂φ_T:

    λ_t = (∂Φ_t/∂φ)ᵀ λ_{t+1}                                plain SGD: λ_t = λ_{t+1} − η_t ∇²F_{B_t}(φ_t) λ_{t+1}
    b   = λ_0 on inherited trained names,  a_frozen + Σ_t (∂Φ_t/∂frozen)ᵀ λ_{t+1} on frozen ones
    I(x) = N Σ_t ⟨λ_{t+1}, ∂Φ_t/∂w_x⟩                       SGD: −(N/|B|) Σ_{t: x ∈ B_t} η_t ⟨λ_{t+1}, ∇ℓ_x(φ_t)⟩

This is exact for the run as it was, converged or not. About √T states are saved on disk; those between two of them are
computed again, and about √T of them are held in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import training, vectors
from ..adapters.split import write
from ..curvature.derivatives import Evaluation
from ..engine import Engine
from ..engine.checkpoints import Checkpoint
from ..engine.hashing import digest
from ..engine.stream import Stream
from ..errors import InputError
from ..scoring.scorable import RowInfluence
from ..training.optimisers import start
from ..training.polish import PolishReport
from ..training.record import compose, rerun
from ..training.recording import Recording
from ..training.replay import Replay
from ..vectors import Block
from .backward import RunCertificate, gap, go_back, growth_limit, held_bytes
from .chain import BoundStage
from .cost import Cost, best_seconds, size_text, time_text
from .differentiation import Differentiation, Retraining
from .recorded import inherit_head, recorded_run
from .stage import Stage


@dataclass
class RowWeights:
    """∂f/∂w_i for the weight w_i of each row of a stage in its run; I(x_i) = N ∂f/∂w_i is looked up.

    Attributes:
        bound: the stage.
        weights: ∂f/∂w_i, (Q, rows), float64.
        certificate: the certificate of the pull-back.
    """

    bound: BoundStage
    weights: Tensor
    certificate: RunCertificate

    @property
    def columns(self) -> int:
        return len(self.weights)

    def influence(self, batch: dict[str, Any], rows: list[dict]) -> RowInfluence:
        """I(x_i) = N ∂f/∂w_i of the rows, which must be rows of the stage; one forward pass gives their losses.

        Args:
            batch: B rows as the stage's objective collates them, on the engine's device.
            rows: the rows themselves.

        Returns:
            influence, (B, Q) in float64, positive where more of the row raises the test loss; losses, (B,), sums over
            terms; counts, (B,).

        Raises:
            InputError: a row on which the stage was not trained.
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
        """example_id → number of the row in the stage's data, and its digest."""
        return {row["example_id"]: (i, digest(row)) for i, row in enumerate(self.bound.rows)}


class Unrolled(Differentiation):
    """Differentiates a stage whose training run was recorded (`training.record`, `RecordCallback`), step by step.

    Args:
        bound: the stage in its place in the chain.
        recording: a planned run; defaults to the run in the folder `Stage.run`.

    Attributes:
        recording: the run.
        replay: the steps of the run, forward and backward.

    Raises:
        InputError: the data are a stream, or the run in the folder is not that of this stage: other rows, settings,
            parameters, start or end.
    """

    needs_run = True
    masks_of_training = True
    bound: BoundStage

    def __init__(self, bound: BoundStage, recording: Recording | None = None):
        super().__init__(bound)
        self.rows = _rows_at_hand(bound)
        if recording is not None:  # the run is planned: it has no states to be checked
            self.recording, self.replay = recording, self._replay(recording)
            return
        self.recording, first = recorded_run(bound)
        self.replay = self._replay(self.recording)
        inherit_head(bound, self.recording, first)

    def _replay(self, recording: Recording) -> Replay:
        bound = self.bound
        before = bound.before.model.parameters if bound.before else None
        return Replay(
            bound.model,
            bound.stage.objective,
            self.rows,
            recording,
            bound.engine,
            bound.split,
            before,
            name=bound.name,
        )

    # --- the pull-back

    def pull_back(self, adjoint: Block, checkpoint: Checkpoint | None = None) -> tuple[RowWeights, Block]:
        """Takes the adjoint back through the run; all columns share one backward sweep.

        A sweep that was interrupted continues from its own checkpoint, which lies in the run's folder.

        Args:
            adjoint: a = ∂f/∂φ_T on the trained and the frozen names, tensors of shape (Q, *parameter.shape).
            checkpoint: its cache key identifies the question and the later stages, and with them the checkpoint of an
                interrupted sweep. None: the values of `adjoint` identify it, which differ by rounding on another
                number of processes.

        Returns:
            ∂f/∂w_i of every row; b on the inherited names, tensors of shape (Q, *parameter.shape).

        Raises:
            InputError: the adjoint grew beyond `Stage.max_growth`, or replaying does not lead from state to state.
        """
        bound, recording, replay = self.bound, self.recording, self.replay
        limit = bound.stage.max_growth or growth_limit(replay.dtype)
        # The file's name tells the replicates of a query apart, whose sweeps begin with adjoints of their own.
        cache_key = checkpoint.cache_key + checkpoint.path.stem if checkpoint else None
        first, certificate = go_back(recording, replay, adjoint, bound.name, limit, cache_key)
        trained = first.slots["parameters"]
        inherited = {n: first.frozen[n] if n in first.frozen else trained[n] for n in bound.split.inherited}
        for n, anchored in first.anchors.items():
            inherited[n] = inherited[n] + anchored
        return RowWeights(bound, first.weights, certificate), inherited

    def load(self, tensors: dict[str, Tensor], certificate: dict[str, Any]) -> RowWeights:
        weights = tensors.get("weights")
        if weights is None or weights.dim() != 2 or weights.shape[1] != len(self.rows):
            shape = None if weights is None else tuple(weights.shape)
            raise InputError(
                f"the saved weights of stage {self.bound.name!r} have the shape {shape}; expected (columns, "
                f"{len(self.rows)}): query again."
            )
        return RowWeights(self.bound, weights, RunCertificate.from_dict(certificate))

    def identity(self) -> dict[str, Any]:
        return {"the recorded run": digest(self.recording.settings)}

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
            bound,
            compose(bound.model, stage.objective, _rows_at_hand(bound), arguments, bound.split, stage.weight_decay),
        )

    def memory(self, columns: int, free: int, processes: int) -> dict[str, int]:
        return {"states of the run and adjoints": held_bytes(self.recording, self.bound.model.parameters, columns)}

    def cost(self, columns: int, processes: int = 1, adjoint: Block | None = None) -> Cost:
        """What a pull-back of Q = `columns` columns takes, measured on two steps of the run, forward and backward."""
        bound, run, replay = self.bound, self.recording, self.replay
        parameters = bound.model.parameters
        slots = start(run.optimiser, {name: parameters[name] for name in run.trained})
        names = (*bound.split.trained, *bound.split.frozen)
        a = vectors.rademacher({name: parameters[name] for name in names}, columns, seed=0)
        carried, last = replay.adjoint(a), run.steps - 1
        forward = best_seconds(replay.forward, slots, 0)
        backward = best_seconds(replay.backward, slots, min(1, last), carried)
        state, step_rows = run.bytes_of(parameters), max(map(len, run.schedule.rows))
        held, states = held_bytes(run, parameters, columns), run.interval + 2
        training_seconds, solve_seconds = run.steps * forward, run.steps * (forward + backward)
        text = (
            f"run of {run.steps:,} steps of up to {step_rows} rows: {time_text(training_seconds)} to train; back "
            f"through it with {columns} column(s) {time_text(solve_seconds)}",
            f"{states} states of {size_text(state)} held at a time, with adjoints {size_text(held)}; model "
            f"{size_text(vectors.nbytes(parameters))}; {len(run.saved_steps)} states on disk, "
            f"{size_text(len(run.saved_steps) * state)}",
        )
        return Cost(
            solve_seconds=solve_seconds,
            score_seconds_per_row=forward / step_rows / 3,
            memory_bytes=held,
            model_bytes=vectors.nbytes(parameters),
            vector_bytes=8 * columns * len(self.rows),
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
    """Repeats a recorded run step by step, from where the retrained stage before ends."""

    polishes = False

    def __init__(self, stage: Stage, before: Stage | None, engine: Engine):
        super().__init__(stage, before, engine)
        assert stage.run is not None
        self.recording = Recording.from_pretrained(stage.run, stage.name)
        if before is not None:
            first = self.recording.state(0)["parameters"]
            self.roles = self.roles.with_inherited_head(first, dict(before.model.named_parameters()))

    def settings(self) -> Any:
        return self.recording.settings

    def handed_on(self) -> Collection[str]:
        return self.roles.inherited

    def begin(self, model: nn.Module) -> None:
        write(model, self.recording.state(0)["parameters"])

    def warm_start(
        self, model: nn.Module, terms: Mapping[str, Any], polish: Callable[..., PolishReport], prepared: Any
    ) -> None:
        terms = {key: value for key, value in terms.items() if key not in ("weight_decay", "alpha")}  # the run's own
        rerun(self.recording, model, self.stage.objective, self.stage.data, engine=self.engine, **terms)

    def from_scratch(self, model: nn.Module, arguments: Any, terms: Mapping[str, Any]) -> None:
        terms = {**terms, **{key: getattr(self.recording, key) for key in ("weight_decay", "alpha", "dropout")}}
        training.record(model, self.stage.objective, self.stage.data, arguments, None, **terms, progress=False)


def _rows_at_hand(bound: BoundStage) -> list[dict]:
    """The rows of an unrolled stage, which must be a table: a run refers to them by number."""
    if isinstance(bound.rows, Stream):
        raise InputError(
            f"the data of stage {bound.name!r} is a stream, and link is 'unrolled'; expected a list or a dataset, "
            "since through its run a stage needs all rows at hand, or an implicit link."
        )
    return bound.rows


def check_replay(bound: BoundStage) -> float:
    """Replays the whole run of an unrolled stage from its first state.

    Returns:
        ‖φ_replayed − φ_T‖ / ‖φ_T − φ_0‖, 0 where the run repeats itself bit for bit. (Rounding grows along a run. The
        pull-back restarts at every saved state, and checks each segment between them.)
    """
    assert isinstance(bound.differentiation, Unrolled)
    recording, replay, device = bound.differentiation.recording, bound.differentiation.replay, bound.engine.device
    slots = first = recording.state(0, device)
    with bound.engine.bar(desc=f"{bound.name}: replaying", total=recording.steps, unit=" steps") as bar:
        for t in range(recording.steps):
            slots = replay.forward(slots, t)
            bar.update()
    last = recording.state(recording.steps, device)
    return gap(slots["parameters"], last["parameters"], first["parameters"])
