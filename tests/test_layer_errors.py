"""Output errors of linear layers, against the same figures worked out in float64 from public functions."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from numpy.typing import NDArray

from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.eval import build_parser, methods_and_grades
from engine.layer_errors import LayerError, layer_errors, pooled
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.quant import fp4, sharq
from engine.quant.recipe import Recipe
from engine.quant.registry import METHODS, resolve
from engine.quantize import quantize_model

F64 = NDArray[np.float64]
CASE = "llama_biases"  # the error must not see them
F32 = np.dtype(np.float32)
QKV = ("q_proj", "k_proj", "v_proj")
WINDOWS = [tiny_models.prompt()[:30], tiny_models.prompt()[20:44]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(CASE, tmp_path_factory.mktemp(CASE))


def errors_of(directory: Path, quant: QuantConfig) -> dict[str, LayerError]:
    config = read_config(tiny_models.CASES[CASE].config, CASE)
    return layer_errors(directory, config, select_backend("cpu", 1), F32, resolve(quant, None), WINDOWS)


def first_inputs() -> F64:
    """What layer 0's attention multiplies, in fp32: the normalised embeddings of all windows' tokens."""
    weights = dict(tiny_models.tensors(CASE))
    table = weights["model.embed_tokens.weight"].astype(np.float64)
    x = table[[token for window in WINDOWS for token in window]]
    eps = tiny_models.CASES[CASE].config["rms_norm_eps"]
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
    return (normed * weights["model.layers.0.input_layernorm.weight"].astype(np.float64)).astype(np.float32)


def dequantized(method: str, x: Any, w: Any) -> tuple[F64, F64]:
    """What the method makes of activations and of one shard, through the public functions."""
    if method == "sharq":
        return sharq.dequantize(sharq.prepare(x)), sharq.dequantize(sharq.quantize_weight(w))
    weight = fp4.dequantize(fp4.quantize_weight(w, block=16))
    return x if method == "w4a16" else fp4.dequantize(fp4.prepare(x)), weight


@pytest.mark.parametrize("method", ["w4a16", "nvfp4", "sharq"])
def test_first_layer_against_float64(method: str, directory: Path) -> None:
    found = errors_of(directory, QuantConfig(method, "rtn"))
    x = first_inputs()
    weights = dict(tiny_models.tensors(CASE))
    for name in QKV:
        w = weights[f"model.layers.0.self_attn.{name}.weight"]
        exact = x.astype(np.float64) @ w.astype(np.float64).T
        values, codes = dequantized(method, x, w)
        error = values.astype(np.float64) @ codes.astype(np.float64).T - exact
        expected = math.sqrt((error**2).sum() / (exact**2).sum())
        assert 0.01 < expected < 0.3
        # fp32 sums and a norm rounded elsewhere; were a single code to flip, it would be 1e-4 or so
        assert found[f"model.layers.0.self_attn.{name}"].relative == pytest.approx(expected, rel=1e-5)


def test_every_layer_once_and_fed_exactly(directory: Path) -> None:
    """All linear layers but the head; what a layer puts out as stored does not depend on the method beside it."""
    one, other = (errors_of(directory, QuantConfig(method, "rtn")) for method in ("nvfp4", "mxfp4"))
    weights = [name for name, _ in tiny_models.tensors(CASE) if name.endswith("_proj.weight")]
    assert [f"{module}.weight" for module in one] == weights
    for module, error in one.items():
        assert error.output == other[module].output
        assert error.relative != other[module].relative
    assert all(error.relative == 0 for error in errors_of(directory, QuantConfig("bf16")).values())


def test_layers_that_do_not_fit(directory: Path) -> None:
    """The FFN of 96 is no multiple of HiF4's 64."""
    with pytest.raises(InvalidArgument, match=r"layers\.0\.mlp\.down_proj has 96"):
        errors_of(directory, QuantConfig("hif4", "rtn"))
    errors = errors_of(directory, QuantConfig("hif4", "rtn", fallback="bf16"))
    assert [error.relative == 0 for error in errors.values()] == ([False] * 6 + [True]) * 2


def test_pooling() -> None:
    errors = {
        "model.layers.0.self_attn.q_proj": LayerError(9.0, 100.0),  # 0.3
        "model.layers.1.self_attn.q_proj": LayerError(16.0, 1.0e4),  # 0.04, however much it puts out
        "model.layers.1.mlp.down_proj": LayerError(1.0, 100.0),  # 0.1
    }
    assert pooled(errors, "kind") == pytest.approx({"q_proj": math.sqrt((0.09 + 0.0016) / 2), "down_proj": 0.1})
    assert pooled(errors, "depth") == pytest.approx({0: 0.3, 1: math.sqrt((0.0016 + 0.01) / 2)})
    assert math.isnan(LayerError().relative)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    options = build_parser().parse_args(["layers", *arguments])
    options.main(options)
    return capsys.readouterr().out


def test_command_line(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog, " * 4)
    common = ["--model", str(directory), "--text", str(text), "--window", "32", "--methods", "sharq", "fp8"]
    report = json.loads(run(capsys, *common, "--grades", "rtn", "sweep", "--max-tokens", "100", "--json"))
    assert (report["tokens"], report["window"], len(report["rows"])) == (96, 32, 3 * 14)  # whole windows
    methods = {(row["method"], row["grade"]) for row in report["rows"]}
    assert methods == {("sharq", "rtn"), ("sharq", "sweep"), ("fp8", None)}
    last = report["rows"][-1]
    assert (last["layer"], last["kind"], last["depth"]) == ("model.layers.1.mlp.down_proj", "down_proj", 1)
    assert 0 < last["error"] < 0.1
    by_kind, by_depth = run(capsys, *common).strip().split("\n\n")
    assert "| method | grade | q_proj | k_proj | v_proj | o_proj | gate_proj | up_proj | down_proj |" in by_kind
    assert by_depth.startswith("| layer | sharq sweep | fp8 |") and by_depth.splitlines()[-1].startswith("| 1 | ")


def test_quantised_checkpoints_are_refused(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_model(directory, tmp_path / "quantised", Recipe("nvfp4", "rtn"))
    with pytest.raises(InvalidArgument, match="is quantised already"):
        run(capsys, "--model", str(tmp_path / "quantised"))


def test_methods_have_the_grades_they_have() -> None:
    options = argparse.Namespace(methods=["sharq", "mxfp4", "fp8"], grades=["rtn", "4over6"])
    expected = [("sharq", "rtn"), ("sharq", "4over6"), ("mxfp4", "rtn"), ("fp8", None)]
    assert list(methods_and_grades(options)) == expected
    every = argparse.Namespace(methods=METHODS[1:], grades=["rtn", "4over6", "sweep"])
    for method, grade in methods_and_grades(every):
        resolve(QuantConfig(method, grade), None)  # none is refused
