"""`Stage`: a model, its objective, its data, and which of its parameters are trained."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from torch import nn

from ..curvature import Curvature
from ..engine.hashing import contents, fields_of
from ..errors import InputError
from ..objectives import Objective, checked_objective
from ..registry import CHECKS, CURVATURES, DIFFERENTIATIONS, registered
from ..solvers import Auto, Solver, as_solver
from ..solvers.damping import TRAINING
from ..training.trajectory import Trajectory
from .differentiation import Differentiation


@dataclass
class Stage:
    """One stage of training: its objective F_k and how its trained parameters depend on the stage before.

    F_k(φ) = (1/N_k) Σ_i ℓ_i(φ) + (weight_decay/2) ‖φ_decayed‖² [+ α ‖W − W_before‖², eq. (12)],  N_k = Σ_i count_i.

    Args:
        name: unique in its chain.
        model: a `PreTrainedModel` at the stage's final parameters, or a `PeftModel` of one, whose adapters are not
            merged: they belong to the stage, and the encoder is inherited as without them. It is never modified.
        objective: an object of `hf_msif.objectives`, or of your own subclass of `objectives.Objective`. Its texts are
            cut after as many tokens as the model has positions (`objectives.within_positions`).
        data: the stage's training examples: a `datasets.Dataset`, a list of dicts, or a list of strings. A column
            `example_id` names rows (and seeds their masks); rows without one are numbered. A first stage with
            `curvature_samples` also takes a stream (`engine.corpus.as_corpus`), which is read twice: for the subset of
            the curvature and for N.
        trainable: "all", "head" (everything not inherited) or a list of name patterns. What is inherited and not
            trained is frozen (Case 1); how what is inherited and trained depends on the stage before, `link` says
            (Case 2). A parameter whose `requires_grad` is False was not trained and is held constant, whatever stands
            here (but in a model with adapters, where PEFT sets `requires_grad` by rules of its own). With LoRA, "head"
            is the adapters and everything new. PEFT alone trains no new tensors outside of `modules_to_save` (such as
            BERT's pooler): for its models give `["*.lora_*", "*.modules_to_save.*"]`.
        weight_decay: factor of the quadratic penalty on all trained parameters but biases and normalisation layers,
            which are told apart by the rule of Hugging Face's `Trainer`. (Its own weight decay is AdamW's, and no term
            of an objective.)
        alpha: α of eq. (12), needed where an implicit stage trains inherited parameters. "auto" estimates it from the
            finished parameters, α̂ = −⟨∇_W F, W − W_before⟩ / (2 ‖W − W_before‖²).
        link: how the stage is differentiated: a name in `registry.DIFFERENTIATIONS`. "implicit" takes the stage for a
            minimum of F, the paper's assumption; "unrolled" goes back through its recorded training run, converged or
            not, also of a first stage; "segments" through a few checkpoints of its run. Or a class
            derived from `influence.Differentiation`, or a function that makes one for a bound stage.
        run: folder of the recorded run of an unrolled stage, from `training.record` or a `RecordCallback`; or of an
            implicit stage whose solver has damping="training", which is 1/τ of this run (`recorded.TrainingDamping`).
            A differentiation of your own may read another folder here.
        checkpoints: of a stage in segments, and for damping="training": the folders of a Trainer, as a pattern or a
            list ("runs/pretraining/checkpoint-*"); a `training.trajectory.Trajectory`; or the number of segments into
            which the run in `run` is cut.
        max_growth: a pull-back through a run whose adjoint grows by a larger factor is refused. Defaults to 1e-3
            divided by the rounding unit of the run's dtype.
        curvature: "gauss_newton", "hessian", "ekfac", "auto" (Gauss-Newton, or EK-FAC where a solve would take more
            than an hour per test row), a subclass of `curvature.Curvature`, or a `functools.partial` of one that gives
            further settings.
        curvature_samples: number of rows in the fixed random subset on which the curvature is estimated; None: all of
            `data`.
        solver: one of `hf_msif.solvers`, or an object of your own subclass of `solvers.Solver`. Defaults to `Auto()`,
            which suits the curvature and the number of right-hand sides.
        batch_size: inputs of the model per batch in passes over `data`, where a row with D masks has D of them; it
            does not change a result.
        mask_rounds: rounds of masks per row in curvature, gradients and scores (`Objective.for_influence`): of a
            masked LM, each masks every word once, by eight masks. None: the masks of training, whose F alone a
            polished stage minimises. Through a recorded run, and where they are `static`, they are taken anyway.
        resized: accept embeddings that gained rows since the stage before (see `adapters.split`).
        seed: seed of the curvature subset.
        skip_checks: names of the checks that are left out when the stage is bound (`registry.CHECKS`): "determinism",
            "padding", "causality", "symmetry".

    Raises:
        InputError: a setting out of range.
    """

    name: str
    model: nn.Module
    objective: Objective
    data: Any
    trainable: str | Sequence[str] = "all"
    weight_decay: float = 0.0
    alpha: float | str | None = None
    # It is called with a `chain.BoundStage`, whose module imports this one.
    link: str | Callable[[Any], Differentiation] = "implicit"
    run: str | os.PathLike | None = None
    checkpoints: str | os.PathLike | Sequence[str | os.PathLike] | Trajectory | int | None = None
    max_growth: float | None = None
    curvature: str | Callable[..., Curvature] = "gauss_newton"
    curvature_samples: int | None = None
    solver: Solver = field(default_factory=Auto)
    batch_size: int = 64
    mask_rounds: int | None = 1
    resized: bool = False
    seed: int = 0
    skip_checks: Sequence[str] = ()

    def __post_init__(self):
        self.objective = checked_objective(self.objective, f"stage {self.name!r}", self.model)
        self.solver = as_solver(self.solver)
        kind = self.curvature.func if isinstance(self.curvature, partial) else self.curvature
        is_class = isinstance(kind, type) and issubclass(kind, Curvature)
        if not is_class and self.curvature not in CURVATURES:
            raise InputError(
                f"stage {self.name!r}: curvature is {self.curvature!r}; expected one of {sorted(CURVATURES)}, or a "
                "subclass of hf_msif.curvature.Curvature (or a functools.partial of one)."
            )
        if not callable(self.link) and self.link not in DIFFERENTIATIONS:
            raise InputError(
                f"stage {self.name!r}: link is {self.link!r}; expected one of {sorted(DIFFERENTIATIONS)}, or a "
                "Differentiation."
            )
        if "<lambda>" in self.link_name:
            raise InputError(
                f"stage {self.name!r}: link is a lambda, by which a saved query could not be told from another one; "
                "expected a class, a named function, or a functools.partial of one."
            )
        needs_run, by_run = getattr(self.differentiation, "needs_run", None), self.link == "segments"
        if needs_run is False and getattr(self.solver, "damping", None) == TRAINING:
            needs_run, by_run = self.checkpoints is None, True
        if self.checkpoints is not None and not by_run and not callable(self.link):
            raise InputError(
                f"stage {self.name!r}: checkpoints is given, but link is {self.link_name!r}; expected "
                "link='segments', or a solver with damping='training'."
            )
        if needs_run is not None and needs_run != (self.run is not None):
            raise InputError(
                f"stage {self.name!r}: link is {self.link_name!r} and run is {self.run!r}; expected the folder of a "
                "recorded run for link='unrolled' or a solver with damping='training', and None for link='implicit' "
                "with another damping."
            )
        sizes = [self.batch_size, *(n for n in (self.curvature_samples, self.mask_rounds) if n is not None)]
        if not self.weight_decay >= 0 or min(sizes) < 1:
            raise InputError(
                f"stage {self.name!r}: weight_decay={self.weight_decay}, batch_size={self.batch_size}, "
                f"curvature_samples={self.curvature_samples}, mask_rounds={self.mask_rounds}; expected a decay of at "
                "least 0 and numbers of at least 1."
            )
        unknown = [name for name in self.skip_checks if name not in CHECKS]
        if unknown or isinstance(self.skip_checks, str):
            raise InputError(
                f"stage {self.name!r}: skip_checks is {self.skip_checks!r}; expected a list of names among "
                f"{list(CHECKS)}."
            )
        is_positive = isinstance(self.alpha, (int, float)) and 0 < self.alpha < math.inf
        if self.alpha not in (None, "auto") and not is_positive:
            raise InputError(
                f"stage {self.name!r}: alpha is {self.alpha!r}; expected a positive number, as in eq. (12), or 'auto'."
            )

    @property
    def influence_objective(self) -> Objective:
        """The objective of curvature, gradients and scores; `objective` is that of training."""
        if self.mask_rounds is None or getattr(self.differentiation, "masks_of_training", False):
            return self.objective
        return self.objective.for_influence(self.mask_rounds)

    @property
    def has_mask_rounds(self) -> bool:
        """Whether its rows are scored with rounds of masks."""
        return self.influence_objective is not self.objective

    @property
    def differentiation(self) -> Callable[[Any], Differentiation]:
        """What makes the stage's `Differentiation` from its `BoundStage`."""
        return self.link if callable(self.link) else registered(DIFFERENTIATIONS, self.link)

    @property
    def link_name(self) -> str:
        """The link as saved queries store it: its registered name, else "module:Name" of its class."""
        return _name(self.link, DIFFERENTIATIONS)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide a pull-back, as plain values by name. (Model, objective and data are compared by
        content, a recorded run by its differentiation; `batch_size` changes no result.)"""
        apart = {
            "name",
            "model",
            "objective",
            "mask_rounds",
            "data",
            "run",
            "checkpoints",
            "batch_size",
            "skip_checks",
        }
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        solver = settings.pop("solver")
        settings |= {"link": self.link_name, "curvature": self.curvature_name, "solver": type(solver).__name__}
        return settings | {f"solver.{key}": contents(value) for key, value in fields_of(solver).items()}

    @property
    def curvature_class(self) -> Callable[..., Curvature]:
        """What makes the stage's curvature operator: a class, or a partial of one."""
        return registered(CURVATURES, self.curvature) if isinstance(self.curvature, str) else self.curvature

    @property
    def curvature_name(self) -> str:
        """The curvature as metadata and checkpoints store it: its registered name, else "module:Name"."""
        return _name(self.curvature, CURVATURES)


def _name(kind: Any, table: Mapping[str, str]) -> str:
    """The registered name of a class or function, else where it is defined, as "module:Name"; of a partial function,
    that of the function that it calls."""
    if isinstance(kind, str):
        return kind
    if isinstance(kind, partial):
        settings = [*map(repr, kind.args), *(f"{key}={value!r}" for key, value in sorted(kind.keywords.items()))]
        return f"{_name(kind.func, table)}({', '.join(settings)})"
    place = f"{kind.__module__}:{getattr(kind, '__qualname__', type(kind).__qualname__)}"
    return next((name for name, registered_place in table.items() if registered_place == place), place)
