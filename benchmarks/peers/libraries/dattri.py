"""dattri: all parameters; gradients of single sentences by `vmap`, kept for a whole batch, all parameters in one row.

Its loss is the mean over the masked words that it is given, so that a gradient is 1/M of hf_msif's, M the masked words
per sentence, and the Hessian of all sentences at once is hf_msif's.
"""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm import influence_function
from dattri.algorithm.base import BaseInnerProductAttributor
from dattri.task import AttributionTask
from problem import MaskedWords, Problem, Sentences, losses
from torch.utils.data import DataLoader, TensorDataset


def _task(masked: MaskedWords) -> AttributionTask:
    def loss(parameters, data):
        input_ids, columns, labels = (t.long() for t in data)  # LiSSA hands token ids on as floats
        logits = torch.func.functional_call(masked, parameters, (input_ids, columns))
        return losses(logits, labels).mean() / labels.shape[-1]

    return AttributionTask(loss, masked, masked.state_dict())


def _loader(sentences: Sentences, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(*sentences.tensors), batch_size)


def _parameters(masked: MaskedWords) -> int:
    return sum(p.numel() for p in masked.parameters())


def score(problem: Problem, masked: MaskedWords, clock, batch_size: int = 16) -> dict[str, Any]:
    """`attribute`, but for the gradients of the queries: it takes them again for every batch, here they are kept."""
    attributor = BaseInnerProductAttributor(_task(masked))
    batches = _loader(problem.queries, len(problem.queries))
    queries = torch.cat([_gradients(attributor, one) for one in _loader(problem.queries, 1)]).detach()
    attributor.generate_test_rep = lambda ckpt_idx, data: queries
    attributor.cache(_loader(problem.train, batch_size))
    with clock.running():
        scores = attributor.attribute(_loader(problem.train, batch_size), batches)
    return {"scores": scores.detach(), "parameters": _parameters(masked)}


def _gradients(attributor: BaseInnerProductAttributor, batch: list[torch.Tensor]) -> torch.Tensor:
    return attributor.generate_train_rep(0, tuple(t.unsqueeze(0) for t in batch))


def fit(problem: Problem, masked: MaskedWords, clock, batch_size: int = 64) -> dict[str, Any]:
    attributor = influence_function.IFAttributorEKFAC(_task(masked))
    with clock.running():
        attributor.cache(_loader(problem.train, batch_size))
    return {"parameters": _parameters(masked)}


def _solver(method: str, masked: MaskedWords, damping: float, sentences: Sentences, **settings: Any):
    """The attributors that put something in the place of the inverse curvature, with hf_msif's λ in their units."""
    task, terms = _task(masked), sentences.columns.shape[1]
    if method in ("CG", "LiSSA", "Arnoldi"):  # the model's own attention has no second derivative on CPUs
        masked.model.set_attn_implementation("eager")
    if method == "CG":
        return influence_function.IFAttributorCG(task, regularization=damping, **settings)
    if method == "LiSSA":
        # It solves (H / scaling + damping) x = v, and returns x / scaling.
        scaling = settings.pop("scaling")
        settings |= {"scaling": scaling, "damping": damping / scaling}
        return influence_function.IFAttributorLiSSA(task, **settings)
    if method == "Arnoldi":
        return influence_function.IFAttributorArnoldi(task, regularization=damping, **settings)
    if method == "DataInf":
        return influence_function.IFAttributorDataInf(task, regularization=damping / terms)
    if method == "EK-FAC":
        return influence_function.IFAttributorEKFAC(task, damping=damping / terms)
    assert method == "gradient", method
    return BaseInnerProductAttributor(task)


def solve(
    problem: Problem, masked: MaskedWords, clock, method: str, damping: float, **settings: Any
) -> dict[str, Any]:
    """One (H + λ)⁻¹ ∇f. It says nothing of how well it was solved, so the residual is taken of what it returns."""
    from solving import residual

    attributor = _solver(method, masked, damping, problem.train, **settings)
    attributor.cache(_loader(problem.train, len(problem.train)))  # with more batches it adds up their inverses
    b = _gradients(attributor, list(problem.queries.tensors)).detach()
    with clock.running():
        u = attributor.transform_test_rep(0, b)
    error = residual(masked, problem.train, damping, *(_by_parameter(v[0], masked) for v in (u, b)))
    products = settings.get("max_iter", settings.get("recursion_depth"))
    return {"residual": error, "products": products, "parameters": _parameters(masked)}


def _by_parameter(v: torch.Tensor, masked: MaskedWords) -> list[torch.Tensor]:
    parameters = list(masked.parameters())
    return [p.view_as(q) for p, q in zip(v.split([q.numel() for q in parameters]), parameters, strict=True)]


def quality(
    problem: Problem, masked: MaskedWords, clock, method: str, damping: float, **settings: Any
) -> dict[str, Any]:
    train = _loader(problem.train, len(problem.train))
    with clock.running():
        attributor = _solver(method, masked, damping, problem.train, **settings)
        attributor.cache(train)
        scores = attributor.attribute(train, _loader(problem.queries, len(problem.queries)))
    return {"scores": scores.detach(), "parameters": _parameters(masked)}
