"""FP8 rows: E4M3 codes with one float32 scale per row, for weights and, per token, for activations.

    scale = max(fp32(amax |x| / 448), 1e-9)      code = e4m3(clamp(fp32(x / scale), ±448)), nearest, ties to even

448 is E4M3's largest number, so no code is ever NaN. A code's sign is x's sign bit, also where it rounds to zero. The
bits of E4M3 are drawn in `engine.fp8_types`; other backends give the same ones. A KV cache in E4M3 has such codes, too,
of K or V over a scale that is fixed.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument, NumericalError
from engine.fp8_types import Fp8Matrix

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = np.float32(448)
SCALE_MIN = np.float32(1e-9)


def quantize_rows(x: F32) -> tuple[U8, F32]:
    """Codes [R, K] and scale [R] of x [R, K]. Raises NumericalError (NaN, infinity)."""
    amax = np.abs(x).max(axis=1, initial=0)
    if not np.isfinite(amax).all():
        raise NumericalError("x holds NaN or infinity, which FP8 rows must not")
    scale = np.maximum(amax / E4M3_MAX, SCALE_MIN)
    return encode(x / scale[:, None]), scale


def encode(x: F32) -> U8:
    """The nearest codes, ties to even, of numbers clamped to ±448. Not for NaN."""
    return np.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3).view(np.uint8)


def cache_scales(dtype: np.dtype[Any], scales: F32 | None, num_layers: int) -> F32 | None:
    """The scales [2, layers] of a KV cache of this dtype: those given or 1; None for a dtype that has none.

    Raises InvalidArgument.
    """
    if np.dtype(dtype) != E4M3:
        if scales is not None:
            raise InvalidArgument(f"a KV cache in {np.dtype(dtype)} has no scales, only one in E4M3 has")
        return None
    scales = np.ones((2, num_layers), np.float32) if scales is None else np.ascontiguousarray(scales, np.float32)
    if scales.shape != (2, num_layers) or not (np.isfinite(scales) & (scales > 0)).all():
        raise InvalidArgument(f"scales of a KV cache must be positive numbers [2, {num_layers}], not {scales}")
    return scales


def decode(codes: U8) -> F32:
    """The codes' values, without any scale: exact."""
    return codes.view(E4M3).astype(np.float32)


def row_scales(m: Fp8Matrix) -> F32:
    """A weight's scales repeated for every row: [N, ceil(K / tile[1])]."""
    return np.repeat(m.scale, m.tile[0], axis=0)[: m.rows]
