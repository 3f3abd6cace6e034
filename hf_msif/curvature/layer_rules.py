"""Rules for layers: how the gradients of examples are made of what goes into a layer and what gradient comes out.

One forward and one backward pass to the layers' outputs, no matter how many examples: for a layer whose rows (tokens)
n have the inputs a_n and the gradients g_n = ∂ℓ/∂(output row n), example i has the gradient Σ_{n ∈ i} g_n ⊗ a_n in the
weight and Σ_{n ∈ i} g_n in the bias (Goodfellow, 2015). Scoring takes inner products of it with the queries, EK-FAC
its second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.functional import ConstantPadding, FunctionalModel
from ..objectives import numbers_within
from ..vectors import Block


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

    def example_of_each(self, x: Tensor) -> Tensor:
        """The example of each of the n rows of x, (n,)."""
        if self.index is not None:
            return self.index
        examples = torch.arange(self.examples, device=x.device)
        return examples.repeat_interleave(len(x) // self.examples)

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
        slots = numbers_within(self.index)
        return slots, int(slots.max()) + 1 if len(slots) else 0


@dataclass
class Call:
    """One call of a layer in a pass: n rows of inputs and of gradients.

    Attributes:
        a: inputs, one row per token: (n, d_in); token ids (n,) of an embedding.
        g: (n, d_out) the gradient of the summed losses in the layer's output.
        grouping: the example of each row.
        alone: the layer has no other call in the pass.
    """

    a: Any
    g: Tensor
    grouping: Grouping
    alone: bool = False


class Layer:
    """A module with parameters of its own; a subclass is a rule for one kind of module.

    Attributes:
        module: the module.
        names: its own parameters: name in the module → name in the model.
        kind: how its rows belong to examples, see `layers.Pass.kind`; found by `LayerMap`.
    """

    def __init__(self, module: nn.Module, names: dict[str, str], model: FunctionalModel):
        self.module, self.names, self.kind = module, names, ""
        self.model = model

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        raise NotImplementedError

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """The parameters and buffers in the module, by names in the module, with the values of `FunctionalModel`."""
        canonical = {id(p): name for name, p in self.model.model.named_parameters()}
        prefix = next(name for name, module in self.model.model.named_modules() if module is self.module)
        buffers = [local for local, _ in self.module.named_buffers()]
        return {
            **{local: self.model.parameters[canonical[id(p)]] for local, p in self.module.named_parameters()},
            **{local: self.model.buffers[f"{prefix}.{local}" if prefix else local] for local in buffers},
        }

    def tangent(self, args: tuple, kwargs: dict, direction: Mapping[str, Tensor]) -> Tensor:
        """The tangent of the module's output along a direction in its own parameters, at these arguments."""
        with torch.no_grad(), forward_ad.dual_level(), ConstantPadding():
            duals = {local: forward_ad.make_dual(self.values[local], t) for local, t in direction.items()}
            output = torch.func.functional_call(self.module, {**self.values, **duals}, args, kwargs)
            tangent = forward_ad.unpack_dual(output).tangent
        return torch.zeros_like(output) if tangent is None else tangent

    def lead(self, output: Tensor) -> tuple[int, ...]:
        """The axes of an output that count rows."""
        return tuple(output.shape[:-1])

    def inputs(self, args: tuple, kwargs: dict) -> Any:
        """What `rows` needs of a call's arguments."""
        return args[0] if args else next(iter(kwargs.values()))

    def rows(self, x: Any, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
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
        """Columns of the weight, (Q, *weight.shape), as matrices, (Q, d_out, d_in)."""
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
        return (
            isinstance(module, (nn.Conv1d, nn.Conv2d))
            and type(module) in (nn.Conv1d, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def lead(self, output: Tensor) -> tuple[int, ...]:
        return (output.shape[0], *output.shape[2:])

    def matrix(self, v: Tensor) -> Tensor:
        return v.flatten(2)

    def stored(self, matrices: Tensor) -> Tensor:
        return matrices.reshape(len(matrices), *self.values["weight"].shape)

    def rows(self, x: Any, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
        module: Any = self.module
        kernel, dilation, padding, stride = module.kernel_size, module.dilation, module.padding, module.stride
        if x.dim() == 3:  # one axis: a picture one pixel high
            x, g = x.unsqueeze(2), g.unsqueeze(2)
            kernel, dilation, padding, stride = (1, *kernel), (1, *dilation), (0, *padding), (1, *stride)
        patches = nn.functional.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
        return patches.flatten(0, 1), g.flatten(2).transpose(1, 2).flatten(0, 1)


class Embedding(Layer):
    """A linear layer whose inputs are token ids: rows of the identity matrix."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        plain = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
        return plain and module.max_norm is None and not module.scale_grad_by_freq

    def rows(self, x: Tensor, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        tokens, g = flat(x), flat(g)
        padding: int | None = self.module.padding_idx  # type: ignore[assignment]
        # PyTorch gives the row at `padding_idx` no gradient; tied output layers share the row and give it one.
        return tokens, g if padding is None else g.masked_fill((tokens == padding).unsqueeze(1), 0.0)

    def gradients(self, call: Call) -> Block:
        table = self.values["weight"]
        made = call.g.new_zeros(call.grouping.examples, *table.shape)
        index = call.grouping.example_of_each(call.g)
        return {self.names["weight"]: made.index_put_((index, call.a), call.g, accumulate=True)}


class Elementwise(Layer):
    """A module in whose output each element depends on one element of each parameter, linearly: every norm.

    ∂out/∂w is the module's own tangent along w = 1, so that LayerNorm, RMSNorm and their variants share this rule.
    """

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):  # their channels are not the last axis
            return False
        own = list(module.parameters(recurse=False))
        vectors_alone = bool(own) and all(p.dim() == 1 and p.shape == own[0].shape for p in own)
        return vectors_alone and not list(module.children()) and "norm" in type(module).__name__.lower()

    def rows(self, x: Any, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
        return flat(self._slopes(x)), flat(g)

    def _slopes(self, x: Tensor) -> Tensor:
        """∂out/∂weight of each element."""
        module: Any = self.module
        if "weight" not in self.names:
            return x  # not needed
        if isinstance(module, nn.LayerNorm):
            return nn.functional.layer_norm(x, module.normalized_shape, eps=module.eps)
        return self.tangent((x,), {}, {"weight": torch.ones_like(self.values["weight"])})

    def gradients(self, call: Call) -> Block:
        made = {self.names["weight"]: call.grouping.sum(call.a * call.g)} if "weight" in self.names else {}
        if "bias" in self.names:
            made[self.names["bias"]] = call.grouping.sum(call.g)
        return made


class Local(Layer):
    """Any other module: ⟨u, ∇ℓ_i⟩ is the product of its output's gradient with its own tangent along u.

    The rows of a `Call` are those of the output, and its inputs the arguments with which the module is run again.
    """

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        return True

    def lead(self, output: Tensor) -> tuple[int, ...]:
        return tuple(output.shape[:-1] if output.dim() > 1 else output.shape)

    def inputs(self, args: tuple, kwargs: dict) -> Any:
        return args, kwargs

    def rows(self, x: Any, g: Tensor, flat: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
        def matrix(t: Tensor) -> Tensor:
            return flat(t).flatten(1) if t.dim() > 1 else t.unsqueeze(1)

        return (x, matrix), matrix(g)

    def slopes(self, call: Call, direction: Mapping[str, Tensor]) -> Tensor:
        """⟨direction, ∇ℓ_i⟩ of each example, (B,); `direction` by names in the module."""
        (args, kwargs), flat = call.a
        try:
            tangent = self.tangent(args, kwargs, direction)
        except NotImplementedError as error:  # a function in the module has no forward-mode derivative
            self.model.refuse_forward_mode(error)
            gradients = self.gradients(call)
            return torch.stack([(gradients[self.names[n]] * t).flatten(1).sum(1) for n, t in direction.items()]).sum(0)
        return call.grouping.sum((flat(tangent) * call.g).sum(1))

    def gradients(self, call: Call) -> Block:
        ((args, kwargs), flat), grouping = call.a, call.grouping
        own = {local: self.values[local].detach().requires_grad_() for local in self.names}
        with torch.enable_grad():
            output = flat(torch.func.functional_call(self.module, {**self.values, **own}, args, kwargs))
        index = grouping.example_of_each(call.g)
        parts = [call.g * (index == i).unsqueeze(1) for i in range(grouping.examples)]
        rows = [torch.autograd.grad(output, list(own.values()), part, retain_graph=True) for part in parts]
        return {
            name: torch.stack(columns)
            for name, columns in zip(self.names.values(), zip(*rows, strict=True), strict=True)
        }


RULES: tuple[type[Layer], ...] = (Linear, TransposedLinear, Convolution, Embedding, Elementwise, Local)
