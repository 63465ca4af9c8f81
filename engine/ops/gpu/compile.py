"""Kernels as cubins: compiled by NVRTC for one GPU architecture, kept on disk, loaded through cupy.RawModule.

A cubin rather than PTX, and compiled here rather than by CuPy, because block-scaled FP4 exists for targets of one
architecture alone (sm_120a) and CuPy asks for plain ones. Cached files are named by a hash of everything that goes in
and by one of what came out: processes may compile at once (one rename publishes), and a damaged file is noticed and
made anew.

NVRTC is CuPy's; no GPU is needed to compile, only to load. `engine.ops.gpu.host_build` is the same for the CPU.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from engine.cache_directory import cache_directory
from engine.errors import DeviceError
from engine.ops.gpu import sources

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a", "sm_121a")
ONLY_FOR = {"sm120": "sm_120a", "wgmma": "sm_90a"}  # files of cuda/ whose names end so; setup.py has the same table
_OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
_ELF = b"\x7fELF"


def cubin(source: str | Path, arch: str, *, defines: Sequence[str] = (), cache: Path | None = None) -> Path:
    """The compiled kernels of `source`, a name in cuda/ or a path, for `arch`, e.g. "sm_90a".

    defines: macros, "NAME=value". cache: the folder for cubins; None: `cache_directory("kernels")`.
    Raises DeviceError where NVRTC is missing, does not know the architecture, or refuses the source (with its log).
    """
    path = Path(source)
    if path.name == str(source):
        path = sources.cuda_directory() / path
    options = (f"--gpu-architecture={arch}", *_OPTIONS, *(f"-D{define}" for define in defines))
    texts = {name: file.read_text() for name, file in sources.local_files(path).items()}
    key = _digest(repr((nvrtc_version(), options, sorted(texts.items()))).encode())
    folder = cache_directory("kernels") if cache is None else cache
    for found in folder.glob(f"{path.stem}-{arch}-{key}-*.cubin"):
        if _is_whole(found):
            return found
        found.unlink(missing_ok=True)
    image = compile_source(path, options)
    target = folder / f"{path.stem}-{arch}-{key}-{_digest(image)}.cubin"
    _publish(target, image)
    return target


def kernel_files(arch: str) -> list[str]:
    """The files of cuda/ that have kernels for `arch`."""
    names = sorted(path.stem for path in sources.cuda_directory().glob("*.cu"))
    return [f"{name}.cu" for name in names if arch == ONLY_FOR.get(name.rpartition("_")[2], arch)]


def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC that CuPy found. Raises DeviceError where there is none."""
    nvrtc = _nvrtc()
    try:
        return cast(tuple[int, int], nvrtc.getVersion())
    except (RuntimeError, OSError) as problem:  # the binding is there, the library is not
        raise DeviceError(
            f"CuPy finds no NVRTC ({problem}); install it, e.g. pip install 'cupy-cuda13x[ctk]'"
        ) from problem


def compile_source(path: Path, options: Sequence[str]) -> bytes:
    """The cubin. Raises DeviceError with NVRTC's log."""
    nvrtc = _nvrtc()
    folders = (path.parent, sources.cuda_directory(), *sources.cuda_include_directories(nvrtc_version()))
    includes = [f"-I{folder}" for folder in folders]
    program = nvrtc.createProgram(path.read_text(), path.name, (), ())
    try:
        nvrtc.compileProgram(program, (*options, *includes))
        image: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as problem:
        log = nvrtc.getProgramLog(program)
        raise DeviceError(f"NVRTC refuses {path.name} ({problem}; {' '.join(options)}):\n{log}") from problem
    finally:
        nvrtc.destroyProgram(program)
    return _completed(image)


def _completed(image: bytes) -> bytes:
    """CuPy hands an image out without its last byte, as it does PTX, whose text ends in a zero. Ours is the last one of
    the program headers, which a cubin ends with."""
    offset, entry, count = (*struct.unpack_from("<Q", image, 32), *struct.unpack_from("<HH", image, 54))
    return image.ljust(offset + entry * count, b"\0")


def _nvrtc() -> ModuleType:
    try:
        from cupy.cuda import nvrtc
    except ImportError as problem:
        raise DeviceError(
            "compiling for a GPU needs CuPy; install cupy-cuda13x or cupy-cuda12x, whichever fits the driver"
        ) from problem
    return cast(ModuleType, nvrtc)


def _is_whole(path: Path) -> bool:
    try:
        image = path.read_bytes()
    except OSError:
        return False
    return image[:4] == _ELF and path.stem.endswith(_digest(image))


def _publish(target: Path, image: bytes) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        os.replace(draft, target)
    except OSError as problem:
        raise DeviceError(
            f"compiled kernels cannot be kept in {target.parent} ({problem.strerror}); set ENGINE_CACHE to a folder "
            "that can be written"
        ) from problem


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]
