"""config.json of the dense Qwen models (Qwen2, Qwen2.5, Qwen3): the meaning of the families' own keys."""

from __future__ import annotations

from engine.config import ModelConfig
from engine.models.fields import Fields
from engine.models.hf_config import (
    FamilyDefaults,
    FamilyFlags,
    num_layers,
    read_decoder,
    sliding_window,
    windows_from_layer_types,
)

_QWEN2 = FamilyDefaults(max_position_embeddings=32768, num_kv_heads=32)
_QWEN3 = FamilyDefaults(max_position_embeddings=32768, num_kv_heads=32, head_dim=128)


def read_qwen2(fields: Fields) -> ModelConfig:
    """Qwen2 and Qwen2.5: biases on q, k, v always (no key says so) and nowhere else."""
    fields.refuse_unless({"mlp_bias": (False,)})
    return read_decoder(fields, "Qwen2ForCausalLM", _QWEN2, FamilyFlags(qkv_bias=True), _layer_windows(fields))


def read_qwen3(fields: Fields) -> ModelConfig:
    """Qwen3: RMSNorm over each head of q and k; `attention_bias` is on q, k, v and o alike."""
    fields.refuse_unless({"mlp_bias": (False,)})
    bias = fields.flag("attention_bias", False)
    flags = FamilyFlags(qkv_bias=bias, o_bias=bias, qk_norm=True)
    return read_decoder(fields, "Qwen3ForCausalLM", _QWEN3, flags, _layer_windows(fields))


def _layer_windows(fields: Fields) -> tuple[int | None, ...]:
    """A window applies where `layer_types` says or, without that list, from layer `max_window_layers` upwards.

    `sliding_window` counts only under `use_sliding_window`: the files of models without windows carry a number too.
    """
    count = num_layers(fields)
    window = sliding_window(fields, default=4096) if fields.flag("use_sliding_window", False) else None
    listed = windows_from_layer_types(fields, count, window)
    if listed is not None:
        return listed
    first = fields.integer("max_window_layers", 0, 1 << 24, default=28)
    return tuple(window if layer >= first else None for layer in range(count))
