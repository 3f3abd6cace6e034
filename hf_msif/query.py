"""`Query`: the whole state of a question, u_k of every stage; saved once, it scores any corpus later."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import vectors
from .errors import InputError
from .scores import Scores
from .solvers import Certificate
from .vectors import Block

if TYPE_CHECKING:
    from .influence import MultiStageInfluence

FORMAT = 1


@dataclass
class Query:
    """u_k = (curvature of stage k)⁻¹ a_k for every stage, one column a test example.

    Attributes:
        solutions: stage name → block u_k on the stage's trained parameters.
        certificates: stage name → how well its system was solved.
        tests: the test rows asked about.
        losses: their losses f before anything is changed.
        aggregate: None, "sum" or "mean".
        chain: the `MultiStageInfluence` that made it.
    """

    solutions: dict[str, Block]
    certificates: dict[str, Certificate]
    tests: list[dict]
    losses: list[float]
    aggregate: str | None
    chain: MultiStageInfluence

    @property
    def columns(self) -> int:
        return vectors.columns(next(iter(self.solutions.values())))

    def score(self, corpus, stage: str | None = None, batch_size: int | None = None) -> Scores:
        """Influence of every row of `corpus`, as an example of `stage` (the first by default), on the test loss.

        Rows carry `example_id` as they did in the stage's data (it seeds a sentence's mask); rows without are
        numbered.

        Returns:
            `Scores` with `influence` = ∂f/∂ε (eq. (6), positive = harmful) and `removal_effect` = −influence / N.
        """
        from .scoring import score

        return score(self, corpus, stage, batch_size)

    def certificate(self) -> dict:
        """JSON-able: the certificate, N and settings of every stage."""
        stages = {}
        for link in self.chain.links:
            stage = link.stage
            if stage.name not in self.certificates:  # a query that stops short of a stage, as a damping sweep's does
                continue
            stages[stage.name] = {
                "solve": self.certificates[stage.name].to_dict(),
                "text": str(self.certificates[stage.name]),
                "N": link.count,
                "examples": len(link.rows),
                "curvature": stage.curvature,
                "curvature_examples": link.operator.examples,
                "weight_decay": stage.weight_decay,
                "alpha": stage.alpha,
                "objective": describe(stage.objective),
                "fingerprint": vectors.fingerprint(link.model.parameters),
            }
        return {"stages": stages, "aggregate": self.aggregate, "losses": self.losses}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `query.safetensors` and `query.json` (certificate, tests); each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Everything that can fail comes before the first file: tensors of one query must not lie beside the text of
        # another.
        state = {"format": FORMAT, "tests": self.tests, **self.certificate()}
        text = json.dumps(state, indent=2, default=str, ensure_ascii=False)
        flat = {f"{stage}/{name}": t for stage, u in self.solutions.items() for name, t in u.items()}
        vectors.save(flat, folder / "query.safetensors")
        part = folder / "query.json.part"
        part.write_text(text)
        os.replace(part, folder / "query.json")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, chain: MultiStageInfluence) -> Query:
        """Loads a saved query for the chain it was made with.

        Raises:
            InputError: nothing is saved there, or a stage's parameters have changed since (the stage is named).
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
            if vectors.fingerprint(link.model.parameters) != state["stages"][link.stage.name]["fingerprint"]:
                raise InputError(
                    f"the model of stage {link.stage.name!r} is not the one that the query in {folder} was made "
                    "with: query again."
                )
        flat, _ = vectors.load(folder / "query.safetensors")
        solutions: dict[str, Block] = {name: {} for name in names}
        for key, tensor in flat.items():
            stage, name = key.split("/", 1)
            solutions[stage][name] = tensor.to(chain.engine.device)
        certificates = {name: Certificate.from_dict(state["stages"][name]["solve"]) for name in names}
        return cls(solutions, certificates, state["tests"], state["losses"], state["aggregate"], chain)


def describe(settings) -> dict:
    """Class and plain fields of a settings object, for metadata."""
    plain = {
        k: v for k, v in vars(settings).items() if isinstance(v, (str, int, float, bool, tuple, list, type(None)))
    }
    return {"class": type(settings).__name__, **plain}
