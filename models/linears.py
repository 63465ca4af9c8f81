"""Which linear layers a decoder has, from its configuration alone: what quantising a checkpoint needs to know."""

from __future__ import annotations

from engine.config import ModelConfig
from engine.quant.scheme import HEAD

EMBEDDING = "model.embed_tokens"


def linear_modules(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module -> (N, K), layer by layer, the head last (its weight is the embedding's where the two are tied)."""
    C, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * D, config.num_kv_heads * D
    shapes = {
        "self_attn.q_proj": (queries, C),
        "self_attn.k_proj": (keys, C),
        "self_attn.v_proj": (keys, C),
        "self_attn.o_proj": (C, queries),
        "mlp.gate_proj": (F, C),
        "mlp.up_proj": (F, C),
        "mlp.down_proj": (C, F),
    }
    layers = range(config.num_layers)
    found = {f"model.layers.{layer}.{part}": shape for layer in layers for part, shape in shapes.items()}
    return found | {HEAD: (config.vocab_size, C)}
