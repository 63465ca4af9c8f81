"""The command for a machine with a GPU, rehearsed without one: tests/fake_gpu stands in for CuPy and engine._cuda.

Everything the command starts runs here, in its smallest form, and without the packages that such a machine may lack; so
what is left for hardware to show is hardware's. Figures are not looked at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_on_gpu

from engine.errors import DeviceError
from engine.ops.gpu.emulator import EmulatedModule

ROOT = Path(__file__).resolve().parent.parent
MAY_BE_MISSING = ("tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm", "hypothesis")

try:
    EmulatedModule.compile("embed.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)


def test_the_rehearsal_passes(tmp_path: Path) -> None:
    for package in MAY_BE_MISSING:
        (tmp_path / f"{package}.py").write_text("raise ImportError('a machine without it')")
    paths = os.pathsep.join([str(ROOT / "tests" / "fake_gpu"), str(tmp_path)])
    environment = os.environ | {"PYTHONPATH": paths, "FAKE_GPU_EXTENSION": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTEST_ADDOPTS"] = "-p no:hypothesispytest"  # its plugin is found though the package is not
    command = [sys.executable, "tests/run_on_gpu.py", "--rehearse", "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert {stage["outcome"] for stage in report["stages"]} <= {"ok", "skipped"}
    assert report["figures"]["device"]["name"] == "Emulated GPU, sm_90a, NVRTC"
    for tests in report["tests"].values():
        assert tests["passed"] > 5 and not tests["failed"]
    assert report["tests"]["test-on-gpu"]["passed"] >= 8 and not report["tests"]["test-on-gpu"]["skipped"]
    products = report["figures"]["gemm"]["rows"]
    assert {(row["method"], row["M"]) for row in products if row["layer"] == "qkv"} == {
        (method, M) for method in ("bf16", "sharq", "cublas-bf16") for M in (1, 16)
    }
    assert all(row["times_cublas_bf16"] > 0 for row in products if row["layer"] == "qkv")
    assert report["figures"]["gemm"]["notes"] == report["figures"]["attention"]["notes"] == []  # all in CUDA graphs
    tests = [row["test"] for row in report["figures"]["model"]["rows"]]
    assert tests == ["pp4 @ d5", "tg2 @ d5", "step1 @ d5", "step2 @ d5"] and not report["figures"]["model"]["notes"]
    assert "not measured" in done.stdout


def test_a_stage_that_hangs_or_fails_is_recorded(tmp_path: Path) -> None:
    report = {"stages": [], "tests": {}, "figures": {}}
    python = [sys.executable, "-c"]
    hangs = run_on_gpu.Stage("hangs", [*python, "import time; print('here', flush=True); time.sleep(60)"], 2.5)
    fails = run_on_gpu.Stage("fails", [*python, "raise SystemExit('why')"], 30)
    late = run_on_gpu.Stage("late", [*python, ""], 30)
    deadline = run_on_gpu.time.monotonic() + 60
    for stage, until in ((hangs, deadline), (fails, deadline), (late, run_on_gpu.time.monotonic())):
        run_on_gpu.run(stage, until, report)
    outcomes = {stage["name"]: stage["outcome"] for stage in report["stages"]}
    assert outcomes == {"hangs": "stopped after 2 s", "fails": "failed with status 1", "late": "no time left"}
    assert [stage.get("output", "").strip() for stage in report["stages"]] == ["here", "why", ""]


def test_targets_take_the_worst_figure() -> None:
    def row(layer: str, M: int, microseconds: float, share: float, ratio: float) -> dict[str, object]:
        return {
            "model": "m", "layer": layer, "M": M, "method": "sharq", "bytes": 40e6, "microseconds": microseconds,
            "of_ceiling": share, "times_cublas_bf16": ratio, "times_cublaslt_fp8": None,
        }  # fmt: skip

    rows = [row("down", 1, 10, 0.9, 3.4), row("down", 16, 12, 0.8, 3.1), row("o", 1, 9, 0.84, 3.3)]
    steps = [{"test": f"step{S} @ d512", "tokens_per_s": rate, "of_ceiling": 0.7} for S, rate in ((1, 600), (16, 8000))]
    figures = {"gemm-m": {"rows": rows}, "model-qwen2.5-7b-sharq": {"rows": steps}}
    found = {target["what"]: (target["worst"], target["met"]) for target in run_on_gpu.targets(figures)}
    values = list(found.values())
    assert values[:4] == [(0.84, False), (3.1, True), (None, None), (1.2, True)]
    assert (0.7, True) in values and (600, True) in values and (1.2, True) in values
