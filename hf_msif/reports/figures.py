"""Pictures of scores: the paper's Figure 3, and histograms of influence. Needs matplotlib
(`pip install hf_msif[validation]`)."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..objectives.images import channels_first, decoded

if TYPE_CHECKING:
    from ..scoring.scores import Scores


def figure(**settings):
    """A figure that no window and no global state knows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install hf_msif[validation].") from None
    return Figure(**settings)


def extremes(
    scores: Scores, tests: Sequence[dict], corpus: Sequence[dict], path: str | os.PathLike, k: int = 4
) -> None:
    """Draws each test image beside the k most harmful and the k most helpful images of the corpus, with their scores
    (the paper's Figure 3 is the first column). At most eight tests.

    Args:
        scores: of `corpus`, one column a test or one for all.
        tests, corpus: rows with an `image`, and a `label` that is shown.
        path: of the PNG.
    """
    images = {row["example_id"]: row for row in corpus}
    asked = list(tests)[:8] if scores.columns > 1 or len(tests) == 1 else [None]
    drawn = figure(figsize=(1.3 * (2 * k + 1), 1.6 * len(asked)), layout="constrained")
    grid = drawn.subplots(len(asked), 2 * k + 1, squeeze=False)
    for q, (row, axes) in enumerate(zip(asked, grid, strict=True)):
        _show(axes[0], row, "test" if row is not None else f"{len(tests)} tests")
        for by, places in (("harmful", axes[1 : k + 1]), ("helpful", axes[k + 1 :])):
            top = scores.top(min(k, len(scores)), by, q)
            for place, i, value in zip(places, top.example_id, top.influence, strict=False):
                _show(place, images[i], f"{by}\n{value:+.3g}")
    drawn.savefig(path, dpi=150, format="png")


def _show(axes, row: dict | None, title: str) -> None:
    axes.set_title(title, fontsize=7)
    axes.set(xticks=[], yticks=[])
    if row is None:
        axes.axis("off")
        return
    array = np.asarray(channels_first(decoded(row["image"], None, row["example_id"]), row["example_id"]))
    array = np.moveaxis(array, 0, -1)
    array = (array - array.min()) / max(np.ptp(array), 1e-12)
    axes.imshow(array if array.shape[-1] == 3 else array[..., 0], cmap="gray")
    if "label" in row:
        axes.set_xlabel(f"label {row['label']}", fontsize=7)


def encoded(image: Any) -> Any:
    """PIL images as the {"bytes", "path"} of an image column of `datasets`; anything else as it is."""
    if not hasattr(image, "save"):
        return image
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
