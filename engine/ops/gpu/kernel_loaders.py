"""The two ways kernels get onto a GPU, behind one interface: compiled here by NVRTC, or ahead of time by nvcc.

`NvrtcKernels` compiles a file of cuda/ when its first kernel is launched (`engine.ops.gpu.compile`, cached on disk) and
launches through CuPy. `ExtensionKernels` takes the same kernels from `engine._cuda`, which is there where the package
was built with ENGINE_BUILD_CUDA=1, and launches from C++; a recorded step is one call. Which of them runs is chosen by
name and told in `CudaDevice.name`; neither stands in for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from engine.errors import DeviceError
from engine.ops.gpu.compile import cubin
from engine.ops.gpu.host_build import Architecture
from engine.ops.gpu.launch import WAITING, Launch

LOADERS = ("nvrtc", "extension")
_DEFAULT_SHARED = 48 << 10  # dynamic shared memory that a kernel may have without asking


class KernelLoader(Protocol):
    name: str  # for the user

    def launch(self, launch: Launch, stream: Any, *, behind_kernel: bool = False) -> None:
        """Put one kernel behind those in the stream (a cupy.cuda.Stream). Raises DeviceError.

        behind_kernel: whether what was put there last is a kernel, which then may still run when this one starts, if
        the loader can do that and this one waits for it (`launch.WAITING`).
        """

    def record(self, launches: Sequence[Launch], stream: Any) -> Callable[[], None]:
        """A call that puts all of these into the stream, made ready now. It keeps their arrays alive."""


class NvrtcKernels:
    """Kernels from cubins that NVRTC made for `arch`. debug: wait for each, so that a failure names its kernel.

    CuPy's launches cannot overlap: kernels that wait for the one before do so in vain, which costs nothing.
    """

    name = "NVRTC"

    def __init__(self, cupy: ModuleType, arch: str, *, debug: bool = False) -> None:
        self._cupy = cupy
        self._arch = arch
        self._debug = debug
        self._modules: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Any] = {}
        self._shared: dict[tuple[str, str], int] = {}  # bytes of dynamic shared memory that a kernel was allowed

    def launch(self, launch: Launch, stream: Any, *, behind_kernel: bool = False) -> None:
        args = tuple(_argument(value) for value in launch.args)
        try:
            kernel = self._kernel(launch)
            with stream:
                kernel(launch.grid, launch.block, args, shared_mem=launch.shared)
            if self._debug and not stream.is_capturing():
                stream.synchronize()
        except (self._cupy.cuda.driver.CUDADriverError, self._cupy.cuda.runtime.CUDARuntimeError) as problem:
            before = "" if self._debug else " (or of a kernel launched before; device='cuda:debug' says)"
            raise DeviceError(f"running {launch.kernel} of {launch.source}: {problem}{before}") from problem

    def record(self, launches: Sequence[Launch], stream: Any) -> Callable[[], None]:
        held = list(launches)

        def run() -> None:
            for launch in held:
                self.launch(launch, stream)

        return run

    def _kernel(self, launch: Launch) -> Any:
        key = (launch.source, launch.kernel)
        if key not in self._kernels:
            if launch.source not in self._modules:
                path = cubin(launch.source, self._arch)
                self._modules[launch.source] = self._cupy.RawModule(path=str(path))
            self._kernels[key] = self._modules[launch.source].get_function(launch.kernel)
        kernel = self._kernels[key]
        if launch.shared > self._shared.get(key, _DEFAULT_SHARED):
            kernel.max_dynamic_shared_size_bytes = launch.shared
            self._shared[key] = launch.shared
        return kernel


class ExtensionKernels:
    """Kernels that `engine._cuda` carries. debug: as for `NvrtcKernels`. Raises DeviceError where it is not built.

    From sm_90 on, a kernel that waits for the one before it is launched while that runs; not with debug.
    """

    def __init__(self, arch: str, *, debug: bool = False) -> None:
        self._extension = extension()
        self._kernels = self._extension.Kernels(arch, 0, debug)
        self._overlaps = not debug and Architecture.parse(arch).number >= 90
        self.name = "extension, overlapping kernels" if self._overlaps else "extension"

    def launch(self, launch: Launch, stream: Any, *, behind_kernel: bool = False) -> None:
        self._kernels.launch(launch, stream.ptr, behind_kernel and self._overlapping(launch))

    def _overlapping(self, launch: Launch) -> bool:
        return self._overlaps and launch.source in WAITING

    def record(self, launches: Sequence[Launch], stream: Any) -> Callable[[], None]:
        overlapping = [i > 0 and self._overlapping(launch) for i, launch in enumerate(launches)]
        recording = self._extension.Recording(self._kernels, list(launches), overlapping)
        return lambda: recording.run(stream.ptr)


def make_loader(name: str, cupy: ModuleType, arch: str, *, debug: bool = False) -> KernelLoader:
    """name: one of LOADERS. Raises DeviceError where that loader cannot work."""
    if name == "nvrtc":
        return NvrtcKernels(cupy, arch, debug=debug)
    return ExtensionKernels(arch, debug=debug)


def extension() -> ModuleType:
    """`engine._cuda`. Raises DeviceError."""
    try:
        from engine import _cuda
    except ImportError as problem:
        raise DeviceError(
            f"engine._cuda is not built ({problem}); build it with ENGINE_BUILD_CUDA=1 pip install -e . (nvcc needed), "
            "or use device='cuda', whose kernels NVRTC compiles"
        ) from problem
    return cast(ModuleType, _cuda)


def _argument(value: Any) -> Any:
    """Pointers as 64-bit numbers; values are NumPy scalars of their parameters' types already."""
    if value is None:
        return np.uint64(0)
    return np.uint64(value.address) if hasattr(value, "address") else value
