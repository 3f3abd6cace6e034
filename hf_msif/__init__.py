"""hf_msif: which sentences of the pretraining corpus made this finetuned model say this about this tweet?"""

from importlib import import_module

__version__ = "0.1.0"

# Heavy imports wait for first use, so that `msif --help` answers at once.
_HOMES = {
    "MultiStageInfluence": ".influence.multistage",
    "Query": ".influence.query",
    "Scores": ".scoring.scores",
    "Stage": ".influence.stage",
    "InputError": ".errors",
    "explain": ".project.commands.explain",
}
_ROOMS = (
    "adapters",
    "curvature",
    "engine",
    "influence",
    "objectives",
    "scoring",
    "solvers",
    "training",
    "validation",
    "vectors",
)

__all__ = [*_HOMES, *_ROOMS]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
