"""Kernels compiled by NVRTC, without a GPU: the cache of cubins, and what compiling says when it fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cupy", reason="CuPy brings NVRTC's binding; pip install '.[cuda13]'")

from engine.errors import DeviceError
from engine.ops.gpu import compile as compiling
from engine.ops.gpu.compile import cubin

SOURCE = """
#ifndef STEP
#define STEP 1
#endif
extern "C" __global__ void count(int* out) { out[threadIdx.x] += STEP; }
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "count.cu"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    done: list[Path] = []
    real = compiling.compile_source

    def counted(path: Path, options: tuple[str, ...]) -> bytes:
        done.append(path)
        return real(path, options)

    monkeypatch.setattr(compiling, "compile_source", counted)
    return done


def test_a_second_call_finds_the_first_ones_file(source: Path, tmp_path: Path, compilations: list[Path]) -> None:
    first = cubin(source, "sm_90a", cache=tmp_path / "cache")
    assert first.read_bytes()[:4] == b"\x7fELF" and b"count" in first.read_bytes()
    assert cubin(source, "sm_90a", cache=tmp_path / "cache") == first
    assert len(compilations) == 1


def test_what_goes_in_decides(source: Path, tmp_path: Path, compilations: list[Path]) -> None:
    """Architecture, macros, the source and what it includes."""
    header = tmp_path / "step.h"
    header.write_text("#define STEP 3\n")
    cache = tmp_path / "cache"
    made = {
        cubin(source, "sm_90a", cache=cache),
        cubin(source, "sm_80", cache=cache),
        cubin(source, "sm_90a", defines=("STEP=2",), cache=cache),
    }
    source.write_text('#include "step.h"\n' + SOURCE)
    made.add(cubin(source, "sm_90a", cache=cache))
    header.write_text("#define STEP 4\n")
    made.add(cubin(source, "sm_90a", cache=cache))
    assert len(made) == len(compilations) == 5


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_file_is_made_anew(source: Path, tmp_path: Path, compilations: list[Path], damage: str) -> None:
    cache = tmp_path / "cache"
    path = cubin(source, "sm_90a", cache=cache)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"empty": b"", "cut": whole[:-1], "flipped": flipped}[damage])
    assert cubin(source, "sm_90a", cache=cache).read_bytes() == whole
    assert len(compilations) == 2 and len(list(cache.iterdir())) == 1


def test_processes_may_compile_at_once(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from engine.ops.gpu.compile import cubin;"
        "print(cubin(Path(sys.argv[1]), 'sm_80', cache=Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
    root = Path(__file__).resolve().parent.parent
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].strip() for process in running]
    assert all(process.returncode == 0 for process in running)
    assert all(Path(path).read_bytes()[:4] == b"\x7fELF" for path in printed)
    assert not list((tmp_path / "cache").glob(".*"))


def test_refusals_carry_the_compilers_log(source: Path, tmp_path: Path) -> None:
    source.write_text('extern "C" __global__ void broken() { undeclared = 1; }\n')
    with pytest.raises(DeviceError, match=r"NVRTC refuses count\.cu .*\n(.*\n)*.*undeclared"):
        cubin(source, "sm_90a", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_an_architecture_nobody_has(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="sm_11"):
        cubin(source, "sm_11", cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="set ENGINE_CACHE"):
        cubin(source, "sm_80", cache=tmp_path / "file" / "cache")
