"""config.json readers: equal to Transformers' reading on every variant, refusals by name, and nothing but ConfigError
on thousands of mutated files."""

from __future__ import annotations

import copy
import json
import random
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_variants import VARIANTS
from tiny_models import CASES

from engine.config import ModelConfig, RopeConfig
from engine.errors import ConfigError
from engine.models.registry import SUPPORTED_ARCHITECTURES, read_config
from engine.rope import rope_table

Config = dict[str, Any]
_GOLDEN = json.loads((Path(__file__).parent / "golden" / "configs.json").read_text())["variants"]
_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = (
    VARIANTS[name] for name in ("llama-3-8b", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-8b")
)


@pytest.mark.parametrize("name", VARIANTS)
def test_reads_what_transformers_reads(name: str) -> None:
    record = _GOLDEN[name]
    assert record["config"] == VARIANTS[name], "tests/golden/configs.json is older than config_variants.py"
    model = read_config(record["config"], "config.json")
    for key, expected in record["expected"].items():
        value = getattr(model, key)
        assert (list(value) if isinstance(value, tuple) else value) == expected, key
    assert {f.name for f in fields(ModelConfig)} - set(record["expected"]) == {"architecture", "rope"}
    assert model.architecture == record["config"]["architectures"][0]


def test_both_rope_spellings_mean_the_same() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16.0}
    old = _with(_LLAMA, rope_theta=1e6, rope_scaling={"type": "yarn", **yarn})
    middle = _with(_LLAMA, rope_theta=1e6, rope_scaling={"rope_type": "yarn", **yarn})
    new = _with(_LLAMA, "rope_theta", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **yarn})
    both = _with(_LLAMA, rope_theta=1e6, rope_scaling={"type": "yarn", **yarn}, rope_parameters=new["rope_parameters"])
    expected = RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_position=1024, beta_fast=16.0)
    assert [read_config(config, "c").rope for config in (old, middle, new, both)] == [expected] * 4


_YARN = {"type": "yarn", "factor": 4.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_REFUSED: list[tuple[Config, Config, str]] = [  # base, changes, what the message says
    (_LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"),
    (_LLAMA, {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "architectures.*one architecture"),
    (_LLAMA, {"architectures": None}, "architectures = null.*supported"),
    (_LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures.*list of strings"),
    (_LLAMA, {"model_type": "mistral"}, "model_type = \"mistral\".*LlamaForCausalLM needs model_type 'llama'"),
    (_LLAMA, {"hidden_act": "gelu"}, 'hidden_act = "gelu".*supported: silu'),
    (_LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "method 'gptq' are not supported yet"),
    (_LLAMA, {"quantization_config": {"bits": 4}}, "quantised checkpoints of method 'unknown'"),
    (_LLAMA, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype.*bfloat16, float16, float32"),
    (_LLAMA, {"dtype": "float16"}, "torch_dtype.*differs from dtype"),
    (_LLAMA, {"head_dim": 12}, "head dimension of 12.*multiples of 8 up to 256"),
    (_LLAMA, {"head_dim": 264}, "head dimension of 264"),
    (_LLAMA, {"num_attention_heads": 24}, "hidden_size = 4096 must be a multiple of num_attention_heads = 24"),
    (_LLAMA, {"num_key_value_heads": 5}, "num_attention_heads = 32 is not a multiple of num_key_value_heads = 5"),
    (_LLAMA, {"num_hidden_layers": "32"}, 'num_hidden_layers = "32": must be a whole number from 1'),
    (_LLAMA, {"num_hidden_layers": 10**30}, "num_hidden_layers.*whole number"),
    (_LLAMA, {"hidden_size": 4096.0}, "hidden_size = 4096.0: must be a whole number"),
    (_LLAMA, {"vocab_size": True}, "vocab_size = true: must be a whole number"),
    (_LLAMA, {"rms_norm_eps": "1e-5"}, 'rms_norm_eps = "1e-5": must be a number'),
    (_LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    (_LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings = 1: must be true or false"),
    (_LLAMA, {"eos_token_id": [1, -2]}, "eos_token_id.*whole number"),
    (_LLAMA, {"eos_token_id": "</s>"}, "eos_token_id"),
    (_LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling.type = "dynamic".*linear, llama3'),
    (_LLAMA, {"rope_scaling": {"type": "longrope"}}, "longrope"),
    (_LLAMA, {"rope_scaling": "linear"}, "rope_scaling.*must be an object"),
    (_LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "rope_scaling.rope_type.*differs"),
    (_LLAMA, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    (_LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor = 0.5"),
    (_LLAMA, {"rope_scaling": {"type": "default", "factor": 2.0}}, "rope_scaling.factor"),
    (_LLAMA, {"rope_scaling": {**_YARN, "long_factor": [1.0]}}, "rope_scaling.long_factor"),
    (_LLAMA, {"rope_scaling": {**_YARN, "beta_fast": 1, "beta_slow": 2}}, "rope_scaling.beta_fast.*at least"),
    (_LLAMA, {"rope_scaling": {**_LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor.*less than high_freq_factor"),
    (_LLAMA, {"rope_scaling": {**_LLAMA3, "low_freq_factor": None}}, "low_freq_factor"),
    (_LLAMA, {"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "rope_scaling.mrope_section"),
    (_LLAMA, {"rope_scaling": _YARN, "rope_parameters": {**_YARN, "factor": 8.0}}, "rope_scaling and rope_parameters"),
    (_LLAMA, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_theta = 500000.0.*differs"),
    (_LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention.*per layer"),
    (
        _LLAMA,
        {"rope_scaling": _YARN | {"original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
        "differs from the top-level value 32",
    ),
    (_LLAMA, {"rope_theta": 0.5}, "rope_theta = 0.5"),
    (_LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5.*other than 1.0.*does not compute"),
    (_LLAMA, {"rope_scaling": {**_YARN, "partial_rotary_factor": 0.25}}, "rope_scaling.partial_rotary_factor"),
    (_LLAMA, {"sliding_window": 4096}, "sliding_window = 4096"),
    (_LLAMA, {"layer_types": ["sliding_attention"] * 32}, "sliding_attention.*no sliding_window"),
    (_LLAMA, {"layer_types": ["chunked_attention"] * 32}, "chunked_attention.*full_attention, sliding_attention"),
    (_LLAMA, {"layer_types": ["full_attention"] * 31}, "31 entries for 32 layers"),
    (_LLAMA, {"layer_types": [None] * 32}, "layer_types.*list of strings"),
    (_MISTRAL, {"attention_bias": True}, "attention_bias = true"),
    (_MISTRAL, {"use_sliding_window": False}, "use_sliding_window = false"),
    (_MISTRAL, {"sliding_window": 0}, "sliding_window = 0: must be a whole number from 1"),
    (_QWEN2, {"layer_types": ["sliding_attention"] * 24}, "sliding_attention.*no sliding_window"),
    (_QWEN2, {"mlp_bias": True}, "mlp_bias = true"),
    (_QWEN2, {"use_mrope": True}, "use_mrope = true"),
    (_QWEN2, {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config = {…}"),
    (_QWEN3, {"head_dim": "128"}, "head_dim"),
    (_QWEN3, {"num_experts": 128}, "num_experts = 128"),
    *(
        (base, {key: value}, rf"^config\.json: {key} = .*which the engine does not compute")
        for base in (_LLAMA, _MISTRAL, _QWEN2, _QWEN3)
        for key, value in {
            "logit_scale": 0.0625,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "clip_qkv": 8.0,
            "qk_layernorm": True,
            "alibi": True,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12,
            "attention_multiplier": 0.0078125,
            "is_causal": False,
            "num_local_experts": 8,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 8192,
            "pretraining_tp": 2,
            "hidden_activation": "gelu_pytorch_tanh",
        }.items()
    ),
]


@pytest.mark.parametrize(("base", "changes", "message"), _REFUSED, ids=lambda v: v if isinstance(v, str) else None)
def test_refuses_by_name(base: Config, changes: Config, message: str) -> None:
    read_config(base, "config.json")  # the base itself is fine
    with pytest.raises(ConfigError) as caught:
        read_config(_with(base, **changes), "config.json")
    assert re.search(message, str(caught.value)) and str(caught.value).startswith("config.json: ")


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_sizes_are_required(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        read_config(_with(_LLAMA, key), "config.json")


@pytest.mark.parametrize("base", [_LLAMA, _MISTRAL, _QWEN2, _QWEN3])
def test_neutral_values_and_unknown_keys_change_nothing(base: Config) -> None:
    neutral = {
        "pretraining_tp": 1,
        "logit_scale": 1.0,
        "partial_rotary_factor": 1,
        "num_experts": 0,
        "clip_qkv": None,
        "attention_dropout": 0.1,
        "use_cache": False,
        "transformers_version": "4.57.0",
        "_name_or_path": "x",
        "rope_scaling": None,
        "quantization_config": None,
        "unsloth_fixed": True,
        "task_specific_params": {"a": [1]},
    }
    assert read_config(_with(base, **neutral), "c") == read_config(base, "c")


_BOMBS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    8,
    31,
    10**9,
    2**31,
    2**63,
    10**40,
    -(10**40),
    10**400,
    0.0,
    -0.0,
    1e-320,
    0.5,
    1.0,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "silu",
    "4096",
    "yarn",
    "\ud800",
    "x" * 500,
    [],
    [[]],
    [None],
    [1, 2],
    ["full_attention"],
    ["sliding_attention", 3],
    {},
    {"rope_type": "yarn"},
    {"type": []},
    {"full_attention": {"rope_type": "default"}},
    [{"a": 1}] * 3,
    {"": {"": {}}},
]
_EXTRA_KEYS = [
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "head_dim",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "dtype",
    "torch_dtype",
    "eos_token_id",
    "bos_token_id",
    "partial_rotary_factor",
    "quantization_config",
    "original_max_position_embeddings",
    "num_experts",
    "position_embedding_type",
    "mlp_bias",
    "attention_bias",
    "num_key_value_heads",
    "max_position_embeddings",
    "logit_scale",
]


def test_mutated_files_give_a_sound_config_or_a_config_error() -> None:
    """10,000 files with one to three values removed, replaced, added or swapped, at any depth."""
    random_source = random.Random(20240607)
    bases = [*VARIANTS.values(), *(case.config for case in CASES.values())]
    accepted = refused = 0
    for _ in range(10000):
        config = copy.deepcopy(random_source.choice(bases))
        for _ in range(random_source.randint(1, 3)):
            _mutate(config, random_source)
        try:
            model = read_config(config, "config.json")
        except ConfigError as error:
            assert str(error).startswith("config.json: ") and len(str(error)) < 500
            refused += 1
        else:
            _assert_sound(model)
            accepted += 1
    assert accepted > 1000 and refused > 5000  # mutations of both kinds really occur


def _mutate(config: Config, random_source: random.Random) -> None:
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    place = random_source.choice(places)
    key = random_source.choice([*place, *_EXTRA_KEYS])
    action = random_source.randrange(4)
    if action == 0:
        place.pop(key, None)
    elif action == 1 and place:
        place[key] = place[random_source.choice(list(place))]
    elif action == 2 and isinstance(place.get(key), (int, float)):
        place[key] = place[key] * random_source.choice([-1, 0, 0.5, 1, 2, 3, 10**6])
    else:
        place[key] = copy.deepcopy(random_source.choice(_BOMBS))


def _assert_sound(model: ModelConfig) -> None:
    assert model.architecture in SUPPORTED_ARCHITECTURES
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "max_position_embeddings"):
        value = getattr(model, name)
        assert type(value) is int and 1 <= value <= 1 << 24, name
    assert model.num_heads % model.num_kv_heads == 0 and model.head_dim % 8 == 0 and 8 <= model.head_dim <= 256
    assert len(model.layer_windows) == model.num_layers
    assert all(window is None or (type(window) is int and window >= 1) for window in model.layer_windows)
    for flag in ("tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):
        assert type(getattr(model, flag)) is bool
    assert type(model.rms_norm_eps) is float and 0 <= model.rms_norm_eps <= 1
    assert model.dtype in ("bfloat16", "float16", "float32")
    assert all(type(token) is int and token >= 0 for token in model.eos_token_ids)
    assert np.isfinite(rope_table(model.rope, model.head_dim, 3)).all()


def _with(config: Config, *removed: str, **changes: Any) -> Config:
    return {key: value for key, value in config.items() if key not in removed} | changes
