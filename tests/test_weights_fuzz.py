"""Spoiled model files: more than 10,000 mutations, each either read correctly or refused with the engine's own error.

The mutations are drawn from fixed seeds, so a failure names an input that fails again. What the safetensors reader
accepts must also be what the format's own library sees, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors

from engine.errors import ConfigError, EngineError, WeightsError
from engine.generation_defaults import GenerationDefaults
from engine.json_file import read_json
from engine.models.registry import read_config
from engine.weights.checkpoint import INDEX, Checkpoint
from engine.weights.safetensors_file import SafetensorsFile
from engine.weights.write import save_safetensors

NUMBERS = [-1, 0, 1, 2, 3, 4, 7, 8, 16, 255, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**39, 10**100]
VALUES: list[Any] = [
    *NUMBERS,
    *(None, True, False, 0.5, -0.0, 8.0, 1e-320, 1e308, float("inf"), float("nan")),
    *("", "x", "\0", "\ud800", "F32", "BF16", "U8", "BOOL", "F4", "F8_E4M3", "default", "yarn", "llama3", "10000"),
    *("../a.safetensors", "a.safetensors", "b.safetensors", "a.safetensors/", "LlamaForCausalLM", "qwen3", "silu"),
    *([], [0], [-1], [0, 0], [0, 8], [8, 0], [2] * 40, [[]], ["full_attention"], {}, {"a": 1}, {"type": "linear"}),
]


def spoil_bytes(rng: Random, data: bytes) -> bytes:
    """One blind change somewhere."""
    if not data:
        return rng.randbytes(rng.randrange(9))
    at = rng.randrange(len(data) + 1)
    length = rng.choice([1, 2, 4, 8, rng.randrange(1, 64)])
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + data[at : at + length] * rng.randrange(2, 4) + data[at + length :]
        case 3:
            return data[:at] + rng.randbytes(length) + data[at + length * rng.randrange(2) :]
        case 4:
            return data[:at] + rng.choice([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"1e999"]) + data[at:]
        case _:
            flipped = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(flipped)


def spoil_number(rng: Random, text: str) -> str:
    """One number becomes another."""
    found = list(re.finditer(r"\d+", text))
    if not found:
        return text
    hit = rng.choice(found)
    near = int(hit[0]) + rng.choice([-8, -1, 1, 8])
    return text[: hit.start()] + str(rng.choice([near, near, *NUMBERS])) + text[hit.end() :]


def spoil_value(rng: Random, value: Any) -> Any:
    """A copy of parsed JSON with one node replaced, removed, renamed or moved."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(VALUES)
    items: list[Any] = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    at = rng.randrange(len(items))
    key, inner = items[at]
    match rng.randrange(8):
        case 0:
            del items[at]
        case 1:
            items.append((rng.choice(["", "x", "__metadata__", "dtype", "shape", key]), rng.choice(VALUES)))
        case 2:
            items[at] = (rng.choice(["", "\0", "__metadata__", items[rng.randrange(len(items))][0]]), inner)
        case 3:
            other = rng.randrange(len(items))
            items[at], items[other] = (key, items[other][1]), (items[other][0], inner)
        case _:
            items[at] = (key, spoil_value(rng, inner))
    return dict(items) if isinstance(value, dict) else [inner for _, inner in items]


def spoil_json(rng: Random, data: bytes) -> bytes:
    """A JSON file spoiled as bytes, as text or as structure."""
    match rng.randrange(6):
        case 0 | 1:
            return spoil_bytes(rng, data)
        case 2:
            return spoil_number(rng, data.decode()).encode()
        case 3:  # a key twice
            names = re.findall(r'"[^"]*"(?=:)', data.decode())
            return data.decode().replace("{", "{" + f"{rng.choice(names)}: {rng.choice(['0', '{}'])}, ", 1).encode()
        case _:
            value = json.loads(data)
            for _ in range(rng.choice([1, 1, 2, 3])):
                value = spoil_value(rng, value)
            return json.dumps(value).encode()


def spoil_safetensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file spoiled blindly, in its header's length, or in its header with the length made to fit."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(6):
        case 0:
            return spoil_bytes(rng, data)
        case 1:
            wrong = rng.choice([length + rng.choice([-8, -1, 1, 8]), *(n for n in NUMBERS if 0 <= n < 2**64)])
            return wrong.to_bytes(8, "little") + data[8:]
        case 2:
            body = spoil_bytes(rng, body)
        case _:
            header = spoil_json(rng, header)
    return len(header).to_bytes(8, "little") + header + body


def attack(batch: str, count: int, seeds: list[bytes], spoil: Callable, path: Path, use: Callable[[], None]) -> int:
    """Run `use` on `count` spoiled versions of `seeds` written to `path`; how many were accepted."""
    accepted = 0
    for number in range(count):
        rng = Random(f"{batch} {number}")
        path.unlink(missing_ok=True)  # overwriting in place waits for the disk on some file systems
        path.write_bytes(spoil(rng, rng.choice(seeds)))
        try:
            use()
            accepted += 1
        except (WeightsError, ConfigError) as problem:
            assert "\n" not in str(problem) and len(str(problem)) < 4000, f"{batch} {number}: {problem}"
        except Exception as problem:
            raise AssertionError(f"{batch} {number}: {problem!r} from {path.read_bytes()[:2000]!r}") from problem
    return accepted


def read_everything(file: SafetensorsFile | Checkpoint) -> dict[str, bytes]:
    with file:
        for name in file.names():
            np.frombuffer(file.tensor(name).tobytes(), np.uint8).sum()
            file.release(name)
        return {name: file.tensor(name).tobytes() for name in file.names()}


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "model.embed.weight": rng.standard_normal((4, 3)).astype(ml_dtypes.bfloat16),
        "model.norm.weight": rng.standard_normal(3).astype(np.float32),
        "packed": rng.integers(0, 256, (2, 5), np.uint8),
        "scales": rng.standard_normal((2, 2)).astype(ml_dtypes.float8_e4m3fn),
        "count": np.array(seed),
        "empty": np.zeros((0, 7), np.float16),
        "mask": rng.integers(0, 2, 3) > 0,
    }


def safetensors_seeds(path: Path) -> list[bytes]:
    seeds = []
    for metadata, count in ((None, 7), ({"format": "pt"}, 3), ({}, 1), ({"a": "b", "c": ""}, 0)):
        save_safetensors(path, dict(list(tensors(count).items())[:count]), metadata)
        seeds.append(path.read_bytes())
    return seeds


@pytest.mark.parametrize("batch", range(3))
def test_safetensors(tmp_path, batch):
    path = tmp_path / "a.safetensors"

    def use() -> None:
        ours = read_everything(SafetensorsFile(path))
        theirs = {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(path.read_bytes())}
        assert ours == theirs

    accepted = attack(f"safetensors {batch}", 2000, safetensors_seeds(path), spoil_safetensors, path, use)
    assert 100 < accepted < 1500  # the mutations reach both sides of the line


def test_index(tmp_path):
    parts = [tensors(1), {f"layer.{name}": array for name, array in tensors(2).items()}]
    files = ["a.safetensors", "b.safetensors"]
    for file, part in zip(files, parts, strict=True):
        save_safetensors(tmp_path / file, part)
    index = {"metadata": {"total_size": 99}, "weight_map": {n: f for f, p in zip(files, parts, strict=True) for n in p}}

    def use() -> None:
        assert set(read_everything(Checkpoint(tmp_path))) == set(index["weight_map"])

    seeds = [json.dumps(index).encode(), json.dumps({"weight_map": index["weight_map"]}, indent=2).encode()]
    accepted = attack("index", 2000, seeds, spoil_json, tmp_path / INDEX, use)
    assert 50 < accepted < 1500


SHARED: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    "eos_token_id": [1, 2],
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: list[dict[str, Any]] = [
    SHARED | {"architectures": ["LlamaForCausalLM"], "rope_scaling": LLAMA3},
    SHARED | {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    SHARED | {"architectures": ["MistralForCausalLM"], "sliding_window": 16, "head_dim": 16},
    SHARED | {"architectures": ["Qwen2ForCausalLM"], "rope_scaling": YARN, "use_sliding_window": False},
    SHARED | {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"] * 2, "head_dim": 8},
]


def test_config(tmp_path):
    path = tmp_path / "config.json"
    seeds = [json.dumps(config).encode() for config in CONFIGS]
    for config in CONFIGS:
        assert read_config(config, path).num_layers == 2

    def use() -> None:
        assert read_config(read_json(path, ConfigError), path).head_dim % 8 == 0

    accepted = attack("config", 2000, seeds, spoil_json, path, use)
    assert 50 < accepted < 1500


def test_generation_config(tmp_path):
    path = tmp_path / "generation_config.json"
    values = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True, "eos_token_id": [1, 2], "min_p": 0.0}
    seeds = [json.dumps(values).encode(), json.dumps(values | {"eos_token_id": 3, "repetition_penalty": 1.1}).encode()]

    def use() -> None:
        found = GenerationDefaults.from_directory(tmp_path, model_eos=(7,), tokenizer_eos=None)
        assert 7 in found.stop_token_ids

    accepted = attack("generation", 500, seeds, spoil_json, path, use)
    assert 10 < accepted < 400


def test_errors_of_other_kinds_would_be_noticed(tmp_path):
    def use() -> None:
        raise KeyError("x")

    with pytest.raises(AssertionError, match="KeyError"):
        attack("none", 1, [b"{}"], spoil_json, tmp_path / "x", use)
    assert issubclass(WeightsError, EngineError) and not issubclass(KeyError, EngineError)
