"""The weight grade `gram` against second formulations: linear solves in float64, all sixteen codes tried one by one."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from test_quantize_cli import opened
from tiny_models import write_model

from engine.config import QuantConfig
from engine.errors import InvalidArgument, NumericalError
from engine.fp4_types import Fp4Matrix
from engine.ops.fp4.blocks import block_format
from engine.ops.reference import ReferenceOps
from engine.quant import fp4, gram
from engine.quant.fp4_linear import Fp4Linear
from engine.quant.grades import quantize_shards
from engine.quant.recipe import Recipe
from engine.quant.registry import FP4_METHODS
from engine.quantize import quantize_model
from engine.weights import conversion
from engine.weights.checkpoint import Checkpoint

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = np.concatenate([E2M1, -E2M1])
KINDS = [("nvfp4", 16), ("nvfp4", 32), ("mxfp4", 32)]
each_kind = pytest.mark.parametrize(("format", "block"), KINDS)


def weights(seed, N=96, K=64):
    """Rows that lie near a few directions, as a trained weight's do."""
    r = np.random.default_rng(seed)
    directions = r.standard_normal((8, K)) * 2
    return ((r.standard_normal((N, 8)) @ directions + r.standard_normal((N, K))) * 0.02).astype(ml_dtypes.bfloat16)


def values(m: Fp4Matrix) -> np.ndarray:
    return fp4.dequantize(m).astype(np.float64)


def loss(m: Fp4Matrix, w: np.ndarray, H: np.ndarray) -> np.ndarray:
    error = values(m) - w.astype(np.float64)
    return ((error @ H) * error).sum(axis=1)


def quantized(w, format="nvfp4", block=32, grade="gram", beside=()):
    return quantize_shards(ReferenceOps(), [w, *beside], format=format, block=block, grade=grade)[0]


def unit_of(m: Fp4Matrix) -> np.ndarray:
    """Block scales as numbers [N, K], without g."""
    bits = m.scale.view(ml_dtypes.float8_e4m3fn if m.format == "nvfp4" else ml_dtypes.float8_e8m0fnu)
    return np.repeat(bits.astype(np.float64), m.block, axis=1)


def divided(w: np.ndarray, m: Fp4Matrix) -> np.ndarray:
    return (w.astype(np.float32) / m.g[:, None]).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_the_guess_is_the_mean_second_moment_of_all_rows():
    shards = [weights(1), weights(2, N=40)]
    rows = np.concatenate(shards).astype(np.float64)
    second = np.einsum("ni,nj->ij", rows, rows)
    expected = second / np.diag(second).mean() + np.eye(64)
    np.testing.assert_allclose(gram.covariance(shards), expected, atol=1e-6)  # products in fp32
    for factor in (1e-30, 1e30):  # whose squares fp32 does not hold
        scaled = [w.astype(np.float32) * np.float32(factor) for w in shards]
        np.testing.assert_allclose(gram.covariance(scaled), expected, atol=1e-6)
    assert (gram.covariance([np.zeros((4, 32), np.float32)]) == np.eye(32)).all()


@each_kind
def test_feedback_leaves_the_rest_where_a_linear_solve_puts_it(monkeypatch, format, block):
    """Before each code is chosen, what is still free minimises tr(Δ H Δᵀ) given the codes so far: solved outright."""
    monkeypatch.setattr(gram, "_REFINEMENTS", 0)
    w = weights(3, N=70)
    H = gram.covariance([w])
    m = quantized(w, format, block)
    x, unit, chosen = divided(w, m), unit_of(m), values(m) / m.g[:, None]
    for k in range(64):
        error = (chosen - x)[:, :k]
        target = x[:, k:] - np.linalg.solve(H[k:, k:], H[k:, :k] @ error.T).T
        distance = np.abs(target[:, :1] - VALUES * unit[:, k, None])
        missed = np.abs(target[:, 0] - chosen[:, k]) - distance.min(axis=1)
        assert (missed <= 1e-4 * unit[:, k]).all()  # fp32 against fp64: nothing but ties may fall otherwise


@each_kind
def test_refinement_chooses_the_best_of_all_codes_one_by_one(format, block):
    w, fmt = weights(4, N=70)[:5], block_format(format, block)
    H = gram.covariance([weights(4, N=70)])
    m = fp4.quantize_weight(w, format=format, block=block, grade="sweep")
    x, unit, current = divided(w, m), unit_of(m), values(m) / m.g[:, None]
    for k in range(64):
        candidates = np.repeat(current[:, None], len(VALUES), axis=1)  # [N, codes, K]
        candidates[:, :, k] = VALUES * unit[:, k, None]
        error = candidates - x[:, None]
        best = np.einsum("nci,ij,ncj->nc", error, H, error, optimize=True).argmin(axis=1)
        current[:, k] = VALUES[best] * unit[:, k]
    codes = fmt.encode(divided(w, m).astype(np.float32).reshape(5, -1, block), m.scale).reshape(5, 64)
    refined = gram._refined(x.astype(np.float32), codes, m.scale, H.astype(np.float32), fmt)
    np.testing.assert_array_equal(VALUES[refined] * unit, current)


@each_kind
def test_less_is_lost_where_inputs_lie_as_the_rows_do(format, block):
    """Held-out inputs from the directions the weight was made of, half of them plain noise."""
    w = weights(5, N=128)
    r = np.random.default_rng(5)
    directions = np.linalg.svd(w.astype(np.float64), full_matrices=False)[2][:8]
    x = r.standard_normal((1000, 8)) @ directions * 3 + r.standard_normal((1000, 64))
    lost = {}
    for grade in ("sweep", "gram"):
        error = x @ (values(quantized(w, format, block, grade)) - w.astype(np.float64)).T
        lost[grade] = (error**2).mean()
    assert lost["gram"] < 0.75 * lost["sweep"]


@each_kind
def test_no_row_loses_more_than_by_sweep(format, block):
    w = weights(6, N=200)
    H = gram.covariance([w])
    by_gram, by_sweep = (loss(quantized(w, format, block, grade), w, H) for grade in ("gram", "sweep"))
    assert (by_gram < by_sweep).mean() > 0.99 and by_gram.sum() < 0.8 * by_sweep.sum()


def test_shards_are_rounded_for_the_input_they_share():
    q, k = weights(7), weights(8, N=16)
    H = gram.covariance([np.concatenate([q, k])])
    assert loss(quantized(q, beside=[k]), q, H).sum() < loss(quantized(q), q, H).sum()
    np.testing.assert_array_equal(quantized(k, beside=[q]).g, quantized(k, grade="sweep").g)


def test_fewer_rows_than_inputs_are_swept():
    w = weights(9, N=63)
    for grade in ("gram", "sweep"):
        m = quantized(w, grade=grade)
        np.testing.assert_array_equal(m.payload, fp4.quantize_weight(w, block=32, grade="sweep").payload)
    assert (quantized(weights(9, N=64)).payload[:63] != m.payload).any()


def test_a_weight_of_zeros():
    m = quantized(np.zeros((64, 32), np.float32))
    assert not values(m).any()


def test_refusals():
    w = weights(10, K=64)
    with pytest.raises(InvalidArgument, match="gram is defined for nvfp4 and mxfp4, not for hif4"):
        fp4.quantize_weight(w, format="hif4", grade="gram")
    bad = np.full((64, 64), np.nan, np.float32)
    for arguments in ({"w": bad}, {"w": w, "beside": [bad]}):
        with pytest.raises(NumericalError, match="holds NaN or infinity"):
            quantized(**arguments)


@pytest.mark.parametrize("shard_bytes", [1, 1 << 28], ids=["a file each", "one file"])
def test_a_quantised_file_holds_what_loading_makes(shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Shards that share an input are quantised together wherever their files end."""
    monkeypatch.setattr(conversion, "_SHARD_BYTES", shard_bytes)
    source = write_model("qwen3_tied", tmp_path / "source")
    quantize_model(source, tmp_path / "out", Recipe("sharq", "gram"))
    made: dict[str, Fp4Matrix] = {}

    class Recording(ReferenceOps):
        def pack_fp4(self, shards, *, weights_only=False):
            made.update(zip(names, shards, strict=True))

    with Checkpoint(source) as plain, opened(tmp_path / "out") as copy:
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            names = [f"model.layers.1.{part}.weight" for part in group]
            method = Fp4Linear("sharq", FP4_METHODS["sharq"], QuantConfig("sharq", grade="gram"), Recording())
            method.pack([plain.tensor(name) for name in names])
        for name, expected in made.items():
            stored = copy.tensor(name)
            np.testing.assert_array_equal(stored.payload, expected.payload)
            np.testing.assert_array_equal(stored.scale, expected.scale)
        assert copy.scheme is not None and copy.scheme.grade == "gram"
