"""Programmatic dependent launch under the emulator's checker: what kernels do before griddepcontrol.wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import DeviceError, KernelFault
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule, Schedule

SOURCE = Path(__file__).resolve().parent / "emulator_kernels" / "dependent.cu"
F32 = np.dtype(np.float32)

try:
    MODULE = EmulatedModule.compile(SOURCE, checked=True)
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

CONSTANT, MADE = np.arange(64, dtype=np.float32), np.arange(64, dtype=np.float32) * 3


def launch(kernel: str, early: list[Any] | None, schedule: Schedule = SCHEDULES[0]) -> Any:
    out = np.zeros(64, np.float32)
    MODULE.launch(kernel, (2, 1, 1), (32, 1, 1), 128, [CONSTANT, MADE, out], schedule=schedule, early=early)
    return out


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_what_is_allowed(schedule: Schedule) -> None:
    np.testing.assert_array_equal(launch("waits_first", [], schedule), CONSTANT + MADE)
    np.testing.assert_array_equal(launch("reads_constants_early", [CONSTANT], schedule), 2 * CONSTANT + MADE)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "early", "report"),
    [
        ("reads_constants_early", [], r"too early: read .* argument 0"),
        ("reads_early", [CONSTANT], r"too early: read of 4 bytes at dependent.cu:\d+: argument 1"),
        ("copies_early", [CONSTANT], r"too early: read .* argument 1"),
        ("stores_early", [CONSTANT], r"too early: write .* argument 2.* may still use it"),
        ("adds_early", [CONSTANT], r"too early: atomic .* argument 2"),
        ("leaves_early", [CONSTANT], r"thread .* ends without griddepcontrol.wait"),
        ("never_waits", [CONSTANT, MADE], r"too early: write|ends without"),
    ],
)
def test_what_is_not(kernel: str, early: list[Any], report: str, schedule: Schedule) -> None:
    with pytest.raises(KernelFault, match=report):
        launch(kernel, early, schedule)


def test_an_ordinary_launch_may_do_all_of_it() -> None:
    for kernel in MODULE.kernels:
        launch(kernel, None)
