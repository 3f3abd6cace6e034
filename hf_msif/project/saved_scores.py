"""Reads the scores of a finished run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from ..scoring.scores import Scores


SHARES = "shares.parquet"


def shares_file(folder: Path, scores: Scores) -> Path:
    """Where `msif score` keeps the shares of tokens and layers in these scores, which it wrote to the run folder."""
    file = folder / f"shares-{scores.metadata.get('stage')}.parquet"
    return file if file.is_file() else folder / SHARES


def saved_scores(folder: str, stage: str | None = None) -> Scores:
    """The scores that `msif score` wrote to a run folder.

    Args:
        folder: the `run_dir` of the run.
        stage: the stage whose rows are ranked; defaults to the one in `scores.parquet`. Rankings of other stages lie
            beside it in `scores-STAGE.parquet`.

    Raises:
        InputError: no scores of that stage, or a file that holds none.
    """
    from ..scoring.scores import Scores

    path = Path(folder).expanduser()
    by_stage = {file.stem.removeprefix("scores-"): file for file in sorted(path.glob("scores-*.parquet"))}
    file = path / "scores.parquet"
    if stage is not None:
        file = by_stage.get(stage, file)
    if stage is None and by_stage and not file.is_file():
        raise InputError(f"{file} does not exist, but scores of the stages {list(by_stage)} do: name one of them.")
    try:
        scores = Scores.from_parquet(file)
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"{file} holds no scores ({first_line(error)}); expected what msif score writes.") from error
    scored_stage = scores.metadata.get("stage")
    if stage not in (None, scored_stage):
        stages = sorted({*filter(None, [scored_stage]), *by_stage})
        raise InputError(
            f"{folder} holds scores of the stages {stages}, none of {stage!r}; run msif score --corpus.stage {stage}."
        )
    return scores
