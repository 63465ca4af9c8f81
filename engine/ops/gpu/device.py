"""What the GPU backend asks of a device: memory and launches. The emulator is here, a real one in `cuda_device`.

Arrays are the device's own: NumPy's under emulation, `GpuArray` on a GPU. The backend uses only what both have: shape,
dtype, strides, nbytes, slices of leading rows, reshape of contiguous ones, view as another dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import DeviceError
from engine.memory import kv_cache_budget
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule, Schedule
from engine.ops.gpu.host_build import Architecture
from engine.ops.gpu.launch import WAITING, Launch, check_shared

# Multiprocessors of the GPU that stands for an emulated architecture: of V100, T4, A100, A40, Orin, L40S, H200, B200,
# B300, RTX 5090 and GB10.
REPRESENTATIVE_SMS = {
    70: 80, 75: 40, 80: 108, 86: 84, 87: 16, 89: 142, 90: 132, 100: 148, 103: 160, 120: 170, 121: 48,
}  # fmt: skip


class Recording(Protocol):
    """Work that a device can do again. It keeps all memory that its kernels read and write."""

    def run(self) -> None:
        """Put all of it behind what was launched before."""


class Device(Protocol):
    name: str  # for the user: "emulated sm_90", "NVIDIA H200"
    arch: str  # "sm_80" … "sm_90a", "sm_120a"
    sms: int  # multiprocessors: what plans share work out among; never changes a result

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Uninitialised memory. Raises CapacityError where there is not enough."""

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any: ...

    def upload(self, array: NDArray[Any]) -> Any:
        """A copy of a host array."""

    def write(self, array: Any, host: NDArray[Any]) -> None:
        """Copy a host array over a device array of its shape and dtype, behind what was launched before.

        The host array is the caller's again at once.
        """

    def download(self, array: Any) -> NDArray[Any]:
        """A copy on the host, once all launches before are done."""

    def launch(self, launch: Launch) -> None:
        """Put one kernel behind those launched before. Raises DeviceError for what the device cannot run."""

    def capture(self, work: Callable[[], object]) -> Recording:
        """Record what `work` zeroes and launches. It is called twice: run once, then recorded, which runs nothing.

        work must not copy to or from the host when it is called again. Raises DeviceError.
        """

    def kv_cache_budget(self) -> int:
        """Bytes that a KV cache may take now unless told otherwise."""


class RehearsalDevice:
    """Takes memory as the device it stands for does, and computes nothing: what is launched, sent or read is not.

    passing: what was taken, kept from others until this is gone.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.name, self.arch, self.sms = device.name, device.arch, device.sms
        self.passing: list[Any] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        self.passing.append(self._device.empty(shape, dtype))
        return self.passing[-1]

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        self.passing.append(self._device.zeros(shape, dtype))
        return self.passing[-1]

    def upload(self, array: NDArray[Any]) -> Any:
        return self._device.upload(array)  # a table that later steps find as it is

    def write(self, array: Any, host: NDArray[Any]) -> None:
        pass

    def download(self, array: Any) -> NDArray[Any]:
        return np.zeros(array.shape, array.dtype)

    def launch(self, launch: Launch) -> None:
        pass

    def capture(self, work: Callable[[], object]) -> Recording:
        work()
        return EmulatedRecording([])

    def kv_cache_budget(self) -> int:
        return self._device.kv_cache_budget()


class EmulatedRecording:
    """What `EmulatedDevice.capture` saw, in order, on the same arrays each time."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        self._calls = calls

    def run(self) -> None:
        for call in self._calls:
            call()


class EmulatedDevice:
    """Kernels on the CPU, compiled for `arch` as far as the preprocessor goes; arrays are NumPy's.

    checked: the build that reports data races and accesses out of bounds. sms: None for those of the GPU that `arch`
    stands for. Raises DeviceError where kernels cannot be compiled, KernelFault where one does wrong.
    """

    def __init__(
        self, arch: str = "sm_90", *, checked: bool = False, schedule: Schedule = SCHEDULES[0], sms: int | None = None
    ) -> None:
        number = Architecture.parse(arch).number  # refused now, not at the first launch
        self.arch = arch
        self.sms = sms or REPRESENTATIVE_SMS[number]
        self.name = f"emulated {arch}"
        self._checked = checked
        self._schedule = schedule
        self._written: dict[int, weakref.ref[NDArray[Any]]] = {}  # allocations that a kernel has been given to write
        self._modules: dict[str, EmulatedModule] = {}
        self._captured: list[Callable[[], None]] | None = None  # while work is recorded

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        raw = np.full(int(np.prod(shape)) * dtype.itemsize + 16, 0xFF, np.uint8)  # NaN, so that a gap shows
        start = -raw.ctypes.data % 16  # vectors of 16 bytes are aligned on a GPU
        return raw[start : start + raw.size - 16].view(dtype).reshape(shape)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        array = self.empty(shape, dtype)
        self._do(lambda: array.view(np.uint8).fill(0))
        return array

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        copy = self.empty(array.shape, array.dtype)
        self.write(copy, array)
        return copy

    def write(self, array: NDArray[Any], host: NDArray[Any]) -> None:
        self._refuse_to_record()
        array[...] = host

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        self._refuse_to_record()
        return array.copy()

    def launch(self, launch: Launch) -> None:
        check_shared(launch, self.arch)
        module = self._modules.get(launch.source)
        if module is None:
            module = EmulatedModule.compile(launch.source, arch=self.arch, checked=self._checked)
            self._modules[launch.source] = module
        self._do(lambda: self._run(module, launch))

    def _run(self, module: EmulatedModule, launch: Launch) -> None:
        """Under the checker as the extension launches on a GPU: while kernels before may still run."""
        early = None
        if self._checked:
            self._note_written(module, launch)
            if launch.source in WAITING and module.arch.number >= 90:
                arrays = [value for value in launch.args if isinstance(value, np.ndarray)]
                early = [array for array in arrays if not self._is_written(array)]
        module.launch(*launch[1:], schedule=self._schedule, early=early)

    def _note_written(self, module: EmulatedModule, launch: Launch) -> None:
        kernel = module.kernels.get(launch.kernel)
        for parameter, value in zip(kernel.parameters if kernel else (), launch.args, strict=False):
            if parameter.kind == "p" and value is not None:
                allocation = _allocation(value)
                self._written[id(allocation)] = weakref.ref(allocation)

    def _is_written(self, array: NDArray[Any]) -> bool:
        allocation = _allocation(array)
        found = self._written.get(id(allocation))
        return found is not None and found() is allocation

    def capture(self, work: Callable[[], object]) -> EmulatedRecording:
        work()
        calls: list[Callable[[], None]] = []
        self._captured = calls
        try:
            work()
        finally:
            self._captured = None
        return EmulatedRecording(calls)

    def _do(self, call: Callable[[], None]) -> None:
        if self._captured is None:
            call()
        else:
            self._captured.append(call)

    def _refuse_to_record(self) -> None:
        if self._captured is not None:
            raise DeviceError("a copy to or from the host cannot be recorded")

    def kv_cache_budget(self) -> int:
        return kv_cache_budget()


def _allocation(array: NDArray[Any]) -> NDArray[Any]:
    """The array whose memory this one is a part of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
