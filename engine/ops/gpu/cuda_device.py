"""A CUDA device through CuPy: memory from its pool, kernels from cubins that NVRTC made for this very architecture.

CuPy's arrays are not used: `GpuArray` is a pointer with a shape, which holds bfloat16 whatever CuPy's version knows.
All work goes to one stream in order, so a download sees everything launched before it.
"""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError, DeviceError, InvalidArgument
from engine.ops.gpu.compile import cubin
from engine.ops.gpu.launch import Launch

_ARCHITECTURES = {
    (8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (12, 0): "sm_120a",
    (12, 1): "sm_121a",
}  # fmt: skip
_KV_SHARE = 0.9  # of what the weights left; the rest is scratch, and grows with the batch
_DEFAULT_SHARED = 48 << 10  # dynamic shared memory that a kernel may have without asking


class GpuArray:
    """A contiguous array in device memory, or leading rows of one. `memory` keeps it alive."""

    def __init__(self, memory: Any, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._memory = memory
        self.address = address
        self.shape = shape
        self.dtype = dtype

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes from one index to the next in each dimension."""
        return tuple(self.itemsize * prod(self.shape[i + 1 :]) for i in range(len(self.shape)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> GpuArray:
        """One row, or neighbouring rows."""
        row = self.itemsize * prod(self.shape[1:])
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise InvalidArgument("rows of a device array are taken one after the other")
            return GpuArray(
                self._memory, self.address + start * row, (max(0, stop - start), *self.shape[1:]), self.dtype
            )
        return GpuArray(self._memory, self.address + range(len(self))[index] * row, self.shape[1:], self.dtype)

    def reshape(self, *shape: Any) -> GpuArray:
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if prod(wanted) != self.size:
            raise InvalidArgument(f"{self.size} elements do not make the shape {wanted}")
        return GpuArray(self._memory, self.address, wanted, self.dtype)


class CudaDevice:
    """GPU number `index`. Raises DeviceError where CuPy, a driver, or a GPU the kernels exist for is missing."""

    def __init__(self, index: int = 0) -> None:
        self._cupy = _cupy()
        runtime = self._cupy.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as problem:
            raise DeviceError(f"device 'cuda': no GPU can be used here ({problem}); use device='cpu'") from problem
        if index >= count:
            raise DeviceError(f"there is no GPU number {index}; this machine has {count}")
        self._device = self._cupy.cuda.Device(index)
        self._device.use()
        properties = runtime.getDeviceProperties(index)
        capability = (int(properties["major"]), int(properties["minor"]))
        if capability not in _ARCHITECTURES:
            raise DeviceError(
                f"the kernels exist for compute capabilities {', '.join(f'{a}.{b}' for a, b in _ARCHITECTURES)}; this "
                f"GPU has {capability[0]}.{capability[1]}"
            )
        self.arch = _ARCHITECTURES[capability]
        self.name = f"{properties['name'].decode()}, {self.arch}, NVRTC"
        self._kernels: dict[tuple[str, str], Any] = {}
        self._modules: dict[str, Any] = {}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> GpuArray:
        nbytes = prod(shape) * dtype.itemsize
        try:
            memory = self._cupy.cuda.alloc(max(nbytes, 16))
        except self._cupy.cuda.memory.OutOfMemoryError as problem:
            raise CapacityError(
                f"the GPU has no {nbytes / 2**20:.0f} MiB left ({self.free_bytes() / 2**20:.0f} MiB are free); lower "
                "max_model_len, max_num_seqs or kv_cache_bytes, or choose a smaller quant"
            ) from problem
        return GpuArray(memory, memory.ptr, shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> GpuArray:
        array = self.empty(shape, dtype)
        self._cupy.cuda.runtime.memsetAsync(array.address, 0, array.nbytes, self._stream())
        return array

    def upload(self, array: NDArray[Any]) -> GpuArray:
        host = np.ascontiguousarray(array)
        copy = self.empty(host.shape, host.dtype)
        if host.nbytes:
            runtime = self._cupy.cuda.runtime
            runtime.memcpyAsync(copy.address, host.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, self._stream())
            runtime.streamSynchronize(self._stream())  # the host's memory is the caller's again
        return copy

    def download(self, array: GpuArray) -> NDArray[Any]:
        host = np.empty(array.shape, array.dtype)
        runtime = self._cupy.cuda.runtime
        if host.nbytes:
            runtime.memcpyAsync(
                host.ctypes.data, array.address, host.nbytes, runtime.memcpyDeviceToHost, self._stream()
            )
        runtime.streamSynchronize(self._stream())
        return host

    def launch(self, launch: Launch) -> None:
        kernel = self._kernel(launch)
        args = tuple(_argument(value) for value in launch.args)
        kernel(launch.grid, launch.block, args, shared_mem=launch.shared)

    def kv_cache_budget(self) -> int:
        return int(self.free_bytes() * _KV_SHARE)

    def free_bytes(self) -> int:
        """Memory that could be had now."""
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        return int(free) + int(self._cupy.get_default_memory_pool().free_bytes())

    def _kernel(self, launch: Launch) -> Any:
        key = (launch.source, launch.kernel)
        if key not in self._kernels:
            if launch.source not in self._modules:
                path = cubin(launch.source, self.arch)
                self._modules[launch.source] = self._cupy.RawModule(path=str(path))
            self._kernels[key] = self._modules[launch.source].get_function(launch.kernel)
        kernel = self._kernels[key]
        if launch.shared > max(_DEFAULT_SHARED, kernel.max_dynamic_shared_size_bytes):
            kernel.max_dynamic_shared_size_bytes = launch.shared
        return kernel

    def _stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)


def _argument(value: Any) -> Any:
    """Pointers as 64-bit numbers; values are NumPy scalars of their parameters' types already."""
    if value is None:
        return np.uint64(0)
    return np.uint64(value.address) if isinstance(value, GpuArray) else value


def _cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as problem:
        raise DeviceError(
            "device 'cuda' needs CuPy: pip install 'sharq-engine[cuda13]' (or cuda12, whichever fits the driver)"
        ) from problem
    return cast(ModuleType, cupy)
