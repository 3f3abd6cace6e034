"""What goes into every layer of a batch and what gradient comes out: the per-example gradients are made of both.

One forward and one backward pass to the layers' outputs, no matter how many examples: for a layer whose rows (tokens)
n have the inputs a_n and the gradients g_n = ∂ℓ/∂(output row n), example i has the gradient Σ_{n ∈ i} g_n ⊗ a_n in the
weight and Σ_{n ∈ i} g_n in the bias (Goodfellow, 2015). Scoring takes inner products of it with the queries, EK-FAC
its second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.functional import FunctionalModel
from ..engine.accelerated import to_device
from ..errors import InputError
from ..objectives import Objective
from ..vectors import Block
from .derivatives import Evaluation

SAMPLE_ROWS = (3, 2, 4, 5)  # sizes of the batch on which layers are looked at; the first that is told from other sizes


class Grouping:
    """Which example each of n rows belongs to.

    Attributes:
        examples: B.
        index: (n,) the example of each row; None: n/B consecutive rows per example.
    """

    def __init__(self, examples: int, index: Tensor | None = None):
        self.examples, self.index = examples, index

    def sum(self, x: Tensor) -> Tensor:
        """Sums over the rows of each example: (n, …) → (B, …)."""
        if self.index is None:
            return x.reshape(self.examples, -1, *x.shape[1:]).sum(1)
        return x.new_zeros(self.examples, *x.shape[1:]).index_add_(0, self.index, x)

    def padded(self, x: Tensor) -> Tensor:
        """(n, d) → (B, T, d), T the largest number of rows of an example; zero where an example has fewer."""
        if self.index is None:
            return x.reshape(self.examples, -1, *x.shape[1:])
        slots, width = self._slots
        return x.new_zeros(self.examples, width, *x.shape[1:]).index_put_((self.index, slots), x)

    @cached_property
    def _slots(self) -> tuple[Tensor, int]:
        """The place of each row among those of its example, and the number of places."""
        assert self.index is not None
        counts = torch.bincount(self.index, minlength=self.examples)
        order = self.index.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        slots = torch.empty_like(order)
        slots[order] = torch.arange(len(order), device=order.device) - starts[self.index[order]]
        return slots, int(counts.max())


@dataclass
class Call:
    """One call of a layer in a pass: n rows of inputs and of gradients.

    Attributes:
        a: inputs, one row per token: (n, d_in); token ids (n,) of an embedding.
        g: (n, d_out) the gradient of the summed losses in the layer's output.
        grouping: the example of each row.
    """

    a: Tensor
    g: Tensor
    grouping: Grouping


class Layer:
    """A module with parameters of its own; a subclass is a rule for one kind of module.

    Attributes:
        module: the module.
        names: its own parameters: name in the module → name in the model.
        kind: how its rows belong to examples, a name in `Pass.groupings`; found by `layers_of`.
    """

    def __init__(self, module: nn.Module, names: dict[str, str]):
        self.module, self.names, self.kind = module, names, ""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        raise NotImplementedError

    def lead(self, output: Tensor) -> tuple[int, ...]:
        """The axes of an output that count rows."""
        return tuple(output.shape[:-1])

    def inputs(self, args: tuple, kwargs: dict) -> Tensor:
        """What `rows` needs of a call's arguments."""
        return args[0] if args else next(iter(kwargs.values()))

    def rows(self, x: Tensor, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(a, g) of a `Call`; `flat` makes one axis of the axes of `lead`."""
        return flat(x), flat(g)

    def gradients(self, call: Call) -> Block:
        """∇ℓ_i in the layer's parameters, one column per example, by names of the model. For a few examples."""
        raise NotImplementedError


class Linear(Layer):
    """out = a Wᵀ + b."""

    transposed = False  # W is stored as (d_in, d_out)

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward

    def matrix(self, v: Tensor) -> Tensor:
        """Columns of the weight, (Q, *weight.shape), as (Q, d_out, d_in); no copy."""
        return v.transpose(1, 2) if self.transposed else v

    def stored(self, matrices: Tensor) -> Tensor:
        """Inverse of `matrix`."""
        return matrices.transpose(1, 2) if self.transposed else matrices

    def gradients(self, call: Call) -> Block:
        made = {}
        if "weight" in self.names:
            a, g = call.grouping.padded(call.a), call.grouping.padded(call.g)
            made[self.names["weight"]] = self.stored(g.transpose(1, 2) @ a)
        if "bias" in self.names:
            made[self.names["bias"]] = call.grouping.sum(call.g)
        return made


class TransposedLinear(Linear):
    """GPT-2's `Conv1D`: a linear layer whose weight is stored as (d_in, d_out)."""

    transposed = True

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return type(module).forward is Conv1D.forward


class Convolution(Linear):
    """`Conv1d` and `Conv2d` without groups: a linear layer on the patches that the kernel sees."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        plain = type(module) in (nn.Conv1d, nn.Conv2d)
        return plain and module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)

    def lead(self, output: Tensor) -> tuple[int, ...]:
        return (output.shape[0], *output.shape[2:])

    def matrix(self, v: Tensor) -> Tensor:
        return v.flatten(2)

    def stored(self, matrices: Tensor) -> Tensor:
        return matrices.reshape(len(matrices), *self.module.weight.shape)

    def rows(self, x: Tensor, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        module: Any = self.module
        settings = module.kernel_size, module.dilation, module.padding, module.stride
        if x.dim() == 3:  # one axis: a picture one pixel high
            x, g = x.unsqueeze(2), g.unsqueeze(2)
            settings = tuple((first, *s) for first, s in zip((1, 1, 0, 1), settings, strict=True))
        kernel, dilation, padding, stride = settings
        patches = nn.functional.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
        return patches.flatten(0, 1), g.flatten(2).transpose(1, 2).flatten(0, 1)


class Embedding(Layer):
    """A linear layer whose inputs are token ids: rows of the identity matrix."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        plain = type(module).forward is nn.Embedding.forward
        return plain and module.max_norm is None and not module.scale_grad_by_freq

    def gradients(self, call: Call) -> Block:
        table = self.module.weight
        made = call.g.new_zeros(call.grouping.examples, *table.shape)
        index = call.grouping.index
        if index is None:
            index = torch.arange(call.grouping.examples, device=call.g.device)
            index = index.repeat_interleave(len(call.g) // call.grouping.examples)
        return {self.names["weight"]: made.index_put_((index, call.a), call.g, accumulate=True)}


class Elementwise(Layer):
    """A module in whose output each element depends on one element of each parameter, linearly: every norm.

    ∂out/∂w is the module's own tangent along w = 1, so that LayerNorm, RMSNorm and their variants share this rule.
    """

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        own = list(module.parameters(recurse=False))
        vectors_alone = bool(own) and all(p.dim() == 1 and p.shape == own[0].shape for p in own)
        return vectors_alone and not list(module.children()) and "norm" in type(module).__name__.lower()

    def rows(self, x: Tensor, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return flat(self._slopes(x)), flat(g)

    def _slopes(self, x: Tensor) -> Tensor:
        """∂out/∂weight of each element."""
        module: Any = self.module
        if isinstance(module, nn.LayerNorm):
            return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        values = {name: p.detach() for name, p in module.named_parameters()}
        with torch.no_grad(), forward_ad.dual_level():
            values["weight"] = forward_ad.make_dual(values["weight"], torch.ones_like(values["weight"]))
            output = torch.func.functional_call(module, values, (x,))
            return forward_ad.unpack_dual(output).tangent

    def gradients(self, call: Call) -> Block:
        made = {self.names["weight"]: call.grouping.sum(call.a * call.g)} if "weight" in self.names else {}
        if "bias" in self.names:
            made[self.names["bias"]] = call.grouping.sum(call.g)
        return made


RULES: tuple[type[Layer], ...] = (Linear, TransposedLinear, Convolution, Embedding, Elementwise)


@dataclass
class Pass:
    """One call of the model: sizes that tell how a layer's rows belong to the examples.

    Attributes:
        examples: B.
        inputs: number of rows of the model's inputs, B times the draws per example.
        lengths: the further sizes of the inputs, such as the number of tokens.
        positions: (M,) the input row of each token that the head sees; None: the head sees all of them.
    """

    examples: int
    inputs: int = 0
    lengths: tuple[int, ...] = ()
    positions: Tensor | None = None

    def kind(self, lead: tuple[int, ...], is_table: bool) -> str:
        """How rows with these leading axes belong to the examples.

        "rows": the first axis is that of the inputs; "broadcast": a table's row of positions for all inputs;
        "positions": the tokens that the head sees; "probed": any other order, see `_Run`.
        """
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
        wanted = tuple(names)
        canonical = {id(p): name for name, p in model.model.named_parameters()}
        self.layers: list[Layer] = []
        owners: dict[str, str] = {}
        for module in model.model.modules():
            own = {local: canonical[id(p)] for local, p in module._parameters.items() if p is not None}
            own = {local: name for local, name in own.items() if name in wanted}
            owners |= {name: type(module).__name__ for name in own.values()}
            rule = next((rule for rule in RULES if own and rule.fits(module)), None)
            if rule is not None:
                self.layers.append(rule(module, own))
        made = {name for layer in self.layers for name in layer.names.values()}
        # Some owners do not use their parameter, but a layer inside them that is tied to it does.
        self.rest = {name: f"no rule for {owners.get(name, 'it')}" for name in wanted if name not in made}
        with model.evaluating():
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
        for layer in self.layers:
            kinds = run.kinds.get(layer, {"probed"})
            layer.kind = kinds.pop() if len(kinds) == 1 else "probed"
        for _ in range(2):  # once more with the rows of the layers that are wrong taken for unordered
            wrong = self._wrong(evaluation, size)
            for layer in self.layers:
                if wrong & set(layer.names.values()):
                    layer.kind = "probed"
        reason = "its gradient is not that of its layers"
        self.rest |= {name: reason for name in wrong}
        for layer in list(self.layers):  # a tied parameter is made by all of its layers, or by none
            layer.names = {local: name for local, name in layer.names.items() if name not in self.rest}
            if not layer.names:
                self.layers.remove(layer)

    def _wrong(self, evaluation: Evaluation, examples: int) -> set[str]:
        """The parameters in which some example's gradient is not that of a plain backward pass."""
        names = [*dict.fromkeys(name for layer in self.layers for name in layer.names.values())]
        if not names:
            return set()
        made = [dict[str, Tensor]() for _ in range(examples)]

        def receive(layer: Layer, call: Call) -> None:
            for name, columns in layer.gradients(call).items():
                for row, column in zip(made, columns, strict=True):
                    row[name] = row[name] + column if name in row else column

        mixed = self._mixed(evaluation, examples, receive)
        leaves = evaluation.leaves(names)
        sums, _ = evaluation.losses(leaves)
        wrong, tolerance = mixed, 1e4 * torch.finfo(sums.dtype).eps
        for i, row in enumerate(made):
            true = torch.autograd.grad(
                sums[i], list(leaves.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            norms = [float(t.norm()) for t in true]
            for name, t, norm in zip(names, true, norms, strict=True):
                gap = float((row[name] - t).norm()) if name in row else norm
                if not gap <= tolerance * (norm + 1e-3 * max(norms)):
                    wrong.add(name)
        return wrong

    def _mixed(self, evaluation: Evaluation, examples: int, receive: Receive) -> set[str]:
        """Runs the layers; the parameters of those whose rows mix examples, which are not received."""
        mixed = set[str]()

        def instead(layer: Layer) -> None:
            mixed.update(layer.names.values())

        self.run(evaluation, examples, receive, instead)
        return mixed

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
            mixing: called in the place of `receive` where a layer's rows belong to several examples each; None: an
                error is raised.

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
        self.kinds: dict[Layer, set[str]] = {}
        self.at = Pass(examples)
        self.weights: Tensor | None = None

    def losses(self) -> tuple[Tensor, Tensor]:
        hooks = [(layer, self._receive if self.receive else self._find) for layer in self.layers]
        handles = [layer.module.register_forward_hook(partial(hook, layer), with_kwargs=True) for layer, hook in hooks]
        try:
            return self.evaluation.objective.losses(self._call, self.evaluation.batch)
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, positions: tuple[Tensor, Tensor] | None = None, **inputs):
        tensors = [t for t in inputs.values() if isinstance(t, Tensor) and t.dim()]
        lengths = [size for t in tensors for size in t.shape[1:]]
        self.at = Pass(self.examples, len(tensors[0]), tuple(lengths), None if positions is None else positions[0])
        self.ambiguous |= self.at.inputs in [*lengths, *([] if positions is None else [len(positions[0])])]
        return self.evaluation.model.bind({})(positions=positions, **inputs)

    def _find(self, layer: Layer, _module, _args, _kwargs, output) -> None:
        kind = self.at.kind(layer.lead(output), isinstance(layer, Embedding))
        self.kinds.setdefault(layer, set()).add(kind)

    def _receive(self, layer: Layer, _module, args, kwargs, output) -> Tensor:
        lead, at, x = layer.lead(output), self.at, layer.inputs(args, kwargs)
        if not at.allows(layer.kind, lead):
            raise _not_told_apart(layer, self.examples)
        if layer.kind == "broadcast":
            x, output = (t.expand(at.inputs, *t.shape[1:]) for t in (x, output))
        if not output.requires_grad:
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            output = leaf.clone()  # not the leaf itself, which must not be written to
        first: list[Tensor] = []

        def received(g: Tensor) -> None:
            with torch.no_grad():
                if layer.kind != "probed":
                    self._deliver(layer, x, g, len(lead), at.grouping(layer.kind))
                elif self.weights is None:
                    first.append(g.clone())
                else:
                    self._probed(layer, x, first.pop(), g, len(lead))

        output.register_hook(received)
        return output

    def _deliver(self, layer: Layer, x: Tensor, g: Tensor, axes: int, grouping: Grouping) -> None:
        assert self.receive is not None
        a, g = layer.rows(x.detach(), g, lambda t: t.flatten(0, axes - 1))
        self.receive(layer, Call(a, g, grouping))

    def _probed(self, layer: Layer, x: Tensor, g: Tensor, weighted: Tensor, axes: int) -> None:
        """Delivers rows whose examples are told by the growth of their gradients."""
        assert self.weights is not None
        rows, weighted_rows = (t.flatten(0, axes - 1).flatten(1).double() for t in (g, weighted))
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
        self._deliver(layer, x, g, axes, Grouping(self.examples, index - 1))


def _not_told_apart(layer: Layer, examples: int) -> InputError:
    names = list(layer.names.values())
    return InputError(
        f"the rows of the layer with {names[0]!r} cannot be told apart by example in a batch of {examples} rows, "
        "though they could be in other batches; expected one example per row: score with method='forward'."
    )
