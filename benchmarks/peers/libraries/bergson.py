"""bergson: weights and biases of the `nn.Linear` modules under `model.base_model`: those of the head are left out.

It compares the logits of every position with the label of the *next* one, also for a masked language model, without a
word. Here the labels are shifted by one position against that, so that its loss is the masked language model's; it
computes the logits of all positions.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from bergson.collector.collector import CollectorComputer
from bergson.collector.in_memory_collector import InMemoryCollector
from bergson.config.config import HessianConfig, IndexConfig, InversionConfig
from bergson.gradients import GradientProcessor
from bergson.hessians.hessian_approximations import fit_factored_hessians
from bergson.hessians.preconditioner import FactoredPreconditioner
from bergson.score.score_writer import InMemorySequenceScoreWriter
from bergson.score.scorer import Scorer
from datasets import Dataset
from problem import MaskedWords, Problem, Sentences

logging.disable(logging.INFO)


def _dataset(sentences: Sentences) -> Dataset:
    rows, shifted = torch.arange(len(sentences)).unsqueeze(1), torch.full_like(sentences.input_ids, -100)
    shifted[rows, sentences.columns + 1] = sentences.labels  # position t is compared with label t + 1
    tokens = sentences.input_ids.tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": shifted.tolist(), "length": [len(t) for t in tokens]})


def _batches(sentences: Sentences, size: int) -> list[list[int]]:
    return [part.tolist() for part in torch.arange(len(sentences)).split(size)]


def _config(folder: str) -> IndexConfig:
    config = IndexConfig(run_path=str(Path(folder) / "run"), include_bias=True, loss_reduction="sum")
    config.partial_run_path.mkdir(parents=True, exist_ok=True)
    return config


def _collect(
    masked: MaskedWords, sentences: Sentences, config: IndexConfig, batch_size: int, scorer: Scorer | None
) -> InMemoryCollector:
    """Per-sentence gradients of all modules, kept (no scorer) or scored batch by batch."""
    model, data = masked.model, _dataset(sentences)
    processor = GradientProcessor(include_bias=True)
    collector = InMemoryCollector(
        model=model.base_model, data=data, cfg=config, processor=processor, scorer=scorer, skip_hessians=True
    )
    batches = _batches(sentences, batch_size)
    CollectorComputer(model, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks("pass")
    return collector


def _scorer(queries: dict[str, torch.Tensor], sentences: Sentences) -> Scorer:
    columns = len(next(iter(queries.values())))
    writer = InMemorySequenceScoreWriter(len(sentences), columns)
    return Scorer(queries, list(queries), writer, torch.device("cpu"), torch.float32)


def _parameters(queries: dict[str, torch.Tensor]) -> int:
    return sum(t.shape[1] for t in queries.values())


def score(problem: Problem, masked: MaskedWords, clock, batch_size: int = 64) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder)
        queries = _collect(masked, problem.queries, config, 4, None).gradients
        scorer = _scorer(queries, problem.train)
        with clock.running():
            _collect(masked, problem.train, config, batch_size, scorer)
    return {"scores": scorer.writer.scores, "parameters": _parameters(queries)}


def _fit(problem: Problem, masked: MaskedWords, config: IndexConfig, batch_size: int, corrected: bool) -> None:
    fit_factored_hessians(
        masked.model,
        _dataset(problem.train),
        config,
        HessianConfig(method="kfac", ev_correction=corrected),
        target_modules=None,
        attention_cfgs={},
        batches=_batches(problem.train, batch_size),
        path=str(config.partial_run_path),
        do_eigendecomposition=True,
    )


def fit(problem: Problem, masked: MaskedWords, clock, batch_size: int = 64) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder)
        with clock.running():
            _fit(problem, masked, config, batch_size, corrected=True)
    linear = [m for m in masked.model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    return {"parameters": sum(p.numel() for module in linear for p in module.parameters())}


def quality(
    problem: Problem, masked: MaskedWords, clock, method: str, damping: float, batch_size: int = 64
) -> dict[str, Any]:
    torch.manual_seed(0)  # of the sampled labels
    with tempfile.TemporaryDirectory() as folder:
        config = _config(folder)
        with clock.running():
            queries = _collect(masked, problem.queries, config, batch_size, None).gradients
            if method != "gradient":
                _fit(problem, masked, config, batch_size, corrected=method == "ekfac")
                # As kronfluence's, its matrix is M times hf_msif's, M the masked words per sentence.
                absolute = damping * problem.train.columns.shape[1]
                inverse = FactoredPreconditioner.from_path(
                    config.partial_run_path,
                    inversion_cfg=InversionConfig("absolute_damped_inverse", absolute),
                    ev_correction=method == "ekfac",
                )
                queries = {name: t.flatten(1) for name, t in inverse.apply(queries).items()}
            scorer = _scorer(queries, problem.train)
            _collect(masked, problem.train, config, batch_size, scorer)
    return {"scores": scorer.writer.scores, "parameters": _parameters(queries)}
