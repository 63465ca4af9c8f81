"""config.json variants: the shapes and keys of published models, and corner cases of each key's meaning.

Transformers' reading of each is committed in tests/golden/configs.json; `test_model_configs.py` holds the engine's
readers to it and starts its mutations from these.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# Rows of the rotary tables that are compared: neighbours, block borders, and the far ends of real contexts.
ROPE_POSITIONS = [0, 1, 2, 3, 15, 16, 47, 1000, 8191, 32768, 131071]


def _config(architecture: str, model_type: str, sizes: tuple[int, int, int, int, int | None], **keys: Any) -> Config:
    hidden, ffn, layers, heads, kv_heads = sizes
    config: Config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    return {**config, **({"num_key_value_heads": kv_heads} if kv_heads else {}), **keys}


def _llama(sizes: tuple[int, int, int, int, int | None], **keys: Any) -> Config:
    return _config("LlamaForCausalLM", "llama", sizes, **keys)


def _mistral(sizes: tuple[int, int, int, int, int | None], **keys: Any) -> Config:
    return _config("MistralForCausalLM", "mistral", sizes, **keys)


def _qwen2(sizes: tuple[int, int, int, int, int | None], **keys: Any) -> Config:
    return _config("Qwen2ForCausalLM", "qwen2", sizes, **keys)


def _qwen3(sizes: tuple[int, int, int, int, int | None], **keys: Any) -> Config:
    return _config("Qwen3ForCausalLM", "qwen3", sizes, **keys)


_TINY = (64, 96, 3, 4, 2)
_LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

VARIANTS: dict[str, Config] = {
    # as published
    "llama-2-7b": _llama(
        (4096, 11008, 32, 32, 32),
        max_position_embeddings=4096,
        pretraining_tp=1,
        rope_scaling=None,
        torch_dtype="float16",
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    ),
    "llama-3-8b": _llama(
        (4096, 14336, 32, 32, 8),
        vocab_size=128256,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=128000,
        eos_token_id=128001,
        pretraining_tp=1,
    ),
    "llama-3.1-8b-instruct": _llama(
        (4096, 14336, 32, 32, 8),
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", **_LLAMA31},
        mlp_bias=False,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
    ),
    "llama-3.2-1b": _llama(
        (2048, 8192, 16, 32, 8),
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        head_dim=64,
        rope_scaling={"rope_type": "llama3", **_LLAMA31, "factor": 32.0},
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    "mistral-7b-v0.1": _mistral(
        (4096, 14336, 32, 32, 8),
        max_position_embeddings=32768,
        rope_theta=10000.0,
        sliding_window=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral-7b-v0.3": _mistral(
        (4096, 14336, 32, 32, 8),
        vocab_size=32768,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral-nemo": _mistral(
        (5120, 14336, 40, 32, 8),
        vocab_size=131072,
        max_position_embeddings=1024000,
        rope_theta=1000000.0,
        sliding_window=None,
        head_dim=128,
    ),
    "qwen2.5-0.5b": _qwen2(
        (896, 4864, 24, 14, 2),
        vocab_size=151936,
        max_position_embeddings=32768,
        max_window_layers=24,
        rope_theta=1000000.0,
        sliding_window=32768,
        use_sliding_window=False,
        use_mrope=False,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151643,
    ),
    "qwen2.5-7b-instruct-yarn": _qwen2(
        (3584, 18944, 28, 28, 4),
        vocab_size=152064,
        max_position_embeddings=32768,
        max_window_layers=28,
        rope_theta=1000000.0,
        sliding_window=131072,
        use_sliding_window=False,
        rms_norm_eps=1e-6,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
    "qwen3-8b": _qwen3(
        (4096, 12288, 36, 32, 8),
        vocab_size=151936,
        head_dim=128,
        max_position_embeddings=40960,
        max_window_layers=36,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        use_sliding_window=False,
        attention_bias=False,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
    "qwen3-0.6b-rope-parameters": _qwen3(
        (1024, 3072, 28, 16, 8),
        vocab_size=151936,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
        layer_types=["full_attention"] * 28,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        eos_token_id=151645,
    ),
    # absent keys, and null where it differs from absent
    "llama-defaults": _llama((64, 96, 3, 4, None)),
    "llama-nulls": _llama(
        _TINY, head_dim=None, num_key_value_heads=None, rope_scaling=None, eos_token_id=None, bos_token_id=None
    ),
    "mistral-defaults": _mistral((256, 96, 3, 16, None)),
    "mistral-nulls": _mistral((256, 96, 3, 16, None), head_dim=None, sliding_window=None),
    "qwen2-defaults": _qwen2((256, 96, 3, 32, None)),
    "qwen2-null-kv-heads": _qwen2((256, 96, 3, 16, None), num_key_value_heads=None),
    "qwen3-defaults": _qwen3((256, 96, 3, 32, None)),
    "llama-dtype": {k: v for k, v in _llama(_TINY, dtype="float16").items() if k != "torch_dtype"},
    "llama-no-dtype": {k: v for k, v in _llama(_TINY).items() if k != "torch_dtype"},
    "llama-no-eps-no-act": {k: v for k, v in _llama(_TINY).items() if k not in ("rms_norm_eps", "hidden_act")},
    # biases, head dimensions
    "llama-biases": _llama(_TINY, attention_bias=True, mlp_bias=True),
    "llama-attention-bias": _llama(_TINY, attention_bias=True),
    "llama-head-dim-24": _llama(_TINY, head_dim=24),
    "qwen2-head-dim": _qwen2(_TINY, head_dim=40),
    "qwen3-attention-bias": _qwen3(_TINY, attention_bias=True, head_dim=256),
    # windows
    "mistral-layer-types": _mistral(
        _TINY, sliding_window=8, head_dim=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "qwen2-window-off": _qwen2(_TINY, sliding_window=8, max_window_layers=0),
    "qwen2-window-null": _qwen2(_TINY, use_sliding_window=True, sliding_window=None, max_window_layers=0),
    "qwen2-window-default-layers": _qwen2(_TINY, use_sliding_window=True, sliding_window=8),
    "qwen2-window-from-1": _qwen2(_TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen2-window-absent": _qwen2(_TINY, use_sliding_window=True, max_window_layers=0),
    "qwen2-layer-types": _qwen2(
        _TINY,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3-window-from-2": _qwen3(_TINY, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    # rotary embeddings
    "rope-linear": _llama(_TINY, rope_scaling={"type": "linear", "factor": 4.0}),
    "rope-linear-integer": _llama(_TINY, rope_scaling={"rope_type": "linear", "type": "linear", "factor": 2}),
    "rope-linear-parameters": _llama(
        _TINY, rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    ),
    "rope-llama3-parameters": _llama(
        _TINY,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **_LLAMA31},
    ),
    "rope-llama3-theta-outside": _llama(
        _TINY,
        max_position_embeddings=131072,
        rope_theta=250000.0,
        rope_parameters={"rope_type": "llama3", **_LLAMA31},
    ),
    "rope-yarn-no-original": _llama(
        _TINY, head_dim=128, max_position_embeddings=4096, rope_scaling={"type": "yarn", "factor": 16.0}
    ),
    "rope-yarn-attention-factor": _qwen3(
        _TINY,
        head_dim=128,
        max_position_embeddings=131072,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "attention_factor": 0.9,
            "beta_fast": 20,
            "beta_slow": 2,
        },
    ),
    "rope-yarn-mscale": _llama(
        _TINY,
        head_dim=64,
        max_position_embeddings=163840,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    ),
    "rope-yarn-mscale-alone": _llama(
        _TINY,
        head_dim=64,
        max_position_embeddings=163840,
        rope_scaling={
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 0,
        },
    ),
    "rope-yarn-not-truncated": _llama(
        _TINY,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "rope-yarn-factor-null": _llama(
        _TINY,
        head_dim=64,
        max_position_embeddings=16384,
        rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
    ),
    "rope-yarn-tiny-original": _llama(
        _TINY,
        max_position_embeddings=64,
        rope_scaling={"type": "yarn", "factor": 2.0, "finetuned": True, "original_max_position_embeddings": 4},
    ),
    "rope-yarn-original-outside": _llama(
        _TINY,
        max_position_embeddings=8192,
        original_max_position_embeddings=2048,
        rope_scaling={"type": "yarn", "factor": 4.0},
    ),
}
