"""What tests of memory share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def settle() -> None:
    """Have everything given back that nobody needs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@contextmanager
def beside_history() -> Iterator[None]:
    """Torch records history, so native may take the GIL at each request."""
    torch.cuda.memory._record_memory_history()
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
