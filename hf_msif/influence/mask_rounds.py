"""A question with another number of rounds of masks per row than its stage has: given, or by the noise of masks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ..engine.hashing import describe
from ..errors import InputError
from ..objectives import Objective
from ..scoring.mask_noise import MaskNoise
from ..scoring.scorable import Scorable
from .chain import BoundStage
from .differentiation import StageSolution
from .direction import Direction, Directions
from .replicates import Replicates, is_direction, measured_noise


def with_mask_rounds(
    scorable: Scorable,
    bound: BoundStage,
    solution: StageSolution,
    rounds: int | str,
    corpus: Any,
    batch_size: int | None = None,
) -> Scorable:
    """The same question about rows whose scores are means over `rounds` rounds of masks.

    N is that of the stage: a round counts each term as often as another one.

    Args:
        scorable: the question with the rounds of the stage.
        bound, solution: the stage whose rows are ranked, and what the query holds of it.
        rounds: at least 1; "auto": as many as the noise of masks asks for, see `scoring.mask_noise`.
        corpus: the rows that are ranked, of which "auto" measures some.
        batch_size: rows per batch of that measurement.

    Raises:
        InputError: another `rounds`, or a stage whose scores have no rounds.
    """
    one_round, solution = _checked(bound, solution, rounds)
    noise = None
    if not isinstance(rounds, int):
        first = solution.each[0] if isinstance(solution, Replicates) else solution
        assert is_direction(first)
        two = [_with_objective(scorable, bound, first, one_round.of_epoch(e))[0] for e in (0, 1)]
        noise = MaskNoise.measured(two, corpus, batch_size)
        rounds = noise.rounds()
    number = rounds
    changed, _ = in_rounds(scorable, bound, solution, number)
    metadata = {**scorable.metadata, "objective": describe(changed.objective), "mask_rounds": number}
    if scorable.noise is not None:
        changed = replace(changed, noise=partial(measured_noise, bound, changed))
    if noise is not None:
        metadata["mask_noise"] = noise.tell(one_round.inputs_per_row, bound.engine.is_main)
    return replace(changed, metadata=metadata, identity=lambda: {**scorable.identity(), "the rounds of masks": number})


def in_rounds(
    scorable: Scorable, bound: BoundStage, solution: StageSolution, rounds: int
) -> tuple[Scorable, Direction | Directions | Replicates]:
    """The same question about rows with `rounds` rounds of masks, and its solution. The noise stays that of the
    stage's own rounds.

    Args:
        scorable, bound, solution: as of `with_mask_rounds`.
        rounds: at least 1.

    Raises:
        InputError: as `with_mask_rounds`.
    """
    _, directions = _checked(bound, solution, rounds)
    return _with_objective(scorable, bound, directions, bound.stage.objective.for_influence(rounds))


def _checked(
    bound: BoundStage, solution: StageSolution, rounds: int | str
) -> tuple[Objective, Direction | Directions | Replicates]:
    """The objective with one round of masks, and the solution, of a stage whose rows can be scored so."""
    if rounds != "auto" and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
        raise InputError(f"mask_rounds is {rounds!r}; expected at least 1, 'auto', or None for the stage's own.")
    one_round = bound.stage.objective.for_influence(1)
    has_rounds = bound.stage.mask_rounds is not None and one_round is not bound.stage.objective
    if not (has_rounds and is_direction(solution)):
        raise InputError(
            f"mask_rounds is {rounds!r}, but the rows of stage {bound.name!r} are scored without rounds of masks: its "
            "objective has none, or its masks are those of training; expected None."
        )
    return one_round, solution


def _with_objective(
    scorable: Scorable, bound: BoundStage, solution: Direction | Directions | Replicates, objective: Objective
) -> tuple[Scorable, Direction | Directions | Replicates]:
    """The question with another objective, in batches of about as many inputs of the model as before; its solution."""
    objective = objective if bound.objective.pads else objective.unpadded()
    direction = solution.with_objective(objective)
    direction.prepare()
    size = max(1, bound.stage.batch_size // (objective.inputs_per_row or 1))
    return replace(scorable, objective=objective, influence=direction.influence, batch_size=size), direction
