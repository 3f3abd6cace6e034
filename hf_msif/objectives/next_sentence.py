"""BERT's and ALBERT's own pretraining: masked words, and whether the second text follows the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from ..errors import InputError
from ._base import Batch, Rows, Terms
from .chunks import Windows, one_window_per_row
from .classification import pair_content
from .language import MaskedLM
from .tokens import encode

PAIR_LOGITS = ("seq_relationship_logits", "sop_logits")  # the latter of ALBERT: are the sentences in their order?


@dataclass(frozen=True)
class NextSentenceMaskedLM(MaskedLM):
    """Masked LM with next-sentence prediction, as BERT was pretrained (`BertForPreTraining`), or with that of the
    order of two sentences, as ALBERT was (`AlbertForPreTraining`).

    ℓ_i = (1/D) Σ_draws Σ_masked [−log p(token | masked pair) + (−log p(next | masked pair))]

    The second term is that of the sentence, once for each masked token: in the mean over masked tokens, F is the sum
    of both of BERT's means where all rows have equally many masks. With `reduction="example"` a row is the mean of
    its masked tokens plus its one next-sentence loss, and counts once.

    Args:
        text_pair_column: where the second text is.
        next_sentence_column: where the label is: 0, the second text follows the first; 1, it does not, or precedes it
            (Hugging Face's numbers).

    The other settings are those of `MaskedLM`; `chunk` is refused.

    Raises:
        InputError: as `MaskedLM`, or a model without logits of both kinds, or a label other than 0 and 1.
    """

    text_pair_column: str = "text_pair"
    next_sentence_column: str = "next_sentence_label"

    auto_class: ClassVar[str] = "AutoModelForPreTraining"
    columns: ClassVar[tuple[str, ...]] = ("text_pair", "next_sentence_label")

    def __post_init__(self):
        super().__post_init__()
        if self.chunk is not None:
            raise InputError(
                f"NextSentenceMaskedLM got chunk={self.chunk}; expected None: a pair is read in one window, and cut "
                "at max_length."
            )

    def _windows(self, rows: Rows) -> Windows:
        return one_window_per_row(*encode(self, rows, self.text_pair_column))

    def collate(self, rows: Rows) -> Batch:
        labels = []
        for row in rows:
            value = row.get(self.next_sentence_column)
            if isinstance(value, bool) or value not in (0, 1):
                raise InputError(
                    f"row {row.get('example_id')!r} has {value!r} in column {self.next_sentence_column!r}; expected 0 "
                    "where the second text follows the first, and 1 where it does not."
                )
            labels.append(int(value))
        return super().collate(rows) | {"next_sentence_labels": torch.tensor(labels)}

    def content(self, row: Mapping[str, Any]) -> Any:
        """Both texts, with a bar between them."""
        return pair_content(super().content(row), row, self.text_pair_column)

    def _terms(self, call: Callable, batch: Batch) -> Terms:
        """The masked tokens, one draw after the other, each with the next-sentence loss of its draw."""
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in batch}
        output = call(**inputs, positions=(batch["rows"], batch["columns"]))
        words, *kinds = (getattr(output, name, None) for name in ("prediction_logits", *PAIR_LOGITS))
        pairs = next((logits for logits in kinds if logits is not None), None)
        if words is None or pairs is None:
            raise InputError(
                f"NextSentenceMaskedLM needs a model with prediction_logits and {' or '.join(PAIR_LOGITS)}, such as "
                f"BertForPreTraining; {type(output).__name__} has not both: take MaskedLM for this model."
            )
        terms = self._masked_terms(words, batch)
        labels = batch["next_sentence_labels"][batch["owners"]]
        next_sentence = cross_entropy(pairs, labels, reduction="none")[batch["rows"]] / self.draws
        return terms._replace(losses=terms.losses + next_sentence)
