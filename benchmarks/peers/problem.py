"""A problem on disk: a masked language model, its masked sentences and its queries, the same ones for every library.

It is made where hf_msif is installed (`prepare.py`) and read in every environment, so this file imports torch and
transformers alone. All sentences of a problem have the same number of tokens and of masked words: there is no padding,
and no library is compared by how it treats it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertForMaskedLM


@dataclass(frozen=True)
class Sentences:
    """N masked sentences of T tokens, M of them masked.

    Attributes:
        input_ids: (N, T), the masks among them.
        columns: (N, M), where the masked tokens are.
        labels: (N, M), what they were.
    """

    input_ids: Tensor
    columns: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice) -> Sentences:
        return Sentences(*(t[rows] for t in self.tensors))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.input_ids, self.columns, self.labels

    @property
    def terms(self) -> int:
        """N of the objective: how many masked words there are."""
        return self.labels.numel()

    def batches(self, size: int) -> list[Sentences]:
        return [self[start : start + size] for start in range(0, len(self), size)]


@dataclass(frozen=True)
class Problem:
    """A model, its training sentences and the queries, whose loss is the measurement.

    Attributes:
        folder: where it lies.
        facts: what `prepare.py` said of it: the rows as texts, the settings of the masks, the damping λ.
        train: the sentences that are scored.
        queries: the sentences whose loss is explained.
    """

    folder: Path
    facts: dict[str, Any]
    train: Sentences
    queries: Sentences

    @classmethod
    def load(cls, folder: str | Path) -> Problem:
        folder = Path(folder)
        tensors = load_file(folder / "sentences.safetensors")
        parts = {
            part: Sentences(*(tensors[f"{part}.{name}"] for name in ("input_ids", "columns", "labels")))
            for part in ("train", "queries")
        }
        return cls(folder, json.loads((folder / "problem.json").read_text()), **parts)

    def first(self, train: int | None = None, queries: int | None = None) -> Problem:
        """The problem with its first sentences and queries only."""
        return Problem(self.folder, self.facts, self.train[slice(train)], self.queries[slice(queries)])

    def model(self) -> BertForMaskedLM:
        """The finished model in float32, in evaluation mode."""
        return BertForMaskedLM.from_pretrained(self.folder / "model", dtype=torch.float32).eval()


class MaskedWords(nn.Module):
    """The model with its head on the masked words only: (N, T) tokens and (N, M) columns to logits (N, M, V).

    The head keeps a dimension of sentences, from which libraries that look into modules tell the sentences apart.
    """

    def __init__(self, model: BertForMaskedLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, columns: Tensor) -> Tensor:
        states = self.model.bert(input_ids=input_ids).last_hidden_state
        return self.model.cls(states.gather(1, columns.unsqueeze(-1).expand(-1, -1, states.shape[-1])))


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """ℓ_i = Σ over the masked words of −log p, (N,), from logits (N, M, V) and labels (N, M)."""
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)


def forward_pass(model: MaskedWords, sentences: Sentences, batch_size: int = 64) -> float:
    """F: one plain forward pass over the sentences, without gradients; returns the sum of their losses."""
    with torch.no_grad():
        return sum(
            losses(model(batch.input_ids, batch.columns), batch.labels).sum().item()
            for batch in sentences.batches(batch_size)
        )


def untied(model: BertForMaskedLM) -> BertForMaskedLM:
    """The model, with the decoder's weight no longer that of the embeddings: gradients of the two are then apart."""
    decoder = model.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    return model
