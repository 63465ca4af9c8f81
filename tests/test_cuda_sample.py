"""The sampling kernels on the emulator choose the tokens that engine.sampler chooses."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from engine.core import SamplingParams
from engine.errors import DeviceError, NumericalError, RequestError
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule
from engine.sampler import SamplerState, sample_row

try:
    EmulatedModule.compile("sample.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)


@lru_cache
def module(checked=False):
    return EmulatedModule.compile("sample.cu", checked=checked)


class Request:
    """One row's parameters as the sampler's state has them and as the kernels take them."""

    def __init__(self, params, *, seed=7, index=0, prompt=(), answer=(), eos=()):
        self.params, self.seed, self.index = params, seed, index
        self.position = len(answer)
        self.state = SamplerState(params, seed=seed, index=index, prompt=prompt, answer=answer, eos_token_ids=eos)
        stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos)}
        self.masks = sorted(stops) if self.position < params.min_tokens else []
        self.bias = dict(params.logit_bias or {})
        self.repetition = params.repetition_penalty or 1.0
        penalised = {token: answer.count(token) for token in answer}
        if self.repetition != 1.0:
            penalised = {token: answer.count(token) for token in (*prompt, *answer)}
        if self.repetition == 1.0 and not (params.presence_penalty or params.frequency_penalty):
            penalised = {}
        self.penalised = penalised

    def expected(self, row):
        """The token, or the status of a row that has none."""
        try:
            return sample_row(row, self.state, str).token_id, 0
        except NumericalError:
            return None, 1
        except RequestError:
            return None, 2


def lists(parts, dtype):
    """A row's lists one after the other, with where each begins."""
    starts = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return starts, np.array([*sum(map(list, parts), []), 0], dtype)  # never empty: a launch wants an address


def choose(logits, requests, threads=64, chunks=3, checked=False, **launch):
    S, V = logits.shape
    logits = logits.copy()
    run = module(checked).launch
    stride, size, block = np.int64(V), np.int32(V), (threads, 1, 1)

    def numbers(get, dtype):
        return np.array([get(r) for r in requests], dtype)

    raw_keys, keys = np.zeros((2, S), np.uint64)
    run("row_maxima", (chunks, S, 1), block, 0, [logits, stride, raw_keys, size], **launch)
    mask_start, mask_ids = lists([r.masks for r in requests], np.int32)
    bias_start, bias_ids = lists([r.bias for r in requests], np.int32)
    penalty_start, penalty_ids = lists([r.penalised for r in requests], np.int32)
    args = [
        logits, stride, mask_start, mask_ids,
        bias_start, bias_ids, lists([r.bias.values() for r in requests], np.float64)[1],
        penalty_start, penalty_ids, lists([r.penalised.values() for r in requests], np.int32)[1],
        numbers(lambda r: r.repetition, np.float64),
        numbers(lambda r: r.params.presence_penalty, np.float64),
        numbers(lambda r: r.params.frequency_penalty, np.float64),
    ]  # fmt: skip
    run("adjust_logits", (S, 1, 1), block, 0, args, **launch)
    run("row_maxima", (chunks, S, 1), block, 0, [logits, stride, keys, size], **launch)
    temperature, weights = numbers(lambda r: r.state.temperature, np.float64), np.full((S, V), np.nan)
    run("token_weights", (chunks, S, 1), block, 0, [logits, stride, keys, temperature, weights, size], **launch)
    tokens, status = np.full((2, S), -1, np.int32)
    args = [
        logits, stride, weights, raw_keys, keys, temperature,
        numbers(lambda r: r.state.top_k, np.int32), numbers(lambda r: r.state.top_p, np.float64),
        numbers(lambda r: r.state.min_p, np.float64), numbers(lambda r: r.seed, np.uint64),
        numbers(lambda r: r.index, np.uint64), numbers(lambda r: r.position, np.int32), tokens, status, size,
    ]  # fmt: skip
    run("sample_rows", (S, 1, 1), block, 0, args, **launch)
    return [(int(t) if s == 0 else None, int(s)) for t, s in zip(tokens, status, strict=True)]


def rows_of_logits(rng, S, V):
    """Rows that are smooth, of few distinct values, all equal, with −inf, with zeros of both signs, of huge spans."""
    x = rng.normal(0, 4, (S, V)).astype(np.float32)
    kind = np.arange(S) % 6
    x[kind == 1] = rng.integers(-2, 3, (np.count_nonzero(kind == 1), V))
    x[kind == 2] = -1.5
    x[kind == 3] = np.where(rng.random((np.count_nonzero(kind == 3), V)) < 0.7, -np.inf, x[kind == 3])
    x[kind == 4] = rng.choice([-0.0, 0.0, -0.5], (np.count_nonzero(kind == 4), V))
    x[kind == 5] *= 1e30
    x[:, rng.integers(V)] = 2.0
    return x


def random_params(rng):
    def pick(*values):
        return values[rng.integers(len(values))]

    return SamplingParams(
        temperature=pick(0.0, 0.3, 1.0, 1.0, 2.5), top_k=pick(0, 0, -1, 1, 2, 17, 300), top_p=pick(1.0, 0.05, 0.5, 0.9),
        min_p=pick(0.0, 0.0, 0.02, 1.0), repetition_penalty=pick(1.0, 1.3, 0.7), presence_penalty=pick(0.0, 0.4),
        frequency_penalty=pick(0.0, -0.3), logit_bias=pick(None, {0: 2.5, 1: -100.0}), min_tokens=pick(0, 4),
    )  # fmt: skip


@pytest.mark.parametrize("V", [2, 31, 64, 1000, 5003])
def test_the_samplers_tokens(V):
    rng = np.random.default_rng(V)
    S = 48
    logits = rows_of_logits(rng, S, V)
    requests = []
    for s in range(S):
        prompt, answer = rng.integers(0, V, 5).tolist(), rng.integers(0, V, int(rng.integers(7))).tolist()
        seed = int(rng.integers(2**63))
        requests.append(Request(random_params(rng), seed=seed, index=s % 3, prompt=prompt, answer=answer, eos=(V - 1,)))
    assert choose(logits, requests) == [r.expected(row) for r, row in zip(requests, logits, strict=True)]


def test_every_share_of_the_distribution_is_drawn():
    """One row, many seeds: the draws are the sampler's, and all likely tokens occur."""
    row = np.log(np.array([0.4, 0.1, 0.0001, 0.2, 0.2999], np.float32))
    requests = [Request(SamplingParams(), seed=seed, answer=[0] * (seed % 5)) for seed in range(100)]
    chosen = choose(np.tile(row, (100, 1)), requests)
    assert chosen == [r.expected(row) for r in requests]
    assert {token for token, _ in chosen} >= {0, 1, 3, 4}


def test_the_first_of_equal_maxima():
    logits = np.zeros((2, 300), np.float32)
    logits[1, [250, 70]] = 3
    greedy = [Request(SamplingParams(temperature=0)) for _ in range(2)]
    assert choose(logits, greedy) == [(0, 0), (70, 0)]


def test_a_token_does_not_depend_on_block_size_or_batch():
    rng = np.random.default_rng(3)
    logits = rows_of_logits(rng, 6, 700)
    requests = [Request(SamplingParams(top_p=0.8, top_k=200), seed=s) for s in range(6)]
    expected = [r.expected(row) for r, row in zip(requests, logits, strict=True)]
    for threads, chunks in ((32, 1), (96, 7), (1024, 2)):
        assert choose(logits, requests, threads, chunks) == expected
    assert [choose(logits[s : s + 1], requests[s : s + 1])[0] for s in range(6)] == expected


def test_rows_nobody_can_choose_from():
    V, fine = 40, SamplingParams()
    logits = np.random.default_rng(4).normal(0, 1, (6, V)).astype(np.float32)
    logits[0, 7], logits[1, 3], logits[2] = np.nan, np.inf, -np.inf
    logits[3, :-1] = -np.inf
    masked = Request(SamplingParams(min_tokens=2), eos=(V - 1,))
    overflowing = Request(SamplingParams(repetition_penalty=1e-39), prompt=[1])
    requests = [Request(fine), Request(fine), Request(fine), masked, overflowing, Request(fine)]
    logits[4, 1] = 3e38
    chosen = choose(logits, requests)
    assert [status for _, status in chosen] == [1, 1, 1, 2, 2, 0]
    assert chosen[5] == requests[5].expected(logits[5])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_checked_build(schedule):
    rng = np.random.default_rng(5)
    logits = rows_of_logits(rng, 6, 150)
    requests = [Request(random_params(rng), seed=s, prompt=[1, 2], answer=[3, 3]) for s in range(6)]
    requests[0] = Request(SamplingParams(top_k=20, top_p=0.7, min_p=0.01))
    expected = [r.expected(row) for r, row in zip(requests, logits, strict=True)]
    assert choose(logits, requests, checked=True, schedule=schedule) == expected
