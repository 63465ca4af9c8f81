"""Weights as the matrix-product kernels read them: the NumPy side of cuda/weight_layout.cuh, which draws the layout.

A unit is 16 rows by 128 k of FP4 (1024 bytes of codes, then the rows' scales) or 64 k of FP8 (1024 bytes of codes).
N is padded to 16 and K to 128 with zeros: codes of 0 under whatever scale a byte 0 is. Units of 16 rows lie one after
the other along k. bf16 and f16 weights need no layout of their own: kernels read [N, K] row by row.

The eight codes of a 32-bit word are nibbles where instructions take FP4 (sm_120a), and `placed` where kernels make f16
of them (cuda/fp4_decode.cuh draws both).

`pack_*` take host arrays; `unpack_fp4` undoes `pack_fp4` for tests. A packed weight's arrays may be replaced by a
device's copies of them (`on`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument
from engine.fp4_types import Format, Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops import fp8

U8 = NDArray[np.uint8]

TILE_ROWS = 16
CODE_BYTES = 1024  # of a unit
FP4_UNIT_K = 128
FP8_UNIT_K = 64
FP8_SCALE_K = 128  # k per scale where there are several along k: what DeepSeek-style checkpoints have


@dataclass(frozen=True, slots=True)
class Fp4Units:
    """An FP4 weight [N, K] in units: what `Fp4Matrix` holds, its rows' global scales beside it."""

    format: Format
    block: int  # k per scale
    placed: bool  # the order of bits within a word
    N: int
    K: int
    units: Any  # uint8 [tiles, ceil(K / 128), 1088 or 1152]
    g: Any  # float32 [N]

    @property
    def nbytes(self) -> int:
        return int(self.units.nbytes + self.g.nbytes)

    def on(self, upload: Callable[[NDArray[Any]], Any]) -> Fp4Units:
        """The same weight with its arrays handed through `upload`."""
        return replace(self, units=upload(self.units), g=upload(self.g))


@dataclass(frozen=True, slots=True)
class Fp8Units:
    """An FP8 weight [N, K] in units. One scale a row, or one for each row and 128 k."""

    N: int
    K: int
    units: Any  # uint8 [tiles, 2 ceil(K / 128), 1024]
    scale: Any  # float32 [scales along k, N]

    @property
    def nbytes(self) -> int:
        return int(self.units.nbytes + self.scale.nbytes)

    def on(self, upload: Callable[[NDArray[Any]], Any]) -> Fp8Units:
        """The same weight with its arrays handed through `upload`."""
        return replace(self, units=upload(self.units), scale=upload(self.scale))


def unit_bytes(format: Format, block: int) -> int:
    """Bytes of a unit of an FP4 weight: codes, and one or two words of scales for each of its rows."""
    words = 2 if format == "hif4" or block == 16 else 1
    return CODE_BYTES + 4 * TILE_ROWS * words


def pack_fp4(shards: Sequence[Fp4Matrix], *, placed: bool = True) -> Fp4Units:
    """One weight of [N_i, K] shards, rows one after the other. placed: False for FP4 instructions.

    Raises InvalidArgument (shards that differ in kind).
    """
    first = shards[0]
    for shard in shards:
        if (shard.format, shard.K, shard.block) != (first.format, first.K, first.block):
            raise InvalidArgument(
                f"all shards need one format, K and block, but got {first.format}, {first.K}, {first.block} "
                f"and {shard.format}, {shard.K}, {shard.block}"
            )
    N, K = sum(shard.rows for shard in shards), first.K
    tiles, chunks = -(-N // TILE_ROWS), -(-K // FP4_UNIT_K)
    codes = _padded([s.payload for s in shards], tiles, chunks * FP4_UNIT_K // 2)
    if placed:
        codes = _PLACED[codes.view("<u2")].view(np.uint8)
    scale_bytes = [np.ascontiguousarray(s.scale).view(np.uint8) for s in shards]
    words = (unit_bytes(first.format, first.block) - CODE_BYTES) // (4 * TILE_ROWS)
    scales = _padded(scale_bytes, tiles, chunks * words * 4)

    units = np.empty((tiles, chunks, unit_bytes(first.format, first.block)), np.uint8)
    units[..., :CODE_BYTES] = _lane_order(codes, tiles, chunks)
    by_row = scales.reshape(tiles, TILE_ROWS, chunks, words, 4)
    units[..., CODE_BYTES:] = by_row.transpose(0, 2, 3, 1, 4).reshape(tiles, chunks, -1)
    return Fp4Units(first.format, first.block, placed, N, K, units, np.concatenate([s.g for s in shards]))


def unpack_fp4(weight: Fp4Units) -> Fp4Matrix:
    """The matrix again, all shards as one."""
    tiles, chunks, size = weight.units.shape
    codes = weight.units[..., :CODE_BYTES].reshape(tiles, chunks, 2, 8, 4, 4, 4)
    payload = codes.transpose(0, 2, 3, 1, 5, 4, 6).reshape(tiles * TILE_ROWS, -1)
    if weight.placed:
        payload = np.argsort(_PLACED).astype("<u2")[payload.view("<u2")].view(np.uint8)
    words = (size - CODE_BYTES) // (4 * TILE_ROWS)
    scales = weight.units[..., CODE_BYTES:].reshape(tiles, chunks, words, TILE_ROWS, 4)
    rows = np.ascontiguousarray(scales.transpose(0, 3, 1, 2, 4)).reshape(tiles * TILE_ROWS, -1)
    scale = rows.view(np.uint32) if weight.format == "hif4" else rows
    N, K = weight.N, weight.K
    payload = np.ascontiguousarray(payload[:N, : K // 2])
    scale = np.ascontiguousarray(scale[:N, : K // weight.block])
    return Fp4Matrix(weight.format, payload, scale, weight.g)


def pack_fp8(shards: Sequence[Fp8Matrix]) -> Fp8Units:
    """One weight of [N_i, K] shards. Raises InvalidArgument (K differs, or a scale for another number of k than 128 or
    all of K)."""
    K = shards[0].K
    steps = {min(K, shard.tile[1]) for shard in shards}
    if any(shard.K != K for shard in shards) or len(steps) > 1 or not steps <= {K, FP8_SCALE_K}:
        raise InvalidArgument(
            f"all shards need one K and a scale for each {FP8_SCALE_K} k or for all of K; got K of "
            f"{sorted({s.K for s in shards})} and scales for {sorted(steps)} k"
        )
    N = sum(shard.rows for shard in shards)
    tiles, chunks = -(-N // TILE_ROWS), 2 * -(-K // (2 * FP8_UNIT_K))
    codes = _padded([shard.payload for shard in shards], tiles, chunks * FP8_UNIT_K)
    scale = np.concatenate([fp8.row_scales(shard) for shard in shards])
    return Fp8Units(N, K, _lane_order(codes, tiles, chunks), np.ascontiguousarray(scale.T))


def _place() -> NDArray[np.uint16]:
    """Half a word of nibbles to half a word placed: signs to bits 15, 12, 14, 13, magnitudes to 11:9, 8:6, 5:3, 2:0."""
    half = np.arange(1 << 16)
    placed = np.zeros_like(half)
    for k, (sign, magnitude) in enumerate(((15, 9), (12, 6), (14, 3), (13, 0))):
        code = half >> 4 * k & 15
        placed |= (code >> 3) << sign | (code & 7) << magnitude
    return placed.astype("<u2")


_PLACED = _place()  # [65536] uint16, a permutation


def _padded(parts: Sequence[U8], tiles: int, row_bytes: int) -> U8:
    """Rows one after the other, [16 tiles, row_bytes], zeros where there is nothing."""
    whole = np.zeros((tiles * TILE_ROWS, row_bytes), np.uint8)
    row = 0
    for part in parts:
        whole[row : row + part.shape[0], : part.shape[1]] = part
        row += part.shape[0]
    return whole


def _lane_order(codes: U8, tiles: int, chunks: int) -> U8:
    """Rows of 64 bytes a unit [16 tiles, 64 chunks] to [tiles, chunks, 1024]: lane 4 g + q of each half of 8 rows has
    row g's bytes 16 r + 4 q … + 3, r = 0 … 3."""
    by_row = codes.reshape(tiles, 2, 8, chunks, 4, 4, 4)  # tile, half, g, chunk, r, q, byte
    return np.ascontiguousarray(by_row.transpose(0, 3, 1, 2, 5, 4, 6)).reshape(tiles, chunks, CODE_BYTES)
