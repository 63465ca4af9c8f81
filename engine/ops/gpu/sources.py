"""Where the kernels' sources and CUDA's own headers are, and what a kernel file includes.

The kernels are in cuda/ of a checkout, or beside the installed package. CUDA's headers (cuda_bf16.h and its like, which
a host compiler can read) come from the nvidia-cuda-runtime wheel and its two companions where they are installed, else
from a CUDA toolkit: a machine without a GPU needs no toolkit.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import engine
from engine.errors import DeviceError

HEADER_WHEELS = ("nvidia-cuda-runtime", "nvidia-cuda-crt", "nvidia-cuda-cccl")
HEADERS = (
    "cuda_runtime_api.h",
    "cuda_bf16.h",
    "cuda_fp16.h",
    "cuda_fp8.h",
    "cuda_fp4.h",
    "vector_types.h",
    "crt/host_defines.h",
    "nv/target",
)
_RELEASE = re.compile(r"#define CUDART_VERSION +(\d+)")
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def cuda_directory() -> Path:
    """The folder of the kernels' sources. Raises DeviceError if it is not there."""
    package = Path(engine.__file__).resolve().parent
    candidates = (package / "cuda", package.parent / "cuda")  # installed; in a checkout
    for folder in candidates:
        if (folder / "emulate" / "simt.h").is_file():
            return folder
    raise DeviceError(f"no CUDA sources (neither {' nor '.join(map(str, candidates))}); install sharq-engine anew")


def cuda_include_directories(newest: tuple[int, int] | None = None) -> tuple[Path, ...]:
    """Folders to give a compiler with -I so that it finds CUDA's headers.

    The first of these that holds them all: the NVIDIA wheels, $CUDA_HOME, $CUDA_PATH, the toolkit of the nvcc on PATH,
    /usr/local/cuda. newest: the release (major, minor) of a compiler for GPUs, which does not know all that newer
    headers call. Raises DeviceError, naming what was tried, if none does.
    """
    tried: list[str] = []
    for name, folders in _include_candidates():
        if not all(any((folder / header).is_file() for folder in folders) for header in HEADERS):
            tried.append(f"{name} (not all of them)")
        elif newest is not None and (release := _release(folders)) > newest:
            tried.append(f"{name} (of CUDA {release[0]}.{release[1]})")
        else:
            return tuple(folder for folder in folders if folder.is_dir())
    version = "" if newest is None else f" of CUDA {newest[0]}.{newest[1]}, the compiler's, or older"
    raise DeviceError(f"no CUDA headers{version} in {', '.join(tried)}; pip install {' '.join(HEADER_WHEELS)}")


def _release(folders: Iterable[Path]) -> tuple[int, int]:
    """(major, minor) of the CUDA whose headers are in these folders."""
    text = next(_read(path) for folder in folders if (path := folder / "cuda_runtime_api.h").is_file())
    found = _RELEASE.search(text)
    number = int(found[1]) if found else 0
    return number // 1000, number % 1000 // 10


def _include_candidates() -> Iterator[tuple[str, tuple[Path, ...]]]:
    yield "the wheels " + " ".join(HEADER_WHEELS), tuple(dict.fromkeys(_wheel_folders()))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(variable):
            yield f"${variable}={value}", _toolkit_folders(Path(value))
    if nvcc := shutil.which("nvcc"):
        yield f"the toolkit of {nvcc}", _toolkit_folders(Path(nvcc).resolve().parent.parent)
    yield "/usr/local/cuda", _toolkit_folders(Path("/usr/local/cuda"))


def _wheel_folders() -> Iterator[Path]:
    """Every …/include of the installed wheels: they unpack into one nvidia/cuNN/include, but need not."""
    for name in HEADER_WHEELS:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name in {"cuda_bf16.h", "host_defines.h", "target"}:
                folder = Path(str(file.locate()))
                depth = next((i for i, part in enumerate(file.parts) if part == "include"), None)
                if depth is not None:
                    yield folder.parents[len(file.parts) - depth - 2]


def _toolkit_folders(root: Path) -> tuple[Path, ...]:
    return root / "include", root / "include" / "cccl"


def local_files(source: Path) -> dict[str, Path]:
    """`source` and all it includes with quotes, directly or not: name as cuda/ would spell it -> path.

    A file of cuda/ is named from there, any other (a test's kernel) by its file name. Each #include is looked up beside
    the including file, then in cuda/. Raises DeviceError for one that is in neither.
    """
    root = cuda_directory()
    found: dict[str, Path] = {}
    pending = [source.resolve()]
    while pending:
        path = pending.pop()
        name = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
        if name in found:
            continue
        found[name] = path
        for included in INCLUDE.findall(_read(path)):
            choices = [folder / included for folder in (path.parent, root) if (folder / included).is_file()]
            if not choices:
                raise DeviceError(f'{path} includes "{included}", which is neither beside it nor in {root}')
            pending.append(choices[0].resolve())
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise DeviceError(f"cannot read the kernel source {path}: {error}") from error
