"""Quantised weights as the tensors and JSON of three conventions: the inverse of `engine.weights.quantized`.

    native                  ModelOpt's tensor names; every format, NVFP4 with a scale per 16 or 32 k as it was made
    modelopt                NVFP4, per 32 k becoming two equal scales per 16: the same values, bit for bit
    compressed-tensors      NVFP4 likewise (with 1/g stored, so values may move by one ulp of g), MXFP4, FP8 per row

The foreign two declare NVFP4 weight-only (`W4A16_NVFP4`; no `input_activations`): activations in NVFP4 need calibrated
input scales there, and nothing was calibrated. This engine takes such a file as `nvfp4` or `sharq` all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.quant.groups import per_16
from engine.quant.recipe import Kind, Recipe
from engine.quant.scheme import Naming, Storage
from engine.weights.parts import parts_of

Layout = Literal["native", "modelopt", "compressed-tensors"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_FORMATS: dict[Layout, tuple[str, ...]] = {
    "native": ("nvfp4", "mxfp4", "hif4", "fp8"),
    "modelopt": ("nvfp4",),  # its FP8 has one scale per tensor, which this engine does not make
    "compressed-tensors": ("nvfp4", "mxfp4", "fp8"),
}
_SCALE_RULES = {"nvfp4": "amax/6 ue4m3", "mxfp4": "ocp floor", "hif4": "amax/7 e6m2", "fp8": "amax/448 per row"}
_PACKED = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "fp8": "float-quantized"}
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def storage_of(kind: Kind, layout: Layout) -> Storage:
    """How `layout` stores weights of this kind. Raises InvalidArgument where it cannot."""
    if kind.format not in _FORMATS[layout]:
        raise InvalidArgument(
            f"the {layout} format does not hold {kind} weights, only {', '.join(_FORMATS[layout])}; use native"
        )
    naming: Naming = "compressed-tensors" if layout == "compressed-tensors" else "modelopt"
    return Storage(kind.format, naming, (1, 16 if kind.format == "nvfp4" and layout != "native" else kind.block))


def parts_in_file(module: str, shape: tuple[int, int], storage: Storage) -> dict[str, tuple[np.dtype[Any], Any]]:
    """Name -> (dtype, shape) of the tensors that a weight [N, K] becomes."""
    parts, (N, K) = parts_of(storage), shape
    byte = np.dtype(np.uint8)
    if storage.format == "fp8":
        layout: list[tuple[str, np.dtype[Any], Any]] = [
            (parts.payload[0], _E4M3, (N, K)),
            (parts.scale[0], np.dtype(np.float32), (N, 1)),
        ]
    else:
        scale = {"nvfp4": _E4M3, "mxfp4": byte, "hif4": np.dtype(np.uint32)}[storage.format]
        layout = [(parts.payload[0], byte, (N, K // 2)), (parts.scale[0], scale, (N, K // storage.tile[1]))]
    if parts.global_scale is not None:
        layout.append((parts.global_scale, np.dtype(np.float32), (1,) if parts.divides else ()))
    return {f"{module}.{suffix}": (dtype, size) for suffix, dtype, size in layout}


def tensors_of(module: str, weight: Fp4Matrix | Fp8Matrix, storage: Storage) -> dict[str, NDArray[Any]]:
    """The tensors themselves. The weight's g must be one number: a checkpoint's tensor is one shard."""
    parts = parts_of(storage)
    if isinstance(weight, Fp4Matrix) and storage.tile[1] == 16:
        weight = per_16(weight)
    arrays = [weight.payload, weight.scale]
    if parts.global_scale is not None:
        assert isinstance(weight, Fp4Matrix)
        g = weight.g[0]
        if (weight.g != g).any():
            raise InvalidArgument(f"{module}: rows with different global scales do not fit one tensor")
        arrays.append(np.array([np.float32(1) / g]) if parts.divides else np.array(g))
    wanted = parts_in_file(module, (weight.rows, weight.K), storage)
    return {
        name: array.view(dtype) if dtype.itemsize == 1 else array
        for (name, (dtype, _)), array in zip(wanted.items(), arrays, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Description:
    """What the JSON files say: quantization_config of config.json, and ModelOpt's own file if there is one."""

    config: dict[str, Any]
    modelopt: dict[str, Any] | None = None


def describe(recipe: Recipe, layout: Layout, left: Sequence[str], version: str) -> Description:
    """left: the linear layers that stay as stored, the head included."""
    if layout == "native":
        return Description(_native(recipe, left))
    if layout == "compressed-tensors":
        return Description(_compressed_tensors(recipe, left))
    producer = {"name": "sharq-engine", "version": version, "grade": recipe.grade}
    algo = "W4A16_NVFP4"
    return Description(
        {"quant_method": "modelopt", "quant_algo": algo, "group_size": 16, "ignore": [*left], "producer": producer},
        {
            "producer": producer,
            "quantization": {
                "quant_algo": algo,
                "kv_cache_quant_algo": None,
                "group_size": 16,
                "exclude_modules": [*left],
            },
        },
    )


def check(recipe: Recipe, layout: str) -> None:
    """Raise InvalidArgument for a layout that is unknown or does not hold what the recipe makes."""
    for kind in (recipe.body, recipe.head_kind):
        if kind is not None:
            storage_of(kind, as_layout(layout))


def as_layout(name: str) -> Layout:
    for layout in LAYOUTS:
        if layout == name:
            return layout
    raise InvalidArgument(f"unknown format {name!r}; choose one of {', '.join(LAYOUTS)}")


def _native(recipe: Recipe, left: Sequence[str]) -> dict[str, Any]:
    body = recipe.body
    return {
        "quant_method": "sharq",
        "method": recipe.quant,
        "format": body.format,
        "group_size": body.block or None,
        "grade": recipe.grade,
        "scale_rule": _SCALE_RULES[body.format],
        "head": "bf16" if "lm_head" in left else recipe.head,
        "ignore": [module for module in left if module != "lm_head"],
    }


def _compressed_tensors(recipe: Recipe, left: Sequence[str]) -> dict[str, Any]:
    groups = {"group_0": _group(recipe.body, "Linear", weights_only=recipe.body.format == "nvfp4")}
    if recipe.head_kind is not None and "lm_head" not in left:
        groups["group_1"] = _group(recipe.head_kind, "lm_head", weights_only=recipe.head == "nvfp4")
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [*left],
        "kv_cache_scheme": None,
    }


def _group(kind: Kind, target: str, *, weights_only: bool) -> dict[str, Any]:
    common = {"num_bits": 8 if kind.format == "fp8" else 4, "type": "float", "symmetric": True}
    weights: dict[str, dict[str, Any]] = {
        "nvfp4": {"strategy": "tensor_group", "group_size": 16},
        "mxfp4": {"strategy": "group", "group_size": 32},
        "fp8": {"strategy": "channel"},
    }
    inputs = {"strategy": "token"} if kind.format == "fp8" else weights[kind.format]
    return {
        "targets": [target],
        "format": _PACKED[kind.format],
        "weights": {**common, **weights[kind.format], "dynamic": False},
        "input_activations": None if weights_only else {**common, **inputs, "dynamic": True},
        "output_activations": None,
    }
