"""What the config.json files of all dense decoder families have in common: shapes, windows, token ids, refusals.

A family's file (`llama`, `qwen`) states its defaults and its meaning of the family's own keys; everything else is read
here, once. Absent keys take the defaults of the family's configuration class in Transformers, whose files omit values
equal to them; the five sizes that no sensible file omits are required.

A config.json may ask for arithmetic that the engine does not do. Keys known to change a model's output are listed in
`_NEUTRAL` with the values at which they change nothing; anything else there is refused by name. Keys that are neither
read nor listed (training settings, cache switches, notes) are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config import ModelConfig
from engine.json_file import brief
from engine.models.fields import Fields
from engine.models.quantization import quantization_fields
from engine.models.rope_config import read_rope

_MAX_SIZE = 1 << 24  # vocabulary, hidden, FFN, context: float32 counts exactly up to here, no real model is near
_MAX_LAYERS = 1 << 12
_MAX_TOKEN = (1 << 31) - 1  # ids travel as int32
_DTYPES = ("bfloat16", "float16", "float32")
_WINDOW_KINDS = ("full_attention", "sliding_attention")

_ONE, _OFF = (1.0,), (False,)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # logits and residual stream scaled or capped
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "final_logit_softcapping": (),
    "residual_multiplier": _ONE,
    "embedding_multiplier": _ONE,
    "scale_emb": _ONE,
    "scale_depth": (),
    "dim_model_base": (),
    "mup_width_scale": _ONE,
    # attention computed differently
    "attn_logit_softcapping": (),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "qk_layernorm": _OFF,
    "use_qk_norm": _OFF,
    "attention_chunk_size": (),
    "attention_sinks": (),
    "attn_temperature_tuning": _OFF,
    "sliding_window_pattern": (),
    "sparse_attention_config": (),
    "dual_chunk_attention_config": (),
    "use_logn_attn": _OFF,
    "kv_lora_rank": (),
    "cross_attention_layers": ([],),
    "add_cross_attention": _OFF,
    "is_encoder_decoder": _OFF,
    "is_causal": (True,),
    "use_bidirectional_attention": _OFF,
    # positions encoded differently
    "partial_rotary_factor": _ONE,
    "rotary_pct": _ONE,
    "rope_ratio": _ONE,
    "rope_local_base_freq": (),
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "mrope_section": (),
    "use_mrope": _OFF,
    "use_dynamic_ntk": _OFF,
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (),
    "alibi": _OFF,
    "position_embedding_type": ("rope", "absolute"),  # "absolute" is what old Transformers wrote for every model
    # another block structure
    "parallel_attn": _OFF,
    "use_parallel_residual": _OFF,
    "hidden_activation": ("silu",),
    "activation_function": ("silu",),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "block_configs": (),
    "per_layer_config": (),
    "pretraining_tp": (1,),
}


@dataclass(frozen=True, slots=True)
class FamilyDefaults:
    """Values a family's config.json may leave out. None for head_dim and num_kv_heads: C / H, and H."""

    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FamilyFlags:
    """Which optional parameters a family's layers have."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False


def read_decoder(
    fields: Fields,
    architecture: str,
    defaults: FamilyDefaults,
    flags: FamilyFlags,
    layer_windows: tuple[int | None, ...],
) -> ModelConfig:
    """The `ModelConfig` that a dense decoder's config.json describes. Raises ConfigError naming key and value."""
    quantization_fields(fields)  # refuses methods nobody reads; what a known one says is no part of the model
    fields.refuse_unless(_NEUTRAL)
    fields.choice("hidden_act", ("silu",), "silu")
    hidden, heads, kv_heads, head_dim = _attention_sizes(fields, defaults)
    max_position = fields.integer("max_position_embeddings", 1, _MAX_SIZE, defaults.max_position_embeddings)
    bos = fields.optional_integer("bos_token_id", 0, _MAX_TOKEN, defaults.bos_token_id)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", 1, _MAX_SIZE),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size", 1, _MAX_SIZE),
        num_layers=len(layer_windows),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        rope=read_rope(fields, max_position),
        max_position_embeddings=max_position,
        layer_windows=layer_windows,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=flags.qkv_bias,
        o_bias=flags.o_bias,
        mlp_bias=flags.mlp_bias,
        qk_norm=flags.qk_norm,
        dtype=_dtype(fields),
        bos_token_id=bos,
        eos_token_ids=fields.integers("eos_token_id", 0, _MAX_TOKEN, defaults.eos_token_ids),
    )


def num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", 1, _MAX_LAYERS)


def sliding_window(fields: Fields, default: int) -> int | None:
    """The file's `sliding_window` in tokens; None for null, `default` where absent."""
    return fields.optional_integer("sliding_window", 1, _MAX_SIZE, default)


def windows_from_layer_types(fields: Fields, count: int, window: int | None) -> tuple[int | None, ...] | None:
    """One window per layer as `layer_types` says, None where the file has no such list.

    count: the number of layers, which the list must match; window: what "sliding_attention" means.
    """
    kinds = fields.strings("layer_types")
    if kinds is None:
        return None
    if len(kinds) != count:
        fields.fail(f"layer_types has {len(kinds)} entries for {count} layers")
    for kind in kinds:
        if kind not in _WINDOW_KINDS:
            fields.fail(f"layer_types asks for {brief(kind)}, not supported; supported: {', '.join(_WINDOW_KINDS)}")
    if window is None and "sliding_attention" in kinds:
        fields.fail("layer_types asks for sliding_attention, but no sliding_window is in force")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _attention_sizes(fields: Fields, defaults: FamilyDefaults) -> tuple[int, int, int, int]:
    """C, H, KVH and D, each what the engine can compute."""
    hidden = fields.integer("hidden_size", 1, _MAX_SIZE)
    heads = fields.integer("num_attention_heads", 1, _MAX_SIZE)
    default_kv = defaults.num_kv_heads or heads
    kv_heads = fields.optional_integer("num_key_value_heads", 1, _MAX_SIZE, default_kv) or heads
    if heads % kv_heads:
        fields.fail(f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}")
    head_dim = fields.optional_integer("head_dim", 1, _MAX_SIZE, defaults.head_dim)
    if head_dim is None and hidden % heads:
        fields.fail(f"without head_dim, hidden_size = {hidden} must be a multiple of num_attention_heads = {heads}")
    head_dim = head_dim or hidden // heads
    if head_dim % 8 or not 8 <= head_dim <= 256:
        fields.fail(f"a head dimension of {head_dim} is not supported; supported: multiples of 8 up to 256")
    return hidden, heads, kv_heads, head_dim


def _dtype(fields: Fields) -> str:
    """The checkpoint's type under its old or new key; float32, which loses nothing, where no key says."""
    spelled = {key: fields.choice(key, _DTYPES) for key in ("dtype", "torch_dtype") if key in fields}
    if len(set(spelled.values())) > 1:
        fields.refuse("torch_dtype", f"differs from dtype = {spelled['dtype']!r}")
    return next(iter(spelled.values()), "float32")
