"""One kernel launch as plain data: what every device takes, and what the launch_* modules make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

Dim3 = tuple[int, int, int]


class Launch(NamedTuple):
    source: str  # the file in cuda/
    kernel: str  # its entry point
    grid: Dim3  # blocks along x, y, z
    block: Dim3  # threads
    shared: int  # bytes of dynamic shared memory
    args: Sequence[Any]  # device arrays, None for a null pointer, NumPy scalars of the parameter's exact type
