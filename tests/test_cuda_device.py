"""A GPU's memory, errors and launches, on the stand-in for CuPy (tests/fake_gpu).

What was loaded runs, what fails is told, and kernels overlap where they may.

Where only memory matters, nothing is launched: the stand-in's allocations are counted, kernels do not run.
"""

from __future__ import annotations

import gc
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CASES, write_model

from engine import LLM, SamplingParams
from engine.core import Batch
from engine.errors import CapacityError, DeviceError, EngineClosed, InvalidArgument, KernelFault
from engine.ops.backends import select_backend
from engine.ops.gpu import kernel_loaders
from engine.ops.gpu.cuda_device import CudaDevice
from engine.ops.gpu.emulator import EmulatedModule
from engine.ops.gpu.launch import Launch
from engine.ops.gpu.launch_attention import AttentionShape, most_scratch, plan_attention
from engine.ops.gpu.launch_linear import plan_decode
from engine.runner import ModelRunner
from engine.sampler import SamplerState

try:
    EmulatedModule.compile("embed.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

FAKE_GPU = Path(__file__).resolve().parent / "fake_gpu"
CONTEXT = 2048


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """cupy.cuda of the stand-in, in place of any CuPy that is installed."""
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cupy"}
    monkeypatch.syspath_prepend(str(FAKE_GPU))
    yield importlib.import_module("cupy.cuda")
    for name in [name for name in sys.modules if name.split(".")[0] == "cupy"]:
        del sys.modules[name]
    sys.modules.update(others)


@pytest.fixture
def idle(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, whose kernels do nothing."""
    monkeypatch.setattr(CudaDevice, "launch", lambda device, launch: None)
    return cuda


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of long contexts, so that attention is split, and a K of three slices, so that products are."""
    tiny = CASES["qwen3_tied"]
    config = {**tiny.config, "max_position_embeddings": CONTEXT, "intermediate_size": 640}
    monkeypatch.setitem(CASES, "split", replace(tiny, config=config))
    return write_model("split", tmp_path)


def load(path: Path, **options: Any) -> LLM:
    most = {"max_num_seqs": 6, "max_num_batched_tokens": 90, "kv_cache_bytes": None}
    return LLM(path, device="cuda", dtype="bfloat16", **{**most, **options})


def taken(cuda: Any) -> int:
    gc.collect()
    free, total = cuda.runtime.memGetInfo()
    return total - free


# ---- steps after loading ---------------------------------------------------------------------------------------------


def batch(new_tokens: Sequence[int], context: int, decode_rows: int | None = None) -> Batch:
    """Sequences that end with so many new tokens each; all rows are asked for, but one."""
    ends = np.cumsum([0, *new_tokens]).astype(np.int32)
    T, S = int(ends[-1]), len(new_tokens)
    positions = np.concatenate([np.arange(context - n, context) for n in new_tokens]).astype(np.int32)
    tables = np.zeros((S, -(-context // 16)), np.int32)
    rows = np.arange(1 if T > 1 else 0, T, dtype=np.int32)
    return Batch(
        np.zeros(T, np.int32), positions, positions % 16, ends, np.full(S, context, np.int32), tables, rows, decode_rows
    )


def run_large_steps(runner: ModelRunner, S: int, T: int) -> None:
    """Every way to share a step's tokens out that could take most of something, in two orders."""
    context = runner.plan.max_model_len
    whole = [min(T, context)]
    each = [min(T // S, context)] * S
    ones = [[1] * n for n in range(S, 0, -1)]
    uneven = [min(5, context)] * (S - 1) + [min(T - 5 * (S - 1), context)]
    shapes = [whole, each, *ones, uneven, [min(19, context)] * (T // 19)]
    states = [SamplerState(SamplingParams(temperature=0.5, presence_penalty=1.0), seed=0)] * S
    for new_tokens in [*shapes, *reversed(shapes)]:
        for decode_rows in (None, 0):
            hidden = runner.hidden(batch(new_tokens, context, decode_rows))
            runner.logits(hidden, range(min(len(hidden), 64)))
            n = min(len(hidden), S)
            runner.choose(hidden, range(n), states[:n])


METHODS = [
    {},
    {"quant": "sharq", "quant_head": "nvfp4"},
    {"quant": "sharq", "deterministic": True},
    {"quant": "sharq", "sharq_scale": "tensor", "quant_head": "fp8"},
    {"quant": "fp8", "quant_head": "fp8"},
    {"quant": "w4a16", "kv_cache_dtype": "fp8"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_what_was_loaded_never_runs_out(
    idle: Any, model: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """On GPUs of ever less memory: a model is refused, or its largest steps run."""
    before = taken(idle)
    with load(model, **options) as llm:
        cache = llm._plan.nbytes
        needed = taken(idle) - before - cache
    passed = 0
    for room in (cache, cache // 16, cache // 64, 0, -needed // 4):
        monkeypatch.setattr(idle, "TOTAL", before + needed + room)
        try:
            llm = load(model, **options)
        except CapacityError:
            continue
        passed += 1
        with llm:
            run_large_steps(llm._worker._runner, 6, 90)
    assert 2 <= passed <= 4, "some were to be refused"
    assert taken(idle) == before, "all memory comes back"


def test_steps_take_little_beyond_what_is_reserved(idle: Any, model: Path) -> None:
    """Arrays in passing and a few bytes for each recording."""
    with load(model, quant="sharq") as llm:
        reserved = taken(idle)
        run_large_steps(llm._worker._runner, 6, 90)
        assert taken(idle) - reserved < 20_000
        run_large_steps(llm._worker._runner, 6, 90)
        assert taken(idle) - reserved < 20_000


def test_a_cpu_rehearses_nothing(model: Path) -> None:
    assert select_backend("numpy").rehearsal() is None and select_backend("cpu").rehearsal() is None


# ---- too little memory -----------------------------------------------------------------------------------------------


def refusal(model: Path, **options: Any) -> str:
    with pytest.raises(CapacityError) as caught:
        load(model, **options)
    return str(caught.value)


def test_what_is_refused_says_what_fits(idle: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = taken(idle)
    with load(model, max_model_len=512) as llm:
        weights = taken(idle) - before - llm._plan.nbytes  # and scratch
    monkeypatch.setattr(idle, "TOTAL", before + 50_000)
    assert refusal(model).startswith("the weights do not fit: the GPU has no ") and "a quant of" in refusal(model)
    monkeypatch.setattr(idle, "TOTAL", before + weights + 100_000)
    told = refusal(model, max_model_len=512)
    fitting = int(told.partition(" holds ")[2].split()[0])
    assert 16 <= fitting < 512
    load(model, max_model_len=fitting).close()
    told = refusal(model, max_model_len=64, max_num_batched_tokens=4000, max_num_seqs=60)
    assert told.startswith("steps of up to 4000 tokens and 60 sequences of 64 tokens do not fit beside the weights (")
    largest = {name: int(value) for name, value in re.findall(r"(max_num_\w+)=(\d+)", told)}
    assert 16 <= largest["max_num_seqs"] <= 60 and 16 <= largest["max_num_batched_tokens"] < 4000
    load(model, max_model_len=64, **largest).close()
    monkeypatch.setattr(idle, "TOTAL", before + weights + (30 << 20))
    assert "refuses a KV cache of 1024 MiB" in refusal(model, kv_cache_bytes=1 << 30, max_num_seqs=100_000)
    assert taken(idle) == before


@pytest.mark.parametrize("where", ["in a step", "in a recording"])
def test_running_out_in_a_step_ends_the_engine_and_only_it(
    idle: Any, model: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Another process took the memory that was kept for the driver."""
    before = taken(idle)
    llm = load(model)
    original = CudaDevice.zeros

    def full(device: CudaDevice, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        if (where == "in a recording") == (device._captured is not None):
            monkeypatch.setattr(idle, "TOTAL", 0)
        return original(device, shape, dtype)

    monkeypatch.setattr(CudaDevice, "zeros", full)
    with pytest.raises(EngineClosed, match=r"the engine stopped: the GPU has no \d+ MiB left") as caught:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    assert isinstance(caught.value.__cause__, CapacityError)
    with pytest.raises(EngineClosed):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
    llm.close()
    monkeypatch.undo()
    del llm, caught
    assert taken(idle) == before


# ---- bounds ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.sampled_from([(2, 2, 64), (14, 2, 128), (20, 1, 64), (32, 8, 128), (48, 2, 256)]),
    st.integers(1, 40_000),
    st.sampled_from([None, 100, 5000]),
)
def test_no_step_takes_more_scratch_for_attention(
    counts: list[int], heads: tuple[int, int, int], longest: int, window: int | None
) -> None:
    shape = AttentionShape(*heads)
    limits = {"tokens": sum(counts), "sequences": len(counts), "context": longest + max(counts)}
    contexts = [n + longest * i // len(counts) for i, n in enumerate(counts)]
    step = batch(counts, 64)
    step = Batch(*[getattr(step, f) for f in ("token_ids", "positions", "slot_mapping", "query_start")],
                 np.array(contexts, np.int32), step.block_tables, step.logit_rows)  # fmt: skip
    plan = plan_attention(step, shape, window)
    partials, arrivals = most_scratch(shape, **limits)
    assert plan.partials_size(shape) <= partials and plan.arrivals_size(shape) <= arrivals
    covered = [i for part in plan.rounds for i in range(len(plan.decode_items))[part]]
    assert covered == list(range(len(plan.decode_items)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4096), st.integers(1, 40_000), st.integers(1, 20_000), st.integers(1, 200), st.sampled_from([1, 2])
)
def test_room_for_many_tokens_is_room_for_fewer(M: int, N: int, K: int, sms: int, paths: int) -> None:
    plan = plan_decode(M, N, K, sms=sms, unit_k=64, unit_bytes=2048, padding=64, paths=paths)
    for fewer in {1, M // 2, M - M % 32, M - 1, M} - {0}:
        cut = plan_decode(fewer, N, K, sms=sms, unit_k=64, unit_bytes=2048, padding=64, paths=paths).cut
        assert cut.partials <= cut.room <= plan.cut.room and cut.arrivals <= 4 * sms


# ---- launches that overlap -------------------------------------------------------------------------------------------


class Extension:
    """engine._cuda, as far as it is told which kernels overlap the one before."""

    def __init__(self) -> None:
        self.overlaps: list[bool] = []
        self.recorded: list[bool] = []

    def Kernels(self, arch: str, device: int, debug: bool) -> Any:  # a class there
        return self

    def launch(self, launch: Launch, stream: int, overlaps: bool = False) -> None:
        self.overlaps.append(overlaps)

    def Recording(self, kernels: Any, launches: list[Launch], overlaps: list[bool]) -> Any:
        self.recorded = overlaps
        return self


@pytest.mark.parametrize(("arch", "debug"), [("sm_90a", False), ("sm_80", False), ("sm_90a", True)])
def test_kernels_overlap_the_kernel_before(cuda: Any, monkeypatch: pytest.MonkeyPatch, arch: str, debug: bool) -> None:
    """Where the one waits for the other, and nothing else lies between them."""
    extension = Extension()
    monkeypatch.setattr(kernel_loaders, "extension", lambda: extension)
    major, minor = divmod(int(arch[3:5]), 10)
    properties = cuda.runtime.getDeviceProperties
    monkeypatch.setattr(
        cuda.runtime, "getDeviceProperties", lambda index: {**properties(index), "major": major, "minor": minor}
    )
    device = CudaDevice("extension", debug=debug)
    array = device.zeros((4,), np.dtype(np.float32))
    waits = Launch("embed.cu", "embed_f32_f32", (1, 1, 1), (32, 1, 1), 0, [])
    does_not = waits._replace(source="read_bandwidth.cu")

    def told(*work: Any) -> list[bool]:
        extension.overlaps.clear()
        for call in work:
            call() if callable(call) else device.launch(call)
        return extension.overlaps

    def between(call: Any) -> list[bool]:
        return told(waits, call, waits, waits)

    no = arch == "sm_80" or debug
    yes = [not no]
    assert told(lambda: device.zeros((4,), array.dtype), waits, waits, does_not, waits) == [False, *yes, False, *yes]
    for call in (
        lambda: device.zeros((4,), array.dtype),
        lambda: device.write(array, np.zeros(4, np.float32)),
        lambda: device.download(array),
        lambda: device.upload(np.zeros(4, np.float32)),
    ):
        assert between(call)[1:] == [False, *yes]
    extension.overlaps.clear()
    graph = device.capture(lambda: [device.launch(waits) for _ in range(2)])
    assert extension.overlaps[2:] == [False, *yes], "a graph's first kernel follows none"
    assert told(waits, graph.run, waits)[1:] == [False]
    device.record([waits, waits, does_not, waits])
    assert extension.recorded == [False, *yes, False, *yes]


# ---- errors that come late -------------------------------------------------------------------------------------------


def reads_nothing(device: CudaDevice) -> Launch:
    """A kernel of the tests that follows a null pointer, behind one that does not."""
    array = device.zeros((64,), np.dtype(np.uint32))
    out = device.zeros((1,), np.dtype(np.uint32))
    good = Launch("read_bandwidth.cu", "read_bandwidth", (1, 1, 1), (64, 1, 1), 0, [array, np.int64(16), out])
    device.launch(good)
    return good._replace(args=[None, np.int64(16), out])


@pytest.mark.parametrize("call", ["download", "write", "zeros", "launch", "synchronize", "capture", "free_bytes"])
def test_a_kernel_that_failed_is_told_by_the_next_call(cuda: Any, call: str) -> None:
    device = CudaDevice()
    array = device.zeros((4,), np.dtype(np.float32))
    bad = reads_nothing(device)
    device.launch(bad)  # nothing is known yet
    calls = {
        "download": lambda: device.download(array),
        "write": lambda: device.write(array, np.zeros(4, np.float32)),
        "zeros": lambda: device.zeros((4,), np.dtype(np.float32)),
        "launch": lambda: device.launch(bad),
        "synchronize": device.synchronize,
        "capture": lambda: device.capture(lambda: None),
        "free_bytes": device.free_bytes,
    }
    with pytest.raises(DeviceError, match=r"illegal memory access[\s\S]*device='cuda:debug'"):
        calls[call]()
    cuda.reset()


def test_debug_names_the_kernel(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = CudaDevice(debug=True)
    bad = reads_nothing(device)
    with pytest.raises(DeviceError, match="running read_bandwidth of read_bandwidth.cu: cudaErrorIllegalAddress"):
        device.launch(bad)
    cuda.reset()
    good = bad._replace(args=[device.zeros((64,), np.dtype(np.uint32)), *bad.args[1:]])
    graph = device.capture(lambda: device.launch(good))
    graph.run()

    def fails(*_: Any) -> None:
        raise KernelFault("planted")

    monkeypatch.setattr(sys.modules["cupy"], "emulated_launch", fails)
    with pytest.raises(DeviceError, match="a graph of read_bandwidth: cudaErrorIllegalAddress.*planted"):
        graph.run()
    cuda.reset()


def test_the_user_can_ask_for_it(cuda: Any) -> None:
    assert "debug" in select_backend("cuda:debug").kernel_path
    assert "debug" not in select_backend("cuda").kernel_path
    with pytest.raises(InvalidArgument, match="unknown kernel loader 'other'"):
        select_backend("cuda:other:debug")
