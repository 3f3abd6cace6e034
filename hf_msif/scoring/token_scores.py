"""`token_scores`: the influence of each term of a few rows, such as each masked word of the ten most harmful ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine.corpus import as_rows
from ..errors import InputError
from ..objectives import Objective, Terms
from .frames import influence_columns
from .scorable import RowInfluence, Scorable, check_finite

if TYPE_CHECKING:
    import pandas as pd


class TermInfluence(NamedTuple):
    """The influences of the terms of a batch.

    Attributes:
        influence: (M, Q) in float64: that of each term for each query column; those of a row sum to I(x), eq. (6).
        terms: the M terms.
    """

    influence: Tensor
    terms: Terms


def token_scores(scorable: Scorable, rows, influence: Callable[[dict, list[dict]], TermInfluence]) -> pd.DataFrame:
    """The influence of every term of the rows, one line per term: `influence.Query.token_scores`.

    Args:
        scorable: the question, and the stage whose rows are looked at.
        rows: a table, see `engine.corpus.as_rows`.
        influence: (batch on the device, its rows) → `TermInfluence`; called inside `model.evaluating()`.

    Returns:
        The table, on every process.

    Raises:
        InputError: bad rows, an objective that does not say its terms or whose terms do not sum to its losses, or a
            loss that is not finite.
    """
    import pandas as pd

    engine, objective, rows = scorable.engine, scorable.objective, as_rows(rows, "the rows")
    _check_terms(objective, scorable.stage)
    names = influence_columns(scorable.columns)
    share = [np.zeros((0, 5 + len(names)))]
    with scorable.model.evaluating(), engine.raising_together():
        for indices, batch in engine.batches(rows, objective, scorable.batch_size):
            batch_rows = [rows[i] for i in indices]
            values, terms = influence(batch, batch_rows)
            _check_sums(type(objective).__name__, scorable.influence(batch, batch_rows), values, terms, batch_rows)
            unknown = torch.full_like(terms.owners, -1)
            places = torch.tensor(indices, device=terms.owners.device)[terms.owners]
            positions, targets = (unknown if t is None else t for t in (terms.positions, terms.targets))
            columns = [places, terms.numbers, positions, targets, terms.losses, values]
            table = torch.column_stack([column.double() for column in columns]).cpu().numpy()
            check_finite(table, [batch_rows[i] for i in terms.owners.tolist()])
            share.append(table)
    table = np.concatenate(engine.gather([np.concatenate(share)]))
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    places, numbers, positions, targets = table[:, :4].T.astype(np.int64)
    texts = iter(objective.token_texts(targets[targets >= 0].tolist()))
    return pd.DataFrame(
        {
            "example_id": [rows[i]["example_id"] for i in places],
            "term": numbers,
            "position": pd.array([place if place >= 0 else None for place in positions.tolist()], dtype="Int64"),
            "token": [next(texts) if target >= 0 else None for target in targets],
            "loss": table[:, 4],
            **dict(zip(names, table[:, 5:].T, strict=True)),
        }
    )


def _check_terms(objective: Objective, stage: str) -> None:
    if objective.terms is None:
        raise InputError(
            f"stage {stage!r}: the objective {type(objective).__name__} does not say its terms; expected "
            "a method terms(call, batch) that returns hf_msif.objectives.Terms: add it, or score whole rows."
        )


def _check_sums(objective: str, of_rows: RowInfluence, values: Tensor, terms: Terms, rows: list[dict]) -> None:
    """Refuses terms that do not sum to the losses, and their influences to those of rows: as those of a subclass that
    changed its losses alone, or that cut its terms from the graph."""
    accuracy = torch.finfo(of_rows.losses.dtype).eps ** 0.5
    for what, parts, whole in (
        ("losses", terms.losses.unsqueeze(1), of_rows.losses.unsqueeze(1)),
        ("influences", values, of_rows.influence),
    ):
        sums = torch.zeros_like(whole).index_add(0, terms.owners, parts.to(whole))
        wrong = (sums - whole).abs() > accuracy * torch.maximum(whole.abs(), whole.abs().amax(0))
        if wrong.any():
            i, q = wrong.nonzero()[0].tolist()
            raise InputError(
                f"the {what} of the terms that {objective} says for the row {rows[i]['example_id']!r} sum to "
                f"{float(sums[i, q]):.6g}, but that of the row is {float(whole[i, q]):.6g}; expected the same number: "
                "let `terms` and `losses` follow each other."
            )
