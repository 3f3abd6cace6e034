"""Replaced-token detection, ELECTRA's task: which tokens of a sentence are not its own?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import InputError
from ._base import Batch, Rows, Terms, logits_of
from .corruption import Corruption
from .tokens import check_length


@dataclass(frozen=True)
class ReplacedTokenDetection(Corruption):
    """Replaced-token detection with replacements that are a pure function of (seed, example id, draw).

    ℓ_i = (1/D) Σ_draws Σ_t −log p(replaced_t | corrupted sentence), over all real tokens t, p(1) = sigmoid(z_t): the
    loss of ELECTRA's discriminator (Clark et al., 2020). The tokens to be replaced are chosen as `MaskedLM` chooses
    its masks. Their substitutes are ordinary tokens of the vocabulary, each as likely as any other, in the place of a
    generator's; one that equals the token is none, as in ELECTRA.

    Args:
        tokenizer: the model's tokenizer.
        seed: of the replacements.
        mask_probability: p, the share of the ordinary tokens that is replaced; with folds 1/K, K being an integer.
        draws: D, the number of corrupted sentences per row, whose losses are averaged.
        first_draw: number of the first draw; epoch e of training takes the draws from first_draw + e · draws.
        masks: "random", or "folds", by which a round of K draws replaces each token once.
        static: training keeps the same replacements in every epoch, and influence has these, too.
        max_length: tokens after which a sentence is cut, and counted as truncated; defaults to the tokenizer's limit.
        reduction: "token" (N counts real tokens, as Hugging Face trains) or "example" (each sentence is the mean of
            its terms and counts once).
        text_column: where the sentence is. Rows without this column may hold `input_ids`, tokenised already.

    Raises:
        InputError: settings out of range, among them a `max_length` (or limit of the tokenizer) without room for an
            ordinary token; a model without one logit per token.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    seed: int = 0
    mask_probability: float = 0.15
    draws: int = 1
    first_draw: int = 0
    masks: str = "random"
    static: bool = False
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"

    auto_class: ClassVar[str] = "AutoModelForPreTraining"

    def __post_init__(self):
        self._check_reduction()
        self._check_draws()
        check_length(self.tokenizer, self.max_length, "ReplacedTokenDetection")

    def collate(self, rows: Rows) -> Batch:
        tokenizer = self.tokenizer
        vocabulary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        batch, truncated, lines, columns, _, substitutes = self._corrupted(rows, len(vocabulary))
        inputs = batch["input_ids"].numpy()
        original = inputs.copy()
        inputs[lines, columns] = vocabulary[substitutes]
        return batch | {"labels": torch.from_numpy((inputs != original).astype(np.int64)), "truncated": truncated}

    def _numbers(self, batch: Batch) -> Tensor:
        numbers = batch["attention_mask"].sum(1).to(torch.get_default_dtype()) / self.draws
        return numbers.new_zeros(len(batch["truncated"])).index_add(0, batch["owners"], numbers)

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The real tokens, one draw after the other."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        logits = logits_of(call(**inputs), "ReplacedTokenDetection", 2)
        lines, columns = batch["attention_mask"].nonzero(as_tuple=True)
        if logits.shape != batch["input_ids"].shape:
            raise InputError(
                f"ReplacedTokenDetection expects one logit per token, but the model returned shape "
                f"{tuple(logits.shape)} for {tuple(batch['input_ids'].shape)} tokens: give the discriminator, "
                "ElectraForPreTraining."
            )
        chosen = logits[lines, columns]
        labels = batch["labels"][lines, columns].to(chosen)
        losses = binary_cross_entropy_with_logits(chosen, labels, reduction="none") / self.draws
        return Terms(losses, batch["owners"][lines], columns)
