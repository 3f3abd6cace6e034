"""Images as arrays: whatever a row holds (PIL, array, nested list, encoded bytes) → float channels-first pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError

CHANNELS = (1, 3, 4)


def decoded(image: Any, mode: str | None, row: Any) -> Any:
    """The image as PIL or as an array; `mode` ("L", "RGB", …) converts PIL images and adds channels to grey arrays.

    Palette images become RGB (their numbers are colour indices, not brightness). Bytes, and the `{"bytes", "path"}`
    of an undecoded `datasets` column, are decoded.

    Raises:
        InputError: it is no image; the row is named.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (bytes, str)):
        try:
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            image.load()
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"row {row!r}: its image cannot be decoded: {error}.") from None
    if isinstance(image, Image.Image):
        if mode or image.mode in ("P", "PA", "1"):
            image = image.convert(mode or ("L" if image.mode == "1" else "RGB"))
        return image
    array = _array(image, row)
    if mode == "RGB" and (array.ndim == 2 or array.shape[-1] == 1):
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=-1)
    return array


def _array(image: Any, row: Any) -> np.ndarray:
    try:
        array = np.asarray(image)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    if array.dtype.kind not in "uifb" or array.ndim not in (2, 3):
        raise InputError(
            f"row {row!r} has a {type(image).__name__} of shape {array.shape} and type {array.dtype} as its image; "
            "expected a PIL image, encoded bytes, or numbers of shape (H, W), (H, W, C) or (C, H, W)."
        )
    return array


def channels_first(image: Any, row: Any) -> np.ndarray:
    """An image of `decoded` as a float64 array (C, H, W).

    The axis of channels of a three-dimensional array is the last one if it has 1, 3 or 4 entries, else the first.
    """
    array = _array(image, row).astype(np.float64)
    if array.ndim == 2:
        return array[None]
    if array.shape[-1] in CHANNELS:
        return np.moveaxis(array, -1, 0)
    if array.shape[0] in CHANNELS:
        return array
    raise InputError(
        f"row {row!r} has an image of shape {array.shape}; expected 1, 3 or 4 channels on the last or the first axis."
    )


def shrunk(array: np.ndarray, times: int) -> np.ndarray:
    """Means over squares of `times` × `times` pixels of an array (C, H, W); borders beyond whole squares are cut.

    >>> shrunk(np.arange(12.0).reshape(1, 3, 4), 2).tolist()
    [[[2.5, 4.5]]]
    """
    if times == 1:
        return array
    channels, height, width = array.shape
    height, width = height // times, width // times
    squares = array[:, : height * times, : width * times].reshape(channels, height, times, width, times)
    return squares.mean((2, 4))
