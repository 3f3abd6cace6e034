"""Plots of scores, queries and validations: `scores.plot`, `query.plot`. Each returns matplotlib axes.

They leave no window and no state of pyplot behind: `scores.plot.distribution().figure.savefig("influences.png")`.
Needs matplotlib (`pip install "hf_msif[plots]"`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import cut
from ..errors import InputError
from .figures import figure
from .tables import test_sentence

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from ..influence.query import Query
    from ..scoring.scores import Scores

HELPFUL, HARMFUL = "#3b75af", "#c8553d"
MOST_BARS = 80
MOST_LINES = 10
SIGN = "negative: helpful, positive: harmful"


class ScoresPlots:
    """`scores.plot`."""

    def __init__(self, scores: Scores):
        self.scores = scores

    def distribution(self, query: int = 0, ax: Axes | None = None) -> Axes:
        """A histogram of the influences on one test, with a logarithmic number of rows.

        Where only the extreme rows were kept, it is that of all rows all the same.

        Args:
            query: number of the query column.
            ax: axes to draw into; defaults to new ones.

        Raises:
            InputError: there is no such query column, or matplotlib is not installed.
        """
        scores = self.scores
        values, kept = scores.influence(query), scores.metadata.get("kept")
        ax = _axes(ax, 5.5, 3.2)
        if kept is None:
            counts, edges = np.histogram(values, bins=50)
            low, high, rows = edges[:-1], edges[1:], len(values)
        else:
            low, high, counts = np.array(kept["all"][query]["histogram"]).T
            ax.set_xscale("symlog", linthresh=max(float(np.quantile(abs(values), 0.5)), np.finfo(float).tiny))
            rows = int(counts.sum())
        colours = [HELPFUL if centre < 0 else HARMFUL for centre in (low + high) / 2]
        ax.bar(low, counts, width=high - low, align="edge", color=colours)
        ax.set_yscale("log")
        ax.axvline(0, color="0.3", lw=0.8)
        what = self._measurement
        ax.set_xlabel(f"influence: change of the {what} per unit of weight\n({_sign(what)})")
        ax.set_ylabel(f"rows, of {rows:,}")
        if "tests" in scores.metadata:
            ax.set_title(cut(test_sentence(scores, query)), fontsize="medium", parse_math=False)
        return ax

    def tokens(self, table: pd.DataFrame, query: int = 0, ax: Axes | None = None) -> Axes:
        """The influence of each term of a few rows, such as each masked word, as bars.

        Args:
            table: of `Query.token_scores`.
            query: number of the query column.
            ax: axes to draw into; defaults to new ones.

        Raises:
            InputError: the table is of something else, or of too many terms; or matplotlib is not installed.
        """
        return tokens(table, query, ax, self._measurement)

    def layers(self, table: pd.DataFrame, query: int = 0, ax: Axes | None = None) -> Axes:
        """The influence of a few rows through each layer, the first layer on top, with one line per row.

        Args:
            table: of `Query.layer_scores`: columns `example_id`, `layer` and `influence`, in the order of the layers.
            query: number of the query column.
            ax: axes to draw into; defaults to new ones.

        Raises:
            InputError: the table is of something else, or of too many rows; or matplotlib is not installed.
        """
        return layers(table, query, ax, self._measurement)

    @property
    def _measurement(self) -> str:
        return self.scores.metadata.get("measurement", "loss")


class QueryPlots:
    """`query.plot`."""

    def __init__(self, query: Query):
        self.query = query

    def convergence(self, stage: str | None = None, ax: Axes | None = None) -> Axes:
        """How each column of a stage was solved, as its certificate says.

        Args:
            stage: its name; defaults to the first.
            ax: axes to draw into; defaults to new ones.

        Raises:
            InputError: there is no such stage, its certificate has nothing to draw, or matplotlib is not installed.
        """
        name = self.query.chain.stage(stage).name
        ax = convergence(self.query.certificates[name], ax)
        ax.set_title(f"stage {name}", fontsize="medium", parse_math=False)
        return ax


def tokens(table: pd.DataFrame, query: int = 0, ax: Axes | None = None, measurement: str = "loss") -> Axes:
    """As `ScoresPlots.tokens`; `measurement` is what is explained."""
    values = _influences(table, query, ("example_id", "term", "token"))
    if len(table) > MOST_BARS:
        raise InputError(
            f"the table has {len(table):,} terms; expected at most {MOST_BARS}, which can be read: take fewer rows."
        )
    ax = _axes(ax, 5.5, 1 + 0.22 * max(len(table), 4))
    labels = []
    for example_id, term, token in zip(table["example_id"], table["term"], table["token"], strict=True):
        name = cut(token, 24) if isinstance(token, str) else f"term {term}"
        labels.append(name if table["example_id"].nunique() == 1 else f"{cut(example_id, 16)}: {name}")
    _bars(ax, values, labels)
    starts = np.flatnonzero(table["example_id"].to_numpy()[1:] != table["example_id"].to_numpy()[:-1])
    for start in starts:
        ax.axhline(start + 0.5, color="0.7", lw=0.8)
    ax.set_xlabel(f"influence of the term\n({_sign(measurement)})")
    return ax


def layers(table: pd.DataFrame, query: int = 0, ax: Axes | None = None, measurement: str = "loss") -> Axes:
    """As `ScoresPlots.layers`; `measurement` is what is explained."""
    values = _influences(table, query, ("example_id", "layer"))
    names = list(dict.fromkeys(table["layer"]))
    ids = list(dict.fromkeys(table["example_id"]))
    if len(ids) > MOST_LINES:
        raise InputError(
            f"the table has {len(ids):,} rows of the corpus; expected at most {MOST_LINES}, whose lines can be told "
            "apart: take fewer rows."
        )
    ax = _axes(ax, 5.5, 1 + 0.22 * max(len(names), 4))
    if len(ids) == 1:
        _bars(ax, values, [cut(name, 40) for name in names])
    else:
        for example_id in ids:
            of_row = (table["example_id"] == example_id).to_numpy()
            places = [names.index(name) for name in table["layer"][of_row]]
            ax.plot(values[of_row], places, "o-", ms=3, lw=1, label=cut(example_id, 24))
        _name_lines(ax, [cut(name, 40) for name in names])
        ax.legend(title="row", fontsize="small", title_fontsize="small")
    ax.set_xlabel(f"influence through the layer\n({_sign(measurement)})")
    return ax


def convergence(certificate: Any, ax: Axes | None = None) -> Axes:
    """How well each column was solved: of `query.certificates[stage]`.

    Args:
        certificate: that of a stage.
        ax: axes to draw into; defaults to new ones.

    Raises:
        InputError: the certificate has nothing to draw, or matplotlib is not installed.
    """
    curves = certificate.curves() if hasattr(certificate, "curves") else None
    if curves is None:
        raise InputError(
            f"the certificate is a {type(certificate).__name__}, which has nothing to draw; expected that of a "
            "solver, of segments or of a run."
        )
    ax = _axes(ax, 5.5, 3.2)
    from matplotlib.ticker import MaxNLocator  # after `_axes`, which says where matplotlib is missing

    for name, (x, y) in curves.lines.items():
        style = "o" if curves.are_points else "o-"
        ax.plot(x, np.maximum(y, np.finfo(float).eps), style, ms=4, lw=1, alpha=0.8, label=name)
    if curves.limit is not None:
        ax.axhline(curves.limit, color="0.3", lw=0.8, ls="--", label=f"limit {curves.limit:.3g}")
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=curves.x, ylabel=curves.y)
    ax.legend(fontsize="small")
    return ax


def agreement(predicted: np.ndarray, measured: np.ndarray, ax: Axes | None = None) -> Axes:
    """Measured against predicted effects of removals, with the least-squares line.

    Args:
        predicted: effects on the test loss, of any shape.
        measured: of the same shape.
        ax: axes to draw into; defaults to new ones.
    """
    x, y = np.ravel(predicted), np.ravel(measured)
    ax = _axes(ax, 3.6, 3.2)
    ax.axhline(0, color="0.85", lw=0.8)
    ax.axvline(0, color="0.85", lw=0.8)
    ax.scatter(x, y, s=12, alpha=0.7 if x.size < 500 else 0.3)
    if np.ptp(x) > 0:
        slope, intercept = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        ax.plot(ends, slope * ends + intercept, color="C1", lw=1)
    ax.set(xlabel="predicted change of the test loss", ylabel="measured change of the test loss")
    return ax


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    return figure(figsize=(width, height), layout="constrained").subplots() if ax is None else ax


def _sign(measurement: str) -> str:
    return SIGN if measurement == "loss" else "negative: the row lowers it, positive: raises it"


def _influences(table: pd.DataFrame, query: int, columns: tuple[str, ...]) -> np.ndarray:
    """The influences on one test of a table with these columns."""
    name = "influence" if "influence" in table and query == 0 else f"influence_{query}"
    missing = [column for column in (*columns, name) if column not in table]
    if missing:
        raise InputError(
            f"the table has no column {missing[0]!r}; expected {', '.join(columns)} and {name}, as "
            "Query.token_scores and Query.layer_scores have them."
        )
    return table[name].to_numpy()


def _bars(ax: Axes, values: np.ndarray, labels: list[str]) -> None:
    ax.barh(np.arange(len(values)), values, color=[HELPFUL if value < 0 else HARMFUL for value in values])
    _name_lines(ax, labels)


def _name_lines(ax: Axes, labels: list[str]) -> None:
    ax.set_yticks(np.arange(len(labels)), labels, fontsize="small", parse_math=False)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.axvline(0, color="0.3", lw=0.8)
