"""From results to a table of measurements, to Markdown and to a figure: no library is needed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from tabulate import tabulate

MIB = 2**20
TOP = 10


def row_of(case: Mapping[str, Any], repeat: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """One measurement: the case, its times in seconds of CPU and in forward passes F, its memory, and its error.

    >>> case = {"measurement": "score", "library": "x", "method": "gradient", "problem": "p", "queries": 2}
    >>> row = row_of(case, 0, {"seconds": 3.0, "forward_seconds": 2.0, "peak_bytes": 2**21})
    >>> row["ratio"], row["peak_mib"], row["error"]
    (1.5, 2.0, '')
    """
    seconds, forward = result.get("seconds", np.nan), result.get("forward_seconds", np.nan)
    names = ("measurement", "library", "method", "problem", "train", "queries")
    measured = {name: result.get(name, np.nan) for name in ("parameters", "residual", "products")}
    versions = result.get("versions", {})
    return {
        **{name: case.get(name) for name in names},
        "repeat": repeat,
        "seconds": seconds,
        "forward_seconds": forward,
        "ratio": seconds / forward,
        "peak_mib": result.get("peak_bytes", np.nan) / MIB,
        **measured,
        **{key: value for key, value in result.items() if key in AGREEMENT},
        "version": versions.get(case["library"], ""),
        "torch": versions.get("torch", ""),
        "transformers": versions.get("transformers", ""),
        "error": result.get("error", ""),
    }


# What `agreement` finds.
AGREEMENT = {
    "spearman_gauss_newton": "ρ, Gauss-Newton",
    "overlap_gauss_newton": "top 10",
    "spearman_hessian": "ρ, Hessian",
    "overlap_hessian": "top 10, Hessian",
    "lds": "LDS",
    "gradient_error": "error",
}
# The parameters that a library covers, of `prepare.gradient_products`.
COVERAGE = {
    "hf_msif": "all",
    "captum": "all",
    "dattri": "all",
    "kronfluence": "linear",
    "bergson": "encoder_linear",
}


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of the columns of x and y, (N, Q), in the mean; a constant column counts as 0.

    >>> round(spearman(np.array([[1.0], [2.0], [9.0]]), np.array([[1.0], [3.0], [2.0]])), 6)
    0.5
    """
    x, y = (rankdata(values, axis=0) for values in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    return float(((x * y).sum(0) / np.where(norms > 0, norms, np.inf)).mean())


def overlap(x: np.ndarray, y: np.ndarray, top: int = TOP) -> float:
    """How many of the `top` rows of largest |x| are among those of y, as a share; a mean over columns.

    >>> overlap(np.array([[1.0], [-3.0], [2.0]]), np.array([[0.0], [3.0], [9.0]]), top=1)
    0.0
    """
    leaders = [np.argsort(-np.abs(values), axis=0)[:top] for values in (x, y)]
    return float(np.mean([len(set(a) & set(b)) / top for a, b in zip(*(part.T for part in leaders), strict=True)]))


def agreement(
    scores: np.ndarray, exact: Mapping[str, np.ndarray], omissions: np.ndarray, effects: np.ndarray
) -> dict[str, float]:
    """How well removal effects (N, Q) agree with the exact ones and with retraining.

    Args:
        scores: of a library.
        exact: curvature → exact removal effects.
        omissions: (S, n), the rows that each retraining left out.
        effects: (S, Q), what leaving them out did.
    """
    result = {}
    for curvature in ("gauss_newton", "hessian"):
        result[f"spearman_{curvature}"] = spearman(scores, exact[curvature])
        result[f"overlap_{curvature}"] = overlap(scores, exact[curvature])
    return result | {"lds": spearman(scores[omissions].sum(1), effects)}


def relative_error(scores: np.ndarray, products: np.ndarray) -> float:
    """‖c · scores − products‖ / ‖products‖ with the best c: a library's scores have its own unit.

    >>> relative_error(np.array([[2.0, 4.0]]), np.array([[1.0, 2.0]]))
    0.0
    """
    scale = (scores * products).sum() / (scores**2).sum()
    return float(np.linalg.norm(scale * scores - products) / np.linalg.norm(products))


def medians(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per case: medians over its repeats, the extremes of its ratio; an error stands for the case."""
    keys = ["measurement", "library", "method", "problem", "train", "queries", "version"]
    grouped = frame.groupby(keys, sort=False, dropna=False)
    numbers = grouped[[name for name in frame.columns if pd.api.types.is_numeric_dtype(frame[name])]].median()
    ends = grouped["ratio"].agg(smallest="min", largest="max")
    errors = grouped["error"].agg(lambda values: next((value for value in values if value), ""))
    numbers = numbers.drop(columns=[name for name in ("repeat", *keys) if name in numbers])
    return numbers.join(ends).join(errors).reset_index()


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, without an exponent from 0.001 to 1,000,000; "" for what was not measured.

    >>> number(3.4567), number(123456.0), number(float("nan")), number(0.987654, 2)
    ('3.46', '123,000', '', '0.99')
    """
    if value is None or not np.isfinite(value):
        return ""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 10 ** (digits - 1):
        return f"{rounded:,.0f}"
    decimals = digits - 1 - int(np.floor(np.log10(abs(rounded)))) if rounded else digits - 1
    return f"{rounded:,.{min(decimals, digits)}f}"


def markdown(frame: pd.DataFrame, machine: Mapping[str, Any]) -> str:
    """All tables of the measurements."""
    summary = medians(frame)
    parts = [f"{machine['cpu']}, {machine['cores']} cores, one thread; {machine['packages']}"]
    for measurement, title, table in (
        ("score", "Scoring, in forward passes F of the same sentences (smallest–largest)", _scoring),
        ("fit", "Fits of Kronecker factors", _fitting),
        ("solve", "One inverse-curvature-vector product", _solving),
        ("quality", "Agreement of the scores of a trained model", _quality),
    ):
        rows = summary[summary["measurement"] == measurement]
        if len(rows):
            parts += [f"## {title}", tabulate(table(rows), headers="keys", tablefmt="github", disable_numparse=True)]
    return "\n\n".join(parts) + "\n"


def whole(value: float) -> str:
    """A whole number with its thousands apart; "" for what was not measured."""
    return f"{value:,.0f}" if np.isfinite(value) else ""


def _name(row: pd.Series) -> str:
    return f"{row['library']} {row['version']}".strip()


def _scoring(rows: pd.DataFrame) -> list[dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for _, row in rows.iterrows():
        line = table.setdefault(_name(row), {"": _name(row), "parameters": ""})
        line["parameters"] = line["parameters"] or whole(row["parameters"])
        median, smallest, largest = (number(row[name]) for name in ("ratio", "smallest", "largest"))
        ends = f"{median} ({smallest}–{largest})" if smallest != largest else median
        line[f"Q = {row['queries']:.0f}"] = row["error"] or ends
        line["peak MiB, last Q"] = number(row["peak_mib"])
    columns = list(dict.fromkeys(key for line in table.values() for key in line if not key.startswith("peak")))
    return [{key: line.get(key, "") for key in [*columns, "peak MiB, last Q"]} for line in table.values()]


def _costs(row: pd.Series) -> dict[str, str]:
    figures = {"F": "ratio", "CPU s": "seconds", "peak MiB": "peak_mib"}
    costs = {title: "" if row["error"] else number(row[name]) for title, name in figures.items()}
    return costs | {"parameters": whole(row["parameters"]), "why not": row["error"]}


def _fitting(rows: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {"": _name(row), "what": row["method"], "V": f"{int(row['problem'].split('_')[1]):,}"} | _costs(row)
        for _, row in rows.iterrows()
    ]


def _solving(rows: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {"": _name(row), "what": row["method"]}
        | {"products": whole(row["products"]), "relative residual": number(row["residual"], 2)}
        | _costs(row)
        for _, row in rows.iterrows()
    ]


def _quality(rows: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {"": _name(row), "what": row["method"]}
        | {title: number(row.get(name, np.nan), 2) for name, title in AGREEMENT.items()}
        | {"CPU s": number(row["seconds"]), "parameters": whole(row["parameters"]), "why not": row["error"]}
        for _, row in rows.iterrows()
    ]


def plot(frame: pd.DataFrame, path: str | Path, measures: Sequence[str] = ("spearman_gauss_newton", "lds")) -> None:
    """Quality against time: agreement with the exact scores and with retraining, over CPU seconds."""
    from matplotlib.figure import Figure

    rows = medians(frame)
    rows = rows[(rows["measurement"] == "quality") & (rows["error"] == "")]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures)), measures, strict=True):
        for library, group in rows.groupby("library", sort=False):
            axes.scatter(group["seconds"], group[measure], label=library)
        for place, (_, row) in enumerate(rows.sort_values("seconds").iterrows()):
            above = place % 2 == 0  # neighbours do not write over each other
            axes.annotate(row["method"], (row["seconds"], row[measure]), fontsize=7, xytext=(3, 3 if above else -9),
                          textcoords="offset points")  # fmt: skip
        axes.margins(x=0.12)
        axes.set(xscale="log", xlabel="CPU seconds", ylabel=AGREEMENT[measure])
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
