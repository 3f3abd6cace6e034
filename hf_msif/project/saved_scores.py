"""Reads the scores of a finished run's folder, and the shares of tokens and layers in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from ..reports.shares import Shares
    from ..scoring.scores import Scores

SHARES = "shares.parquet"


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


def saved_shares(folder: str, scores: Scores) -> Shares | None:
    """The shares of tokens and layers in these scores, which `msif score` wrote to a run folder beside them.

    Args:
        folder: the `run_dir` of the run.
        scores: what `saved_scores` read from it.

    Returns:
        None where there are none, or those of other scores.

    Raises:
        InputError: a file that holds no shares.
    """
    from ..reports.shares import Shares

    path = Path(folder).expanduser()
    of_stage = path / f"shares-{scores.metadata.get('stage')}.parquet"
    return Shares.load(of_stage if of_stage.is_file() else path / SHARES, scores)
