"""NVFP4 weights with a scale per 16 k and per 32 k, one as the other.

per 32:  | s0    | s1    |        The codes are the same bytes in both. A scale per 32 is two equal scales per 16,
per 16:  | s0 s0 | s1 s1 |        so widening is always exact and narrowing is whenever all pairs are equal.
"""

from __future__ import annotations

import numpy as np

from engine.errors import InvalidArgument
from engine.fp4_types import Fp4Matrix

_ROWS = 1 << 12  # rows compared at once: most files differ in the first few


def per_16(m: Fp4Matrix) -> Fp4Matrix:
    """The same NVFP4 matrix with a scale per 16 k. Raises InvalidArgument for other formats."""
    if m.format != "nvfp4":
        raise InvalidArgument(f"only nvfp4 has a scale per 16 k, not {m.format}")
    return m if m.block == 16 else Fp4Matrix(m.format, m.payload, np.repeat(m.scale, 2, axis=1), m.g)


def narrowest(m: Fp4Matrix) -> Fp4Matrix:
    """The same matrix with a scale per 32 k where that loses nothing, else m itself."""
    if m.format != "nvfp4" or m.block != 16 or m.K % 32:
        return m
    even, odd = m.scale[:, 0::2], m.scale[:, 1::2]
    for start in range(0, m.rows, _ROWS):
        if not np.array_equal(even[start : start + _ROWS], odd[start : start + _ROWS]):
            return m
    return Fp4Matrix(m.format, m.payload, np.ascontiguousarray(even), m.g)
