"""How a checkpoint says that it is quantised: config.json's `quantization_config`, and ModelOpt's second file.

Four conventions are read, each into the same `QuantScheme`:

    quant_method          who writes it                      weights
    sharq                 this engine (`engine.quantize`)    NVFP4 per 16 or 32, MXFP4, HiF4, FP8
    modelopt              NVIDIA ModelOpt                    NVFP4, W4A16_NVFP4, FP8
    compressed-tensors    llm-compressor                     nvfp4-pack-quantized, mxfp4-pack-quantized, float-quantized
    fp8                   Hugging Face (DeepSeek, Qwen)      FP8 in blocks

Everything that changes what the weights mean is checked, and what the engine does not do is refused by name. How the
publisher meant activations to be quantised is noted (`QuantScheme.method`) but binds nobody: the user's `quant=`
decides, and static input scales are not needed because activations are scaled as they come. A calibrated FP8 KV cache
is noted as well: its scales serve where `kv_cache_dtype="fp8"` asks for such a cache; "auto" keeps the activations'
type, which loses nothing against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.json_file import brief, read_json
from engine.models.compressed_tensors import read_compressed_tensors, read_kv_cache_scheme
from engine.models.fields import Fields
from engine.quant.grades import GRADES
from engine.quant.scheme import HEAD, Pattern, QuantScheme, Rule, Storage, WeightFormat

MODELOPT_FILE = "hf_quant_config.json"
_KEYS = ("quantization_config", "compression_config")
_LINEAR = Pattern("Linear", "linear")
_HEAD = Pattern(HEAD, "name")
_NATIVE_TILES: dict[str, tuple[tuple[int, int], ...]] = {
    "nvfp4": ((1, 16), (1, 32)),
    "mxfp4": ((1, 32),),
    "hif4": ((1, 64),),
    "fp8": ((1, 0),),
}
_HEADS: dict[str, Storage | None] = {
    "bf16": None,
    "fp8": Storage("fp8", "modelopt", (1, 0)),
    "nvfp4": Storage("nvfp4", "modelopt", (1, 16)),
}
_MODELOPT: dict[str, tuple[WeightFormat, tuple[int, int], str]] = {  # quant_algo -> format, tile, method
    "NVFP4": ("nvfp4", (1, 16), "nvfp4"),
    "W4A16_NVFP4": ("nvfp4", (1, 16), "w4a16"),
    "FP8": ("fp8", (0, 0), "fp8"),
}


def read_quantization(config_json: Mapping[str, Any], directory: Path) -> QuantScheme | None:
    """The quantisation of the model in `directory`, whose config.json is given parsed; None where there is none.

    Raises ConfigError for what is malformed, contradictory or unknown.
    """
    fields = Fields(config_json, str(directory / "config.json"))
    path = directory / MODELOPT_FILE
    second = Fields(read_json(path, ConfigError), str(path)).child("quantization") if path.exists() else None
    own = quantization_fields(fields)
    if own is None:
        return None if second is None else _read_modelopt(Fields({}, str(path)), second)
    if own.raw("quant_method") == "modelopt":
        return _read_modelopt(own, second)
    if second is not None:
        fields.fail(f"is quantised by {brief(own.raw('quant_method'))}, but {MODELOPT_FILE} is there as well")
    return _READERS[own.raw("quant_method")](own)


def quantization_fields(fields: Fields) -> Fields | None:
    """The object that describes the quantisation, of a method that is known; None where there is none."""
    for key in _KEYS:
        if key in fields:
            child = fields.child(key)
            method = child.raw("quant_method") if child else None
            if child is None or not isinstance(method, str) or method not in SUPPORTED_METHODS:
                fields.fail(
                    f"quantised checkpoints of method {brief(method or 'unknown')} are not supported yet; "
                    f"supported: {', '.join(SUPPORTED_METHODS)}"
                )
            return child
    return None


def _read_sharq(fields: Fields) -> QuantScheme:
    """Our own: ModelOpt's tensor names, any group size, `head` apart from the rest, `ignore` by exact names."""
    format = fields.choice("format", tuple(_NATIVE_TILES))
    group = 0 if format == "fp8" else fields.integer("group_size", 16, 64)
    if (1, group) not in _NATIVE_TILES[format]:
        fields.refuse("group_size", f"not one of {format}'s, {' and '.join(str(t[1]) for t in _NATIVE_TILES[format])}")
    grade = fields.choice("grade", GRADES)
    head = _HEADS[fields.choice("head", tuple(_HEADS), "bf16")]
    ignore = [Pattern(name, "name") for name in fields.strings("ignore") or ()]
    rules = [Rule(_LINEAR, Storage(format, "modelopt", (1, group)))]  # type: ignore[arg-type]  # checked by choice
    if head is None:
        ignore.append(_HEAD)
    else:
        rules.append(Rule(_HEAD, head))
    usual = "sharq" if (format, group) == ("nvfp4", 32) else format
    method = fields.choice("method", (usual, f"sharq-{format}", "sharq-dense", "w4a16"), usual)
    return QuantScheme(f"sharq {format}", method, tuple(rules), tuple(ignore), grade)


def _read_modelopt(own: Fields, second: Fields | None) -> QuantScheme:
    """ModelOpt describes one thing in config.json, in hf_quant_config.json, or in both, each possibly incomplete."""
    sources = [source for source in (own, second) if source is not None]
    algo = _agreed(sources, "quant_algo", lambda source: source.text("quant_algo").upper())
    if algo is None:
        own.fail("quant_algo is missing from ModelOpt's quantization_config")
    if algo not in _MODELOPT:
        own.fail(f"ModelOpt's quant_algo {brief(algo)} is not supported; supported: {', '.join(_MODELOPT)}")
    format, tile, method = _MODELOPT[algo]
    group = _agreed(sources, "group_size", lambda source: source.integer("group_size", 1, 1 << 20))
    if format == "nvfp4" and group not in (None, tile[1]):
        own.fail(f"ModelOpt's {algo} with group_size {group} is not supported; supported: {tile[1]}")
    ignore = [
        Pattern(text, "glob")
        for source in sources
        for key in ("exclude_modules", "ignore")
        for text in source.strings(key) or ()
    ]
    rules = (Rule(_LINEAR, Storage(format, "modelopt", tile)),)
    return QuantScheme(f"modelopt {algo}", method, rules, tuple(ignore), kv_cache=_modelopt_kv_cache(sources))


def _modelopt_kv_cache(sources: list[Fields]) -> str | None:
    algo = _agreed(sources, "kv_cache_quant_algo", lambda source: source.text("kv_cache_quant_algo").upper())
    if algo is None:  # config.json's spelling
        return next((found for source in sources if (found := read_kv_cache_scheme(source))), None)
    return algo


def _agreed(sources: list[Fields], key: str, read: Callable[[Fields], Any]) -> Any:
    """What the files that have the key say; None where none has it, an error where they differ."""
    values = {read(source) for source in sources if key in source}
    if len(values) > 1:
        sources[0].fail(f"{key} is {' here and '.join(sorted(map(repr, values)))} in {MODELOPT_FILE}")
    return values.pop() if values else None


def _read_hf_fp8(fields: Fields) -> QuantScheme:
    fields.choice("fmt", ("e4m3",), "e4m3")
    fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    block = fields.integers("weight_block_size", 1, 1 << 20)
    if len(block) != 2:
        fields.refuse("weight_block_size", "must be two numbers such as [128, 128]")
    ignore = [Pattern(name, "part") for name in fields.strings("modules_to_not_convert") or ()]
    rules = (Rule(_LINEAR, Storage("fp8", "hf-fp8", (block[0], block[1]))),)
    return QuantScheme("fp8 in blocks", "fp8", rules, (*ignore, _HEAD))  # its writers never convert the head


_READERS: dict[str, Callable[[Fields], QuantScheme]] = {
    "sharq": _read_sharq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": _read_hf_fp8,
}
SUPPORTED_METHODS = ("modelopt", *_READERS)
