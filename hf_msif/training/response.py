"""How a run of an optimiser answers, along one eigenvector of its curvature: a scalar recurrence of its schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .optimisers import SGD, AdamW


def linear_form(optimiser: SGD | AdamW, rates: Sequence[float], begin: int = 0) -> tuple[SGD, list[float]]:
    """The run as one of gradient descent with momentum, in the coordinates of its preconditioner P.

    With √v̂ held at its value, AdamW is m ← β₁m + (1 − β₁)g, φ ← φ − η_t P m / (1 − β₁ᵗ): descent with momentum β₁, in
    units of m/(1 − β₁), whose rates are η_t (1 − β₁)/(1 − β₁ᵗ). SGD is itself. Weight decay is left to the curvature.

    Args:
        optimiser: of the run.
        rates: η_t of consecutive steps.
        begin: the number of steps before them.

    Returns:
        The optimiser without weight decay; its rates.

    >>> [round(rate, 4) for rate in linear_form(AdamW(beta1=0.9), [1.0, 1.0])[1]]
    [1.0, 0.5263]
    """
    if isinstance(optimiser, SGD):
        return SGD(optimiser.momentum, optimiser.nesterov), list(rates)
    beta = optimiser.beta1
    return SGD(beta), [rate * (1 - beta) / (1 - beta**t) for t, rate in enumerate(rates, begin + 1)]


def responses(descent: SGD, rates: Sequence[float], eigenvalues: Tensor) -> Tensor:
    """What a cotangent after the steps becomes before them, and how it answers a constant force during them.

    Along an eigenvector of curvature σ the gradient at φ is σφ, and a step is linear in (φ, m). Back through the
    steps, λ ← Jᵀλ; for plain descent

        λ_before = Π_t (1 − η_t σ) λ,      u = Σ_t η_t Π_{s>t} (1 − η_s σ) λ,

    where −u is the derivative of ⟨λ, (φ, m)⟩ in a constant that is added to the gradient of every step: the limits of
    small rates are e^{−τσ} and (1 − e^{−τσ})/σ with τ = Σ η_t (Bae et al., 2024).

    Args:
        descent: the optimiser, SGD with or without momentum, without weight decay.
        rates: η_t of the steps.
        eigenvalues: σ, (k,), of any sign.

    Returns:
        (S, 1 + S, k) in float64, for the S slots of the state (the parameter, and m where there is momentum): row i is
        the answer to λ = 1 on slot i, [u, λ_before on each slot].

    >>> responses(SGD(), [0.5, 0.5], torch.tensor([1.0])).flatten().tolist()  # ½ + ½·½, and ½·½
    [0.75, 0.25]
    """
    sigma = eigenvalues.double()
    slots = 1 + len(descent.buffers)
    carried = list(torch.eye(slots, dtype=torch.float64).unsqueeze(2).repeat(1, 1, len(sigma)).unbind())
    u = torch.zeros(slots, len(sigma), dtype=torch.float64)
    buffers = (sigma,) * (slots - 1)  # their values do not matter: the step is linear
    for rate in reversed(rates):
        on_p, on_g, *on_buffers = descent.vjp(sigma, sigma, buffers, rate, 0, 0.0, tuple(carried))
        u = u - on_g
        carried = [torch.addcmul(on_p, sigma, on_g), *on_buffers]
    return torch.stack([u, *carried], 1)
