"""Memory for any step, taken before the KV cache gets the rest.

A device's scratch memory grows to the largest step it meets, and a KV cache takes what is free. So that no step runs
out later, the largest ones are rehearsed first: as they will run, except that nothing is computed (`Ops.rehearsal`).
Backends that need no such care rehearse nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.core import Batch, SamplingParams, StepLimits
from engine.errors import CapacityError
from engine.models.decoder import Decoder
from engine.ops.contract import Ops
from engine.runner import PROMPT_ROWS, CachePlan, ModelRunner, plan_cache
from engine.sampler import SamplerState


def start_runner(
    model: Decoder,
    ops: Ops,
    engine: EngineConfig,
    dtype: np.dtype[Any],
    kv_dtype: np.dtype[Any],
    kv_scales: NDArray[np.float32] | None = None,
) -> ModelRunner:
    """A runner whose cache takes what the weights and the scratch memory of the largest steps leave.

    dtype, kv_dtype: of activations, of K and V. Raises InvalidArgument as `plan_cache` and `ModelRunner` do, and
    CapacityError, which says what fits.
    """

    def plan() -> CachePlan:
        return plan_cache(model.config, engine, ops, kv_dtype)

    length = plan().max_model_len  # no sequence will be longer
    limits = StepLimits(engine.max_num_batched_tokens, engine.max_num_seqs, length)
    small = CachePlan(1, ops.kv_block_size, 0, length, kv_dtype)

    def rehearse(part: StepLimits) -> None:
        _rehearse(ModelRunner(model, ops, small, dtype, limits=part, kv_scales=kv_scales), part)

    passing = _reserve(ops, limits, rehearse, plan)
    runner = ModelRunner(model, ops, plan(), dtype, limits=limits, kv_scales=kv_scales)
    del passing  # which the cache was not to have
    return runner


def _reserve(
    ops: Ops, most: StepLimits, rehearse: Callable[[StepLimits], None], plan: Callable[[], CachePlan]
) -> object:
    """Rehearse steps of 16, 32, 64 … tokens, if the backend wants that; what the last of them took in passing.

    plan: of the cache beside what was rehearsed. Raises CapacityError, which names the largest steps that fit.
    """
    passing: object = None
    fitting: StepLimits | None = None
    failure: CapacityError | None = None
    for tokens in _sizes(most.tokens):
        limits = StepLimits(tokens, min(tokens, most.sequences), most.context)
        passing = None  # of the one before
        rehearsal = ops.rehearsal()
        if rehearsal is None:
            return None
        try:
            with rehearsal as passing:
                rehearse(limits)
        except CapacityError as problem:
            failure = _too_large(most, problem)
            break
        try:
            plan()
            fitting = limits
        except CapacityError as problem:
            failure = problem
    if failure is None:
        return passing
    fits = f"max_num_batched_tokens={fitting.tokens} and max_num_seqs={fitting.sequences} fit" if fitting else ""
    raise CapacityError(f"{failure}; {fits or 'or choose a quant of fewer bits'}") from None


def _too_large(steps: StepLimits, problem: CapacityError) -> CapacityError:
    return CapacityError(
        f"steps of up to {steps.tokens} tokens and {steps.sequences} sequences of {steps.context} tokens do not fit "
        f"beside the weights ({problem}); lower max_model_len, max_num_batched_tokens or max_num_seqs"
    )


def _sizes(tokens: int) -> list[int]:
    """Powers of two and the number itself: between two of them memory only grows, and no backend's kernels change."""
    return [*(1 << i for i in range(4, (tokens - 1).bit_length())), tokens]


def _rehearse(runner: ModelRunner, limits: StepLimits) -> None:
    """The steps that take most memory: one long prompt, all of it prefilled or decoded; a token of every sequence."""
    T, S, length = limits.tokens, min(limits.tokens, limits.sequences), limits.context
    states = [SamplerState(SamplingParams(temperature=1.0, presence_penalty=1.0), seed=0)] * S
    whole = [*[length] * (T // length), *([T % length] if T % length else [])]
    for new_tokens, num_decode_rows in ((whole, 0), (whole, None), ([1] * S, None)):
        hidden = runner.hidden(_last_tokens(new_tokens, length, runner.plan.block_size, num_decode_rows))
        rows = min(len(hidden), max(S, PROMPT_ROWS))
        runner.logits(hidden, range(rows))
        chosen = range(min(len(hidden), S))
        runner.choose(hidden, chosen, states[: len(chosen)])


def _last_tokens(new_tokens: Sequence[int], context: int, block_size: int, num_decode_rows: int | None) -> Batch:
    """A batch of sequences whose last tokens, so many, end a context of this length. The first row is not asked for."""
    counts = np.array(new_tokens, np.int32)
    ends = np.cumsum(counts, dtype=np.int32)
    T, S = int(ends[-1]), len(counts)
    return Batch(
        token_ids=np.zeros(T, np.int32),
        positions=np.concatenate([np.arange(context - n, context, dtype=np.int32) for n in new_tokens]),
        slot_mapping=np.zeros(T, np.int32),
        query_start=np.concatenate([np.zeros(1, np.int32), ends]),
        context_lens=np.full(S, context, np.int32),
        block_tables=np.zeros((S, -(-context // block_size)), np.int32),
        logit_rows=np.arange(min(1, T - 1), T, dtype=np.int32),
        num_decode_rows=num_decode_rows,
    )
