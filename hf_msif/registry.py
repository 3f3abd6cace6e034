"""What the names in settings stand for: one line for each, "module:Name".

It imports nothing, so that a configuration can be checked, and its help printed, without PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

SOLVERS = {
    "auto": "hf_msif.solvers.auto:Auto",
    "cg": "hf_msif.solvers.cg:CG",
    "block_cg": "hf_msif.solvers.block_cg:BlockCG",
    "squared_cg": "hf_msif.solvers.squared_cg:SquaredCG",
    "minres": "hf_msif.solvers.minres:MinRes",
    "identity": "hf_msif.solvers.identity:Identity",
    "dense": "hf_msif.solvers.dense:Dense",
    "closed_form": "hf_msif.solvers.closed_form:ClosedForm",
    "stochastic": "hf_msif.solvers.stochastic:Stochastic",
}
PRECONDITIONERS = {
    "nystrom": "hf_msif.solvers.nystrom:Nystrom",
    "ekfac": "hf_msif.curvature.preconditioner:EKFACPreconditioner",
}
CURVATURES = {
    "auto": "hf_msif.curvature.auto:auto",
    "gauss_newton": "hf_msif.curvature.gauss_newton:GaussNewton",
    "hessian": "hf_msif.curvature.hessian:Hessian",
    "ekfac": "hf_msif.curvature.ekfac:EKFAC",
}
DIFFERENTIATIONS = {
    "implicit": "hf_msif.influence.implicit:Implicit",
    "unrolled": "hf_msif.influence.unrolled:Unrolled",
    "segments": "hf_msif.influence.segments:Segments",
}
CHECKS = {
    "determinism": "hf_msif.influence.checks:determinism",
    "padding": "hf_msif.influence.checks:padding",
    "causality": "hf_msif.influence.checks:causality",
    "symmetry": "hf_msif.influence.checks:symmetry",
}
# What a wing shows by a wing above it, which it may not import.
PLOTS = {
    "scores": "hf_msif.reports.plots:ScoresPlots",
    "query": "hf_msif.reports.plots:QueryPlots",
}


def registered(table: Mapping[str, str], name: str) -> Any:
    """The class that `name` stands for in `table`.

    >>> registered(SOLVERS, "cg").__name__
    'CG'
    """
    return resolve_name(table[name])
