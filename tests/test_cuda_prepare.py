"""The CUDA prepare kernels (SharQ, one-path FP4, FP8) on the emulator: every array of an operand, bit for bit NumPy's.

The fast build runs every format, mode, type and fused form; the checking build a few of them.
"""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from bit_patterns import BF16, DTYPES, F16, F32, all_patterns
from test_sharq import FORMATS, MODES, hard_rows

from engine.errors import DeviceError
from engine.fp4_types import BLOCKS
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule
from engine.ops.gpu.host_build import compiler
from engine.ops.reference import ReferenceOps

try:
    EmulatedModule.compile("prepare_fp8.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

REFERENCE = ReferenceOps()
NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_mode = pytest.mark.parametrize(("format", "sparse"), MODES)
each_build = pytest.mark.parametrize("checked", [pytest.param(False, id="fast"), pytest.param(True, id="checked")])


@lru_cache
def module(source, checked=False, arch="sm_90"):
    return EmulatedModule.compile(source, checked=checked, arch=arch)


class Rows:
    """What to prepare, and how a launch takes it."""

    def __init__(self, x, norm=None, silu=False, threads=64, checked=False, arch="sm_90", **launch):
        self.x, self.norm, self.silu, self.launch = x, norm, silu, launch
        self.build = {"checked": checked, "arch": arch}
        self.T, self.K = x.shape[0], x.shape[1] // (2 if silu else 1)
        self.P = -(-self.K // 128) * 128
        self.block = (threads, 1, 1)
        self.shared = -(-self.K // 16) * 32 if silu or norm else 0
        self.invalid = np.zeros(1, np.int32)

    def args(self):
        weight, eps = self.norm or (None, 0.0)
        stride = np.int64(self.x.strides[0] // self.x.itemsize)
        return [self.x, stride, weight, np.float32(eps), np.int32(self.silu), np.int32(self.K)]

    def run(self, source, name, args):
        name = f"{name}_{NAMES[self.x.dtype]}"
        kernels = module(source, **self.build)
        kernels.launch(name, (self.T, 1, 1), self.block, self.shared, [*self.args(), *args], **self.launch)

    def tensor_amax(self):
        amax = np.zeros(1, F32)
        self.run("prepare_sharq.cu", "prepare_amax", [amax, self.invalid])
        return amax


def dirty(shape, dtype=np.uint8):
    return np.full(shape, 0xA5, dtype)


def assert_array(name, actual, expected, padding):
    """actual [T, P'] is expected [T, K'] and padding."""
    columns = expected.shape[1]
    np.testing.assert_array_equal(actual[:, :columns], expected, err_msg=name)
    assert (actual[:, columns:] == padding).all(), f"{name}: padding"


def assert_sharq(rows, format, sparse, scale="token"):
    T, P, hif4 = rows.T, rows.P, format == "hif4"
    scale_type, block = (np.uint32, 64) if hif4 else (np.uint8, BLOCKS[format][0])
    backbone_block = BLOCKS[format][-1] if sparse else block
    out = {
        "backbone": dirty((T, P // (4 if sparse else 2))),
        "meta": dirty((T, P // (8 if hif4 else 16))) if sparse else None,
        "backbone_scale": dirty((T, P // backbone_block), scale_type),
        "residual": dirty((T, P // 2)),
        "residual_scale": dirty((T, P // block), scale_type),
        "g": dirty(T, F32),
    }
    amax = rows.tensor_amax() if scale == "tensor" else None
    name = f"prepare_sharq_{format}_{'sparse' if sparse else 'dense'}"
    rows.run("prepare_sharq.cu", name, [amax, *out.values(), rows.invalid])
    assert rows.invalid[0] == 0
    mode = {"format": format, "sparse": sparse, "scale": scale}
    x = rows.x.astype(F32) if rows.x.dtype == F16 else rows.x
    expected = REFERENCE.prepare_sharq(x, norm=rows.norm, silu=rows.silu, **mode)
    np.testing.assert_array_equal(out.pop("g").view(np.uint32), expected.g.view(np.uint32))
    for field, array in out.items():
        if array is not None:
            assert_array(field, array, getattr(expected, field), 0x44 if field == "meta" else 0)


def assert_fp4(rows, format, scale="token"):
    block = BLOCKS[format][0]
    payload = dirty((rows.T, rows.P // 2))
    scales = dirty((rows.T, rows.P // block), np.uint32 if format == "hif4" else np.uint8)
    g = dirty(rows.T, F32)
    amax = rows.tensor_amax() if scale == "tensor" else None
    rows.run("prepare_fp4.cu", f"prepare_fp4_{format}", [amax, payload, scales, g, rows.invalid])
    assert rows.invalid[0] == 0
    x = rows.x.astype(F32) if rows.x.dtype == F16 else rows.x
    expected = REFERENCE.prepare_fp4(x, format=format, scale=scale, norm=rows.norm, silu=rows.silu)
    np.testing.assert_array_equal(g.view(np.uint32), expected.g.view(np.uint32))
    assert_array("payload", payload, expected.payload, 0)
    assert_array("scale", scales, expected.scale, 0)


def assert_fp8(rows):
    codes, scale = dirty((rows.T, rows.P)), dirty(rows.T, F32)
    rows.run("prepare_fp8.cu", "prepare_fp8", [codes, scale, rows.invalid])
    assert rows.invalid[0] == 0
    expected = REFERENCE.prepare_fp8(rows.x, norm=rows.norm, silu=rows.silu)
    np.testing.assert_array_equal(scale.view(np.uint32), expected.scale.view(np.uint32))
    assert_array("codes", codes, expected.codes, 0)


def activations(seed, T, K, dtype):
    """Channels of many sizes, a few outliers, rows far apart."""
    r = np.random.default_rng(seed)
    x = r.standard_normal((T, K)) * np.exp(r.standard_normal(K)) * 10.0 ** r.integers(-2, 2, (T, 1))
    x[:, r.integers(0, K, 2)] *= 40
    return x.astype(dtype)


def norm_of(K):
    return np.random.default_rng(K).normal(1, 0.3, K).astype(F32), 1e-6


def finite_rows(K, dtype):
    with np.errstate(over="ignore"):
        x = hard_rows(K).astype(dtype)
    return x[np.isfinite(x).all(axis=1)]


# ---- values ----------------------------------------------------------------------------------------------------------


@each_mode
@each_dtype
def test_hard_rows(format, sparse, dtype):
    for K in (64, 320):
        assert_sharq(Rows(finite_rows(K, dtype)), format, sparse)


@each_mode
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_any_finite_bit_patterns(format, sparse, dtype):
    """Magnitudes from subnormal to the largest side by side."""
    x = all_patterns(np.random.default_rng(1), (24, 256), dtype)
    with np.errstate(invalid="ignore"):
        x[~np.isfinite(x.astype(BF16).astype(F32))] = 0
    x[8:16] *= np.array(1e-20, dtype)
    x[16:] *= np.array(1e-38, dtype)
    assert_sharq(Rows(x), format, sparse)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_border_of_e2m1_and_of_the_scales(sparse, dtype):
    """Bf16 numbers up to 2688 in rows whose g is 1, each leading a block of 16 with the borders it makes."""
    values = np.arange(0x3A00, 0x4528, dtype=np.uint16).view(BF16).astype(F32)[::7]
    multiples = np.array([1, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]) / 6
    blocks = np.concatenate([values[:, None] * multiples, -values[:, None] * multiples], axis=1).astype(F32)
    rows = np.resize(blocks, (blocks.size // 2032, 127 * 16))
    x = np.concatenate([rows, np.full((len(rows), 16), 2688, F32)], axis=1)
    assert_sharq(Rows(x.astype(dtype), threads=128), "nvfp4", sparse)


def test_every_bf16_number_of_a_block_under_every_mantissa_of_its_scale():
    """Blocks led by 6·(1 + m/8): all scales' mantissas, and all bf16 numbers of seven octaves below: borders, ties."""
    numbers = np.arange(0x3D00, 0x4080, dtype=np.uint16).view(BF16).astype(F32)  # 2^-5 … 4
    leads = 6 * (8 + np.arange(8)) / 8
    rows = np.resize(numbers, (8, -(-numbers.size // 12), 12))
    x = np.zeros((8, rows.shape[1] + 1, 16), F32)
    x[:, :-1, 0], x[:, :-1, 4:], x[:, -1] = leads[:, None], rows, 2688
    x[:, ::2] *= -1
    x = np.concatenate([x.reshape(8, -1), np.full((8, -x[0].size % 32), 2688.0)], axis=1)
    for sparse in (True, False):
        assert_sharq(Rows(x.astype(BF16), threads=128), "nvfp4", sparse)


def test_the_quotient_of_every_bf16_mantissa_by_every_mantissa_of_g(tmp_path):
    program = tmp_path / "divisor"
    source = Path(__file__).with_name("divisor.cpp")
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off"]
    subprocess.run([*compiler(), *flags, str(source), "-o", str(program)], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "0\n"


@each_mode
def test_tiny_and_huge_numbers_beside_zeros(format, sparse):
    """Chunks where scores below 2^-100 of g, and zeros, compete; rows whose g is 2^64 and more."""
    r = np.random.default_rng(7)
    tiny = all_patterns(r, (16, 320), BF16)
    tiny[~np.isfinite(tiny.astype(F32))] = 1
    tiny *= np.array(1e-38, BF16) / np.maximum(1, np.abs(tiny)).astype(BF16)
    x = np.where(r.random((16, 320)) < 0.5, tiny, 0).astype(BF16)
    x[:, ::64] = r.standard_normal((16, 5)).astype(BF16)
    x[8:] *= np.array(2.0**100, BF16)
    huge = (r.standard_normal((4, 320)) * 2.0**121).astype(BF16)
    for rows in (x, huge):
        assert_sharq(Rows(rows), format, sparse)
        assert_fp4(Rows(rows), format)
    assert_fp8(Rows(x))
    assert_fp8(Rows(huge))


@each_mode
def test_fused_forms_before_e4m3_conversions(format, sparse):
    """sm_80 has none: scales and codes are found otherwise."""
    K = 1088
    x, gate_up = activations(K, 4, K, BF16), activations(K + 1, 4, 2 * K, BF16)
    assert_sharq(Rows(finite_rows(64, BF16), arch="sm_80"), format, sparse)
    assert_sharq(Rows(x, norm=norm_of(K), arch="sm_80"), format, sparse)
    assert_sharq(Rows(gate_up, silu=True, arch="sm_80"), format, sparse)
    assert_fp4(Rows(x, arch="sm_80"), format)
    assert_fp8(Rows(x, arch="sm_80"))


@each_mode
@each_dtype
def test_fused_forms(format, sparse, dtype):
    for K in (64, 1088):
        x, gate_up = activations(K, 4, K, dtype), activations(K + 1, 4, 2 * K, dtype)
        assert_sharq(Rows(x, norm=norm_of(K)), format, sparse)
        assert_sharq(Rows(gate_up, silu=True), format, sparse)


@each_dtype
@pytest.mark.parametrize("format", FORMATS)
def test_one_path(format, dtype):
    for K in (64, 320, 1088):
        assert_fp4(Rows(finite_rows(K, dtype)), format)
        assert_fp4(Rows(activations(K, 3, K, dtype), norm=norm_of(K)), format)
        assert_fp4(Rows(activations(K, 3, 2 * K, dtype), silu=True), format)


@each_dtype
def test_fp8(dtype):
    for K in (1, 27, 64, 1000, 2056):
        assert_fp8(Rows(finite_rows(2064, dtype)[:, :K].copy()))
        assert_fp8(Rows(activations(K, 3, K, dtype), norm=norm_of(K)))
        assert_fp8(Rows(activations(K, 3, 2 * K, dtype), silu=True))
    if dtype != F16:  # all magnitudes of bf16
        every = np.arange(0x7F80, dtype=np.uint16).view(BF16).reshape(255, 128)
        assert_fp8(Rows(every.astype(dtype)))


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [32, 96, 896, 4864])
def test_padding_and_sizes(K):
    x = activations(K, 2, K, BF16)
    for format, sparse in MODES:
        if K % BLOCKS[format][-1] == 0:
            assert_sharq(Rows(x, threads=min(512, -(-K // 16 // 32) * 32)), format, sparse)


def test_the_largest_k():
    x, gate_up = activations(1, 1, 32768, BF16), activations(1, 1, 65536, BF16)
    for rows in ({"x": x, "norm": norm_of(32768)}, {"x": gate_up, "silu": True}, {"x": x}):
        assert_sharq(Rows(threads=1024, **rows), "nvfp4", True)
        assert_fp4(Rows(threads=512, **rows), "hif4")
        assert_fp8(Rows(threads=1024, **rows))


@each_build
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_any_block_size_schedule_and_poison(threads, checked):
    x, gate_up = activations(2, 2, 1056, BF16), activations(3, 2, 2 * 1056, BF16)
    for schedule, poison in zip(SCHEDULES, (0xFF, 0, 0x7F, 0x3C), strict=True):
        how = {"threads": threads, "checked": checked, "schedule": schedule, "poison": poison}
        assert_sharq(Rows(x, norm=norm_of(1056), **how), "nvfp4", True)
        assert_sharq(Rows(gate_up, silu=True, **how), "nvfp4", True)


def test_checked_in_all_modes():
    x = activations(4, 2, 192, BF16)
    for format, sparse in MODES:
        assert_sharq(Rows(x, checked=True), format, sparse)
        assert_sharq(Rows(x, checked=True, norm=norm_of(192)), format, sparse, scale="tensor")
    for format in FORMATS:
        assert_fp4(Rows(x, checked=True, norm=norm_of(192)), format)
    assert_fp8(Rows(x[:, :131], checked=True, norm=norm_of(131)))
    assert_fp8(Rows(x[:, :131].astype(F32), checked=True))


@each_build
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_rows_that_lie_apart(dtype, checked):
    wide = activations(6, 4, 408, dtype)
    assert_sharq(Rows(wide[:, 8:168], checked=checked), "nvfp4", True)
    assert_sharq(Rows(wide[::2, 24:408], silu=True, checked=checked), "nvfp4", True)
    for first in (8, 11):  # FP8 rows may begin anywhere
        assert_fp8(Rows(wide[:, first : first + 150], silu=True, checked=checked))


@each_mode
def test_one_global_scale_for_all_rows(format, sparse):
    x = hard_rows(128)[[0, 7, 10]]
    assert_sharq(Rows(x), format, sparse, scale="tensor")
    assert_sharq(Rows(x.astype(BF16), norm=norm_of(128)), format, sparse, scale="tensor")
    if sparse:
        assert_fp4(Rows(x), format, scale="tensor")


# ---- rows that cannot be prepared ------------------------------------------------------------------------------------


def invalid_row(rows, source, name, arrays):
    rows.run(source, name, [*arrays, rows.invalid])
    return int(rows.invalid[0]) - 1


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@each_dtype
def test_nan_and_infinity_are_flagged_with_their_row(dtype, bad):
    T, K = 3, 64
    out = [dirty((T, 128)) for _ in range(5)]
    for format in FORMATS:
        for k in (0, 37, K - 1):
            x = activations(k, T, K, dtype)
            x[1, k] = bad
            for rows in (Rows(x), Rows(x, norm=norm_of(K))):
                arrays = [None, *out, dirty(T, F32)]
                assert invalid_row(rows, "prepare_sharq.cu", f"prepare_sharq_{format}_sparse", arrays) == 1
    x = activations(1, T, 2 * K, dtype)
    x[2, K] = bad  # the first `up`
    assert invalid_row(Rows(x, silu=True), "prepare_fp4.cu", "prepare_fp4_nvfp4", [None, *out[:2], dirty(T, F32)]) == 2
    assert invalid_row(Rows(x), "prepare_fp8.cu", "prepare_fp8", [dirty((T, 128)), dirty(T, F32)]) == 2
    assert invalid_row(Rows(x), "prepare_sharq.cu", "prepare_amax", [np.zeros(1, F32)]) == 2


def test_what_becomes_infinite_in_bf16_is_flagged():
    x = np.zeros((2, 64), F32)
    x[1, 5] = 3.4e38  # finite, but rounds up
    arrays = [None, *(dirty((2, 128)) for _ in range(5)), dirty(2, F32)]
    for format in ("mxfp4", "hif4"):
        assert invalid_row(Rows(x), "prepare_sharq.cu", f"prepare_sharq_{format}_dense", arrays) == 1
    assert_sharq(Rows(x), "nvfp4", True)  # divided by its global scale first
    assert_fp8(Rows(x))
    weight = np.full(64, 3e38, F32), 1e-6
    rows = Rows(x * np.float32(1e-20), norm=weight)  # the norm makes it 8 · 3e38
    assert invalid_row(rows, "prepare_sharq.cu", "prepare_sharq_nvfp4_sparse", arrays) == 1
