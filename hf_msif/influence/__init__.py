"""The method: stages, their chain, how each is differentiated, and the queries that result."""

from .cost import Cost
from .differentiation import Differentiation, DirectCertificate, Retraining, StageSolution
from .direction import Direction
from .multistage import MultiStageInfluence
from .query import Query
from .stage import Stage

__all__ = [
    "Cost",
    "Differentiation",
    "DirectCertificate",
    "Direction",
    "MultiStageInfluence",
    "Query",
    "Retraining",
    "Stage",
    "StageSolution",
]
