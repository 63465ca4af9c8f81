"""Tiny random checkpoints of every architecture, RoPE kind and option the engine reads, written as Hugging Face would.

Each case is a config.json, weights and a tokenizer, about 200 KB in all. The weights come from raw Philox bits through
integer sums, which NumPy guarantees stable, so only Transformers' outputs on them are committed (tests/golden). Scales
are chosen so that activations stay near 1 and logits have a standard deviation near 1; biases and norm weights are far
enough from 0 and 1 that leaving one out shows. Parameter names and shapes are derived here from the JSON alone, without
the engine's config readers, so that the two check each other.

    directory = write_model("qwen3_tied", tmp_path)           # a checkpoint to load
    golden = load_golden("qwen3_tied")                        # what Transformers makes of it
    list(CASES)                                               # all their names
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

GOLDEN_DIR = Path(__file__).parent / "golden"
V = 264  # 256 bytes, two special tokens, six unused
EOS, BOS = 256, 257
PROMPT_TOKENS = 48
_DTYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
Config = dict[str, Any]


@dataclass(frozen=True)
class TinyCase:
    """One checkpoint. `without` are the config overrides that turn the case's feature off: the golden script proves
    with them that the feature shows in the logits (empty where the case has no such switch)."""

    config: Config
    shards: int = 1
    without: Config = field(default_factory=dict)


def _base(architecture: str, model_type: str, **keys: Any) -> Config:
    config: Config = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": V,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "use_cache": True,
        "initializer_range": 0.02,
    }
    if "dtype" in keys:
        del config["torch_dtype"]
    return {**config, **keys}


def _llama(**keys: Any) -> Config:
    return _base("LlamaForCausalLM", "llama", **keys)


def _mistral(**keys: Any) -> Config:
    return _base("MistralForCausalLM", "mistral", **keys)


def _qwen2(**keys: Any) -> Config:
    return _base("Qwen2ForCausalLM", "qwen2", **keys)


def _qwen3(**keys: Any) -> Config:
    return _base("Qwen3ForCausalLM", "qwen3", **{"head_dim": 32, **keys})


# Original context lengths below the prompt's 48 tokens, so that every branch of the frequency rules is taken.
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
_NO_SCALING: Config = {"rope_scaling": None}
_WINDOWED = {"use_sliding_window": True, "sliding_window": 12}

CASES: dict[str, TinyCase] = {
    "llama2_mha_f16": TinyCase(_llama(num_key_value_heads=4, torch_dtype="float16", pretraining_tp=1)),
    "llama2_sharded_f32": TinyCase(_llama(torch_dtype="float32", rms_norm_eps=1e-6), shards=3),
    "llama3_gqa": TinyCase(_llama(rope_theta=500000.0), without={"rope_theta": 10000.0}),
    "llama31_rope_llama3": TinyCase(
        _llama(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **_LLAMA3}, eos_token_id=[EOS, 258]),
        without=_NO_SCALING,
    ),
    "llama32_rope_parameters_tied": TinyCase(
        _llama(
            rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, **_LLAMA3},
            tie_word_embeddings=True,
            dtype="bfloat16",
        ),
        without={"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    "llama_rope_linear": TinyCase(_llama(rope_scaling={"type": "linear", "factor": 2.5}), without=_NO_SCALING),
    "llama_rope_yarn": TinyCase(_llama(rope_scaling={"type": "yarn", **_YARN}), without=_NO_SCALING),
    "llama_rope_yarn_attention_factor": TinyCase(
        _llama(rope_scaling={"rope_type": "yarn", **_YARN, "attention_factor": 1.5, "beta_slow": 2.0}),
        without={"rope_scaling": {"rope_type": "yarn", **_YARN, "beta_slow": 2.0}},
    ),
    "llama_rope_yarn_mscale": TinyCase(
        _llama(rope_scaling={"rope_type": "yarn", **_YARN, "mscale": 3.0, "mscale_all_dim": 0.5, "truncate": False}),
        without={"rope_scaling": {"rope_type": "yarn", **_YARN, "mscale": 3.0, "mscale_all_dim": 0.5}},
    ),
    "llama_biases": TinyCase(_llama(attention_bias=True, mlp_bias=True)),
    "llama_head24_mha6": TinyCase(
        _llama(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=24, intermediate_size=72)
    ),
    "llama_head40": TinyCase(_llama(hidden_size=80, num_attention_heads=2, num_key_value_heads=1)),
    "llama_head80": TinyCase(_llama(hidden_size=72, num_attention_heads=3, num_key_value_heads=1, head_dim=80)),
    "mistral_window": TinyCase(_mistral(sliding_window=16, rope_theta=1e6), without={"sliding_window": None}),
    "mistral_head_dim": TinyCase(_mistral(sliding_window=None, head_dim=24, rope_theta=1e6)),
    "ministral_layer_types": TinyCase(
        _mistral(sliding_window=10, head_dim=16, layer_types=["full_attention", "sliding_attention"]),
        without={"layer_types": ["sliding_attention", "sliding_attention"]},
    ),
    "qwen2_tied_group7": TinyCase(
        _qwen2(
            hidden_size=56,
            num_attention_heads=7,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_theta=1e6,
            sliding_window=32,
            use_sliding_window=False,
            max_window_layers=1,
            rms_norm_eps=1e-6,
        ),
        without={"use_sliding_window": True, "sliding_window": 8},
    ),
    "qwen2_yarn": TinyCase(_qwen2(rope_scaling={"type": "yarn", **_YARN}, rope_theta=1e6), without=_NO_SCALING),
    "qwen2_window_layers": TinyCase(_qwen2(max_window_layers=1, **_WINDOWED), without={"max_window_layers": 0}),
    "qwen2_layer_types": TinyCase(
        _qwen2(layer_types=["sliding_attention", "full_attention"], max_window_layers=2, **_WINDOWED),
        without={"layer_types": None},
    ),
    "qwen3_tied": TinyCase(_qwen3(tie_word_embeddings=True, rope_theta=1e6, rope_scaling=None, rms_norm_eps=1e-6)),
    "qwen3_rope_parameters_f32": TinyCase(
        _qwen3(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}, head_dim=64, torch_dtype="float32"),
        without={"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    ),
    "qwen3_bias_window_yarn": TinyCase(
        _qwen3(
            attention_bias=True,
            max_window_layers=1,
            rope_parameters={"rope_theta": 1e6, "rope_type": "yarn", **_YARN},
            torch_dtype="float16",
            **_WINDOWED,
        ),
        without={"use_sliding_window": False},
    ),
    "qwen3_head256": TinyCase(
        _qwen3(head_dim=256, num_attention_heads=2, num_key_value_heads=1, hidden_size=40, intermediate_size=64)
    ),
}


def write_model(name: str, directory: Path, *, shards: int | None = None) -> Path:
    """Write the case as a checkpoint into `directory` (made if missing) and return it.

    shards: overrides the case's number of safetensors files.
    """
    case = CASES[name]
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", case.config)
    _write_weights(dict(tensors(name)), directory, case.shards if shards is None else shards)
    write_tokenizer(directory)
    return directory


def tensors(name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """The case's parameters by their name in the checkpoint, in its dtype."""
    config = CASES[name].config
    dtype = _DTYPES[config.get("dtype") or config["torch_dtype"]]
    for tensor, shape, mean, std in _parameters(config):
        yield tensor, (mean + std * _bell(f"{name}/{tensor}", shape)).astype(np.float32).astype(dtype)


def weights_digest(name: str) -> str:
    """SHA-256 over names and bytes of all parameters: tells "other weights" from "other arithmetic"."""
    digest = hashlib.sha256()
    for tensor, values in tensors(name):
        digest.update(tensor.encode() + values.tobytes())
    return digest.hexdigest()


def prompt() -> list[int]:
    """The fixed prompt of all golden outputs: PROMPT_TOKENS byte tokens, no special ones."""
    return [int(value) for value in _bits("prompt", PROMPT_TOKENS) % 256]


@dataclass(frozen=True)
class Golden:
    """What Transformers computes in float32 (weights as stored) on a case's checkpoint.

    greedy continues `prompt` by the arg max; margins[i] is the winner's lead over the second at that step. Where it is
    small another arithmetic may choose otherwise, so compare steps along these tokens rather than along one's own.
    """

    prompt: list[int]
    logits: NDArray[np.float32]  # [PROMPT_TOKENS, V]
    greedy: list[int]
    margins: list[float]
    bfloat16_rms: float  # RMS error of Transformers' own bfloat16 run / standard deviation of logits, for orientation


def load_golden(name: str) -> Golden:
    """The committed outputs of one case."""
    record = golden_record()["cases"][name]
    with np.load(GOLDEN_DIR / "logits.npz") as arrays:
        logits = arrays[name]
    return Golden(prompt(), logits, record["greedy"], record["margins"], record["bfloat16_rms"])


@cache
def golden_record() -> dict[str, Any]:
    """tests/golden/golden.json: versions, and per case digest, greedy tokens and margins."""
    record: dict[str, Any] = json.loads((GOLDEN_DIR / "golden.json").read_text())
    return record


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: token i is byte i, then the special tokens."""
    specials = {"<|endoftext|>": EOS, "<|begin|>": BOS}
    added = [
        {
            "id": i,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for text, i in specials.items()
    ]
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False, "ignore_merges": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "bos_token": "<|begin|>"})


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files: itself, or one from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


Parameter = tuple[str, tuple[int, ...], float, float]  # name, shape, mean, standard deviation


def _parameters(config: Config) -> Iterator[Parameter]:
    hidden, tied = config["hidden_size"], config["tie_word_embeddings"]
    embedding_std = hidden**-0.5 if tied else 1.0  # tied: the table is the head as well, and sets the logits' scale
    yield "model.embed_tokens.weight", (V, hidden), 0.0, embedding_std
    for layer in range(config["num_hidden_layers"]):
        yield from _layer_parameters(config, f"model.layers.{layer}.")
    yield "model.norm.weight", (hidden,), 1.0, 0.2
    if not tied:
        yield "lm_head.weight", (V, hidden), 0.0, hidden**-0.5


def _layer_parameters(config: Config, prefix: str) -> Iterator[Parameter]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    o_bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    qkv_bias = o_bias or config["model_type"] == "qwen2"
    linears = {
        "self_attn.q_proj": (queries, hidden, qkv_bias),
        "self_attn.k_proj": (keys, hidden, qkv_bias),
        "self_attn.v_proj": (keys, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, queries, o_bias),
        "mlp.gate_proj": (ffn, hidden, mlp_bias),
        "mlp.up_proj": (ffn, hidden, mlp_bias),
        "mlp.down_proj": (hidden, ffn, mlp_bias),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{norm}.weight", (hidden,), 1.0, 0.2
    for module, (rows, columns, has_bias) in linears.items():
        yield f"{prefix}{module}.weight", (rows, columns), 0.0, columns**-0.5
        if has_bias:
            yield f"{prefix}{module}.bias", (rows,), 0.0, 0.4
    for norm in ("q_norm", "k_norm") if config["model_type"] == "qwen3" else ():
        yield f"{prefix}self_attn.{norm}.weight", (head_dim,), 1.0, 0.2


def _bits(label: str, count: int) -> NDArray[np.uint64]:
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:16], "little")
    return np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64)


def _bell(label: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Bell-shaped values of mean 0 and standard deviation 1: sums of four 16-bit numbers, exact in integers."""
    parts = _bits(label, int(np.prod(shape))).astype("<u8").view("<u2").reshape(-1, 4)
    total = parts.astype(np.int64).sum(axis=1) - 2 * 65535
    return np.asarray(total / np.sqrt(4 * (65536**2 - 1) / 12), np.float64).reshape(shape)


def _write_weights(parameters: dict[str, NDArray[Any]], directory: Path, shards: int) -> None:
    if shards == 1:
        save_file(parameters, directory / "model.safetensors", {"format": "pt"})
        return
    names = list(parameters)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: parameters[name] for name in names[shard::shards]}
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(values.nbytes for values in parameters.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
