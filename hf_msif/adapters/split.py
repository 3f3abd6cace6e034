"""Splits a `PreTrainedModel` into the shared encoder W and the heads U and Θ.

`split` decides by name and shape which tensors a stage inherited from the stage before, which it trains, and which
are left out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..display import Displayed, Summary, Table, plural
from ..errors import InputError
from .peft import has_adapters, inspect_adapters, name_before_adapters, unwrap

# One of two otherwise equal base models may lack it: BertModel has a pooler, the base of BertForMaskedLM has none.
OPTIONAL_MODULE = "pooler"
HELD = "requires_grad is False: held constant"
REASONS = 5  # to leave tensors out that `print` tells


@dataclass(frozen=True, repr=False)
class Split(Displayed):
    """The role of every parameter of one stage (W, U and Θ of the paper, §3.1), by name.

    Attributes:
        stage: name of the stage.
        shapes: name → shape of every parameter of the model; tied tensors appear once.
        inherited: the encoder W: name in this model → name in the model of the stage before.
        trained: tensors that the stage optimises.
        resized: inherited tensors with more rows than before: name → number of inherited (leading) rows.
        left_out: tensors that are neither inherited nor trained: name → reason.
        held: tensors that `trainable` names, but whose requires_grad is False: they are frozen, or left out.
        encoder_only: tensors of the encoder that are in the head all the same, since the encoder of the stage before
            lacks them, as a decoder that its task does not use.
        not_passed_on: tensors of the encoder of the stage before, by their names there, that this encoder lacks.

    >>> shapes = {"encoder.weight": torch.Size([2, 3]), "head.weight": torch.Size([4])}
    >>> roles = Split("finetuning", shapes, {"encoder.weight": "encoder.weight"}, ("head.weight",))
    >>> roles.frozen, roles.proximal, roles.head, roles.count(roles.trained)
    (('encoder.weight',), (), ('head.weight',), 4)
    """

    stage: str
    shapes: dict[str, torch.Size]
    inherited: dict[str, str]
    trained: tuple[str, ...]
    resized: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    encoder_only: tuple[str, ...] = ()
    not_passed_on: tuple[str, ...] = ()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Tensors that are inherited and not trained: Case 1, eq. (2)."""
        trained = set(self.trained)
        return tuple(name for name in self.inherited if name not in trained)

    @property
    def proximal(self) -> tuple[str, ...]:
        """Tensors that are inherited and trained: Case 2, eq. (12)."""
        return tuple(name for name in self.trained if name in self.inherited)

    @property
    def head(self) -> tuple[str, ...]:
        """Tensors that are trained and not inherited: U in pretraining, Θ in finetuning."""
        return tuple(name for name in self.trained if name not in self.inherited)

    def with_inherited_head(self, first: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Split:
        """The roles in a run, where a head that starts from the values of the stage before is inherited too.

        That is the case if training goes on with the same task.

        Args:
            first: the run's initial parameters, by their names in this model.
            before: the parameters of the stage before, by their names there.
        """
        inherited = dict(self.inherited)
        for name, value in first.items():
            if name not in inherited and name in before and torch.equal(value, before[name].to(value)):
                inherited[name] = name
        return replace(self, inherited=inherited)

    def count(self, names: Sequence[str]) -> int:
        """Number of scalars in the tensors `names`."""
        return sum(self.shapes[name].numel() for name in names)

    def role(self, name: str) -> str:
        """The role of a tensor: "frozen", "proximal", "head" or "left out"."""
        if name in self.inherited:
            return "proximal" if name in set(self.trained) else "frozen"
        return "head" if name in set(self.trained) else "left out"

    def table(self) -> list[dict]:
        """One row per tensor: its name, shape, number of parameters, role, and a note."""
        rows = []
        for name, shape in self.shapes.items():
            note = self.left_out.get(name, "")
            if name in self.inherited and self.inherited[name] != name:
                note = f"from {self.inherited[name]}"
            if name in self.resized:
                fate = "trained" if name in self.trained else "held constant"
                note = f"first {self.resized[name]} of {shape[0]} rows inherited, the others {fate}"
            if name in self.encoder_only and name not in self.left_out:
                note = "in this encoder alone: not inherited"
            if name in self.held and name in self.inherited:
                note = "; ".join(filter(None, [note, HELD]))
            rows.append(
                {
                    "tensor": name,
                    "shape": tuple(shape),
                    "parameters": shape.numel(),
                    "role": self.role(name),
                    "note": note,
                }
            )
        return rows

    def summary(self) -> Summary:
        own = "head U or Θ: trained, not inherited" if self.inherited else "trained: encoder W and head U"
        groups = [
            ("encoder W, frozen: inherited, not trained; Case 1, eq. (2)", self.frozen),
            ("encoder W, tied: inherited and trained; Case 2, eq. (12)", self.proximal),
            (own, self.head),
            ("left out: neither inherited nor trained", tuple(self.left_out)),
        ]
        rows = [[label, f"{self.count(names):,}", f"{len(names):,}"] for label, names in groups if names]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        notes = [f"Left out, {_listed(names)}: {why}." for why, names in list(reasons.items())[:REASONS]]
        if self.encoder_only:
            notes.append(f"In this encoder alone, and so in the head: {_listed(self.encoder_only)}.")
        if self.not_passed_on:
            notes.append(f"In the encoder of the stage before alone: {_listed(self.not_passed_on)}.")
        if self.held:
            notes.append(f"Not trained, {_listed(self.held)}: {HELD}.")
        total = self.count(tuple(self.shapes))
        return Summary(
            f"stage {self.stage!r}: {plural(total, 'parameter')} in {plural(len(self.shapes), 'tensor')}",
            tables=[Table(["role", "parameters", "tensors"], rows)],
            notes=notes,
            steps=["split.table() has the role of every tensor"],
        )


def _listed(names: Sequence[str]) -> str:
    return f"{len(names):,} tensors (first {names[0]!r})" if len(names) > 1 else f"tensor {names[0]!r}"


def encoder(model: nn.Module) -> nn.Module:
    """The base model of a `PreTrainedModel`, also of one in a `PeftModel` (whose `base_model` is a PEFT wrapper)."""
    return cast(nn.Module, unwrap(model).base_model)


def _encoder_names(model: nn.Module, idle: Collection[str]) -> dict[str, str]:
    """Name in the whole model → name inside the base model before adapters wrapped it; without the names in `idle`.

    Tensors are matched by identity, so that ties do not matter. A tensor and the copy of it that PEFT trains may both
    be in use, and then have the same name inside the base model.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    pairs = [(canonical[id(p)], name_before_adapters(name)) for name, p in encoder(model).named_parameters()]
    return {name: base for name, base in pairs if name not in idle}


def split(
    stage: str,
    model: nn.Module,
    previous: nn.Module | None = None,
    trainable: str | Sequence[str] = "all",
    resized: bool = False,
    previous_stage: str = "the stage before",
) -> Split:
    """Assigns every parameter of `model` its role.

    W is what the two *base* models share by name and shape; a pooler that only one of them has belongs to its head. So
    does what else one base model has and the other, of the same architecture and the same sizes, lacks (the mask token
    of an image model, the decoders of Funnel and Perceiver): its task alone uses it. The base model of a text model
    may be a part of that of a model of texts and images.

    LoRA and other PEFT adapters inside the encoder belong to the head too, unless the previous model has the same
    ones. `query.base_layer.weight` is the `query.weight` of the stage before, and a copy in `modules_to_save` takes
    the place of its original. Inactive adapters and originals that a copy replaces are left out, and with "head" also
    new weights under an adapter.

    A parameter whose `requires_grad` is False was not trained, whatever `trainable` says: it is held constant. Models
    with adapters are the exception, since PEFT sets `requires_grad` by rules of its own.

    Args:
        stage: the stage's name.
        model: the stage's model.
        previous: the model of the stage before, or None for the first stage (nothing is inherited).
        trainable: "all"; "head" (all that is not inherited); or name patterns (`fnmatch`, e.g. `"*.layer.3.*"`).
        resized: accept embeddings that differ from those of `previous` only in a larger number of rows
            (`resize_token_embeddings` after tokens were added): the leading rows are inherited, the new ones are not.
        previous_stage: name of the stage before, for messages.

    Raises:
        InputError: the base models do not match (the first tensor that differs is named), a pattern matches nothing,
            or nothing is left to train; `requires_grad` is False in all that would be trained; an adapter is merged,
            or is a DoRA.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    added, idle = inspect_adapters(model, stage)
    match = _Match() if previous is None else _match(stage, model, previous, resized, previous_stage)
    inherited = match.inherited
    trained, left_out = _trained(stage, [name for name in shapes if name not in idle], inherited, trainable)
    if trainable == "head" and added:  # a weight and its adapter trained together would have a flat direction
        under = {n: "held constant under its adapter" for n in trained if ".base_layer." in n}
        trained, left_out = tuple(n for n in trained if n not in under), under
    held = () if has_adapters(model) else tuple(n for n in trained if not model.get_parameter(n).requires_grad)
    if held and held == trained:
        raise InputError(
            f"stage {stage!r}: requires_grad is False in all {len(held)} tensors that trainable={trainable!r} names; "
            "expected it to be True where the stage was trained: call model.requires_grad_(True) if the model was "
            "only loaded for inference."
        )
    trained = tuple(n for n in trained if n not in set(held))
    left_out |= {name: HELD for name in held if name not in inherited}
    left_out = {**left_out, **idle}
    return Split(
        stage, shapes, inherited, trained, match.resized, left_out, held, match.encoder_only, match.not_passed_on
    )


@dataclass(frozen=True)
class _Match:
    """Attributes of `Split` that a model and that of the stage before decide."""

    inherited: dict[str, str] = field(default_factory=dict)
    resized: dict[str, int] = field(default_factory=dict)
    encoder_only: tuple[str, ...] = ()
    not_passed_on: tuple[str, ...] = ()


def _match(stage: str, model: nn.Module, previous: nn.Module, resized: bool, previous_stage: str) -> _Match:
    added, idle = inspect_adapters(model, stage)
    bases_by_name = _encoder_names(model, idle)
    previous_added, previous_idle = inspect_adapters(previous, previous_stage)
    previous_names = {base: n for n, base in _encoder_names(previous, previous_idle).items()}
    pair = f"stage {stage!r} ({type(model).__name__}) and {previous_stage!r} ({type(previous).__name__})"
    way_out = "; load the finetuned model from the pretrained checkpoint, or pair it with the checkpoint it came from"

    contained = not set(bases_by_name.values()) & set(previous_names)
    if contained:
        bases_by_name, previous_names = _below_a_part(bases_by_name, previous_names)
    shared = {name: base for name, base in bases_by_name.items() if base in previous_names}
    if not shared:
        raise InputError(
            f"{pair} share no tensor: the first of the one is {next(iter(bases_by_name.values()))!r}, of the other "
            f"{next(iter(previous_names))!r}{way_out}."
        )
    bases = {base: name for name, base in bases_by_name.items() if name in shared or name not in added}
    encoder_only, not_passed_on = list[str](), list[str]()
    # The head is part of the "base model" only if there is no base-model attribute: then names alone decide.
    if not any(encoder(m) is unwrap(m) for m in (model, previous)):
        encoder_only = [base for base in bases if base not in previous_names and not _is_optional(base)]
        not_passed_on = [base for base in previous_names if base not in bases and not _is_optional(base)]
    # Adapters that are lacking change what the tensors that are shared compute.
    lost = [base for base in not_passed_on if previous_names[base] in previous_added]
    in_one = [*lost, *encoder_only, *not_passed_on]
    if in_one and (lost or not (contained or _same_sizes(model, previous))):
        base = in_one[0]
        has, lacks = (stage, previous_stage) if base in bases else (previous_stage, stage)
        raise InputError(f"{pair} do not match: tensor {base!r} is in {has!r} and not in {lacks!r}{way_out}.")
    resized_rows = {}
    for name, base in shared.items():
        shape, previous_shape = model.get_parameter(name).shape, previous.get_parameter(previous_names[base]).shape
        if shape == previous_shape:
            continue
        if _is_embedding(model, name) and shape[1:] == previous_shape[1:] and shape[0] > previous_shape[0]:
            if resized:
                resized_rows[name] = previous_shape[0]
                continue
            raise InputError(
                f"{pair} do not match: tensor {base!r} is {tuple(shape)} in {stage!r} and {tuple(previous_shape)} in "
                f"{previous_stage!r}; if {shape[0] - previous_shape[0]} tokens were added with "
                "resize_token_embeddings, pass resized=True, otherwise pair the model with the checkpoint that it was "
                "finetuned from."
            )
        raise InputError(
            f"{pair} do not match: tensor {base!r} is {tuple(shape)} in {stage!r} and {tuple(previous_shape)} in "
            f"{previous_stage!r}{way_out}."
        )
    return _Match(
        {name: previous_names[base] for name, base in shared.items()},
        resized_rows,
        tuple(bases[base] for base in encoder_only),
        tuple(previous_names[base] for base in not_passed_on),
    )


def _is_optional(base: str) -> bool:
    return OPTIONAL_MODULE in base.split(".")


def _below_a_part(names: dict[str, str], previous: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The names inside the base models (of `_encoder_names`, and the other way round), where the one base model is a
    part of the other: the part's names are then those in the larger one."""
    bases = list(names.values())
    for part, whole in ((bases, list(previous)), (list(previous), bases)):
        for prefix in dict.fromkeys(name.removesuffix(part[0]) for name in whole if name.endswith("." + part[0])):
            if {prefix + name for name in part} <= set(whole):
                if part is bases:
                    return {name: prefix + base for name, base in names.items()}, previous
                return names, {prefix + base: name for base, name in previous.items()}
    return names, previous


def _same_sizes(model: nn.Module, previous: nn.Module) -> bool:
    """Whether two models have the same architecture and configured sizes, but for those of their vocabularies."""
    one, other = (getattr(unwrap(m), "config", None) for m in (model, previous))
    if not (isinstance(one, PretrainedConfig) and isinstance(other, PretrainedConfig)):
        return False
    sizes, other_sizes = _sizes(one.to_dict()), _sizes(other.to_dict())
    return one.model_type == other.model_type and all(
        sizes[path] == other_sizes[path] for path in set(sizes) & set(other_sizes)
    )


def _sizes(settings: Any, key: str = "") -> dict[str, int]:
    """The whole numbers in nested settings, by path, without those of tokens and labels: layers, widths, heads."""
    if key.endswith("label2id"):
        return {}
    entries: Iterable[tuple[Any, Any]]
    if isinstance(settings, Mapping):
        entries = settings.items()
    elif isinstance(settings, (list, tuple)):
        entries = enumerate(settings)
    else:
        is_size = type(settings) is int and not key.endswith(("_id", "_ids", "vocab_size"))
        return {key: settings} if is_size else {}
    return {path: size for name, value in entries for path, size in _sizes(value, f"{key}.{name}").items()}


def _is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _trained(
    stage: str, names: list[str], inherited: Mapping[str, str], trainable: str | Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """`Split.trained` and the tensors that no pattern matches, as `Split.left_out`."""
    if trainable == "all":
        return tuple(names), {}
    if trainable == "head":
        head = tuple(name for name in names if name not in inherited)
        if not head:
            raise InputError(
                f"stage {stage!r} has trainable='head', but its model has no parameter besides the inherited encoder; "
                "pass the model with its task head (AutoModelFor...), or trainable='all'."
            )
        return head, {}
    if isinstance(trainable, str):
        raise InputError(
            f"stage {stage!r}: trainable is {trainable!r}; expected 'head', 'all' or a list of name patterns."
        )
    for pattern in trainable:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"stage {stage!r}: the trainable pattern {pattern!r} matches no parameter; names look like "
                f"{names[0]!r} and {names[-1]!r}, and * matches any part of a name."
            )
    trained = tuple(name for name in names if any(fnmatch.fnmatchcase(name, p) for p in trainable))
    left_out = {
        name: "matched by no pattern in trainable, and not inherited: held constant"
        for name in names
        if name not in inherited and name not in set(trained)
    }
    return trained, left_out


def decayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on: all but biases and normalisation layers, as in `Trainer`.

    >>> decayed_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    {'0.weight'}
    """
    from transformers.trainer_pt_utils import get_parameter_names

    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    return set(get_parameter_names(model, [nn.LayerNorm], forbidden))


def write(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copies values into a model's parameters, in place and in the parameters' dtype and device.

    >>> linear = nn.Linear(1, 1)
    >>> write(linear, {"weight": torch.tensor([[2.0]])})
    >>> linear.weight.item()
    2.0
    """
    with torch.no_grad():
        for name, value in parameters.items():
            model.get_parameter(name).copy_(value)
