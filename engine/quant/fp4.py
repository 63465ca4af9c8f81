"""The block formats as users of arrays see them: NVFP4, MXFP4 and HiF4 in a single path, NumPy in and out.

`prepare` quantises activations, `quantize_weight` weights (in a grade, see `engine.quant.grades`), `matmul`
multiplies them, `dequantize` shows what the codes are worth. Arguments are checked here and nowhere below. SharQ's two
paths are in `sharq`, with the same verbs; how a model's layers use either is not this module's business.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument, NumericalError
from engine.fp4_types import BLOCKS, Format, Fp4Matrix, SharqOperand
from engine.ops.fp4 import product
from engine.ops.fp4.blocks import block_format, quantize
from engine.ops.fp4.elements import pack
from engine.ops.fp4.split import ScaleRule, scaled_rows
from engine.ops.reference import ReferenceOps
from engine.quant.grades import quantize_shards

F32 = NDArray[np.float32]
Array = NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
ACTIVATIONS = (np.dtype(np.float32), BF16)
WEIGHTS = (*ACTIVATIONS, np.dtype(np.float16))


def prepare(x: Array, *, format: Format = "nvfp4", scale: ScaleRule = "token") -> Fp4Matrix:
    """Activations x [T, K], float32 or bfloat16, in one path: NVFP4 per 16 k, MXFP4 per 32, HiF4 per 64.

    scale: whether NVFP4's g is each row's own or one for all rows; the other formats have none and refuse "tensor".
    Raises InvalidArgument (shape, dtype, K not a multiple of the block, names) and NumericalError (NaN, infinity).
    """
    fmt = block_format(check_format(format))
    rows, g = checked_scaled_rows(x, format, scale, multiple=fmt.block)
    codes, scales = quantize(rows, fmt)
    return Fp4Matrix(format, pack(codes), scales, g)


def quantize_weight(w: Array, *, format: Format = "nvfp4", block: int | None = None, grade: str = "rtn") -> Fp4Matrix:
    """One shard w [N, K], float32, bfloat16 or float16, with a global scale of its own (NVFP4; else 1).

    block: k per scale; NVFP4 has 16 (the default) and 32. Raises as `prepare` does.
    """
    blocks = BLOCKS[check_format(format)]
    block = blocks[0] if block is None else block
    if block not in blocks:
        raise InvalidArgument(f"{format} has no blocks of {block}; it has {' and '.join(map(str, blocks))}")
    check_array("w", w, WEIGHTS, multiple=block)
    if w.shape[0] == 0:
        raise InvalidArgument(f"w must have at least one row, not shape {w.shape}")
    return quantize_shards(ReferenceOps(), [w], format=format, block=block, grade=grade)[0]


def matmul(a: Fp4Matrix, w: Fp4Matrix) -> F32:
    """a · wᵀ [T, N] in fp32, global scales included; the order of the sums is `engine.ops.fp4.product`'s."""
    check_factors(a, w)
    return product.matmul(a, w)


def dequantize(m: Fp4Matrix) -> F32:
    """The values [R, K] of a matrix, global scale included."""
    return product.dequantize(m)


# ---- checks, shared with `sharq` -------------------------------------------------------------------------------------


def check_format(format: str) -> Format:
    if format not in BLOCKS:
        raise InvalidArgument(f"unknown FP4 format {format!r}; known: {', '.join(BLOCKS)}")
    return format  # type: ignore[return-value]


def check_array(name: str, array: Array, dtypes: tuple[np.dtype[Any], ...], multiple: int) -> None:
    """Two dimensions, one of the dtypes, the last dimension a positive multiple."""
    if array.dtype not in dtypes:
        raise InvalidArgument(f"{name} must be {' or '.join(map(str, dtypes))}, not {array.dtype}")
    if array.ndim != 2:
        raise InvalidArgument(f"{name} must have 2 dimensions (rows, K), not shape {array.shape}")
    if array.shape[1] == 0 or array.shape[1] % multiple:
        raise InvalidArgument(f"K of {name} must be a positive multiple of {multiple}, not {array.shape[1]}")


def check_finite(name: str, array: Array) -> None:
    if not np.isfinite(array).all():
        raise NumericalError(f"{name} holds NaN or infinity; FP4 has codes for neither")


def checked_scaled_rows(x: Array, format: Format, scale: ScaleRule, multiple: int) -> tuple[F32, F32]:
    """x [T, K] ready for its block quantiser, and g [T], after every check of `prepare`'s arguments."""
    check_array("x", x, ACTIVATIONS, multiple)
    check_scale_rule(format, scale)
    check_finite("x", x)
    rows, g = scaled_rows(x.astype(np.float32, copy=False), format, scale)
    check_finite("x rounded to bfloat16", rows)
    return rows, g


def check_scale_rule(format: Format, scale: str) -> None:
    if scale not in ("token", "tensor"):
        raise InvalidArgument(f"scale must be 'token' or 'tensor', not {scale!r}")
    if scale == "tensor" and not block_format(format).has_global_scale:
        raise InvalidArgument(f"{format} has no global scale, so scale='tensor' has no meaning; leave it at 'token'")


def check_factors(operand: SharqOperand | Fp4Matrix, w: Fp4Matrix) -> None:
    if operand.format != w.format:
        raise InvalidArgument(f"activations in {operand.format} do not multiply weights in {w.format}")
    if operand.K != w.K:
        raise InvalidArgument(f"activations with K = {operand.K} do not multiply weights with K = {w.K}")
