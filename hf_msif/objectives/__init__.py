"""A task's per-example losses: masked, causal and bidirectional LM, classification of texts and of images.

An objective is any object with two methods: `collate(rows) -> batch`, where rows are dicts that carry `example_id`
and a batch is a dict of tensors, and `losses(call, batch) -> (sums, counts)`, both of shape (B,), where
`call(**inputs)` runs the model with the parameters under study. ℓ_i is the *sum* over the counted terms of example i,
so that the stage's objective is Σ ℓ_i / Σ counts: one division at the end, never a mean of batch means. A third
method, `counts(batch)`, is optional and spares a forward pass where only N is wanted. An attribute `text_column` names
the text by whose length rows are put into batches ("text" where there is none). On a GPU another thread calls
`collate`, one call at a time.
"""

from ._base import tokenized
from .classification import ImageClassification, SequenceClassification
from .language import BidirectionalLM, CausalLM, MaskedLM, of_epoch
from .skipgram import SkipGram

__all__ = [
    "BidirectionalLM",
    "CausalLM",
    "ImageClassification",
    "MaskedLM",
    "SequenceClassification",
    "SkipGram",
    "of_epoch",
    "tokenized",
]
