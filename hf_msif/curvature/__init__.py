"""The curvature of a stage's objective as a linear operator: exact Hessian or Gauss-Newton matrix."""

from .base import Curvature
from .gauss_newton import GaussNewton
from .hessian import Hessian

__all__ = ["Curvature", "GaussNewton", "Hessian"]
