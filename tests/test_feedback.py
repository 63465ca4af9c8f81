"""Codes that make up for each other's errors: NumPy against linear solves and all codes tried; C++ against NumPy."""

from __future__ import annotations

from itertools import product

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.ops.fp4 import feedback
from engine.ops.fp4.blocks import block_format, decode
from engine.ops.fp4.elements import unpack
from engine.ops.fp4.feedback import Feedback
from engine.ops.fp4.grades import candidates, global_scale
from engine.ops.reference import ReferenceOps

try:
    from engine.ops.cpu import CpuOps, available_isas

    BACKENDS = {isa: CpuOps(2, isa) for isa in available_isas()}
except ImportError:  # the definition is tested all the same
    BACKENDS = {}

F32, F16, BF16 = (np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = np.concatenate([E2M1, -E2M1])
KINDS = [("nvfp4", 16), ("nvfp4", 32), ("mxfp4", 32)]
REFERENCE = ReferenceOps()
each_kind = pytest.mark.parametrize(("format", "block"), KINDS)
each_isa = pytest.mark.parametrize("isa", BACKENDS)


def rng(seed):
    return np.random.default_rng(seed)


def weights(seed, N=70, K=64, dtype=BF16):
    return (rng(seed).standard_t(4, (N, K)) * 0.02).astype(dtype)


def moments(seed, K=64, strong=8):
    """Inputs that lie near a few directions."""
    x = rng(seed).standard_normal((4 * K, strong)) @ rng(seed + 1).standard_normal((strong, K)) * 2
    x += rng(seed + 2).standard_normal(x.shape)
    return x.T @ x / len(x)


def quantized(ops, w, H, format="nvfp4", block=32):
    fmt = block_format(format, block)
    return ops.quantize_feedback(w, global_scale(w, fmt, "sweep")[0], Feedback.of(H), format=format, block=block)


def values(m):
    """Without the global scale."""
    return decode(unpack(m.payload), m.scale, block_format(m.format, m.block)).astype(np.float64)


def unit_of(m):
    bits = m.scale.view(ml_dtypes.float8_e4m3fn if m.format == "nvfp4" else ml_dtypes.float8_e8m0fnu)
    return np.repeat(bits.astype(np.float64), m.block, axis=1)


def divided(w, m):
    return (w.astype(np.float32) / m.g[:, None]).astype(BF16).astype(np.float64)


def loss(error, H):
    return ((error @ H) * error).sum(axis=-1)


def where_the_rest_goes(H, error, k):
    """Errors that elements from k on would have if they were free: those with the smallest d H dᵀ, given d before k."""
    return -np.linalg.solve(H[k:, k:], H[k:, :k] @ error[..., :k, None])[..., 0]


# ---- the definition --------------------------------------------------------------------------------------------------


@each_kind
def test_each_code_is_the_nearest_to_where_a_linear_solve_puts_it(monkeypatch, format, block):
    monkeypatch.setattr(feedback, "REFINEMENTS", 0)
    w, H = weights(3), moments(3)
    m = quantized(REFERENCE, w, H, format, block)
    x, unit, chosen = divided(w, m), unit_of(m), values(m)
    for k in range(64):
        target = x[:, k] + where_the_rest_goes(H, chosen - x, k)[:, 0]
        distance = np.abs(target[:, None] - VALUES * unit[:, k, None]).min(axis=1)
        missed = np.abs(target - chosen[:, k]) - distance
        assert (missed <= 1e-4 * unit[:, k]).all()  # fp32 against fp64: nothing but ties may fall otherwise


@each_kind
def test_a_block_has_the_scale_that_costs_least_once_the_rest_has_made_up_for_it(monkeypatch, format, block):
    """Each scale that `sweep` tries for the second block, its codes by linear solves, the rest left free."""
    monkeypatch.setattr(feedback, "REFINEMENTS", 0)
    w, H = weights(4, N=12, K=96), moments(4, K=96)
    m = quantized(REFERENCE, w, H, format, block)
    fmt, x, chosen = block_format(format, block), divided(w, m), values(m)
    target = x[:, block:] + where_the_rest_goes(H, chosen - x, block)
    amax = np.abs(target[:, :block]).max(axis=1).astype(np.float32)

    def cost(error):
        done = error.copy()
        done[:, 2 * block :] = where_the_rest_goes(H, error, 2 * block) if 2 * block < 96 else 0
        return loss(done, H)

    tried = []
    for scale in candidates(amax, fmt, "sweep"):
        error = chosen - x
        step = 2 * fmt.unit(scale).astype(np.float64)
        for k in range(block, 2 * block):
            wanted = x[:, k] + where_the_rest_goes(H, error, k)[:, 0]
            nearest = np.abs(wanted[:, None] - VALUES * step[:, None]).argmin(axis=1)
            error[:, k] = VALUES[nearest] * step - x[:, k]
        tried.append(cost(error))
    assert len(tried) > 1
    assert (cost(chosen - x) <= np.min(tried, axis=0) * (1 + 1e-4)).all()


@each_kind
def test_refinement_chooses_the_best_of_all_codes_one_by_one(monkeypatch, format, block):
    w, H = weights(5, N=5), moments(5)
    monkeypatch.setattr(feedback, "REFINEMENTS", 0)
    m = quantized(REFERENCE, w, H, format, block)
    x, unit, current = divided(w, m), unit_of(m), values(m)
    for k in range(64):
        tried = np.repeat(current[:, None], len(VALUES), axis=1)  # [N, codes, K]
        tried[:, :, k] = VALUES * unit[:, k, None]
        current[:, k] = VALUES[loss(tried - x[:, None], H).argmin(axis=1)] * unit[:, k]
    monkeypatch.setattr(feedback, "REFINEMENTS", 1)
    refined = quantized(REFERENCE, w, H, format, block)
    np.testing.assert_array_equal(refined.scale, m.scale)
    np.testing.assert_array_equal(values(refined), current)


@each_kind
@pytest.mark.parametrize("seed", [6, 7])
def test_rows_lose_less_than_by_sweep_or_rtn(format, block, seed):
    w, H = weights(seed, N=200), moments(seed)
    m = quantized(REFERENCE, w, H, format, block)
    own = loss(values(m) - divided(w, m), H)
    for grade in ("sweep", "rtn"):
        other = REFERENCE.quantize_weight(w, format=format, block=block, grade=grade)
        lost = loss(values(other) - divided(w, other), H)
        assert (own <= lost).mean() > 0.98 and own.sum() < 0.6 * lost.sum()


def test_hard_weights_lose_no_more_than_by_sweep():
    """One outlier a row; all alike; ties throughout; zeros; a strong direction that they all lie in."""
    r, K = rng(8), 64
    w = np.concatenate([
        np.where(r.random((20, K)) < 0.02, 1.0, 0.01 * r.standard_normal((20, K))),
        np.full((1, K), 0.03),
        r.choice([0.25, 0.75, 1.25, 2.5, -5], (20, K)) * 0.01,
        np.zeros((1, K)),
    ]).astype(BF16)  # fmt: skip
    for H in (moments(8), np.eye(K), np.ones((K, K)) + 0.01 * np.eye(K)):
        m = quantized(REFERENCE, w, H)
        other = REFERENCE.quantize_weight(w, format="nvfp4", block=32, grade="sweep")
        own, swept = (loss(values(a) - divided(w, a), H) for a in (m, other))
        assert own.sum() <= swept.sum() * (1 + 1e-6)
        assert not values(m)[-1].any()


def test_between_the_best_of_all_codes_and_sweep():
    """Four elements that matter, the others zero and unrelated: every scale and every four codes are tried."""
    N, free = 12, [1, 4, 5, 9]
    w = np.zeros((N, 16), np.float32)
    w[:, free] = rng(9).standard_normal((N, 4)) * 0.02
    H = np.eye(16)
    H[np.ix_(free, free)] = moments(9, K=4, strong=1)
    m = quantized(REFERENCE, w, H, block=16)
    swept = REFERENCE.quantize_weight(w, format="nvfp4", block=16, grade="sweep")
    x = divided(w, m)
    codes = np.array(list(product(VALUES[[*range(8), *range(9, 16)]], repeat=4)))
    best = np.full(N, np.inf)
    for byte in range(1, 127):
        step = float(np.uint8(byte).view(ml_dtypes.float8_e4m3fn))
        if 2 * step < 0.2 * np.abs(x).max() / 6:
            continue  # far too small for every row's largest
        for n in range(N):
            best[n] = min(best[n], loss(codes * step - x[n, free], H[np.ix_(free, free)]).min())
    own, other = (loss(values(a) - x, H) for a in (m, swept))
    assert (own >= best - 1e-9).all()
    assert own.sum() - best.sum() < 0.5 * (other.sum() - best.sum())


def test_rows_do_not_depend_on_each_other(monkeypatch):
    w, H = weights(10, N=9), moments(10)
    together = quantized(REFERENCE, w, H)
    monkeypatch.setattr(feedback, "_ROWS", 4)
    np.testing.assert_array_equal(quantized(REFERENCE, w, H).payload, together.payload)


# ---- C++ -------------------------------------------------------------------------------------------------------------


def assert_equals_numpy(ops, w, H, format, block):
    actual, expected = quantized(ops, w, H, format, block), quantized(REFERENCE, w, H, format, block)
    assert (actual.format, actual.block) == (expected.format, expected.block)
    for name in ("g", "scale", "payload"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)


@each_isa
@each_kind
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_sizes(isa, format, block, dtype):
    """From a single block; rows and columns that are no multiple of what a thread takes."""
    for N, K in ((1, block), (15, 2 * block), (33, 96), (70, 160)):
        assert_equals_numpy(BACKENDS[isa], weights(N, N, K, dtype), moments(N, K), format, block)


@each_isa
@each_kind
def test_hard_numbers(isa, format, block):
    """Ties, zeros of both signs, an outlier, rows from subnormal to large."""
    r, K = rng(11), 64
    w = r.choice([0.25, 0.75, 1.25, 2.5, -5, 0.0, -0.0], (40, K)) * np.exp2(np.linspace(-140, 30, 40))[:, None]
    w[3, 5] = 2.0**33
    for rows in (w, w[:10], w[20:22]):
        for H in (moments(11), np.eye(K), np.ones((K, K)) + 0.01 * np.eye(K)):
            assert_equals_numpy(BACKENDS[isa], rows.astype(F32), H, format, block)


@pytest.mark.skipif(not BACKENDS, reason="the C++ extension is not built")
@settings(deadline=None, max_examples=8)
@given(st.sampled_from(KINDS), st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([F32, BF16, F16]))
def test_random_weights(kind, seed, N, dtype):
    for ops in BACKENDS.values():
        assert_equals_numpy(ops, weights(seed, N, 96, dtype), moments(seed, 96), *kind)


@pytest.mark.skipif(not BACKENDS, reason="the C++ extension is not built")
@each_kind
def test_strided_rows_and_threads(format, block):
    wide = weights(12, N=200, K=256)
    for threads in (1, 3):
        assert_equals_numpy(CpuOps(threads), wide[::2, 64:192], moments(12, 128), format, block)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "hif4", "block": 64}, "errors are fed back for nvfp4 and mxfp4, not for hif4"),
        ({"block": 64}, "nvfp4 has no blocks of 64"),
        ({"w": np.ones((2, 48), F32)}, "K of w must be a positive multiple of 32, not 48"),
        ({"w": np.ones((0, 64), F32)}, "w must have at least one row"),
        ({"w": np.ones((2, 96), F32)}, r"first must be contiguous float32 \[3, 96, 32\], not float32 \[2, 64, 32\]"),
        ({"w": np.ones((2, 64), np.float64)}, "float64"),
    ],
)
@pytest.mark.skipif(not BACKENDS, reason="the C++ extension is not built")
def test_refusals(options, message):
    arguments = {"w": np.ones((2, 64), F32), "format": "nvfp4", "block": 32} | options
    with pytest.raises(InvalidArgument, match=message):
        next(iter(BACKENDS.values())).quantize_feedback(
            arguments.pop("w"), np.float32(1), Feedback.of(np.eye(64)), **arguments
        )
    if options.get("format") == "hif4":
        with pytest.raises(InvalidArgument, match=message):
            REFERENCE.quantize_feedback(np.ones((2, 64), F32), np.float32(1), Feedback.of(np.eye(64)), **arguments)
