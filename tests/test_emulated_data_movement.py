"""Copies, matrix loads, conversions, barriers and wgmma on the emulator against NumPy; asm strings that are wrong.

The last part takes wrappers of mma.cuh, breaks their strings (swapped operands, missing clobbers, other mnemonics) and
expects each to be caught: by the interpreter's checks, or by a result that is not the right one's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fragments import A_16, LEGAL_NIBBLES, accumulator, metadata_16, metadata_64x32, metadata_halves, picked_k
from numpy.typing import NDArray
from ptx_probes import PROBES, ROOT, probe

from engine.errors import KernelFault
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule, Schedule

WARP = (32, 1, 1)
ONE = (1, 1, 1)
BF16 = ml_dtypes.bfloat16
Array = NDArray[np.generic]


# --- Matrices between shared memory and registers ---------------------------------------------------------------------


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, trans: bool) -> None:
    """Register i of lane l: elements (l / 4, 2 (l % 4)) and next of matrix i, whose rows lanes 8 i … point at."""
    rng = np.random.default_rng(1)
    image = rng.integers(0, 2**16, (64, 8)).astype(np.uint16)
    rows = rng.permutation(64)[:32].astype(np.int32)
    out = np.zeros((32, count), np.uint32)
    kernel = f"ldmatrix_x{count}" + "_trans" * trans
    probe("sm_80").launch(kernel, ONE, WARP, 0, [image.view(np.uint8), rows, out])
    for i in range(count):
        matrix = image[rows[8 * i : 8 * i + 8]]
        matrix = matrix.T if trans else matrix
        np.testing.assert_array_equal(out[:, i], np.ascontiguousarray(matrix).reshape(32, 2).view(np.uint32)[:, 0])


@pytest.mark.parametrize(("count", "trans"), [(2, False), (4, False), (4, True)])
def test_stmatrix(count: int, trans: bool) -> None:
    rng = np.random.default_rng(2)
    image = rng.integers(0, 2**16, (64, 8)).astype(np.uint16)
    words = rng.integers(0, 2**32, (32, count), np.uint32)
    rows = rng.permutation(64)[:32].astype(np.int32)
    expected = image.copy()
    for i in range(count):
        matrix = np.ascontiguousarray(words[:, i]).view(np.uint16).reshape(8, 8)
        expected[rows[8 * i : 8 * i + 8]] = matrix.T if trans else matrix
    kernel = f"stmatrix_x{count}" + "_trans" * trans
    probe("sm_90a").launch(kernel, ONE, WARP, 0, [words, rows, image.view(np.uint8)])
    np.testing.assert_array_equal(image, expected)


def test_a_row_must_be_aligned() -> None:
    arguments = [np.zeros(1024, np.uint8), np.zeros(32, np.uint32)]
    with pytest.raises(KernelFault, match="lane 5's row is not aligned to 16 bytes"):
        probe("sm_80").launch("ldmatrix_misaligned", ONE, WARP, 0, arguments)


def test_lanes_of_a_warp_at_different_instructions_are_an_error() -> None:
    with pytest.raises(KernelFault, match=r"mma\.cuh"):
        probe("sm_80").launch("divergent", ONE, WARP, 0, [np.zeros(1024, np.uint8), np.zeros(32, np.uint32)])


# --- Copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("form", range(6))
def test_cp_async(form: int, schedule: Schedule) -> None:
    """16, 8 and 4 bytes, with and without a number of bytes to read (the rest zeros) and a cache policy."""
    rng = np.random.default_rng(form)
    source = rng.integers(1, 256, (64, 16)).astype(np.uint8)
    reads = rng.integers(0, 17, 64).astype(np.int32)
    out = np.zeros_like(source)
    probe("sm_80").launch("cp_async", ONE, (64, 1, 1), 0, [source, reads, np.int32(form), out], schedule=schedule)
    keeps = np.arange(16) < reads[:, None] if form in (1, 3, 4, 5) else True
    np.testing.assert_array_equal(out, np.where(keeps, source, 0))


@pytest.mark.parametrize("pending", [0, 1])
def test_waiting_for_all_but_n_groups(pending: int) -> None:
    source = np.arange(1024, dtype=np.uint32).astype(np.uint8).reshape(32, 32)
    out = np.zeros((32, 16), np.uint8)
    for schedule in SCHEDULES:
        probe("sm_80").launch("cp_async_groups", ONE, WARP, 0, [source, np.int32(pending), out], schedule=schedule)
        np.testing.assert_array_equal(out, source[:, :16])


def test_a_wait_that_is_too_weak_shows_under_lazy_copies() -> None:
    source = np.ones((32, 32), np.uint8)
    out = np.zeros((32, 16), np.uint8)
    arguments = [source, np.int32(2), out]
    probe("sm_80").launch("cp_async_groups", ONE, WARP, 0, arguments, schedule=Schedule(lazy_copies=True))
    assert (out == 0xFF).all()  # the poison


@pytest.mark.parametrize("form", range(4))
def test_load_once(form: int) -> None:
    source = np.random.default_rng(3).integers(0, 256, 512).astype(np.uint8)
    size = 32 * (4, 8, 16, 16)[form]
    out = np.zeros(size, np.uint8)
    probe("sm_80").launch("load_once", ONE, WARP, 0, [source, np.int32(form), out])
    np.testing.assert_array_equal(out, source[:size])


# --- Conversions ------------------------------------------------------------------------------------------------------


def edge_values(dtype: type, rng: np.random.Generator) -> NDArray[np.float32]:
    """Every value of the type, every midpoint of neighbours, their fp32 neighbours, and others; a multiple of 256."""
    codes = np.arange(256 if np.dtype(dtype) != np.dtype(ml_dtypes.float4_e2m1fn) else 16).astype(np.uint8).view(dtype)
    values = np.unique(codes.astype(np.float64)[np.isfinite(codes.astype(np.float64))])
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    near = [np.nextafter(exact, np.float32(side)) for side in (-np.inf, np.inf)]
    wild = rng.standard_normal(256).astype(np.float32) * np.float32(2.0) ** rng.integers(-20, 20, 256).astype(
        np.float32
    )
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3e38, -3e38], np.float32)
    x = np.concatenate([exact, *near, wild, special])
    return np.concatenate([x, np.zeros(-len(x) % 256, np.float32)])


def saturated(x: NDArray[np.float32], dtype: type) -> Array:
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(x, -largest, largest).astype(dtype)


def test_reciprocals() -> None:
    """Subnormal numbers count as zeros of their sign, and so do subnormal results."""
    x = np.array([1, -3, 448, 2.0**-9, 1e-30, 0.0, -0.0, 1e-40, -1e-40, 2.0**127, -3e38, np.inf], np.float32)
    x = np.concatenate([x, np.random.default_rng(6).standard_normal(116, np.float32)])
    out = np.zeros_like(x)
    probe("sm_80").launch("reciprocals", ONE, (128, 1, 1), 0, [x, out])
    least = np.finfo(np.float32).tiny
    with np.errstate(divide="ignore"):
        expected = 1 / np.where(np.abs(x) < least, np.copysign(np.float32(0), x), x)
    expected = np.where(np.abs(expected) < least, np.copysign(np.float32(0), expected), expected)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_e4m3_both_ways() -> None:
    x = edge_values(ml_dtypes.float8_e4m3fn, np.random.default_rng(4))
    out = np.zeros(len(x) // 2, np.uint16)
    probe("sm_90a").launch("to_e4m3", (len(x) // 256, 1, 1), (128, 1, 1), 0, [x, out])
    np.testing.assert_array_equal(out.view(np.uint8), saturated(x, ml_dtypes.float8_e4m3fn).view(np.uint8))
    codes = np.arange(256).astype(np.uint8)
    halves = np.zeros(128, np.uint32)
    probe("sm_90a").launch("from_e4m3", ONE, (128, 1, 1), 0, [codes.view(np.uint16), halves])
    np.testing.assert_array_equal(halves.view(np.float16), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float16))


def test_e2m1_both_ways() -> None:
    x = edge_values(ml_dtypes.float4_e2m1fn, np.random.default_rng(5))
    out = np.zeros(len(x) // 8, np.uint32)
    probe("sm_120a").launch("to_e2m1", (len(x) // 256, 1, 1), WARP, 0, [x, out])
    packed = out.view(np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    expected = saturated(x, ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    np.testing.assert_array_equal(codes, expected)
    words = np.full(32, 0xFEDCBA98, np.uint32)
    words[::2] = 0x76543210
    halves = np.zeros((32, 4), np.uint32)
    probe("sm_120a").launch("from_e2m1", ONE, WARP, 0, [words, halves])
    values = np.arange(16).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float16)
    np.testing.assert_array_equal(halves.view(np.float16).reshape(16, 16), np.tile(values, (16, 1)))


def test_ue8m0_rounds_upward() -> None:
    """The least power of two that is not below, from 2^-127 to 2^127."""
    powers = 2.0 ** np.arange(-127, 128)
    x = np.concatenate([powers, powers * 1.5, powers * (1 + 2.0**-23), [0, 1e-45, np.inf]]).astype(np.float32)
    x = np.concatenate([x, np.ones(-len(x) % 256, np.float32)])
    out = np.zeros(len(x) // 2, np.uint16)
    probe("sm_120a").launch("to_ue8m0", (len(x) // 256, 1, 1), (128, 1, 1), 0, [x, out])
    expected = np.clip(np.searchsorted(powers, x.astype(np.float64)), 0, 254)
    np.testing.assert_array_equal(out.view(np.uint8), expected)


def test_nan_becomes_what_cudas_headers_say() -> None:
    """cuda_fp8.h and cuda_fp4.h on the host: E4M3 and UE8M0 have a NaN, E2M1 gets +6."""
    nan = np.full(256, np.nan, np.float32)
    nan[1::2] = -nan[1::2]
    for kernel, size, dtype, code in (("to_e4m3", 2, np.uint16, 0x7F7F), ("to_ue8m0", 2, np.uint16, 0xFFFF)):
        out = np.zeros(256 // size, dtype)
        probe("sm_120a").launch(kernel, ONE, (128, 1, 1), 0, [nan, out])
        assert (out == code).all(), kernel
    out = np.zeros(32, np.uint32)
    probe("sm_120a").launch("to_e2m1", ONE, WARP, 0, [nan, out])
    assert (out == 0x77777777).all()


# --- Barriers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_named_barriers(schedule: Schedule) -> None:
    sums = np.zeros(96, np.int32)
    probe("sm_80").launch("named_barriers", ONE, (96, 1, 1), 0, [np.int32(5), sums], schedule=schedule)
    expected = 100 * sum(range(5)) + 5 * np.arange(32)
    np.testing.assert_array_equal(sums.reshape(3, 32), [np.zeros(32), expected, expected])


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_bulk_copies_through_mbarriers(schedule: Schedule, checked: bool) -> None:
    data = np.arange(7 * 64, dtype=np.int32) ** 2
    sums = np.zeros(96, np.int32)
    arguments = [data, np.int32(7), np.int32(0), sums]
    probe("sm_90a", checked=checked).launch("bulk_pipeline", ONE, (96, 1, 1), 0, arguments, schedule=schedule)
    totals = data.reshape(7, 64).sum(axis=0)
    np.testing.assert_array_equal(sums, totals[np.arange(96) % 64])


def test_an_mbarrier_nobody_waits_for_is_a_race() -> None:
    arguments = [np.arange(7 * 64, dtype=np.int32), np.int32(7), np.int32(1), np.zeros(96, np.int32)]
    with pytest.raises(KernelFault):
        probe("sm_90a", checked=True).launch("bulk_pipeline", ONE, (96, 1, 1), 0, arguments)


def test_bulk_copies_that_nobody_waits_for_stay_away_under_lazy_copies() -> None:
    """And a later launch starts from nothing."""
    data, sums = np.ones(7 * 64, np.int32), np.zeros(96, np.int32)
    lazy = Schedule(lazy_copies=True)
    probe("sm_90a").launch("bulk_pipeline", ONE, (96, 1, 1), 0, [data, np.int32(1), np.int32(1), sums], schedule=lazy)
    assert (sums == -1).all()  # the poison
    probe("sm_90a").launch("bulk_pipeline", ONE, (96, 1, 1), 0, [data, np.int32(7), np.int32(0), sums], schedule=lazy)
    assert (sums == 7).all()


def test_bytes_that_nobody_announced_end_in_a_deadlock() -> None:
    arguments = [np.arange(7 * 64, dtype=np.int32), np.int32(7), np.int32(2), np.zeros(96, np.int32)]
    with pytest.raises(KernelFault, match="mma.cuh"):
        probe("sm_90a").launch("bulk_pipeline", ONE, (96, 1, 1), 0, arguments)


# --- wgmma ------------------------------------------------------------------------------------------------------------

SWIZZLE_CODE = {1: 0, 8: 1, 4: 2, 2: 3}  # by units of 16 bytes


class SharedMatrix:
    """An R × K bf16 matrix in shared memory as wgmma wants it, by the pictures of the PTX ISA.

    K-major: lines of `units` · 16 bytes along k, one per row; MN-major: along the rows, one per k. Eight lines make a
    group of 128 · units bytes; without swizzle a line is one unit and every 8 × 16 bytes are a core matrix. Swizzled by
    128, 64 or 32 bytes, unit u of line l stands at u ^ l % 8, u ^ l / 2 % 4, u ^ l / 4 % 2.
    """

    def __init__(self, values: Array, mn_major: bool, units: int) -> None:
        self.mn_major, self.units = mn_major, units
        lines = values.T if mn_major else values  # [lines, elements along a line]
        groups, blocks = lines.shape[0] // 8, lines.shape[1] // (8 * units)
        # Blocks along the line outermost: a block is all groups of lines, `units` wide.
        self.group_bytes = 128 * units
        self.block_bytes = groups * self.group_bytes
        data = np.zeros((blocks, lines.shape[0], units, 8), BF16)
        for line in range(lines.shape[0]):
            flip = {8: line % 8, 4: line // 2 % 4, 2: line // 4 % 2, 1: 0}[units]
            for unit in range(blocks * units):
                data[unit // units, line, (unit % units) ^ flip] = lines[line, 8 * unit : 8 * unit + 8]
        self.bytes = data.reshape(-1).view(np.uint8)

    def descriptor(self, start: int, step: int) -> int:
        """Of k = 16 step …, without the address of shared memory."""
        along = 16 * step // 8  # units of k before
        if self.mn_major:
            leading, stride = self.block_bytes, self.group_bytes
            start += along * self.group_bytes
            if self.units == 1:
                leading, stride = stride, leading
        else:
            leading, stride = self.block_bytes, self.group_bytes
            start += along // self.units * self.block_bytes + along % self.units * 16
        assert max(start, leading, stride) < 1 << 18
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLE_CODE[self.units] << 62


# kernel, N, adds, A transposed (None: in registers), B transposed
WGMMA = [
    ("wgmma_64_kk", 64, True, False, False),
    ("wgmma_64_km", 64, True, False, True),
    ("wgmma_64_mk", 64, True, True, False),
    ("wgmma_64_mm", 64, False, True, True),
    ("wgmma_128_kk", 128, True, False, False),
    ("wgmma_256_kk", 256, False, False, False),
    ("wgmma_256_km", 256, True, False, True),
    ("wgmma_64_registers", 64, True, None, True),
    ("wgmma_128_registers", 128, True, None, False),
    ("wgmma_256_registers", 256, True, None, False),
]


@pytest.mark.parametrize("units", [1, 2, 4, 8])
@pytest.mark.parametrize(("kernel", "n", "adds", "a_mn", "b_mn"), WGMMA, ids=lambda v: str(v))
def test_wgmma(kernel: str, n: int, adds: bool, a_mn: bool | None, b_mn: bool, units: int) -> None:
    """Matrices with k = 64 in shared memory; each quarter of k multiplied by moving the descriptors' start."""
    rng = np.random.default_rng(n + units)
    a, b = rng.integers(-8, 9, (64, 64)).astype(BF16), rng.integers(-8, 9, (n, 64)).astype(BF16)
    c = rng.integers(-99, 100, (64, n)).astype(np.float32)
    layout = accumulator(n)
    in_b = SharedMatrix(b, b_mn, units)
    in_a = SharedMatrix(a, bool(a_mn), units)
    b_start = 8192  # A takes 8192 bytes
    image = np.concatenate([in_a.bytes, in_b.bytes])
    for step in (0, 1, 3):
        ks = slice(16 * step, 16 * step + 16)
        registers = layout.scatter(c.reshape(4, 16, n).view(np.uint32)).view(np.float32).copy()
        from_a: Array | np.generic = np.uint64(in_a.descriptor(0, step))
        if a_mn is None:
            from_a = A_16.scatter(np.ascontiguousarray(a[:, ks]).view(np.uint16).reshape(4, 16, 16))
        arguments = [image, np.int32(len(image)), from_a, np.uint64(in_b.descriptor(b_start, step)), registers]
        probe("sm_90a").launch(kernel, ONE, (128, 1, 1), len(image), arguments)
        product = a[:, ks].astype(np.float32) @ b[:, ks].astype(np.float32).T
        np.testing.assert_array_equal(layout.gather(registers).reshape(64, n), product + (c if adds else 0))


@pytest.mark.parametrize(("units", "registers_for_a"), [(1, False), (4, False), (8, False), (8, True)])
@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_wgmma(selector: int, units: int, registers_for_a: bool) -> None:
    """Both halves of a sparse k = 64: each metadata nibble alone, then random ones; other lanes hold illegal words."""
    rng = np.random.default_rng(10 * units + selector)
    nibbles = np.full((64 * 8, 64, 8), 0b0100, np.uint8)
    nibbles.reshape(512, 512)[np.arange(512), np.arange(512)] = 0b1110
    nibbles = np.concatenate([nibbles, rng.choice(LEGAL_NIBBLES, (8, 64, 8))])[:: 1 if registers_for_a else 37]
    stored, b = rng.integers(-8, 9, (64, 32)).astype(BF16), rng.integers(-8, 9, (128, 64)).astype(BF16)
    c = rng.integers(-99, 100, (len(nibbles), 64, 128)).astype(np.float32)
    in_a, in_b, layout = SharedMatrix(stored, False, min(units, 4)), SharedMatrix(b, False, units), accumulator(128)
    image = np.concatenate([in_a.bytes, in_b.bytes])
    for half in (0, 1):
        words = layout.scatter(c.reshape(-1, 16, 128).view(np.uint32))
        registers = words.view(np.float32).copy()
        kept = np.ascontiguousarray(stored[:, 16 * half : 16 * half + 16])
        kernel = f"wgmma_sp_128_{selector}"
        of_a: Array | np.generic = np.uint64(in_a.descriptor(0, half))
        if registers_for_a:
            kernel = f"wgmma_sp_128_registers_{selector}"
            of_a = np.tile(A_16.scatter(kept.view(np.uint16).reshape(4, 16, 16)), (len(nibbles), 1, 1))
        of_b, metadata = np.uint64(in_b.descriptor(4096, 2 * half)), metadata_64x32(nibbles, selector, 0xFFFFFFFF)
        arguments = [image, np.int32(len(image)), of_a, of_b, metadata, registers]
        probe("sm_90a").launch(kernel, (len(nibbles), 1, 1), (128, 1, 1), len(image), arguments)
        a = np.zeros((len(nibbles), 64, 32), np.float32)
        values = np.broadcast_to(kept.astype(np.float32), (len(nibbles), 64, 16))
        np.put_along_axis(a, picked_k(nibbles, 1), values, axis=2)
        product = a @ b[:, 32 * half : 32 * half + 32].astype(np.float32).T
        np.testing.assert_array_equal(layout.gather(registers).reshape(c.shape), product + c)


def test_sparse_wgmma_without_legal_metadata_or_layout() -> None:
    a, b = np.zeros((64, 32), BF16), np.zeros((128, 32), BF16)
    for units, word, message in ((8, 0x44444404, "metadata nibble"), (2, 0x44444444, "32 bytes of swizzle")):
        in_a, in_b = SharedMatrix(a, False, 4), SharedMatrix(b, False, min(units, 4))
        image = np.concatenate([in_a.bytes, in_b.bytes])
        arguments = [image, np.int32(len(image)), np.uint64(in_a.descriptor(0, 0)), np.uint64(in_b.descriptor(4096, 0))]
        arguments += [np.full((1, 128), word, np.uint32), np.zeros((1, 128, 64), np.float32)]
        with pytest.raises(KernelFault, match=message):
            probe("sm_90a").launch("wgmma_sp_128_0", ONE, (128, 1, 1), len(image), arguments)


def test_registers_move_between_warpgroups() -> None:
    out = np.zeros(256, np.int32)
    probe("sm_90a").launch("registers_between_warpgroups", ONE, (256, 1, 1), 0, [out])
    assert out.all()


# --- Strings that are wrong -------------------------------------------------------------------------------------------

MMA = (ROOT / "cuda" / "mma.cuh").read_text()


def wrapper(name: str) -> str:
    """A wrapper's definition in mma.cuh, its template line included."""
    match = re.search(rf"^(template <[^\n]*>\n)?__device__ [^\n]*\b{name}\((?:.|\n)*?\n}}\n", MMA, re.MULTILINE)
    assert match is not None, name
    return match[0]


# wrapper, its probe, old text, new text, what the interpreter says (None: the result is wrong)
MUTANTS = [
    ("mma_m16n8k16_bf16", "{%4, %5, %6, %7}", "{%5, %4, %6, %7}", None),
    ("mma_m16n8k16_bf16", "{%4, %5, %6, %7}", "{%4, %6, %5, %7}", None),
    ("mma_m16n8k16_bf16", "{%8, %9}", "{%9, %8}", None),
    ("mma_m16n8k16_bf16", "{%0, %1, %2, %3};", "{%0, %2, %1, %3};", None),
    ("mma_m16n8k16_bf16", "bf16.bf16", "f16.f16", None),
    ("mma_m16n8k16_bf16", "m16n8k16.row.col", "m16n8k16.col.row", "no model of instruction"),
    ("mma_m16n8k16_bf16", "{%8, %9}", "{%8, %8}", "operand %9 is never used"),
    ("mma_m16n8k16_bf16", "{%8, %9}", "{%8}", "do not have the form"),
    ("mma_m16n8k16_bf16", "{%8, %9}", "{%8, %10}", "there is no operand %10"),
    ("mma_m16n8k16_bf16", "{%8, %9}, ", "", "do not have the form"),
    ("mma_m16n8k16_bf16", '"{%0, %1, %2, %3};"', '"{%0, %1, %2, %3}"', "same"),
    ("mma_m16n8k16_bf16", '"{%0, %1, %2, %3};"', '"{%0, %1, %2, %3};}"', "a closing brace too many"),
    ("mma_m16n8k16_bf16", "{%4, %5, %6, %7}", "{%4, %5, %6, %3}", '%3 is "f" where "r" belongs'),
    ("mma_m16n8k16_bf16", '"+f"(c[2])', '"=f"(c[2])', "output %2 is read before it is written"),
    ("mma_m16n8k16_bf16", "f32 {%0, %1, %2, %3}", "f32 {%0, %1, %2, %4}", "%4"),
    ("mma_m16n8k64_nvfp4", "%10, {0, %12}, %11, {0, %13}", "%11, {0, %12}, %10, {0, %13}", None),
    ("mma_m16n8k64_nvfp4", "%10, {0, %12}", "%10, {1, %12}", "the byte selector is 0"),
    ("mma_m16n8k64_nvfp4", "%11, {0, %13}", "%11, {0, 4}", "operand %13 is never used"),
    ("mma_m16n8k64_nvfp4", "scale_vec::4X", "scale_vec::2X", "no model of instruction"),
    ("mma_sp_m16n8k128_nvfp4", "{%8, %9, %10, %11}", "{%10, %11, %8, %9}", None),
    ("mma_sp_m16n8k128_nvfp4", "%12, 0, ", "%12, 1, ", "the sparsity selector is at most 0"),
    ("mma_sp_m16n8k128_nvfp4", "%12, 0, ", "%13, 0, ", "operand %12 is never used"),
    ("mma_sp_m16n8k32_bf16", "%12, %13;", "%12, 2;", "operand %13 is never used"),
    ("mma_sp_m16n8k32_bf16", "%12, %13;", "%12, %12;", '%12 is "r" where "i" belongs'),
    ("ldmatrix_x4", ': "memory"', "", 'no "memory" clobber'),
    ("ldmatrix_x4", "{%0, %1, %2, %3}", "{%1, %0, %2, %3}", None),
    ("ldmatrix_x4", "{%0, %1, %2, %3}", "{%0, %1, %2, %2}", "operand %3 is never used"),
    ("ldmatrix_x4", "[%4]", "%4", "do not have the form"),
    ("ldmatrix_x4", "[%4]", "[%4 + 8]", "not aligned to 16 bytes"),
    ("ldmatrix_x4", "[%4]", "[rows]", "neither an operand, nor declared"),
    ("ldmatrix_x4", "ldmatrix.sync", "wgmma.fence.sync.aligned; ldmatrix.sync", "does not exist on sm_120"),
    ("ldmatrix_x4", "ldmatrix.sync", "{.reg .pred p; ldmatrix.sync", "an unclosed brace"),
    ("ldmatrix_x4", "[%4];", "[%4]; @p mov.b32 %0, %1;", "guarded instructions are not emulated"),
]
KERNELS = {
    "mma_m16n8k16_bf16": "DENSE({name}, 4, 2, float, broken_{i}::mma_m16n8k16_bf16)",
    "mma_m16n8k64_nvfp4": "SCALED({name}, broken_{i}::mma_m16n8k64_nvfp4)",
    "mma_sp_m16n8k128_nvfp4": "SCALED_SPARSE({name}, broken_{i}::mma_sp_m16n8k128_nvfp4)",
    "mma_sp_m16n8k32_bf16": "SPARSE({name}, 4, 4, float, broken_{i}::mma_sp_m16n8k32_bf16<0>)",
    "ldmatrix_x4": "LOAD_MATRIX({name}, 4, broken_{i}::ldmatrix_x4)",
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> EmulatedModule:
    """All of them in one file, beside the wrappers as they are ("original_…")."""
    text = PROBES.read_text()
    for i, (name, old, new, _) in enumerate(MUTANTS):
        source = wrapper(name)
        assert source.count(old) >= 1, (name, old)
        at = source.rindex(old) if old.startswith(('"{%0', "{%0, %1, %2, %3};")) else source.index(old)
        changed = source[:at] + new + source[at + len(old) :]
        text += f"\nnamespace broken_{i} {{\n{changed}}}\n" + KERNELS[name].format(name=f"mutant_{i}", i=i)
    path = tmp_path_factory.mktemp("mutants") / "mutants.cu"
    path.write_text(text)
    return probe("sm_120a", path)


ORIGINALS = {
    "mma_m16n8k16_bf16": "mma_bf16",
    "mma_m16n8k64_nvfp4": "nvfp4",
    "mma_sp_m16n8k128_nvfp4": "sparse_nvfp4",
    "mma_sp_m16n8k32_bf16": "mma_sp_bf16_0",
    "ldmatrix_x4": "ldmatrix_x4",
}


def arguments_for(name: str) -> list[Array]:
    """Operands that are all different, the result last."""
    rng = np.random.default_rng(7)
    if name == "ldmatrix_x4":
        image = rng.integers(0, 256, 1024).astype(np.uint8)
        return [image, rng.permutation(64)[:32].astype(np.int32), np.zeros((32, 4), np.uint32)]
    c = rng.standard_normal((32, 4)).astype(np.float32)
    if name == "mma_m16n8k16_bf16":
        return [*(rng.standard_normal((32, n)).astype(BF16).view(np.uint16) for n in (8, 4)), c]
    if name == "mma_sp_m16n8k32_bf16":
        nibbles = rng.choice(LEGAL_NIBBLES, (1, 16, 8))
        return [
            *(rng.standard_normal((32, 8)).astype(BF16).view(np.uint16) for _ in "ab"),
            metadata_16(nibbles, 0, 0),
            c,
        ]
    words = [rng.integers(0, 2**32, (32, n), np.uint32) for n in ((4, 4) if "sp" in name else (4, 2))]
    scales = [np.ascontiguousarray(rng.integers(0x30, 0x48, (32, 4)).astype(np.uint8)).view(np.uint32) for _ in "ab"]
    metadata = [metadata_halves(rng.choice(LEGAL_NIBBLES, (1, 16, 16)))] if "sp" in name else []
    return [*words, *metadata, *scales, c]


@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=lambda i: f"{MUTANTS[i][0]}: {MUTANTS[i][2]}")
def test_a_wrong_string_is_caught(mutants: EmulatedModule, i: int) -> None:
    name, _, _, message = MUTANTS[i]
    right, wrong = arguments_for(name), arguments_for(name)
    mutants.launch(ORIGINALS[name], ONE, WARP, 0, right)
    if message in (None, "same"):
        mutants.launch(f"mutant_{i}", ONE, WARP, 0, wrong)
        assert (right[-1] == wrong[-1]).all() == (message == "same")
    else:
        with pytest.raises(KernelFault, match=rf"mutants\.cu.*{re.escape(message)}"):
            mutants.launch(f"mutant_{i}", ONE, WARP, 0, wrong)


# --- Architectures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_120a"])
def test_ptxas_accepts_every_wrapper(arch: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: only the emulator has read the asm strings")
    command = [nvcc, "-cubin", f"-arch={arch}", f"-I{ROOT / 'cuda'}", "-o", str(tmp_path / "probes.cubin"), str(PROBES)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arch", "kernel"),
    [("sm_80", "stmatrix_x4"), ("sm_80", "mma_e4m3"), ("sm_120a", "wgmma_64_kk"), ("sm_90a", "nvfp4")],
)
def test_a_wrapper_is_absent_where_its_instruction_is(arch: str, kernel: str) -> None:
    assert kernel not in probe(arch).kernels
