"""`Stage`: a model, its objective, its data. `Link`: a stage bound to its place in a chain."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import adapters, vectors
from .adapters import FunctionalModel, Split
from .autodiff import Evaluation
from .curvature import Curvature, GaussNewton, Hessian
from .engine import Engine, as_rows
from .errors import InputError
from .solvers import CG
from .vectors import Block

CURVATURES = {"gauss_newton": GaussNewton, "hessian": Hessian}


@dataclass
class Stage:
    """One stage of training: its objective F_k and how its trained parameters depend on the stage before.

    F_k(φ) = (1/N_k) Σ_i ℓ_i(φ) + (weight_decay/2) ‖φ_decayed‖² [+ α ‖W − W_before‖², eq. (12)],  N_k = Σ_i count_i.

    Args:
        name: unique in its chain.
        model: a `PreTrainedModel` at the stage's final parameters, or a `PeftModel` of one: its adapters, not merged,
            belong to the stage and its encoder is inherited as ever; never modified.
        objective: an object of `hf_msif.objectives`, or any other with `collate` and `losses`.
        data: the stage's training examples: a `datasets.Dataset`, a list of dicts, or a list of strings. A column
            `example_id` names rows (and seeds their masks); rows without one are numbered.
        trainable: "all", "head" (everything not inherited) or a list of name patterns. What is inherited and not
            trained is frozen (Case 1), what is inherited and trained is proximal (Case 2). With LoRA, "head" is
            the adapters and all that is new; PEFT alone holds new tensors outside of `modules_to_save` (such as
            BERT's pooler) constant, which is `["*.lora_*", "*.modules_to_save.*"]`.
        weight_decay: of the quadratic penalty, on all trained parameters but biases and normalisation layers (by the
            rule of Hugging Face's `Trainer`, whose own weight decay is AdamW's and no term of an objective).
        alpha: α of eq. (12); needed where inherited parameters are trained.
        link: "proximal" is the only one so far.
        curvature: "gauss_newton" or "hessian".
        curvature_samples: size of the fixed random subset on which the curvature is estimated; None: all of `data`.
        solver: one of `hf_msif.solvers`.
        batch_size: rows a batch in passes over `data`.
        resized: accept embeddings that gained rows since the stage before (see `adapters.split`).
        seed: of the curvature subset.

    Raises:
        InputError: a setting out of range.
    """

    name: str
    model: nn.Module
    objective: Any
    data: Any
    trainable: str | Sequence[str] = "all"
    weight_decay: float = 0.0
    alpha: float | None = None
    link: str = "proximal"
    curvature: str = "gauss_newton"
    curvature_samples: int | None = None
    solver: Any = field(default_factory=CG)
    batch_size: int = 64
    resized: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.curvature not in CURVATURES:
            raise InputError(
                f"stage {self.name!r}: curvature is {self.curvature!r}; expected one of {sorted(CURVATURES)}."
            )
        if self.link != "proximal":
            raise InputError(f"stage {self.name!r}: link is {self.link!r}; expected 'proximal'.")
        sizes = [self.batch_size, 1 if self.curvature_samples is None else self.curvature_samples]
        if not self.weight_decay >= 0 or min(sizes) < 1:
            raise InputError(
                f"stage {self.name!r}: weight_decay={self.weight_decay}, batch_size={self.batch_size}, "
                f"curvature_samples={self.curvature_samples}; expected a decay of at least 0 and sizes of at least 1."
            )
        if self.alpha is not None and not (isinstance(self.alpha, (int, float)) and 0 < self.alpha < math.inf):
            raise InputError(
                f"stage {self.name!r}: alpha is {self.alpha!r}; expected a positive number, as in eq. (12)."
            )


class Link:
    """A stage bound to its place in a chain: its roles, rows and curvature, and what it hands to the stage before.

    Attributes:
        split: the roles of its parameters.
        model: the stage's model as a function of its parameters.
        rows: the stage's data.
        curvature_rows: the fixed random subset on which `operator` is estimated.
    """

    def __init__(self, stage: Stage, before: Link | None, engine: Engine):
        self.stage, self.before, self.engine = stage, before, engine
        self.split: Split = adapters.split(
            stage.name,
            stage.model,
            before.stage.model if before else None,
            stage.trainable,
            stage.resized,
            before.stage.name if before else "",
        )
        self._solver_states: dict[Any, Any] = {}
        self.model = FunctionalModel(stage.model, engine.device)
        self.rows = as_rows(stage.data, f"the data of stage {stage.name!r}")
        self.curvature_rows = self.subset(stage.curvature_samples)
        self._check_finite()
        self._leave_out_what_the_loss_ignores()
        self._check_link()

    def _leave_out_what_the_loss_ignores(self) -> None:
        """A trained tensor that the loss never reads has no curvature: the system would be singular in it."""
        probe = Evaluation(self.model, self.stage.objective, self.collate(self.rows[:2]))
        with self.model.evaluating():
            leaves = probe.leaves(self.split.trained)
            sums, _ = probe.losses(leaves)
        total = sums.sum()
        if not total.requires_grad:
            raise InputError(f"stage {self.stage.name!r}: the loss depends on none of the trained parameters.")
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        unused = {name: "the loss does not depend on it" for name, g in zip(leaves, found, strict=True) if g is None}
        if unused:
            trained = tuple(name for name in self.split.trained if name not in unused)
            inherited = {n: source for n, source in self.split.inherited.items() if n not in unused}
            self.split = replace(
                self.split, trained=trained, inherited=inherited, left_out={**self.split.left_out, **unused}
            )

    def _check_finite(self) -> None:
        for name, parameter in self.model.parameters.items():
            if not parameter.isfinite().all():
                raise InputError(
                    f"stage {self.stage.name!r}: the parameter {name!r} holds NaN or inf: its training diverged, or "
                    "the checkpoint is damaged; load an earlier one."
                )

    def _check_link(self) -> None:
        if self.split.proximal and self.stage.alpha is None:
            raise InputError(
                f"stage {self.stage.name!r} trains {len(self.split.proximal)} inherited tensors (first "
                f"{self.split.proximal[0]!r}): give alpha, the α of eq. (12), or freeze them with trainable='head'."
            )
        for name in self.split.frozen:
            source = self.before.model.parameters[self.split.inherited[name]]
            own = self._leading(name, self.model.parameters[name])
            gap = float((own.double() - source.double()).norm() / source.double().norm().clamp(min=1e-30))
            if gap > 1e-6:
                raise InputError(
                    f"stage {self.stage.name!r}: {name!r} counts as frozen, but differs from stage "
                    f"{self.before.stage.name!r} (relative difference {gap:.1e}): it was trained, or adapters were "
                    "merged into it, or the checkpoint is another one. Use trainable='all' (or patterns) with alpha, "
                    "give the model with its adapters unmerged, or pair it with the checkpoint that it was finetuned "
                    "from."
                )

    def collate(self, rows: list[dict]) -> dict:
        """A batch of the stage's objective on the engine's device."""
        return self.engine.place(self.stage.objective.collate(rows))

    @cached_property
    def operator(self) -> Curvature:
        """∂²F_k/∂trained² + weight decay + 2α on proximal names, on the curvature subset."""
        return self.curvature(self.curvature_rows)

    def curvature(self, rows: list[dict]) -> Curvature:
        """`operator` estimated on other rows."""
        stage, kind = self.stage, CURVATURES[self.stage.curvature]
        return kind(self.model, stage.objective, rows, self.split.trained, self.engine, stage.batch_size, self.ridge)

    def solver_state(self, solver: Any) -> Any:
        """What the solver pays once per operator (damping, factorisation), kept for later queries."""
        if solver not in self._solver_states:
            self._solver_states[solver] = solver.init(self.operator)
        return self._solver_states[solver]

    @cached_property
    def _decayed(self) -> set[str]:
        return adapters.decayed_names(self.stage.model)

    @cached_property
    def ridge(self) -> dict[str, float | Tensor]:
        """Diagonal of the quadratic terms of F_k."""
        ridge: dict[str, float | Tensor] = {}
        if self.stage.weight_decay:
            ridge = {name: self.stage.weight_decay for name in self.split.trained if name in self._decayed}
        for name in self.split.proximal:
            ridge[name] = ridge.get(name, 0.0) + self.tie(name)
        return ridge

    def tie(self, name: str) -> float | Tensor:
        """2α on the inherited rows of a proximal parameter, zero on rows that a resize added."""
        return self.split.tie(name, self.model.parameters[name], self.stage.alpha)

    def subset(self, size: int | None) -> list[dict]:
        """So many random rows of the stage's data, the same for the same seed; None: all of them."""
        if size is None or size >= len(self.rows):
            return self.rows
        return random.Random(self.stage.seed).sample(self.rows, size)

    @cached_property
    def count(self) -> float:
        """N_k = Σ count_i over *all* of the stage's data: the removal of an example has the effect −influence/N_k."""
        built = vars(self).get("operator")  # a saved query is scored without one
        if built is not None and built.examples == len(self.rows):
            return built.count
        total = 0.0
        counts = getattr(self.stage.objective, "counts", None)
        with torch.no_grad(), self.model.evaluating():
            for _, batch in self.engine.batches(self.rows, self.stage.objective.collate, self.stage.batch_size):
                found = counts(batch) if counts else Evaluation(self.model, self.stage.objective, batch).losses({})[1]
                total += float(found.double().sum())
        return sum(self.engine.gather([total]))

    @cached_property
    def gradient_norm(self) -> float:
        """‖∇F_k‖ in the trained parameters, on the curvature subset; one gradient pass.

        The implicit formulas, eqs. (9)–(15), differentiate ∇F_k = 0: they are exact where this is zero. (On a subset
        of the data it is not zero even where training has converged on all of them.)
        """
        total = self.operator.gradient()
        for name in self.split.trained:
            if self.stage.weight_decay and name in self._decayed:
                total[name] += self.stage.weight_decay * self.model.parameters[name]
        for name in self.split.proximal:
            total[name] += 2 * self.stage.alpha * self._shift(name)
        return float(vectors.norm(total))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the parameters, by which a saved query knows its model."""
        return vectors.fingerprint(self.model.parameters)

    def _shift(self, name: str) -> Tensor:
        """W − W_before, zero on rows that a resize added."""
        shift = torch.zeros_like(self.model.parameters[name])
        own = self._leading(name, self.model.parameters[name])
        self._leading(name, shift).copy_(own - self.before.model.parameters[self.split.inherited[name]].to(own))
        return shift

    def _leading(self, name: str, tensor: Tensor, axis: int = 0) -> Tensor:
        """The inherited rows of a tensor: all of them unless the stage resized it."""
        return tensor.narrow(axis, 0, self.split.resized[name]) if name in self.split.resized else tensor

    def carry(self, b: Mapping[str, Tensor]) -> Block:
        """An adjoint on this stage's inherited names as one on the stage before, there zero on the head."""
        before = self.before.model.parameters
        width = vectors.columns(b)
        carried = {name: p.new_zeros(width, *p.shape) for name, p in before.items()}
        for name, value in b.items():
            source = self.split.inherited[name]
            carried[source] += self._leading(name, value, axis=1).to(carried[source])
        return carried


def bind(stages: Sequence[Stage], engine: Engine) -> list[Link]:
    """The stages as a chain, first to last.

    Raises:
        InputError: no stage, a name used twice, or stages that do not fit together.
    """
    if not stages:
        raise InputError("a chain needs at least one stage; got none.")
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise InputError(f"stage names must differ; got {names}.")
    links: list[Link] = []
    for stage in stages:
        links.append(Link(stage, links[-1] if links else None, engine))
    return links
