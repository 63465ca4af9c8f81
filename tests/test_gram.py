"""The weight grade `gram`: its guesses against loops and sampled inputs, what it is worth, and where it is applied.

How codes follow from a guess: test_feedback.
"""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from test_quantize_cli import opened
from tiny_models import write_model

from engine import LLM, loading
from engine.errors import InvalidArgument, NumericalError
from engine.fp4_types import Fp4Matrix
from engine.json_file import read_json
from engine.models.linears import linear_modules
from engine.models.registry import read_config
from engine.ops.fp4.blocks import block_format
from engine.ops.reference import ReferenceOps
from engine.quant import fp4, gram
from engine.quant.recipe import Recipe
from engine.quantize import quantize_model
from engine.weights import conversion
from engine.weights.checkpoint import Checkpoint
from engine.weights.quantised_on_reading import QuantisedOnReading

OPS = ReferenceOps()
FORMAT = block_format("nvfp4", 32)
C, D, HEADS, KV_HEADS, F = 64, 16, 6, 2, 96
WEIGHTS = {"q": (HEADS * D, C), "k": (KV_HEADS * D, C), "v": (KV_HEADS * D, C), "o": (C, HEADS * D)}
WEIGHTS |= {"gate": (F, C), "up": (F, C), "down": (C, F)}


def made_layer(seed: int = 0, dtype=ml_dtypes.bfloat16) -> gram.Layer:
    """Rows of what reads the residual stream lie near a few directions, as a trained weight's do."""
    r = np.random.default_rng(seed)
    directions = r.standard_normal((8, C)) * 2
    made = {}
    for name, (N, K) in WEIGHTS.items():
        near = r.standard_normal((N, 8)) @ directions if K == C and name != "o" else 0
        made[name] = ((near + r.standard_normal((N, K))) * 0.02).astype(dtype)
    norms = {name: np.exp(r.standard_normal(C) * 0.3).astype(dtype) for name in ("attention_norm", "mlp_norm")}
    return gram.Layer(**made, **norms, head_dim=D)


def guesses(layer: gram.Layer) -> dict[str, np.ndarray]:
    whole = slice(None)
    return {name: H for names, moments in gram._inputs(layer) for H in [moments(whole)] for name in names}


def unit(H: np.ndarray) -> np.ndarray:
    return H / np.diag(H).mean()


def values(m: Fp4Matrix) -> np.ndarray:
    return fp4.dequantize(m).astype(np.float64)


def second(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return np.einsum("ni,nj->ij", rows, rows)


# ---- guesses ---------------------------------------------------------------------------------------------------------


def test_what_reads_the_residual_stream_tells_its_directions_and_the_norm_its_strength():
    layer = made_layer(1)
    readers = [np.concatenate(group) for group in ((layer.q, layer.k, layer.v), (layer.gate, layer.up))]
    expected = unit(sum(unit(second(rows)) for rows in readers)) + 0.5 * np.eye(C)
    found = guesses(layer)
    for name, norm in (("q", layer.attention_norm), ("up", layer.mlp_norm)):
        power = norm.astype(np.float64) ** 2
        np.testing.assert_allclose(np.diag(found[name]), power / power.mean() + 1e-3, rtol=1e-12)
        scale = np.sqrt(np.outer(np.diag(found[name]), np.diag(found[name])))
        root = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
        np.testing.assert_allclose(found[name] / scale, expected / root, atol=1e-6)  # products in fp32
    assert found["q"] is found["k"] is found["v"] and found["gate"] is found["up"]


def test_attention_puts_out_averages_of_values_that_heads_share():
    layer = made_layer(2)
    inputs, v = guesses(layer)["q"], layer.v.astype(np.float64)
    own = np.empty((HEADS * D, HEADS * D))
    for i in range(HEADS * D):
        for j in range(HEADS * D):
            (a, at), (b, to) = divmod(i, D), divmod(j, D)
            rows = v[a // 3 * D + at], v[b // 3 * D + to]  # three query heads read one head of values
            own[i, j] = rows[0] @ inputs @ rows[1] * (1 if a == b else 0.5)
    expected = unit(unit(own) + unit(second(layer.o))) + 0.5 * np.eye(HEADS * D)
    np.testing.assert_allclose(guesses(layer)["o"], expected, atol=1e-5)


def test_moments_of_a_product_of_normal_numbers():
    """Against samples: gate ∘ up of inputs drawn with the covariance that gate and up are rounded for."""
    layer = made_layer(3)
    draws = np.random.default_rng(3).multivariate_normal(np.zeros(C), guesses(layer)["up"], 50_000)
    products = (draws @ layer.gate.astype(np.float64).T) * (draws @ layer.up.astype(np.float64).T)
    expected = unit(second(products)) + 0.5 * np.eye(F)
    found = guesses(layer)["down"]
    assert np.abs(found - expected).max() < 0.08 * np.abs(expected).max()
    assert np.linalg.norm(found - expected) < 0.04 * np.linalg.norm(expected)


def test_guesses_are_the_same_for_weights_of_any_size():
    layer = made_layer(4, np.float32)
    expected = guesses(layer)
    for factor in (1e-30, 1e30):  # whose squares fp32 does not hold
        sizes = {name: getattr(layer, name) * np.float32(factor) for name in WEIGHTS}
        for name, H in guesses(replace(layer, **sizes)).items():
            np.testing.assert_allclose(H, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [*WEIGHTS, "attention_norm", "mlp_norm", "all"])
def test_zeros(zero):
    layer = made_layer(5)
    names = [field.name for field in fields(layer) if field.name != "head_dim"] if zero == "all" else [zero]
    layer = replace(layer, **{name: np.zeros_like(getattr(layer, name)) for name in names})
    made = gram.quantize_layer(OPS, layer, WEIGHTS, FORMAT)
    for name in WEIGHTS:
        w, lost = getattr(layer, name).astype(np.float64), values(made[name])
        assert np.abs(lost - w).max() <= 0.3 * np.abs(w).max()
        assert lost.any() == w.any()


@pytest.mark.parametrize("bad", [*WEIGHTS, "attention_norm", "mlp_norm"])
def test_not_finite_is_refused(bad):
    layer = made_layer(6)
    array = getattr(layer, bad).copy()
    array[-1] = np.nan
    with pytest.raises(NumericalError, match="holds NaN or infinity"):
        gram.quantize_layer(OPS, replace(layer, **{bad: array}), WEIGHTS, FORMAT)


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "block"), [("nvfp4", 16), ("nvfp4", 32), ("mxfp4", 32)])
def test_less_is_lost_where_inputs_lie_as_the_rows_do(format, block):
    """Held-out inputs, half of them plain noise, through the norms; attention that averages three tokens."""
    layer = made_layer(7)
    r = np.random.default_rng(7)
    rows = np.concatenate([layer.q, layer.gate]).astype(np.float64)
    stream = r.standard_normal((3000, 8)) @ np.linalg.svd(rows, full_matrices=False)[2][:8] * 3
    stream += r.standard_normal(stream.shape)
    stream /= np.sqrt((stream**2).mean(axis=1, keepdims=True))
    attention, mlp = (stream * norm.astype(np.float64) for norm in (layer.attention_norm, layer.mlp_norm))
    v = (attention @ layer.v.astype(np.float64).T).reshape(3000, KV_HEADS, D)
    heads = [(v[r.permutation(3000)] + v)[:, head // 3] for head in range(HEADS)]
    g, u = mlp @ layer.gate.astype(np.float64).T, mlp @ layer.up.astype(np.float64).T
    inputs = dict.fromkeys("qkv", attention) | {"o": np.concatenate(heads, axis=1), "gate": mlp, "up": mlp}
    inputs["down"] = g / (1 + np.exp(-g)) * u
    made = gram.quantize_layer(OPS, layer, WEIGHTS, block_format(format, block))
    for name, x in inputs.items():
        w = getattr(layer, name)
        swept = OPS.quantize_weight(w, format=format, block=block, grade="sweep")
        lost, other = (((x @ (values(m) - w.astype(np.float64)).T) ** 2).mean() for m in (made[name], swept))
        assert lost < 0.85 * other, name
        np.testing.assert_array_equal(made[name].g, swept.g)


def test_only_what_is_asked_for_is_made_and_does_not_depend_on_it():
    layer = made_layer(8)
    every, some = (gram.quantize_layer(OPS, layer, names, FORMAT) for names in (WEIGHTS, ["down", "k"]))
    assert list(every) == ["q", "k", "v", "o", "gate", "up", "down"] and set(some) == {"down", "k"}
    for name, m in some.items():
        np.testing.assert_array_equal(m.payload, every[name].payload)


def test_many_columns_are_cut_into_parts(monkeypatch):
    layer = made_layer(9)
    monkeypatch.setattr(gram, "_LONGEST", 64)
    assert gram._cut(96, 32) == [slice(0, 32), slice(32, 96)] and gram._cut(64, 32) == [slice(0, 64)]
    made = gram.quantize_layer(OPS, layer, ["q", "down"], FORMAT)
    monkeypatch.undo()
    whole = gram.quantize_layer(OPS, layer, ["q", "down"], FORMAT)
    np.testing.assert_array_equal(made["q"].payload, whole["q"].payload)
    assert made["down"].payload.shape == whole["down"].payload.shape
    assert (made["down"].payload != whole["down"].payload).any()
    w = layer.down
    for columns in (slice(0, 32), slice(32, 96)):  # each the best for its own part of the guess
        H = guesses(layer)["down"][columns, columns]
        swept = OPS.quantize_weight(w, format="nvfp4", block=32, grade="sweep")
        errors = [(values(m) - w.astype(np.float64))[:, columns] for m in (made["down"], swept)]
        own, other = (((e @ H) * e).sum() for e in errors)
        assert own < other


def test_a_weight_alone():
    """Its own rows are all that is known of its input; where they are fewer than K, nothing."""
    w = made_layer(10).q
    H = unit(second(w)) + 0.5 * np.eye(C)
    own, swept = (fp4.quantize_weight(w, block=32, grade=grade) for grade in ("gram", "sweep"))
    lost, other = ((error @ H * error).sum() for error in (values(m) - w.astype(np.float64) for m in (own, swept)))
    assert lost < 0.8 * other
    few = w[: C - 1]
    a, b = (fp4.quantize_weight(few, block=32, grade=grade) for grade in ("gram", "sweep"))
    np.testing.assert_array_equal(a.payload, b.payload)
    with pytest.raises(InvalidArgument, match="gram is defined for nvfp4 and mxfp4, not for hif4"):
        fp4.quantize_weight(w, format="hif4", grade="gram")


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_model("qwen3_tied", tmp_path_factory.mktemp("gram") / "source")


@pytest.mark.parametrize("shard_bytes", [1, 1 << 28], ids=["a file each", "one file"])
def test_a_quantised_file_holds_what_loading_makes(source, shard_bytes, tmp_path, monkeypatch):
    """Layers are quantised whole wherever files end, and when a run goes on that was stopped within one."""
    monkeypatch.setattr(conversion, "_SHARD_BYTES", shard_bytes)
    recipe = Recipe("sharq", "gram")
    quantize_model(source, tmp_path / "out", recipe)
    if shard_bytes == 1:
        stop_after(7, source, tmp_path / "again", recipe, monkeypatch)
        assert quantize_model(source, tmp_path / "again", recipe).resumed_shards == 7
    config = read_config(read_json(source / "config.json", InvalidArgument), source / "config.json")
    with Checkpoint(source) as plain, opened(tmp_path / "out") as copy:
        made = QuantisedOnReading(plain, recipe, OPS, linear_modules(config), None, config.head_dim)
        assert set(made.storages()) == set(copy.storages())
        for module in copy.storages():
            stored, expected = copy.tensor(f"{module}.weight"), made.tensor(f"{module}.weight")
            np.testing.assert_array_equal(stored.payload, expected.payload)
            np.testing.assert_array_equal(stored.scale, expected.scale)
        assert copy.scheme is not None and copy.scheme.grade == "gram"
    if shard_bytes == 1:
        for file in (tmp_path / "out").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def stop_after(shards, source, out, recipe, monkeypatch):
    saved = []
    save = conversion.save_safetensors

    def failing(path, *rest):
        if len(saved) == shards:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion, "save_safetensors", failing)
        quantize_model(source, out, recipe)


def test_a_model_runs_as_its_quantised_file_does(source, tmp_path):
    quantize_model(source, tmp_path / "out", Recipe("sharq", "gram", head="nvfp4"))
    models = LLM(str(source), quant="sharq", grade="gram", quant_head="nvfp4"), LLM(str(tmp_path / "out"))
    with models[0] as made, models[1] as stored:
        np.testing.assert_array_equal(made.logits([1, 2, 3]), stored.logits([1, 2, 3]))


def test_the_cache_holds_what_loading_makes(source, tmp_path, monkeypatch):
    def logits(**options):
        with LLM(str(source), quant="sharq", grade="gram", **options) as llm:
            return llm.logits([1, 2, 3])

    wanted = logits(quant_cache=False)
    monkeypatch.setattr(loading, "WORTH_CACHING", 0)
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path))
    np.testing.assert_array_equal(logits(), wanted)
    monkeypatch.delattr(gram, "quantize_layer")
    np.testing.assert_array_equal(logits(), wanted)


def test_the_layer_of_a_bad_tensor_is_named(source, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    with Checkpoint(source) as plain:
        name = "model.layers.0.mlp.up_proj.weight"
        file, entry = plain.entry(name).file.name, plain.entry(name)
    with open(bad / file, "r+b") as data:
        header = int.from_bytes(data.read(8), "little")
        data.seek(8 + header + entry.begin if entry.begin < 8 + header else entry.begin)
        data.write(np.full(4, np.nan, np.float32).tobytes())
    with pytest.raises(NumericalError, match=r"the layer of tensor 'model\.layers\.0\..*NaN or infinity"):
        quantize_model(bad, tmp_path / "out", Recipe("sharq", "gram"))
