"""How a ranking moves with the damping: one query a λ, compared with its neighbour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .engine import as_rows
from .errors import InputError
from .influence import MultiStageInfluence, pull_back
from .query import Query

if TYPE_CHECKING:
    import pandas as pd


def damping_sweep(
    chain: MultiStageInfluence, tests, corpus, dampings: Sequence[float], stage: str | None = None, k: int = 10
) -> pd.DataFrame:
    """Scores `corpus` once for every λ of `stage` (the first by default); the later stages are solved once.

    Returns:
        One row a λ, ascending: `damping`, `iterations` and `residual` (worst column), `spread` (standard deviation of
        the influence), `top_k_kept` (share of the top k by absolute influence that was in the previous λ's top k, mean
        over columns) and `rank_correlation` (Spearman with the previous λ, mean over columns).
    """
    import pandas as pd

    if not dampings or min(dampings) <= 0:
        raise InputError(f"the dampings are {list(dampings)}; expected positive numbers.")
    target = chain.link(stage)
    rows = as_rows(tests, "the test examples")
    adjoint, losses = chain.measurement(rows)
    for link in reversed(chain.links):
        if link is target:
            break
        _, inherited, _ = pull_back(link, adjoint)
        adjoint = link.carry(inherited)
    found, before = [], None
    for damping in sorted(dampings):
        u, _, certificate = pull_back(target, adjoint, replace(target.stage.solver, damping=damping))
        name = target.stage.name
        scores = Query({name: u}, {name: certificate}, rows, losses, None, chain).score(corpus, stage=name)
        values = np.stack([scores.influence(q) for q in range(scores.columns)])
        row = {"damping": damping, "iterations": max(certificate.iterations), "residual": max(certificate.residual)}
        row["spread"] = float(values.std(axis=1).mean())
        row["top_k_kept"], row["rank_correlation"] = (
            _compare(before, values, k) if before is not None else (None, None)
        )
        found.append(row)
        before = values
    return pd.DataFrame(found)


def _compare(before: np.ndarray, after: np.ndarray, k: int) -> tuple[float, float]:
    from scipy.stats import spearmanr

    kept = [
        len(set(np.argsort(-abs(x))[:k]) & set(np.argsort(-abs(y))[:k])) / min(k, len(x))
        for x, y in zip(before, after, strict=True)
    ]
    ranks = [spearmanr(x, y).statistic for x, y in zip(before, after, strict=True)]
    return float(np.mean(kept)), float(np.mean(ranks))
