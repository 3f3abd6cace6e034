"""The loss of a target text given a source text, for encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_msif.objectives._base import Batch, Rows, SumOfTerms, Terms, logits_of
from hf_msif.objectives.tokens import texts_of, tokenize


@dataclass(frozen=True)
class Seq2SeqLM(SumOfTerms):
    """ℓ_i = Σ_t −log p(target_t | source, targets before it); the decoder starts with the tokenizer's first token."""

    tokenizer: Any = None
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"

    def collate(self, rows: Rows) -> Batch:
        source, truncated = tokenize(self.tokenizer, texts_of(rows, self.text_column), self.max_length)
        target, _ = tokenize(self.tokenizer, texts_of(rows, "target"), self.max_length)
        return {
            **{key: source[key] for key in ("input_ids", "attention_mask")},
            "targets": target["input_ids"],
            "target_mask": target["attention_mask"],
            "truncated": truncated,
        }

    def _numbers(self, batch: Batch) -> Tensor:
        return batch["target_mask"][:, 1:].sum(1).to(torch.get_default_dtype())

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        targets, mask = batch["targets"], batch["target_mask"]
        source = {key: batch[key] for key in ("input_ids", "attention_mask")}
        output = call(**source, decoder_input_ids=targets, decoder_attention_mask=mask)
        owners, before = mask[:, 1:].nonzero(as_tuple=True)
        logits, labels = logits_of(output, "Seq2SeqLM", 3)[owners, before], targets[owners, before + 1]
        return Terms(cross_entropy(logits, labels, reduction="none"), owners, before + 1, labels)
