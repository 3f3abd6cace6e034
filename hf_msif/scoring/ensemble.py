"""`mean`: several rankings of the same rows as one, whose error bars say how far they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .frames import query_columns, with_duplicates
from .noise import SAMPLE_ROWS, Noise
from .orders import NORMS
from .scores import Scores


def mean(rankings: Sequence[Scores]) -> Scores:
    """The mean influence of each row over R rankings: of models trained from other starts, checkpoints or dampings.

    I(x) = (1/R) Σ_r I_r(x), and likewise every other number of a row. Each ranking counts as a replicate: `Noise` of
    their scatter gives `influence_se`, `top_probability` and the reliability, in the place of the error bars that the
    rankings have themselves. These then cover all that the rankings do not share, and not masks alone.

    Args:
        rankings: at least two, of the same rows in the same order, about the same tests.

    Returns:
        Scores with the metadata that all have, the means of the test losses and of what is explained, and the
        certificate of every ranking: its stages are named `STAGE of ranking r`.

    Raises:
        InputError: fewer than two rankings; rows, tests, measurements, stages or N differ; two rankings are the
            same; or only extreme rows were kept.

    >>> rows = [{"example_id": i, "text": text} for i, text in enumerate(["tax", "vote", "war", "debt"])]
    >>> facts = {"stage": "pretraining", "N": 4.0, "tests": [{"text": "I vote"}]}
    >>> each = [
    ...     Scores.build(rows, np.array([values]).T, count=4, columns={}, metadata=facts)
    ...     for values in ([1.0, -3.0, 0.5, 0.0], [2.0, -5.0, 0.5, 1.0])
    ... ]
    >>> found = mean(each)
    >>> found.influence().tolist(), found.noise.reliability
    ([1.5, -4.0, 0.5, 0.5], [0.8])
    """
    import pandas as pd

    rankings = list(rankings)
    _check(rankings)
    influences = np.stack([scores.influences() for scores in rankings], axis=1)  # (rows, R, Q)
    sample = np.unique(np.linspace(0, len(influences) - 1, min(SAMPLE_ROWS, len(influences))).round().astype(int))
    noise = Noise.measured(influences[sample])
    errors, frame = noise.standard_errors(influences), rankings[0].frame
    of_rows = ["example_id", "text", "text_sha256", "loss", "terms", *NORMS["self"]]
    shared = [name for name in of_rows if all(name in scores.frame for scores in rankings)]
    frame = frame[shared].reset_index(drop=True)
    for name in {"loss", *NORMS["self"]} & set(shared):
        frame[name] = np.mean([scores.frame[name] for scores in rankings], axis=0)
    queries = query_columns(influences.mean(1), rankings[0].metadata["N"], errors)
    frame = pd.concat([frame, queries], axis=1)
    text = f"mean of {len(rankings)} rankings, each of which counts as a replicate: {noise}"
    facts = {"noise": noise.to_dict(), "noise_text": text, "columns": rankings[0].columns}
    return Scores(with_duplicates(frame), {**_shared(rankings), **facts})


def _check(rankings: Sequence[Scores]) -> None:
    if len(rankings) < 2:
        raise InputError(f"got {len(rankings)} ranking(s); expected at least two, whose mean is taken.")
    if any({"kept", "shortlist"} & set(scores.metadata) for scores in rankings):
        raise InputError(
            "of a ranking only the extreme rows were kept, which are others in each; expected all scores: score "
            "without keep."
        )
    first, names = rankings[0], ("example_id", "text_sha256")
    for number, scores in enumerate(rankings[1:], start=1):
        stages, tests = ([s.metadata[name] for s in (first, scores)] for name in ("stage", "tests"))
        if stages[0] != stages[1] or tests[0] != tests[1]:
            raise InputError(
                f"ranking {number} is of stage {stages[1]!r} about the tests {_short(tests[1])}, ranking 0 of "
                f"{stages[0]!r} about {_short(tests[0])}; expected the same."
            )
        explained = [s.metadata.get("measurement", "loss") for s in (first, scores)]
        if explained[0] != explained[1]:
            raise InputError(
                f"ranking {number} explains the {explained[1]}, ranking 0 the {explained[0]}; expected the same "
                "measurement."
            )
        ways = [(s.metadata.get("certificate") or {}).get("aggregate") for s in (first, scores)]
        if ways[0] != ways[1] or first.columns != scores.columns:
            raise InputError(
                f"ranking {number} has {scores.columns} query column(s) with aggregate={ways[1]!r}, ranking 0 "
                f"{first.columns} with {ways[0]!r}; expected the same."
            )
        if len(first) != len(scores) or any((first.frame[n] != scores.frame[n]).any() for n in names):
            raise InputError(f"the rows of ranking {number} are not those of ranking 0; expected the same corpus.")
        same = next((k for k in range(number) if _equal(rankings[k], scores)), None)
        if same is not None:
            raise InputError(
                f"ranking {number} has the influences of ranking {same}, number for number: it says nothing new, and "
                "its agreement would count as reliability; expected different ones."
            )
        counts = [float(s.metadata["N"]) for s in (first, scores)]
        if not math.isclose(*counts, rel_tol=1e-6):
            raise InputError(
                f"N is {counts[1]:g} in ranking {number} and {counts[0]:g} in ranking 0, so that their influences are "
                "in different units; expected the same objective and tokenizer."
            )


def _equal(one: Scores, other: Scores) -> bool:
    return all(np.array_equal(one.influence(q), other.influence(q)) for q in range(one.columns))


def _shared(rankings: Sequence[Scores]) -> dict[str, Any]:
    """The metadata that are the same in all; and the certificates, side by side."""
    each = [scores.metadata for scores in rankings]
    same = {key: value for key, value in each[0].items() if all(other.get(key) == value for other in each[1:])}
    certificates = [metadata["certificate"] for metadata in each if metadata.get("certificate")]
    if len(certificates) < len(each):
        return same
    stages = {
        f"{name} of ranking {number}": facts
        for number, certificate in enumerate(certificates)
        for name, facts in certificate["stages"].items()
    }
    means = {
        name: np.mean([certificate[name] for certificate in certificates], axis=0).tolist()
        for name in ("losses", "values")
        if name in certificates[0]
    }
    shared = {key: value for key, value in certificates[0].items() if key != "predictions"}  # each model has its own
    return {**same, "certificate": {**shared, **means, "stages": stages}}


def _short(tests: Sequence[dict]) -> str:
    texts = [str(test.get("text", test.get("example_id"))) for test in tests]
    return ", ".join(repr(text[:40]) for text in texts[:2]) + (", …" if texts[2:] else "")
