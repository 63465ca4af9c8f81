"""FP4 methods as a model's linear layers use them, and their names."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import write_model

from engine import LLM
from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.eval import Measured, recovered
from engine.ops.contract import Ops
from engine.ops.reference import ReferenceOps
from engine.quant import fp4, sharq
from engine.quant.method import LinearMethod
from engine.quant.registry import FP4_METHODS, METHODS, LayerMethods, bits_per_weight, check_quant, resolve
from engine.workspace import Workspace

F32 = NDArray[np.float32]
K = 128
BACKENDS: list[Ops] = [ReferenceOps()]
with contextlib.suppress(ImportError):  # the extension is optional
    from engine.ops.cpu import CpuOps

    BACKENDS.append(CpuOps(threads=1))


def _random(rows: int, seed: int, columns: int = K) -> F32:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def _method(quant: QuantConfig, ops: Ops) -> LinearMethod:
    return LayerMethods(resolve(quant, None), ops, Workspace(ops))(("layer",), K)


def _values(name: str, x: F32) -> NDArray[np.float64]:
    """What the method makes of activations, through the public functions."""
    rule = FP4_METHODS[name]
    if rule.paths == "weights only":
        return x.astype(np.float64)
    if rule.paths == "one":
        return fp4.dequantize(fp4.prepare(x, format=rule.format)).astype(np.float64)
    sparse = rule.paths == "sparse and dense"
    return sharq.dequantize(sharq.prepare(x, format=rule.format, sparse=sparse)).astype(np.float64)


@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: type(ops).__name__)
@pytest.mark.parametrize("name", FP4_METHODS)
def test_a_layer_is_the_product_of_what_was_quantised(name: str, ops: Ops) -> None:
    """Two shards with global scales of their own, bias and residual, against float64."""
    method = _method(QuantConfig(name, "rtn"), ops)
    shards = [_random(24, 1), 50 * _random(8, 2)]
    x, bias, residual = _random(5, 3), _random(1, 4, 32)[0], _random(5, 5, 32)
    rule = FP4_METHODS[name]
    dequantized = [fp4.dequantize(fp4.quantize_weight(w, format=rule.format, block=rule.block)) for w in shards]
    expected = _values(name, x) @ np.concatenate(dequantized).astype(np.float64).T + bias + residual
    weight = method.pack(shards)
    got = method.matmul(method.prepare(x), weight, out=residual, bias=bias, residual=residual)
    assert got is residual
    assert np.abs(got - expected).max() <= 3e-6 * np.abs(expected).max()  # fp32 sums, and dequantize rounds each g·s·q


@pytest.mark.parametrize("ops", BACKENDS, ids=lambda ops: type(ops).__name__)
def test_compat_rounds_between_the_paths(ops: Ops) -> None:
    """As the paper's code: bf16(bf16(backbone) + residual path), then the layer's own residual."""
    w, x = _random(32, 1), _random(3, 2)
    method = _method(QuantConfig("sharq", "rtn", compat=True), ops)
    residual = _random(3, 4, 32)
    got = method.matmul(method.prepare(x), method.pack([w]), out=np.empty_like(residual), residual=residual)
    operand, w32 = sharq.prepare(x), sharq.quantize_weight(w)
    between = sharq.sparse_matmul(operand, w32).astype(fp4.BF16).astype(np.float32)
    both = (between + sharq.dense_matmul(operand, w32)).astype(fp4.BF16).astype(np.float32)
    assert np.mean(got != both + residual) < 0.05  # the backends' order of sums may tip a rounding
    assert np.abs(got - (both + residual)).max() <= 2.0**-7 * np.abs(both).max()


@pytest.mark.parametrize("name", ["w4a16", "nvfp4", "sharq", "sharq-dense", "sharq-mxfp4"])
def test_a_whole_model(name: str, tmp_path: Path) -> None:
    """Close to the model as stored but not equal, and a token's logits do not depend on how its prompt is cut."""
    path = write_model("qwen3_tied", tmp_path)
    prompt = np.random.default_rng(0).integers(0, 256, 20).tolist()
    with LLM(path) as stored, LLM(path, quant=name) as whole:
        with LLM(path, quant=name, max_num_batched_tokens=7) as cut:
            logits, chunked = whole.logits(prompt), cut.logits(prompt)
        error = logits - stored.logits(prompt)
        assert name in whole.kernel_path
    assert np.array_equal(logits, chunked)
    relative = np.sqrt(np.mean(error**2)) / logits.std()
    assert 0.02 < relative < 0.5


def test_layers_that_do_not_fit(tmp_path: Path) -> None:
    """The tiny model's FFN of 96 is no multiple of HiF4's 64."""
    path = write_model("qwen3_tied", tmp_path)
    with pytest.raises(InvalidArgument, match=r"multiples of 64 and model\.layers\.0\.mlp\.down_proj has 96"):
        LLM(path, quant="hif4")
    with LLM(path, quant="hif4", quant_fallback="bf16") as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig("fp5"),
        QuantConfig("sharq", "best"),
        QuantConfig("sharq", scale="row"),
        QuantConfig("sharq", fallback="fp8"),
        QuantConfig("mxfp4", "4over6"),
        QuantConfig("sharq-hif4", scale="tensor"),
        QuantConfig("nvfp4", compat=True),
    ],
)
def test_names_that_are_unknown_or_do_not_go_together(quant: QuantConfig) -> None:
    with pytest.raises(InvalidArgument):
        check_quant(quant)


def test_bits_per_weight() -> None:
    bits = {name: bits_per_weight(QuantConfig(name)) for name in METHODS}
    assert bits["bf16"] is None
    assert (bits["nvfp4"], bits["sharq"], bits["mxfp4"], bits["hif4"]) == (4.5, 4.25, 4.25, 4.5)


@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=6), st.floats(0, 1))
def test_recovered_share(losses: list[float], share: float) -> None:
    """A method a known part of the way between the two others, in every window: the share, without spread."""

    def measured(shift: float) -> Measured:
        return Measured(QuantConfig(), [np.array([loss + shift] * 3) for loss in losses], 0.0, 1.0)

    found = recovered(measured(1 - share), measured(1), measured(0), resamples=20)
    assert found is not None
    assert np.allclose(found, share, atol=1e-9)
    assert recovered(measured(0), measured(0), measured(0), resamples=20) is None
