"""Splits a `PreTrainedModel` into shared encoder W and heads U and Θ.

`split` decides by name and shape which tensors a stage inherited from the stage before, which it trained, and which
are left out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..errors import InputError
from .peft import former_name, survey, unwrapped

# What only one of two otherwise equal base models has: BertModel has a pooler, the base of BertForMaskedLM has none.
OPTIONAL_MODULE = "pooler"


@dataclass(frozen=True)
class Split:
    """Roles of the parameters of one stage (W, U and Θ of the paper, §3.1), by name.

    Attributes:
        shapes: every parameter of the model; tied tensors appear once.
        inherited: encoder tensors W: own name → name in the model of the stage before.
        trained: tensors that the stage optimises.
        resized: inherited tensors with more rows than before: name → number of inherited (leading) rows.
        left_out: tensors that are neither inherited nor trained: name → why.
    """

    stage: str
    shapes: dict[str, torch.Size]
    inherited: dict[str, str]
    trained: tuple[str, ...]
    resized: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Inherited and not trained: Case 1, eq. (2)."""
        trained = set(self.trained)
        return tuple(name for name in self.inherited if name not in trained)

    @property
    def proximal(self) -> tuple[str, ...]:
        """Inherited and trained: Case 2, eq. (12)."""
        return tuple(name for name in self.trained if name in self.inherited)

    @property
    def head(self) -> tuple[str, ...]:
        """Trained and not inherited: U in pretraining, Θ in finetuning."""
        return tuple(name for name in self.trained if name not in self.inherited)

    def continuing(self, first: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Split:
        """The roles of a run that started at `first`, from the model of the stage before: a head that starts with that
        model's values, as training that goes on with the same task does, is inherited too."""
        inherited = dict(self.inherited)
        for name, value in first.items():
            if name not in inherited and name in before and torch.equal(value, before[name].to(value)):
                inherited[name] = name
        return replace(self, inherited=inherited)

    def count(self, names: Sequence[str]) -> int:
        """Number of scalars in `names`."""
        return sum(self.shapes[name].numel() for name in names)

    def role(self, name: str) -> str:
        """One of "frozen", "proximal", "head", "left out"."""
        if name in self.inherited:
            return "proximal" if name in set(self.trained) else "frozen"
        return "head" if name in set(self.trained) else "left out"

    def table(self) -> list[dict]:
        """One row a tensor: name, shape, parameters, role, note."""
        rows = []
        for name, shape in self.shapes.items():
            note = self.left_out.get(name, "")
            if name in self.inherited and self.inherited[name] != name:
                note = f"from {self.inherited[name]}"
            if name in self.resized:
                fate = "trained" if name in self.trained else "held constant"
                note = f"first {self.resized[name]} of {shape[0]} rows inherited, the others {fate}"
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

    def __str__(self) -> str:
        groups = [
            ("inherited, frozen (W)", self.frozen),
            ("inherited, trained (W, proximal)", self.proximal),
            ("trained, own (U or Θ)", self.head),
            ("left out", tuple(self.left_out)),
        ]
        lines = [f"stage {self.stage!r}: {self.count(tuple(self.shapes)):,} parameters in {len(self.shapes)} tensors"]
        lines += [f"  {label:34} {self.count(names):>13,} in {len(names)} tensors" for label, names in groups if names]
        lines += [f"    {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def encoder(model: nn.Module) -> nn.Module:
    """The base model of a `PreTrainedModel`, also of one in a `PeftModel`, whose own `base_model` is another thing."""
    return unwrapped(model).base_model


def _encoder_names(model: nn.Module, idle: Collection[str]) -> dict[str, str]:
    """Names in the whole model → names inside the base model, as before any adapters; without those in `idle`.

    Matched by identity so that ties do not matter. A tensor and a copy that PEFT trains may both be in use.
    """
    canonical = {id(p): name for name, p in model.named_parameters()}
    pairs = [(canonical[id(p)], former_name(name)) for name, p in encoder(model).named_parameters()]
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

    W is what the two *base* models share by name and shape; a pooler that only one of them has belongs to its head.
    LoRA and other PEFT adapters inside of the encoder belong to the head too, unless the model before has the same;
    `query.base_layer.weight` is the `query.weight` of the stage before, and a copy in `modules_to_save` takes the
    place of its original. Inactive adapters, originals that a copy replaces and, with "head", new weights under an
    adapter are left out.

    Args:
        stage: name used in messages.
        model: the stage's model.
        previous: the model of the stage before, or None for the first stage (nothing is inherited).
        trainable: "all"; "head" (all that is not inherited); or name patterns (`fnmatch`, e.g. `"*.layer.3.*"`).
        resized: accept tensors that differ from `previous` only in a larger number of rows (`resize_token_embeddings`
            after tokens were added): the leading rows are inherited, the new ones are not.

    Raises:
        InputError: the base models do not match (the first tensor that differs is named), a pattern matches nothing,
            or nothing is left to train; adapters that are merged, or are no function of the model's parameters.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    added, idle = survey(model, stage)
    inherited, grown = _match(stage, model, previous, resized, previous_stage) if previous is not None else ({}, {})
    trained, left_out = _trained(stage, [name for name in shapes if name not in idle], inherited, trainable)
    if trainable == "head" and added:  # to train both would have a flat direction
        under = {n: "held constant under its adapter" for n in trained if ".base_layer." in n}
        trained, left_out = tuple(n for n in trained if n not in under), under
    return Split(stage, shapes, inherited, trained, grown, {**left_out, **idle})


def _match(
    stage: str, model: nn.Module, previous: nn.Module, resized: bool, previous_stage: str
) -> tuple[dict[str, str], dict[str, int]]:
    added, idle = survey(model, stage)
    own = _encoder_names(model, idle)
    other = {base: n for n, base in _encoder_names(previous, survey(previous, previous_stage)[1]).items()}
    pair = f"stage {stage!r} ({type(model).__name__}) and {previous_stage!r} ({type(previous).__name__})"
    way_out = "; load the finetuned model from the pretrained checkpoint, or pair it with the checkpoint it came from"

    # A head hides inside the base model only where there is no base-model attribute: then names alone decide.
    whole = any(encoder(one) is unwrapped(one) for one in (model, previous))
    shared = {name: base for name, base in own.items() if base in other}
    if not shared:
        raise InputError(
            f"{pair} share no tensor: the first of the one is {next(iter(own.values()))!r}, of the other "
            f"{next(iter(other))!r}{way_out}."
        )
    bases = dict.fromkeys(base for name, base in own.items() if name in shared or name not in added)
    for base in [*bases, *other]:
        if (base in bases) != (base in other) and OPTIONAL_MODULE not in base.split(".") and not whole:
            has, lacks = (stage, previous_stage) if base in bases else (previous_stage, stage)
            raise InputError(f"{pair} do not match: tensor {base!r} is in {has!r} and not in {lacks!r}{way_out}.")
    grown = {}
    for name, base in shared.items():
        mine, theirs = model.get_parameter(name).shape, previous.get_parameter(other[base]).shape
        if mine == theirs:
            continue
        if _is_embedding(model, name) and mine[1:] == theirs[1:] and mine[0] > theirs[0]:
            if resized:
                grown[name] = theirs[0]
                continue
            raise InputError(
                f"{pair} do not match: tensor {base!r} is {tuple(mine)} in {stage!r} and {tuple(theirs)} in "
                f"{previous_stage!r}; if {mine[0] - theirs[0]} tokens were added with resize_token_embeddings, pass "
                "resized=True, otherwise pair the model with the checkpoint that it was finetuned from."
            )
        raise InputError(
            f"{pair} do not match: tensor {base!r} is {tuple(mine)} in {stage!r} and {tuple(theirs)} in "
            f"{previous_stage!r}{way_out}."
        )
    return {name: other[base] for name, base in shared.items()}, grown


def _is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _trained(
    stage: str, names: list[str], inherited: Mapping[str, str], trainable: str | Sequence[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    if trainable == "all":
        return tuple(names), {}
    if trainable == "head":
        head = tuple(name for name in names if name not in inherited)
        if not head:
            raise InputError(
                f"stage {stage!r} has trainable='head', but its model has no parameter of its own beside the "
                "inherited encoder; pass the model with its task head (AutoModelFor...), or trainable='all'."
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
    """Parameters that weight decay acts on: all but biases and normalisation layers, by the rule of `Trainer`."""
    from transformers.trainer_pt_utils import get_parameter_names

    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    return set(get_parameter_names(model, [nn.LayerNorm], forbidden))


def write(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copies values into a model's parameters, in place."""
    with torch.no_grad():
        for name, value in parameters.items():
            model.get_parameter(name).copy_(value)
