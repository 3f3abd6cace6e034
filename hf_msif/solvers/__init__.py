"""Inverse-curvature-vector products: `solve(operator, b, solver) -> Solution(value, certificate)`."""

from ._base import Problem, Solver, as_solver
from ._solve import problem, solve
from .auto import Auto
from .block_cg import BlockCG
from .certificate import Certificate, Solution
from .cg import CG
from .closed_form import ClosedForm
from .dense import Dense
from .forecast import Forecast, forecast
from .identity import Identity
from .minres import MinRes
from .nystrom import Nystrom
from .operator import Operator
from .preconditioner import Preconditioner
from .squared_cg import SquaredCG
from .stochastic import Stochastic

__all__ = [
    "CG",
    "Auto",
    "BlockCG",
    "Certificate",
    "ClosedForm",
    "Dense",
    "Forecast",
    "Identity",
    "MinRes",
    "Nystrom",
    "Operator",
    "Preconditioner",
    "Problem",
    "Solution",
    "Solver",
    "SquaredCG",
    "Stochastic",
    "as_solver",
    "forecast",
    "problem",
    "solve",
]
