"""Frozen configuration: what a model is (`ModelConfig`) and how the engine runs it (`EngineConfig`).

A `ModelConfig` is architecture-neutral: a reader in `engine.models` fills it from a checkpoint's `config.json` and
refuses what the engine does not do, so that everything below works from explicit fields and never from JSON. Derived
run-time state (what fits in memory, which kernels run) lives elsewhere; nothing here is changed after construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from engine.errors import InvalidArgument

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding over the whole head (rotate-half pairing: i with i + D/2).

    kind selects the frequency rule; fields a kind does not use keep their defaults.
    attention_factor None means "derive it from factor" as the YaRN paper does; it multiplies cos and sin.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0  # linear, llama3, yarn: context extension factor
    original_max_position: int = 0  # llama3, yarn: context length before extension, tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn, DeepSeek spelling
    mscale_all_dim: float | None = None  # yarn, DeepSeek spelling
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder: shapes, flags and constants. One spelling per dimension: see `engine.ops`.

    layer_windows has one entry per layer: a sliding window in tokens (a query sees itself and the window - 1 tokens
    before it), or None for full attention.
    """

    architecture: str  # as in config.json, e.g. "Qwen3ForCausalLM"
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # KVH, divides H
    head_dim: int  # D, a multiple of 8 up to 256; not necessarily C / H
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    layer_windows: tuple[int | None, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"  # the checkpoint's: "bfloat16" | "float16" | "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)  # no slots, for the same reason as below
class QuantConfig:
    """How linear layers store weights and take activations; `engine.quant.registry` knows the names.

    What is left open (None, "auto") the checkpoint decides, or its absence of quantisation: see `registry.resolve`.
    """

    method: str = "auto"  # what the checkpoint is made for; "bf16", as stored, where it is not quantised
    grade: str | None = None  # how a weight's block scales are chosen; None: the best that needs no data
    fallback: str | None = None  # what layers do whose K does not fit: None refuses them, "bf16" leaves them as stored
    scale: str = "token"  # SharQ's global scale: one per token, or the paper's one per tensor
    compat: bool = False  # round to bf16 between SharQ's paths, as the paper's code does
    head: str | None = None  # lm_head: "bf16" | "fp8" | "nvfp4"; None: as the checkpoint has it


@dataclass(frozen=True)  # no slots: `LLM` takes its defaults from the class's attributes
class EngineConfig:
    """How the engine runs a model. None means "choose, and report under verbose".

    Raises InvalidArgument for values of the wrong type or below the least; names are checked by those who know them.
    """

    device: str = "auto"  # "auto" | "cpu" | "numpy" | "cuda" | "emulate", "emulate:sm_120a"
    dtype: str = "auto"  # activations: "auto" | "bfloat16" | "float16" | "float32"
    max_model_len: int | None = None  # tokens per sequence, prompt and answer together
    max_num_seqs: int = 64  # sequences running at once
    max_num_batched_tokens: int = 512  # tokens per step; longer prefills are cut into chunks
    kv_cache_bytes: int | None = None  # memory for the KV cache
    kv_cache_dtype: str = "auto"  # of K and V: "auto", as the activations; "fp8", E4M3, which holds twice the tokens
    enable_prefix_caching: bool = True
    threads: int | None = None  # CPU threads; None = physical cores available to this process
    deterministic: bool = False  # GPU: a text's bits are the same as prompt and as answer, at a cost in prefill

    def __post_init__(self) -> None:
        for name, least, optional in _COUNTS:
            value = getattr(self, name)
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
                raise InvalidArgument(f"{name} must be a whole number from {least} up, not {value!r}")
        for name in ("device", "dtype", "kv_cache_dtype"):
            if not isinstance(getattr(self, name), str):
                raise InvalidArgument(f"{name} must be text, not {getattr(self, name)!r}")


_COUNTS = (  # name, least, whether None is allowed
    ("max_model_len", 2, True),  # a token of prompt and one of answer
    ("max_num_seqs", 1, False),
    ("max_num_batched_tokens", 1, False),
    ("kv_cache_bytes", 1, True),
    ("threads", 1, True),
)
