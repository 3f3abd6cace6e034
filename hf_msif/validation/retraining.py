"""Retrains all stages of a chain without some examples of one stage, and measures the test losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import adapters, training, vectors
from ..adapters import FunctionalModel, Split
from ..autodiff import Evaluation
from ..digests import digest
from ..engine import Engine, as_rows
from ..errors import InputError
from ..polishing import PolishReport, polish
from ..query import describe
from ..stages import Stage
from .bank import Retrained


class _Chain:
    """What both ways of retraining share: the stages, which of them loses examples, and the measurement."""

    def __init__(
        self,
        stages: Sequence[Stage],
        tests: Any,
        stage: str | None,
        tol: float | None,
        polish_settings: Mapping[str, Any],
        engine: Engine | None,
    ):
        self.stages, self.engine = list(stages), engine or Engine(progress=False)
        names = [s.name for s in self.stages]
        if stage is not None and stage not in names:
            raise InputError(f"there is no stage {stage!r} to leave examples out of; the stages are {names}.")
        self.target = names.index(stage) if stage is not None else 0
        self.tests = as_rows(tests, "the test examples")
        self.tol, self.polish_settings = tol, dict(polish_settings)
        self.roles = [
            adapters.split(s.name, s.model, self.stages[k - 1].model if k else None, s.trainable, s.resized)
            for k, s in enumerate(self.stages)
        ]

    @property
    def settings(self) -> dict:
        """All that the test losses depend on, as fingerprints and plain values."""
        stages = [
            {
                "name": s.name,
                "model": vectors.fingerprint(dict(s.model.named_parameters())),
                "objective": describe(s.objective),
                "data": digest(as_rows(s.data, f"the data of stage {s.name!r}")),
                "trainable": s.trainable if isinstance(s.trainable, str) else list(s.trainable),
                "weight_decay": s.weight_decay,
                "alpha": s.alpha,
                "link": s.link,
            }
            for s in self.stages
        ]
        own = {"retraining": type(self).__name__, "tol": self.tol, "polish": self.polish_settings}
        return {**own, "stage": self.stages[self.target].name, "tests": digest(self.tests), "stages": stages}

    def _settings(self, k: int, models: Sequence[nn.Module], omit: Collection) -> dict[str, Any]:
        """What `train` and `polish` need to know alike of stage k."""
        s = self.stages[k]
        return {
            "previous": models[k - 1] if k else None,
            "trainable": s.trainable,
            "weight_decay": s.weight_decay,
            "alpha": s.alpha,
            "resized": s.resized,
            "omit": omit if k == self.target else (),
            "name": s.name,
        }

    def polish(self, k: int, models: Sequence[nn.Module], omit: Collection, **more) -> PolishReport:
        s = self.stages[k]
        settings = {"batch_size": s.batch_size, "tol": self.tol, **self.polish_settings, **more}
        settings |= self._settings(k, models, omit)
        return polish(models[k], s.objective, s.data, engine=self.engine, **settings)

    def measured(self, model: nn.Module, reports: Sequence[PolishReport]) -> Retrained:
        """The loss (a sum over its terms) of every test example of the last stage; how every stage was polished, and
        the accuracy on the tests where the objective predicts classes, in the notes."""
        s = self.stages[-1]
        functional, losses, right = FunctionalModel(model, self.engine.device), [], 0
        classifies = hasattr(s.objective, "predictions")
        with torch.no_grad(), functional.evaluating():
            for start in range(0, len(self.tests), s.batch_size):
                batch = self.engine.place(s.objective.collate(self.tests[start : start + s.batch_size]))
                losses += Evaluation(functional, s.objective, batch).losses({})[0].double().tolist()
                if classifies:
                    predicted = s.objective.predictions(functional.bind({}), batch)
                    right += int((predicted == batch["labels"]).sum())
        notes = {r.name: {"gradient_norm": r.gradient_norm, "steps": r.newton_iterations} for r in reports}
        if classifies:
            notes["accuracy"] = right / len(self.tests)
        return Retrained(losses, all(r.reached for r in reports), notes)


class WarmStart(_Chain):
    """Every stage is polished again from its finished parameters, without the omitted examples.

    The local minimum that the finished models sit in is followed, which is what an influence function predicts; the
    whole chain of a small model takes a second. The stages' models are copied, never changed. Frozen encoders are
    handed on from stage to stage, proximal ones are tied to the retrained one, eq. (12).

    Args:
        stages: as in `MultiStageInfluence`; float64 models at stationary points (`training.polish`), since
            differences of losses are what is wanted.
        tests: examples of the last stage, one column each.
        stage: whose examples are left out; the first by default.
        perturbation: under a seed other than 0 every trained tensor starts with Gaussian noise of this size relative
            to its root mean square, which shows how reproducible the truth is.
        tol: as in `polish`.
        engine: made when none is given.
        polish_settings: more of `polish`'s arguments.

    Raises:
        InputError: the stages do not fit together, or an unrolled link (its run would have to be repeated: use
            `FromScratch`).
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        tests: Any,
        stage: str | None = None,
        perturbation: float = 1e-6,
        tol: float | None = None,
        engine: Engine | None = None,
        **polish_settings,
    ):
        super().__init__(stages, tests, stage, tol, polish_settings, engine)
        if any(s.link != "proximal" for s in self.stages):
            raise InputError("WarmStart minimises F, and an unrolled stage ends where its run ends: use FromScratch.")
        self.perturbation = perturbation
        self._finished: list[nn.Module] | None = None
        self._preconditioners: list = []

    @property
    def settings(self) -> dict:
        return {**super().settings, "perturbation": self.perturbation}

    def finished(self) -> list[nn.Module]:
        """The stages' models at their stationary points, which every retraining starts from; made once."""
        if self._finished is None:
            models = [copy.deepcopy(s.model) for s in self.stages]
            for k in range(len(models)):
                if k:
                    hand_on(models[k - 1], models[k], self.roles[k], self.roles[k].frozen)
                self._preconditioners.append(self.polish(k, models, (), factorise=True).preconditioner)
            self._finished = models
        return self._finished

    def __call__(self, omit: frozenset, seed: int = 0) -> Retrained:
        """Test losses after retraining without the ids in `omit`."""
        models, reports = list(self.finished()), []
        for k in range(0 if seed else self.target, len(models)):
            models[k] = copy.deepcopy(models[k])
            if seed:
                self._perturb(models[k], self.roles[k].trained, seed + 1000 * k)
            if k:
                hand_on(models[k - 1], models[k], self.roles[k], self.roles[k].frozen)
            reports.append(self.polish(k, models, omit, preconditioner=self._preconditioners[k]))
        return self.measured(models[-1], reports)

    def _perturb(self, model: nn.Module, names: Collection[str], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in names:
                p = model.get_parameter(name)
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                p += self.perturbation * p.double().square().mean().sqrt().to(p) * noise


class FromScratch(_Chain):
    """Every stage is trained again from fresh parameters: `training.train`, then `polish`, or either alone.

    Args:
        stages, tests, stage, tol, engine, polish_settings: as in `WarmStart`; the stages' models serve as
            architecture alone.
        make: `make(seed)` returns untrained models, one a stage.
        arguments: Hugging Face's `TrainingArguments` of every stage (their seed is set; `save_strategy="no"`, since a
            retraining must not resume another one), or None: no `train`, so that `polish` does it all. Also a list
            with None for some of the stages.
        polished: polish every stage after training, or a list that says which.

    Raises:
        InputError: a stage with neither; arguments that save checkpoints, or not one a stage.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        tests: Any,
        make: Callable[[int], Sequence[nn.Module]],
        arguments: Sequence[Any] | None = None,
        polished: bool | Sequence[bool] = True,
        stage: str | None = None,
        tol: float | None = None,
        engine: Engine | None = None,
        **polish_settings,
    ):
        super().__init__(stages, tests, stage, tol, polish_settings, engine)
        arguments = [None] * len(stages) if arguments is None else list(arguments)
        polished = [polished] * len(stages) if isinstance(polished, bool) else list(polished)
        strategies = [a.save_strategy for a in arguments if a is not None]
        if not len(arguments) == len(polished) == len(stages) or any(strategy != "no" for strategy in strategies):
            raise InputError(
                f"FromScratch needs one TrainingArguments a stage ({len(stages)}) with save_strategy='no'; got "
                f"{len(arguments)} with {[str(strategy) for strategy in strategies]}."
            )
        idle = [s.name for s, a, p in zip(stages, arguments, polished, strict=True) if a is None and not p]
        if idle:
            raise InputError(
                f"FromScratch got no training arguments and polished=False for {idle}: nothing would be trained."
            )
        self.make, self.arguments, self.polished = make, arguments, polished

    @property
    def settings(self) -> dict:
        # The finished models are not what these losses depend on; the fresh ones are.
        found = super().settings
        for stage, model in zip(found["stages"], self.make(0), strict=True):
            stage["model"] = vectors.fingerprint(dict(model.named_parameters()))
        passing = ("output_dir", "logging_dir", "seed", "data_seed", "report_to", "run_name")
        given = [{} if a is None else a.to_dict() for a in self.arguments]
        plain = [{k: v for k, v in a.items() if k not in passing} for a in given]
        return {**found, "arguments": plain, "polished": self.polished}

    def __call__(self, omit: frozenset, seed: int = 0) -> Retrained:
        """Test losses after training without the ids in `omit`."""
        from transformers import set_seed

        models, reports = list(self.make(seed)), []
        for k, s in enumerate(self.stages):
            set_seed(seed)
            if k:
                hand_on(models[k - 1], models[k], self.roles[k], self.roles[k].inherited)
            if self.arguments[k] is not None:
                arguments = copy.copy(self.arguments[k])
                arguments.seed, arguments.data_seed = seed, seed
                training.train(
                    models[k],
                    s.objective,
                    s.data,
                    arguments,
                    **self._settings(k, models, omit),
                    progress=False,
                )
            if self.polished[k]:
                reports.append(self.polish(k, models, omit))
        return self.measured(models[-1], reports)


def hand_on(source: nn.Module, model: nn.Module, roles: Split, names: Collection[str]) -> None:
    """Copies the inherited tensors `names` from the model of the stage before, in place (their inherited rows)."""
    with torch.no_grad():
        for name in names:
            value = source.get_parameter(roles.inherited[name])
            target = model.get_parameter(name)
            target[: len(value)].copy_(value) if value.dim() else target.copy_(value)
