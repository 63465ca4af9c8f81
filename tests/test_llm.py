"""`LLM` as a service embeds it: prompts, streams, sampling, threads, cancelling, closing, errors that stay put.

Most tests run a tiny random model with a byte vocabulary: a token is a byte, so every stop string of two characters
spans tokens, and `bytes.decode` says what the text of an answer is.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import BOS, EOS, V, prompt, tensors, write_model
from tiny_models import _write_weights as write_weights

from engine import LLM, SamplingParams
from engine.errors import (
    CapacityError,
    ChatTemplateError,
    EngineClosed,
    EngineError,
    InvalidArgument,
    NumericalError,
    RequestError,
)

SPECIAL = {EOS: "<|endoftext|>", BOS: "<|begin|>"}
CONTEXT = 128  # the tiny models' max_position_embeddings
LETTERS = {ord(letter): 60.0 for letter in "abc"}  # far above every other logit
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def letters(seed: int, max_tokens: int | None = 40, **more: Any) -> SamplingParams:
    """Parameters whose answers consist of the letters a, b and c."""
    return SamplingParams(temperature=1, seed=seed, max_tokens=max_tokens, logit_bias=LETTERS, **more)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("qwen3_tied", tmp_path_factory.mktemp("qwen3_tied"))


@pytest.fixture(scope="module")
def shared(directory: Path) -> Iterator[LLM]:
    with LLM(directory) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The module's LLM, which every test must leave idle and whole."""
    yield shared
    assert_idle(shared)


def assert_idle(llm: LLM) -> None:
    """No request is left and all blocks are back. A request that has run since ensures that cancels have arrived."""
    llm.generate([1], SamplingParams(max_tokens=1))
    scheduler = llm._worker._scheduler
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 0
    assert not scheduler.has_unfinished and not llm._worker._requests and not llm._worker._answers


class Gate:
    """Holds an LLM's steps back: each needs a permit. `waiting()` returns once the worker wants one."""

    def __init__(self, llm: LLM) -> None:
        self._permits, self._wanted = threading.Semaphore(0), threading.Semaphore(0)
        runner = llm._worker._runner
        hidden = runner.hidden

        def held(batch: Any) -> Any:
            self._wanted.release()
            assert self._permits.acquire(timeout=60)
            return hidden(batch)

        runner.hidden = held  # type: ignore[method-assign]

    def waiting(self) -> None:
        assert self._wanted.acquire(timeout=60)

    def open(self, steps: int = 100_000) -> None:
        self._permits.release(steps)


@pytest.fixture
def gated(directory: Path) -> Iterator[tuple[LLM, Gate]]:
    llm = LLM(directory)
    gate = Gate(llm)
    yield llm, gate
    gate.open()
    llm.close()


def answer(llm: LLM, prompt: str | list[int], params: SamplingParams) -> str:
    return llm.generate(prompt, params)[0].outputs[0].text


# ---- prompts and parameters ---------------------------------------------------------------------------------------


def test_prompts_may_be_text_ids_or_a_list_of_both(llm: LLM) -> None:
    text, ids = "hello", list(b"hello")
    outs = llm.generate([text, ids, tuple(ids), np.array(ids)], GREEDY)
    assert [out.prompt for out in outs] == ["hello", None, None, None]
    assert [out.prompt_token_ids for out in outs] == [ids] * 4
    assert len({tuple(out.outputs[0].token_ids) for out in outs}) == 1
    for single in (text, ids, tuple(ids), np.array(ids, np.int32)):
        (out,) = llm.generate(single, GREEDY)  # type: ignore[arg-type]
        assert out.outputs == outs[0].outputs
    assert llm.generate([]) == []


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    each = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (3, 1, 7)]
    outs = llm.generate(["a", "b", "c"], each)
    assert [len(out.outputs[0].token_ids) for out in outs] == [3, 1, 7]
    with pytest.raises(RequestError, match="3 prompts got 2 sampling parameters"):
        llm.generate(["a", "b", "c"], each[:2])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "NoneType"),
        (5, "not int"),
        (b"bytes", "not bytes"),
        ({"prompt": "x"}, "not dict"),
        ({1, 2}, "not set"),
        ([[1, "x"]], "not str at 1"),
        ([1, "x"], "not str at 1"),
        ([1, True], "not bool at 1"),
        ([[1.0]], "not float at 0"),
        ([None], "not NoneType"),
        ([3, -1], "-1 at position 1"),
        ([[0, V]], f"{V} at position 1 is outside the vocabulary"),
        ("", "empty"),
        ([[]], "empty"),
        (["fine", ""], "empty"),
        ([[1] * CONTEXT], f"{CONTEXT} tokens and at most {CONTEXT - 1} fit"),
    ],
)
def test_unusable_prompts_are_refused_at_once(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate(prompts)
    assert isinstance(caught.value, ValueError)


def test_parameters_of_another_kind_are_refused(llm: LLM) -> None:
    for params in ({"temperature": 0}, "greedy", 0, [{"temperature": 0}]):
        with pytest.raises(RequestError, match="must be SamplingParams"):
            llm.generate(["a"], params)  # type: ignore[arg-type]


def test_a_text_with_tokens_beyond_the_models_vocabulary_is_refused(tmp_path: Path) -> None:
    write_model("qwen3_tied", tmp_path)
    config = json.loads((tmp_path / "tokenizer.json").read_text())
    config["added_tokens"].append({**config["added_tokens"][0], "id": V + 5, "content": "<|extra|>"})
    config["model"]["vocab"] |= {f"unused{i}": i for i in range(258, V + 5)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    with LLM(tmp_path) as llm:
        with pytest.raises(RequestError, match=f"token {V + 5} at position 1 is outside the vocabulary"):
            llm.generate("a<|extra|>")
        assert len(llm.generate("a", GREEDY)) == 1


def test_the_first_step_has_all_prompts_of_a_call(llm: LLM) -> None:
    sequences: list[int] = []
    runner, hidden = llm._worker._runner, llm._worker._runner.hidden
    runner.hidden = lambda batch: (sequences.append(len(batch.context_lens)), hidden(batch))[1]  # type: ignore[method-assign]
    try:
        for _ in range(10):
            llm.generate([[5, 6, 7], [8], [9, 10]], SamplingParams(max_tokens=1))
    finally:
        runner.hidden = hidden  # type: ignore[method-assign]
    assert sequences == [3] * 10


def test_several_answers_are_distinct_ordered_and_share_the_prompt(llm: LLM) -> None:
    ids = [7] * 64 + list(b"tail")
    rows: list[int] = []
    runner, hidden = llm._worker._runner, llm._worker._runner.hidden
    runner.hidden = lambda batch: (rows.append(len(batch.token_ids)), hidden(batch))[1]  # type: ignore[method-assign]
    try:
        (four,) = llm.generate(ids, SamplingParams(n=4, seed=3, temperature=1.5, max_tokens=10, ignore_eos=True))
    finally:
        runner.hidden = hidden  # type: ignore[method-assign]
    assert [output.index for output in four.outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in four.outputs}) == 4
    block = llm._worker._scheduler.pool.block_size
    alone = len(ids) - len(ids) // block * block  # prompt tokens of the other three that no full block holds
    assert sum(rows) == len(ids) + 3 * alone + 4 * 9
    assert four.num_cached_tokens == 0, "what the siblings share was not there before"
    (two,) = llm.generate(ids, SamplingParams(n=2, seed=3, temperature=1.5, max_tokens=10, ignore_eos=True))
    assert two.outputs == four.outputs[:2]
    assert two.num_cached_tokens == len(ids) - alone


# ---- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [range(V), [0xC3, 0xA9, 0x61], [0xF0, 0x9F, 0x98, 0x80, 0x80, 0xE2]])
def test_pieces_join_to_the_text_and_the_text_is_the_bytes(llm: LLM, allowed: Any) -> None:
    bias = {token: 60.0 for token in allowed}
    params = SamplingParams(seed=11, max_tokens=60, logit_bias=bias, ignore_eos=True, n=3)
    pieces = list(llm.stream("x", params))
    (out,) = llm.generate("x", params)
    for output in out.outputs:
        own = [piece for piece in pieces if piece.index == output.index]
        assert "".join(piece.text for piece in own) == output.text
        assert [token for piece in own for token in piece.token_ids] == output.token_ids
        assert [piece.finish_reason for piece in own] == [None] * 59 + ["length"]
        said = bytes(token for token in output.token_ids if token < 256)  # special and unused tokens have no text
        assert output.text == said.decode("utf-8", errors="replace")


def test_no_piece_ends_inside_a_character(llm: LLM) -> None:
    smile = "😀".encode()
    bias = [{byte: 100.0} for byte in smile]
    ids = list(b"x")
    for position, one in enumerate(bias):  # the character's bytes one by one
        (out,) = llm.generate(ids, SamplingParams(temperature=0, max_tokens=1, logit_bias=one))
        assert out.outputs[0].token_ids == [smile[position]]
        assert out.outputs[0].text == ("😀" if position == 3 else "�"), "an answer's end is an end"
        ids = ids + out.outputs[0].token_ids
    texts = [
        piece.text
        for piece in llm.stream("x", SamplingParams(seed=2, max_tokens=80, logit_bias=dict.fromkeys(smile, 60.0)))
    ]
    assert "😀" in "".join(texts) or "�" in "".join(texts)
    assert any(not text for text in texts), "a character's first bytes show nothing yet"


def expected_stop(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; the longest one where several are at once."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@pytest.mark.parametrize("seed", range(6))
def test_stop_strings_across_tokens_are_never_emitted(llm: LLM, seed: int) -> None:
    whole = answer(llm, "x", letters(seed))
    rng = random.Random(seed)
    for _ in range(8):
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        expected = expected_stop(whole, stops)
        stream = llm.stream("x", letters(seed, stop=stops))
        pieces = [piece.text for piece in stream]
        output = stream.result().outputs[0]
        assert output.text == "".join(pieces) == expected
        assert output.finish_reason == ("length" if expected == whole else "stop")
        assert whole.startswith(output.text) and len(output.token_ids) <= len(whole)


def test_stop_may_be_one_text(llm: LLM) -> None:
    whole = answer(llm, "x", letters(4))
    assert answer(llm, "x", letters(4, stop=whole[3:5])) == whole[: whole.index(whole[3:5])]


def test_stop_token_ids_end_the_answer_without_text(llm: LLM) -> None:
    (free,) = llm.generate("x", letters(1))
    token = ord("c")
    end = free.outputs[0].token_ids.index(token)
    (out,) = llm.generate("x", letters(1, stop_token_ids=[token]))
    assert out.outputs[0].token_ids == free.outputs[0].token_ids[: end + 1]
    assert out.outputs[0].text == free.outputs[0].text[:end]
    assert out.outputs[0].finish_reason == "stop"


def test_end_of_sequence_stops_unless_ignored(llm: LLM) -> None:
    wants_eos = {EOS: 100.0, ord("a"): 60.0}
    (out,) = llm.generate("x", SamplingParams(temperature=0, max_tokens=9, logit_bias=wants_eos))
    assert (out.outputs[0].token_ids, out.outputs[0].text, out.outputs[0].finish_reason) == ([EOS], "", "stop")
    (out,) = llm.generate("x", SamplingParams(temperature=0, max_tokens=9, logit_bias=wants_eos, ignore_eos=True))
    assert (out.outputs[0].token_ids, out.outputs[0].finish_reason) == ([EOS] * 9, "length")


def test_min_tokens_come_before_any_stop(llm: LLM) -> None:
    wants_eos = {EOS: 100.0, ord("a"): 60.0}
    for least in (1, 3, 9):
        params = SamplingParams(temperature=0, max_tokens=9, min_tokens=least, logit_bias=wants_eos)
        (out,) = llm.generate("x", params)
        assert out.outputs[0].token_ids == ([ord("a")] * least + [EOS])[:9]
        assert out.outputs[0].finish_reason == ("length" if least == 9 else "stop")
    (out,) = llm.generate("x", letters(1, min_tokens=10, stop=["a", "b", "c"]))
    assert len(out.outputs[0].text) == 10 and len(out.outputs[0].token_ids) == 11


def test_without_max_tokens_the_answer_goes_to_the_end_of_the_context(directory: Path, llm: LLM) -> None:
    (out,) = llm.generate("x" * 20, letters(1, max_tokens=None))
    assert (len(out.outputs[0].token_ids), out.outputs[0].finish_reason) == (CONTEXT - 20, "length")
    with LLM(directory, max_model_len=33) as short:
        assert short.max_model_len == 33
        (out,) = short.generate("x" * 20, letters(1, max_tokens=500))
        assert (len(out.outputs[0].token_ids), out.outputs[0].finish_reason) == (13, "length")
        with pytest.raises(RequestError, match="33 tokens and at most 32 fit"):
            short.generate("x" * 33)


# ---- log-probabilities and logits ---------------------------------------------------------------------------------


def log_softmax(logits: np.ndarray) -> np.ndarray:
    z = logits.astype(np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def check_logprobs(entry: dict[int, Any], row: np.ndarray, token: int, count: int) -> None:
    """One position's entry against the row of log-probabilities."""
    order = sorted(range(V), key=lambda i: (-row[i], i))
    assert list(entry) == [token, *(i for i in order[:count] if i != token)]
    for i, (logprob, rank, text) in entry.items():
        assert logprob == pytest.approx(row[i], abs=1e-9)
        assert rank == 1 + np.count_nonzero(row > row[i])
        assert text == (bytes([i]).decode("utf-8", errors="replace") if i < 256 else SPECIAL.get(i, ""))


@pytest.mark.parametrize("count", [0, 1, 5, V + 100])
def test_logprobs_are_those_of_the_logits(llm: LLM, count: int) -> None:
    ids = prompt()
    params = SamplingParams(
        seed=8, temperature=1.3, max_tokens=6, ignore_eos=True, logprobs=count, prompt_logprobs=count
    )
    (out,) = llm.generate(ids, params)
    output = out.outputs[0]
    rows = log_softmax(llm.logits(ids + output.token_ids))
    assert output.logprobs is not None and len(output.logprobs) == 6
    for position, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        check_logprobs(entry, rows[len(ids) - 1 + position], token, count)
    assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == len(ids)
    assert out.prompt_logprobs[0] is None
    for position in range(1, len(ids)):
        entry = out.prompt_logprobs[position]
        assert entry is not None
        check_logprobs(entry, rows[position - 1], ids[position], count)


def test_without_being_asked_for_there_are_no_logprobs(llm: LLM) -> None:
    (out,) = llm.generate("x", GREEDY)
    assert out.prompt_logprobs is None and out.outputs[0].logprobs is None


def test_prompt_logprobs_come_with_several_answers_and_in_chunks(directory: Path, llm: LLM) -> None:
    params = SamplingParams(seed=8, n=3, max_tokens=2, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    (whole,) = llm.generate(prompt(), params)
    with LLM(directory, max_num_batched_tokens=5, enable_prefix_caching=False) as small:
        (chunked,) = small.generate(prompt(), params)
    assert chunked.prompt_logprobs == whole.prompt_logprobs and chunked.outputs == whole.outputs


def test_logits_of_a_whole_context(llm: LLM) -> None:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, V, CONTEXT)
    logits = llm.logits(ids)  # type: ignore[arg-type]
    assert logits.dtype == np.float32 and logits.shape == (CONTEXT, V)
    assert np.array_equal(llm.logits(ids[:50].tolist()), logits[:50])
    (out,) = llm.generate(ids[:50].tolist(), SamplingParams(temperature=0, max_tokens=1))
    assert out.outputs[0].token_ids == [int(logits[49].argmax())]
    with pytest.raises(RequestError, match=f"{CONTEXT + 1} tokens and at most {CONTEXT} fit"):
        llm.logits([1] * (CONTEXT + 1))
    with pytest.raises(RequestError, match="empty"):
        llm.logits([])


def test_logits_larger_than_memory_are_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.llm.available_memory", lambda: 100 * V * 4)
    assert len(llm.logits([1] * 100)) == 100
    with pytest.raises(CapacityError, match="logits of 101 tokens"):
        llm.logits([1] * 101)


# ---- seeds and company --------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    params = SamplingParams(
        seed=42, max_tokens=25, temperature=1.2, top_p=0.95, repetition_penalty=1.1, ignore_eos=True
    )
    alone = answer(llm, "once upon", params)
    others = [SamplingParams(seed=i, max_tokens=5 + 7 * i, ignore_eos=True) for i in range(5)]
    for place in (0, 3, 5):
        crowd: list[Any] = ["other " * (i + 1) for i in range(5)]
        outs = llm.generate([*crowd[:place], "once upon", *crowd[place:]], [*others[:place], params, *others[place:]])
        assert outs[place].outputs[0].text == alone
    assert answer(llm, "once upon", params) == alone
    assert answer(llm, "once upon", SamplingParams(seed=43, max_tokens=25, temperature=1.2, ignore_eos=True)) != alone


def test_without_a_seed_answers_differ(llm: LLM) -> None:
    params = SamplingParams(max_tokens=25, temperature=1.5, ignore_eos=True)
    assert answer(llm, "x", params) != answer(llm, "x", params)


def test_eight_threads_get_what_one_gets(llm: LLM) -> None:
    jobs = [
        (f"thread {i} says {'ab' * (i % 7)}", SamplingParams(seed=i, max_tokens=5 + i % 11, n=1 + i % 2))
        for i in range(40)
    ]
    serial = [llm.generate(text, params)[0].outputs for text, params in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: llm.generate(*job)[0].outputs, jobs))
        streamed = list(pool.map(lambda job: [piece for piece in llm.stream(*job)], jobs))
        scored = list(pool.map(llm.logits, [[i, i + 1, i + 2] for i in range(40)]))
    assert together == serial
    for outputs, pieces in zip(serial, streamed, strict=True):
        for output in outputs:
            assert "".join(piece.text for piece in pieces if piece.index == output.index) == output.text
    assert np.array_equal(np.stack(scored), np.stack([llm.logits([i, i + 1, i + 2]) for i in range(40)]))


def test_two_models_at_once(llm: LLM, tmp_path: Path) -> None:
    write_model("mistral_window", tmp_path)
    texts = [f"text {i}" for i in range(12)]
    with LLM(tmp_path, threads=1) as other:
        alone = [(answer(llm, text, GREEDY), answer(other, text, GREEDY)) for text in texts]
        with ThreadPoolExecutor(4) as pool:
            both = list(pool.map(lambda text: (answer(llm, text, GREEDY), answer(other, text, GREEDY)), texts))
        assert both == alone
    assert answer(llm, texts[0], GREEDY) == alone[0][0], "closing one leaves the other"


def test_times_are_told(llm: LLM) -> None:
    (out,) = llm.generate("x" * 100, GREEDY)
    assert out.seconds_to_first_token is not None and 0 < out.seconds_to_first_token <= out.seconds


# ---- cancelling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "with", "del"])
def test_leaving_a_stream_early_cancels_the_request(gated: tuple[LLM, Gate], end: str) -> None:
    llm, gate = gated
    gate.open(2)
    stream = llm.stream("x" * 50, letters(1, max_tokens=None, n=3))
    next(stream)
    if end == "with":
        with stream:
            pass
    elif end == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    del stream
    gate.open()
    assert_idle(llm)


def test_an_aborted_request_tells_what_it_has(gated: tuple[LLM, Gate]) -> None:
    llm, gate = gated
    gate.open(4)
    stream = llm.stream("x", letters(1, n=2))
    seen = [next(stream) for _ in range(4)]
    stream.close()
    gate.open()
    out = stream.result()
    assert [output.finish_reason for output in out.outputs] == ["abort", "abort"]
    (whole,) = llm.generate("x", letters(1, n=2))
    for output, full in zip(out.outputs, whole.outputs, strict=True):
        shown = "".join(piece.text for piece in seen if piece.index == output.index)
        assert full.text.startswith(output.text) and output.text.startswith(shown)
        assert output.token_ids == full.token_ids[: len(output.token_ids)] and len(output.token_ids) < 40
    assert stream.result() is out, "the end stays"


def test_a_finished_answer_keeps_its_reason_when_its_sibling_is_cancelled(gated: tuple[LLM, Gate]) -> None:
    llm, gate = gated
    params = SamplingParams(seed=1, n=2, temperature=1, max_tokens=100, logit_bias={EOS: 3.0})
    stream = llm.stream("x", params)
    finished = None
    while finished is None:
        gate.waiting()
        gate.open(1)
        piece = next(stream)
        finished = piece.index if piece.finish_reason is not None else None
    gate.waiting()  # the other one's next step, which runs after the cancel has been sent
    stream.close()
    gate.open()
    out = stream.result()
    assert out.outputs[finished].finish_reason == "stop"
    assert out.outputs[1 - finished].finish_reason == "abort"


def test_closing_wakes_a_thread_that_waits(gated: tuple[LLM, Gate]) -> None:
    llm, gate = gated
    stream = llm.stream("x", letters(1))
    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(list, stream)
        waiter = pool.submit(stream.result)
        gate.waiting()
        stream.close()
        gate.open()
        pieces, out = reader.result(60), waiter.result(60)
    assert out.outputs[0].finish_reason == "abort" and len(pieces) <= 1
    assert_idle(llm)


def test_a_stream_may_be_collected_anywhere(llm: LLM) -> None:
    """Also by the garbage collector in a thread that is submitting at this moment, and holds the worker's lock."""
    streams = [llm.stream("x", letters(1, max_tokens=None))]

    def collect() -> None:
        with llm._worker._gate:
            streams.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "cancelling waits for a lock its own thread holds"


def test_cancelling_after_the_end_changes_nothing(llm: LLM) -> None:
    stream = llm.stream("x", GREEDY)
    out = stream.result()
    stream.close()
    assert stream.result() is out and out.outputs[0].finish_reason == "length"
    assert list(stream) == []


def test_an_error_cancels_the_other_prompts(gated: tuple[LLM, Gate]) -> None:
    llm, gate = gated
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["a", "b", ""], letters(1, max_tokens=None))
    gate.open()
    assert_idle(llm)
    assert llm._worker._scheduler.pool.num_cached <= 1, "the others were not computed to their ends"


# ---- closing ------------------------------------------------------------------------------------------------------


def test_close_ends_what_runs_and_what_comes(gated: tuple[LLM, Gate]) -> None:
    llm, gate = gated
    streams = [llm.stream("x", letters(i)) for i in range(3)]
    gate.waiting()
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(streams[0].result)
        closing = pool.submit(llm.close)
        while llm._worker._closed is None:
            pass
        late: list[Callable[[], object]] = [
            lambda: llm.generate("x"),
            lambda: llm.stream("x"),
            lambda: llm.logits([1]),
        ]
        for call in late:
            with pytest.raises(EngineClosed, match="closed"):
                call()
        gate.open()
        closing.result(60)
        with pytest.raises(EngineClosed, match="before the request was finished"):
            waiting.result(60)
    with pytest.raises(EngineClosed):
        list(streams[1])
    assert list(streams[1]) == []
    for stream in streams:
        stream.close()
        with pytest.raises(EngineClosed):
            stream.result()
    llm.close()
    assert not llm._worker._thread.is_alive()


def test_a_kept_error_does_not_collect_frames(directory: Path) -> None:
    llm = LLM(directory)
    llm.close()
    lengths = set()
    for _ in range(3):
        with pytest.raises(EngineClosed) as caught:
            llm.generate("x")
        trace, length = caught.value.__traceback__, 0
        while trace is not None:
            trace, length = trace.tb_next, length + 1
        lengths.add(length)
    assert len(lengths) == 1


def test_as_a_context_manager_it_closes_itself(directory: Path) -> None:
    with LLM(directory) as llm:
        thread = llm._worker._thread
        assert thread.is_alive()
        llm.generate("x", GREEDY)
    assert not thread.is_alive()
    with pytest.raises(EngineClosed):
        llm.generate("x", GREEDY)
    with pytest.raises(ZeroDivisionError), LLM(directory) as llm:
        1 / 0  # noqa: B018
    assert not llm._worker._thread.is_alive()


def test_close_frees_the_model_though_the_llm_is_kept(directory: Path) -> None:
    llm = LLM(directory)
    llm.generate("x", GREEDY)
    gone = [weakref.ref(llm._worker._runner), weakref.ref(llm._worker._runner._model)]
    llm.close()
    assert [reference() for reference in gone] == [None, None]


def test_collection_closes(directory: Path) -> None:
    llm = LLM(directory)
    worker = llm._worker
    gone = [weakref.ref(llm), weakref.ref(worker._runner._model)]
    llm.generate("x", GREEDY)
    with pytest.raises(RequestError):
        llm.generate("")
    gc.disable()  # reference counts alone must do: a model is not to wait for the collector
    try:
        del llm
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()
    assert not worker._thread.is_alive()


def test_a_stream_keeps_its_llm_open(directory: Path) -> None:
    stream = LLM(directory).stream("x", GREEDY)
    gc.collect()
    assert len(stream.result().outputs[0].token_ids) == 12
    llm = weakref.ref(stream._llm)
    del stream
    assert llm() is None


def test_a_forked_child_is_told(llm: LLM) -> None:
    """The worker's thread stays behind in the parent; without the check the child would wait for ever."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends it if it waits after all
        try:
            llm.generate("x")
            os.write(writing, b"no error")
        except EngineClosed as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert b"after forking" in os.read(reading, 1000)
    os.close(reading)


# ---- errors -------------------------------------------------------------------------------------------------------


def poisoned(directory: Path, name: str, token: int) -> Path:
    """A model one of whose tokens has a finite embedding that overflows float16."""
    write_model(name, directory)
    weights = {key: values.copy() for key, values in tensors(name)}
    weights["model.embed_tokens.weight"][token] = 1e5
    write_weights(weights, directory, 1)
    return directory


@pytest.mark.parametrize("device", ["cpu", "numpy"])
@pytest.mark.parametrize("name", ["llama3_gqa", "mistral_window"])
def test_nan_fails_its_request_and_no_other(tmp_path: Path, name: str, device: str) -> None:
    """In particular not those that get its cache blocks, in which NaN stay behind."""
    bad, good = 200, list(b"good")
    path = poisoned(tmp_path, name, bad)
    with LLM(path, device=device, dtype="float16", max_model_len=96, kv_cache_bytes=1 << 16) as llm:
        expected = llm.generate(good, GREEDY)[0].outputs
        rows = llm.logits(good)
        streams = [llm.stream(ids, GREEDY) for ids in (good, [bad], good, [1] * 60 + [bad], [bad] * 80, good)]
        for position in (0, 2, 5):
            assert streams[position].result().outputs == expected
        for position in (1, 3, 4):
            with pytest.raises(NumericalError, match="answer position 0"):
                streams[position].result()
        with pytest.raises(NumericalError, match="prompt position 1"):
            llm.logits([3, bad, 3])
        with pytest.raises(NumericalError, match="prompt position 1"):
            llm.generate([3, bad, 3], SamplingParams(prompt_logprobs=1, max_tokens=1))
        for extra in range(20):  # into every offset of the blocks that held NaN
            assert np.isfinite(llm.logits(good + [5] * extra)).all()
        assert llm.generate(good, GREEDY)[0].outputs == expected
        assert np.array_equal(llm.logits(good), rows)
        assert_idle(llm)


def test_settings_that_leave_no_token_fail_their_request_alone(llm: LLM) -> None:
    impossible = SamplingParams(temperature=0, repetition_penalty=1e-300, max_tokens=50)
    streams = [llm.stream("abc", params) for params in (GREEDY, impossible, GREEDY)]
    assert streams[0].result().outputs == streams[2].result().outputs
    with pytest.raises(RequestError, match="relax these settings"):
        streams[1].result()


@pytest.mark.parametrize("where", ["engine.worker.sample_row", "engine.models.decoder.Decoder.logits"])
def test_an_internal_error_reaches_everyone(directory: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    llm = LLM(directory)
    gone = weakref.ref(llm._worker._runner._model)
    both_here = threading.Event()

    def broken(*_: object) -> None:
        assert both_here.wait(60)
        raise KeyError("a bug")

    monkeypatch.setattr(where, broken)
    streams = [llm.stream("x"), llm.stream("y")]
    both_here.set()
    for stream in streams:
        with pytest.raises(EngineClosed, match=r"internal error: KeyError\('a bug'\)") as caught:
            list(stream)
        assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(EngineClosed, match="internal error") as caught:
        llm.generate("z")
    assert isinstance(caught.value.__cause__, KeyError)
    llm._worker._thread.join(60)
    assert gone() is None, "the error must not keep the model"


def test_token_ids_beyond_the_vocabulary_in_parameters(llm: LLM) -> None:
    for params in (SamplingParams(stop_token_ids=[V]), SamplingParams(logit_bias={V: 1.0})):
        with pytest.raises(RequestError, match=f"has token {V}"):
            llm.generate("x", params)
    with pytest.raises(RequestError, match=r"below 2\^64"):
        llm.generate("x", SamplingParams(seed=1 << 64))


def test_end_tokens_beyond_the_vocabulary_are_harmless(tmp_path: Path) -> None:
    write_model("qwen3_tied", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ord("a"), V, 2**31 - 1]}))
    with LLM(tmp_path) as llm:
        params = SamplingParams(temperature=0, logit_bias={ord("a"): 100.0}, max_tokens=5, min_tokens=2)
        (out,) = llm.generate("x", params)
        assert len(out.outputs[0].token_ids) == 3 and out.outputs[0].token_ids[2] == ord("a")


# ---- what a model brings along ------------------------------------------------------------------------------------


def test_generation_config_fills_what_is_unset(tmp_path: Path, llm: LLM) -> None:
    write_model("qwen3_tied", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 1, "temperature": 0.9}))
    sampled = SamplingParams(seed=1, max_tokens=30, temperature=1, top_k=0, ignore_eos=True)
    unset = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    greedy = answer(llm, "x", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    neutral = answer(llm, "x", unset)
    assert greedy != neutral
    with LLM(tmp_path) as model:
        assert model.sampling_defaults == {"top_k": 1, "temperature": 0.9}
        assert answer(model, "x", unset) == greedy, "the file's top_k applies"
        assert answer(model, "x", sampled) == neutral, "explicit values win"
    with LLM(tmp_path, use_generation_config=False) as model:
        assert model.sampling_defaults == {}
        assert answer(model, "x", unset) == neutral


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{{ mood }}"
)


def test_chat_applies_the_template(tmp_path: Path) -> None:
    write_model("qwen3_tied", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hi"}]
    with LLM(tmp_path) as llm:
        assert llm.has_chat_template
        (out,) = llm.chat(messages, GREEDY, mood="!")
        ids = [*b"<system>be nice", EOS, *b"<user>hi", EOS, *b"<assistant>!"]
        assert out.prompt_token_ids == ids == llm.encode_chat(messages, mood="!")
        assert out.outputs == llm.generate(ids, GREEDY)[0].outputs
        assert llm.generate("hi", GREEDY)[0].prompt_token_ids == list(b"hi"), "generate never applies it"
        with pytest.raises(RequestError, match="role"):
            llm.chat([{"content": "hi"}])
        template = llm._template
    assert template is not None and template._worker is None, "its process ends with the LLM"


def test_chat_without_a_template(llm: LLM) -> None:
    assert not llm.has_chat_template
    for call in (llm.chat, llm.encode_chat):
        with pytest.raises(ChatTemplateError, match="has no chat template"):
            call([{"role": "user", "content": "hi"}])


def test_describe_says_what_was_chosen(directory: Path) -> None:
    with LLM(directory, dtype="float32", device="numpy", max_model_len=50, kv_cache_bytes=1 << 20) as llm:
        text = llm.describe()
        for part in (
            str(directory),
            "Qwen3ForCausalLM",
            "2 layers",
            "numpy",
            "weights bfloat16",
            "activations float32",
        ):
            assert part in text
        assert "sequences up to 50 tokens" in text
        assert (llm.device, llm.kernel_path, llm.max_model_len) == ("cpu", "numpy", 50)


def test_prefix_caching_can_be_turned_off(directory: Path) -> None:
    ids = [9] * 70
    for enabled, cached in ((True, 64), (False, 0)):
        with LLM(directory, enable_prefix_caching=enabled) as llm:
            first, second = (llm.generate(ids, GREEDY)[0] for _ in range(2))
            assert (first.num_cached_tokens, second.num_cached_tokens) == (0, cached)
            assert first.outputs == second.outputs


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(
            (name, value)
            for name in ("max_num_seqs", "max_num_batched_tokens", "threads")
            for value in (0, -1, 1.5, "2", True)
        ),
        *(("max_model_len", value) for value in (0, 1, -5, 12.0, "8")),
        *(("kv_cache_bytes", value) for value in (0, -1, 1e9)),
        *(("device", value) for value in ("gpu", None, 0, ["cpu"])),
        *(("dtype", value) for value in ("fp16", "int8", None, np.float32)),
        *(("kv_cache_dtype", value) for value in ("bfloat16", "fp8_e5m2", "", None, 8)),
        *(("model", value) for value in (None, 5, b"demo", ["demo"])),
    ],
)
def test_unusable_arguments_are_named(directory: Path, argument: str, value: Any) -> None:
    with pytest.raises(EngineError, match=argument) as caught:
        LLM(**{"model": directory, argument: value})
    assert isinstance(caught.value, InvalidArgument)
