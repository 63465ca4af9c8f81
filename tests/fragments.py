"""Where matrix elements live in a warp's registers: the PTX ISA's formulas, written out per instruction.

Shared by the tests of emulated instructions, and independent of the emulator: every formula below is the text of the
PTX ISA's section ("Matrix Fragments for …") or, for FP4, of BLACKWELL's tables, with groupID = lane >> 2 = g and
threadID_in_group = lane & 3 = q; element i counts through a lane's registers from the low bits up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]
Where = Callable[[int, int, int], Place]  # (g, q, i) -> (row, column)
Words = NDArray[np.uint32]


@dataclass(frozen=True)
class Fragment:
    """One operand of one instruction: a `shape` matrix of `bits`-bit elements, `count` per lane."""

    shape: Place
    bits: int
    where: Where

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1] // 32

    def scatter(self, codes: NDArray[np.unsignedinteger]) -> Words:
        """[cases, rows, columns] codes -> [cases, 32, registers] words."""
        per_word = 32 // self.bits
        words = np.zeros((len(codes), 32, -(-self.count // per_word)), np.uint32)
        for lane in range(32):
            for i in range(self.count):
                row, column = self.where(lane >> 2, lane & 3, i)
                value = codes[:, row, column].astype(np.uint32) << np.uint32(self.bits * (i % per_word))
                words[:, lane, i // per_word] |= value
        return words

    def gather(self, registers: NDArray[np.generic]) -> NDArray[np.generic]:
        """[cases, 32, registers] of 32-bit elements -> [cases, rows, columns]."""
        out = np.zeros((len(registers), *self.shape), registers.dtype)
        for lane in range(32):
            for i in range(self.count):
                row, column = self.where(lane >> 2, lane & 3, i)
                out[:, row, column] = registers[:, lane, i]
        return out


def accumulator(n: int = 8) -> Fragment:
    """C and D of m16n8: c0, c1 in row g, c2, c3 in row g + 8; wgmma repeats that every 8 columns."""
    return Fragment((16, n), 32, lambda g, q, i: (g if i % 4 < 2 else g + 8, 8 * (i // 4) + 2 * q + (i & 1)))


# mma.m16n8k16 with 16-bit elements; B is given as [column, k].
A_16 = Fragment(
    (16, 16),
    16,
    lambda g, q, i: (g if i < 2 or 4 <= i < 6 else g + 8, q * 2 + (i & 1) + (0 if i < 4 else 8)),
)
B_16 = Fragment((8, 16), 16, lambda g, q, i: (g, q * 2 + (i & 1) + (0 if i < 2 else 8)))
# mma.sp.m16n8k32: A stored as m16n8k16's, B twice as long.
B_16_LONG = Fragment((8, 32), 16, lambda g, q, i: (g, q * 2 + (i & 1) + 8 * (i // 2)))

# mma.m16n8k16 and m16n8k32 with 8-bit elements, and B of the sparse m16n8k64.
A_8_K16 = Fragment((16, 16), 8, lambda g, q, i: (g if i < 4 else g + 8, q * 4 + (i & 3)))
B_8_K16 = Fragment((8, 16), 8, lambda g, q, i: (g, q * 4 + i))
A_8 = Fragment(
    (16, 32),
    8,
    lambda g, q, i: (g if i < 4 or 8 <= i < 12 else g + 8, q * 4 + (i & 3) + (0 if i < 8 else 16)),
)
B_8 = Fragment((8, 32), 8, lambda g, q, i: (g, q * 4 + (i & 3) + (0 if i < 4 else 16)))
B_8_LONG = Fragment((8, 64), 8, lambda g, q, i: (g, q * 4 + (i & 3) + 16 * (i // 4)))

# mma.m16n8k64 with 4-bit elements, and the sparse m16n8k128 (A as stored).
A_4 = Fragment((16, 64), 4, lambda g, q, i: (g + 8 * (i // 8 & 1), 8 * q + i % 8 + 32 * (i // 16)))
B_4 = Fragment((8, 64), 4, lambda g, q, i: (g, 8 * q + i % 8 + 32 * (i // 8)))
B_4_LONG = Fragment((8, 128), 4, lambda g, q, i: (g, 8 * q + i % 8 + 32 * (i // 8)))


def metadata_16(nibbles: NDArray[np.unsignedinteger], selector: int, others: int) -> Words:
    """Nibbles [cases, 16, 8] of m16n8k32 with 16-bit elements -> [cases, 32]; lanes not selected get `others`."""
    words = np.full((len(nibbles), 32), others, np.uint32)
    for g in range(8):
        for half in range(2):  # of k: chunks 0-3, 4-7
            word = np.zeros(len(nibbles), np.uint32)
            for chunk in range(4):
                word |= nibbles[:, g, 4 * half + chunk].astype(np.uint32) << np.uint32(4 * chunk)
                word |= nibbles[:, g + 8, 4 * half + chunk].astype(np.uint32) << np.uint32(16 + 4 * chunk)
            words[:, 4 * g + 2 * selector + half] = word
    return words


def metadata_64x32(nibbles: NDArray[np.unsignedinteger], selector: int, others: int) -> Words:
    """Nibbles [cases, 64, 8] of wgmma m64nNk32 with 16-bit elements -> [cases, 128]; lanes not selected get `others`.

    CUTLASS's ELayout_64x32: element v = a + 16 b of thread t = i + 2 j + 4 g + 32 w (j chooses no element, so it is the
    selector) is number 1024 i + g + 16 w + 64 a + 8 b of the matrix [64, 32] counted down its columns.
    """
    words = np.full((len(nibbles), 128), others, np.uint32)
    for thread in range(128):
        if thread // 2 % 2 != selector:
            continue
        word = np.zeros(len(nibbles), np.uint32)
        for value in range(0, 32, 4):  # a nibble says where two of four elements are
            number = 1024 * (thread % 2) + thread // 4 % 8 + 16 * (thread // 32) + 64 * (value % 16) + 8 * (value // 16)
            row, column = number % 64, number // 64
            word |= nibbles[:, row, column // 4].astype(np.uint32) << np.uint32(value)
        words[:, thread] = word
    return words


def _word(nibbles: NDArray[np.unsignedinteger]) -> Words:
    """[cases, 8] -> [cases], the first lowest."""
    return sum((nibbles[:, i].astype(np.uint32) << np.uint32(4 * i) for i in range(8)), np.zeros(1, np.uint32))


def metadata_s8_k32(nibbles: NDArray[np.unsignedinteger], selector: int, others: int) -> Words:
    """Nibbles [cases, 16, 8]: one row per selected lane."""
    words = np.full((len(nibbles), 32), others, np.uint32)
    for row in range(16):
        words[:, 4 * (row % 8) + 2 * selector + row // 8] = _word(nibbles[:, row])
    return words


def metadata_halves(nibbles: NDArray[np.unsignedinteger]) -> Words:
    """Nibbles [cases, 16, 16] of m16n8k64 s8 and m16n8k128 FP4: half a row per lane."""
    words = np.zeros((len(nibbles), 32), np.uint32)
    for lane in range(32):
        row, half = (lane >> 2) + 8 * (lane & 1), lane >> 1 & 1
        words[:, lane] = _word(nibbles[:, row, 8 * half : 8 * half + 8])
    return words


def scales_a(scales: NDArray[np.uint8], byte: int, thread: int, others: int) -> Words:
    """Scale bytes [cases, 16, 2 or 4] -> [cases, 32] words; every byte that nobody should read is `others`."""
    lanes = [4 * (row % 8) + 2 * thread + row // 8 for row in range(16)]
    return _scale_words(scales, lanes, byte, others)


def scales_b(scales: NDArray[np.uint8], byte: int, thread: int, others: int) -> Words:
    """Scale bytes [cases, 8, 2 or 4]."""
    return _scale_words(scales, [4 * column + thread for column in range(8)], byte, others)


def _scale_words(scales: NDArray[np.uint8], lanes: list[int], byte: int, others: int) -> Words:
    data = np.full((len(scales), 32, 4), others, np.uint8)
    for index, lane in enumerate(lanes):
        data[:, lane, byte : byte + scales.shape[2]] = scales[:, index]
    return np.ascontiguousarray(data).view("<u4")[:, :, 0].astype(np.uint32)


def picked_k(nibbles: NDArray[np.unsignedinteger], group: int) -> NDArray[np.int64]:
    """k of each stored element: nibble i0 | i1 << 2 keeps places i0 and i1, `group` k each, of its 4 · `group` k."""
    low, high = nibbles & 3, nibbles >> 2
    chunk = 4 * group * np.arange(nibbles.shape[-1])
    places = np.stack([low, high], axis=-1).astype(np.int64) * group + chunk[:, None]
    ks = places[..., None] + np.arange(group)
    return ks.reshape(*nibbles.shape[:-1], -1)


LEGAL_NIBBLES = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], np.uint8)
