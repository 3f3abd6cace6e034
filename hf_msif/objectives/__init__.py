"""A task's per-example losses: masked, causal and bidirectional LM, classification of texts and of images.

An objective of your own subclasses `Objective` and writes two methods, `collate(rows) -> batch` and `losses(call,
batch) -> (sums, counts)`; `Objective` names everything else that an objective may say, with its default.
"""

from ._base import Objective, Terms, checked_objective, numbers_within, with_losses
from .classification import ImageClassification, SequenceClassification
from .language import BidirectionalLM, CausalLM, MaskedLM
from .skipgram import SkipGram
from .tokens import tokenized

__all__ = [
    "BidirectionalLM",
    "CausalLM",
    "ImageClassification",
    "MaskedLM",
    "Objective",
    "SequenceClassification",
    "SkipGram",
    "Terms",
    "checked_objective",
    "numbers_within",
    "tokenized",
    "with_losses",
]
