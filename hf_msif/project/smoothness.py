"""Whether the recorded run of the ranked stage can be predicted at all, for `msif diagnose` and `msif validate`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .. import validation
from ..errors import InputError
from .provenance import check_query, check_query_content
from .retraining import retraining
from .saved_scores import saved_scores

if TYPE_CHECKING:
    from ..scoring.scores import Scores
    from .run import Run


def smoothness(project: Run, retrain: validation.WarmStart, scores: Scores | None) -> dict[str, Any]:
    """`validation.metasmoothness` with the predictions of `scores`, None where there are none; and its text."""
    metasmoothness = validation.metasmoothness(retrain, scores, aggregate=project.aggregate)
    return {**metasmoothness.to_dict(), "text": str(metasmoothness)}


def of_own_rows(project: Run, scores: Scores) -> Scores | None:
    """The scores, where all their rows are some that the ranked stage was trained on and can be weighted; or None."""
    own_rows = {row["example_id"] for row in project.rows(project.ranked)}
    return scores if own_rows.issuperset(scores.frame["example_id"]) else None


def check_measurable(project: Run) -> None:
    """Refuses to measure smoothness where it cannot be measured; before anything is computed.

    Raises:
        InputError: a stage is not trained yet, or the ranked one repeats no run; there are several processes; or the
            query in the run folder has other settings.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("--smoothness repeats a training, in one process; expected msif diagnose without a launcher.")
    link = project.config.stages[project.ranked].link
    if link != "unrolled":
        raise InputError(
            f"stage {project.ranked!r} has link={link!r}, and no recorded run that could be repeated; --smoothness "
            "expects a ranked stage with link: unrolled."
        )
    untrained = [name for name in project.names if not project.is_trained(name)]
    if untrained:
        raise InputError(f"stage {untrained[0]!r} is not trained yet, and has no run to repeat: run msif train first.")
    if project.output("scores.parquet").is_file():
        check_query(project, project.folder / "query")


def diagnosed(project: Run) -> dict[str, Any]:
    """The smoothness of the ranked stage's run, with the predictions that lie in the run folder.

    Raises:
        InputError: these are not the present models', tests' or rows', or cannot be read.
    """
    chain, tests = project.chain(project.models()), project.tests()
    retrain = retraining(project, chain, tests, "warm_start")
    assert isinstance(retrain, validation.WarmStart)
    scores = None
    if project.output("scores.parquet").is_file():
        check_query_content(project, chain, tests)
        scores = of_own_rows(project, saved_scores(str(project.folder), project.ranked))
    return smoothness(project, retrain, scores)
