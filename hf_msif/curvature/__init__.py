"""The curvature of a stage's objective as a linear operator: exact Hessian, Gauss-Newton matrix, or EK-FAC of it."""

from .base import Curvature
from .ekfac import EKFAC
from .gauss_newton import GaussNewton
from .hessian import Hessian
from .preconditioner import EKFACPreconditioner

__all__ = ["EKFAC", "Curvature", "EKFACPreconditioner", "GaussNewton", "Hessian"]
