"""What an influence has to beat: one score a row and test column, each comparable to a removal effect.

A baseline is a function of a `Case` that returns an array (rows, Q). Its sign is that of `removal_effect`: positive
means that the test loss is predicted to rise when the row is removed (the row helps). Only `identity` and
`gradient_dot` also have its unit; the others order rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import vectors
from ..adapters.split import encoder
from ..curvature.derivatives import Evaluation, example_gradients
from ..engine.corpus import as_rows
from ..errors import InputError
from ..influence.chain import Link
from ..influence.multistage import MultiStageInfluence
from ..influence.stage import Stage
from ..objectives import tokenized
from ..solvers import Identity
from ..vectors import Block


@dataclass
class Case:
    """A chain, the test rows (of its last stage), the corpus (rows of `link`'s stage) and what baselines share."""

    chain: MultiStageInfluence
    tests: list[dict]
    corpus: list[dict]
    link: Link
    seed: int = 0

    @property
    def last(self) -> Link:
        return self.chain.links[-1]

    @cached_property
    def test_gradients(self) -> Block:
        """∇f of every test on the parameters of the last stage that the corpus's stage shares, under its names."""
        adjoint, _ = self.chain.measurement(self.tests)
        for link in reversed(self.chain.links):
            if link is self.link:
                break
            adjoint = link.carry({name: adjoint[name] for name in link.split.inherited})
        shared = [n for n in self.link.split.trained if n in adjoint and bool(adjoint[n].any())]
        if not shared:
            raise InputError(
                f"stage {self.link.stage.name!r} trains no parameter that {self.last.stage.name!r} shares: a gradient "
                "baseline has nothing to compare."
            )
        return vectors.select(adjoint, shared)

    @cached_property
    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """⟨∇f, ∇ℓ⟩ on the shared parameters, (rows, Q), and ‖∇ℓ‖ there, (rows,)."""
        tests, objective, found = vectors.flatten(self.test_gradients).double(), self.link.stage.objective, []
        engine = self.chain.engine
        with self.link.model.evaluating(), engine.bar(total=len(self.corpus), desc="gradients", unit=" rows") as bar:
            for indices, batch in engine.batches(self.corpus, objective, batch_size=1):
                evaluation = Evaluation(self.link.model, objective, batch)
                rows = vectors.flatten(example_gradients(evaluation, list(self.test_gradients))).double()
                found += zip(indices, (rows @ tests.T).tolist(), rows.norm(dim=1).tolist(), strict=True)
                bar.update(len(indices) * engine.processes)
        found = sorted(engine.gather(found))
        return np.array([row[1] for row in found]), np.array([row[2] for row in found])

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """The corpus's and the tests' texts."""
        found = []
        for link, rows in ((self.link, self.corpus), (self.last, self.tests)):
            column = link.stage.objective.text_column
            if column not in rows[0]:
                raise InputError(
                    f"stage {link.stage.name!r} has no texts ({type(link.stage.objective).__name__}): leave the "
                    "baselines tfidf and bm25 out."
                )
            found.append([row[column] for row in rows])
        return found[0], found[1]


def identity(case: Case) -> np.ndarray:
    """Identity for every inverse curvature, the paper's Figure 2(c): −I/N with u_k = a_k."""
    # Where α is not a number, W moves with W_before one to one, as a run begins: 2α = 1.

    def changes(stage: Stage) -> dict:
        return {"solver": Identity(), "alpha": 0.5 if stage.alpha in (None, "auto") else stage.alpha}

    return _effects(case, changes)


def implicit(case: Case) -> np.ndarray:
    """The chain with unrolled links taken for minima, by each stage's curvature and solver: eqs. (9)–(15), with the
    estimate α̂ where the stage has no α."""
    return _effects(case, lambda stage: {"alpha": stage.alpha or "auto"})


def _effects(case: Case, changes: Callable[[Stage], dict]) -> np.ndarray:
    """−I/N of the chain of proximal links that `changes` makes of its stages."""
    stages = [replace(link.stage, link="proximal", run=None, **changes(link.stage)) for link in case.chain.links]
    chain = MultiStageInfluence(stages, case.chain.engine.accelerator, case.chain.engine.progress)
    return chain.query(case.tests).score(case.corpus, stage=case.link.stage.name).removal_effects()


def gradient_dot(case: Case) -> np.ndarray:
    """⟨∇f, ∇ℓ⟩/N on the shared parameters: the effect of leaving one gradient step on the row undone."""
    return case.gradients[0] / case.link.count


def gradient_cosine(case: Case) -> np.ndarray:
    """⟨∇f, ∇ℓ⟩ / (‖∇f‖ ‖∇ℓ‖) on the shared parameters; 0 for a row without a gradient."""
    products, norms = case.gradients
    tests = vectors.norm(case.test_gradients).numpy(force=True)
    return products / np.maximum(norms[:, None] * tests, np.finfo(np.float64).tiny)


def representation(case: Case) -> np.ndarray:
    """Cosine of encoder outputs (means over real tokens, or over an image's places), by each stage's own model."""
    corpus, tests = _representations(case.link, case.corpus), _representations(case.last, case.tests)
    if corpus.shape[1] != tests.shape[1]:
        raise InputError(f"the encoders' outputs have {corpus.shape[1]} and {tests.shape[1]} features.")
    return _unit(corpus) @ _unit(tests).T


def tfidf(case: Case) -> np.ndarray:
    """Cosine of TF-IDF vectors, document frequencies from the corpus."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    corpus, tests = case.texts
    vectorizer = TfidfVectorizer()
    documents = vectorizer.fit_transform(corpus)
    return (documents @ vectorizer.transform(tests).T).toarray()


def bm25(case: Case, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Okapi BM25 (Robertson & Zaragoza, 2009) of the corpus's rows for the test as the query.

    Σ_terms log(1 + (n − d + ½)/(d + ½)) · f (k1 + 1) / (f + k1 (1 − b + b · length/mean length)), d the number of rows
    that have the term and f its count in the row; a term counts as often as the test has it.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    corpus, tests = case.texts
    vectorizer = CountVectorizer()
    counts = vectorizer.fit_transform(corpus).astype(np.float64).tocsr()
    lengths = np.asarray(counts.sum(1)).ravel()
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    weight = np.log1p((len(corpus) - frequency + 0.5) / (frequency + 0.5))
    short = k1 * (1 - b + b * lengths / max(lengths.mean(), 1e-12))
    row = np.repeat(np.arange(len(corpus)), np.diff(counts.indptr))
    counts.data = weight[counts.indices] * counts.data * (k1 + 1) / (counts.data + short[row])
    return (counts @ vectorizer.transform(tests).T.astype(np.float64)).toarray()


def random(case: Case) -> np.ndarray:
    """Independent normal numbers: what chance looks like at this size."""
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
    """Scores of `corpus`, rows of `stage`, for `tests`, under every baseline's name.

    Args:
        chain: stages as for the influence itself; its solvers are not used.
        tests: rows of the last stage, one column each.
        corpus: rows of `stage`, as `Query.score` takes them.
        stage: the first by default.
        which: functions of `BASELINES`, or any other of a `Case`; default: all that apply (implicit needs an unrolled
            link, tfidf and bm25 texts in both stages).
        seed: of `random`.

    Returns:
        name → array (rows, Q) in corpus order, signed as a removal effect: positive means that the row helps.
    """
    case = Case(chain, as_rows(tests, "the test examples"), as_rows(corpus, "the corpus"), chain.link(stage), seed)
    if which is None:
        texts = all(
            link.stage.objective.text_column in rows[0]
            for link, rows in ((case.link, case.corpus), (case.last, case.tests))
        )
        odd = () if texts else TEXT
        if all(link.recording is None for link in chain.links):
            odd = (*odd, implicit)
        which = [baseline for baseline in BASELINES if baseline not in odd]
    return {baseline.__name__: baseline(case) for baseline in which}


def _representations(link: Link, rows: list[dict]) -> np.ndarray:
    engine, objective, found = link.engine, link.stage.objective, []
    with torch.no_grad(), link.model.evaluating():
        for indices, batch in engine.batches(
            rows, objective, link.stage.batch_size, lambda some: _inputs(objective, some)
        ):
            found += zip(indices, _pooled(link, batch).double().tolist(), strict=True)
    return np.array([row[1] for row in sorted(engine.gather(found))])


def _inputs(objective: Any, rows: list[dict]) -> dict:
    """What the encoder reads: the whole text, unmasked, or what the objective's batches have but labels."""
    if objective.tokenizer is not None:
        return tokenized(objective, rows)
    names, batch = objective.inputs, objective.collate(rows)
    return {name: batch[name] for name in names} if names else {k: v for k, v in batch.items() if k != "labels"}


def _pooled(link: Link, inputs: dict) -> Tensor:
    base, parameters = encoder(link.stage.model), link.model.parameters
    whole = {id(p): parameters[name] for name, p in link.stage.model.named_parameters()}
    state = {name: whole[id(p)] for name, p in base.named_parameters()}
    buffers = {name: b.to(link.engine.device) for name, b in base.named_buffers()}
    output = torch.func.functional_call(base, {**state, **buffers}, kwargs=inputs)
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        states = output if isinstance(output, Tensor) else output[0]
    if states.dim() == 3 and "attention_mask" in inputs:
        weights = inputs["attention_mask"].to(states).unsqueeze(-1)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    if states.dim() == 3:
        return states.mean(1)
    return states.flatten(2).mean(2) if states.dim() == 4 else states.flatten(1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
