"""A stand-in for CuPy whose GPU is the emulator: what `engine` uses of CuPy, on the CPU, with the real calls' shapes.

Put tests/fake_gpu on PYTHONPATH and `device="cuda"` runs here: device memory is host memory at real addresses, NVRTC
"compiles" a source to its name, and launching such a module runs the kernel on the emulator. A graph is the list of
calls that its stream saw while capturing. With FAKE_GPU_EXTENSION=1 it stands in for engine._cuda, too. What the real
CuPy refuses, this refuses: work on the host's side of a capture, launches of no kernel, unknown arguments. Time is the
CPU's. It shows that the code around the kernels works; nothing about a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cupy import cuda
from cupy.cuda import MemoryPool, default_pool, emulated_launch
from engine.errors import DeviceError
from engine.ops.gpu.launch import WAITING

__version__ = "0.0+fake"


def get_default_memory_pool() -> MemoryPool:
    return default_pool


class ndarray:  # noqa: N801  # as CuPy spells it
    """A contiguous array in device memory."""

    def __init__(self, host: np.ndarray[Any, Any]) -> None:
        self.shape, self.dtype, self.nbytes = host.shape, host.dtype, host.nbytes
        self.memory = cuda.alloc(max(host.nbytes, 16))
        cuda.at(self.memory.ptr)[: self.nbytes] = np.ascontiguousarray(host).reshape(-1).view(np.uint8)


def asarray(host: np.ndarray[Any, Any]) -> ndarray:
    return ndarray(host)


def asnumpy(array: ndarray) -> np.ndarray[Any, Any]:
    return cuda.at(array.memory.ptr)[: array.nbytes].view(array.dtype).reshape(array.shape).copy()


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
        grid, block = ((*shape, 1, 1)[:3] for shape in (grid, block))
        values = [np.uint64(a.memory.ptr) if isinstance(a, ndarray) else np.asarray(a)[()] for a in args]
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


class _Extension(ModuleType):
    """engine._cuda, as far as it launches: the same calls, on the emulator."""

    class Kernels:
        def __init__(self, arch: str, device: int, debug: bool) -> None:
            assert (arch, device) == (cuda.ARCH, 0)

        def launch(self, launch: Any, stream: int, overlaps: bool = False) -> None:
            assert not overlaps or launch.source in WAITING, f"{launch.kernel} does not wait for the kernel before"
            values = [self._bits(value) for value in launch.args]
            if launch.kernel not in cuda.emulated(launch.source).kernels:
                raise DeviceError(f"finding {launch.kernel} of {launch.source}: CUDA_ERROR_NOT_FOUND")
            wanted = len(cuda.emulated(launch.source).kernels[launch.kernel].parameters)
            if len(values) != wanted:
                raise DeviceError(f"{launch.kernel} of {launch.source} takes {wanted} arguments, not {len(values)}")

            def work() -> None:
                cuda.emulated_launch(launch.source, launch.kernel, launch.grid, launch.block, launch.shared, values)

            try:
                cuda.Stream.at(stream).do(work)
            except cuda.CUDADriverError as problem:
                raise DeviceError(f"launching {launch.kernel} of {launch.source}: {problem}") from problem

        @staticmethod
        def _bits(value: Any) -> Any:
            if value is None:
                return np.uint64(0)
            return np.uint64(value.address) if hasattr(value, "address") else value

    class Recording:
        def __init__(self, kernels: Any, launches: list[Any], overlaps: list[bool]) -> None:
            assert len(overlaps) == len(launches)
            self._kernels, self._launches = kernels, list(zip(launches, overlaps, strict=True))

        def run(self, stream: int) -> None:
            for launch, overlaps in self._launches:
                self._kernels.launch(launch, stream, overlaps)


if os.environ.get("FAKE_GPU_EXTENSION") == "1":
    sys.modules["engine._cuda"] = _Extension("engine._cuda")
