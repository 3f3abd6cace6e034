"""`Scores`: one row per scored row, a few columns per query column, and every setting in the metadata."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

import numpy as np
from pydantic import Field
from typing_extensions import TypedDict

from ..display import Displayed, Summary
from ..engine import repository
from ..engine.files import parse_json
from ..errors import FileError, InputError, first_line
from ..registry import REPORTS, registered
from . import overview
from .card import FILE, card
from .frames import METADATA_KEY, QUERY_COLUMNS, FrameInFile, FrameInMemory, frame_of, with_duplicates, write_frame
from .noise import Noise, top_probabilities
from .orders import DIVISORS, NORMS, ORDERS, order_key, relative

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset


class SavedMetadata(TypedDict):
    """What is read of the metadata of a file of scores; there is more."""

    columns: Annotated[int, Field(ge=1, le=1_000_000)]
    tests: NotRequired[list[dict[str, Any]]]
    kept: NotRequired[dict[str, Any]]


class Scores(Displayed):
    """Influence of every scored row on the test loss.

    Columns of `frame`:

    - `example_id`: of the row.
    - `text`: of the row; empty for an image.
    - `text_sha256`: SHA-256 of the text or of the image.
    - `duplicates`: how many rows have the same text or image, this row included.
    - `loss`: ℓ of the row, a sum.
    - `terms`: how many terms ℓ sums.
    - `label`: the row's class, by name, where rows have one.
    - `gradient_norm`: ‖∇ℓ_x‖, and `self_influence`: ∇ℓ_xᵀ (A + λ)⁻¹ ∇ℓ_x, where the scoring was asked for `norms`.
    - `influence` = ∂f/∂ε for F + ε ℓ_x, eq. (6). Positive: more weight on x raises the test loss (harmful). Negative:
      more weight on x lowers it (helpful).
    - `influence_se`: its standard error, see `noise.Noise`; only where the query has replicates.
    - `removal_effect` = −influence / N: predicted change of the test loss when x is removed and all stages are
      trained again.

    With several query columns the last three exist for each of them. In `frame` and in Parquet, which have one row per
    row of the corpus, their names end in `_0`, `_1`, … in the order of the tests. In `long`, `top` and `bottom` they
    have their plain names, and the column `test` says which test example a row is about. The frame of a file is
    read when it is asked for; `top`, `bottom` and `influence` read the columns and rows that they need.

    Where only the extreme rows were kept, `metadata["kept"]` says how many, with moments and a histogram of all
    influences, and there is no column `duplicates`.

    >>> rows = [{"example_id": i, "text": text} for i, text in enumerate(["vote", "tax", "vote"])]
    >>> scores = Scores.build(rows, np.array([[0.5], [-2.0], [1.0]]), count=4, columns={}, metadata={})
    >>> scores.top(2, by="harmful")[["example_id", "influence", "removal_effect", "duplicates"]].values.tolist()
    [[2.0, 1.0, -0.25, 2.0], [0.0, 0.5, -0.125, 2.0]]

    Args:
        frame: the columns above.
        metadata: ready for JSON; `columns` is the number of query columns.
    """

    def __init__(self, frame: pd.DataFrame, metadata: dict | None = None):
        self._source: FrameInMemory | FrameInFile = FrameInMemory(frame)
        self.metadata = metadata or {}

    @classmethod
    def build(
        cls,
        rows: Sequence[dict],
        influence: np.ndarray,
        count: float,
        columns: dict[str, Any],
        metadata: dict,
        text_column: str = "text",
        errors: np.ndarray | None = None,
    ) -> Scores:
        """Assembles scores in memory.

        Args:
            rows: in the order of the corpus, each with its `example_id`.
            influence: (rows, Q), eq. (6).
            count: N of the stage.
            columns: more columns: name → one value per row; scoring has `loss` and `terms`.
            metadata: ready for JSON.
            text_column: key of a row's text or image.
            errors: standard errors of the influences, (rows, Q); None: they are not known.
        """
        frame = with_duplicates(frame_of(rows, influence, count, columns, text_column, errors))
        return cls(frame, {**metadata, "columns": influence.shape[1]})

    @property
    def frame(self) -> pd.DataFrame:
        """All rows and columns."""
        if isinstance(self._source, FrameInFile):
            self._source = FrameInMemory(self._source.whole())
        return self._source.frame

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"<{overview.title(self.metadata, len(self))}>"

    def summary(self) -> Summary:
        # Without `top`, which computes a probability of every row.
        most = min(overview.ROWS, self.metadata.get("kept", {}).get("keep", overview.ROWS))
        first_rows = {by: self._picked(self._order(by, 0)[:most], 0, by) for by in ("helpful", "harmful")}
        return overview.summary(self.metadata, len(self), first_rows)

    @property
    def columns(self) -> int:
        """Number of query columns."""
        return self.metadata["columns"]

    def influence(self, query: int = 0) -> np.ndarray:
        """Influence on the loss of test example number `query`, (rows,), in corpus order.

        Raises:
            InputError: there is no such query column.
        """
        return self._source.column(f"influence{self._suffix(query)}")

    def influences(self) -> np.ndarray:
        """Influences on the losses of all test examples, (rows, Q), in corpus order."""
        return np.stack([self.influence(q) for q in range(self.columns)], axis=1)

    def standard_error(self, query: int = 0) -> np.ndarray | None:
        """Standard errors of `influence(query)`, (rows,); None where the query had no replicates.

        Raises:
            InputError: there is no such query column.
        """
        name = f"influence_se{self._suffix(query)}"
        return self._source.column(name) if name in self._source.names else None

    @property
    def noise(self) -> Noise | None:
        """How the replicates of the query scatter, and the reliability of the ranking; None without replicates."""
        facts = self.metadata.get("noise")
        return None if facts is None else Noise.from_dict(facts)

    @property
    def tests(self) -> list[dict[str, Any]]:
        """What each test row is and what the model says of it: its columns (`text`, `example_id`, …), its `loss`, and
        of a classification `label` and `prediction`, names of classes, with `probability`, that of the prediction.

        Raises:
            InputError: the scores were made by hand, and do not say which tests they are about.
        """
        rows = self.metadata.get("tests")
        if rows is None:
            raise InputError(
                "these scores do not say which tests they are about; expected those of a query: score again."
            )
        certificate = self.metadata.get("certificate") or {}
        tests = [dict(row) for row in rows]
        for test, loss in zip(tests, certificate.get("losses", ()), strict=False):
            test["loss"] = loss
        for test, prediction in zip(tests, certificate.get("predictions", ()), strict=False):
            test |= prediction
        return tests

    def removal_effects(self) -> np.ndarray:
        """Predicted changes of all test losses on removal of each row, (rows, Q)."""
        return self.frame[[f"removal_effect{self._suffix(q)}" for q in range(self.columns)]].to_numpy()

    def relative(self, query: int = 0, by: str = "relative") -> np.ndarray:
        """Influence relative to the size of the row's gradient, (rows,), in corpus order; signed as influence is.

        Args:
            query: number of the query column.
            by: "relative": I(x)/‖∇ℓ_x‖; "self_relative": I(x)/√(∇ℓ_xᵀ (A + λ)⁻¹ ∇ℓ_x), the ℓ-relative influence of
                RelatIF (`orders`). It is 0 for a row without gradient.

        Raises:
            InputError: there is no such query column, or the scores were made without the norms.
        """
        if by not in DIVISORS:
            raise InputError(f"by is {by!r}; expected one of {list(DIVISORS)}.")
        return relative(self.influence(query), by, self._divisor(by))

    def top(self, k: int = 10, by: str = "absolute", query: int | None = 0, distinct: bool = False) -> pd.DataFrame:
        """The first k rows of an order.

        Args:
            k: how many rows, at most.
            by: "absolute" (largest absolute influence first), "harmful" (most positive first), "helpful" (most
                negative first), "relative" or "self_relative" (largest absolute value of `relative` first, which is
                then a column); rows of equal value are in corpus order.
            query: number of the query column; None: all of them, the first k rows of each.
            distinct: whether to leave out a row whose text (or image) a row before it has.

        Returns:
            The columns of `frame`, without suffixes, and `test`, the number of the query column. Where there are
            standard errors, also `top_probability`: how likely the row would be among the k first without sampling
            noise (`noise.top_probabilities`). Since noise itself puts rows first, a score counts as normal around
            ρ · influence with the variance ρ · se², where ρ is the reliability of the replicates' mean. Rows that were
            not kept (`score(keep=...)`) do not compete.

        Raises:
            InputError: there is no such order or query column, fewer than k rows of each order were kept, or a
                relative order is asked of scores that were made without the norms.
        """
        if query is None:
            return self._of_all_tests(lambda q: self.top(k, by, q, distinct))
        places, errors = self._first(self._order(by, query), k, distinct), self.standard_error(query)
        rows = self._picked(places, query, by)
        noise = self.noise
        if errors is not None and noise is not None and len(places) and by not in DIVISORS:
            share = noise.reliability_of_mean(noise.reliability[query])
            share = 1.0 if share != share else share  # NaN: unknown
            values = share * self.influence(query) * (-1 if by == "helpful" else 1)
            probabilities = top_probabilities(values, share**0.5 * errors, len(places), absolute=by == "absolute")
            rows.insert(list(rows).index("influence_se") + 1, "top_probability", probabilities[places])
        return rows

    def bottom(self, k: int = 10, by: str = "absolute", query: int | None = 0, distinct: bool = False) -> pd.DataFrame:
        """The last k rows of an order, the last one first: by "absolute" those of least absolute influence.

        Args:
            k: how many rows, at most.
            by: the order, as of `top`.
            query: number of the query column; None: all of them, the last k rows of each.
            distinct: as of `top`.

        Raises:
            InputError: as `top`; or by is "absolute" or relative, and the rows come from a shortlist, which does not
                seek those of least influence.
        """
        if by not in ("harmful", "helpful") and "shortlist" in self.metadata:
            raise InputError(
                f"these scores come from a shortlist {self.metadata['shortlist']['first_pass']}, which does not seek "
                "the rows of least absolute influence: score without keep."
            )
        if query is None:
            return self._of_all_tests(lambda q: self.bottom(k, by, q, distinct))
        return self._picked(self._first(self._order(by, query)[::-1], k, distinct), query, by)

    def common(self, k: int = 10, by: str = "absolute", share: float = 0.8) -> pd.DataFrame:
        """The rows that lead the lists of nearly all test examples: generic ones, which say little about any of them.

        Args:
            k: length of a list, the top k of a query column.
            by: the order, as of `top`.
            share: of the query columns in whose top k a row must be, in (0, 1].

        Returns:
            `example_id`, `columns` (in how many lists the row is) and `text`, those in most lists first.

        Raises:
            InputError: as `top`; there are fewer than two query columns; or a share out of range.

        >>> rows = [{"example_id": i, "text": text} for i, text in enumerate(["the", "tax", "vote"])]
        >>> influence = np.array([[9.0, -8.0], [1.0, 0.0], [0.0, 1.0]])
        >>> scores = Scores.build(rows, influence, count=4, columns={}, metadata={})
        >>> scores.common(k=2).values.tolist()
        [[0, 2, 'the']]
        """
        if not 0 < share <= 1:
            raise InputError(f"share is {share!r}; expected a share of the query columns in (0, 1].")
        if self.columns < 2:
            raise InputError(
                "these scores have one query column; expected several, since a row is common where it leads the lists "
                "of nearly all of them: query several test examples without aggregate."
            )
        self._check_kept(min(k, len(self)))
        lists = np.zeros(len(self), dtype=int)
        for query in range(self.columns):
            lists[self._order(by, query)[:k]] += 1
        places = np.flatnonzero(lists >= share * self.columns)
        places = places[np.argsort(-lists[places], kind="stable")]
        found = self._source.rows(places)[["example_id", "text"]]
        found.insert(1, "columns", lists[places])
        return found

    def texts(self) -> list[str]:
        """The text of every row, in corpus order; empty for an image."""
        return self._source.column("text").tolist()

    def long(self) -> pd.DataFrame:
        """One row per row of the corpus and query column: the columns of `frame`, without suffixes, and `test`.

        >>> rows = [{"example_id": i, "text": text} for i, text in enumerate(["tax", "vote"])]
        >>> scores = Scores.build(rows, np.array([[1.0, 0.0], [3.0, -2.0]]), count=4, columns={}, metadata={})
        >>> scores.long()[["test", "example_id", "influence"]].values.tolist()
        [[0.0, 0.0, 1.0], [0.0, 1.0, 3.0], [1.0, 0.0, 0.0], [1.0, 1.0, -2.0]]
        """
        return self._of_all_tests(lambda q: self._of_test(self.frame, q))

    def to_pandas(self) -> pd.DataFrame:
        """A copy of `frame`."""
        return self.frame.copy()

    def to_dataset(self) -> Dataset:
        """`frame` as a data set of the library `datasets`."""
        from datasets import Dataset

        return Dataset.from_pandas(self.frame, preserve_index=False)

    def to_parquet(self, path: str | os.PathLike) -> None:
        """Writes one Parquet file with the metadata in its schema, whole or not at all."""
        write_frame(self.frame, self.metadata, path)

    def to_html(self, path: str | os.PathLike, k: int = 10, query: Any = None, corpus: Any = None) -> None:
        """Writes one HTML file that shows the scores: it needs no network, and opens from disk (`docs/report.md`).

        Per test example its prediction, the most helpful, the most harmful and the least influential texts with their
        influences, how similar their words are to the test's, and where all influences lie; what is known of the
        noise and of every linear system, warnings first.

        Args:
            path: of the file; one of this name is replaced, whole or not at all.
            k: texts per list; those that occur several times are one line.
            query: the `Query` that made the scores. With it, each shown token is shaded by its share of the influence,
                the share of each layer of the model is listed, and the encoder's similarity of texts is shown: some
                four passes per shown row. None: they are left out.
            corpus: the rows that were scored, as `Query.score` takes them, for an objective that reads more than the
                text of a row; only read with `query`.

        Raises:
            InputError: k is below 1, or scores that do not say which tests they are about.
        """
        registered(REPORTS, "html")(self, path, k=k, query=query, corpus=corpus)

    @classmethod
    def from_parquet(cls, path: str | os.PathLike) -> Scores:
        """Reads what `to_parquet` wrote.

        Raises:
            InputError: there is no such file, or it holds no scores.
        """
        if not Path(path).is_file():
            raise InputError(
                f"{path} does not exist; expected the Parquet file that `msif score` or `Scores.to_parquet` writes."
            )
        scores, way_out = cls.__new__(cls), "expected what `msif score` or `Scores.to_parquet` writes: score again"
        try:
            scores._source = FrameInFile(path)
        except (OSError, ValueError) as error:  # also of pyarrow
            raise FileError(f"{path} holds no scores ({first_line(error)}); {way_out}.") from error
        packed = scores._source.metadata.get(METADATA_KEY)
        if packed is None:
            raise InputError(
                f"{path} is a Parquet file without scores' metadata; expected one that `Scores.to_parquet` wrote."
            )
        scores.metadata = parse_json(packed, SavedMetadata, path, way_out)
        names = {f"influence{scores._suffix(q)}" for q in range(scores.columns)} | {"example_id", "text"}
        missing = sorted(names - set(scores._source.names))
        if missing:
            raise FileError(f"{path} is damaged (it has no column {missing[0]!r}): {way_out}.")
        return scores

    def push_to_hub(self, repo_id: str, private: bool = True, token: str | None = None) -> str:
        """Sends the scores to a data set on the Hub: `scores.parquet`, and a card that explains it.

        The texts of the ranked rows and of the tests leave this machine with it. Of several processes, call it on one.

        Args:
            repo_id: `owner/name`; it is made if needed.
            private: only its owners may read it.
            token: defaults to that of `hf auth login`.

        Returns:
            The address of the data set.

        Raises:
            InputError: the Hub cannot be reached or refuses, or the data set is public and `private` is True.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.to_parquet(folder / FILE)
            text = card(repo_id, self.summary(), self.metadata, self._source.names)
            (folder / repository.CARD).write_text(text, encoding="utf-8")
            return repository.push(folder, [FILE, repository.CARD], repo_id, "dataset", private, token)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, token: str | None = None, revision: str | None = None
    ) -> Scores:
        """Loads `scores.parquet` of a folder, such as that of a run, or of a data set on the Hub.

        Args:
            source: a folder, or `owner/name` of a data set.
            token: defaults to that of `hf auth login`.
            revision: a branch, tag or commit of the data set.

        Raises:
            InputError: there is no such folder or data set, or it holds no scores.
        """
        return cls.from_parquet(repository.fetched(source, [FILE], "dataset", token, revision) / FILE)

    @property
    def plot(self) -> Any:
        """Pictures of the scores: `plot.distribution()`, `plot.tokens(table)`, `plot.layers(table)`."""
        return registered(REPORTS, "scores")(self)

    def _suffix(self, query: int) -> str:
        if not 0 <= query < self.columns:
            raise InputError(
                f"query column {query} does not exist; these scores have {self.columns} (numbered from 0)."
            )
        return "" if self.columns == 1 else f"_{query}"

    def _order(self, by: str, query: int) -> np.ndarray:
        """Places of the rows, first to last; rows of equal value are in corpus order."""
        if by not in ORDERS:
            raise InputError(f"by is {by!r}; expected one of {list(ORDERS)}.")
        key = order_key(by, self.influence(query), self._divisor(by) if by in DIVISORS else None)
        return np.argsort(key, kind="stable")

    def _first(self, order: np.ndarray, k: int, distinct: bool) -> np.ndarray:
        """The first k places of an order; with `distinct`, of rows of equal text or image the first one alone. Where
        extremes were kept, distinct rows are sought among those of the order that surely were."""
        if not distinct:
            return order[:k]
        self._check_kept(min(k, len(order)))
        digests = self._source.column("text_sha256")
        places = dict[str, int]()
        for place in order[: self.metadata.get("kept", {}).get("keep", len(order))]:
            if len(places) == k:
                break
            places.setdefault(digests[place], int(place))
        return np.array(list(places.values()), dtype=int)

    def _divisor(self, by: str) -> np.ndarray:
        """The column by which a relative order divides."""
        name = DIVISORS[by]
        if name not in self._source.names:
            setting = next(setting for setting, columns in NORMS.items() if name in columns)
            raise InputError(
                f"by is {by!r}, but these scores have no column {name}; expected scores that were made with "
                f"norms={setting!r} (in a configuration corpus.norms: {setting}): score again."
            )
        return self._source.column(name)

    def _check_kept(self, k: int) -> None:
        keep = self.metadata.get("kept", {}).get("keep")
        if keep is not None and k > keep:
            raise InputError(
                f"these scores kept the {keep:,} most extreme rows of each order, not {k:,}: ask for at "
                f"most {keep:,}, or score again with a larger `keep`."
            )

    def _picked(self, places: np.ndarray, query: int, by: str) -> pd.DataFrame:
        self._check_kept(len(places))
        rows = self._of_test(self._source.rows(places), query)
        order = ["test", "example_id", "influence", "influence_se", "removal_effect", "loss", "terms", "label"]
        order += ["duplicates"]
        order += [*NORMS["self"], "text"]
        rows = rows[[name for name in order if name in rows]]
        if by in DIVISORS:
            value = relative(rows["influence"].to_numpy(), by, rows[DIVISORS[by]].to_numpy())
            rows.insert(3, f"{by}_influence", value)
        return rows

    def _of_test(self, rows: pd.DataFrame, query: int) -> pd.DataFrame:
        """Rows of the frame with the columns of one query column alone, under their plain names."""
        suffixes = [self._suffix(q) for q in range(self.columns)]
        names = {f"{name}{suffixes[query]}": name for name in QUERY_COLUMNS}
        others = {f"{name}{suffix}" for name in QUERY_COLUMNS for suffix in suffixes} - set(names)
        rows = rows[[name for name in rows if name not in others]].rename(columns=names)
        rows.insert(0, "test", query)
        return rows

    def _of_all_tests(self, of_test: Callable[[int], pd.DataFrame]) -> pd.DataFrame:
        import pandas as pd

        return pd.concat([of_test(q) for q in range(self.columns)], ignore_index=True)
