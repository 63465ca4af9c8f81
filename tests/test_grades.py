"""Weight grades against the scalar formulation bit for bit, which tries all 40 factors of a sweep one by one."""

from __future__ import annotations

from fractions import Fraction

import fp4_scalar as scalar
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.ops.fp4 import grades
from engine.ops.fp4.blocks import block_format
from engine.ops.fp4.scales import E6M2_VALUES, E8M0_VALUES, UE4M3_VALUES
from engine.quant import fp4, sharq

FACTORS = [Fraction(float(f)) for f in np.linspace(0.65, 1.6, 40).astype(np.float32)]
KINDS = [("nvfp4", 16), ("nvfp4", 32), ("mxfp4", 32), ("hif4", 64)]
CASES = [(f, b, g) for f, b in KINDS for g in ("rtn", "4over6", "sweep") if g != "4over6" or f == "nvfp4"]


def assert_equals_scalar(w: np.ndarray, format: str, block: int, grade: str) -> None:
    m = fp4.quantize_weight(w, format=format, block=block, grade=grade)
    rows = w.astype(np.float32).tolist()
    g, payload, scale = scalar.graded_shard(rows, format, block, grade, FACTORS)
    assert (m.format, m.block, {Fraction(float(v)) for v in m.g}) == (format, block, {g})
    assert m.scale.tolist() == scale
    assert m.payload.tolist() == payload


def hard_weights(K: int = 64) -> np.ndarray:
    r = np.random.default_rng(0)
    outlier = r.standard_normal(K) * 0.01
    outlier[5] = 3.0
    rows = [
        r.standard_normal(K) * 0.02,
        r.standard_t(3, K) * 0.02,
        outlier,
        np.zeros(K),
        np.full(K, -0.5),  # every candidate can be exact: ties between scales
        r.choice([0.5, 1, 1.5, 2, 3, 4, 6], K) / 2,  # exact under amax/6
        r.choice([0.5, 1, 2, 3, 4], K) / 2,  # exact under amax/4
        r.standard_normal(K) * 1e-7,  # subnormal block scales
        np.where(np.arange(K) % 16 == 0, -1.0, -0.0),
    ]
    return np.array(rows, np.float32)


@pytest.mark.parametrize(("format", "block", "grade"), CASES)
def test_hard_weights_equal_the_scalar_formulation(format, block, grade):
    assert_equals_scalar(hard_weights(), format, block, grade)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights(dtype):
    assert_equals_scalar(hard_weights()[:3].astype(dtype), "nvfp4", 32, "sweep")


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(CASES), st.integers(0, 2**32 - 1), st.floats(1.5, 30))
def test_random_weights_equal_the_scalar_formulation(case, seed, freedom):
    w = np.random.default_rng(seed).standard_t(freedom, (1, 64)).astype(np.float32)
    assert_equals_scalar(w, *case)


def test_chunks_do_not_show(monkeypatch):
    w = np.random.default_rng(1).standard_normal((23, 64)).astype(np.float32)
    whole = sharq.quantize_weight(w, grade="sweep")
    monkeypatch.setattr(grades, "_CHUNK", 5 * 64)
    parts = sharq.quantize_weight(w, grade="sweep")
    assert (whole.payload == parts.payload).all() and (whole.scale == parts.scale).all()
    assert (whole.g == parts.g).all()


@pytest.mark.parametrize(("format", "block"), KINDS)
def test_errors_to_the_last_bit(format, block):
    """The sums of squares themselves, in the defined order, under scales that are not the best."""
    r = np.random.default_rng(4)
    x = r.standard_normal((20, block)).astype(ml_dtypes.bfloat16).astype(np.float32)
    fmt = block_format(format, block)
    for factor in (0.7, 1.0, 1.3):
        byte = fmt.scale_byte(np.abs(x).max(axis=-1) * np.float32(factor))
        errors = grades.squared_error(x, fmt.complete(byte, x), fmt)
        for row, scale, error in zip(x, byte.tolist(), errors, strict=True):
            numbers = [scalar.number(v) for v in row]
            assert Fraction(float(error)) == scalar.squared_error(numbers, scalar.BLOCK[format](numbers, scale)[2])


@pytest.mark.parametrize(("format", "block"), KINDS)
def test_candidates_of_a_sweep_are_those_of_its_40_factors(format, block):
    amax = np.float32(np.exp(np.random.default_rng(5).uniform(-12, 7.8, 100)))
    tried = np.array(list(grades.candidates(amax, block_format(format, block), "sweep")))
    for a, column in zip(amax, tried.T, strict=True):
        expected = [scalar.SCALE[format](scalar.fp32(Fraction(float(a)) * f)) for f in FACTORS]
        assert list(dict.fromkeys(column.tolist())) == list(dict.fromkeys(expected))


@pytest.mark.parametrize("values", [UE4M3_VALUES[1:127], E8M0_VALUES[:253], E6M2_VALUES[:255]])
def test_a_sweep_skips_no_scale(values):
    """What lets `sweep` walk the codes: adjacent factors are closer than the two borders of any scale's interval."""
    borders = (values[1:] + values[:-1]).astype(np.float64) / 2
    assert (borders[1:] / borders[:-1]).min() > max(b / a for a, b in zip(FACTORS, FACTORS[1:], strict=False)) * 1.01


def error_of(w: np.ndarray, **options: object) -> float:
    return float(((fp4.dequantize(fp4.quantize_weight(w, **options)).astype(np.float64) - w) ** 2).sum())


@pytest.mark.parametrize("freedom", [4, 1000], ids=["heavy tails", "nearly normal"])
def test_better_grades_have_smaller_errors(freedom):
    w = (np.random.default_rng(2).standard_t(freedom, (64, 512)) * 0.02).astype(np.float32)
    for block in (16, 32):
        rtn, four, sweep = (error_of(w, block=block, grade=g) for g in ("rtn", "4over6", "sweep"))
        assert sweep < 0.93 * four < 0.93 * rtn
    for format in ("mxfp4", "hif4"):
        assert error_of(w, format=format, grade="sweep") < 0.97 * error_of(w, format=format, grade="rtn")


def test_no_block_of_a_sweep_is_worse_than_rtn():
    w = np.random.default_rng(3).standard_normal((16, 256)).astype(np.float32)
    by_block = {
        g: ((sharq.dequantize(sharq.quantize_weight(w, grade=g)) - w).reshape(-1, 32) ** 2).sum(axis=1)
        for g in ("rtn", "sweep")
    }
    assert (by_block["sweep"] <= by_block["rtn"] * (1 + 1e-2)).all()  # the search sees bf16(w / g), not w


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grade": "best"}, "unknown weight grade 'best'; known: rtn, 4over6, sweep"),
        ({"grade": "4over6", "format": "hif4"}, "defined for nvfp4, not for hif4"),
        ({"block": 64}, "no blocks of 64; it has 16 and 32"),
        ({"format": "mxfp4", "block": 16}, "no blocks of 16; it has 32"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InvalidArgument, match=message):
        fp4.quantize_weight(hard_weights(), **options)
    with pytest.raises(InvalidArgument, match="multiple of 16, not 24"):
        fp4.quantize_weight(np.ones((2, 24), np.float32))
    with pytest.raises(InvalidArgument, match="at least one row"):
        fp4.quantize_weight(np.ones((0, 32), np.float32))
