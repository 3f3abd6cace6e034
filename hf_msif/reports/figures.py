"""Figures: the paper's Figure 3, and what every other figure is made with. Needs matplotlib
(`pip install hf_msif[plots]`)."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.files import write_atomically
from ..errors import InputError
from ..objectives.images import channels_first, decoded

if TYPE_CHECKING:
    from ..scoring.scores import Scores


def figure(**settings):
    """A matplotlib figure that is part of no window and of no global state; Jupyter shows it as a picture.

    Args:
        settings: of `matplotlib.figure.Figure`.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install hf_msif[plots].") from None

    class Shown(Figure):
        """Jupyter knows how to show a plain figure only where pyplot was imported."""

        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    return Shown(**settings)


def picture_format(path: str | os.PathLike, key: str) -> str:
    """The format of a picture by the ending of its path, as matplotlib names it: "png", "pdf", ...

    Args:
        path: of the picture.
        key: what holds the path, for the message.

    Raises:
        InputError: matplotlib is not installed, or writes no such format.
    """
    formats = sorted(figure().canvas.get_supported_filetypes())
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in formats:
        raise InputError(f"{key} is {str(path)!r}; expected a name with one of the endings {', '.join(formats)}.")
    return ending


def write_figure(path: str | os.PathLike, draw: Callable[[Path], object]) -> str | None:
    """Writes a figure, whole or not at all, where it can be drawn: a command does not fail for want of matplotlib.

    Args:
        path: of the PNG.
        draw: writes the PNG to the path that it is called with.

    Returns:
        `path`, or None with a warning if the figure cannot be drawn.
    """
    try:
        write_atomically(path, draw)
    except InputError as error:
        warnings.warn(str(error), stacklevel=2)
        return None
    return str(path)


def extremes(
    scores: Scores, tests: Sequence[dict], corpus: Sequence[dict], path: str | os.PathLike, k: int = 4
) -> None:
    """Draws each test image beside the k most harmful and the k most helpful images of the corpus, with their
    influence (the paper's Figure 3). At most eight test images are drawn.

    Args:
        scores: of `corpus`, one column per test image, or one for all of them together.
        tests: rows with an `image`, and a `label` that is shown.
        corpus: rows with an `image`, and a `label` that is shown.
        path: of the PNG.
        k: images of the corpus on each side.
    """
    images = {row["example_id"]: row for row in corpus}
    shown_tests = list(tests)[:8] if scores.columns > 1 or len(tests) == 1 else [None]
    page = figure(figsize=(1.3 * (2 * k + 1), 1.6 * len(shown_tests)), layout="constrained")
    grid = page.subplots(len(shown_tests), 2 * k + 1, squeeze=False)
    for column, (row, axes) in enumerate(zip(shown_tests, grid, strict=True)):
        _show(axes[0], row, "test" if row is not None else f"{len(tests)} tests")
        for by, side in (("harmful", axes[1 : k + 1]), ("helpful", axes[k + 1 :])):
            top = scores.top(min(k, len(scores)), by, column)
            # Of a corpus with fewer than k rows, the last places stay empty.
            for place, example_id, influence in zip(side, top.example_id, top.influence, strict=False):
                _show(place, images[example_id], f"{by}\n{influence:+.3g}")
    page.savefig(path, dpi=150, format="png")


def _show(axes, row: dict | None, title: str) -> None:
    """Draws a row's image and label; an empty place for None."""
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
    """A PIL image as the {"bytes", "path"} of an image column of `datasets`, in PNG; anything else as it is."""
    if not hasattr(image, "save"):
        return image
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
