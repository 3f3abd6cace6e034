"""Optimisers as pure functions of parameters, gradients and buffers: steps that can be repeated and differentiated.

The state of a run is a dict slot → name → tensor; its slots are "parameters" and the optimiser's buffers. The
arithmetic is that of `torch.optim`.

Each optimiser has two methods: `update`, one step of one parameter, and `vjp`, the vector-Jacobian product of that
step, written out by hand. `vjp` takes a cotangent λ on what `update` returns to Jᵀλ on what it reads; tensors of λ
carry a leading axis of Q columns, (Q, *parameter.shape). `clipped` and `clipped_vjp` are the same pair for clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..vectors import Block

Slots = dict[str, dict[str, Tensor]]
CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class SGD:
    """g ← g + weight_decay φ;  m ← momentum m + g;  φ ← φ − rate m  (φ − rate (g + momentum m) with `nesterov`)."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def update(
        self, p: Tensor, g: Tensor, buffers: tuple[Tensor, ...], rate: float, step: int, decay: float
    ) -> tuple[Tensor, ...]:
        """The parameter and the buffers after a step; `step` counts from 1, `decay` is 0 where none acts on p."""
        g = g + decay * p if decay else g
        if not self.momentum:
            return (p - rate * g,)
        m = self.momentum * buffers[0] + g
        return p - rate * (g + self.momentum * m if self.nesterov else m), m

    def vjp(
        self,
        p: Tensor,
        g: Tensor,
        buffers: tuple[Tensor, ...],
        rate: float,
        step: int,
        decay: float,
        cotangents: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Jᵀλ of `update`, (Q, *p.shape) each.

        Args:
            p, g, buffers: the parameter, its gradient and its buffers before the step.
            rate, step, decay: the learning rate, the number of the step (from 1), the weight decay on p.
            cotangents: λ on the parameter and on each buffer after the step.

        Returns:
            Jᵀλ on the parameter, on the gradient, and on each buffer before the step.
        """
        on_p, *on_buffers = cotangents
        after: tuple[Tensor, ...]
        if not self.momentum:
            on_g, after = -rate * on_p, ()
        else:
            on_m = torch.add(on_buffers[0], on_p, alpha=-rate * (self.momentum if self.nesterov else 1.0))
            on_g = torch.add(on_m, on_p, alpha=-rate) if self.nesterov else on_m
            after = (self.momentum * on_m,)
        return torch.add(on_p, on_g, alpha=decay) if decay else on_p, on_g, *after


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019).

    φ ← (1 − rate · weight_decay) φ;  m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  φ ← φ − rate m̂ / (√v̂ + eps), with
    the bias-corrected m̂ = m/(1 − β₁ᵗ) and v̂ = v/(1 − β₂ᵗ).

    `eps_inside_root`: the denominator is √(v̂ + eps²). With the usual one a coordinate whose gradients are all zero has
    the slope rate/eps: a run is smooth in its data only where eps is not small or inside the root.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_inside_root: bool = False
    weight_decay: float = 0.0

    buffers: ClassVar[tuple[str, ...]] = ("first_moment", "second_moment")

    def update(
        self, p: Tensor, g: Tensor, buffers: tuple[Tensor, ...], rate: float, step: int, decay: float
    ) -> tuple[Tensor, ...]:
        """The parameter and the buffers after a step; `step` counts from 1, `decay` is 0 where none acts on p."""
        p = p * (1 - rate * decay) if decay else p
        m, v = self._moments(g, buffers)
        return p - rate / (1 - self.beta1**step) * (m / self._denominator(v, step)), m, v

    def _moments(self, g: Tensor, buffers: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return torch.lerp(buffers[0], g, 1 - self.beta1), self.beta2 * buffers[1] + (1 - self.beta2) * g * g

    def _denominator(self, v: Tensor, step: int) -> Tensor:
        correction = 1 - self.beta2**step
        if self.eps_inside_root:
            return (v / correction + self.eps**2).sqrt()
        return v.sqrt() / math.sqrt(correction) + self.eps

    def vjp(
        self,
        p: Tensor,
        g: Tensor,
        buffers: tuple[Tensor, ...],
        rate: float,
        step: int,
        decay: float,
        cotangents: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Jᵀλ of `update`, (Q, *p.shape) each. With s the denominator and c = rate / (1 − β₁ᵗ):

        μ_m = λ_m − c λ_φ / s,  μ_v = λ_v + c (m/s²) (∂s/∂v) λ_φ;  on φ: (1 − rate decay) λ_φ;
        on g: (1 − β₁) μ_m + 2 (1 − β₂) g μ_v;  on the buffers: β₁ μ_m and β₂ μ_v.

        Where v = 0 all gradients so far were zero and so is m: ∂s/∂v = ∞ of √v counts as 0, as m/s has no slope in v.

        Args:
            p, g, buffers: the parameter, its gradient and its buffers before the step.
            rate, step, decay: the learning rate, the number of the step (from 1), the weight decay on p.
            cotangents: λ on the parameter and on each buffer after the step.

        Returns:
            Jᵀλ on the parameter, on the gradient, and on each buffer before the step.
        """
        on_p, on_m, on_v = cotangents
        m, v = self._moments(g, buffers)
        size = self._denominator(v, step)
        inverse = rate / (1 - self.beta1**step) / size  # c / s
        correction = 1 - self.beta2**step
        if self.eps_inside_root:
            slope = 0.5 / correction / size  # ∂s/∂v
        else:
            slope = torch.where(v > 0, 0.5 / math.sqrt(correction) * v.rsqrt(), 0.0)
        on_m = torch.addcmul(on_m, inverse, on_p, value=-1)
        on_v = torch.addcmul(on_v, inverse * (m / size) * slope, on_p)
        on_g = torch.addcmul((1 - self.beta1) * on_m, 2 * (1 - self.beta2) * g, on_v)
        # Both are new tensors: in place, since an embedding matrix of Q columns is large.
        return (1 - rate * decay) * on_p if decay else on_p, on_g, on_m.mul_(self.beta1), on_v.mul_(self.beta2)


OPTIMISERS = {"SGD": SGD, "AdamW": AdamW}


def to_dict(optimiser: SGD | AdamW) -> dict[str, Any]:
    return {"class": type(optimiser).__name__, **asdict(optimiser)}


def from_dict(values: Mapping[str, Any]) -> SGD | AdamW:
    """Inverse of `to_dict`."""
    return OPTIMISERS[values["class"]](**{key: value for key, value in values.items() if key != "class"})


def from_arguments(arguments: Any, name: str) -> SGD | AdamW:
    """The optimiser that Hugging Face's `TrainingArguments` name.

    `optim` is adamw_torch (also _fused) or sgd; `optim_args` is written as "momentum=0.9" or "eps_inside_root=true".

    Raises:
        InputError: another optimiser, or an argument that it does not have.
    """
    kind = str(getattr(arguments.optim, "value", arguments.optim))
    optimiser: type[SGD | AdamW]
    types: dict[str, type]
    settings: dict[str, Any]
    if kind in ("adamw_torch", "adamw_torch_fused"):
        optimiser, types = AdamW, {"eps_inside_root": bool}
        settings = {"beta1": arguments.adam_beta1, "beta2": arguments.adam_beta2, "eps": arguments.adam_epsilon}
    elif kind == "sgd":
        optimiser, types, settings = SGD, {"momentum": float, "nesterov": bool}, {}
    else:
        raise InputError(
            f"stage {name!r}: a recorded run has optim {kind!r}; expected adamw_torch, adamw_torch_fused or sgd, "
            "which can be replayed and differentiated."
        )
    for setting in filter(None, (arguments.optim_args or "").replace(" ", "").split(",")):
        key, _, value = setting.partition("=")
        try:
            settings[key] = {"true": True, "false": False}[value.lower()] if types[key] is bool else types[key](value)
        except (KeyError, ValueError):
            expected = ", ".join(f"{k}={'true' if v is bool else '0.9'}" for k, v in types.items())
            raise InputError(
                f"stage {name!r}: optim_args has {setting!r}; expected, for {kind}, any of {expected}."
            ) from None
    return optimiser(weight_decay=arguments.weight_decay, **settings)


def start(optimiser: SGD | AdamW, parameters: Mapping[str, Tensor]) -> Slots:
    """The state before the first step: buffers are zero."""
    slots: Slots = {"parameters": {name: p.detach().clone() for name, p in parameters.items()}}
    for slot in optimiser.buffers:
        slots[slot] = {name: torch.zeros_like(p) for name, p in parameters.items()}
    return slots


def clipped(gradients: dict[str, Tensor], largest: float | None) -> dict[str, Tensor]:
    """The gradients of a step, scaled so that all together have at most the norm `largest`; None or 0: as they are.

    min(1, largest / (‖g‖ + 1e-6)) · g, as torch's `clip_grad_norm_` has it.

    >>> clipped({"w": torch.tensor([3.0, 4.0])}, largest=1.0)["w"].round(decimals=4)
    tensor([0.6000, 0.8000])
    """
    if not largest:
        return gradients
    share = (largest / (_joint_norm(gradients) + CLIP_EPSILON)).clamp(max=1.0)
    return {name: share * g for name, g in gradients.items()}


def clipped_vjp(gradients: Mapping[str, Tensor], largest: float | None, cotangents: Block) -> Block:
    """Jᵀλ of `clipped`, (Q, *g.shape) each; overwrites λ, one name at a time.

    s λ − s ⟨λ, g⟩ / ((‖g‖ + 1e-6) ‖g‖) · g with the scale s = largest / (‖g‖ + 1e-6); λ itself where s ≥ 1.

    Args:
        gradients: g, before it is clipped.
        largest: the largest norm; None or 0 where nothing is clipped.
        cotangents: λ on what `clipped` returns, (Q, *g.shape) for each name.
    """
    if not largest:
        return cotangents
    norm = _joint_norm(gradients)
    tiny = torch.finfo(norm.dtype).tiny  # at g = 0 the norm's slope counts as 0
    share = largest / (norm + CLIP_EPSILON)
    inner = sum(cotangents[name].reshape(-1, g.numel()) @ g.reshape(-1) for name, g in gradients.items())
    along = torch.where(share < 1, inner / norm.clamp(min=tiny) * (share / (norm + CLIP_EPSILON)), 0.0)
    for name, g in gradients.items():
        cotangent = cotangents[name].mul_(share.clamp(max=1.0))
        cotangent.addcmul_(along.reshape(-1, *[1] * g.dim()), g, value=-1)
    return cotangents


def _joint_norm(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(t) for t in tensors.values()]).norm()
