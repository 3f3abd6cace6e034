"""Reads the published ELMo weights, HDF5 files with JSON options in the layout of bilm-tf and AllenNLP."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError
from .configuration import ElmoConfig

Model = TypeVar("Model", bound=PreTrainedModel)


def read_options(options_file: str | os.PathLike, **settings: Any) -> ElmoConfig:
    """The configuration that an options file (JSON) describes; `settings` take precedence over the file.

    Raises:
        InputError: the file cannot be read, or is not an options file of ELMo.

    >>> import json, tempfile
    >>> cnn = {"embedding": {"dim": 4}, "filters": [[1, 4], [2, 8]], "n_highway": 1, "activation": "relu"}
    >>> lstm = {"dim": 64, "projection_dim": 16, "n_layers": 2, "cell_clip": 3, "proj_clip": 3}
    >>> with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
    ...     file.write(json.dumps({"char_cnn": cnn, "lstm": lstm})) and file.flush()
    ...     config = read_options(file.name)
    >>> config.hidden_size, config.use_skip_connections
    (32, False)
    """
    try:
        with open(options_file, encoding="utf-8") as file:
            options = json.load(file)
        lstm, cnn = options["lstm"], options["char_cnn"]
        fields: dict[str, Any] = {
            "max_characters": cnn.get("max_characters_per_token", 50),
            "character_size": cnn["embedding"]["dim"],
            "filters": cnn["filters"],
            "num_highway_layers": cnn["n_highway"],
            "activation": cnn["activation"],
            "num_hidden_layers": lstm["n_layers"],
            "cell_size": lstm["dim"],
            "projection_size": lstm["projection_dim"],
            "cell_clip": lstm.get("cell_clip"),
            "projection_clip": lstm.get("proj_clip"),
            "use_skip_connections": bool(lstm.get("use_skip_connections")),
        }
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the options {str(options_file)!r} ({error}); expected a JSON file.") from None
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{str(options_file)!r} is not an options file of ELMo: it lacks {error}; expected the sections "
            "'lstm' and 'char_cnn'."
        ) from None
    if "n_tokens_vocab" in options:
        fields["vocab_size"] = options["n_tokens_vocab"]
    return ElmoConfig(**{**fields, **settings})


def encoder_state(weight_file: str | os.PathLike, config: ElmoConfig) -> dict[str, Tensor]:
    """The tensors of `ElmoModel` by name, float32, from a weight file (HDF5).

    Raises:
        InputError: the file cannot be read, or a tensor is missing or has a shape that does not fit `config`.
    """
    state, cell = {}, config.cell_size
    with _WeightFile(weight_file) as read:
        characters = read("char_embed", config.n_characters - 1, config.character_size)
        state["characters.embedding.weight"] = np.concatenate([np.zeros_like(characters[:1]), characters])
        for i, (width, number) in enumerate(config.filters):
            kernel = read(f"CNN/W_cnn_{i}", 1, width, config.character_size, number)[0]
            state[f"characters.convolutions.{i}.weight"] = kernel.transpose(2, 1, 0)
            state[f"characters.convolutions.{i}.bias"] = read(f"CNN/b_cnn_{i}", number)
        filters, out = config.n_filters, config.projection_size
        for i in range(config.num_highway_layers):
            for name in ("transform", "carry"):
                target = f"characters.highways.{i}.{name}"
                state[f"{target}.weight"] = read(f"CNN_high_{i}/W_{name}", filters, filters).T
                state[f"{target}.bias"] = read(f"CNN_high_{i}/b_{name}", filters)
        state["characters.projection.weight"] = read("CNN_proj/W_proj", filters, out).T
        state["characters.projection.bias"] = read("CNN_proj/b_proj", out)
        for number, direction in enumerate(("forward", "backward")):
            for depth in range(config.num_hidden_layers):
                source = f"RNN_{number}/RNN/MultiRNNCell/Cell{depth}/LSTMCell"
                target = f"{direction}_layers.{depth}"
                weights = read(f"{source}/W_0", 2 * out, 4 * cell)
                bias = read(f"{source}/B", 4 * cell).copy()
                bias[2 * cell : 3 * cell] += 1  # TensorFlow's forget_bias
                state[f"{target}.input.weight"], state[f"{target}.state.weight"] = weights[:out].T, weights[out:].T
                state[f"{target}.input.bias"] = bias
                state[f"{target}.projection.weight"] = read(f"{source}/W_P_0", cell, out).T
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def head_state(softmax_file: str | os.PathLike, config: ElmoConfig) -> dict[str, Tensor]:
    """`weight` (V, projection) and `bias` (V,) of U, float32, from a softmax file (HDF5), which determines V.

    Raises:
        InputError: the file cannot be read, or a tensor is missing or has a shape that does not fit `config`.
    """
    with _WeightFile(softmax_file) as read:
        weight = read("softmax/W", None, config.projection_size)
        return {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(read("softmax/b", len(weight)))}


def build(
    kind: type[Model],
    options_file: str | os.PathLike,
    weight_file: str | os.PathLike,
    softmax_file: str | os.PathLike | None = None,
    **settings: Any,
) -> Model:
    """A model of class `kind` with published weights, as `ElmoPreTrainedModel.from_allennlp` returns it.

    Args:
        kind: `ElmoModel` or a class with a head.
        options_file: JSON.
        weight_file: HDF5, the encoder W.
        softmax_file: HDF5, the head U; only for a class with `lm_head`, which is random without it (with a warning).
        settings: of `ElmoConfig`; they take precedence over the options file.

    Raises:
        InputError: a file cannot be read or does not fit, or `kind` has no head for `softmax_file`.
    """
    config = read_options(options_file, **settings)
    state, head = encoder_state(weight_file, config), None
    if softmax_file is not None:
        head = head_state(softmax_file, config)
        config.vocab_size = len(head["bias"])
    model = kind(config)
    model.base_model.load_state_dict(state)
    if hasattr(model, "lm_head"):
        if head is None:
            warnings.warn(
                f"no softmax_file: U of {kind.__name__} ({config.vocab_size:,} words) is random and must be trained.",
                stacklevel=3,
            )
        else:
            model.lm_head.load_state_dict(head)
    elif head is not None:
        raise InputError(f"{kind.__name__} has no softmax over words; leave softmax_file out.")
    return model.eval()


class _WeightFile:
    """An HDF5 file as a context: yields `read(name, *shape)`, which checks the shape; None stands for any length."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)

    def __enter__(self):
        try:
            import h5py
        except ImportError:
            raise InputError("reading HDF5 weights needs h5py: pip install 'hf_msif[elmo]'.") from None
        try:
            self.file = h5py.File(self.path, "r")
        except OSError as error:
            raise InputError(f"cannot read the weights {self.path!r} ({error}); expected an HDF5 file.") from None
        return self._read

    def __exit__(self, *_):
        self.file.close()

    def _read(self, name: str, *shape: int | None) -> np.ndarray:
        if name not in self.file:
            raise InputError(f"{self.path!r} has no tensor {name!r}; expected the layout of the weights of bilm-tf.")
        data = self.file[name]
        if len(data.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, data.shape, strict=True)):
            expected = tuple("any" if n is None else n for n in shape)
            raise InputError(
                f"{self.path!r}: tensor {name!r} has the shape {data.shape}; its options say {expected}: options and "
                "weights belong to different models."
            )
        return np.asarray(data, dtype=np.float32)
