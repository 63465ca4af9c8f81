"""config.json of Llama (2 to 3.2) and Mistral (7B, Nemo, Ministral): the meaning of the families' own keys."""

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

_LLAMA = FamilyDefaults(max_position_embeddings=2048, bos_token_id=1, eos_token_ids=(2,))
_MISTRAL = FamilyDefaults(max_position_embeddings=131072, num_kv_heads=8, bos_token_id=1, eos_token_ids=(2,))


def read_llama(fields: Fields) -> ModelConfig:
    """Llama: full attention everywhere; `attention_bias` is on q, k, v and o alike."""
    if fields.flag("use_sliding_window", True):  # a window that another key switches off is no request
        fields.refuse_unless({"sliding_window": ()})
    count = num_layers(fields)
    windows = windows_from_layer_types(fields, count, None) or (None,) * count
    bias = fields.flag("attention_bias", False)
    flags = FamilyFlags(qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
    return read_decoder(fields, "LlamaForCausalLM", _LLAMA, flags, windows)


def read_mistral(fields: Fields) -> ModelConfig:
    """Mistral and Ministral: no biases; the window (4096 where absent, none for null) is on every layer or on those
    that `layer_types` names."""
    fields.refuse_unless({"attention_bias": (False,), "mlp_bias": (False,)})
    count = num_layers(fields)
    window = sliding_window(fields, default=4096)
    if window is not None:  # the family has no such switch; one set to false would contradict the window
        fields.refuse_unless({"use_sliding_window": (True,)})
    windows = windows_from_layer_types(fields, count, window) or (window,) * count
    return read_decoder(fields, "MistralForCausalLM", _MISTRAL, FamilyFlags(), windows)
