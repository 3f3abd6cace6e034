"""`Sampled`: what differentiations by curvature share, which is estimated on a sample of rows with drawn masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import ClassVar, Self

from ..curvature import Curvature, auto
from ..engine.stream import Stream
from ..errors import InputError
from ..objectives import Objective
from .chain import BoundStage
from .differentiation import Differentiation
from .implicit_cost import curvature_examples


class Sampled(Differentiation):
    """A differentiation by curvature, which can be replicated: other masks, another part of the sample.

    A subclass estimates its curvature on `curvature_rows`, by `objective`.

    Raises:
        InputError: the data are a stream and `curvature_samples` is None.
    """

    bound: BoundStage

    of_rows: ClassVar[tuple[str, ...]] = ("curvature_rows",)
    """Names of what is computed once from `curvature_rows` and `objective`, which no replicate shares."""

    def __init__(self, bound: BoundStage):
        super().__init__(bound)
        stage = bound.stage
        if isinstance(bound.rows, Stream) and stage.curvature_samples is None:
            raise InputError(
                f"the data of stage {stage.name!r} is a stream, and curvature_samples is None; expected the number of "
                "rows on which the curvature is estimated."
            )
        self._draw, self._part = 0, (0, 1)  # number of the round of masks; number and number of parts of the sample
        self._replicates: dict[tuple[int, int], Self] = {}

    @cached_property
    def curvature_kind(self) -> tuple[Callable[..., Curvature], str | None]:
        """What makes the operators, and why `curvature="auto"` took it (None: it was given)."""
        bound, stage = self.bound, self.bound.stage
        if stage.curvature != "auto":
            return stage.curvature_class, None
        return auto.chosen(bound.model, bound.objective, bound.compared_rows, curvature_examples(self), bound.engine)

    @property
    def objective(self) -> Objective:
        """The stage's objective, with the masks of the replicate."""
        return drawn(self.bound.objective, self._draw)

    @cached_property
    def _sample(self) -> list[dict]:
        return self.bound.subset(self.bound.stage.curvature_samples)

    @cached_property
    def curvature_rows(self) -> list[dict]:
        """The fixed random subset on which curvature is estimated, or a replicate's part of it."""
        number, parts = self._part
        return self._sample if parts == 1 else self._sample[number::parts]

    @property
    def sampled_rows(self) -> int | None:
        rows, samples = self.bound.rows, curvature_examples(self)
        return samples if isinstance(rows, Stream) or samples < len(rows) else None

    @property
    def draws(self) -> bool:
        return self.sampled_rows is not None or drawn(self.bound.objective, 1) is not self.bound.objective

    def replicate(self, number: int, of: int) -> Self:
        """The differentiation with its own round of masks, and the curvature on its own 1/`of` of the sample.

        A curvature on all rows stays on all rows, since these are the data of F and no sample.

        Raises:
            InputError: the sample has fewer rows than there are replicates.
        """
        bound, samples = self.bound, self.sampled_rows
        if of == 1 or not self.draws:
            return self
        if samples is not None and samples < of:
            raise InputError(
                f"stage {bound.name!r} has curvature_samples={samples} for {of} replicates; expected at least one row "
                "for each: take more samples or fewer replicates."
            )
        if (number, of) not in self._replicates:
            self._prepare_replicates()
            changed = self._copy()
            changed._draw, changed._part = number, (0, 1) if samples is None else (number, of)
            for name in self.of_rows:
                vars(changed).pop(name, None)
            self._replicates[number, of] = changed
        return self._replicates[number, of]

    def _prepare_replicates(self) -> None:
        """Computes what all replicates share: a stream is read once, and `curvature="auto"` chooses once."""
        _ = self._sample, self.curvature_kind

    def _copy(self) -> Self:
        """A copy without replicates."""
        changed = copy.copy(self)
        changed._replicates = {}
        return changed


def drawn(objective: Objective, number: int) -> Objective:
    """The objective with the masks or negatives of a replicate: itself for the first, or where it draws none."""
    if number == 0:
        return objective
    changed = objective.of_epoch(number)
    return changed if changed.pads == objective.pads else changed.unpadded()  # which `dataclasses.replace` forgets
