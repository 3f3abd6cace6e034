"""Settings that a configuration hands on to other libraries, and to our solvers and objectives, checked against what
these take."""

from __future__ import annotations

from typing import Any

from ..errors import InputError, first_line
from .config import settings, unknown_key
from .schema import Config

# task → the objective's name, and the Auto class of its models
KINDS = {
    "masked-lm": ("MaskedLM", "AutoModelForMaskedLM"),
    "causal-lm": ("CausalLM", "AutoModelForCausalLM"),
    "skip-gram": ("SkipGram", "AutoModelForPreTraining"),
    "bidirectional-lm": ("BidirectionalLM", "AutoModelForPreTraining"),
    "sequence-classification": ("SequenceClassification", "AutoModelForSequenceClassification"),
    "image-classification": ("ImageClassification", "AutoModelForImageClassification"),
}


def training(config: Config, name: str) -> dict[str, Any]:
    """The settings of `TrainingArguments`."""
    from transformers import TrainingArguments

    given, key = config.stages[name].training, f"stages.{name}.training"
    return settings(TrainingArguments, given, key, without=["output_dir"])


def polishing(config: Config, name: str) -> dict[str, Any] | None:
    """The settings of `training.polish`, or None where a stage is not polished."""
    from ..training.polish import polish

    given = config.stages[name].polish
    ours = ["model", "objective", "data", "previous", "trainable", "weight_decay", "alpha", "resized", "omit"]
    ours += ["factorise", "preconditioner", "batch_size", "engine", "name"]  # of the stage, or of a retraining
    return None if given is None else settings(polish, given, f"stages.{name}.polish", without=ours)


def solver(config: Config, name: str):
    """A solver of `hf_msif.solvers`."""
    from .. import solvers

    chosen = config.stages[name].solver
    kinds = {"cg": "CG", "squared_cg": "SquaredCG", "minres": "MinRes", "identity": "Identity", "dense": "Dense"}
    kind = getattr(solvers, kinds[chosen.name])
    return kind(**settings(kind, chosen.model_dump(exclude={"name"}, exclude_none=True), f"stages.{name}.solver"))


def objective(config: Config, name: str, tokenizer):
    """An objective of `hf_msif.objectives`."""
    from .. import objectives

    stage = config.stages[name]
    kind = getattr(objectives, KINDS[stage.task][0])
    ours = ["tokenizer", "processor", "text_column", "image_column", "label_column", "dtype", "unigrams"]
    given = settings(kind, stage.objective, f"stages.{name}.objective", without=ours)  # known otherwise
    if stage.task in ("masked-lm", "skip-gram"):
        given.setdefault("seed", config.seed)
    if stage.task == "image-classification":
        return kind(dtype=stage.model.dtype or "float32", **given)
    return kind(tokenizer, **given)


def new_config(config: Config, name: str):
    """Configuration of a new model, or None where the stage starts from a model."""
    from transformers import AutoConfig

    from .. import models  # noqa: F401  (registers its classes with the Auto classes)

    given, key = config.stages[name].model.config, f"stages.{name}.model.config"
    if given is None:
        return None
    if "model_type" not in given:
        raise InputError(f"{key}.model_type is missing; expected a model type of transformers, e.g. bert.")
    try:
        default = AutoConfig.for_model(given["model_type"])
        known = {"num_labels", *default.to_dict(), *default.attribute_map}
        odd = [k for k in given if k not in known]
        if odd:
            raise InputError(unknown_key(f"{key}.{odd[0]}", [f"{key}.{k}" for k in sorted(known)]))
        return AutoConfig.for_model(**given)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{key}: {first_line(error)}.") from error


def adapter(config: Config, name: str):
    """The `peft.LoraConfig` of a new model, or None where it has no adapters."""
    from ..adapters import peft

    given, key = config.stages[name].model.lora, f"stages.{name}.model.lora"
    if given is None:
        return None
    kind = peft.library(key).LoraConfig
    ours = ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"]
    ours += ["inference_mode", "runtime_config", "bias"]  # known otherwise, or said by `trainable`
    checked = settings(kind, given, key, without=ours)
    start = checked.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal"):
        raise InputError(
            f"{key}.init_lora_weights is {start!r}, which changes the inherited weights to begin with; expected "
            "true, false, gaussian or orthogonal."
        )
    try:
        return kind(**checked)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"{key}: {first_line(error)}.") from error
