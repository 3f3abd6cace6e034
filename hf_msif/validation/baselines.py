"""Baselines that an influence has to beat: one score per row and test column, to be compared with removal effects.

A baseline is a function of a `Case` that returns an array (rows, Q). Its sign is that of `removal_effect`: positive
means that the test loss is predicted to rise when the row is removed (the row helps). `implicit`, `identity` and
`gradient_dot` also have its unit; the others only order rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .. import vectors
from ..curvature.derivatives import Evaluation, example_gradients
from ..engine.corpus import as_rows
from ..errors import InputError
from ..influence.chain import BoundStage
from ..influence.implicit import Implicit
from ..influence.multistage import MultiStageInfluence
from ..influence.representations import cosines, representations
from ..influence.stage import Stage
from ..scoring.similarity import BM25, TFIDF
from ..solvers import Identity
from ..vectors import Block


@dataclass
class Case:
    """What baselines are computed from, and quantities that several of them share.

    Attributes:
        chain: the stages.
        tests: Q test rows, of the last stage.
        corpus: the rows to score, of the stage `bound`.
        bound: the stage of the corpus, bound to the chain.
        seed: of `random`.
    """

    chain: MultiStageInfluence
    tests: list[dict]
    corpus: list[dict]
    bound: BoundStage
    seed: int = 0

    @property
    def last(self) -> BoundStage:
        """The last stage, bound to the chain."""
        return self.chain.stages[-1]

    @cached_property
    def test_gradients(self) -> Block:
        """∇f of every test on the parameters that the last stage shares with the corpus's stage: a block of Q columns.

        Names are those of the corpus's stage.

        Raises:
            InputError: no shared parameter is trained.
        """
        adjoint, _ = self.chain.measurement(self.tests)
        for bound in reversed(self.chain.stages):
            if bound is self.bound:
                break
            adjoint = bound.carry({name: adjoint[name] for name in bound.split.inherited})
        shared = [n for n in self.bound.split.trained if n in adjoint and bool(adjoint[n].any())]
        if not shared:
            raise InputError(
                f"stage {self.bound.name!r} trains no parameter that {self.last.stage.name!r} shares; gradient "
                "baselines need one: leave them out with which=[...]."
            )
        return vectors.select(adjoint, shared)

    @cached_property
    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """⟨∇f, ∇ℓ⟩ on the shared parameters, (rows, Q), and ‖∇ℓ‖ there, (rows,)."""
        tests, objective = vectors.flatten(self.test_gradients).double(), self.bound.objective
        products: list[tuple[int, list[float], float]] = []
        engine = self.chain.engine
        with self.bound.model.evaluating(), engine.bar(total=len(self.corpus), desc="gradients", unit=" rows") as bar:
            for indices, batch in engine.batches(self.corpus, objective, batch_size=1):
                evaluation = Evaluation(self.bound.model, objective, batch)
                rows = vectors.flatten(example_gradients(evaluation, list(self.test_gradients))).double()
                products += zip(indices, (rows @ tests.T).tolist(), rows.norm(dim=1).tolist(), strict=True)
                bar.update(len(indices) * engine.processes)
        products = sorted(engine.gather(products))
        return np.array([row[1] for row in products]), np.array([row[2] for row in products])

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """The texts of the corpus and those of the tests.

        Raises:
            InputError: one of the stages has no texts.
        """
        texts = []
        for bound, rows in ((self.bound, self.corpus), (self.last, self.tests)):
            column = bound.objective.text_column
            if column not in rows[0]:
                raise InputError(
                    f"stage {bound.name!r} has no texts ({type(bound.objective).__name__}): leave out "
                    "the baselines tfidf and bm25."
                )
            texts.append([bound.objective.content(row) for row in rows])
        return texts[0], texts[1]


def identity(case: Case) -> np.ndarray:
    """−I/N with the identity in place of every inverse curvature, u_k = a_k: the paper's Figure 2(c)."""
    # If α is not a number, 2α = 1: then W moves with W_before one to one, as at the beginning of a run.

    def changes(stage: Stage) -> dict:
        return {"solver": Identity(), "alpha": 0.5 if stage.alpha in (None, "auto") else stage.alpha}

    return _effects(case, changes)


def implicit(case: Case) -> np.ndarray:
    """−I/N, eqs. (9)–(15), with every unrolled stage treated as if its stage were at a minimum.

    Each stage keeps its curvature and its solver; a stage without α gets the estimate α̂.
    """
    return _effects(case, lambda stage: {"alpha": stage.alpha or "auto"})


def _effects(case: Case, changes: Callable[[Stage], dict]) -> np.ndarray:
    """−I/N of the chain whose stages are all implicit and have the settings that `changes` returns."""
    stages = [replace(bound.stage, link="implicit", run=None, **changes(bound.stage)) for bound in case.chain.stages]
    chain = MultiStageInfluence(stages, case.chain.engine.accelerator, case.chain.engine.progress)
    return chain.query(case.tests).score(case.corpus, stage=case.bound.name).removal_effects()


def gradient_dot(case: Case) -> np.ndarray:
    """⟨∇f, ∇ℓ⟩/N on the shared parameters: the effect of leaving out one gradient step on the row."""
    return case.gradients[0] / case.bound.count


def gradient_cosine(case: Case) -> np.ndarray:
    """⟨∇f, ∇ℓ⟩ / (‖∇f‖ ‖∇ℓ‖) on the shared parameters; 0 for a row without a gradient."""
    products, norms = case.gradients
    tests = vectors.norm(case.test_gradients).numpy(force=True)
    return products / np.maximum(norms[:, None] * tests, np.finfo(np.float64).tiny)


def representation(case: Case) -> np.ndarray:
    """Cosine of the encoder outputs of row and test, each by the model of its stage.

    An output is the mean over the real tokens of a text, or over the positions of an image.

    Raises:
        InputError: the two encoders have different numbers of features.
    """
    corpus, tests = representations(case.bound, case.corpus), representations(case.last, case.tests)
    if corpus.shape[1] != tests.shape[1]:
        raise InputError(
            f"the encoders' outputs have {corpus.shape[1]} and {tests.shape[1]} features; expected as many: leave out "
            "the baseline representation."
        )
    return cosines(corpus, tests)


def tfidf(case: Case) -> np.ndarray:
    """Cosine of the TF-IDF vectors of row and test, with document frequencies from the corpus."""
    corpus, tests = case.texts
    return TFIDF(corpus)(corpus, tests)


def bm25(case: Case) -> np.ndarray:
    """Okapi BM25 of every row, with the test as the query: see `scoring.similarity.BM25`."""
    corpus, tests = case.texts
    return BM25(corpus)(corpus, tests)


def random(case: Case) -> np.ndarray:
    """Independent standard normal numbers, to show what chance achieves with this many removals."""
    return np.random.default_rng(case.seed).standard_normal((len(case.corpus), len(case.tests)))


Baseline = Callable[[Case], np.ndarray]
BASELINES: tuple[Baseline, ...] = (
    implicit,
    identity,
    gradient_dot,
    gradient_cosine,
    representation,
    tfidf,
    bm25,
    random,
)
TEXT = (tfidf, bm25)


def baselines(
    chain: MultiStageInfluence,
    tests: Any,
    corpus: Any,
    stage: str | None = None,
    which: Sequence[Baseline] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Scores every row of `corpus` for every test, by each baseline.

    Args:
        chain: the stages, as for the influence itself; only `implicit` uses their solvers.
        tests: Q rows of the last stage: a `datasets.Dataset`, or a list of dicts or strings.
        corpus: rows of `stage`, in the same forms.
        stage: name of the corpus's stage; defaults to the first stage.
        which: functions of `BASELINES`, or other functions of a `Case`. Defaults to all that apply: `implicit` needs
            an unrolled stage, `tfidf` and `bm25` need texts in both stages.
        seed: of `random`.

    Returns:
        name → array (rows, Q) in corpus order, signed as a removal effect: positive means that the row helps.

    Raises:
        InputError: there is no such stage, the rows are no table, or a baseline in `which` does not apply.
    """
    case = Case(chain, as_rows(tests, "the test examples"), as_rows(corpus, "the corpus"), chain.stage(stage), seed)
    if which is None:
        texts = all(
            bound.objective.text_column in rows[0]
            for bound, rows in ((case.bound, case.corpus), (case.last, case.tests))
        )
        inapplicable = () if texts else TEXT
        if all(isinstance(bound.differentiation, Implicit) for bound in chain.stages):
            inapplicable = (*inapplicable, implicit)
        which = [baseline for baseline in BASELINES if baseline not in inapplicable]
    return {baseline.__name__: baseline(case) for baseline in which}
