"""Models that transformers lacks."""

from .classifier import FeedForwardClassifier, FeedForwardClassifierConfig
from .cnn import ConvNetConfig, ConvNetForImageClassification, ConvNetModel
from .elmo import ElmoConfig, ElmoForBidirectionalLM, ElmoForSequenceClassification, ElmoModel, ElmoTokenizer

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
]
