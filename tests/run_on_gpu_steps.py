"""The steps of tests/run_on_gpu.py that are code of this repository's own, each in a process of its own.

device FILE       what GPU, driver and versions there are
build-cuda        engine._cuda in place; build-cpu: engine._native
nvrtc FILE        all kernels by NVRTC into the disk cache, a process per core
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import sysconfig
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def device(out: Path) -> None:
    from engine.ops.gpu.compile import nvrtc_version
    from engine.ops.gpu.cuda_device import CudaDevice

    gpu = CudaDevice()
    found = {"name": gpu.name, "arch": gpu.arch, "sms": gpu.sms, "l2_bytes": gpu.l2_bytes}
    found |= {"memory_bytes": gpu.memory_bytes, **gpu.versions(), "nvrtc": ".".join(map(str, nvrtc_version()))}
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    for name, command in (
        ("nvidia_smi", ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]),
        ("nvcc", ["nvcc", "--version"]),
    ):
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout
            found[name] = text.strip().splitlines()[-1] if text.strip() else None
        except OSError:
            found[name] = None
    out.write_text(json.dumps(found))


def build(name: str) -> None:
    """As setup.py does, with or without setuptools: images with Python 3.12 may lack it."""
    os.chdir(ROOT)
    code = _setup()
    target = ROOT / "engine" / f"_{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if name == "cuda":
        code["build_cuda"](target, Path("build/on_gpu/engine_cuda"))
        return
    builder = code["BuildNative"].__new__(code["BuildNative"])
    builder.build_temp = "build/on_gpu"
    builder._build(target)


def _setup() -> dict[str, Any]:
    """setup.py's names, without setting anything up."""
    stand_in: Any = types.ModuleType("setuptools")
    stand_in.setup = lambda **_: None
    stand_in.Extension = lambda *_, **__: None
    command: Any = types.ModuleType("setuptools.command.build_ext")
    command.build_ext = object
    errors: Any = types.ModuleType("setuptools.errors")
    errors.CompileError = type("CompileError", (Exception,), {})
    modules = {"setuptools": stand_in, "setuptools.command": types.ModuleType("setuptools.command")}
    sys.modules |= modules | {"setuptools.command.build_ext": command, "setuptools.errors": errors}
    code: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "setup"}
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), code)
    return code


def nvrtc(out: Path) -> None:
    from engine.ops.gpu.compile import kernel_files
    from engine.ops.gpu.cuda_device import CudaDevice

    arch = CudaDevice().arch
    names = kernel_files(arch)
    start = time.monotonic()
    cores = min(16, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        problems = dict(zip(names, pool.map(_compiled, names, [arch] * len(names)), strict=True))
    failed = {name: problem for name, problem in problems.items() if problem}
    out.write_text(json.dumps({"files": len(names), "seconds": time.monotonic() - start, "failed": failed}))
    if failed:
        sys.exit("\n".join(failed.values()))


def _compiled(name: str, arch: str) -> str | None:
    from engine.errors import DeviceError
    from engine.ops.gpu.compile import cubin

    try:
        cubin(name, arch)
    except DeviceError as problem:
        return str(problem)
    return None


if __name__ == "__main__":
    step, *arguments = sys.argv[1:]
    if step.startswith("build-"):
        build({"build-cuda": "cuda", "build-cpu": "native"}[step])
    else:
        {"device": device, "nvrtc": nvrtc}[step](*map(Path, arguments))
