"""The NumPy operations against independent formulations: exact rationals, float64, complex numbers, dense masks."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paging import scattered, total_blocks

from engine.ops.reference import ReferenceOps, exp32, fma32, inverse_rms

OPS = ReferenceOps()
F32, F16, BF16 = (np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
DTYPES = [F32, F16, BF16]
HALF_ULP = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}  # relative error of one rounding

floats32 = st.integers(0, 2**32 - 1).map(lambda bits: np.uint32(bits).view(np.float32)).filter(np.isfinite)
moderate32 = st.floats(-4, 4, width=32).map(np.float32)


def assert_close(actual, expected, dtype, steps=4.0):
    """Within one rounding to `dtype` and `steps` fp32 roundings of the largest magnitude along the last axis."""
    actual, expected = actual.astype(np.float64), np.asarray(expected, np.float64)
    largest = np.abs(expected).max(axis=-1, keepdims=True)
    smallest = 2.0**-25 if dtype == F16 else 1e-38  # half a subnormal step
    slack = HALF_ULP[dtype] * np.abs(expected) + steps * HALF_ULP[F32] * largest + smallest
    assert (np.abs(actual - expected) <= slack).all()


# ---- elementary steps ------------------------------------------------------------------------------------------------


def round_fraction(value: Fraction) -> np.float32:
    """The fp32 number nearest to an exact rational, ties to even; independent of any floating-point arithmetic."""
    if value == 0:
        return np.float32(0)
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - 23, -149)
    count = round(magnitude / unit)  # Python rounds a Fraction half to even
    if count * unit >= Fraction(2) ** 128:
        return np.float32(np.copysign(np.inf, float(np.sign(value))))
    return np.float32(float(count * unit) * (1 if value > 0 else -1))


def fma_exact(a, b, c) -> np.float32:
    return round_fraction(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


@settings(max_examples=1500, deadline=None)
@given(floats32, floats32, floats32)
def test_fma_rounds_once_on_any_bits(a, b, c):
    with np.errstate(over="ignore"):
        assert fma32(a, b, c) == fma_exact(a, b, c)


@settings(max_examples=1500, deadline=None)
@given(moderate32, moderate32, moderate32, st.integers(-30, 30))
def test_fma_rounds_once_where_the_exponents_are_near(a, b, c, shift):
    c = np.float32(c * 2.0**shift)
    assert fma32(a, b, c) == fma_exact(a, b, c)


@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-100])
def test_fma_does_not_round_twice(scale):
    # a·b = (1 + 2^-36)·2^-24: just above half an ulp of 1, and lost by float64, which then sees an exact tie
    a, b, c = np.float32(1 + 2**-12), np.float32((1 - 2**-12 + 2**-24) * 2**-24 * scale), np.float32(scale)
    rounded_twice = np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    assert fma32(a, b, c) == fma_exact(a, b, c) == np.float32((1 + 2**-23) * scale)
    assert rounded_twice == np.float32(scale)


def test_fma_keeps_infinities_and_nan():
    with np.errstate(invalid="ignore"):
        a, b, c = np.float32([[np.inf, 1, 0, np.nan], [2, 1, np.inf, 1], [1, -np.inf, 1, 1]])
        result = fma32(a, b, c)
    np.testing.assert_array_equal(result, np.float32([np.inf, -np.inf, np.nan, np.nan]))


def test_exp_is_within_one_ulp():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-104, 88.7, 400_000), rng.uniform(-1, 1, 100_000), rng.normal(0, 1e-6, 1000)])
    x = x.astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)  # that of a subnormal where the result is one
    assert np.max(np.abs(exp32(x) - exact) / ulp) < 1.0


def test_exp_at_its_ends():
    x = np.float32([-np.inf, -1e30, -104, -103.9, -0.0, 0.0, 88.72, 88.73, 1e30, np.inf, np.nan])
    tiny = np.float32(2.0**-149)
    expected = np.float32([0, 0, 0, tiny, 1, 1, np.exp(np.float64(np.float32(88.72))), np.inf, np.inf, np.inf, np.nan])
    np.testing.assert_allclose(exp32(x), expected, rtol=1e-7)


# ---- row operations --------------------------------------------------------------------------------------------------


def tree_sum(partials: list[np.float32]) -> np.float32:
    """Adding neighbours ten times over is adding the two halves' sums, recursively."""
    if len(partials) == 1:
        return partials[0]
    half = len(partials) // 2
    return np.float32(tree_sum(partials[:half]) + tree_sum(partials[half:]))


@pytest.mark.parametrize("K", [8, 1000, 1024, 2600])
def test_inverse_rms_follows_the_fixed_order(K):
    x = np.random.default_rng(K).normal(0, 3, K).astype(np.float32)
    partials = [np.float32(0)] * 1024
    for k in range(K):
        partials[k % 1024] = fma_exact(x[k], x[k], partials[k % 1024])
    mean = np.float32(tree_sum(partials) / np.float32(K))
    expected = np.float32(1) / np.sqrt(np.float32(mean + np.float32(1e-6)))
    assert inverse_rms(x, 1e-6)[0] == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", [8, 200, 1024, 3000])
def test_rms_norm_equals_float64(dtype, C):
    rng = np.random.default_rng(C)
    x = (rng.normal(0, 1, (5, C)) * np.array([[1e-3], [1], [7], [100], [0]])).astype(dtype)
    weight = rng.normal(1, 0.3, C).astype(np.float32)
    out = OPS.rms_norm(x, weight, 1e-6, out=OPS.empty(x.shape, dtype))
    x64 = x.astype(np.float64)
    assert_close(out, x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * weight, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul_equals_float64(dtype):
    rng = np.random.default_rng(1)
    gate_up = np.concatenate([rng.normal(0, 6, (20, 96)), rng.normal(0, 2, (20, 96))], axis=1).astype(dtype)
    out = OPS.silu_mul(gate_up, out=OPS.empty((20, 96), dtype))
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    assert_close(out, gate / (1 + np.exp(-gate)) * up, dtype)


def test_silu_mul_at_extreme_gates():
    gate = np.float32([1e30, 100, -88.0, -88.8, -200, -3e38, 0.0, -0.0, np.inf, -np.inf, np.nan])
    gate_up = np.concatenate([gate, np.ones_like(gate)])[None]
    out = OPS.silu_mul(gate_up, out=OPS.empty((1, gate.size), F32))[0]
    expected = np.float32([1e30, 100, -88 * np.exp(-88.0), 0, 0, 0, 0, 0, np.inf, np.nan, np.nan])
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_embed_converts_rows(table_dtype, dtype):
    table = np.random.default_rng(2).normal(0, 1, (50, 24)).astype(table_dtype)
    ids = np.array([3, 49, 3, 0], np.int32)
    out = OPS.embed(table, ids, out=OPS.empty((4, 24), dtype))
    expected = table[ids].astype(np.float32).astype(dtype)
    np.testing.assert_array_equal(out, expected)
    assert out.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", ["same", "float32"])
def test_linear_equals_float64_and_rows_do_not_depend_on_their_number(dtype, out_dtype):
    rng = np.random.default_rng(3)
    T, K, shards = 9, 72, [rng.normal(0, 1, (n, 72)).astype(dtype) for n in (40, 8, 11)]
    x, bias = rng.normal(0, 1, (T, K)).astype(dtype), rng.normal(0, 1, 59).astype(np.float32)
    residual = rng.normal(0, 1, (T, 59)).astype(dtype)
    weight = OPS.pack_weight(shards)
    assert (weight.N, weight.K, weight.nbytes) == (59, 72, 59 * 72 * 4)
    kind = dtype if out_dtype == "same" else F32
    out = OPS.linear(x, weight, out=OPS.empty((T, 59), kind), bias=bias, residual=residual)
    expected = x.astype(np.float64) @ np.concatenate(shards).astype(np.float64).T + bias + residual.astype(np.float64)
    assert_close(out, expected, kind, steps=64)
    alone = [
        OPS.linear(x[t : t + 1], weight, out=OPS.empty((1, 59), kind), bias=bias, residual=residual[t : t + 1])
        for t in range(T)
    ]
    np.testing.assert_array_equal(np.concatenate(alone), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_finite_and_aligned_memory(dtype):
    array = OPS.empty((3, 5), dtype)
    assert array.ctypes.data % 64 == 0 and array.dtype == dtype and array.shape == (3, 5)
    array[...] = 1
    assert OPS.all_finite(array)
    for bad in (np.nan, np.inf, -np.inf):
        array[1, 3] = bad
        assert not OPS.all_finite(array)


# ---- rotary embedding and attention ----------------------------------------------------------------------------------


def rope_table(P: int, D: int) -> np.ndarray:
    angles = np.arange(P)[:, None] * 10000.0 ** (-np.arange(D // 2) / (D // 2))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("D", [8, 64])
def test_rope_is_a_complex_rotation_and_fills_the_cache(dtype, with_norm, D):
    rng = np.random.default_rng(4)
    H, KVH, eps = 4, 2, 1e-5
    paging = scattered(rng, [40, 23], OPS.kv_block_size)
    batch = paging.batch([(0, 30, 37), (1, 0, 20)])
    T = batch.positions.size
    qkv = rng.normal(0, 2, (T, (H + 2 * KVH) * D)).astype(dtype)
    norms = {n: rng.normal(1, 0.2, D).astype(np.float32) if with_norm else None for n in ("q_norm", "k_norm")}
    table = rope_table(50, D)
    cache = OPS.new_kv_cache(num_layers=2, num_blocks=total_blocks(paging), num_kv_heads=KVH, head_dim=D, dtype=dtype)
    out = OPS.rope_and_cache(qkv, table, batch, cache, 1, **norms, eps=eps, out=OPS.empty((T, H * D), dtype))

    def expected(heads, norm):
        x = heads.astype(np.float64)
        if norm is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * norm
        turn = table[batch.positions, None, : D // 2] + 1j * table[batch.positions, None, D // 2 :]
        turned = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k, v = np.split(qkv.reshape(T, -1, D), [H, H + KVH], axis=1)
    assert_close(out.reshape(T, H, D), expected(q, norms["q_norm"]), dtype, steps=8)
    block, offset = batch.slot_mapping // 16, batch.slot_mapping % 16
    assert_close(cache.k[1, block, offset], expected(k, norms["k_norm"]), dtype, steps=8)
    np.testing.assert_array_equal(cache.v[1, block, offset], v)
    untouched = np.ones(cache.k.shape[:3], bool)
    untouched[1, block, offset] = False
    assert not cache.k[untouched].any() and not cache.v[untouched].any()


def dense_attention(q, k, v, scale, window):
    """All of one sequence at once in float64: q [n, H, D], k and v [n, KVH, D]; heads repeated, mask added."""
    n, H, _ = q.shape
    k, v = (np.repeat(a, H // a.shape[1], axis=1) for a in (k, v))
    scores = scale * np.einsum("ihd,jhd->hij", q, k)
    i, j = np.indices((n, n))
    visible = (j <= i) if window is None else (j <= i) & (i - j < window)
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 7, 16, 100])
@pytest.mark.parametrize("H, KVH", [(4, 4), (6, 2), (7, 1)])
def test_attention_equals_dense_masks_however_it_is_chunked(dtype, window, H, KVH):
    rng = np.random.default_rng(5)
    D, lengths = 16, [45, 18]
    paging = scattered(rng, lengths, OPS.kv_block_size)
    cache = OPS.new_kv_cache(num_layers=2, num_blocks=total_blocks(paging), num_kv_heads=KVH, head_dim=D, dtype=dtype)
    no_rotation = np.concatenate([np.ones((64, D // 2)), np.zeros((64, D // 2))], axis=1).astype(np.float32)
    qkv = [rng.normal(0, 1, (n, (H + 2 * KVH) * D)).astype(dtype) for n in lengths]

    def step(spans):
        batch = paging.batch(spans)
        rows = np.concatenate([qkv[s][start:stop] for s, start, stop in spans])
        T = len(rows)
        q = OPS.rope_and_cache(
            rows, no_rotation, batch, cache, 1, q_norm=None, k_norm=None, eps=0.0, out=OPS.empty((T, H * D), dtype)
        )
        return OPS.attention(q, batch, cache, 1, scale=0.3, window=window, out=OPS.empty((T, H * D), dtype))

    together = step([(0, 0, 45), (1, 0, 18)])
    for s, rows in ((0, together[:45]), (1, together[45:])):
        q, k, v = np.split(qkv[s].reshape(lengths[s], -1, D).astype(np.float64), [H, H + KVH], axis=1)
        expected = dense_attention(q, k, v, 0.3, window).reshape(rows.shape)
        assert_close(rows, expected, dtype, steps=2)
    pieces = [step([(0, 0, 17)]), step([(1, 0, 9), (0, 17, 18)]), step([(0, 18, 45), (1, 9, 18)])]
    chunked = np.concatenate([pieces[0], pieces[1][9:], pieces[2][:27], pieces[1][:9], pieces[2][27:]])
    np.testing.assert_array_equal(chunked, together)
