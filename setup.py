"""Builds sharq-engine: the Python packages and the optional C++ extension `engine._native`.

Metadata is in pyproject.toml. What needs code is here: the extension's kernel files are compiled once per instruction
set (see engine/ops/cpu/kernels.h), which setuptools' own build_ext cannot express, so this one runs the compiler.

The extension is optional. Without a C++17 compiler (GCC or Clang, on Linux or macOS) the install succeeds with one
warning, and the engine runs on its NumPy path and says so. ENGINE_REQUIRE_NATIVE=1 turns the warning into an error.

A rebuild compiles what changed. Object files are kept in the build directory (ENGINE_BUILD_DIR names another), under a
lock; the extension is replaced in one step, so a running process keeps the file it loaded.

ENGINE_BUILD_CUDA=1 builds `engine._cuda` too: every kernel of cuda/ compiled by nvcc for every architecture, inside one
extension that needs no driver to be imported. That takes minutes, so it is never done unasked, and what prevents it is
an error. ENGINE_CUDA_ARCHITECTURES="sm_90a" leaves the others out.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SOURCE_DIR = Path("engine/ops/cpu")
COMMON_SOURCES = (
    "attention_plan.cpp",
    "bind_attention.cpp",
    "bind_fp4.cpp",
    "bind_fp8.cpp",
    "bind_linear.cpp",
    "bind_rows.cpp",
    "bindings.cpp",
    "cpu_features.cpp",
    "kernels.cpp",
    "kv_cache.cpp",
    "packed_fp4.cpp",
    "packed_fp8.cpp",
    "packed_weight.cpp",
    "scratch.cpp",
    "slabs.cpp",
    "thread_pool.cpp",
)
# Compiled once per instruction set.
KERNEL_SOURCES = (
    "attention.cpp",
    "finite.cpp",
    "fp4_linear.cpp",
    "fp8_linear.cpp",
    "linear.cpp",
    "prepare_fp4.cpp",
    "prepare_fp8.cpp",
    "quantize_feedback.cpp",
    "quantize_weight.cpp",
    "rope.cpp",
    "rows.cpp",
    "w4a16_linear.cpp",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
INSTRUCTION_SETS: dict[str, tuple[int, tuple[str, ...]]] = {  # namespace -> ENGINE_ISA_LEVEL, flags
    "portable": (0, ()),
    "avx2": (1, AVX2),
    "avx512": (2, AVX512),
    "avx512_bf16": (3, (*AVX512, "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16")),
}
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a·b + c is fused where the source says fma, nowhere else
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # 64-byte vectors are passed between inlined functions only
    "-Wno-maybe-uninitialized",  # this and the next: GCC 12 warns about its own AVX-512 headers
    "-Wno-uninitialized",
    "-MMD",
)
BUILD_JOBS = int(os.environ.get("ENGINE_BUILD_JOBS") or min(4, os.cpu_count() or 1))

CUDA_DIR = Path("cuda")
CUDA_BINDINGS = CUDA_DIR / "bindings.cpp"
CUDA_ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")
ONLY_FOR = {"sm120": "sm_120a", "wgmma": "sm_90a"}  # kernel files whose names end so, as in engine.ops.gpu.compile
CUDA_FLAGS = ("-std=c++17", "-cubin")


class Compiler:
    """The host's C++ compiler: $CXX, else the one Python was built with, else c++."""

    def __init__(self) -> None:
        candidates = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
        found = [command for command in (shlex.split(c) for c in candidates if c) if self._runs(command)]
        if os.name != "posix" or not found:
            raise CompileError("no C++ compiler found (tried $CXX, c++, g++ and clang++; others are not supported)")
        self.command = found[0]

    @staticmethod
    def _runs(command: list[str]) -> bool:
        try:
            return subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def accepts(self, flags: tuple[str, ...]) -> bool:
        """Whether these flags work here; x86 ones do not elsewhere, and old compilers lack new ones."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text("#include <immintrin.h>\nint probe() { return 0; }\n")
            command = [*self.command, *flags, "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def run(self, arguments: list[str], target: Path) -> None:
        """Write `target` (the compiler's -o) completely or not at all."""
        partial = target.with_name(target.name + ".partial")
        command = [*self.command, *arguments, "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stderr.write(result.stderr)
        if result.returncode:
            raise CompileError(f"{self.command[0]} failed on {arguments[-1]} (output above)")
        os.replace(partial, target)


class Job:
    """One object file: a source and what it is compiled with."""

    def __init__(self, source: str, object_dir: Path, flags: tuple[str, ...]) -> None:
        self.source = SOURCE_DIR / source
        self.object = object_dir / (Path(source).stem + ".o")
        self.depends = self.object.with_suffix(".d")
        self.stamp = self.object.with_suffix(".flags")
        self.flags = flags

    def is_current(self, command: list[str]) -> bool:
        if not (self.object.exists() and self.depends.exists() and self.stamp.exists()):
            return False
        if self.stamp.read_text() != shlex.join([*command, *self.flags]):
            return False
        built = self.object.stat().st_mtime
        names = self.depends.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        return all(Path(name).exists() and Path(name).stat().st_mtime < built for name in names)

    def compile(self, compiler: Compiler) -> None:
        if self.is_current(compiler.command):
            return
        self.object.parent.mkdir(parents=True, exist_ok=True)
        compiler.run([*self.flags, "-MF", str(self.depends), "-c", str(self.source)], self.object)
        self.stamp.write_text(shlex.join([*compiler.command, *self.flags]))


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One build at a time in `folder`."""
    import fcntl  # not on Windows, where Compiler has refused already

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class BuildNative(build_ext):
    """Compiles `engine._native`; anything that prevents it becomes one warning."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "engine._cuda":
            folder = Path(os.environ.get("ENGINE_BUILD_DIR") or self.build_temp) / "engine_cuda"
            build_cuda(Path(self.get_ext_fullpath(ext.name)), folder)
            return
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except (CompileError, OSError, ImportError) as error:
            if not ext.optional:
                raise
            self.warn(f"engine._native was not built: {error}. The engine will run on its slow NumPy path.")

    def _build(self, target: Path) -> None:
        import pybind11

        compiler = Compiler()
        folder = Path(os.environ.get("ENGINE_BUILD_DIR") or self.build_temp) / "engine_native"
        includes = tuple(f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include")))
        with exclusive(folder):
            jobs = self._jobs(compiler, folder, FLAGS + includes)
            with ThreadPoolExecutor(BUILD_JOBS) as pool:
                list(pool.map(lambda job: job.compile(compiler), jobs))
            target.parent.mkdir(parents=True, exist_ok=True)
            mac = ["-bundle", "-undefined", "dynamic_lookup"]
            linking = mac if sys.platform == "darwin" else ["-shared", "-pthread", "-Wl,-s"]
            compiler.run([*linking, *(str(job.object) for job in jobs)], target)

    def _jobs(self, compiler: Compiler, folder: Path, flags: tuple[str, ...]) -> list[Job]:
        usable = {n: v for n, v in INSTRUCTION_SETS.items() if n == "portable" or compiler.accepts(v[1])}
        have = tuple(f"-DENGINE_HAVE_{name}" for name in usable)
        jobs = [Job(source, folder / "common", flags + have) for source in COMMON_SOURCES]
        for name, (level, isa_flags) in usable.items():
            own = (*flags, *isa_flags, f"-DENGINE_ISA={name}", f"-DENGINE_ISA_LEVEL={level}")
            jobs += [Job(source, folder / name, own) for source in KERNEL_SOURCES]
        return jobs


def build_cuda(target: Path, folder: Path) -> None:
    """`engine._cuda`: the bindings and a cubin of every kernel file for every architecture."""
    import pybind11

    nvcc, compiler = find_nvcc(), Compiler()
    chosen = tuple(os.environ.get("ENGINE_CUDA_ARCHITECTURES", " ".join(CUDA_ARCHITECTURES)).split())
    if unknown := set(chosen) - set(CUDA_ARCHITECTURES):
        raise CompileError(
            f"ENGINE_CUDA_ARCHITECTURES: {', '.join(unknown)}; there are {', '.join(CUDA_ARCHITECTURES)}"
        )
    with exclusive(folder):
        cubins = [Cubin(source, arch, folder) for arch in chosen for source in kernel_sources(arch)]
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        with ThreadPoolExecutor(BUILD_JOBS) as pool:
            list(pool.map(lambda cubin: cubin.compile(nvcc, version), cubins))
        images = folder / "images.cpp"
        images.write_text(images_source(cubins))
        folders = [pybind11.get_include(), sysconfig.get_path("include"), *toolkit_includes(nvcc)]
        includes = [f"-isystem{folder}" for folder in folders]
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = [flag for flag in FLAGS if flag != "-MMD"]
        compiler.run(
            [*flags, "-shared", f"-I{CUDA_DIR}", *includes, str(CUDA_BINDINGS), str(images), "-ldl", "-Wl,-s"], target
        )


def find_nvcc() -> str:
    """Of $CUDA_HOME, $CUDA_PATH, PATH or /usr/local/cuda, in this order."""
    homes = [value for name in ("CUDA_HOME", "CUDA_PATH") if (value := os.environ.get(name))]
    candidates = [*(f"{home}/bin/nvcc" for home in homes), shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise CompileError(
        "ENGINE_BUILD_CUDA=1 needs nvcc of CUDA 12.8 or newer, which is neither in $CUDA_HOME nor on PATH nor in "
        "/usr/local/cuda; install a CUDA toolkit, or leave ENGINE_BUILD_CUDA unset: kernels are then compiled by NVRTC"
    )


def toolkit_includes(nvcc: str) -> list[str]:
    """Where nvcc itself looks for CUDA's headers: it may be a script, or a link to anywhere."""
    command = [nvcc, "--dryrun", "-cubin", str(sorted(CUDA_DIR.glob("*.cu"))[0])]
    plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    values = [line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ INCLUDES=")]
    return [flag.removeprefix("-I") for value in values for word in shlex.split(value) for flag in shlex.split(word)]


def kernel_sources(arch: str) -> list[Path]:
    """The kernel files that have anything for `arch`."""
    found = sorted(CUDA_DIR.glob("*.cu"))
    return [path for path in found if arch == ONLY_FOR.get(path.stem.rpartition("_")[2], arch)]


def with_includes(source: Path) -> list[Path]:
    """A kernel file and all of cuda/ that it includes."""
    found: list[Path] = []
    pending = [source]
    while pending:
        path = pending.pop()
        if path not in found and path.is_file():
            found.append(path)
            pending += [CUDA_DIR / name for name in re.findall(r'#include "([^"]+)"', path.read_text())]
    return sorted(found)


class Cubin:
    """One kernel file for one architecture."""

    def __init__(self, source: Path, arch: str, folder: Path) -> None:
        self.source = source
        self.arch = arch
        self.path = folder / f"{source.stem}-{arch}.cubin"
        self.stamp = self.path.with_suffix(".key")

    def compile(self, nvcc: str, version: str) -> None:
        """Anew where the sources, the flags or the compiler's version changed."""
        texts = [path.read_text() for path in with_includes(self.source)]
        text = "\n".join([version, " ".join(CUDA_FLAGS), *texts])
        key = hashlib.sha256(text.encode()).hexdigest()
        if self.path.exists() and self.stamp.exists() and self.stamp.read_text() == key:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        command = [nvcc, *CUDA_FLAGS, f"-arch={self.arch}", str(self.source), "-o", str(partial)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        sys.stderr.write(result.stderr)
        if result.returncode:
            raise CompileError(f"{shlex.join(command)} failed (output above)")
        os.replace(partial, self.path)
        self.stamp.write_text(key)


def images_source(cubins: list[Cubin]) -> str:
    """C++ that puts the cubins into the extension's read-only data, and the table cuda/bindings.cpp reads."""
    parts = ['#include "images.h"\n']
    for i, cubin in enumerate(cubins):
        name = f"engine_image_{i}"
        parts.append(
            f'__asm__(".pushsection .rodata\\n.balign 64\\n{name}:\\n.incbin \\"{cubin.path.resolve()}\\"\\n'
            f'{name}_end:\\n.popsection\\n");\n'
            f'extern "C" __attribute__((visibility("hidden"))) const char {name}[], {name}_end[];\n'
        )
    rows = "".join(
        f'    {{"{cubin.source.name}", "{cubin.arch}", engine_image_{i}, engine_image_{i}_end}},\n'
        for i, cubin in enumerate(cubins)
    )
    parts.append(f"const Image kImages[] = {{\n{rows}}};\nconst int kImageCount = {len(cubins)};\n")
    return "".join(parts)


os.chdir(ROOT)
sources = [str(SOURCE_DIR / name) for name in COMMON_SOURCES + KERNEL_SOURCES]
optional = os.environ.get("ENGINE_REQUIRE_NATIVE") != "1"
extensions = [Extension("engine._native", sources, optional=optional, language="c++")]
if os.environ.get("ENGINE_BUILD_CUDA") == "1":
    extensions.append(Extension("engine._cuda", [str(CUDA_BINDINGS)], language="c++"))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildNative},
)
