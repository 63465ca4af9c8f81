"""Named scratch buffers of one model, grown to the largest step seen and reused by every later one.

Fresh arrays of several megabytes would be mapped, zeroed and unmapped by the system at every layer of every step. A
name stands for one role ("qkv", "norm"); taking it again ends the life of what was taken before. Not thread-safe: one
model runs one step at a time.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from engine.ops.contract import Array, Ops


class Workspace:
    """Scratch memory from one backend."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._buffers: dict[tuple[str, np.dtype[Any]], Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised [shape] array, valid until the same name is taken again."""
        size, key = prod(shape), (name, dtype)
        if key not in self._buffers or self._buffers[key].size < size:
            self._buffers.pop(key, None)  # first, as there may be no room for both
            self._buffers[key] = self._ops.empty((size,), dtype)
        return self._buffers[key][:size].reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())
