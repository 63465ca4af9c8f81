"""SharQ's public functions against the scalar formulation bit for bit, and its products against float64."""

from __future__ import annotations

from fractions import Fraction

import fp4_scalar as scalar
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument, NumericalError
from engine.fp4_types import Fp4Matrix, SharqOperand
from engine.ops.reference import ReferenceOps
from engine.quant import fp4, sharq

BF16 = ml_dtypes.bfloat16
FORMATS = ["nvfp4", "mxfp4", "hif4"]
FIELDS = ["g", "backbone", "meta", "backbone_scale", "residual", "residual_scale"]
MODES = [(format, sparse) for format in FORMATS for sparse in (True, False)]
LEGAL_NIBBLES = {0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def fields(operand: SharqOperand, row: int) -> dict[str, object]:
    """One row of every field, as lists of whole numbers."""
    arrays = {name: getattr(operand, name) for name in FIELDS}
    out = {name: None if array is None else array[row].tolist() for name, array in arrays.items()}
    return out | {"g": Fraction(float(operand.g[row]))}


def assert_equals_scalar(x: np.ndarray, format: str, sparse: bool, every: int = 1) -> None:
    """Compares every `every`-th row."""
    operand = sharq.prepare(x, format=format, sparse=sparse)
    for t in range(0, len(x), every):
        expected = scalar.sharq_row(x[t].astype(np.float32).tolist(), format, sparse)
        actual = fields(operand, t)
        for name in FIELDS:
            assert actual[name] == expected[name], f"row {t}: {name}"


def hard_rows(K: int) -> np.ndarray:
    """Rows [R, K] float32: ties everywhere, zeros of both signs, equals, subnormals, outliers, the ends of fp32."""
    r = rng(K)
    normal = r.standard_normal((4, K))
    unit = np.where(np.arange(K) == K - 1, 2688.0, 1.0)  # makes g exactly 1
    steps = np.repeat(2.0 ** r.integers(-9, 6, K // 16), 16)  # a step per 16: many block scales
    ties = r.choice([0.25, 0.75, -1.25, 1.75, -2.5, 3.5, 5.0, 6.0, -6.0], K) * steps
    scale_ties = np.where(np.arange(K) % 16 == 3, 6 * (8.5 + r.integers(0, 7, K)) / 8, r.integers(-3, 4, K) / 4)
    outlier, two_outliers = normal[0] * 1e-3, normal[1].copy()
    outlier[K // 2] = 1e4
    two_outliers[[1, K - 2]] = -300.0, 299.0
    rows = [
        normal[2],
        np.where(unit == 1, ties, unit),
        np.where(unit == 1, scale_ties, unit),
        np.where(unit == 1, r.integers(-4, 5, K) * 2.0**-11, unit),  # below the smallest scale's first border
        np.zeros(K),
        np.full(K, -0.0),
        np.full(K, -1.7),
        np.where(np.arange(K) % 3, 0.3, -0.3),
        r.integers(-2, 3, K) * 1.0,
        np.where(r.random(K) < 0.95, -0.0, normal[3]),
        outlier,
        two_outliers,
        -np.abs(normal[0]) * 1e-30,  # g at its smallest
        normal[1] * 1e-42,  # fp32 subnormals
        normal[2] * 5e37,
    ]
    return np.array(rows, np.float32)


# ---- prepare, bit for bit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "sparse"), MODES)
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_hard_rows_equal_the_scalar_formulation(format, sparse, dtype):
    assert_equals_scalar(hard_rows(128).astype(dtype), format, sparse)


@pytest.mark.parametrize(("T", "K"), [(1, 64), (300, 64), (2, 192), (1, 18944)])
@pytest.mark.parametrize("format", FORMATS)
def test_sizes_from_least_to_largest(format, T, K):
    channels = np.exp(rng(2).standard_normal(K))
    assert_equals_scalar((rng(1).standard_normal((T, K)) * channels).astype(BF16), format, sparse=True, every=23)


@pytest.mark.parametrize("sparse", [True, False])
def test_smallest_k(sparse):
    for format in ("nvfp4", "mxfp4"):
        assert_equals_scalar(hard_rows(32), format, sparse)


small_values = st.one_of(
    st.sampled_from([0.0, -0.0, 0.25, -0.75, 1.25, 2.5, 5.0, -6.0, 2688.0, 1e-9, -1e-45]),
    st.floats(-(2.0**127), 2.0**127, width=32),
    st.integers(-(2**15), 2**15).map(lambda i: i / 256),
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(MODES), st.lists(small_values, min_size=64, max_size=64))
def test_any_numbers_equal_the_scalar_formulation(mode, values):
    assert_equals_scalar(np.array([values], np.float32), *mode)


def test_one_global_scale_for_a_tensor():
    x = hard_rows(64)[[0, 7, 10]]
    operand = sharq.prepare(x, scale="tensor")
    g = scalar.global_scale(Fraction(float(np.abs(x).max())))
    for t, row in enumerate(x):
        expected = scalar.sharq_row(row.tolist(), "nvfp4", True, g)
        assert {name: fields(operand, t)[name] for name in FIELDS} == expected


def test_no_rows_is_no_error():
    for format, sparse in MODES:
        operand = sharq.prepare(np.zeros((0, 64), np.float32), format=format, sparse=sparse)
        assert (operand.T, operand.K, operand.sparse) == (0, 64, sparse)
    assert sharq.prepare(np.zeros((0, 64), np.float32), scale="tensor").g.shape == (0,)


def test_rmsnorm_then_prepare():
    """The fused form is the norm, rounded once to bf16, then `prepare`: the scalar formulation takes over there."""
    x, weight = rng(3).standard_normal((3, 1056)).astype(BF16), rng(4).standard_normal(1056).astype(np.float32)
    operand = sharq.prepare_rmsnorm(x, weight, 1e-6)
    normed = ReferenceOps().rms_norm(x.astype(np.float32), weight, 1e-6, out=np.empty(x.shape, np.float32))
    for t, row in enumerate(normed):
        rounded = [float(v) * (-1 if n else 1) for n, v in ((n, scalar.bf16(v)) for n, v in map(scalar.number, row))]
        assert {name: fields(operand, t)[name] for name in FIELDS} == scalar.sharq_row(rounded, "nvfp4", True)
    x64 = x.astype(np.float64)
    expected = x64 / np.sqrt((x64**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    assert np.linalg.norm(sharq.dequantize(operand) - expected) < 0.06 * np.linalg.norm(expected)


def test_silu_mul_then_prepare():
    gate_up = rng(5).standard_normal((3, 128)).astype(BF16)
    operand = sharq.prepare_silu_mul(gate_up, sparse=False)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert np.linalg.norm(sharq.dequantize(operand) - expected) < 0.03 * np.linalg.norm(expected)


# ---- what must hold of any operand -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "sparse"), MODES)
def test_a_row_alone_is_the_row_in_a_batch(format, sparse):
    x = np.concatenate([hard_rows(128), rng(6).standard_normal((285, 128)).astype(np.float32)])
    w = sharq.quantize_weight(rng(7).standard_normal((19, 128)).astype(np.float32), format=format)
    together = sharq.prepare(x, format=format, sparse=sparse)
    y = sharq.matmul(together, w)
    for t in (0, 1, 10, 11, 14, 150, 299):
        alone = sharq.prepare(x[t : t + 1], format=format, sparse=sparse)
        assert fields(alone, 0) == fields(together, t)
        assert sharq.matmul(alone, w).tobytes() == y[t : t + 1].tobytes()


def test_a_tensor_wide_scale_lets_rows_influence_each_other():
    x = rng(8).standard_normal((2, 64)).astype(np.float32)
    x[1] *= 1000
    alone, together = sharq.prepare(x[:1], scale="tensor"), sharq.prepare(x, scale="tensor")
    assert alone.g[0] != together.g[0] == together.g[1]


@pytest.mark.parametrize("format", FORMATS)
def test_metadata_is_legal_and_keeps_the_largest(format):
    x = hard_rows(256)
    meta = sharq.prepare(x, format=format).meta
    assert meta is not None
    nibbles = np.stack([meta & 15, meta >> 4], axis=-1).reshape(len(x), -1)
    assert set(nibbles.ravel().tolist()) <= LEGAL_NIBBLES
    assert set(LEGAL_NIBBLES) == set(nibbles.ravel().tolist())  # hard enough to have met them all
    x = x.astype(BF16).astype(np.float64)
    scores = np.abs(x).reshape(len(x), nibbles.shape[1], 4, -1).max(axis=-1)
    kept = np.stack([nibbles & 3, nibbles >> 2], axis=-1)
    least_kept = np.take_along_axis(scores, kept, axis=-1).min(axis=-1)
    if format != "nvfp4":  # there the mask sees x / g, where unequal numbers may have become equal
        assert (least_kept == np.sort(scores, axis=-1)[..., 2]).all()
    assert (least_kept >= np.sort(scores, axis=-1)[..., 2] * (1 - 2.0**-7)).all()


@pytest.mark.parametrize("sparse", [True, False])
def test_the_residual_leaves_less_than_its_own_step(sparse):
    """|x − g·(backbone + residual)| ≤ one residual scale (half of E2M1's widest gap), plus x's rounding to bf16."""
    x = rng(9).standard_t(3, (40, 512)).astype(np.float32)
    operand = sharq.prepare(x, sparse=sparse)
    step = operand.residual_scale.view(ml_dtypes.float8_e4m3fn).astype(np.float64).repeat(16, axis=1)
    error = np.abs(x / operand.g[:, None].astype(np.float64) - sharq.dequantize(operand) / operand.g[:, None])
    assert (error <= step + 2.0**-8 * np.abs(x / operand.g[:, None])).all()


def test_a_sparse_backbone_is_exactly_half():
    operand = sharq.prepare(rng(10).standard_normal((5, 256)).astype(np.float32))
    none = np.zeros_like(operand.residual)
    backbone = SharqOperand(
        operand.g, operand.backbone, operand.meta, operand.backbone_scale, none, operand.residual_scale
    )
    chunks = sharq.dequantize(backbone).reshape(5, 32, 4, 2)
    assert ((chunks != 0).any(axis=-1).sum(axis=-1) == 2).all()


# ---- products --------------------------------------------------------------------------------------------------------


def relative_to_largest(y: np.ndarray, a: np.ndarray, w: np.ndarray) -> float:
    expected = a.astype(np.float64) @ w.astype(np.float64).T
    return float(np.abs(y - expected).max() / np.abs(expected).max())


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(MODES),
    st.integers(1, 9),
    st.integers(8, 41),  # enough outputs that the largest is not all cancellation
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)
def test_matmul_is_the_product_of_what_the_codes_say(mode, T, N, blocks, seed):
    format, sparse = mode
    K = blocks * (64 if format == "hif4" else 32)
    x = rng(seed).standard_t(2, (T, K)).astype(np.float32)
    w = rng(seed + 1).standard_t(4, (N, K)).astype(np.float32)
    operand, weight = sharq.prepare(x, format=format, sparse=sparse), sharq.quantize_weight(w, format=format)
    y = sharq.matmul(operand, weight)
    assert (y.dtype, y.shape) == (np.float32, (T, N))
    assert relative_to_largest(y, sharq.dequantize(operand), sharq.dequantize(weight)) <= 2e-6
    halves = sharq.sparse_matmul(operand, weight).astype(np.float64) + sharq.dense_matmul(operand, weight)
    assert np.abs(halves - y).max() <= 2e-6 * np.abs(y).max()
    plain = fp4.prepare(x, format=format)
    assert relative_to_largest(fp4.matmul(plain, weight), fp4.dequantize(plain), fp4.dequantize(weight)) <= 2e-6


@pytest.mark.parametrize(("format", "sparse"), MODES)
def test_matmul_at_the_largest_k(format, sparse):
    x = (rng(11).standard_normal((3, 18944)) * np.exp(rng(12).standard_normal(18944))).astype(BF16)
    w = (rng(13).standard_normal((5, 18944)) * 0.02).astype(BF16)
    operand, weight = sharq.prepare(x, format=format, sparse=sparse), sharq.quantize_weight(w, format=format)
    y = sharq.matmul(operand, weight)
    assert relative_to_largest(y, sharq.dequantize(operand), sharq.dequantize(weight)) <= 2e-6


def test_dequantize_equals_the_scalar_formulation():
    """Both paths decoded by hand from the stored bytes, once."""
    x = hard_rows(64)[:3]
    operand = sharq.prepare(x)
    for t in range(3):
        row = fields(operand, t)
        values = [Fraction(0)] * 64
        stored = [n for byte in row["backbone"] for n in (byte & 15, byte >> 4)]
        nibbles = [n for byte in row["meta"] for n in (byte & 15, byte >> 4)]
        for c, nibble in enumerate(nibbles):
            for j, k in enumerate(8 * c + 2 * i + e for i in (nibble & 3, nibble >> 2) for e in (0, 1)):
                negative, value = scalar.value_of(scalar.E2M1, stored[4 * c + j])
                values[k] += (-value if negative else value) * scalar.UE4M3[row["backbone_scale"][k // 32]]
        for k, code in enumerate(n for byte in row["residual"] for n in (byte & 15, byte >> 4)):
            negative, value = scalar.value_of(scalar.E2M1, code)
            values[k] += (-value if negative else value) * scalar.UE4M3[row["residual_scale"][k // 16]]
        expected = [float(v) * float(row["g"]) for v in values]
        np.testing.assert_allclose(sharq.dequantize(operand)[t], expected, rtol=2.0**-23)


def test_one_payload_serves_both_scale_views():
    """The dense product is bitwise the same whether it reads the weight's scales per 32 or each twice, per 16."""
    x, w = rng(14).standard_normal((4, 224)).astype(np.float32), rng(15).standard_normal((7, 224)).astype(np.float32)
    operand, w32 = sharq.prepare(x), sharq.quantize_weight(w)
    assert w32.payload.shape == (7, 112) and w32.scale.shape == (7, 7) and len(set(w32.g.tolist())) == 1
    per_16 = Fp4Matrix("nvfp4", w32.payload, w32.scale.repeat(2, axis=1), w32.g)
    assert sharq.dense_matmul(operand, w32).tobytes() == sharq.dense_matmul(operand, per_16).tobytes()
    assert (sharq.dequantize(w32) == sharq.dequantize(per_16)).all()


def test_published_weights_in_blocks_of_16():
    x, w = rng(16).standard_normal((4, 96)).astype(np.float32), rng(17).standard_normal((7, 96)).astype(np.float32)
    operand, w16 = sharq.prepare(x), fp4.quantize_weight(w, block=16)
    assert relative_to_largest(sharq.matmul(operand, w16), sharq.dequantize(operand), sharq.dequantize(w16)) <= 2e-6


def test_both_zeros_are_zero():
    operand, w = sharq.prepare(np.zeros((2, 64), np.float32)), rng(18).standard_normal((3, 64)).astype(np.float32)
    minus = SharqOperand(
        operand.g, operand.backbone | 0x88, operand.meta, operand.backbone_scale, operand.residual | 0x88,
        operand.residual_scale,
    )  # fmt: skip
    assert (sharq.matmul(minus, sharq.quantize_weight(w)) == 0).all()
    assert (sharq.dequantize(minus) == 0).all()


# ---- what it is for --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outlier", "nvfp4", "sharq_w32", "sharq_w16", "alone_nvfp4", "alone_sharq"),
    [(1.0, 0.130, 0.111, 0.100, 0.093, 0.039), (50.0, 0.108, 0.099, 0.089, 0.062, 0.016)],
    ids=["moderate", "heavy outliers"],
)
def test_the_known_ladder_of_errors(outlier, nvfp4, sharq_w32, sharq_w16, alone_nvfp4, alone_sharq):
    """Relative output errors on synthetic activations, K = 2048, near the figures known from another implementation."""
    K, r = 2048, rng(19)
    channels = np.exp(0.4 * r.standard_normal(K))
    channels[r.choice(K, 8, replace=False)] *= outlier
    x = (r.standard_normal((32, K)) * channels).astype(np.float32)
    w = (r.standard_normal((128, K)) * 0.02).astype(np.float32)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    one_path, two_paths, dense_paths = fp4.prepare(x), sharq.prepare(x), sharq.prepare(x, sparse=False)
    w16, w32, sweep = fp4.quantize_weight(w), sharq.quantize_weight(w), sharq.quantize_weight(w, grade="sweep")

    def error(y: np.ndarray) -> float:
        return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))

    def of_activations(operand: SharqOperand | Fp4Matrix) -> float:
        return error(sharq.dequantize(operand).astype(np.float64) @ w.astype(np.float64).T)

    ladder = [
        error(fp4.matmul(one_path, w16)),
        error(sharq.matmul(two_paths, w32)),
        error(sharq.matmul(two_paths, w16)),
    ]
    np.testing.assert_allclose(ladder, [nvfp4, sharq_w32, sharq_w16], rtol=0.15)
    assert ladder[0] > ladder[1] > ladder[2] > error(sharq.matmul(dense_paths, w16))
    assert error(sharq.matmul(two_paths, sweep)) < ladder[1]
    alone = [of_activations(one_path), of_activations(two_paths), of_activations(dense_paths)]
    np.testing.assert_allclose(alone[:2], [alone_nvfp4, alone_sharq], rtol=0.25)
    assert alone[0] > alone[1] > alone[2]


# ---- refusals --------------------------------------------------------------------------------------------------------

GOOD = np.ones((2, 64), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.ones((2, 48), np.float32)}, "multiple of 32, not 48"),
        ({"x": np.ones((2, 32), np.float32), "format": "hif4"}, "multiple of 64, not 32"),
        ({"x": np.ones((2, 0), np.float32)}, "multiple of 32, not 0"),
        ({"x": np.ones(64, np.float32)}, "2 dimensions"),
        ({"x": np.ones((2, 64))}, "float32 or bfloat16, not float64"),
        ({"x": np.ones((2, 64), np.int32)}, "not int32"),
        ({"x": GOOD, "format": "fp5"}, "unknown FP4 format 'fp5'"),
        ({"x": GOOD, "scale": "row"}, "'token' or 'tensor', not 'row'"),
        ({"x": GOOD, "format": "mxfp4", "scale": "tensor"}, "no global scale"),
    ],
)
def test_prepare_refuses(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        sharq.prepare(**arguments)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_not_finite_is_refused(bad, dtype):
    x = GOOD.astype(dtype)
    x[1, 63] = bad
    for format in FORMATS:
        for call in (sharq.prepare, sharq.quantize_weight, fp4.prepare, fp4.quantize_weight):
            with pytest.raises(NumericalError, match="NaN or infinity"):
                call(x, format=format)
    with pytest.raises(NumericalError):
        sharq.prepare_rmsnorm(x, np.ones(64, np.float32), 1e-6)
    with pytest.raises(NumericalError):
        sharq.prepare_silu_mul(np.concatenate([x, x], axis=1))


def test_beyond_bf16_is_refused_where_there_is_no_global_scale():
    x = np.full((1, 64), np.finfo(np.float32).max)
    assert sharq.prepare(x).g[0] == np.float32(np.finfo(np.float32).max) / np.float32(2688)
    for format in ("mxfp4", "hif4"):
        for call in (sharq.prepare, sharq.quantize_weight):
            with pytest.raises(NumericalError, match="bfloat16"):
                call(x, format=format)


def test_products_refuse_what_does_not_fit():
    operand, w = sharq.prepare(GOOD), sharq.quantize_weight(np.ones((3, 32), np.float32))
    with pytest.raises(InvalidArgument, match="K = 64 do not multiply weights with K = 32"):
        sharq.matmul(operand, w)
    with pytest.raises(InvalidArgument, match="nvfp4 do not multiply weights in mxfp4"):
        sharq.dense_matmul(operand, sharq.quantize_weight(GOOD, format="mxfp4"))
    with pytest.raises(InvalidArgument, match="weight must be float32 of shape"):
        sharq.prepare_rmsnorm(GOOD, np.ones(32, np.float32), 1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("payload", np.zeros((3, 32), np.int8)),
        ("payload", np.zeros(96, np.uint8)),
        ("scale", np.zeros((3, 1), np.uint8)),
        ("scale", np.zeros((2, 4), np.uint8)),
        ("scale", np.zeros((3, 4), np.float32)),
        ("g", np.ones(3)),
        ("g", np.float32(1)),
        ("format", "int4"),
    ],
)
def test_matrices_refuse_arrays_that_do_not_fit(field, value):
    arrays = {
        "format": "nvfp4", "payload": np.zeros((3, 32), np.uint8), "scale": np.zeros((3, 4), np.uint8),
        "g": np.ones(3, np.float32),
    }  # fmt: skip
    Fp4Matrix(**arrays)
    with pytest.raises(InvalidArgument):
        Fp4Matrix(**arrays | {field: value})


@pytest.mark.parametrize("field", FIELDS)
def test_operands_refuse_arrays_that_do_not_fit(field):
    operand = sharq.prepare(GOOD)
    arrays = {name: getattr(operand, name) for name in FIELDS}
    SharqOperand(**arrays)
    with pytest.raises(InvalidArgument):
        SharqOperand(**arrays | {field: arrays[field][:, :-1] if arrays[field].ndim == 2 else arrays[field][:-1]})
    with pytest.raises(InvalidArgument):
        SharqOperand(**arrays | {field: arrays[field].astype(np.int16)})
