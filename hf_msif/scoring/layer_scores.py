"""`layer_scores`: what each layer's parameters contribute to the influence of a few rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..engine.corpus import as_rows
from .frames import influence_columns
from .scorable import Scorable, check_finite

if TYPE_CHECKING:
    import pandas as pd

Layers = dict[str, tuple[str, ...]]


def layers_of(names: Iterable[str], prefix: str = "") -> Layers:
    """Names of parameters by their layer: a name up to its first number, or its first part where it has none.

    >>> layers_of(["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.LayerNorm.bias", "cls.bias"], "bert")
    {'encoder.layer.0': ('bert.encoder.layer.0.output.dense.weight',),
     'embeddings': ('bert.embeddings.LayerNorm.bias',),
     'cls': ('cls.bias',)}

    Args:
        names: of parameters.
        prefix: name of the encoder within the model (`base_model_prefix`), which is left out.
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        below = re.sub(rf"^(.*?\.)??{re.escape(prefix)}\.", "", name, count=1) if prefix else name
        numbered = re.match(r"(.*?\b\d+)(\.|$)", below)
        layers.setdefault(numbered[1] if numbered else below.partition(".")[0], []).append(name)
    return {layer: tuple(members) for layer, members in layers.items()}


def layer_scores(
    scorable: Scorable,
    rows,
    layers: Layers,
    influence: Callable[[dict, list[dict], Sequence[Sequence[str]]], Tensor],
) -> pd.DataFrame:
    """The share of every layer in the influence of the rows, one line per row and layer: `Query.layer_scores`.

    Args:
        scorable: the question, and the stage whose rows are looked at.
        rows: a table, see `engine.corpus.as_rows`.
        layers: layer → names of its parameters.
        influence: (batch on the device, its rows, names by layer) → (B, layers, Q) in float64; called inside
            `model.evaluating()`.

    Returns:
        The table, on every process.

    Raises:
        InputError: bad rows, or a derivative that is not finite.
    """
    import pandas as pd

    engine, rows = scorable.engine, as_rows(rows, "the rows")
    members, columns = list(layers.values()), influence_columns(scorable.columns)
    share: list[tuple[int, np.ndarray]] = []
    with scorable.model.evaluating(), engine.raising_together():
        # One row at a time: its gradient is held as a whole.
        for indices, batch in engine.batches(rows, scorable.objective, batch_size=1):
            values = influence(batch, [rows[i] for i in indices], members).cpu().numpy()
            check_finite(values.reshape(len(indices), -1), [rows[i] for i in indices])
            share += zip(indices, values, strict=True)
    table = np.stack([values for _, values in sorted(engine.gather(share), key=lambda item: item[0])])
    return pd.DataFrame(
        {
            "example_id": [row["example_id"] for row in rows for _ in layers],
            "layer": list(layers) * len(rows),
            **dict(zip(columns, table.reshape(-1, len(columns)).T, strict=True)),
        }
    )
