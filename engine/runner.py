"""One loaded model on one backend: size its KV cache, run its steps.

The runner knows nothing of requests; `Batch` in, logits or the next tokens out. How a model gets loaded is
`engine.loading`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig, ModelConfig
from engine.core import Batch, StepLimits
from engine.errors import CapacityError, InvalidArgument
from engine.models.decoder import Decoder
from engine.ops.contract import Array, KVCache, Ops
from engine.ops.fp8 import E4M3
from engine.sampler import SamplerState

PROMPT_ROWS = 64  # prompt rows whose logits are computed at once: 64 x 152k x 4 bytes = 39 MB

DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


def activation_dtype(name: str, stored: str) -> np.dtype[Any]:
    """The run's dtype: `name`, or the checkpoint's (`stored`) for "auto". Raises InvalidArgument."""
    if name != "auto" and name not in DTYPES:
        raise InvalidArgument(f"unknown dtype {name!r}; choose auto or one of {', '.join(DTYPES)}")
    return DTYPES[stored if name == "auto" else name]


def cache_dtype(name: str, activations: np.dtype[Any]) -> np.dtype[Any]:
    """The KV cache's dtype, of `EngineConfig.kv_cache_dtype`. Raises InvalidArgument."""
    if name not in ("auto", "fp8"):
        raise InvalidArgument(f"unknown kv_cache_dtype {name!r}; choose auto (as the activations) or fp8")
    return E4M3 if name == "fp8" else activations


def sequence_length(model: ModelConfig, engine: EngineConfig) -> int:
    """The longest sequence asked for, in tokens: max_model_len or the model's own context length.

    Raises InvalidArgument for more than the model's.
    """
    limit = model.max_position_embeddings
    if engine.max_model_len is not None and engine.max_model_len > limit:
        raise InvalidArgument(f"max_model_len {engine.max_model_len} is beyond the model's context length, {limit}")
    return engine.max_model_len or limit


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Size of the KV cache and the sequence length it allows."""

    num_blocks: int
    block_size: int  # tokens
    nbytes: int
    max_model_len: int  # tokens
    dtype: np.dtype[Any]  # of K and V

    def __str__(self) -> str:
        tokens, name = self.num_blocks * self.block_size, "FP8 (E4M3)" if self.dtype == E4M3 else str(self.dtype)
        size = f"{tokens} tokens in {name} ({self.nbytes / 2**20:.0f} MiB)"
        return f"KV cache {size}, sequences up to {self.max_model_len} tokens"


def plan_cache(model: ModelConfig, engine: EngineConfig, ops: Ops, dtype: np.dtype[Any]) -> CachePlan:
    """Size the cache, K and V of this dtype, from the memory available now, capped by what max_num_seqs sequences of
    full length need.

    Raises InvalidArgument as `sequence_length` does, CapacityError where a max_model_len that was asked for, or any
    sequence at all, cannot fit.
    """
    length, block_size = sequence_length(model, engine), ops.kv_block_size
    block_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * block_size * dtype.itemsize
    budget = ops.kv_cache_budget() if engine.kv_cache_bytes is None else engine.kv_cache_bytes
    num_blocks = min(engine.max_num_seqs * -(-length // block_size), budget // block_bytes)
    fitting = num_blocks * block_size
    if fitting < (2 if engine.max_model_len is None else length):
        raise CapacityError(
            f"a KV cache of {budget / 2**20:.1f} MiB holds {fitting} tokens, fewer than the wanted {length}; "
            f"lower max_model_len or raise kv_cache_bytes ({block_bytes} bytes per {block_size} tokens)"
        )
    return CachePlan(num_blocks, block_size, num_blocks * block_bytes, min(length, fitting), dtype)


class ModelRunner:
    """Runs batches through a loaded model. Not thread-safe: one step at a time.

    dtype: of activations. limits: of its steps; None: the defaults. kv_scales: of a cache in FP8, see
    `Ops.new_kv_cache`. Raises CapacityError for its cache, InvalidArgument for a dtype that the backend does not do.
    """

    def __init__(
        self,
        model: Decoder,
        ops: Ops,
        plan: CachePlan,
        dtype: np.dtype[Any],
        *,
        limits: StepLimits | None = None,
        kv_scales: NDArray[np.float32] | None = None,
    ) -> None:
        config = model.config
        self._model = model
        self._ops = ops
        self.plan = plan
        defaults = StepLimits(EngineConfig.max_num_batched_tokens, EngineConfig.max_num_seqs, plan.max_model_len)
        try:
            self.cache: KVCache = ops.new_kv_cache(
                num_layers=config.num_layers,
                num_blocks=plan.num_blocks,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                dtype=plan.dtype,
                activations=dtype,
                scales=kv_scales,
            )
        except (MemoryError, CapacityError) as problem:
            raise CapacityError(
                f"the system refuses a KV cache of {plan.nbytes / 2**20:.0f} MiB ({problem}); lower kv_cache_bytes"
            ) from None
        self._steps = ops.new_steps(self.cache, num_heads=config.num_heads, limits=limits or defaults)

    @property
    def kernel_path(self) -> str:
        """What runs, for the user."""
        return self._ops.kernel_path + (f", {self._steps.description}" if self._steps else "")

    def hidden(self, batch: Batch) -> Array:
        """Run one step; the hidden states [R, C] of batch.logit_rows, valid until the next step."""
        steps = self._steps
        x = self._model.forward(batch, self.cache) if steps is None else steps.hidden(batch, self._forward)
        return x if len(batch.logit_rows) == len(x) else self._ops.take_rows(x, batch.logit_rows)

    def _forward(self, step: Any, num_positions: int) -> Array:
        return self._model.forward_staged(step, num_positions, self.cache)

    def choose(self, hidden: Array, rows: Sequence[int], states: Sequence[SamplerState]) -> list[int | None]:
        """The next token of some rows of `hidden`'s result, chosen where the logits are, or None for one that the host
        must choose: because log-probabilities are wanted, or the logits unusable, or the backend has no such place.

        Raises NumericalError as `Ops.to_host` does.
        """
        tokens: list[int | None] = [None] * len(rows)
        plain = [i for i, state in enumerate(states) if state.params.logprobs is None]
        if self._steps is not None and plain:
            choices = [states[i].as_row() for i in plain]
            chosen = self._steps.choose(hidden, [rows[i] for i in plain], choices, self._model.logits)
            for i, token in zip(plain, chosen, strict=True):
                tokens[i] = token
        return tokens

    def logits(self, hidden: Array, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Logits [r, V] of some rows of `hidden`'s result, or of all. Valid until the next call.

        Raises NumericalError as `Ops.to_host` does.
        """
        if rows is not None:
            hidden = self._ops.take_rows(hidden, np.asarray(rows, np.int32))
        return self._ops.to_host(self._model.logits(hidden))
