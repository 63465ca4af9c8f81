"""A token's logits are bitwise the same whatever happens around it: alone, batched, chunked, cached, preempted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_model

import engine.worker
from engine import LLM, SamplingParams
from engine.errors import DeviceError
from engine.ops.gpu.emulator import EmulatedModule
from engine.ops.gpu.launch_linear import Output
from engine.ops.gpu.prefill_products import PrefillProducts

Rows = dict[tuple[tuple[int, ...], int], bytes]  # (prompt, answer position) -> the logits row sampled from

MODELS = ("qwen3_tied", "mistral_window", "qwen2_tied_group7", "llama2_mha_f16", "llama2_sharded_f32")
ANSWER = 24


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Every logits row that reaches the sampler, while the test runs."""
    recorded: Rows = {}
    original = engine.worker.sample_row

    def record(row, state, token_text):  # type: ignore[no-untyped-def]
        key = (tuple(record.prompts[id(state)]), state.position)  # type: ignore[attr-defined]
        assert recorded.setdefault(key, row.tobytes()) == row.tobytes(), f"logits differ at {key[1]}"
        return original(row, state, token_text)

    record.prompts = {}  # type: ignore[attr-defined]
    original_answer = engine.worker.Answer

    def answer(sequence, *args, **kwargs):  # type: ignore[no-untyped-def]
        made = original_answer(sequence, *args, **kwargs)
        record.prompts[id(made.sampler)] = list(sequence.tokens)  # type: ignore[attr-defined]
        kept.append(made)  # ids must stay unique
        return made

    kept: list[object] = []
    monkeypatch.setattr(engine.worker, "sample_row", record)
    monkeypatch.setattr(engine.worker, "Answer", answer)
    return recorded


def _prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    shared = rng.integers(0, 256, 40).tolist()
    tails = [rng.integers(0, 256, n).tolist() for n in (1, 7, 23, 38)]
    return [shared + tail for tail in tails] + [tails[1], tails[3][:17]]


def _run(  # type: ignore[no-untyped-def]
    model: Path, prompts: Sequence[list[int]], *, together: bool, device: str = "cpu", answer: int = ANSWER, **settings
) -> list[list[int]]:
    params = SamplingParams(
        temperature=0, max_tokens=answer, ignore_eos=True, logprobs=0
    )  # so that the host sees logits
    with LLM(model, device=device, **settings) as llm:
        if together:
            return [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
        return [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]


def test_logits_are_bitwise_the_same(model: Path, rows: Rows) -> None:
    """The recorder compares every row with the first one seen for the same prompt and position."""
    prompts = _prompts()
    alone = _run(model, prompts, together=False, enable_prefix_caching=False, threads=1)
    assert len(rows) == len(prompts) * ANSWER
    for chunk in (512, 33, 7, 1):
        got = _run(model, prompts, together=True, enable_prefix_caching=False, max_num_batched_tokens=chunk, threads=2)
        assert got == alone, f"chunks of {chunk}"
    assert _run(model, prompts, together=False) == alone, "prefix cache"
    assert _run(model, prompts[::-1], together=True)[::-1] == alone, "batched in another order, cached"


def test_logits_are_bitwise_the_same_over_a_cache_in_fp8(tmp_path: Path, rows: Rows) -> None:
    path, prompts, options = write_model("qwen3_tied", tmp_path), _prompts(), {"kv_cache_dtype": "fp8"}
    alone = _run(path, prompts, together=False, enable_prefix_caching=False, threads=1, **options)
    for chunk in (512, 33, 1):
        got = _run(path, prompts, together=True, max_num_batched_tokens=chunk, **options)
        assert got == alone, f"chunks of {chunk}"
    assert _run(path, prompts[::-1], together=True, **options)[::-1] == alone, "batched in another order, cached"


def test_preempted_sequences_go_on_as_before(model: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = _prompts()
    alone = _run(model, prompts, together=False, enable_prefix_caching=False)
    preempted = []
    original = engine.worker.Scheduler.schedule

    def schedule(self):  # type: ignore[no-untyped-def]
        step = original(self)
        preempted.extend(step.preempted if step else ())
        return step

    monkeypatch.setattr(engine.worker.Scheduler, "schedule", schedule)
    with LLM(model, device="cpu") as llm:
        block_bytes = llm._plan.nbytes // llm._plan.num_blocks
    for caching in (False, True):
        got = _run(
            model,
            prompts,
            together=True,
            max_model_len=112,
            kv_cache_bytes=12 * block_bytes,
            enable_prefix_caching=caching,
        )
        assert got == alone
    assert preempted, "the pool was meant to be too small for all"


def test_prompt_logits_do_not_depend_on_chunks(model: Path) -> None:
    prompt = _prompts()[3]
    results = []
    for chunk in (512, 19, 1):
        with LLM(model, device="cpu", max_num_batched_tokens=chunk) as llm:
            results.append(llm.logits(prompt))
    assert all(np.array_equal(results[0], other) for other in results[1:])


# ---- the GPU's two guarantees, on the emulator  ---------------------------------------------------------------------


@pytest.fixture
def emulator() -> str:
    try:
        EmulatedModule.compile("embed.cu")
    except DeviceError as error:
        pytest.skip(f"kernels cannot be compiled for the emulator: {error}")
    return "emulate"


@pytest.mark.parametrize("quant", ["bf16", "fp8", "sharq"])
def test_batch_mates_never_matter_on_a_gpu(tmp_path: Path, rows: Rows, emulator: str, quant: str) -> None:
    path, prompts = write_model("qwen3_tied", tmp_path), [prompt[-25:] for prompt in _prompts()[1:4]]
    options = {"device": emulator, "answer": 4, "quant": quant, "dtype": "bfloat16", "enable_prefix_caching": False}
    alone = _run(path, prompts, together=False, **options)
    assert _run(path, prompts, together=True, **options) == alone
    assert _run(path, prompts[::-1], together=True, **options)[::-1] == alone


@pytest.fixture
def visible_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of prefill rows get a bias: rounded to bf16, the two orders of sums give these small models' decode rows
    and prefill rows the same values nearly always, and a row of the wrong kind would not show."""

    def biased(original: Any) -> Any:
        def launches(own: Any, x: Any, weight: Any, output: Output) -> Any:
            bias = np.zeros(output.out.shape[1], np.float32) if output.bias is None else output.bias
            return original(own, x, weight, replace(output, bias=bias + np.float32(0.02)))

        return launches

    for name in ("linear", "fp4_linear"):
        monkeypatch.setattr(PrefillProducts, name, biased(getattr(PrefillProducts, name)))


@pytest.mark.usefixtures("visible_kinds")
@pytest.mark.parametrize(("device", "quant"), [("emulate", "bf16"), ("emulate:sm_90a", "sharq")])
def test_what_happens_to_a_prompt_never_matters_on_a_gpu(
    tmp_path: Path, rows: Rows, emulator: str, monkeypatch: pytest.MonkeyPatch, device: str, quant: str
) -> None:
    """Long ones, whose rows prefill, and short ones: beside each other and beside answers, in chunks of any size, from
    the cache that the others fill, and run anew after a preemption."""
    path, rng = write_model("mistral_window", tmp_path), np.random.default_rng(5)
    text, tail = rng.integers(0, 256, 78).tolist(), rng.integers(0, 256, 32).tolist()
    prompts = [text, text[:66] + tail[:12], text[:46] + tail, text[:64], text[:20] + tail[:3]]  # two are short
    options = {"device": device, "answer": 5, "quant": quant, "dtype": "bfloat16"}
    alone = _run(path, prompts, together=False, enable_prefix_caching=False, **options)
    for budget, caching in ((512, False), (100, True), (23, False)):
        got = _run(
            path, prompts, together=True, max_num_batched_tokens=budget, enable_prefix_caching=caching, **options
        )
        assert got == alone, f"{budget} tokens a step"
    assert _run(path, prompts[::-1], together=True, **options)[::-1] == alone
    cut = {"max_num_batched_tokens": 77}  # the last chunk has one token
    assert _run(path, prompts, together=False, **options, **cut) == alone, "one after the other, from the cache"

    preempted = []
    original = engine.worker.Scheduler.schedule

    def schedule(self):  # type: ignore[no-untyped-def]
        step = original(self)
        preempted.extend(seq for seq in (step.preempted if step else ()) if seq.num_output and seq.num_prefill)
        return step

    monkeypatch.setattr(engine.worker.Scheduler, "schedule", schedule)
    with LLM(path, device=device, dtype="bfloat16") as llm:
        block_bytes = llm._plan.nbytes // llm._plan.num_blocks
    for caching in (False, True):  # three long prompts fit, but not the sixth block of each
        crowded = {"max_model_len": 96, "kv_cache_bytes": 17 * block_bytes, "enable_prefix_caching": caching}
        assert _run(path, prompts, together=True, **options, **crowded) == alone
    assert preempted, "the pool was meant to be too small for all"


@pytest.mark.parametrize("quant, kv", [("bf16", "auto"), ("sharq", "auto"), ("bf16", "fp8")])
def test_deterministic_on_a_gpu(tmp_path: Path, rows: Rows, emulator: str, quant: str, kv: str) -> None:
    """Alone, batched, in chunks of any size (a chunk of 1 is a decode step), and from the prefix cache."""
    path, prompts = write_model("qwen3_tied", tmp_path), [prompt[:45] for prompt in _prompts()[1:4]]
    options = {"device": emulator, "answer": 4, "quant": quant, "dtype": "bfloat16", "deterministic": True}
    options["kv_cache_dtype"] = kv
    alone = _run(path, prompts, together=False, enable_prefix_caching=False, **options)
    for chunk in (512, 11, 1):
        assert _run(path, prompts, together=True, max_num_batched_tokens=chunk, **options) == alone, (
            f"chunks of {chunk}"
        )
