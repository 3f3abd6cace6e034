"""Models that transformers lacks: ELMo, skip-gram, word vectors, convolutions, a feed-forward classifier."""

from .classifier import FeedForwardClassifier, FeedForwardClassifierConfig
from .convnet import ConvNetConfig, ConvNetForImageClassification, ConvNetModel
from .elmo import ElmoConfig, ElmoForBidirectionalLM, ElmoForSequenceClassification, ElmoModel, ElmoTokenizer
from .skipgram import SkipGramConfig, SkipGramForPreTraining, SkipGramForSequenceClassification, SkipGramModel
from .word2vec import from_word2vec

__all__ = [
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "ConvNetModel",
    "ElmoConfig",
    "ElmoForBidirectionalLM",
    "ElmoForSequenceClassification",
    "ElmoModel",
    "ElmoTokenizer",
    "FeedForwardClassifier",
    "FeedForwardClassifierConfig",
    "SkipGramConfig",
    "SkipGramForPreTraining",
    "SkipGramForSequenceClassification",
    "SkipGramModel",
    "from_word2vec",
]
