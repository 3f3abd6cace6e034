"""The card of scores on the Hub: what the file holds, its columns, sign and unit, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..display import Summary, Table

TAGS = ["hf_msif", "influence-functions", "data-attribution"]
FILE = "scores.parquet"
COLUMNS = {
    "example_id": "of the row in the data of its stage",
    "text": "of the row; empty for an image",
    "text_sha256": "SHA-256 of the text or image",
    "duplicates": "how many rows have the same text or image, this row included",
    "loss": "ℓ of the row, a sum over its terms",
    "terms": "how many terms ℓ sums, such as masked words",
    "label": "class of the row, by name, where rows have one",
    "gradient_norm": "‖∇ℓ‖ of the row",
    "self_influence": "∇ℓᵀ (A + λ)⁻¹ ∇ℓ of the row, with the stage's curvature A",
    "influence": "∂f/∂ε: how f moves per unit of weight on the row",
    "influence_se": "standard error of the influence",
    "removal_effect": "−influence / N: the predicted change of f where the row is removed",
}


def card(repo_id: str, summary: Summary, metadata: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The README.md of a data set of scores.

    Args:
        repo_id: of the repository.
        summary: of the scores.
        metadata: of the scores.
        columns: names in the file.
    """
    from huggingface_hub import DatasetCardData

    files = [{"config_name": "default", "data_files": FILE}]
    header = DatasetCardData(tags=TAGS, configs=files, pretty_name="Influence scores").to_yaml()
    several = [name for name in COLUMNS if f"{name}_0" in columns]
    explained = [[f"{name}_0, {name}_1, …", f"{COLUMNS[name]}, of each test in their order"] for name in several]
    rows = [[name, COLUMNS[name]] for name in COLUMNS if name in columns] + explained
    parts = [
        "# Influence scores",
        summary.markdown(),
        f"`{FILE}` holds the text of every row and, in the metadata of its schema, the rows of the tests.",
        "## Columns",
        Summary("One row per row of the corpus", tables=[Table(["column", "what it is"], rows)]).markdown(),
        "## How to load it",
        f'''```python
from datasets import load_dataset
from hf_msif import Scores

table = load_dataset("{repo_id}", split="train")
scores = Scores.from_pretrained("{repo_id}")
print(scores.top(10, by="harmful"))
```''',
        *stage_texts((metadata.get("certificate") or {}).get("stages", {})),
    ]
    return f"---\n{header}\n---\n\n" + "\n\n".join(parts) + "\n"


def stage_texts(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Paragraphs of a card about the stages: how well each was solved, by which settings."""
    if not stages:
        return []
    paragraphs = ["## How the stages were solved"]
    for name, facts in stages.items():
        objective = facts["objective"]
        settings = ", ".join(f"{key}={value!r}" for key, value in objective.items() if key != "class")
        lines = [
            f"stage {name!r}: link={facts['link']!r}, {facts['examples']:,} rows, N = {facts['N']:,.6g}",
            f"objective {objective['class']}({settings})",
            *facts["text"].splitlines(),
        ]
        paragraphs.append("\n".join(f"    {line}" for line in lines))  # indented: a block of code that no text can end
    return paragraphs
