"""The `quantization_config` of compressed-tensors: groups of modules, each with a format and its scales' shape."""

from __future__ import annotations

import re
from typing import Any

from engine.json_file import brief
from engine.models.fields import Fields
from engine.quant.scheme import Pattern, QuantScheme, Rule, Storage

_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "float-quantized")
_MAX_PATTERN = 1000  # characters
_MAX_GROUPS = 100


def read_compressed_tensors(fields: Fields) -> QuantScheme:
    """Raises ConfigError naming what is not supported: other formats, transforms, sparsity, asymmetric weights."""
    for key in ("transform_config", "sparsity_config"):
        child = fields.child(key)
        if child is not None and child.raw("format") != "dense":  # {"format": "dense"}: no sparsity
            fields.refuse(key, "checkpoints with transforms or compressed sparsity are not supported")
    groups = fields.child("config_groups")
    if groups is None or len(groups.present()) > _MAX_GROUPS:
        fields.refuse("config_groups", f"must be an object of 1 to {_MAX_GROUPS} groups")
    rules, formats, weights_only = [], [], True
    for name in groups.present():
        group = groups.child(name)
        if group is None:
            groups.refuse(name, "must be an object with targets and weights")
        format = _format(fields, group)
        storage = _STORAGES[format](group)
        rules += [Rule(_target(group, text), storage) for text in group.strings("targets") or ()]
        formats.append(format)
        weights_only &= group.child("input_activations") is None
        if group.child("output_activations") is not None:
            group.refuse("output_activations", "quantised outputs are not supported")
    if not rules:
        fields.refuse("config_groups", "no group has targets")
    methods = {"fp8" if f == "float-quantized" else f.partition("-")[0] for f in formats}
    method = "nvfp4" if "nvfp4" in methods else min(methods, key=("mxfp4", "fp8").index)
    return QuantScheme(
        name=f"compressed-tensors {' and '.join(dict.fromkeys(formats))}",
        method="w4a16" if method == "nvfp4" and weights_only else method,
        rules=tuple(rules),
        ignore=tuple(_pattern(fields, "ignore", text) for text in fields.strings("ignore") or ()),
        kv_cache=read_kv_cache_scheme(fields),
    )


def read_kv_cache_scheme(fields: Fields) -> str | None:
    """What a cache's scales are for: "FP8", one for a tensor of E4M3, or "other"; None where nothing is said of one."""
    scheme = fields.child("kv_cache_scheme")
    if scheme is None:
        return None
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    return "FP8" if all(scheme.raw(key) in (None, value) for key, value in wanted.items()) else "other"


def _format(fields: Fields, group: Fields) -> str:
    """The group's own format, or the one at the top."""
    return group.choice("format", _FORMATS) if "format" in group else fields.choice("format", _FORMATS)


def _target(group: Fields, text: str) -> Pattern:
    if text == "Linear":
        return Pattern(text, "linear")
    pattern = _pattern(group, "targets", text)
    if pattern.kind == "name" and text[:1].isupper():  # a class of layers; their names are in lower case
        group.refuse("targets", f"layers of class {brief(text)} are not supported; supported: Linear, names, re:…")
    return pattern


def _pattern(fields: Fields, key: str, text: str) -> Pattern:
    if not text.startswith("re:"):
        return Pattern(text, "name")
    expression = text[len("re:") :]
    try:
        if len(expression) > _MAX_PATTERN:
            raise re.error(f"longer than {_MAX_PATTERN} characters")
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as problem:
        fields.refuse(key, f"{brief(text)} is not a regular expression: {problem}")
    return Pattern(expression, "regex")


def _weights(group: Fields, bits: int, strategies: tuple[str, ...]) -> tuple[Fields, str]:
    """The group's `weights`, checked as far as all formats have them alike, and their strategy."""
    weights = group.child("weights")
    if weights is None:
        group.refuse("weights", "must be an object")
    weights.refuse_unless(
        {
            "num_bits": (bits,),
            "type": ("float",),
            "symmetric": (True,),
            "dynamic": (False,),
            "actorder": (False, "static"),  # the order of calibration; the weights are stored in their own
        }
    )
    return weights, weights.choice("strategy", strategies)


def _group_size(weights: Fields, size: int) -> int:
    return weights.integer("group_size", size, size, size)


def _nvfp4(group: Fields) -> Storage:
    weights, _ = _weights(group, 4, ("tensor_group",))
    return Storage("nvfp4", "compressed-tensors", (1, _group_size(weights, 16)))


def _mxfp4(group: Fields) -> Storage:
    weights, _ = _weights(group, 4, ("group",))
    return Storage("mxfp4", "compressed-tensors", (1, _group_size(weights, 32)))


def _fp8(group: Fields) -> Storage:
    weights, strategy = _weights(group, 8, ("tensor", "channel", "block"))
    if strategy != "block":
        return Storage("fp8", "compressed-tensors", (0, 0) if strategy == "tensor" else (1, 0))
    block = weights.integers("block_structure", 1, 1 << 20)
    if len(block) != 2:
        weights.refuse("block_structure", "must be two numbers such as [128, 128]")
    return Storage("fp8", "compressed-tensors", (block[0], block[1]))


_STORAGES: dict[str, Any] = {
    "nvfp4-pack-quantized": _nvfp4,
    "mxfp4-pack-quantized": _mxfp4,
    "float-quantized": _fp8,
}
