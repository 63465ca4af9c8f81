"""Everything this repository can show on a machine with an NVIDIA GPU, in one command and under ten minutes:

    python tests/run_on_gpu.py --out results.json

It builds both extensions where they are (nvcc for this GPU alone), compiles all kernels by NVRTC, runs the GPU tests
with both kernel loaders, the benchmarks, and compute-sanitizer where there is one. The JSON file holds device, driver,
versions, every figure and every test's outcome; it is written anew after each stage, so what was measured survives
whatever comes later. A stage that fails or runs out of its time is recorded, and the next one begins. At the end the
targets stand beside the figures.

It works from a checkout in place and without network. It needs Python 3.10, NumPy, ml_dtypes, CuPy, pybind11, pytest,
a C++ compiler and nvcc; --wheels names a folder of wheels to take missing packages from. --rehearse runs every stage
in its smallest form, to try the command itself (with tests/fake_gpu on PYTHONPATH: without a GPU).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("numpy", "ml_dtypes", "cupy", "pybind11", "pytest")
BUILD = "build"  # under the root: what is in between
CORES = min(16, len(os.sched_getaffinity(0)))  # compilers at once: each takes up to a gigabyte
TAIL = 4000  # characters of a failed stage's output that are kept
MODELS = ("qwen2.5-7b", "llama-3.1-8b", "qwen3-8b")

# Emulator tests that run on the GPU through the plugin, and packages besides NEEDED that they import.
KERNEL_TESTS: dict[str, tuple[str, ...]] = {
    "tests/test_cuda_rows.py": (),
    "tests/test_cuda_prepare.py": (),
    "tests/test_cuda_linear.py": (),
    "tests/test_cuda_attention.py": (),
    "tests/test_cuda_sample.py": (),
    "tests/test_gpu_backend.py": ("safetensors", "tokenizers"),
}
GPU_TESTS: dict[str, tuple[str, ...]] = {"tests/test_on_gpu.py": (), "tests/test_instructions_on_gpu.py": ()}

Report = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A command with its share of the time, and what to do with the file it leaves."""

    name: str
    command: Sequence[str]
    seconds: float
    result: Path | None = None
    read: Callable[[Path], Any] = field(default=lambda path: json.loads(path.read_text()))
    environment: Mapping[str, str] = field(default_factory=dict)


def main() -> int:
    options = parse()
    os.chdir(ROOT)
    sys.path.insert(1, str(ROOT))
    unpack(options.wheels)
    missing = [name for name in NEEDED if not importable(name)]
    if missing:
        print(f"missing: {', '.join(missing)}; install them, or give --wheels DIR with their wheels", file=sys.stderr)
        return 1
    report: Report = {"what": "sharq-engine on a GPU", "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    report |= {"rehearsal": options.rehearse, "stages": [], "tests": {}, "figures": {}, "targets": []}
    deadline = time.monotonic() + options.seconds
    for stage in stages(options, report):
        if stage.name != "device" and options.only and not stage.name.startswith(tuple(options.only)):
            continue
        run(stage, deadline, report)
        report["targets"] = targets(report["figures"], report["tests"])
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report))
    return 0 if all(stage["outcome"] in ("ok", "skipped") for stage in report["stages"]) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results.json"), help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=560, help="for everything (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to take missing packages from")
    parser.add_argument("--only", nargs="*", help="stages whose names begin so, e.g. build test bench-model")
    parser.add_argument("--rehearse", action="store_true", help="every stage in its smallest form; builds nothing")
    options = parser.parse_args()
    options.out = options.out.absolute()
    return options


def unpack(wheels: Path | None) -> None:
    """Wheels are zip archives of packages; what is installed already stays first."""
    if wheels is None:
        return
    folder = ROOT / BUILD / "gpu_wheels"
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path.append(str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))


def commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


# ---- the stages ------------------------------------------------------------------------------------------------------


def stages(options: argparse.Namespace, report: Report) -> Iterator[Stage]:
    """In the order of what is worth most. A later stage's command may depend on what earlier ones reported."""
    work = ROOT / BUILD / "gpu_results"
    work.mkdir(parents=True, exist_ok=True)
    for old in work.iterdir():
        old.unlink()
    python = [sys.executable]
    yield Stage("device", [*python, __file__.replace(".py", "_steps.py"), "device", str(work / "device.json")], 60,
                work / "device.json")  # fmt: skip
    arch = report["figures"].get("device", {}).get("arch", "sm_90a")
    if not options.rehearse:
        steps = [*python, __file__.replace(".py", "_steps.py")]
        cores = {"ENGINE_BUILD_JOBS": str(CORES), "ENGINE_CUDA_ARCHITECTURES": arch}
        yield Stage("build-cuda", [*steps, "build-cuda"], 150, environment=cores)
        yield Stage("build-cpu", [*steps, "build-cpu"], 100, environment=cores)
        yield Stage("compile-nvrtc", [*steps, "nvrtc", str(work / "nvrtc.json")], 120, work / "nvrtc.json")
    few = ["-k", "silu or embed or small_re or captured or errors_name"] if options.rehearse else []
    yield pytest_stage("test-on-gpu", available(GPU_TESTS), few, 200 if options.rehearse else 75, work)
    plugin = [*few, "-p", "gpu_for_emulator", "--kernel-loader"]
    yield pytest_stage("test-kernels-nvrtc", available(KERNEL_TESTS), [*plugin, "nvrtc"], 120, work)
    yield from benchmarks(options, work)
    if extension_is_built() and not options.rehearse:
        yield pytest_stage("test-kernels-extension", available(KERNEL_TESTS), [*plugin, "extension"], 120, work)
    yield from sanitizer(options)


def available(tests: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Those whose packages are here."""
    return [name for name, needs in tests.items() if all(map(importable, needs))]


def importable(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def pytest_stage(name: str, files: Sequence[str], options: Sequence[str], seconds: float, work: Path) -> Stage:
    result = work / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={result}", *options, *files]
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests")]))
    return Stage(name, command, seconds, result, outcomes, {"PYTHONPATH": paths})


def benchmarks(options: argparse.Namespace, work: Path) -> Iterator[Stage]:
    """Short ones each, so that one that hangs or fails costs little."""

    def bench(name: str, seconds: float, *arguments: str) -> Stage:
        result = work / f"{name}.json"
        command = [sys.executable, "-m", "engine.bench", "-v", *arguments, "--device", "cuda", "--save", str(result)]
        return Stage(f"bench-{name}", command, seconds, result)

    if options.rehearse:
        methods = ("--methods", "bf16", "sharq", "--layers", "qkv", "--seconds", "0.01")
        yield bench("gemm", 300, "gemm", "--model", "tiny", "--m", "1", "16", "80", *methods)
        yield bench("attention", 300, "attention", "--model", "tiny", "--context", "20", "--prefill", "20",
                    "--batch", "1", "2", "--seconds", "0.01")  # fmt: skip
        yield bench("model", 300, "model", "--shape", "tiny", "--quant", "sharq", "--depth", "5", "--pp", "4", "--tg",
                    "2", "--repetitions", "1", "--graph-batch", "1", "2")  # fmt: skip
        return
    decode = ("--m", "1", "4", "16", "64", "--methods", "bf16", "w4a16", "nvfp4", "sharq", "fp8", "--seconds", "0.1")
    first, *others = MODELS
    yield bench(f"gemm-{first}", 60, "gemm", "--model", first, *decode)
    for quant, graded in (("sharq", ()), ("bf16", ()), ("w4a16", ()), ("sharq", ("--deterministic",))):
        name = f"model-{first}-{quant}{'-deterministic' if graded else ''}"
        yield bench(name, 45, "model", "--shape", first, "--quant", quant, "--depth", "512", "--pp", "512", "--tg",
                    "64", "--repetitions", "3", "--graph-batch", "1", "16", *graded)  # fmt: skip
    prefill = ("--m", "128", "256", "1024", "4096", "--methods", "bf16", "w4a16", "nvfp4", "sharq", "--seconds", "0.1")
    yield bench(f"gemm-prefill-{first}", 60, "gemm", "--model", first, "--layers", "qkv", "gate_up", "down", *prefill)
    yield bench("attention", 30, "attention", "--seconds", "0.1")
    few = ("--context", "4096", "32768", "--prefill", "2048", "--kv-cache-dtype", "fp8")
    yield bench("attention-fp8", 20, "attention", "--seconds", "0.1", *few)
    for model in others:
        yield bench(f"gemm-{model}", 40, "gemm", "--model", model, "--layers", "gate_up", "down", *decode)


def sanitizer(options: argparse.Namespace) -> Iterator[Stage]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None or options.rehearse:
        return
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_on_gpu.py", "-k", "small"]
    for check in ("memcheck", "racecheck"):
        yield Stage(f"sanitizer-{check}", [tool, "--tool", check, "--error-exitcode", "9", *tests], 60)


def extension_is_built() -> bool:
    return (ROOT / "engine" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}").exists()


# ---- running them ----------------------------------------------------------------------------------------------------


def run(stage: Stage, deadline: float, report: Report) -> None:
    """Run one stage, in a process group of its own, and keep what it left."""
    limit = min(stage.seconds, deadline - time.monotonic())
    entry: Report = {"name": stage.name, "command": " ".join(map(str, stage.command)), "outcome": "no time left"}
    report["stages"].append(entry)
    if limit < 2:
        return
    print(f"{stage.name} (at most {limit:.0f} s) …", file=sys.stderr, flush=True)
    start = time.monotonic()
    environment = os.environ | dict(stage.environment)
    with subprocess.Popen(
        stage.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
            entry["outcome"] = "ok" if process.returncode == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            entry["outcome"] = f"stopped after {limit:.0f} s"
    entry["seconds"] = round(time.monotonic() - start, 1)
    if entry["outcome"] != "ok":
        entry["output"] = output[-TAIL:]
    print(f"{stage.name}: {entry['outcome']}, {entry['seconds']} s", file=sys.stderr, flush=True)
    if stage.result is not None and stage.result.exists():
        found = stage.read(stage.result)
        kind = "tests" if stage.result.suffix == ".xml" else "figures"
        report[kind][stage.name.removeprefix("bench-")] = found


def outcomes(path: Path) -> Report:
    """Counts, and every failed or skipped test with its reason's beginning, from pytest's XML report."""
    found: Report = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            found["failed"][name] = f"{problem.get('message', '')}\n{problem.text or ''}"[-TAIL:]
        elif skipped is not None:
            found["skipped"][name] = skipped.get("message", "")[:200]
        else:
            found["passed"] += 1
    return found


# ---- targets ---------------------------------------------------------------------------------------------------------

Found = tuple[str, float | None]  # where it was found, and what


def targets(figures: Mapping[str, Any], tests: Mapping[str, Report]) -> list[Report]:
    """What was aimed at, beside the figures found for it, of which the worst decides; none: not measured."""
    gemm = [row for name, report in figures.items() if name.startswith("gemm") for row in report["rows"]]
    products = [row for row in gemm if not row["layer"].startswith("prepare")]
    large = [row for row in products if row["method"] == "sharq" and row["bytes"] >= 30e6 and row["M"] <= 64]
    first, few = [row for row in large if row["M"] == 1], [row for row in large if row["M"] <= 16]
    many = [row for row in products if row["M"] >= 256]
    steps = model_rows(figures, "model-qwen2.5-7b-sharq")
    attention = [row for name in ("attention", "attention-fp8") for row in figures.get(name, {}).get("rows", [])]
    answers = [row for row in attention if row["new"] == 1 and row["bytes"] >= 64e6]
    return [
        target("tests failed on the GPU", 0, failures(tests), most=True),
        target("fused SharQ, M = 1, 30 MB or more: share of read bandwidth", 0.85, column(first, "of_ceiling"), 0.92),
        target("  M = 1 … 16: x cuBLAS bf16", 3.0, column(few, "times_cublas_bf16")),
        target("  M = 1 … 16: x cuBLASLt FP8", 1.6, column(few, "times_cublaslt_fp8")),
        target("  a product's time, M = 16 / M = 1", 1.25, ratios(large, 16, 1), most=True),
        target("Qwen2.5-7B, context 512, a step of 1: share of bandwidth", 0.6, step(steps, 1, "of_ceiling"), 0.78),
        target("  tokens/s, a CUDA graph", 560, step(steps, 1, "tokens_per_s")),
        target("  tokens/s, decoding through Python", 560, model_column(steps, "tg", "tokens_per_s")),
        target("  a step's time, 16 sequences / 1", 1.25, step_ratio(steps), most=True),
        target("prefill, M >= 256, bf16: x cuBLAS bf16", 0.9, prefill(many, "bf16"), 0.95),
        target("  w4a16", 0.9, prefill(many, "w4a16"), 0.95),
        target("  sharq", 0.5, prefill(many, "sharq"), 0.67),
        target("  sharq, the sparse path alone", None, prefill(many, "sharq-backbone")),
        target("prepare kernels, the largest M: share of bandwidth", 0.7, prepared(gemm)),
        target("decode attention, K and V of 64 MB: share of bandwidth", 0.7, column(answers, "of_ceiling"), 0.9),
        target("deterministic / default, tokens/s: a step of 1", None, determinism(figures, "step1 ")),
        target("  a prompt of 512", None, determinism(figures, "pp512 ")),
    ]  # fmt: skip


def target(
    what: str, bound: float | None, found: Sequence[Found], goal: float | None = None, *, most: bool = False
) -> Report:
    """bound: what must be met, None for what is only told; goal: what is hoped for; most: less is better."""
    measured = sorted([(value, where) for where, value in found if value is not None], reverse=most)
    (worst, where), (best, _) = (measured[0], measured[-1]) if measured else ((None, None), (None, None))
    met = None if worst is None or bound is None else worst <= bound if most else worst >= bound
    return {
        "what": what, "bound": bound, "goal": goal, "at_most": most, "worst": worst, "where": where, "best": best,
        "of": len(measured), "met": met,
    }  # fmt: skip


def place(row: Report) -> str:
    """Where a benchmark's row was measured."""
    return " ".join(str(row[key]) for key in ("model", "layer", "test") if key in row) + (
        f" M = {row['M']}" if "M" in row else ""
    )


def column(rows: Sequence[Report], name: str) -> list[Found]:
    return [(place(row), row[name]) for row in rows]


def failures(tests: Mapping[str, Report]) -> list[Found]:
    return [(name, len(found["failed"])) for name, found in tests.items()]


def prefill(rows: Sequence[Report], method: str) -> list[Found]:
    return column([row for row in rows if row["method"] == method], "times_cublas_bf16")


def ratios(rows: Sequence[Report], above: int, below: int) -> list[Found]:
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        times.setdefault(f"{row['model']} {row['layer']}", {})[row["M"]] = row["microseconds"]
    return [(name, round(t[above] / t[below], 3)) for name, t in times.items() if above in t and below in t]


def prepared(rows: Sequence[Report]) -> list[Found]:
    own = [row for row in rows if row["layer"].startswith("prepare") and row["method"] in ("sharq", "nvfp4")]
    largest = max((row["M"] for row in own), default=0)
    return [(f"{place(row)} {row['method']}", row["of_ceiling"]) for row in own if row["M"] == largest]


def model_rows(figures: Mapping[str, Any], name: str) -> list[Report]:
    return list(figures.get(name, {}).get("rows", []))


def model_column(rows: Sequence[Report], test: str, name: str) -> list[Found]:
    return column([row for row in rows if row["test"].startswith(test)], name)


def step(rows: Sequence[Report], S: int, name: str) -> list[Found]:
    return model_column(rows, f"step{S} ", name)


def step_ratio(rows: Sequence[Report]) -> list[Found]:
    seconds = {S: S / rate for S in (1, 16) for _, rate in step(rows, S, "tokens_per_s") if rate}
    return [("16 / 1", round(seconds[16] / seconds[1], 3))] if len(seconds) == 2 else []


def determinism(figures: Mapping[str, Any], test: str) -> list[Found]:
    names = ("model-qwen2.5-7b-sharq-deterministic", "model-qwen2.5-7b-sharq")
    rates = [rate for name in names for _, rate in model_column(model_rows(figures, name), test, "tokens_per_s")]
    return [(test.strip(), round(rates[0] / rates[1], 3))] if len(rates) == 2 and rates[1] else []


def as_table(rows: Sequence[Report]) -> list[str]:
    """The targets: a verdict, what it takes, the worst figure and where it was found, the best one."""
    verdicts = {None: "", True: "met", False: "MISSED"}
    cells = [("", "", "must", "goal", "worst", "best", "of", "worst at")]
    for row in rows:
        sign = "<=" if row["at_most"] else ">="
        cells.append(
            (
                "not measured" if row["worst"] is None else verdicts[row["met"]],
                row["what"],
                "" if row["bound"] is None else f"{sign} {row['bound']}",
                *("" if row[key] is None else str(row[key]) for key in ("goal", "worst", "best")),
                str(row["of"] or ""),
                row["where"] or "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def summary(report: Report) -> str:
    device = report["figures"].get("device", {})
    lines = ["", " ".join(str(value) for value in device.values()) or "no GPU"]
    lines += [
        f"{name}: {found['passed']} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped"
        for name, found in report["tests"].items()
    ]
    lines += [f"  failed: {test}" for found in report["tests"].values() for test in found["failed"]]
    for entry in report["stages"]:
        if entry["outcome"] not in ("ok", "skipped"):
            lines.append(f"{entry['name']}: {entry['outcome']}")
    lines += ["", *as_table(report["targets"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
