"""Matrices and SharQ operands in FP4, as plain data: what the quantisers make and the matrix products take.

One class serves weights and activations in one path, because they are the same thing: rows of 4-bit codes, a scale per
block of k, a global scale per row. `engine.ops.fp4` defines what the bits mean. Arrays are never padded; a kernel that
wants another layout makes its own. Nothing here computes; constructing checks shapes and types, not values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument

Format = Literal["nvfp4", "mxfp4", "hif4"]
U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

BLOCKS: dict[str, tuple[int, ...]] = {"nvfp4": (16, 32), "mxfp4": (32,), "hif4": (64,)}  # k per scale
_SCALE_TYPE: dict[str, type[np.generic]] = {"nvfp4": np.uint8, "mxfp4": np.uint8, "hif4": np.uint32}


@dataclass(frozen=True, slots=True, eq=False)
class Fp4Matrix:
    """A matrix [R, K]: weights (R = N outputs) or activations in a single path (R = T tokens).

    Raises InvalidArgument where the arrays do not fit each other.
    """

    format: Format
    payload: U8  # [R, K/2], codes, even k in the low nibble
    scale: NDArray[Any]  # [R, K/block]: uint8 UE4M3 (nvfp4, block 16 or 32), uint8 E8M0 (mxfp4, 32), uint32 (hif4, 64)
    g: F32  # [R] global scale, constant within a weight's shard; 1 for mxfp4 and hif4

    def __post_init__(self) -> None:
        rows, K = _check_codes("payload", self.payload, self.format)
        _check_scale("scale", self.scale, self.format, rows, K, BLOCKS[self.format])
        _check_array("g", self.g, np.float32, (rows,))

    @property
    def rows(self) -> int:
        return self.payload.shape[0]

    @property
    def K(self) -> int:
        return self.payload.shape[1] * 2

    @property
    def block(self) -> int:
        """How many k share a scale."""
        return self.K // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes + self.scale.nbytes + self.g.nbytes


W32 = Fp4Matrix  # a weight as SharQ wants it: NVFP4 codes with one scale per 32 k, read by both paths


@dataclass(frozen=True, slots=True, eq=False)
class SharqOperand:
    """Activations [T, K] split into a backbone and the residual against it: x ≈ g · (backbone + residual).

    A sparse backbone keeps half the elements. nvfp4 and mxfp4 keep two of the four neighbouring pairs in each 8 k, hif4
    two of each 4 k; the kept ones' numbers i0 < i1 are the nibble `i0 | i1 << 2`, the even chunk in the low nibble.
    Raises InvalidArgument where the arrays do not fit each other.
    """

    g: F32  # [T] global scale of the row; 1 for mxfp4 and hif4
    backbone: U8  # sparse [T, K/4]: the kept codes in k order, two a byte, first in the low nibble; dense [T, K/2]
    meta: U8 | None  # [T, K/16] (hif4 [T, K/8]); None where the backbone is dense
    backbone_scale: NDArray[Any]  # sparse [T, K/32] (hif4 [T, K/64]); dense as residual_scale
    residual: U8  # [T, K/2]
    residual_scale: NDArray[Any]  # uint8 [T, K/16] (mxfp4 [T, K/32]); hif4 uint32 [T, K/64]
    format: Format = "nvfp4"

    def __post_init__(self) -> None:
        T, K = _check_codes("residual", self.residual, self.format)
        smallest = BLOCKS[self.format][:1]
        _check_scale("residual_scale", self.residual_scale, self.format, T, K, smallest)
        _check_array("g", self.g, np.float32, (T,))
        _check_array("backbone", self.backbone, np.uint8, (T, K // 4 if self.sparse else K // 2))
        block = BLOCKS[self.format][-1:] if self.sparse else smallest
        _check_scale("backbone_scale", self.backbone_scale, self.format, T, K, block)
        if self.meta is not None:
            _check_array("meta", self.meta, np.uint8, (T, K // (8 if self.format == "hif4" else 16)))

    @property
    def sparse(self) -> bool:
        return self.meta is not None

    @property
    def T(self) -> int:
        return self.residual.shape[0]

    @property
    def K(self) -> int:
        return self.residual.shape[1] * 2


def _check_codes(name: str, codes: U8, format: Format) -> tuple[int, int]:
    """Rows and K of codes packed two a byte."""
    if format not in BLOCKS:
        raise InvalidArgument(f"unknown FP4 format {format!r}; known: {', '.join(BLOCKS)}")
    if codes.ndim != 2:
        raise InvalidArgument(f"{name} must have 2 dimensions, not shape {codes.shape}")
    _check_array(name, codes, np.uint8, codes.shape)
    return codes.shape[0], codes.shape[1] * 2


def _check_scale(name: str, scale: NDArray[Any], format: Format, rows: int, K: int, blocks: tuple[int, ...]) -> None:
    shapes = [(rows, K // block) for block in blocks if K % block == 0]
    if scale.shape not in shapes:
        raise InvalidArgument(
            f"{name} of {format} with {rows} rows and K = {K} must have a scale per {' or '.join(map(str, blocks))} k, "
            f"not shape {scale.shape}"
        )
    _check_array(name, scale, _SCALE_TYPE[format], scale.shape)


def _check_array(name: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise InvalidArgument(
            f"{name} must be {np.dtype(dtype)} of shape {shape}, not {array.dtype} of shape {array.shape}"
        )
