"""`Page`: what the HTML report says, before it is HTML: warnings, a section per test, settings."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..scoring.noise import UNRELIABLE
from .section import Sections
from .shares import Shares

if TYPE_CHECKING:
    from ..scoring.scores import Scores

REDUNDANT = ("solve", "text", "noise")  # facts of a stage that its certificate says in words


class Page:
    """What a report says of scores.

    Args:
        scores: those of a query.
        k: texts per list.
        shares: of tokens and layers; None: they are not known.
        command: prints the report again.

    Raises:
        InputError: scores that do not say which tests they are about.
    """

    def __init__(self, scores: Scores, k: int, shares: Shares | None, command: str | None):
        self.scores, self.k, self.shares, self.command = scores, k, shares, command
        self.metadata = scores.metadata
        self.stages: dict[str, Any] = (self.metadata.get("certificate") or {}).get("stages", {})
        self.stage: str = self.metadata.get("stage") or "not known"
        kept = self.metadata.get("kept")
        self.rows: int = kept["all"][0]["count"] if kept else len(scores)
        sections = Sections(scores, k, shares, {row["example_id"]: row["columns"] for row in self.common})
        self.similarity = "Encoder cosine" if sections.has_cosines else "TF-IDF cosine"
        self.sections = [sections.make(q) for q in range(scores.columns)]
        lines = [line for section in self.sections for part in section.lists for line in part.lines]
        self.has_errors = any(line.error is not None for line in lines)
        self.has_probabilities = any(line.probability is not None for line in lines)
        self.is_shaded = any(piece.value is not None for line in lines for piece in line.pieces)

    @property
    def explained(self) -> str:
        """What influences change."""
        measurement = self.metadata.get("measurement", "loss")
        return "test loss" if measurement == "loss" else measurement

    @property
    def warnings(self) -> list[str]:
        """What a reader must know first."""
        noise, warnings = self.scores.noise, list[str]()
        if noise is not None and noise.lowest_reliability < UNRELIABLE:
            warnings.append(f"{noise}.")
        for name, facts in self.stages.items():
            converged = facts.get("solve", {}).get("converged", [])
            if not all(converged):
                warnings.append(
                    f"Stage {name}: {len(converged) - sum(converged)} of {len(converged)} solutions are not within "
                    "their tolerance; its certificate below says more."
                )
        if self.metadata.get("truncated"):
            warnings.append(
                f"{self.metadata['truncated']:,} of {self.rows:,} rows were cut after as many tokens as the model "
                "reads: their influence is that of what is left."
            )
        error = self.metadata.get("dtype_error")
        if error and "shortlist" not in self.metadata:
            warnings.append(
                f"Influences in {error['dtype']} differ by {error['relative']:.1%} from those in the model's own "
                f"precision (root mean square, on {error['rows']} rows)."
            )
        masks = self.metadata.get("mask_noise")
        if masks and masks["share"] > masks["target"]:
            warnings.append(f"The choice of masks makes {masks['share']:.0%} of the variance between rows.")
        return warnings

    @property
    def notes(self) -> list[str]:
        """Why something is not shown."""
        if self.shares is None:
            return [
                "Tokens are not shaded: their shares are not known; msif score or to_html(query=...) computes them."
            ]
        reasons = self.shares.reasons
        shown = (("token", "Tokens are not shaded"), ("layer", "Layers are not listed"))
        return [f"{what}: {reasons[kind]}" for kind, what in shown if kind in reasons]

    @property
    def noise_text(self) -> str:
        return self.metadata.get("noise_text") or "it is not known how much of the ranking is noise"

    @property
    def settings(self) -> list[tuple[str, str]]:
        """(name, value) of what the scores are about."""
        known = self.metadata
        settings = [("ranked stage", self.stage), ("rows scored", f"{self.rows:,}")]
        if "kept" in known:
            settings.append(("rows kept", f"{len(self.scores):,}: {known['kept']['keep']:,} per order"))
        if "N" in known:
            settings.append(("N, the number of terms of the stage", f"{known['N']:,.6g}"))
        settings.append(("explained", f"the {self.explained}"))
        way = (known.get("certificate") or {}).get("aggregate")
        if way:
            settings.append(("test examples", f"{len(known['tests']):,}, by the {way}"))
        named = {"mask_rounds": "rounds of masks", "shortlist": "shortlist", "objective": "objective of the stage"}
        return settings + [(name, in_words(known[key])) for key, name in named.items() if key in known]

    @property
    def certificates(self) -> list[tuple[str, list[str], list[tuple[str, str]]]]:
        """Of each stage its name, the lines of its certificate, and its settings."""
        return [
            (
                name,
                facts.get("text", "").splitlines(),
                [
                    (key.replace("_", " "), in_words(value))
                    for key, value in facts.items()
                    if key not in REDUNDANT and value is not None
                ],
            )
            for name, facts in self.stages.items()
        ]

    @cached_property
    def common(self) -> list[dict[str, Any]]:
        """The rows that lead the lists of nearly all tests, see `Scores.common`."""
        if self.scores.columns < 2:
            return []
        k = min(self.k, self.metadata.get("kept", {}).get("keep", self.k))
        return self.scores.common(k).to_dict("records")


def in_words(value: Any) -> str:
    """A setting for people: a mapping as its entries, those that are None left out.

    >>> in_words({"class": "MaskedLM", "draws": 8, "chunk": None, "damping": 0.0001234567})
    'MaskedLM, draws 8, damping 0.0001235'
    """
    if isinstance(value, dict):
        entries = [
            in_words(item) if key == "class" else f"{key.replace('_', ' ')} {in_words(item)}"
            for key, item in value.items()
            if item is not None
        ]
        return ", ".join(entries)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
