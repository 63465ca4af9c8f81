"""Block formats along K: NVFP4, MXFP4 and HiF4. Each value is element × block scale.

    format   block     scale                             scale of a block whose largest magnitude is a
    NVFP4    16 or 32  UE4M3 byte                        ue4m3(clamp(a / 6, 2^−9, 448))
    MXFP4    32        E8M0 byte                         2^(floor(log2 a) − 2), as OCP MX suggests; a = 0: byte 0
    HiF4     64        32-bit word, drawn at `Hif4`      e6m2(clamp(a · fp32(1/7), 2^−48, 1.5·2^15)) + micro-exponents

A scale is chosen in two steps, so that the weight grades can try other scales than the rule's: `scale_byte` turns a
magnitude into the byte that is searched over, `complete` turns byte and block into the stored scale.

Every value is also integer × unit with a small integer and one unit per block: a dot product over a block is then an
exact integer, whatever the order it is summed in. Arrays: x float32 [..., block], codes uint8 [..., block], bytes and
scales [...], one per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.fp4_types import Format
from engine.ops.fp4.elements import E2M1_VALUES, S1P2_VALUES, encode_e2m1, encode_s1p2
from engine.ops.fp4.scales import (
    E6M2_VALUES,
    E8M0_VALUES,
    UE4M3_VALUES,
    encode_e6m2,
    encode_e8m0_floor,
    encode_ue4m3,
)

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
F32 = NDArray[np.float32]
Scale = NDArray[Any]  # uint8, or uint32 for HiF4

_ONE = np.float32(1)


class BlockFormat(Protocol):
    """What the quantisers and the products need to know of a format; the module's text has the shapes."""

    name: ClassVar[Format]
    has_global_scale: ClassVar[bool]

    @property
    def block(self) -> int: ...

    def scale_byte(self, amax: F32) -> U8:
        """The scale for blocks with these largest magnitudes, or its leading byte."""

    def complete(self, byte: U8, x: F32) -> Scale:
        """The stored scale of blocks x whose leading byte is given."""

    def encode(self, x: F32, scale: Scale) -> U8:
        """The nearest codes under the given stored scales."""

    def integers(self, codes: U8, scale: Scale) -> F32:
        """Small exact integers, so that a value is integer × unit."""

    def unit(self, scale: Scale) -> F32:
        """What the integer 1 is worth in each block."""


@dataclass(frozen=True)
class Nvfp4:
    """E2M1 elements, UE4M3 scales. code = e2m1(clamp(x · (1/s), ±6)): the reciprocal is rounded, then the product."""

    block: int = 16
    name: ClassVar[Format] = "nvfp4"
    has_global_scale: ClassVar[bool] = True

    def scale_byte(self, amax: F32) -> U8:
        return encode_ue4m3(amax / np.float32(6))

    def complete(self, byte: U8, x: F32) -> Scale:
        return byte

    def encode(self, x: F32, scale: Scale) -> U8:
        return encode_e2m1(x * (_ONE / UE4M3_VALUES[scale])[..., None])

    def integers(self, codes: U8, scale: Scale) -> F32:
        return _E2M1_INTEGERS[codes]

    def unit(self, scale: Scale) -> F32:
        return UE4M3_VALUES[scale] * np.float32(0.5)


@dataclass(frozen=True)
class Mxfp4:
    """E2M1 elements, E8M0 scales: x · (1/s) is exact unless it underflows, and then its code is 0 either way."""

    block: int = 32
    name: ClassVar[Format] = "mxfp4"
    has_global_scale: ClassVar[bool] = False

    def scale_byte(self, amax: F32) -> U8:
        return encode_e8m0_floor(amax, max_exponent=2)

    def complete(self, byte: U8, x: F32) -> Scale:
        return byte

    def encode(self, x: F32, scale: Scale) -> U8:
        return encode_e2m1(x * (_ONE / E8M0_VALUES[scale])[..., None])

    def integers(self, codes: U8, scale: Scale) -> F32:
        return _E2M1_INTEGERS[codes]

    def unit(self, scale: Scale) -> F32:
        return E8M0_VALUES[scale] * np.float32(0.5)


@dataclass(frozen=True)
class Hif4:
    """S1P2 elements under three levels of scale: value = E · 2^(e8 + e16) · element, largest 7 · E.

        bit   31 ... 16      15 ... 8      7 ... 0
            | E1_16        | E1_8        | E6M2 |      bit 16 + i is e16 of k in [4i, 4i + 4)
                                                       bit  8 + i is e8  of k in [8i, 8i + 8)

    e8 = 1 where the largest of its 8 is at least 4E; e16 = 1 where the largest of its 4 is at least 2 · 2^e8 · E. Both
    comparisons are exact (E has 3 significant bits). code = s1p2(x / (2^(e8 + e16) · E)), one rounded division.
    """

    block: int = 64
    name: ClassVar[Format] = "hif4"
    has_global_scale: ClassVar[bool] = False

    def scale_byte(self, amax: F32) -> U8:
        return encode_e6m2(amax * np.float32(1 / 7))

    def complete(self, byte: U8, x: F32) -> Scale:
        E = E6M2_VALUES[byte][..., None]
        largest_of_4 = np.abs(x).reshape(*x.shape[:-1], 16, 4).max(axis=-1)
        largest_of_8 = largest_of_4.reshape(*x.shape[:-1], 8, 2).max(axis=-1)
        e8 = largest_of_8 >= np.float32(4) * E
        e16 = largest_of_4 >= np.ldexp(np.float32(2) * E, np.repeat(e8, 2, axis=-1).astype(np.int32))
        word = byte.astype(np.uint32)
        word |= (e8 << np.arange(8, 16, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
        word |= (e16 << np.arange(16, 32, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
        return word

    def encode(self, x: F32, scale: Scale) -> U8:
        return encode_s1p2(x / np.ldexp(E6M2_VALUES[scale & 0xFF][..., None], _micro_exponents(scale)))

    def integers(self, codes: U8, scale: Scale) -> F32:
        return np.ldexp(_S1P2_INTEGERS[codes], _micro_exponents(scale))

    def unit(self, scale: Scale) -> F32:
        return E6M2_VALUES[scale & 0xFF] * np.float32(0.25)


_E2M1_INTEGERS = E2M1_VALUES * np.float32(2)  # 0 1 2 3 4 6 8 12 and their negatives
_S1P2_INTEGERS = S1P2_VALUES * np.float32(4)  # 0 … 7 and their negatives; at most 28 with the micro-exponents


def _micro_exponents(scale: U32) -> NDArray[np.int32]:
    """e8 + e16 of every element: [...] to [..., 64]."""
    word = scale[..., None].astype(np.uint32)
    k = np.arange(64, dtype=np.uint32)
    return ((word >> (8 + k // 8) & 1) + (word >> (16 + k // 4) & 1)).astype(np.int32)


def block_format(name: Format, block: int | None = None) -> BlockFormat:
    """The format by name; block tells NVFP4's two sizes apart (16 unless given)."""
    if name == "nvfp4":
        return Nvfp4(block or 16)
    return Mxfp4() if name == "mxfp4" else Hif4()


def quantize(x: F32, fmt: BlockFormat) -> tuple[U8, Scale]:
    """Codes [R, K] and scales [R, K/block] of x [R, K] by the format's own scale rule. K is a multiple of the block."""
    blocks = x.reshape(x.shape[0], x.shape[1] // fmt.block, fmt.block)
    scale = fmt.complete(fmt.scale_byte(np.abs(blocks).max(axis=-1, initial=0)), blocks)
    return fmt.encode(blocks, scale).reshape(x.shape), scale


def decode(codes: U8, scale: Scale, fmt: BlockFormat) -> F32:
    """The values [R, K] of codes [R, K] and scales [R, K/block], the global scale left out.

    Exact; only under E8M0 bytes above 252, which no encoder here writes, can a value be too large for fp32.
    """
    blocks = codes.reshape(codes.shape[0], codes.shape[1] // fmt.block, fmt.block)
    return (fmt.integers(blocks, scale) * fmt.unit(scale)[..., None]).reshape(codes.shape)
