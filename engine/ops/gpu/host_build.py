"""A .cu file as a shared library for the CPU, made by the host's C++ compiler and cached on disk.

Steps, each a plain compiler call:
    1. The file and what it includes are copied, their inline assembly rewritten (ptx_rewrite), and preprocessed with
       cuda/emulate/simt.h in front, which makes CUDA C++ of C++.
    2. Entry points are read off the preprocessed text, where macros are expanded, and a table of them is appended.
    3. In a checking build the compiler's assembly gets a gap after each __shared__ array, so that running off one array
       never ends in its neighbour, which would look like an access to that one.
    4. Every `extern __shared__` name is defined as the one arena of dynamic shared memory.
The runtime (cuda/emulate/*.cpp) is a library of its own beside them, shared by all modules of one kind.

Cached files are named by a hash of everything that goes in and appear by one rename, so processes may build at once.
Needs GCC (or what takes its options) on Linux.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.cache_directory import cache_directory
from engine.errors import DeviceError
from engine.ops.gpu import elf, ptx_rewrite, sources
from engine.ops.gpu.launch import SHARED_LIMITS

# -march=native cannot change results: contraction is off, and without -ffast-math nothing is reordered. It makes fmaf
# an instruction instead of a call.
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # kernels read packed words as other types
    "-fno-math-errno",
    *(("-march=native",) if platform.machine() == "x86_64" else ()),
)
KERNEL_FLAGS = (
    "-O1",  # a third less to compile than -O2 and as fast: kernels spend their time in switches and models
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # or two modules with the same template would share its __shared__ arrays
    "-fno-extern-tls-init",  # `extern __shared__` arrays are plain data
    "-Wno-attributes",
    "-Wno-unknown-pragmas",  # unroll
)
CHECKING_FLAGS = (
    "-fsanitize=thread,alignment,bounds",  # cuda/emulate/hooks.cpp takes the calls
    "-fno-sanitize-recover=all",
    "--param=tsan-instrument-func-entry-exit=0",
)
GAP_BYTES = 256  # between shared arrays of a checking build: an overflow by up to this much is seen as one

ENTRY = re.compile(
    r'extern\s*"C"\s*__attribute__\(\(noinline, visibility\("default"\)\)\)\s*'
    r"(?:emu_launch_bounds\s*(?P<before>\((?:[^()]|\([^()]*\))*\))\s*)?void\s+"
    r"(?:emu_launch_bounds\s*(?P<after>\((?:[^()]|\([^()]*\))*\))\s*)?(?P<name>\w+)\s*\("
)
BOUNDS = re.compile(r"emu_launch_bounds\s*\((?:[^()]|\([^()]*\))*\)")
ARCH = re.compile(r"sm_(\d{2,3})([af]?)")


@dataclass(frozen=True)
class Architecture:
    number: int  # 90 of sm_90a
    suffix: str  # "a" for architecture-specific features

    @classmethod
    def parse(cls, arch: str) -> Architecture:
        match = ARCH.fullmatch(arch)
        if match is None or int(match[1]) not in SHARED_LIMITS:
            known = ", ".join(f"sm_{number}" for number in SHARED_LIMITS)
            raise DeviceError(f"unknown GPU architecture {arch!r}; known are {known}, with suffix a where there is one")
        return cls(int(match[1]), match[2])

    @property
    def shared_limit(self) -> int:
        """Bytes of dynamic shared memory that a block may ask for."""
        return SHARED_LIMITS[self.number] << 10

    @property
    def defines(self) -> tuple[str, ...]:
        own = {"a": (f"__CUDA_ARCH_FEAT_SM{self.number}_ALL=1",), "f": (), "": ()}[self.suffix]
        return (f"EMU_CUDA_ARCH={self.number * 10}", *own)


def compiler() -> tuple[str, ...]:
    """The host's C++ compiler: $CXX, else g++ or c++. Raises DeviceError where there is none."""
    for command in (os.environ.get("CXX"), "g++", "c++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return tuple(words)
    raise DeviceError("no C++ compiler ($CXX, g++ or c++): running CUDA kernels on the CPU needs one; install g++")


@dataclass(frozen=True)
class HostBuild:
    """What one library is made of."""

    source: Path
    arch: Architecture
    checked: bool
    defines: tuple[str, ...]

    def library(self) -> Path:
        """The shared library, compiled unless it is cached. It needs the runtime's, which lies beside it.

        Raises DeviceError with the compiler's log if that fails.
        """
        if sys.platform != "linux":
            raise DeviceError(f"running CUDA kernels on the CPU works on Linux only, not on {sys.platform}")
        runtime = _Runtime(self.checked)
        texts = {name: _rewritten(name, path) for name, path in sources.local_files(self.source).items()}
        key = _digest(runtime.key, Path(__file__).read_text(), self.arch, self.defines, sorted(texts.items()))
        library = _cached(f"runtime-{runtime.key}", runtime.build)
        return _cached(f"{self.source.stem}-{key}", lambda folder: self._build(folder, texts, library))

    def _build(self, folder: Path, texts: dict[str, str], runtime: Path) -> Path:
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        own_name = next(iter(texts))  # relative, as all names from here on: they end up in reports
        flags = [
            "-g1",
            *FLAGS,
            *KERNEL_FLAGS,
            *(CHECKING_FLAGS if self.checked else ()),
            *(f"-fdebug-prefix-map={path}=." for path in (folder, sources.cuda_directory())),
        ]
        defines = [f"-D{name}" for name in (*self.arch.defines, *self.defines)]
        preprocess = [*_includes(), *defines, "-include", "emulate/simt.h", "-x", "c++", "-E", own_name]
        _run([*flags, *preprocess, "-o", "kernels.ii"], folder)
        text = (folder / "kernels.ii").read_text()
        (folder / "kernels.ii").write_text(_with_entry_table(text, self.arch.shared_limit, own_name))
        _run([*flags, "-x", "c++-cpp-output", "-S", "kernels.ii", "-o", "kernels.s"], folder)
        if self.checked:
            (folder / "kernels.s").write_text(_with_gaps((folder / "kernels.s").read_text()))
        _run(["-c", "kernels.s", "-o", "kernels.o"], folder)
        undefined = [symbol.name for symbol in elf.tls_symbols(folder / "kernels.o") if not symbol.defined]
        (folder / "arena.s").write_text(_arena(undefined, self.arch.shared_limit))
        needs = ["-Wl,--no-as-needed", f"-L{runtime.parent}", f"-l:{runtime.name}", "-Wl,-rpath,$ORIGIN", "-Wl,-z,defs"]
        _run(["-shared", "kernels.o", "arena.s", *needs, "-o", "module.so"], folder)
        return folder / "module.so"


@dataclass(frozen=True)
class _Runtime:
    """cuda/emulate/*.cpp as one library."""

    checked: bool

    @property
    def key(self) -> str:
        folder = sources.cuda_directory() / "emulate"
        files = sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cpp"))
        texts = [(path.name, path.read_text()) for path in files]
        headers = sources.cuda_include_directories()
        return _digest(compiler(), _compiler_version(compiler()), _cpu(), self._flags, texts, _headers(headers))

    @property
    def _flags(self) -> tuple[str, ...]:
        # Reports walk the stack. Without interposition the library's functions can be inlined into one another.
        fixed = ("-fno-omit-frame-pointer", "-fno-semantic-interposition")
        return (*FLAGS, "-O2", *fixed, f"-DEMU_CHECKED={int(self.checked)}")

    def build(self, folder: Path) -> Path:
        files = sorted(str(path) for path in (sources.cuda_directory() / "emulate").glob("*.cpp"))
        objects = [f"{Path(file).stem}.o" for file in files]

        def compile_one(file: str, target: str) -> None:
            _run([*self._flags, *_includes(), "-c", file, "-o", target], folder)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, files, objects))
        _run(["-shared", *objects, "-o", "runtime.so", "-ldl", "-lrt", "-lpthread"], folder)
        return folder / "runtime.so"


def _cached(stem: str, build: Callable[[Path], Path]) -> Path:
    """The library of that name in the cache, or the one that build(an empty folder) returns, moved there in one step.

    The name also holds a hash of the file, so a damaged one is noticed and made anew.
    """
    cache = cache_directory("emulator")
    for found in cache.glob(f"{stem}-*.so"):
        if found.stem == f"{stem}-{_digest(found.read_bytes())}":
            return found
        found.unlink(missing_ok=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as folder:
            made = build(Path(folder))
            target = cache / f"{stem}-{_digest(made.read_bytes())}.so"
            os.replace(made, target)
    except OSError as problem:
        raise DeviceError(
            f"compiled kernels cannot be kept in {cache} ({problem}); set ENGINE_CACHE to a folder that can be written"
        ) from problem
    return target


def _run(arguments: Sequence[str], folder: Path) -> None:
    command = [*compiler(), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DeviceError(f"the host compiler refused the kernels:\n{shlex.join(command)}\n{result.stderr}")


def _includes() -> list[str]:
    """Rewritten copies (of the working folder) first, so that no original is read in their place."""
    return ["-I.", f"-I{sources.cuda_directory()}", *(f"-isystem{path}" for path in sources.cuda_include_directories())]


@functools.cache
def _headers(folders: tuple[Path, ...]) -> str:
    """A hash of the CUDA headers whose text decides what a build means: those with a version or with arithmetic."""
    names = ("cuda_runtime_api.h", "cuda_bf16.hpp", "cuda_fp16.hpp", "cuda_fp8.hpp", "cuda_fp4.hpp")
    files = [folder / name for folder in folders for name in names]
    return _digest(folders, [file.read_bytes() for file in files if file.exists()])


def _rewritten(name: str, path: Path) -> str:
    return ptx_rewrite.rewrite(path.read_text(), name)


def _digest(*parts: object) -> str:
    data = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else repr(parts).encode()
    return hashlib.sha256(data).hexdigest()[:24]


@functools.cache
def _compiler_version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout


@functools.cache
def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return platform.machine() + next((line for line in lines if line.startswith("flags")), "")


def _with_entry_table(text: str, arena_bytes: int, file: str) -> str:
    """The preprocessed kernels with emu_module behind them: what emulator.py asks a library for."""
    entries = {match["name"]: match["before"] or match["after"] or "(0)" for match in ENTRY.finditer(text)}
    if not entries:
        raise DeviceError(f'{file} has no entry point; one looks like: extern "C" __global__ void name(…)')
    table = ", ".join(f'emu::entry<&{name}>("{name}", emu::first_of{bounds})' for name, bounds in entries.items())
    return BOUNDS.sub("", text) + (
        f'\n# 1 "entry points"\nextern thread_local char emu_arena[];\n'
        f"static const emu::KernelEntry emu_entries[] = {{{table}}};\n"
        f'extern "C" __attribute__((visibility("default"))) const emu::Module emu_module = '
        f"{{emu_entries, {len(entries)}, {arena_bytes}, [] {{ return static_cast<void*>(emu_arena); }}}};\n"
    )


def _with_gaps(assembly: str) -> str:
    """GAP_BYTES more behind every variable in a thread-local section; its symbol's size stays."""
    lines = assembly.split("\n")
    inside = False
    for i, line in enumerate(lines):
        if re.match(r"\t\.(section|text|data|bss)", line):
            inside = ".tbss" in line
        elif inside and line.startswith("\t.zero\t"):
            lines[i] = f"\t.zero\t{int(line.split()[1]) + GAP_BYTES}"
    return "\n".join(lines)


def _arena(names: Sequence[str], size: int) -> str:
    """Assembly that defines all `names` as one thread-local array, aligned as swizzled tiles need it."""
    labels = "".join(f".globl {n}\n.hidden {n}\n.type {n}, %object\n{n}:\n" for n in names)
    note = '.section .note.GNU-stack,"",%progbits\n'
    return f'.section .tbss.emu_arena,"awT",%nobits\n.balign 1024\n{labels}.zero {size + GAP_BYTES}\n{note}'
