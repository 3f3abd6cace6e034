"""Tokens of a sentence that are masked or replaced: a pure function of (seed, example id, draw)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ._base import Batch, Rows
from .chunks import InChunks, document_of
from .tokens import ordinary_tokens, seeded

FOLDS = 8  # close to the masked share of BERT's training, 0.15


class Corrupted(NamedTuple):
    """A batch with D copies of every window, and the tokens that are to be changed in each.

    Attributes:
        batch: what the model reads, (I, T), unchanged yet, with `owners`, (I,), the row of each copy, and `starts`,
            (I,), those of its window.
        truncated: (B,) which rows were cut.
        lines, columns: (M,) where a token is to be changed.
        action: (M,) a number in [0, 1) for each that says what becomes of it.
        substitutes: (M,) a random token for each.
    """

    batch: Batch
    truncated: Tensor
    lines: np.ndarray
    columns: np.ndarray
    action: np.ndarray
    substitutes: np.ndarray


class Corruption(InChunks):
    """An objective with the fields `tokenizer`, `seed`, `mask_probability`, `draws`, `first_draw`, `masks`, `static`:
    of every sentence, D draws choose tokens that are changed.

    - masks="random": each draw chooses max(1, round(p·n)) of a sentence's n ordinary tokens.
    - masks="folds", as influence has them (`for_influence`): the tokens are shuffled and cut into K = 1/p folds. Each
      draw of a round of K takes one of them, so that a round takes each token exactly once, where independent draws
      leave to chance which tokens a score knows; the next round shuffles anew. (Folds of a sentence with fewer than K
      tokens may be empty.)
    """

    seed: int
    mask_probability: float
    draws: int
    first_draw: int
    masks: str
    static: bool

    def _check_draws(self) -> None:
        what = type(self).__name__
        if not 0 < self.mask_probability <= 1 or self.draws < 1:
            raise InputError(
                f"{what} got mask_probability={self.mask_probability} and draws={self.draws}; expected a probability "
                "in (0, 1] and at least one draw."
            )
        if self.masks not in ("random", "folds"):
            raise InputError(f"{what} got masks={self.masks!r}; expected 'random' or 'folds'.")
        if self.masks == "folds" and abs(self._folds_per_round * self.mask_probability - 1) > 0.01:
            raise InputError(
                f"{what} got masks='folds' and mask_probability={self.mask_probability}; expected 1/K with an integer "
                f"K, so that K folds cover a sentence: give 1/{self._folds_per_round}."
            )

    def _corrupted(self, rows: Rows, vocabulary: int) -> Corrupted:
        """The rows' windows, once per draw, and the tokens that the draws choose; random tokens are numbers below
        `vocabulary`."""
        batch, truncated, owners, counted, starts, kept = self._windows(rows)
        # Of a document the tokens of all of its windows are drawn, also where the row is one chunk of it.
        window, column = (ordinary_tokens(self.tokenizer, batch) & counted).nonzero()
        numbers = np.bincount(owners[window], minlength=len(rows))
        first = np.cumsum(numbers) - numbers  # of a row's tokens among all
        tokens, actions, substitutes = [np.zeros(0, int)], [np.zeros(0)], [np.zeros(0, int)]
        sizes, turns = list[int](), list[int]()
        for row, number, start in zip(rows, numbers.tolist(), first.tolist(), strict=True):
            for d, (chosen, action, substitute) in enumerate(self._draw(row, number, vocabulary)) if number else ():
                tokens.append(chosen + start)
                actions.append(action)
                substitutes.append(substitute)
                sizes.append(len(chosen))
                turns.append(d)
        chosen, draw = np.concatenate(tokens), np.repeat(np.array(turns, dtype=int), sizes)
        # The copies of a row lie draw by draw, and in each draw window by window.
        width = np.bincount(owners[kept], minlength=len(rows))
        base = np.cumsum(width) - width
        line = self.draws * base[owners] + (np.cumsum(kept) - 1 - base[owners])  # of a window in the first draw
        sources = np.zeros(self.draws * len(owners[kept]), dtype=int)
        for d in range(self.draws):
            sources[line[kept] + d * width[owners[kept]]] = kept.nonzero()[0]
        index = torch.from_numpy(sources)
        copies = {key: value[index] for key, value in batch.items()}
        copies |= {"owners": torch.from_numpy(owners[sources]), "starts": torch.from_numpy(starts[sources])}
        place, inside = window[chosen], kept[window[chosen]]
        lines = line[place] + draw * width[owners[place]]
        return Corrupted(
            copies,
            truncated,
            lines[inside],
            column[chosen][inside],
            np.concatenate(actions)[inside],
            np.concatenate(substitutes)[inside],
        )

    def _draw(
        self, row: Mapping[str, Any], number: int, vocabulary: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each draw: which of a row's `number` ordinary tokens are chosen; a number in [0, 1) for each that says
        what becomes of it; and random tokens."""
        draw = self._folds if self.masks == "folds" else self._random
        return draw(document_of(row), number, vocabulary)

    @property
    def _draws(self) -> range:
        return range(self.first_draw, self.first_draw + self.draws)

    def _random(self, example_id: Any, number: int, vocabulary: int) -> Iterator:
        size = max(1, round(self.mask_probability * number))
        for draw in self._draws:
            generator = seeded(self.seed, example_id, draw)
            chosen = np.sort(generator.choice(number, size=size, replace=False))
            yield chosen, generator.random(size), generator.integers(vocabulary, size=size)

    def _folds(self, example_id: Any, number: int, vocabulary: int) -> Iterator:
        """The folds of one round after another; the action is 0, of which a mask comes."""
        folds, dealt, zeros = self._folds_per_round, -1, np.zeros(number)
        for draw in self._draws:
            turn, fold = divmod(draw, folds)
            if turn != dealt:  # once per round
                dealt, generator = turn, seeded(self.seed, example_id, turn)
                order, random = generator.permutation(number), generator.integers(vocabulary, size=number)
            chosen = np.sort(order[fold * number // folds : (fold + 1) * number // folds])
            yield chosen, zeros[: len(chosen)], random[chosen]

    @property
    def _folds_per_round(self) -> int:
        return round(1 / self.mask_probability)

    @property
    def inputs_per_row(self) -> int | None:  # type: ignore[override]  # a setting decides what is a constant elsewhere
        """`draws`, each with its mask; None where a row has several windows."""
        return self.draws if self.chunk is None else None

    def inputs_of(self, row: Mapping[str, Any]) -> int:
        """`draws` for each window of the row."""
        return self.draws if self.chunk is None else self.draws * int(self._windows([row]).kept.sum())

    def of_epoch(self, epoch: int) -> Self:
        """The objective with the masks of an epoch of training; with `static` masks, itself."""
        return self if self.static else self._with(first_draw=self.first_draw + epoch * self.draws)

    def for_influence(self, rounds: int = 1) -> Self:
        """The objective with `rounds` rounds of folds: eight of them, or 1/p where `masks` is "folds" already.

        With `static` masks, itself. N counts an eighth of all tokens, where masks of training count p of them.
        """
        if self.static:
            return self
        if self.masks == "folds":
            return self._with(draws=rounds * self._folds_per_round)
        return self._with(masks="folds", mask_probability=1 / FOLDS, draws=rounds * FOLDS, first_draw=0)

    def _with(self, **settings: Any) -> Self:
        return replace(self, **settings)  # type: ignore[type-var]  # subclasses are dataclasses
