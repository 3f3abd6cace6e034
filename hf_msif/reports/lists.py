"""Which rows a report shows of a test example: the most helpful, the most harmful and the least influential ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from ..scoring.scores import Scores

LENGTH = 10  # of a list


def lists_of(scores: Scores, query: int, k: int = LENGTH) -> dict[str, pd.DataFrame]:
    """The lists "helpful", "harmful" and "least", each of at most k rows with different texts.

    Args:
        scores: of any corpus.
        query: number of the query column.
        k: rows per list; where fewer extremes were kept, as many.

    Returns:
        Tables as of `Scores.top`. A helpful row has a negative influence and a harmful one a positive, so a list may
        be shorter than k. "least" is missing where the scores come from a shortlist, which does not seek such rows.
    """
    k = min(k, scores.metadata.get("kept", {}).get("keep", k))
    lists = {}
    for by, sign in (("helpful", -1), ("harmful", 1)):
        rows = scores.top(k, by=by, query=query, distinct=True)
        lists[by] = rows[sign * rows["influence"] > 0].reset_index(drop=True)
    if "shortlist" not in scores.metadata:
        lists["least"] = scores.bottom(k, by="absolute", query=query, distinct=True)
    return lists
