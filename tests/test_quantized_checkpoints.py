"""Published quantised checkpoints: files written by hand in each convention, read back, compared in float64."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_files import Nvfp4, Tensor, bf16, e2m1_values, e4m3, e4m3_values, f32, spread, u8, write_file

from engine.errors import ConfigError, EngineError, WeightsError
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.models.quantization import read_quantization
from engine.quant import fp4, fp8
from engine.quant.groups import narrowest, per_16
from engine.weights.coverage import fill
from engine.weights.quantized import LogicalCheckpoint

Json = dict[str, Any]
MLP = "model.layers.0.mlp.down_proj"
ATTENTION = "model.layers.0.self_attn"

MODELOPT: Json = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}
GROUP: Json = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True},
}
COMPRESSED: Json = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"],
}
HF_FP8: Json = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SHARQ: Json = {"quant_method": "sharq", "format": "nvfp4", "group_size": 32, "grade": "sweep", "head": "bf16"}


def group(**weights: Any) -> Json:
    return {"targets": ["Linear"], "weights": weights}


def float_quantized(strategy: str, **more: Any) -> Json:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, **more}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group(**weights)}
    }  # fmt: skip


MXFP4: Json = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "g": {**group(num_bits=4, type="float", strategy="group", group_size=32), "format": "mxfp4-pack-quantized"}
    },
}


def opened(
    directory: Path, tensors: dict[str, Tensor], config: Json | None, second: Json | None = None
) -> LogicalCheckpoint:
    write_file(directory / "model.safetensors", tensors)
    config_json = {} if config is None else {"quantization_config": config}
    if second is not None:
        (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": second}))
    return LogicalCheckpoint(directory, read_quantization(config_json, directory))


def values(weight: Any) -> Any:
    return (fp4 if isinstance(weight, Fp4Matrix) else fp8).dequantize(weight).astype(np.float64)


def refused(error: type[EngineError], *parts: str) -> Any:
    return pytest.raises(error, match=".*".join(re.escape(part) for part in parts))


# ---- conventions -----------------------------------------------------------------------------------------------------


def test_modelopt_multiplies_plain_row_major_scales(tmp_path):
    w = Nvfp4(130, 96, seed=1)  # more rows than a swizzled tile of scales has, and not a multiple
    tensors = w.modelopt(MLP, 3e-4) | {f"{MLP}.input_scale": f32(0.01), f"{MLP}.bias": f32(np.zeros(130))}
    checkpoint = opened(tmp_path, tensors, MODELOPT)
    assert checkpoint.names() == (f"{MLP}.weight", f"{MLP}.bias")
    entry = checkpoint.entry(f"{MLP}.weight")
    assert (entry.shape, entry.dtype, entry.nbytes) == ((130, 96), "NVFP4", 130 * 48 + 130 * 6 + 4)
    assert checkpoint.nbytes == entry.nbytes + 520
    weight = checkpoint.tensor(f"{MLP}.weight")
    assert isinstance(weight, Fp4Matrix) and weight.block == 16
    np.testing.assert_allclose(values(weight), w.values() * np.float64(np.float32(3e-4)), rtol=2.0**-23)
    checkpoint.release(f"{MLP}.weight")
    assert (weight.payload == w.payload).all()  # pages come back from the file


def test_compressed_tensors_divides(tmp_path):
    w = Nvfp4(24, 64, seed=2)
    tensors = w.compressed_tensors(MLP, 2688 / 0.37) | {f"{MLP}.input_global_scale": f32([12.0])}
    weight = opened(tmp_path, tensors, COMPRESSED).tensor(f"{MLP}.weight")
    np.testing.assert_allclose(values(weight), w.values() / np.float64(np.float32(2688 / 0.37)), rtol=2.0**-22)


@pytest.mark.parametrize("divides", [False, True], ids=["modelopt", "compressed-tensors"])
def test_fused_shards_keep_their_own_global_scales(tmp_path, divides):
    shards = {f"{ATTENTION}.{p}_proj": (Nvfp4(16, 32, seed=i), 0.5**i) for i, p in enumerate("qkv", 3)}
    tensors: dict[str, Tensor] = {}
    for module, (w, g) in shards.items():
        tensors |= w.compressed_tensors(module, 1 / g) if divides else w.modelopt(module, g)
    checkpoint = opened(tmp_path, tensors, COMPRESSED if divides else MODELOPT)
    for module, (w, g) in shards.items():
        weight = checkpoint.tensor(f"{module}.weight")
        assert (weight.g == np.float32(g)).all() and weight.g.shape == (16,)
        np.testing.assert_array_equal(values(weight), w.values() * g)  # powers of two: exact


def test_equal_neighbouring_scales_load_as_one_scale_per_32(tmp_path):
    w = Nvfp4(20, 128, seed=7, group=32)
    twice = Nvfp4(20, 128, seed=7)
    twice.payload, twice.scale = w.payload, np.repeat(w.scale, 2, axis=1)
    other = Nvfp4(20, 128, seed=7)
    other.payload, other.scale = twice.payload, twice.scale.copy()
    other.scale[19, 7] ^= 1
    tensors = twice.modelopt("a.up_proj", 0.25) | other.modelopt("a.gate_proj", 0.25)
    checkpoint = opened(tmp_path, tensors, MODELOPT)
    assert checkpoint.tensor("a.gate_proj.weight").block == 16
    weight = checkpoint.tensor("a.up_proj.weight")
    assert weight.block == 32 and (weight.scale == w.scale).all()
    np.testing.assert_array_equal(values(weight), w.values() * 0.25)
    assert (per_16(weight).scale == twice.scale).all() and narrowest(per_16(weight)).block == 32
    odd = Nvfp4(4, 48, seed=8)
    odd.scale[:] = 64
    m = Fp4Matrix("nvfp4", odd.payload, odd.scale, np.ones(4, np.float32))
    assert narrowest(m) is m  # 48 k do not divide by 32


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_mxfp4(tmp_path, dtype):
    rng = np.random.default_rng(9)
    payload, scale = rng.integers(0, 256, (10, 48), np.uint8), rng.integers(100, 140, (10, 3), np.uint8)
    tensors = {f"{MLP}.weight_packed": u8(payload), f"{MLP}.weight_scale": (dtype, scale)}
    weight = opened(tmp_path, tensors, MXFP4).tensor(f"{MLP}.weight")
    assert weight.format == "mxfp4" and (weight.g == 1).all()
    expected = e2m1_values(payload) * spread(2.0 ** (scale.astype(np.float64) - 127), (10, 96), (1, 32))
    np.testing.assert_array_equal(values(weight), expected)


FP8_CASES: dict[str, tuple[Json, str, tuple[int, ...], tuple[int, int]]] = {
    "hf blocks": (HF_FP8, "weight_scale_inv", (3, 2), (128, 128)),
    "compressed-tensors tensor": (float_quantized("tensor"), "weight_scale", (1,), (300, 200)),
    "compressed-tensors channel": (float_quantized("channel"), "weight_scale", (300, 1), (1, 200)),
    "compressed-tensors block": (
        float_quantized("block", block_structure=[128, 64]), "weight_scale", (3, 4), (128, 64)
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "fp8"}, "weight_scale", (), (300, 200)),
}  # fmt: skip


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("case", FP8_CASES)
def test_fp8_scales_always_multiply(tmp_path, case, stored):
    config, suffix, shape, tile = FP8_CASES[case]
    rng = np.random.default_rng(10)
    codes = rng.integers(0, 255, (300, 200), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scale = (rng.integers(1, 255, shape) * 2.0**-12).astype(np.float32)  # exact in bfloat16
    tensors = {f"{MLP}.weight": e4m3(codes), f"{MLP}.{suffix}": f32(scale) if stored == "F32" else bf16(scale)}
    checkpoint = opened(tmp_path, tensors, config)
    weight = checkpoint.tensor(f"{MLP}.weight")
    assert isinstance(weight, Fp8Matrix) and weight.tile == tile and checkpoint.entry(f"{MLP}.weight").dtype == "FP8"
    tiles = np.broadcast_to(scale, (-(-300 // tile[0]), -(-200 // tile[1]))).astype(np.float64)
    np.testing.assert_array_equal(values(weight), e4m3_values(codes) * spread(tiles, (300, 200), tile))


def test_native_head_of_another_format(tmp_path):
    body, head = Nvfp4(8, 64, seed=11, group=32), Nvfp4(12, 64, seed=12)
    tensors = body.modelopt(MLP, 1.0) | head.modelopt("lm_head", 2.0)
    checkpoint = opened(tmp_path, tensors, {**SHARQ, "head": "nvfp4"})
    assert (checkpoint.tensor(f"{MLP}.weight").block, checkpoint.tensor("lm_head.weight").block) == (32, 16)
    np.testing.assert_array_equal(values(checkpoint.tensor("lm_head.weight")), head.values() * 2)


# ---- who is quantised ------------------------------------------------------------------------------------------------


PLAIN = bf16(np.ones((16, 32)))


@pytest.mark.parametrize(
    ("config", "second", "plain"),
    [
        (MODELOPT, None, ["lm_head"]),
        ({**MODELOPT, "quant_algo": "nvfp4", "ignore": []}, {"exclude_modules": ["lm_head"]}, ["lm_head"]),
        (None, {"quant_algo": "Nvfp4", "group_size": 16, "exclude_modules": ["*.up_proj", "lm_head"]},
         ["a.up_proj", "b.up_proj", "lm_head"]),
        ({**MODELOPT, "ignore": ["model.layers.0.self_attn*", "model.layers.1.mlp"]}, None,
         ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]),
        ({**COMPRESSED, "ignore": ["re:.*up_proj$", "lm_head"]}, None, ["a.up_proj", "lm_head"]),
        ({**HF_FP8, "modules_to_not_convert": ["gate"]}, None, ["model.layers.1.mlp.gate", "lm_head"]),
    ],
    ids=["name", "second file", "second file alone", "globs", "regex", "parts"],
)  # fmt: skip
def test_excluded_modules_are_plain_and_others_are_not(tmp_path, config, second, plain):
    tensors = {f"{module}.weight": PLAIN for module in [*plain, "model.embed_tokens"]}
    tensors["model.norm.weight"] = f32(np.ones(16))
    checkpoint = opened(tmp_path, tensors, config, second)
    assert set(checkpoint.names()) == set(tensors)
    assert all(isinstance(checkpoint.tensor(name), np.ndarray) for name in tensors)
    with refused(WeightsError, "model.layers.9.mlp.gate_proj", "lacks"):
        opened(tmp_path, {**tensors, "model.layers.9.mlp.gate_proj.weight": PLAIN}, config)


def test_excluded_module_with_scales_is_refused(tmp_path):
    with refused(WeightsError, "lm_head", "should be plain", "weight_scale"):
        opened(tmp_path, Nvfp4(16, 32, seed=1).modelopt("lm_head", 1.0), MODELOPT)


def test_groups_of_different_formats(tmp_path):
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "a": {**GROUP, "format": "nvfp4-pack-quantized"},
            "b": {"targets": ["re:.*down_proj"], "weights": eight, "format": "float-quantized"},
        },
    }
    tensors = Nvfp4(8, 32, seed=1).compressed_tensors("x.up_proj", 1.0)
    tensors |= {"x.down_proj.weight": e4m3(np.full((8, 32), 56)), "x.down_proj.weight_scale": f32(np.full((8, 1), 3))}
    checkpoint = opened(tmp_path, tensors, config)
    assert isinstance(checkpoint.tensor("x.up_proj.weight"), Fp4Matrix)
    assert (values(checkpoint.tensor("x.down_proj.weight")) == 3).all()
    assert checkpoint.scheme is not None and checkpoint.scheme.method == "w4a16"


# ---- every tensor accounted for --------------------------------------------------------------------------------------


def change(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {f"{MLP}.{suffix}": tensor for suffix, tensor in tensors.items()}


GOOD = Nvfp4(16, 64, seed=5)
DAMAGED: dict[str, tuple[dict[str, Tensor | None], tuple[str, ...]]] = {
    "no scale": (change(weight_scale=None), (MLP, "lacks weight_scale")),
    "no global scale": (change(weight_scale_2=None), (MLP, "lacks weight_scale_2")),
    "no payload": (change(weight=None), (MLP, "lacks weight")),
    "smoothing": (change(pre_quant_scale=f32(np.ones(64))), (MLP, "unknown pre_quant_scale")),
    "hadamard": (change(forward_hadamard_matrix=f32(np.eye(2))), (MLP, "unknown forward_hadamard_matrix")),
    "zero points": (change(weight_zero_point=u8([0])), (MLP, "unknown weight_zero_point")),
    "other convention": (change(weight_global_scale=f32([1])), (MLP, "unknown weight_global_scale")),
    "lost expert": ({"model.layers.0.mlp.experts.3.up_proj.weight_scale": e4m3([[1]])}, ("experts.3.up_proj", "lacks")),
    "scale of another dtype": (change(weight_scale=u8(GOOD.scale)), ("weight_scale is U8", "F8_E4M3")),
    "payload of another dtype": (change(weight=("I8", GOOD.payload)), ("weight is I8", "U8")),
    "global scale in bf16": (change(weight_scale_2=bf16(1.0)), ("weight_scale_2 is BF16", "F32")),
    "scale cut": (change(weight_scale=e4m3(GOOD.scale[:15])), ("weight_scale has shape [15, 4]", "[16, 4]")),
    "scale per 32": (change(weight_scale=e4m3(GOOD.scale[:, :2])), ("weight_scale has shape [16, 2]", "[16, 4]")),
    "scale transposed": (change(weight_scale=e4m3(GOOD.scale.T)), ("[4, 16]", "[16, 4]")),
    "scale padded for a swizzle": (change(weight_scale=e4m3(np.ones((128, 4)))), ("[128, 4]", "[16, 4]")),
    "global scale per row": (change(weight_scale_2=f32(np.ones(16))), ("weight_scale_2 has shape [16]",)),
    "K not a multiple": (change(weight=u8(GOOD.payload[:, :20])), ("K = 40 is not a multiple of 16",)),
    "weight is a vector": (change(weight=u8(GOOD.payload[0])), ("expected two dimensions",)),
    "cache scale nobody declared": ({f"{ATTENTION}.k_proj.k_scale": f32(1)}, ("k_scale", "KV cache", "says nothing")),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_headers_that_do_not_agree_are_refused_at_once(tmp_path, case):
    changes, parts = DAMAGED[case]
    tensors: dict[str, Any] = GOOD.modelopt(MLP, 1.0) | changes
    with refused(WeightsError, "model.safetensors", *parts):
        opened(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, MODELOPT)


@pytest.mark.parametrize("named_in", [f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_scale"])
def test_cache_scales_are_accepted_where_only_the_second_file_speaks_of_them(tmp_path, named_in):
    tensors = GOOD.modelopt(MLP, 1.0) | {named_in: f32(1.0)}
    checkpoint = opened(tmp_path, tensors, MODELOPT, {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"})
    assert checkpoint.scheme is not None and checkpoint.scheme.kv_cache == "FP8"
    assert checkpoint.names() == (f"{MLP}.weight",)


@pytest.mark.parametrize(
    "described, kind",
    [
        ({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}, "FP8"),
        ({"num_bits": 8, "type": "float", "dynamic": False}, "FP8"),  # ModelOpt's
        ({"num_bits": 8, "type": "int", "strategy": "tensor"}, "other"),
        ({"num_bits": 4, "type": "float"}, "other"),
        ({"num_bits": 8, "type": "float", "strategy": "attn_head"}, "other"),
        ({"num_bits": 8, "type": "float", "dynamic": True}, "other"),
        (None, None),
    ],
)
@pytest.mark.parametrize("config", [MODELOPT, COMPRESSED], ids=["modelopt", "compressed-tensors"])
def test_what_cache_scales_are_for(tmp_path, config, described, kind):
    """Those of E4M3, one a tensor, serve a cache in FP8; others are accounted for and mean nothing to it."""
    g = GOOD.modelopt(MLP, 1.0) if config is MODELOPT else GOOD.compressed_tensors(MLP, 1.0)
    tensors = g | ({} if kind is None else {f"{ATTENTION}.k_scale": f32(0.5)})
    checkpoint = opened(tmp_path, tensors, {**config, "kv_cache_scheme": described})
    assert checkpoint.scheme is not None and checkpoint.scheme.kv_cache == kind
    assert checkpoint.kv_scales() == ({f"{ATTENTION}.k_scale": 0.5} if kind == "FP8" else {})


def one_byte(array: Any, byte: int) -> Any:
    changed = array.copy()
    changed[3, 2] = byte
    return changed


BAD_VALUES = {
    "negative scale": change(weight_scale=e4m3(one_byte(GOOD.scale, 0x80))),
    "NaN scale": change(weight_scale=e4m3(one_byte(GOOD.scale, 0x7F))),
    "negative NaN scale": change(weight_scale=e4m3(one_byte(GOOD.scale, 0xFF))),
    "global scale 0": change(weight_scale_2=f32(0)),
    "global scale negative": change(weight_scale_2=f32(-1)),
    "global scale NaN": change(weight_scale_2=f32(np.nan)),
    "global scale infinite": change(weight_scale_2=f32(np.inf)),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_scales_are_refused_when_read(tmp_path, case):
    tensors: dict[str, Any] = GOOD.modelopt(MLP, 1.0) | BAD_VALUES[case]
    checkpoint = opened(tmp_path, tensors, MODELOPT)
    with refused(WeightsError, "model.safetensors", MLP):
        checkpoint.tensor(f"{MLP}.weight")


def test_bad_values_of_the_other_formats(tmp_path):
    cases: list[tuple[Json, dict[str, Tensor]]] = [
        (COMPRESSED, GOOD.compressed_tensors(MLP, 1e-42)),  # its reciprocal is infinite
        (MXFP4, {f"{MLP}.weight_packed": u8(GOOD.payload), f"{MLP}.weight_scale": u8(np.full((16, 2), 255))}),
        (HF_FP8, {f"{MLP}.weight": e4m3(np.full((2, 2), 0xFF)), f"{MLP}.weight_scale_inv": f32([[1]])}),
        (HF_FP8, {f"{MLP}.weight": e4m3(np.ones((2, 2))), f"{MLP}.weight_scale_inv": f32([[np.nan]])}),
        (HF_FP8, {f"{MLP}.weight": e4m3(np.ones((2, 2))), f"{MLP}.weight_scale_inv": f32([[-1]])}),
    ]
    for config, tensors in cases:
        with refused(WeightsError, MLP, "holds"):
            opened(tmp_path, tensors, config).tensor(f"{MLP}.weight")


def test_zero_scales_are_numbers(tmp_path):
    tensors = GOOD.modelopt(MLP, 1.0) | {f"{MLP}.weight_scale": e4m3(np.zeros((16, 4)))}
    assert (values(opened(tmp_path, tensors, MODELOPT).tensor(f"{MLP}.weight")) == 0).all()


# ---- a model's parameters --------------------------------------------------------------------------------------------


def test_fill_takes_logical_tensors(tmp_path):
    tensors = GOOD.modelopt(MLP, 1.0) | {"model.norm.weight": f32(np.ones(16))}
    checkpoint = opened(tmp_path, tensors, MODELOPT)
    expected: dict[str, tuple[int, ...]] = {f"{MLP}.weight": (16, 64), "model.norm.weight": (16,)}
    got: dict[str, Any] = {}
    seen: list[tuple[int, int]] = []
    fill(expected, checkpoint, got.__setitem__, progress=lambda *step: seen.append(step))
    assert isinstance(got[f"{MLP}.weight"], Fp4Matrix) and isinstance(got["model.norm.weight"], np.ndarray)
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes)
    with refused(WeightsError, f"{MLP}.weight", "expected [16, 32]", "found [16, 64]"):
        fill({**expected, f"{MLP}.weight": (16, 32)}, checkpoint, got.__setitem__)
    with refused(WeightsError, "unknown to the model", MLP):
        fill({"model.norm.weight": (16,)}, checkpoint, got.__setitem__)


def test_fill_refuses_a_quantised_tensor_for_a_tied_one(tmp_path):
    tensors = GOOD.modelopt("lm_head", 1.0) | {"model.embed_tokens.weight": bf16(np.ones((16, 64)))}
    checkpoint = opened(tmp_path, tensors, {**MODELOPT, "ignore": []})
    with refused(WeightsError, "lm_head.weight", "quantised", "model.embed_tokens.weight"):
        fill({"model.embed_tokens.weight": (16, 64)}, checkpoint, lambda name, tensor: None,
             ties={"lm_head.weight": "model.embed_tokens.weight"})  # fmt: skip


def test_without_a_scheme_quantised_tensors_are_refused_by_type(tmp_path):
    checkpoint = opened(tmp_path, GOOD.modelopt(MLP, 1.0), None)
    with refused(WeightsError, f"{MLP}.weight", "U8"):
        fill({f"{MLP}.weight": (16, 64)}, checkpoint, lambda name, tensor: None)


# ---- configurations --------------------------------------------------------------------------------------------------


BAD_CONFIGS: list[tuple[Json, str]] = [
    ({"quant_method": "fp_quant"}, "'fp_quant'.*not supported"),
    ({"quant_method": "gptq"}, "'gptq'.*supported: modelopt, sharq, compressed-tensors, fp8"),
    ({"quant_method": ["modelopt"]}, "not supported"),
    ({**MODELOPT, "quant_algo": "NVFP4_AWQ"}, "'NVFP4_AWQ' is not supported"),
    ({**MODELOPT, "quant_algo": "nvfp4_svd"}, "'NVFP4_SVD' is not supported"),
    ({**MODELOPT, "quant_algo": 4}, "quant_algo = 4"),
    ({"quant_method": "modelopt"}, "quant_algo is missing"),
    ({**MODELOPT, "group_size": 32}, "group_size 32"),
    ({**MODELOPT, "ignore": "lm_head"}, "ignore.*list of strings"),
    ({**COMPRESSED, "transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
    ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ({**COMPRESSED, "format": "pack-quantized"}, "format = \"pack-quantized\".*nvfp4-pack-quantized"),
    ({**COMPRESSED, "format": "mixed-precision"}, "mixed-precision"),
    ({**COMPRESSED, "config_groups": {}}, "config_groups"),
    ({**COMPRESSED, "config_groups": {"a": {"targets": ["Linear"]}}}, "weights"),
    ({**COMPRESSED, "config_groups": {"a": {**GROUP, "targets": []}}}, "no group has targets"),
    ({**COMPRESSED, "config_groups": {"a": {**GROUP, "targets": ["Embedding"]}}}, "'Embedding'"),
    ({**COMPRESSED, "config_groups": {"a": {**GROUP, "output_activations": {"num_bits": 8}}}}, "output_activations"),
    ({**COMPRESSED, "config_groups": {"a": group(num_bits=8, type="float", strategy="tensor_group")}}, "num_bits"),
    ({**COMPRESSED, "config_groups": {"a": group(num_bits=4, type="int", strategy="tensor_group")}}, "type"),
    ({**COMPRESSED, "config_groups": {"a": group(num_bits=4, type="float", strategy="group")}}, "strategy"),
    ({**COMPRESSED, "config_groups": {"a": group(strategy="tensor_group", group_size=32)}}, "group_size"),
    ({**COMPRESSED, "config_groups": {"a": group(strategy="tensor_group", symmetric=False)}}, "symmetric"),
    ({**COMPRESSED, "ignore": ["re:("]}, "regular expression"),
    ({**COMPRESSED, "ignore": ["re:" + "a" * 2000]}, "regular expression"),
    ({**HF_FP8, "weight_block_size": None}, "weight_block_size"),
    ({**HF_FP8, "weight_block_size": [128]}, "weight_block_size"),
    ({**HF_FP8, "fmt": "e5m2"}, "fmt"),
    ({**SHARQ, "format": "int4"}, "format"),
    ({**SHARQ, "group_size": 64}, "group_size = 64"),
    ({**SHARQ, "grade": "magic"}, "grade"),
    ({**SHARQ, "head": "int8"}, "head"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), BAD_CONFIGS)
def test_configurations_refused_by_name(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        read_quantization({"quantization_config": config}, tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["Linear", "NVFP4", 16, 128]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(GROUP)), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([MODELOPT, COMPRESSED, MXFP4, HF_FP8, SHARQ]), st.data())
def test_any_configuration_is_read_or_refused(config, data):
    """One value somewhere replaced by anything: a scheme or a ConfigError, never another exception."""
    config = json.loads(json.dumps(config))
    place: Any = config
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON_VALUES)
    with suppress(ConfigError):
        scheme = read_quantization({"quantization_config": config}, Path("nowhere"))
        assert scheme is None or scheme.storage("model.embed_tokens") is None


def test_modelopt_files_that_contradict_each_other(tmp_path):
    second = tmp_path / "hf_quant_config.json"
    for quantization, message in (
        ({"quant_algo": "FP8"}, "quant_algo is 'FP8' here and 'NVFP4'"),
        ({"quant_algo": "NVFP4", "group_size": 32}, "group_size"),
    ):
        second.write_text(json.dumps({"quantization": quantization}))
        with pytest.raises(ConfigError, match=message):
            read_quantization({"quantization_config": MODELOPT}, tmp_path)
    with pytest.raises(ConfigError, match="hf_quant_config.json is there as well"):
        read_quantization({"quantization_config": COMPRESSED}, tmp_path)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (MODELOPT, "nvfp4"),
        ({**MODELOPT, "quant_algo": "W4A16_NVFP4"}, "w4a16"),
        (COMPRESSED, "w4a16"),
        ({**COMPRESSED, "config_groups": {"a": {**GROUP, "input_activations": {"num_bits": 4}}}}, "nvfp4"),
        (MXFP4, "mxfp4"),
        (HF_FP8, "fp8"),
        (SHARQ, "sharq"),
        ({**SHARQ, "group_size": 16}, "nvfp4"),
        ({**SHARQ, "format": "hif4", "group_size": 64, "method": "sharq-hif4"}, "sharq-hif4"),
    ],
)
def test_method_a_file_is_made_for(tmp_path, config, method):
    scheme = read_quantization({"quantization_config": config}, tmp_path)
    assert scheme is not None and scheme.method == method


def test_old_name_of_compressed_tensors_configuration(tmp_path):
    scheme = read_quantization({"compression_config": COMPRESSED}, tmp_path)
    assert scheme is not None and scheme.storage("a.up_proj") is not None and scheme.storage("lm_head") is None


def test_fp8_weight_is_the_nearest_code(tmp_path):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((9, 70)).astype(np.float32)
    w[2] = 0
    m = fp8.quantize_weight(w)
    assert (m.scale[:, 0] == np.maximum(np.abs(w).max(axis=1) / np.float32(448), np.float32(1e-9))).all()
    codes = np.arange(256, dtype=np.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    grid = e4m3_values(finite)
    ratio = w.astype(np.float64) / m.scale
    nearest = np.abs(ratio[:, :, None] - grid).min(axis=2)
    assert (np.abs(ratio - e4m3_values(m.payload)) <= nearest + 1e-6 * np.abs(ratio)).all()
    assert (values(m)[2] == 0).all() and ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max == 448
