"""Recorded decode steps and sampling on the device: what they give is bitwise what steps run kernel by kernel give.

Compared are log-probabilities: float64 sums over whole rows of logits, in which a changed bit of a logit shows. Models
are tiny and run on the emulator, whose recordings keep to CUDA graphs' rules: they replay on the same arrays, and
nothing may be copied to or from the host in them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import write_model

import engine.llm
import engine.worker
from engine import LLM, RequestOutput, SamplingParams
from engine.core import Batch, SamplingRow, StepLimits
from engine.errors import DeviceError, NumericalError, RequestError
from engine.ops.gpu.backend import GpuOps
from engine.ops.gpu.device import EmulatedDevice
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule
from engine.ops.gpu.launch_attention import AttentionShape, num_splits, plan_attention
from engine.ops.gpu.staging import PackedArrays, Scratch, StagedDecode
from engine.ops.gpu.steps import GpuSteps, bucket
from engine.sampler import SamplerState

try:
    EmulatedModule.compile("embed.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
RNG = np.random.default_rng(11)
TOKENS = RNG.integers(0, 256, 260).tolist()
Load = Callable[..., LLM]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Load:
    """load(case, record=…, **options): a tiny model of up to 512 positions on the emulator."""

    def loaded(case: str = "qwen3_tied", *, record: bool = True, device: Any = None, **options: Any) -> LLM:
        path = write_model(case, tmp_path / case)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))

        def backend(name: str, threads: int | None, *, deterministic: bool) -> GpuOps:
            return GpuOps(device or EmulatedDevice(), deterministic=deterministic, record=record)

        monkeypatch.setattr(engine.llm, "select_backend", backend)
        return LLM(path, device="emulate", **{"dtype": "bfloat16", "max_num_seqs": 8, **options})

    return loaded


def steps_of(llm: LLM) -> GpuSteps:
    steps = llm._worker._runner._steps
    assert isinstance(steps, GpuSteps)
    return steps


def answers(outputs: Sequence[RequestOutput]) -> list[Any]:
    """Token ids and log-probabilities."""
    return [(answer.token_ids, answer.logprobs) for output in outputs for answer in output.outputs]


def lengths(*counts: int, **settings: Any) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=2, **settings) for count in counts
    ]


# ---- recorded steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("qwen3_tied", {"quant": "sharq"}),
        ("qwen3_tied", {"quant": "sharq", "sharq_scale": "tensor"}),  # one maximum for all rows of a step
        ("qwen3_tied", {"quant": "fp8", "deterministic": True}),
        ("mistral_window", {"quant": "w4a16"}),
        ("qwen2_tied_group7", {}),
        ("llama2_mha_f16", {"dtype": "float16"}),
    ],
)
def test_a_replayed_step_gives_the_same_bits(
    load: Load, monkeypatch: pytest.MonkeyPatch, case: str, options: dict[str, Any]
) -> None:
    """A batch that shrinks from 5 sequences to 1 while contexts pass blocks (16), splits and recordings (64, 128)."""
    monkeypatch.setattr("engine.ops.gpu.steps._LEAST_BLOCKS", 4)
    prompts = [TOKENS[:124], TOKENS[7:68], TOKENS[20:34], TOKENS[100:103], TOKENS[60:121]]
    assert_replayed_alike(load, case, options, prompts, [8, 6, 5, 3, 2], {(8, 8), (4, 8), (1, 16)})


def test_recordings_for_contexts_longer_than_any(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 256 blocks: partial results by the dozen and a kernel that joins them, where one split is enough."""
    monkeypatch.setattr("engine.ops.gpu.steps._LEAST_BLOCKS", 256)
    assert_replayed_alike(load, "qwen3_tied", {}, [TOKENS[:63], TOKENS[9:12]], [4, 4], {(2, 256)})


def assert_replayed_alike(
    load: Load, case: str, options: dict[str, Any], prompts: list[list[int]], counts: list[int], used: set[Any]
) -> None:
    """used: the recordings, (sequences, blocks), that must have been replayed."""
    results = []
    for record in (False, True):
        with load(case, record=record, **options) as llm:
            results.append(answers(llm.generate(prompts, lengths(*counts))))
            recorded = set(steps_of(llm)._decodes)
    assert results[1] == results[0]
    assert recorded >= used, "the recordings that the test is about"


def test_replays_under_the_checker(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """No access out of bounds and no race in what is replayed, whatever the order of threads; the same tokens."""
    monkeypatch.setattr("engine.ops.gpu.steps._LEAST_BLOCKS", 4)
    found = []
    for device in (EmulatedDevice(), EmulatedDevice(checked=True, schedule=SCHEDULES[2])):
        with load(device=device) as llm:
            params = [SamplingParams(seed=3, top_p=0.9, max_tokens=count, ignore_eos=True) for count in (5, 3, 3)]
            found.append(answers(llm.generate([TOKENS[:61], TOKENS[70:73], TOKENS[80:100]], params)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("sm_90", {"quant": "sharq", "quant_head": "fp8"}),
        ("sm_90", {"quant": "sharq-mxfp4", "kv_cache_dtype": "fp8"}),
        ("sm_90", {"quant": "w4a16", "quant_head": "nvfp4"}),
        ("sm_120a", {"quant": "sharq"}),
        ("sm_120a", {"quant": "mxfp4"}),
    ],
)
def test_kernels_wait_for_those_before_them(load: Load, arch: str, options: dict[str, Any]) -> None:
    """The checker launches decode steps' kernels as if the kernels before still ran; the second step knows what the
    first has written."""
    with load(device=EmulatedDevice(arch, checked=True), max_num_batched_tokens=8, **options) as llm:
        llm.generate([TOKENS[:3]], SamplingParams(seed=3, top_p=0.9, presence_penalty=0.5, max_tokens=3))


def test_growing_batches_and_preempted_sequences(load: Load) -> None:
    """Too few blocks for all: sequences come back, in part from the prefix cache, into other rows and buckets."""
    prompts = [TOKENS[:30], TOKENS[:40], TOKENS[50:95], TOKENS[:33]]
    results, preempted = [], []
    block_bytes = 2 * 2 * 16 * 2 * 32 * 2  # K and V, layers, tokens, KV heads, head_dim, bytes
    for record in (False, True):
        with load(record=record, max_model_len=80, kv_cache_bytes=12 * block_bytes) as llm:
            assert llm._plan.num_blocks == 12
            schedule = llm._worker._scheduler.schedule

            def counted(schedule: Any = schedule) -> Any:
                step = schedule()
                preempted.extend(step.preempted if step else ())
                return step

            llm._worker._scheduler.schedule = counted  # type: ignore[method-assign]
            results.append(answers(llm.generate(prompts, lengths(20, 20, 20, 20))))
    assert results[1] == results[0]
    assert preempted, "the pool was meant to be too small for all"


def test_a_long_prefill_between_replays(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rehearsal it makes workspaces grow; what was recorded on the smaller ones keeps them."""
    monkeypatch.setattr(GpuOps, "rehearsal", lambda ops: None)
    results = []
    for record in (False, True):
        with load(record=record, quant="sharq", enable_prefix_caching=False) as llm:
            short = [llm.generate([TOKENS[:5]], lengths(4)) for _ in range(2)]
            llm.generate([TOKENS[:200]], lengths(1))
            results.append([answers(outputs) for outputs in [*short, llm.generate([TOKENS[:5]], lengths(4))]])
    assert results[0][0] == results[0][2] and results[1] == results[0]


def test_what_a_step_asks_of_the_device(load: Load) -> None:
    """In the steady state: two transfers in, one out, no memory, hence one point at which host and device meet."""
    calls: list[str] = []

    class Counting(EmulatedDevice):
        def __getattribute__(self, name: str) -> Any:
            if name in ("empty", "zeros", "upload", "write", "download", "capture"):
                calls.append(name)
            return super().__getattribute__(name)

    with load(device=Counting(), quant="sharq") as llm:
        params = SamplingParams(temperature=1.0, seed=1, max_tokens=9, ignore_eos=True)
        per_step = []
        complete = llm._worker._scheduler.complete

        def counted(*arguments: Any) -> Any:
            per_step.append(Counter(calls))
            calls.clear()
            return complete(*arguments)

        llm._worker._scheduler.complete = counted  # type: ignore[method-assign]
        llm.generate([TOKENS[:20], TOKENS[30:40]], params)
    assert [counts["capture"] for counts in per_step] == [1, 1, *[0] * 7], "a choice and a decode step are recorded"
    assert all(counts == {"write": 2, "download": 1} for counts in per_step[2:])


def test_a_recording_must_not_copy() -> None:
    device = EmulatedDevice()
    array = device.zeros((4,), F32)
    calls: list[int] = []

    def work() -> None:
        calls.append(0)
        if len(calls) == 2:
            device.download(array)

    with pytest.raises(DeviceError, match="cannot be recorded"):
        device.capture(work)
    device.download(array)  # recording is over


def test_a_recording_zeroes_what_the_work_zeroed() -> None:
    device = EmulatedDevice()
    made: list[Any] = []
    recording = device.capture(lambda: made.append(device.zeros((3,), F32)))
    made[1][...] = 7
    recording.run()
    assert not made[1].any() and len(made) == 2


def test_buckets() -> None:
    sizes = (1, 2, 4, *range(8, 80, 8))
    assert [bucket(count) for count in range(1, 70)] == [
        next(size for size in sizes if size >= count) for count in range(1, 70)
    ]


def test_the_user_is_told(load: Load) -> None:
    with load(max_num_seqs=6) as llm:
        assert "emulated sm_90, recorded decode steps up to 6, sampling on the device" in llm.describe()


# ---- sampling on the device ------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "presence_penalty": 0.7, "frequency_penalty": -0.5},
    {"temperature": 1.0, "logit_bias": {5: 3.0, 9: -100.0}, "min_tokens": 5, "ignore_eos": False},
    {"temperature": 0.7, "top_k": 10**12, "n": 2},
]


def sampled(llm: LLM, settings: Sequence[dict[str, Any]], logprobs: int | None) -> list[list[int]]:
    params = [
        SamplingParams(**{"max_tokens": 7, "ignore_eos": True, "logprobs": logprobs, **own}, seed=2**64 - 1 - i)
        for i, own in enumerate(settings)
    ]
    prompts = [TOKENS[i : 3 * i + 4] for i in range(len(settings))]
    return [answer.token_ids for output in llm.generate(prompts, params) for answer in output.outputs]


@pytest.mark.parametrize("record", [True, False])
def test_the_host_samplers_tokens(load: Load, monkeypatch: pytest.MonkeyPatch, record: bool) -> None:
    """Asking for log-probabilities sends rows to the host, whose choice defines what is right."""
    with load(record=record) as llm:
        expected = sampled(llm, SETTINGS, logprobs=0)
        monkeypatch.setattr(engine.worker, "sample_row", None)  # nobody may call it
        assert sampled(llm, SETTINGS, logprobs=None) == expected
        assert sampled(llm, SETTINGS[:1] * 3, logprobs=None) == [expected[0], *sampled(llm, SETTINGS[:1] * 3, None)[1:]]


def test_rows_for_the_host_beside_rows_for_the_device(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with load() as llm:
        expected = sampled(llm, SETTINGS, logprobs=0)
        seen: list[int] = []
        original = engine.worker.sample_row

        def counted(row: Any, state: SamplerState, text: Any) -> Any:
            seen.append(state.position)
            return original(row, state, text)

        monkeypatch.setattr(engine.worker, "sample_row", counted)
        mixed = [{**own, "logprobs": 1 if i == 3 else None} for i, own in enumerate(SETTINGS)]
        assert sampled(llm, mixed, logprobs=None) == expected
        assert seen == list(range(7))


def test_a_row_without_a_choice_fails_alone(load: Load) -> None:
    with load() as llm:
        impossible = SamplingParams(min_tokens=1, stop_token_ids=range(llm.config.vocab_size), max_tokens=2)
        streams = [llm.stream(TOKENS[:9], params) for params in (impossible, lengths(3)[0])]
        with pytest.raises(RequestError, match="no token can be chosen at answer position 0: after min_tokens"):
            streams[0].result()
        assert len(streams[1].result().outputs[0].token_ids) == 3


def choice(**changed: Any) -> SamplingRow:
    state = SamplerState(SamplingParams(temperature=0.0, **changed), seed=1)
    return state.as_row()


def gpu_steps(ops: GpuOps) -> GpuSteps:
    cache = ops.new_kv_cache(num_layers=1, num_blocks=4, num_kv_heads=1, head_dim=32, dtype=BF16)
    return ops.new_steps(cache, num_heads=2, limits=StepLimits(4, 4, 64))


def test_unusable_logits_are_left_to_the_host() -> None:
    ops = GpuOps(EmulatedDevice())
    logits = np.zeros((4, 40), np.float32)
    logits[:3] = [[np.nan], [np.inf], [-np.inf]]
    logits[3, 17] = 2.0
    hidden, device_logits = ops.constant(np.zeros((4, 8), BF16)), ops.empty((4, 40), F32)

    def head(x: Any) -> Any:  # choosing changes nothing of rows without penalties
        return device_logits

    ops.device.write(device_logits, logits)
    assert gpu_steps(ops).choose(hidden, [0, 1, 2, 3], [choice()] * 4, head) == [None, None, None, 17]


def test_nan_in_a_layers_input_comes_with_the_tokens() -> None:
    ops = GpuOps(EmulatedDevice())
    steps = gpu_steps(ops)
    hidden = RNG.standard_normal((3, 64)).astype(BF16)
    logits = ops.constant(RNG.standard_normal((2, 40)).astype(np.float32))

    def head(x: Any) -> Any:
        ops.prepare_sharq(x)
        return logits

    on_device = ops.constant(hidden)
    chosen = steps.choose(on_device, [0, 2], [choice()] * 2, head)
    assert chosen == logits.argmax(axis=1).tolist()
    hidden[2, 5] = np.nan
    ops.device.write(on_device, hidden)
    with pytest.raises(NumericalError, match="row 1 of a layer's input"):
        steps.choose(on_device, [0, 2], [choice()] * 2, head)
    hidden[2, 5] = 0
    ops.device.write(on_device, hidden)
    assert steps.choose(on_device, [0, 2], [choice()] * 2, head) == chosen  # told once


# ---- memory ----------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([np.int32, np.uint64, np.float64, np.uint8]).map(np.dtype)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.tuples(SHAPES, DTYPES), min_size=1, max_size=6))
def test_packed_arrays_arrive_whole(layout: dict[str, Any]) -> None:
    packed = PackedArrays(EmulatedDevice(), layout)
    for i, array in enumerate(packed.host.values()):
        array[...] = np.arange(array.size).reshape(array.shape) + 20 * i
    packed.send()
    assert list(packed.device) == list(layout)
    for name, (shape, dtype) in layout.items():
        array = packed.device[name]
        assert (array.shape, array.dtype) == (shape, dtype) and array.ctypes.data % 16 == 0
        np.testing.assert_array_equal(array, packed.host[name])


@pytest.mark.parametrize(("H", "KVH", "contexts"), [(14, 2, [65, 128, 3]), (48, 2, [100, 1]), (2, 2, [7])])
def test_a_staged_decode_step_is_the_batch_with_rows_added(H: int, KVH: int, contexts: list[int]) -> None:
    """Items as they are planned for such a batch; each has partial results of its own, for the longest context."""
    device, shape, S, blocks, spare = EmulatedDevice(), AttentionShape(H, KVH, 32), 4, 8, 99
    staged = StagedDecode(device, Scratch(device), shape, S, blocks, 16, spare)
    n, ends = len(contexts), np.array(contexts, np.int32)
    for first_block in (1, 40):  # the second time over the first
        tables = np.arange(n * blocks, dtype=np.int32).reshape(n, blocks) + first_block
        slots = tables[np.arange(n), (ends - 1) // 16] * 16 + (ends - 1) % 16
        batch = Batch(
            np.arange(n, dtype=np.int32) + 5, ends - 1, slots, np.arange(n + 1, dtype=np.int32), ends, tables,
            np.arange(n, dtype=np.int32),
        )  # fmt: skip
        staged.fill(batch)
    shortest = [*range(n), *[contexts.index(min(contexts))] * (S - n)]
    np.testing.assert_array_equal(staged.token_ids, batch.token_ids[shortest])
    np.testing.assert_array_equal(staged.positions, batch.positions[shortest])
    np.testing.assert_array_equal(staged.block_tables, batch.block_tables[shortest])
    np.testing.assert_array_equal(staged.slot_mapping, [*slots, *[spare * 16] * (S - n)])

    whole = replace(batch, query_start=np.arange(S + 1, dtype=np.int32), context_lens=ends[shortest])
    expected, planned = plan_attention(whole, shape), staged.planned(shape, None)
    np.testing.assert_array_equal(planned.decode_items[:, :5], expected.decode_items[:, :5])
    longest = num_splits(0, blocks * 16 - 1)
    assert planned.plan.most_splits == longest >= expected.most_splits
    np.testing.assert_array_equal(np.diff(planned.decode_items[:, 5]), longest)
    assert planned.partials.size == len(planned.decode_items) * longest * KVH * expected.partial_rows * (32 + 4)
    assert planned.arrivals.size == len(planned.decode_items) * KVH and not planned.arrivals.any()


def test_operands_share_memory_only_where_one_lives_at_a_time() -> None:
    scratch = Scratch(EmulatedDevice())

    def operands() -> list[Any]:
        return [scratch.operand("codes", (rows, 16), F32) for rows in (4, 2, 8)]

    with scratch.one_operand():
        first, second, third = operands()
        assert np.shares_memory(first, second) and not np.shares_memory(first, third), "grown: the old one stays whole"
    assert not any(np.shares_memory(first, other) for other in operands())
