"""Matrices in FP8 (E4M3) with float32 scales, as plain data: weights as FP8 checkpoints hold them, and activations.

    bit      7     6     5     4     3     2     1     0
    E4M3  |  s  | e3    e2    e1    e0 | m2    m1    m0 |   (1 + m/8) · 2^(e−7); e = 0: m · 2^−9; 0x7F, 0xFF NaN

A value is code × scale, always multiplied, whatever a checkpoint calls its scale. Constructing checks shapes and types,
not values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Matrix:
    """A weight [N, K] with a scale per tile of rows × k: (1, K) one per row, (N, K) one in all, (128, 128) blocks.

    Raises InvalidArgument where the arrays do not fit each other.
    """

    payload: U8  # [N, K] E4M3 codes, one a byte
    scale: F32  # [ceil(N / tile[0]), ceil(K / tile[1])]
    tile: tuple[int, int]  # how many rows and how many k share a scale; the last tiles may be cut

    def __post_init__(self) -> None:
        if self.payload.ndim != 2 or self.payload.dtype != np.uint8:
            raise InvalidArgument(
                f"payload must be uint8 [N, K], not {self.payload.dtype} of shape {self.payload.shape}"
            )
        if min(self.tile) < 1:
            raise InvalidArgument(f"a scale's tile must have at least one row and one k, not {self.tile}")
        shape = tuple(-(-size // step) for size, step in zip(self.payload.shape, self.tile, strict=True))
        if self.scale.dtype != np.float32 or self.scale.shape != shape:
            raise InvalidArgument(
                f"scale must be float32 of shape {shape} for tiles of {self.tile} in [{self.rows}, {self.K}], "
                f"not {self.scale.dtype} of shape {self.scale.shape}"
            )

    @property
    def rows(self) -> int:
        return self.payload.shape[0]

    @property
    def K(self) -> int:
        return self.payload.shape[1]

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes + self.scale.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Operand:
    """Activations [T, K] with a scale per token. Raises InvalidArgument where the arrays do not fit each other."""

    codes: U8  # [T, K] E4M3
    scale: F32  # [T]

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != np.uint8:
            raise InvalidArgument(f"codes must be uint8 [T, K], not {self.codes.dtype} of shape {self.codes.shape}")
        if self.scale.dtype != np.float32 or self.scale.shape != (self.T,):
            raise InvalidArgument(
                f"scale must be float32 [{self.T}], not {self.scale.dtype} of shape {self.scale.shape}"
            )

    @property
    def T(self) -> int:
        return self.codes.shape[0]

    @property
    def K(self) -> int:
        return self.codes.shape[1]
