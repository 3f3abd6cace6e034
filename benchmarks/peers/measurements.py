"""What is measured: one `Case` per library, method and size, in the order in which they take turns."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

LIBRARIES = ("hf_msif", "kronfluence", "bergson", "captum", "dattri")
QUERIES = (1, 2, 4, 8, 32)
# λ of the solves: large enough that the Hessian of a model with random weights, plus λ, is positive definite.
HESSIAN_DAMPING, GAUSS_NEWTON_DAMPING, TOLERANCE = 50.0, 1.0, 1e-2


@dataclass(frozen=True)
class Sizes:
    """How large the problems are.

    Attributes:
        sentences: that are scored.
        fitted: sentences to which Kronecker factors are fitted.
        solved: sentences whose curvature is solved with.
        slow: sentences of a library that takes over a second for one: its costs grow linearly with them.
        vocabularies: of the model with random weights; the first one's is scored.
        quality: sentences, queries and retrainings of the trained model.
        queries: numbers of queries.
    """

    sentences: int = 256
    fitted: int = 128
    solved: int = 64
    slow: int = 16
    vocabularies: tuple[int, int] = (8_000, 30_522)
    quality: tuple[int, int, int] = (240, 16, 40)
    queries: tuple[int, ...] = QUERIES


SMALL = Sizes(32, 16, 16, 4, (500, 1_000), (60, 4, 4), (1, 8))


@dataclass(frozen=True)
class Case:
    """A measurement of one library.

    Attributes:
        measurement: "score", "fit", "solve" or "quality": the function in `libraries/`.
        library: its module in `libraries/`.
        method: what the library does, as the tables name it.
        problem: folder of the problem.
        train: how many of its sentences; None: all.
        queries: how many of its queries; None: all.
        arguments: of the function.
        once: measured once whatever the number of repeats, since it takes minutes.
        warm_up: number of sentences of a first, uncounted run; 0: none.
    """

    measurement: str
    library: str
    method: str
    problem: str
    train: int | None = None
    queries: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    once: bool = False
    warm_up: int = 0

    @property
    def key(self) -> str:
        """A name for files."""
        parts = [self.measurement, self.library, self.method, self.problem, f"q{self.queries}"]
        return re.sub(r"[^a-z0-9_]+", "-", "-".join(parts).lower())

    @property
    def settings(self) -> str:
        """All that decides its result, to tell a result of other settings."""
        decisive = {name: value for name, value in vars(self).items() if name != "once"}
        return json.dumps(decisive, sort_keys=True)


def scoring(sizes: Sizes) -> list[Case]:
    """Gradient products of all sentences with Q prepared query vectors."""
    problem = f"cost_{sizes.vocabularies[0]}"
    return [
        Case(
            "score",
            library,
            "gradient",
            problem,
            sizes.slow if library == "dattri" else sizes.sentences,
            q,
            warm_up=2,
        )
        for q in sizes.queries
        for library in LIBRARIES
        if library != "dattri" or q in (sizes.queries[0], sizes.queries[-1])
    ]


def fitting(sizes: Sizes) -> list[Case]:
    """Fits of Kronecker factors with corrected eigenvalues."""
    cases = []
    for vocabulary in sizes.vocabularies:
        shared = {"problem": f"cost_{vocabulary}", "train": sizes.fitted, "queries": 1}
        cases += [
            Case("fit", "hf_msif", "ekfac", **shared),
            Case("fit", "kronfluence", "ekfac, without the decoder", **shared, arguments={"decoder": False}),
            Case("fit", "bergson", "ekfac", **shared),
            Case("fit", "dattri", "ekfac", **shared, once=True),
            Case("fit", "captum", "ekfac", **shared, once=True),
            Case("fit", "kronfluence", "ekfac, all Linear", **shared, once=True),
        ]
    return cases


def solving(sizes: Sizes) -> list[Case]:
    """One inverse-curvature-vector product; the peers have no tolerance, their iterations are set."""
    shared = {"problem": f"cost_{sizes.vocabularies[0]}", "train": sizes.solved, "queries": 1}
    hessian = {"damping": HESSIAN_DAMPING}
    gauss_newton = {"curvature": "gauss_newton", "damping": GAUSS_NEWTON_DAMPING, "tol": TOLERANCE}
    lissa = {"method": "LiSSA", "recursion_depth": 10, "batch_size": sizes.solved, "scaling": 100.0}
    return [
        Case("solve", "hf_msif", "Gauss-Newton, CG", **shared, arguments=gauss_newton),
        Case(
            "solve", "hf_msif", "Hessian, CG", **shared, arguments={"curvature": "hessian", "tol": TOLERANCE} | hessian
        ),
        Case("solve", "dattri", "Hessian, CG", **shared, arguments={"method": "CG", "max_iter": 12} | hessian),
        Case("solve", "dattri", "Hessian, LiSSA", **shared, arguments=lissa | hessian),
        Case("solve", "captum", "Hessian, Arnoldi", **shared, arguments={"iterations": 10} | hessian),
    ]


# Library → its methods: settings beside method and damping.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "hf_msif": {"gradient": {}, "Gauss-Newton": {}, "Hessian": {}, "ekfac": {}, "unrolled": {}},
    "kronfluence": {"gradient": {}, "diagonal": {}, "kfac": {}, "ekfac": {}},
    "bergson": {"gradient": {}, "kfac": {}, "ekfac": {}},
    "captum": {"gradient": {}, "Arnoldi": {}, "explicit": {}},
    "dattri": {
        "gradient": {},
        "CG": {"max_iter": 50},
        "LiSSA": {"recursion_depth": 500, "batch_size": 32, "scaling": 100.0},
        "Arnoldi": {"max_iter": 200, "proj_dim": 50},
        "DataInf": {},
        "EK-FAC": {},
    },
}


def quality(sizes: Sizes, damping: float) -> list[Case]:
    """Scores of the trained model, from the finished weights to the last sentence."""
    return [
        Case(
            "quality",
            library,
            method,
            "quality",
            arguments={"method": method, "damping": damping} | settings,
            once=method == "explicit",
            warm_up=0 if method in ("explicit", "unrolled") else 4,
        )
        for library, methods in METHODS.items()
        for method, settings in methods.items()
    ]
