"""Linear layers in FP4: weights quantised to NVFP4, MXFP4 or HiF4, and activations in one of three ways.

    weights only    activations stay as they are; the weights' values are exact in fp32            w4a16
    one path        activations rounded to the format, one product                                 nvfp4, mxfp4, hif4
    two paths       SharQ: backbone plus residual, both against one payload                        sharq, sharq-…

Weights are quantised shard by shard as they are loaded, each shard with a global scale of its own. The arithmetic is
NumPy's definition (`engine.ops.fp4`), exact and slow: compiled kernels for these methods are not there yet, and
`kernel_path` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.fp4_types import Format, Fp4Matrix, SharqOperand
from engine.ops.contract import Array, Ops
from engine.quant import fp4, sharq
from engine.quant.as_stored import AsStored
from engine.quant.method import LinearMethod

F32 = NDArray[np.float32]
Paths = Literal["weights only", "one", "sparse and dense", "dense and dense"]


@dataclass(frozen=True, slots=True)
class Fp4Rule:
    """What a method does: the format, k per weight scale, and the activations' paths."""

    format: Format
    block: int
    paths: Paths


class Fp4Linear:
    """One FP4 method. `full` serves the layers it leaves alone."""

    def __init__(self, name: str, rule: Fp4Rule, quant: QuantConfig, ops: Ops, full: AsStored) -> None:
        self.name = name
        self._rule = rule
        self._quant = quant
        self._ops = ops
        self._full = full

    def for_layer(self, name: str, K: int) -> LinearMethod:
        """Itself where K fits the blocks; else the full-precision method, if that was allowed.

        Raises InvalidArgument naming the layer.
        """
        if K % self._rule.block == 0:
            return self
        if self._quant.fallback == "bf16":
            return self._full
        raise InvalidArgument(
            f"{self.name} needs inputs in multiples of {self._rule.block} and {name} has {K}; "
            f"allow such layers to stay as stored with quant_fallback='bf16'"
        )

    def pack(self, shards: Sequence[Array]) -> Any:
        rule, grade = self._rule, self._quant.grade
        quantized = [fp4.quantize_weight(w, format=rule.format, block=rule.block, grade=grade) for w in shards]
        if rule.paths == "weights only":
            return self._ops.pack_weight([fp4.dequantize(w) for w in quantized])
        payload = np.concatenate([w.payload for w in quantized])
        scale = np.concatenate([w.scale for w in quantized])
        return Fp4Matrix(rule.format, payload, scale, np.concatenate([w.g for w in quantized]))

    def prepare(self, x: Array) -> Any:
        rule, scale = self._rule, self._quant.scale
        if rule.paths == "weights only":
            return x
        x = x.astype(np.float32) if x.dtype == np.float16 else x
        if rule.paths == "one":
            return fp4.prepare(x, format=rule.format, scale=scale)
        return sharq.prepare(x, format=rule.format, sparse=rule.paths == "sparse and dense", scale=scale)

    def prepare_norm(self, x: Array, weight: F32, eps: float) -> Any:
        return self.prepare(self._full.prepare_norm(x, weight, eps))

    def prepare_silu_mul(self, gate_up: Array) -> Any:
        return self.prepare(self._full.prepare_silu_mul(gate_up))

    def matmul(
        self, operand: Any, weight: Any, *, out: Array, bias: F32 | None = None, residual: Array | None = None
    ) -> Array:
        if self._rule.paths == "weights only":
            return self._full.matmul(operand, weight, out=out, bias=bias, residual=residual)
        y = self._product(operand, weight)
        if bias is not None:
            y += bias
        if residual is not None:
            y += residual.astype(np.float32)
        out[...] = y
        return out

    def _product(self, operand: SharqOperand | Fp4Matrix, weight: Fp4Matrix) -> F32:
        if isinstance(operand, Fp4Matrix):
            return fp4.matmul(operand, weight)
        if not self._quant.compat:
            return sharq.matmul(operand, weight)
        backbone = fp4_round(sharq.sparse_matmul(operand, weight))
        return backbone + sharq.dense_matmul(operand, weight)


def fp4_round(y: F32) -> F32:
    """y rounded to bf16 and back: what the paper's code does between the paths."""
    return y.astype(fp4.BF16).astype(np.float32)
