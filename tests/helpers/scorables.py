"""A `Scorable` that no query made: rows have a number x, and influences that follow from it."""

import pytest
import torch

from hf_msif import objectives
from hf_msif.adapters.functional import FunctionalModel
from hf_msif.engine import Engine
from hf_msif.scoring.scorable import RowInfluence, Scorable


class Numbers(objectives.Objective):
    """Its batches hold the rows' numbers."""

    def collate(self, rows):
        return {"x": torch.tensor([row["x"] for row in rows]), "truncated": torch.tensor([r["x"] > 6 for r in rows])}

    def losses(self, call, batch):
        raise AssertionError("the influence of a Scorable is asked, not its objective")


def scorable(**changes):
    """I(x) = (x, x²), ℓ = 2x, one term per row."""

    def influence(batch, rows):
        x = batch["x"].double()
        assert [row["x"] for row in rows] == x.tolist()
        return RowInfluence(torch.stack([x, x**2], 1), 2 * x, torch.ones_like(x))

    settings = {
        "stage": "toy",
        "file_name": "scores-toy.parquet",
        "engine": Engine(progress=False),
        "model": FunctionalModel(torch.nn.Linear(1, 1)),
        "objective": Numbers(),
        "batch_size": 2,
        "columns": 2,
        "count": 4.0,
        "influence": influence,
        "dtype": torch.float32,
        "metadata": {"stage": "toy"},
        "identity": lambda: pytest.fail("asked for the identity of scores in memory"),
    }
    return Scorable(**{**settings, **changes})
