"""The method: stages, their chain, how each is differentiated, and the queries that result."""

from .multistage import MultiStageInfluence
from .query import Query
from .stage import Stage

__all__ = ["MultiStageInfluence", "Query", "Stage"]
