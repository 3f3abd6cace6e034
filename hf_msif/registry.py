"""What the names in settings stand for, one line for each: "module:Name", or for a file's ending its format.

It imports nothing, so that a configuration can be checked, and its help printed, without PyTorch.
"""

from __future__ import annotations

import os
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
# What `msif diagnose` measures beside the checks.
DIAGNOSTICS = {
    "pad ids": "hf_msif.influence.diagnostics:pad_ids",
    "attention": "hf_msif.influence.diagnostics:attention",
    "precision": "hf_msif.influence.diagnostics:precision",
    "stationarity": "hf_msif.influence.diagnostics:stationarity",
    "curvature sign": "hf_msif.influence.diagnostics:curvature_sign",
    "ties": "hf_msif.influence.diagnostics:ties",
    "mask coverage": "hf_msif.influence.diagnostics:mask_coverage",
    "damping": "hf_msif.influence.diagnostics:damping",
}
# File ending → the builder of `datasets` that reads such a file, also with a further ending .gz.
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
# What a wing shows by a wing above it, which it may not import.
REPORTS = {
    "html": "hf_msif.reports.html:write_report",
    "scores": "hf_msif.reports.plots:ScoresPlots",
    "query": "hf_msif.reports.plots:QueryPlots",
}


def registered(table: Mapping[str, str], name: str) -> Any:
    """The class or function that `name` stands for in `table`.

    >>> registered(SOLVERS, "cg").__name__
    'CG'
    """
    return resolve_name(table[name])


def file_ending(name: str) -> str:
    """The ending of a file's name that says its format: in lower case, without a further .gz.

    >>> file_ending("data/Tweets.TSV.gz")
    '.tsv'
    """
    return os.path.splitext(name.lower().removesuffix(".gz"))[1]


def builder_of(name: str) -> str | None:
    """The builder of `datasets` that reads a file of this name; None where its ending says no format.

    >>> builder_of("data/tweets.tsv.gz"), builder_of("google-research-datasets/go_emotions")
    ('csv', None)
    """
    return FORMATS.get(file_ending(name))
