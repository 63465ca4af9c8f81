"""See the package: streams, events, graphs, memory, runtime, NVRTC and cuBLAS of the stand-in."""

from __future__ import annotations

import bisect
import ctypes
import gc
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument, KernelFault
from engine.ops.gpu.emulator import EmulatedModule

ARCH = os.environ.get("FAKE_GPU_ARCH", "sm_90a")
TOTAL = 8 << 30  # bytes that the device says it has
_COPY = {"memcpyHostToDevice": 1, "memcpyDeviceToHost": 2, "memcpyDeviceToDevice": 3}


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


_failed: list[str] = []  # what a kernel did wrong: calls after it say so, as on a GPU, which runs it at some later time


def check() -> None:
    """Every call of the runtime begins so. Raises for a kernel that failed before."""
    if _failed:
        raise CUDARuntimeError(f"cudaErrorIllegalAddress: an illegal memory access was encountered: {_failed[0]}")


def reset() -> None:
    """A new process's GPU."""
    _failed.clear()


# ---- memory ----------------------------------------------------------------------------------------------------------

_allocations: dict[int, NDArray[np.uint8]] = {}  # address -> memory
_addresses: list[int] = []  # sorted


def _free() -> int:
    return TOTAL - sum(memory.nbytes for memory in _allocations.values())


class MemoryPointer:
    ptr = 0

    def __init__(self, nbytes: int) -> None:
        check()
        if _free() < nbytes:
            gc.collect()  # as CuPy does
        if _free() < nbytes:
            raise OutOfMemoryError(f"{nbytes} bytes")
        raw = np.full(nbytes + 256, 0xFF, np.uint8)
        self.ptr = raw.ctypes.data + -raw.ctypes.data % 256
        self._raw = raw
        _allocations[self.ptr] = raw[self.ptr - raw.ctypes.data :][:nbytes]
        bisect.insort(_addresses, self.ptr)

    def __del__(self) -> None:
        if _allocations.pop(self.ptr, None) is not None:
            _addresses.remove(self.ptr)


class MemoryPool:
    def malloc(self, nbytes: int) -> MemoryPointer:
        return MemoryPointer(nbytes)

    def free_bytes(self) -> int:
        return 0


default_pool = MemoryPool()


def alloc(nbytes: int) -> MemoryPointer:
    return default_pool.malloc(nbytes)


class PinnedMemory:
    def __init__(self, nbytes: int) -> None:
        self._raw = np.empty(nbytes, np.uint8)
        self.ptr = self._raw.ctypes.data


def alloc_pinned_memory(nbytes: int) -> PinnedMemory:
    return PinnedMemory(nbytes)


def at(address: int) -> NDArray[np.uint8]:
    """Device memory from `address` to the end of its allocation. Raises where there is none."""
    i = bisect.bisect_right(_addresses, address) - 1
    if i < 0 or address > _addresses[i] + _allocations[_addresses[i]].nbytes:
        raise CUDARuntimeError(f"cudaErrorIllegalAddress: {address:#x}")
    return _allocations[_addresses[i]][address - _addresses[i] :]


# ---- streams, events, graphs -----------------------------------------------------------------------------------------

Work = Callable[[], object]


class Stream:
    _streams: dict[int, Stream] = {}

    def __init__(self, *, non_blocking: bool = False) -> None:
        self.ptr = len(Stream._streams) + 1
        self._captured: list[Work] | None = None
        Stream._streams[self.ptr] = self

    @classmethod
    def at(cls, address: int) -> Stream:
        return cls._streams[address]

    def do(self, work: Work) -> None:
        check()
        if self._captured is not None:
            self._captured.append(work)
            return
        try:
            work()
        except KernelFault as fault:
            _failed.append(str(fault))

    def __enter__(self) -> Stream:
        _current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.pop()

    def synchronize(self) -> None:
        check()
        if self._captured is not None:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing"
            )

    def is_capturing(self) -> bool:
        return self._captured is not None

    def begin_capture(self) -> None:
        self._captured = []

    def end_capture(self) -> Graph:
        assert self._captured is not None
        graph, self._captured = Graph(self._captured), None
        return graph


class Graph:
    def __init__(self, work: list[Work]) -> None:
        self._work = work

    def upload(self, stream: Stream) -> None:
        pass

    def launch(self, stream: Stream) -> None:
        for work in self._work:
            stream.do(work)


class Event:
    time = 0.0

    def record(self, stream: Stream) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        check()


_current = [Stream()]


def get_current_stream() -> Stream:
    return _current[-1]


def get_elapsed_time(start: Event, end: Event) -> float:
    return (end.time - start.time) * 1e3


# ---- runtime ---------------------------------------------------------------------------------------------------------


def _memcpy_async(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
    for address, side in ((target, kind in (1, 3)), (source, kind in (2, 3))):
        if side and at(address).nbytes < nbytes:
            raise CUDARuntimeError(f"cudaErrorInvalidValue: {nbytes} bytes at {address:#x}")
    Stream.at(stream).do(lambda: ctypes.memmove(target, source, nbytes))


def _memset_async(target: int, value: int, nbytes: int, stream: int) -> None:
    if at(target).nbytes < nbytes:
        raise CUDARuntimeError(f"cudaErrorInvalidValue: {nbytes} bytes at {target:#x}")
    Stream.at(stream).do(lambda: ctypes.memset(target, value, nbytes))


def _mem_get_info() -> tuple[int, int]:
    check()
    return _free(), TOTAL


_number = int("".join(c for c in ARCH if c.isdigit()))
runtime = SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    getDeviceCount=lambda: 1,
    getDeviceProperties=lambda index: {
        "name": b"Emulated GPU",
        "major": _number // 10,
        "minor": _number % 10,
        "multiProcessorCount": 2,
        "l2CacheSize": 4096,
        "totalGlobalMem": TOTAL,
    },
    memGetInfo=_mem_get_info,
    memcpyAsync=_memcpy_async,
    memsetAsync=_memset_async,
    driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 13000,
    **_COPY,
)
driver = SimpleNamespace(CUDADriverError=CUDADriverError)
memory = SimpleNamespace(OutOfMemoryError=OutOfMemoryError)


# ---- kernels ---------------------------------------------------------------------------------------------------------


_compile = EmulatedModule.compile  # now, before tests replace it


@cache
def emulated(source: str) -> EmulatedModule:
    own = Path(__file__).resolve().parents[2] / "kernels" / source  # a test's, not in cuda/
    return _compile(own if own.exists() else source, arch=ARCH)


def emulated_launch(
    source: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int, values: list[Any]
) -> None:
    module = emulated(source)
    parameters = module.kernels[name].parameters
    assert len(parameters) == len(values), f"{name} takes {len(parameters)} arguments, not {len(values)}"
    args: list[Any] = []
    for parameter, value in zip(parameters, values, strict=True):
        pointer = parameter.kind in "pc"
        assert value.dtype.itemsize == parameter.bytes, f"{name}: {value!r} for {parameter}"
        args.append((at(int(value)) if value else None) if pointer else value)
    try:
        module.launch(name, grid, block, shared, args)
    except InvalidArgument as problem:
        raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: {problem}") from problem


class _Nvrtc(SimpleNamespace):
    """ "Compiles" a source to its name."""

    ELF = b"\x7fELF".ljust(64, b"\0")  # a header, of nothing

    class NVRTCError(RuntimeError):
        pass

    def getVersion(self) -> tuple[int, int]:  # as CuPy spells it
        return (99, 0)  # no other's: what it "compiled" must not be found by a real one

    def createProgram(self, text: str, name: str, headers: tuple[()], includes: tuple[()]) -> str:
        return name

    def compileProgram(self, program: str, options: tuple[str, ...]) -> None:
        assert f"--gpu-architecture={ARCH}" in options

    def getCUBIN(self, program: str) -> bytes:
        return self.ELF + program.encode()

    def getProgramLog(self, program: str) -> str:
        return ""

    def destroyProgram(self, program: str) -> None:
        pass


nvrtc = _Nvrtc()


# ---- cuBLAS ----------------------------------------------------------------------------------------------------------


class _Cublas(SimpleNamespace):
    stream = 1

    def setStream(self, handle: int, stream: int) -> None:
        self.stream = stream

    def setPointerMode(self, handle: int, mode: int) -> None:
        assert mode == 0

    def gemmEx(
        self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int, lda: int,
        b: int, b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        """bf16 alone, A transposed: C [n, m] = B [n, k] · A [m, k]ᵀ, row by row."""
        assert (transa, transb, a_type, b_type, c_type) == (1, 0, 14, 14, 14) and (lda, ldb, ldc) == (k, k, m)
        assert ctypes.c_float.from_address(alpha).value == 1 and ctypes.c_float.from_address(beta).value == 0

        def work() -> None:
            left = at(b)[: 2 * n * k].view(ml_dtypes.bfloat16).reshape(n, k).astype(np.float32)
            right = at(a)[: 2 * m * k].view(ml_dtypes.bfloat16).reshape(m, k).astype(np.float32)
            at(c)[: 2 * m * n].view(ml_dtypes.bfloat16)[...] = (left @ right.T).reshape(-1)

        Stream.at(self.stream).do(work)


cublas = _Cublas()
device = SimpleNamespace(get_cublas_handle=lambda: 7)
