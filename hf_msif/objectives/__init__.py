"""A task's per-example losses: language models of all kinds, and classification of texts, words and images.

An objective of your own subclasses `Objective` and writes two methods, `collate(rows) -> batch` and `losses(call,
batch) -> (sums, counts)`; `Objective` names everything else that an objective may say, with its default.
"""

from ._base import Objective, Terms, numbers_within, with_losses
from .chunks import chunk_rows
from .classification import ImageClassification, SequenceClassification
from .language import BidirectionalLM, CausalLM, MaskedLM
from .lengths import checked_objective, within_positions
from .multi_label import MultiLabel
from .next_sentence import NextSentenceMaskedLM
from .regression import Regression
from .replaced_tokens import ReplacedTokenDetection
from .sequence_to_sequence import Seq2SeqLM
from .skipgram import SkipGram
from .token_classification import TokenClassification
from .tokens import token_spans, tokenized

__all__ = [
    "BidirectionalLM",
    "CausalLM",
    "ImageClassification",
    "MaskedLM",
    "MultiLabel",
    "NextSentenceMaskedLM",
    "Objective",
    "Regression",
    "ReplacedTokenDetection",
    "Seq2SeqLM",
    "SequenceClassification",
    "SkipGram",
    "Terms",
    "TokenClassification",
    "checked_objective",
    "chunk_rows",
    "numbers_within",
    "token_spans",
    "tokenized",
    "with_losses",
    "within_positions",
]
