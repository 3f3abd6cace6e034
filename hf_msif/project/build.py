"""Makes objects of a configuration's settings: training arguments, solver, curvature, objective, models.

Settings that are handed on to other libraries, or to classes of your own, are checked against what these take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line
from ..registry import SOLVERS, registered
from . import hub
from .config import settings, unknown_key
from .plugins import imported, is_dotted, parameters
from .schema import Config, StageConfig
from .tasks import task_of
from .trial import built, refusal
from .values import shortened

if TYPE_CHECKING:
    from ..curvature import Curvature
    from ..objectives import Objective
    from ..solvers import Solver


def training_settings(config: Config, name: str) -> dict[str, Any]:
    """The settings of `TrainingArguments`."""
    from transformers import TrainingArguments

    from ..training.settings import check_effects, check_settings

    values, key = config.stages[name].training, f"stages.{name}.training"
    checked = settings(TrainingArguments, values, key, without=["output_dir"])
    check_settings(checked, f"{key}.")
    check_effects(checked, f"{key}.")
    return checked


def polish_settings(config: Config, name: str) -> dict[str, Any] | None:
    """The settings of `training.polish`, or None where a stage is not polished."""
    from ..training.polish import check_limits, polish

    values = config.stages[name].polish
    without = ["model", "objective", "data", "previous", "trainable", "weight_decay", "alpha", "resized", "omit"]
    without += ["factorise", "preconditioner", "batch_size", "engine", "name"]  # of the stage, or of a retraining
    if values is None:
        return None
    checked = settings(polish, values, f"stages.{name}.polish", without=without)
    check_limits(checked, f"stages.{name}.polish.")
    return checked


def solver(config: Config, name: str) -> Solver:
    """A solver of `hf_msif.solvers`, or of the user's own."""
    section, key = config.stages[name].solver, f"stages.{name}.solver"
    if is_dotted(section.name):
        kind = imported(section.name, f"{key}.name", object)
    else:
        kind = registered(SOLVERS, section.name)
    return kind(**settings(kind, section.model_dump(exclude={"name"}, exclude_none=True), key))


def curvature(config: Config, name: str) -> str | type[Curvature]:
    """What `Stage` takes as curvature: a name, or a subclass of `Curvature` of the user's own."""
    from ..curvature import Curvature

    value = config.stages[name].curvature
    return imported(value, f"stages.{name}.curvature", Curvature) if is_dotted(value) else value


def link(config: Config, name: str) -> str | Callable:
    """What `Stage` takes as link: a name, or a differentiation of the user's own."""
    value = config.stages[name].link
    return imported(value, f"stages.{name}.link") if is_dotted(value) else value


def objective(config: Config, name: str, tokenizer: Any) -> Objective:
    """The objective of the stage's task, with the stage's settings."""
    stage, key = config.stages[name], f"stages.{name}"
    kind = task_of(stage.task, f"{key}.task").objective_class(f"{key}.task")
    # What is known otherwise, the columns as in the rows of `data.load_rows`.
    known = {"tokenizer": tokenizer, "text_column": "text", "image_column": "image", "label_column": "label"}
    known["dtype"] = stage.model.dtype or "float32"
    takes = parameters(kind)
    columns = [parameter for parameter in takes if parameter.endswith("_column")]
    known |= {f"{name}_column": name for name in stage.data.columns if f"{name}_column" in takes}
    _check_columns(stage, key, takes)
    values = settings(kind, stage.objective, f"{key}.objective", without=[*known, *columns, "processor", "unigrams"])
    if "seed" in takes:
        values.setdefault("seed", config.seed)
    if "labels" in takes and stage.data.label_from == "files":
        values.setdefault("labels", list(stage.data.data_files or ()))
    try:
        return kind(**{parameter: value for parameter, value in known.items() if parameter in takes}, **values)
    except InputError as error:
        raise InputError(f"{key}.objective: {error}") from error


def measurement(config: Config) -> Any:
    """What a query explains, as `MultiStageInfluence.query` takes it."""
    from ..influence.measurements import NAMES

    name, of = config.test.measurement, config.test.of
    if is_dotted(name):
        return imported(name, "test.measurement")
    return NAMES[name]() if of is None else NAMES[name](of)


def _check_columns(stage: StageConfig, key: str, takes: Iterable[str]) -> None:
    """Refuses names in `data.columns` that a task of the table does not read."""
    if is_dotted(stage.task):
        return
    columns = [name.removesuffix("_column") for name in takes if name.endswith("_column")]
    task = task_of(stage.task, f"{key}.task")
    read = {*task.columns, *columns} - {"text", "image", "label"}
    read |= {"input_ids", "attention_mask", "token_type_ids"} if task.content == "text" else set()
    unknown = [name for name in stage.data.columns if name not in read]
    if unknown:
        raise InputError(
            f"{key}.data.columns names {unknown[0]!r}, which {stage.task} does not read; expected names among "
            f"{sorted(read)}."
        )


def new_config(config: Config, name: str) -> Any:
    """The `PretrainedConfig` of a new model, or None where the stage starts from a model."""
    from transformers import AutoConfig

    from .. import models  # noqa: F401  (registers its classes with the Auto classes)

    values, key = config.stages[name].model.config, f"stages.{name}.model.config"
    if values is None:
        return None
    if "model_type" not in values:
        raise InputError(f"{key}.model_type is missing; expected a model type of transformers, e.g. bert.")
    try:
        default = AutoConfig.for_model(values["model_type"])
        known = {"num_labels", "decoder_start_token_id", *default.to_dict(), *default.attribute_map}
        unknown = [k for k in values if k not in known]
        if unknown:
            raise InputError(unknown_key(f"{key}.{unknown[0]}", [f"{key}.{k}" for k in sorted(known)]))
        for label, name_of_class in (values.get("id2label") or {}).items():
            if isinstance(name_of_class, (list, dict)):
                raise InputError(
                    f"{key}.id2label.{label} is {shortened(name_of_class)}; expected the name of a class, such as "
                    "Positive."
                )
        for setting, value in values.items():
            usual = getattr(default, setting, None)
            if type(value) is type(usual) is int and value < 0 < usual:
                raise InputError(
                    f"{key}.{setting} is {value}; expected at least 0: {values['model_type']} has {usual} of them by "
                    "default."
                )
        return AutoConfig.for_model(**values)
    except InputError:
        raise
    except Exception as error:
        given, make = _configured(values)
        raise refusal(key, given, make, error) from error


def _configured(values: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """The settings of a new model beside its type, and what makes a configuration of them."""
    from transformers import AutoConfig

    given = {name: value for name, value in values.items() if name != "model_type"}
    return given, lambda settings: AutoConfig.for_model(values["model_type"], **settings)


def adapter(config: Config, name: str) -> Any:
    """The `peft.LoraConfig` of a new model, or None where it has no adapters."""
    from ..adapters import peft

    values, key = config.stages[name].model.lora, f"stages.{name}.model.lora"
    if values is None:
        return None
    kind = peft.import_peft(key).LoraConfig
    without = ["task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"]
    without += ["inference_mode", "runtime_config", "bias"]  # known otherwise, or said by `trainable`
    checked = settings(kind, values, key, without=without)
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


def load_model(config: Config, name: str, source: str | Path, **overrides: Any) -> tuple[Any, list[str]]:
    """A model that `save_pretrained` wrote, and the names of tensors that it does not have.

    Args:
        source: Hub id or folder.
        overrides: settings of the model's configuration.

    Raises:
        InputError: it cannot be loaded.
    """
    from ..adapters import peft

    stage, folder = config.stages[name], Path(source).expanduser()
    auto = _auto_class(stage, name)
    try:
        if (folder / peft.FOLDER).is_dir():
            return _cast(stage, peft.load(folder, auto)), []
        if (folder / peft.PUBLISHED).is_file():
            return _cast(stage, peft.load_published(folder, auto)), []
        # Tensors of other shapes are told by name below; Transformers prints a table of them.
        loading = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = auto.from_pretrained(hub.prepare(str(source)), **loading, **overrides)
        model = _cast(stage, model)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"stage {name!r}: cannot load the model {str(source)!r} ({first_line(error)}{_offline(source, error)}); "
            "expected a Hub id, or a folder as save_pretrained writes it."
        ) from error
    for tensor, saved, expected in sorted(report["mismatched_keys"])[:1]:
        raise InputError(
            f"stage {name!r}: the weights in {str(source)!r} do not fit their config.json, or the labels that are "
            f"listed: {tensor} has the shape {tuple(saved)}, and {tuple(expected)} was expected; give a folder as "
            "save_pretrained writes it, with its own sizes and labels."
        )
    return model, sorted(report["missing_keys"])


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a Hub id or a folder.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from .. import models  # noqa: F401  (registers its tokenizer with the Auto classes)

    try:
        return AutoTokenizer.from_pretrained(hub.prepare(source))
    except Exception as error:  # a damaged file raises anything
        raise InputError(
            f"tokenizer: cannot load {source!r} ({first_line(error)}{_offline(source, error)}); expected a Hub id or "
            "a folder as save_pretrained writes it."
        ) from error


def _offline(source: str | Path, error: Exception) -> str:
    return "" if Path(source).expanduser().exists() else hub.reason(error)


def new_model(config: Config, name: str, before: Any, seed: int, adapter: Any, classes: list[str] | None) -> Any:
    """An untrained model: from `model.path`, else from `model.config` or on the encoder of the model before.

    Args:
        before: the model of the stage before, or None.
        seed: of the initial weights.
        adapter: the `LoraConfig` of its new adapters, or None.
        classes: names of what its head tells apart, in the order of its logits, or None. The model's configuration has
            them, so that another order is noticed later; one that `model.path` names keeps its own.

    Raises:
        InputError: it cannot be loaded or built.
    """
    import transformers

    from ..models import FeedForwardClassifier

    stage = config.stages[name]
    transformers.set_seed(seed)
    head: dict[str, Any] = {} if classes is None else {"num_labels": len(classes)}
    problem_type = task_of(stage.task, f"stages.{name}.task").problem_type
    if problem_type is not None:
        head["problem_type"] = problem_type
    if stage.model.path is not None:
        model = load_model(config, name, stage.model.path, **head)[0]
        named = getattr(model.config, "id2label", None) or {}
        if classes is not None and all(named.get(i) == f"LABEL_{i}" for i in range(len(classes))):
            model.config.update(_names(classes))
    elif before is not None and stage.model.head == "feed_forward":
        head |= _names(classes)
        encoder, key = before.base_model, f"stages.{name}.model"
        sizes = {"hidden_size": stage.model.hidden_size}
        model = built(lambda sizes: FeedForwardClassifier.from_encoder(encoder, **sizes, **head), sizes, key)
    else:
        model = _from_settings(config, name, before, head | _names(classes))
    return _cast(stage, _adapted(name, model, adapter))


def _names(classes: list[str] | None) -> dict[str, Any]:
    """What a `PretrainedConfig` says of its classes; nothing where there are none."""
    if classes is None:
        return {}
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def inherits_head(config: Config, name: str, model: Any, before: Any) -> bool:
    """Whether a stage goes on with the task of the stage before, and so with its head."""
    stage = config.stages[name]
    task = task_of(stage.task, f"stages.{name}.task")
    return stage.model.path is None and type(model) is type(before) and task.inherits_head


def _from_settings(config: Config, name: str, before: Any, head: dict[str, Any]) -> Any:
    stage = config.stages[name]
    if before is None and stage.model.config is None:
        raise InputError(
            f"stages.{name}.model has neither path nor config; expected a checkpoint to start from, or the "
            "settings of a new model."
        )
    auto = _auto_class(stage, name)

    key, given, configured = f"stages.{name}.model", dict[str, Any](), None
    if before is None and stage.model.config is not None:
        key, (given, configured) = f"{key}.config", _configured(stage.model.config)

    def make(values: dict[str, Any]) -> Any:
        configuration = configured(values) if configured else copy.deepcopy(before.base_model.config)
        configuration.update(head)
        return auto.from_config(configuration)

    model = built(make, given, key)
    if before is not None:
        model.base_model.load_state_dict(before.base_model.state_dict(), strict=False)  # poolers differ
        if inherits_head(config, name, model, before):
            model.load_state_dict(before.state_dict())
    return model


def _auto_class(stage: StageConfig, name: str) -> Any:
    import transformers

    from .. import models  # noqa: F401  (registers its classes with the Auto classes)

    auto_class = task_of(stage.task, f"stages.{name}.task").auto_class
    if not hasattr(transformers, auto_class):
        raise InputError(
            f"stages.{name}.task is {stage.task!r}, whose auto_class {auto_class!r} transformers does not have; "
            "expected a class such as AutoModelForSequenceClassification."
        )
    return getattr(transformers, auto_class)


def _cast(stage: StageConfig, model: Any) -> Any:
    import torch

    if stage.model.dtype is None:
        return model
    # As a saved model has it: a new head on this encoder is drawn in the same dtype before saving and after.
    dtype = model.config.dtype = model.base_model.config.dtype = getattr(torch, stage.model.dtype)
    return model.to(dtype)


def _adapted(name: str, model: Any, adapter: Any) -> Any:
    """The model with new adapters where the stage has some and the model has none yet."""
    from ..adapters import peft

    if adapter is None or peft.has_adapters(model):
        return model
    key = f"stages.{name}.model.lora"
    try:
        return peft.import_peft(key).inject_adapter_in_model(copy.deepcopy(adapter), model)
    except (ValueError, TypeError) as error:  # no such modules, no adapter for them
        raise InputError(f"{key}: {first_line(error)}.") from error
