"""F of a stage, and what minimises it: Hugging Face's `Trainer`, recorded runs, Newton's method, scikit-learn."""

from importlib import import_module

from .evaluation import evaluate, mistakes
from .polish import PolishReport, polish
from .record import record
from .saving import save

# Name → module. Hugging Face's Trainer takes seconds to import, and most commands do not train.
_LAZY = {"RecordCallback": ".callback", "train": ".trainer"}

__all__ = ["PolishReport", "RecordCallback", "evaluate", "mistakes", "polish", "record", "save", "train"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
