"""One kernel launch as plain data: what every device takes, and what the launch_* modules make.

How much shared memory a block may have is said here, once: plans ask `shared_limit`, devices refuse what goes beyond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from engine.errors import DeviceError

Dim3 = tuple[int, int, int]
# KiB of shared memory a block may ask for, its static arrays counted, by compute capability (CUDA C++ Programming
# Guide, table of technical specifications).
SHARED_LIMITS = {70: 96, 75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


# Files all of whose kernels wait for those before them (ptx::grid_dependency_wait in cuda/mma.cuh): the kernels of
# decode steps. These alone may be launched while the kernel before still runs (programmatic dependent launch). None
# reads what others write by ld.global.nc: that is for what does not change while a kernel runs.
WAITING = frozenset(
    f"{name}.cu"
    for name in (
        "attention_decode", "embed", "linear_bf16", "linear_fp8", "linear_hif4", "linear_mxfp4", "linear_mxfp4_sm120",
        "linear_nvfp4x16", "linear_nvfp4x16_sm120", "linear_nvfp4x32", "linear_nvfp4x32_sm120", "prepare_fp4",
        "prepare_fp8", "prepare_sharq", "rms_norm", "rope_and_cache", "sample", "silu_mul",
    )
)  # fmt: skip


class Launch(NamedTuple):
    source: str  # the file in cuda/
    kernel: str  # its entry point
    grid: Dim3  # blocks along x, y, z
    block: Dim3  # threads
    shared: int  # bytes of dynamic shared memory
    args: Sequence[Any]  # device arrays, None for a null pointer, NumPy scalars of the parameter's exact type


def shared_limit(arch: str) -> int:
    """Bytes of shared memory that a block may have on an architecture such as "sm_90a"."""
    return SHARED_LIMITS[int(arch.removeprefix("sm_").rstrip("af"))] << 10


def check_shared(launch: Launch, arch: str) -> None:
    """Raise DeviceError for a launch that no block has room for. Static arrays, which it does not see, are the driver's
    to refuse."""
    if launch.shared > shared_limit(arch):
        raise DeviceError(
            f"{launch.kernel} needs {launch.shared} bytes of shared memory; a block has {shared_limit(arch)} on {arch}"
        )
