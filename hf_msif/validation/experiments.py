"""The experiments: removal of single examples, of groups and of random subsets, each against its prediction."""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..scoring.scores import Scores
from .bank import Bank
from .measures import Correlation, correlation

if TYPE_CHECKING:
    import pandas as pd

METHOD = "influence"


@dataclass(frozen=True)
class Validation:
    """Predicted against measured removal effects, for one method and the baselines beside it.

    Attributes:
        kind: "leave_one_out", "remove_groups" or "datamodelling_score".
        correlations: "influence" and every baseline → `Correlation`. The LDS is the `spearman_r` of a
            "datamodelling_score".
        ceiling: the correlation of the measurement with itself under other seeds, which no method can be expected to
            pass; None where no such seeds were given.
        omissions: the sets of ids that were left out.
        labels: a name for each of them.
        measured, repeated: measured removal effects (n, Q) under the seeds, and under the ceiling's.
        predicted: method → predicted removal effects (n, Q); Q = 1 where test columns were added up.
        settings: seeds, fraction, number of retrainings that missed their stationary point, and so on.
    """

    kind: str
    correlations: dict[str, Correlation]
    ceiling: Correlation | None
    omissions: list[list]
    labels: list[Hashable]
    measured: np.ndarray
    repeated: np.ndarray | None
    predicted: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> pd.DataFrame:
        """One row a method: r, ρ, slope, their intervals, n and the ceilings."""
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
        """One row a removal: its label, how many examples, measured and predicted effect (means over columns)."""
        import pandas as pd

        found = {"removed": self.labels, "examples": [len(o) for o in self.omissions]}
        found["measured"] = self.measured.mean(1)
        if self.repeated is not None:
            found["measured_again"] = self.repeated.mean(1)
        return pd.DataFrame(found | {name: values.mean(1) for name, values in self.predicted.items()})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: `pearson_r`, `spearman_r`, `slope`, `n`, …, the same under each baseline's name, `ceiling`,
        `settings`."""
        own = self.correlations[METHOD].to_dict()
        others = {name: c.to_dict() for name, c in self.correlations.items() if name != METHOD}
        ceiling = None if self.ceiling is None else self.ceiling.to_dict()
        return {"kind": self.kind, **own, "ceiling": ceiling, **others, "settings": self.settings}

    def __str__(self) -> str:
        from tabulate import tabulate

        def interval(pair: tuple[float, float]) -> str:
            return f"[{pair[0]:.3f}, {pair[1]:.3f}]"

        rows = [
            [name, c.pearson_r, interval(c.pearson_interval), c.spearman_r, interval(c.spearman_interval), c.slope]
            for name, c in self.correlations.items()
        ]
        if self.ceiling is not None:
            c = self.ceiling
            end = ["(ceiling)", c.pearson_r, interval(c.pearson_interval)]
            rows.append([*end, c.spearman_r, interval(c.spearman_interval), c.slope])
        c = self.correlations[METHOD]
        head = (
            f"{self.kind.replace('_', ' ')}: n = {c.n} removals, {c.columns} test column(s), {c.level:.0%} intervals"
        )
        if missed := self.settings.get("unreached"):
            head += f"; {missed} retrainings missed their stationary point"
        if self.ceiling is None:
            head += "; ceiling not measured"
        names = ["method", "Pearson r", "", "Spearman", "", "slope"]
        return head + "\n" + tabulate(rows, names, floatfmt=".3f")

    def plot(self, path: str | os.PathLike | None = None, methods: Sequence[str] | None = None):
        """Scatter of measured against predicted effects with the least-squares line, one panel a method.

        Needs matplotlib (`pip install hf_msif[validation]`). Returns the figure; also writes it where `path` is given.
        """
        from ..reports.figures import figure as new_figure

        methods = list(methods or self.correlations)
        figure = new_figure(figsize=(3.4 * len(methods), 3.2), layout="constrained")
        for axes, name in zip(np.ravel(figure.subplots(1, len(methods))), methods, strict=True):
            x, y, c = self.predicted[name], self.measured, self.correlations[name]
            axes.axhline(0, color="0.85", lw=0.8)
            axes.axvline(0, color="0.85", lw=0.8)
            axes.scatter(x.ravel(), y.ravel(), s=12, alpha=0.7 if x.size < 500 else 0.3)
            if np.ptp(x) > 0:
                slope, intercept = np.polyfit(x.ravel(), y.ravel(), 1)
                ends = np.array([x.min(), x.max()])
                axes.plot(ends, slope * ends + intercept, color="C1", lw=1)
            axes.set(title=f"{name}: r = {c.pearson_r:.2f}, ρ = {c.spearman_r:.2f}", xlabel="predicted effect")
            axes.title.set_fontsize("medium")
        figure.axes[0].set_ylabel("measured change of the test loss")
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
    seeds: Sequence[int] = (0,),
    ceiling_seeds: Sequence[int] = (1,),
    resamples: int = 1000,
) -> Validation:
    """Removes single examples, trains all stages again, and compares with the prediction (the paper's §4.1, Fig. 2).

    Args:
        bank: of retrainings of the same chain and tests.
        predicted: `Scores` of the corpus, or removal effects (rows, Q) in the order of `ids`.
        ids: example ids of the rows; those of the scores by default.
        examples: how many, those of the largest absolute predicted effect, as in the paper; or their ids.
        baselines: name → the same for other methods, in the same order; see `validation.baselines`.
        aggregate: "sum" or "mean" over the test columns (the paper sums), or None: a correlation a column, averaged.
        seeds: the measurement is the mean over them.
        ceiling_seeds: of the second measurement that the ceiling comes from; empty: none.
        resamples: of the bootstrap over removals.

    Returns:
        `Validation`. Effects are in units of the test loss (of its sum or mean over tests, as `aggregate` says).

    Raises:
        InputError: numbers of rows or columns that do not fit, unknown ids, scores aggregated in another way, or
            seeds that are the ceiling's too.

    >>> effects = {"a": 3.0, "b": -2.0, "c": 1.0, "d": 0.5}  # a truth that adds up, and a prediction of half its size
    >>> bank = Bank(lambda omit, seed: [7.0 + sum(effects[i] for i in omit)], progress=False)
    >>> found = leave_one_out(bank, np.array([1.5, -1.0, 0.5, 0.25]), list("abcd"), examples=3)
    >>> found.labels, round(found.to_dict()["pearson_r"], 6), round(found.to_dict()["slope"], 6)
    (['a', 'b', 'c'], 1.0, 2.0)
    """
    methods, ids, place = _methods(predicted, ids, baselines, aggregate)
    if isinstance(examples, int):
        strength = np.abs(methods[METHOD]).sum(1)
        chosen = [ids[i] for i in np.argsort(-strength, kind="stable")[:examples]]
    else:
        chosen = list(examples)
    omissions = [[i] for i in chosen]
    settings = {"examples": len(chosen)}
    return _compare(
        "leave_one_out", bank, methods, place, omissions, chosen, aggregate, seeds, ceiling_seeds, resamples, settings
    )


def remove_groups(
    bank: Bank,
    predicted: Scores | np.ndarray,
    groups: Mapping[Hashable, Collection],
    ids: Sequence | None = None,
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    aggregate: str | None = "sum",
    seeds: Sequence[int] = (0,),
    ceiling_seeds: Sequence[int] = (1,),
    resamples: int = 1000,
) -> Validation:
    """Removes groups of examples, each predicted by the sum of its members' effects, eq. (8).

    Args:
        predicted, ids, baselines, aggregate, seeds, ceiling_seeds, resamples: as in `leave_one_out`.
        groups: name → the ids of its members; at least three groups.

    Returns, raises: as `leave_one_out`.

    >>> bank = Bank(lambda omit, seed: [float(sum(omit))], progress=False)
    >>> found = remove_groups(bank, np.arange(6.0), {"low": [0, 1], "high": [4, 5], "odd": [1, 3, 5]}, range(6))
    >>> found.removals["measured"].tolist(), found.removals["influence"].tolist()
    ([1.0, 9.0, 9.0], [1.0, 9.0, 9.0])
    """
    methods, _, place = _methods(predicted, ids, baselines, aggregate)
    omissions = [list(group) for group in groups.values()]
    return _compare(
        "remove_groups", bank, methods, place, omissions, list(groups), aggregate, seeds, ceiling_seeds, resamples, {}
    )


def datamodelling_score(
    bank: Bank,
    predicted: Scores | np.ndarray,
    ids: Sequence | None = None,
    subsets: int = 100,
    fraction: float = 0.95,
    seed: int = 0,
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    aggregate: str | None = None,
    seeds: Sequence[int] = (0,),
    ceiling_seeds: Sequence[int] = (1,),
    resamples: int = 1000,
) -> Validation:
    """Linear datamodelling score (Park et al., 2023): trains on random subsets, and correlates over them, per test,
    the measured loss with the sum of the predicted effects; the mean over tests.

    The LDS is `spearman_r` of the result, its interval a bootstrap over subsets. An LDS means nothing without its
    `fraction`: at one half the removal is too large for any first-order prediction.

    Args:
        predicted, ids, baselines, aggregate, seeds, ceiling_seeds, resamples: as in `leave_one_out`.
        subsets: how many; the first ones of a larger number are the same, so that a bank can grow.
        fraction: of the rows that is kept, in (0, 1); at least one row is removed.
        seed: of the draw of subsets.

    Returns, raises: as `leave_one_out`.

    >>> bank = Bank(lambda omit, seed: [-float(sum(omit))], progress=False)
    >>> found = datamodelling_score(bank, -np.arange(40.0), range(40), subsets=20, fraction=0.9)
    >>> round(found.to_dict()["spearman_r"], 6), found.settings["removed"]
    (1.0, 4)
    """
    methods, ids, place = _methods(predicted, ids, baselines, aggregate)
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction}; expected the share of rows that is kept, between 0 and 1.")
    omissions = random_omissions(ids, subsets, fraction, seed)
    settings = {"subsets": subsets, "fraction": fraction, "subset_seed": seed, "removed": len(omissions[0])}
    labels = list(range(subsets))
    return _compare(
        "datamodelling_score",
        bank,
        methods,
        place,
        omissions,
        labels,
        aggregate,
        seeds,
        ceiling_seeds,
        resamples,
        settings,
    )


def random_omissions(ids: Sequence, subsets: int, fraction: float, seed: int = 0) -> list[list]:
    """`subsets` random sets of round((1 − fraction) N) ids, at least one id each: what each subset lacks."""
    generator = np.random.default_rng(seed)
    size = max(1, round((1 - fraction) * len(ids)))
    return [[ids[i] for i in generator.choice(len(ids), size, replace=False)] for _ in range(subsets)]


def _methods(predicted, ids, baselines, aggregate) -> tuple[dict[str, np.ndarray], list, dict]:
    """name → removal effects (rows, Q), summed over columns where the experiment does; the rows' ids; id → row."""
    if aggregate not in (None, "sum", "mean"):
        raise InputError(f"aggregate is {aggregate!r}; expected 'sum', 'mean' or None.")
    if ids is None:
        if not isinstance(predicted, Scores):
            raise InputError("predictions given as an array need ids=, the example ids of its rows.")
        ids = predicted.frame["example_id"]
    ids = [i.item() if isinstance(i, np.generic) else i for i in ids]
    given = {METHOD: predicted, **(baselines or {})}
    if len(given) != 1 + len(baselines or {}):
        raise InputError(f"a baseline cannot be called {METHOD!r}, the name of the method itself.")
    found = {name: _effects(name, values, aggregate) for name, values in given.items()}
    for name, values in found.items():
        if len(values) != len(ids):
            raise InputError(f"{name!r} has {len(values)} rows, but there are {len(ids)} ids.")
    return found, ids, {i: row for row, i in enumerate(ids)}


def _effects(name: str, values: Scores | np.ndarray, aggregate: str | None) -> np.ndarray:
    if isinstance(values, Scores):
        had = values.metadata.get("certificate", {}).get("aggregate")
        if had != aggregate and had is not None:
            raise InputError(
                f"the scores of {name!r} are of the {had} over the test examples, but aggregate is {aggregate!r}: use "
                "the same, or scores with one column a test example."
            )
        values = values.removal_effects()
    values = np.asarray(values, dtype=np.float64)
    values = values.reshape(len(values), -1)
    if aggregate is None or values.shape[1] == 1:
        return values
    return _aggregated(values, aggregate)


def _aggregated(values: np.ndarray, aggregate: str) -> np.ndarray:
    return getattr(values, aggregate)(axis=1, keepdims=True)


def _compare(
    kind, bank, methods, place, omissions, labels, aggregate, seeds, ceiling_seeds, resamples, settings
) -> Validation:
    unknown = [i for omitted in omissions for i in omitted if i not in place]
    if unknown:
        raise InputError(f"there is no row with the example_id {unknown[0]!r} among the predictions.")
    if set(seeds) & set(ceiling_seeds):
        raise InputError(
            f"seeds {list(seeds)} and ceiling_seeds {list(ceiling_seeds)} overlap: the ceiling would lie."
        )

    def measure(some: Sequence[int]) -> np.ndarray:
        effects = bank.effects(omissions, some)
        return effects if aggregate is None else _aggregated(effects, aggregate)

    measured = measure(seeds)
    repeated = measure(ceiling_seeds) if len(ceiling_seeds) else None
    predicted = {}
    for name, values in methods.items():
        if values.shape[1] != measured.shape[1]:
            raise InputError(
                f"{name!r} has {values.shape[1]} test columns, but the bank measures {measured.shape[1]}: score the "
                "same test examples."
            )
        predicted[name] = np.array([values[[place[i] for i in omitted]].sum(0) for omitted in omissions])
    settings = {"seeds": list(seeds), "ceiling_seeds": list(ceiling_seeds), "aggregate": aggregate, **settings}
    settings |= {"bank": bank.fingerprint, "unreached": bank.unreached(omissions, [*seeds, *ceiling_seeds])}
    return Validation(
        kind=kind,
        correlations={name: correlation(values, measured, resamples) for name, values in predicted.items()},
        ceiling=None if repeated is None else correlation(repeated, measured, resamples),
        omissions=omissions,
        labels=labels,
        measured=measured,
        repeated=repeated,
        predicted=predicted,
        settings=settings,
    )
