"""Decides what each step computes: continuous batching, chunked prefill, preemption by recompute.

A step is `schedule()`, the model's forward pass and sampling, `complete()`. Within `max_num_batched_tokens`, sequences
that decode (one token each) come first, then prefills under way, then waiting sequences, always in order of arrival;
what does not fit is cut into chunks and goes on next step. So long prompts do not hold up the answers being written.

Blocks. A sequence is admitted when blocks for all its known tokens are to be had, less what the prefix cache already
holds, and one more stays for each running sequence: it would be preempted at once otherwise. While it decodes it takes
a block whenever its last one is full. When none is left the latest arrival gives all of its blocks back and waits
again; later it is run anew from its prompt and its answer so far, mostly from the prefix cache.

Two kinds of rows. A backend may sum in one order for many tokens and in another for few, and a token's bits must not
depend on its batch-mates. So its kind follows from the request alone: prefill rows are all positions of a prompt longer
than `short_prompt_tokens`, wherever the budget cuts it; all others are decode rows. A short prompt's are, because most
of what it costs is reading the weights; those of an answer that is run anew after a preemption are, because they were
the first time. The prefix cache keeps the kinds apart (`Sequence.block_key`): a long prompt does not find what a short
one or an answer computed. Backends with one order for all have no `short_prompt_tokens`, and share everything.

Nobody starves. Running and waiting are ordered by arrival, nobody is admitted past one that waits for blocks, and only
the latest arrival is preempted, so the oldest keeps what it has. `max_model_len` tokens always fit the pool
(`fit_model_len`), so the last one running finishes. One rule lets others pass: where prefix caching can help, the
second to n-th answers to a prompt wait until the first has computed it, and then all read its blocks.

`schedule` changes no sequence's progress, only `complete` does: a step that failed may be dropped, and the next
`schedule` does its work again. Nothing here chooses tokens, knows text, or is thread-safe.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Container, Hashable, Iterable, Mapping
from operator import attrgetter

from engine.blocks import BlockPool
from engine.core import FinishReason
from engine.errors import CapacityError, InvalidArgument, RequestError
from engine.sequence import Sequence, SequenceStatus
from engine.step import Chunk, ScheduledStep, build_step

_ARRIVAL = attrgetter("arrival")


def fit_model_len(wanted: int, num_blocks: int, block_size: int) -> int:
    """The longest sequence, in tokens, that both the wanted length and a pool of `num_blocks` blocks allow.

    Raises CapacityError when the pool cannot hold even a prompt and an answer of one token each.
    """
    capacity = num_blocks * block_size
    if capacity < 2:
        raise CapacityError(
            f"the KV cache holds {capacity} tokens and a sequence needs at least 2; give it more memory "
            "(kv_cache_bytes)"
        )
    return min(wanted, capacity)


def check_prompt_length(num_prompt: int, max_model_len: int, *, only_scored: bool) -> None:
    """Raise RequestError for a prompt that can never be served, naming the length that can."""
    if num_prompt == 0:
        raise RequestError("the prompt is empty; give at least one token")
    num_answer = 0 if only_scored else 1  # tokens an answer has at least
    longest = max_model_len - num_answer
    if num_prompt > longest:
        raise RequestError(
            f"the prompt has {num_prompt} tokens and at most {longest} fit (max_model_len {max_model_len}, of which "
            f"{num_answer} for the answer); shorten it or raise max_model_len"
        )


class Scheduler:
    """Serves sequences from one block pool. Deterministic: the same calls give the same steps.

    max_num_seqs: sequences running at once. max_num_batched_tokens: tokens per step. max_model_len: tokens per
    sequence, prompt and answer together. short_prompt_tokens: `Ops.short_prompt_tokens`. Raises InvalidArgument for
    values that are too small, CapacityError when one sequence of max_model_len tokens does not fit the pool (see
    `fit_model_len`).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        short_prompt_tokens: int | None = None,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1 or max_model_len < 2:
            raise InvalidArgument(
                f"max_num_seqs and max_num_batched_tokens must be at least 1 and max_model_len at least 2, not "
                f"{max_num_seqs}, {max_num_batched_tokens} and {max_model_len}"
            )
        fits = fit_model_len(max_model_len, pool.num_blocks, pool.block_size)
        if fits < max_model_len:
            raise CapacityError(
                f"max_model_len {max_model_len} does not fit the KV cache, which holds {fits} tokens; set "
                f"max_model_len to {fits} or less, or give the cache more memory (kv_cache_bytes)"
            )
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.short_prompt_tokens = short_prompt_tokens
        self.waiting: list[Sequence] = []  # both by arrival, oldest first
        self.running: list[Sequence] = []
        self._requests: dict[Hashable, list[Sequence]] = {}  # unfinished sequences by request
        self._num_arrived = 0
        self._in_flight: ScheduledStep | None = None

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; add a request's n sequences one after the other, index 0 first.

        Raises RequestError as `check_prompt_length` does.
        """
        assert seq.arrival < 0, "a sequence is added once"
        check_prompt_length(seq.num_prompt, self.max_model_len, only_scored=seq.only_scored)
        siblings = self._requests.setdefault(seq.request_id, [])
        seq.leader = siblings[0] if siblings else None
        siblings.append(seq)
        if self.short_prompt_tokens is not None and seq.num_prompt > self.short_prompt_tokens:
            seq.num_prefill = seq.num_prompt
        seq.arrival = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(seq)

    def abort(self, request_id: Hashable) -> list[Sequence]:
        """Cancel what is unfinished of a request, at any time; return it. Nothing if it is unknown or finished."""
        unfinished = list(self._requests.get(request_id, ()))
        for seq in unfinished:
            self.finish(seq, "abort")
        return unfinished

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End one sequence, at any time, also while a step with it is in flight; does nothing if it has ended."""
        if seq.is_finished:
            return
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._release_blocks(seq)
        else:
            self.waiting.remove(seq)
        seq.status, seq.finish_reason, seq.leader = SequenceStatus.FINISHED, reason, None
        siblings = self._requests[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._requests[seq.request_id]

    def schedule(self) -> ScheduledStep | None:
        """Choose the next step's work; None when there is nothing left to do."""
        preempted = self._extend_tables()
        budget = self.max_num_batched_tokens
        chunks: list[Chunk] = []
        for seq in sorted(self.running, key=lambda seq: seq.num_remaining > 1):  # stable: decodes first, by arrival
            if budget > 0:
                budget -= _append_chunk(chunks, seq, budget)
        for seq in self._admissible() if not preempted else ():
            if budget == 0 or not self._admit(seq):
                break
            budget -= _append_chunk(chunks, seq, budget)
        assert chunks or not self.has_unfinished, "sequences wait and none can run"
        self._in_flight = build_step(chunks, preempted, self.pool.block_size) if chunks else None
        return self._in_flight

    def complete(
        self, step: ScheduledStep, new_tokens: Mapping[Sequence, int], stopped: Container[Sequence] = ()
    ) -> list[Sequence]:
        """Record that the latest step has run; return the sequences that it finished.

        new_tokens: the token of each sequence in `step.sampled`; those finished since `schedule` may be left out.
        stopped: the sequences whose new token ends them (reason "stop"). Otherwise they end with reason "length" at
        max_tokens or max_model_len.
        """
        assert step is self._in_flight, "only the latest step can be completed, once"
        self._in_flight = None
        finished: list[Sequence] = []
        for seq, _, end in step.chunks:
            if seq.is_finished:
                continue
            seq.num_computed = end
            seq.next_logit = max(seq.next_logit, end)
            self._register_blocks(seq)
            if seq.num_remaining > 0:
                continue
            if not seq.only_scored:
                seq.tokens.append(new_tokens[seq])
            if seq in stopped:
                self.finish(seq, "stop")
            elif seq.only_scored or len(seq.tokens) == self.max_model_len or seq.num_output == seq.params.max_tokens:
                self.finish(seq, "length")
            if seq.is_finished:
                finished.append(seq)
        return finished

    def _extend_tables(self) -> list[Sequence]:
        """Give every running sequence room for its known tokens, oldest first; return whom that preempted."""
        preempted: list[Sequence] = []
        for seq in list(self.running):
            needs_block = self.pool.num_blocks_for(len(seq.tokens)) > len(seq.block_table)
            while needs_block and self.pool.num_available == 0 and seq.status is SequenceStatus.RUNNING:
                preempted.append(self._preempt_latest())
            if needs_block and seq.status is SequenceStatus.RUNNING:
                seq.block_table.extend(self.pool.allocate(1))
        return preempted

    def _preempt_latest(self) -> Sequence:
        seq = self.running.pop()
        self._release_blocks(seq)
        seq.status = SequenceStatus.WAITING
        seq.num_preemptions += 1
        insort(self.waiting, seq, key=_ARRIVAL)
        return seq

    def _admissible(self) -> Iterable[Sequence]:
        """Waiting sequences in the order in which they may be admitted, while there is a place to run."""
        for seq in list(self.waiting):
            if len(self.running) == self.max_num_seqs:
                return
            if not self._awaits_leader(seq):
                yield seq

    def _awaits_leader(self, seq: Sequence) -> bool:
        """Whether the first answer to the same prompt is about to compute blocks that this one can read."""
        leader = seq.leader
        if leader is None or leader.is_finished or leader.num_output > 0:
            return False
        return self.pool.enable_prefix_caching and seq.next_logit >= self.pool.block_size

    def _admit(self, seq: Sequence) -> bool:
        """Start a waiting sequence if its known tokens fit, with all the prefix cache has of them."""
        size = self.pool.block_size
        hit = self.pool.match(seq.block_key(i, size) for i in range(seq.next_logit // size))
        num_new = self.pool.num_blocks_for(len(seq.tokens)) - len(hit.blocks)
        if num_new + hit.num_cached + len(self.running) > self.pool.num_available:
            return False
        self.pool.hold(hit.blocks)
        seq.block_table.extend(hit.blocks)
        seq.block_table.extend(self.pool.allocate(num_new))
        seq.num_registered, seq.prefix = len(hit.blocks), hit.node
        seq.num_computed = len(hit.blocks) * size
        if seq.num_preemptions == 0:
            seq.num_cached_tokens = seq.num_computed
        seq.status = SequenceStatus.RUNNING
        self.waiting.remove(seq)
        insort(self.running, seq, key=_ARRIVAL)
        return True

    def _register_blocks(self, seq: Sequence) -> None:
        """Index the blocks that the latest step filled."""
        size = self.pool.block_size
        for i in range(seq.num_registered, seq.num_computed // size):
            assert seq.prefix is not None, "a running sequence has a place in the prefix tree"
            seq.prefix = self.pool.register(seq.block_table[i], seq.prefix, seq.block_key(i, size))
            seq.num_registered = i + 1

    def _release_blocks(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        del seq.block_table[:]
        seq.num_computed = seq.num_registered = 0
        seq.prefix = None

    def check_integrity(self) -> None:
        """Assert the pool's invariants and that running sequences, and nobody else, hold what they should."""
        self.pool.check_integrity(seq.block_table for seq in self.running)
        for queue, status in ((self.running, SequenceStatus.RUNNING), (self.waiting, SequenceStatus.WAITING)):
            assert all(seq.status is status for seq in queue), "a sequence is in the wrong queue"
            assert queue == sorted(queue, key=_ARRIVAL), "a queue is not in order of arrival"
        assert len(self.running) <= self.max_num_seqs, "too many sequences run"
        assert not any(seq.block_table for seq in self.waiting), "a waiting sequence holds blocks"
        by_request = {seq for siblings in self._requests.values() for seq in siblings}
        assert by_request == {*self.running, *self.waiting}, "a sequence is lost"
        assert all(self._requests.values()), "a finished request is still listed"
        size = self.pool.block_size
        for seq in self.running:
            num_needed = self.pool.num_blocks_for(len(seq.tokens))
            assert self.pool.num_blocks_for(seq.num_computed) <= len(seq.block_table) <= num_needed, (
                "wrong table length"
            )
            assert seq.num_registered == seq.num_computed // size, "full blocks are not registered"
            for block in seq.block_table[seq.num_registered :]:
                private = self.pool.num_references(block) == 1 and not self.pool.is_indexed(block)
                assert private, f"block {block} is shared before it is full"


def _append_chunk(chunks: list[Chunk], seq: Sequence, budget: int) -> int:
    """Take as much of the sequence as the budget allows, of one kind of rows; return how much."""
    count = min(seq.num_remaining, budget)
    if seq.num_computed < seq.num_prefill:
        count = min(count, seq.num_prefill - seq.num_computed)
    chunks.append(Chunk(seq, seq.num_computed, seq.num_computed + count))
    return count
