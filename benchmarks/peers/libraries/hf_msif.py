"""hf_msif by its public interface: `Stage`, `MultiStageInfluence.query` and `Query.score`."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from prepare import chain, rows_of, tokenizer_of
from problem import MaskedWords, Problem

from hf_msif import objectives, solvers


def _rows(problem: Problem) -> tuple[Any, list[dict], list[dict]]:
    """The objective and the rows, which must be masked as the problem's sentences are."""
    facts = problem.facts
    objective = objectives.MaskedLM(tokenizer_of(facts["words"]), **facts["masks"])
    train, queries = rows_of(facts["train"], facts["queries"])
    train, queries = train[: len(problem.train)], queries[: len(problem.queries)]
    batch = objective.collate(train)
    assert torch.equal(batch["input_ids"], problem.train.input_ids)
    assert torch.equal(batch["labels"], problem.train.labels.flatten())
    return objective, train, queries


def _parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def score(problem: Problem, masked: MaskedWords, clock, batch_size: int = 64) -> dict[str, Any]:
    objective, train, queries = _rows(problem)
    query = chain(masked.model, objective, train, "gauss_newton", solvers.Identity()).query(queries)
    with clock.running():
        scores = query.score(train, batch_size=batch_size)
    return {"scores": scores.removal_effects(), "parameters": _parameters(masked.model)}


def ekfac(damping: float) -> dict[str, Any]:
    """Curvature and solver of a stage with Kronecker factors."""
    return {"curvature": "ekfac", "solver": solvers.ClosedForm(damping=damping)}


def fit(problem: Problem, masked: MaskedWords, clock, batch_size: int = 64) -> dict[str, Any]:
    """The fit and one query with it: a stage fits its factors when it is first asked."""
    objective, train, queries = _rows(problem)
    model = chain(masked.model, objective, train, **ekfac(1.0), batch_size=batch_size)
    with clock.running():
        model.query(queries)
    return {"parameters": _parameters(masked.model)}


def solve(
    problem: Problem,
    masked: MaskedWords,
    clock,
    curvature: str,
    damping: float,
    tol: float,
    max_iter: int = 200,
    batch_size: int = 64,
) -> dict[str, Any]:
    """One solve of (A + λ) u = ∇f by CG to a relative residual."""
    objective, train, queries = _rows(problem)
    solver = solvers.CG(damping=damping, tol=tol, max_iter=max_iter)
    model = chain(masked.model, objective, train, curvature, solver, batch_size=batch_size)
    with clock.running():
        query = model.query(queries)
    certificate = query.certificates["only"]
    return {
        "residual": max(certificate.residual),
        "products": max(certificate.matvecs),
        "parameters": _parameters(masked.model),
    }


def quality(
    problem: Problem, masked: MaskedWords, clock, method: str, damping: float, batch_size: int = 512
) -> dict[str, Any]:
    objective, train, queries = _rows(problem)
    ways: dict[str, dict[str, Any]] = {
        "gradient": {"curvature": "gauss_newton", "solver": solvers.Identity()},
        "Gauss-Newton": {"curvature": "gauss_newton", "solver": solvers.CG(damping=damping, tol=1e-3)},
        "Hessian": {"curvature": "hessian", "solver": solvers.MinRes(damping=damping, tol=1e-3)},
        "unrolled": {},
    }
    model, way = masked.model, ekfac(damping) if method == "ekfac" else ways[method]
    if method == "unrolled":  # its own run, in the float64 that it was recorded in
        model = copy.deepcopy(model).double()
        run = str(problem.folder / problem.facts["run"])
        way = ways["gradient"] | {"link": "unrolled", "run": run, "weight_decay": problem.facts["weight_decay"]}
    with clock.running(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not solved to tolerance")
        query = chain(model, objective, train, **way, batch_size=batch_size).query(queries)
        scores = query.score(train)
    return {"scores": scores.removal_effects(), "parameters": _parameters(model)}
