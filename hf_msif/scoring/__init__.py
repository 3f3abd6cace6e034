"""What a query says of a corpus."""

from .scores import Scores

__all__ = ["Scores"]
