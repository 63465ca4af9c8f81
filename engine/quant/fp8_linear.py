"""Linear layers in FP8: E4M3 weights with one float32 scale per row (files: per tensor or block as well).

fp8               activations in E4M3 too, with a scale per token as they come
weights only      activations as they are; what an FP8 head uses: it sees few rows, and its weights are the cost
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.fp8_types import Fp8Matrix
from engine.ops.contract import Array, Ops
from engine.quant import fp8
from engine.quant.as_stored import AsStored, PlainActivations
from engine.quant.method import BackendProduct, Weight

F32 = NDArray[np.float32]


class Fp8Linear(BackendProduct):
    """Weights and activations in E4M3. Any K."""

    name = "fp8"

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def pack(self, shards: Sequence[Weight]) -> Any:
        return self._ops.pack_fp8([_quantized(shard) for shard in shards])

    def prepare(self, x: Array) -> Any:
        return self._ops.prepare_fp8(x)

    def prepare_norm(self, x: Array, weight: F32, eps: float) -> Any:
        return self._ops.prepare_fp8(x, norm=(weight, eps))

    def prepare_silu_mul(self, gate_up: Array) -> Any:
        return self._ops.prepare_fp8(gate_up, silu=True)

    @property
    def _product(self) -> Callable[..., Array]:
        return self._ops.fp8_linear


class Fp8WeightsOnly(PlainActivations, Fp8Linear):
    """Activations as they are."""

    def __init__(self, ops: Ops, full: AsStored) -> None:
        Fp8Linear.__init__(self, ops)
        self._full = full

    @property
    def _product(self) -> Callable[..., Array]:
        return self._ops.w8a16_linear


def _quantized(shard: Weight) -> Fp8Matrix:
    if isinstance(shard, Fp8Matrix):
        return shard
    assert isinstance(shard, np.ndarray), "FP4 shards have methods of their own"
    return fp8.quantize_weight(shard)
