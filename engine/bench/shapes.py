"""The shapes of published models, by the short names users know: their config.json without the weights.

What a benchmark needs of a model is its matrices, and those follow from a dozen numbers; so every benchmark runs
without a download. The numbers are those of the models' published config.json files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.errors import ConfigError, InvalidArgument
from engine.json_file import read_json
from engine.models.linears import linear_modules
from engine.models.registry import read_config
from engine.quant.scheme import HEAD

_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def _config(family: str, *values: int | bool, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        **dict(zip(_KEYS, values, strict=True)),
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {  # layers, C, F, H, KVH, V, tied
    "qwen2.5-0.5b": _config("Qwen2", 24, 896, 4864, 14, 2, 151936, True),
    "qwen2.5-0.5b-32k": _config("Qwen2", 24, 896, 4864, 14, 2, 32000, True),  # llama.cpp's file of that shape
    "qwen2.5-1.5b": _config("Qwen2", 28, 1536, 8960, 12, 2, 151936, True),
    "qwen2.5-7b": _config("Qwen2", 28, 3584, 18944, 28, 4, 152064, False),
    "qwen3-0.6b": _config("Qwen3", 28, 1024, 3072, 16, 8, 151936, True, head_dim=128),
    "qwen3-8b": _config("Qwen3", 36, 4096, 12288, 32, 8, 151936, False, head_dim=128),
    "llama-3.2-1b": _config("Llama", 16, 2048, 8192, 32, 8, 128256, True, head_dim=64),
    "llama-3.1-8b": _config("Llama", 32, 4096, 14336, 32, 8, 128256, False),
    "tiny": _config("Llama", 2, 256, 512, 4, 2, 512, False),  # no published model: for trying a benchmark out
}


def shape_config(name: str) -> ModelConfig:
    """The named shape. Raises InvalidArgument for a name that is none."""
    if name not in SHAPES:
        raise InvalidArgument(f"unknown shape {name!r}; choose one of {', '.join(SHAPES)}")
    return read_config(SHAPES[name], f"shape {name}")


def any_config(model: str) -> ModelConfig:
    """Of a named shape, or of a directory with a config.json. Raises InvalidArgument, ConfigError."""
    path = Path(model) / "config.json"
    if model in SHAPES or not path.is_file():
        return shape_config(model)
    return read_config(read_json(path, ConfigError), path)


def fused_linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices (N, K) that one layer multiplies in a step, q|k|v and gate|up side by side, and the head."""
    linears = linear_modules(config)
    parts = {name.rpartition(".")[2]: shape for name, shape in linears.items()}  # all layers alike
    groups = {
        "qkv": ("q_proj", "k_proj", "v_proj"),
        "o": ("o_proj",),
        "gate_up": ("gate_proj", "up_proj"),
        "down": ("down_proj",),
        "head": (HEAD,),
    }
    return {name: (sum(parts[p][0] for p in members), parts[members[0]][1]) for name, members in groups.items()}
