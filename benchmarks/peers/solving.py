"""An independent check of a solve: the residual of (H + λ) u = b, H the Hessian of the mean loss."""

from __future__ import annotations

import torch
from problem import MaskedWords, Sentences, losses
from torch import Tensor


def gradient(masked: MaskedWords, sentences: Sentences) -> list[Tensor]:
    """∇ of the summed loss of the sentences, one tensor per parameter."""
    loss = losses(masked(sentences.input_ids, sentences.columns), sentences.labels).sum()
    return [g.detach() for g in torch.autograd.grad(loss, list(masked.parameters()))]


def product(masked: MaskedWords, sentences: Sentences, v: list[Tensor], batch_size: int = 64) -> list[Tensor]:
    """H v, H the Hessian of (1/N) Σ ℓ_i."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    parameters, total = list(masked.parameters()), [torch.zeros_like(t) for t in v]
    with sdpa_kernel(SDPBackend.MATH):
        for batch in sentences.batches(batch_size):
            loss = losses(masked(batch.input_ids, batch.columns), batch.labels).sum() / sentences.terms
            first = torch.autograd.grad(loss, parameters, create_graph=True)
            for sum_, part in zip(total, torch.autograd.grad(first, parameters, v), strict=True):
                sum_ += part
    return total


def residual(masked: MaskedWords, sentences: Sentences, damping: float, u: list[Tensor], b: list[Tensor]) -> float:
    """‖(H + λ) u − b‖ / ‖b‖."""
    off = [h + damping * x - y for h, x, y in zip(product(masked, sentences, u), u, b, strict=True)]
    return (_norm(off) / _norm(b)).item()


def _norm(v: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in v]).norm()
