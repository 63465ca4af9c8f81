"""SharQ: activations in FP4 as a sparse backbone plus a dense residual, weights in FP4 with one payload for both paths.

    operand = prepare(x)         w32 = quantize_weight(w)         y = matmul(operand, w32)    float32 [T, N]

The backbone takes half the elements, in the pattern that sparse FP4 tensor cores multiply at twice the rate; the
residual is what the *quantised* backbone misses, so it repairs the dropped elements and the kept ones' rounding. The
weights have one scale per 32 k: the sparse product reads it per 32, the dense product per 16, twice the same.

The bits, rounding by rounding, and how the method's published simulation differs: `engine.ops.fp4.split`; the order
of a product's sums: `engine.ops.fp4.product`. This module checks arguments and calls them; it is for tests, benchmarks
and other programs, NumPy in and out. It does not choose where the work runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument
from engine.fp4_types import W32, Format, Fp4Matrix, SharqOperand
from engine.ops.fp4 import product
from engine.ops.fp4.split import ScaleRule, paths, split
from engine.ops.reference import ReferenceOps
from engine.quant import fp4

F32 = NDArray[np.float32]
Array = NDArray[Any]

__all__ = [
    "W32",
    "SharqOperand",
    "dense_matmul",
    "dequantize",
    "matmul",
    "prepare",
    "prepare_rmsnorm",
    "prepare_silu_mul",
    "quantize_weight",
    "sparse_matmul",
]

_BLOCK = {"nvfp4": 32, "mxfp4": 32, "hif4": 64}  # k per scale of weights and sparse backbone: what K must divide by


def prepare(x: Array, *, format: Format = "nvfp4", sparse: bool = True, scale: ScaleRule = "token") -> SharqOperand:
    """Split activations x [T, K], float32 or bfloat16; K a multiple of 32 (hif4: 64).

    sparse=False keeps everything in the backbone (then in blocks of 16 for nvfp4): what SharQ becomes where sparsity
    saves nothing. scale: nvfp4's g per row, or one for all rows ("tensor", the paper's rule, which lets a row's result
    depend on the others). Raises InvalidArgument (shape, dtype, K, names) and NumericalError (NaN, infinity).
    """
    rows, g = fp4.checked_scaled_rows(x, format, scale, multiple=_BLOCK[fp4.check_format(format)])
    return split(rows, g, format=format, sparse=sparse)


def prepare_rmsnorm(
    x: Array,
    weight: F32,
    eps: float,
    *,
    format: Format = "nvfp4",
    sparse: bool = True,
    scale: ScaleRule = "token",
) -> SharqOperand:
    """`prepare` of bf16((x · inv_rms) · weight), inv_rms as in `engine.ops.reference`; x [T, K], weight [K].

    Raises as `prepare` does.
    """
    fp4.check_array("x", x, fp4.ACTIVATIONS, multiple=_BLOCK[fp4.check_format(format)])
    if weight.shape != x.shape[1:] or weight.dtype != np.float32:
        raise InvalidArgument(
            f"weight must be float32 of shape {x.shape[1:]}, not {weight.dtype} of shape {weight.shape}"
        )
    fp4.check_finite("x", x)
    normed = ReferenceOps().rms_norm(x, weight, eps, out=np.empty(x.shape, fp4.BF16))
    return prepare(normed, format=format, sparse=sparse, scale=scale)


def prepare_silu_mul(
    gate_up: Array, *, format: Format = "nvfp4", sparse: bool = True, scale: ScaleRule = "token"
) -> SharqOperand:
    """`prepare` of bf16(silu(gate) · up), as in `engine.ops.reference`; gate_up [T, 2K] = gate | up.

    Raises as `prepare` does.
    """
    fp4.check_array("gate_up", gate_up, fp4.ACTIVATIONS, multiple=2 * _BLOCK[fp4.check_format(format)])
    fp4.check_finite("gate_up", gate_up)
    T, width = gate_up.shape
    product_of_both = ReferenceOps().silu_mul(gate_up, out=np.empty((T, width // 2), fp4.BF16))
    return prepare(product_of_both, format=format, sparse=sparse, scale=scale)


def quantize_weight(w: Array, *, grade: str = "rtn", format: Format = "nvfp4") -> W32:
    """One shard w [N, K], float32, bfloat16 or float16, K a multiple of 32 (hif4: 64); g is constant over its rows.

    grade: how scales are chosen, see `engine.quant.grades`. Raises as `prepare` does.
    """
    return fp4.quantize_weight(w, format=format, block=_BLOCK[fp4.check_format(format)], grade=grade)


def matmul(operand: SharqOperand, w: W32) -> F32:
    """Y [T, N] = g · g_w · (backbone · wᵀ + residual · wᵀ) in fp32, the paths added before the global scales.

    w may also have blocks of 16 (NVFP4 weights as published). Raises InvalidArgument where they do not fit.
    """
    fp4.check_factors(operand, w)
    return product.matmul(operand, w)


def sparse_matmul(operand: SharqOperand, w: W32) -> F32:
    """The backbone's share of `matmul`, g · g_w included."""
    fp4.check_factors(operand, w)
    return product.matmul(paths(operand)[0], w)


def dense_matmul(operand: SharqOperand, w: W32) -> F32:
    """The residual's share of `matmul`, g · g_w included."""
    fp4.check_factors(operand, w)
    return product.matmul(paths(operand)[1], w)


def dequantize(m: SharqOperand | Fp4Matrix) -> F32:
    """The values [R, K] of an operand (both paths added in fp32) or of a weight, global scale included."""
    if isinstance(m, Fp4Matrix):
        return product.dequantize(m)
    backbone, residual = (product.block_values(path) for path in paths(m))
    return (backbone + residual) * m.g[:, None]
