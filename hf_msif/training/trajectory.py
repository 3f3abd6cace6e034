"""`Trajectory`: a training run known by a few of its states, the learning rate of every step, and the optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.hashing import digest
from ..errors import InputError
from . import optimisers
from .optimisers import SGD, AdamW
from .recording import Recording
from .response import linear_form, responses


class Snapshot(NamedTuple):
    """A state of a run.

    Attributes:
        parameters: name → value, at least of the trained parameters.
        buffers: name → value of those that the run changed; others keep their value.
        second_moments: v̂ of AdamW, corrected for its bias, by name; None where they are not known, or not needed.
    """

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    second_moments: Mapping[str, Tensor] | None


class Segment(NamedTuple):
    """The steps begin, …, end − 1 of a run, numbered from 0, for which the state after `step` steps stands."""

    begin: int
    end: int
    step: int


@dataclass(frozen=True)
class Trajectory:
    """A run of T steps, cut into segments, each with one state that stands for it.

    Attributes:
        optimiser: `SGD` or `AdamW` of `training.optimisers`.
        rates: η_t of each step, T numbers.
        segments: first to last; together they are all steps.
        load: number of a segment → its `Snapshot`.
        decayed: the names on which the optimiser's own weight decay acts.
        origin: where it was read, for people.
        clip: the norm to which gradients were clipped, which makes τ an upper bound; None: they were not, or it is not
            known.
        fingerprint: of whatever else it depends on.
        alpha: α by which a recorded run was tied to the stage before; None: by none, or it is not known.
        batch: rows per step, by which second moments that are not known are estimated.
    """

    optimiser: SGD | AdamW
    rates: Sequence[float]
    segments: tuple[Segment, ...]
    load: Callable[[int], Snapshot]
    decayed: frozenset[str]
    origin: str
    clip: float | None = None
    fingerprint: str = ""
    alpha: float | None = None
    batch: int | None = None

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rates)

    def descent(self, segment: Segment) -> tuple[SGD, list[float]]:
        """The segment's steps as gradient descent in the coordinates of its preconditioner, see `linear_form`."""
        return linear_form(self.optimiser, self.rates[segment.begin : segment.end], segment.begin)

    def time(self, segment: Segment | None = None) -> float:
        """τ of a segment, or of the whole run: how far it moves a parameter whose gradient is 1 in every step, in the
        coordinates of the preconditioner; Σ_t η_t for plain descent."""
        segment = segment or Segment(0, self.steps, 0)
        return float(responses(*self.descent(segment), torch.zeros(1))[0, 0, 0])

    def roots(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """P^½ of AdamW, P = 1/(√v̂ + ε), by name; nothing for SGD, whose P is 1.

        P counts as 0 where v̂ is 0: no gradient has ever come there, and the run has never moved that entry.

        Args:
            snapshot: with its second moments, unless the optimiser is SGD.
        """
        if isinstance(self.optimiser, SGD):
            return {}
        assert snapshot.second_moments is not None
        eps, roots = self.optimiser.eps, {}
        for name, v in snapshot.second_moments.items():
            size = (v + eps**2).sqrt() if self.optimiser.eps_inside_root else v.sqrt() + eps
            roots[name] = torch.where(v > 0, size.rsqrt(), 0.0)
        return roots

    @property
    def settings(self) -> dict[str, Any]:
        """What decides it beside its states, as plain values."""
        return {
            "optimiser": optimisers.to_dict(self.optimiser),
            "rates": digest(list(self.rates)),
            "segments": [list(segment) for segment in self.segments],
            "decayed": digest(sorted(self.decayed)),
            "fingerprint": self.fingerprint,
            "batch": self.batch,
        }


def nearest(steps: Sequence[int], total: int) -> tuple[list[Segment], list[int]]:
    """Cuts a run so that each step belongs to the nearest state, the earlier one of two that are as near.

    Args:
        steps: after how many steps each state stands, ascending.
        total: T.

    Returns:
        The segments, and which of the states they belong to: a state without a step is left out.

    >>> nearest([0, 1, 2], 2)
    ([Segment(begin=0, end=1, step=0), Segment(begin=1, end=2, step=1)], [0, 1])
    >>> nearest([500, 1000], 1000)
    ([Segment(begin=0, end=750, step=500), Segment(begin=750, end=1000, step=1000)], [0, 1])
    """
    ends = [*((a + b + 1) // 2 for a, b in itertools.pairwise(steps)), total]
    begins = [0, *ends[:-1]]
    cut = [Segment(*bounds) for bounds in zip(begins, ends, steps, strict=True)]
    places = [i for i, segment in enumerate(cut) if segment.end > segment.begin]
    return [cut[i] for i in places], places


def of_recording(recording: Recording, segments: int) -> Trajectory:
    """A recorded run in segments of equal length, each with the saved state that is nearest to its middle.

    Args:
        recording: the run.
        segments: L; 0: one segment, with the end of the run.

    Raises:
        InputError: the run has fewer states on disk.
    """
    steps, adam = recording.steps, isinstance(recording.optimiser, AdamW)
    saved = [step for step in recording.saved_steps if step or not adam]  # at the start, Adam has no moments
    if not 0 <= segments <= min(len(saved), steps):
        raise InputError(
            f"checkpoints is {segments}, but the run in {recording.folder} of {steps} steps has {len(saved)} saved "
            f"states; expected at least 1 and at most {min(len(saved), steps)}."
        )
    bounds = [round(i * steps / segments) for i in range(segments + 1)] if segments else []
    cut = [
        Segment(begin, end, min(saved, key=lambda step: (abs(2 * step - begin - end), step)))
        for begin, end in itertools.pairwise(bounds)
    ] or [Segment(0, steps, steps)]

    def load(i: int) -> Snapshot:
        state, moments = recording.state(cut[i].step), None
        if isinstance(recording.optimiser, AdamW):
            correction = 1 - recording.optimiser.beta2 ** cut[i].step
            moments = {name: v / correction for name, v in state["second_moment"].items()}
        return Snapshot(state["parameters"], {}, moments)

    return Trajectory(
        recording.optimiser,
        recording.schedule.rates,
        tuple(cut),
        load,
        recording.decayed,
        origin=f"the recorded run in {recording.folder}",
        clip=recording.clip,
        fingerprint=digest(recording.settings),
        alpha=recording.alpha,
    )


def of_models(
    models: Sequence[nn.Module | Callable[[], nn.Module]],
    steps: Sequence[int],
    rates: Sequence[float],
    optimiser: SGD | AdamW,
    decayed: Collection[str] = (),
    second_moments: Sequence[Mapping[str, Tensor]] | None = None,
    batch: int | None = None,
) -> Trajectory:
    """A run from models that were saved along it, such as the revisions of a model on the Hub.

    Args:
        models: the model after each of `steps`, or functions that load it, e.g.
            `partial(AutoModelForCausalLM.from_pretrained, "EleutherAI/pythia-70m", revision="step1000")`.
        steps: after how many steps of the run each model stands, ascending; each step of the run is counted to the
            nearest.
        rates: the learning rate of each of the run's T steps.
        optimiser: `training.optimisers.SGD(...)` or `AdamW(...)`.
        decayed: the names on which the optimiser's weight decay acts; `adapters.split.decayed_names(model)` are those
            of a `Trainer`.
        second_moments: v̂ of AdamW at each model, corrected for its bias. None: they are estimated from the gradients
            of rows (`influence.coordinates`), for which `batch` is needed.
        batch: rows per step of the run.

    Raises:
        InputError: the lists do not fit together.
    """
    lengths = {len(models), len(steps)} | ({len(second_moments)} if second_moments is not None else set())
    ascending = all(a < b for a, b in itertools.pairwise(steps))
    if len(lengths) > 1 or not models or not ascending or min(steps) < 0 or max(steps) > len(rates):
        raise InputError(
            f"got {len(models)} models, the steps {list(steps)[:5]} and {len(rates)} rates; expected one step per "
            "model, ascending, none beyond the number of rates, and one rate per step of the run."
        )
    cut, places = nearest(steps, len(rates))

    def load(i: int) -> Snapshot:
        model, moments = models[places[i]], None if second_moments is None else second_moments[places[i]]
        model = model if isinstance(model, nn.Module) else model()
        return Snapshot(
            {name: p.detach() for name, p in model.named_parameters()},
            {name: b.detach() for name, b in model.named_buffers()},
            moments,
        )

    if isinstance(optimiser, AdamW) and second_moments is None and (batch is None or batch < 1):
        raise InputError(
            f"the second moments of AdamW are not given, and batch is {batch!r}; expected second_moments, or the "
            "number of rows per step, by which they are estimated."
        )
    origin = f"{len(models)} models"
    return Trajectory(optimiser, rates, tuple(cut), load, frozenset(decayed), origin, batch=batch)
