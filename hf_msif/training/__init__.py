"""F of a stage, and what minimises it: a `Trainer`, recorded runs, Newton's method, scikit-learn."""

from importlib import import_module

from .evaluation import evaluate, mistakes
from .polish import PolishReport, polish
from .record import record

# Hugging Face's Trainer takes seconds to import, and most commands do not train.
_HOMES = {
    "RecordCallback": ".callback",
    "save": ".trainer",
    "train": ".trainer",
}

__all__ = ["PolishReport", "RecordCallback", "evaluate", "mistakes", "polish", "record", "save", "train"]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
