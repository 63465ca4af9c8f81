"""Quantised checkpoints, a quantised head and the cache of quantised weights, through whole models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from quantized_files import Nvfp4, Tensor, bf16, e4m3, e4m3_values, f32, spread, write_file
from tiny_models import tensors as plain_tensors
from tiny_models import write_model

from engine import LLM, loading
from engine.config import QuantConfig
from engine.errors import InvalidArgument, WeightsError
from engine.quant import fp4, fp8
from engine.quant.recipe import Recipe
from engine.quant.registry import resolve
from engine.quantize import quantize_model
from engine.weights import quant_cache

F32 = NDArray[np.float32]
CASE = "qwen3_tied"  # hidden 64, FFN 96
PROMPT = np.random.default_rng(0).integers(0, 256, 24).tolist()


def logits(path: Path, **options: Any) -> F32:
    with LLM(path, **options) as llm:
        return llm.logits(PROMPT)


def relative(got: F32, wanted: F32) -> float:
    return float(np.sqrt(np.mean((got - wanted) ** 2)) / wanted.std())


# ---- files made by engine.quantize -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "layout", "head"),
    [
        ("sharq", "native", "bf16"),
        ("sharq", "modelopt", "bf16"),  # legal NVFP4 with every scale twice, recognised
        ("sharq-mxfp4", "native", "fp8"),
        ("nvfp4", "modelopt", "nvfp4"),
        ("w4a16", "native", "nvfp4"),
        ("mxfp4", "compressed-tensors", "bf16"),
        ("sharq-dense", "native", "bf16"),
        ("fp8", "native", "fp8"),
        ("fp8", "compressed-tensors", "bf16"),
    ],
)
def test_a_copy_runs_as_its_source_quantised_while_loading(tmp_path: Path, method: str, layout: str, head: str) -> None:
    """Bit for bit: the same codes, scales and kernels, whichever way they came."""
    source = write_model(CASE, tmp_path / "source")
    quantize_model(source, tmp_path / "copy", Recipe(method, "rtn", head), layout=layout)
    grade = None if method == "fp8" and head != "nvfp4" else "rtn"
    wanted = logits(source, quant=method, grade=grade, quant_head=head)
    asked = method if layout == "native" else "auto" if method in ("mxfp4", "fp8") else method
    assert np.array_equal(logits(tmp_path / "copy", quant=asked), wanted)
    if layout == "native":
        with LLM(tmp_path / "copy") as llm:
            assert llm.quant.method == method and "from the checkpoint" in llm.describe()
            assert llm.quant.head == head


def test_a_copy_keeps_layers_that_do_not_fit(tmp_path: Path) -> None:
    source = write_model(CASE, tmp_path / "source")
    quantize_model(source, tmp_path / "copy", Recipe("sharq-hif4", "rtn", fallback="bf16"))
    wanted = logits(source, quant="sharq-hif4", grade="rtn", quant_fallback="bf16")
    assert np.array_equal(logits(tmp_path / "copy"), wanted)


# ---- files made by hand ----------------------------------------------------------------------------------------------


def _published(directory: Path, convention: str) -> tuple[Path, Path]:
    """A tiny model with random quantised MLP weights as others publish it, and its twin in plain float32."""
    published, twin = directory / "published", directory / "twin"
    write_model(CASE, published)
    write_model(CASE, twin)
    quantised: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for seed, (name, array) in enumerate(plain_tensors(CASE)):
        array = array.astype(np.float32)
        module = name.removesuffix(".weight")
        if ".mlp." not in name:
            quantised[name] = plain[name] = f32(array)
            continue
        parts, values = _CONVENTIONS[convention](module, array.shape, seed)
        scale = array.std() / values.std()  # a model with weights of a sane size
        parts, values = _CONVENTIONS[convention](module, array.shape, seed, scale)
        quantised |= parts
        plain[name] = f32(values)
    _replace(published, quantised, _QUANTIZATION[convention])
    _replace(twin, plain, None)
    return published, twin


def _replace(directory: Path, tensors: dict[str, Tensor], quantization: Any) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    write_file(directory / "model.safetensors", tensors)
    config = json.loads((directory / "config.json").read_text())
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))


def _modelopt(module: str, shape: tuple[int, int], seed: int, g: float = 1.0) -> tuple[dict[str, Tensor], Any]:
    w = Nvfp4(*shape, seed=seed)
    return w.modelopt(module, g), w.values() * np.float64(np.float32(g))


def _compressed(module: str, shape: tuple[int, int], seed: int, g: float = 1.0) -> tuple[dict[str, Tensor], Any]:
    w = Nvfp4(*shape, seed=seed)
    return w.compressed_tensors(module, 1 / g), w.values() / np.float64(np.float32(1 / g))


def _fp8(tile: tuple[int, int], suffix: str) -> Callable[..., tuple[dict[str, Tensor], Any]]:
    def make(module: str, shape: tuple[int, int], seed: int, g: float = 1.0) -> tuple[dict[str, Tensor], Any]:
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, 0x7F, shape, np.uint8) | rng.integers(0, 2, shape, np.uint8) << 7
        rows, columns = (tile[0] or shape[0], tile[1] or shape[1])
        size = (-(-shape[0] // rows), -(-shape[1] // columns))
        scale = (rng.uniform(0.5, 2, size) * g).astype(np.float32)
        values = e4m3_values(codes) * spread(scale.astype(np.float64), shape, (rows, columns))
        return {f"{module}.weight": e4m3(codes), f"{module}.{suffix}": f32(scale)}, values

    return make


_IGNORED = ["lm_head", "re:.*self_attn.*"]
_GROUP = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
}
_CONVENTIONS: dict[str, Any] = {
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
    "fp8 per row": _fp8((1, 0), "weight_scale"),
    "fp8 blocks": _fp8((32, 32), "weight_scale_inv"),
}
_QUANTIZATION: dict[str, Any] = {
    "modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["lm_head", "model.layers.*.self_attn*"],
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": _GROUP},
        "ignore": _IGNORED,
    },
    "fp8 per row": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            }
        },
        "ignore": _IGNORED,
    },
    "fp8 blocks": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["self_attn", "lm_head"],
    },
}


@pytest.mark.parametrize("convention", _CONVENTIONS)
def test_a_published_checkpoint_runs_as_its_values(tmp_path: Path, convention: str) -> None:
    """Against the same model with every weight written out, whose products are plain fp32."""
    published, twin = _published(tmp_path, convention)
    wanted = logits(twin)
    is_fp8 = convention.startswith("fp8")
    if not is_fp8:
        assert relative(logits(published, quant="w4a16"), wanted) < 1e-5
    for quant, least, most in (
        [("auto", 1e-3, 0.1), ("fp8", 1e-3, 0.1)] if is_fp8 else [("nvfp4", 0.02, 0.4), ("sharq", 0.01, 0.25)]
    ):
        assert least < relative(logits(published, quant=quant), wanted) < most


def test_scales_of_a_cache_in_fp8(tmp_path: Path) -> None:
    """What a checkpoint divides K and V by: nothing at 1, little where nothing overflows, all where everything does."""

    def scored(scale: float | None, **options: Any) -> tuple[F32, str]:
        directory = tmp_path / str(scale)
        published, _ = _published(directory, "modelopt")
        tensors = _raw(published / "model.safetensors")
        for layer in range(2) if scale is not None else ():
            attention = f"model.layers.{layer}.self_attn"
            tensors |= {f"{attention}.{x}_proj.{x}_scale": f32(scale) for x in "kv"}
        _replace(published, tensors, {**_QUANTIZATION["modelopt"], "kv_cache_scheme": {"num_bits": 8, "type": "float"}})
        with LLM(published, quant="w4a16", **options) as llm:  # activations as they are: no code flips but the cache's
            return llm.logits(PROMPT), llm.describe()

    plain, described = scored(None, kv_cache_dtype="fp8")
    assert "FP8 (E4M3)" in described and "scaled" not in described
    ones, described = scored(1.0, kv_cache_dtype="fp8")
    assert np.array_equal(ones, plain) and "K and V scaled as the checkpoint says" in described
    assert 0 < relative(scored(0.0625, kv_cache_dtype="fp8")[0], plain) < 0.1
    assert relative(scored(1e-5, kv_cache_dtype="fp8")[0], plain) > 0.3
    unscaled, described = scored(1e-5)
    assert relative(unscaled, plain) < 0.1 and "scaled" not in described


def test_sharq_on_weights_in_groups_of_16(tmp_path: Path) -> None:
    """Better than NVFP4 activations on the same weights, and a token's logits do not depend on how a prompt is cut."""
    published, twin = _published(tmp_path, "modelopt")
    wanted = logits(twin)
    sharq = logits(published, quant="sharq")
    assert relative(sharq, wanted) < 0.8 * relative(logits(published, quant="nvfp4"), wanted)
    assert np.array_equal(logits(published, quant="sharq", max_num_batched_tokens=7), sharq)


# ---- what does not go together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "options", "message"),
    [
        ("modelopt", {"quant": "bf16"}, r"weights are nvfp4 .* quant 'bf16' does not multiply; choose one of w4a16"),
        ("modelopt", {"quant": "sharq-mxfp4"}, "choose one of w4a16, nvfp4, sharq, sharq-dense"),
        ("modelopt", {"grade": "sweep"}, "quantised already .* a grade, here 'sweep'"),
        ("modelopt", {"sharq_compat": True}, "nvfp4.* has none"),
        ("fp8 blocks", {"quant": "nvfp4"}, "weights are fp8 .* choose one of fp8"),
    ],
)
def test_a_method_that_the_stored_weights_do_not_allow(
    tmp_path: Path, convention: str, options: dict[str, Any], message: str
) -> None:
    published, _ = _published(tmp_path, convention)
    with pytest.raises(InvalidArgument, match=message):
        LLM(published, **options)


def test_shards_that_share_an_input_must_be_stored_alike(tmp_path: Path) -> None:
    published, _ = _published(tmp_path, "modelopt")
    (gate,) = (array for name, array in plain_tensors(CASE) if name == "model.layers.0.mlp.gate_proj.weight")
    tensors = _raw(published / "model.safetensors")
    for name in [name for name in tensors if ".0.mlp.up_proj" in name]:
        del tensors[name]
    tensors["model.layers.0.mlp.up_proj.weight"] = f32(gate.astype(np.float32))
    quantization = json.loads(json.dumps(_QUANTIZATION["modelopt"]))
    quantization["ignore"].append("model.layers.0.mlp.up_proj")
    _replace(published, tensors, quantization)
    with pytest.raises(InvalidArgument, match=r"gate_proj nvfp4, model\.layers\.0\.mlp\.up_proj plain"):
        LLM(published)


def _raw(file: Path) -> dict[str, Tensor]:
    """The file's tensors as `write_file` takes them."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    kinds = {"U8": np.uint8, "F8_E4M3": np.uint8, "F32": np.float32}
    return {
        name: (
            entry["dtype"],
            np.frombuffer(raw[8 + size :][slice(*entry["data_offsets"])], kinds[entry["dtype"]]).reshape(
                entry["shape"]
            ),
        )
        for name, entry in json.loads(raw[8 : 8 + size]).items()
    }


def test_a_tied_head_is_never_quantised_by_a_rule_for_all_linear_layers(tmp_path: Path) -> None:
    """Files of tied models need not list the head among those left alone: there is no such tensor."""
    published, _ = _published(tmp_path, "modelopt")
    wanted = logits(published)
    quantization = json.loads(json.dumps(_QUANTIZATION["modelopt"]))
    quantization["ignore"].remove("lm_head")
    _replace(published, _raw(published / "model.safetensors"), quantization)
    assert np.array_equal(logits(published), wanted)


def test_a_stored_head_cannot_become_another(tmp_path: Path) -> None:
    quantize_model(write_model(CASE, tmp_path / "source"), tmp_path / "copy", Recipe("sharq", "rtn", "fp8"))
    with pytest.raises(InvalidArgument, match="head is stored as fp8; it cannot become nvfp4"):
        LLM(tmp_path / "copy", quant_head="nvfp4")


def test_what_is_left_open_is_decided() -> None:
    plain = resolve(QuantConfig(), None)
    assert (plain.method, plain.head, plain.grade) == ("bf16", "bf16", None)
    assert resolve(QuantConfig("sharq"), None).grade == "sweep"
    assert resolve(QuantConfig("fp8"), None).grade is None
    assert resolve(QuantConfig(head="nvfp4"), None).grade == "sweep"


# ---- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["qwen3_tied", "llama2_sharded_f32"])
@pytest.mark.parametrize("head", ["fp8", "nvfp4"])
def test_a_quantised_head_is_the_product_with_its_values(tmp_path: Path, case: str, head: str) -> None:
    """The body's hidden states, recovered from the plain head's logits, times the quantised head's values."""
    path = write_model(case, tmp_path)
    plain = logits(path, dtype="float32").astype(np.float64)
    got = logits(path, dtype="float32", quant_head=head, grade="rtn" if head == "nvfp4" else None)
    name = "model.embed_tokens.weight" if case == "qwen3_tied" else "lm_head.weight"
    table = next(array for key, array in plain_tensors(case) if key == name).astype(np.float32)
    hidden = np.linalg.lstsq(table.astype(np.float64), plain.T, rcond=None)[0].T
    values = fp8.dequantize(fp8.quantize_weight(table)) if head == "fp8" else fp4.dequantize(fp4.quantize_weight(table))
    np.testing.assert_allclose(got, hidden @ values.astype(np.float64).T, atol=3e-5 * np.abs(plain).max())


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loading, "WORTH_CACHING", 0)
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantised"


def _no_quantising(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("quantised although it was cached")

    monkeypatch.setattr(Recipe, "quantize", refuse)


@pytest.mark.parametrize("case", ["qwen3_tied", "llama2_sharded_f32"])
@pytest.mark.parametrize("head", ["bf16", "fp8"])
def test_the_second_start_reads_what_the_first_wrote(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, case: str, head: str
) -> None:
    path = write_model(case, tmp_path / "model")
    wanted = logits(path, quant="sharq", quant_head=head, quant_cache=False)
    assert not cache.exists()
    assert np.array_equal(logits(path, quant="sharq", quant_head=head), wanted)
    (entry,) = cache.iterdir()
    _no_quantising(monkeypatch)
    with LLM(path, quant="sharq", quant_head=head) as llm:
        assert np.array_equal(llm.logits(PROMPT), wanted)
        assert f"cached in {entry}" in llm.describe()


def test_other_weights_or_another_recipe_make_another_entry(tmp_path: Path, cache: Path) -> None:
    path = write_model(CASE, tmp_path / "model")
    logits(path, quant="sharq")
    logits(path, quant="sharq", grade="rtn")
    file = next(path.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    logits(path, quant="sharq")
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "emptied", "other"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    path = write_model(CASE, tmp_path / "model")
    wanted = logits(path, quant="sharq")
    (entry,) = cache.iterdir()
    (file,) = entry.glob("*.safetensors")
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "emptied":
        file.unlink()
    else:
        write_file(file, {"model.layers.0.mlp.up_proj.bias": bf16(np.zeros(3))})
    assert np.array_equal(logits(path, quant="sharq"), wanted)
    assert [child.name for child in cache.iterdir()] == [entry.name]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(CASE, tmp_path / "model")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with LLM(path, quant="sharq") as llm:
        note = llm.describe()
        got = llm.logits(PROMPT)
    assert "quantised while loading, not cached" in note and "no space left" in note
    assert np.array_equal(got, logits(path, quant="sharq", quant_cache=False))


def test_an_entry_holds_quantised_weights_alone(tmp_path: Path, cache: Path) -> None:
    path = write_model(CASE, tmp_path / "model")
    logits(path, quant="sharq")
    (entry,) = cache.iterdir()
    with quant_cache.LogicalCheckpoint(entry, None) as raw:
        assert all(name.rpartition(".")[2].startswith("weight") and "proj" in name for name in raw.names())


def test_missing_weights_are_reported_as_without_a_cache(tmp_path: Path, cache: Path) -> None:
    path = write_model(CASE, tmp_path / "model")
    kept = {name: f32(array.astype(np.float32)) for name, array in plain_tensors(CASE) if "down_proj" not in name}
    for file in path.glob("model*"):
        file.unlink()
    write_file(path / "model.safetensors", kept)
    with pytest.raises(WeightsError, match="missing: .*down_proj"):
        LLM(path, quant="sharq")
