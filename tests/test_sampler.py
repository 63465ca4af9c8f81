"""The sampler against its definition, written a second time here with Python floats, sorts and recounts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.core import Logprob, SamplingParams
from engine.errors import NumericalError, RequestError
from engine.sampler import (
    Logits,
    SampledToken,
    SamplerState,
    check_against_vocab,
    prompt_logprobs,
    resolve_seed,
    sample,
    sample_row,
)

INF = math.inf


def text(token_id: int) -> str:
    return f"<{token_id}>"


def row_of(values: Sequence[float]) -> Logits:
    return np.array(values, dtype=np.float32)


def choose(row: Logits, state: SamplerState) -> int:
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        return sample_row(row, state, text).token_id


class FixedDraw(SamplerState):
    """A state whose uniform number the test decides."""

    u = 0.0

    def uniform(self) -> float:
        return self.u


# ---- which tokens survive, and with what probability --------------------------------------------------------------


def kept_by_definition(
    x: Sequence[float], t: float, top_k: int, top_p: float, min_p: float
) -> tuple[dict[int, float], float]:
    """{id: weight} of what top_k, min_p and top_p keep, and how near top_p came to cutting elsewhere."""
    drop = [(max(x) - v) / t for v in x]
    ids = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if 0 < top_k < len(x):
        ids = ids[:top_k]
    weight = {i: math.exp(-drop[i]) for i in ids}
    ranked = sorted((i for i in ids if weight[i] >= min_p), key=lambda i: (drop[i], i))
    total = math.fsum(weight[i] for i in ranked)
    mass = [m / total for m in accumulate(weight[i] for i in ranked)]
    count = next((n + 1 for n, m in enumerate(mass) if m >= top_p), len(ranked)) if top_p < 1 else len(ranked)
    margin = min(abs(m - top_p) for m in mass) if top_p < 1 else 1.0
    return {i: weight[i] for i in sorted(ranked[:count])}, margin


def assert_draws(row: Logits, params: SamplingParams, kept: dict[int, float]) -> None:
    """Every kept token answers to exactly its own share of [0, 1), in order of id."""
    state = FixedDraw(params, seed=0)
    total, below = math.fsum(kept.values()), 0.0
    for token_id, weight in kept.items():
        share = weight / total
        if share > 1e-9:  # a smaller one's edges are within rounding of each other
            for inside in (1e-4, 0.5, 1 - 1e-4):
                state.u = below + inside * share
                assert choose(row, state) == token_id
        below += share
    state.u = 1 - 2.0**-53
    assert choose(row, state) in kept


# Few distinct values give many ties; the large ones reach float32's limits.
logit = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, -1.0, -INF]),
    st.floats(-30, 30, width=32),
    st.sampled_from([float(np.float32(3e38)), float(np.float32(-3e38)), 88.0, -104.0]),
)
rows = st.lists(logit, min_size=1, max_size=40).filter(lambda x: max(x) > -INF)


@settings(max_examples=250, deadline=None)
@given(
    x=rows,
    t=st.one_of(st.floats(0.05, 5), st.sampled_from([1.0, 1.1e-5, 1e30, 1e308])),
    top_k=st.sampled_from([-1, 0, 1, 2, 3, 5, 1000]),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)
def test_filters_and_draw_follow_the_definition(
    x: list[float], t: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = row_of(x)
    kept, margin = kept_by_definition(x, t, top_k, top_p, min_p)
    drop = [(max(x) - v) / t for v in x]
    # Where two ways of rounding may disagree about the last kept token, the definition does not decide.
    assume(margin > 1e-9)
    assume(all(d == 0 or min_p == 0 or abs(math.exp(-d) - min_p) > 1e-12 * min_p for d in drop))
    assert_draws(row, SamplingParams(temperature=t, top_k=top_k, top_p=top_p, min_p=min_p), kept)


@pytest.mark.parametrize("kind", ["spread", "ties", "flat", "peaked"])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 31},
        {"top_k": 32},
        {"top_k": 1990},
        {"top_p": 0.03},
        {"top_p": 0.7},
        {"top_p": 0.9999},
        {"min_p": 0.2},
        {"top_k": 60, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_filters_on_a_large_vocabulary(kind: str, filters: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    noise = rng.standard_normal(2000)
    scaled = {
        "spread": noise * 4,
        "ties": np.round(noise * 2),
        "flat": noise * 1e-3,
        "peaked": noise + 12 * (noise > 3),
    }
    row = scaled[kind].astype(np.float32)
    kept, margin = kept_by_definition(
        row.tolist(), 0.8, filters.get("top_k", 0), filters.get("top_p", 1.0), filters.get("min_p", 0.0)
    )
    assert margin > 1e-12
    edges = dict(list(kept.items())[:3] + list(kept.items())[-3:])
    state, total = FixedDraw(SamplingParams(temperature=0.8, **filters), seed=0), math.fsum(kept.values())
    below, drawn = 0.0, set()
    for n, (token_id, weight) in enumerate(kept.items()):
        state.u = (below + weight / 2) / total
        below += weight
        if (token_id in edges or n % max(1, len(kept) // 40) == 0) and weight / total > 1e-12:
            assert choose(row, state) == token_id
            drawn.add(token_id)
    assert drawn


def test_top_p_keeps_the_shortest_sufficient_beginning_and_breaks_ties_by_id() -> None:
    row = row_of([0.0] * 8)  # equal weights: all sums are exact
    for top_p, kept in ((0.25, 2), (0.25 + 1e-9, 3), (1e-300, 1), (0.875, 7), (0.9, 8)):
        assert_draws(row, SamplingParams(top_p=top_p), dict.fromkeys(range(kept), 1.0))


def test_top_p_that_is_met_exactly_keeps_no_more() -> None:
    exact = [(v, p) for v in range(1, 60) for p in [1 / (1 + float(np.exp(-v / 8)))] if p * (1 + np.exp(-v / 8)) == 1]
    assert len(exact) > 5
    for v, top_p in exact:
        assert_draws(row_of([-v / 8, 0.0]), SamplingParams(top_p=top_p), {1: 1.0})


def test_a_draw_on_an_edge_belongs_to_the_next_possible_token() -> None:
    state = FixedDraw(SamplingParams(), seed=0)
    row = row_of([-INF, 0, 0, -INF, 0, 0])
    for state.u, token_id in ((0.0, 1), (0.25, 2), (0.5, 4), (0.75, 5)):
        assert choose(row, state) == token_id


def test_top_k_breaks_ties_by_id_and_min_p_of_one_keeps_only_the_largest() -> None:
    row = row_of([1, 3, 3, 2, 3])
    assert_draws(row, SamplingParams(top_k=2), {1: 1.0, 2: 1.0})
    assert_draws(row, SamplingParams(min_p=1.0), {1: 1.0, 2: 1.0, 4: 1.0})


def test_min_p_comes_before_top_p_mass_is_taken() -> None:
    row = np.log(row_of([0.4, 0.3, 0.1, 0.1, 0.1]))
    # Of the two tokens that min_p leaves, the first has 4/7 of the mass: enough for 0.55, though 0.4 would not be.
    assert_draws(row, SamplingParams(min_p=0.5, top_p=0.55), {0: 1.0})


def test_neutral_filters_change_nothing() -> None:
    rng = np.random.default_rng(5)
    row = rng.standard_normal(300).astype(np.float32) * 2
    plain = SamplerState(SamplingParams(), seed=9)
    neutral = SamplerState(
        SamplingParams(temperature=1.0, top_k=300, top_p=1.0, min_p=0.0, repetition_penalty=1.0, logit_bias={}), seed=9
    )
    for _ in range(200):
        token = choose(row, plain)
        assert choose(row, neutral) == token
        plain.append(token)
        neutral.append(token)


@given(x=rows, t=st.sampled_from([0.0, 1e-300, 1e-6]), seed=st.integers(0, 2**64 - 1))
def test_no_temperature_is_greedy_with_the_lowest_id(x: list[float], t: float, seed: int) -> None:
    row = row_of(x)
    assert choose(row, SamplerState(SamplingParams(temperature=t, top_p=0.5), seed=seed)) == x.index(max(x))


# ---- random numbers -----------------------------------------------------------------------------------------------


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    word = 2**64
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], word)
        high1, low1 = divmod(0xCA5A826395121157 * counter[2], word)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B97F4A7C15) % word, (key[1] + 0xBB67AE8584CAA73B) % word]
    return counter


def test_uniform_is_the_documented_counter_based_stream() -> None:
    published = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"  # of zeros, by its authors
    assert philox4x64([0, 0, 0, 0], [0, 0]) == [int(w, 16) for w in published.split()]
    for seed, index, position in ((0, 0, 0), (2**64 - 1, 3, 1), (1234567, 1, 70000)):
        state = SamplerState(SamplingParams(), seed=seed, index=index, answer=[0] * position)
        word = philox4x64([position + 1, 0, 0, 0], [seed, index])[0]
        assert state.uniform() == (word >> 11) / 2**53


def chi_square(observed: Counter[int], probabilities: Sequence[float]) -> float:
    n = sum(observed.values())
    return sum((observed[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probabilities))


def test_draws_follow_the_distribution_along_positions_seeds_and_samples() -> None:
    row = row_of([0.0, 1.0, -1.0, 2.5, 0.3, 0.3, -2.0, 1.7])
    weights = [math.exp(v / 1.3) for v in row.tolist()]
    probabilities = [w / math.fsum(weights) for w in weights]
    params = SamplingParams(temperature=1.3)
    walker, along = SamplerState(params, seed=42), Counter[int]()
    for _ in range(8000):
        along[choose(row, walker)] += 1
        walker.append(0)
    seeds = Counter(choose(row, SamplerState(params, seed=s)) for s in range(8000))
    samples = Counter(choose(row, SamplerState(params, seed=42, index=i)) for i in range(8000))
    for observed in (along, seeds, samples):
        assert chi_square(observed, probabilities) < 24.3  # 7 degrees of freedom: exceeded once in 1000


def test_seed_comes_from_the_request_or_from_entropy() -> None:
    assert resolve_seed(SamplingParams(seed=2**64 - 1)) == 2**64 - 1
    drawn = {resolve_seed(SamplingParams()) for _ in range(20)}
    assert len(drawn) == 20 and all(0 <= s < 2**64 for s in drawn)
    with pytest.raises(RequestError, match="seed"):
        resolve_seed(SamplingParams(seed=2**64))


# ---- batches, state, penalties --------------------------------------------------------------------------------------


def mixed_states() -> list[SamplerState]:
    every = [
        SamplingParams(logprobs=3),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(top_k=20, top_p=0.9, temperature=0.7),
        SamplingParams(top_p=0.8, presence_penalty=0.5, frequency_penalty=0.2),
        SamplingParams(min_p=0.02, repetition_penalty=1.3, logprobs=2),
        SamplingParams(min_tokens=9, stop_token_ids=[4], logit_bias={7: 3.0, 8: -4.0}),
    ]
    return [SamplerState(p, seed=77, index=n, prompt=[1, 2, 3], answer=[5, 5, 2]) for n, p in enumerate(every)]


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)), size=st.integers(1, 6))
def test_a_row_never_sees_its_batch(order: list[int], size: int) -> None:
    logits = (np.random.default_rng(8).standard_normal((6, 333)) * 2).astype(np.float32)
    before = logits.copy()
    alone = [sample_row(row, state, text) for row, state in zip(logits, mixed_states(), strict=True)]
    states = mixed_states()
    picked = order[:size]
    batch = sample(logits[picked], [states[i] for i in picked], text)
    assert batch == [alone[i] for i in picked]
    assert (logits == before).all()


@pytest.mark.parametrize("number", range(6))
def test_a_state_rebuilt_after_preemption_goes_on_identically(number: int) -> None:
    def walk(state: SamplerState, start: int) -> list[SampledToken]:
        found = []
        for step in range(start, 40):
            row = np.random.default_rng(step).standard_normal(200).astype(np.float32)
            found.append(sample_row(row, state, text))
            state.append(found[-1].token_id)
        return found

    params = mixed_states()[number].params
    whole = walk(SamplerState(params, seed=5, prompt=[9, 9, 8]), 0)
    for cut in (1, 8, 23, 39):
        answer = [t.token_id for t in whole[:cut]]
        assert walk(SamplerState(params, seed=5, prompt=[9, 9, 8], answer=answer), cut) == whole[cut:]


token_lists = st.lists(st.integers(0, 29), max_size=60)


@given(
    x=st.lists(st.one_of(st.just(-INF), st.floats(-50, 50, width=32)), min_size=30, max_size=30),
    prompt=token_lists,
    answer=token_lists,
    repetition=st.sampled_from([1.0, 1.2, 0.5, 3.0]),
    presence=st.sampled_from([0.0, 0.7, -2.0]),
    frequency=st.sampled_from([0.0, 0.3, -1.5]),
    bias=st.dictionaries(st.integers(0, 29), st.floats(-100, 100), max_size=4),
    min_tokens=st.integers(0, 60),
    ignore_eos=st.booleans(),
)
def test_adjustments_equal_a_recount_from_scratch(
    x: list[float],
    prompt: list[int],
    answer: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    min_tokens: int,
    ignore_eos: bool,
) -> None:
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        min_tokens=min_tokens,
        stop_token_ids=[3],
        ignore_eos=ignore_eos,
    )
    row = row_of(x)
    state = SamplerState(params, seed=0, prompt=prompt, answer=answer, eos_token_ids=[4, 5])
    expected = []
    for i, value in enumerate(row.tolist()):
        if len(answer) < min_tokens and (i == 3 or (i in (4, 5) and not ignore_eos)):
            value = -INF
        value = float(np.float32(value + bias.get(i, 0.0)))
        if repetition != 1 and i in prompt + answer:
            value = value / repetition if value > 0 else value * repetition
        if i in answer:
            value -= frequency * answer.count(i) + presence
        expected.append(np.float32(value))
    assert state.adjusted(row).tolist() == expected
    assert row.tolist() == row_of(x).tolist()


def test_min_tokens_holds_stop_tokens_back_until_it_is_reached() -> None:
    row = row_of([0, 9, 8, 7])
    state = SamplerState(SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[2]), seed=0, eos_token_ids=[1])
    found = []
    for _ in range(3):
        found.append(choose(row, state))
        state.append(found[-1])
    assert found == [3, 3, 1]


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def logprobs_by_definition(x: list[float], chosen: int, count: int) -> dict[int, Logprob]:
    norm = max(x) + math.log(math.fsum(math.exp(v - max(x)) for v in x))
    ranked = sorted(range(len(x)), key=lambda i: (-x[i], i))
    ids = [chosen, *(i for i in ranked[:count] if i != chosen)]
    return {i: Logprob(x[i] - norm, 1 + sum(v > x[i] for v in x), text(i)) for i in ids}


def assert_same(found: dict[int, Logprob], expected: dict[int, Logprob]) -> None:
    assert list(found) == list(expected)
    for token_id, want in expected.items():
        assert found[token_id][1:] == want[1:]
        assert found[token_id].logprob == pytest.approx(want.logprob, rel=1e-12, abs=1e-12)


@given(x=rows, count=st.integers(0, 50), seed=st.integers(0, 99), t=st.sampled_from([0.0, 1.0]))
def test_logprobs_are_of_the_raw_model_distribution(x: list[float], count: int, seed: int, t: float) -> None:
    row = row_of(x)
    params = SamplingParams(temperature=t, top_p=0.9, logit_bias={0: 5.0}, repetition_penalty=1.5, logprobs=count)
    assume(np.isfinite(SamplerState(params, seed=0, answer=[0]).adjusted(row).max()))
    token = sample_row(row, SamplerState(params, seed=seed, answer=[0]), text)
    assert token.logprobs is not None
    assert_same(token.logprobs, logprobs_by_definition(row.tolist(), token.token_id, count))


def test_logprobs_of_a_large_row_with_ties() -> None:
    row = np.round(np.random.default_rng(2).standard_normal(4010) * 3).astype(np.float32)
    for count in (1, 62, 63, 5000):
        token = sample_row(row, SamplerState(SamplingParams(logprobs=count), seed=1), text)
        assert_same(token.logprobs or {}, logprobs_by_definition(row.tolist(), token.token_id, count))
    assert sample_row(row, SamplerState(SamplingParams(), seed=1), text).logprobs is None


def test_prompt_logprobs_pair_each_row_with_the_next_token() -> None:
    logits = np.random.default_rng(4).standard_normal((5, 90)).astype(np.float32)
    following = [3, 89, 0, 41, 41]
    found = prompt_logprobs(logits, following, 2, text, first_position=16)
    for row, token_id, entry in zip(logits, following, found, strict=True):
        assert_same(entry, logprobs_by_definition(row.tolist(), token_id, 2))


# ---- bad numbers and bad requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[0, math.nan, 1], [-INF, 1, INF], [math.nan, INF, 0], [-INF, -INF, -INF]], ids=str)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0, logit_bias={1: -100.0})], ids=str)
def test_unusable_logits_name_the_position(bad: list[float], params: SamplingParams) -> None:
    with pytest.raises(NumericalError, match="answer position 2"):
        sample_row(row_of(bad), SamplerState(params, seed=0, answer=[0, 0]), text)
    with pytest.raises(NumericalError, match="prompt position 8"):
        prompt_logprobs(np.stack([row_of([0, 1, 2]), row_of(bad)]), [1, 1], 0, text, first_position=7)


def test_settings_that_leave_no_token_are_the_requests_fault() -> None:
    masked = SamplingParams(min_tokens=3, stop_token_ids=[0, 1])
    with pytest.raises(RequestError, match="answer position 1.*min_tokens"):
        sample_row(row_of([1, 2, -INF]), SamplerState(masked, seed=0, answer=[0]), text)
    absurd = SamplerState(SamplingParams(repetition_penalty=1e-300), seed=0, prompt=[1])
    with pytest.raises(RequestError, match="penalties"):
        sample_row(row_of([1, 2, 3]), absurd, text)


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    inside = SamplingParams(stop_token_ids=[0, 99], logit_bias={99: 1.0})
    check_against_vocab(inside, 100)
    for name, params in (
        ("stop_token_ids", SamplingParams(stop_token_ids=[1, 100])),
        ("logit_bias", SamplingParams(logit_bias={5: 1.0, 100: 1.0})),
    ):
        with pytest.raises(RequestError, match=f"{name}.*100.*100"):
            check_against_vocab(params, 100)
