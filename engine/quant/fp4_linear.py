"""Linear layers in FP4: weights quantised to NVFP4, MXFP4 or HiF4, and activations in one of three ways.

    weights only    activations stay as they are; the weights' values are exact in fp32            w4a16
    one path        activations rounded to the format, one product                                 nvfp4, mxfp4, hif4
    two paths       SharQ: backbone plus residual, both against one payload                        sharq, sharq-…

Weights are quantised shard by shard as they are loaded, each shard with a global scale of its own, or taken as a
quantised checkpoint stores them. Preparation is one operation of the backend with the norm or the SwiGLU before it, and
both of SharQ's paths are one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from engine.config import QuantConfig
from engine.fp4_types import Format, Fp4Matrix
from engine.ops.contract import Array, Ops
from engine.ops.fp4.split import ScaleRule, paths
from engine.quant import fp4
from engine.quant.as_stored import AsStored, PlainActivations
from engine.quant.grades import quantize_shards
from engine.quant.groups import per_16
from engine.quant.method import BackendProduct, Weight

F32 = NDArray[np.float32]
Paths = Literal["weights only", "one", "sparse and dense", "dense and dense"]


@dataclass(frozen=True, slots=True)
class Fp4Rule:
    """What a method does: the format, k per weight scale, and the activations' paths."""

    format: Format
    block: int
    paths: Paths


class Fp4Linear(BackendProduct):
    """One FP4 method with activations in one or two paths."""

    def __init__(self, name: str, rule: Fp4Rule, quant: QuantConfig, ops: Ops) -> None:
        self.name = name
        self._rule = rule
        self._grade = cast(str, quant.grade)  # checked by the registry
        self._scale = cast(ScaleRule, quant.scale)
        self._ops = ops

    def pack(self, shards: Sequence[Weight]) -> Any:
        stored = [shard for shard in shards if isinstance(shard, Fp4Matrix)]
        plain = [shard for shard in shards if isinstance(shard, np.ndarray)]
        assert len(shards) in (len(stored), len(plain)), "shards are stored alike, FP8 ones have methods of their own"
        weights_only = self._rule.paths == "weights only"
        return self._ops.pack_fp4(_alike(stored or self._quantized(plain)), weights_only=weights_only)

    def _quantized(self, shards: Sequence[Array]) -> list[Fp4Matrix]:
        rule = self._rule
        return quantize_shards(self._ops, shards, format=rule.format, block=rule.block, grade=self._grade)

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

    @property
    def _product(self) -> Callable[..., Array]:
        return self._ops.fp4_linear


class WeightsOnly(PlainActivations, Fp4Linear):
    """Activations as they are."""

    def __init__(self, name: str, rule: Fp4Rule, quant: QuantConfig, ops: Ops, full: AsStored) -> None:
        Fp4Linear.__init__(self, name, rule, quant, ops)
        self._full = full

    @property
    def _product(self) -> Callable[..., Array]:
        return self._ops.w4a16_linear


class CompatSharq(Fp4Linear):
    """SharQ as the paper's code computes it: the backbone's product is rounded to bf16 before the residual's is added.

    For comparison with the paper: two passes over the weights.
    """

    def _prepare(self, x: Array, *, norm: tuple[F32, float] | None = None, silu: bool = False) -> Any:
        return paths(super()._prepare(x, norm=norm, silu=silu))

    def matmul(
        self,
        operand: Any,
        weight: Any,
        *,
        out: Array,
        bias: F32 | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        backbone, rest = operand
        between = self._ops.empty(out.shape, fp4.BF16)
        self._ops.fp4_linear(backbone, weight, out=between, num_decode_rows=num_decode_rows)
        both = self._ops.empty(out.shape, fp4.BF16)
        self._ops.fp4_linear(rest, weight, out=both, bias=bias, residual=between, num_decode_rows=num_decode_rows)
        out[...] = both if residual is None else residual.astype(np.float32) + both.astype(np.float32)
        return out


def _alike(shards: list[Fp4Matrix]) -> list[Fp4Matrix]:
    """Shards with one block: NVFP4 files may hold a scale per 32 k for some and per 16 for others."""
    return shards if len({shard.block for shard in shards}) == 1 else [per_16(shard) for shard in shards]


def _full_width(x: Array) -> Array:
    """float16 has more mantissa than bf16 and less range: it is split from fp32."""
    return x.astype(np.float32) if x.dtype == np.float16 else x
