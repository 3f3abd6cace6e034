"""Optimisers as pure functions of parameters, gradients and buffers: steps that can be repeated and differentiated.

The state of a run is a dict slot → name → tensor; its slots are "parameters" and the optimiser's buffers. Their
arithmetic is that of `torch.optim`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError

Slots = dict[str, dict[str, Tensor]]
CLIP_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True)
class SGD:
    """g ← g + weight_decay φ;  m ← momentum m + g;  φ ← φ − rate m  (g + momentum m with `nesterov`)."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def update(
        self, p: Tensor, g: Tensor, buffers: tuple[Tensor, ...], rate: float, step: int, decay: float
    ) -> tuple[Tensor, ...]:
        """The new parameter and buffers; `step` counts from 1."""
        g = g + decay * p if decay else g
        if not self.momentum:
            return (p - rate * g,)
        m = self.momentum * buffers[0] + g
        return p - rate * (g + self.momentum * m if self.nesterov else m), m


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019).

    φ ← (1 − rate · weight_decay) φ;  m ← β₁m + (1 − β₁)g;  v ← β₂v + (1 − β₂)g²;  φ ← φ − rate m̂ / (√v̂ + eps), with
    the bias-corrected m̂ and v̂.

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
        """The new parameter and buffers; `step` counts from 1."""
        p = p * (1 - rate * decay) if decay else p
        m = torch.lerp(buffers[0], g, 1 - self.beta1)
        v = self.beta2 * buffers[1] + (1 - self.beta2) * g * g
        first, second = 1 - self.beta1**step, 1 - self.beta2**step
        if self.eps_inside_root:
            size = (v / second + self.eps**2).sqrt()
        else:
            size = _root(v) / math.sqrt(second) + self.eps
        return p - rate / first * (m / size), m, v


def _root(v: Tensor) -> Tensor:
    """√v with slope 0 at v = 0, where m is 0 as well and m/(√v + eps) has no term from √v's slope."""
    some = v > 0
    return torch.where(some, torch.where(some, v, 1.0).sqrt(), 0.0)


OPTIMISERS = {"SGD": SGD, "AdamW": AdamW}


def to_dict(optimiser: SGD | AdamW) -> dict[str, Any]:
    return {"class": type(optimiser).__name__, **asdict(optimiser)}


def from_dict(values: Mapping[str, Any]) -> SGD | AdamW:
    """Inverse of `to_dict`."""
    return OPTIMISERS[values["class"]](**{key: value for key, value in values.items() if key != "class"})


def from_arguments(arguments: Any, name: str) -> SGD | AdamW:
    """The optimiser that Hugging Face's `TrainingArguments` name.

    `optim` is adamw_torch (also _fused) or sgd; `optim_args` is as in "momentum=0.9" or "eps_inside_root=true".

    Raises:
        InputError: another optimiser, or an argument that it does not have.
    """
    kind = str(getattr(arguments.optim, "value", arguments.optim))
    if kind in ("adamw_torch", "adamw_torch_fused"):
        found, own = AdamW, {"eps_inside_root": bool}
        given = {"beta1": arguments.adam_beta1, "beta2": arguments.adam_beta2, "eps": arguments.adam_epsilon}
    elif kind == "sgd":
        found, given, own = SGD, {}, {"momentum": float, "nesterov": bool}
    else:
        raise InputError(
            f"stage {name!r}: a recorded run has optim {kind!r}; expected adamw_torch, adamw_torch_fused or sgd, "
            "which can be replayed and differentiated."
        )
    for setting in filter(None, (arguments.optim_args or "").replace(" ", "").split(",")):
        key, _, text = setting.partition("=")
        try:
            given[key] = {"true": True, "false": False}[text.lower()] if own[key] is bool else own[key](text)
        except (KeyError, ValueError):
            expected = ", ".join(f"{k}={'true' if v is bool else '0.9'}" for k, v in own.items())
            raise InputError(
                f"stage {name!r}: optim_args has {setting!r}; expected, for {kind}, any of {expected}."
            ) from None
    return found(weight_decay=arguments.weight_decay, **given)


def start(optimiser: SGD | AdamW, parameters: Mapping[str, Tensor]) -> Slots:
    """The state before the first step: buffers are zero."""
    slots: Slots = {"parameters": {name: p.detach().clone() for name, p in parameters.items()}}
    for slot in optimiser.buffers:
        slots[slot] = {name: torch.zeros_like(p) for name, p in parameters.items()}
    return slots


def clipped(gradients: dict[str, Tensor], largest: float | None) -> dict[str, Tensor]:
    """The gradients of a step, scaled so that all together have at most the norm `largest`; None or 0: as they are.

    >>> clipped({"w": torch.tensor([3.0, 4.0])}, largest=1.0)["w"].round(decimals=4)
    tensor([0.6000, 0.8000])
    """
    if not largest:
        return gradients
    norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]).norm()
    share = (largest / (norm + CLIP_EPSILON)).clamp(max=1.0)
    return {name: share * g for name, g in gradients.items()}
