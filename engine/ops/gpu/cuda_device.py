"""A CUDA device through CuPy: memory from its pool, kernels from either loader (`engine.ops.gpu.kernel_loaders`).

CuPy's arrays are not used: `GpuArray` is a pointer with a shape, which holds bfloat16 whatever CuPy's version knows.
All work goes to one stream in order, so a download sees everything launched before it. Work that repeats can be
captured into a CUDA graph, which replays it without Python.

Which GPU: the first that CUDA_VISIBLE_DEVICES leaves.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engine.errors import CapacityError, DeviceError, InvalidArgument
from engine.ops.gpu.kernel_loaders import LOADERS, make_loader
from engine.ops.gpu.launch import Launch, check_shared

_ARCHITECTURES = {
    (8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_89", (9, 0): "sm_90a", (12, 0): "sm_120a",
    (12, 1): "sm_121a",
}  # fmt: skip
_STAGING = 4  # copies from the host that may be under way
# Kept from the KV cache for the driver: modules and graphs as they come, gaps between allocations.
_DRIVERS_SHARE, _DRIVERS_MOST = 0.1, 1 << 30


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

    def view(self, dtype: np.dtype[Any]) -> GpuArray:
        """The same bytes as another dtype; the last dimension grows or shrinks with its size."""
        dtype = np.dtype(dtype)
        last, rest = divmod(self.shape[-1] * self.itemsize, dtype.itemsize)
        if rest:
            raise InvalidArgument(f"rows of {self.shape[-1]} {self.dtype} are no whole number of {dtype}")
        return GpuArray(self._memory, self.address, (*self.shape[:-1], last), dtype)


class CudaGraph:
    """Work captured by `CudaDevice.capture`; `run` puts all of it into the device's stream at once.

    It keeps all memory that its kernels read and write.
    """

    def __init__(self, device: CudaDevice, graph: Any, launches: Sequence[Launch]) -> None:
        self._device = device
        self._graph = graph
        self._launches = launches

    def run(self) -> None:
        """Raises DeviceError; with debug it says whose kernels failed."""
        self._device.start(self._graph, self._launches)


class CudaDevice:
    """The GPU, with kernels from `loader`. debug: wait after each launch, so that a failure names its kernel; without,
    CUDA tells of it at some later call.

    sms: its multiprocessors; l2_bytes: its last-level cache; memory_bytes: all it has. Raises DeviceError where CuPy, a
    driver, the loader, or a GPU the kernels exist for is missing; InvalidArgument for an unknown loader.
    """

    def __init__(self, loader: str = "nvrtc", *, debug: bool = False) -> None:
        if loader not in LOADERS:
            raise InvalidArgument(f"unknown kernel loader {loader!r}; choose one of {', '.join(LOADERS)}")
        gc.collect()  # a model that was given up may lie in cycles, with its memory
        self._cupy = _cupy()
        runtime = self._cupy.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as problem:
            raise DeviceError(f"device 'cuda': no GPU can be used here ({problem}); use device='cpu'") from problem
        if count < 1:
            raise DeviceError("device 'cuda': this machine has no GPU, or CUDA_VISIBLE_DEVICES hides it")
        properties = runtime.getDeviceProperties(0)
        capability = (int(properties["major"]), int(properties["minor"]))
        if capability not in _ARCHITECTURES:
            raise DeviceError(
                f"the kernels exist for compute capabilities {', '.join(f'{a}.{b}' for a, b in _ARCHITECTURES)}; this "
                f"GPU has {capability[0]}.{capability[1]}"
            )
        self.arch = _ARCHITECTURES[capability]
        self.debug = debug
        self.sms = int(properties["multiProcessorCount"])
        self.l2_bytes = int(properties["l2CacheSize"])
        self.memory_bytes = int(properties["totalGlobalMem"])
        self._loader = make_loader(loader, self._cupy, self.arch, debug=debug)
        self.name = f"{properties['name'].decode()}, {self.arch}, {self._loader.name}{', debug' if debug else ''}"
        self.stream = self._cupy.cuda.Stream(non_blocking=True)
        self._captured: list[Launch] | None = None  # while a graph is captured
        self._behind_kernel = False  # whether the stream's last work is a kernel
        self._staging: list[tuple[int, Any, Any] | None] = [None] * _STAGING  # bytes, pinned memory, event
        self._next = 0

    # ---- memory ------------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> GpuArray:
        nbytes = prod(shape) * dtype.itemsize
        try:
            with self.told("taking memory"):
                memory = self._cupy.cuda.alloc(max(nbytes, 16))
        except self._cupy.cuda.memory.OutOfMemoryError as problem:
            raise CapacityError(
                f"the GPU has no {nbytes / 2**20:.0f} MiB left ({self.free_bytes() / 2**20:.0f} MiB are free)"
            ) from problem
        return GpuArray(memory, int(memory.ptr), shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> GpuArray:
        array = self.empty(shape, dtype)
        if array.nbytes:
            self._behind_kernel = False
            with self.told("zeroing memory"):
                self._cupy.cuda.runtime.memsetAsync(array.address, 0, array.nbytes, self.stream.ptr)
        return array

    def upload(self, array: NDArray[Any]) -> GpuArray:
        host = np.ascontiguousarray(array).reshape(array.shape)
        copy = self.empty(host.shape, host.dtype)
        if host.nbytes:
            self._copy(copy.address, host.ctypes.data, host.nbytes, "memcpyHostToDevice")
            self.synchronize()  # the host's memory is the caller's again
        return copy

    def write(self, array: GpuArray, host: NDArray[Any]) -> None:
        """Copies a host array over a device array of its shape and dtype, behind what was launched before.

        It goes through pinned memory, so that neither the host waits nor its array is needed afterwards.
        """
        if (array.shape, array.dtype) != (host.shape, host.dtype):
            raise InvalidArgument(f"{host.dtype} {host.shape} cannot be written over {array.dtype} {array.shape}")
        if not host.nbytes:
            return
        source = np.ascontiguousarray(host)
        with self.told("copying to the GPU"):
            pinned, copied = self._pinned(source.nbytes)
            ctypes.memmove(pinned.ptr, source.ctypes.data, source.nbytes)
            self._copy(array.address, pinned.ptr, source.nbytes, "memcpyHostToDevice")
            copied.record(self.stream)

    def _pinned(self, nbytes: int) -> tuple[Any, Any]:
        """Pinned memory whose last use is over, and the event to record behind the next: they take turns."""
        self._next = (self._next + 1) % len(self._staging)
        held = self._staging[self._next]
        if held is not None:
            held[2].synchronize()
        if held is None or held[0] < nbytes:
            held = (nbytes, self._cupy.cuda.alloc_pinned_memory(nbytes), self._cupy.cuda.Event())
            self._staging[self._next] = held
        return held[1], held[2]

    def download(self, array: GpuArray) -> NDArray[Any]:
        host = np.empty(array.shape, array.dtype)
        if host.nbytes:
            self._copy(host.ctypes.data, array.address, host.nbytes, "memcpyDeviceToHost")
        self.synchronize()
        return host

    def repeat_rows(self, array: NDArray[Any], rows: int) -> GpuArray:
        """Uploads `array`, its rows over and over until there are so many: random weights of any size, quickly."""
        if not len(array):
            raise InvalidArgument("an array without rows cannot be repeated")
        whole = self.empty((rows, *array.shape[1:]), array.dtype)
        first = self.upload(array[:rows])
        done = 0
        while done < whole.nbytes:
            size = min(max(first.nbytes, done), whole.nbytes - done)
            source = whole.address if done else first.address
            self._copy(whole.address + done, source, size, "memcpyDeviceToDevice")
            done += size
        self.synchronize()
        return whole

    def kv_cache_budget(self) -> int:
        free = self.free_bytes()
        return free - min(int(free * _DRIVERS_SHARE), _DRIVERS_MOST)

    def free_bytes(self) -> int:
        """Memory that could be had now."""
        with self.told("asking for free memory"):
            free, _ = self._cupy.cuda.runtime.memGetInfo()
        return int(free) + int(self._cupy.get_default_memory_pool().free_bytes())

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        if self._captured is not None:
            raise DeviceError("a copy to or from the host cannot be part of a CUDA graph")
        runtime = self._cupy.cuda.runtime
        self._behind_kernel = False
        with self.told("copying"):
            runtime.memcpyAsync(target, source, nbytes, getattr(runtime, kind), self.stream.ptr)

    # ---- work --------------------------------------------------------------------------------------------------------

    def launch(self, launch: Launch) -> None:
        check_shared(launch, self.arch)
        if self._captured is not None:
            self._captured.append(launch)
        self._loader.launch(launch, self.stream, behind_kernel=self._behind_kernel)
        self._behind_kernel = True

    def record(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """A call that runs all of these in order: from C++ at once, with the extension."""
        for launch in launches:
            check_shared(launch, self.arch)
        return self._loader.record(launches, self.stream)

    def start(self, graph: Any, launches: Sequence[Launch]) -> None:
        """Put a graph of these launches behind what was launched before."""
        self._behind_kernel = False
        with self.told("starting a graph"):
            graph.launch(self.stream)
        if self.debug:
            with self.told(f"a graph of {', '.join(dict.fromkeys(launch.kernel for launch in launches))}"):
                self.stream.synchronize()

    def synchronize(self) -> None:
        """Wait for everything launched so far. Raises DeviceError where some of it failed."""
        with self.told("waiting for the GPU"):
            self.stream.synchronize()

    @contextmanager
    def told(self, doing: str) -> Iterator[None]:
        """What CUDA reports of a call, as DeviceError: its own failure, or that of anything launched before."""
        try:
            yield
        except self._cupy.cuda.runtime.CUDARuntimeError as problem:
            which = "" if self.debug else "; device='cuda:debug' names it"
            raise DeviceError(
                f"{doing}: {problem}. Where that is an illegal access or a failed launch, a kernel did it{which}, and "
                "this process has lost its GPU: start anew"
            ) from problem

    def capture(self, work: Callable[[], object]) -> CudaGraph:
        """What `work` launches, as a graph. It runs once before, so that all its kernels are loaded.

        work may allocate, and must not copy to or from the host. Raises DeviceError.
        """
        work()
        self.synchronize()
        launches: list[Launch] = []
        with self.told("capturing a CUDA graph"):
            self._captured, self._behind_kernel = launches, False
            self.stream.begin_capture()
            try:
                work()
            except BaseException:
                self._abandon_capture()
                raise
            finally:
                self._captured, self._behind_kernel = None, False
            return CudaGraph(self, self.stream.end_capture(), launches)

    def _abandon_capture(self) -> None:
        """End it, so that the stream can be used again; what is wrong with it is on its way already."""
        with suppress(self._cupy.cuda.runtime.CUDARuntimeError):
            self.stream.end_capture()

    def seconds(self, work: Callable[[], object]) -> float:
        """How long the GPU takes for what `work` launches, by CUDA events."""
        events = [self._cupy.cuda.Event() for _ in range(2)]
        events[0].record(self.stream)
        self._behind_kernel = False
        work()
        events[1].record(self.stream)
        self._behind_kernel = False
        self.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(*events)) / 1e3

    def versions(self) -> dict[str, str]:
        """Of the driver's CUDA, the runtime, CuPy."""
        runtime = self._cupy.cuda.runtime
        return {
            "driver_cuda": _dotted(runtime.driverGetVersion()),
            "cuda_runtime": _dotted(runtime.runtimeGetVersion()),
            "cupy": self._cupy.__version__,
        }


def _dotted(version: int) -> str:
    """13020 -> "13.2"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _cupy() -> ModuleType:
    try:
        import cupy
    except ImportError as problem:
        raise DeviceError(
            "device 'cuda' needs CuPy: pip install 'sharq-engine[cuda13]' (or cuda12, whichever fits the driver)"
        ) from problem
    return cast(ModuleType, cupy)
