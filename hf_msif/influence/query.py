"""`Query`: a question about test rows with the solution of every stage; saved once, it scores any corpus later."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..display import Displayed, Summary
from ..engine import folders, repository
from ..engine.files import flat_keys, save_tensors, write_atomically
from ..engine.hashing import describe, digest, tensors_fingerprint
from ..errors import InputError
from ..registry import REPORTS, registered
from ..scoring.layer_scores import layer_scores, layers_of
from ..scoring.noise import Noise
from ..scoring.orders import columns_of
from ..scoring.scorable import Scorable
from ..scoring.scorer import score
from ..scoring.scores import Scores
from ..scoring.shortlist import shortlist
from ..scoring.token_scores import token_scores
from . import query_overview, saved_query
from .chain import BoundStage, Chain
from .differentiation import StageCertificate, StageSolution
from .direction import Direction, Directions
from .mask_rounds import in_rounds, with_mask_rounds
from .replicates import Replicates, is_direction, measured_noise
from .saved_query import FILES, FORMAT

if TYPE_CHECKING:
    import pandas as pd

NOT_COMPARED = "replicates that are not compared yet: query.noise() compares them, and so do scores"


@dataclass(repr=False)
class Query(Displayed):
    """The answer for test rows: the solution of every stage, with one column per test row or one for all of them.

    Attributes:
        solutions: stage name → its solution (u_k of an implicit stage, ∂f/∂w of the rows of an unrolled one), with its
            certificate.
        tests: the test rows.
        losses: the loss of each test row at the final parameters, a sum over its terms.
        aggregate: None: one column per test row; "sum" or "mean": one column for all of them, eq. (8).
        chain: the chain whose stages were pulled back.
        facts: stage name → facts about the stage for the certificate; measured when the query is made. Those of a
            stage that has replicates have their `noise`.
        identity: stage name → `BoundStage.identity`: what the query depends on.
        measurement: name of what is explained, f: "loss", or another of `measurements`.
        values: f of each test row at the final parameters; the losses where it is the loss.
        predictions: what the model says of each test row, see `predictions.predictions`.
    """

    solutions: dict[str, StageSolution]
    tests: list[dict]
    losses: list[float]
    aggregate: str | None
    chain: Chain
    facts: dict[str, dict] = field(default_factory=dict)
    identity: dict[str, dict] = field(default_factory=dict)
    measurement: str = "loss"
    values: list[float] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self):
        self.values = self.values or self.losses
        self.predictions = self.predictions or [{} for _ in self.tests]
        for bound in self.chain.stages:  # the query of a damping sweep holds the swept stage alone
            if bound.name in self.solutions and bound.name not in self.facts:
                self.facts[bound.name], self.identity[bound.name] = _facts(bound), bound.identity

    def summary(self) -> Summary:
        names = [bound.name for bound in self.chain.stages if bound.name in self.solutions]
        stages = {name: (self.facts[name], self.solutions[name].certificate) for name in names}
        asked = query_overview.Asked(self.tests, self.values, self.measurement, self.aggregate)
        return query_overview.summary(asked, stages, self.noise_text(names[0]))

    @property
    def columns(self) -> int:
        """Q: the number of test rows, or 1 where they are aggregated."""
        return next(iter(self.solutions.values())).columns

    @property
    def certificates(self) -> dict[str, StageCertificate]:
        """Stage name → how well its system was solved, or how well its run was replayed."""
        return {name: solution.certificate for name, solution in self.solutions.items()}

    def noise(self, stage: str | None = None) -> Noise | None:
        """How the replicates of a stage's ranking scatter, and its reliability; None where there is one replicate.

        Where the query did not compare them, all processes do so together now, on `SAMPLE_ROWS` random rows of the
        stage (the first ones of a stream).

        Args:
            stage: name of the stage whose rows are ranked; defaults to the first.
        """
        bound = self.chain.stage(stage)
        return self._compared(bound) if self._has_replicates(bound) else None

    def noise_text(self, stage: str | None = None) -> str:
        """One sentence on the sampling noise of a stage's ranking; it begins with its reliability where that is known.

        Args:
            stage: name of the stage whose rows are ranked; defaults to the first.
        """
        bound = self.chain.stage(stage)
        if self._has_replicates(bound):
            is_known = self.facts[bound.name].get("noise") is not None
            return str(self._compared(bound)) if is_known else NOT_COMPARED
        onwards = self.chain.stages[self.chain.stages.index(bound) :]
        if any(each.differentiation.draws for each in onwards):
            return (
                "no error bars: masks or rows of the curvature are drawn, but by one replicate (replicates=2 has them)"
            )
        return "no sampling noise: no masks are drawn, and no curvature is estimated on a sample"

    def _compared(self, bound: BoundStage) -> Noise:
        """How the replicates of a stage scatter."""
        facts = self.facts[bound.name]
        if facts.get("noise") is None:
            facts["noise"] = measured_noise(bound, self._scorable(bound, self._solution(bound, "auto"))).to_dict()
        return Noise.from_dict(facts["noise"])

    def _has_replicates(self, bound: BoundStage) -> bool:
        return isinstance(self.solutions.get(bound.name), Replicates)

    @property
    def plain_tests(self) -> list[dict]:
        """The test rows as they are saved."""
        return plain_rows(self.tests)

    def score(
        self,
        corpus,
        stage: str | None = None,
        batch_size: int | None = None,
        method: str = "auto",
        mask_rounds: int | str | None = None,
        norms: str | None = None,
        **settings,
    ) -> Scores:
        """Influence of every row of `corpus`, as an example of `stage`, on f: the test loss, or what else is measured.

        Args:
            corpus: a table or a stream of rows, see `engine.corpus.as_corpus`. Each has the `example_id` that it has
                in the stage's data (it seeds a sentence's mask); rows without one are numbered.
            stage: name of the stage whose examples the rows are; defaults to the first.
            batch_size: rows per batch; defaults to that of the stage. It does not change a score.
            method: how the rows of an implicit stage are scored, see `Direction`: "auto", "forward" or "layerwise".
                Both are exact.
            mask_rounds: rounds of masks per row of an implicit stage, whose scores are averaged; defaults to
                `Stage.mask_rounds`. With `keep` they are for a shortlist: all rows are scored with those of the stage,
                and the rows that are kept with these. "auto": doubled until masks have at most 5 % of the variance
                between rows, as measured on 128 of them; the result is printed, and in the metadata as `mask_noise`.
            norms: what relative influence divides by, of an implicit stage's rows: "gradient" adds the column
                `gradient_norm`, ‖∇ℓ_x‖, exact, for some 6 % more time from two columns on; "self" adds
                `self_influence` as well, ∇ℓ_xᵀ (A + λ)⁻¹ ∇ℓ_x with A EK-FAC's approximation of the stage's
                curvature (itself for curvature="ekfac"), for 40 to 80 % more time and a fit of A. Then
                `Scores.top` has the orders "relative" and "self_relative". Defaults to neither.
            output_dir: folder for the finished file, scores.parquet (scores-STAGE.parquet for another stage than the
                first), and meanwhile for parts that survive the process.
            resume: continue an interrupted scoring in `output_dir`, on any number of processes. A query, model,
                setting or corpus that has changed since is refused by name.
            keep: write only the `keep` rows of largest, of smallest and of least absolute influence per column, and
                those at the ends of the relative orders whose norms are asked for, with moments and a histogram of
                all rows; None: all rows.
            dtype: "tf32" computes float32 matrix products in TF32 on GPUs that have it; "bfloat16" computes in that
                type where autocast does. The error is measured, printed, and in the metadata as `dtype_error`. With
                `keep` it serves for a shortlist, and the rows that are kept have their exact scores, see
                `scoring.shortlist`. Defaults to the model's own precision.
            part_rows: rows per part; defaults to 4,096. An interruption loses the parts that are being scored (sixteen
                batches per process, or one part) and those that are being written.

        Returns:
            `Scores` with `influence` = ∂f/∂ε, eq. (6), positive where more of the row raises f (of the test loss:
            harmful), and `removal_effect` = −influence / N, the predicted change of f on removal.

        Raises:
            InputError: there is no such stage, a setting out of range, `mask_rounds` for a stage whose scores have no
                rounds, bad rows, or an interrupted scoring that does not fit.
        """
        bound = self.chain.stage(stage)
        columns = columns_of(norms)
        solution = self._solution(bound, method, columns)
        first = exact = self._scorable(bound, solution, columns)
        if mask_rounds is not None:
            exact = with_mask_rounds(first, bound, solution, mask_rounds, corpus, batch_size)
        is_short = settings.get("dtype") not in (None, "float32") or exact.objective != first.objective
        if settings.get("keep") is None or not is_short:
            return score(exact, corpus, batch_size=batch_size, **settings)
        return shortlist(exact, corpus, batch_size=batch_size, first=first, **settings)

    def token_scores(
        self,
        rows,
        stage: str | None = None,
        method: str = "auto",
        query: int | None = None,
        mask_rounds: int | None = None,
    ) -> pd.DataFrame:
        """Influence of every term of a few rows (each masked word, each predicted token) on the test loss.

        The loss of a row is a sum over terms, ℓ_x = Σ_t ℓ_t, and so is its influence: that of a term is ∂f/∂ε for
        F_k + ε ℓ_t, −⟨u_k, ∇ℓ_t⟩. It says which *predictions* of the row are harmful or helpful (positive is harmful),
        not which of the words that the model reads.

        Args:
            rows: a `datasets.Dataset` or a list of dicts or of strings, each with the `example_id` that it has in the
                stage's data (it seeds a sentence's mask), and the columns that the objective reads: for sentences
                in the column "text", `scores.top(10).to_dict("records")`.
            stage: name of the stage whose examples the rows are; defaults to the first. It must be an implicit one.
            method: "auto", "forward" or "layerwise", see `Direction.term_influence`. Both are exact.
            query: number of the query column; defaults to all of them.
            mask_rounds: rounds of masks per row, as of `score`; defaults to `Stage.mask_rounds`.

        Returns:
            A table with a line per term, by row and by `term`, the number of the term within its row:

            - `position`: which token of the row is predicted, from 0, special tokens included; `token`: its text. Both
              are empty where the objective does not say them.
            - `loss`: ℓ_t, with its share in ℓ_x: divided by the draws of `MaskedLM`, and by the row's number of terms
              where `reduction` is "example".
            - `influence`, or `influence_0`, `influence_1`, …: those of a row sum to what `score` says of it.

        Raises:
            InputError: there is no such stage or query column, or the stage is not implicit; bad rows; or an objective
                that does not say its terms, or says such that do not sum to its losses.
        """
        _, scorable, directions = self._by_derivatives(stage, method, query, mask_rounds)
        return token_scores(scorable, rows, directions.term_influence)

    def layer_scores(
        self, rows, stage: str | None = None, query: int | None = None, mask_rounds: int | None = None
    ) -> pd.DataFrame:
        """What each layer of the model contributes to the influence of a few rows on the test loss.

        I(x) = −⟨u_k, ∇ℓ_x⟩ is a sum over parameters: the share of a layer is that sum over the layer's own. It costs a
        backward pass per row, and the memory of one gradient.

        Args:
            rows: as of `token_scores`.
            stage: name of the stage whose examples the rows are; defaults to the first. It must be an implicit one.
            query: number of the query column; defaults to all of them.
            mask_rounds: rounds of masks per row, as of `score`; defaults to `Stage.mask_rounds`.

        Returns:
            A table with a line per row and layer: `example_id`; `layer`, the names of its parameters up to their first
            number ("encoder.layer.0"), or their first part where they have none ("embeddings", "cls"), see
            `scoring.layer_scores.layers_of`; and `influence`, or `influence_0`, `influence_1`, …: those of a row sum
            to what `score` says of it. A parameter that two layers share counts in one of them.

        Raises:
            InputError: there is no such stage or query column, or the stage is not implicit; or bad rows.
        """
        bound, scorable, directions = self._by_derivatives(stage, "auto", query, mask_rounds)
        layers = layers_of(bound.split.trained, getattr(bound.stage.model, "base_model_prefix", ""))
        return layer_scores(scorable, rows, layers, directions.layer_influence)

    def _by_derivatives(
        self, stage: str | None, method: str, query: int | None, mask_rounds: int | None
    ) -> tuple[BoundStage, Scorable, Direction | Directions | Replicates]:
        """An implicit stage, and what scores its rows by derivatives of their losses, for one query column or all."""
        bound = self.chain.stage(stage)
        solution = self._solution(bound, method)
        if not is_direction(solution):
            raise InputError(
                f"stage {bound.name!r} is differentiated by link={bound.stage.link_name!r}, whose rows are not scored "
                "by derivatives of their losses; expected an implicit stage: score its rows whole."
            )
        if query is not None:
            if isinstance(query, bool) or query not in range(self.columns):
                raise InputError(
                    f"query column {query} does not exist; this query has {self.columns} (numbered from 0)."
                )
            solution = solution.column(query)
            solution.prepare()
        scorable = replace(self._scorable(bound, solution), columns=solution.columns)
        if mask_rounds is not None:
            scorable, solution = in_rounds(scorable, bound, solution, mask_rounds)
        return bound, scorable, solution

    def _solution(self, bound: BoundStage, method: str, norms: tuple[str, ...] = ()) -> StageSolution:
        """The solution of a stage, which scores its rows by that method, with these norms."""
        solution = self.solutions[bound.name]
        if is_direction(solution):
            one = solution.each[0] if isinstance(solution, Replicates) else solution
            metric = bound.differentiation.metric(one.certificate) if "self_influence" in norms else None
            solution = solution.by(method, bool(norms), metric)
            solution.prepare()
        elif norms:
            raise InputError(
                f"norms are asked for, but stage {bound.name!r} is differentiated by link={bound.stage.link_name!r}: "
                "its influence is a sum over a run's steps, with a gradient at each of them, and no one norm belongs "
                "to it; expected an implicit stage, or norms=None."
            )
        elif method != "auto":
            raise InputError(
                f"method is {method!r}, but stage {bound.name!r} is differentiated by "
                f"link={bound.stage.link_name!r}, whose rows are not scored by derivatives; expected 'auto'."
            )
        return solution

    def _scorable(self, bound: BoundStage, solution: StageSolution, norms: tuple[str, ...] = ()) -> Scorable:
        count = self.facts[bound.name]["N"]
        first = bound is self.chain.stages[0]
        objective = bound.objective
        return Scorable(
            stage=bound.name,
            file_name="scores.parquet" if first else f"scores-{bound.name}.parquet",
            engine=bound.engine,
            model=bound.model,
            objective=objective,
            batch_size=bound.batch_size,
            columns=self.columns,
            count=count,
            influence=solution.influence,
            dtype=next(iter(bound.model.parameters.values())).dtype,
            metadata={
                "stage": bound.name,
                "N": count,
                "objective": describe(objective),
                "certificate": self.certificate(),
                "measurement": self.measurement,
                "tests": self.tests,
                "noise": None,
                "noise_text": self.noise_text(bound.name),
            },
            identity=partial(self._identity, bound),
            noise=partial(self._compared, bound) if self._has_replicates(bound) else None,
            seed=bound.stage.seed,
            norms=norms,
        )

    def _identity(self, bound: BoundStage) -> dict[str, Any]:
        """What the scores depend on: name for people → digest or plain value."""
        solution = tensors_fingerprint(self.solutions[bound.name].tensors())
        count = self.facts[bound.name]["N"]
        identity = {"the ranked stage": bound.name}
        identity["the query"] = digest([solution, self.plain_tests, self.aggregate or "", self.measurement, count])
        for stage, settings in self.identity.items():
            identity |= {f"{name} of stage {stage!r}": value for name, value in settings.items()}
        return identity

    def certificate(self) -> dict:
        """How far every stage can be trusted, with its N and settings; JSON-able.

        `solve` of a stage is the certificate of its linear system, or of its run. `gradient_norm` of an implicit stage
        is ‖∇F_k‖: the formulas are exact where it is zero. `text` has both for people.
        """
        stages = {}
        for name, facts in self.facts.items():
            certificate = self.solutions[name].certificate
            text = self.chain.stage(name).differentiation.summary(certificate, facts)
            if facts.get("noise"):
                text = f"{Noise.from_dict(facts['noise'])}\n{text}"
            stages[name] = {"solve": certificate.to_dict(), "text": text, **facts}
        facts = {"measurement": self.measurement, "values": self.values, "losses": self.losses}
        return {"stages": stages, "aggregate": self.aggregate, **facts, "predictions": self.predictions}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `query.safetensors` and `query.json` (certificate, tests); each whole or not at all.

        Of several processes, the main one writes.

        Raises:
            InputError: the folder has a file of such a name that this method did not write.
        """
        with self.chain.engine.raising_together():
            if self.chain.engine.is_main:
                self._write(Path(folder))

    def _write(self, folder: Path) -> None:
        marker = folders.read_marker(folder)
        if marker is None:
            for path in map(folder.joinpath, FILES):
                if path.exists():
                    raise InputError(f"{path} exists, and hf_msif did not write it: move it away, or save elsewhere.")
        # What can fail comes before the first file: the tensors of one query must not lie beside the text of another.
        tensors = flat_keys({stage: solution.tensors() for stage, solution in self.solutions.items()})
        state = {"format": FORMAT, "tests": self.plain_tests, **self.certificate(), "depends_on": self.identity}
        state = json.loads(json.dumps({**state, "tensors": tensors_fingerprint(tensors)}, default=str))
        text = json.dumps({**state, "sha256": digest(state)}, indent=2, ensure_ascii=False)
        if marker is None or marker.kind == "query":
            folders.write_marker(folder, "query", FILES)  # without the facts about an earlier query
        else:
            folders.add_names(folder, "query", FILES)
        save_tensors(tensors, folder / "query.safetensors")
        write_atomically(folder / "query.json", lambda part: part.write_text(text, encoding="utf-8"))

    def push_to_hub(self, repo_id: str, private: bool = True, token: str | None = None) -> str | None:
        """Sends the query to a model repository on the Hub: the files of `save_pretrained`, and a card.

        The rows of the tests leave this machine with it. Of several processes, the main one sends.

        Args:
            repo_id: `owner/name`; it is made if needed.
            private: only its owners may read it.
            token: defaults to that of `hf auth login`.

        Returns:
            The address of the repository; None on other processes than the main one.

        Raises:
            InputError: the Hub cannot be reached or refuses, or the repository is public and `private` is True.
        """
        with self.chain.engine.raising_together():
            if not self.chain.engine.is_main:
                return None
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                self._write(folder)
                card = query_overview.card(repo_id, self.summary(), self.certificate()["stages"])
                (folder / repository.CARD).write_text(card, encoding="utf-8")
                return repository.push(folder, [*FILES, repository.CARD], repo_id, "model", private, token)

    @property
    def plot(self) -> Any:
        """Pictures of the query: `plot.convergence()`, and those of `token_scores` and `layer_scores`."""
        return registered(REPORTS, "query")(self)

    @classmethod
    def check(
        cls, folder: str | os.PathLike, chain: Chain, tests: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Any]:
        """What the `query.json` in a folder holds, after checking that it could be made with `chain` today.

        Args:
            folder: where it was saved.
            chain: the stages as they are now.
            tests: the test rows that it should ask about; None: any.

        Raises:
            InputError: as `from_pretrained`, but for the tensors, which are not read; or other test rows.
        """
        folder = Path(folder)
        state = saved_query.read(folder)
        names = [bound.name for bound in chain.stages]
        if list(state["stages"]) != names:
            raise InputError(
                f"{folder} holds a query through the stages {list(state['stages'])}; this chain has {names}."
            )
        for bound in chain.stages:
            saved_query.check_unchanged(bound, state["depends_on"][bound.name], folder)
        if tests is not None and json.loads(json.dumps(plain_rows(tests))) != state["tests"]:
            raise InputError(
                f"the test rows are not those that the query in {folder} asks about: query again, or undo the change."
            )
        return state

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, chain: Chain, token: str | None = None, revision: str | None = None
    ) -> Query:
        """Loads a saved query for the chain it was made with.

        Args:
            source: a folder, or `owner/name` of a repository on the Hub.
            chain: the stages as they are now.
            token: defaults to that of `hf auth login`.
            revision: a branch, tag or commit of the repository.

        Raises:
            InputError: nothing is saved there, or the Hub cannot be reached; the files are damaged, or were changed
                since they were written; or something that the query depends on has changed since (it is named): a
                stage's model, data, objective, tokenizer or settings.
        """
        folder = repository.fetched(source, FILES, "model", token, revision)
        state = cls.check(folder, chain)
        by_stage = saved_query.read_tensors(folder, state, chain)
        solutions, facts = {}, {}
        for bound in chain.stages:
            saved = state["stages"][bound.name]
            solutions[bound.name] = saved_query.solution(bound, by_stage.get(bound.name, {}), state, folder)
            # Counting inside of scoring would be a pass that not all processes reach.
            bound.remember_size(saved["N"], saved["examples"])
            facts[bound.name] = {key: value for key, value in saved.items() if key not in ("solve", "text")}
        asked = {name: state[name] for name in ("measurement", "values", "predictions")}
        return cls(
            solutions, state["tests"], state["losses"], state["aggregate"], chain, facts, state["depends_on"], **asked
        )


def plain_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what JSON does not hold: texts and numbers, no pixels."""
    plain = (str, int, float, bool, type(None))
    return [{key: value for key, value in row.items() if isinstance(value, plain)} for row in rows]


def _facts(bound: BoundStage) -> dict:
    return {
        "link": bound.stage.link_name,
        "N": bound.count,
        "examples": bound.examples,
        "objective": describe(bound.objective),
        **bound.differentiation.facts(),
    }
