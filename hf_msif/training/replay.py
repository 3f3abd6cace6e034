"""`Replay`: the steps of a recorded run, forward, and backward as the adjoints of its states.

Step t makes the next state from the parameters φ, the optimiser's buffers m and the rows of a batch B:

    g = ∇ [ Σ_{i∈B} w_i ℓ_i(φ) / Σ_{i∈B} count_i + quadratic terms ],    (φ, m) ← Φ_t(φ, m, clip(g)).

The adjoint of a state is λ = ∂f/∂(φ, m), f being the query at the end of the run. It is carried from the state after
the step to the state before it by the chain rule, in two products:

1. The optimiser is elementwise and has its vector-Jacobian product in closed form (`optimisers`), as clipping and the
   quadratic terms have theirs. They give λ on (φ, m) by every way but the data, and γ = ∂f/∂g.
2. The data's gradient depends on φ, on the weights w_i of the rows and on the parameters that the run holds constant.
   One backward pass through the graph of g, with γ at its end, gives all three: the Hessian product ∇²F_B γ, which is
   added to λ on φ; the mixed derivative ∂⟨∇F_B, γ⟩/∂frozen, added to the adjoint of the frozen parameters; and
   ⟨∇ℓ_i, γ⟩ / Σ count_i, added to ∂f/∂w_i of every row of the batch at once.

All adjoints have Q columns, one per query. With several processes each one evaluates its share of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import vectors
from ..adapters.functional import FunctionalModel, has_dropout
from ..adapters.split import Split
from ..curvature.base import _counts
from ..curvature.derivatives import Evaluation, check_twice_differentiable
from ..engine.accelerated import Engine
from ..engine.corpus import checked_omission
from ..errors import InputError
from ..objectives import Objective
from ..vectors import Block
from .objective import QuadraticTerms, data_term, example_weights
from .optimisers import Slots, clipped, clipped_vjp
from .recording import Recording


@dataclass
class Adjoint:
    """The adjoint of a run's state, and what has fallen on everything else on the way back; Q columns each.

    Attributes:
        slots: slot → block, on parameters and buffers; the same on every process.
        frozen: on inherited parameters that the run holds constant. Each process has a summand of it, which
            `Replay.gather` adds up.
        anchors: on the values that α ties parameters to, eq. (12), zero on rows that a resize added; the same on every
            process.
        weights: ∂f/∂w_i of the weight of every row, added up over the steps, (Q, rows), float64. Each process has a
            summand of it, as of `frozen`.
    """

    slots: dict[str, Block]
    frozen: Block
    anchors: Block
    weights: Tensor


class _MicroBatch(NamedTuple):
    """The rows of a step that are evaluated at once."""

    evaluation: Evaluation
    indices: Tensor  # of its rows in the stage's data
    step_count: float  # Σ count_i of the whole step


class _Graph(NamedTuple):
    """A micro-batch's gradient with its graph, and the leaves that it depends on."""

    gradient: dict[str, Tensor]
    parameters: dict[str, Tensor]
    frozen: dict[str, Tensor]
    weights: Tensor


class Replay:
    """The steps of `recording` on a model and rows.

    Args:
        model: held constant but for the trained parameters, which come with each state.
        objective: the stage's, whose losses the run minimised.
        rows: the run's rows, in its order.
        recording: the run: its schedule, optimiser and quadratic terms.
        engine: runs the passes.
        roles: of the stage's parameters.
        previous: the model of the stage before, whose values α ties to (its module, or name → tensor).
        omit: example ids whose losses have the weight zero.
        name: the stage's name, for messages.
        weights: ω of every row, (rows,), in the place of 1 and, for those in `omit`, 0.

    Raises:
        InputError: ids in `omit` that no row has, or all; not one weight per row.
    """

    def __init__(
        self,
        model: FunctionalModel,
        objective: Objective,
        rows: list[dict],
        recording: Recording,
        engine: Engine,
        roles: Split,
        previous: nn.Module | Mapping[str, Tensor] | None = None,
        omit: Collection[Any] = (),
        name: str = "stage",
        weights: Tensor | None = None,
    ):
        omit = checked_omission(omit, rows, name)
        weights = example_weights(rows, omit) if weights is None else weights
        if weights.shape != (len(rows),):
            raise InputError(
                f"stage {name!r}: weights have the shape {tuple(weights.shape)}; expected one per row, ({len(rows)},)."
            )
        self.model, self.objective, self.rows, self.recording = model, objective, rows, recording
        self.engine, self.frozen = engine, roles.frozen
        parameters = {n: model.parameters[n] for n in recording.trained}
        self.dtype = next(iter(parameters.values())).dtype
        self.weights = weights.to(engine.device, self.dtype)
        self.quadratic = QuadraticTerms.of(
            model.model, roles, parameters, recording.weight_decay, recording.alpha, previous, recording.decayed
        )
        # Random numbers of dropout depend on the whole batch: every process then runs all of it.
        self.shared = engine.processes > 1 and not (recording.dropout and has_dropout(model.model))
        self._collated: tuple[Any, list[_MicroBatch]] = (None, [])

    # --- forward

    def forward(self, slots: Slots, t: int) -> Slots:
        """The state after step t (from 0)."""
        parameters = slots["parameters"]
        gradient = self._gradient(parameters, t)
        with torch.no_grad():
            gradient = clipped(self.quadratic.gradient(parameters, gradient), self.recording.clip)
            after: Slots = {slot: {} for slot in slots}
            for name, g in gradient.items():
                p, *buffers = (tensors[name] for tensors in slots.values())
                updated = self.recording.optimiser.update(p, g, tuple(buffers), *self._settings(name, t))
                for slot, value in zip(slots, updated, strict=True):
                    after[slot][name] = value
        return after

    def _settings(self, name: str, t: int) -> tuple[float, int, float]:
        """Learning rate, number of the step (from 1) and the optimiser's own weight decay."""
        run = self.recording
        return run.schedule.rates[t], t + 1, run.optimiser.weight_decay if name in run.decayed else 0.0

    def _gradient(self, parameters: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
        """∇ of the data term of F_B."""
        total: dict[str, Tensor] = {}
        with self._step(t) as micro_batches, self._independently():
            for evaluation, indices, count in micro_batches:
                leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
                sums, _ = evaluation.losses(leaves)
                value = data_term(self.weights[indices], sums, count)
                gradients = torch.autograd.grad(
                    value, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
                for name, g in zip(leaves, gradients, strict=True):
                    total[name] = total[name] + g if name in total else g
        return self._summed(total, parameters)

    def _summed(self, share: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the processes' shares of a batch."""
        return self.engine.sum(like, [dict(share)]) if self.shared else dict(share)

    # --- backward

    def adjoint(self, a: Block) -> Adjoint:
        """Before the last step is undone: `a` on the final parameters, zero on the buffers."""
        trained = vectors.select(a, self.recording.trained)
        slots = {"parameters": vectors.clone(trained)}
        slots |= {slot: vectors.zeros_like(trained) for slot in self.recording.optimiser.buffers}
        frozen = vectors.clone(vectors.select(a, self.frozen))
        anchors = vectors.zeros_like(vectors.select(trained, self.quadratic.anchors))
        weights = torch.zeros(vectors.columns(a), len(self.rows), dtype=torch.float64, device=self.engine.device)
        return self.scatter(Adjoint(slots, frozen, anchors, weights))

    def gather(self, adjoint: Adjoint) -> Adjoint:
        """An adjoint whose `frozen` and `weights` are the sums over the processes."""
        if not self.shared:
            return adjoint
        summands = {**adjoint.frozen, "": adjoint.weights}
        sums = self.engine.sum(summands, [summands])
        return replace(adjoint, frozen={n: sums[n] for n in adjoint.frozen}, weights=sums[""])

    def scatter(self, adjoint: Adjoint) -> Adjoint:
        """The inverse of `gather`: the main process has all of `frozen` and `weights`, the others zero."""
        if not self.shared or self.engine.is_main:
            return adjoint
        frozen, weights = vectors.zeros_like(adjoint.frozen), torch.zeros_like(adjoint.weights)
        return replace(adjoint, frozen=frozen, weights=weights)

    def backward(self, slots: Slots, t: int, adjoint: Adjoint) -> None:
        """Takes `adjoint` in place from the state after step t to `slots`, the state before it.

        Cost: (6 + about 5 Q) forward passes of the step's batch.
        """
        gradient, graph = self._gradient_and_graph(slots["parameters"], t)
        gamma = self._through_update(slots, gradient, t, adjoint)
        self._through_gradient(slots["parameters"], graph, gamma, t, adjoint)

    def _gradient_and_graph(self, parameters: Mapping[str, Tensor], t: int) -> tuple[dict[str, Tensor], _Graph | None]:
        """∇ of the data term of F_B, and its graph where the step is one micro-batch. (Graphs of several are made one
        after another when they are needed: together they would take the memory of the whole batch.)"""
        micro_batches = self._micro_batches(t)
        if len(micro_batches) != 1:
            return self._gradient(parameters, t), None
        with self._step(t), self._independently():
            graph = self._graph(micro_batches[0], parameters)
        return self._summed({name: g.detach() for name, g in graph.gradient.items()}, parameters), graph

    def _graph(self, micro_batch: _MicroBatch, parameters: Mapping[str, Tensor]) -> _Graph:
        evaluation, indices, count = micro_batch
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        frozen = evaluation.leaves(self.frozen)
        weights = self.weights[indices].requires_grad_()
        sums, _ = evaluation.losses({**frozen, **leaves})
        gradients = torch.autograd.grad(
            data_term(weights, sums, count),
            list(leaves.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        check_twice_differentiable(evaluation.model, gradients)
        return _Graph(dict(zip(leaves, gradients, strict=True)), leaves, frozen, weights)

    @torch.no_grad()
    def _through_update(self, slots: Slots, gradient: Mapping[str, Tensor], t: int, adjoint: Adjoint) -> Block:
        """The adjoint by every way but the data's gradient, in place; returns γ, on that gradient.

        One parameter at a time: beside λ and γ only the temporaries of one parameter are held.
        """
        run, gamma = self.recording, {}
        unclipped = self.quadratic.gradient(slots["parameters"], gradient)
        for name, g in clipped(unclipped, run.clip).items():
            p, *buffers = (tensors[name] for tensors in slots.values())
            after = tuple(block.pop(name) for block in adjoint.slots.values())
            on_p, gamma[name], *on_buffers = run.optimiser.vjp(p, g, tuple(buffers), *self._settings(name, t), after)
            for block, value in zip(adjoint.slots.values(), (on_p, *on_buffers), strict=True):
                block[name] = value
        gamma = clipped_vjp(unclipped, run.clip, gamma)
        for name, ridge in self.quadratic.ridge.items():
            adjoint.slots["parameters"][name] += ridge * gamma[name]
        for name, tie in self.quadratic.tie.items():
            adjoint.anchors[name] -= tie * gamma[name]
        return gamma

    def _through_gradient(
        self, parameters: Mapping[str, Tensor], graph: _Graph | None, gamma: Block, t: int, adjoint: Adjoint
    ) -> None:
        """Adds to the adjoint what γ gives by way of the data's gradient."""
        on_parameters = adjoint.slots["parameters"]
        share = vectors.zeros_like(on_parameters) if self.shared else on_parameters
        with self._step(t) as micro_batches, self._independently():
            for micro_batch in micro_batches:
                graph = graph or self._graph(micro_batch, parameters)
                self._gradient_vjp(graph, gamma, share, adjoint.frozen, adjoint.weights, micro_batch.indices)
                graph = None
        if self.shared:
            vectors.add_(on_parameters, self._summed(share, share))

    @staticmethod
    def _gradient_vjp(
        graph: _Graph, gamma: Block, on_parameters: Block, on_frozen: Block, on_weights: Tensor, indices: Tensor
    ) -> None:
        """Adds ∂⟨∇F_B, γ⟩ with respect to parameters, frozen parameters and weights, a column at a time."""
        curved = [name for name, g in graph.gradient.items() if g.requires_grad]
        if not curved:
            return
        outputs, width = [graph.gradient[name] for name in curved], vectors.columns(gamma)
        for q in range(width):
            *gradients, of_weights = torch.autograd.grad(
                outputs,
                [*graph.parameters.values(), *graph.frozen.values(), graph.weights],
                [gamma[name][q] for name in curved],
                retain_graph=q + 1 < width,
                allow_unused=True,
                materialize_grads=True,
            )
            targets = [block[name] for block in (on_parameters, on_frozen) for name in block]
            for target, value in zip(targets, gradients, strict=True):
                target[q] += value
            on_weights[q, indices] += of_weights.double()

    # --- batches

    def _micro_batches(self, t: int) -> list[_MicroBatch]:
        """This process's micro-batches of step t; those of the last step that was asked for are kept."""
        schedule, size = self.recording.schedule, self.recording.micro_batch
        rows, objective = schedule.rows[t], self.objective.of_epoch(schedule.epochs[t])
        key = (rows, objective)
        if self._collated[0] != key:
            evaluations, device = [], self.engine.device
            shares: Sequence[Sequence[int]] = [
                range(start, min(len(rows), start + size)) for start in range(0, len(rows), size)
            ]
            if self.shared:
                shares = self.engine.local_batches([self.rows[i] for i in rows], objective, size)
            with torch.no_grad(), self.model.evaluating(), self._independently():
                for share in shares:
                    indices = [rows[i] for i in share]
                    batch = self.engine.to_device(objective.collate([self.rows[i] for i in indices]))
                    evaluation = Evaluation(self.model, objective, batch)
                    evaluations.append((evaluation, torch.tensor(indices, device=device)))
                count = sum(float(_counts(evaluation).double().sum()) for evaluation, _ in evaluations)
            if self.shared:
                count = sum(self.engine.gather([count]))
            self._collated = key, [_MicroBatch(evaluation, indices, count) for evaluation, indices in evaluations]
        return self._collated[1]

    def _independently(self):
        """Around what each process does of a shared step without the others: what fails in one is raised in all."""
        return self.engine.raising_together() if self.shared else nullcontext()

    @contextmanager
    def _step(self, t: int) -> Iterator[list[_MicroBatch]]:
        """The micro-batches of step t, and inside the random numbers of its dropout; on leaving, the generators are as
        they were."""
        micro_batches, run, device = self._micro_batches(t), self.recording, self.engine.device
        if not run.dropout:
            with self.model.evaluating():
                yield micro_batches
            return
        with self.model.evaluating(dropout=True), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if run.schedule.generators is None:
                torch.manual_seed(run.seed * 1_000_003 + t)
            elif device.type == "cuda":
                torch.cuda.set_rng_state(run.schedule.generators[t].clone(), device)
            else:
                torch.set_rng_state(run.schedule.generators[t].clone())
            yield micro_batches
