"""How a ranking moves with the damping: one query per λ, each compared with the one before."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..engine.corpus import as_rows
from ..errors import InputError
from ..solvers import Certificate
from .chain import Chain
from .multistage import flaw, judge
from .query import Query

if TYPE_CHECKING:
    import pandas as pd


def damping_sweep(
    chain: Chain,
    tests,
    corpus,
    dampings: Sequence[float] | str = "auto",
    stage: str | None = None,
    k: int = 10,
    measurement: Any = "loss",
) -> pd.DataFrame:
    """Scores `corpus` once for every λ of `stage` (the first by default); the later stages are solved once.

    Args:
        chain: the stages; the solver of `stage` gets each of the dampings in turn.
        tests: test examples, with one column each.
        corpus: rows to rank, as examples of `stage`.
        dampings: the values of λ, all positive; "auto": `Differentiation.dampings`, powers of ten times the largest
            eigenvalue.
        stage: name of the stage whose damping varies; defaults to the first.
        k: number of rows in the top of a ranking.
        measurement: what is explained, as for `MultiStageInfluence.query`.

    Returns:
        One row per λ, ascending, with the columns `damping`, `iterations` and `residual` (of the worst query column),
        `spread` (standard deviation of the influence, mean over query columns), and two that compare with the λ
        before and are NaN in the first row: `top_k_kept` (share of the top k by absolute influence that were in the
        top k before, mean over query columns) and `rank_correlation` (Spearman's ρ of the influences, mean over query
        columns). A λ too small for the solver has no ranking: NaN. There it met negative curvature, or its residual
        is not below 1, that of u = 0.

    Warns:
        UserWarning: a λ has no ranking.

    Raises:
        InputError: bad rows, dampings that are not positive, k < 1, or a stage without damping.
    """
    import pandas as pd

    target = chain.stage(stage)
    dampings = target.differentiation.dampings() if isinstance(dampings, str) else sorted(set(dampings))
    if not dampings or not all(0 < damping < math.inf for damping in dampings):
        raise InputError(f"the dampings are {dampings}; expected positive numbers.")
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1.")
    name = target.name
    rows = as_rows(tests, "the test examples")
    damped = [target.differentiation.damped(damping) for damping in dampings]
    adjoint, explained = chain.measurement(rows, measurement=measurement)
    for bound in reversed(chain.stages):
        if bound is target:
            break
        solution, inherited = bound.differentiation.pull_back(adjoint)
        judge(bound.name, solution.certificate)
        adjoint = bound.carry(inherited)
    table, before = [], None
    for damping, differentiation in zip(dampings, damped, strict=True):
        solution, _ = differentiation.pull_back(adjoint)
        certificate = cast(Certificate, solution.certificate)  # what has a damping is a linear system
        row = {"damping": damping, "iterations": max(certificate.iterations), "residual": max(certificate.residual)}
        row |= dict.fromkeys(("spread", "top_k_kept", "rank_correlation"), math.nan)
        table.append(row)
        reason = flaw(certificate)
        if reason is not None:
            warnings.warn(f"stage {name!r}: no ranking at damping {damping:g}: {reason}. {certificate}", stacklevel=2)
            continue
        scores = Query({name: solution}, rows, explained, None, chain).score(corpus, stage=name)
        values = scores.influences().T
        row["spread"] = float(values.std(axis=1).mean())
        if before is not None:
            row["top_k_kept"], row["rank_correlation"] = _compare(before, values, k)
        before = values
    return pd.DataFrame(table)


STABLE = 0.7  # share of the top that a factor between two dampings of a sweep may leave, for a ranking that is stable


@dataclass(frozen=True)
class Recommendation:
    """The damping that a sweep recommends.

    Attributes:
        damping: λ; None where no λ has a ranking that is solved.
        reason: why, for people.
    """

    damping: float | None
    reason: str


def recommendation(table: pd.DataFrame, tol: float) -> Recommendation:
    """The smallest λ that is solved, and beside which the ranking is stable: less is muted than with a larger one.

    A ranking is stable at λ where the next larger λ keeps at least `STABLE` of its top. Where none is, the largest λ
    that is solved is taken. (A very large λ is always stable: its ranking is that of plain gradient products. Being
    stable is no proof that a ranking means something; retraining is.)

    Args:
        table: what `damping_sweep` returned.
        tol: the solver's tolerance.

    >>> import pandas as pd
    >>> table = pd.DataFrame({"damping": [0.01, 0.1, 1.0], "residual": [0.3, 1e-4, 1e-4]})
    >>> recommendation(table.assign(top_k_kept=[None, 0.4, 0.9]), tol=1e-3).damping
    0.1
    """
    solved = [residual <= tol for residual in table.residual]
    if not any(solved):
        return Recommendation(None, f"no λ is solved to {tol:.0e}: give the solver more iterations, or try a larger λ")
    next_shares = [*table.top_k_kept[1:], math.nan]  # of the top that the next larger λ keeps
    for damping, is_solved, share in zip(table.damping, solved, next_shares, strict=True):
        if is_solved and share >= STABLE:
            reason = f"the smallest λ that is solved and of whose top the next larger λ keeps {share:.0%}"
            return Recommendation(float(damping), reason)
    largest = max(damping for damping, is_solved in zip(table.damping, solved, strict=True) if is_solved)
    shares = [share for share, is_solved in zip(next_shares, solved, strict=True) if is_solved and share == share]
    best = f"at most {max(shares):.0%} of a top" if shares else "nothing to compare with"
    reason = f"the largest λ that is solved; no ranking is stable ({best} kept by the next larger λ): try larger ones"
    return Recommendation(float(largest), reason)


def _compare(before: np.ndarray, after: np.ndarray, k: int) -> tuple[float, float]:
    from scipy.stats import spearmanr

    def top(values: np.ndarray) -> set:
        return set(np.argsort(-abs(values), kind="stable")[:k])

    pairs = list(zip(before, after, strict=True))
    shares = [len(top(x) & top(y)) / min(k, len(x)) for x, y in pairs]
    return float(np.mean(shares)), float(np.mean([spearmanr(x, y).statistic for x, y in pairs]))
