"""Which backend serves a device: decided here, once, and told to the user through `Ops.kernel_path`.

Nothing falls back in silence: "cpu" without the compiled extension means the NumPy path and says so in `kernel_path`;
"cuda" without a usable GPU is an error.
"""

from __future__ import annotations

from engine.errors import DeviceError, InvalidArgument
from engine.ops.contract import Ops

DEVICES = ("auto", "cpu", "numpy", "cuda")


def select_backend(device: str = "auto", threads: int | None = None) -> Ops:
    """The backend for `device`; threads only concern the CPU (None = physical cores this process may use).

    "auto" is the fastest that is there: today the CPU. "numpy" is the slow, exact definition of every operation.
    Raises InvalidArgument for an unknown device, DeviceError for one that cannot be used here.
    """
    if device not in DEVICES:
        raise InvalidArgument(f"unknown device {device!r}; choose one of {', '.join(DEVICES)}")
    if threads is not None and threads < 1:
        raise InvalidArgument(f"threads must be at least 1, not {threads}")
    if device == "cuda":
        raise DeviceError("device 'cuda': this version has no CUDA backend; use device='cpu'")
    if device == "numpy":
        from engine.ops.reference import ReferenceOps

        return ReferenceOps()
    return _cpu(threads)


def _cpu(threads: int | None) -> Ops:
    try:
        from engine.ops.cpu import CpuOps
    except ImportError as error:
        from engine.ops.reference import ReferenceOps

        ops = ReferenceOps()
        ops.kernel_path = f"numpy, slow: the compiled extension is missing ({error})"
        return ops
    return CpuOps(threads=threads)
