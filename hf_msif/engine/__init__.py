"""Rows → batches → processes → disk: the only wing that knows Accelerate."""

from .accelerated import Engine, new_accelerator

__all__ = ["Engine", "new_accelerator"]
