"""Launches of the row-wise kernels: embed, rms_norm, silu_mul, rope_and_cache, and the preparations.

Grids and argument lists as the kernels' headers have them; a row's block size is chosen for speed and changes no bit.
Nothing here allocates or launches. Arrays have contiguous rows, which may lie apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from engine.fp4_types import BLOCKS, Format
from engine.ops.gpu.launch import Dim3, Launch

_NAMES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}
_PADDING = 128  # K of operands is rounded up to a multiple
_MANY_ROWS = 512  # rows that occupy a large GPU with a few warps each


def type_name(dtype: np.dtype[Any]) -> str:
    """How entry points spell an activation dtype."""
    return _NAMES[dtype]


def row_stride(x: Any) -> np.int64:
    """Elements from one row of x [rows, columns] to the next."""
    return np.int64(x.strides[0] // x.dtype.itemsize)


def padded(K: int) -> int:
    """K as operands have it in device memory."""
    return -(-K // _PADDING) * _PADDING


def embed(table: Any, token_ids: Any, out: Any) -> Launch:
    T, C = out.shape
    args = [table, row_stride(table), token_ids, out, row_stride(out), np.int32(C)]
    return Launch("embed.cu", f"embed_{_NAMES[table.dtype]}_{_NAMES[out.dtype]}", (T, 1, 1), _threads(C), 0, args)


def rms_norm(x: Any, weight: Any, eps: float, out: Any) -> Launch:
    T, C = x.shape
    args = [x, row_stride(x), weight, np.float32(eps), out, row_stride(out), np.int32(C)]
    return Launch("rms_norm.cu", f"rms_norm_{_NAMES[x.dtype]}", (T, 1, 1), (128, 1, 1), 0, args)


def silu_mul(gate_up: Any, out: Any) -> Launch:
    T, F = out.shape
    args = [gate_up, row_stride(gate_up), out, row_stride(out), np.int32(F)]
    return Launch("silu_mul.cu", f"silu_mul_{_NAMES[out.dtype]}", (T, -(-F // 512), 1), (64, 1, 1), 0, args)


class E4m3Cache(NamedTuple):
    """Beside a layer's codes."""

    k_scales: Any  # [KVH] float32: a value is its head's scale times its code
    v_scales: Any
    invalid: Any  # int32 [1], as of a preparation


def rope_and_cache(
    qkv: Any, rope_table: Any, positions: Any, slot_mapping: Any, q_norm: Any, k_norm: Any, eps: float, out: Any,
    k_cache: Any, v_cache: Any, e4m3: E4m3Cache | None = None,
) -> Launch:  # fmt: skip
    """k_cache, v_cache [blocks, KVH, 16, D] of this layer; e4m3: what codes need besides."""
    T, (_, KVH, _, D) = len(qkv), k_cache.shape
    H, lanes = out.shape[1] // D, 1 << (D // 8 - 1).bit_length()
    args = [
        qkv, row_stride(qkv), rope_table, positions, slot_mapping, q_norm, k_norm, np.float32(eps),
        out, row_stride(out), k_cache, v_cache, np.int32(H), np.int32(KVH), np.int32(D),
    ]  # fmt: skip
    grid = (T, -(-(H + 2 * KVH) * lanes // 128), 1)
    kernel = f"rope_and_cache_{_NAMES[qkv.dtype]}"
    if e4m3 is not None:
        kernel, args = f"{kernel}_e4m3", [*args, *e4m3]
    return Launch("rope_and_cache.cu", kernel, grid, (128, 1, 1), 0, args)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a preparation reads: x [T, K], with a norm (weight [K], eps) before it, or silu of x [T, 2K] = gate | up."""

    x: Any
    norm: tuple[Any, float] | None = None
    silu: bool = False

    @property
    def T(self) -> int:
        return len(self.x)

    @property
    def K(self) -> int:
        return self.x.shape[1] // 2 if self.silu else self.x.shape[1]

    def launch(self, source: str, kernel: str, args: list[Any]) -> Launch:
        weight, eps = self.norm or (None, 0.0)
        # A tile of 16 to a thread, so that a row is ready soon; of many rows four, so that what begins a row is shared.
        warps = -(-padded(self.K) // (16 * 32 * (4 if self.T >= _MANY_ROWS else 1)))
        shared = -(-self.K // 16) * 32 if self.silu or self.norm else 0
        rows = [self.x, row_stride(self.x), weight, np.float32(eps), np.int32(self.silu), np.int32(self.K)]
        name = f"{kernel}_{_NAMES[self.x.dtype]}"
        block = (32 * min(warps, 12 if "hif4" in kernel else 32), 1, 1)  # as many threads as registers allow
        return Launch(source, name, (self.T, 1, 1), block, shared, [*rows, *args])


def prepare_amax(rows: Rows, amax: Any, invalid: Any) -> Launch:
    """amax [1] float32, zero before: the largest magnitude of all rows."""
    return rows.launch("prepare_sharq.cu", "prepare_amax", [amax, invalid])


def prepare_sharq(rows: Rows, operand: Any, amax: Any, invalid: Any) -> Launch:
    """operand: its format, sparse, and arrays of `sharq_shapes`. amax: None for a g per row."""
    kernel = f"prepare_sharq_{operand.format}_{'sparse' if operand.sparse else 'dense'}"
    arrays = [operand.backbone, operand.meta, operand.backbone_scale, operand.residual, operand.residual_scale]
    return rows.launch("prepare_sharq.cu", kernel, [amax, *arrays, operand.g, invalid])


def prepare_fp4(rows: Rows, operand: Any, amax: Any, invalid: Any) -> Launch:
    """operand: its format and arrays of `fp4_shapes`. amax: None for a g per row."""
    arrays = [operand.payload, operand.scale, operand.g]
    return rows.launch("prepare_fp4.cu", f"prepare_fp4_{operand.format}", [amax, *arrays, invalid])


def prepare_fp8(rows: Rows, codes: Any, scale: Any, invalid: Any) -> Launch:
    """codes uint8 [T, padded K], scale float32 [T]."""
    return rows.launch("prepare_fp8.cu", "prepare_fp8", [codes, scale, invalid])


def sharq_shapes(format: Format, sparse: bool, T: int, K: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Field of `SharqOperand` -> shape and dtype in device memory, K padded."""
    P, byte, scale = padded(K), np.dtype(np.uint8), _scale_type(format)
    block = BLOCKS[format][0]
    kept = {"meta": ((T, P // (8 if format == "hif4" else 16)), byte)} if sparse else {}
    return kept | {
        "backbone": ((T, P // (4 if sparse else 2)), byte),
        "backbone_scale": ((T, P // (BLOCKS[format][-1] if sparse else block)), scale),
        "residual": ((T, P // 2), byte),
        "residual_scale": ((T, P // block), scale),
        "g": ((T,), np.dtype(np.float32)),
    }


def fp4_shapes(format: Format, T: int, K: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Field of `Fp4Matrix` -> shape and dtype in device memory, K padded."""
    P = padded(K)
    return {
        "payload": ((T, P // 2), np.dtype(np.uint8)),
        "scale": ((T, P // BLOCKS[format][0]), _scale_type(format)),
        "g": ((T,), np.dtype(np.float32)),
    }


def _scale_type(format: Format) -> np.dtype[Any]:
    return np.dtype(np.uint32 if format == "hif4" else np.uint8)


def _threads(columns: int) -> Dim3:
    """One thread per eight columns, in warps, up to 256."""
    return (min(256, -(-columns // 256) * 32), 1, 1)
