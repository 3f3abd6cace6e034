"""Language models: masked, causal and bidirectional; a sentence's loss is the sum over its predicted tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import InputError
from ._base import Batch, Rows, SumOfTerms, Terms, logits_of
from .tokens import check_length, ordinary_tokens, seeded, texts_of, tokenize


@dataclass(frozen=True)
class MaskedLM(SumOfTerms):
    """Masked language modelling with masks that are a pure function of (seed, example id, draw).

    ℓ_i = (1/D) Σ_draws Σ_masked −log p(token | masked sentence). The head runs on the masked tokens only.

    - masks="random", as BERT is trained: each draw chooses max(1, round(p·n)) of a sentence's n ordinary tokens, of
      which 80 % become `[MASK]`, 10 % a random token, 10 % stay (Devlin et al., 2019).
    - masks="folds", for influence: the tokens are shuffled and cut into K = 1/p folds. Each draw of a round of K masks
      one of them, so that a round masks each token exactly once, where independent draws leave to chance which tokens
      a score knows; the next round shuffles anew. All become `[MASK]`. (A fold of fewer than K tokens may be empty.)

    Args:
        tokenizer: a tokenizer with a mask token.
        seed: of the masks.
        mask_probability: p; with folds 1/K, K being an integer.
        draws: D, the number of masks per sentence, whose losses are averaged (the variance of a score falls as 1/D,
            the cost grows as D).
        first_draw: number of the first draw; epoch e of training takes the draws from first_draw + e · draws.
        masks: "random" or "folds".
        static: training keeps the same masks in every epoch instead.
        max_length: tokens after which a sentence is cut, and counted as truncated; defaults to the tokenizer's limit.
        reduction: "token" (N counts masked tokens, as Hugging Face trains) or "example" (each sentence is the mean of
            its terms and counts once).
        text_column: where the sentence is.

    Raises:
        InputError: a tokenizer without a mask token, or settings out of range, among them a `max_length` (or limit of
            the tokenizer) without room for an ordinary token.
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

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"

    def __post_init__(self):
        self._check_reduction()
        if self.tokenizer.mask_token_id is None:
            raise InputError(
                "MaskedLM needs a tokenizer with a mask token; this one has none: use CausalLM for this model."
            )
        if not 0 < self.mask_probability <= 1 or self.draws < 1:
            raise InputError(
                f"MaskedLM got mask_probability={self.mask_probability} and draws={self.draws}; expected a "
                "probability in (0, 1] and at least one draw."
            )
        if self.masks not in ("random", "folds"):
            raise InputError(f"MaskedLM got masks={self.masks!r}; expected 'random' or 'folds'.")
        if self.masks == "folds" and abs(self._folds_per_round * self.mask_probability - 1) > 0.01:
            raise InputError(
                f"MaskedLM got masks='folds' and mask_probability={self.mask_probability}; expected 1/K with an "
                f"integer K, so that K folds cover a sentence: give 1/{self._folds_per_round}."
            )
        check_length(self.tokenizer, self.max_length, "MaskedLM")

    def collate(self, rows: Rows) -> Batch:
        encoded, truncated = tokenize(self.tokenizer, texts_of(rows, self.text_column), self.max_length)
        inputs = np.repeat(encoded["input_ids"].numpy(), self.draws, axis=0)
        lines, columns, actions, substitutes = [], [], [], []
        for i, (row, ordinary) in enumerate(zip(rows, ordinary_tokens(self.tokenizer, encoded), strict=True)):
            (candidates,) = ordinary.nonzero()
            if len(candidates) == 0:
                continue
            draws = (self._folds if self.masks == "folds" else self._random)(row["example_id"], candidates)
            for d, (places, action, substitute) in enumerate(draws):
                lines += [i * self.draws + d] * len(places)
                columns.append(places)
                actions.append(action)
                substitutes.append(substitute)
        where = np.array(lines, dtype=np.int64), np.concatenate([np.zeros(0, dtype=np.int64), *columns])
        labels = inputs[where]
        if columns:
            action, substitute = np.concatenate(actions), np.concatenate(substitutes)
            mask = self.tokenizer.mask_token_id
            inputs[where] = np.where(action < 0.8, mask, np.where(action < 0.9, substitute, labels))
        batch = {key: value.repeat_interleave(self.draws, dim=0) for key, value in encoded.items()}
        batch["input_ids"] = torch.from_numpy(inputs)
        batch |= {"rows": torch.from_numpy(where[0]), "columns": torch.from_numpy(where[1])}
        return batch | {"labels": torch.from_numpy(labels), "truncated": truncated}

    @property
    def _draws(self) -> range:
        return range(self.first_draw, self.first_draw + self.draws)

    def _random(self, example_id: Any, candidates: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each draw: places of the masked tokens; a number in [0, 1) for each that says what becomes of it; and
        random tokens."""
        number, vocabulary = max(1, round(self.mask_probability * len(candidates))), len(self.tokenizer)
        for draw in self._draws:
            generator = seeded(self.seed, example_id, draw)
            places = np.sort(generator.choice(candidates, size=number, replace=False))
            yield places, generator.random(number), generator.integers(vocabulary, size=number)

    def _folds(self, example_id: Any, candidates: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The same, of the folds of one round after another; each token becomes `[MASK]`."""
        number, folds = len(candidates), self._folds_per_round
        for draw in self._draws:
            turn, fold = divmod(draw, folds)
            order = seeded(self.seed, example_id, turn).permutation(candidates)
            places = np.sort(order[fold * number // folds : (fold + 1) * number // folds])
            yield places, np.zeros(len(places)), np.zeros(len(places), dtype=np.int64)

    @property
    def _folds_per_round(self) -> int:
        return round(1 / self.mask_probability)

    @property
    def inputs_per_row(self) -> int:  # type: ignore[override]  # a setting decides what is a constant elsewhere
        """`draws`, each with its mask."""
        return self.draws

    def of_epoch(self, epoch: int) -> MaskedLM:
        """The objective with the masks of an epoch of training; with `static` masks, itself."""
        return self if self.static else replace(self, first_draw=self.first_draw + epoch * self.draws)

    def _numbers(self, batch: Batch) -> Tensor:
        size = batch["input_ids"].shape[0]
        counted = torch.bincount(batch["rows"], minlength=size).to(torch.get_default_dtype())
        return counted.view(-1, self.draws).mean(1)

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The masked tokens, one draw after the other."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        logits = logits_of(call(**inputs, positions=(batch["rows"], batch["columns"])), "MaskedLM", 2)
        losses = cross_entropy(logits, batch["labels"], reduction="none") / self.draws
        return Terms(losses, batch["rows"] // self.draws, batch["columns"], batch["labels"])


@dataclass(frozen=True)
class CausalLM(SumOfTerms):
    """Next-token prediction: ℓ_i = Σ_t −log p(token_t | tokens before it), over the real tokens after the first.

    Args:
        tokenizer: the model's tokenizer.
        max_length: tokens after which a text is cut, and counted as truncated; defaults to the tokenizer's limit.
        reduction: "token" (N counts predicted tokens) or "example" (each text is the mean of its terms and counts
            once).
        text_column: where the text is.

    Raises:
        InputError: an unknown `reduction`, or a `max_length` (or limit of the tokenizer) without room for two tokens,
            one of them an ordinary one.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    causal: ClassVar[bool] = True

    def __post_init__(self):
        self._check_reduction()
        check_length(self.tokenizer, self.max_length, "CausalLM", tokens=2)

    def collate(self, rows: Rows) -> Batch:
        batch, truncated = tokenize(self.tokenizer, texts_of(rows, self.text_column), self.max_length)
        return batch | {"truncated": truncated}

    def _numbers(self, batch: Batch) -> Tensor:
        return batch["attention_mask"][:, 1:].sum(1).to(torch.get_default_dtype())

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The tokens after the first, in their order."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = logits_of(call(input_ids=ids, attention_mask=mask), "CausalLM", 3)
        owners, before = mask[:, 1:].nonzero(as_tuple=True)
        targets = ids[owners, before + 1]
        losses = cross_entropy(logits[owners, before], targets, reduction="none")
        return Terms(losses, owners, before + 1, targets)


@dataclass(frozen=True)
class BidirectionalLM(SumOfTerms):
    """Both neighbours of every token, ELMo's task: ℓ_i = Σ_t −log p(token_t | all before it) − log p(token_t | all
    after it), each over the full vocabulary, a sentence's end as the last target of either direction.

    A sentence of n words has 2 (n + 1) terms. Without gradients, the logits are not kept.

    Args:
        tokenizer: an `ElmoTokenizer` with a vocabulary of words.
        max_length: tokens, both ends included, after which a sentence is cut, and counted as truncated; defaults to
            the tokenizer's limit, which is none for an `ElmoTokenizer`.
        reduction: "token" (N counts predicted tokens) or "example" (each sentence is the mean of its terms and counts
            once).
        text_column: where the sentence is.

    Raises:
        InputError: an unknown `reduction`, a tokenizer without a vocabulary of words, or a `max_length` (or limit of
            the tokenizer) without room for a word.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"

    auto_class: ClassVar[str] = "AutoModelForPreTraining"

    def __post_init__(self):
        self._check_reduction()
        if not getattr(self.tokenizer, "words", None):
            raise InputError(
                f"BidirectionalLM got a {type(self.tokenizer).__name__} without words to predict; expected an "
                "ElmoTokenizer with a vocabulary: build one with ElmoTokenizer.train, or `python -m "
                "hf_msif.models.elmo.vocabulary`."
            )
        check_length(self.tokenizer, self.max_length, "BidirectionalLM")

    def collate(self, rows: Rows) -> Batch:
        texts = texts_of(rows, self.text_column)
        batch, truncated = tokenize(self.tokenizer, texts, self.max_length, return_labels=True)
        return batch | {"truncated": truncated}

    def _numbers(self, batch: Batch) -> Tensor:
        return 2 * batch["attention_mask"][:, 1:].sum(1).to(torch.get_default_dtype())

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The words after the first, each predicted from those before it; then the words before the last, each
        predicted from those after it."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        output = call(**inputs, output_logits=torch.is_grad_enabled())
        owners, before = batch["attention_mask"][:, 1:].nonzero(as_tuple=True)
        owners, positions = owners.repeat(2), torch.cat([before + 1, before])
        targets, losses = batch["labels"][owners, positions], getattr(output, "losses", None)
        if losses is None:
            logits = logits_of(output, "BidirectionalLM", 3)
            losses = cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        return Terms(losses.flatten(), owners, positions, targets)

    def token_texts(self, targets: Sequence[int]) -> list[str]:
        """The words of the vocabulary with these ids."""
        return [self.tokenizer.words[i] for i in targets]
