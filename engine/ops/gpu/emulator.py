"""Launches of CUDA kernels on the CPU: the emulator's Python side.

    module = EmulatedModule.compile("rms_norm.cu", arch="sm_90", checked=True)
    module.launch("rms_norm_bf16", grid=(T, 1, 1), block=(256, 1, 1), shared=0, args=[x, w, out, np.int32(T), …])

A kernel reads and writes the arrays' own memory. A checking build reports data races, uninitialised shared memory,
accesses out of bounds; every build reports divergent barriers and deadlocks (cuda/emulate/README.md: what emulation
shows and what it cannot). It does not model time, occupancy or memory banks, and it never uses a GPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument, KernelFault
from engine.ops.gpu import elf, sources
from engine.ops.gpu.host_build import Architecture, HostBuild

Array = NDArray[Any]
Argument = Array | np.generic | None
Dim3 = tuple[int, int, int]

MAX_THREADS = 1024
MAX_BLOCK: Dim3 = (1024, 1024, 64)
MAX_GRID: Dim3 = (2**31 - 1, 65535, 65535)
REPORT_BYTES = 8192
PLACE = re.compile(r"\{pc (0x[0-9a-f]+)\}")


class Order(IntEnum):
    """Which of the threads that could run goes first: warps, and lanes within a warp."""

    ASCENDING = 0
    DESCENDING = 1
    RANDOM = 2  # priorities drawn for each block and anew at each block barrier


@dataclass(frozen=True)
class Schedule:
    """One way of running a block's threads; a correct kernel gives the same result under all."""

    order: Order = Order.ASCENDING
    lazy_copies: bool = True  # asynchronous copies land when they are waited for; otherwise when they are issued
    seed: int = 0


# Enough for tests that want several: both orders, both ways of copying, some at random.
SCHEDULES = (
    Schedule(Order.ASCENDING, lazy_copies=True),
    Schedule(Order.DESCENDING, lazy_copies=False),
    Schedule(Order.RANDOM, lazy_copies=True, seed=1),
    Schedule(Order.RANDOM, lazy_copies=False, seed=2),
)


# The structures of cuda/emulate/launch.h.
class _ArgumentType(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_char), ("bytes", ctypes.c_uint32))


class _KernelEntry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("types", ctypes.POINTER(_ArgumentType)),
        ("arguments", ctypes.c_uint32),
        ("max_threads", ctypes.c_uint32),
    )


class _Module(ctypes.Structure):
    _fields_ = (
        ("kernels", ctypes.POINTER(_KernelEntry)),
        ("kernel_count", ctypes.c_uint32),
        ("arena_bytes", ctypes.c_uint32),
        ("arena", ctypes.c_void_p),
    )


class _Region(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("early", ctypes.c_uint32),
    )


class _SharedArray(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("offset", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class _Schedule(ctypes.Structure):
    _fields_ = (("order", ctypes.c_uint32), ("lazy_copies", ctypes.c_uint32), ("seed", ctypes.c_uint64))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("module", ctypes.POINTER(_Module)),
        ("kernel", ctypes.POINTER(_KernelEntry)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("poison", ctypes.c_uint32),
        ("schedule", _Schedule),
        ("time_limit", ctypes.c_double),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("regions", ctypes.POINTER(_Region)),
        ("arrays", ctypes.POINTER(_SharedArray)),
        ("region_count", ctypes.c_uint32),
        ("array_count", ctypes.c_uint32),
        ("report_bytes", ctypes.c_uint32),
        ("dependent", ctypes.c_uint32),
        ("report", ctypes.c_char_p),
    )


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel, as its compiled type has it."""

    kind: str  # p pointer, c pointer to const, i signed, u unsigned, f floating, s anything else
    bytes: int


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int  # of __launch_bounds__; 0 where there are none


class EmulatedModule:
    """The kernels of one .cu file, compiled for this CPU. Launches in one process run one after another."""

    def __init__(self, library: Path, arch: Architecture, checked: bool) -> None:
        """Loads a compiled library; `compile` makes it."""
        self.arch = arch
        self.checked = checked
        self._path = library
        self._library = ctypes.CDLL(str(library))
        self._run = self._library.emu_launch  # the runtime's, which the library needs and so loads
        self._run.argtypes = (ctypes.POINTER(_Launch),)
        self._module = _Module.in_dll(self._library, "emu_module")
        self._entries = {_text(entry.name): entry for entry in self._module.kernels[: self._module.kernel_count]}
        self.kernels = {name: _kernel(entry) for name, entry in self._entries.items()}
        arrays = [symbol for symbol in elf.tls_symbols(library) if symbol.defined and symbol.size]
        self._arrays = (_SharedArray * len(arrays))(*(_SharedArray(a.name.encode(), a.offset, a.size) for a in arrays))

    @classmethod
    def compile(
        cls, source: str | Path, *, arch: str = "sm_90", checked: bool = False, defines: Sequence[str] = ()
    ) -> EmulatedModule:
        """The kernels of `source`: a name in cuda/, or a path.

        arch: which GPU __CUDA_ARCH__ pretends ("sm_90", "sm_90a", "sm_120a", …). defines: macros, "NAME=value".
        Raises DeviceError where there is no compiler, no CUDA headers, or the compiler refuses (its log included).
        """
        path = Path(source)
        if path.name == str(source):
            path = sources.cuda_directory() / path
        build = HostBuild(path, Architecture.parse(arch), checked, tuple(defines))
        return cls(build.library(), build.arch, checked)

    def launch(
        self,
        name: str,
        grid: Dim3,
        block: Dim3,
        shared: int,
        args: Sequence[Argument],
        *,
        schedule: Schedule = SCHEDULES[0],
        poison: int = 0xFF,
        time_limit: float = 120.0,
        early: Sequence[Array] | None = None,
    ) -> None:
        """Runs kernel `name` to its end.

        grid, block: blocks and threads along x, y, z. shared: bytes of dynamic shared memory.
        args: NumPy arrays for pointers (C-contiguous, or rows of a wider array), None for a null pointer, NumPy scalars
        of the parameter's exact size for values.
        poison: the byte that fills shared memory before each block; 0xFF makes NaN of every float. time_limit: seconds.
        early: not None where the kernel is launched while those before it still run: those of args that none of them
        writes, which may be read before griddepcontrol.wait.
        Raises InvalidArgument for a launch that CUDA would refuse, KernelFault for one in which the kernel did wrong.
        """
        kernel = self.kernels.get(name)
        if kernel is None:
            raise InvalidArgument(f"no kernel {name!r}; there are {', '.join(sorted(self.kernels))}")
        self._check_shape(kernel, grid, block, shared)
        values = _Arguments(kernel, args, early or ())
        regions = values.regions()
        report = ctypes.create_string_buffer(REPORT_BYTES)
        launch = _Launch(
            module=ctypes.pointer(self._module),
            kernel=ctypes.pointer(self._entries[name]),
            grid=grid,
            block=block,
            shared_bytes=shared,
            poison=poison & 0xFF,
            schedule=_Schedule(schedule.order, schedule.lazy_copies, schedule.seed),
            time_limit=time_limit,
            arguments=values.pointers,
            regions=regions,
            arrays=self._arrays,
            region_count=len(regions),
            array_count=len(self._arrays),
            report_bytes=REPORT_BYTES,
            dependent=early is not None,
            report=ctypes.cast(report, ctypes.c_char_p),
        )
        if self._run(ctypes.byref(launch)):
            raise KernelFault(PLACE.sub(self._place, _text(report.value)))

    def _check_shape(self, kernel: Kernel, grid: Dim3, block: Dim3, shared: int) -> None:
        """What cuLaunchKernel would refuse."""
        for what, shape, limits in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
            if len(shape) != 3 or not all(1 <= n <= limit for n, limit in zip(shape, limits, strict=True)):
                raise InvalidArgument(f"{kernel.name}: {what} {tuple(shape)} is not within (1, 1, 1) … {limits}")
        threads = block[0] * block[1] * block[2]
        limit = kernel.max_threads or MAX_THREADS
        if threads > limit:
            raise InvalidArgument(f"{kernel.name}: {threads} threads in a block; it can have at most {limit}")
        if not 0 <= shared <= self.arch.shared_limit:
            raise InvalidArgument(
                f"{kernel.name}: {shared} bytes of dynamic shared memory; sm_{self.arch.number} has at most "
                f"{self.arch.shared_limit}"
            )

    def _place(self, match: re.Match[str]) -> str:
        """File and line of an address in the library, with the lines it was inlined into."""
        tool = shutil.which("addr2line")
        if tool is None:
            return f"code address {match[1]} of {self._path.name} (install binutils to see the line)"
        command = [tool, "-i", "-e", str(self._path), match[1]]
        lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
        places = [re.sub(r"^(\./)+| \(discriminator.*", "", line) for line in lines if line]
        places = [place for place in places if not place.startswith("emulate/")] or places
        return places[0] + "".join(f" (in {place})" for place in places[1:])


class _Arguments:
    """A launch's arguments as the kernel takes them: the addresses of values and of pointers."""

    def __init__(self, kernel: Kernel, args: Sequence[Argument], early: Sequence[Array]) -> None:
        if len(args) != len(kernel.parameters):
            raise InvalidArgument(f"{kernel.name} takes {len(kernel.parameters)} arguments, not {len(args)}")
        self._early = {id(array) for array in early}
        self._spans: list[tuple[int, int, str, bool, bool]] = []  # begin, end, name, writable, early
        self._values = [
            self._value(f"argument {i} of {kernel.name}", parameter, value)
            for i, (parameter, value) in enumerate(zip(kernel.parameters, args, strict=True))
        ]
        addresses = [ctypes.addressof(value) for value in self._values]
        self.pointers = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)

    def _value(self, what: str, parameter: Parameter, value: Argument) -> ctypes.Array[ctypes.c_char]:
        """The parameter's bytes."""
        if parameter.kind in "pc":
            data = np.uintp(0 if value is None else self._address(what, parameter, value)).tobytes()
        elif isinstance(value, np.generic):
            kinds = {"i": "iu", "u": "iub", "f": "f", "s": "V"}[parameter.kind]
            if value.dtype.itemsize != parameter.bytes or value.dtype.kind not in kinds:
                raise InvalidArgument(f"{what} has {parameter.bytes} bytes (kind {kinds}); {value.dtype} does not fit")
            data = value.tobytes()
        else:
            raise InvalidArgument(
                f"{what} is a value of {parameter.bytes} bytes: give a NumPy scalar, not {value!r:.80}"
            )
        return ctypes.create_string_buffer(data, len(data))

    def _address(self, what: str, parameter: Parameter, value: Argument) -> int:
        if not isinstance(value, np.ndarray):
            raise InvalidArgument(f"{what} is a pointer: give a NumPy array or None, not {value!r:.80}")
        writable = parameter.kind == "p"
        if writable and not value.flags.writeable:
            raise InvalidArgument(f"{what} is written by the kernel, but the array is read-only")
        strides = [stride for stride, n in zip(value.strides, value.shape, strict=True) if n > 1]
        if strides != sorted(strides, reverse=True) or (strides and strides[-1] != value.itemsize):
            raise InvalidArgument(f"{what}: an array of strides {value.strides} is neither contiguous nor rows")
        address = value.ctypes.data
        if value.size:
            extent = (
                sum((n - 1) * stride for n, stride in zip(value.shape, value.strides, strict=True)) + value.itemsize
            )
            name, early = what.split(" of ")[0], id(value) in self._early
            self._spans.append((address, address + extent, name, writable, early))
        return address

    def regions(self) -> ctypes.Array[_Region]:
        """The arrays' memory; arrays that overlap are one region."""
        merged: list[tuple[int, int, str, bool, bool]] = []
        for begin, end, name, writable, early in sorted(self._spans):
            if merged and begin < merged[-1][1]:
                first, last, names, written, constant = merged.pop()
                merged.append((first, max(last, end), f"{names}, {name}", written or writable, constant and early))
            else:
                merged.append((begin, end, name, writable, early))
        return (_Region * len(merged))(*(_Region(n.encode(), b, e - b, w, c) for b, e, n, w, c in merged))


def _text(data: bytes | None) -> str:
    return (data or b"").decode(errors="replace")


def _kernel(entry: _KernelEntry) -> Kernel:
    types = entry.types[: entry.arguments]
    parameters = tuple(Parameter(_text(t.kind), int(t.bytes)) for t in types)
    return Kernel(_text(entry.name), parameters, int(entry.max_threads))
