"""Whether what a query will hold fits into the memory that is free."""

from __future__ import annotations

import os

import torch

from ..errors import InputError
from ..influence.chain import Chain
from ..influence.cost import size_text


def available_bytes(device: torch.device) -> int:
    """Bytes of memory that are free for this process: on its GPU, or its share of the free memory of the machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch uses it again
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check(chain: Chain, columns: int) -> None:
    """Refuses a query that cannot fit into memory, before it starts.

    Args:
        chain: the stages.
        columns: Q, the number of query columns.

    Raises:
        InputError: a stage does not fit; names the stage, what it needs and what is free.
    """
    engine = chain.engine
    for bound in chain.stages:
        bound.differentiation.prepare()  # by all processes together
        with engine.raising_together():
            free = available_bytes(engine.device)
            needed = bound.differentiation.memory(columns, free, engine.processes)
            if sum(needed.values()) > free:
                parts = " and ".join(f"{size_text(size)} for {name}" for name, size in needed.items())
                sharded = "" if engine.sharded else ", sharded: true on more processes"
                raise InputError(
                    f"stage {bound.name!r} needs about {parts} on each process, but {size_text(free)} are free: "
                    f"expected a smaller batch_size, fewer test examples at a time{sharded}, or memory_check: false "
                    "to try all the same."
                )
