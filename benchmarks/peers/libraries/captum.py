"""captum: all parameters; one backward pass per sentence, whose gradients it keeps for a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from captum.influence import TracInCP
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from captum.influence._core.influence_function import NaiveInfluenceFunction
from problem import MaskedWords, Problem, Sentences, losses
from torch.utils.data import DataLoader, TensorDataset


def _loader(sentences: Sentences, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(*sentences.tensors), batch_size)


def _as_it_is(model: torch.nn.Module, checkpoint: str) -> float:
    """Loads nothing: the model is the checkpoint. The learning rate is 1."""
    return 1.0


def _parameters(masked: MaskedWords) -> int:
    return sum(p.numel() for p in masked.parameters())


def _tracin(problem: Problem, masked: MaskedWords, batch_size: int) -> TracInCP:
    return TracInCP(masked, _loader(problem.train, batch_size), ["the model"], _as_it_is, loss_fn=losses)


def score(problem: Problem, masked: MaskedWords, clock, batch_size: int = 16) -> dict[str, Any]:
    """`TracInCP.influence`, cut in two: the gradients of the queries are prepared, the loop over batches is timed."""
    tracin = _tracin(problem, masked, batch_size)
    queries = tracin._get_checkpoint_jacobians(_loader(problem.queries, batch_size), False, losses)
    with clock.running():
        scores = torch.cat([tracin._influence_batch_tracincp(queries, b) for b in tracin.train_dataloader], dim=1)
    return {"scores": scores.detach().T, "parameters": _parameters(masked)}


def fit(problem: Problem, masked: MaskedWords, clock) -> dict[str, Any]:
    raise NotImplementedError("captum has no Kronecker factors")


def _arnoldi(problem: Problem, masked: MaskedWords, damping: float, batch_size: int, dimension: int, rank: int):
    """Its matrix is the Hessian of the *summed* losses; λ is added to the part that the Krylov space sees."""
    masked.model.set_attn_implementation("eager")  # the model's own attention has no second derivative on CPUs
    return ArnoldiInfluenceFunction(
        masked,
        _loader(problem.train, batch_size),
        "the model",
        _as_it_is,
        loss_fn=losses,
        arnoldi_dim=dimension,
        projection_dim=rank,
        hessian_reg=damping * problem.train.terms,
    )


def solve(
    problem: Problem, masked: MaskedWords, clock, damping: float, iterations: int, batch_size: int = 64
) -> dict[str, Any]:
    """The low-rank inverse R Rᵀ of Arnoldi's iterations, applied to the first query's gradient: no system is solved,
    so the residual is taken of what it returns."""
    from solving import gradient, residual

    with clock.running():
        arnoldi = _arnoldi(problem, masked, damping, batch_size, iterations, iterations)
        b = gradient(masked, problem.queries)
        # R Rᵀ is the inverse for the sum over terms; that of the mean is larger by their number.
        coordinates = [sum((r * g).sum() for r, g in zip(row, b, strict=True)) for row in arnoldi.R]
        u = [
            problem.train.terms * sum(c * row[i] for c, row in zip(coordinates, arnoldi.R, strict=True))
            for i in range(len(b))
        ]
    error = residual(masked, problem.train, damping, u, b)
    return {"residual": error, "products": iterations, "parameters": _parameters(masked)}


def quality(
    problem: Problem, masked: MaskedWords, clock, method: str, damping: float, batch_size: int = 64
) -> dict[str, Any]:
    with clock.running():
        if method == "gradient":
            scores = _tracin(problem, masked, batch_size).influence(problem.queries.tensors)
        elif method == "Arnoldi":
            influence = _arnoldi(problem, masked, damping, len(problem.train), 200, 50)
            scores = influence.influence(problem.queries.tensors)
        else:
            masked.model.set_attn_implementation("eager")
            loader = _loader(problem.train, len(problem.train))
            influence = NaiveInfluenceFunction(
                masked,
                loader,
                "the model",
                _as_it_is,
                loss_fn=losses,
                projection_dim=_parameters(masked),
                hessian_reg=damping * problem.train.terms,
                hessian_inverse_tol=0.0,
            )
            scores = influence.influence(problem.queries.tensors)
    return {"scores": scores.detach().T, "parameters": _parameters(masked)}
