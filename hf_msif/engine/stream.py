"""`Stream`: rows that are read anew at every iteration, for corpora larger than memory."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .hashing import digest

COMPARED_ROWS = 1000


@dataclass(frozen=True)
class Stream:
    """Rows that are read anew at every iteration and never held in memory as a whole.

    The memory used does not grow with the number of rows. A stream can be a corpus to be scored, or the data of a
    stage that was trained elsewhere; its curvature is then taken on a random subset (`curvature_samples`).

    Attributes:
        read: returns a new iterator over the rows, dicts that carry `example_id`.
        what: name of the data in error messages.
        files: the local files that are read, if that is known.

    Raises:
        InputError: on iteration, if there is no row.

    >>> stream = Stream(lambda: ({"example_id": i, "text": f"sentence {i}"} for i in range(1000)))
    >>> len(stream.sample(3, seed=0)), stream.sample(3, seed=0) == stream.sample(3, seed=0)
    (3, True)
    """

    read: Callable[[], Iterator[dict]]
    what: str = "the corpus"
    files: tuple[Path, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the first `COMPARED_ROWS` rows, and of the files, where they are known: bytes
        are read a hundred times faster than rows."""
        sha = hashlib.sha256(digest(list(itertools.islice(iter(self), COMPARED_ROWS))).encode())
        for path in self.files:
            with open(path, "rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()

    def __iter__(self) -> Iterator[dict]:
        empty = True
        for row in self.read():
            empty = False
            yield row
        if empty:
            raise InputError(f"{self.what} is empty; expected at least one row: check the path and the filters.")

    def sample(self, size: int, seed: int) -> list[dict]:
        """`size` rows, drawn uniformly without replacement in one reading; all rows if there are fewer.

        The same seed draws the same rows.
        """
        # Reservoir sampling (Vitter, 1985, algorithm R): row n enters with probability size / n, in a random place.
        generator, reservoir = random.Random(seed), []
        for number, row in enumerate(self):
            if number < size:
                reservoir.append(row)
            elif (place := generator.randrange(number + 1)) < size:
                reservoir[place] = row
        return reservoir
