"""Matrix products of FP4 operands: exact integers within a group of k, one order of fp32 sums across groups.

A group is as many k as share one scale on both sides (NVFP4: 16 where either operand has a scale per 16, else 32).
Within it the dot product of the `integers` is exact in any order (|dot| ≤ 4608 for 32 E2M1 products, ≤ 50176 for 64
S1P2), and so is dot · unit_a · unit_w: 13 + 4 + 4 significant bits for NVFP4, 16 + 3 + 3 for HiF4. What rounds:

    path[t, n] = the terms of ascending groups added one after the other in fp32, starting from 0
    Y[t, n]    = fp32(fp32(backbone + residual) · fp32(g[t] · g_w[n]))

so a row of Y depends on that row and the weight alone. The C++ and CUDA products may group the sums otherwise (their
bound is 2e-6 of max |Y|); nothing else about a product is free. MXFP4's scales span the whole range of fp32, hence a
term is (dot · unit_a) · unit_w: exact unless it leaves that range, and 0 stays 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.fp4_types import Fp4Matrix, SharqOperand
from engine.ops.fp4.blocks import BlockFormat, block_format, decode
from engine.ops.fp4.elements import unpack
from engine.ops.fp4.split import paths

F32 = NDArray[np.float32]


@np.errstate(over="ignore", invalid="ignore")
def path_sum(a: Fp4Matrix, w: Fp4Matrix) -> F32:
    """a · wᵀ [T, N] without the global scales. a and w share format and K."""
    group = min(a.block, w.block)
    a_format, w_format = block_format(a.format, a.block), block_format(w.format, w.block)
    a_units, w_units = a_format.unit(a.scale), w_format.unit(w.scale)
    total = np.zeros((a.rows, w.rows), np.float32)
    for k in range(0, a.K, group):
        # Whole numbers below 2^24: whatever order the BLAS sums them in, the result is exact.
        dot = _integers(a, a_format, k, group) @ _integers(w, w_format, k, group).T
        total += (dot * a_units[:, k // a.block, None]) * w_units[:, k // w.block]
    return total


def _integers(m: Fp4Matrix, fmt: BlockFormat, k: int, group: int) -> F32:
    """The integers of columns k … k + group: [R, group]."""
    codes = unpack(m.payload[:, k // 2 : (k + group) // 2])
    return fmt.integers(codes, m.scale[:, k // m.block])


def matmul(operand: SharqOperand | Fp4Matrix, w: Fp4Matrix) -> F32:
    """Y [T, N] in fp32, both paths of a SharQ operand added before the one multiplication by the global scales."""
    if isinstance(operand, Fp4Matrix):
        return _globally_scaled(path_sum(operand, w), operand.g, w.g)
    backbone, residual = paths(operand)
    return _globally_scaled(path_sum(backbone, w) + path_sum(residual, w), operand.g, w.g)


@np.errstate(over="ignore")
def _globally_scaled(total: F32, g: F32, g_w: F32) -> F32:
    return total * (g[:, None] * g_w)


def block_values(m: Fp4Matrix) -> F32:
    """The values [R, K] without the global scale: exact."""
    return decode(unpack(m.payload), m.scale, block_format(m.format, m.block))


def dequantize(m: Fp4Matrix) -> F32:
    """The values [R, K], each rounded once by the multiplication with g."""
    return block_values(m) * m.g[:, None]
