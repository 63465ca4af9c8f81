"""One answer being generated: its tokens, how far they are computed, and the cache blocks it holds.

Plain state; the scheduler changes it, everybody else reads. A request with n > 1 is n sequences that share a prompt.
All tokens known so far, prompt and answer, are one list, because after a preemption the answer so far is recomputed
just as the prompt was. It does not know how tokens are chosen or turned into text.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from engine.blocks import PrefixNode
from engine.core import FinishReason, SamplingParams


class SequenceStatus(Enum):
    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"  # holds blocks for all its tokens
    FINISHED = "finished"  # holds no blocks, for good


@dataclass(eq=False, slots=True)
class Sequence:
    """Created as Sequence(request_id, index, list(prompt_ids), params); compared and hashed by identity.

    Over its tokens, in half-open intervals: [0, num_prompt) prompt, [num_prompt, len(tokens)) answer;
    [0, num_computed) have K and V in the cache, [num_computed, len(tokens)) are still to be run;
    positions [0, next_logit) owe no logits, positions [next_logit, len(tokens)) do. A sequence whose prompt is scored
    starts with next_logit = 0, any other with its last prompt token. The token at next_logit must be run, so it bounds
    what may come from the prefix cache. [0, num_prefill) are prefill rows, the others decode rows: all of the prompt or
    none of it, as the scheduler decides when the sequence is added.
    """

    request_id: Any  # hashable: what `Scheduler.abort` takes
    index: int  # which of the request's n answers
    tokens: list[int]  # prompt, then answer
    params: SamplingParams
    only_scored: bool = False  # ends when its prompt is computed: its logits are wanted, no answer
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    num_prompt: int = field(init=False)
    num_prefill: int = 0
    num_computed: int = 0
    next_logit: int = field(init=False)
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when first admitted
    num_preemptions: int = 0
    arrival: int = -1  # order of `Scheduler.add`: the lower, the older
    leader: Sequence | None = field(default=None, repr=False)  # first sequence of the request, unless it is this one
    block_table: array[int] = field(default_factory=lambda: array("i"), repr=False)  # int32: copied fast to NumPy
    num_registered: int = 0  # leading blocks given to the prefix index
    prefix: PrefixNode | None = field(default=None, repr=False)  # node of the last of them

    def __post_init__(self) -> None:
        self.num_prompt = len(self.tokens)
        self.next_logit = 0 if self.scores_prompt else self.num_prompt - 1

    @property
    def scores_prompt(self) -> bool:
        """Whether every prompt position's logits are wanted; siblings share the first sequence's."""
        return self.params.prompt_logprobs is not None and self.index == 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed: 1 in decode, more in prefill."""
        return len(self.tokens) - self.num_computed

    def block_key(self, block: int, block_size: int) -> tuple[int, ...]:
        """What the prefix cache knows a full block by: its token ids, those of prefill rows as ~id.

        K and V of the two kinds of rows may differ in their last bits, so one must never be taken for the other.
        """
        start = block * block_size
        tokens = self.tokens[start : start + block_size]
        prefill = max(0, self.num_prefill - start)
        return (*(~token for token in tokens[:prefill]), *tokens[prefill:])

    @property
    def prompt_ids(self) -> list[int]:
        """A copy."""
        return self.tokens[: self.num_prompt]

    @property
    def output_ids(self) -> list[int]:
        """A copy."""
        return self.tokens[self.num_prompt :]

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED
