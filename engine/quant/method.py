"""What a linear layer asks of its quantisation method.

A layer owns a method and a packed weight; the activations pass through it in two steps, `prepare` (whatever the method
does to its input: nothing, a cast, a split into FP4 operands) and `matmul`. Preparing is separate so that layers which
read the same input share one operand (q/k/v; gate/up), and fused forms exist because preparation follows directly on a
normalisation or a SwiGLU, whose result then never travels through memory.

An operand and a packed weight are opaque to layers; a method only ever receives its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops.contract import Array, Ops

Weight = Array | Fp4Matrix | Fp8Matrix  # one shard [N, K], plain or as a quantised checkpoint stores it


class LinearMethod(Protocol):
    """One way of storing weights [N, K] and multiplying activations [T, K] with them."""

    name: str  # as users spell it: "bf16", "sharq", …

    def pack(self, shards: Sequence[Weight]) -> Any:
        """The kernel's form of [N_i, K] weights that share one input; per-shard scales are kept apart.

        Plain shards are quantised here; those a checkpoint holds quantised keep every bit.
        """

    def prepare(self, x: Array) -> Any:
        """Operand of x [T, K]."""

    def prepare_norm(self, x: Array, weight: NDArray[np.float32], eps: float) -> Any:
        """Operand of RMSNorm(x) · weight; x [T, K]."""

    def prepare_silu_mul(self, gate_up: Array) -> Any:
        """Operand of silu(gate) · up; gate_up [T, 2K] = gate | up."""

    def matmul(
        self,
        operand: Any,
        weight: Any,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        """out [T, N] = operand · weightᵀ + bias + residual, rounded once; out may be residual itself.

        num_decode_rows: as in the step's `Batch`.
        """


class BackendProduct:
    """What methods share whose `matmul` is one of the backend's products as it is."""

    _ops: Ops

    @property
    def _product(self) -> Callable[..., Array]:
        """`Ops.linear`, or another with its parameters."""
        raise NotImplementedError

    def matmul(
        self,
        operand: Any,
        weight: Any,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        return self._product(operand, weight, out=out, bias=bias, residual=residual, num_decode_rows=num_decode_rows)
