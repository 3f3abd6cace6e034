"""The orders of rows, and what relative influence divides by; the names of columns that hold it.

Relative influence (Barshan, Brunet & Dziugaite, "RelatIF: Identifying Explanatory Training Examples via Relative
Influence", AISTATS 2020) asks of which rows a test loss speaks in particular: rows of large gradient change every
prediction, and head every list by influence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..errors import InputError

ORDERS = ("absolute", "harmful", "helpful", "relative", "self_relative")
NORMS = {"gradient": ("gradient_norm",), "self": ("gradient_norm", "self_influence")}  # setting → columns
DIVISORS = {"relative": "gradient_norm", "self_relative": "self_influence"}  # order → column


def columns_of(norms: str | None) -> tuple[str, ...]:
    """The columns that the setting `norms` of a scoring adds.

    >>> columns_of("gradient"), columns_of(None)
    (('gradient_norm',), ())
    """
    if norms is not None and norms not in NORMS:
        raise InputError(f"norms is {norms!r}; expected one of {list(NORMS)}, or None for no norms.")
    return () if norms is None else NORMS[norms]


def relative(influence: np.ndarray, by: str, divisor: np.ndarray) -> np.ndarray:
    """I(x)/‖∇ℓ_x‖ for by="relative", I(x)/√(self-influence) for "self_relative"; 0 where the row has no gradient.

    Args:
        influence: I, (rows,).
        by: the order.
        divisor: its column `DIVISORS[by]`, (rows,), not negative.

    >>> relative(np.array([-6.0, 0.0]), "self_relative", np.array([4.0, 0.0])).tolist()
    [-3.0, 0.0]
    """
    size = np.sqrt(divisor) if by == "self_relative" else divisor
    return np.divide(influence, size, out=np.zeros_like(influence), where=size > 0)


def order_key(by: str, influence: np.ndarray, divisor: np.ndarray | None = None) -> np.ndarray:
    """What increases along an order; `divisor` is its column `DIVISORS[by]`, where it has one.

    >>> order_key("absolute", np.array([1.0, -3.0])).argsort().tolist()
    [1, 0]
    """
    if divisor is not None:
        return -abs(relative(influence, by, divisor))
    return {"absolute": -abs(influence), "harmful": -influence, "helpful": influence}[by]


def relative_keys(influence: np.ndarray, norms: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """`order_key` of every relative order whose column is there, for one query column."""
    for by, column in DIVISORS.items():
        if column in norms:
            yield order_key(by, influence, norms[column])
