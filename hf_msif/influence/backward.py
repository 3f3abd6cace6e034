"""Back through a recorded run: one backward sweep for all columns, its certificate, and its checkpoint on disk."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import vectors
from ..display import LINES, Curves, Displayed, Summary, Table, few_lines, few_rows, plural
from ..engine.checkpoints import Checkpoint
from ..engine.files import flat_keys, nested_keys
from ..engine.hashing import tensors_fingerprint
from ..errors import InputError
from ..training.optimisers import Slots
from ..training.recording import Recording
from ..training.replay import Adjoint, Replay
from ..vectors import Block

REPRODUCED = 3e-2  # largest difference of a replayed state, relative to the distance between two saved states
SAVE_EVERY = 60.0  # seconds between two writings of a backward sweep's checkpoint

REMEDIES = (
    "the run is too sensitive for a first-order answer: train it with a smaller learning rate, larger batches, more "
    "warm-up, weight averaging or fewer steps, or differentiate it implicitly (link='implicit')"
)


COLUMNS = 10  # whose adjoints are drawn


@dataclass(frozen=True, repr=False)
class RunCertificate(Displayed):
    """What is known about a pull-back through a run; lists have one entry per column.

    Attributes:
        steps: T, the number of steps.
        growth: the largest ‖λ_t‖ / ‖a‖ at any step t, on the parameters.
        limit: the growth above which a pull-back is refused.
        replay_difference: the largest ‖φ_replayed − φ_recorded‖ / ‖φ_recorded − φ_before‖ over the segments between
            saved states, of the parameters and of each of the optimiser's buffers (a loss on another scale changes
            Adam's moments, though not its steps). It is 0 where the run repeats itself bit for bit.
        norms: [[t, [‖λ_t‖ / ‖a‖ of each column]], ...] at the saved states, last first.
    """

    steps: int
    growth: list[float]
    limit: float
    replay_difference: float
    norms: list[list[Any]]

    @property
    def converged(self) -> list[bool]:
        """True for every column: nothing is iterated, and an answer is exact or refused."""
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
        lines = [
            f"unrolled, column {q}: {plural(self.steps, 'step')}; adjoint grew at most {growth:.2g} times (limit "
            f"{self.limit:.1g}), {first[q]:.2g} at the start; replay differs by {self.replay_difference:.1e}"
            for q, growth in enumerate(self.growth)
        ]
        return "\n".join(few_lines(lines if len(lines) <= LINES else [self.summary().title, *lines]))

    def curves(self) -> Curves:
        steps, norms = zip(*self.norms, strict=True)
        lines = {f"column {q}": (steps, [norm[q] for norm in norms]) for q in range(min(len(self.growth), COLUMNS))}
        return Curves("step of the run", "norm of the adjoint, relative to that at the end", lines)

    def summary(self) -> Summary:
        title = (
            f"unrolled: {plural(len(self.growth), 'column')} through {plural(self.steps, 'step')}, adjoint grew at "
            f"most {max(self.growth):.2g} times (limit {self.limit:.1g}), replay differs by "
            f"{self.replay_difference:.1e}"
        )
        rows = [[str(q), f"{growth:.2g}", f"{self.norms[-1][1][q]:.2g}"] for q, growth in enumerate(self.growth)]
        headings = ["column", "largest growth of the adjoint", "growth at the start"]
        return Summary(title, tables=[Table(headings, few_rows(rows))])


def held_bytes(recording: Recording, parameters: Mapping[str, Any], columns: int) -> int:
    """The largest number of bytes that a pull-back holds at a time, beside the graph of one step.

    It holds the states of one segment. While they are computed, it also holds the recorded and the replayed end of the
    segment, and per column the adjoint of a state. On the way back it also holds the gradient before and after
    clipping, and per column the adjoints of a state and of these two gradients.
    """
    state = recording.bytes_of(parameters)
    parameters_bytes = state // (1 + len(recording.optimiser.buffers))
    gradients = 2 * parameters_bytes
    backward = recording.interval * state + gradients + columns * (state + gradients)
    return max(backward, (recording.interval + 2) * state + columns * state)


def growth_limit(dtype: torch.dtype) -> float:
    """The growth of the adjoint by which rounding errors of the run are enlarged to 0.1 %: 1e-3 / rounding unit."""
    return 1e-3 / torch.finfo(dtype).eps


def go_back(
    recording: Recording, replay: Replay, a: Block, name: str, limit: float, cache_key: str | None = None
) -> tuple[Adjoint, RunCertificate]:
    """Takes the adjoint from the end of a run to its start, step by step; all columns share one sweep.

    A sweep that was interrupted continues from its checkpoint in the run's folder.

    Args:
        recording: the run.
        replay: the steps of the run.
        a: ∂f/∂φ_T on the trained and the frozen names, tensors of shape (Q, *parameter.shape).
        name: name of the stage, for messages.
        limit: the largest growth of the adjoint's norm.
        cache_key: identifies the question and the stages that `a` comes from, and with them the checkpoint. None: the
            values of `a` identify it, which differ by rounding on another number of processes.

    Returns:
        The adjoint of the first state, whole on every process; the certificate.

    Raises:
        InputError: the adjoint grew beyond the limit, or replaying does not lead from state to state.
    """
    last_norm = vectors.norm(vectors.select(a, recording.trained)).clamp(min=torch.finfo(torch.float64).tiny)
    sweep = _Sweep(recording, replay, a, cache_key)
    bar = replay.engine.bar(desc=f"{name}: back through the run", total=recording.steps, unit=" steps")
    with bar:
        bar.update(recording.steps - sweep.step)
        for begin, end in reversed(list(itertools.pairwise(recording.saved_steps))):
            if begin >= sweep.step:
                continue
            states, difference = _segment(recording, replay, begin, end)
            sweep.difference = max(sweep.difference, difference)
            if not sweep.difference <= REPRODUCED:
                raise InputError(
                    f"stage {name!r}: replaying steps {begin + 1} to {end} ends {sweep.difference:.1e} of their "
                    f"length away from the recorded state; expected at most {REPRODUCED:.0e}. The run had another "
                    "loss than the stage's objective (as many models' own loss is under gradient accumulation), data "
                    "or random numbers that were not recorded, or attention kernels with dropout of their own "
                    "(attn_implementation='eager')."
                )
            for t in reversed(range(begin, end)):
                replay.backward(states.pop(), t, sweep.adjoint)
                growth = (vectors.norm(sweep.adjoint.slots["parameters"]) / last_norm).tolist()
                sweep.growth = [max(pair) for pair in zip(sweep.growth, growth, strict=True)]
                if not all(math.isfinite(x) and x <= limit for x in growth):
                    raise InputError(
                        f"stage {name!r}: on the way back the adjoint grew {max(growth):.1e} times at step {t + 1} of "
                        f"{recording.steps}; expected at most {limit:.1e} (max_growth): {REMEDIES}."
                    )
                bar.set_postfix(growth=f"{max(growth):.1e}", refresh=False)
                bar.update()
            sweep.step = begin
            sweep.norms.append([begin, growth])
            sweep.save_if_due()
    sweep.checkpoint.delete()
    certificate = RunCertificate(recording.steps, sweep.growth, limit, sweep.difference, sweep.norms)
    return replay.gather(sweep.adjoint), certificate


def _segment(recording: Recording, replay: Replay, begin: int, end: int) -> tuple[list[Slots], float]:
    """The state before each step between two saved states, and the `gap` of the replayed to the recorded end."""
    device = replay.engine.device
    states = [recording.state(begin, device)]
    for t in range(begin, end):
        states.append(replay.forward(states[-1], t))
    replayed, recorded = states.pop(), recording.state(end, device)
    return states, max(gap(replayed[slot], recorded[slot], states[0][slot]) for slot in recorded)


def gap(replayed: Mapping, recorded: Mapping, first: Mapping) -> float:
    """‖replayed − recorded‖ / ‖recorded − first‖; 0 where replayed and recorded are equal."""

    def distance(x: Mapping, y: Mapping) -> float:
        return math.sqrt(sum(float((x[n].double() - y[n].double()).square().sum()) for n in x))

    difference = distance(replayed, recorded)
    return difference / max(distance(recorded, first), 1e-300) if difference else difference


class _Sweep:
    """A backward sweep under way, and its checkpoint in the run's folder; arguments as for `go_back`."""

    def __init__(self, recording: Recording, replay: Replay, a: Block, cache_key: str | None):
        self.step, self.difference, self.replay = recording.steps, 0.0, replay
        width = vectors.columns(a)
        self.growth, self.norms = [1.0] * width, [[recording.steps, [1.0] * width]]
        key = f"{cache_key or tensors_fingerprint(a)} {recording.settings}"
        key = hashlib.sha256(key.encode()).hexdigest()
        assert recording.folder is not None
        path = recording.folder / f"sweep-{key[:16]}.safetensors"
        self.checkpoint = Checkpoint(path, key, replay.engine, SAVE_EVERY)
        self.adjoint = self._load() or replay.adjoint(a)

    def save_if_due(self) -> None:
        if not self.checkpoint.due() or self.step == 0:
            return
        adjoint = self.replay.gather(self.adjoint)
        parts = {"frozen": adjoint.frozen, "anchors": adjoint.anchors, "weights": {"": adjoint.weights}}
        parts |= {f"slot {slot}": block for slot, block in adjoint.slots.items()}
        progress = {key: getattr(self, key) for key in ("step", "difference", "growth", "norms")}
        self.checkpoint.save(flat_keys(parts), progress)

    def _load(self) -> Adjoint | None:
        """The adjoint of the checkpoint; None if there is no checkpoint, or it is damaged or has another cache key."""
        saved = self.checkpoint.load()
        if saved is None:
            return None
        tensors, progress = saved
        vars(self).update({key: progress[key] for key in ("step", "difference", "growth", "norms")})
        device = self.replay.engine.device
        parts: dict[str, Block] = {"frozen": {}, "anchors": {}}
        parts |= nested_keys({key: t.to(device) for key, t in tensors.items()})
        weights = parts.pop("weights")[""]
        slots = {part.removeprefix("slot "): block for part, block in parts.items() if part.startswith("slot ")}
        return self.replay.scatter(Adjoint(slots, parts["frozen"], parts["anchors"], weights))
