"""FP8 weights: E4M3 codes with one float32 scale per row, by the rule of `engine.ops.fp8`.

`dequantize` also reads the scales of published checkpoints (one per tensor, one per block of 128 × 128), which are
never made here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.fp8_types import Fp8Matrix
from engine.ops import fp8

F32 = NDArray[np.float32]
_CHUNK = 1 << 20  # elements worked on at once: a few arrays of 4 MB


def quantize_weight(w: NDArray[Any]) -> Fp8Matrix:
    """w [N, K], float32, bfloat16 or float16, K ≥ 1. Raises NumericalError (NaN, infinity)."""
    N, K = w.shape
    payload, scale = np.empty((N, K), np.uint8), np.empty((N, 1), np.float32)
    step = max(1, _CHUNK // K)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        payload[rows], scale[rows, 0] = fp8.quantize_rows(w[rows].astype(np.float32, copy=False))
    return Fp8Matrix(payload, scale, (1, K))


def dequantize(m: Fp8Matrix) -> F32:
    """The values [N, K], each rounded once by the multiplication with its scale."""
    scale = np.repeat(fp8.row_scales(m), m.tile[1], axis=1)[:, : m.K]
    return fp8.decode(m.payload) * scale
