"""Linear layers in FP4: weights quantised to NVFP4, MXFP4 or HiF4, and activations in one of three ways.

    weights only    activations stay as they are; the weights' values are exact in fp32            w4a16
    one path        activations rounded to the format, one product                                 nvfp4, mxfp4, hif4
    two paths       SharQ: backbone plus residual, both against one payload                        sharq, sharq-…

Weights are quantised shard by shard as they are loaded, each shard with a global scale of its own. Preparation is one
operation of the backend with the norm or the SwiGLU before it, and both of SharQ's paths are one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.fp4_types import Format
from engine.ops.contract import Array, Ops
from engine.ops.fp4.split import ScaleRule, paths
from engine.quant import fp4
from engine.quant.as_stored import AsStored
from engine.quant.grades import Grade
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
        self._grade = cast(Grade, quant.grade)  # names are checked by the registry
        self._scale = cast(ScaleRule, quant.scale)
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
        rule = self._rule
        return self._ops.pack_fp4(
            [fp4.quantize_weight(w, format=rule.format, block=rule.block, grade=self._grade) for w in shards]
        )

    def prepare(self, x: Array) -> Any:
        return self._prepare(x)

    def prepare_norm(self, x: Array, weight: F32, eps: float) -> Any:
        return self._prepare(x, norm=(weight, eps))

    def prepare_silu_mul(self, gate_up: Array) -> Any:
        return self._prepare(gate_up, silu=True)

    def _prepare(self, x: Array, *, norm: tuple[F32, float] | None = None, silu: bool = False) -> Any:
        rule = self._rule
        x = _full_width(x)
        if rule.paths == "one":
            return self._ops.prepare_fp4(x, format=rule.format, scale=self._scale, norm=norm, silu=silu)
        sparse = rule.paths == "sparse and dense"
        return self._ops.prepare_sharq(x, format=rule.format, sparse=sparse, scale=self._scale, norm=norm, silu=silu)

    def matmul(
        self, operand: Any, weight: Any, *, out: Array, bias: F32 | None = None, residual: Array | None = None
    ) -> Array:
        return self._ops.fp4_linear(operand, weight, out=out, bias=bias, residual=residual)


class WeightsOnly(Fp4Linear):
    """Activations as they are, norm and SwiGLU as without quantisation."""

    def prepare(self, x: Array) -> Array:
        return self._full.prepare(x)

    def prepare_norm(self, x: Array, weight: F32, eps: float) -> Array:
        return self._full.prepare_norm(x, weight, eps)

    def prepare_silu_mul(self, gate_up: Array) -> Array:
        return self._full.prepare_silu_mul(gate_up)

    def matmul(
        self, operand: Any, weight: Any, *, out: Array, bias: F32 | None = None, residual: Array | None = None
    ) -> Array:
        return self._ops.w4a16_linear(operand, weight, out=out, bias=bias, residual=residual)


class CompatSharq(Fp4Linear):
    """SharQ as the paper's code computes it: the backbone's product is rounded to bf16 before the residual's is added.

    For comparison with the paper: two passes over the weights.
    """

    def _prepare(self, x: Array, *, norm: tuple[F32, float] | None = None, silu: bool = False) -> Any:
        return paths(super()._prepare(x, norm=norm, silu=silu))

    def matmul(
        self, operand: Any, weight: Any, *, out: Array, bias: F32 | None = None, residual: Array | None = None
    ) -> Array:
        backbone, rest = operand
        between = self._ops.empty(out.shape, fp4.BF16)
        self._ops.fp4_linear(backbone, weight, out=between)
        both = self._ops.empty(out.shape, fp4.BF16)
        self._ops.fp4_linear(rest, weight, out=both, bias=bias, residual=between)
        out[...] = both if residual is None else residual.astype(np.float32) + both.astype(np.float32)
        return out


def _full_width(x: Array) -> Array:
    """float16 has more mantissa than bf16 and less range: it is split from fp32."""
    return x.astype(np.float32) if x.dtype == np.float16 else x
