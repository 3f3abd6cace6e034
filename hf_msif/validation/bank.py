"""A bank of retrainings: the measurements that every method is compared with, computed once and stored."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from ..engine.files import read_json, write_json
from ..engine.folders import add_names
from ..engine.progress import bar
from ..errors import InputError


class Entry(TypedDict):
    """What the file of a retraining holds."""

    omitted: list[Any]
    seed: int
    losses: list[float]
    reached: bool


class Result(TypedDict):
    """What the file of another result holds."""

    result: dict[str, Any]


@dataclass(frozen=True)
class Retrained:
    """The result of one retraining.

    Attributes:
        losses: the test losses f after it, one per test example: Q numbers.
        reached: whether it reached the stationary point that it should reach.
        notes: JSON-able details, e.g. the gradient norm of every stage.
    """

    losses: Sequence[float]
    reached: bool = True
    notes: dict = field(default_factory=dict)


class Bank:
    """Test losses after retraining without sets of examples, cached by (omitted ids, seed, settings).

    Each retraining is one small JSON file, written whole or not at all. So a run that was killed continues where it
    stopped, several processes may fill the same folder, and all methods are compared with the same retrainings.

    Args:
        retrain: `retrain(omit, seed)` trains all stages without the examples whose ids are in `omit` (a frozenset of
            ids of one stage) and returns the test losses: Q numbers or a `Retrained`. Its attribute `settings`
            (JSON-able), if it has one, says what else the losses depend on; `WarmStart` and `FromScratch` have it.
        folder: where retrainings are stored; None: only in memory.
        settings: further settings (JSON-able) on which the losses depend; needed if there is a folder and `retrain` is
            a plain function.
        progress: show a bar over the retrainings.

    Attributes:
        computed: number of retrainings that this object computed rather than read.
        fingerprint: SHA-256 of all settings; retrainings with another fingerprint are not read.

    Raises:
        InputError: there is a folder, but there are no settings.

    >>> bank = Bank(lambda omit, seed: [2.0 - len(omit)], progress=False)
    >>> bank.effects([{"a"}, {"a", "b"}]).tolist(), bank.computed
    ([[-1.0], [-2.0]], 3)
    >>> bank.effects([{"b", "a"}]).tolist(), bank.computed
    ([[-2.0]], 3)
    """

    def __init__(
        self,
        retrain: Callable[[frozenset, int], Retrained | Sequence[float]],
        folder: str | os.PathLike | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
    ):
        retrain_settings = getattr(retrain, "settings", None)
        if folder is not None and retrain_settings is None and settings is None:
            raise InputError(
                "a bank in a folder must know what its losses depend on, or another experiment could read its "
                "retrainings: pass settings={...}."
            )
        self.retrain, self.progress, self.computed = retrain, progress, 0
        self.settings = {**(retrain_settings or {}), **(settings or {})}
        self.fingerprint = hashlib.sha256(_json(self.settings).encode()).hexdigest()
        self.folder = None if folder is None else Path(folder)
        self._entries: dict[str, dict] = {}
        if self.folder is not None:
            add_names(self.folder, "retrainings", ("settings-*.json", 32 * "[0-9a-f]" + ".json"))
            write_json(self.folder / f"settings-{self.fingerprint[:12]}.json", self.settings, indent=None)

    def losses(self, omissions: Sequence[Collection], seed: int = 0) -> np.ndarray:
        """Test losses after retraining without each of the sets of ids: float64, shape (sets, Q).

        Raises:
            InputError: a retraining ended in losses that are not finite, or a stored file is damaged.
        """
        return np.array([entry["losses"] for entry in self.entries(omissions, seed)])

    def effects(self, omissions: Sequence[Collection], seeds: Sequence[int] = (0,)) -> np.ndarray:
        """Measured removal effects: float64, shape (sets, Q), in units of the test loss; positive: the set helped.

        The effect is the loss without a set minus the loss with all examples under the same seed; the mean over
        `seeds`.
        """
        effects = []
        for seed in seeds:
            losses = self.losses([(), *omissions], seed)
            effects.append(losses[1:] - losses[0])
        return np.mean(effects, axis=0)

    def entries(self, omissions: Sequence[Collection], seed: int = 0) -> list[dict]:
        """The records of the retrainings (losses, reached, notes, seconds); missing ones are computed first."""
        sets = [_ordered(omission) for omission in omissions]
        keys = [self._key(omitted, seed) for omitted in sets]
        missing = {key: omitted for key, omitted in zip(keys, sets, strict=True) if self._read(key) is None}
        shown = self.progress and bool(missing)
        with bar(missing.items(), shown=shown, desc=f"retraining, seed {seed}", unit=" retrainings") as retrainings:
            for key, omitted in retrainings:
                self._compute(key, omitted, seed)
        entries = []
        for key in keys:
            entry = self._read(key)
            assert entry is not None  # computed above
            entries.append(entry)
        return entries

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """Another result under the same settings, JSON-able: computed once, and stored beside the retrainings.

        Args:
            name: which result, with all on which it depends beside the settings.
            compute: returns it.
        """
        key = self._key({"result": name}, 0)
        entry = self._read(key, Result)
        if entry is None:
            entry = self._keep(key, {"name": name, "fingerprint": self.fingerprint, "result": compute()})
        return entry["result"]

    def unreached(self, omissions: Sequence[Collection], seeds: Sequence[int]) -> int:
        """Number of these retrainings, with those of all examples, that missed their stationary point."""
        return sum(not entry["reached"] for seed in seeds for entry in self.entries([(), *omissions], seed))

    def _key(self, omitted: list | dict, seed: int) -> str:
        return hashlib.sha256(_json([self.fingerprint, omitted, seed]).encode()).hexdigest()[:32]

    def _read(self, key: str, kind: Any = Entry) -> dict | None:
        if key not in self._entries and self.folder is not None and (path := self.folder / f"{key}.json").exists():
            self._entries[key] = read_json(path, kind, "delete it, and it will be computed again")
        return self._entries.get(key)

    def _compute(self, key: str, omitted: list, seed: int) -> None:
        started = time.perf_counter()
        with warnings.catch_warnings():
            # They are counted and reported together: one warning per retraining would hide the bar.
            warnings.filterwarnings("ignore", "not a stationary point")
            result = self.retrain(frozenset(omitted), seed)
        result = result if isinstance(result, Retrained) else Retrained(result)
        losses = [float(x) for x in np.ravel(np.asarray(result.losses, dtype=np.float64))]
        if not np.isfinite(losses).all():
            raise InputError(
                f"retraining without {omitted[:5]} under seed {seed} ended in losses that are not finite."
            )
        entry = {"omitted": omitted, "seed": seed, "fingerprint": self.fingerprint, "losses": losses}
        entry |= {"reached": result.reached, "notes": result.notes, "seconds": round(time.perf_counter() - started, 3)}
        self._keep(key, entry)
        self.computed += 1

    def _keep(self, key: str, entry: dict) -> dict:
        self._entries[key] = entry
        if self.folder is not None:
            write_json(self.folder / f"{key}.json", entry, indent=None)
        return entry


def _ordered(omission: Collection) -> list:
    """The distinct ids as plain Python values, sorted, so that the same set always has the same JSON text."""
    plain = {i.item() if isinstance(i, np.generic) else i for i in omission}
    return sorted(plain, key=lambda i: (type(i).__name__, i))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
