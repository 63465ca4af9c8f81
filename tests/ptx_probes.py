"""Compiled probes of mma.cuh (kernels/instructions.cu), once per process and architecture."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from engine.errors import DeviceError
from engine.ops.gpu.emulator import EmulatedModule

ROOT = Path(__file__).resolve().parent.parent
PROBES = ROOT / "tests" / "kernels" / "instructions.cu"


@functools.cache
def _compiled(source: Path, arch: str, checked: bool) -> EmulatedModule | str:
    try:
        return EmulatedModule.compile(source, arch=arch, checked=checked)
    except DeviceError as error:
        if "no C++ compiler" in str(error) or "no CUDA headers" in str(error):
            return str(error)
        raise


def probe(arch: str, source: Path = PROBES, checked: bool = False) -> EmulatedModule:
    """The module; skips the test where the machine cannot compile any."""
    module = _compiled(source, arch, checked)
    if isinstance(module, str):
        pytest.skip(module)
    return module
