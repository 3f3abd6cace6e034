"""Metasmoothness: whether a recorded run answers a change of its rows' weights with a change that can be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..engine.corpus import as_rows
from ..errors import InputError
from ..scoring.scores import Scores
from .experiments import METHOD, effects_of_methods
from .measures import aggregated
from .retraining import WarmStart

SMOOTH = 0.9  # similarity from which on a first-order prediction of the run has something to predict
NEARLY_LINEAR = 0.5  # relative error of a first-order prediction up to which it says most of what happens
REMEDIES = (
    "a smaller learning rate, larger batches, warm-up, an average of the last weights, Adam's eps inside the root "
    "(optim_args: eps_inside_root=true) or larger, or the expected truth in the place of the own one"
)


@dataclass(frozen=True)
class Metasmoothness:
    """How smoothly the end of a run depends on the weights ω of its rows, along ω = 1 + t v from t = 0 over h to 2h.

    Attributes:
        losses: similarity of the two successive differences of the test losses, in [−1, 1].
        parameters: the same of the final parameters of the stage.
        second_order: size of the second-order term at the far end, relative to the first-order one.
        first_order_error: at h and at 2h, ‖measured − predicted change of the losses‖ / ‖predicted change‖; None
            without predictions.
        step: h. The far end is as far from 1 as leaving out the share 4h² of the rows.
        directions: number of random directions v.
        stage: name of the stage whose rows were weighted.
    """

    losses: float
    parameters: float
    second_order: float
    first_order_error: tuple[float, float] | None
    step: float
    directions: int
    stage: str

    @property
    def smooth(self) -> bool:
        """Whether both similarities are at least 0.9, and the second order and the errors of the prediction,
        where there is one, at most a half."""
        errors = (self.second_order, *(self.first_order_error or ()))
        return min(self.losses, self.parameters) >= SMOOTH and max(errors) <= NEARLY_LINEAR

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: the attributes, and "smooth"."""
        error = None if self.first_order_error is None else list(self.first_order_error)
        return {**asdict(self), "first_order_error": error, "smooth": self.smooth}

    def __str__(self) -> str:
        text = (
            f"metasmoothness of the run of {self.stage!r}: {self.losses:.2f} (test losses), {self.parameters:.2f} "
            f"(parameters); second order {self.second_order:.0%} of the first at the distance of leaving out "
            f"{4 * self.step**2:.0%} of the rows"
        )
        if self.first_order_error is not None:
            near, far = self.first_order_error
            text += f"; error of the prediction {near:.0%} at half of that distance, {far:.0%} at all of it"
        if not self.smooth:
            text += f". This run is not smooth enough to be predicted well (≥ {SMOOTH}, ≤ {NEARLY_LINEAR:.0%}): try "
            text += REMEDIES
        return f"{text}."


def metasmoothness(
    retrain: WarmStart,
    predicted: Scores | np.ndarray | None = None,
    ids: Sequence | None = None,
    step: float = 0.1,
    directions: int = 1,
    seed: int = 0,
    aggregate: str | None = None,
) -> Metasmoothness:
    """Repeats a recorded run with the weights 1, 1 + h v and 1 + 2h v of its rows, and compares what the two steps do.

    S = Σ_j |Δ_j| sign(Δ_j) sign(Δ'_j) / Σ_j |Δ_j|,    Δ = y(1 + hv) − y(1),  Δ' = y(1 + 2hv) − y(1 + hv)

    which is the empirical metasmoothness of Engstrom et al. (Optimizing ML training with metagradient descent, 2025),
    of the test losses and of the final parameters y; v is a vector of random signs. Near 1: two equal steps do about
    the same. Near 0: the answer to the second has nothing to do with the answer to the first, and no derivative
    predicts either.

    It takes 1 + 2 `directions` retrainings, and so shows before all others are made whether they can be predicted.

    Args:
        retrain: the chain; the stage that loses examples must be one that repeats its run.
        predicted: `Scores` of the stage's rows, or predicted removal effects (rows, Q) in the order of `ids`, for
            `first_order_error`: −h Σ_i v_i effect_i is the predicted change. Other rows than these are not weighted.
            None: all rows are weighted, and nothing is compared.
        ids: example ids of the rows of `predicted`; default to those of the scores.
        step: h, in (0, 0.5], so that no weight is negative.
        directions: number of random directions; with few tests take more than one.
        seed: of the directions.
        aggregate: "sum" or "mean" if the scores are aggregated over the tests so.

    Raises:
        InputError: the stage is polished and repeats no run, `step` is outside its range, a predicted row is none of
            the stage's, or nothing depends on the weights.
    """
    stage = retrain.stages[retrain.target]
    if not 0 < step <= 0.5 or directions < 1:
        raise InputError(f"step is {step} and directions {directions}; expected 0 < step ≤ 0.5 and at least one.")
    rows = as_rows(stage.data, f"the data of stage {stage.name!r}")
    places, effects = np.arange(len(rows)), None
    if predicted is not None:
        methods, ids, _ = effects_of_methods(predicted, ids, None, aggregate)
        place_of = {row["example_id"]: place for place, row in enumerate(rows)}
        unknown = [i for i in ids if i not in place_of]
        if unknown:
            raise InputError(f"no row of stage {stage.name!r} has the example_id {unknown[0]!r} of the predictions.")
        places, effects = np.array([place_of[i] for i in ids]), methods[METHOD]
    generator, start = np.random.default_rng(seed), _ended(retrain, np.ones(len(rows)))
    ends, changes = [], []
    for _ in range(directions):
        v = np.zeros(len(rows))
        v[places] = generator.choice([-1.0, 1.0], size=len(places))
        ends.append([_ended(retrain, 1 + size * v) for size in (step, 2 * step)])
        if effects is not None:
            changes.append(-step * v[places] @ effects)
    losses, parameters = (
        np.stack([[near[y] - start[y], far[y] - near[y]] for near, far in ends], axis=1) for y in (0, 1)
    )
    first, second = losses
    if not first.any():
        raise InputError(f"the test losses do not depend on the weights of the rows of stage {stage.name!r}.")
    error = None
    if effects is not None:
        prediction, far = np.stack(changes), first + second
        error = (
            _relative(aggregated(first, aggregate), prediction),
            _relative(aggregated(far, aggregate), 2 * prediction),
        )
    return Metasmoothness(
        losses=_similarity(first, second),
        parameters=_similarity(*parameters),
        # With Δ = a + b and Δ' = a + 3b, of a first-order term a and a second-order one b at h; at 2h 2a and 4b.
        second_order=float(2 * np.linalg.norm(second - first) / np.linalg.norm(3 * first - second)),
        first_order_error=error,
        step=step,
        directions=directions,
        stage=stage.name,
    )


def _ended(retrain: WarmStart, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The test losses, and the trained parameters of the weighted stage as one vector, in float64."""
    models, reports = retrain.again(weights=torch.from_numpy(weights))
    model, names = models[retrain.target], retrain.roles[retrain.target].trained
    parameters = torch.cat([model.get_parameter(name).detach().flatten().double() for name in names])
    return np.array(retrain.measured(models, reports).losses), parameters.numpy(force=True)


def _similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Σ |Δ| sign(Δ) sign(Δ') / Σ |Δ|."""
    return float((first * np.sign(second)).sum() / np.abs(first).sum())


def _relative(measured: np.ndarray, predicted: np.ndarray) -> float:
    """‖measured − predicted‖ / ‖predicted‖."""
    return float(np.linalg.norm(measured - predicted) / np.linalg.norm(predicted))
