"""`Query`: the whole state of a question, u_k of every stage; saved once, it scores any corpus later."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .. import vectors
from ..engine.corpus import Stream
from ..engine.files import load_tensors, save_tensors, write_whole
from ..engine.hashing import describe
from ..errors import InputError
from ..scoring.scores import Scores
from ..solvers import Certificate
from ..vectors import Block
from .chain import AlphaEstimate, Link
from .unrolled import RunCertificate

if TYPE_CHECKING:
    from .multistage import MultiStageInfluence

FORMAT = 2


@dataclass
class Query:
    """u_k = (curvature of stage k)⁻¹ a_k for every stage, one column a test example.

    Attributes:
        solutions: stage name → block u_k on the stage's trained parameters; of an unrolled stage {"weights": ∂f/∂w},
            the test loss's derivative in the weight of each of its rows.
        certificates: stage name → how well its system was solved, or its run replayed.
        tests: the test rows asked about.
        losses: their losses f before anything is changed.
        aggregate: None, "sum" or "mean".
        chain: the `MultiStageInfluence` that made it.
        facts: stage name → what the certificate says of the stage itself; measured when the query is made.
    """

    solutions: dict[str, Block]
    certificates: dict[str, Certificate | RunCertificate]
    tests: list[dict]
    losses: list[float]
    aggregate: str | None
    chain: MultiStageInfluence
    facts: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        for link in self.chain.links:
            name = link.stage.name  # a damping sweep's query holds the swept stage alone
            if name in self.certificates and name not in self.facts:
                self.facts[name] = _facts(link)

    @property
    def columns(self) -> int:
        """Number of query columns: test examples, or one for a group."""
        return vectors.columns(next(iter(self.solutions.values())))

    @property
    def plain_tests(self) -> list[dict]:
        """The test rows as they are saved: pixels stay where they came from."""
        plain = (str, int, float, bool, type(None))
        return [{key: value for key, value in row.items() if isinstance(value, plain)} for row in self.tests]

    def score(self, corpus, stage: str | None = None, batch_size: int | None = None, **more) -> Scores:
        """Influence of every row of `corpus`, as an example of `stage` (the first by default), on the test loss.

        Args:
            corpus: a table or a stream of rows, see `corpus.as_corpus`. They carry `example_id` as in the stage's
                data (it seeds a sentence's mask); rows without one are numbered.
            stage: whose examples the rows are.
            batch_size: rows a batch; None: the stage's own. It does not change a score.
            output_dir: folder for the finished file, scores.parquet (scores-STAGE.parquet for another stage than the
                first), and meanwhile for parts that survive the process.
            resume: go on with what an interrupted scoring left in `output_dir`, on any number of processes; what
                changed in the meantime is refused by name.
            keep: only so many rows of largest, smallest and least absolute influence, with moments and a histogram of
                all of them: for corpora whose scores need not all be kept.
            dtype: "tf32" has matrix products of float32 in it, where a GPU can; "bfloat16" computes in it where
                autocast does. The error is measured, printed and in the metadata as `dtype_error`.
            part_rows: rows a part; 4,096 by default. What an interruption can cost is the rounds in hand: the parts
                that are scored, sixteen batches a process or one part at least, and those that are written.

        Returns:
            `Scores` with `influence` = ∂f/∂ε (eq. (6), positive = harmful) and `removal_effect` = −influence / N.
        """
        from ..scoring.scorer import score

        return score(self, corpus, stage, batch_size, **more)

    def certificate(self) -> dict:
        """JSON-able: how far every stage can be trusted, with its N and settings.

        A stage's `solve` is the certificate of its linear system and `gradient_norm` is ‖∇F_k‖: the formulas of an
        implicit pull-back are exact where it is zero. `text` says both for people.
        """
        stages = {
            name: {"solve": self.certificates[name].to_dict(), "text": self._text(name), **facts}
            for name, facts in self.facts.items()
        }
        return {"stages": stages, "aggregate": self.aggregate, "losses": self.losses}

    def _text(self, name: str) -> str:
        facts, lines = self.facts[name], str(self.certificates[name])
        if facts["alpha_estimate"]:
            lines += f"\n{AlphaEstimate(**facts['alpha_estimate'])}"
        if facts["link"] == "unrolled":
            return lines
        return (
            f"{lines}\nnorm of the objective's gradient {facts['gradient_norm']:.1e} on "
            f"{facts['curvature_examples']:,} examples (the formulas are exact where it is 0)"
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `query.safetensors` and `query.json` (certificate, tests); each whole or not at all. Of several
        processes the main one writes."""
        with self.chain.engine.together():
            if self.chain.engine.is_main:
                self._write(Path(folder))

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # What can fail comes before the first file: tensors of one query must not lie beside the text of another.
        state = {"format": FORMAT, "tests": self.plain_tests, **self.certificate()}
        text = json.dumps(state, indent=2, default=str, ensure_ascii=False)
        flat = {f"{stage}/{name}": t for stage, u in self.solutions.items() for name, t in u.items()}
        save_tensors(flat, folder / "query.safetensors")
        write_whole(folder / "query.json", lambda part: part.write_text(text, encoding="utf-8"))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, chain: MultiStageInfluence) -> Query:
        """Loads a saved query for the chain it was made with.

        Raises:
            InputError: nothing is saved there, or a stage's parameters or data have changed since (it is named).
        """
        folder = Path(folder)
        if not (folder / "query.json").exists():
            raise InputError(
                f"{folder} holds no query; expected query.json and query.safetensors as `save_pretrained` writes."
            )
        state = json.loads((folder / "query.json").read_text())
        if state["format"] != FORMAT:
            raise InputError(
                f"{folder} was written in format {state['format']}; this version reads {FORMAT}: query again."
            )
        names = [link.stage.name for link in chain.links]
        if list(state["stages"]) != names:
            raise InputError(
                f"{folder} holds a query through the stages {list(state['stages'])}; this chain has {names}."
            )
        for link in chain.links:
            saved = state["stages"][link.stage.name]
            if link.fingerprint != saved["fingerprint"]:
                raise InputError(
                    f"the model of stage {link.stage.name!r} is not the one that the query in {folder} was made "
                    "with: query again."
                )
            if not isinstance(link.rows, Stream) and len(link.rows) != saved["examples"]:
                raise InputError(
                    f"the data of stage {link.stage.name!r} have {len(link.rows):,} rows, but {saved['examples']:,} "
                    f"when the query in {folder} was made: query again."
                )
        flat, _ = load_tensors(folder / "query.safetensors")
        solutions: dict[str, Block] = {name: {} for name in names}
        for key, tensor in flat.items():
            stage, name = key.split("/", 1)
            solutions[stage][name] = tensor.to(chain.engine.device)
        kinds = {"proximal": Certificate, "unrolled": RunCertificate}
        for link in chain.links:
            name, saved = link.stage.name, state["stages"][link.stage.name]
            if saved["link"] != link.stage.link:
                raise InputError(
                    f"the query in {folder} pulled stage {name!r} back by a link that is {saved['link']}; the stage's "
                    f"is {link.stage.link}: query again."
                )
        certificates = {
            name: kinds[state["stages"][name]["link"]].from_dict(state["stages"][name]["solve"]) for name in names
        }
        facts = {
            name: {key: value for key, value in state["stages"][name].items() if key not in ("solve", "text")}
            for name in names
        }
        return cls(solutions, certificates, state["tests"], state["losses"], state["aggregate"], chain, facts)


def _facts(link: Link) -> dict:
    stage = link.stage
    found = {
        "link": stage.link,
        "N": link.count,
        "examples": link.examples,
        "weight_decay": (link.recording or stage).weight_decay,
        "alpha": (link.recording or link).alpha,
        "alpha_estimate": None,
        "objective": describe(stage.objective),
        "fingerprint": link.fingerprint,
    }
    if link.recording is not None:
        return found
    if stage.alpha == "auto" and link.split.proximal:
        found["alpha_estimate"] = asdict(link.estimate)
    return found | {
        "curvature": stage.curvature_name,
        "curvature_examples": len(link.curvature_rows),
        "gradient_norm": link.gradient_norm,
    }
