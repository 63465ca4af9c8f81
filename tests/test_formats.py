"""Element and scale formats, code by code and border by border, against exact tables and ml_dtypes."""

from __future__ import annotations

from fractions import Fraction

import fp4_scalar as scalar
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.fp4_types import Fp4Matrix
from engine.ops.fp4.blocks import Hif4, Mxfp4, Nvfp4, block_format, decode, quantize
from engine.ops.fp4.elements import E2M1_VALUES, S1P2_VALUES, encode_e2m1, encode_s1p2, pack, unpack
from engine.ops.fp4.scales import (
    E6M2_VALUES,
    E8M0_VALUES,
    UE4M3_VALUES,
    encode_e6m2,
    encode_e8m0_floor,
    encode_ue4m3,
)
from engine.ops.fp4.split import round_bf16, scaled_rows

BYTES = np.arange(256, dtype=np.uint8)
needs_small_types = pytest.mark.skipif(
    not hasattr(ml_dtypes, "float4_e2m1fn"), reason="this ml_dtypes has no 4-bit and E8M0 types"
)


def around(values: np.ndarray) -> np.ndarray:
    """The values, the exact middles between neighbours, and the fp32 numbers just beside all of them."""
    values = values.astype(np.float32)
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2])
    return np.concatenate([np.nextafter(points, np.float32(0)), points, np.nextafter(points, np.float32(np.inf))])


def every_bf16() -> np.ndarray:
    """All finite bf16 numbers, as fp32."""
    values = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    return values[np.isfinite(values)]


# ---- elements --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encode", "values", "table"), [(encode_e2m1, E2M1_VALUES, scalar.E2M1), (encode_s1p2, S1P2_VALUES, scalar.S1P2)]
)
def test_elements_round_to_the_nearest_code(encode, values, table):
    assert [Fraction(float(v)) for v in values] == [*table, *(-v for v in table)]
    assert np.signbit(values).tolist() == [False] * 8 + [True] * 8
    assert encode(values).tolist() == list(range(16))
    x = around(values[:8])
    x = np.concatenate([x, np.float32([0, 1e-45, 1e-38, 6.5, 7, 100, 3e38]), every_bf16()[:32640:8]])
    for signed in (x, -x):
        expected = [scalar.code_of(table, scalar.number(v)) for v in signed]
        assert encode(signed).tolist() == expected


def test_e2m1_ties_by_hand():
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    assert E2M1_VALUES[encode_e2m1(ties)].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert encode_e2m1(np.float32([-0.0, -0.25, -1e-30])).tolist() == [8, 8, 8]


@needs_small_types
def test_e2m1_equals_ml_dtypes():
    float4 = ml_dtypes.float4_e2m1fn
    assert (E2M1_VALUES.view(np.uint32) == BYTES[:16].view(float4).astype(np.float32).view(np.uint32)).all()
    x = np.concatenate([around(E2M1_VALUES[:8]), every_bf16()]).clip(-6, 6)
    assert (encode_e2m1(x) == x.astype(float4).view(np.uint8)).all()


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda codes: len(codes) % 2 == 0))
def test_packing_puts_the_even_k_low(codes):
    payload = pack(np.array([codes, codes[::-1]], np.uint8))
    assert payload[0].tolist() == scalar.packed(codes)
    assert unpack(payload).tolist() == [codes, codes[::-1]]


# ---- scales ----------------------------------------------------------------------------------------------------------


def test_ue4m3_rounds_to_the_nearest_code_and_never_to_zero():
    assert [Fraction(float(v)) for v in UE4M3_VALUES[:127]] == scalar.UE4M3
    assert np.isnan(UE4M3_VALUES[127:]).all()
    assert encode_ue4m3(UE4M3_VALUES[1:127]).tolist() == list(range(1, 127))
    s = around(UE4M3_VALUES[1:127])
    assert encode_ue4m3(s).tolist() == [max(1, scalar.nearest(scalar.UE4M3, Fraction(float(v)))) for v in s]
    assert encode_ue4m3(np.float32([0, 1e-45, 2**-9, 448, 464, 465, 1e30])).tolist() == [1, 1, 1, 126, 126, 126, 126]


def test_ue4m3_equals_ml_dtypes():
    e4m3 = ml_dtypes.float8_e4m3fn
    assert (UE4M3_VALUES[:127] == BYTES[:127].view(e4m3).astype(np.float32)).all()
    s = np.concatenate([around(UE4M3_VALUES[1:127]), np.abs(every_bf16())]).clip(2**-9, 448)
    assert (encode_ue4m3(s) == s.astype(e4m3).view(np.uint8)).all()


def test_e8m0_takes_the_floor_of_the_exponent():
    assert [Fraction(float(v)) for v in E8M0_VALUES[:255]] == scalar.E8M0
    assert np.isnan(E8M0_VALUES[255])
    powers = np.exp2(np.arange(-149, 128, dtype=np.float64)).astype(np.float32)
    amax = np.concatenate([[np.float32(0)], powers, np.nextafter(powers, np.float32(0)), powers * np.float32(1.5)])
    expected = [scalar.mxfp4_scale(Fraction(float(a))) for a in amax]
    assert encode_e8m0_floor(amax, max_exponent=2).tolist() == expected
    assert encode_e8m0_floor(np.float32([0, 6, 4, 3.99, 1e-40]), max_exponent=2).tolist() == [0, 127, 127, 126, 0]


@needs_small_types
def test_e8m0_values_equal_ml_dtypes():
    assert np.array_equal(E8M0_VALUES, BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), equal_nan=True)


def test_e6m2_rounds_to_the_nearest_code_and_saturates():
    assert [Fraction(float(v)) for v in E6M2_VALUES[:255]] == scalar.E6M2
    assert np.isnan(E6M2_VALUES[255])
    assert encode_e6m2(E6M2_VALUES[:255]).tolist() == list(range(255))
    s = around(E6M2_VALUES[:255])
    assert encode_e6m2(s).tolist() == [scalar.nearest(scalar.E6M2, Fraction(float(v))) for v in s]
    assert encode_e6m2(np.float32([0, 2.0**-60, 1.5 * 2**15, 1.75 * 2**15, 1e30])).tolist() == [0, 0, 254, 254, 254]


def test_bf16_rounding_equals_ml_dtypes():
    middles = ((np.arange(65535, dtype=np.uint32) << 16) | 0x8000).view(np.float32)
    middles = middles[np.isfinite(middles)]
    x = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    x = x[np.isfinite(x)]
    with np.errstate(over="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (round_bf16(x).view(np.uint32) == expected.view(np.uint32)).all()


# ---- blocks ----------------------------------------------------------------------------------------------------------

ALL_FORMATS = [Nvfp4(16), Nvfp4(32), Mxfp4(), Hif4()]


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=repr)
def test_every_code_under_every_scale_decodes_exactly_and_comes_back(fmt):
    """All 16 codes × all scale bytes (HiF4: random micro-exponents); re-encoding under the scale is the identity."""
    top = {"nvfp4": 127, "mxfp4": 253, "hif4": 255}[fmt.name]  # E8M0 above 252: 6 · 2^126 is no fp32 number
    scales = np.arange(1 if fmt.name == "nvfp4" else 0, top, dtype=np.uint32 if fmt.name == "hif4" else np.uint8)
    if fmt.name == "hif4":
        scales |= np.random.default_rng(0).integers(0, 2**24, len(scales), dtype=np.uint32) << 8
    codes = np.tile(np.arange(16, dtype=np.uint8), (len(scales), fmt.block // 16))
    values = decode(codes, scales[:, None], fmt)
    assert (fmt.encode(values[:, None, :], scales[:, None])[:, 0] == codes).all()
    table = scalar.S1P2 if fmt.name == "hif4" else scalar.E2M1
    steps = {"nvfp4": scalar.UE4M3, "mxfp4": scalar.E8M0, "hif4": scalar.E6M2}[fmt.name]
    for row, scale in list(zip(values, scales.tolist(), strict=True))[:: 3 if fmt.block < 64 else 17]:
        for k, value in enumerate(row):
            micro = (scale >> (8 + k // 8) & 1) + (scale >> (16 + k // 4) & 1) if fmt.name == "hif4" else 0
            expected = table[k % 8] * steps[scale & 0xFF] * 2**micro
            assert (np.signbit(value), abs(Fraction(float(value)))) == (k % 16 >= 8, expected)


def adversarial_rows(seed: int, K: int) -> np.ndarray:
    """Rows [R, K] of bf16 values as NVFP4 sees them (at most 2688): ties, borders, zeros, tiny, equal, one outlier."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((6, K))
    scales = UE4M3_VALUES[rng.integers(1, 127, (4, K // 16))].repeat(16, axis=1)
    ties = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -5.0, -2.5], (4, K)) * scales
    outlier = normal[0] * 1e-3
    outlier[K // 3] = -2688
    rows = [
        *(normal[i] * 10.0 ** (i - 3) for i in range(6)),
        *ties,
        *(rng.integers(-8, 9, (3, K)) / 4 * 2.0 ** rng.integers(-12, 9, (3, 1))),
        np.zeros(K),
        np.full(K, -0.0),
        np.full(K, -3.0),
        np.where(np.arange(K) % 2, 1.0, -1.0),
        normal[1] * 2.0**-130,
        np.where(rng.random(K) < 0.9, 0, normal[2]),
        outlier,
    ]
    return round_bf16(np.array(rows, np.float32).clip(-2688, 2688))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=repr)
def test_block_quantizers_equal_the_scalar_ones(fmt):
    x = adversarial_rows(1, 192)
    codes, scales = quantize(x, fmt)
    values = decode(codes, scales, fmt)
    for t, row in enumerate(x):
        expected = scalar.quantized([scalar.number(v) for v in row], fmt.name, fmt.block)
        assert codes[t].tolist() == expected[0]
        assert scales[t].tolist() == expected[1]
        assert [scalar.number(v) for v in values[t]] == expected[2]


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=repr)
def test_scale_rules_at_their_borders(fmt):
    """Magnitudes one fp32 step around those whose scale is a border between two codes."""
    table = {"nvfp4": UE4M3_VALUES[1:127], "mxfp4": E8M0_VALUES[3:253], "hif4": E6M2_VALUES[:255]}[fmt.name]
    amax = around(around(table) * np.float32({"nvfp4": 6, "mxfp4": 4, "hif4": 7}[fmt.name]))
    rule = {"nvfp4": scalar.nvfp4_scale, "mxfp4": scalar.mxfp4_scale, "hif4": scalar.hif4_scale}[fmt.name]
    assert fmt.scale_byte(amax).tolist() == [rule(Fraction(float(a))) for a in amax]


@pytest.mark.parametrize("amax", [2688.0, 1.0, 3.1415927, 777.77, 1e-3, 5e30])
def test_rows_are_divided_and_then_rounded(amax):
    """X one fp32 step around those whose quotient by g is a border between two bf16 numbers."""
    g = scalar.global_scale(Fraction(float(np.float32(amax))))
    bf16 = (np.arange(0x3F80, 0x4080, dtype=np.uint32) << 16).view(np.float32)  # [1, 4)
    X = around((around(bf16).astype(np.float64) * float(g)).astype(np.float32))
    X = np.append(np.minimum(X, np.float32(amax)), np.float32(amax))
    x, actual_g = scaled_rows(X[None], "nvfp4", "token")
    assert Fraction(float(actual_g[0])) == g
    assert [Fraction(float(v)) for v in x[0]] == [scalar.bf16(scalar.fp32(Fraction(float(v)) / g)) for v in X]


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=repr)
def test_integers_times_unit_is_the_value(fmt):
    """What the products rely on: small whole numbers and one unit a block, exactly the decoded value."""
    x = adversarial_rows(2, 128)
    codes, scales = quantize(x, fmt)
    blocks = codes.reshape(len(x), -1, fmt.block)
    integers, unit = fmt.integers(blocks, scales), fmt.unit(scales)
    assert (integers == np.rint(integers)).all() and np.abs(integers).max() <= 28
    exact = integers.astype(np.float64) * unit[..., None].astype(np.float64)
    assert (exact.reshape(x.shape) == decode(codes, scales, fmt)).all()


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=64, max_size=64))
def test_mxfp4_and_hif4_take_any_finite_numbers(values):
    x = round_bf16(np.float32([values]))
    for fmt in (Mxfp4(), Hif4()):
        codes, scales = quantize(x, fmt)
        expected = scalar.quantized([scalar.number(v) for v in x[0]], fmt.name, fmt.block)
        assert (codes[0].tolist(), scales[0].tolist()) == expected[:2]


def test_formats_by_name():
    assert [block_format("nvfp4").block, block_format("nvfp4", 32).block] == [16, 32]
    assert [block_format("mxfp4").block, block_format("hif4").block] == [32, 64]


def test_matrix_knows_its_shape():
    m = Fp4Matrix("nvfp4", np.zeros((3, 32), np.uint8), np.zeros((3, 2), np.uint8), np.ones(3, np.float32))
    assert (m.rows, m.K, m.block, m.nbytes) == (3, 64, 32, 96 + 6 + 12)
