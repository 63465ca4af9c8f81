"""SharQ's activation split: rows X [T, K] into a quantised backbone and a quantised residual against it.

Step by step, each one rounding unless marked exact; C++ and CUDA give the same bits:

1. amax = max |X| over the row (scale="tensor": over all rows)                                            exact
   g = max(fp32(amax / 2688), fp32(1e-9)) for NVFP4, 1 for MXFP4 and HiF4
   x = bf16(fp32(X / g)): two roundings, the second one nearest-even too
2. sparse only. NVFP4, MXFP4: score of a pair of neighbours = max(|x|, |x'|), the best two of each 4 pairs are kept;
   HiF4: score = |x|, the best two of each 4 elements. The lower number wins a tie. Dropped elements count as 0. exact
3. backbone = the format's block quantiser (`engine.ops.fp4.blocks`) on the kept x: NVFP4 per 32, or 16 where dense;
   MXFP4 per 32; HiF4 per 64. For NVFP4: s = ue4m3(clamp(fp32(amax / 6), 2^−9, 448)), i = fp32(1 / s),
   q = e2m1(clamp(fp32(x · i), ±6))
4. r = fp32(x − q·s) where kept, x elsewhere. q·s is exact in fp32, so one rounding, fused or not.
   residual = the same block quantiser on r: NVFP4 per 16, MXFP4 per 32, HiF4 per 64

A code's sign is the sign bit of what was rounded, so a negative number that rounds to zero has code 8. An r that is
exactly 0 where something is kept is +0. All of a row's numbers depend on that row alone (scale="token").

What the method's published simulation does differently, as far as it is known: it breaks ties of E2M1 in another
direction, has no subnormal UE4M3 scales, uses one g for the whole tensor, and rounds to bf16 between the two paths.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.fp4_types import Format, Fp4Matrix, SharqOperand
from engine.ops.fp4.blocks import block_format, decode, quantize
from engine.ops.fp4.elements import pack, unpack

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
ScaleRule = Literal["token", "tensor"]

NVFP4_MAX = np.float32(6 * 448)  # what a row's largest magnitude becomes
G_MIN = np.float32(1e-9)


def global_scale(X: F32, per_row: bool, largest: np.float32 = NVFP4_MAX) -> F32:
    """g [R] of X [R, K]: max(amax / largest, 1e-9) with amax over each row, or over all of X."""
    amax = np.abs(X).max(axis=-1, initial=0)
    if not per_row:
        amax = np.broadcast_to(amax.max(initial=0), amax.shape)
    return np.maximum(amax / largest, G_MIN)


def round_bf16(x: F32) -> F32:
    """x rounded to bf16's 8 significant bits (nearest-even, subnormals kept, too large becomes infinite), as fp32."""
    raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((raw + 0x7FFF + (raw >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def scaled_rows(X: F32, format: Format, scale: ScaleRule) -> tuple[F32, F32]:
    """Step 1: x [T, K] (fp32 holding bf16 values) and g [T]."""
    if not block_format(format).has_global_scale:
        return round_bf16(X), np.ones(X.shape[0], np.float32)
    g = global_scale(X, per_row=scale == "token")
    return round_bf16(X / g[:, None]), g


def split(x: F32, g: F32, *, format: Format, sparse: bool) -> SharqOperand:
    """Steps 2 to 4 for x [T, K] from `scaled_rows`; K a multiple of 32 (HiF4: 64)."""
    backbone_format = block_format(format, 32 if sparse else 16)
    kept_index = best_two_of_four(_scores(x, format)) if sparse else None
    kept = x if kept_index is None else np.where(_spread(kept_index, x.shape[1]), x, np.float32(0))
    codes, backbone_scale = quantize(kept, backbone_format)
    # What was dropped has the code of +0, so subtracting the whole backbone leaves it as it is, −0 included.
    residual, residual_scale = quantize(x - decode(codes, backbone_scale, backbone_format), block_format(format))
    return SharqOperand(
        g=g,
        backbone=pack(codes if kept_index is None else _compress(codes, kept_index)),
        meta=None if kept_index is None else _metadata(kept_index),
        backbone_scale=backbone_scale,
        residual=pack(residual),
        residual_scale=residual_scale,
        format=format,
    )


def _scores(x: F32, format: Format) -> F32:
    """What candidates of the mask compete with, [T, chunks, 4]: elements for HiF4, pairs for the others."""
    T, K = x.shape
    width = 1 if format == "hif4" else 2
    return np.abs(x).reshape(T, K // (4 * width), 4, width).max(axis=-1)


def best_two_of_four(scores: F32) -> U8:
    """Numbers i0 < i1 of the two largest of four scores, the lower number winning ties: [..., 4] to [..., 2]."""
    first = scores.argmax(axis=-1)[..., None]  # the first of equals
    others = scores.copy()
    np.put_along_axis(others, first, np.float32(-1), axis=-1)  # below every score
    second = others.argmax(axis=-1)[..., None]
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=-1).astype(np.uint8)


def _spread(kept_index: U8, K: int) -> NDArray[np.bool_]:
    """The mask [T, K] of kept elements from the candidates kept in each chunk [T, chunks, 2]."""
    T, chunks, _ = kept_index.shape
    kept = (kept_index[..., None] == np.arange(4, dtype=np.uint8)).any(axis=-2)
    return np.repeat(kept.reshape(T, 4 * chunks), K // (4 * chunks), axis=1)


def _metadata(kept_index: U8) -> U8:
    """A nibble a chunk, two a byte: [T, chunks, 2] to [T, chunks/2]."""
    return pack(kept_index[..., 0] | kept_index[..., 1] << np.uint8(2))


def _compress(codes: U8, kept_index: U8) -> U8:
    """Kept codes in the order of k: [T, K] to [T, K/2]."""
    T, K = codes.shape
    chunks = kept_index.shape[1]
    candidates = codes.reshape(T, chunks, 4, K // (4 * chunks))
    return np.take_along_axis(candidates, kept_index[..., None], axis=-2).reshape(T, K // 2)


def paths(operand: SharqOperand) -> tuple[Fp4Matrix, Fp4Matrix]:
    """Backbone and residual, each as an ordinary matrix [T, K]; what the sparse backbone dropped has code 0."""
    backbone = operand.backbone
    if operand.meta is not None:
        backbone = pack(_expand(unpack(backbone), unpack(operand.meta), operand.K))
    return (
        Fp4Matrix(operand.format, backbone, operand.backbone_scale, operand.g),
        Fp4Matrix(operand.format, operand.residual, operand.residual_scale, operand.g),
    )


def _expand(stored: U8, nibbles: U8, K: int) -> U8:
    """The inverse of `_compress`: stored [T, K/2], nibbles [T, chunks] to codes [T, K]."""
    T, chunks = nibbles.shape
    width = K // (4 * chunks)
    codes = np.zeros((T, chunks, 4, width), np.uint8)
    kept_index = np.stack([nibbles & 3, nibbles >> 2], axis=-1)
    np.put_along_axis(codes, kept_index[..., None], stored.reshape(T, chunks, 2, width), axis=-2)
    return codes.reshape(T, K)
