"""What goes into every layer of a batch and what gradient comes out: `LayerMap` finds the layers and runs them.

How per-example gradients are made of both, `layer_rules` says for each kind of layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import vectors
from ..adapters.functional import FunctionalModel
from ..engine.accelerated import to_device
from ..errors import InputError
from ..objectives import Objective
from .derivatives import Evaluation
from .layer_rules import RULES, Call, Embedding, Grouping, Layer

# A gradient that a layer does not make is wrong by its whole size. Rounding is smaller, also of models that compute
# parts in float32 whatever their parameters are.
TOLERANCE = 1e-3
SAMPLE_ROWS = (3, 2, 4, 5)  # sizes of the batch on which layers are looked at; the first that is told from other sizes


@dataclass
class Pass:
    """One call of the model: sizes that tell how a layer's rows belong to the examples.

    Attributes:
        examples: B.
        inputs: number of rows of the model's inputs, B times the draws per example.
        lengths: the further sizes of the inputs, such as the number of tokens.
        positions: (M,) the input row of each token that the head sees; None: the head sees all of them.
        per_example: how many inputs an example has, see `Objective.inputs_per_row`; None: it differs.
    """

    examples: int
    inputs: int = 0
    lengths: tuple[int, ...] = ()
    positions: Tensor | None = None
    per_example: int | None = None

    @property
    def is_regular(self) -> bool:
        """Whether all examples have equally many inputs; pairs of words have not."""
        return self.per_example is not None and self.inputs == self.per_example * self.examples

    def kind(self, lead: tuple[int, ...], is_table: bool) -> str:
        """How rows with these leading axes belong to the examples.

        "rows": the first axis is that of the inputs; "broadcast": a table's row of positions for all inputs;
        "positions": the tokens that the head sees; "probed": any other order, see `_Run`. A layer of which the sample
        has calls of both kinds "rows" and "positions" gets the kind "either": one that is shared by the layers of an
        encoder, the last of which runs on the tokens that the head sees.
        """
        if not self.is_regular:
            return "probed"
        flattened = len(lead) == 1 and lead[0] in [self.inputs * length for length in self.lengths]
        if lead and (lead[0] == self.inputs or flattened):
            return "rows"
        if is_table and lead[0] == 1:
            return "broadcast"
        if self.positions is not None and lead in ((1, len(self.positions)), (len(self.positions),)):
            return "positions"
        return "probed"

    def allows(self, kind: str, lead: tuple[int, ...]) -> bool:
        """Whether rows of this kind can have these leading axes."""
        if kind != "probed" and not self.is_regular:
            return False
        if kind == "rows":
            return lead[0] % self.inputs == 0 if len(lead) == 1 else lead[0] == self.inputs
        if kind == "positions":
            return self.positions is not None and lead in ((1, len(self.positions)), (len(self.positions),))
        return True

    def grouping(self, kind: str) -> Grouping:
        """Which example each of the rows belongs to."""
        return self._by_positions if kind == "positions" else self._consecutive

    @cached_property
    def _consecutive(self) -> Grouping:
        return Grouping(self.examples)

    @cached_property
    def _by_positions(self) -> Grouping:
        assert self.positions is not None
        return Grouping(self.examples, self.positions // (self.inputs // self.examples))


Receive = Callable[[Layer, Call], None]


class LayerMap:
    """The layers of a model that make the gradients of its parameters, as far as one of the `RULES` fits.

    Args:
        model: the model.
        objective: gives the losses.
        names: the parameters under study.
        rows: a few rows of different lengths. On them it is found out how the rows of each layer's output belong to
            the examples, and the gradients that the layers make are compared with those of plain backward passes: a
            parameter for which they differ is left out.

    Attributes:
        layers: those that make gradients.
        covered: the parameters whose gradient they make whole.
        rest: the other ones, with the reason for people.
    """

    def __init__(self, model: FunctionalModel, objective: Objective, names: Iterable[str], rows: list[dict]):
        self.model, self.objective = model, objective
        self.wanted = wanted = tuple(names)
        canonical = {id(p): name for name, p in model.model.named_parameters()}
        self.layers: list[Layer] = []
        for module in model.model.modules():
            own = {local: canonical[id(p)] for local, p in module._parameters.items() if p is not None}
            # What a module inside has, too, is used there.
            inside = {id(p) for child in module.children() for p in child.parameters()}
            used_here = {local for local, p in module._parameters.items() if id(p) not in inside}
            own = {local: name for local, name in own.items() if name in wanted and local in used_here}
            if own:
                rule = next(rule for rule in RULES if rule.fits(module))
                self.layers.append(rule(module, own, model))
        self.rest: dict[str, str] = {}
        with model.evaluating(), torch.enable_grad():
            self._look(rows)
        self.covered = tuple(name for name in wanted if name not in self.rest)

    @property
    def probes(self) -> bool:
        """Whether a pass needs a second backward pass, to find out which rows belong to which example."""
        return any(layer.kind == "probed" for layer in self.layers)

    def _look(self, rows: list[dict]) -> None:
        """Finds the kinds of the layers' rows, and compares gradients; what fails goes to `rest`."""
        device = next(iter(self.model.parameters.values())).device
        for size in [size for size in SAMPLE_ROWS if size <= len(rows)] or [1]:
            spread = [rows[i * (len(rows) - 1) // max(1, size - 1)] for i in range(size)]
            evaluation = Evaluation(self.model, self.objective, to_device(self.objective.collate(spread), device))
            run = _Run(evaluation, self.layers, size)
            run.losses()
            if not run.ambiguous:
                break
        for layer in list(self.layers):
            calls = run.kinds.get(layer)
            if calls is None:  # not called; or called by another module, in whose gradient it is
                self.layers.remove(layer)
                continue
            kinds = {kind for kind, _ in calls}
            layer.kind = kinds.pop() if len(kinds) == 1 else "probed"
            if calls == {("rows", 2), ("positions", 2)}:  # with one axis, as many rows as inputs would look alike
                layer.kind = "either"
        made = {name for layer in self.layers for name in layer.names.values()}
        self.rest = {name: "no module that is called has it" for name in self.wanted if name not in made}
        wrong = self._wrong(evaluation, size)
        if wrong:  # once more, with the order of their rows taken for unknown
            for layer in self.layers:
                layer.kind = "probed" if wrong & set(layer.names.values()) else layer.kind
            wrong = self._wrong(evaluation, size)
        self.rest |= dict.fromkeys(wrong, "its gradient is not made by the modules that have it")
        for layer in list(self.layers):  # a tied parameter is made by all of its layers, or by none
            layer.names = {local: name for local, name in layer.names.items() if name not in self.rest}
            if not layer.names:
                self.layers.remove(layer)

    def _wrong(self, evaluation: Evaluation, examples: int) -> set[str]:
        """The parameters in which some example's gradient is not that of a plain backward pass."""
        names = [*dict.fromkeys(name for layer in self.layers for name in layer.names.values())]
        if not names:
            return set()
        # Their products with random vectors of ±1 are compared: gradients of all examples would need much memory.
        signs = {
            name: vectors.rademacher({name: self.model.parameters[name]}, 1, seed)[name]
            for seed, name in enumerate(names)
        }
        made = torch.zeros(len(names), examples, dtype=torch.float64)
        place = {name: i for i, name in enumerate(names)}

        def receive(layer: Layer, call: Call) -> None:
            for name, columns in layer.gradients(call).items():
                made[place[name]] += _products(columns, signs[name]).cpu()

        wrong = set[str]()
        self.run(evaluation, examples, receive, lambda layer: wrong.update(layer.names.values()))
        leaves = evaluation.leaves(names)
        sums, _ = evaluation.losses(leaves)
        for i in range(examples):
            true = torch.autograd.grad(
                sums[i], list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            norms = [float(t.norm()) for t in true]
            for name, t, norm in zip(names, true, norms, strict=True):
                gap = abs(float(made[place[name], i]) - float(_products(t.unsqueeze(0), signs[name])))
                if not gap <= TOLERANCE * (norm + 1e-3 * max(norms)):
                    wrong.add(name)
        return wrong

    def run(
        self,
        evaluation: Evaluation,
        examples: int,
        receive: Receive,
        mixing: Callable[[Layer], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One forward and one backward pass; `receive(layer, call)` is called once per call of a layer.

        Args:
            evaluation: the batch.
            examples: B.
            receive: may be called in any order of layers; a layer that is called twice in a pass is received twice.
            mixing: called where a layer's rows belong to several examples each, or its rule fails; None: an error is
                raised.

        Returns:
            (sums, counts) of `Evaluation.losses`.

        Raises:
            InputError: the rows of a layer cannot be told apart by example, though those of the sample could.
        """
        run = _Run(evaluation, self.layers, examples, receive, mixing)
        with torch.enable_grad():
            sums, counts = run.losses()
            if run.leaves:
                probes = self.probes
                torch.autograd.grad(sums.sum(), run.leaves, allow_unused=True, retain_graph=probes)
                if probes:
                    run.weights = torch.arange(1.0, examples + 1).to(sums)
                    torch.autograd.grad((run.weights * sums).sum(), run.leaves, allow_unused=True)
        return sums.detach(), counts


class _Run:
    """One forward pass with hooks on the layers: each output's gradient is received when the backward pass makes it.

    Where the order of a layer's rows is not known (packed sequences, tokens dealt to experts), a second backward pass
    weights the loss of example i by i + 1: a row's gradient grows by the weight of the example that it belongs to.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        layers: list[Layer],
        examples: int,
        receive: Receive | None = None,
        mixing: Callable[[Layer], None] | None = None,
    ):
        self.evaluation, self.layers, self.receive, self.mixing = evaluation, layers, receive, mixing
        self.examples, self.ambiguous, self.leaves = examples, False, list[Tensor]()
        self.kinds: dict[Layer, set[tuple[str, int]]] = {}  # of the calls, each with its number of leading axes
        self.calls = Counter[Layer]()
        self.at = Pass(examples)
        self.weights: Tensor | None = None

    def losses(self) -> tuple[Tensor, Tensor]:
        return self.evaluation.objective.losses(self._call, self.evaluation.batch)

    def _call(self, positions: tuple[Tensor, Tensor] | None = None, **inputs):
        tensors = [t for t in inputs.values() if isinstance(t, Tensor) and t.dim()]
        lengths = [size for t in tensors for size in t.shape[1:]]
        head_rows = None if positions is None else positions[0]
        per_example = self.evaluation.objective.inputs_per_row
        self.at = Pass(self.examples, len(tensors[0]), tuple(lengths), head_rows, per_example)
        self.ambiguous |= self.at.inputs in [*lengths, *([] if head_rows is None else [len(head_rows)])]
        model = self.evaluation.model
        model.gather_point(positions, inputs)  # now, since the passes that find it must not meet the hooks
        hooks = [(layer, self._receive if self.receive else self._find) for layer in self.layers]
        handles = [layer.module.register_forward_hook(partial(hook, layer), with_kwargs=True) for layer, hook in hooks]
        try:
            return model.bind({})(positions=positions, **inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _find(self, layer: Layer, _module, _args, _kwargs, output) -> None:
        if not isinstance(output, Tensor):
            return
        lead = layer.lead(output)
        kind = self.at.kind(lead, isinstance(layer, Embedding))
        self.kinds.setdefault(layer, set()).add((kind, len(lead)))

    def _receive(self, layer: Layer, _module, args, kwargs, output) -> Tensor:
        self.calls[layer] += 1  # all of them, before the backward pass begins
        lead, at, x, kind = layer.lead(output), self.at, layer.inputs(args, kwargs), layer.kind
        if kind == "either":
            kind = "rows" if lead[0] == at.inputs else "positions"
        if not at.allows(kind, lead):
            raise _not_told_apart(layer, self.examples)
        if kind == "broadcast":
            x, output = (t.expand(at.inputs, *t.shape[1:]) for t in (x, output))
            lead = layer.lead(output)
        x = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, x)
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()  # not the leaf itself, which must not be written to
        first: list[Tensor] = []

        def received(g: Tensor) -> None:
            # Autocast is the forward pass's; what is made of gradients has their type.
            with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
                if kind != "probed":
                    if self.weights is None:
                        self._deliver(layer, x, g, lead, at.grouping(kind))
                elif self.weights is None:
                    first.append(g.clone())
                else:
                    self._probed(layer, x, first.pop(), g, lead)

        output.register_hook(received)
        return output

    def _deliver(self, layer: Layer, x: Any, g: Tensor, lead: tuple[int, ...], grouping: Grouping) -> None:
        assert self.receive is not None
        try:
            a, g = layer.rows(x, g, lambda t: t.reshape(math.prod(lead), *t.shape[len(lead) :]))
            self.receive(layer, Call(a, g, grouping, alone=self.calls[layer] == 1))
        except (RuntimeError, IndexError, TypeError, ValueError):
            if self.mixing is None:
                raise
            self.mixing(layer)  # a rule that fails on the sample does not fit to its module

    def _probed(self, layer: Layer, x: Any, g: Tensor, weighted: Tensor, lead: tuple[int, ...]) -> None:
        """Delivers rows whose examples are told by the growth of their gradients."""
        assert self.weights is not None
        rows, weighted_rows = (t.reshape(math.prod(lead), -1).double() for t in (g, weighted))
        squares = rows.square().sum(1)
        growth = (rows * weighted_rows).sum(1) / squares.clamp(min=torch.finfo(torch.float64).tiny)
        index = growth.round().long().clamp(1, self.examples)
        gap = (weighted_rows - index.unsqueeze(1) * rows).norm(dim=1)
        # A row without gradient belongs to any example.
        if (gap > 0.1 * squares.sqrt() + 1e-5 * squares.sum().sqrt()).any():
            if self.mixing is None:
                raise _not_told_apart(layer, self.examples)
            self.mixing(layer)
            return
        self._deliver(layer, x, g, lead, Grouping(self.examples, index - 1))


def _products(columns: Tensor, signs: Tensor) -> Tensor:
    """Inner products of columns with a vector, in float64."""
    return (columns.double() * signs).flatten(1).sum(1) if columns.dim() > 1 else columns.double() * signs[0]


class UnclearRowsError(InputError):
    """The rows of a layer cannot be told apart by example in a batch, though those of the sample could."""


def _not_told_apart(layer: Layer, examples: int) -> UnclearRowsError:
    names = list(layer.names.values())
    return UnclearRowsError(
        f"the rows of the layer with {names[0]!r} cannot be told apart by example in a batch of {examples} rows, "
        "though they could be in other batches; expected one example per row: score with method='forward'."
    )
