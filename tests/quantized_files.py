"""Quantised checkpoints written by hand, and what their numbers mean in float64: independent of the engine's code."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensor = tuple[str, NDArray[Any]]  # dtype as the file spells it, the raw numbers
F64 = NDArray[np.float64]


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file from its description: length, JSON, bytes."""
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def u8(array: Any) -> Tensor:
    return "U8", np.asarray(array, np.uint8)


def e4m3(array: Any) -> Tensor:
    """Bytes that are E4M3 codes."""
    return "F8_E4M3", np.asarray(array, np.uint8)


def f32(array: Any) -> Tensor:
    return "F32", np.asarray(array, np.float32)


def bf16(array: Any) -> Tensor:
    """Numbers whose float32 form has 16 zero bits at its end."""
    words = np.asarray(array, np.float32).view(np.uint32)
    assert not (words & 0xFFFF).any()
    return "BF16", (words >> 16).astype(np.uint16)


# ---- what codes are worth --------------------------------------------------------------------------------------------


def e2m1_values(payload: NDArray[np.uint8]) -> F64:
    """[N, K/2] bytes to [N, K] numbers: even k from the low nibble."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = np.array(values + [-value for value in values])
    out = np.empty((payload.shape[0], payload.shape[1] * 2))
    for k in range(out.shape[1]):
        byte = payload[:, k // 2]
        out[:, k] = table[byte >> 4 if k % 2 else byte & 15]
    return out


def e4m3_values(codes: NDArray[np.uint8]) -> F64:
    def value(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
        return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))

    return np.vectorize(value, otypes=[np.float64])(codes)


def spread(scale: F64, shape: tuple[int, int], tile: tuple[int, int]) -> F64:
    """A scale per tile of a matrix as a scale per element."""
    n, k = np.indices(shape)
    return scale[n // tile[0], k // tile[1]]


# ---- random weights --------------------------------------------------------------------------------------------------


class Nvfp4:
    """Random NVFP4 numbers [N, K], a scale per `group` k, and their values once a global scale is known."""

    def __init__(self, N: int, K: int, seed: int, group: int = 16) -> None:
        rng = np.random.default_rng(seed)
        self.group = group
        self.payload = rng.integers(0, 256, (N, K // 2), np.uint8)
        self.scale = rng.integers(1, 0x7F, (N, K // group), np.uint8)

    def values(self) -> F64:
        """Without the global scale."""
        N, K = self.payload.shape[0], self.payload.shape[1] * 2
        return e2m1_values(self.payload) * spread(e4m3_values(self.scale), (N, K), (1, self.group))

    def modelopt(self, module: str, g: float) -> dict[str, Tensor]:
        return {
            f"{module}.weight": u8(self.payload),
            f"{module}.weight_scale": e4m3(self.scale),
            f"{module}.weight_scale_2": f32(g),
        }

    def compressed_tensors(self, module: str, divisor: float) -> dict[str, Tensor]:
        return {
            f"{module}.weight_packed": u8(self.payload),
            f"{module}.weight_scale": e4m3(self.scale),
            f"{module}.weight_global_scale": f32([divisor]),
        }
