"""`Replay`: the steps of a recorded run, forward, and backward as the adjoints of its states.

A step is φ, m ← Φ(φ, m, g) with g = ∇F_B(φ), F_B = Σ w_i ℓ_i / Σ count_i + quadratic terms. Its adjoint takes λ on the
state after the step to λ on the state before it: through the elementwise Φ, which leaves γ on g, and through g by one
double backward, which gives the Hessian product ∇²F_B γ, the mixed derivative in frozen parameters, and ⟨∇ℓ_i, γ⟩ / Σ
count_i for every example of the batch at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import vectors
from ..adapters.functional import FunctionalModel, has_dropout
from ..adapters.split import Split
from ..curvature.base import _counts
from ..curvature.derivatives import Evaluation
from ..engine.accelerated import Engine
from ..engine.corpus import checked_omission
from ..vectors import Block
from .optimisers import Slots, clipped
from .recording import Recording


@dataclass
class Adjoint:
    """The adjoint on a run's state, and what has fallen on everything else on the way back; Q columns each.

    Attributes:
        slots: slot → block, on parameters and buffers; the same on every process.
        frozen: on inherited parameters that the run holds constant; parts that add up (`Replay.whole`).
        anchors: on the values that α ties parameters to, eq. (12); the same on every process.
        weights: ∂f/∂w_i of the weight of every row in every step, (Q, rows), float64; parts that add up.
    """

    slots: dict[str, Block]
    frozen: Block
    anchors: Block
    weights: Tensor


class Replay:
    """The steps of `recording` on a model and rows.

    Args:
        model: held constant but for the trained parameters, which come with each state.
        rows: the run's rows, in its order.
        roles: of the stage's parameters.
        previous: the model of the stage before, whose values α ties to (its module, or name → tensor).
        omit: example ids whose losses have the weight zero.
    """

    def __init__(
        self,
        model: FunctionalModel,
        objective: Any,
        rows: list[dict],
        recording: Recording,
        engine: Engine,
        roles: Split,
        previous: nn.Module | Mapping[str, Tensor] | None = None,
        omit: Collection[Any] = (),
        name: str = "stage",
    ):
        omit = checked_omission(omit, rows, name)
        self.model, self.objective, self.rows, self.recording = model, objective, rows, recording
        self.engine, self.marks = engine, frozenset(recording.marks)
        parameters = {n: model.parameters[n] for n in recording.trained}
        self.dtype = next(iter(parameters.values())).dtype
        self.weights = torch.tensor([0.0 if row["example_id"] in omit else 1.0 for row in rows], device=engine.device)
        self.weights = self.weights.to(self.dtype)
        inherited = [n for n in roles.proximal if n in parameters]
        self.ties, self.anchors = {}, {}
        if recording.alpha:
            self.ties = {n: roles.tie(n, parameters[n], recording.alpha) for n in inherited}
            before = dict(previous.named_parameters()) if isinstance(previous, nn.Module) else previous
            for n in inherited:
                source, anchor = before[roles.inherited[n]].detach(), parameters[n].clone()
                # all rows, unless a resize added some
                (anchor[: roles.resized[n]] if n in roles.resized else anchor).copy_(source)
                self.anchors[n] = anchor
        self.frozen = roles.frozen
        self.decay = {n: recording.weight_decay for n in recording.decayed if recording.weight_decay}
        # Random numbers of dropout depend on the whole batch: every process then runs all of it.
        self.shared = engine.processes > 1 and not (recording.dropout and has_dropout(model.model))
        self._collated: tuple[Any, list] = (None, [])

    # --- forward

    def forward(self, slots: Slots, t: int) -> Slots:
        """The state after step t (from 0)."""
        gradient = self._gradient(slots["parameters"], t)
        with torch.no_grad():
            total = self._total(slots["parameters"], gradient, self.anchors)
            after: Slots = {slot: {} for slot in slots}
            for name, g in total.items():
                updated = self._update(name, g, [own[name] for own in slots.values()], t)
                for slot, value in zip(slots, updated, strict=True):
                    after[slot][name] = value
        return after

    def _total(
        self, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor], anchors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the optimiser sees: the gradient of the whole F_B, clipped."""
        total = dict(gradient)
        for name, strength in self.decay.items():
            total[name] = total[name] + strength * parameters[name]
        for name, strength in self.ties.items():
            total[name] = total[name] + strength * (parameters[name] - anchors[name])
        return clipped(total, self.recording.clip)

    def _update(self, name: str, g: Tensor, state: list[Tensor], t: int) -> tuple[Tensor, ...]:
        """A parameter and its buffers after step t."""
        run = self.recording
        decay = run.optimiser.weight_decay if name in run.decayed else 0.0
        return run.optimiser.update(state[0], g, tuple(state[1:]), run.schedule.rates[t], t + 1, decay)

    def _gradient(self, parameters: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
        """∇ of the data's part of F_B."""
        total: dict[str, Tensor] = {}
        with self._step(t) as parts, self._alone():
            for evaluation, indices, count in parts:
                leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
                sums, _ = evaluation.losses(leaves)
                value = (self.weights[indices] * sums).sum() / count
                found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
                for name, g in zip(leaves, found, strict=True):
                    total[name] = total[name] + g if name in total else g
        return self._added(total, parameters)

    def _added(self, mine: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the processes' shares of a batch add up to."""
        return self.engine.sum(like, [dict(mine)]) if self.shared else dict(mine)

    # --- backward

    def adjoint(self, a: Block) -> Adjoint:
        """Before the last step is undone: `a` on the final parameters, zero on the buffers."""
        width, run = vectors.columns(a), self.recording
        trained = vectors.select(a, run.trained)
        slots = {"parameters": vectors.clone(trained)}
        slots |= {slot: vectors.zeros_like(trained) for slot in run.optimiser.buffers}
        frozen = vectors.clone(vectors.select(a, self.frozen))
        anchors = vectors.zeros_like({n: trained[n] for n in self.ties})
        weights = torch.zeros(width, len(self.rows), dtype=torch.float64, device=self.engine.device)
        return self.own(Adjoint(slots, frozen, anchors, weights))

    def whole(self, adjoint: Adjoint) -> Adjoint:
        """An adjoint with the parts that processes share added up."""
        if not self.shared:
            return adjoint
        parts = {**adjoint.frozen, "": adjoint.weights}
        found = self.engine.sum(parts, [parts])
        return replace(adjoint, frozen={n: found[n] for n in adjoint.frozen}, weights=found[""])

    def own(self, adjoint: Adjoint) -> Adjoint:
        """The inverse of `whole`: the main process has all of it."""
        if not self.shared or self.engine.is_main:
            return adjoint
        frozen, weights = vectors.zeros_like(adjoint.frozen), torch.zeros_like(adjoint.weights)
        return replace(adjoint, frozen=frozen, weights=weights)

    def backward(self, slots: Slots, t: int, adjoint: Adjoint) -> None:
        """Undoes step t in place: `slots` is the state before it. Cost (6 + about 5 Q) F of the step's batch."""
        parameters, parts = slots["parameters"], self._evaluations(t)
        graph = None
        if len(parts) == 1:  # its graph gives the gradient too
            with self._step(t), self._alone():
                graph = self._graph(*parts[0], parameters)
            gradient = self._added({name: g.detach() for name, g in graph[0].items()}, parameters)
        else:
            gradient = self._gradient(parameters, t)
        direct, gamma = self._through_update(slots, gradient, t, adjoint)
        width = vectors.columns(gamma)
        more = (
            {n: p.new_zeros(width, *p.shape) for n, p in parameters.items()} if self.shared else direct["parameters"]
        )
        with self._step(t), self._alone():
            for evaluation, indices, count in parts:
                graph = graph or self._graph(evaluation, indices, count, parameters)
                self._through_gradient(graph, gamma, indices, more, adjoint)
                graph = None
        if self.shared:
            vectors.add_(direct["parameters"], self._added(more, more))
        adjoint.slots = direct

    def _graph(self, evaluation, indices, count, parameters):
        """A micro-batch's gradient with its graph, and the leaves that it depends on."""
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        frozen = evaluation.leaves(self.frozen)
        weights = self.weights[indices].requires_grad_()
        sums, _ = evaluation.losses({**frozen, **leaves})
        value = (weights * sums).sum() / count
        found = torch.autograd.grad(
            value, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True)), leaves, frozen, weights

    def _through_update(
        self, slots: Slots, gradient: Mapping[str, Tensor], t: int, adjoint: Adjoint
    ) -> tuple[dict[str, Block], Block]:
        """λ on the state before the step, but for what comes by way of g; and γ, on g."""
        inputs = [
            {n: x.detach().requires_grad_() for n, x in own.items()}
            for own in (slots["parameters"], gradient, self.anchors)
        ]
        total = self._total(*inputs)
        direct: dict[str, Block] = {slot: {} for slot in slots}
        seen: Block = {}
        for n, g in total.items():  # a parameter at a time: the graph of all updates would be several states
            leaves = [x.detach().requires_grad_() for x in (g, *(own[n] for own in slots.values()))]
            after = self._update(n, leaves[0], leaves[1:], t)
            seen[n], *rest = _vjp(after, leaves, [own.pop(n) for own in adjoint.slots.values()])
            for slot, value in zip(slots, rest, strict=True):
                direct[slot][n] = value
        leaves = [x for own in inputs for x in own.values()]
        found = iter(_vjp(list(total.values()), leaves, list(seen.values())))
        more, gamma, anchors = ({n: next(found) for n in own} for own in inputs)
        vectors.add_(direct["parameters"], more)
        vectors.add_(adjoint.anchors, anchors)
        return direct, gamma

    def _through_gradient(self, graph, gamma: Block, indices: Tensor, parameters: Block, adjoint: Adjoint) -> None:
        """Adds what comes by way of g: to λ on `parameters`, to frozen parameters and to weights."""
        gradient, leaves, frozen, weights = graph
        curved = [name for name, g in gradient.items() if g.requires_grad]
        if not curved:
            return
        inputs = [*leaves.values(), *frozen.values(), weights]
        outputs, width = [gradient[name] for name in curved], vectors.columns(gamma)
        for q in range(width):
            found = torch.autograd.grad(
                outputs,
                inputs,
                [gamma[name][q] for name in curved],
                retain_graph=q + 1 < width,
                allow_unused=True,
                materialize_grads=True,
            )
            for name, value in zip(leaves, found, strict=False):
                parameters[name][q] += value
            for name, value in zip(frozen, found[len(leaves) :], strict=False):
                adjoint.frozen[name][q] += value
            adjoint.weights[q, indices] += found[-1].double()

    # --- batches

    def _evaluations(self, t: int) -> list[tuple[Evaluation, Tensor, float]]:
        """The micro-batches of step t with their rows' indices and Σ count_i of the whole step."""
        schedule, size = self.recording.schedule, self.recording.micro_batch
        rows, objective = schedule.rows[t], self.objective.of_epoch(schedule.epochs[t])
        key = (rows, objective)
        if self._collated[0] != key:
            parts, device = [], self.engine.device
            shares = [range(start, min(len(rows), start + size)) for start in range(0, len(rows), size)]
            if self.shared:
                shares = self.engine.share([self.rows[i] for i in rows], objective, size)
            with torch.no_grad(), self.model.evaluating(), self._alone():
                for share in shares:
                    some = [rows[i] for i in share]
                    batch = self.engine.place(objective.collate([self.rows[i] for i in some]))
                    parts.append((Evaluation(self.model, objective, batch), torch.tensor(some, device=device)))
                total = sum(float(_counts(evaluation).double().sum()) for evaluation, _ in parts)
            if self.shared:
                total = sum(self.engine.gather([total]))
            self._collated = key, [(*part, total or 1.0) for part in parts]  # no term: the data say nothing
        return self._collated[1]

    def _alone(self):
        """Around what each process does of a shared step on its own: what fails in one ends all."""
        return self.engine.together() if self.shared else nullcontext()

    @contextmanager
    def _step(self, t: int) -> Iterator[list[tuple[Evaluation, Tensor, float]]]:
        """The micro-batches of step t, inside of it with its random numbers; those outside are as they were."""
        parts, run, device = self._evaluations(t), self.recording, self.engine.device
        if not run.dropout:
            with self.model.evaluating():
                yield parts
            return
        with self.model.evaluating(dropout=True), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if run.schedule.generators is None:
                torch.manual_seed(run.seed * 1_000_003 + t)
            elif device.type == "cuda":
                torch.cuda.set_rng_state(run.schedule.generators[t].clone(), device)
            else:
                torch.set_rng_state(run.schedule.generators[t].clone())
            yield parts


def _vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], adjoints: Sequence[Tensor]) -> list[Tensor]:
    """Σ (∂output/∂input)ᵀ adjoint for every input and column: tensors of shape (Q, *input.shape)."""
    width = adjoints[0].shape[0]
    columns = [
        torch.autograd.grad(
            outputs,
            inputs,
            [adjoint[q] for adjoint in adjoints],
            retain_graph=q + 1 < width,
            allow_unused=True,
            materialize_grads=True,
        )
        for q in range(width)
    ]
    return [torch.stack(column) for column in zip(*columns, strict=True)]
