"""Three experiments: remove single examples, groups or random subsets, and compare the effects with predictions."""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..scoring.scores import Scores
from .bank import Bank
from .measures import Correlation, aggregated, correlation
from .truth import Measurement, OwnTruth, Truth

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

METHOD = "influence"  # name of the method under test among the baselines


@dataclass(frozen=True)
class Validation:
    """Predicted and measured removal effects, of the influence and of the baselines.

    All effects are in units of the test loss; positive means that the removed examples helped.

    Attributes:
        kind: "leave_one_out", "remove_groups" or "datamodelling_score".
        truth: what the predictions are compared with, in words.
        correlations: "influence" and the name of every baseline → `Correlation`. The LDS is the `spearman_r` of a
            "datamodelling_score".
        measurement: the measured removal effects (n, Q); Q = 1 if the effects were aggregated over test columns; and
            their ceiling, which no other measurement can be expected to exceed.
        omissions: the n sets of ids that were left out.
        labels: a name for each of them.
        predicted: method → predicted removal effects (n, Q).
        settings: seeds, fraction, number of retrainings that missed their stationary point, and so on.
    """

    kind: str
    truth: str
    correlations: dict[str, Correlation]
    measurement: Measurement
    omissions: list[list]
    labels: list[Hashable]
    predicted: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def measured(self) -> np.ndarray:
        """The measured removal effects, (n, Q)."""
        return self.measurement.effects

    @property
    def ceiling(self) -> Correlation | None:
        """How a second measurement would correlate with this one; None if that was not measured."""
        return self.measurement.ceiling

    @property
    def table(self) -> pd.DataFrame:
        """One row per method: Pearson's r, Spearman's r, their intervals, slope, n and the ceilings."""
        import pandas as pd

        rows = []
        for name, c in self.correlations.items():
            row = {"method": name, "pearson_r": c.pearson_r, "pearson_interval": c.pearson_interval}
            row |= {"spearman_r": c.spearman_r, "spearman_interval": c.spearman_interval}
            row |= {"slope": c.slope, "n": c.n}
            for which in ("pearson_r", "spearman_r"):
                row[f"ceiling_{which}"] = np.nan if self.ceiling is None else getattr(self.ceiling, which)
            rows.append(row)
        return pd.DataFrame(rows)

    @property
    def removals(self) -> pd.DataFrame:
        """One row per removal: label, number of examples, measured and predicted effect (means over columns); the
        standard error over the starts where the truth is the expected one."""
        import pandas as pd

        measurement = self.measurement
        table = {"removed": self.labels, "examples": [len(o) for o in self.omissions]}
        table["measured"] = self.measured.mean(1)
        if measurement.repeated is not None:
            table["measured_again"] = measurement.repeated.mean(1)
        if measurement.by_start is not None:
            means = measurement.by_start.mean(2)
            table["standard_error"] = means.std(0, ddof=1) / np.sqrt(len(means))
        return pd.DataFrame(table | {name: values.mean(1) for name, values in self.predicted.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the fields of the influence's `Correlation` (`pearson_r`, `spearman_r`, `slope`, `n`, …); the
        same fields under "ceiling", under "halves" where the truth has halves, and under each baseline's name;
        "kind" and "settings"."""
        influence = self.correlations[METHOD].to_dict()
        others = {name: c.to_dict() for name, c in self.correlations.items() if name != METHOD}
        ceilings = {name: None if c is None else c.to_dict() for name, c in self._ceilings.items()}
        return {"kind": self.kind, **influence, **ceilings, **others, "settings": self.settings}

    @property
    def _ceilings(self) -> dict[str, Correlation | None]:
        halves = self.measurement.halves
        return {"ceiling": self.ceiling} | ({} if halves is None else {"halves": halves})

    def __str__(self) -> str:
        from tabulate import tabulate

        def interval(pair: tuple[float, float]) -> str:
            return f"[{pair[0]:.3f}, {pair[1]:.3f}]"

        lines = {**self.correlations, **{f"({name})": c for name, c in self._ceilings.items() if c is not None}}
        rows = [
            [name, c.pearson_r, interval(c.pearson_interval), c.spearman_r, interval(c.spearman_interval), c.slope]
            for name, c in lines.items()
        ]
        c = self.correlations[METHOD]
        head = (
            f"{self.kind.replace('_', ' ')} against {self.truth}: n = {c.n} removals, {c.columns} test column(s), "
            f"{c.level:.0%} intervals"
        )
        if missed := self.settings.get("unreached"):
            head += f"; {missed} retrainings missed their stationary point"
        if self.ceiling is None:
            head += "; ceiling not measured"
        names = ["method", "Pearson r", "", "Spearman", "", "slope"]
        return head + "\n" + tabulate(rows, names, floatfmt=".3f")

    def plot(self, path: str | os.PathLike | None = None, methods: Sequence[str] | None = None) -> Figure:
        """Scatter of measured against predicted effects with the least-squares line, one panel per method.

        Needs matplotlib (`pip install hf_msif[plots]`).

        Args:
            path: where to write the figure as PNG; None: it is not written.
            methods: names in `correlations`; default to all.

        Returns:
            The figure.
        """
        from ..reports.figures import figure as new_figure
        from ..reports.plots import agreement

        methods = list(methods or self.correlations)
        figure = new_figure(figsize=(3.4 * len(methods), 3.2), layout="constrained")
        for axes, name in zip(np.ravel(figure.subplots(1, len(methods))), methods, strict=True):
            c = self.correlations[name]
            agreement(self.predicted[name], self.measured, axes)
            axes.set_title(f"{name}: r = {c.pearson_r:.2f}, ρ = {c.spearman_r:.2f}", fontsize="medium")
            if axes is not figure.axes[0]:
                axes.set_ylabel("")
        if path is not None:
            figure.savefig(path, dpi=150, format="png")
        return figure


def leave_one_out(
    bank: Bank,
    predicted: Scores | np.ndarray,
    ids: Sequence | None = None,
    examples: int | Sequence = 100,
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    aggregate: str | None = "sum",
    truth: Truth = OwnTruth(),  # noqa: B008
    resamples: int = 1000,
) -> Validation:
    """Removes single examples, trains all stages again, and compares the effects with predictions (§4.1, Fig. 2).

    Args:
        bank: retrainings of the same chain, with the same tests.
        predicted: `Scores` of the corpus, or predicted removal effects (rows, Q) in the order of `ids`.
        ids: example ids of the rows of `predicted`; default to those of the scores.
        examples: the ids of the examples to remove; or their number, then those with the largest absolute predicted
            effect are taken, as in the paper.
        baselines: name → `Scores` or array (rows, Q) of other methods, in the same order; see `validation.baselines`.
        aggregate: "sum" or "mean" of the effects over the test columns (the paper sums); None: a correlation per
            column, and the mean of these.
        truth: what is measured: `OwnTruth` (what this run does without the examples) or `ExpectedTruth` (what training
            does without them, in the mean over other starts).
        resamples: number of bootstrap samples of the removals.

    Returns:
        `Validation`. Effects are in units of the test loss (of its sum or mean over tests, as `aggregate` says);
        positive means that the examples helped.

    Raises:
        InputError: numbers of rows or columns differ, there is no row with an id, the scores are aggregated in
            another way, the bank has no such truth, or there are fewer than three removals.

    >>> effects = {"a": 3.0, "b": -2.0, "c": 1.0, "d": 0.5}  # effects that add up, and predictions of half their size
    >>> bank = Bank(lambda omit, seed: [7.0 + sum(effects[i] for i in omit)], progress=False)
    >>> result = leave_one_out(bank, np.array([1.5, -1.0, 0.5, 0.25]), list("abcd"), examples=3)
    >>> result.labels, round(result.to_dict()["pearson_r"], 6), round(result.to_dict()["slope"], 6)
    (['a', 'b', 'c'], 1.0, 2.0)
    """
    methods, ids, row_of = effects_of_methods(predicted, ids, baselines, aggregate)
    if isinstance(examples, int):
        strength = np.abs(methods[METHOD]).sum(1)
        removed_ids = [ids[i] for i in np.argsort(-strength, kind="stable")[:examples]]
    else:
        removed_ids = list(examples)
    omissions = [[i] for i in removed_ids]
    settings = {"examples": len(removed_ids)}
    return _compare(
        "leave_one_out", bank, methods, row_of, omissions, removed_ids, aggregate, truth, resamples, settings
    )


def remove_groups(
    bank: Bank,
    predicted: Scores | np.ndarray,
    groups: Mapping[Any, Collection],
    ids: Sequence | None = None,
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    aggregate: str | None = "sum",
    truth: Truth = OwnTruth(),  # noqa: B008
    resamples: int = 1000,
) -> Validation:
    """Removes groups of examples; the prediction for a group is the sum of its members' effects, eq. (8).

    Args:
        bank: retrainings of the same chain, with the same tests.
        predicted: `Scores` of the corpus, or predicted removal effects (rows, Q) in the order of `ids`.
        groups: name → the ids of its members; at least three groups.
        ids: example ids of the rows of `predicted`; default to those of the scores.
        baselines: name → `Scores` or array (rows, Q) of other methods, in the same order; see `validation.baselines`.
        aggregate: "sum" or "mean" of the effects over the test columns; None: a correlation per column, and the
            mean of these.
        truth: what is measured: `OwnTruth` (what this run does without the examples) or `ExpectedTruth` (what training
            does without them, in the mean over other starts).
        resamples: number of bootstrap samples of the removals.

    Returns:
        `Validation`. Effects are in units of the test loss (of its sum or mean over tests, as `aggregate` says);
        positive means that the examples helped.

    Raises:
        InputError: numbers of rows or columns differ, there is no row with an id, the scores are aggregated in
            another way, the bank has no such truth, or there are fewer than three removals.

    >>> bank = Bank(lambda omit, seed: [float(sum(omit))], progress=False)
    >>> result = remove_groups(bank, np.arange(6.0), {"low": [0, 1], "high": [4, 5], "odd": [1, 3, 5]}, range(6))
    >>> result.removals["measured"].tolist(), result.removals["influence"].tolist()
    ([1.0, 9.0, 9.0], [1.0, 9.0, 9.0])
    """
    methods, _, row_of = effects_of_methods(predicted, ids, baselines, aggregate)
    omissions = [list(group) for group in groups.values()]
    labels = list(groups)
    return _compare("remove_groups", bank, methods, row_of, omissions, labels, aggregate, truth, resamples, {})


def datamodelling_score(
    bank: Bank,
    predicted: Scores | np.ndarray,
    ids: Sequence | None = None,
    subsets: int = 100,
    fraction: float = 0.95,
    seed: int = 0,
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    aggregate: str | None = None,
    truth: Truth = OwnTruth(),  # noqa: B008
    resamples: int = 1000,
) -> Validation:
    """Linear datamodelling score (LDS; Park et al., 2023): trains all stages on random subsets of the corpus.

    For each test the measured effects are correlated, over the subsets, with the sums of the predicted effects of the
    removed rows. The LDS is the mean over tests: `spearman_r` of the result, with a bootstrap over subsets as its
    interval. An LDS has no meaning without its `fraction`: at one half the removal is too large for any first-order
    prediction.

    Args:
        bank: retrainings of the same chain, with the same tests.
        predicted: `Scores` of the corpus, or predicted removal effects (rows, Q) in the order of `ids`.
        ids: example ids of the rows of `predicted`; default to those of the scores.
        subsets: number of subsets. A larger number begins with the same subsets, so that a bank can grow.
        fraction: share of the rows that each subset keeps, in (0, 1); at least one row is removed.
        seed: of the draw of subsets.
        baselines: name → `Scores` or array (rows, Q) of other methods, in the same order; see `validation.baselines`.
        aggregate: "sum" or "mean" of the effects over the test columns; None: a correlation per column, and the
            mean of these.
        truth: what is measured: `OwnTruth` (what this run does without the examples) or `ExpectedTruth` (what training
            does without them, in the mean over other starts).
        resamples: number of bootstrap samples of the removals.

    Returns:
        `Validation`. Effects are in units of the test loss (of its sum or mean over tests, as `aggregate` says);
        positive means that the examples helped.

    Raises:
        InputError: numbers of rows or columns differ, there is no row with an id, the scores are aggregated in
            another way, the bank has no such truth, `fraction` is outside (0, 1), or there are fewer than three
            removals.

    >>> bank = Bank(lambda omit, seed: [-float(sum(omit))], progress=False)
    >>> result = datamodelling_score(bank, -np.arange(40.0), range(40), subsets=20, fraction=0.9)
    >>> round(result.to_dict()["spearman_r"], 6), result.settings["removed"]
    (1.0, 4)
    """
    methods, ids, row_of = effects_of_methods(predicted, ids, baselines, aggregate)
    if not 0 < fraction < 1:
        raise InputError(
            f"fraction is {fraction}; expected the share of the rows that each subset keeps, between 0 and 1."
        )
    omissions = random_omissions(ids, subsets, fraction, seed)
    settings = {"subsets": subsets, "fraction": fraction, "subset_seed": seed, "removed": len(omissions[0])}
    labels = list(range(subsets))
    return _compare(
        "datamodelling_score", bank, methods, row_of, omissions, labels, aggregate, truth, resamples, settings
    )


def random_omissions(ids: Sequence, subsets: int, fraction: float, seed: int = 0) -> list[list]:
    """`subsets` random sets of ids to leave out, each of round((1 − fraction) N) of the N ids but at least one.

    >>> [len(omission) for omission in random_omissions(range(40), subsets=3, fraction=0.9)]
    [4, 4, 4]
    """
    generator = np.random.default_rng(seed)
    size = max(1, round((1 - fraction) * len(ids)))
    return [[ids[i] for i in generator.choice(len(ids), size, replace=False)] for _ in range(subsets)]


def effects_of_methods(
    predicted: Scores | np.ndarray,
    ids: Sequence | None,
    baselines: Mapping[str, Scores | np.ndarray] | None,
    aggregate: str | None,
) -> tuple[dict[str, np.ndarray], list, dict[Any, int]]:
    """Three results: method → predicted removal effects (rows, Q), aggregated if asked for; ids; id → row.

    Raises:
        InputError: numbers of rows differ, an array has no ids, or the scores are aggregated in another way.
    """
    if aggregate not in (None, "sum", "mean"):
        raise InputError(f"aggregate is {aggregate!r}; expected 'sum', 'mean' or None.")
    if ids is None:
        if not isinstance(predicted, Scores):
            raise InputError("predictions that are an array need ids=, the example ids of its rows.")
        ids = predicted.frame["example_id"]
    ids = [i.item() if isinstance(i, np.generic) else i for i in ids]
    predictions = {METHOD: predicted, **(baselines or {})}
    if len(predictions) != 1 + len(baselines or {}):
        raise InputError(f"a baseline cannot be called {METHOD!r}, the name of the method itself: rename it.")
    effects = {name: _effects(name, values, aggregate) for name, values in predictions.items()}
    for name, values in effects.items():
        if len(values) != len(ids):
            raise InputError(f"{name!r} has {len(values)} rows, but there are {len(ids)} ids: pass one id per row.")
    return effects, ids, {i: row for row, i in enumerate(ids)}


def _effects(name: str, values: Scores | np.ndarray, aggregate: str | None) -> np.ndarray:
    """Predicted removal effects (rows, Q) in float64, aggregated over columns if asked for: Q = 1."""
    if isinstance(values, Scores):
        scores_aggregate = values.metadata.get("certificate", {}).get("aggregate")
        if scores_aggregate != aggregate and scores_aggregate is not None:
            raise InputError(
                f"the scores of {name!r} are of the {scores_aggregate} over the test examples, but aggregate is "
                f"{aggregate!r}: use the same, or scores with one column per test example."
            )
        explained = values.metadata.get("measurement", "loss")
        if explained != "loss":
            raise InputError(
                f"the scores of {name!r} explain the {explained}, but retrainings measure losses: query with "
                "measurement='loss'."
            )
        values = values.removal_effects()
    values = np.asarray(values, dtype=np.float64)
    values = values.reshape(len(values), -1)
    if aggregate is None or values.shape[1] == 1:
        return values
    return aggregated(values, aggregate)


def _compare(
    kind: str,
    bank: Bank,
    methods: Mapping[str, np.ndarray],
    row_of: Mapping[Any, int],
    omissions: list[list],
    labels: Sequence[Hashable],
    aggregate: str | None,
    truth: Truth,
    resamples: int,
    settings: Mapping[str, Any],
) -> Validation:
    """Measures the effects of the omissions and correlates every method's predictions with them."""
    unknown = [i for omitted in omissions for i in omitted if i not in row_of]
    if unknown:
        raise InputError(f"there is no row with the example_id {unknown[0]!r} among the predictions.")
    measurement = truth.measure(bank, omissions, aggregate, resamples)
    measured = measurement.effects
    predicted = {}
    for name, values in methods.items():
        if values.shape[1] != measured.shape[1]:
            raise InputError(
                f"{name!r} has {values.shape[1]} test columns, but the bank measures {measured.shape[1]}: score the "
                "same test examples."
            )
        predicted[name] = np.array([values[[row_of[i] for i in omitted]].sum(0) for omitted in omissions])
    settings = {**truth.to_dict(), "aggregate": aggregate, **settings}
    settings |= {"bank": bank.fingerprint, "unreached": bank.unreached(omissions, truth.retrainings)}
    return Validation(
        kind=kind,
        truth=str(truth),
        correlations={name: correlation(values, measured, resamples) for name, values in predicted.items()},
        measurement=measurement,
        omissions=omissions,
        labels=list(labels),
        predicted=predicted,
        settings=settings,
    )
