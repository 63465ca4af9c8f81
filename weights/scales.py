"""Scales of quantised weights, read and checked value by value: a bad scale is a wrong model that still talks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import WeightsError
from engine.json_file import brief
from engine.quant.scheme import WeightFormat
from engine.weights.checkpoint import Checkpoint
from engine.weights.safetensors_file import TensorEntry

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_UE4M3_LAST, _NAN_BYTE = 0x7E, 0xFF
_CHUNK = 1 << 22  # bytes looked at once


def block_scales(entry: TensorEntry, files: Checkpoint, format: WeightFormat) -> NDArray[Any]:
    """The scales as `Fp4Matrix` has them: uint8 for NVFP4 and MXFP4, uint32 for HiF4; a view of the file if aligned.

    Raises WeightsError for NaN and for NVFP4's sign bit, which no scale has.
    """
    array = files.tensor(entry.name)
    if format == "hif4":
        _refuse(entry, (array & 0xFF == _NAN_BYTE).any(), "NaN among its block scales")
        return np.require(array, requirements="A")
    codes = array.view(np.uint8)
    largest = int(codes.max(initial=0))
    if format == "mxfp4":
        _refuse(entry, largest == _NAN_BYTE, "NaN (byte 255) among its block scales")
    else:
        _refuse(entry, largest > _UE4M3_LAST, f"a NaN or negative block scale (byte {largest:#04x})")
    return codes


def global_scale(entry: TensorEntry, files: Checkpoint, *, divides: bool) -> np.float32:
    """What values are multiplied with. Raises WeightsError unless it is positive and finite."""
    stored = np.float32(files.tensor(entry.name).reshape(-1)[0])
    with np.errstate(divide="ignore", over="ignore"):
        g = np.float32(1) / stored if divides else stored
    _refuse(entry, not (stored > 0 and np.isfinite(stored) and np.isfinite(g) and g > 0), f"the scale {stored}")
    return np.float32(g)


def cache_scale(entry: TensorEntry, files: Checkpoint) -> np.float32:
    """The scale of a layer's K or V. Raises WeightsError unless it is one number, positive and finite."""
    _refuse(entry, entry.shape not in ((), (1,)), f"scales of shape {list(entry.shape)}; the KV cache takes one number")
    return global_scale(entry, files, divides=False)


def fp8_scales(entry: TensorEntry, files: Checkpoint) -> F32:
    """The scales in float32, shape as stored. Raises WeightsError unless all are finite and none negative."""
    scale = files.tensor(entry.name).astype(np.float32)
    _refuse(entry, not (np.isfinite(scale) & (scale >= 0)).all(), "a scale that is NaN, infinite or negative")
    return scale


def refuse_nan_codes(entry: TensorEntry, payload: U8) -> None:
    """Raise WeightsError where an E4M3 payload [N, K] holds NaN; a few megabytes are looked at once."""
    step = max(1, _CHUNK // payload.shape[1])
    for start in range(0, payload.shape[0], step):
        _refuse(entry, ((payload[start : start + step] & 0x7F) == 0x7F).any(), "NaN")


def _refuse(entry: TensorEntry, found: Any, what: str) -> None:
    if found:
        raise WeightsError(f"{entry.file}: tensor {brief(entry.name)} holds {what}")
