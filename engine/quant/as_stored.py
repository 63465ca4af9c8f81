"""The method that quantises nothing: weights exactly as the checkpoint stores them, activations in the run's dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.ops.contract import Array, Ops, PackedWeight
from engine.quant.method import BackendProduct, Weight
from engine.workspace import Workspace


class AsStored(BackendProduct):
    """Operands are the activations themselves; norms and SwiGLU run as operations of their own."""

    name = "bf16"  # the name users know, whatever type the checkpoint has

    def __init__(self, ops: Ops, workspace: Workspace) -> None:
        self._ops = ops
        self._workspace = workspace

    def pack(self, shards: Sequence[Weight]) -> PackedWeight:
        arrays = [shard for shard in shards if isinstance(shard, np.ndarray)]
        assert len(arrays) == len(shards), "quantised shards have methods of their own"
        return self._ops.pack_weight(arrays)

    def prepare(self, x: Array) -> Array:
        return x

    def prepare_norm(self, x: Array, weight: NDArray[np.float32], eps: float) -> Array:
        return self._ops.rms_norm(x, weight, eps, out=self._workspace.take("norm", x.shape, x.dtype))

    def prepare_silu_mul(self, gate_up: Array) -> Array:
        T, width = gate_up.shape
        return self._ops.silu_mul(gate_up, out=self._workspace.take("silu_mul", (T, width // 2), gate_up.dtype))

    @property
    def _product(self) -> Callable[..., Array]:
        return self._ops.linear


class PlainActivations:
    """What methods that quantise weights alone share: operands, norm and SwiGLU are those of `_full`."""

    _full: AsStored

    def prepare(self, x: Array) -> Array:
        return self._full.prepare(x)

    def prepare_norm(self, x: Array, weight: NDArray[np.float32], eps: float) -> Array:
        return self._full.prepare_norm(x, weight, eps)

    def prepare_silu_mul(self, gate_up: Array) -> Array:
        return self._full.prepare_silu_mul(gate_up)
