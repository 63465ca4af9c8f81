"""Bad input end to end: each is the engine's own error with the deciding name or number in it, and nothing else breaks.

The parsers have tests and fuzzers of their own; here whole model directories, requests and command lines are spoiled.
A healthy engine runs beside all of it and must go on answering as before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_locate import Hub
from test_weights_fuzz import spoil_json, spoil_safetensors
from tiny_models import V, tensors, write_model
from tiny_models import _write_weights as write_weights

import engine.memory
from engine import LLM, SamplingParams
from engine.errors import (
    CapacityError,
    ConfigError,
    DeviceError,
    EngineClosed,
    EngineError,
    InvalidArgument,
    ModelNotFound,
    NumericalError,
    RequestError,
    TokenizerError,
    WeightsError,
)

ROOT = Path(__file__).resolve().parent.parent
NAME = "qwen2_window_layers"  # untied, with biases and two layers
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(NAME, tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def healthy(original: Path) -> Iterator[tuple[LLM, list[int]]]:
    """An engine that lives through all tests, and what it answers."""
    with LLM(original) as llm:
        yield llm, llm.generate("hello", GREEDY)[0].outputs[0].token_ids


@pytest.fixture
def directory(original: Path, tmp_path: Path, healthy: tuple[LLM, list[int]]) -> Iterator[Path]:
    """A copy to spoil; afterwards the healthy engine must still serve."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    yield tmp_path
    llm, expected = healthy
    assert llm.generate("hello", GREEDY)[0].outputs[0].token_ids == expected


# ---- ways to spoil a directory ------------------------------------------------------------------------------------


def remove(name: str) -> Spoil:
    return lambda directory: (directory / name).unlink()


def write(name: str, content: str | bytes) -> Spoil:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def edit(name: str, **changes: Any) -> Spoil:
    """Set keys of a JSON file; None removes one."""

    def spoil(directory: Path) -> None:
        file = directory / name
        values = json.loads(file.read_text()) if file.exists() else {}
        values = {key: value for key, value in (values | changes).items() if value is not None}
        file.write_text(json.dumps(values))

    return spoil


def cut(size: int) -> Spoil:
    """Keep this many bytes of the weights; a negative number is cut off the end."""
    return lambda directory: (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:size])


def header_length(change: Callable[[int], int]) -> Spoil:
    def spoil(directory: Path) -> None:
        data = (directory / WEIGHTS).read_bytes()
        length = change(int.from_bytes(data[:8], "little"))
        (directory / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])

    return spoil


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change the parsed header; the tensors' bytes stay where they are."""

    def spoil(directory: Path) -> None:
        data = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def entry(name: str, **fields: Any) -> Spoil:
    return header(lambda entries: entries[name].update(fields))


def duplicate_name(directory: Path) -> None:
    data = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = (
        data[8 : 8 + length].rstrip(b" ")[:-1] + b',"lm_head.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}'
    )
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def weights(change: Callable[[dict[str, Any]], object], shards: int = 1) -> Spoil:
    """Well-formed files of other tensors."""

    def spoil(directory: Path) -> None:
        parameters = {name: values.copy() for name, values in tensors(NAME)}
        change(parameters)
        (directory / WEIGHTS).unlink()
        write_weights(parameters, directory, shards)

    return spoil


def poison(name: str, value: float) -> Spoil:
    def change(parameters: dict[str, Any]) -> None:
        parameters[name].reshape(-1)[-1] = value

    return weights(change)


def sharded(then: Spoil) -> Spoil:
    def spoil(directory: Path) -> None:
        weights(lambda parameters: None, shards=3)(directory)
        then(directory)

    return spoil


def config_directory(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()


NORM, QUERY, BIAS = (
    "model.norm.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.bias",
)
MLP, HEAD, EMBEDDING = "model.layers.0.mlp.down_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
SHARD = "model-00002-of-00003.safetensors"

DIRECTORIES: dict[str, tuple[Spoil, type[EngineError], tuple[str, ...]]] = {
    # weight files
    "no weights": (remove(WEIGHTS), WeightsError, (WEIGHTS, INDEX)),
    "other format only": (
        lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"),
        WeightsError, ("pytorch_model.bin", "only safetensors"),
    ),
    "data cut": (cut(-10), WeightsError, ("truncated",)),
    "header cut": (cut(200), WeightsError, ("200", "truncated")),
    "7 bytes": (cut(7), WeightsError, ("7 bytes",)),
    "0 bytes": (cut(0), WeightsError, ("0 bytes",)),
    "extra bytes": (lambda d: (d / WEIGHTS).open("ab").write(b"x" * 77), WeightsError, ("77 unused bytes",)),
    "a text file": (write(WEIGHTS, "hello " * 100), WeightsError, ("not safetensors",)),
    "a Git LFS pointer": (write(WEIGHTS, "version https://git-lfs.github.com/spec"), WeightsError, ("git lfs pull",)),
    "header too long by 1": (header_length(lambda n: n + 1), WeightsError, ("header: not UTF-8",)),
    "header too short by 1": (header_length(lambda n: n - 1), WeightsError, ("1 unused bytes",)),
    "header of 0 bytes": (header_length(lambda n: 0), WeightsError, ("header",)),
    "header beyond the file": (header_length(lambda n: 99_000_000), WeightsError, ("99000000", "truncated")),
    "header of 2^63 bytes": (header_length(lambda n: 2**63), WeightsError, (str(2**63),)),
    "overlap": (
        header(lambda e: e[QUERY].update(data_offsets=e[MLP]["data_offsets"], shape=e[MLP]["shape"])),
        WeightsError, ("overlap", QUERY),
    ),
    "out of range": (entry(NORM, data_offsets=[10**12, 10**12 + 128]), WeightsError, (NORM, "truncated")),
    "backwards": (entry(NORM, data_offsets=[128, 0]), WeightsError, (NORM, "-128")),
    "negative": (entry(NORM, data_offsets=[-128, 0]), WeightsError, (NORM, "-128")),
    "absurd shape": (entry(NORM, shape=[2**62, 2**62]), WeightsError, (NORM, str(2**62), "beyond any memory")),
    "large shape": (entry(NORM, shape=[2**40, 8]), WeightsError, (NORM, str(2**40))),
    "zero times absurd": (entry(NORM, shape=[0, 2**62]), WeightsError, (NORM,)),
    "shape of text": (entry(NORM, shape="64"), WeightsError, (NORM, "shape")),
    "unknown dtype": (entry(NORM, dtype="F12"), WeightsError, (NORM, "F12")),
    "duplicate name": (duplicate_name, WeightsError, ("lm_head.weight", "more than once")),
    "missing shard": (sharded(remove(SHARD)), WeightsError, (SHARD, "1 of the 3 files")),
    "cut shard": (sharded(lambda d: os.truncate(d / SHARD, 3000)), WeightsError, (SHARD,)),
    "one shard twice": (
        sharded(lambda d: shutil.copy(d / "model-00001-of-00003.safetensors", d / SHARD)), WeightsError, (SHARD, INDEX),
    ),
    "shard outside": (
        sharded(edit(INDEX, weight_map={NORM: "../x.safetensors"})), WeightsError, ("../x.safetensors", NORM),
    ),
    "index malformed": (sharded(write(INDEX, "{]")), WeightsError, (INDEX, "line 1, column 2")),
    # what is in them
    "leftover tensor": (
        weights(lambda p: p.update({"model.layers.2.extra": np.zeros(5, np.float32)})),
        WeightsError, ("model.layers.2.extra", "[5]"),
    ),
    "missing tensor": (weights(lambda p: p.pop(BIAS)), WeightsError, (BIAS, "[32]")),
    "wrong shape": (weights(lambda p: p.update({MLP: p[MLP].T.copy()})), WeightsError, (MLP, "[64, 96]", "[96, 64]")),
    "wrong dtype": (weights(lambda p: p.update({MLP: p[MLP].astype(np.int8)})), WeightsError, (MLP, "I8")),
    "double precision": (weights(lambda p: p.update({MLP: p[MLP].astype(np.float64)})), WeightsError, (MLP, "F64")),
    "8-bit floats": (
        weights(lambda p: p.update({MLP: p[MLP].astype(np.float32).astype(ml_dtypes.float8_e4m3fn)})),
        WeightsError, (MLP, "F8_E4M3"),
    ),
    **{
        f"{value} in {name}": (poison(name, value), NumericalError, (name, "NaN or infinite"))
        for name, value in zip((NORM, QUERY, BIAS, MLP, HEAD, EMBEDDING), (np.nan, np.inf, -np.inf) * 2, strict=True)
    },
    # config.json
    "no config": (remove("config.json"), ConfigError, ("config.json", "no such file")),
    "config cut": (lambda d: os.truncate(d / "config.json", 99), ConfigError, ("config.json", "malformed JSON")),
    "config empty": (write("config.json", ""), ConfigError, ("config.json",)),
    "config a list": (write("config.json", "[]"), ConfigError, ("config.json", "list")),
    "config not UTF-8": (write("config.json", b'{"a": "\xff"}'), ConfigError, ("config.json", "byte 7")),
    "config key twice": (write("config.json", '{"a": 1, "a": 2}'), ConfigError, ("'a'", "more than once")),
    "config a directory": (config_directory, ConfigError, ("config.json", "not a regular file")),
    "unsupported architecture": (
        edit("config.json", architectures=["MixtralForCausalLM"]),
        ConfigError, ("MixtralForCausalLM", "LlamaForCausalLM"),
    ),
    "no architecture": (edit("config.json", architectures=None), ConfigError, ("architectures",)),
    "unknown rope": (
        edit("config.json", rope_scaling={"type": "longrope", "factor": 2.0}), ConfigError, ("longrope", "yarn"),
    ),
    "quantised": (edit("config.json", quantization_config={"quant_method": "awq"}), ConfigError, ("awq",)),
    "other activation": (edit("config.json", hidden_act="gelu"), ConfigError, ("hidden_act", "gelu")),
    "head size": (edit("config.json", head_dim=20), ConfigError, ("config.json", "20", "multiples of 8")),
    "heads": (edit("config.json", num_key_value_heads=3), ConfigError, ("num_key_value_heads", "3")),
    "size of text": (edit("config.json", hidden_size="64"), ConfigError, ("hidden_size", '"64"')),
    "negative size": (edit("config.json", num_hidden_layers=-2), ConfigError, ("num_hidden_layers", "-2")),
    "one position": (edit("config.json", max_position_embeddings=1), EngineError, ("1",)),
    "too many layers": (edit("config.json", num_hidden_layers=50), WeightsError, ("model.layers.2.", "missing")),
    "too wide": (edit("config.json", hidden_size=1 << 24, head_dim=16), WeightsError, (str(1 << 24), "[264, 64]")),
    # the rest
    "no tokenizer": (remove("tokenizer.json"), TokenizerError, ("no tokenizer.json",)),
    "tokenizer malformed": (write("tokenizer.json", "{"), TokenizerError, ("tokenizer.json",)),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), TokenizerError, ("tokenizer.json",)),
    "tokenizer config malformed": (write("tokenizer_config.json", "{'a': 1}"), TokenizerError, ("line 1, column 2",)),
    "unknown end token": (edit("tokenizer_config.json", eos_token="<end>"), TokenizerError, ("<end>",)),
    "generation config malformed": (write("generation_config.json", "hi"), ConfigError, ("generation_config.json",)),
    "hot": (write("generation_config.json", '{"temperature": -1}'), ConfigError, ("temperature", "-1")),
    "end of text": (write("generation_config.json", '{"eos_token_id": "x"}'), ConfigError, ("eos_token_id", "'x'")),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTORIES)
def test_a_spoiled_directory_is_refused(directory: Path, case: str) -> None:
    spoil, kind, parts = DIRECTORIES[case]
    spoil(directory)
    with pytest.raises(kind) as caught:
        LLM(directory)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message and len(message) < 2000


def test_the_same_directory_unspoiled_is_accepted(directory: Path, healthy: tuple[LLM, list[int]]) -> None:
    _, expected = healthy
    for spoil in (lambda d: None, weights(lambda p: None, shards=3)):
        spoil(directory)
        with LLM(directory) as llm:
            assert llm.generate("hello", GREEDY)[0].outputs[0].token_ids == expected


# ---- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        ({"model": "/no/such/directory"}, ModelNotFound, ("/no/such/directory",)),
        ({"model": "qwen3-9b"}, ModelNotFound, ("qwen3-8b",)),
        ({"model": ""}, ModelNotFound, ("''",)),
        ({"model": "a\0b"}, ModelNotFound, ("a\\x00b",)),
        ({"revision": "main"}, InvalidArgument, ("main", "not downloaded")),
        ({"device": "emulate:sm_11"}, DeviceError, ("sm_11", "sm_120")),
        ({"device": "tpu"}, InvalidArgument, ("tpu", "cpu")),
        ({"dtype": "float8"}, InvalidArgument, ("float8", "bfloat16")),
        ({"threads": 0}, InvalidArgument, ("threads", "0")),
        ({"max_model_len": 129}, InvalidArgument, ("129", "128")),
        ({"max_model_len": 1}, InvalidArgument, ("max_model_len", "1")),
        ({"max_num_seqs": 0}, InvalidArgument, ("max_num_seqs", "0")),
        ({"kv_cache_bytes": 1000}, CapacityError, ("holds 0 tokens", "kv_cache_bytes")),
        ({"kv_cache_bytes": 20_000, "max_model_len": 100}, CapacityError, ("100", "lower max_model_len")),
    ],
)
def test_unusable_arguments(
    directory: Path, arguments: dict[str, Any], kind: type[EngineError], parts: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        LLM(**{"model": directory, **arguments})
    for part in parts:
        assert part in str(caught.value)
    assert isinstance(caught.value, ValueError) == issubclass(kind, InvalidArgument)


def test_a_length_beyond_the_models_is_refused_before_the_weights_are_read(directory: Path) -> None:
    remove(WEIGHTS)(directory)
    with pytest.raises(InvalidArgument, match="max_model_len 129 is beyond the model's context length, 128"):
        LLM(directory, max_model_len=129)


def test_little_memory_shortens_what_was_not_asked_for_and_refuses_what_was(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(directory) as llm:
        block_bytes, block = llm._plan.nbytes // llm._plan.num_blocks, llm._plan.block_size
    monkeypatch.setattr(engine.memory, "available_memory", lambda: 4 * 3 * block_bytes)  # a quarter is for the cache
    with LLM(directory) as llm:
        assert llm.max_model_len == 3 * block and f"up to {3 * block} tokens" in llm.describe()
        assert llm.generate("x" * (3 * block - 1), GREEDY)[0].outputs[0].finish_reason == "length"
        with pytest.raises(RequestError, match=f"at most {3 * block - 1} fit"):
            llm.generate("x" * 3 * block)
    with pytest.raises(CapacityError, match=f"holds {3 * block} tokens, fewer than the wanted 100"):
        LLM(directory, max_model_len=100)
    monkeypatch.setattr(engine.memory, "available_memory", lambda: 0)
    with pytest.raises(CapacityError, match="holds 0 tokens"):
        LLM(directory)


def test_a_system_that_refuses_the_cache(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("engine.ops.reference.ReferenceOps.new_kv_cache", refuse)
    with pytest.raises(CapacityError, match="refuses a KV cache of"):
        LLM(directory, device="numpy")


# ---- requests -----------------------------------------------------------------------------------------------------

HUGE = 10**400  # more than a float holds
PARAMS: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 1.0, "2", True, None.__class__, 1025, HUGE]),
    ("temperature", [-0.1, -1, float("nan"), float("inf"), "hot", True, HUGE, -HUGE, [1]]),
    ("top_p", [0, 0.0, -0.5, 1.0001, 2, float("nan"), "1", HUGE]),
    ("top_k", [-2, 1.5, "5", HUGE * -1]),
    ("min_p", [-0.1, 1.1, float("nan"), float("-inf")]),
    ("repetition_penalty", [0, -1, float("inf"), float("nan"), "x"]),
    ("presence_penalty", [-2.1, 2.1, float("nan"), "x"]),
    ("frequency_penalty", [-2.1, 2.1, float("nan"), "x"]),
    ("max_tokens", [0, -1, 1.5, "10", False]),
    ("min_tokens", [-1, 0.5, "1"]),
    ("logprobs", [-1, 1.0, True]),
    ("prompt_logprobs", [-1, 1.0, "all"]),
    ("seed", [-1, 1.5, "x"]),
    ("stop", ["", [""], ["ok", ""], [5], 5, [None], [b"x"], b"x"]),
    ("stop_token_ids", [[-1], [1.5], ["x"], 5, [True], [None], "7"]),
    ("logit_bias", [{-1: 0.0}, {"1": 0.0}, {1: 101}, {1: float("nan")}, {1: "x"}, {1: None}, {None: 1}, [1], 5]),
    ("ignore_eos", [1, 0, "yes", None]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in PARAMS for value in values])
def test_invalid_sampling_parameters(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert name.removesuffix("_ids") in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "params",
    [
        *({"temperature": value} for value in (0, 0.0, 1e-9, 100.0, np.float32(0.5), np.int64(1))),
        *({"top_p": value} for value in (1e-9, 1, 1.0, np.float64(0.5))),
        *({"top_k": value} for value in (-1, 0, 1, 10**9, np.int32(5))),
        *({"min_p": value} for value in (0, 1)),
        *({"n": value} for value in (1, np.int64(3))),
        {"repetition_penalty": 1e-3},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"stop": "x"},
        {"stop": ["a", "b"], "stop_token_ids": [np.int64(5)], "logit_bias": {np.int64(5): 100, 6: -100}},
        {"stop": [], "stop_token_ids": [], "logit_bias": {}},
        {"max_tokens": 3, "min_tokens": 3},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"seed": 0},
        {"seed": 2**64 - 1},
    ],
)
def test_sampling_parameters_at_their_limits(healthy: tuple[LLM, list[int]], params: dict[str, Any]) -> None:
    llm, _ = healthy
    (out,) = llm.generate("hello", SamplingParams(**{"max_tokens": 4, **params}))
    assert len(out.outputs) == params.get("n", 1) and all(1 <= len(output.token_ids) <= 4 for output in out.outputs)


def test_contradicting_sampling_parameters() -> None:
    with pytest.raises(RequestError, match="min_tokens 6 is larger than max_tokens 5"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_parameters_do_not_change_with_what_they_were_made_from() -> None:
    bias, stop, ids = {1: 1.0}, ["a"], [1]
    params = SamplingParams(logit_bias=bias, stop=stop, stop_token_ids=ids)
    bias[2], stop[0], ids[0] = 1e9, "", -5
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({1: 1.0}, ("a",), (1,))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ("x" * 128, "128 tokens and at most 127 fit"),
        ([1] * 100_000, "100000 tokens and at most 127 fit"),
        ([V], f"token {V} at position 0"),
        ([1, 2, -1], "token -1 at position 2"),
        ([2**70], f"token {2**70} at position 0"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_requests_that_can_never_be_served(directory: Path, prompt: Any, message: str) -> None:
    with LLM(directory) as llm:
        expected = llm.generate("fine", GREEDY)[0].outputs
        for call in (llm.generate, llm.stream, llm.logits):
            if (prompt, call) == ([], llm.generate):
                continue  # no prompts at all
            if call == llm.logits and isinstance(prompt, str):
                continue
            with pytest.raises(RequestError, match="128 fit" if call == llm.logits and "fit" in message else message):
                call(prompt)
        assert llm.generate("fine", GREEDY)[0].outputs == expected


# ---- the command line ---------------------------------------------------------------------------------------------


def generate(*arguments: object, stdin: bytes = b"", **environment: str) -> tuple[int, bytes, str]:
    """Exit code, stdout and stderr of `python -m engine.generate`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    inherited = {key: value for key, value in inherited.items() if not key.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-m", "engine.generate", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=inherited | environment,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def refused(result: tuple[int, bytes, str]) -> str:
    """The one line of an orderly failure."""
    code, out, err = result
    assert (code, out) == (1, b"") and err.startswith("error: ") and err.count("\n") == 1, result
    return err


def test_the_command_line_refuses_in_one_line(directory: Path) -> None:
    assert "sm_11" in refused(generate("--model", directory, "-p", "x", "--device", "emulate:sm_11"))
    assert "(byte 1: " in refused(generate("--model", directory, "-p", "-", stdin=b"a\x80"))
    poison(NORM, np.nan)(directory)
    assert NORM in refused(generate("--model", directory, "-p", "x"))


def test_downloading_into_an_unusable_cache(original: Path, tmp_path: Path) -> None:
    """And, so that the failure means something, into a usable one."""
    server = Hub({"tiny/model": {file.name: file.read_bytes() for file in original.iterdir()}}, {})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        blocked = tmp_path / "blocked"
        blocked.write_text("a file where the cache should be")
        arguments = ("--model", "tiny/model", "-p", "hello", "--temp", 0, "-m", 6)
        code, out, err = generate(*arguments, HF_ENDPOINT=server.url, HF_HUB_CACHE=str(blocked))
        assert (code, out) == (1, b"") and "Traceback" not in err
        message = err.splitlines()[-1]  # the Hub's library may have said something before
        assert message.startswith("error: ") and str(blocked) in message and "writable" in message
        code, out, err = generate(*arguments, HF_ENDPOINT=server.url, HF_HUB_CACHE=str(tmp_path / "hub"))
        assert code == 0 and out and "generation" in err
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# ---- fuzzing ------------------------------------------------------------------------------------------------------

FILES: dict[str, Callable[[Random, bytes], bytes]] = {
    "config.json": spoil_json,
    "generation_config.json": spoil_json,
    "tokenizer_config.json": spoil_json,
    WEIGHTS: spoil_safetensors,
}


@pytest.mark.parametrize("file", FILES)
def test_spoiled_directories_raise_only_the_engines_errors(directory: Path, file: str) -> None:
    """Each is refused by LLM(...), or answers, or fails the request; the seeds are fixed, so a failure fails again."""
    edit("generation_config.json", temperature=0.7, top_p=0.9, eos_token_id=[256, 3], repetition_penalty=1.1)(directory)
    edit("tokenizer_config.json", add_bos_token=False, added_tokens_decoder={})(directory)
    good = (directory / file).read_bytes()
    accepted = 0
    params = SamplingParams(max_tokens=3, min_tokens=2, seed=1, logprobs=2)
    for number in range(400):
        data = FILES[file](Random(f"{file} {number}"), good)
        (directory / file).unlink()  # a mapping of the old one may still be read
        (directory / file).write_bytes(data)
        try:
            with LLM(directory, threads=1, kv_cache_bytes=1 << 20) as llm:
                llm.generate("hello", params)
            accepted += 1
        except EngineClosed as problem:
            raise AssertionError(f"{file} {number}: {problem} from {data[:2000]!r}") from problem
        except EngineError as problem:
            assert "\n" not in str(problem) and len(str(problem)) < 4000, f"{file} {number}: {problem}"
        except Exception as problem:
            raise AssertionError(f"{file} {number}: {problem!r} from {data[:2000]!r}") from problem
    assert 10 < accepted < 390, "the mutations reach both sides of the line"
