"""Every operation in NumPy: the definition of correct, and what runs where there is no compiler.

The other backends are measured against this module. `rms_norm`, `rope_and_cache`, `silu_mul` and `embed` are defined
here to the last bit, so that a FP4 code chosen from their outputs is the same everywhere; the rules are:

* every elementary step is one correctly rounded fp32 operation (+, ×, ÷, √, or `fma32`), in the order written here;
* a sum of squares is 1024 partial sums, see `inverse_rms`: an order that suits 16 lanes as well as 1024 threads;
* the exponential is the polynomial `exp32`, because no two libraries' exp agree in the last bit;
* the result is rounded once to the output's dtype, nearest-even, subnormals kept. Which NaN a NaN is, is left open.

`linear` and `attention` have no defined summation order, only the guarantee that a row's bits depend on that row (and
its sequence) alone. NumPy's matrix products choose their order by shape, so here `linear` is one matrix-vector product
per row and `attention` works row by row. That is slow, 5 to 50 times slower than the C++ backend, and on purpose so:
this module is read, compared with and fallen back to; it is not tuned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.core import Batch, StepLimits
from engine.errors import InvalidArgument, NumericalError
from engine.fp4_types import BLOCKS, Format, Fp4Matrix, SharqOperand
from engine.fp8_types import Fp8Matrix, Fp8Operand
from engine.memory import kv_cache_budget
from engine.ops import fp8
from engine.ops.contract import Array, Norm
from engine.ops.fp4 import blocks, grades, product
from engine.ops.fp4.elements import pack
from engine.ops.fp4.feedback import Feedback
from engine.ops.fp4.feedback import quantize as quantize_with_feedback
from engine.ops.fp4.split import ScaleRule, scaled_rows, split

F32 = NDArray[np.float32]

NUM_PARTIALS = 1024  # partial sums of a sum of squares: one per thread of the largest GPU block
KV_BLOCK_SIZE = 16
_ALIGNMENT = 64  # bytes: a cache line, an AVX-512 register


# ---- elementary steps ------------------------------------------------------------------------------------------------


def fma32(a: F32 | np.float32, b: F32, c: F32 | np.float32) -> F32:
    """a·b + c with a single rounding to fp32, broadcast like NumPy's own operators.

    The product of two fp32 numbers is exact in float64, the sum with c is not: rounding it to 53 bits and then to 24
    can differ from rounding once. So the sum is rounded to odd first (an inexact sum takes the neighbour whose last bit
    is 1, which is never a tie and remembers the side), after which rounding to 24 bits is right, also for subnormals.
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, dtype=np.float64)
    total = np.asarray(product + addend)
    from_addend = total - product  # two-sum: error is what `total` lost, exactly
    error = (product - (total - from_addend)) + (addend - from_addend)
    bits = total.view(np.int64)
    inexact_even = np.isfinite(total) & (error != 0) & ((bits & 1) == 0)
    outward = np.where((error > 0) == (total > 0), 1, -1)  # bits of a float64 count away from zero
    odd = np.where(inexact_even, bits + outward, bits).view(np.float64)
    return odd.astype(np.float32)


EXP_MIN, EXP_MAX = np.float32(-104.0), np.float32(89.0)  # e^x rounds to 0 and to infinity at and beyond these
_LOG2E = np.float32(1.44269504)
_LN2_HI = np.float32(0.693147182)  # ln 2 rounded to fp32; n · _LN2_HI is taken from x exactly by the fma
_LN2_LO = np.float32(-1.90465421e-9)  # ln 2 − _LN2_HI
# e^r ≈ 1 + r + r²·(c2 + c3·r + … + c6·r⁴) on |r| ≤ ln 2 / 2, least largest relative error (3e-9), highest power first
_EXP_COEFFICIENTS = tuple(
    np.float32(float.fromhex(c))
    for c in ("0x1.6a23cep-10", "0x1.123a2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p0", "0x1p0")
)


@np.errstate(over="ignore")
def exp32(x: F32) -> F32:
    """e^x in fp32 within 1 ulp: x = n·ln 2 + r, a polynomial of degree 6 in r, then an exact scaling by 2^n.

    x is clamped to [EXP_MIN, EXP_MAX], where the result is already 0 or infinity; NaN stays NaN.
    """
    x = np.minimum(np.maximum(x, EXP_MIN), EXP_MAX)
    n = np.rint(x * _LOG2E)
    r = fma32(-_LN2_LO, n, fma32(-_LN2_HI, n, x))
    p = np.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = fma32(p, r, coefficient)
    return _scale_by_power_of_two(p, n)


def _scale_by_power_of_two(p: F32, n: F32) -> F32:
    """p · 2^n with one rounding, p in [0.5, 2), n in [-150, 128]: two factors, since 2^n itself may not be an fp32."""
    exponent = np.nan_to_num(n).astype(np.int32)
    half = exponent >> 1
    one = np.float32(1)
    return (p * np.ldexp(one, half)) * np.ldexp(one, exponent - half)


def inverse_rms(x: F32, eps: float) -> F32:
    """1 / sqrt(mean(x²) + eps) over the last axis, kept as an axis of length 1.

    Partial sum p of 1024 takes the elements k ≡ p (mod 1024) in ascending order, each by fma; absent ones are 0. Then
    neighbours 2i, 2i+1 are added, ten times. Sum / K, + eps, square root and reciprocal are rounded one by one.
    """
    K = x.shape[-1]
    chunks = -(-K // NUM_PARTIALS)
    padded = np.zeros((*x.shape[:-1], chunks * NUM_PARTIALS), np.float32)
    padded[..., :K] = x
    sums = np.zeros((*x.shape[:-1], NUM_PARTIALS), np.float32)
    for chunk in np.split(padded, chunks, axis=-1):
        sums = fma32(chunk, chunk, sums)
    while sums.shape[-1] > 1:
        sums = sums[..., 0::2] + sums[..., 1::2]
    root: F32 = np.sqrt(sums / np.float32(K) + np.float32(eps))
    return np.float32(1) / root


def _normalise(x: F32, weight: F32, eps: float) -> F32:
    return (x * inverse_rms(x, eps)) * weight


def _rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotary embedding of x [T, heads, D]; cos, sin [T, 1, D/2]; pairs are (i, i + D/2)."""
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate([fma32(low, cos, -(high * sin)), fma32(high, cos, low * sin)], axis=-1)


def _f32(x: Array) -> F32:
    return x.astype(np.float32, copy=False)


# ---- the contract ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReferenceWeight:
    """A weight as stored, converted to fp32 once."""

    w: F32  # [N, K]

    @property
    def N(self) -> int:
        return self.w.shape[0]

    @property
    def K(self) -> int:
        return self.w.shape[1]

    @property
    def nbytes(self) -> int:
        return self.w.nbytes


@dataclass(frozen=True, slots=True)
class ReferenceFp4Weight:
    """All shards one after the other, as they are."""

    matrix: Fp4Matrix

    @property
    def N(self) -> int:
        return self.matrix.rows

    @property
    def K(self) -> int:
        return self.matrix.K

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes


@dataclass(frozen=True, slots=True)
class ReferenceFp8Weight:
    """All shards one after the other, each row with its own scales."""

    codes: NDArray[np.uint8]  # [N, K] E4M3
    scale: F32  # [N, ceil(K / step)]
    step: int  # k per scale

    @property
    def N(self) -> int:
        return self.codes.shape[0]

    @property
    def K(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


@dataclass(frozen=True, slots=True)
class ReferenceKVCache:
    """Token-major: slot `block * block_size + offset` of a layer is row [block, offset]."""

    k: Array  # [layers, blocks, block_size, KVH, D]
    v: Array  # [layers, blocks, block_size, KVH, D]
    scales: F32 | None = None  # [2, layers]: of E4M3's K and V

    @property
    def num_blocks(self) -> int:
        return self.k.shape[1]

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class ReferenceOps:
    """`engine.ops.contract.Ops` in NumPy. Out-of-range values become infinities silently, as on every backend."""

    kernel_path = "numpy"
    kv_block_size = KV_BLOCK_SIZE
    short_prompt_tokens: int | None = None

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
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
        return bool(np.isfinite(array).all())

    def pack_weight(self, shards: Sequence[Array]) -> ReferenceWeight:
        return ReferenceWeight(np.concatenate([_f32(shard) for shard in shards]))

    @np.errstate(over="ignore", invalid="ignore")
    def linear(
        self,
        x: Array,
        weight: ReferenceWeight,
        *,
        out: Array,
        bias: F32 | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        row = self.empty((weight.K,), np.dtype(np.float32))  # one place for every row: BLAS may look at alignment
        for t in range(x.shape[0]):
            row[:] = x[t]
            y = weight.w @ row
            if bias is not None:
                y += bias
            if residual is not None:
                y += _f32(residual[t])
            out[t] = y
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
    ) -> SharqOperand:
        return split(*self._fp4_rows(x, format, scale, norm, silu), format=format, sparse=sparse)

    def prepare_fp4(
        self,
        x: Array,
        *,
        format: Format = "nvfp4",
        scale: ScaleRule = "token",
        norm: Norm | None = None,
        silu: bool = False,
    ) -> Fp4Matrix:
        rows, g = self._fp4_rows(x, format, scale, norm, silu)
        codes, scales = blocks.quantize(rows, blocks.block_format(format))
        return Fp4Matrix(format, pack(codes), scales, g)

    def _fp4_rows(self, x: Array, format: Format, scale: ScaleRule, norm: Norm | None, silu: bool) -> tuple[F32, F32]:
        """The rows [T, K] to quantise, bf16 values over g, and g [T]."""
        K = x.shape[1] // (2 if silu else 1)
        if K == 0 or K % BLOCKS[format][-1]:
            raise InvalidArgument(f"K must be a positive multiple of {BLOCKS[format][-1]}, not {K}")
        x = self._low_precision_rows(x, norm, silu)
        if not np.isfinite(x).all():
            raise NumericalError("x holds NaN or infinity; FP4 has codes for neither")
        rows, g = scaled_rows(_f32(x), format, scale)
        if not np.isfinite(rows).all():
            raise NumericalError("x rounded to bfloat16 holds infinity; FP4 has no code for it")
        return rows, g

    def quantize_weight(self, w: Array, *, format: Format, block: int, grade: grades.Grade) -> Fp4Matrix:
        return grades.quantize(w, fmt=blocks.block_format(format, block), grade=grade)

    def quantize_feedback(
        self, w: Array, g: np.float32, feedback: Feedback, *, format: Format, block: int
    ) -> Fp4Matrix:
        if format == "hif4":
            raise InvalidArgument("errors are fed back for nvfp4 and mxfp4, not for hif4")
        return quantize_with_feedback(w, g, blocks.block_format(format, block), feedback)

    def pack_fp4(self, shards: Sequence[Fp4Matrix], *, weights_only: bool = False) -> ReferenceFp4Weight:
        payload, scale, g = (np.concatenate([getattr(s, name) for s in shards]) for name in ("payload", "scale", "g"))
        return ReferenceFp4Weight(Fp4Matrix(shards[0].format, payload, scale, g))

    def fp4_linear(
        self,
        operand: SharqOperand | Fp4Matrix,
        weight: ReferenceFp4Weight,
        *,
        out: Array,
        bias: F32 | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        return _finish(product.matmul(operand, weight.matrix), bias, residual, out)

    @np.errstate(over="ignore", invalid="ignore")
    def w4a16_linear(
        self,
        x: Array,
        weight: ReferenceFp4Weight,
        *,
        out: Array,
        bias: F32 | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        values = product.block_values(weight.matrix)
        row = self.empty((weight.K,), np.dtype(np.float32))  # as in linear
        y = np.empty(out.shape, np.float32)
        for t in range(x.shape[0]):
            row[:] = x[t]
            y[t] = (values @ row) * weight.matrix.g
        return _finish(y, bias, residual, out)

    @np.errstate(over="ignore", invalid="ignore")
    def prepare_fp8(self, x: Array, *, norm: Norm | None = None, silu: bool = False) -> Fp8Operand:
        return Fp8Operand(*fp8.quantize_rows(_f32(self._low_precision_rows(x, norm, silu))))

    def _low_precision_rows(self, x: Array, norm: Norm | None, silu: bool) -> Array:
        """What a prepared operand holds: x as it is, or bf16 of its norm or SwiGLU."""
        T, K = x.shape[0], x.shape[1] // (2 if silu else 1)
        if norm is not None:
            return self.rms_norm(x, *norm, out=np.empty((T, K), ml_dtypes.bfloat16))
        if silu:
            return self.silu_mul(x, out=np.empty((T, K), ml_dtypes.bfloat16))
        return x

    def pack_fp8(self, shards: Sequence[Fp8Matrix]) -> ReferenceFp8Weight:
        step = min(shards[0].K, shards[0].tile[1])
        for shard in shards:
            if (shard.K, min(shard.K, shard.tile[1])) != (shards[0].K, step):
                raise InvalidArgument(
                    f"all shards need one K and as many k per scale, but got {shards[0].K} by {step} "
                    f"and {shard.K} by {shard.tile[1]}"
                )
        codes = np.concatenate([shard.payload for shard in shards])
        if ((codes & 0x7F) == 0x7F).any():
            raise NumericalError("the weight holds NaN, which FP8 weights must not")
        return ReferenceFp8Weight(codes, np.concatenate([fp8.row_scales(shard) for shard in shards]), step)

    @np.errstate(over="ignore", invalid="ignore")
    def fp8_linear(
        self,
        operand: Fp8Operand,
        weight: ReferenceFp8Weight,
        *,
        out: Array,
        bias: F32 | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        y = self._fp8_products(fp8.decode(operand.codes), weight)
        return _finish(y * operand.scale[:, None], bias, residual, out)

    @np.errstate(over="ignore", invalid="ignore")
    def w8a16_linear(
        self,
        x: Array,
        weight: ReferenceFp8Weight,
        *,
        out: Array,
        bias: F32 | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        return _finish(self._fp8_products(_f32(x), weight), bias, residual, out)

    def _fp8_products(self, x: F32, weight: ReferenceFp8Weight) -> F32:
        """x [T, K] · (weight's values)ᵀ [T, N]: sums over the k that share a scale, times it, added up in ascending k.

        Row by row and from one place in memory, as in `linear`.
        """
        y = np.zeros((x.shape[0], weight.N), np.float32)
        row = self.empty((weight.step,), np.dtype(np.float32))
        for scale, k in zip(weight.scale.T, range(0, weight.K, weight.step), strict=True):
            values = fp8.decode(weight.codes[:, k : k + weight.step])
            for t in range(x.shape[0]):
                part = row[: values.shape[1]]
                part[:] = x[t, k : k + weight.step]
                y[t] += (values @ part) * scale
        return y

    @np.errstate(over="ignore")
    def embed(self, table: Array, token_ids: NDArray[np.int32], *, out: Array) -> Array:
        out[...] = _f32(table[token_ids])
        return out

    @np.errstate(over="ignore", invalid="ignore")
    def rms_norm(self, x: Array, weight: F32, eps: float, *, out: Array) -> Array:
        out[...] = _normalise(_f32(x), weight, eps)
        return out

    @np.errstate(over="ignore", invalid="ignore")
    def silu_mul(self, gate_up: Array, *, out: Array) -> Array:
        """silu(g) = g / (1 + e^−g), then · u. For g below −88.7 e^−g is infinite and the result 0, which is off by
        less than 3e-37·|u|; an infinite gate of −inf gives NaN (it was an overflow already)."""
        gate, up = np.split(_f32(gate_up), 2, axis=-1)
        out[...] = (gate / (np.float32(1) + exp32(-gate))) * up
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
        scales: F32 | None = None,
    ) -> ReferenceKVCache:
        shape = (num_layers, num_blocks, KV_BLOCK_SIZE, num_kv_heads, head_dim)
        scales = fp8.cache_scales(dtype, scales, num_layers)
        return ReferenceKVCache(np.zeros(shape, dtype), np.zeros(shape, dtype), scales)

    @np.errstate(over="ignore", invalid="ignore")
    def rope_and_cache(
        self,
        qkv: Array,
        rope_table: F32,
        batch: Batch,
        cache: ReferenceKVCache,
        layer: int,
        *,
        q_norm: F32 | None,
        k_norm: F32 | None,
        eps: float,
        out: Array,
    ) -> Array:
        """Norm and rotation are fp32 throughout; q and k are rounded once, to out's and the cache's type."""
        KVH, D = cache.k.shape[3:]
        heads = _f32(qkv).reshape(qkv.shape[0], -1, D)
        H = heads.shape[1] - 2 * KVH
        q, k, v = np.split(heads, [H, H + KVH], axis=1)
        if q_norm is not None:
            q = _normalise(q, q_norm, eps)
        if k_norm is not None:
            k = _normalise(k, k_norm, eps)
        cos, sin = np.split(rope_table[batch.positions][:, None, :], 2, axis=-1)
        block, offset = np.divmod(batch.slot_mapping, cache.block_size)
        k = _rotate(k, cos, sin)
        if cache.scales is not None:
            k, v = (_e4m3(x, scale) for x, scale in zip((k, v), cache.scales[:, layer], strict=True))
        cache.k[layer, block, offset] = k
        cache.v[layer, block, offset] = v
        out[...] = _rotate(q, cos, sin).reshape(out.shape)
        return out

    @np.errstate(over="ignore", invalid="ignore")
    def attention(
        self,
        q: Array,
        batch: Batch,
        cache: ReferenceKVCache,
        layer: int,
        *,
        scale: float,
        window: int | None,
        out: Array,
    ) -> Array:
        """Computed in float64, one row at a time (all heads of a row together) and rounded once."""
        KVH, D = cache.k.shape[3:]
        rows = q.astype(np.float64).reshape(q.shape[0], KVH, -1, D)
        for s, context_len in enumerate(batch.context_lens):
            k, v = (_gather(pages[layer], batch.block_tables[s], context_len) for pages in (cache.k, cache.v))
            if cache.scales is not None:
                k, v = k * cache.scales[0, layer], v * cache.scales[1, layer]
            for t in range(batch.query_start[s], batch.query_start[s + 1]):
                stop = int(batch.positions[t]) + 1
                start = 0 if window is None else max(0, stop - window)
                weights = _softmax(scale * (rows[t] @ k[:, start:stop].transpose(0, 2, 1)))
                out[t] = (weights @ v[:, start:stop]).astype(np.float32).reshape(-1)
        return out


@np.errstate(over="ignore", invalid="ignore")
def _finish(y: F32, bias: F32 | None, residual: Array | None, out: Array) -> Array:
    """out = y + bias + residual, rounded once."""
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + _f32(residual)
    out[...] = y
    return out


def _e4m3(x: F32, scale: np.float32) -> Array:
    """x as an E4M3 cache holds it. Raises NumericalError (NaN, infinity)."""
    if not np.isfinite(x).all():
        raise NumericalError("K or V holds NaN or infinity, which a KV cache in FP8 cannot hold")
    codes: Array = fp8.encode(x / np.float32(scale)).view(fp8.E4M3)
    return codes


def _gather(pages: Array, block_table: NDArray[np.int32], context_len: int) -> NDArray[np.float64]:
    """One sequence's first context_len entries of a layer's pages [blocks, block_size, KVH, D], as [KVH, tokens, D]."""
    num_blocks = -(-int(context_len) // pages.shape[1])
    tokens = pages[block_table[:num_blocks]].reshape(-1, *pages.shape[2:])[:context_len]
    return np.ascontiguousarray(tokens.transpose(1, 0, 2), dtype=np.float64)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
