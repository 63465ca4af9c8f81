"""Random weights on a GPU in moments: what is packed is some rows of random numbers, repeated in device memory.

Quantising and laying out a 7 B model's weights on the host takes minutes, and for timing values do not matter as long
as they are random. `QuickGpuOps` is the GPU backend with that one difference: asked to pack weights, it looks at their
kind and size alone, packs ROWS rows of its own and copies these until there are enough; and the same `Batch` twice in
a row is uploaded once, so that a step can be repeated as a CUDA graph. `shape_only` makes the weights
to give it: arrays of the right shape without memory behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.core import Batch
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops.contract import Array
from engine.ops.gpu.backend import GpuOps
from engine.ops.gpu.cuda_device import CudaDevice, GpuArray
from engine.ops.gpu.staging import StagedBatch
from engine.ops.gpu.weight_layout import TILE_ROWS
from engine.quant import fp4, fp8
from engine.quant.method import Weight

ROWS = 256  # then they repeat
BF16 = np.dtype(ml_dtypes.bfloat16)
_Packed = TypeVar("_Packed")


class QuickGpuOps(GpuOps):
    """`GpuOps` for timing: weights are random, whatever is given."""

    def __init__(self, device: CudaDevice, *, deterministic: bool = False) -> None:
        super().__init__(device, deterministic=deterministic)
        self._cuda = device
        self._staged: tuple[Batch, StagedBatch] | None = None

    def stage(self, batch: Batch) -> StagedBatch:
        """The last one again for the same batch: a step that is captured into a CUDA graph must not upload."""
        if self._staged is None or self._staged[0] is not batch:
            self._staged = batch, super().stage(batch)
        return self._staged[1]

    def pack_weight(self, shards: Sequence[Array]) -> Any:
        N, K = _size(shards)
        return self._repeated(super().pack_weight([random_rows(K).astype(shards[0].dtype)]), N)

    def pack_fp4(self, shards: Sequence[Fp4Matrix], *, weights_only: bool = False) -> Any:
        N, K = _size(shards)
        rows = [_quantized(K, shards[0].format, shards[0].block)]
        return self._repeated(super().pack_fp4(rows, weights_only=weights_only), N)

    def pack_fp8(self, shards: Sequence[Fp8Matrix]) -> Any:
        N, K = _size(shards)
        return self._repeated(super().pack_fp8([fp8.quantize_weight(random_rows(K))]), N)

    def _repeated(self, packed: _Packed, N: int) -> _Packed:
        """A weight of ROWS rows as one of N: rows, tiles of rows, and what has a value per row along its last axis."""
        changed: dict[str, Any] = {}
        for field in fields(packed):  # type: ignore[arg-type]  # all packed weights are dataclasses
            value = getattr(packed, field.name)
            if field.name == "N":
                changed["N"] = N
            elif isinstance(value, GpuArray):
                changed[field.name] = self._enlarged(value, N)
        return replace(packed, **changed)  # type: ignore[type-var]

    def _enlarged(self, array: GpuArray, N: int) -> GpuArray:
        rows = {ROWS: N, ROWS // TILE_ROWS: -(-N // TILE_ROWS)}
        host = self.device.download(array)
        if len(array) in rows:
            return self._cuda.repeat_rows(host, rows[len(array)])
        assert array.shape[-1] == ROWS, f"{array.shape} is no layout of {ROWS} rows that is known here"
        return self._cuda.upload(np.ascontiguousarray(np.resize(host.T, (N, len(host))).T))


def shape_only(kind: Weight, N: int) -> Weight:
    """A weight of N rows like the first of `kind`, without memory of its own."""
    if isinstance(kind, Fp4Matrix):
        return Fp4Matrix(kind.format, *(_stretched(part, N) for part in (kind.payload, kind.scale, kind.g)))
    if isinstance(kind, Fp8Matrix):
        return Fp8Matrix(_stretched(kind.payload, N), _stretched(kind.scale, N), kind.tile)
    return _stretched(kind, N)


@cache
def random_rows(K: int) -> NDArray[Any]:
    """bf16 [ROWS, K], scaled to keep activations finite."""
    values = np.random.default_rng(0).standard_normal((ROWS, K), np.float32) * np.float32(K**-0.5)
    return values.astype(BF16)


@cache
def _quantized(K: int, format: Any, block: int) -> Fp4Matrix:
    return fp4.quantize_weight(random_rows(K), format=format, block=block)


def _size(shards: Sequence[Any]) -> tuple[int, int]:
    first = shards[0]
    rows = sum(shard.rows if isinstance(shard, Fp4Matrix | Fp8Matrix) else len(shard) for shard in shards)
    return rows, first.K if isinstance(first, Fp4Matrix | Fp8Matrix) else first.shape[1]


def _stretched(part: NDArray[Any], N: int) -> NDArray[Any]:
    return np.broadcast_to(part[:1], (N, *part.shape[1:]))
