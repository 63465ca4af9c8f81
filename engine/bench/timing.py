"""Where benchmarks run and how they time: the one place that knows the kind of hardware.

`BenchDevice` is what a benchmark asks of hardware: run calls and say how long they took, read memory as fast as it
goes, and how large a set of weights must be so that no cache holds it. `interleaved` times competitors in turns: what
disturbs the machine hits all of them, and the ceiling with them. Today there is the CPU.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.memory import available_memory
from engine.ops.backends import select_backend
from engine.ops.contract import Array, Ops

Call = Callable[[], object]
_CPU_DIR = Path("/sys/devices/system/cpu")
_UNKNOWN_CACHE = 64 << 20  # where the system does not tell: as much as a large desktop processor has
_LEAST_READ = 256 << 20  # bytes of a bandwidth reading: milliseconds, far above what starting it costs
_SAMPLE_SECONDS = 0.004  # one competitor's turn: a hundred calls of 40 µs; a thousandth of it is the clock's
_WARM_UP = 4  # calls before the rounds, which also tell how many make a turn
_ROUNDS = (3, 200)


class BenchDevice(Protocol):
    """One kind of hardware under measurement."""

    ops: Ops
    rotation_bytes: int  # a set of weights used in turns is at least this large: each is cold when its turn comes

    def array(self, host: Array) -> Array:
        """The array where operations take it."""

    def seconds(self, calls: Iterable[Call]) -> float:
        """How long the device takes for the calls, one after the other."""

    def reader(self) -> tuple[Call, int]:
        """A call that reads memory as fast as it can be read, and the bytes one call reads."""

    def available_memory(self) -> int:
        """Bytes that can still be allocated."""


class CpuDevice:
    """The processor, by the wall clock."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.cache_bytes = last_level_cache(_usable_cpus(), _CPU_DIR)
        self.rotation_bytes = 2 * self.cache_bytes

    def array(self, host: Array) -> Array:
        return host

    def seconds(self, calls: Iterable[Call]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return time.perf_counter() - start

    def reader(self) -> tuple[Call, int]:
        """The backend's `all_finite`, its threads' plainest loop over memory, on a buffer that no cache holds."""
        buffer = np.ones(max(_LEAST_READ, 4 * self.cache_bytes) // 4, np.float32)
        return lambda: self.ops.all_finite(buffer), buffer.nbytes

    def available_memory(self) -> int:
        return available_memory()


def bench_device(device: str, threads: int | None) -> BenchDevice:
    """Raises as `select_backend` does."""
    return CpuDevice(select_backend(device, threads))


def read_bandwidth(device: BenchDevice, reader: Call, read_bytes: int, readings: int = 9) -> float:
    """Bytes per second through the device's `reader`: the median of several readings."""
    reader()
    return read_bytes / float(np.median([device.seconds([reader]) for _ in range(readings)]))


def interleaved(device: BenchDevice, subjects: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each subject, one figure per round; in a round each has its turn.

    A subject's calls are taken in rotation, from where its last turn ended. seconds: about how long it may all take.
    """
    turns = {name: itertools.cycle(calls) for name, calls in subjects.items()}
    single = {name: device.seconds(calls[:_WARM_UP]) / len(calls[:_WARM_UP]) for name, calls in subjects.items()}
    counts = {name: max(1, round(_SAMPLE_SECONDS / max(time, 1e-7))) for name, time in single.items()}
    round_seconds = sum(counts[name] * single[name] for name in subjects)
    rounds = min(max(_ROUNDS[0], int(seconds / round_seconds)), _ROUNDS[1])
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, count in counts.items():
            found[name].append(device.seconds(itertools.islice(turns[name], count)) / count)
    return found


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
