"""The only room that knows Accelerate: exact shards of the data, one reduction a pass, progress bars.

Every pass over data goes through `Engine`. Rows are cut into one shard a process without padding or repetition (a
prepared data loader would repeat rows of an uneven last batch, and sums would be wrong), and each process's sums are
added once at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .vectors import Block


class Engine:
    """Runs passes over data on this process's shard.

    Args:
        accelerator: an `accelerate.Accelerator`; made when none is given.
        progress: show tqdm bars on the main process.
    """

    def __init__(self, accelerator=None, progress: bool = True):
        from accelerate import Accelerator

        self.accelerator = accelerator or Accelerator()
        self.progress = progress
        # Read once: making TrainingArguments later resets the state that an Accelerator reads them from.
        self.device: torch.device = self.accelerator.device
        self.processes: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.processes:
            raise InputError(
                f"the launcher started {launched} processes, but Accelerate runs {self.processes}: "
                "every one of them would do the whole job. On CPU set ACCELERATE_USE_CPU=true and use --multi_gpu, "
                "or Accelerator(cpu=True)."
            )

    def shard(self, indices: Sequence[int]) -> Sequence[int]:
        """This process's part of `indices`: every index in exactly one process."""
        return indices[self.rank :: self.processes]

    def batches(
        self, rows: Sequence[dict], collate: Callable, batch_size: int
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """This process's batches as (row indices, batch on the device), longest rows first: little is padding."""
        order = sorted(range(len(rows)), key=lambda i: (_length(rows[i]), i), reverse=True)
        mine = self.shard(order)
        for start in range(0, len(mine), batch_size):
            indices = list(mine[start : start + batch_size])
            yield indices, self.place(collate([rows[i] for i in indices]))

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors on the engine's device."""
        return placed(batch, self.device)

    def bar(self, iterable: Iterable | None = None, **settings):
        """A tqdm bar on the main process."""
        from tqdm.auto import tqdm

        hidden = not (self.progress and self.is_main)
        return tqdm(iterable, disable=hidden, dynamic_ncols=True, leave=False, **settings)

    @contextmanager
    def solver_bar(self, description: str, solver: Any) -> Iterator[Callable[[int, float], None]]:
        """A bar over the iterations of a solver; yields its `progress(iteration, residual)`."""
        with self.bar(desc=description, total=getattr(solver, "max_iter", None), unit=" iterations") as bar:

            def progress(iteration: int, residual: float) -> None:
                bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
                bar.update(iteration - bar.n)

            yield progress

    def sum(self, like: dict[str, Tensor], parts: Iterable[Block]) -> Block:
        """Σ parts over all batches of all processes; accumulated in float64, returned in the dtype of `like`."""
        total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in like.items()}
        for part in parts:
            for name, t in part.items():
                total[name] += t
        if self.processes > 1:
            sizes = [t.numel() for t in total.values()]
            flat = self.accelerator.reduce(torch.cat([t.flatten() for t in total.values()]), reduction="sum")
            total = {name: piece.view_as(t) for (name, t), piece in zip(total.items(), flat.split(sizes), strict=True)}
        return {name: t.to(like[name].dtype) for name, t in total.items()}

    def gather(self, items: list) -> list:
        """The lists of all processes, one after another, on every process."""
        if self.processes == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)


def placed(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _length(row: dict) -> int:
    return max((len(value) for value in row.values() if isinstance(value, str)), default=0)


def as_rows(data, what: str) -> list[dict]:
    """Any sensible table (a Dataset, dicts, or strings, column "text") as a list of dicts that carry `example_id`.

    Raises:
        InputError: it is no such table (several splits, a stream, a data frame), is empty, or repeats an id.
    """
    # Iterated, a mapping (several splits, one row) or a data frame would pass off its column names as sentences.
    named = isinstance(data, Mapping) or hasattr(data, "iterrows")
    if isinstance(data, str) or named or not hasattr(data, "__len__"):
        way_out = ""
        if hasattr(data, "iterrows"):
            way_out = ": convert it with Dataset.from_pandas"
        elif named:
            way_out = f" (it has the keys {list(data)[:5]}: pick one split, or put a single row into a list)"
        raise InputError(
            f"{what} is a {type(data).__name__}; expected a datasets.Dataset or a list of rows or of strings{way_out}."
        )
    if len(data) == 0:
        raise InputError(f"{what} is empty; expected at least one row: check the path, the split and the filters.")
    rows = []
    for index, row in enumerate(data):
        if not isinstance(row, (str, Mapping)):
            raise InputError(f"{what}: row {index} is a {type(row).__name__}; expected a dict or a string.")
        rows.append({"example_id": index, **({"text": row} if isinstance(row, str) else row)})
    if len({row["example_id"] for row in rows}) != len(rows):
        raise InputError(f"{what} repeats an example_id; ids name rows and seed their masks, so each must occur once.")
    return rows


def checked_omission(omit: Collection[Any], rows: list[dict], name: str) -> frozenset:
    """The ids to leave out of `rows`, some of them but not all."""
    omit, known = frozenset(omit), {row["example_id"] for row in rows}
    if omit - known:
        raise InputError(
            f"omit names {sorted(omit - known, key=repr)[:5]}, which are no example_id of the data of stage {name!r}; "
            f"they look like {rows[0]['example_id']!r}."
        )
    if omit == known:
        raise InputError(f"omit names every row of the data of stage {name!r}; expected some to be left.")
    return omit
