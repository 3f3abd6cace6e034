"""Sets up the retraining of a configuration's stages, for `msif validate` and `msif cleanse`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import validation
from ..engine import folders
from ..errors import InputError
from . import build, provenance
from .train import FILES_OF_A_TRAINING

if TYPE_CHECKING:
    from ..influence.multistage import MultiStageInfluence
    from .run import Run


def retraining(
    run: Run, chain: MultiStageInfluence, tests: list[dict], how: str, vary: Sequence[str] = ("weights",)
) -> validation.WarmStart | validation.FromScratch:
    """Retrains the configuration's stages without some rows of the ranked stage.

    Args:
        run: of the configuration.
        chain: of `run`; its stages are trained again, and its models stay as they are.
        tests: rows of the last stage whose losses are measured.
        how: "warm_start" goes on from the finished models of the ranked stage and the later ones, "from_scratch"
            trains all stages from new initial weights.
        vary: what another seed of the latter draws, "weights" or "order".

    Raises:
        InputError: `polish` settings that differ between stages, or a warm start of a stage that is not polished.
    """
    stages = [bound.stage for bound in chain.stages]
    polish_settings = {name: build.polish_settings(run.config, name) for name in run.names}
    shared_settings = _shared_polish_settings(polish_settings)
    if how == "warm_start":
        warm_start = validation.WarmStart(stages, tests, stage=run.ranked, **shared_settings)
        retrained = warm_start.retrainings[run.names.index(run.ranked) :]  # earlier stages stay as they are
        names = [retraining.stage.name for retraining in retrained if retraining.polishes]
        unpolished = [name for name in names if polish_settings[name] is None]
        if unpolished:
            _refuse_taken(run, unpolished)
            raise InputError(
                f"stages.{unpolished[0]}.polish is missing: a warm start goes from stationary point to stationary "
                "point. Give polish: {} and train again, or retrain from_scratch."
            )
        return warm_start
    _refuse_taken(run, run.names)
    for name in run.names:
        provenance.check_initial_weights(run, name)
    arguments = [
        run.arguments(name, save_strategy="no") if stage.uses_trainer else None
        for name, stage in run.config.stages.items()
    ]
    polished = [settings is not None for settings in polish_settings.values()]
    return validation.FromScratch(
        stages, tests, run.new_models, arguments, polished, run.ranked, run.config.seed, vary=vary, **shared_settings
    )


@contextmanager
def checkpoint_folders(run: Run, how: str) -> Iterator[None]:
    """Around retrainings "from_scratch", in which a `Trainer` makes the folders of its checkpoints, and may log there.

    Raises:
        InputError: such a folder holds files that the library did not write.
    """
    trained = [name for name, stage in run.config.stages.items() if how == "from_scratch" and stage.uses_trainer]
    checkpoints = [run.checkpoints(name) for name in trained]
    for folder in checkpoints:
        folders.check(folder)
    for folder in checkpoints:
        folders.add_names(folder, "checkpoints of a training", FILES_OF_A_TRAINING)
    try:
        yield
    finally:
        for folder in checkpoints:
            folders.remove_if_empty(folder)


def _refuse_taken(run: Run, names: Sequence[str]) -> None:
    """Refuses stages whose finished model is given: by which training it was made, the configuration does not say."""
    taken = [name for name in names if run.is_taken_as_it_is(name)]
    if taken:
        raise InputError(
            f"stages.{taken[0]} is taken as it is (model.path without training or polish, or with a run from "
            "elsewhere), so it cannot be trained again without some rows; expected its training, or polish, settings, "
            "or a warm start with another stage ranked (--corpus.stage)."
        )


def _shared_polish_settings(polish_settings: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The `polish` settings of all polished stages, which must be the same.

    `method` is left out: it says how a minimum is found and not which one, and a retraining uses the method that fits
    any stage.
    """
    distinct = {
        tuple(sorted((key, value) for key, value in settings.items() if key != "method"))
        for settings in polish_settings.values()
        if settings is not None
    }
    if len(distinct) > 1:
        raise InputError(
            f"the stages' polish settings differ ({polish_settings}), but a retraining polishes all stages alike: "
            "give them the same."
        )
    return dict(distinct.pop()) if distinct else {}


def refuse_streams(run: Run, command: str) -> None:
    """Refuses streamed data, which a retraining cannot go through again without some rows."""
    streamed = [name for name, stage in run.config.stages.items() if stage.data.streaming]
    if streamed:
        raise InputError(
            f"stages.{streamed[0]}.data.streaming is true, but msif {command} trains again and needs the rows at "
            "hand; expected streaming: false, with data.sample where they are too many."
        )


def refuse_measurements(run: Run, command: str) -> None:
    """Refuses a measurement other than the loss, which is what retrainings measure."""
    name = run.config.test.measurement
    if name != "loss":
        raise InputError(
            f"test.measurement is {name}, but msif {command} trains again and measures losses; expected loss, as "
            "--test.measurement loss has it."
        )
