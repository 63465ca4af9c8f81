"""A pytest plugin: tests written for the emulator launch their kernels on the GPU instead.

    python -m pytest -p gpu_for_emulator --kernel-loader nvrtc tests/test_cuda_rows.py …

`EmulatedModule.compile` then gives kernels of the GPU: a launch copies its arrays there and back. Schedules, poison and
checking builds are the emulator's; they launch the same kernel again. Tests of architectures that this GPU is not are
skipped, as is everything where there is no GPU, and property tests where Hypothesis is not installed.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from engine.errors import DeviceError
from engine.ops.gpu.cuda_device import CudaDevice, GpuArray
from engine.ops.gpu.emulator import EmulatedModule
from engine.ops.gpu.host_build import Architecture
from engine.ops.gpu.launch import Launch

_ALIGNMENT = 256  # of device memory; arrays keep their addresses' remainder, as alignment decides what kernels do


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel-loader", default="nvrtc", choices=("nvrtc", "extension"))


def _skipping(*_: Any, **__: Any) -> Any:
    return pytest.mark.skip(reason="Hypothesis is not installed")


class _Anything(ModuleType):
    """Hypothesis where it is not installed: its tests are skipped, other tests of the same file run."""

    def __getattr__(self, name: str) -> Any:
        return _skipping if name == "given" else self

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


def _without_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ImportError:
        sys.modules["hypothesis"] = sys.modules["hypothesis.strategies"] = _Anything("hypothesis")


def pytest_configure(config: pytest.Config) -> None:
    try:
        device = CudaDevice(config.getoption("--kernel-loader"), debug=True)
    except DeviceError as problem:
        pytest.exit(f"no GPU to test on: {problem}", returncode=5)

    def compile_for_gpu(source: str | Path, *, arch: str = "sm_90", **_: Any) -> GpuModule:
        return GpuModule(device, str(source), arch)

    _without_hypothesis()
    EmulatedModule.compile = compile_for_gpu  # type: ignore[method-assign,assignment]


class GpuModule:
    """What tests use of an `EmulatedModule`."""

    def __init__(self, device: CudaDevice, source: str, arch: str) -> None:
        self.arch = Architecture.parse(arch)
        self._device = device
        self._source = source
        self._missing = arch.endswith("a") and arch != device.arch

    def launch(self, name: str, grid: Any, block: Any, shared: int, args: Sequence[Any], **_: Any) -> None:
        if self._missing:
            pytest.skip(f"kernels of {self.arch} do not run on {self._device.arch}")
        if Path(self._source).name != self._source:
            pytest.skip("a kernel of the tests' own")
        regions = _regions([value for value in args if isinstance(value, np.ndarray)])
        held = [(begin, end, self._to_device(begin, end)) for begin, end in regions]

        def argument(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            address = value.ctypes.data
            begin, _, copy = next(h for h in held if h[0] <= address < max(h[1], h[0] + 1))
            return copy[address - begin :]

        self._device.launch(Launch(self._source, name, grid, block, shared, [argument(value) for value in args]))
        for begin, end, copy in held:
            if end > begin:
                host = self._device.download(copy)
                ctypes.memmove(begin, host.ctypes.data, end - begin)

    def _to_device(self, begin: int, end: int) -> GpuArray:
        byte = np.dtype(np.uint8)
        whole = self._device.empty((end - begin + 2 * _ALIGNMENT,), byte)
        shift = (begin - whole.address) % _ALIGNMENT
        copy = whole[shift : shift + end - begin]
        if end > begin:
            self._device.write(copy, np.frombuffer((ctypes.c_uint8 * (end - begin)).from_address(begin), byte))
        return copy


def _regions(arrays: Sequence[np.ndarray[Any, Any]]) -> list[tuple[int, int]]:
    """Memory from the first to the last byte of each, those that overlap joined."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(_extent(array) for array in arrays):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _extent(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    begin = array.ctypes.data
    if not array.size:
        return begin, begin
    strides = zip(array.shape, array.strides, strict=True)
    return begin, begin + sum((n - 1) * stride for n, stride in strides) + array.itemsize
