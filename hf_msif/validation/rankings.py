"""What the first rows of a ranking are worth: the test loss without them, and how many planted rows they hold."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..scoring.scores import Scores
from .bank import Bank
from .experiments import METHOD, effects_of_methods, random_omissions
from .measures import LossDifference, Recall, loss_difference, mean_recall, recalls
from .truth import OwnTruth, Truth

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# by → what is sorted, largest first, of removal effects
ORDERS = {"helpful": np.positive, "harmful": np.negative, "absolute": np.abs}


@dataclass(frozen=True)
class TopRemoval:
    """Query loss differences of the influence and of the baselines.

    Attributes:
        truth: which retrainings were measured, in words.
        differences: "influence" and the name of every baseline → `LossDifference`.
        first: method → per test column the ids that it puts first, which were left out.
        measured: method → measured removal effect of these, per column, (Q,).
        random: measured removal effects of the random draws, (R, Q).
        settings: fraction, seeds, number of retrainings that missed their stationary point, and so on.
    """

    truth: str
    differences: dict[str, LossDifference]
    first: dict[str, list[list]]
    measured: dict[str, np.ndarray]
    random: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)
    kind: str = "remove_top"

    @property
    def table(self) -> pd.DataFrame:
        """One row per method: difference, its interval, and the share of random draws that it is above."""
        import pandas as pd

        rows = [
            {"method": name, "difference": d.difference, "interval": d.interval, "above": d.above}
            for name, d in self.differences.items()
        ]
        return pd.DataFrame(rows)

    @property
    def removals(self) -> pd.DataFrame:
        """One row per removal: method ("random" of a draw has its number), test column (null: all), rows, effect."""
        import pandas as pd

        rows = [
            {"removed": name, "column": column, "examples": len(self.first[name][column]), "measured": effect}
            for name, effects in self.measured.items()
            for column, effect in enumerate(effects)
        ]
        size = self.settings["removed"]
        for draw, effects in enumerate(self.random):
            rows.append({"removed": f"draw {draw}", "column": None, "examples": size, "measured": effects.mean()})
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the fields of the influence's `LossDifference`, the same under each baseline's name; "kind" and
        "settings"."""
        influence = self.differences[METHOD].to_dict()
        others = {name: d.to_dict() for name, d in self.differences.items() if name != METHOD}
        return {"kind": self.kind, **influence, **others, "settings": self.settings}

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            [name, d.difference, f"[{d.interval[0]:.4f}, {d.interval[1]:.4f}]", d.above]
            for name, d in self.differences.items()
        ]
        d = self.differences[METHOD]
        head = (
            f"query loss difference by {self.truth}: without the {self.settings['removed']} rows "
            f"({self.settings['fraction']:.2%}) that help most against {d.draws} draws of random ones, {d.columns} "
            f"test column(s), {d.level:.0%} intervals over draws"
        )
        if missed := self.settings["unreached"]:
            head += f"; {missed} retrainings missed their stationary point"
        return head + "\n" + tabulate(rows, ["method", "difference", "", "above random"], floatfmt=(".3f", ".4f"))

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """The difference of every method with its interval; needs matplotlib (`pip install hf_msif[plots]`).

        Args:
            path: where to write the figure as PNG; None: it is not written.
        """
        from ..reports.figures import figure as new_figure

        figure = new_figure(figsize=(5, 1 + 0.35 * len(self.differences)), layout="constrained")
        axes = figure.subplots()
        for place, d in enumerate(self.differences.values()):
            axes.plot(d.interval, [place, place], color="C0", lw=1.5)
            axes.plot([d.difference], [place], "o", color="C0", ms=4)
        axes.axvline(0, color="0.85", lw=0.8)
        axes.set_yticks(range(len(self.differences)), list(self.differences))
        axes.invert_yaxis()
        axes.set_xlabel("test loss without the first rows − without random ones")
        if path is not None:
            figure.savefig(path, dpi=150, format="png")
        return figure


def remove_top(
    bank: Bank,
    predicted: Scores | np.ndarray,
    ids: Sequence | None = None,
    fraction: float = 0.01,
    draws: int = 20,
    seed: int = 0,
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    aggregate: str | None = None,
    truth: Truth = OwnTruth(),  # noqa: B008
    resamples: int = 1000,
) -> TopRemoval:
    """The query loss difference: trains without the rows that help a test most, and without as many random ones.

    For each test and method the rows with the largest predicted removal effects are left out, and the loss on that
    test is compared with the mean over random draws. Positive: without them the test does worse, as predicted. It
    takes one training per method and test (those that methods share are done once) and one per draw; with
    `aggregate` one per method.

    Args:
        bank: retrainings of the same chain, with the same tests.
        predicted: `Scores` of the corpus, or predicted removal effects (rows, Q) in the order of `ids`.
        ids: example ids of the rows of `predicted`; default to those of the scores.
        fraction: share of the rows that is left out, in (0, 1); at least one row is.
        draws: number of random draws, at least 2. A larger number begins with the same draws.
        seed: of the draws.
        baselines: name → `Scores` or array (rows, Q) of other methods, in the same order; see `validation.baselines`.
        aggregate: "sum" or "mean" over the test columns: one set of rows for all; None: one for each column.
        truth: which retrainings are measured: `OwnTruth` or `ExpectedTruth`.
        resamples: number of bootstrap samples of the draws.

    Returns:
        `TopRemoval`, in units of the test loss (of its sum or mean over tests, as `aggregate` says).

    Raises:
        InputError: numbers of rows or columns differ, the scores are aggregated in another way, the bank has no such
            truth, `fraction` is outside (0, 1), or there are fewer than two draws.

    >>> bank = Bank(lambda omit, seed: [float(sum(omit))], progress=False)
    >>> effects = np.arange(100.0)
    >>> found = remove_top(bank, effects, range(100), fraction=0.02, baselines={"opposite": -effects})
    >>> found.first["influence"], found.measured["influence"].tolist(), found.differences["influence"].above
    ([[99, 98]], [197.0], 1.0)
    >>> found.measured["opposite"].tolist(), found.differences["opposite"].above
    ([1.0], 0.0)
    """
    methods, ids, _ = effects_of_methods(predicted, ids, baselines, aggregate)
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction}; expected the share of the rows to leave out, between 0 and 1.")
    random_sets = random_omissions(ids, draws, 1 - fraction, seed)
    size = len(random_sets[0]) if random_sets else 0
    columns = {values.shape[1] for values in methods.values()}
    if len(columns) != 1:
        raise InputError(f"the methods have {sorted(columns)} test columns; expected as many: score the same tests.")
    first = {
        name: [[ids[i] for i in column] for column in np.argsort(-values, axis=0, kind="stable")[:size].T]
        for name, values in methods.items()
    }
    omissions = [*random_sets, *(omitted for of_method in first.values() for omitted in of_method)]
    effects = truth.effects(bank, omissions, aggregate)
    (width,) = columns
    if effects.shape[1] != width:
        raise InputError(
            f"the methods have {width} test columns, but the bank measures {effects.shape[1]}: score the same tests."
        )
    random, of_first = effects[:draws], effects[draws:].reshape(len(first), width, width)
    measured = {name: np.diagonal(values).copy() for name, values in zip(first, of_first, strict=True)}
    settings = {**truth.to_dict(), "aggregate": aggregate, "fraction": fraction, "removed": size, "draws": draws}
    settings |= {"draw_seed": seed, "bank": bank.fingerprint, "unreached": bank.unreached(omissions, truth.seeds)}
    return TopRemoval(
        truth=str(truth),
        differences={name: loss_difference(values, random, resamples) for name, values in measured.items()},
        first=first,
        measured=measured,
        random=random,
        settings=settings,
    )


@dataclass(frozen=True)
class PlantedRecall:
    """recall@k of the influence and of the baselines.

    Attributes:
        recalls: "influence" and the name of every baseline → `Recall`.
        units: method → recall of each unit, (units, number of k).
    """

    recalls: dict[str, Recall]
    units: dict[str, np.ndarray]

    @classmethod
    def over(cls, results: Sequence[PlantedRecall], resamples: int = 1000) -> PlantedRecall:
        """The mean over several seeds (of weights, masks, plants), with intervals over seeds.

        Args:
            results: of one seed each, with the same methods and the same k.
            resamples: number of bootstrap samples of the seeds.

        Raises:
            InputError: there are none, or methods or k differ.
        """
        kinds = {(tuple(result.recalls), result.recalls[METHOD].k) for result in results}
        if len(kinds) != 1:
            raise InputError(f"PlantedRecall.over got {len(kinds)} kinds of results; expected the same methods and k.")
        units = {name: np.stack([r.units[name].mean(0) for r in results]) for name in results[0].recalls}
        chance = np.mean([result.recalls[METHOD].chance for result in results], axis=0).tolist()
        k = results[0].recalls[METHOD].k
        return cls({name: mean_recall(values, k, chance, "seeds", resamples) for name, values in units.items()}, units)

    @property
    def table(self) -> pd.DataFrame:
        """One row per method and k: recall, interval, chance."""
        import pandas as pd

        rows = [
            {"method": name, "k": k, "recall": recall, "interval": interval, "chance": chance}
            for name, r in self.recalls.items()
            for k, recall, interval, chance in zip(r.k, r.recall, r.interval, r.chance, strict=True)
        ]
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the fields of the influence's `Recall`, and the same under each baseline's name."""
        others = {name: r.to_dict() for name, r in self.recalls.items() if name != METHOD}
        return {"kind": "planted_recall", **self.recalls[METHOD].to_dict(), **others}

    def __str__(self) -> str:
        from tabulate import tabulate

        r = self.recalls[METHOD]
        rows: list[list] = [
            [name] + [f"{x:.2f} [{low:.2f}, {high:.2f}]" for x, (low, high) in zip(o.recall, o.interval, strict=True)]
            for name, o in self.recalls.items()
        ]
        rows.append(["(chance)", *(f"{chance:.3f}" for chance in r.chance)])
        head = f"recall of planted rows, mean over {r.units} {r.of}, {r.level:.0%} intervals over {r.of}"
        return head + "\n" + tabulate(rows, ["method", *(f"first {k}" for k in r.k)])


def planted_recall(
    predicted: Scores | np.ndarray,
    planted: Collection | Sequence[Collection],
    ids: Sequence | None = None,
    k: Sequence[int] = (10, 30, 100),
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    by: str = "helpful",
    resamples: int = 1000,
) -> PlantedRecall:
    """How many of the rows that are known to matter a ranking puts first: recall@k.

        recall@k = (planted rows among the first k) / (planted rows),    k / rows for a random order

    Args:
        predicted: `Scores` of the corpus, or predicted removal effects (rows, Q) in the order of `ids`.
        planted: the example ids of the planted rows, the same for all tests; or a list (or tuple) of Q collections.
        ids: example ids of the rows of `predicted`; default to those of the scores.
        k: numbers of first rows, ascending.
        baselines: name → `Scores` or array (rows, Q) of other methods, in the same order; see `validation.baselines`.
        by: what comes first, "helpful" (the largest removal effect), "harmful" or "absolute".
        resamples: number of bootstrap samples of the tests.

    Returns:
        `PlantedRecall`, a mean over tests with intervals over tests. `PlantedRecall.over` takes several to a mean
        over seeds.

    Raises:
        InputError: numbers of rows or columns differ, a planted id has no row, a test has none, `k` is outside 1 to
            the number of rows, or `by` is unknown.

    >>> effects = np.array([[0.0], [3.0], [-1.0], [2.0]])
    >>> found = planted_recall(effects, {"b", "c"}, list("abcd"), k=(1, 2, 4))
    >>> found.recalls["influence"].recall, found.recalls["influence"].chance
    ((0.5, 0.5, 1.0), (0.25, 0.5, 1.0))
    """
    methods, ids, row_of = effects_of_methods(predicted, ids, baselines, None)
    if by not in ORDERS:
        raise InputError(f"by is {by!r}; expected one of {', '.join(ORDERS)}.")
    if not len(k) or min(k) < 1 or max(k) > len(ids):
        raise InputError(f"k is {list(k)}; expected numbers from 1 to the number of rows, {len(ids)}.")
    width = methods[METHOD].shape[1]
    several = isinstance(planted, (list, tuple)) and all(
        isinstance(of, (list, tuple, set, frozenset)) for of in planted
    )
    sets = list(planted) if several else [planted] * width
    is_planted = np.zeros((len(ids), width), dtype=bool)
    if len(sets) != width or any(values.shape[1] != width for values in methods.values()):
        counts = sorted({values.shape[1] for values in methods.values()})
        raise InputError(
            f"there are {len(sets)} sets of planted ids, and methods with {counts} columns: give as many."
        )
    for column, of_test in enumerate(sets):
        unknown = [i for i in of_test if i not in row_of]
        if unknown or not len(of_test):
            raise InputError(
                f"planted holds {unknown[0]!r}, which no row has." if unknown else "planted is empty; expected ids."
            )
        is_planted[[row_of[i] for i in of_test], column] = True
    order = {name: np.argsort(-ORDERS[by](values), axis=0, kind="stable") for name, values in methods.items()}
    units = {name: recalls(places, is_planted, k) for name, places in order.items()}
    chance = [number / len(ids) for number in k]
    return PlantedRecall(
        {name: mean_recall(values, k, chance, "tests", resamples) for name, values in units.items()}, units
    )
