"""Launches of the matrix products: which kernel, how the work is cut, what arguments; headers of cuda/linear_* say why.

Nothing here allocates or launches. The order of sums, and so every bit, is a function of K alone (`slice_k`); all else
that a plan chooses is for speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from engine.errors import InvalidArgument
from engine.ops.gpu.launch import Launch
from engine.ops.gpu.launch_rows import row_stride, type_name
from engine.ops.gpu.weight_layout import CODE_BYTES, FP4_UNIT_K, FP8_UNIT_K, TILE_ROWS, Fp4Units, Fp8Units, unit_bytes

COLUMNS = 8  # of an mma
STAGES = 4  # kStages
RESULT_PADDING = 8  # kResultPadding
OUTPUT_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
H200_SMS = 132


def slice_k(K: int) -> int:
    """How many k are summed before the sum is added to others': a power of two, at most 8 slices."""
    size = 256
    while 8 * size < K:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How cuda/linear_decode.cuh cuts M · N · K."""

    tiles: int  # of 8 columns a block
    warps: int  # of 16 rows a block
    column_groups: int
    row_blocks: int
    slices: int
    slices_per_block: int
    slice_k: int
    chunk_k: int
    shared: int
    partials: int  # floats of workspace; 0 where a block has all slices
    arrivals: int  # counters, zero before and after

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.column_groups, -(-self.slices // self.slices_per_block), self.row_blocks)


def plan_decode(
    M: int, N: int, K: int, *, unit_k: int, unit_bytes: int, padding: int, paths: int = 1, scale_group: int = 0,
    sms: int = H200_SMS,
) -> DecodePlan:  # fmt: skip
    """The plan for M tokens. unit_k, unit_bytes: of the weight's layout; padding: bytes after a column of factors;
    scale_group: k per fp32 scale of the input, 0 where it has none; sms: of the device."""
    tiles = next(tiles for tiles in (1, 2, 4) if M * paths <= COLUMNS * tiles or tiles == 4)
    warps = 4 if tiles == 1 else 8
    group_tokens = COLUMNS * tiles // paths
    groups = -(-M // group_tokens)
    row_blocks = -(-N // (TILE_ROWS * warps))
    size = slice_k(K)
    slices = -(-K // size)
    splits = min(slices, -(-4 * sms // (row_blocks * groups)))  # four blocks an SM keep it busy
    per_block = -(-slices // splits)

    columns = min(M, group_tokens) * paths
    budget = (20 if tiles < 4 else 36) * 1024  # bytes of factors, so that two to four blocks fit an SM
    chunk = size
    while chunk > FP4_UNIT_K and columns * (2 * chunk + padding) > budget:
        chunk //= 2
    shared = warps * STAGES * unit_bytes + columns * (2 * chunk + padding)
    shared += 4 * group_tokens * (TILE_ROWS * warps + RESULT_PADDING)
    if scale_group:
        shared += 4 * (chunk // scale_group) * COLUMNS * tiles
    split = per_block < slices
    return DecodePlan(
        tiles=tiles,
        warps=warps,
        column_groups=groups,
        row_blocks=row_blocks,
        slices=slices,
        slices_per_block=per_block,
        slice_k=size,
        chunk_k=chunk,
        shared=shared,
        partials=slices * M * -(-N // TILE_ROWS) * TILE_ROWS if split else 0,
        arrivals=groups * row_blocks if split else 0,
    )


@dataclass(frozen=True, slots=True)
class Output:
    """Where a product goes and what is added on the way."""

    out: Any  # [M, N] float32, float16 or bfloat16
    bias: Any = None  # [N] float32
    residual: Any = None  # [M, N] of out's dtype; may be out


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory that launches share, one after the other."""

    partials: Any  # float32, at least `DecodePlan.partials`
    arrivals: Any  # uint32, zero, at least `DecodePlan.arrivals`


def fp4_name(weight: Fp4Units) -> str:
    """How entry points spell a weight's format."""
    return f"nvfp4x{weight.block}" if weight.format == "nvfp4" else weight.format


def plan_fp4_decode(
    weight: Fp4Units, M: int, input_type: str, *, paths: int = 1, sms: int = H200_SMS
) -> DecodePlan:  # fmt: skip
    """input_type: fp4 (one or two paths), bf16 or f16."""
    scale_group = {"bf16": 128, "f16": 0, "fp4": {"nvfp4": 0, "mxfp4": 32, "hif4": 64}[weight.format]}[input_type]
    return plan_decode(
        M, weight.N, weight.K, unit_k=FP4_UNIT_K, unit_bytes=unit_bytes(weight.format, weight.block), padding=64,
        paths=paths, scale_group=scale_group, sms=sms,
    )  # fmt: skip


def w4a16_decode(x: Any, weight: Fp4Units, output: Output, workspace: Workspace, sms: int = H200_SMS) -> Launch:
    """x [M, K] bfloat16 or float16."""
    input_type = type_name(x.dtype)
    plan = plan_fp4_decode(weight, len(x), input_type, sms=sms)
    kernel = f"linear_decode_{fp4_name(weight)}_{input_type}_t{plan.tiles}"
    args = [x, row_stride(x), weight.units, weight.g, *_decode_arguments(plan, output, workspace, weight.K)]
    return _decode_launch(f"linear_{fp4_name(weight)}.cu", kernel, plan, args)


def fp4_decode(operand: Any, weight: Fp4Units, output: Output, workspace: Workspace, sms: int = H200_SMS) -> Launch:
    """operand: device arrays named as in `SharqOperand` or `Fp4Matrix`, rows of `padded(K)` codes."""
    two_paths = hasattr(operand, "residual")
    plan = plan_fp4_decode(weight, len(operand.g), "fp4", paths=2 if two_paths else 1, sms=sms)
    if two_paths:
        K = 2 * operand.residual.shape[1]
        backbone_block, block = K // operand.backbone_scale.shape[1], K // operand.residual_scale.shape[1]
        codes = [operand.backbone, operand.meta, operand.backbone_scale, operand.residual, operand.residual_scale]
    else:
        K = 2 * operand.payload.shape[1]
        block = backbone_block = K // operand.scale.shape[1]
        codes = [None, None, None, operand.payload, operand.scale]
    kernel = f"linear_decode_{fp4_name(weight)}_fp4_t{plan.tiles}"
    args = [*codes, np.int32(backbone_block), np.int32(block), operand.g, weight.units, weight.g]
    return _decode_launch(
        f"linear_{fp4_name(weight)}.cu", kernel, plan, [*args, *_decode_arguments(plan, output, workspace, K)]
    )


def plan_fp8_decode(weight: Fp8Units, M: int, input_type: str, *, sms: int = H200_SMS) -> DecodePlan:
    """input_type: fp8, bf16 or f16."""
    return plan_decode(
        M, weight.N, weight.K, unit_k=FP8_UNIT_K, unit_bytes=CODE_BYTES, padding=16,
        scale_group=128 if input_type == "bf16" else 0, sms=sms,
    )  # fmt: skip


def fp8_decode(operand: Any, weight: Fp8Units, output: Output, workspace: Workspace, sms: int = H200_SMS) -> Launch:
    """operand: device arrays `codes` uint8 [M, padded(K)] and `scale` float32 [M]."""
    plan = plan_fp8_decode(weight, len(operand.scale), "fp8", sms=sms)
    args = [operand.codes, operand.scale, *_fp8_arguments(weight)]
    args += _decode_arguments(plan, output, workspace, operand.codes.shape[1])
    return _decode_launch("linear_fp8.cu", f"linear_decode_fp8_fp8_t{plan.tiles}", plan, args)


def w8a16_decode(x: Any, weight: Fp8Units, output: Output, workspace: Workspace, sms: int = H200_SMS) -> Launch:
    """x [M, K] bfloat16 or float16."""
    input_type = type_name(x.dtype)
    plan = plan_fp8_decode(weight, len(x), input_type, sms=sms)
    args = [x, row_stride(x), *_fp8_arguments(weight), *_decode_arguments(plan, output, workspace, weight.K)]
    return _decode_launch("linear_fp8.cu", f"linear_decode_fp8_{input_type}_t{plan.tiles}", plan, args)


def plan_16_bit_decode(N: int, K: int, M: int, *, sms: int = H200_SMS) -> DecodePlan:
    return plan_decode(M, N, K, unit_k=64, unit_bytes=2048, padding=64, sms=sms)


def decode(x: Any, w: Any, output: Output, workspace: Workspace, sms: int = H200_SMS) -> Launch:
    """x [M, K] and w [N, K] of one type, bfloat16 or float16, w contiguous. Raises InvalidArgument (K, types)."""
    N, K = w.shape
    if K % 8 or x.dtype != w.dtype:
        raise InvalidArgument(f"x and w must have one type and K a multiple of 8; got {x.dtype}, {w.dtype} and K = {K}")
    plan = plan_16_bit_decode(N, K, len(x), sms=sms)
    args = [x, row_stride(x), w, *_decode_arguments(plan, output, workspace, K)]
    return _decode_launch("linear_bf16.cu", f"linear_decode_{type_name(x.dtype)}_t{plan.tiles}", plan, args)


def _fp8_arguments(weight: Fp8Units) -> list[Any]:
    return [weight.units, weight.scale, np.int32(weight.scale.shape[0])]


def _decode_arguments(plan: DecodePlan, output: Output, workspace: Workspace, K: int) -> list[Any]:
    M, N = output.out.shape
    shape = [np.int32(M), np.int32(N), np.int32(K)]
    cut = [np.int32(plan.slice_k), np.int32(plan.slices_per_block), np.int32(plan.chunk_k)]
    work = [workspace.partials, workspace.arrivals] if plan.partials else [None, None]
    out_type = np.int32(OUTPUT_TYPES[output.out.dtype])
    return [output.bias, output.residual, output.out, out_type, *shape, *cut, *work]


def _decode_launch(source: str, kernel: str, plan: DecodePlan, args: list[Any]) -> Launch:
    return Launch(source, kernel, plan.grid, (32 * plan.warps, 1, 1), plan.shared, args)
