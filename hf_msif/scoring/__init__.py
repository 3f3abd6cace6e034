"""What a query says of a corpus."""

from .ensemble import mean
from .scores import Scores

__all__ = ["Scores", "mean"]
