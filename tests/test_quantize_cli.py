"""`engine.quantize`: what it writes, read back and compared; what stops it, and that it goes on where it stopped."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantized_files import e2m1_values, e4m3_values, spread
from tiny_models import write_model

from engine.config import QuantConfig
from engine.errors import EngineError, InvalidArgument, NumericalError, WeightsError
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.layers import Context
from engine.models.decoder import Decoder
from engine.models.linears import linear_modules
from engine.models.quantization import read_quantization
from engine.models.registry import read_config
from engine.ops.reference import ReferenceOps
from engine.quant import fp4, fp8
from engine.quant.recipe import Recipe
from engine.quant.registry import LayerMethods, resolve
from engine.quantize import quantize_model
from engine.weights import conversion
from engine.weights.checkpoint import Checkpoint
from engine.weights.coverage import fill
from engine.weights.quantized import LogicalCheckpoint
from engine.weights.write import save_safetensors
from engine.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """64 hidden, 96 FFN, two layers; embedding and head are one tensor."""
    directory = write_model("qwen3_tied", tmp_path / "source")
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_SHARD_BYTES", 20_000)


def opened(directory: Path) -> LogicalCheckpoint:
    config_json = json.loads((directory / "config.json").read_text())
    return LogicalCheckpoint(directory, read_quantization(config_json, directory))


def config_of(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return loaded


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def same(a: Any, b: Any, ulps: int = 0) -> bool:
    """Whether two quantised weights hold the same codes and scales, and global scales that differ by at most `ulps`."""
    if isinstance(a, Fp8Matrix):
        return a.tile == b.tile and np.array_equal(a.payload, b.payload) and np.array_equal(a.scale, b.scale)
    exact = np.array_equal(a.payload, b.payload) and np.array_equal(a.scale, b.scale) and a.format == b.format
    return exact and bool((np.abs(a.g.view(np.int32) - b.g.view(np.int32)) <= ulps).all())


# ---- what is written -------------------------------------------------------------------------------------------------

CASES = [
    ("sharq", "native", "bf16"),
    ("sharq", "modelopt", "nvfp4"),
    ("sharq", "compressed-tensors", "fp8"),
    ("nvfp4", "native", "fp8"),
    ("w4a16", "modelopt", "bf16"),
    ("nvfp4", "compressed-tensors", "bf16"),
    ("mxfp4", "native", "nvfp4"),
    ("mxfp4", "compressed-tensors", "bf16"),
    ("sharq-hif4", "native", "bf16"),
    ("fp8", "native", "fp8"),
    ("fp8", "compressed-tensors", "bf16"),
]


@pytest.mark.parametrize(("quant", "layout", "head"), CASES, ids=["-".join(case) for case in CASES])
def test_every_layout_reads_back_as_what_was_quantised(source: Path, quant: str, layout: str, head: str) -> None:
    before, out = digests(source), source.parent / "out"
    report = quantize_model(source, out, Recipe(quant, "rtn", head, "bf16"), layout=layout)
    assert digests(source) == before
    with Checkpoint(source) as plain, opened(out) as copy:
        assert {*copy.names()} == {*plain.names()} | ({"lm_head.weight"} if head != "bf16" else set())
        for name in copy.names():
            module, weight = name.removesuffix(".weight"), copy.tensor(name)
            stored = plain.tensor("model.embed_tokens.weight" if module == "lm_head" else name)
            if module == "lm_head":
                wanted: Any = fp8.quantize_weight(stored) if head == "fp8" else fp4.quantize_weight(stored)
                assert same(weight, wanted)
            elif not module.endswith("_proj") or quant == "sharq-hif4" and module.endswith("down_proj"):
                assert isinstance(weight, np.ndarray) and weight.tobytes() == stored.tobytes()
            elif quant == "fp8":
                assert same(weight, fp8.quantize_weight(stored))
            else:
                rule = {"sharq": ("nvfp4", 32), "mxfp4": ("mxfp4", 32), "sharq-hif4": ("hif4", 64)}
                format, block = rule.get(quant, ("nvfp4", 16))
                wanted = fp4.quantize_weight(stored, format=format, block=block)  # type: ignore[arg-type]
                assert same(weight, wanted, ulps=1 if layout == "compressed-tensors" else 0)
        assert copy.scheme is not None
        if layout == "native":
            assert (copy.scheme.method, copy.scheme.grade) == (quant, "rtn")
        _check_parameters(out, copy)
    assert report.left == ((DOWN.replace(".1.", ".0."), DOWN) if quant == "sharq-hif4" else ())
    assert report.nbytes < report.source_nbytes
    assert (out / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()
    kept = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert {path.name for path in out.iterdir()} == kept | {"config.json", "model.safetensors"} | (
        {"hf_quant_config.json"} if layout == "modelopt" else set()
    )
    assert not list(source.parent.glob(".*"))


def _check_parameters(out: Path, copy: LogicalCheckpoint) -> None:
    """The model that the copy's config.json describes finds all its parameters in the copy, and no others."""
    model = _decoder(config_of(out))
    got: dict[str, Any] = {}
    shapes = {parameter.name: parameter.shape for parameter in model.parameters()}
    fill(shapes, copy, got.__setitem__, ignore=model.redundant_tensors, ties=model.tied_tensors)
    assert got.keys() == shapes.keys()


def _decoder(config_json: dict[str, Any]) -> Decoder:
    ops = ReferenceOps()
    workspace = Workspace(ops)
    methods = LayerMethods(resolve(QuantConfig(), None), ops, workspace)
    return Decoder(read_config(config_json, "config.json"), Context(ops, workspace, np.dtype(np.float32), methods))


@pytest.mark.parametrize("case", ["qwen3_head256", "llama_head24_mha6", "qwen2_window_layers"])
def test_linear_modules_are_the_decoders(tmp_path: Path, case: str) -> None:
    config_json = config_of(write_model(case, tmp_path))
    shapes = {p.name: p.shape for p in _decoder(config_json).parameters() if len(p.shape) == 2}
    del shapes["model.embed_tokens.weight"]
    assert {f"{name}.weight": s for name, s in linear_modules(read_config(config_json, "")).items()} == shapes


def test_w32_exports_as_legal_nvfp4(source: Path) -> None:
    """The file as another program reads it, from the raw tensors, in float64."""
    out = source.parent / "out"
    quantize_model(source, out, Recipe("sharq", "rtn"), layout="modelopt")
    with Checkpoint(out) as raw, Checkpoint(source) as plain:
        codes = raw.tensor(f"{DOWN}.weight")
        scale = raw.tensor(f"{DOWN}.weight_scale")
        g = raw.tensor(f"{DOWN}.weight_scale_2")
        w = plain.tensor(f"{DOWN}.weight").astype(np.float32)
        assert raw.entry(f"{DOWN}.weight_scale").dtype == "F8_E4M3"
        assert (codes.shape, scale.shape, g.shape, g.dtype) == ((64, 48), (64, 6), (), np.float32)
    values = e2m1_values(codes) * spread(e4m3_values(scale.view(np.uint8)), (64, 96), (1, 16)) * np.float64(g)
    np.testing.assert_allclose(values, fp4.dequantize(fp4.quantize_weight(w, block=32)), rtol=2.0**-23)
    assert np.linalg.norm(values - w) < 0.2 * np.linalg.norm(w)
    quantization = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["exclude_modules"] == ["lm_head"] == config_of(out)["quantization_config"]["ignore"]
    assert (quantization["quant_algo"], quantization["group_size"]) == ("W4A16_NVFP4", 16)


def test_native_configuration(source: Path) -> None:
    out = source.parent / "out"
    quantize_model(source, out, Recipe("sharq", "4over6", "fp8"))
    config = config_of(out)
    assert config["tie_word_embeddings"] is False  # the head is a copy of its own now
    quantization = config["quantization_config"]
    assert quantization.pop("scale_rule")
    assert quantization == {
        "quant_method": "sharq", "method": "sharq", "format": "nvfp4", "group_size": 32, "grade": "4over6",
        "head": "fp8", "ignore": [],
    }  # fmt: skip
    with opened(out) as copy, Checkpoint(source) as plain:
        table = "model.embed_tokens.weight"
        assert copy.tensor(table).tobytes() == plain.tensor(table).tobytes()  # type: ignore[union-attr]


def test_untied_head_and_many_shards(tmp_path: Path, small_shards: None) -> None:
    source, out = write_model("llama2_sharded_f32", tmp_path / "source"), tmp_path / "out"
    steps: list[tuple[int, int]] = []
    quantize_model(source, out, Recipe("sharq", "rtn", "nvfp4"), progress=lambda *step: steps.append(step))
    with Checkpoint(source) as plain, opened(out) as copy:
        assert {*copy.names()} == {*plain.names()} and len(copy.files) > 3
        assert isinstance(copy.tensor("lm_head.weight"), Fp4Matrix)
        assert steps[-1] == (plain.nbytes, plain.nbytes) and steps == sorted(steps)
        assert json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == copy.nbytes


# ---- what stops it ---------------------------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, code: int = errno.ENOSPC) -> None:
    """The disk is full from the given fsync on; each shard needs one."""
    count, real = 0, os.fsync

    def fsync(handle: int) -> None:
        nonlocal count
        count += 1
        if count >= call:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_leaves_nothing_and_the_next_run_goes_on(
    source: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out, whole = digests(source), source.parent / "out", source.parent / "whole"
    recipe = Recipe("sharq", "rtn")
    quantize_model(source, whole, recipe)
    shards = len(list(whole.glob("*.safetensors")))
    finished = 0
    for call in range(1, shards + 3):  # full at each shard in turn, then while the finished folder is published
        with monkeypatch.context() as patch, pytest.raises(WeightsError, match="no space left.*run the same command"):
            fail_at(patch, 2 if call > 1 else 1)
            quantize_model(source, out, recipe)
        assert not out.exists() and digests(source) == before
        found = len(list((source.parent / ".out.partial").glob("*.safetensors")))
        assert found >= finished
        finished = found
    assert finished == shards
    assert quantize_model(source, out, recipe).resumed_shards == shards
    assert digests(out) == digests(whole)


def test_a_killed_run_is_continued(source: Path) -> None:
    out, whole = source.parent / "out", source.parent / "whole"
    script = f"""
import os
from pathlib import Path
from engine.quant.recipe import Recipe
from engine.quantize import quantize_model
from engine.weights import conversion, write
conversion._SHARD_BYTES = 20_000
real, count = Path.replace, 0
def replace(self, target):
    global count
    count += str(target).endswith(".safetensors")
    if count == 3:
        os._exit(9)  # as if killed: with a whole file under a temporary name
    return real(self, target)
Path.replace = replace
quantize_model(Path({str(source)!r}), Path({str(out)!r}), Recipe("sharq", "rtn"))
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 9
    work = source.parent / ".out.partial"
    assert not out.exists() and not (work / "config.json").exists() and len(list(work.glob(".*.tmp"))) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_SHARD_BYTES", 20_000)
        assert quantize_model(source, out, Recipe("sharq", "rtn")).resumed_shards == 2
        quantize_model(source, whole, Recipe("sharq", "rtn"))
    assert digests(out) == digests(whole) and not work.exists()


@pytest.mark.parametrize("change", ["recipe", "source", "damage"])
def test_unfinished_work_that_no_longer_fits_is_made_again(
    source: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out, recipe = source.parent / "out", Recipe("sharq", "rtn")
    with monkeypatch.context() as patch, pytest.raises(WeightsError):
        fail_at(patch, 4)
        quantize_model(source, out, recipe)
    first = source.parent / ".out.partial" / sorted(os.listdir(source.parent / ".out.partial"))[0]
    if change == "damage":
        first.write_bytes(first.read_bytes()[:-1])
    if change == "source":
        os.utime(source / "model.safetensors", ns=(1, 1))
    report = quantize_model(source, out, Recipe("sharq", "sweep") if change == "recipe" else recipe)
    assert report.resumed_shards == (2 if change == "damage" else 0)
    with opened(out) as copy:
        assert isinstance(copy.tensor(f"{DOWN}.weight"), Fp4Matrix)


def test_space_is_looked_at_first(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = conversion.shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match="no space left.*GB are needed"):
        quantize_model(source, source.parent / "out", Recipe("sharq", "rtn"))
    assert not (source.parent / "out").exists()


def refusals(source: Path) -> list[tuple[Path, dict[str, Any], type[EngineError], str]]:
    full, file = source.parent / "full", source.parent / "file"
    full.mkdir()
    (full / "x").touch()
    file.touch()
    out = source.parent / "out"
    return [
        (full, {}, InvalidArgument, "exists already"),
        (file, {}, InvalidArgument, "exists already"),
        (source / "out", {}, InvalidArgument, "inside the source"),
        (file / "out", {}, WeightsError, "cannot be written: Not a directory"),
        (Path("/proc/out"), {}, WeightsError, "/proc/out: cannot be written"),
        (out, {"quant": "int3"}, InvalidArgument, "unknown quant 'int3'; choose one of w4a16, nvfp4"),
        (out, {"grade": "best"}, InvalidArgument, "unknown weight grade 'best'"),
        (out, {"quant": "mxfp4", "grade": "4over6"}, InvalidArgument, "4over6 is defined for nvfp4"),
        (out, {"quant": "fp8", "grade": "sweep"}, InvalidArgument, "fp8 has one scale rule"),
        (out, {"head": "int8"}, InvalidArgument, "unknown quant_head 'int8'"),
        (out, {"fallback": "fp8"}, InvalidArgument, "unknown quant_fallback 'fp8'"),
        (out, {"layout": "gguf"}, InvalidArgument, "unknown format 'gguf'"),
        (out, {"layout": "modelopt", "quant": "hif4"}, InvalidArgument, "modelopt format does not hold hif4"),
        (out, {"layout": "modelopt", "head": "fp8"}, InvalidArgument, "modelopt format does not hold fp8"),
        (out, {"quant": "hif4"}, InvalidArgument, r"layers.0.mlp.down_proj and 1 more: K = 96 is not a multiple of 64"),
    ]


def test_refused_before_anything_is_written(source: Path) -> None:
    before = digests(source)
    for out, options, error, message in refusals(source):
        layout = options.pop("layout", "native")
        with pytest.raises(error, match=message):
            quantize_model(source, out, Recipe(**{"quant": "sharq", **options}), layout=layout)
    assert digests(source) == before
    assert {path.name for path in source.parent.iterdir()} == {"source", "full", "file"}


def test_refuses_what_is_quantised_already(source: Path) -> None:
    quantize_model(source, source.parent / "one", Recipe("nvfp4", "rtn"))
    with pytest.raises(InvalidArgument, match="quantised already .sharq nvfp4."):
        quantize_model(source.parent / "one", source.parent / "two", Recipe("nvfp4", "rtn"))


def test_bad_weights_are_named(source: Path) -> None:
    with Checkpoint(source) as plain:
        tensors = {name: plain.tensor(name).copy() for name in plain.names()}
    tensors[f"{DOWN}.weight"][3, 5] = np.nan
    save_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(NumericalError, match=f"{DOWN}.weight'.*NaN"):
        quantize_model(source, source.parent / "out", Recipe("sharq", "rtn"))
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"][:, :64].copy()
    save_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(WeightsError, match=rf"{DOWN}.weight' is BF16 \[64, 64\].*\[64, 96\]"):
        quantize_model(source, source.parent / "out", Recipe("sharq", "rtn"))
    del tensors[f"{DOWN}.weight"]
    save_safetensors(source / "model.safetensors", tensors)
    with pytest.raises(WeightsError, match=f"no tensor '{DOWN}.weight'"):
        quantize_model(source, source.parent / "out", Recipe("sharq", "rtn"))
    assert not (source.parent / "out").exists()


def test_one_process_at_a_time_and_no_foreign_folders(source: Path) -> None:
    work = source.parent / ".out.partial"
    work.mkdir()
    handle = os.open(work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InvalidArgument, match="another process"):
        quantize_model(source, source.parent / "out", Recipe("sharq", "rtn"))
    os.close(handle)
    (work / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match="unknown origin"):
        quantize_model(source, source.parent / "out", Recipe("sharq", "rtn"))
    assert (work / "thesis.txt").read_text() == "mine"


# ---- the command line ------------------------------------------------------------------------------------------------


def command(*arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """limit: bytes a file may have, as a file system might say."""
    script = "import runpy, sys\n"
    if limit is not None:
        script += f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    script += "runpy.run_module('engine.quantize', run_name='__main__', alter_sys=True)"
    arguments = ("-c", script, *arguments)
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_command_line(source: Path) -> None:
    out = source.parent / "out"
    done = command(source, out, "--quant", "hif4", "--grade", "rtn", "--quant-fallback", "bf16")
    assert (done.returncode, done.stdout) == (0, "")
    unfit, summary = done.stderr.splitlines()
    assert unfit.endswith(f"{DOWN.replace('.1.', '.0.')}, {DOWN}")
    assert "12 linear layers in hif4 with a scale per 64 k, grade rtn, head bf16" in summary
    done = command(source, out, "--quant", "sharq")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_writes_that_fail_are_one_line(source: Path) -> None:
    done = command(source, source.parent / "out", "--quant", "sharq", "--grade", "rtn", limit=30_000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and "out: cannot be written: no space left (File too large)" in done.stderr
    assert not (source.parent / "out").exists()
