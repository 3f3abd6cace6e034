"""Retrains all stages of a chain without some examples of one stage, and measures the test losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Split
from ..adapters.functional import FunctionalModel
from ..curvature.derivatives import Evaluation
from ..curvature.padding import without_padding
from ..engine import Engine
from ..engine.corpus import as_rows
from ..engine.hashing import digest, objective_identity, tensors_fingerprint
from ..errors import InputError
from ..influence.differentiation import Retraining
from ..influence.stage import Stage
from ..objectives import Objective
from ..training.polish import PolishReport, polish
from .bank import Retrained

VARIED = ("weights", "order")  # what a start may draw


class _Retrainer:
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
        before = [None, *self.stages]
        self.retrainings: list[Retraining] = [
            _retraining(s, before[k], self.engine) for k, s in enumerate(self.stages)
        ]
        self.roles: list[Split] = [retraining.roles for retraining in self.retrainings]

    @cached_property
    def test_objective(self) -> Objective:
        """The objective by which a query measures the tests, without padding where that reaches the loss."""
        last = self.stages[-1]
        return without_padding(
            FunctionalModel(last.model, self.engine.device), last.influence_objective, self.tests, self.engine
        )

    @property
    def settings(self) -> dict:
        """All that the test losses depend on, as fingerprints and plain values."""
        stages = [
            {
                "name": s.name,
                "model": tensors_fingerprint(dict(s.model.named_parameters())),
                "objective": objective_identity(s.objective),
                "measured": objective_identity(s.influence_objective),
                "data": digest(as_rows(s.data, f"the data of stage {s.name!r}")),
                "trainable": s.trainable if isinstance(s.trainable, str) else list(s.trainable),
                "weight_decay": s.weight_decay,
                "alpha": s.alpha,
                "link": retraining.settings(),
            }
            | ({"held": list(retraining.roles.held)} if retraining.roles.held else {})
            for s, retraining in zip(self.stages, self.retrainings, strict=True)
        ]
        shared = {"retraining": type(self).__name__, "tol": self.tol, "polish": self.polish_settings}
        return {**shared, "stage": self.stages[self.target].name, "tests": digest(self.tests), "stages": stages}

    def terms(
        self, k: int, models: Sequence[nn.Module], omit: Collection, weights: Tensor | None = None
    ) -> dict[str, Any]:
        """F of stage k, as `train`, `record` and `polish` take it."""
        s = self.stages[k]
        weighted = {} if weights is None or k != self.target else {"weights": weights}
        return weighted | {
            "previous": models[k - 1] if k else None,
            "trainable": s.trainable,
            "weight_decay": s.weight_decay,
            "alpha": None if s.alpha == "auto" else s.alpha,
            "resized": s.resized,
            "omit": omit if k == self.target else (),
            "name": s.name,
        }

    def polish(self, k: int, models: Sequence[nn.Module], omit: Collection, **settings) -> PolishReport:
        """Brings the model of stage k to a stationary point of F without the ids in `omit`, in place."""
        s = self.stages[k]
        settings = {"batch_size": s.batch_size, "tol": self.tol, **self.polish_settings, **settings}
        settings |= self.terms(k, models, omit)
        return polish(models[k], s.objective, s.data, engine=self.engine, **settings)

    def measured(self, models: Sequence[nn.Module], reports: Sequence[PolishReport]) -> Retrained:
        """The loss (a sum over its terms) of every test example of the last stage; how every stage was polished, and
        the accuracy on the tests where the objective predicts classes, in the notes."""
        objective, size = self.test_objective, self.stages[-1].batch_size if self.test_objective.pads else 1
        functional, losses, right = FunctionalModel(models[-1], self.engine.device), [], 0
        predictions = objective.predictions
        with torch.no_grad(), functional.evaluating():
            for start in range(0, len(self.tests), size):
                batch = self.engine.to_device(objective.collate(self.tests[start : start + size]))
                losses += Evaluation(functional, objective, batch).losses({})[0].double().tolist()
                if predictions is not None:
                    predicted = predictions(functional.bind({}), batch)
                    right += int((predicted == batch["labels"]).sum())
        notes: dict[str, Any] = {
            r.name: {"gradient_norm": r.gradient_norm, "steps": r.newton_iterations} for r in reports
        }
        if predictions is not None:
            notes["accuracy"] = right / len(self.tests)
        return Retrained(losses, all(r.reached for r in reports), notes)


class WarmStart(_Retrainer):
    """Every stage from the one that loses examples on is trained again from its finished parameters, as its link
    predicts it: an implicit stage is polished again, an unrolled one repeats its run, from where the stage before now
    ends. Earlier stages stay what they are.

    The local minimum that the finished models sit in is followed, or the steps that were taken, which is what an
    influence function predicts; the whole chain of a small model takes a second. The stages' models are copied, never
    changed. Frozen encoders are handed on from stage to stage, proximal ones are tied to the retrained one, eq. (12).

    Args:
        stages: as for `MultiStageInfluence`; those that are trained again in float64, at stationary points
            (`training.polish`) or at the end of their runs, since differences of losses are what is wanted.
        tests: examples of the last stage, one column each.
        stage: whose examples are left out; defaults to the first.
        perturbation: under a seed other than 0 every tensor that is trained again starts with Gaussian noise of this
            size relative to its root mean square, which shows how reproducible the truth is.
        tol: of ‖∇F‖ at a stationary point; defaults to 1e-9 in float64, 1e-4 in float32.
        engine: made when none is given.
        polish_settings: further arguments of `training.polish`.

    Raises:
        InputError: the stages do not fit together.
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
        for s, retraining in zip(self.stages, self.retrainings, strict=True):
            if retraining.polishes and s.alpha == "auto" and retraining.roles.proximal:
                raise InputError(
                    f"stage {s.name!r}: alpha is 'auto', so training did not tie it, and a warm start would leave "
                    "where it ended; expected alpha as a number, link='unrolled', or FromScratch."
                )
        self.perturbation = perturbation
        self._finished: list[nn.Module] | None = None
        self._prepared: list = []

    @property
    def settings(self) -> dict:
        return {**super().settings, "perturbation": self.perturbation}

    @property
    def repeats_run(self) -> bool:
        """Whether the stage that loses examples repeats a recorded run, rather than being polished."""
        return not self.retrainings[self.target].polishes

    def finished(self) -> list[nn.Module]:
        """The stages' models at their stationary points, which every retraining starts from; made once."""
        if self._finished is None:
            models = [copy.deepcopy(s.model) for s in self.stages]
            for k, retraining in enumerate(self.retrainings):
                if k:
                    hand_on(models[k - 1], models[k], self.roles[k], self.roles[k].frozen)
                prepared = retraining.prepare(partial(self.polish, k, models)) if k >= self.target else None
                self._prepared.append(prepared)
            self._finished = models
        return self._finished

    def check_starts(self, seeds: Sequence[int]) -> None:
        """Refuses other starts: a warm start has one.

        Raises:
            InputError: always.
        """
        raise InputError(
            "WarmStart trains the finished models again, so there is no other start over which an effect could be "
            "expected; expected FromScratch, or OwnTruth (msif: validation.retrain: from_scratch, or truth: own)."
        )

    def __call__(self, omit: frozenset, seed: int = 0) -> Retrained:
        """Test losses after retraining without the ids in `omit`."""
        return self.measured(*self.again(omit, seed))

    def again(
        self, omit: Collection = (), seed: int = 0, weights: Tensor | None = None
    ) -> tuple[list[nn.Module], list[PolishReport]]:
        """The models of all stages after retraining, and how those that are polished were.

        Args:
            omit: the ids to leave out.
            seed: other than 0: the start is moved a little.
            weights: ω of every row of the stage that loses examples, in the place of `omit`.

        Raises:
            InputError: weights, but that stage is polished and repeats no run.
        """
        if weights is not None and not self.repeats_run:
            raise InputError(
                f"stage {self.stages[self.target].name!r} is polished, and only a run is repeated with weights of its "
                "rows; expected link='unrolled' with its run."
            )
        models, reports = list(self.finished()), []
        for k in range(self.target, len(models)):
            models[k], retraining = copy.deepcopy(models[k]), self.retrainings[k]
            retraining.begin(models[k])
            if k:
                hand_on(models[k - 1], models[k], self.roles[k], retraining.handed_on())
            if seed:
                perturb(models[k], self.roles[k].trained, self.perturbation, seed + 1000 * k)
            polish_again = partial(self.polish, k, models)
            terms = self.terms(k, models, omit, weights)
            reports.append(retraining.warm_start(models[k], terms, polish_again, self._prepared[k]))
        return models, [report for report in reports if report is not None]


class FromScratch(_Retrainer):
    """Every stage is trained again from fresh parameters: by `TrainingArguments`, then polished, or either alone; an
    unrolled stage by the steps of a run, `training.record`.

    A seed is a *start*: it draws what `vary` names, and everything else is as under the seed `start`. What the
    objectives draw (masks, negatives) has seeds of its own, and is the same under every start.

    Args:
        stages, tests, stage, tol, engine, polish_settings: as for `WarmStart`; the stages' models serve as
            architecture alone.
        make: `make(seed)` returns untrained models, one per stage.
        start: the seed of the runs that are explained. A negative seed −n is this start with Gaussian noise on every
            tensor, of the size `perturbation` relative to its root mean square: the ceiling of a measurement.
        arguments: Hugging Face's `TrainingArguments` of every stage (their seed is set; `save_strategy="no"`, since a
            retraining must not resume another one), or None: no training, so that `polish` does it all. Also a list
            with None for some of the stages.
        vary: what a seed draws, of "weights" (the initial weights, by `make`) and "order" (the order of the batches,
            and dropout).
        polished: polish every stage after training, or a list that says which; defaults to all that are implicit.

    Raises:
        InputError: a stage with neither; arguments that save checkpoints, or not one per stage; `vary` names
            something else, or nothing.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        tests: Any,
        make: Callable[[int], Sequence[nn.Module]],
        arguments: Sequence[Any] | None = None,
        polished: bool | Sequence[bool] | None = None,
        stage: str | None = None,
        start: int = 0,
        perturbation: float = 1e-6,
        vary: Collection[str] = ("weights",),
        tol: float | None = None,
        engine: Engine | None = None,
        **polish_settings,
    ):
        super().__init__(stages, tests, stage, tol, polish_settings, engine)
        if not vary or not set(vary) <= set(VARIED):
            raise InputError(f"vary is {vary!r}; expected one or both of {', '.join(VARIED)}.")
        arguments = [None] * len(stages) if arguments is None else list(arguments)
        if polished is None:
            polished = [retraining.polishes for retraining in self.retrainings]
        polished = [polished] * len(stages) if isinstance(polished, bool) else list(polished)
        strategies = [a.save_strategy for a in arguments if a is not None]
        if not len(arguments) == len(polished) == len(stages) or any(strategy != "no" for strategy in strategies):
            raise InputError(
                f"FromScratch needs one TrainingArguments per stage ({len(stages)}) with save_strategy='no'; got "
                f"{len(arguments)} with {[str(strategy) for strategy in strategies]}."
            )
        idle = [s.name for s, a, p in zip(stages, arguments, polished, strict=True) if a is None and not p]
        if idle:
            raise InputError(
                f"FromScratch got no training arguments and polished=False for {idle}: nothing would be trained."
            )
        for s, retraining, a, p in zip(self.stages, self.retrainings, arguments, polished, strict=True):
            if not retraining.polishes and (a is None or p):
                raise InputError(
                    f"stage {s.name!r} has link={s.link_name!r}: it is what its run leaves; expected its "
                    "TrainingArguments and no polish."
                )
        self.make, self.arguments, self.polished = make, arguments, polished
        self.start, self.perturbation, self.vary = start, perturbation, tuple(sorted(set(vary)))

    @property
    def settings(self) -> dict:
        # The finished models are not what these losses depend on; the fresh ones are.
        settings = super().settings
        for stage, model in zip(settings["stages"], self.make(0), strict=True):
            stage["model"] = tensors_fingerprint(dict(model.named_parameters()))
        passing = ("output_dir", "logging_dir", "seed", "data_seed", "report_to", "run_name")
        arguments = [{} if a is None else a.to_dict() for a in self.arguments]
        plain = [{k: v for k, v in a.items() if k not in passing} for a in arguments]
        settings |= {"arguments": plain, "polished": self.polished}
        return {**settings, "start": self.start, "perturbation": self.perturbation, "vary": self.vary}

    def check_starts(self, seeds: Sequence[int]) -> None:
        """Refuses seeds that are not other starts of the stage that loses examples.

        Raises:
            InputError: one is the run's own start, or is negative (its start moved a little); or the stage and those
                before it begin at the same weights under all of them, and the order of their batches does not vary.
        """
        own = [seed for seed in seeds if seed < 0 or seed == self.start]
        if own:
            raise InputError(
                f"the starts {list(seeds)} hold {own[0]}, the run's own start ({self.start}) or a negative seed, "
                "which is that start moved a little; expected other starts alone."
            )
        stages = range(self.target + 1)
        if "order" in self.vary and any(self.arguments[k] is not None for k in stages):
            return
        one, other = self.make(seeds[0]), self.make(seeds[1])
        fresh = [(k, n) for k in stages for n in self.roles[k].trained if n not in self.roles[k].inherited]
        if "weights" not in self.vary or all(
            torch.equal(one[k].get_parameter(n), other[k].get_parameter(n)) for k, n in fresh
        ):
            raise InputError(
                f"stage {self.stages[self.target].name!r} starts from the same weights under every seed, so that "
                "there are no other starts over which its effects could be expected; expected a stage that is trained "
                "from scratch, batches in another order (vary=('order',); msif: validation.vary), or OwnTruth "
                "(msif: validation.truth: own)."
            )

    def __call__(self, omit: frozenset, seed: int = 0) -> Retrained:
        """Test losses after training without the ids in `omit`."""
        from transformers import set_seed

        noise = -seed
        seed = self.start if noise > 0 else seed
        models: list[nn.Module] = list(self.make(seed if "weights" in self.vary else self.start))
        seed, reports = seed if "order" in self.vary else self.start, []
        for k, retraining in enumerate(self.retrainings):
            _hold(models[k], self.roles[k].held)
            set_seed(seed)
            if noise > 0:
                perturb(models[k], self.roles[k].trained, self.perturbation, noise + 1000 * k)
            if k:
                hand_on(models[k - 1], models[k], self.roles[k], self.roles[k].inherited)
            if self.arguments[k] is not None:
                arguments = copy.copy(self.arguments[k])
                arguments.seed, arguments.data_seed = seed, seed
                retraining.from_scratch(models[k], arguments, self.terms(k, models, omit))
            if self.polished[k]:
                reports.append(self.polish(k, models, omit))
        return self.measured(models, reports)


def _retraining(stage: Stage, before: Stage | None, engine: Engine) -> Retraining:
    make = getattr(stage.differentiation, "retraining", None)
    if make is None:
        raise InputError(f"stage {stage.name!r}: link={stage.link_name!r} does not say how it is trained again.")
    return make(stage, before, engine)


def _hold(model: nn.Module, names: Collection[str]) -> None:
    """Sets `requires_grad` to False where the finished model has it so: fresh models do not know what was trained."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)


def perturb(model: nn.Module, names: Collection[str], size: float, seed: int) -> None:
    """Adds Gaussian noise to tensors in place, of a size relative to their root mean square."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            p = model.get_parameter(name)
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p.add_(size * p.double().square().mean().sqrt().to(p) * noise)


def hand_on(source: nn.Module, model: nn.Module, roles: Split, names: Collection[str]) -> None:
    """Copies the inherited tensors `names` from the model of the stage before, in place (their inherited rows)."""
    with torch.no_grad():
        for name in names:
            value = source.get_parameter(roles.inherited[name])
            target = model.get_parameter(name)
            target[: len(value)].copy_(value) if value.dim() else target.copy_(value)
