"""Plots draw what their tables and scores hold, into axes of the caller, and leave pyplot alone."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from hf_msif import InputError, Scores
from hf_msif.influence import DirectCertificate
from hf_msif.influence.backward import RunCertificate
from hf_msif.influence.replicates import ReplicatesCertificate
from hf_msif.influence.segment_sweep import SegmentReport, SegmentsCertificate
from hf_msif.reports import plots
from hf_msif.solvers.certificate import Certificate

INFLUENCE = np.random.default_rng(0).standard_t(3, (400, 2))


def scores(**metadata):
    rows = [{"example_id": i, "text": "t"} for i in range(len(INFLUENCE))]
    facts = {"tests": [{"text": "costs $5 and $6 " * 9}, {"text": "b"}], **metadata}
    return Scores.build(rows, INFLUENCE, 4.0, {}, facts)


def drawn(ax):
    """The axes, after all of their figure was drawn, with all texts."""
    ax.figure.canvas.draw()
    return ax


@pytest.mark.parametrize("query", [0, 1])
def test_a_distribution_counts_every_row_on_its_side_of_zero(query):
    ax = drawn(scores().plot.distribution(query))
    heights = {}
    for bar in ax.patches:
        heights[bar.get_facecolor()] = heights.get(bar.get_facecolor(), 0) + bar.get_height()
    assert sum(heights.values()) == len(INFLUENCE)
    assert len(heights) == 2
    assert "positive: harmful" in ax.get_xlabel()
    assert ax.get_ylabel() == "rows, of 400"
    assert len(ax.get_title()) <= 60


def test_a_distribution_of_extreme_rows_is_that_of_all():
    low, high = [-2.0, -1.0, 1.0], [-1.0, 0.0, 2.0]
    histogram = [list(edges) for edges in zip(low, high, [70, 5, 25], strict=True)]
    kept = {"keep": 400, "all": [{"histogram": histogram, "count": 100}] * 2}
    ax = drawn(scores(kept=kept, measurement="logit margin").plot.distribution())
    assert [bar.get_height() for bar in ax.patches] == [70, 5, 25]
    assert ax.get_ylabel() == "rows, of 100"
    assert "logit margin" in ax.get_xlabel()
    assert "harmful" not in ax.get_xlabel()


TERMS = pd.DataFrame(
    {
        "example_id": [3, 3, 8],
        "term": [0, 1, 0],
        "token": ["tax", None, "$^$"],
        "influence_0": [1.0, -2.0, 0.5],
        "influence_1": [0.0, 4.0, 1.0],
    }
)


def test_tokens_are_one_bar_per_term():
    ax = drawn(scores().plot.tokens(TERMS, query=1))
    assert [bar.get_width() for bar in ax.patches] == [0.0, 4.0, 1.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3: tax", "3: term 1", "8: $^$"]


def test_layers_are_one_line_per_row_or_the_bars_of_one():
    table = pd.DataFrame(
        [
            {"example_id": i, "layer": name, "influence": 10 * i + n}
            for i in (1, 2)
            for n, name in enumerate(["embeddings", "layer.0", "head"])
        ]
    )
    ax = drawn(scores().plot.layers(table))
    lines = [line for line in ax.lines if line.get_label() in ("1", "2")]
    assert [line.get_xdata().tolist() for line in lines] == [[10, 11, 12], [20, 21, 22]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["embeddings", "layer.0", "head"]
    assert [bar.get_width() for bar in drawn(plots.layers(table[table.example_id == 2])).patches] == [20, 21, 22]


@pytest.mark.parametrize(
    ("draw", "table", "words"),
    [
        (plots.tokens, TERMS.drop(columns="token"), "has no column 'token'"),
        (plots.tokens, TERMS.drop(columns=["influence_0", "influence_1"]), "has no column 'influence_0'"),
        (plots.tokens, pd.concat([TERMS] * 40), "has 120 terms; expected at most 80"),
        (plots.layers, TERMS, "has no column 'layer'"),
        (plots.layers, TERMS.loc[[0] * 11].assign(layer="a", example_id=range(11)), "has 11 rows of the corpus"),
    ],
)
def test_tables_that_cannot_be_drawn(draw, table, words):
    with pytest.raises(InputError, match=words):
        draw(table)


def solved(residual):
    nothing = [None] * len(residual)
    ended = [r <= 1e-3 for r in residual]
    facts = {"status": ["converged"] * len(residual), "negative_curvature": [False] * len(residual)}
    facts |= {"smallest_ritz": nothing, "largest_ritz": nothing}
    return Certificate("cg", 0.5, 1e-3, [4, 5], [5, 6], residual, ended, **facts)


def test_convergence_shows_each_column_and_the_limit():
    ax = drawn(plots.convergence(solved([1e-4, 0.0])))
    points, limit = ax.lines
    assert points.get_xdata().tolist() == [4, 5]
    assert points.get_ydata()[0] == 1e-4
    assert 0 < points.get_ydata()[1] < 1e-12  # a residual of 0 has no logarithm
    assert limit.get_ydata()[0] == 1e-3
    both = drawn(plots.convergence(ReplicatesCertificate([solved([1e-4, 1e-5])] * 2)))
    assert len(both.lines) == 3


def test_convergence_of_runs_and_segments():
    ax = drawn(plots.convergence(RunCertificate(9, [2.0], 1e4, 0.0, [[9, [1.0]], [4, [2.0]], [0, [0.5]]])))
    assert ax.lines[0].get_xydata().tolist() == [[9, 1.0], [4, 2.0], [0, 0.5]]
    facts = {"step": 1, "time": 1.0, "iterations": [3, 3], "smallest_ritz": 0.1, "largest_ritz": 2.0}
    facts |= {"reach": 0.1, "amplified": 1.0, "unstable": False, "growth": []}
    reports = [SegmentReport(begin=n, end=n + 5, error=[1e-4, 1e-5 * n], **facts) for n in (5, 0)]
    ax = drawn(plots.convergence(SegmentsCertificate(1e-3, 50, reports)))
    assert ax.lines[0].get_xydata().tolist() == [[10, 1e-4], [5, 1e-4]]
    for certificate in (DirectCertificate("given", 2), object()):
        with pytest.raises(InputError, match="nothing to draw"):
            plots.convergence(certificate)


def test_agreement_has_the_least_squares_line():
    x = np.array([0.0, 1.0, 2.0])
    ax = drawn(plots.agreement(x, 3 * x - 1))
    np.testing.assert_allclose(ax.lines[-1].get_xydata(), [[0, -1], [2, 5]], atol=1e-12)


def test_axes_of_the_caller_are_drawn_into():
    first, second, third = Figure().subplots(3)
    assert scores().plot.distribution(ax=first) is first
    assert plots.tokens(TERMS, ax=second) is second
    assert plots.convergence(solved([1e-4, 1e-5]), third) is third
    drawn(third)


def test_pyplot_holds_none_of_the_figures():
    drawn(scores().plot.distribution())
    assert pyplot.get_fignums() == []
