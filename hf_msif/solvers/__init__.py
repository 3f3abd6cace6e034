"""Inverse-curvature-vector products: `solve(operator, b, solver) -> Solution(value, certificate)`."""

from ._base import Solver, as_solver
from ._solve import solve
from .certificate import Certificate, Solution
from .cg import CG
from .closed_form import ClosedForm
from .dense import Dense
from .identity import Identity
from .minres import MinRes
from .operator import Operator
from .squared_cg import SquaredCG

__all__ = [
    "CG",
    "Certificate",
    "ClosedForm",
    "Dense",
    "Identity",
    "MinRes",
    "Operator",
    "Solution",
    "Solver",
    "SquaredCG",
    "as_solver",
    "solve",
]
