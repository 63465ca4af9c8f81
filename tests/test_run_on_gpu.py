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
        (method, M) for method in ("bf16", "sharq", "sharq-backbone", "cublas-bf16") for M in (1, 16, 80)
    }
    assert {row["method"] for row in products if row["layer"] == "prepare qkv"} == {"bf16", "sharq"}
    assert all(row["times_cublas_bf16"] > 0 for row in products if row["layer"] == "qkv")
    assert report["figures"]["gemm"]["notes"] == report["figures"]["attention"]["notes"] == []  # all in CUDA graphs
    tests = [row["test"] for row in report["figures"]["model"]["rows"]]
    assert tests == ["pp4 @ d5", "tg2 @ d5", "step1 @ d5", "step2 @ d5"] and not report["figures"]["model"]["notes"]
    assert "not measured" in done.stdout
    told = {target["what"]: target for target in report["targets"]}
    assert told["tests failed on the GPU"]["met"] and told["tests failed on the GPU"]["of"] == len(report["tests"])


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
    def row(layer: str, M: int, microseconds: float, share: float, ratio: float, **other: object) -> dict[str, object]:
        return {
            "model": "m", "layer": layer, "M": M, "method": "sharq", "bytes": 40e6, "microseconds": microseconds,
            "of_ceiling": share, "times_cublas_bf16": ratio, "times_cublaslt_fp8": None, **other,
        }  # fmt: skip

    rows = [row("down", 1, 10, 0.9, 3.4), row("down", 16, 12, 0.8, 3.1), row("o", 1, 9, 0.84, 3.3)]
    rows += [
        row("down", 256, 90, 0, 0.61),
        row("down", 1024, 300, 0, 0.45),
        row("down", 1024, 9, 0, 1.2, method="bf16"),
    ]
    rows += [row("prepare qkv", M, 5, share, None) for M, share in ((256, 0.2), (1024, 0.72))]
    steps = [{"test": f"step{S} @ d512", "tokens_per_s": rate, "of_ceiling": 0.7} for S, rate in ((1, 600), (16, 8000))]
    figures = {
        "gemm-m": {"rows": rows},
        "model-qwen2.5-7b-sharq": {"rows": steps},
        "model-qwen2.5-7b-sharq-deterministic": {"rows": [{**steps[0], "tokens_per_s": 570}]},
    }
    tests = {"nvrtc": {"failed": {}}, "extension": {"failed": {"one": "why"}}}
    told = {target["what"].strip(): target for target in run_on_gpu.targets(figures, tests)}
    found = {what: (target["worst"], target["where"], target["met"]) for what, target in told.items()}
    assert found["tests failed on the GPU"] == (1, "extension", False)
    assert found["fused SharQ, M = 1, 30 MB or more: share of read bandwidth"] == (0.84, "m o M = 1", False)
    assert found["M = 1 … 16: x cuBLAS bf16"] == (3.1, "m down M = 16", True)
    assert found["M = 1 … 16: x cuBLASLt FP8"] == (None, None, None)
    assert found["a product's time, M = 16 / M = 1"] == (1.2, "m down", True)
    assert found["Qwen2.5-7B, context 512, a step of 1: share of bandwidth"] == (0.7, "step1 @ d512", True)
    assert found["tokens/s, a CUDA graph"][0] == 600
    assert found["a step's time, 16 sequences / 1"] == (1.2, "16 / 1", True)
    assert found["prefill, M >= 256, bf16: x cuBLAS bf16"] == (1.2, "m down M = 1024", True)
    assert found["sharq"] == (0.45, "m down M = 1024", False) and told["sharq"]["best"] == 0.61
    assert found["prepare kernels, the largest M: share of bandwidth"] == (0.72, "m prepare qkv M = 1024 sharq", True)
    assert found["deterministic / default, tokens/s: a step of 1"] == (0.95, "step1", None)
    lines = {line[14:60].strip(): line for line in run_on_gpu.as_table(list(told.values()))}
    missed = next(line for what, line in lines.items() if what.startswith("fused SharQ"))
    assert missed.split()[0] == "MISSED" and ">= 0.85" in missed and missed.endswith("m o M = 1")
