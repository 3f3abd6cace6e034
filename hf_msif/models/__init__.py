"""Models that transformers lacks."""

from .classifier import FeedForwardClassifier, FeedForwardClassifierConfig
from .cnn import ConvNetConfig, ConvNetForImageClassification, ConvNetModel

__all__ = [
    "ConvNetConfig",
    "ConvNetForImageClassification",
    "ConvNetModel",
    "FeedForwardClassifier",
    "FeedForwardClassifierConfig",
]
