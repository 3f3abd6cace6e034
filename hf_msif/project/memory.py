"""What a pull-back and a scoring hold in memory on each process, beside the model, and whether it is there."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .. import vectors
from ..curvature import Curvature
from ..errors import InputError
from ..influence.chain import Link

# What a product holds, in units of a float32 block: the whole vectors, their float64 sum (two), a batch's part of it.
PRODUCT_BLOCKS = 4


def solver_bytes(link: Link, solver: Any, columns: int, processes: int) -> int:
    """Of the solver's vectors on each process, in shards where the engine is sharded."""
    parameters = [link.model.parameters[name] for name in link.split.trained]
    vector = columns * sum(p.numel() * p.element_size() for p in parameters)
    shards = processes if link.engine.sharded and solver.shardable else 1
    held = -(-solver.vectors_held * vector // shards) + PRODUCT_BLOCKS * vector
    return held + solver.extra_bytes(sum(p.numel() for p in parameters))


def activation_bytes(operator: Curvature) -> int:
    """What autograd keeps for a product on that batch of this process that has most of it, measured."""
    if not operator.evaluations:
        return 0
    evaluation = max(operator.evaluations, key=lambda found: attended(found.batch))
    v = vectors.rademacher(operator.parameters, 1, seed=0)
    known = {p.untyped_storage()._cdata for p in operator.model.parameters.values()}
    kept = _Kept(known)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x.t if isinstance(x, _Held) else x)
    with operator.model.evaluating(), hooks:
        operator._product(evaluation, v)
    return kept.most


def attended(batch: dict[str, Any]) -> int:
    """Rows times length squared of the widest tensor of a batch, as attention has it."""
    shapes = [t.shape for t in batch.values() if isinstance(t, Tensor) and t.dim() > 1]
    return max((shape[0] * shape[1] ** 2 for shape in shapes), default=0)


class _Kept:
    """What autograd has saved, by storage: how much now, and the most it ever was. The known ones do not count."""

    def __init__(self, known: set[int]):
        self.known, self.holders = known, Counter()
        self.now = self.most = 0

    def pack(self, t: Tensor) -> Tensor | _Held:
        storage = t.untyped_storage()
        if t._is_zerotensor() or storage._cdata in self.known:  # a zero tensor has no memory
            return t
        return _Held(self, t, storage._cdata, storage.nbytes())

    def change(self, key: int, size: int, holders: int) -> None:
        before = self.holders[key]
        self.holders[key] += holders
        if not before or not self.holders[key]:
            self.now += holders * size
            self.most = max(self.most, self.now)


class _Held:
    """A saved tensor, for as long as the graph has it: freed storages' addresses are used again."""

    def __init__(self, kept: _Kept, t: Tensor, key: int, size: int):
        self.kept, self.t, self.key, self.size = kept, t, key, size
        kept.change(key, size, 1)

    def __del__(self):
        self.kept.change(self.key, self.size, -1)


def available_bytes(device: torch.device) -> int:
    """Memory that is free on the device for this process; on a CPU its share of what the machine has."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, to be used again
        return torch.cuda.mem_get_info(device)[0] + kept
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(links: list[Link], columns: int) -> None:
    """Refuses a query whose vectors and activations cannot fit, before it starts.

    Raises:
        InputError: the stage, what it needs and what is there.
    """
    for link in links:
        if link.recording is not None:
            continue
        operator = link.operator  # the processes make it together
        with link.engine.together():
            held = solver_bytes(link, link.stage.solver, columns, link.engine.processes)
            free = available_bytes(link.engine.device)
            # Measured only where the vectors leave room to do so.
            active = activation_bytes(operator) if held < free else 0
            if held + active > free:
                sharded = "" if link.engine.sharded else ", sharded: true on more processes"
                raise InputError(
                    f"stage {link.stage.name!r} needs about {size(held)} for the solver's vectors and {size(active)} "
                    f"for a batch's activations on each process, but {size(free)} are free: expected a smaller "
                    f"batch_size, fewer test examples at a time{sharded}, or memory_check: false to try all the same."
                )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""
