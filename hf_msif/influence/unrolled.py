"""The unrolled link: a stage's adjoint pulled back through its own training run instead of a linear system.

With steps φ_{t+1} = Φ_t(φ_t), φ_0 = (W_before, Θ_0), and λ_T = a = ∂f/∂φ_T:

    λ_t = (∂Φ_t/∂φ)ᵀ λ_{t+1}                                plain SGD: λ_t = λ_{t+1} − η_t ∇²F_{B_t}(φ_t) λ_{t+1}
    b   = λ_0 on inherited trained names,  a_frozen + Σ_t (∂Φ_t/∂frozen)ᵀ λ_{t+1} on frozen ones
    I(x) = N Σ_t ⟨λ_{t+1}, ∂Φ_t/∂w_x⟩                       SGD: −(N/|B|) Σ_{t: x ∈ B_t} η_t ⟨λ_{t+1}, ∇ℓ_x(φ_t)⟩

exact for the run as it was, converged or not. States between two kept ones are computed again: about 2√T of them are
held at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import vectors
from ..engine.checkpoints import Checkpoint
from ..engine.hashing import tensors_fingerprint
from ..errors import InputError
from ..training.optimisers import Slots
from ..training.replay import Adjoint, Replay
from ..vectors import Block

if TYPE_CHECKING:
    from ..training.recording import Recording
    from .chain import Link

REPRODUCED = 3e-2  # largest difference of a replayed state, relative to how far the run went between two states
SAVE_EVERY = 60.0  # seconds between two copies of a backward sweep that is under way

REMEDIES = (
    "the run is too sensitive for a first-order answer: train it with a smaller learning rate, larger batches, more "
    "warm-up, weight averaging or fewer steps, or pull it back implicitly (link='proximal')"
)


@dataclass(frozen=True)
class RunCertificate:
    """What is known about a pull-back through a run; lists have one entry a column.

    - `steps`: T. `norms`: [[t, ‖λ_t‖ / ‖a‖ a column], ...] on the parameters, at the kept states, last one first.
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
        return ["unrolled"] * len(self.growth)

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
            f"unrolled, column {q}: {self.steps} steps; adjoint grew at most {grown:.2g} times (limit "
            f"{self.limit:.1g}), {first[q]:.2g} at the start; replay differs by {self.replay_difference:.1e}"
            for q, grown in enumerate(self.growth)
        )


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


def pull_back(link: Link, a: Block, question: str | None = None) -> tuple[Block, Block, RunCertificate]:
    """One stage of the chain through its recorded run; all columns share one backward sweep.

    A sweep that was interrupted goes on from its last copy in the run's folder.

    Args:
        link: a stage with `link="unrolled"`.
        a: ∂f/∂φ_T on the trained and the frozen names, (Q, *parameter.shape).
        question: what `a` is the answer to, by which a copy of an interrupted sweep is known; None: by `a` itself,
            which differs by rounding on another number of processes.

    Returns:
        {"weights": ∂f/∂w_i of every row, (Q, rows)}; b on the inherited names; the certificate.

    Raises:
        InputError: the adjoint grew beyond `Stage.max_growth`, or replaying does not lead from state to state.
    """
    recording, replay, name = link.recording, link.replay, link.stage.name
    limit = link.stage.max_growth or growth_limit(replay.dtype)
    size = vectors.norm(vectors.select(a, recording.trained)).clamp(min=torch.finfo(torch.float64).tiny)
    sweep = _Sweep(recording, replay, a, question)
    segments = list(itertools.pairwise(recording.saved_steps))
    bar = link.engine.bar(desc=f"{name}: back through the run", total=recording.steps, unit=" steps")
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
                    "loss than the stage's objective (as many models' own loss is under gradient accumulation), data "
                    "or random numbers that were not recorded, or attention kernels with dropout of their own "
                    "(attn_implementation='eager')."
                )
            for t in reversed(range(begin, end)):
                replay.backward(states.pop(), t, sweep.adjoint)
                grown = (vectors.norm(sweep.adjoint.slots["parameters"]) / size).tolist()
                sweep.growth = [max(pair) for pair in zip(sweep.growth, grown, strict=True)]
                if not all(math.isfinite(x) and x <= limit for x in grown):
                    raise InputError(
                        f"stage {name!r}: on the way back the adjoint grew {max(grown):.1e} times at step {t + 1} of "
                        f"{recording.steps}; expected at most {limit:.1e} (max_growth): {REMEDIES}."
                    )
                bar.set_postfix(growth=f"{max(grown):.1e}", refresh=False)
                bar.update()
            sweep.step = begin
            sweep.norms.append([begin, grown])
            sweep.keep()
    sweep.copy.forget()
    adjoint = replay.gather(sweep.adjoint)
    own = adjoint.slots["parameters"]
    inherited = {n: adjoint.frozen[n] if n in adjoint.frozen else own[n] for n in link.split.inherited}
    for n, anchored in adjoint.anchors.items():
        inherited[n] = inherited[n] + anchored
    certificate = RunCertificate(recording.steps, sweep.growth, limit, sweep.difference, sweep.norms)
    return {"weights": adjoint.weights}, inherited, certificate


def _segment(recording: Recording, replay: Replay, begin: int, end: int) -> tuple[list[Slots], float]:
    """The states before each of the steps between two kept ones, and how far they lead from the recorded end."""
    device = replay.engine.device
    states = [recording.state(begin, device)]
    for t in range(begin, end):
        states.append(replay.forward(states[-1], t))
    found, expected = states.pop(), recording.state(end, device)
    return states, max(_gap(found[slot], expected[slot], states[0][slot]) for slot in expected)


def _gap(found: Mapping, expected: Mapping, start: Mapping) -> float:
    """‖found − expected‖ / ‖expected − start‖."""

    def distance(x: Mapping, y: Mapping) -> float:
        return math.sqrt(sum(float((x[n].double() - y[n].double()).square().sum()) for n in x))

    gap = distance(found, expected)
    return gap / max(distance(expected, start), 1e-300) if gap else gap


def check_replay(link: Link) -> float:
    """Replays a stage's whole run from its first state.

    Returns:
        ‖φ_replayed − φ_T‖ / ‖φ_T − φ_0‖, 0 where the run repeats itself bit for bit. (Rounding grows along a run; the
        pull-back itself restarts at every kept state, and checks each of these stretches.)
    """
    recording, device = link.recording, link.engine.device
    slots = first = recording.state(0, device)
    with link.engine.bar(desc=f"{link.stage.name}: replaying", total=recording.steps, unit=" steps") as bar:
        for t in range(recording.steps):
            slots = link.replay.forward(slots, t)
            bar.update()
    last = recording.state(recording.steps, device)
    return _gap(slots["parameters"], last["parameters"], first["parameters"])


class _Sweep:
    """A backward sweep under way, and its copy in the run's folder."""

    def __init__(self, recording: Recording, replay: Replay, a: Block, question: str | None):
        self.step, self.difference, self.replay = recording.steps, 0.0, replay
        width = vectors.columns(a)
        self.growth, self.norms = [1.0] * width, [[recording.steps, [1.0] * width]]
        asked = f"{question or tensors_fingerprint(a)} {recording.settings}"
        asked = hashlib.sha256(asked.encode()).hexdigest()
        self.copy = Checkpoint(recording.folder / f"sweep-{asked[:16]}.safetensors", asked, replay.engine, SAVE_EVERY)
        self.adjoint = self._load() or replay.adjoint(a)

    def keep(self) -> None:
        if not self.copy.due() or self.step == 0:
            return
        adjoint = self.replay.gather(self.adjoint)
        parts = {"frozen": adjoint.frozen, "anchors": adjoint.anchors}
        parts |= {f"slot {slot}": own for slot, own in adjoint.slots.items()}
        flat = {f"{part}/{name}": t for part, own in parts.items() for name, t in own.items()}
        passed = {key: getattr(self, key) for key in ("step", "difference", "growth", "norms")}
        self.copy.save({**flat, "weights/": adjoint.weights}, passed)

    def _load(self) -> Adjoint | None:
        """The copy's adjoint; None where there is none, or one that is damaged or of another question."""
        found = self.copy.load()
        if found is None:
            return None
        flat, passed = found
        vars(self).update({key: passed[key] for key in ("step", "difference", "growth", "norms")})
        parts: dict[str, Block] = {"frozen": {}, "anchors": {}}
        for key, tensor in flat.items():
            part, name = key.split("/", 1)
            parts.setdefault(part, {})[name] = tensor.to(self.replay.engine.device)
        weights = parts.pop("weights")[""]
        slots = {part.removeprefix("slot "): own for part, own in parts.items() if part.startswith("slot ")}
        return self.replay.scatter(Adjoint(slots, parts["frozen"], parts["anchors"], weights))
