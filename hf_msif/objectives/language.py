"""Language models: masked, causal and bidirectional; a sentence's loss is the sum over its predicted tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import InputError
from ._base import Batch, Rows, SumOfTerms, Terms, logits_of
from .chunks import InChunks
from .corruption import Corruption
from .tokens import check_length, encode, texts_of, tokenize


def refuse_encoder_decoder(model: Any, objective: str, table: str) -> None:
    """Raises an `InputError` for an encoder-decoder that is not in this table of transformers.

    (BART is in that of masked LMs: its decoder reads the masked sentence, too.)
    """
    from transformers.models.auto import modeling_auto

    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    if name not in getattr(modeling_auto, table).values():
        raise InputError(
            f"{name} is an encoder-decoder, which predicts a target from a text; {objective} expects a model that "
            "reads one text: take objectives.Seq2SeqLM (task: sequence-to-sequence), whose rows have a 'text' and a "
            "'target'."
        )


@dataclass(frozen=True)
class MaskedLM(Corruption):
    """Masked language modelling with masks that are a pure function of (seed, example id, draw).

    ℓ_i = (1/D) Σ_draws Σ_masked −log p(token | masked sentence). The head runs on the masked tokens only.

    - masks="random", as BERT is trained: each draw chooses max(1, round(p·n)) of a sentence's n ordinary tokens, of
      which 80 % become `[MASK]`, 10 % a random token, 10 % stay (Devlin et al., 2019).
    - masks="folds", as influence has them (`for_influence`): the tokens are shuffled and cut into K = 1/p folds. Each
      draw of a round of K masks one of them, so that a round masks each token exactly once, where independent draws
      leave to chance which tokens a score knows; the next round shuffles anew. All become `[MASK]`. (Folds of a
      sentence with fewer than K tokens may be empty.)

    Args:
        tokenizer: a tokenizer with a mask token.
        seed: of the masks.
        mask_probability: p; with folds 1/K, K being an integer.
        draws: D, the number of masks per sentence, whose losses are averaged (the variance of a score falls as 1/D,
            the cost grows as D).
        first_draw: number of the first draw; epoch e of training takes the draws from first_draw + e · draws.
        masks: "random" or "folds".
        static: training keeps the same masks in every epoch instead, and influence has these masks, too: they are a
            part of what was minimised.
        max_length: tokens after which a sentence is cut, and counted as truncated; defaults to the tokenizer's limit.
        reduction: "token" (N counts masked tokens, as Hugging Face trains) or "example" (each sentence is the mean of
            its terms and counts once).
        text_column: where the sentence is. Rows without this column may hold `input_ids`, tokenised already.
        chunk: tokens of a window: a document is read in windows instead of being cut, ℓ_i is the sum over them, and
            each token counts in one of them (`chunk_rows`); None: a document is cut.
        stride: tokens that a window has in common with the one before, as context that is not masked.

    Raises:
        InputError: a tokenizer without a mask token, or settings out of range, among them a `max_length` (or limit of
            the tokenizer) without room for an ordinary token; an encoder-decoder that is no masked LM.
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
    chunk: int | None = None
    stride: int = 0

    auto_class: ClassVar[str] = "AutoModelForMaskedLM"

    def __post_init__(self):
        self._check_reduction()
        if self.tokenizer.mask_token_id is None:
            raise InputError(
                f"{type(self).__name__} needs a tokenizer with a mask token; this one has none: use CausalLM for this "
                "model."
            )
        self._check_draws()
        check_length(self.tokenizer, self.max_length if self.chunk is None else self.chunk, type(self).__name__)
        self._check_chunk()

    def check_model(self, model: Any) -> None:
        """Refuses an encoder-decoder that transformers does not list as a masked LM."""
        refuse_encoder_decoder(model, "MaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES")

    def collate(self, rows: Rows) -> Batch:
        batch, truncated, lines, columns, action, substitutes = self._corrupted(rows, len(self.tokenizer))
        inputs = batch["input_ids"].numpy()
        where = lines, columns
        labels = inputs[where]
        shown = np.where(action < 0.9, substitutes, labels)
        inputs[where] = np.where(action < 0.8, self.tokenizer.mask_token_id, shown)
        batch |= {"rows": torch.from_numpy(lines), "columns": torch.from_numpy(columns)}
        return batch | {"labels": torch.from_numpy(labels), "truncated": truncated}

    def collate_masked(self, rows: Rows, spans: Sequence[tuple[int, int]]) -> Batch:
        """A batch in which the tokens of one span per row are masked, and no others; `spans`, (B, 2), are theirs.

        Args:
            rows: as `collate` reads them.
            spans: (first token, one after the last) of each row, special tokens counted.
        """
        batch, truncated = encode(self, rows)
        inputs, real = batch["input_ids"], batch["attention_mask"].bool()
        where, place = torch.tensor(spans).reshape(-1, 2), torch.arange(inputs.shape[1])
        lines, columns = (real & (where[:, :1] <= place) & (place < where[:, 1:])).nonzero(as_tuple=True)
        labels = inputs[lines, columns]
        inputs[lines, columns] = self.tokenizer.mask_token_id
        batch |= {"rows": lines, "columns": columns, "labels": labels, "truncated": truncated, "spans": where}
        return batch | {"owners": torch.arange(len(rows)), "starts": torch.zeros(len(rows), dtype=torch.int64)}

    def _numbers(self, batch: Batch) -> Tensor:
        owners, size = batch["owners"][batch["rows"]], len(batch["truncated"])
        return torch.bincount(owners, minlength=size).to(torch.get_default_dtype()) / self.draws

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The masked tokens, one draw after the other."""
        return self._masked_terms(self._logits(call, batch), batch)

    def _logits(self, call: Callable, batch: Batch) -> Tensor:
        """The logits of the masked tokens, (M, V)."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        return logits_of(call(**inputs, positions=(batch["rows"], batch["columns"])), "MaskedLM", 2)

    def _masked_terms(self, logits: Tensor, batch: Batch) -> Terms:
        losses = cross_entropy(logits, batch["labels"], reduction="none") / self.draws
        positions = batch["columns"] + batch["starts"][batch["rows"]]
        return Terms(losses, batch["owners"][batch["rows"]], positions, batch["labels"])


@dataclass(frozen=True)
class CausalLM(InChunks):
    """Next-token prediction: ℓ_i = Σ_t −log p(token_t | tokens before it), over the real tokens after the first.

    Args:
        tokenizer: the model's tokenizer.
        max_length: tokens after which a text is cut, and counted as truncated; defaults to the tokenizer's limit.
        reduction: "token" (N counts predicted tokens) or "example" (each text is the mean of its terms and counts
            once).
        text_column: where the text is. Rows without this column may hold `input_ids`, tokenised already.
        chunk: tokens of a window: a document is read in windows instead of being cut, ℓ_i is the sum over them, and
            each token is predicted in one of them (`chunk_rows`); None: a document is cut.
        stride: tokens that a window has in common with the one before, from which its first tokens are predicted; at
            least 1.

    Raises:
        InputError: an unknown `reduction`, or a `max_length` (or limit of the tokenizer) without room for two tokens,
            one of them an ordinary one; an encoder-decoder.
    """

    tokenizer: Any = field()  # required, though `Objective` has a default
    max_length: int | None = None
    reduction: str = "token"
    text_column: str = "text"
    chunk: int | None = None
    stride: int = 1

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    causal: ClassVar[bool] = True
    least_stride: ClassVar[int] = 1

    def __post_init__(self):
        self._check_reduction()
        limit = self.max_length if self.chunk is None else self.chunk
        check_length(self.tokenizer, limit, "CausalLM", tokens=2)
        self._check_chunk()

    def check_model(self, model: Any) -> None:
        """Refuses an encoder-decoder."""
        refuse_encoder_decoder(model, "CausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")

    @property
    def inputs_per_row(self) -> int | None:  # type: ignore[override]  # a setting decides what is a constant elsewhere
        """One; None where a row has several windows."""
        return 1 if self.chunk is None else None

    def inputs_of(self, row: Mapping[str, Any]) -> int:
        """The number of the row's windows."""
        return 1 if self.chunk is None else int(self._windows([row]).kept.sum())

    def collate(self, rows: Rows) -> Batch:
        windows = self._windows(rows)
        if self.chunk is None:
            return windows.batch | {"truncated": windows.truncated}
        kept = torch.from_numpy(windows.kept)
        batch = {key: value[kept] for key, value in windows.batch.items()} | {"truncated": windows.truncated}
        arrays = {"counted": windows.counted, "owners": windows.owners, "starts": windows.starts}
        return batch | {key: torch.from_numpy(value)[kept] for key, value in arrays.items()}

    def _numbers(self, batch: Batch) -> Tensor:
        numbers = _counted(batch)[:, 1:].sum(1)
        if "owners" in batch:
            numbers = numbers.new_zeros(len(batch["truncated"])).index_add(0, batch["owners"], numbers)
        return numbers.to(torch.get_default_dtype())

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The tokens after the first, in their order."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = logits_of(call(input_ids=ids, attention_mask=mask), "CausalLM", 3)
        lines, before = _counted(batch)[:, 1:].nonzero(as_tuple=True)
        targets, positions, owners = ids[lines, before + 1], before + 1, lines
        losses = cross_entropy(logits[lines, before], targets, reduction="none")
        if "owners" in batch:
            positions, owners = positions + batch["starts"][lines], batch["owners"][lines]
        return Terms(losses, owners, positions, targets)


def _counted(batch: Batch) -> Tensor:
    """The tokens that count, (I, T): of a document in windows those that each adds, else all real ones."""
    return batch["counted"] if "counted" in batch else batch["attention_mask"]


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
