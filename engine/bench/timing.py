"""Where benchmarks run and how they time: the one place that knows the kind of hardware.

`BenchDevice` is what a benchmark asks of hardware: run calls and say how long they took, read memory as fast as it
goes, and how large a set of weights must be so that no cache holds it. `interleaved` times competitors in turns: what
disturbs the machine hits all of them, and the ceiling with them.

A CPU is timed by the wall clock. On a GPU the calls of a turn are captured into a CUDA graph and timed by CUDA events,
so what is measured is the kernels and the gaps between them, as in the graphs that decoding runs in, and not Python.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.bench.quick_weights import QuickGpuOps
from engine.cli import say
from engine.errors import DeviceError
from engine.memory import available_memory
from engine.ops.backends import select_backend
from engine.ops.contract import Array, Ops
from engine.ops.gpu.cuda_device import CudaDevice
from engine.ops.gpu.launch import Launch

Call = Callable[[], object]
Turn = Callable[[], float]  # runs its calls; their seconds together
_CPU_DIR = Path("/sys/devices/system/cpu")
_UNKNOWN_CACHE = 64 << 20  # where the system does not tell: as much as a large desktop processor has
_LEAST_READ = 256 << 20  # bytes of a bandwidth reading: milliseconds, far above what starting it costs
_WARM_UP = 4  # calls before the rounds, which also tell how many make a turn
_ROUNDS = (3, 200)
_GPU_SETTLES = 0.3  # seconds of work until its clocks are up
_READ_THREADS = 512  # of a block of cuda/read_bandwidth.cu


class BenchDevice(Protocol):
    """One kind of hardware under measurement."""

    ops: Ops
    sample_seconds: float  # one competitor's turn: long beside what reading the clock costs
    rotation_bytes: int  # a set of weights used in turns is at least this large: each is cold when its turn comes
    notes: list[str]  # what a reader of the figures must know

    def array(self, host: Array) -> Array:
        """The array where operations take it."""

    def seconds(self, calls: Iterable[Call]) -> float:
        """How long the device takes for the calls, one after the other."""

    def turn(self, calls: Sequence[Call], count: int) -> Turn:
        """Something that runs and times `count` of these calls, taken in rotation, each time it is called."""

    def reader(self) -> tuple[Call, int]:
        """A call that reads memory as fast as it can be read, and the bytes one call reads."""

    def available_memory(self) -> int:
        """Bytes that can still be allocated."""


class CpuDevice:
    """The processor, by the wall clock."""

    sample_seconds = 0.004  # a hundred calls of 40 µs; a thousandth of it is the clock's

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.cache_bytes = last_level_cache(_usable_cpus(), _CPU_DIR)
        self.rotation_bytes = 2 * self.cache_bytes
        self.notes: list[str] = []

    def array(self, host: Array) -> Array:
        return host

    def seconds(self, calls: Iterable[Call]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start

    def turn(self, calls: Sequence[Call], count: int) -> Turn:
        """From where its last turn ended."""
        rotation = itertools.cycle(calls)
        return lambda: self.seconds(itertools.islice(rotation, count))

    def reader(self) -> tuple[Call, int]:
        """The backend's `all_finite`, its threads' plainest loop over memory, on a buffer that no cache holds."""
        buffer = np.ones(max(_LEAST_READ, 4 * self.cache_bytes) // 4, np.float32)
        return lambda: self.ops.all_finite(buffer), buffer.nbytes

    def available_memory(self) -> int:
        return available_memory()


class GpuDevice:
    """A GPU, by CUDA events; kernel launches as `BenchDevice.turn` has them."""

    sample_seconds = 0.0015  # starting a graph costs microseconds; capturing longer ones takes the host longer

    def __init__(self, device: CudaDevice, *, deterministic: bool = False) -> None:
        self.device = device
        self.gpu_ops = QuickGpuOps(device, deterministic=deterministic)
        self.ops: Ops = self.gpu_ops
        self.rotation_bytes = 2 * device.l2_bytes
        self.notes: list[str] = []

    def array(self, host: Array) -> Any:
        return self.device.upload(host)

    def seconds(self, calls: Iterable[Call]) -> float:
        """Python's part included where the GPU waits for it."""
        return self.device.seconds(lambda: _run(calls))

    def turn(self, calls: Sequence[Call], count: int) -> Turn:
        """The same calls each time: the turns of others, the reader's among them, push them out of the cache."""
        chosen = list(itertools.islice(itertools.cycle(calls), count))
        try:
            graph = self.device.capture(lambda: _run(chosen))
        except DeviceError as problem:
            self._note(f"timed with Python's launches, not in a CUDA graph: {problem}")
            return lambda: self.seconds(chosen)
        return lambda: self.device.seconds(graph.run)

    def reader(self) -> tuple[Call, int]:
        """cuda/read_bandwidth.cu on a buffer that no cache holds; warms the GPU up with it."""
        nbytes = 16 * self.device.l2_bytes
        buffer = self.device.zeros((nbytes,), np.dtype(np.uint8))
        out = self.device.zeros((1,), np.dtype(np.uint32))
        args = [buffer, np.int64(nbytes // 16), out]
        grid = (4 * self.device.sms, 1, 1)  # four blocks of 512 threads fill an SM
        launch = Launch("read_bandwidth.cu", "read_bandwidth", grid, (_READ_THREADS, 1, 1), 0, args)
        start = time.perf_counter()
        while time.perf_counter() - start < _GPU_SETTLES:
            self.device.launch(launch)
            self.device.synchronize()
        return lambda: self.device.launch(launch), nbytes

    def available_memory(self) -> int:
        return self.device.free_bytes()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            say(text)


def _run(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


def bench_device(device: str, threads: int | None, deterministic: bool = False) -> BenchDevice:
    """device: as for `select_backend`, which this raises as; "cuda" gets random weights alone (`quick_weights`)."""
    kind, _, loader = device.partition(":")
    if kind == "cuda":
        return GpuDevice(CudaDevice(loader or "nvrtc"), deterministic=deterministic)
    return CpuDevice(select_backend(device, threads, deterministic=deterministic))


def read_bandwidth(device: BenchDevice, reader: Call, read_bytes: int, readings: int = 9) -> float:
    """Bytes per second through the device's `reader`: the median of several readings."""
    reader()
    return read_bytes / float(np.median([device.seconds([reader]) for _ in range(readings)]))


def interleaved(device: BenchDevice, subjects: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each subject, one figure per round; in a round each has its turn.

    A subject's calls are taken in rotation (`BenchDevice.turn`). seconds: about how long it may all take.
    """
    single = {name: _single(device, calls) for name, calls in subjects.items()}
    counts = {name: max(1, round(device.sample_seconds / max(time, 1e-7))) for name, time in single.items()}
    turns = {name: device.turn(calls, counts[name]) for name, calls in subjects.items()}
    round_seconds = sum(counts[name] * single[name] for name in subjects)
    rounds = min(max(_ROUNDS[0], int(seconds / round_seconds)), _ROUNDS[1])
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, count in counts.items():
            found[name].append(turns[name]() / count)
    return found


def _single(device: BenchDevice, calls: Sequence[Call]) -> float:
    """About how long one of them takes."""
    count = min(_WARM_UP, len(calls))
    return device.turn(calls, count)() / count


def copies_for(nbytes: int, rotation_bytes: int) -> int:
    """How many weights of nbytes each it takes to fill a rotation: at least one, which then evicts itself."""
    return max(1, -(-rotation_bytes // nbytes))


def last_level_cache(cpus: Iterable[int], cpu_dir: Path) -> int:
    """Bytes of last-level cache that these CPUs reach together; a guess where the system does not tell."""
    found: dict[str, int] = {}  # CPUs that share one -> its size
    for cpu in cpus:
        levels = sorted((cpu_dir / f"cpu{cpu}" / "cache").glob("index*"), key=lambda index: int(_read(index / "level")))
        if levels:
            found[_read(levels[-1] / "shared_cpu_list")] = _size(_read(levels[-1] / "size"))
    return sum(found.values()) or _UNKNOWN_CACHE


def _usable_cpus() -> Iterable[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _size(text: str) -> int:
    """ "32768K" -> bytes."""
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    return int(text.rstrip("KMG") or 0) << unit


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "0"
