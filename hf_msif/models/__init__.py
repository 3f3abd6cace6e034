"""Models that transformers lacks."""

from .classifier import FeedForwardClassifier, FeedForwardClassifierConfig

__all__ = ["FeedForwardClassifier", "FeedForwardClassifierConfig"]
