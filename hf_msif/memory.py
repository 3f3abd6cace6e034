"""What a pull-back and a scoring hold in memory on each process, beside the model, and whether it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import vectors
from .autodiff import Evaluation
from .curvature import Curvature
from .errors import InputError
from .links import Link
from .solvers import Dense, Identity

# Vectors that a solver holds beside the right-hand side, in units of one.
SOLVER_BLOCKS = {"CG": 5, "SquaredCG": 6, "MinRes": 12, "Identity": 1, "Dense": 2}
# And a product, in the same units for float32: the vector whole, its float64 sum (two), a batch's part of it.
PRODUCT_BLOCKS = 4


def solver_bytes(link: Link, solver: Any, columns: int, processes: int) -> int:
    """Of the solver's vectors on each process, in slices where the engine is sharded."""
    parameters = [link.model.parameters[name] for name in link.split.trained]
    vector = columns * sum(p.numel() * p.element_size() for p in parameters)
    blocks = SOLVER_BLOCKS[type(solver).__name__]
    if isinstance(solver, Dense):
        return blocks * vector + 16 * sum(p.numel() for p in parameters) ** 2
    if link.engine.sharded and not isinstance(solver, Identity):
        return -(-blocks * vector // processes) + PRODUCT_BLOCKS * vector
    return (blocks + PRODUCT_BLOCKS) * vector


def activation_bytes(operator: Curvature) -> int:
    """What autograd keeps for a product on that batch of this process that has most of it, measured."""
    if not operator.evaluations:
        return 0
    evaluation = max(operator.evaluations, key=_attended)
    v = vectors.rademacher(operator.parameters, 1, seed=0)
    known = {p.untyped_storage()._cdata for p in operator.model.parameters.values()}
    with operator.model.evaluating(), _saved(known) as kept:
        operator._product(evaluation, v)
    return sum(kept.values())


def _attended(evaluation: Evaluation) -> int:
    """Rows times length squared of the widest tensor of a batch, as attention has it."""
    shapes = [t.shape for t in evaluation.batch.values() if isinstance(t, Tensor) and t.dim() > 1]
    return max((shape[0] * shape[1] ** 2 for shape in shapes), default=0)


@contextmanager
def _saved(known: set[int]) -> Iterator[dict[int, int]]:
    """Storages that autograd saves inside, address → bytes, other than the known ones."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if not t._is_zerotensor() and storage._cdata not in known:  # a zero tensor has no memory
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


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
