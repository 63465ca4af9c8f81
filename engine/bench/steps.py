"""One sequence fed to a model step by step: what a runner costs without scheduler, sampler and tokenizer.

The cache holds this sequence alone, its blocks in order, so the slot of a token is its position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.core import Batch, SamplingParams
from engine.models.decoder import Decoder
from engine.ops.contract import Array, Ops
from engine.runner import ModelRunner, plan_cache
from engine.sampler import SamplerState

_GREEDY = SamplerState(SamplingParams(temperature=0.0), seed=0)


def decode_rows(prompt_tokens: int, ops: Ops) -> int | None:
    """`Batch.num_decode_rows` of a step with rows of one prompt alone, which has so many tokens: as scheduled."""
    short = ops.short_prompt_tokens
    return 0 if short is not None and prompt_tokens > short else None


class OneSequence:
    """A sequence of up to `length` tokens; positions may be run again, which overwrites them.

    dtype: of activations; kv_dtype: of K and V, None: the same. Raises as `plan_cache` does.
    """

    def __init__(
        self, model: Decoder, ops: Ops, dtype: np.dtype[Any], length: int, kv_dtype: np.dtype[Any] | None = None
    ) -> None:
        engine = EngineConfig(max_model_len=length, max_num_seqs=1)
        plan = plan_cache(model.config, engine, ops, dtype if kv_dtype is None else kv_dtype)
        self._ops = ops
        self._runner = ModelRunner(model, ops, plan, dtype)
        self._block_table = np.arange(plan.num_blocks, dtype=np.int32)[None, :]
        self.cache_bytes = plan.nbytes

    def run(
        self, token_ids: Sequence[int], position: int, *, all_rows: bool = False, prompt_tokens: int | None = None
    ) -> Array:
        """One step: these tokens at position …; the hidden states of the last, or of all.

        prompt_tokens: of the prompt that they are a chunk of; None: they are one themselves.
        """
        T = len(token_ids)
        positions = np.arange(position, position + T, dtype=np.int32)
        rows = positions - position
        batch = Batch(
            token_ids=np.array(token_ids, np.int32),
            positions=positions,
            slot_mapping=positions,
            query_start=np.array([0, T], np.int32),
            context_lens=np.array([position + T], np.int32),
            block_tables=self._block_table,
            logit_rows=rows if all_rows else rows[-1:],
            num_decode_rows=decode_rows(prompt_tokens or T, self._ops),
        )
        return self._runner.hidden(batch)

    def predict(self, token_ids: Sequence[int], position: int, *, prompt_tokens: int | None = None) -> int:
        """The same, and the most probable next token, chosen where the logits are if the backend can."""
        hidden = self.run(token_ids, position, prompt_tokens=prompt_tokens)
        (token,) = self._runner.choose(hidden, [0], [_GREEDY])
        return int(self._runner.logits(hidden)[0].argmax()) if token is None else token
