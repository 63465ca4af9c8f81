"""FP8 on both backends: operands bit by bit against ml_dtypes, products on every instruction set against float64.

Products are compared with the float64 product of the values that codes and scales stand for, and bit by bit with
themselves under every batching and number of threads.
"""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest

from engine.errors import InvalidArgument, NumericalError
from engine.fp8_types import Fp8Matrix, Fp8Operand
from engine.ops.reference import ReferenceOps
from engine.quant import fp8

try:
    from engine.ops.cpu import CpuOps, available_isas
except ImportError as error:
    pytest.skip(f"the C++ extension is not built: {error}", allow_module_level=True)

F32, F16, BF16 = (np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
E4M3 = ml_dtypes.float8_e4m3fn
ISAS = available_isas()
REFERENCE = ReferenceOps()
each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)


@lru_cache
def backend(isa: str = ISAS[0], threads: int = 2) -> CpuOps:
    return CpuOps(threads, isa)


BACKENDS = [*ISAS, "numpy"]
each_backend = pytest.mark.parametrize("name", BACKENDS)


def ops_named(name):
    return REFERENCE if name == "numpy" else backend(name)


def rng(seed):
    return np.random.default_rng(seed)


def bits(array):
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def activations(seed, T, K, dtype=F32):
    """Channels of many sizes, so that every exponent of E4M3 occurs."""
    r = rng(seed)
    return np.clip(r.standard_normal((T, K)) * np.exp(3 * r.standard_normal(K)), -6e4, 6e4).astype(dtype)


def weight(seed, N, K, tile=None):
    """Any codes but NaN, subnormal ones and both zeros among them."""
    tile = tile or (1, K)
    codes = rng(seed).integers(0, 256, (N, K)).astype(np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x81
    scale = rng(seed + 1).random((-(-N // tile[0]), -(-K // tile[1])), F32) * 0.1 + 0.01
    return Fp8Matrix(codes, scale, tile)


def values(codes, scale):
    """What codes [T, K] with a scale per row stand for, in float64."""
    return codes.view(E4M3).astype(np.float64) * scale[:, None]


def weight_values(m):
    scale = m.scale.astype(np.float64)
    for axis in (0, 1):
        scale = np.repeat(scale, m.tile[axis], axis=axis)
    return m.payload.view(E4M3).astype(np.float64) * scale[: m.rows, : m.K]


# ---- operands --------------------------------------------------------------------------------------------------------


def assert_rule(operand, x):
    """Scale and codes of x [T, K] float32 by the formula: ml_dtypes rounds."""
    scale = np.maximum(np.abs(x).max(axis=1) / F32.type(448), F32.type(1e-9))
    np.testing.assert_array_equal(bits(operand.scale), bits(scale))
    codes = np.clip(x / scale[:, None], -448, 448).astype(E4M3).view(np.uint8)
    np.testing.assert_array_equal(operand.codes, codes)


@each_backend
@each_dtype
def test_rows_of_every_length(name, dtype):
    for T, K in ((1, 1), (3, 2), (2, 15), (5, 16), (4, 17), (33, 100), (1, 4864), (300, 64)):
        x = activations(T * K, T, K, dtype)
        operand = ops_named(name).prepare_fp8(x)
        assert (operand.T, operand.K) == (T, K)
        assert_rule(operand, x.astype(F32))


@each_backend
def test_every_border_of_e4m3(name):
    """All numbers of E4M3, the middles between them and their fp32 neighbours, in a row whose scale is 1; and −0."""
    numbers = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(F32)
    points = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2])
    x = np.concatenate([np.nextafter(points, F32.type(0)), points, np.nextafter(points, F32.type(np.inf))])
    x = np.concatenate([[448], x[x <= 448], -x[x <= 448]]).astype(F32)[None]
    operand = ops_named(name).prepare_fp8(x)
    assert operand.scale[0] == 1 and set(operand.codes[0] & 0x7F) == set(range(0x7F))
    assert_rule(operand, x)


@each_backend
def test_any_finite_bit_patterns(name):
    patterns = rng(1).integers(0, 2**32, (60, 75), np.uint32)
    x = np.where(patterns & 0x7F800000 == 0x7F800000, patterns & 0x80FFFFFF, patterns).astype(np.uint32).view(F32)
    x[0], x[1, 1:] = 0, 0
    assert_rule(ops_named(name).prepare_fp8(x), x)
    small = (x.view(np.uint32) & np.uint32(0x80FFFFFF)).view(F32)  # around 1e-38: scales at their least
    assert_rule(ops_named(name).prepare_fp8(small), small)


@each_isa
@each_dtype
def test_fused_forms(isa, dtype):
    for K in (1, 40, 1055):
        x, gate_up = activations(K, 5, K, dtype), rng(K).standard_normal((5, 2 * K)).astype(dtype)
        norm = rng(2).standard_normal(K).astype(F32), 1e-6
        normed = REFERENCE.rms_norm(x, *norm, out=np.empty((5, K), BF16))
        gated = REFERENCE.silu_mul(gate_up, out=np.empty((5, K), BF16))
        for ops in (backend(isa), REFERENCE):
            assert_rule(ops.prepare_fp8(x, norm=norm), normed.astype(F32))
            assert_rule(ops.prepare_fp8(gate_up, silu=True), gated.astype(F32))


def test_strided_rows_and_no_rows():
    wide = activations(6, 4, 192)
    assert_rule(backend().prepare_fp8(wide[::2, 32:160]), wide[::2, 32:160])
    assert backend().prepare_fp8(np.zeros((0, 64), F32)).codes.shape == (0, 64)


def test_weights_follow_the_same_rule():
    w = activations(7, 40, 75, BF16)
    m = fp8.quantize_weight(w)
    assert_rule(Fp8Operand(m.payload, m.scale[:, 0]), w.astype(F32))


@each_backend
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(name, bad):
    ops, ones = ops_named(name), np.ones(37, F32)
    for dtype in (F32, F16, BF16):
        for position in (0, 36):
            x, gate_up = np.ones((3, 37), dtype), np.ones((3, 74), dtype)
            x[1, position] = gate_up[2, position + 37 * (position == 36)] = bad
            for source, arguments in ((x, {}), (x, {"norm": (ones, 1e-6)}), (gate_up, {"silu": True})):
                with pytest.raises(NumericalError, match="NaN or infinity"):
                    ops.prepare_fp8(source, **arguments)


# ---- products --------------------------------------------------------------------------------------------------------


def product(ops, operand, packed, out_dtype=F32, **addends):
    """fp8_linear, or w8a16_linear of an array, into memory full of NaN: an element left unwritten shows."""
    full, multiply = isinstance(operand, np.ndarray), ops.fp8_linear
    if full:
        multiply = ops.w8a16_linear
    out = np.full((operand.shape[0] if full else operand.T, packed.N), np.nan, out_dtype)
    assert multiply(operand, packed, out=out, **addends) is out
    return out


def assert_close(y, x, w):
    """fp32 sums in any order: 2e-6 of the largest |Y|, as the FP4 products obey."""
    expected = x @ w.T
    assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max()


# Tails of every kind; scales per row, per tensor, per block (whole and cut, odd, longer than a segment of 512 k).
SHAPES = [
    (1, 1, 1, (1, 1)),
    (3, 31, 2, (1, 2)),
    (5, 33, 7, (33, 7)),
    (9, 64, 130, (1, 130)),
    (1, 75, 515, (1, 515)),
    (13, 130, 300, (128, 128)),
    (2, 128, 256, (128, 128)),
    (70, 40, 1100, (7, 700)),
    (4, 50, 99, (3, 33)),
    (130, 96, 1030, (96, 1030)),
]


@each_backend
@pytest.mark.parametrize(("T", "N", "K", "tile"), SHAPES)
def test_products(name, T, N, K, tile):
    ops, m, x = ops_named(name), weight(N, N, K, tile), activations(K, T, K)
    packed, w = ops.pack_fp8([m]), weight_values(m)
    assert (packed.N, packed.K) == (N, K) and packed.nbytes >= N * K
    operand = ops.prepare_fp8(x)
    assert_close(product(ops, operand, packed), values(operand.codes, operand.scale), w)
    for dtype in (F32, F16, BF16):
        rows = x.astype(dtype)
        assert_close(product(ops, rows, packed), rows.astype(np.float64), w)


@each_isa
def test_every_number_of_rows(isa):
    m = weight(3, 70, 77, (70, 40))
    packed, x = backend(isa).pack_fp8([m]), activations(4, 40, 77)
    for T in range(1, 41):
        operand = backend(isa).prepare_fp8(x[:T])
        assert_close(product(backend(isa), operand, packed), values(operand.codes, operand.scale), weight_values(m))


@each_isa
def test_exact_values(isa):
    """The identity returns the weight's values, all codes under all of several scales."""
    m = Fp8Matrix(np.tile(np.arange(256, dtype=np.uint8), (40, 1)), rng(5).random((40, 1), F32), (1, 256))
    m.payload[:, [0x7F, 0xFF]] = 0
    ops = backend(isa)
    packed, expected = ops.pack_fp8([m]), fp8.dequantize(m).T
    one = Fp8Operand((np.eye(256, dtype=np.uint8) * 0x38), np.ones(256, F32))
    np.testing.assert_array_equal(product(ops, one, packed), expected)
    for dtype in (F32, F16, BF16):
        np.testing.assert_array_equal(product(ops, np.eye(256).astype(dtype), packed), expected)


@each_isa
@pytest.mark.parametrize("tile", [(1, 1050), (128, 128)], ids=str)
def test_a_row_is_the_same_in_every_batch(isa, tile):
    x, m = activations(12, 40, 1050), weight(13, 75, 1050, tile)
    packed = backend(isa, 1).pack_fp8([m])
    for prepare in (lambda ops, rows: ops.prepare_fp8(rows), lambda ops, rows: rows.astype(BF16)):
        alone = np.concatenate(
            [product(backend(isa, 1), prepare(backend(isa, 1), x[t : t + 1]), packed) for t in range(40)]
        )
        for T in (2, 3, 5, 8, 9, 12, 13, 25, 40):
            ops = backend(isa, 1 + T % 3)
            y = product(ops, prepare(ops, x[40 - T :]), packed)
            np.testing.assert_array_equal(bits(y), bits(alone[40 - T :]))


@each_isa
def test_a_row_is_the_same_in_a_large_batch(isa):
    x, m = activations(14, 700, 160), weight(15, 100, 160, (100, 64))
    packed = backend(isa).pack_fp8([m])
    operand = backend(isa).prepare_fp8(x)
    whole = product(backend(isa, 1), operand, packed)
    np.testing.assert_array_equal(bits(product(backend(isa, 3), operand, packed)), bits(whole))
    for first, T in ((0, 1), (13, 5), (95, 2), (511, 2), (640, 60)):
        part = product(backend(isa), backend(isa).prepare_fp8(x[first : first + T]), packed)
        np.testing.assert_array_equal(bits(part), bits(whole[first : first + T]))


@each_isa
@each_dtype
def test_bias_residual_and_rounding(isa, dtype):
    ops, x, m = backend(isa), activations(16, 6, 90), weight(17, 45, 90)
    bias, residual = (rng(18).standard_normal(45) * 3).astype(F32), (rng(19).standard_normal((6, 45)) * 3).astype(dtype)
    packed = ops.pack_fp8([m])
    for operand in (ops.prepare_fp8(x / 1e3), x / F32.type(1e3)):
        y = product(ops, operand, packed)
        for addends in ({}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
            expected = y + addends.get("bias", F32.type(0))
            expected = expected + addends.get("residual", np.zeros(1, dtype)).astype(F32)
            np.testing.assert_array_equal(product(ops, operand, packed, dtype, **addends), expected.astype(dtype))
        same = ops.empty((6, 45), dtype)
        same[...] = residual
        multiply = ops.fp8_linear if isinstance(operand, Fp8Operand) else ops.w8a16_linear
        multiply(operand, packed, out=same, bias=bias, residual=same)
        np.testing.assert_array_equal(same, expected.astype(dtype))


@each_isa
def test_shards_keep_their_own_scales(isa):
    """Per tensor beside per row, and blocks that begin anew with each shard."""
    ops, x = backend(isa), activations(23, 4, 200)
    for tiles in ([(1, 200), (5, 200), (19, 200)], [(128, 128)] * 3):
        shards = [weight(20 + i, N, 200, tile) for i, (N, tile) in enumerate(zip((40, 5, 19), tiles, strict=True))]
        operand, packed = ops.prepare_fp8(x), ops.pack_fp8(shards)
        assert packed.N == 64
        apart = [product(ops, operand, ops.pack_fp8([s])) for s in shards]
        np.testing.assert_array_equal(product(ops, operand, packed), np.concatenate(apart, axis=1))


# ---- refusals --------------------------------------------------------------------------------------------------------


@each_backend
def test_nan_codes_are_refused(name):
    m = weight(1, 3, 40)
    m.payload[2, 39] = 0xFF
    with pytest.raises(NumericalError, match="NaN"):
        ops_named(name).pack_fp8([m])


@each_backend
def test_shards_that_do_not_fit_are_refused(name):
    ops = ops_named(name)
    for other in (weight(1, 3, 41), weight(1, 3, 40, (1, 20))):
        with pytest.raises(InvalidArgument, match="one K and as many k per scale"):
            ops.pack_fp8([weight(1, 3, 40), other])


def test_bad_arguments_are_refused_with_their_numbers():
    ops, x, m = backend(), np.ones((2, 64), F32), weight(27, 40, 64)
    packed, operand, out = ops.pack_fp8([m]), ops.prepare_fp8(x), np.empty((2, 40), F32)
    other = ops.pack_fp8([weight(28, 40, 96)])
    cases = [
        ("even number of columns", lambda: ops.prepare_fp8(np.ones((2, 65), F32), silu=True)),
        ("not both", lambda: ops.prepare_fp8(x, norm=(np.ones(32, F32), 1e-6), silu=True)),
        (r"norm weight must be .* \[64\]", lambda: ops.prepare_fp8(x, norm=(np.ones(32, F32), 1e-6))),
        ("at least one element", lambda: ops.prepare_fp8(np.ones((2, 0), F32))),
        ("at least one shard", lambda: ops.pack_fp8([])),
        ("K = 64 do not multiply weights with K = 96", lambda: ops.fp8_linear(operand, other, out=out)),
        ("K = 64 do not multiply weights with K = 96", lambda: ops.w8a16_linear(x, other, out=out)),
        (r"out must be \[2, 40\], not \[3, 40\]", lambda: ops.fp8_linear(operand, packed, out=np.empty((3, 40), F32))),
        ("residual must have out's dtype", lambda: ops.fp8_linear(operand, packed, out=out, residual=out.astype(BF16))),
        (r"bias must be .* \[40\]", lambda: ops.w8a16_linear(x, packed, out=out, bias=np.ones(39, F32))),
        ("codes must be uint8", lambda: Fp8Operand(x, np.ones(2, F32))),
        (r"scale must be float32 \[2\]", lambda: Fp8Operand(operand.codes, np.ones(3, F32))),
    ]
    for message, call in cases:
        with pytest.raises(InvalidArgument, match=message):
            call()
    with pytest.raises(TypeError):
        ops.fp8_linear(operand, ops.pack_weight([x]), out=out)
