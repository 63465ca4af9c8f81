"""C++ weight quantisation on every instruction set against NumPy bit by bit; NumPy itself: test_grades."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_grades import CASES, KINDS, hard_weights

from engine.errors import InvalidArgument, NumericalError
from engine.ops.reference import ReferenceOps

try:
    from engine.ops.cpu import CpuOps, available_isas
except ImportError as error:
    pytest.skip(f"the C++ extension is not built: {error}", allow_module_level=True)

F32, F16, BF16 = (np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
BACKENDS = {isa: CpuOps(2, isa) for isa in available_isas()}
REFERENCE = ReferenceOps()
each_isa = pytest.mark.parametrize("isa", BACKENDS)
each_case = pytest.mark.parametrize(("format", "block", "grade"), CASES)


def rng(seed):
    return np.random.default_rng(seed)


def assert_equals_numpy(ops, w, format, block, grade):
    kind = {"format": format, "block": block, "grade": grade}
    actual, expected = ops.quantize_weight(w, **kind), REFERENCE.quantize_weight(np.ascontiguousarray(w), **kind)
    assert (actual.format, actual.block) == (expected.format, expected.block)
    for name in ("g", "scale", "payload"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=f"{name} {kind}")


@each_isa
@each_case
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_hard_weights(isa, format, block, grade, dtype):
    """Ties, zeros, subnormal scales, an outlier; together, and each row with the global scale it makes alone."""
    w = hard_weights(192).astype(dtype)
    assert_equals_numpy(BACKENDS[isa], w, format, block, grade)
    for row in w:
        assert_equals_numpy(BACKENDS[isa], row[None], format, block, grade)


@each_isa
@each_case
def test_sizes(isa, format, block, grade):
    """From a single block; numbers of blocks that are no multiple of sixteen; more rows than one range of work."""
    for N, blocks in ((1, 1), (1, 15), (3, 1), (5, 17), (37, 28), (700, 3)):
        w = (rng(N).standard_t(3, (N, blocks * block)) * 0.02).astype(F32)
        assert_equals_numpy(BACKENDS[isa], w, format, block, grade)


@each_isa
@each_case
def test_magnitudes_from_smallest_to_largest(isa, format, block, grade):
    """Every row has its own size, from fp32's subnormals up to what bf16 can just hold."""
    w = rng(1).standard_normal((60, 128)) * np.exp2(np.linspace(-150, 125, 60))[:, None]
    for rows in (w, w[:20], w[30:35]):
        assert_equals_numpy(BACKENDS[isa], rows.astype(F32), format, block, grade)


@each_isa
@each_case
def test_any_finite_bit_patterns(isa, format, block, grade):
    bits = rng(2).integers(0, 2**16, (24, 192), np.uint16)
    w = np.where(bits & 0x7F80 == 0x7F80, bits & 0x807F, bits).astype(np.uint16).view(BF16)
    assert_equals_numpy(BACKENDS[isa], w, format, block, grade)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(CASES), st.integers(0, 2**32 - 1), st.floats(1.2, 30), st.sampled_from([F32, BF16, F16]))
def test_random_weights(case, seed, freedom, dtype):
    w = (rng(seed).standard_t(freedom, (7, 320)) * 0.02).astype(dtype)
    for ops in BACKENDS.values():
        assert_equals_numpy(ops, w, *case)


@each_case
def test_strided_rows_and_threads(format, block, grade):
    wide = (rng(3).standard_normal((40, 512)) * 0.1).astype(BF16)
    for threads in (1, 3):
        assert_equals_numpy(CpuOps(threads), wide[::2, 64:384], format, block, grade)


@each_isa
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_refused(isa, bad):
    w = np.ones((70, 64), F32)
    w[69, 63] = bad
    for ops in (BACKENDS[isa], REFERENCE):
        for format, block in KINDS:
            with pytest.raises(NumericalError, match="the weight holds NaN or infinity"):
                ops.quantize_weight(w, format=format, block=block, grade="rtn")


@each_isa
def test_beyond_bf16_is_refused_where_there_is_no_global_scale(isa):
    for largest, fits in ((np.nextafter(F32.type(0x1FF << 119), F32.type(0)), True), (F32.type(0x1FF << 119), False)):
        w = np.full((2, 64), largest, F32)
        assert_equals_numpy(BACKENDS[isa], w, "nvfp4", 32, "sweep")
        for format, block in (("mxfp4", 32), ("hif4", 64)):
            if fits:
                assert_equals_numpy(BACKENDS[isa], w, format, block, "sweep")
                continue
            for ops in (BACKENDS[isa], REFERENCE):
                with pytest.raises(NumericalError, match=r"magnitude, 3.39\d*e\+38, is infinite in bfloat16"):
                    ops.quantize_weight(w, format=format, block=block, grade="sweep")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grade": "best"}, "unknown weight grade 'best'; known: rtn, 4over6, sweep"),
        ({"grade": "4over6", "format": "hif4", "block": 64}, "4over6 is defined for nvfp4, not for hif4"),
        ({"block": 64}, "nvfp4 has no blocks of 64"),
        ({"format": "mxfp4", "block": 16}, "mxfp4 has no blocks of 16"),
        ({"w": np.ones((2, 48), F32)}, "K of w must be a positive multiple of 32, not 48"),
        ({"w": np.ones((0, 32), F32)}, "w must have at least one row"),
        ({"w": np.ones((2, 32), np.float64)}, "float64"),
        ({"w": np.ones((2, 64), F32)[:, ::2]}, "contiguous"),
    ],
)
def test_refusals(options, message):
    arguments = {"w": np.ones((2, 64), F32), "format": "nvfp4", "block": 32, "grade": "sweep"} | options
    with pytest.raises(InvalidArgument, match=message):
        BACKENDS[next(iter(BACKENDS))].quantize_weight(**arguments)
