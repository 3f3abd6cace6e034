"""A Hugging Face `Trainer`'s checkpoint folders, read back as a `Trajectory`; no code of the files is ever run."""

from __future__ import annotations

import copy
import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from typing_extensions import TypedDict

from ..adapters.peft import has_adapters
from ..adapters.split import decayed_names
from ..engine.accelerated import accelerate_undisturbed
from ..engine.files import checked_value, read_json
from ..errors import FileError, InputError, first_line
from .optimisers import SGD, AdamW
from .record import learning_rates
from .trajectory import Snapshot, Trajectory, nearest

SAME = 1e-5  # relative distance of two models that counts as rounding
SAME_RATE = 1e-6
# What a schedule is made of, see `record.learning_rates`, and clipping.
SETTINGS = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm")


def of_trainer(
    folders: str | os.PathLike | Sequence[str | os.PathLike], model: nn.Module, trained: Sequence[str], name: str
) -> Trajectory:
    """The run whose checkpoints a `Trainer` left, from `checkpoint-*` folders as they are.

    Read are the weights, `optimizer.pt` (Adam's second moments, its settings and weight decay), `trainer_state.json`
    and, for the learning rates, `training_args.bin` and `scheduler.pt`; where the schedule that these name disagrees
    with the rates that the Trainer logged, or cannot be read, the logged rates are interpolated.

    Args:
        folders: a pattern such as "runs/pretraining/checkpoint-*", a folder, or several.
        model: the stage's model: where the run ended, or its best checkpoint.
        trained: the names that the run trained.
        name: the stage's name, for messages.

    Raises:
        InputError: no such folder, a file that is missing or damaged, an optimiser other than Adam, AdamW or SGD, a
            state that does not fit to the model, or a model that the run did not pass.
    """
    paths = _paths(folders, name)
    states = {path: _json(path / "trainer_state.json", name) for path in paths}
    paths.sort(key=lambda path: states[path]["global_step"])
    steps = [int(states[path]["global_step"]) for path in paths]
    if len(set(steps)) < len(steps) or len({state["max_steps"] for state in states.values()}) > 1:
        raise InputError(
            f"stage {name!r}: the checkpoints {[str(path) for path in paths[:3]]} have the steps {steps[:5]}, of runs "
            f"of {sorted({state['max_steps'] for state in states.values()})} steps; expected those of one run."
        )
    total = _end(paths, steps, int(states[paths[-1]]["max_steps"]), model, trained, name)
    paths, steps = paths[: sum(s <= total for s in steps)], [s for s in steps if s <= total]
    cut, places = nearest(steps, total)
    state = _load(paths[-1] / "optimizer.pt", name)
    optimiser, names = (
        _optimiser(state["param_groups"], paths[-1], name),
        _names(state, model, trained, paths[-1], name),
    )
    rates, clip = _rates(paths[-1], states[paths[-1]], total, _one_rate(state["param_groups"], paths[-1], name), name)

    def load(i: int) -> Snapshot:
        path = paths[places[i]]
        parameters, buffers = weights(path, model, name)
        return Snapshot(parameters, buffers, _second_moments(path, model, trained, name))

    decayed = frozenset(n for n, group in names if group.get("weight_decay") and n in set(trained))
    origin = f"{len(paths)} checkpoint(s) in {paths[0].parent}"
    return Trajectory(optimiser, rates, tuple(cut), load, decayed, origin, clip)


class TrainerState(TypedDict):
    """What is read of trainer_state.json; there is more."""

    global_step: int
    max_steps: int
    log_history: list[dict[str, Any]]


class OptimiserState(TypedDict):
    """What optimizer.pt holds."""

    state: dict[int, dict[str, Any]]
    param_groups: Annotated[list[dict[str, Any]], Field(min_length=1)]


def _paths(folders: str | os.PathLike | Sequence[str | os.PathLike], name: str) -> list[Path]:
    patterns = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    paths = []
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(os.fspath(pattern))))
        paths += [Path(match) for match in matches if (Path(match) / "trainer_state.json").is_file()]
        if not paths:
            raise InputError(
                f"stage {name!r}: checkpoints is {os.fspath(pattern)!r}, where no folder with a trainer_state.json "
                "lies; expected checkpoint-* folders as a Trainer saves them, e.g. 'runs/pretraining/checkpoint-*'."
            )
    return list(dict.fromkeys(paths))


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        return read_json(path, TrainerState, "expected what a Trainer writes")
    except FileError as error:
        raise FileError(f"stage {name!r}: {error}") from error


def _end(paths: list[Path], steps: list[int], most: int, model: nn.Module, trained: Sequence[str], name: str) -> int:
    """After how many steps the stage's model stands."""
    here = {n: model.get_parameter(n).detach().double() for n in trained}
    size = sum(float(p.square().sum()) for p in here.values()) ** 0.5
    distances = []
    for path, step in reversed(list(zip(paths, steps, strict=True))):
        parameters, _ = weights(path, model, name)
        gap = sum(float((parameters[n].double() - p).square().sum()) for n, p in here.items()) ** 0.5
        if gap <= SAME * size:
            return step
        distances.append(gap / size)
    if steps[-1] < most:
        return most
    raise InputError(
        f"stage {name!r}: its model is none of the checkpoints in {paths[0].parent}, of which the last is the end of "
        f"the run (relative distance {distances[0]:.1e}); expected the model that this run left."
    )


# Weights ------------------------------------------------------------------------------------------------------------


def weights(folder: Path, model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers of a checkpoint, by their names in `model`.

    Raises:
        InputError: they cannot be read, or a parameter is missing.
    """
    try:
        if (folder / "adapter_model.safetensors").is_file():
            loaded, missing = _with_adapters(folder, model)
        elif isinstance(model, PreTrainedModel) and not has_adapters(model):
            pair: Any = type(model).from_pretrained(folder, dtype="auto", output_loading_info=True)
            loaded, missing = pair[0], sorted(pair[1]["missing_keys"])
        else:
            loaded, missing = _into_copy(folder, model)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"stage {name!r}: cannot load the weights in {folder} ({first_line(error)}); expected a checkpoint of a "
            f"{type(model).__name__}, as a Trainer saves it."
        ) from error
    parameters = {n: p.detach() for n, p in loaded.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    other = [n for n, shape in shapes.items() if n not in parameters or tuple(parameters[n].shape) != shape]
    if missing or other:
        raise InputError(
            f"stage {name!r}: the checkpoint in {folder} lacks {(missing or other)[0]!r} of the stage's model, or has "
            "it in another shape; expected a checkpoint of the same model."
        )
    return parameters, {n: b.detach() for n, b in loaded.named_buffers()}


def _with_adapters(folder: Path, model: nn.Module) -> tuple[nn.Module, list[str]]:
    from peft import load_peft_weights, set_peft_model_state_dict

    loaded: Any = copy.deepcopy(model)
    result: Any = set_peft_model_state_dict(loaded, load_peft_weights(str(folder), device="cpu"))
    return loaded, [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]


def _into_copy(folder: Path, model: nn.Module) -> tuple[nn.Module, list[str]]:
    from safetensors.torch import load_model

    loaded = copy.deepcopy(model)
    missing, _ = load_model(loaded, folder / "model.safetensors", strict=False)
    return loaded, sorted(missing)


# The optimiser ------------------------------------------------------------------------------------------------------


def _load(path: Path, name: str) -> Any:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        return checked_value(state, OptimiserState, path, "expected what a Trainer writes")
    except Exception as error:
        raise InputError(
            f"stage {name!r}: {path} cannot be read ({first_line(error)}); expected the state of an optimiser, as a "
            "Trainer saves it (save_only_model: false)."
        ) from error


def _optimiser(groups: list[dict[str, Any]], folder: Path, name: str) -> SGD | AdamW:
    decays = {float(group.get("weight_decay", 0.0)) for group in groups} - {0.0}
    group, decay = groups[0], max(decays, default=0.0)
    if len(decays) <= 1:
        if {"betas", "eps", "amsgrad"} <= set(group) and not group["amsgrad"]:
            beta1, beta2 = group["betas"]
            if group.get("decoupled_weight_decay", True) or not decay:
                return AdamW(float(beta1), float(beta2), float(group["eps"]), weight_decay=decay)
        elif {"momentum", "dampening", "nesterov"} <= set(group) and not group["dampening"]:
            return SGD(float(group["momentum"]), bool(group["nesterov"]), decay)
    raise InputError(
        f"stage {name!r}: the optimiser of {folder} has the settings {sorted(group)[:6]}; expected torch's AdamW "
        "(without amsgrad) or SGD (without dampening), with one weight decay."
    )


def _one_rate(groups: list[dict[str, Any]], folder: Path, name: str) -> float:
    """The peak of the learning rate, which all groups must have in common."""
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
    if len(rates) > 1:
        raise InputError(
            f"stage {name!r}: the optimiser of {folder} has groups with the learning rates {sorted(rates)}; expected "
            "one for all parameters."
        )
    return rates.pop()


def _names(
    state: dict[str, Any], model: nn.Module, trained: Sequence[str], folder: Path, name: str
) -> list[tuple[str, dict[str, Any]]]:
    """The names of the optimiser's parameters in its order, each with its group.

    A Trainer's optimiser has two groups: the parameters that weight decay acts on, then the others, each in the
    model's order; one of a single group has the model's order. Which ones it was given, is told by their number and
    shapes.
    """
    groups, decayed = state["param_groups"], decayed_names(model)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    numbers = [(i, group) for group in groups for i in group["params"]]
    entries = [state["state"].get(i, {}).get("exp_avg_sq") for i, _ in numbers]
    given = [n for n, p in model.named_parameters() if p.requires_grad], [n for n in shapes if n in set(trained)]
    for names in given:
        first = [n for n in names if n in decayed]
        ordered = names if len(groups) == 1 else [*first, *(n for n in names if n not in decayed)]
        fits = len(ordered) == len(numbers) and (len(groups) == 1 or len(groups[0]["params"]) == len(first))
        fits = fits and all(
            entry is None or tuple(entry.shape) == shapes[n] for n, entry in zip(ordered, entries, strict=True)
        )
        if fits and set(trained) <= set(ordered):
            return [(n, group) for n, (_, group) in zip(ordered, numbers, strict=True)]
    raise InputError(
        f"stage {name!r}: the optimiser of {folder} has {len(numbers)} tensors in {len(groups)} groups, which are not "
        f"those that the stage trains ({len(set(trained))}, in the order of a Trainer); expected its trainable, or "
        "requires_grad, to say what that run trained."
    )


def _second_moments(folder: Path, model: nn.Module, trained: Sequence[str], name: str) -> dict[str, Tensor] | None:
    """v̂ by the names of the trained parameters; None for an optimiser that has none."""
    state = _load(folder / "optimizer.pt", name)
    if "betas" not in state["param_groups"][0]:
        return None
    moments, wanted = {}, set(trained)
    numbers = [i for group in state["param_groups"] for i in group["params"]]
    for (n, group), i in zip(_names(state, model, trained, folder, name), numbers, strict=True):
        if n in wanted:
            entry = state["state"].get(i)
            if entry is None:  # it never had a gradient
                moments[n] = torch.zeros(model.get_parameter(n).shape)
            else:
                moments[n] = entry["exp_avg_sq"] / (1 - float(group["betas"][1]) ** float(entry["step"]))
    return moments


# The learning rates -------------------------------------------------------------------------------------------------


def _rates(
    folder: Path, state: Mapping[str, Any], total: int, peak: float, name: str
) -> tuple[list[float], float | None]:
    """The learning rate of each step, and the norm to which gradients were clipped, where it is known.

    Args:
        folder: the last checkpoint.
        state: its trainer_state.json.
        total: number of steps.
        peak: the learning rate that the optimiser was given.
        name: the stage's name, for messages.
    """
    # A Trainer logs the rate of the step that it has just taken; scheduler.pt has that of the next one.
    logged = {int(e["step"]): float(e["learning_rate"]) for e in state["log_history"] if "learning_rate" in e}
    arguments = _arguments(folder)
    rates, clip = None, None
    if arguments is not None:
        clip = float(arguments.max_grad_norm or 0.0) or None
        if abs(arguments.learning_rate - peak) <= SAME_RATE * peak:
            rates = learning_rates(arguments, int(state["max_steps"]))
    if rates is not None:
        next_rate = _next_rate(folder)
        checked = {**logged}
        if next_rate is not None and state["global_step"] < len(rates):
            checked[int(state["global_step"]) + 1] = next_rate
        if all(
            abs(rates[step - 1] - rate) <= SAME_RATE * peak for step, rate in checked.items() if step <= len(rates)
        ):
            return rates[:total], clip
    if not logged:
        raise InputError(
            f"stage {name!r}: the learning rates of the run in {folder.parent} are not known: its training_args.bin "
            "does not tell them, and none is logged in trainer_state.json; expected either (logging_steps), or "
            "training.trajectory.of_models with the rates."
        )
    warnings.warn(
        f"stage {name!r}: the learning rates of the run in {folder.parent} are interpolated between the {len(logged)} "
        "that were logged, since its training_args.bin does not tell them.",
        stacklevel=2,
    )
    steps = sorted(logged)
    return np.interp(np.arange(1, total + 1), steps, [logged[step] for step in steps]).tolist(), clip


def _next_rate(folder: Path) -> float | None:
    try:
        return float(torch.load(folder / "scheduler.pt", weights_only=True)["_last_lr"][0])
    except Exception:  # it only serves as a check
        return None


def _arguments(folder: Path) -> TrainingArguments | None:
    """What training_args.bin says of the schedule and of clipping; None where it cannot be read."""
    path = folder / "training_args.bin"
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        # Each class in the file is replaced by one that keeps what it is given, and does nothing.
        with torch.serialization.safe_globals([(_Inert, name) for name in names]):
            saved = vars(torch.load(path, weights_only=True, map_location="cpu"))
        values = {key: _plain(saved[key]) for key in SETTINGS}
        # Older versions give the warm-up as a share by a setting of its own.
        values["warmup_steps"] = values["warmup_steps"] or saved.get("warmup_ratio") or 0
        with accelerate_undisturbed():
            return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **values)
    except Exception:
        return None


class _Inert:
    """What stands for any object of a pickle."""

    arguments: tuple = ()

    def __new__(cls, *arguments):
        inert = super().__new__(cls)
        inert.arguments = arguments
        return inert

    def __setstate__(self, state):
        if isinstance(state, dict):
            vars(self).update(state)


def _plain(value: Any) -> Any:
    """The value of an enumeration's member, which a pickle makes by a call with that value."""
    return value.arguments[0] if isinstance(value, _Inert) and len(value.arguments) == 1 else value
