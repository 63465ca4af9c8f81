"""engine._cuda: what it carries, and how it launches, recorded by a stand-in for the driver.

Skipped where the extension is not built (ENGINE_BUILD_CUDA=1 setup.py build_ext --inplace). On a GPU, test_on_gpu runs
what is launched here.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import sysconfig
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from engine.errors import DeviceError
from engine.ops.gpu.compile import ONLY_FOR, kernel_files
from engine.ops.gpu.emulator import EmulatedModule
from engine.ops.gpu.kernel_loaders import extension

try:
    IMAGES = extension().images()
except DeviceError as problem:
    pytest.skip(str(problem), allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
STT_FUNC, STB_GLOBAL = 2, 1


def entry_points(cubin: bytes) -> set[str]:
    """Global functions in an ELF file's symbol table (System V ABI): a cubin's kernels."""
    (offset,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    found = set()
    for _, kind, _, _, start, length, link, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        for at in range(start, start + length, entry):
            name, info = struct.unpack_from("<IB", cubin, at)
            if info == STB_GLOBAL << 4 | STT_FUNC:
                text = sections[link][4] + name
                found.add(cubin[text : cubin.index(0, text)].decode())
    return found


def carried() -> dict[str, dict[str, bytes]]:
    """Architecture -> source -> cubin."""
    found: dict[str, dict[str, bytes]] = defaultdict(dict)
    for source, arch, cubin in IMAGES:
        found[arch][source] = cubin
    return found


@cache
def expected(source: str) -> set[str]:
    """The entry points as another compiler finds them: the emulator's, which builds each file for one architecture."""
    arch = ONLY_FOR.get(source.removesuffix(".cu").rpartition("_")[2], "sm_90")
    return set(EmulatedModule.compile(source, arch=arch).kernels)


@pytest.mark.parametrize("arch", sorted(carried()))
def test_every_entry_point_is_carried(arch: str) -> None:
    """Every file that has kernels for this architecture, with all of them."""
    images = carried()[arch]
    assert sorted(images) == kernel_files(arch)
    for source, cubin in images.items():
        assert entry_points(cubin) == expected(source), source


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_driver(tmp_path: Path) -> None:
    """It can be imported and asked what it carries; only a GPU needs a driver."""
    (tmp_path / "libcuda.so.1").write_text("not a library")
    out = python(
        "from engine import _cuda; from engine.errors import DeviceError\n"
        "print(len(_cuda.images()) > 0)\n"
        "try: _cuda.Kernels('sm_90a')\n"
        "except DeviceError as problem: print(problem)",
        LD_LIBRARY_PATH=str(tmp_path),
    )
    assert out.startswith("True\nno NVIDIA driver: ") and "device='cpu'" in out


LAUNCHES = """
import numpy as np
from engine import _cuda
from engine.errors import DeviceError
from engine.ops.gpu.launch import Launch

class Array:
    address = 0xABC000

def embed(kernel='embed_bf16_bf16', shared=0, args=None, grid=(7, 1, 1)):
    values = [Array(), np.int64(64), None, Array(), np.int64(-2), np.int32(5)]
    return Launch('embed.cu', kernel, grid, (32, 2, 1), shared, values if args is None else args)

def refused(call, *args):
    try:
        call(*args)
    except DeviceError as problem:
        print('refused:', problem, flush=True)

kernels = _cuda.Kernels(ARCH)
kernels.launch(embed(), 0x99)
kernels.launch(embed('embed_f32_f32', 60000), 0x99)
kernels.launch(embed('embed_f32_f32', 50000), 0x99, True)
recording = _cuda.Recording(kernels, [embed(), embed('embed_f32_f32')], [False, True])
print('recorded', len(recording), flush=True)
recording.run(0x99)
graph = recording.capture(0x99)
graph.launch(0x98)
del graph
refused(kernels.launch, embed('other'), 0)
refused(kernels.launch, embed(args=[Array()]), 0)
refused(kernels.launch, embed(args=[Array(), np.int32(64), None, Array(), np.int64(1), np.int32(5)]), 0)
refused(kernels.launch, embed(args=[Array(), 64, None, Array(), np.int64(1), np.int32(5)]), 0)
refused(kernels.launch, embed(shared=1 << 20), 0)
refused(kernels.launch, embed(grid=(0, 1, 1)), 0)
refused(kernels.launch, Launch('none.cu', 'x', (1, 1, 1), (1, 1, 1), 0, []), 0)
refused(_cuda.Kernels, 'sm_50')
refused(_cuda.Recording, kernels, [embed()], [])
debug = _cuda.Kernels(ARCH, debug=True)
debug.launch(embed(), 0x99)
"""
ARGS = "abc000 40 0 abc000 fffffffffffffffe 5"
EXPECTED = f"""load
launch 30 on 99: 7 1 1, 32 2 1, 0: {ARGS}
attribute 8 60000
launch 40 on 99: 7 1 1, 32 2 1, 60000: {ARGS}
overlapping launch 40 on 99: 7 1 1, 32 2 1, 50000: {ARGS}
recorded 2
launch 30 on 99: 7 1 1, 32 2 1, 0: {ARGS}
overlapping launch 40 on 99: 7 1 1, 32 2 1, 0: {ARGS}
begin
capture 30 on 99: 7 1 1, 32 2 1, 0: {ARGS}
overlapping capture 40 on 99: 7 1 1, 32 2 1, 0: {ARGS}
end
graph on 98
destroy executable
destroy graph
refused: finding other of embed.cu: CUDA_ERROR_SOME, some error
refused: embed_bf16_bf16 of embed.cu takes 6 arguments, not 1
refused: argument 1 of embed_bf16_bf16 of embed.cu has 8 bytes, not 4
refused: argument 1 of embed_bf16_bf16 of embed.cu must be a device array, None or a NumPy scalar, not 64
attribute 8 1048576
refused: embed_bf16_bf16 of embed.cu with 1048576 bytes of shared memory: CUDA_ERROR_SOME, some error
launch 30 on 0: 0 1 1, 32 2 1, 0: {ARGS}
refused: launching embed_bf16_bf16 of embed.cu: CUDA_ERROR_SOME, some error
refused: engine._cuda carries no none.cu for ARCH; build it anew
refused: engine._cuda carries no kernels for sm_50; use the NVRTC loader
refused: a recording is told of each launch whether it overlaps
load
launch 30 on 99: 7 1 1, 32 2 1, 0: {ARGS}
wait
"""


def test_launches_reach_the_driver(tmp_path: Path) -> None:
    """Arguments as the driver reads them, recordings, graphs, debug mode, and what is refused."""
    toolkit = Path("/usr/local/cuda/include")
    if not (toolkit / "cuda.h").is_file():
        pytest.skip("the stand-in for the driver needs cuda.h of a CUDA toolkit")
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()
    stand_in = ["-shared", "-fPIC", "-std=c++17", f"-isystem{toolkit}", str(ROOT / "tests" / "fake_libcuda.cpp")]
    subprocess.run([*compiler, *stand_in, "-o", str(tmp_path / "libcuda.so.1")], check=True)
    arch = IMAGES[0][1]
    out = python(f"ARCH = '{arch}'\n{LAUNCHES}", LD_LIBRARY_PATH=str(tmp_path))
    assert out == EXPECTED.replace("ARCH", arch)
