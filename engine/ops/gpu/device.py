"""What the GPU backend asks of a device: memory and launches. The emulator is here, a real one in `cuda_device`.

Arrays are the device's own: NumPy's under emulation, `GpuArray` on a GPU. The backend uses only what both have: shape,
dtype, strides, nbytes, slices of leading rows, reshape of contiguous ones, view as another dtype of the same size.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.memory import kv_cache_budget
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule, Schedule
from engine.ops.gpu.host_build import Architecture
from engine.ops.gpu.launch import Launch


class Device(Protocol):
    name: str  # for the user: "emulated sm_90", "NVIDIA H200"
    arch: str  # "sm_80" … "sm_90a", "sm_120a"

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Uninitialised memory. Raises CapacityError where there is not enough."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any: ...

    def upload(self, array: NDArray[Any]) -> Any:
        """A copy of a host array."""

    def download(self, array: Any) -> NDArray[Any]:
        """A copy on the host, once all launches before are done."""

    def launch(self, launch: Launch) -> None:
        """Put one kernel behind those launched before."""

    def kv_cache_budget(self) -> int:
        """Bytes that a KV cache may take now unless told otherwise."""


class EmulatedDevice:
    """Kernels on the CPU, compiled for `arch` as far as the preprocessor goes; arrays are NumPy's.

    checked: the build that reports data races and accesses out of bounds. Raises DeviceError where kernels cannot be
    compiled, KernelFault where one does wrong.
    """

    def __init__(self, arch: str = "sm_90", *, checked: bool = False, schedule: Schedule = SCHEDULES[0]) -> None:
        Architecture.parse(arch)  # refused now, not at the first launch
        self.arch = arch
        self.name = f"emulated {arch}"
        self._checked = checked
        self._schedule = schedule
        self._modules: dict[str, EmulatedModule] = {}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        raw = np.full(int(np.prod(shape)) * dtype.itemsize + 16, 0xFF, np.uint8)  # NaN, so that a gap shows
        start = -raw.ctypes.data % 16  # vectors of 16 bytes are aligned on a GPU
        return raw[start : start + raw.size - 16].view(dtype).reshape(shape)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        array = self.empty(shape, dtype)
        array.view(np.uint8)[...] = 0
        return array

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        return array.copy()

    def launch(self, launch: Launch) -> None:
        module = self._modules.get(launch.source)
        if module is None:
            module = EmulatedModule.compile(launch.source, arch=self.arch, checked=self._checked)
            self._modules[launch.source] = module
        module.launch(launch.kernel, launch.grid, launch.block, launch.shared, launch.args, schedule=self._schedule)

    def kv_cache_budget(self) -> int:
        return kv_cache_budget()
