"""kronfluence: the weights and biases of `nn.Linear` modules; Fisher factors from labels that it samples.

Its factors are averages over sentences of outer products of a sentence's gradient, a sum over M masked words, where
hf_msif's F is a mean over masked words: its matrix is M times hf_msif's, and so is the λ that is added to it.
"""

from __future__ import annotations

import tempfile
from typing import Any

import kronfluence
import torch
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.score import pairwise
from problem import MaskedWords, Problem, Sentences, losses
from torch.distributions import Categorical
from torch.utils.data import TensorDataset

DECODER = "model.cls.predictions.decoder"


class Task(kronfluence.task.Task):
    """The summed loss of a batch, of its labels or of labels drawn from the model."""

    def __init__(self, modules: list[str]):
        self.modules = modules

    def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        input_ids, columns, labels = batch
        logits = model(input_ids, columns)
        if sample:
            labels = Categorical(logits=logits.detach()).sample()
        return losses(logits, labels).sum()

    def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


def _analyzer(masked: MaskedWords, folder: str, decoder: bool = True) -> tuple[kronfluence.Analyzer, int]:
    linear = {n: m for n, m in masked.named_modules() if isinstance(m, torch.nn.Linear) and (decoder or n != DECODER)}
    task = Task(list(linear))
    parameters = sum(p.numel() for module in linear.values() for p in module.parameters())
    model = kronfluence.prepare_model(masked, task)
    options = {"cpu": True, "disable_tqdm": True, "output_dir": folder}
    return kronfluence.Analyzer("peer", model, task, **options), parameters


def _dataset(sentences: Sentences) -> TensorDataset:
    return TensorDataset(*sentences.tensors)


def score(problem: Problem, masked: MaskedWords, clock, batch_size: int = 64) -> dict[str, Any]:
    """Only the pass over the training sentences is timed: `compute_pairwise_scores` calls it once per query batch."""
    inner = pairwise.compute_dot_products_with_loader

    def timed(*args, **kwargs):
        with clock.running():
            return inner(*args, **kwargs)

    pairwise.compute_dot_products_with_loader = timed
    with tempfile.TemporaryDirectory() as folder:
        analyzer, parameters = _analyzer(masked, folder)
        factors = FactorArguments(strategy="identity")
        analyzer.fit_all_factors("factors", _dataset(problem.train), batch_size, factor_args=factors)
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            _dataset(problem.queries),
            _dataset(problem.train),
            per_device_query_batch_size=len(problem.queries),
            per_device_train_batch_size=batch_size,
        )
        scores = analyzer.load_pairwise_scores("scores")
    return {"scores": scores["all_modules"].T, "parameters": parameters}


def fit(
    problem: Problem, masked: MaskedWords, clock, decoder: bool = True, strategy: str = "ekfac", batch_size: int = 64
) -> dict[str, Any]:
    """Covariances, eigendecompositions and corrected eigenvalues; `decoder`: of the output layer, too."""
    with tempfile.TemporaryDirectory() as folder:
        analyzer, parameters = _analyzer(masked, folder, decoder)
        factors = FactorArguments(strategy=strategy)
        with clock.running():
            analyzer.fit_all_factors("factors", _dataset(problem.train), batch_size, factor_args=factors)
    return {"parameters": parameters}


def quality(
    problem: Problem, masked: MaskedWords, clock, method: str, damping: float, batch_size: int = 64
) -> dict[str, Any]:
    torch.manual_seed(0)  # of the sampled labels
    strategy = "identity" if method == "gradient" else method
    with tempfile.TemporaryDirectory() as folder:
        analyzer, parameters = _analyzer(masked, folder)
        factors = FactorArguments(strategy=strategy)
        with clock.running():
            analyzer.fit_all_factors("factors", _dataset(problem.train), batch_size, factor_args=factors)
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                _dataset(problem.queries),
                _dataset(problem.train),
                per_device_query_batch_size=len(problem.queries),
                per_device_train_batch_size=batch_size,
                score_args=ScoreArguments(damping_factor=damping * problem.train.columns.shape[1]),
            )
            scores = analyzer.load_pairwise_scores("scores")
    return {"scores": scores["all_modules"].T, "parameters": parameters}
