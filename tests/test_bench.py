"""Benchmarks: what they measure and how they report it. No test looks at how long anything takes."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from engine import LLM
from engine.bench import gemm, model, synthetic, versus_llama_cpp
from engine.bench.__main__ import build_parser
from engine.bench.gemm import Product, fitting, memory_needed, operand_bytes
from engine.bench.report import as_csv, as_markdown, load_pyplot
from engine.bench.shapes import SHAPES, any_config, fused_linears, shape_config
from engine.bench.steps import OneSequence
from engine.bench.timing import Call, CpuDevice, copies_for, interleaved, last_level_cache
from engine.config import QuantConfig
from engine.core import Batch
from engine.errors import DeviceError, InvalidArgument
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.models.linears import linear_modules
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.ops.fp8 import E4M3
from engine.ops.reference import ReferenceOps
from engine.quant.registry import METHODS, LayerMethods, bits_per_weight, resolve
from engine.runner import ModelRunner
from engine.workspace import Workspace

BF16 = np.dtype(ml_dtypes.bfloat16)

# ---- shapes ----------------------------------------------------------------------------------------------------------

# Parameters in billions as the models' cards give them: outside the embedding (and head), and in all.
PUBLISHED = {
    "qwen2.5-0.5b": (0.36, 0.49),
    "qwen2.5-1.5b": (1.31, 1.54),
    "qwen2.5-7b": (6.53, 7.62),
    "qwen3-0.6b": (0.44, 0.60),
    "qwen3-8b": (6.95, 8.19),
    "llama-3.2-1b": (0.97, 1.24),
    "llama-3.1-8b": (6.98, 8.03),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_sizes(name: str) -> None:
    config = shape_config(name)
    linears = linear_modules(config)
    table = config.vocab_size * config.hidden_size
    body = sum(N * K for N, K in linears.values()) - table
    whole = body + table * (1 if config.tie_word_embeddings else 2)
    assert (body / 1e9, whole / 1e9) == pytest.approx(PUBLISHED[name], abs=0.0051)  # norms and biases are less


def test_fused_linears_are_all_of_a_models_linears() -> None:
    for name in SHAPES:
        config = shape_config(name)
        fused = fused_linears(config)
        head = fused.pop("head")
        per_layer = sum(N * K for N, K in fused.values())
        assert per_layer * config.num_layers + head[0] * head[1] == sum(
            N * K for N, K in linear_modules(config).values()
        )
    assert fused_linears(shape_config("qwen2.5-7b")) == {
        "qkv": (4608, 3584),
        "o": (3584, 3584),
        "gate_up": (37888, 3584),
        "down": (3584, 18944),
        "head": (152064, 3584),
    }


def test_a_shape_or_a_directory(tmp_path: Path) -> None:
    tiny_models.write_model("qwen3_tied", tmp_path)
    assert any_config(str(tmp_path)).hidden_size == 64
    with pytest.raises(InvalidArgument, match=r"unknown shape 'gpt-2'; choose one of qwen2\.5-0\.5b, "):
        any_config("gpt-2")


# ---- timing ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 32), st.integers(1, 1 << 30))
def test_a_rotation_is_just_larger_than_asked(nbytes: int, rotation: int) -> None:
    copies = copies_for(nbytes, rotation)
    assert copies * nbytes >= rotation
    assert copies == 1 or (copies - 1) * nbytes < rotation


def test_last_level_cache(tmp_path: Path) -> None:
    """Four CPUs in pairs that share 32 MB, each with 1 MB of its own."""
    for cpu in range(4):
        pair = "0-1" if cpu < 2 else "2-3"
        for index, (level, size, shared) in enumerate([(1, "32K", cpu), (3, "32768K", pair), (2, "1024K", cpu)]):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    assert last_level_cache([0, 1], tmp_path) == 32 << 20
    assert last_level_cache([1, 2], tmp_path) == 64 << 20
    assert last_level_cache([7], tmp_path) == 64 << 20  # unknown: a guess


class ClockedDevice(CpuDevice):
    """Time passes only in calls, and as they say; remembers who was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def call(self, name: str, weight: int, seconds: float) -> Call:
        def run() -> None:
            self.calls.append((name, weight))
            self.now += seconds

        return run

    def seconds(self, calls: Iterable[Call]) -> float:
        start = self.now
        for call in calls:
            call()
        return self.now - start


def test_interleaved_takes_turns_and_rotates() -> None:
    """Every round has all subjects in order; a subject's weights come in rotation, across the turns."""
    device = ClockedDevice()
    costs = {"slow": 0.01, "fast": 0.001}
    subjects = {name: [device.call(name, i, cost) for i in range(5)] for name, cost in costs.items()}
    times = interleaved(device, subjects, 0.2)  # type: ignore[arg-type]  # the part of a device that is used
    assert {name: np.unique(np.round(found, 9)).tolist() for name, found in times.items()} == {
        "slow": [0.01],
        "fast": [0.001],
    }
    assert len(times["slow"]) == len(times["fast"]) >= 10
    measured = device.calls[8:]  # after the warm-up
    for name in costs:
        order = [weight for who, weight in measured if who == name]
        assert order == [weight for weight, _ in zip(cycle(range(5)), order, strict=False)]
    turns = [who for i, (who, _) in enumerate(measured) if i == 0 or who != measured[i - 1][0]]
    assert turns == ["slow", "fast"] * len(times["slow"])


# ---- gemm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> CpuDevice:
    """A device on which rotations of tiny weights stay small."""
    device = CpuDevice(select_backend("cpu", 1))
    device.rotation_bytes = 20_000
    device.cache_bytes = 0
    monkeypatch.setattr(gemm, "bench_device", lambda *_: device)
    return device


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    options = build_parser().parse_args(arguments)
    options.main(options)
    return capsys.readouterr().out


def test_gemm_reports_every_method(tmp_path: Path, small_device: CpuDevice, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(tiny_models.write_model("llama3_gqa", tmp_path / "tiny"))
    saved = tmp_path / "report.json"
    arguments = ["gemm", "--model", tiny, "--m", "1", "3", "--seconds", "0.001"]
    report = json.loads(run(capsys, *arguments, "-o", "json", "--save", str(saved)))
    assert report == json.loads(saved.read_text())
    assert {"read_gb_per_s", "rotation_bytes", "kernel_path", "machine", "skipped"} <= set(report)
    found = {(row["layer"], row["M"], row["method"]): row for row in report["rows"]}
    fitting_down = [name for name in METHODS if "hif4" not in name]  # the FFN of 96 is no multiple of 64
    assert len(report["skipped"]) == 2 and all("multiples of 64" in reason for reason in report["skipped"])
    for M in (1, 3):
        for layer, N, K in (("qkv", 128, 64), ("o", 64, 64), ("gate_up", 192, 64), ("head", 264, 64)):
            for name in METHODS:
                row = found.pop((layer, M, name))
                assert (row["N"], row["K"]) == (N, K)
                assert row["bytes"] == N * K * (bits_per_weight(QuantConfig(name)) or 16) / 8
        assert {name for name in METHODS if found.pop(("down", M, name), None)} == set(fitting_down)
        assert {name for name in METHODS if found.pop(("prepare qkv", M, name), None)} == set(METHODS)
        assert {name for name in METHODS if found.pop(("prepare down", M, name), None)} == set(fitting_down)
        plain = {"bf16", "w4a16"}  # take activations as they are
        assert {name for name in METHODS if found.pop(("prepare o", M, name), None)} == set(METHODS) - plain
    assert not found
    assert all(row["microseconds"] > 0 and row["rounds"] >= 3 for row in report["rows"])
    moved = {(row["layer"], row["method"]): row["bytes"] for row in report["rows"] if row["M"] == 3}
    codes, scales = 3 * 64 * (1 / 4 + 1 / 2 + 1 / 16), 3 * 64 * (1 / 32 + 1 / 16) + 3 * 4  # with metadata, with g
    assert moved["prepare o", "sharq"] == 3 * 64 * 2 + codes + scales
    assert moved["prepare qkv", "sharq"] == moved["prepare o", "sharq"] + 64 * 4  # the norm's weight
    assert moved["prepare qkv", "bf16"] == 2 * 3 * 64 * 2 + 64 * 4
    assert moved["prepare down", "nvfp4"] == 3 * 96 * (4 + 9 / 16) + 3 * 4


@pytest.mark.parametrize("device", ["cpu", "numpy"])
def test_bytes_of_operands(device: str) -> None:
    try:
        ops = select_backend(device)
    except DeviceError as error:
        pytest.skip(str(error))
    x = np.ones((3, 128), BF16)
    assert operand_bytes(x) == 768
    assert operand_bytes(ops.prepare_fp8(x)) == 3 * 128 + 12
    assert operand_bytes(ops.prepare_fp4(x, format="mxfp4")) == 3 * (64 + 4) + 12
    assert operand_bytes(ops.prepare_sharq(x, sparse=False)) == 3 * (128 + 16) + 12


def test_gemm_output_forms(tmp_path: Path, small_device: CpuDevice, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(tiny_models.write_model("llama3_gqa", tmp_path / "tiny"))
    arguments = ["gemm", "--model", tiny, "--m", "1", "2", "--layers", "o", "--seconds", "0.001"]
    table = run(capsys, *arguments, "--methods", "bf16", "sharq")
    assert "| method | MB | M = 1 | M = 2 |" in table and "| sharq | 0.00 |" in table and "1.00x |" in table
    rows = list(csv.DictReader(run(capsys, *arguments, "--methods", "sharq", "-o", "csv").splitlines()))
    assert [(row["layer"], row["M"], row["times_bf16"]) for row in rows] == [
        ("o", "1", ""),  # nothing to compare with
        ("prepare o", "1", ""),
        ("o", "2", ""),
        ("prepare o", "2", ""),
    ]


def test_gemm_leaves_out_what_does_not_fit_the_memory(small_device: CpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    head = Product("m", "head", 1000, 640)
    quants = {name: resolve(QuantConfig(name, "rtn"), None) for name in ("bf16", "sharq")}
    needed = 1000 * 640 * 2 + 1000 * 640 * 17 // 32 + 1000 * 640 * 2  # one of each, which fill a rotation; a source
    assert memory_needed(head, quants, 20_000) == needed
    assert memory_needed(head, ["bf16"], 5_000_000) == 5 * 1_280_000
    monkeypatch.setattr(small_device, "available_memory", lambda: needed)
    assert fitting(head, quants, small_device)[0] == {}
    assert "choose fewer --methods" in fitting(head, quants, small_device)[1][0]
    monkeypatch.setattr(small_device, "available_memory", lambda: 2 * needed)
    assert set(fitting(head, quants, small_device)[0]) == {"bf16", "sharq"}


def test_gemm_weights_fill_a_rotation(small_device: CpuDevice) -> None:
    """64 x 64 in 4.25 bits are 2,176 bytes, so ten of them are 20,000: each packed for itself."""
    product = Product("m", "o", 64, 64)
    quants = {"sharq": resolve(QuantConfig("sharq", "rtn"), None)}
    methods, _ = fitting(product, quants, small_device)
    weights = gemm._weights(product, "sharq", methods["sharq"], small_device)
    assert len(set(map(id, weights))) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--m", "0"], "at least 1, not 0"),
        (["--methods", "int4"], "unknown quant 'int4'"),
        (["--model", "gpt-2"], "unknown shape 'gpt-2'"),
    ],
)
def test_gemm_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidArgument, match=message):
        run(capsys, "gemm", *arguments)


@pytest.mark.parametrize("name", METHODS)
def test_random_weights_are_what_the_method_stores(name: str) -> None:
    """Rows repeat, nothing is quantised again, and a layer packs them."""
    ops = ReferenceOps()
    weight = synthetic.random_weight(name, 600, 64, ops)
    packed = LayerMethods(QuantConfig(name), ops, Workspace(ops))(("layer",), 64).pack([weight])
    assert (packed.N, packed.K) == (600, 64)
    if isinstance(weight, (Fp4Matrix, Fp8Matrix)):
        assert weight.nbytes <= 600 * (64 * (bits_per_weight(QuantConfig(name)) or 0) / 8 + 4)
        codes = weight.payload
    else:
        assert weight.nbytes == 600 * 64 * 2
        codes = weight
    assert np.array_equal(codes[:256], codes[256:512]) and not np.array_equal(codes[0], codes[1])


# ---- whole models ----------------------------------------------------------------------------------------------------


def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", tiny_models.CASES["qwen2_yarn"].config)


@pytest.mark.parametrize("chunk", [1, 7, 20])
def test_one_sequence_is_the_model(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the way through scheduler and worker: the most probable next tokens, however the text is cut."""
    tiny_shape(monkeypatch)
    synthetic.write_model("tiny", tmp_path / "tiny")
    tokens = np.random.default_rng(0).integers(0, 256, 20).tolist()
    with LLM(tmp_path / "tiny", quant="sharq", grade="rtn") as llm:
        expected = llm.logits(tokens).argmax(axis=1)
    ops = select_backend("cpu", 1)
    quant = resolve(QuantConfig("sharq", "rtn"), None)
    decoder = synthetic.random_decoder(shape_config("tiny"), ops, synthetic.BF16, quant)
    sequence = OneSequence(decoder, ops, synthetic.BF16, 20)
    starts = range(0, 20, chunk)
    found = [sequence.predict(tokens[start : start + chunk], start) for start in starts]
    assert found == [expected[min(start + chunk, 20) - 1] for start in starts]


def test_long_prompts_prefill_as_they_are_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps of one, the last of a single token too; shorter prompts and generated tokens decode."""
    tiny_shape(monkeypatch)
    ops = select_backend("cpu", 1)
    monkeypatch.setattr(type(ops), "short_prompt_tokens", 8)
    monkeypatch.setattr(model, "_STEP", 4)
    decoder = synthetic.random_decoder(shape_config("tiny"), ops, synthetic.BF16, resolve(QuantConfig("bf16"), None))
    sequence, kinds = OneSequence(decoder, ops, synthetic.BF16, 20), []
    hidden = ModelRunner.hidden

    def recorded(runner: ModelRunner, batch: Batch) -> Any:
        kinds.append((len(batch.token_ids), batch.num_decode_rows))
        return hidden(runner, batch)

    monkeypatch.setattr(ModelRunner, "hidden", recorded)
    for steps, begin, end in ((model._prompt, 0, 9), (model._prompt, 5, 13), (model._one_by_one, 9, 10)):
        for step in steps(sequence, list(range(20)), begin, end):
            step()
    assert kinds == [(4, 0), (4, 0), (1, 0), (4, None), (4, None), (1, None)]


def test_written_models_are_sharded_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_shape(monkeypatch)
    monkeypatch.setattr(synthetic, "_SHARD_BYTES", 50_000)
    out = tmp_path / "tiny"
    synthetic.write_model("tiny", out)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    with LLM(out) as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()
    before = [path.stat().st_mtime_ns for path in files]
    synthetic.write_model("tiny", out)
    assert before == [path.stat().st_mtime_ns for path in files]
    with pytest.raises(InvalidArgument, match="is not empty"):
        synthetic.main(SimpleNamespace(shape="tiny", directory=out))  # type: ignore[arg-type]


def test_model_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_shape(monkeypatch)
    monkeypatch.setattr(model, "_bandwidth", lambda options: 1e9)
    arguments = ["model", "--shape", "tiny", "--quant", "sharq", "--quant-head", "fp8", "--pp", "8", "--tg", "3"]
    arguments += ["--depth", "0", "20", "--repetitions", "2", "--threads", "1"]
    report = json.loads(run(capsys, *arguments, "-o", "json"))
    assert [row["test"] for row in report["rows"]] == ["pp8", "tg3", "pp8 @ d20", "tg3 @ d20"]
    assert all(row["tokens_per_s"] > 0 and row["std"] >= 0 for row in report["rows"])
    assert (report["quant"], report["grade"], report["head"]) == ("sharq", "rtn", "fp8")
    body, head = sum(N * K for N, K in linear_modules(shape_config("tiny")).values()) - 264 * 64, 264 * 64
    assert report["weight_bytes"] >= body * 17 / 32 + head + 264 * 64 * 2  # and row scales, and a layout's padding
    assert report["cache_bytes"] >= 28 * 2 * 2 * 2 * 16 * 2  # tokens, layers, K and V, heads, D, bytes
    assert report["peak_rss_bytes"] > report["weight_bytes"]
    assert [row["gb_per_s"] is None for row in report["rows"]] == [True, False] * 2  # prompts are bound by arithmetic
    table = run(capsys, *arguments)
    assert "| pp8 @ d20 |" in table and "peak memory" in table
    narrow = json.loads(run(capsys, *arguments, "--kv-cache-dtype", "fp8", "-o", "json"))
    assert 2 * narrow["cache_bytes"] == report["cache_bytes"]
    assert (report["kv_cache_dtype"], narrow["kv_cache_dtype"]) == ("bfloat16", "float8_e4m3fn")


def test_bytes_that_a_token_reads() -> None:
    """Two layers, two KV heads of 16 in bf16: 256 bytes a token. The first of 3 after 20 reads 21, the last 23.

    In E4M3 half of them.
    """
    config = read_config(tiny_models.CASES["qwen2_yarn"].config, "qwen2_yarn")
    decoder = SimpleNamespace(config=config, weight_bytes=1_000_000)
    for kv_dtype, size in ((synthetic.BF16, 256), (E4M3, 128)):
        loaded = model.Model(decoder, QuantConfig(), synthetic.BF16, kv_dtype, 0, 0.0)  # type: ignore[arg-type]
        assert model.bytes_per_token(model.Test("tg", 3, 20), loaded) == 1_000_000 + size * 22


@pytest.mark.parametrize("name, itemsize", [("auto", 2), ("fp8", 1)])
def test_attention_reports(name: str, itemsize: int, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--context", "40", "--batch", "2", "--prefill", "17", "--seconds", "0.01", "--threads", "1"]
    arguments = ["attention", "--model", "qwen2.5-0.5b", *sizes, "--kv-cache-dtype", name]
    report = json.loads(run(capsys, *arguments, "-o", "json"))
    assert [row["test"] for row in report["rows"]] == ["decode S = 2, 40", "prefill 17"]
    assert [row["bytes"] for row in report["rows"]] == [n * 2 * 2 * 64 * itemsize for n in (80, 17)]
    assert all(row["microseconds"] > 0 for row in report["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp", "--tg"], "nothing to measure"),
        (["--pp", "0"], "count from 1"),
        (["--depth", "-1"], "--depth from 0"),
        (["--shape", "gpt-2"], "unknown shape 'gpt-2'"),
        (["--pp", "900", "--depth", "200"], "beyond the model's context length, 1024"),
    ],
)
def test_model_refuses(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "_bandwidth", lambda options: 1e9)
    with pytest.raises(InvalidArgument, match=message):
        run(capsys, "model", *arguments)


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_reports_as_text() -> None:
    rows = [{"a": 1, "b": None}, {"a": 2.5, "b": "x,y"}]
    assert as_csv(rows) == 'a,b\n1,\n2.5,"x,y"'
    assert as_csv([]) == ""
    assert as_markdown(["a", "b"], [[1, None]]) == "| a | b |\n| --- | --- |\n| 1 |  |"


def test_a_plot_without_matplotlib_is_refused_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert load_pyplot(None) is None
    with pytest.raises(InvalidArgument, match=r"needs matplotlib .*pip install 'sharq-engine\[bench\]'"):
        load_pyplot(Path("plot.png"))


def test_plots_are_drawn(tmp_path: Path, small_device: CpuDevice, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    tiny = str(tiny_models.write_model("llama3_gqa", tmp_path / "tiny"))
    arguments = ["gemm", "--model", tiny, "--m", "1", "2", "--layers", "o", "--seconds", "0.001"]
    run(capsys, *arguments, "--plot", str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidArgument, match="there is no directory"):
        load_pyplot(tmp_path / "absent" / "plot.png")


# ---- beside llama.cpp ------------------------------------------------------------------------------------------------


def test_a_peer_that_dies_is_reported(tmp_path: Path) -> None:
    """This interpreter has no llama_cpp."""
    arguments = ["llama-cpp", "--peer-python", sys.executable, "--work", str(tmp_path), "--peer-type", "nvfp4"]
    options = build_parser().parse_args(arguments)
    with pytest.raises(DeviceError, match="the peer's process, .*, has ended"), versus_llama_cpp._peer(options):
        pass


def test_the_peers_random_nvfp4_blocks_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are UE4M3 numbers of a weight's size, by another library's decoding; codes are anything."""
    for name in ("gguf", "llama_cpp"):  # its side runs where these are; what is tested needs neither
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["llama_cpp"], "llama_log_callback", lambda function: function, raising=False)
    from engine.bench.versus_llama_cpp_peer import random_nvfp4

    raw = random_nvfp4(np.random.default_rng(0), 96, 128)
    assert raw.shape == (96, 128 * 36 // 64) and raw.dtype == np.uint8  # 4.5 bits a weight
    blocks = raw.reshape(96, 2, 36)
    scales = blocks[..., :4].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert scales.min() >= 2.0**-6 and scales.max() <= 2.0**-5
    assert len(np.unique(blocks[..., 4:])) == 256
