"""What checkpoints and tables say of themselves: tasks, columns, classes, and what a finetuning trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, first_line
from . import hub
from .tasks import TASKS
from .values import LONGEST_PATH, shown_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

TEXT_COLUMNS = ("text", "sentence", "tweet", "content", "document")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "target")
MOST_CLASSES = 1000
ADAPTERS = ["*.lora_*", "*.modules_to_save.*"]  # what PEFT trains


@dataclass(frozen=True)
class Checkpoint:
    """A model as someone saved it.

    Attributes:
        source: folder or Hub id to load it from; of a Trainer's output folder its last checkpoint.
        config: its configuration; of an adapter that of the model below it.
        is_adapter: whether PEFT saved an adapter alone.
    """

    source: str
    config: PretrainedConfig
    is_adapter: bool = False

    @property
    def architecture(self) -> str:
        """The name of its class, as the configuration says it; empty where it does not."""
        return (self.config.architectures or [""])[0]


def checkpoint(source: str, flag: str) -> Checkpoint:
    """Finds a model: in a folder as `save_pretrained` or PEFT writes it, in a Trainer's output folder, or on the Hub.

    Args:
        source: folder or Hub id.
        flag: what the user calls it, for messages.

    Raises:
        InputError: there is no model.
    """
    from transformers import AutoConfig

    from .. import models  # noqa: F401  (registers its classes with the Auto classes)
    from ..adapters import peft

    folder, shown = Path(source).expanduser(), shown_text(source, LONGEST_PATH)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", peft.PUBLISHED)):
        steps = {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
        if not steps:
            raise InputError(
                f"{flag} is {shown}, a folder without config.json; expected a folder as save_pretrained writes it, a "
                "Trainer's output folder with its checkpoint-* folders, or a Hub id."
            )
        folder = steps[max(steps)]
        source = str(folder)
    is_adapter, described = (folder / peft.PUBLISHED).is_file(), source
    try:
        if is_adapter:
            settings = peft.import_peft(flag).PeftConfig.from_pretrained(source)
            described = settings.base_model_name_or_path
        return Checkpoint(source, AutoConfig.from_pretrained(hub.prepare(described)), is_adapter)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{flag}: cannot read the configuration of {described!r} ({first_line(error)}{hub.reason(error)}); "
            "expected a Hub id, or a folder as save_pretrained writes it."
        ) from error


def task(found: Checkpoint, flag: str, labelled: bool) -> str:
    """The task of a checkpoint, by the class that its configuration names.

    Args:
        found: the checkpoint.
        flag: what the user calls it, for messages.
        labelled: whether a task with labels is meant: that of the finetuned model; else one without.

    Raises:
        InputError: it names a class that no task of that kind takes, or several do.
    """
    import transformers

    if found.is_adapter and labelled:
        return "sequence-classification"
    names = []
    for name, described in TASKS.items():
        mapping = getattr(transformers, described.auto_class)._model_mapping
        models: Any = mapping.get(type(found.config), ())
        models = models if isinstance(models, (tuple, list)) else (models,)
        if found.architecture in {each.__name__ for each in models} and bool(described.label_kind) == labelled:
            names.append(name)
    if found.architecture and len(names) > 1:
        names = [name for name in names if TASKS[name].problem_type == _problem(found.config)] or names
    if len(names) == 1:
        return names[0]
    kind = "with labels" if labelled else "of a language model"
    expected = "BertForSequenceClassification" if labelled else "BertForMaskedLM, with its head"
    stage = "finetuning" if labelled else "pretraining"
    if names:
        raise InputError(
            f"{flag}: {found.architecture} is trained by several tasks; expected one of them by "
            f"--stages.{stage}.task: {', '.join(names)}."
        )
    raise InputError(
        f"{flag}: {found.source} is a {found.architecture or 'model without a named class'}, which no task {kind} "
        f"takes; expected the checkpoint of a class such as {expected}."
    )


def _problem(config: PretrainedConfig) -> str | None:
    """The `problem_type` of a classifier's configuration, which older ones leave out; None for classes."""
    if config.problem_type in ("regression", "multi_label_classification"):
        return config.problem_type
    return "regression" if config.problem_type is None and config.num_labels == 1 else None


# --- columns and classes of tables


def text_column(table: Any, given: str | None, flag: str) -> str:
    """The column with the texts: the one that the user names, one with a usual name, or the only one with texts.

    Raises:
        InputError: there is no such column, or several may be meant.
    """
    if given is not None:
        return given
    usual = [name for name in TEXT_COLUMNS if name in table.column_names]
    texts = [
        name for name, kind in table.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")
    ]
    if usual or len(texts) == 1:
        return (usual or texts)[0]
    raise InputError(
        f"{flag}: none of the columns {table.column_names} is surely the text; name it by "
        f"--{'corpus' if flag == '--corpus' else 'text'}-column."
    )


def label_column(table: Any, given: str | None, flag: str) -> str:
    """The column with the labels: the one that the user names, or one with a usual name.

    Raises:
        InputError: there is none.
    """
    usual = [given] if given is not None else [name for name in LABEL_COLUMNS if name in table.column_names]
    if not usual:
        raise InputError(
            f"{flag}: none of the columns {table.column_names} is surely the label; name it by --label-column."
        )
    return usual[0]


def classes(
    values: Sequence[Any], config: PretrainedConfig, given: Sequence[str] | None, flag: str
) -> list[Any] | None:
    """What the label column calls the classes, in the order of the model's; None where it has their numbers.

    Args:
        values: all different values of the label column.
        config: of the finetuned model, whose `id2label` may name its classes.
        given: the names in the model's order, where the user says them.
        flag: what the user calls the table, for messages.

    Raises:
        InputError: nothing says which name is which class.
    """
    if given:
        return list(given)
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return None
    if len(values) > MOST_CLASSES:
        raise InputError(
            f"{flag}: the label column has {len(values):,} different values; expected classes: name another column by "
            "--label-column."
        )
    spelled: Mapping[str, Any] = {str(value).casefold(): value for value in values if value is not None}
    names = [str(name) for _, name in sorted((config.id2label or {}).items())]
    if all(name.casefold() in spelled for name in names):
        return [spelled[name.casefold()] for name in names]
    raise InputError(
        f"{flag}: the labels are {sorted(map(str, spelled.values()))[:10]}, and the finetuned model calls its classes "
        f"{names[:10]}; say which label is which class by --labels, all of them in the order of the model's classes."
    )


# --- what a finetuning changed


def changed(finetuned: PreTrainedModel, pretrained: PreTrainedModel) -> str | list[str]:
    """Which parameters a finetuning trained, as `Stage.trainable` says it: "head", "all", or name patterns.

    An inherited tensor that is equal in both models was frozen. They are compared in the coarser of their two dtypes.

    Raises:
        InputError: the models do not fit together.
    """
    import torch

    from ..adapters.peft import has_adapters
    from ..adapters.split import split

    if has_adapters(finetuned):
        return ADAPTERS
    inherited = split("finetuning", finetuned, pretrained, "head", previous_stage="pretraining").inherited
    moved = set()
    for name, before in inherited.items():
        one, other = finetuned.get_parameter(name), pretrained.get_parameter(before)
        dtype = max(one.dtype, other.dtype, key=lambda kind: torch.finfo(kind).eps)
        if not torch.equal(one.to(dtype), other.to(dtype)):
            moved.add(name)
    if not moved:
        return "head"
    trained = moved | ({name for name, _ in finetuned.named_parameters()} - set(inherited))
    return "all" if len(moved) == len(inherited) else patterns(trained, [n for n, _ in finetuned.named_parameters()])


def patterns(chosen: set[str], names: Sequence[str]) -> list[str]:
    """The shortest `fnmatch` patterns of whole modules that match the chosen names and no other.

    >>> patterns({"layer.1.a", "layer.1.b", "head"}, ["layer.0.a", "layer.1.a", "layer.1.b", "head"])
    ['layer.1.*', 'head']
    """
    made: dict[str, None] = {}
    for name in (name for name in names if name in chosen):
        parts = name.split(".")
        modules = (".".join(parts[:depth]) + "." for depth in range(1, len(parts)))
        whole = next((m for m in modules if all(n in chosen for n in names if n.startswith(m))), None)
        made[name if whole is None else f"{whole}*"] = None
    return list(made)
