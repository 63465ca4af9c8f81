"""The scheduler, driven by a fake model that reads every earlier token back through the paged cache.

The fake's K/V of a token is a hash of the token, its position, whether its row prefills and all K/V before it, fetched
through the block table; its logits are a hash of all K/V up to there. A stale, shared, lost or misplaced slot anywhere
in a sequence's past, or one of the other kind of row, therefore changes its answer, which must equal that of the
sequence run alone, on a plain list, without a cache.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.blocks import BlockPool
from engine.core import Batch, SamplingParams
from engine.errors import CapacityError, InvalidArgument, RequestError
from engine.scheduler import Scheduler, fit_model_len
from engine.sequence import Sequence, SequenceStatus
from engine.step import Chunk, ScheduledStep, build_step

NUM_TOKENS = 3  # a small vocabulary: prompts and answers often share prefixes
STOP = 2
MASK = 2**64 - 1


def mix(state: int, value: int) -> int:
    state = (state * 6364136223846793005 + value * 2862933555777941757 + 3037000493) & MASK
    return state ^ (state >> 29)


def token_kv(before: int, token: int, position: int, prefills: bool) -> int:
    return mix(mix(before, token), 2 * position + prefills)


def sample(logits: int, index: int) -> int:
    return mix(logits, index) % NUM_TOKENS


def plain_logits(tokens: list[int], num_prefill: int = 0) -> list[int]:
    """The definition: logits after each token, on a plain list. num_prefill: of its leading tokens."""
    state, logits = 0, []
    for position, token in enumerate(tokens):
        state = mix(state, token_kv(state, token, position, position < num_prefill))
        logits.append(state)
    return logits


def plain_answer(seq: Sequence, max_model_len: int, num_prefill: int) -> tuple[list[int], str]:
    tokens = seq.prompt_ids
    while not seq.only_scored:
        tokens.append(sample(plain_logits(tokens, num_prefill)[-1], seq.index))
        if tokens[-1] in (seq.params.stop_token_ids or ()):
            return tokens[seq.num_prompt :], "stop"
        if len(tokens) == max_model_len or len(tokens) - seq.num_prompt == seq.params.max_tokens:
            return tokens[seq.num_prompt :], "length"
    return [], "length"


class FakeModel:
    """A paged cache of one number per slot, filled with rubbish; sequences of a batch run in random order."""

    def __init__(self, pool: BlockPool, seed: int) -> None:
        self.random = random.Random(seed)
        self.size = pool.block_size
        self.cache = [self.random.getrandbits(60) for _ in range(pool.num_blocks * pool.block_size)]

    def run(self, batch: Batch) -> list[int]:
        """Logits of the wanted rows."""
        logits: dict[int, int] = {}
        order = list(range(len(batch.context_lens)))
        self.random.shuffle(order)
        for s in order:
            table = batch.block_tables[s]
            slots = [int(table[p // self.size]) * self.size + p % self.size for p in range(batch.context_lens[s])]
            rows = range(batch.query_start[s], batch.query_start[s + 1])
            first = int(batch.positions[rows[0]])
            assert [int(batch.positions[r]) for r in rows] == list(range(first, batch.context_lens[s]))
            state = 0
            for slot in slots[:first]:
                state = mix(state, self.cache[slot])
            for row in rows:
                position = int(batch.positions[row])
                assert batch.num_decode_rows is not None
                kv = token_kv(state, int(batch.token_ids[row]), position, row >= batch.num_decode_rows)
                self.cache[batch.slot_mapping[row]] = kv
                state = mix(state, self.cache[slots[position]])
                logits[row] = state
        return [logits[int(row)] for row in batch.logit_rows]


class Host:
    """What the engine does around the scheduler, with checks of each step's contract."""

    def __init__(
        self,
        num_blocks: int,
        size: int,
        *,
        seqs: int = 8,
        budget: int = 64,
        length: int | None = None,
        caching: bool = True,
        seed: int = 0,
        short: int | None = None,
    ) -> None:
        self.pool = BlockPool(num_blocks, size, enable_prefix_caching=caching)
        length = fit_model_len(length or num_blocks * size, num_blocks, size)
        limits = {"max_num_seqs": seqs, "max_num_batched_tokens": budget, "max_model_len": length}
        self.scheduler = Scheduler(self.pool, **limits, short_prompt_tokens=short)
        self.model = FakeModel(self.pool, seed)
        self.scored: dict[Sequence, dict[int, int]] = {}
        self.sequences: list[Sequence] = []

    def add(self, prompt: list[int], n: int = 1, only_scored: bool = False, **params: Any) -> list[Sequence]:
        """One request of n answers; its id is the number of its first sequence."""
        request = SamplingParams(n=n, **params)
        new = [Sequence(len(self.sequences), index, list(prompt), request, only_scored) for index in range(n)]
        for seq in new:
            self.scheduler.add(seq)
        self.sequences += new
        return new

    def schedule(self) -> ScheduledStep | None:
        scheduler = self.scheduler
        waiting, running = list(scheduler.waiting), set(scheduler.running)
        step = scheduler.schedule()
        scheduler.check_integrity()
        if step is None:
            assert not scheduler.has_unfinished
            return None
        self.check_batch(step)
        if scheduler.short_prompt_tokens is None:
            several = [chunk.sequence.num_remaining > 1 for chunk in step.chunks if chunk.sequence in running]
            assert several == sorted(several), "decodes come first"
        if step.preempted:
            last_running = max(seq.arrival for seq in scheduler.running)
            assert last_running < min(seq.arrival for seq in step.preempted), "the latest arrivals go first"
        started = [seq for seq in waiting if seq.status is SequenceStatus.RUNNING]
        left = [seq for seq in waiting if seq.status is SequenceStatus.WAITING]
        passed = [seq for seq in left if started and seq.arrival < started[-1].arrival]
        for seq in passed:
            assert self.pool.enable_prefix_caching and seq.index > 0, "somebody was admitted out of turn"
            assert seq.leader is not None and seq.leader.num_output == 0 and not seq.leader.is_finished
        return step

    def check_batch(self, step: ScheduledStep) -> None:
        batch, size = step.batch, self.pool.block_size
        arrays = [getattr(batch, name) for name in Batch.__dataclass_fields__ if name != "num_decode_rows"]
        assert all(array.dtype == np.int32 for array in arrays)
        num_rows, num_seqs = len(batch.token_ids), len(step.chunks)
        assert 0 < num_rows <= self.scheduler.max_num_batched_tokens
        assert len({chunk.sequence for chunk in step.chunks}) == num_seqs <= self.scheduler.max_num_seqs
        assert batch.positions.shape == batch.slot_mapping.shape == (num_rows,)
        assert batch.query_start[0] == 0 and batch.query_start[-1] == num_rows
        assert batch.block_tables.shape == (num_seqs, max(-(-end // size) for _, _, end in step.chunks))
        assert len(set(batch.slot_mapping.tolist())) == num_rows, "two rows write one slot"
        for slot in batch.slot_mapping.tolist():
            assert self.pool.num_references(slot // size) == 1 and not self.pool.is_indexed(slot // size)
        owners = [seq for seq, start, end in step.chunks for _ in range(end - start)]
        for row, described in zip(batch.logit_rows, step.logit_rows, strict=True):
            assert (owners[row], batch.positions[row]) == (described.sequence, described.position)
        for row, (seq, position) in enumerate(zip(owners, batch.positions.tolist(), strict=True)):
            assert (row >= batch.num_decode_rows) == (position < self.num_prefill(seq)), "a row of the other kind"

    def num_prefill(self, seq: Sequence) -> int:
        """The definition: all of a long prompt."""
        short = self.scheduler.short_prompt_tokens
        return seq.num_prompt if short is not None and seq.num_prompt > short else 0

    def run(self, step: ScheduledStep, *, abort_midway: list[Sequence] | None = None) -> list[Sequence]:
        logits = self.model.run(step.batch)
        for seq in abort_midway or ():
            self.scheduler.finish(seq, "abort")
        tokens = {seq: sample(logits[i], seq.index) for i, seq in step.sampled}
        for value, row in zip(logits, step.logit_rows, strict=True):
            if not row.sequence.is_finished:
                scored = self.scored.setdefault(row.sequence, {})
                assert row.position not in scored, "a position's logits were given twice"
                scored[row.position] = value
        stopped = {seq for seq, token in tokens.items() if token in (seq.params.stop_token_ids or ())}
        finished = self.scheduler.complete(step, tokens, stopped)
        self.scheduler.check_integrity()
        assert all(seq.is_finished for seq in finished)
        return finished

    def step(self) -> ScheduledStep:
        step = self.schedule()
        assert step is not None
        self.run(step)
        return step

    def drain(self) -> int:
        """Run to the end; return the number of steps. Bounded, so that a livelock fails."""
        unfinished = sum(not seq.is_finished for seq in self.sequences)
        bound = 2 * (1 + unfinished) * self.scheduler.max_model_len * (1 + self.scheduler.max_model_len)
        for count in range(bound):
            step = self.schedule()
            if step is None:
                return count
            self.run(step)
        raise AssertionError(f"{unfinished} sequences did not finish in {bound} steps")

    def check_answers(self) -> None:
        """Every sequence's answer and scores are those of running it alone; the pool has everything back."""
        for seq in self.sequences:
            num_prefill = self.num_prefill(seq)
            expected, reason = plain_answer(seq, self.scheduler.max_model_len, num_prefill)
            if seq.finish_reason == "abort":
                assert seq.output_ids == expected[: seq.num_output]
            else:
                assert (seq.output_ids, seq.finish_reason) == (expected, reason)
                first = 0 if seq.scores_prompt else seq.num_prompt - 1
                end = len(seq.tokens) - (0 if seq.only_scored else 1)  # nothing is computed of an answer's last token
                assert self.scored[seq].keys() == set(range(first, end))
            logits = plain_logits(seq.tokens, num_prefill)
            assert all(logits[position] == value for position, value in self.scored.get(seq, {}).items())
        assert self.pool.num_used == 0 and self.pool.num_free + self.pool.num_cached == self.pool.num_blocks
        self.pool.clear_cache()
        assert self.pool.num_free == self.pool.num_blocks
        self.scheduler.check_integrity()


def lengths(step: ScheduledStep) -> list[int]:
    return [end - start for _, start, end in step.chunks]


# ---- random schedules


prompts = st.one_of(
    st.lists(st.integers(0, NUM_TOKENS - 1), min_size=1, max_size=24),
    st.integers(1, 24).map(lambda count: ([0, 1, 0, 0, 1, 1] * 4)[:count]),  # prefixes of one another
)


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps, failures and cancellations in any order, in pools that are mostly too small."""

    @initialize(
        size=st.integers(1, 4),
        num_blocks=st.integers(2, 14),
        seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        caching=st.sampled_from([True, True, False]),
        seed=st.integers(0, 9),
        slack=st.integers(0, 20),
        short=st.none() | st.integers(0, 12),
    )
    def start(self, num_blocks: int, size: int, slack: int, **options: Any) -> None:
        self.host = Host(num_blocks, size, length=max(2, num_blocks * size - slack), **options)

    @rule(
        prompt=prompts,
        n=st.sampled_from([1, 1, 2, 4]),
        max_tokens=st.none() | st.integers(1, 16),
        score=st.sampled_from([None, None, 1]),
        stop=st.booleans(),
    )
    def arrive(self, prompt: list[int], n: int, max_tokens: int | None, score: int | None, stop: bool) -> None:
        prompt = prompt[: self.host.scheduler.max_model_len - 1]
        stop_ids = [STOP] if stop else None
        self.host.add(prompt, n, max_tokens=max_tokens, prompt_logprobs=score, stop_token_ids=stop_ids)

    @rule(prompt=prompts)
    def arrive_for_logits(self, prompt: list[int]) -> None:
        self.host.add(prompt[: self.host.scheduler.max_model_len], only_scored=True, prompt_logprobs=0)

    @precondition(lambda self: any(seq.is_finished for seq in self.host.sequences))
    @rule(data=st.data(), more=prompts)
    def continue_a_chat(self, data: st.DataObject, more: list[int]) -> None:
        earlier = data.draw(st.sampled_from([seq for seq in self.host.sequences if seq.is_finished]))
        self.arrive(earlier.tokens + more, 1, 4, None, False)

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            step = self.host.schedule()
            if step is not None:
                self.host.run(step)

    @rule(runs=st.booleans())
    def step_that_fails(self, runs: bool) -> None:
        """The step is dropped, before or after the model wrote to the cache."""
        step = self.host.schedule()
        if step is not None and runs:
            self.host.model.run(step.batch)

    @rule(data=st.data())
    def step_with_cancellation(self, data: st.DataObject) -> None:
        step = self.host.schedule()
        if step is not None:
            live = self.host.scheduler.running + self.host.scheduler.waiting
            self.host.run(step, abort_midway=data.draw(st.lists(st.sampled_from(live), max_size=2)))

    @precondition(lambda self: self.host.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from([seq.request_id for seq in self.host.sequences]))
        self.host.scheduler.abort(request_id)
        assert all(seq.is_finished for seq in self.host.sequences if seq.request_id == request_id)

    @rule()
    def clear_cache(self) -> None:
        self.host.pool.clear_cache()

    @invariant()
    def is_sound(self) -> None:
        self.host.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.host.drain()
            self.host.check_answers()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [3, 5, 64])
@pytest.mark.parametrize("short", [None, 6])
def test_crowded_pool_gives_the_answers_of_sequences_run_alone(budget: int, caching: bool, short: int | None) -> None:
    host = Host(12, 4, seqs=6, budget=budget, caching=caching, short=short)
    for i in range(12):
        host.add([i % 3, 1, 2, 0, 1, i % 2][: 1 + i % 6] * 3, n=1 + i % 3, max_tokens=20)
    host.drain()
    assert sum(seq.num_preemptions for seq in host.sequences) > 0, "the pool was meant to be too small"
    host.check_answers()


# ---- what a step holds


def test_batch_of_a_decode_and_a_chunk() -> None:
    host = Host(8, 4, budget=6)
    (first,) = host.add([2, 0, 1, 1])
    host.step()
    (second,) = host.add([1] * 9)
    step = host.schedule()
    assert step is not None
    batch = step.batch
    assert [chunk.sequence for chunk in step.chunks] == [first, second] and lengths(step) == [1, 5]
    assert batch.token_ids.tolist() == [first.tokens[4], 1, 1, 1, 1, 1]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4]
    assert batch.query_start.tolist() == [0, 1, 6]
    assert batch.context_lens.tolist() == [5, 5]
    assert batch.block_tables.tolist() == [first.block_table.tolist(), second.block_table[:2].tolist()]
    a, b = first.block_table, second.block_table
    assert batch.slot_mapping.tolist() == [4 * a[1], 4 * b[0], 4 * b[0] + 1, 4 * b[0] + 2, 4 * b[0] + 3, 4 * b[1]]
    assert batch.logit_rows.tolist() == [0] and step.sampled == [(0, first)]
    host.run(step)
    step = host.step()
    assert lengths(step) == [1, 4] and step.sampled == [(0, first), (1, second)]


def test_decodes_come_first_and_a_long_prompt_takes_what_is_left() -> None:
    host = Host(64, 4, budget=8)
    for _ in range(3):
        host.add([0, 1], max_tokens=30)
    host.step()
    host.add([1] * 14)
    assert [lengths(host.step()) for _ in range(4)] == [[1, 1, 1, 5], [1, 1, 1, 5], [1, 1, 1, 4], [1, 1, 1, 1]]


def test_scored_prompt_gives_each_position_once_and_does_not_use_the_cache() -> None:
    host = Host(16, 2, budget=4)
    host.add([0, 1, 2, 0, 1, 2], max_tokens=1)
    host.drain()
    (scored,) = host.add([0, 1, 2, 0, 1, 2], max_tokens=1, prompt_logprobs=0)
    (plain,) = host.add([0, 1, 2, 0, 1, 2], max_tokens=1)
    step = host.step()
    assert [row.position for row in step.logit_rows] == [0, 1, 2, 3] and step.sampled == []
    host.drain()
    assert scored.num_cached_tokens == 0 and plain.num_cached_tokens == 4
    assert [host.scored[scored][p] for p in range(6)] == plain_logits([0, 1, 2, 0, 1, 2])


def test_a_request_for_logits_alone_may_fill_the_context_and_gets_no_token() -> None:
    host = Host(3, 4, budget=5)
    with pytest.raises(RequestError, match="has 13 tokens and at most 12 fit"):
        host.add([1] * 13, only_scored=True, prompt_logprobs=0)
    (seq,) = host.add([1, 0, 2] * 4, only_scored=True, prompt_logprobs=0)
    host.drain()
    assert seq.num_output == 0 and [host.scored[seq][p] for p in range(12)] == plain_logits([1, 0, 2] * 4)
    host.check_answers()


# ---- rows that prefill


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=6)
)
def test_rows_of_a_step(cases: list[tuple[int, int, int, bool]]) -> None:
    """Decode rows before prefill rows, both in the chunks' order, and each row its chunk's own."""
    chunks = []
    for i, (num_prompt, start, count, long) in enumerate(cases):
        seq = Sequence(i, 0, list(range(100 * i, 100 * i + num_prompt)), SamplingParams())
        seq.tokens += range(100 * i + num_prompt, 100 * i + 30)
        seq.num_prefill = num_prompt if long else 0
        end = start + count if start >= seq.num_prefill else min(start + count, num_prompt)
        seq.block_table.extend(range(8 * i, 8 * i + 8))
        chunks.append(Chunk(seq, start, end))
    step = build_step(chunks, [], block_size=4)
    prefills = [chunk.start < chunk.sequence.num_prefill for chunk in chunks]
    in_order = [c for c, p in zip(chunks, prefills, strict=True) if not p]
    assert step.batch.num_decode_rows == sum(end - start for _, start, end in in_order)
    in_order += [c for c, p in zip(chunks, prefills, strict=True) if p]
    assert step.chunks == tuple(in_order)
    rows = [(seq, position) for seq, start, end in in_order for position in range(start, end)]
    assert step.batch.token_ids.tolist() == [seq.tokens[position] for seq, position in rows]
    assert step.batch.slot_mapping.tolist() == [32 * seq.request_id + position for seq, position in rows]
    assert [(owner, position) for owner, position, _ in step.logit_rows] == [
        (seq, position) for seq, position in rows if position >= seq.next_logit
    ]


def kinds(step: ScheduledStep) -> list[tuple[int, int, bool]]:
    """Chunks as (start, end, whether their rows prefill)."""
    decode_rows = step.batch.num_decode_rows
    assert decode_rows is not None
    ends = step.batch.query_start[:-1]
    return [(start, end, bool(row >= decode_rows)) for (_, start, end), row in zip(step.chunks, ends, strict=True)]


def test_long_prompts_prefill_to_their_last_token_and_come_last() -> None:
    host = Host(64, 4, budget=8, short=5)
    host.add([0] * 7, max_tokens=9)
    host.add([1] * 6, max_tokens=9)
    host.add([2] * 5, max_tokens=9)
    assert kinds(host.step()) == [(0, 7, True), (0, 1, True)]
    assert kinds(host.step()) == [(7, 8, False), (0, 2, False), (1, 6, True)], "a short prompt is before a long one"
    assert kinds(host.step()) == [(8, 9, False), (6, 7, False), (2, 5, False)]
    host.add([0] * 8, max_tokens=1)
    assert kinds(host.step())[3:] == [(4, 8, True)], "the rest of a cached prompt prefills, too"
    host.drain()
    host.check_answers()


def test_an_answer_run_anew_decodes_in_a_step_of_its_own() -> None:
    host = Host(16, 2, seqs=2, short=3, caching=False)
    host.add([0, 1, 2, 1], max_tokens=8)
    (second,) = host.add([1, 1, 2, 2, 0], max_tokens=12)
    for _ in range(4):
        host.step()
    host.scheduler._preempt_latest()
    assert second.num_output == 4
    assert kinds(host.step()) == [(7, 8, False), (0, 5, True)]
    assert kinds(host.step()) == [(8, 9, False), (5, 9, False)]
    host.drain()
    host.check_answers()


def test_what_one_kind_of_rows_computed_is_not_found_by_the_other() -> None:
    host = Host(32, 2, short=4)
    (short,) = host.add([0, 1, 2, 1], max_tokens=5)
    host.drain()
    (longer,) = host.add([*short.tokens, 0], max_tokens=6)
    host.drain()
    assert longer.num_cached_tokens == 0, "it would have decoded"
    (again,) = host.add([*longer.tokens, 1], max_tokens=1)
    host.drain()
    assert again.num_cached_tokens == 10, "its prompt, not its answer"
    (same,) = host.add([0, 1, 2, 1], max_tokens=5)
    host.drain()
    assert same.num_cached_tokens == 2
    host.check_answers()


# ---- prefix cache


@pytest.mark.parametrize(("num_prompt", "expected"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_a_cached_prompt_still_computes_its_last_token(num_prompt: int, expected: int) -> None:
    host = Host(16, 4)
    prompt = [0, 1, 2, 1, 0, 2, 0, 1, 1][:num_prompt]
    host.add(prompt, max_tokens=1)
    host.drain()
    (again,) = host.add(prompt, max_tokens=1)
    assert lengths(host.step()) == [num_prompt - expected] and again.num_cached_tokens == expected
    host.check_answers()


def test_a_longer_chat_reuses_the_answer_too() -> None:
    host = Host(16, 4)
    (first,) = host.add([0, 1, 2, 1, 0], max_tokens=8)
    host.drain()
    (second,) = host.add([*first.tokens, 1, 1], max_tokens=1)
    host.drain()
    assert second.num_cached_tokens == 12, "the last token of the answer was never computed"
    host.check_answers()


def test_siblings_wait_for_the_first_and_share_its_prompt() -> None:
    host = Host(32, 4, budget=8)
    answers = host.add([0, 1, 2, 1, 0, 2, 0, 1, 1], n=3, max_tokens=4)
    (later,) = host.add([1, 1], max_tokens=4)
    host.step()
    assert host.scheduler.running == [answers[0]]
    step = host.step()
    assert host.scheduler.running == [answers[0], later], "others need not wait with them"
    assert lengths(step) == [1, 2]
    step = host.step()
    assert host.scheduler.running == [*answers, later] and lengths(step) == [1, 1, 1, 1]
    assert [seq.num_cached_tokens for seq in answers] == [0, 8, 8]
    host.drain()
    host.check_answers()


@pytest.mark.parametrize(("caching", "num_prompt"), [(False, 9), (True, 4)])
def test_siblings_start_together_where_there_is_nothing_to_share(caching: bool, num_prompt: int) -> None:
    host = Host(32, 4, caching=caching)
    answers = host.add([1] * num_prompt, n=3, max_tokens=2)
    host.step()
    assert host.scheduler.running == answers


def test_siblings_go_on_when_the_first_is_cancelled() -> None:
    host = Host(32, 4, budget=4)
    answers = host.add([1] * 9, n=3, max_tokens=2)
    host.step()
    host.scheduler.finish(answers[0], "abort")
    host.drain()
    assert [seq.finish_reason for seq in answers] == ["abort", "length", "length"]
    host.check_answers()


# ---- order, preemption, progress


def test_first_come_first_served() -> None:
    host = Host(16, 4, seqs=1)
    sequences = [host.add([1, i % 3], max_tokens=2)[0] for i in range(5)]
    order: list[Sequence] = []
    while (step := host.schedule()) is not None:
        order += [seq for seq in host.run(step)]
    assert order == sequences


def test_a_large_request_is_not_passed_by_small_ones_for_ever() -> None:
    host = Host(8, 4, seqs=4)
    host.add([1], max_tokens=20)
    host.step()
    (large,) = host.add([2] * 28, max_tokens=3)
    for _ in range(60):
        host.add([1], max_tokens=3)
        host.step()
    assert large.is_finished
    assert all(seq.arrival > large.arrival for seq in host.scheduler.running)


def test_the_latest_arrival_is_preempted_and_resumes_before_later_ones() -> None:
    host = Host(6, 2, seqs=2, caching=True)
    (first,), (second,), (third,) = (host.add([i, 1, 0], max_tokens=8) for i in range(3))
    while not second.num_preemptions:
        step = host.step()
    assert step.preempted == (second,) and host.scheduler.waiting == [second, third]
    assert second.num_output > 0 and second.num_computed == 0 and not second.block_table
    while second.status is SequenceStatus.WAITING:
        host.step()
    assert third.status is SequenceStatus.WAITING or host.scheduler.running == [second, third]
    assert first.num_preemptions == 0
    host.drain()
    host.check_answers()


def test_a_preempted_sequence_finds_its_blocks_again() -> None:
    host = Host(16, 2, seqs=2)
    host.add([0, 1, 2], max_tokens=12)
    (second,) = host.add([1, 1, 2, 2, 0], max_tokens=12)
    host.step()
    host.scheduler._preempt_latest()
    step = host.step()
    assert step.chunks[1][1:] == (4, 6) and second.num_preemptions == 1 and second.num_cached_tokens == 0
    host.drain()
    host.check_answers()


def test_nobody_is_admitted_into_the_blocks_that_running_sequences_need_next() -> None:
    host = Host(6, 2, caching=False)
    host.add([0, 1], n=2, max_tokens=4)
    host.step()
    assert (host.pool.num_used, host.pool.num_available) == (2, 4)
    (third,) = host.add([1, 1], max_tokens=4)
    step = host.step()
    assert third.status is SequenceStatus.WAITING, "2 blocks are left, and 1 + 2 would be needed"
    assert len(step.chunks) == 2 and not step.preempted
    host.drain()
    assert third.num_preemptions == 0
    host.check_answers()


def test_a_lone_sequence_may_fill_the_pool() -> None:
    host = Host(3, 4)
    (seq,) = host.add([1])
    host.drain()
    assert len(seq.tokens) == 12 and seq.finish_reason == "length" and seq.num_preemptions == 0


def test_after_a_dropped_step_an_older_prefill_may_take_the_whole_budget() -> None:
    host = Host(64, 4, budget=12)
    _, sibling = host.add([1] * 20, n=2)
    (later,) = host.add([2] * 30)
    for _ in range(4):
        host.step()
    host.pool.clear_cache()  # the sibling has all of its prompt to compute
    dropped = host.schedule()
    assert dropped is not None and lengths(dropped) == [1, 4, 7] and dropped.chunks[2].sequence is sibling
    step = host.step()
    assert lengths(step) == [1, 11] and step.chunks[1].sequence is sibling and later.num_remaining == 4
    host.drain()
    host.check_answers()


# ---- ends


def test_reasons_to_end() -> None:
    host = Host(16, 4, length=12)
    ends = [host.add([0, 1], max_tokens=3)[0], host.add([0, 1])[0], host.add([0], n=3, stop_token_ids=[0, 1, 2])[0]]
    host.drain()
    assert [(seq.finish_reason, len(seq.tokens)) for seq in ends] == [("length", 5), ("length", 12), ("stop", 2)]


def test_a_token_that_stops_at_max_tokens_is_a_stop() -> None:
    host = Host(4, 4)
    (seq,) = host.add([1], max_tokens=1, stop_token_ids=list(range(NUM_TOKENS)))
    host.drain()
    assert seq.finish_reason == "stop"


def test_cancellation_returns_blocks_at_once() -> None:
    host = Host(16, 4, seqs=2, caching=False)
    host.add([1, 1, 1], n=3, max_tokens=9)
    step = host.schedule()
    assert step is not None and host.pool.num_used == 2
    cancelled = host.scheduler.abort(0)
    assert len(cancelled) == 3 and host.pool.num_used == 0 and not host.scheduler.has_unfinished
    assert host.scheduler.complete(step, {}) == []
    assert host.scheduler.abort(0) == [] and host.scheduler.abort("unknown") == []
    assert host.schedule() is None


def test_a_stale_step_cannot_be_completed() -> None:
    host = Host(4, 4)
    host.add([1, 2])
    stale = host.schedule()
    host.step()
    assert stale is not None
    with pytest.raises(AssertionError, match="only the latest step"):
        host.scheduler.complete(stale, {})


# ---- refusals


def test_prompts_that_never_fit_are_refused_with_the_length_that_does() -> None:
    host = Host(4, 4, length=10)
    with pytest.raises(RequestError, match=r"has 10 tokens and at most 9 fit \(max_model_len 10"):
        host.add([1] * 10)
    with pytest.raises(RequestError, match="empty"):
        host.add([])
    assert not host.scheduler.has_unfinished
    host.scheduler.check_integrity()
    host.add([1] * 9)
    host.drain()
    host.check_answers()


def test_model_length_is_fitted_to_the_pool() -> None:
    assert fit_model_len(100, 4, 16) == 64 and fit_model_len(50, 4, 16) == 50
    with pytest.raises(CapacityError, match="holds 1 tokens"):
        fit_model_len(100, 1, 1)
    with pytest.raises(CapacityError, match="max_model_len 65 does not fit .* holds 64 tokens"):
        Scheduler(BlockPool(4, 16), max_num_seqs=1, max_num_batched_tokens=1, max_model_len=65)


@pytest.mark.parametrize("bad", [{"max_num_seqs": 0}, {"max_num_batched_tokens": 0}, {"max_model_len": 1}])
def test_limits_must_be_positive(bad: dict[str, int]) -> None:
    good = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 16}
    with pytest.raises(InvalidArgument, match="must be at least"):
        Scheduler(BlockPool(4, 16), **(good | bad))


def test_siblings_do_not_score_the_prompt_again() -> None:
    params = SamplingParams(n=2, prompt_logprobs=1)
    first, second = (Sequence("r", index, [1, 2, 3], params) for index in range(2))
    assert (first.next_logit, second.next_logit) == (0, 2)
    assert Sequence("r", 0, [1, 2, 3], replace(params, prompt_logprobs=None)).next_logit == 2
