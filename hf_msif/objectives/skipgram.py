"""The task of word2vec: skip-gram with negative sampling, `objectives.SkipGram`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..errors import InputError
from ._base import Batch, Rows, SumOfTerms, Terms
from .tokens import check_length, encode, ordinary_tokens, seeded


@dataclass(frozen=True)
class SkipGram(SumOfTerms):
    """Skip-gram with negative sampling (Mikolov et al., 2013, eq. (4)), for `hf_msif.models.SkipGramForPreTraining`:

    ℓ_i = Σ_(c,o) [ −log σ(u_o · v_c) − (1/D) Σ_draws Σ_{k=1..K} log σ(−u_{n_k} · v_c) ]

    over all pairs of a centre c and a context o among a sentence's ordinary tokens, at most `window` apart, every
    ordered pair once. The K negatives n_k of a pair are drawn from unigram frequencies to the power of 3/4, a pure
    function of (seed, example id, draw); one may be o itself, as in the paper. The window does not shrink at random,
    and frequent words are not left out.

    Args:
        tokenizer: any; its special tokens are neither centre nor context.
        unigrams: how often each token occurs, shape (vocabulary,); or None, and `fitted(rows)` counts them. A constant
            of the objective: a removed sentence stays in it.
        seed: of the negatives.
        window: most tokens from centre to context.
        negatives: K.
        power: of the frequencies.
        draws: D, the number of sets of negatives, whose losses are averaged.
        first_draw: number of the first draw; epoch e of training takes the draws from first_draw + e · draws.
        static: training keeps the same negatives in every epoch instead.
        max_length: tokens after which a sentence is cut, and counted as truncated; defaults to the tokenizer's limit.
        reduction: "token" (N counts pairs) or "example" (each sentence is the mean of its terms and counts once).
        text_column: where the sentence is. Rows without this column may hold `input_ids`, tokenised already.

    Raises:
        InputError: an unknown `reduction`, settings below 1, a `max_length` (or limit of the tokenizer) without room
            for two words, or unigrams that are not the vocabulary's.

    >>> import transformers
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from hf_msif.models import SkipGramConfig, SkipGramForPreTraining
    >>> words = Tokenizer(models.WordLevel({"we": 0, "vote": 1, "today": 2}, unk_token="we"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    >>> rows = [{"example_id": 0, "text": "we vote today"}]
    >>> objective = SkipGram(tokenizer, window=1, negatives=5).fitted(rows)
    >>> sums, counts = objective.losses(SkipGramForPreTraining(SkipGramConfig(3, 4)), objective.collate(rows))
    >>> counts.item(), round(sums.item(), 4)  # we-vote, vote-we, vote-today, today-vote: 4 · 6 log 2 to begin with
    (4.0, 16.6355)
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    unigrams: Sequence[float] | np.ndarray | None = field(default=None, repr=False, compare=False)
    seed: int = 0
    window: int = 5
    negatives: int = 5
    power: float = 0.75
    draws: int = 1
    first_draw: int = 0
    static: bool = False
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"
    unigrams_sha256: str | None = field(default=None, init=False)  # stands for the unigrams in metadata

    auto_class: ClassVar[str] = "AutoModelForPreTraining"

    def __post_init__(self):
        self._check_reduction()
        for name in ("window", "negatives", "draws"):
            if getattr(self, name) < 1:
                raise InputError(f"SkipGram got {name}={getattr(self, name)}; expected at least 1.")
        check_length(self.tokenizer, self.max_length, "SkipGram", ordinary=2)
        if self.unigrams is None:
            return
        counts = np.asarray(self.unigrams, dtype=np.float64)
        if counts.shape != (len(self.tokenizer),) or not (counts >= 0).all() or not 0 < counts.sum() < np.inf:
            raise InputError(
                f"SkipGram got unigrams of shape {counts.shape}; expected how often each of the tokenizer's "
                f"{len(self.tokenizer):,} tokens occurs, none below 0 and some above: SkipGram(...).fitted(rows)."
            )
        object.__setattr__(self, "unigrams", counts)
        object.__setattr__(self, "unigrams_sha256", hashlib.sha256(counts.tobytes()).hexdigest())

    def of_epoch(self, epoch: int) -> SkipGram:
        """The objective with the negatives of an epoch of training; with `static` negatives, itself."""
        return self if self.static else replace(self, first_draw=self.first_draw + epoch * self.draws)

    @property
    def is_fitted(self) -> bool:
        """Whether there are unigrams to draw negatives from."""
        return self.unigrams is not None

    def fitted(self, rows: Iterable[Mapping[str, Any]]) -> SkipGram:
        """The objective with the frequencies of these rows' ordinary tokens as its unigrams.

        Raises:
            InputError: rows without a text, or without an ordinary token.
        """
        counts, table = np.zeros(len(self.tokenizer)), list(rows)
        for start in range(0, len(table), 1024):
            for words in self._sentences(table[start : start + 1024])[0]:
                np.add.at(counts, words, 1)
        if not counts.any():
            raise InputError(f"none of the {len(table)} rows has a token to count: are their texts empty?")
        return replace(self, unigrams=counts)

    @cached_property
    def _cumulative(self) -> np.ndarray:
        # 0 to any power stays without noise, also to the power of 0.
        unigrams = np.asarray(self.unigrams)
        noise = np.where(unigrams > 0, np.maximum(unigrams, 1e-300) ** self.power, 0.0)
        return np.cumsum(noise / noise.sum())

    def _sentences(self, rows: Rows) -> tuple[list[np.ndarray], Tensor]:
        """The ordinary tokens of each row, and which rows were cut."""
        encoded, truncated = encode(self, rows)
        ids, ordinary = encoded["input_ids"].long().numpy(), ordinary_tokens(self.tokenizer, encoded)
        return [line[is_word] for line, is_word in zip(ids, ordinary, strict=True)], truncated

    def _noise(self, example_id: Any, draw: int, pairs: int) -> np.ndarray:
        uniform = seeded(self.seed, example_id, draw).random((pairs, self.negatives))
        return np.searchsorted(self._cumulative, uniform * self._cumulative[-1], side="right")

    inputs_per_row = None  # as many as there are pairs in its sentence

    def collate(self, rows: Rows) -> Batch:
        """All P pairs of the rows, without padding: `input_ids` (P,) has the centres, `candidates` (P, 1 + K D) a
        context and its negatives, `rows` (P,) the row of each pair."""
        if self.unigrams is None:
            raise InputError("SkipGram has no unigrams to draw negatives from; take SkipGram(...).fitted(rows).")
        sentences, truncated = self._sentences(rows)
        centres, candidates, owners = [], [], []
        for i, (row, words) in enumerate(zip(rows, sentences, strict=True)):
            place = np.arange(len(words))
            distance = np.abs(place[:, None] - place)
            centre, context = np.nonzero((distance > 0) & (distance <= self.window))
            draws = range(self.first_draw, self.first_draw + self.draws)
            noise = [self._noise(row["example_id"], draw, len(centre)) for draw in draws]
            centres.append(words[centre])
            candidates.append(np.column_stack([words[context], *noise]))
            owners.append(np.full(len(centre), i))
        batch = {"input_ids": centres, "candidates": candidates, "rows": owners}
        return {key: torch.from_numpy(np.concatenate(parts)) for key, parts in batch.items()} | {
            "truncated": truncated
        }

    def _numbers(self, batch: Batch) -> Tensor:
        return torch.bincount(batch["rows"], minlength=len(batch["truncated"])).to(torch.get_default_dtype())

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The pairs, centre by centre, each with the negatives of all draws; the target of a pair is its context."""
        candidates = batch["candidates"].unsqueeze(1)  # each pair a sentence of one word
        output = call(input_ids=batch["input_ids"].unsqueeze(1), candidates=candidates)
        logits = getattr(output, "logits", None)
        if logits is None or logits.shape != candidates.shape:
            returned = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise InputError(
                f"SkipGram needs a model that compares each token with its candidates, such as "
                f"SkipGramForPreTraining; {type(output).__name__} has {returned}."
            )
        losses = -logsigmoid(logits[:, 0, 0]) - logsigmoid(-logits[:, 0, 1:]).sum(1) / self.draws
        return Terms(losses, batch["rows"], targets=batch["candidates"][:, 0])
