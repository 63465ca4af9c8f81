"""A stand-in for CuPy whose GPU is the emulator: what `engine` uses of CuPy, on the CPU, with the real calls' shapes.

Put tests/fake_gpu on PYTHONPATH and `device="cuda"` runs here: device memory is host memory at real addresses, NVRTC
"compiles" a source to its name, and launching such a module runs the kernel on the emulator. A graph is the list of
calls that its stream saw while capturing. What the real CuPy refuses, this refuses too: work on the host's side of a
capture, launches of no kernel, unknown arguments. Time is the CPU's. It shows that the code around the kernels works;
nothing about a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cupy import cuda
from cupy.cuda import MemoryPool, default_pool, emulated_launch

__version__ = "0.0+fake"


def get_default_memory_pool() -> MemoryPool:
    return default_pool


class RawKernel:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, source: str, name: str) -> None:
        self._source = source
        self._name = name

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise cuda.driver.CUDADriverError(f"{self._name}: {shared_mem} bytes of shared memory were not asked for")
        values = [np.asarray(value)[()] for value in args]
        cuda.get_current_stream().do(lambda: emulated_launch(self._source, self._name, grid, block, shared_mem, values))


class RawModule:
    def __init__(self, *, path: str) -> None:
        image = Path(path).read_bytes()
        self._source = image.removeprefix(cuda.nvrtc.ELF).decode()
        assert self._source.endswith(".cu"), path

    def get_function(self, name: str) -> RawKernel:
        if name not in cuda.emulated(self._source).kernels:
            raise cuda.driver.CUDADriverError(f"CUDA_ERROR_NOT_FOUND: {name} in {self._source}")
        return RawKernel(self._source, name)
