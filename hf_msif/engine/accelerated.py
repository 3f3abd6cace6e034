"""The only room that knows Accelerate: exact shards of the data, one reduction a pass, progress bars.

Every pass over data goes through `Engine`. Rows are dealt out to the processes without padding or repetition (a
prepared data loader would repeat rows of an uneven last batch, and sums would be wrong), so that each has about as
much to do; their sums are added once at the end. What fails in one process ends all of them with its message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import count, islice
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from ..errors import InputError, ProcessError
from ..vectors import Block
from .batching import cost, deal


class Engine:
    """Runs passes over data on this process's shard.

    Args:
        accelerator: an `accelerate.Accelerator`; made when none is given.
        progress: show tqdm bars on the main process.
        sharded: each process holds only its shard of a solver's vectors, see `curvature.sharded`.
    """

    def __init__(self, accelerator=None, progress: bool = True, sharded: bool = False):
        self.accelerator = accelerator or new_accelerator()
        self.progress, self.sharded = progress, sharded
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

    # --- shards

    def share(self, rows: Sequence[dict], objective: Any, size: int) -> list[list[int]]:
        """This process's batches as row indices, the costliest first; see `dealing`."""
        return deal([cost(row, objective) for row in rows], size, self.processes)[self.rank]

    def batches(
        self, rows: Sequence[dict], objective: Any, batch_size: int, collate: Callable | None = None
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """This process's batches as (row indices, batch on the device); `collate` in the place of the objective's.

        While an accelerator computes, a thread makes the next one: tokenising would take as long as the derivatives.
        """
        mine, collate = self.share(rows, objective, batch_size), collate or objective.collate
        # On a CPU a thread would take from the cores that compute.
        each = map if self.device.type == "cpu" else _one_ahead
        made = each(lambda indices: collate([rows[i] for i in indices]), mine)
        for indices, batch in zip(mine, made, strict=True):
            yield indices, self.place(batch)

    def rounds(self, rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
        """Consecutive rows, `size` at a time, the same on every process.

        A stream is read by the main process alone, one round ahead, and broadcast: whatever order it comes in, all
        processes agree on it, and it is fetched once.
        """
        if isinstance(rows, Sequence):
            for start in range(0, len(rows), size):
                with self.together():
                    found = list(rows[start : start + size])
                yield found
            return
        stream = iter(rows) if self.is_main else iter(())
        ahead = _one_ahead(lambda _: list(islice(stream, size)), count())
        while True:
            with self.together():
                found = next(ahead)
            found = self.broadcast(found)
            if not found:
                return
            yield found

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with its tensors on the engine's device."""
        return placed(batch, self.device)

    # --- what the processes tell each other

    def sum(self, like: Mapping[str, Tensor], parts: Iterable[Block]) -> Block:
        """Σ parts over all batches of all processes; accumulated in float64, returned in the dtype of `like`."""
        flat, total = _buffer(like, spare=1)
        failure = self._accumulate(total, parts)
        if self.processes > 1:
            flat[-1] = float(failure is not None)
            distributed.all_reduce(flat)  # in place: a copy would be one more vector
            if flat[-1]:
                self._raise(failure)
        elif failure is not None:
            raise failure
        return {name: t.to(like[name].dtype) for name, t in total.items()}

    def sum_sharded(self, like: Mapping[str, Tensor], parts: Iterable[Block]) -> Tensor:
        """This process's shard of `sum(like, parts)`, shape (Q, ⌈P/processes⌉) in float64."""
        columns = next(iter(like.values())).shape[0]
        size = sum(t[0].numel() for t in like.values())
        flat, total = _buffer(like)
        failure = self._accumulate(total, parts)
        failed = self.add(torch.tensor([float(failure is not None)], device=self.device))
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
        try:
            for part in parts:
                for name, t in part.items():
                    total[name] += t
        except Exception as error:
            return error
        return None

    def add(self, values: Tensor) -> Tensor:
        """A small tensor, added up over the processes."""
        if self.processes > 1:
            values = values.clone()
            distributed.all_reduce(values)
        return values

    def gather(self, items: list) -> list:
        """The lists of all processes, one after another, on every process."""
        if self.processes == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def sample(self, stream: Any, size: int, seed: int) -> list[dict]:
        """`Stream.sample`, read by the main process for all of them."""
        with self.together():
            found = stream.sample(size, seed) if self.is_main else None
        return self.broadcast(found)

    def from_main(self, t: Tensor) -> Tensor:
        """The main process's values of a tensor of the same shape, on every process."""
        if self.processes > 1:
            t = t.contiguous()
            distributed.broadcast(t, src=0)
        return t

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of each process on its own, nothing that needs another one: what fails in one is raised in all."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        if self.processes == 1:
            if failure is not None:
                raise failure
        elif self.add(torch.tensor([float(failure is not None)], device=self.device))[0]:
            self._raise(failure)

    def _raise(self, failure: Exception | None) -> None:
        """Raises the first process's failure: there its own, elsewhere its message."""
        mine = [] if failure is None else [(self.rank, type(failure).__name__, str(failure))]
        rank, kind, text = self.gather(mine)[0]
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

    # --- what people see

    def bar(self, iterable: Iterable | None = None, **settings):
        """A tqdm bar on the main process."""
        from tqdm.auto import tqdm

        hidden = not (self.progress and self.is_main)
        return tqdm(iterable, disable=hidden, dynamic_ncols=True, leave=False, **settings)

    @contextmanager
    def solver_bar(self, stage: str, solver: Any) -> Iterator[Callable[[int, float], None]]:
        """A bar over the iterations of a solver; yields its `progress(iteration, residual)`."""
        settings = {"desc": f"{stage}: inverse curvature", "total": getattr(solver, "max_iter", None)}
        with self.bar(**settings, unit=" iterations") as bar:

            def progress(iteration: int, residual: float) -> None:
                bar.set_postfix(residual=f"{residual:.1e}", refresh=False)
                bar.update(iteration - bar.n)
                self.log({f"{stage}/residual": residual}, iteration)

            yield progress

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Values for the trackers, where the accelerator has some (`Accelerator(log_with=...)`, `init_trackers`)."""
        if getattr(self.accelerator, "trackers", None):
            self.accelerator.log(dict(values), step=step)


def new_accelerator(**settings):
    """An Accelerator whose processes wait for one another up to two days, since the main process may read a corpus or
    put parts together for hours (Accelerate's default ends them after ten minutes). The launcher still ends all
    processes at once when one of them dies."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))], **settings)


def placed(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _one_ahead(make: Callable, items: Iterable) -> Iterator:
    """`map`, but a thread makes the next one while the last one is used."""
    items = iter(items)
    with ThreadPoolExecutor(1) as maker:
        pending = [maker.submit(make, item) for item in islice(items, 1)]
        while pending:
            made = pending.pop().result()
            pending += [maker.submit(make, item) for item in islice(items, 1)]
            yield made


def _buffer(like: Mapping[str, Tensor], spare: int = 0) -> tuple[Tensor, Block]:
    """Zeros in float64 for all tensors of a block in one piece, `spare` entries more at its end, and the block of
    views of it."""
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
