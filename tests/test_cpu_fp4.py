"""The C++ FP4 operations on every instruction set: operands against NumPy bit by bit, products against float64.

What NumPy itself is compared with is in test_sharq and test_formats. The products are compared with the float64 product
of the dequantised operands, and bit by bit with themselves under every batching and number of threads.
"""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
from test_sharq import FIELDS, FORMATS, MODES, hard_rows

from engine.errors import InvalidArgument, NumericalError
from engine.fp4_types import Fp4Matrix, SharqOperand
from engine.ops.reference import ReferenceOps
from engine.quant import fp4, sharq

try:
    from engine.ops.cpu import CpuOps, available_isas
except ImportError as error:
    pytest.skip(f"the C++ extension is not built: {error}", allow_module_level=True)

F32, F16, BF16 = (np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
ISAS = available_isas()
REFERENCE = ReferenceOps()
WEIGHTS = [("nvfp4", 16), ("nvfp4", 32), ("mxfp4", 32), ("hif4", 64)]
each_isa = pytest.mark.parametrize("isa", ISAS)
each_mode = pytest.mark.parametrize(("format", "sparse"), MODES)
each_format = pytest.mark.parametrize("format", FORMATS)
each_weight = pytest.mark.parametrize(("format", "block"), WEIGHTS)


@lru_cache
def backend(isa: str = ISAS[0], threads: int = 2) -> CpuOps:
    return CpuOps(threads, isa)


def rng(seed):
    return np.random.default_rng(seed)


def bits(array):
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def assert_same_operand(actual, expected):
    names = FIELDS if isinstance(expected, SharqOperand) else ["g", "payload", "scale"]
    assert (actual.format, actual.K) == (expected.format, expected.K)
    for name in names:
        a, e = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (e is None), name
        if e is not None:
            assert (a.dtype, a.shape) == (e.dtype, e.shape), name
            np.testing.assert_array_equal(bits(a), bits(e), err_msg=name)


def activations(seed, T, K, dtype=F32):
    """Channels of many sizes, a few outliers: every scale code of some range occurs."""
    r = rng(seed)
    x = r.standard_normal((T, K)) * np.exp(r.standard_normal(K))
    x[:, r.integers(0, K, 2)] *= 40
    return x.astype(dtype)


def weight(seed, N, K, format, block=None):
    return fp4.quantize_weight((rng(seed).standard_normal((N, K)) * 0.02).astype(F32), format=format, block=block)


# ---- operands, bit for bit -------------------------------------------------------------------------------------------


@each_isa
@each_mode
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_hard_rows(isa, format, sparse, dtype):
    for K in (64, 128, 960):
        x = hard_rows(K).astype(dtype)
        expected = sharq.prepare(x, format=format, sparse=sparse)
        assert_same_operand(backend(isa).prepare_sharq(x, format=format, sparse=sparse), expected)
        assert_same_operand(backend(isa).prepare_fp4(x, format=format), fp4.prepare(x, format=format))


@each_isa
@pytest.mark.parametrize(("T", "K"), [(1, 64), (300, 64), (7, 896), (1, 18944), (33, 4864)])
def test_sizes_from_least_to_largest(isa, T, K):
    x = activations(T + K, T, K, BF16)
    for format, sparse in MODES:
        expected = sharq.prepare(x, format=format, sparse=sparse)
        assert_same_operand(backend(isa, 3).prepare_sharq(x, format=format, sparse=sparse), expected)


@each_isa
def test_smallest_k(isa):
    for format in ("nvfp4", "mxfp4"):
        for sparse in (True, False):
            expected = sharq.prepare(hard_rows(32), format=format, sparse=sparse)
            assert_same_operand(backend(isa).prepare_sharq(hard_rows(32), format=format, sparse=sparse), expected)


@each_isa
@each_mode
def test_any_finite_bit_patterns(isa, format, sparse):
    """Magnitudes from subnormal to the largest side by side."""
    patterns = rng(1).integers(0, 2**32, (40, 256), np.uint32)
    x = np.where(patterns & 0x7F000000 == 0x7F000000, patterns & 0x80FFFFFF, patterns).astype(np.uint32).view(F32)
    expected = sharq.prepare(x, format=format, sparse=sparse)
    assert_same_operand(backend(isa).prepare_sharq(x, format=format, sparse=sparse), expected)


@each_isa
def test_every_border_of_e2m1_and_of_the_scales(isa):
    """All bf16 numbers from 0 up to 2688 in a row whose g is 1, each leading a block of 16 with the border it makes."""
    values = np.arange(0x4528, dtype=np.uint16).view(BF16).astype(F32)[::7]
    multiples = np.array([1, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]) / 6
    blocks = np.concatenate([values[:, None] * multiples, -values[:, None] * multiples], axis=1).astype(F32)
    rows = np.resize(blocks, (blocks.size // 2032, 127 * 16))
    x = np.concatenate([rows, np.full((len(rows), 16), 2688, F32)], axis=1)
    for sparse in (True, False):
        assert_same_operand(backend(isa).prepare_sharq(x, sparse=sparse), sharq.prepare(x, sparse=sparse))


@each_isa
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_fused_forms(isa, dtype):
    for K in (64, 1056, 2880):
        x, gate_up = activations(K, 5, K, dtype), activations(K + 1, 5, 2 * K, dtype)
        norm = rng(2).standard_normal(K).astype(F32), 1e-6
        for format, sparse in MODES:
            if K % 64 and format == "hif4":
                continue
            ops, mode = backend(isa), {"format": format, "sparse": sparse}
            assert_same_operand(ops.prepare_sharq(x, norm=norm, **mode), sharq.prepare_rmsnorm(x, *norm, **mode))
            assert_same_operand(ops.prepare_sharq(gate_up, silu=True, **mode), sharq.prepare_silu_mul(gate_up, **mode))
        normed = REFERENCE.rms_norm(x, *norm, out=np.empty(x.shape, BF16))
        assert_same_operand(backend(isa).prepare_fp4(x, norm=norm), fp4.prepare(normed))


@each_isa
def test_one_global_scale_for_all_rows(isa):
    x, norm = hard_rows(128)[[0, 7, 10]], (np.ones(128, F32), 1e-5)
    assert_same_operand(backend(isa).prepare_sharq(x, scale="tensor"), sharq.prepare(x, scale="tensor"))
    assert_same_operand(backend(isa).prepare_fp4(x, scale="tensor"), fp4.prepare(x, scale="tensor"))
    expected = sharq.prepare_rmsnorm(x, *norm, scale="tensor")
    assert_same_operand(backend(isa).prepare_sharq(x, norm=norm, scale="tensor"), expected)


@each_mode
def test_both_backends_serve_the_contract_alike(format, sparse):
    x, norm = activations(3, 4, 128, BF16), (rng(4).standard_normal(128).astype(F32), 1e-6)
    gate_up = activations(5, 4, 256, BF16)
    for source, arguments in ((x, {}), (x, {"norm": norm}), (gate_up, {"silu": True})):
        expected = REFERENCE.prepare_sharq(source, format=format, sparse=sparse, **arguments)
        assert_same_operand(backend().prepare_sharq(source, format=format, sparse=sparse, **arguments), expected)
        expected = REFERENCE.prepare_fp4(source, format=format, **arguments)
        assert_same_operand(backend().prepare_fp4(source, format=format, **arguments), expected)


def test_strided_rows_and_no_rows():
    wide = activations(6, 4, 192)
    expected = sharq.prepare(wide[:, 32:160].copy())
    assert_same_operand(backend().prepare_sharq(wide[:, 32:160]), expected)
    assert_same_operand(backend().prepare_sharq(wide[::2, 64:]), sharq.prepare(wide[::2, 64:].copy()))
    for format, sparse in MODES:
        operand = backend().prepare_sharq(np.zeros((0, 64), F32), format=format, sparse=sparse)
        assert (operand.T, operand.K, operand.residual.shape) == (0, 64, (0, 32))


def test_an_operands_arrays_outlive_it():
    x = activations(7, 3, 64)
    residual = backend().prepare_sharq(x).residual
    for _ in range(20):
        backend().prepare_sharq(-x)
    np.testing.assert_array_equal(residual, sharq.prepare(x).residual)
    assert not residual.flags.writeable


# ---- products --------------------------------------------------------------------------------------------------------


def product(ops, operand, weights, N, out_dtype=F32, **addends):
    """fp4_linear into memory full of NaN, so that an element left unwritten shows."""
    out = np.full((len(operand.g), N), np.nan, out_dtype)
    assert ops.fp4_linear(operand, weights, out=out, **addends) is out
    return out


def assert_close(y, a, w):
    expected = a.astype(np.float64) @ w.astype(np.float64).T
    assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max()


def operands(x, format):
    """Every kind of operand these activations can become."""
    yield sharq.prepare(x, format=format)
    yield sharq.prepare(x, format=format, sparse=False)
    yield fp4.prepare(x, format=format)


@each_isa
@each_weight
def test_products_of_every_kind_with_tails(isa, format, block):
    for N, K, T in ((75, 192, 9), (8, 64, 1), (31, 320, 3), (32, 64, 70), (97, 1088, 2)):
        w = weight(N, N, K, format, block)
        packed = backend(isa).pack_fp4([w])
        for operand in operands(activations(K, T, K), format):
            y = product(backend(isa), operand, packed, N)
            assert_close(y, sharq.dequantize(operand), sharq.dequantize(w))


@each_isa
def test_odd_multiples_of_32(isa):
    """Weights lie in blocks of 64 k: the last one half empty."""
    for format, block in WEIGHTS[:3]:
        for K in (32, 96, 160):
            w, x = weight(1, 40, K, format, block), activations(2, 5, K)
            for operand in operands(x, format):
                y = product(backend(isa), operand, backend(isa).pack_fp4([w]), 40)
                assert_close(y, sharq.dequantize(operand), sharq.dequantize(w))


@each_isa
def test_an_operand_in_one_path_may_have_blocks_of_32(isa):
    x, w = activations(3, 6, 128), weight(4, 40, 128, "nvfp4", 32)
    operand = fp4.quantize_weight(x, block=32)
    w16 = weight(5, 40, 128, "nvfp4", 16)
    for weights in (w, w16):
        y = product(backend(isa), operand, backend(isa).pack_fp4([weights]), 40)
        assert_close(y, sharq.dequantize(operand), sharq.dequantize(weights))


@each_isa
@each_format
def test_the_largest_k(isa, format):
    x, w = activations(8, 3, 18944, BF16), weight(9, 33, 18944, format, 32 if format == "nvfp4" else None)
    for operand in operands(x, format):
        y = product(backend(isa), operand, backend(isa).pack_fp4([w]), 33)
        assert_close(y, sharq.dequantize(operand), sharq.dequantize(w))


@each_isa
@each_weight
def test_every_code_and_scale(isa, format, block):
    """Any bytes that are legal codes: −0, all scales (subnormal ones too) and micro-exponents; 512 rows."""
    r, K = rng(10), 256
    count = K // block
    if format == "hif4":  # E6M2 around 1; all 24 bits of micro-exponents
        scale = r.integers(0, 2**32, (66, count), np.uint32) & 0xFFFFFF0F | 0xB0
    else:
        scale = r.integers(*((1, 0x7F) if format == "nvfp4" else (110, 140)), (66, count)).astype(np.uint8)
    w = Fp4Matrix(format, r.integers(0, 256, (66, K // 2)).astype(np.uint8), scale, r.random(66, F32) + 0.5)
    for operand in (
        sharq.prepare(activations(11, 512, K), format=format),
        fp4.prepare(activations(11, 9, K), format=format),
    ):
        y = product(backend(isa), operand, backend(isa).pack_fp4([w]), 66)
        assert_close(y, sharq.dequantize(operand), sharq.dequantize(w))


@each_isa
def test_exact_integers(isa):
    """Largest codes everywhere: sums at the edge of what 16-bit accumulation holds, one unit apart from wrong."""
    for format, code, block in (
        ("nvfp4", 0x77, 16),
        ("nvfp4", 0xFF, 32),
        ("mxfp4", 0x7F, 32),
        ("hif4", 0x77, 64),
        ("hif4", 0xFF, 64),
    ):
        K, one = 64, {"nvfp4": 0x38, "mxfp4": 127, "hif4": 0xFFFFFFC0}[format]
        scale_type = np.uint32 if format == "hif4" else np.uint8
        payload, g = np.full((34, K // 2), code, np.uint8), np.ones(34, F32)
        matrix = Fp4Matrix(format, payload, np.full((34, K // block), one, scale_type), g)
        y = product(backend(isa), matrix, backend(isa).pack_fp4([matrix]), 34)
        np.testing.assert_array_equal(y, fp4.matmul(matrix, matrix))
        assert (y > 1000).all()


@each_isa
@each_mode
def test_a_row_is_the_same_in_every_batch(isa, format, sparse):
    x = activations(12, 40, 192)
    w = weight(13, 75, 192, format, 32 if format == "nvfp4" else None)
    packed = backend(isa, 1).pack_fp4([w])
    each = [backend(isa, 1).prepare_sharq(x[t : t + 1], format=format, sparse=sparse) for t in range(40)]
    alone = np.concatenate([product(backend(isa, 1), operand, packed, 75) for operand in each])
    for T in range(1, 41):
        ops = backend(isa, 1 + T % 3)
        y = product(ops, ops.prepare_sharq(x[40 - T :], format=format, sparse=sparse), packed, 75)
        np.testing.assert_array_equal(bits(y), bits(alone[40 - T :]))


@each_isa
@each_weight
def test_a_row_is_the_same_in_a_large_batch(isa, format, block):
    x, w = activations(14, 512, 320), weight(15, 200, 320, format, block)
    packed = backend(isa).pack_fp4([w])
    for prepare in (backend(isa).prepare_sharq, backend(isa).prepare_fp4):
        whole = [product(backend(isa, n), prepare(x, format=format), packed, 200) for n in (1, 2, 3)]
        for other in whole[1:]:
            np.testing.assert_array_equal(bits(other), bits(whole[0]))
        for first, T in ((0, 1), (13, 5), (63, 2), (480, 32), (511, 1)):
            part = product(backend(isa), prepare(x[first : first + T], format=format), packed, 200)
            np.testing.assert_array_equal(bits(part), bits(whole[0][first : first + T]))


@each_isa
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_bias_residual_and_rounding(isa, dtype):
    x, w = activations(16, 6, 128), weight(17, 45, 128, "nvfp4", 32)
    bias, residual = (rng(18).standard_normal(45) * 3).astype(F32), (rng(19).standard_normal((6, 45)) * 3).astype(dtype)
    packed, operand = backend(isa).pack_fp4([w]), backend(isa).prepare_sharq(x)
    y = product(backend(isa), operand, packed, 45)
    for addends in ({}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
        expected = y
        if "bias" in addends:
            expected = expected + bias
        if "residual" in addends:
            expected = expected + residual.astype(F32)
        actual = product(backend(isa), operand, packed, 45, dtype, **addends)
        np.testing.assert_array_equal(bits(actual), bits(expected.astype(dtype)))
    np.testing.assert_array_equal(
        bits(backend(isa).fp4_linear(operand, packed, out=residual, bias=bias, residual=residual)), bits(actual)
    )


def test_shards_keep_their_own_global_scale():
    shards = [weight(20 + i, N, 96, "nvfp4", 32) for i, N in enumerate((40, 5, 19))]
    shards[1] = Fp4Matrix("nvfp4", shards[1].payload, shards[1].scale, shards[1].g * 1000)
    operand = backend().prepare_sharq(activations(23, 4, 96))
    packed = backend().pack_fp4(shards)
    assert (packed.N, packed.K, packed.format, packed.block) == (64, 96, "nvfp4", 32)
    apart = [product(backend(), operand, backend().pack_fp4([s]), s.rows) for s in shards]
    np.testing.assert_array_equal(bits(product(backend(), operand, packed, 64)), bits(np.concatenate(apart, axis=1)))


def test_weights_take_four_and_a_quarter_bits():
    for format, block, bits_per_weight in (
        ("nvfp4", 16, 4.5),
        ("nvfp4", 32, 4.25),
        ("mxfp4", 32, 4.25),
        ("hif4", 64, 4.5),
    ):
        assert backend().pack_fp4([weight(24, 64, 128, format, block)]).nbytes * 8 == bits_per_weight * 64 * 128


def test_the_reference_backend_multiplies_too():
    x, w = activations(25, 5, 128, BF16), weight(26, 40, 128, "nvfp4", 32)
    bias, residual = np.ones(40, F32), np.ones((5, 40), BF16)
    packed, operand = REFERENCE.pack_fp4([w, w]), REFERENCE.prepare_sharq(x)
    y = product(REFERENCE, operand, packed, 80)
    np.testing.assert_array_equal(y[:, 40:], sharq.matmul(operand, w))
    y = product(REFERENCE, operand, REFERENCE.pack_fp4([w]), 40, BF16, bias=bias, residual=residual)
    expected = product(backend(), operand, backend().pack_fp4([w]), 40, BF16, bias=bias, residual=residual)
    np.testing.assert_allclose(y.astype(F32), expected.astype(F32), rtol=2.0**-7)
    out = REFERENCE.w4a16_linear(x, packed, out=np.empty((5, 80), F32))
    assert_close(out[:, :40], x.astype(F32), sharq.dequantize(w))


# ---- activations as they are -----------------------------------------------------------------------------------------


@each_isa
@each_weight
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_w4a16(isa, format, block, dtype):
    for N, K, T in ((75, 192, 9), (8, 64, 1), (97, 1088, 70)):
        x, w = activations(K, T, K, dtype), weight(N, N, K, format, block)
        packed, out = backend(isa).pack_fp4([w]), np.full((T, N), np.nan, F32)
        assert_close(backend(isa).w4a16_linear(x, packed, out=out), x.astype(np.float64), sharq.dequantize(w))
        for rows in (slice(0, 1), slice(T // 2, T)):
            part = backend(isa, 3).w4a16_linear(x[rows], packed, out=np.empty((T, N), F32)[rows])
            np.testing.assert_array_equal(bits(part), bits(out[rows]))


@each_isa
def test_w4a16_multiplies_exact_values(isa):
    """The identity returns the weight's values: all codes under all scales."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (126, 1))[:, :128]
    scale = np.repeat(np.arange(1, 127, dtype=np.uint8)[:, None], 8, axis=1)
    w = Fp4Matrix("nvfp4", np.concatenate([codes[:63], codes[63:] + 128]), scale, np.ones(126, F32))
    for dtype in (F32, BF16):
        out = backend(isa).w4a16_linear(
            np.eye(256).astype(dtype), backend(isa).pack_fp4([w]), out=np.empty((256, 126), F32)
        )
        np.testing.assert_array_equal(out, sharq.dequantize(w).T)


# ---- refusals --------------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(isa, bad):
    ops, ones = backend(isa), np.ones(64, F32)
    for dtype in (F32, BF16):
        for position in (0, 37, 63):
            x = np.ones((3, 64), dtype)
            x[1, position] = bad
            gate_up = np.ones((3, 128), dtype)
            gate_up[2, position + 64 * (position == 37)] = bad
            for format in FORMATS:
                for prepare in (ops.prepare_sharq, ops.prepare_fp4):
                    for source, arguments in ((x, {}), (x, {"norm": (ones, 1e-6)}), (gate_up, {"silu": True})):
                        with pytest.raises(NumericalError, match="NaN or infinity"):
                            prepare(source, format=format, **arguments)


@each_isa
def test_beyond_bf16_is_refused_where_there_is_no_global_scale(isa):
    edge = np.array([0x7F7F7FFF], np.uint32).view(F32)  # the largest that bf16 rounds to a number
    x = np.full((1, 64), edge, F32)
    for format in FORMATS:
        assert_same_operand(backend(isa).prepare_sharq(x, format=format), sharq.prepare(x, format=format))
    x[0, 5] = np.array([0x7F7F8000], np.uint32).view(F32)[0]
    assert_same_operand(backend(isa).prepare_sharq(x), sharq.prepare(x))
    for format in ("mxfp4", "hif4"):
        with pytest.raises(NumericalError, match="bfloat16"):
            backend(isa).prepare_sharq(x, format=format)


def test_bad_arguments_are_refused_with_their_numbers():
    ops, x, w = backend(), np.ones((2, 64), F32), weight(27, 40, 64, "nvfp4", 32)
    packed, operand, out = ops.pack_fp4([w]), ops.prepare_sharq(x), np.empty((2, 40), F32)
    other = weight(28, 40, 96, "nvfp4", 32)
    cases = [
        ("multiple of 32, not 48", lambda: ops.prepare_sharq(np.ones((2, 48), F32))),
        ("multiple of 64, not 32", lambda: ops.prepare_sharq(np.ones((2, 32), F32), format="hif4")),
        ("multiple of 32, not 0", lambda: ops.prepare_sharq(np.ones((2, 0), F32))),
        ("float32 or bfloat16, not float16", lambda: ops.prepare_sharq(x.astype(F16))),
        ("unknown FP4 format 'fp5'", lambda: ops.prepare_sharq(x, format="fp5")),
        ("even number of columns", lambda: ops.prepare_sharq(np.ones((2, 65), F32), silu=True)),
        ("not both", lambda: ops.prepare_sharq(x, norm=(np.ones(32, F32), 1e-6), silu=True)),
        (r"norm weight must be .* \[64\]", lambda: ops.prepare_sharq(x, norm=(np.ones(32, F32), 1e-6))),
        ("at least one shard", lambda: ops.pack_fp4([])),
        ("K = 64 in blocks of 32 and nvfp4 with K = 96", lambda: ops.pack_fp4([w, other])),
        ("in blocks of 32 and nvfp4 with K = 64 in blocks of 16", lambda: ops.pack_fp4([w, weight(1, 3, 64, "nvfp4")])),
        ("must be an Fp4Matrix", lambda: ops.pack_fp4([sharq.prepare(x)])),
        ("K = 64 do not multiply weights with K = 96", lambda: ops.fp4_linear(operand, ops.pack_fp4([other]), out=out)),
        ("nvfp4 do not multiply weights in mxfp4",
         lambda: ops.fp4_linear(operand, ops.pack_fp4([weight(1, 40, 64, "mxfp4")]), out=out)),
        (r"out must be \[2, 40\], not \[3, 40\]", lambda: ops.fp4_linear(operand, packed, out=np.empty((3, 40), F32))),
        ("residual must have out's dtype", lambda: ops.fp4_linear(operand, packed, out=out, residual=out.astype(BF16))),
        (r"bias must be .* \[40\]", lambda: ops.fp4_linear(operand, packed, out=out, bias=np.ones(39, F32))),
        (r"x must be \[2, 64\], not \[2, 96\]", lambda: ops.w4a16_linear(np.ones((2, 96), F32), packed, out=out)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(InvalidArgument, match=message):
            call()
    with pytest.raises(AttributeError, match="two paths has no payload"):
        _ = operand.payload
    with pytest.raises(TypeError):
        ops.fp4_linear(operand, ops.pack_weight([x]), out=out)
