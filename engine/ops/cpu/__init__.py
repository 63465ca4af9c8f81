"""The CPU backend: C++ kernels behind the operations' contract.

This class is the contract's Python side and does nothing but pass arrays on; `engine._native` checks them and computes.
The C++ beside it, in reading order:

    dtypes.h  simd.h          element types; sixteen fp32 lanes on every instruction set
    kernels.h  kernels.cpp    the table of kernels, compiled once per instruction set; how to add an operation
    cpu_features.cpp          what this CPU can run
    thread_pool.*  backend.*  persistent threads, scratch memory: what one CpuOps owns
    weight_order.h            which weight comes next, for idle threads to fetch
    weight_tiles.h  packed_weight.*  slabs.*   weights re-laid in tiles of 32 columns, and the memory they lie in
    kv_cache.*                the paged cache in tiles of 16 tokens
    fp32_math.h               arithmetic that `engine.ops.reference` fixes to the last bit
    micro_kernels.h           the inner loops of products, shared by linear.cpp and fp8_linear.cpp
    linear.cpp  rows.cpp …    the kernels, one operation or family per file
    product_args.h  operand_rows.h  product_epilogue.h   how quantised products begin and end
    fp4_tiles.h  packed_fp4.*  fp4_args.h      FP4 weights in tiles; operands
    prepare_fp4.cpp  fp4_quantize.h  fp4_lanes.h   activations into FP4, bit for bit `engine.ops.fp4`
    quantize_feedback.cpp     weight codes along K against each other's errors, bit for bit `engine.ops.fp4.feedback`
    quantize_weight.cpp       weights into FP4, bit for bit `engine.ops.fp4.grades`
    fp4_linear.cpp  w4a16_linear.cpp  fp4_dot.h    products with FP4 weights
    fp8_tiles.h  packed_fp8.*  e4m3_lanes.h    FP8 weights in tiles; codes on vectors, the KV cache's too
    prepare_fp8.cpp  fp8_linear.cpp            the same in FP8, bit for bit `engine.ops.fp8`
    attention_plan.*          how attention is shared out among threads
    bindings.*  bind_*.cpp    argument checks and the Python interface

Importing this module raises ImportError where the extension was not built; `engine.ops.backends` decides what then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine import _native
from engine._native import KVCache, PackedFp4, PackedFp8, PackedWeight, PreparedOperand
from engine.core import Batch, StepLimits
from engine.fp4_types import Format, Fp4Matrix, SharqOperand
from engine.fp8_types import Fp8Matrix, Fp8Operand
from engine.memory import kv_cache_budget
from engine.ops.contract import Array, Norm
from engine.ops.cpu.threads import default_threads
from engine.ops.fp4.feedback import REFINEMENTS, Feedback
from engine.ops.fp4.grades import Grade
from engine.ops.fp4.split import ScaleRule
from engine.ops.fp8 import cache_scales

_ALIGNMENT = 64  # bytes: a cache line, an AVX-512 register


def available_isas() -> tuple[str, ...]:
    """Instruction sets compiled in and supported by this CPU, best first, e.g. ("avx512", "avx2", "portable")."""
    return tuple(_native.isa_names())


class CpuOps:
    """`engine.ops.contract.Ops` in C++.

    threads: None = the physical cores this process may use. isa: one of `available_isas()`; None = the best.
    Arrays passed in need contiguous rows; rows may be further apart than they are long. Operations of one object run
    one at a time, from whichever thread. On avx512-bf16, bf16 · bf16 products take subnormal numbers for 0, as the
    instruction does. Raises InvalidArgument for shapes, dtypes or strides that do not fit.
    """

    kv_block_size: int = _native.kv_block_size
    short_prompt_tokens: int | None = None

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.threads = default_threads() if threads is None else threads
        self.isa = available_isas()[0] if isa is None else isa
        self.kernel_path = f"{self.isa}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        self._native = _native.Backend(self.threads, self.isa)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Uninitialised array, 64-byte aligned."""
        dtype = np.dtype(dtype)
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= extent
        raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        return raw[start : start + nbytes].view(dtype).reshape(shape)

    def constant(self, array: Array) -> Array:
        return array

    def stage(self, batch: Batch) -> Batch:
        return batch

    def take_rows(self, x: Array, rows: NDArray[np.int32]) -> Array:
        return x[rows]

    def to_host(self, x: Array) -> NDArray[Any]:
        return x

    def all_finite(self, array: Array) -> bool:
        return self._native.all_finite(array)

    def pack_weight(self, shards: Sequence[Array]) -> PackedWeight:
        return self._native.pack_weight(shards)

    def linear(
        self,
        x: Array,
        weight: PackedWeight,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        self._native.linear(x, weight, out, bias, residual)
        return out

    def prepare_sharq(
        self,
        x: Array,
        *,
        format: Format = "nvfp4",
        sparse: bool = True,
        scale: ScaleRule = "token",
        norm: Norm | None = None,
        silu: bool = False,
    ) -> PreparedOperand:
        return self._prepare(x, format, 2, sparse, scale, norm, silu)

    def prepare_fp4(
        self,
        x: Array,
        *,
        format: Format = "nvfp4",
        scale: ScaleRule = "token",
        norm: Norm | None = None,
        silu: bool = False,
    ) -> PreparedOperand:
        return self._prepare(x, format, 1, False, scale, norm, silu)

    def _prepare(
        self, x: Array, format: Format, paths: int, sparse: bool, scale: ScaleRule, norm: Norm | None, silu: bool
    ) -> PreparedOperand:
        weight, eps = norm or (None, 0.0)
        operand = self._native.prepare_fp4(x, format, paths, sparse, weight, eps, silu, 0.0)
        if scale == "token":
            return operand
        # g grows with a row's largest magnitude, so the largest g is the whole tensor's. The paper's rule is here to
        # be compared with; doing the work twice keeps the kernel free of it.
        return self._native.prepare_fp4(x, format, paths, sparse, weight, eps, silu, float(operand.g.max(initial=0)))

    def quantize_weight(self, w: Array, *, format: Format, block: int, grade: Grade) -> Fp4Matrix:
        return Fp4Matrix(format, *self._native.quantize_weight(w, format, block, grade))

    def quantize_feedback(
        self, w: Array, g: np.float32, feedback: Feedback, *, format: Format, block: int
    ) -> Fp4Matrix:
        first, later = (_panels(M, block) for M in (feedback.first, feedback.later))
        parts = self._native.quantize_feedback(w, float(g), format, block, first, later, feedback.weight, REFINEMENTS)
        return Fp4Matrix(format, *parts, np.full(len(w), g, np.float32))

    def pack_fp4(self, shards: Sequence[Fp4Matrix], *, weights_only: bool = False) -> PackedFp4:
        return self._native.pack_fp4(shards)

    def fp4_linear(
        self,
        operand: PreparedOperand | SharqOperand | Fp4Matrix,
        weight: PackedFp4,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        self._native.fp4_linear(operand, weight, out, bias, residual)
        return out

    def w4a16_linear(
        self,
        x: Array,
        weight: PackedFp4,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        self._native.w4a16_linear(x, weight, out, bias, residual)
        return out

    def prepare_fp8(self, x: Array, *, norm: Norm | None = None, silu: bool = False) -> Fp8Operand:
        T, K = x.shape[0], x.shape[1] // (2 if silu else 1)
        operand = Fp8Operand(np.empty((T, K), np.uint8), np.empty(T, np.float32))
        weight, eps = norm or (None, 0.0)
        self._native.prepare_fp8(x, weight, eps, silu, operand.codes, operand.scale)
        return operand

    def pack_fp8(self, shards: Sequence[Fp8Matrix]) -> PackedFp8:
        return self._native.pack_fp8(shards)

    def fp8_linear(
        self,
        operand: Fp8Operand,
        weight: PackedFp8,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        self._native.fp8_linear(operand.codes, operand.scale, weight, out, bias, residual)
        return out

    def w8a16_linear(
        self,
        x: Array,
        weight: PackedFp8,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        self._native.w8a16_linear(x, weight, out, bias, residual)
        return out

    def embed(self, table: Array, token_ids: NDArray[np.int32], *, out: Array) -> Array:
        self._native.embed(table, token_ids, out)
        return out

    def rms_norm(self, x: Array, weight: NDArray[np.float32], eps: float, *, out: Array) -> Array:
        self._native.rms_norm(x, weight, eps, out)
        return out

    def silu_mul(self, gate_up: Array, *, out: Array) -> Array:
        self._native.silu_mul(gate_up, out)
        return out

    def kv_cache_budget(self) -> int:
        return kv_cache_budget()

    def rehearsal(self) -> None:
        """None: the cache leaves most of the memory."""

    def new_steps(self, cache: Any, *, num_heads: int, limits: StepLimits) -> None:
        """None: there is no device to keep busy."""

    def new_kv_cache(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: np.dtype[Any],
        activations: np.dtype[Any] | None = None,
        scales: NDArray[np.float32] | None = None,
    ) -> KVCache:
        scales = cache_scales(dtype, scales, num_layers)
        flat = None if scales is None else scales.reshape(-1)
        return _native.new_kv_cache(num_layers, num_blocks, num_kv_heads, head_dim, np.dtype(dtype), flat)

    def rope_and_cache(
        self,
        qkv: Array,
        rope_table: NDArray[np.float32],
        batch: Batch,
        cache: KVCache,
        layer: int,
        *,
        q_norm: NDArray[np.float32] | None,
        k_norm: NDArray[np.float32] | None,
        eps: float,
        out: Array,
    ) -> Array:
        positions, slots = batch.positions, batch.slot_mapping
        self._native.rope_and_cache(qkv, rope_table, positions, slots, cache, layer, q_norm, k_norm, eps, out)
        return out

    def attention(
        self, q: Array, batch: Batch, cache: KVCache, layer: int, *, scale: float, window: int | None, out: Array
    ) -> Array:
        rows, contexts = (batch.positions, batch.query_start), (batch.context_lens, batch.block_tables)
        self._native.attention(q, *rows, *contexts, cache, layer, scale, window, out)
        return out


def _panels(M: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """[K, K] as [K/block, K, block]: a block's columns one after the other."""
    return np.ascontiguousarray(M.reshape(len(M), -1, block).transpose(1, 0, 2))
