"""Which backend serves a device: decided here, once, and told to the user through `Ops.kernel_path`.

Nothing falls back in silence: "cpu" without the compiled extension means the NumPy path and says so in `kernel_path`;
"cuda" without a usable GPU is an error.
"""

from __future__ import annotations

from engine.errors import InvalidArgument
from engine.ops.contract import Ops

DEVICES = ("auto", "cpu", "numpy", "cuda", "emulate")
_EMULATED = "sm_90"


def select_backend(device: str = "auto", threads: int | None = None, *, deterministic: bool = False) -> Ops:
    """The backend for `device`; threads concern the CPU, which also quantises for a GPU (None = physical cores this
    process may use).

    "auto" is the CPU, whose results are proven; "cuda" is asked for by name. "numpy" is the slow, exact definition of
    every operation. "cuda:extension" takes the kernels from `engine._cuda` instead of compiling them by NVRTC;
    "cuda:debug", "cuda:extension:debug" wait for each kernel, to name one that fails.
    "emulate" runs the CUDA kernels on the CPU as on sm_90, "emulate:sm_120a" as on another architecture: slower still,
    for tests. deterministic: on a GPU, long prompts in the order of sums that answers have, as on CPUs always. Raises
    InvalidArgument for an unknown device, DeviceError for one that cannot be used here.
    """
    kind, _, variant = device.partition(":")
    if kind not in DEVICES or (variant and kind not in ("cuda", "emulate")):
        raise InvalidArgument(
            f"unknown device {device!r}; choose one of {', '.join(DEVICES)}, or cuda:extension, emulate:sm_120a"
        )
    if threads is not None and threads < 1:
        raise InvalidArgument(f"threads must be at least 1, not {threads}")
    if kind == "cuda":
        from engine.ops.gpu.backend import GpuOps
        from engine.ops.gpu.cuda_device import CudaDevice

        debug = variant.rpartition(":")[2] == "debug"
        loader = variant.removesuffix("debug").removesuffix(":") if debug else variant
        cuda = CudaDevice(loader or "nvrtc", debug=debug)
        return GpuOps(cuda, deterministic=deterministic, record=not debug, host=_cpu(threads))
    if kind == "emulate":
        from engine.ops.gpu.backend import GpuOps
        from engine.ops.gpu.device import EmulatedDevice

        return GpuOps(EmulatedDevice(variant or _EMULATED), deterministic=deterministic)
    if kind == "numpy":
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
