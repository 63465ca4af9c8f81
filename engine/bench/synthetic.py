"""Model directories with random weights in the shapes of real models: for timing, where values do not matter.

The tokenizer knows single bytes only, so give such a model token ids. Weights are bf16, scaled to keep activations
finite; nothing sensible comes out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engine.weights.write import save_safetensors

# "qwen2.5-0.5b-32k" has a vocabulary of 32,000 instead of 151,936, as the peer's file of that shape has.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b-32k": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "dtype": "bfloat16",
    },
}


def write_synthetic(shape: str, directory: Path) -> None:
    """A Hugging Face style directory of the named shape; an existing one is kept."""
    if (directory / "model.safetensors").exists():
        return
    config = SHAPES[shape]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _byte_tokenizer().save(str(directory / "tokenizer.json"))
    save_safetensors(directory / "model.safetensors", dict(_tensors(config)))


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    rng = np.random.default_rng(0)
    C, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    D = C // config["num_attention_heads"]
    kv_rows = config["num_key_value_heads"] * D

    def matrix(N: int, K: int) -> NDArray[Any]:
        values = rng.standard_normal((N, K), np.float32) * np.float32(K**-0.5)
        return values.astype(ml_dtypes.bfloat16)

    def vector(N: int, value: float) -> NDArray[Any]:
        return np.full(N, value, ml_dtypes.bfloat16)

    yield "model.embed_tokens.weight", matrix(V, C)
    yield "model.norm.weight", vector(C, 1)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", vector(C, 1)
        yield f"{prefix}.post_attention_layernorm.weight", vector(C, 1)
        for name, rows in (("q", C), ("k", kv_rows), ("v", kv_rows)):
            yield f"{prefix}.self_attn.{name}_proj.weight", matrix(rows, C)
            yield f"{prefix}.self_attn.{name}_proj.bias", vector(rows, 0)
        yield f"{prefix}.self_attn.o_proj.weight", matrix(C, C)
        yield f"{prefix}.mlp.gate_proj.weight", matrix(F, C)
        yield f"{prefix}.mlp.up_proj.weight", matrix(F, C)
        yield f"{prefix}.mlp.down_proj.weight", matrix(C, F)
