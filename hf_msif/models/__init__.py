"""Models that transformers lacks."""

from .classifier import FeedForwardClassifier, FeedForwardClassifierConfig
from .cnn import ConvNetConfig, ConvNetForImageClassification, ConvNetModel
from .skipgram import (
    SkipGramConfig,
    SkipGramForPreTraining,
    SkipGramForSequenceClassification,
    SkipGramModel,
)
from .word2vec import from_word2vec

__all__ = [
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "ConvNetModel",
    "FeedForwardClassifier",
    "FeedForwardClassifierConfig",
    "SkipGramConfig",
    "SkipGramForPreTraining",
    "SkipGramForSequenceClassification",
    "SkipGramModel",
    "from_word2vec",
]
