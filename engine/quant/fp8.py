"""FP8 weights: E4M3 codes with one float32 scale per row.

    scale[n] = max(fp32(amax |w[n]| / 448), 1e-9)      code = e4m3(clamp(fp32(w / scale), ±448)), nearest, ties to even

448 is E4M3's largest number, so no code is ever NaN. `dequantize` also reads the scales of published checkpoints (one
per tensor, one per block of 128 × 128), which are never made here.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import NumericalError
from engine.fp8_types import Fp8Matrix

F32 = NDArray[np.float32]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = np.float32(448)
_SCALE_MIN = np.float32(1e-9)
_CHUNK = 1 << 20  # elements worked on at once: a few arrays of 4 MB


def quantize_weight(w: NDArray[Any]) -> Fp8Matrix:
    """w [N, K], float32, bfloat16 or float16, K ≥ 1. Raises NumericalError (NaN, infinity)."""
    N, K = w.shape
    payload, scale = np.empty((N, K), np.uint8), np.empty((N, 1), np.float32)
    step = max(1, _CHUNK // K)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        x = w[rows].astype(np.float32, copy=False)
        amax = np.abs(x).max(axis=1, keepdims=True)
        if not np.isfinite(amax).all():
            raise NumericalError("the weight holds NaN or infinity, which FP8 weights must not")
        scale[rows] = np.maximum(amax / E4M3_MAX, _SCALE_MIN)
        payload[rows] = np.clip(x / scale[rows], -E4M3_MAX, E4M3_MAX).astype(E4M3).view(np.uint8)
    return Fp8Matrix(payload, scale, (1, K))


def dequantize(m: Fp8Matrix) -> F32:
    """The values [N, K], each rounded once by the multiplication with its scale."""
    rows, columns = m.tile
    scale = np.repeat(np.repeat(m.scale, rows, axis=0)[: m.rows], columns, axis=1)[:, : m.K]
    return m.payload.view(E4M3).astype(np.float32) * scale
