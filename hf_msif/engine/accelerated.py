"""The only module that knows Accelerate: exact shards of the data, one reduction per pass, progress bars.

Every pass over data goes through `Engine`. Each row is dealt out to exactly one process (a prepared data loader would
repeat rows to fill an uneven last batch, and the sums would be wrong), so that all processes have about the same work.
Their sums are added once, at the end of the pass. An error in one process ends all of them with its message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed
from torch import Tensor

from ..errors import InputError, ProcessError
from ..vectors import Block
from . import progress
from .batching import Collator, deal_batches, deal_equal, row_cost, row_shape

if TYPE_CHECKING:
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    from .stream import Stream


class Engine:
    """Runs passes over data on this process's shard.

    Args:
        accelerator: an `accelerate.Accelerator`; defaults to `new_accelerator()`.
        progress: show progress on the main process: bars, or lines where stderr is no terminal.
        sharded: each process holds only its shard of a solver's vectors, see `curvature.sharded`.

    Attributes:
        device: this process's device.
        processes: their number.
        rank: this process's number, from 0.
        is_main: whether this is process 0, which reads and writes files for all.

    Raises:
        InputError: the launcher started another number of processes than the accelerator runs.
    """

    def __init__(self, accelerator: Accelerator | None = None, progress: bool = True, sharded: bool = False):
        self.accelerator: Accelerator = accelerator or new_accelerator()
        self.progress, self.sharded = progress, sharded
        # Read once: a TrainingArguments made later resets the global state from which an Accelerator reads them.
        self.device: torch.device = self.accelerator.device
        self.processes: int = self.accelerator.num_processes
        self.rank: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        launched = int(os.environ.get("WORLD_SIZE", 1))
        if launched != self.processes:
            raise InputError(
                f"the launcher started {launched} processes, but Accelerate runs {self.processes}: "
                "each of them would do the whole work. On CPU set ACCELERATE_USE_CPU=true and use --multi_gpu, "
                "or Accelerator(cpu=True)."
            )

    # --- shards

    def local_batches(self, rows: Sequence[dict], objective: Collator, size: int) -> list[list[int]]:
        """This process's batches of at most `size` rows, as row indices, the costliest first."""
        costs = [row_cost(row, objective) for row in rows]
        if objective.pads:
            return deal_batches(costs, size, self.processes)[self.rank]
        shapes = [row_shape(row, objective) for row in rows]
        return deal_equal(shapes, costs, size, self.processes)[self.rank]

    def batches(
        self, rows: Sequence[dict], objective: Collator, batch_size: int, collate: Callable | None = None
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """This process's batches as (row indices, batch on the device).

        On a GPU a thread makes the next batch while the device computes: tokenising would take as long as the
        derivatives.

        Args:
            rows: all rows, the same on every process.
            objective: its `collate` makes a batch of rows; its texts tell the rows' costs.
            batch_size: most rows per batch.
            collate: makes the batches in place of `objective.collate`.
        """
        shares, collate = self.local_batches(rows, objective, batch_size), collate or objective.collate
        # On a CPU a thread would take time from the cores that compute.
        map_batches = map if self.device.type == "cpu" else _map_ahead
        batches = map_batches(lambda indices: collate([rows[i] for i in indices]), shares)
        for indices, batch in zip(shares, batches, strict=True):
            yield indices, self.to_device(batch)

    def rounds(self, rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
        """Consecutive rows, `size` at a time, the same on every process.

        A stream is read by the main process alone, one round ahead, and broadcast: it is fetched once, and all
        processes see its rows in the same order.
        """
        if isinstance(rows, Sequence):
            for start in range(0, len(rows), size):
                with self.raising_together():
                    round_rows = list(rows[start : start + size])
                yield round_rows
            return
        stream = iter(rows) if self.is_main else iter(())
        rounds = _map_ahead(lambda _: list(islice(stream, size)), count())
        while True:
            with self.raising_together():
                round_rows = next(rounds)
            round_rows = self.broadcast_object(round_rows)
            if not round_rows:
                return
            yield round_rows

    def to_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors moved to the engine's device; other values stay as they are."""
        return to_device(batch, self.device)

    # --- communication between processes

    def sum(self, like: Mapping[str, Tensor], parts: Iterable[Block]) -> Block:
        """Σ parts over all batches of all processes, on every process.

        Args:
            like: tensors with the names, shapes, dtypes and device of the result.
            parts: one block per batch of this process.

        Returns:
            The sum, accumulated in float64 and returned in the dtypes of `like`.

        Raises:
            Exception: what `parts` raised; in the other processes an `InputError` or a `ProcessError` of its text.
        """
        flat, total = _buffer(like, spare=1)
        failure = self._accumulate(total, parts)
        if self.processes > 1:
            flat[-1] = float(failure is not None)
            distributed.all_reduce(flat)  # in place: a copy would be one more vector in memory
            if flat[-1]:
                self._raise(failure)
        elif failure is not None:
            raise failure
        return {name: t.to(like[name].dtype) for name, t in total.items()}

    def columns(
        self, like: Mapping[str, Tensor], number: int, columns: Iterable[tuple[int, Mapping[str, Tensor]]]
    ) -> Block:
        """A block whose columns the processes make, each of them by one process; the block is on every process.

        A column has the same bits on any number of processes: nothing but zeros is added to it. A process holds the
        block and one column more.

        Args:
            like: plain tensors with the names, shapes, dtypes and device of a column.
            number: Q, the number of columns.
            columns: (index, column) for each of this process's columns.

        Raises:
            Exception: what `columns` raised; in the other processes an `InputError` or a `ProcessError` of its text.
        """
        make = torch.empty if self.processes == 1 else torch.zeros  # zeros would be written for nothing
        block = {n: make((number, *t.shape), dtype=t.dtype, device=t.device) for n, t in like.items()}
        with self.raising_together():
            for index, column in columns:
                for name, t in column.items():
                    block[name][index] = t
        if self.processes > 1:
            for t in block.values():
                distributed.all_reduce(t)
        return block

    def sum_sharded(self, like: Mapping[str, Tensor], parts: Iterable[Block]) -> Tensor:
        """This process's shard of `sum(like, parts)`, shape (Q, ⌈P/processes⌉) in float64."""
        columns = next(iter(like.values())).shape[0]
        size = sum(t[0].numel() for t in like.values())
        flat, total = _buffer(like)
        failure = self._accumulate(total, parts)
        failed = self.all_reduce(torch.tensor([float(failure is not None)], device=self.device))
        if failed[0]:
            self._raise(failure)
        if len(total) > 1:
            whole = torch.cat([t.reshape(columns, -1) for t in total.values()], 1)
        else:
            whole = flat.view(columns, -1)
        del flat, total
        if self.processes == 1:
            return whole
        length = self.shard_length(size)
        whole = torch.nn.functional.pad(whole, (0, length * self.processes - size))
        shards = whole.new_empty(columns, length)
        for q in range(columns):
            _reduce_scatter(shards[q], whole[q])
        return shards

    def _accumulate(self, total: Block, parts: Iterable[Block]) -> Exception | None:
        """Adds `parts` to `total` in place; returns the error that stopped it, which all processes must learn of."""
        try:
            for part in parts:
                for name, t in part.items():
                    total[name] += t
        except Exception as error:
            return error
        return None

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over the processes, on every process; `values` is not changed."""
        if self.processes > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def gather(self, items: list) -> list:
        """The lists of all processes, concatenated in the order of their ranks, on every process."""
        if self.processes == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def sample(self, stream: Stream, size: int, seed: int) -> list[dict]:
        """`stream.sample(size, seed)`, read by the main process and broadcast."""
        with self.raising_together():
            rows = stream.sample(size, seed) if self.is_main else None
        return self.broadcast_object(rows)

    def broadcast_tensor(self, t: Tensor) -> Tensor:
        """The main process's values of `t`, on every process; all pass a tensor of the same shape and dtype.

        `t` may be overwritten.
        """
        if self.processes > 1:
            t = t.contiguous()
            distributed.broadcast(t, src=0)
        return t

    def broadcast_object(self, value: Any) -> Any:
        """The main process's value, which must be picklable, on every process."""
        if self.processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """Inside, each process works on its own, without communication; an error in one is raised in all at the end.

        Raises:
            Exception: in a process that failed first, its own error; elsewhere an `InputError` or a `ProcessError`
                with the text of that error.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.processes == 1:
            if failure is not None:
                raise failure
        elif self.all_reduce(torch.tensor([float(failure is not None)], device=self.device))[0]:
            self._raise(failure)

    def _raise(self, failure: Exception | None) -> None:
        """Raises the failure of the lowest rank that failed: there the error itself, elsewhere one with its text."""
        failures = [] if failure is None else [(self.rank, type(failure).__name__, str(failure))]
        rank, kind, text = self.gather(failures)[0]
        if failure is not None and rank == self.rank:
            raise failure
        if kind == InputError.__name__:
            raise InputError(text)
        raise ProcessError(f"process {rank} of {self.processes} failed: {kind}: {text}")

    # --- shards of vectors

    def shard_length(self, size: int) -> int:
        """How many entries of a vector of `size` entries each process holds; the last shards are padded with zeros."""
        return -(-size // self.processes)

    def cut(self, vector: Tensor) -> Tensor:
        """This process's shard of a vector that is the same on every process: entries rank × ⌈P/processes⌉, ..."""
        length = self.shard_length(len(vector))
        shard = vector[self.rank * length : (self.rank + 1) * length]
        return torch.nn.functional.pad(shard, (0, length - len(shard))).clone()

    def join(self, shard: Tensor, size: int) -> Tensor:
        """The whole vector of `size` entries, on every process, from the shards that the processes hold."""
        if self.processes == 1:
            return shard
        whole = shard.new_empty(self.processes * len(shard))
        _all_gather(whole, shard.contiguous())
        return whole[:size]

    # --- progress

    def bar(self, iterable: Iterable | None = None, **settings: Any) -> tqdm:
        """`progress.bar`, shown on the main process if `progress` is set."""
        return progress.bar(iterable, shown=self.progress and self.is_main, **settings)

    @contextmanager
    def solver_bar(self, stage: str, solver: object) -> Iterator[Callable[[int, float], None]]:
        """A bar over the iterations of a solver; yields the callback `advance(iteration, residual)`.

        The callback also logs the residual as "<stage>/residual" to the trackers.
        """
        settings = {"desc": f"{stage}: inverse curvature", "total": getattr(solver, "max_iter", None)}
        with self.bar(**settings, unit=" iterations") as bar:

            def advance(iteration: int, residual: float) -> None:
                bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
                bar.update(iteration - bar.n)
                self.log({f"{stage}/residual": residual}, iteration)

            yield advance

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Logs values to the accelerator's trackers, if it has any (`Accelerator(log_with=...)`, `init_trackers`)."""
        if getattr(self.accelerator, "trackers", None):
            self.accelerator.log(dict(values), step=step)


def new_accelerator(**settings: Any) -> Accelerator:
    """An Accelerator whose processes wait for each other for up to two days.

    Accelerate's default is ten minutes, but the main process may take hours to read a corpus or to put parts together.
    The launcher still ends all processes at once when one of them dies.

    Args:
        settings: of `accelerate.Accelerator`.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))], **settings)


@contextmanager
def accelerate_undisturbed() -> Iterator[None]:
    """Keeps Accelerate's state, in which every `Accelerator` of the process finds its device, as it is.

    Inside, `TrainingArguments` may be made only to be read: they reset the state, and an `Accelerator` that was made
    before is of no use afterwards.
    """
    from accelerate.state import AcceleratorState, PartialState

    states = [(kind._shared_state, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState)]
    try:
        yield
    finally:
        for state, before in states:
            if before:
                state.clear()
                state.update(before)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors moved to a device; other values stay as they are."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _map_ahead(function: Callable, items: Iterable) -> Iterator:
    """`map`, but a thread computes the next value while the caller uses the last one."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(function, item) for item in islice(items, 1)]
        while pending:
            value = pending.pop().result()
            pending += [pool.submit(function, item) for item in islice(items, 1)]
            yield value


def _buffer(like: Mapping[str, Tensor], spare: int = 0) -> tuple[Tensor, Block]:
    """One tensor of float64 zeros for all tensors of a block and `spare` further entries at its end; its views as a
    block."""
    first = next(iter(like.values()))
    sizes = [t.numel() for t in like.values()]
    flat = torch.zeros(sum(sizes) + spare, dtype=torch.float64, device=first.device)
    pieces = flat[: len(flat) - spare].split(sizes)
    return flat, {name: piece.view(t.shape) for (name, t), piece in zip(like.items(), pieces, strict=True)}


def _reduce_scatter(shard: Tensor, whole: Tensor) -> None:
    # torch 2.13 renamed this function and the next, and warns about their older names
    (getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor)(shard, whole)


def _all_gather(whole: Tensor, shard: Tensor) -> None:
    (getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor)(whole, shard)
