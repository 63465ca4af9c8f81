"""Every kernel compiles with nvcc for every architecture, without spilling registers beyond what is stated here.

The emulator shows that a kernel computes the right thing; only NVIDIA's compiler shows that it is CUDA, and what it
costs. Reports are kept on disk by the hash of all that goes in, so only what changed is compiled again. Files that end
in _sm120 are for that architecture and leave nothing for others; _wgmma is for sm_90a.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from engine.cache_directory import cache_directory
from engine.errors import DeviceError
from engine.ops.gpu import sources
from engine.ops.gpu.launch import shared_limit
from engine.ops.gpu.launch_attention import AttentionShape

try:
    CUDA = sources.cuda_directory()
except DeviceError as error:
    pytest.skip(str(error), allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")
FLAGS = ("-std=c++17", "-cubin", "-Xptxas", "-v")
# Bytes a kernel may spill (stores and loads together), and why; a kernel that is not here spills nothing.
SPILLS: dict[str, int] = {
    # The total of the splits before, touched where a split ends; the loop over tiles spills nothing (D = 256: up to
    # nine registers). D = 128 and 256 need more than 255 registers; at D = 64 it is the price of two blocks on an SM.
    f"attention_prefill_{types}_{D}": allowed
    for types in ("bf16", "f16", "bf16_e4m3")
    for D, allowed in ((64, 512), (96, 96), (128, 768), (256, 2816))
}
# The same by pattern. Decode products: what the loop over chunks needs, so that two to four blocks fit an SM (the
# loop over k spills nothing); tile products hold 64 tokens × 32 n twice, near the limit of 255 registers. Compilers
# differ: nvcc 13.0 and 13.5 were tried.
SPILLING_FAMILIES = {
    r"linear_decode_\w+_t[124]": 192,
    r"linear_tile_\w+_m[12]": 160,
    r"attention_f32": 16,
}
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
ENTRY = re.compile(r"\bKERNEL (\w+)\(|__global__[^;{]*?\bvoid\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(")


@cache
def nvcc() -> str:
    """The compiler on PATH, in $CUDA_HOME, or of the nvidia-cuda-nvcc wheel."""
    candidates = [shutil.which("nvcc")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(f"{home}/bin/nvcc")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        candidates += sorted(map(str, Path(folder).glob("*/bin/nvcc")))
    for candidate in candidates:
        if candidate and Path(candidate).exists():
            return candidate
    pytest.skip("nvcc is neither on PATH nor in $CUDA_HOME nor installed as a wheel (pip install nvidia-cuda-nvcc)")


@cache
def version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def report(source: Path, arch: str) -> str:
    """What ptxas says of the file's kernels."""
    texts = [path.read_bytes() for path in (source, *sorted(CUDA.glob("*.cuh")))]
    key = hashlib.sha256(b"\0".join([version().encode(), arch.encode(), " ".join(FLAGS).encode(), *texts])).hexdigest()
    kept = cache_directory("ptxas") / f"{source.stem}-{arch}-{key[:24]}.txt"
    if kept.is_file():
        return kept.read_text()
    command = [nvcc(), *FLAGS, f"-arch={arch}", str(source), "-o", os.devnull]  # with the headers it came with
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    unfinished = kept.with_suffix(f".{os.getpid()}")
    unfinished.write_text(done.stdout + done.stderr)
    unfinished.replace(kept)
    return kept.read_text()


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, arch: str) -> None:
    text = report(source, arch)
    assert "warning" not in text and "serialized" not in text, text  # the latter: wgmma waited for one by one
    kernels = list(KERNEL.finditer(text))
    only = {"sm120": "sm_120a", "wgmma": "sm_90a"}.get(source.stem.rpartition("_")[2], arch)
    exists = arch == only
    assert bool(kernels) == exists, f"kernels in ptxas's report: {len(kernels)}\n{text}"
    for kernel in kernels:
        spilt = int(kernel["stores"]) + int(kernel["loads"])
        families = [bytes for name, bytes in SPILLING_FAMILIES.items() if re.fullmatch(name, kernel["name"])]
        allowed = SPILLS.get(kernel["name"], max(families, default=0))
        assert spilt <= allowed, f"{kernel['name']} spills {spilt} bytes at {kernel['registers']} registers on {arch}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("operation", ["decode", "prefill"])
def test_attention_fits_a_blocks_shared_memory(operation: Literal["decode", "prefill"], arch: str) -> None:
    """What the launch asks for beside the arrays that ptxas reports."""
    text = report(CUDA / f"attention_{operation}.cu", arch)
    for D in (64, 96, 128, 256):
        for dtype, kv_e4m3 in (("bf16", False), ("f16", False), ("bf16", True)):
            shape = AttentionShape(1, 1, D, dtype, kv_e4m3)  # type: ignore[arg-type]
            used = re.search(rf"function '{shape.kernel(operation)}'.*?Used \d+ registers([^\n]*)", text, re.DOTALL)
            assert used, shape.kernel(operation)
            static = re.search(r"(\d+) bytes smem", used[1])
            total = shape.shared_bytes(operation) + (int(static[1]) if static else 0)
            assert total <= shared_limit(arch), f"{shape.kernel(operation)}: {total} bytes on {arch}"


def test_what_is_allowed_to_spill_exists() -> None:
    names = {name for path in CUDA.glob("*.cu") for pair in ENTRY.findall(path.read_text()) for name in pair}
    assert names >= set(SPILLS)
