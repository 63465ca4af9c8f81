"""Launches of the FP4 products on block-scaled tensor cores (sm_120a, sm_121a): cuda/linear_sm120.cuh.

Every entry point serves every M and sums in one order, which follows from K alone (`launch_linear.slice_k`): which
shape a plan takes, and how it splits K over blocks, changes no bit, so deterministic=True has nothing to choose here.
HiF4 has no such instructions; `launch_linear` serves it on these GPUs, too.

Nothing here allocates or launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.errors import InvalidArgument
from engine.ops.gpu.launch import Launch
from engine.ops.gpu.launch_linear import OUTPUT_TYPES, RESULT_PADDING, KCut, Output, Workspace, cut_k, fp4_name
from engine.ops.gpu.weight_layout import TILE_ROWS, Fp4Units, unit_bytes

ARCHITECTURES = ("sm_120a", "sm_121a")

# What is multiplied: SharQ's two paths, its sparse backbone or its residual alone, one path.
Path = Literal["sharq", "sharq_dense", "sparse", "dense"]

_SHARED_OF_SM, _SHARED_BESIDES, _MOST_STAGES = 100 * 1024, 1024 + 128, 8  # as in the header


@dataclass(frozen=True, slots=True)
class Shape:
    """A block: cuda/linear_sm120.cuh, M16 … M128."""

    tokens: int
    rows: int
    threads: int
    blocks: int  # an SM holds


SHAPES = {16: Shape(16, 64, 128, 2), 64: Shape(64, 64, 128, 2), 128: Shape(128, 128, 256, 1)}


@dataclass(frozen=True, slots=True)
class Plan:
    """How M · N · K is cut."""

    shape: Shape
    token_blocks: int
    row_blocks: int
    cut: KCut
    shared: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.token_blocks, self.cut.splits, self.row_blocks)


def plan(
    M: int, weight: Fp4Units, path: Path, *, sms: int, tokens: int | None = None, splits: int | None = None
) -> Plan:  # fmt: skip
    """sms: of the device. tokens (16, 64, 128) and splits (of K, at most) overrule what is chosen for speed.

    Raises InvalidArgument for what no entry point multiplies.
    """
    _check(weight, path)
    if tokens is None:
        tokens = next((size for size in SHAPES if size >= M), 128)
    shape = SHAPES[tokens]
    token_blocks, row_blocks = -(-M // shape.tokens), -(-weight.N // shape.rows)
    blocks = token_blocks * row_blocks
    if splits is None and tokens < 128:
        splits = -(-2 * sms // blocks)  # bound by memory: as many blocks as SMs hold
    elif splits is None:
        splits = sms // blocks  # bound by compute: another round would cost more than idle SMs
    cut = cut_k(M, weight.N, weight.K, sms=sms, blocks=blocks, splits=splits)
    return Plan(shape, token_blocks, row_blocks, cut, shared_bytes(shape, weight, path))


def shared_bytes(shape: Shape, weight: Fp4Units, path: Path) -> int:
    """Dynamic shared memory: as many stages as fit, or what the results need."""
    stage = shape.tokens * token_bytes(weight, path)
    stage += shape.rows // TILE_ROWS * unit_bytes(weight.format, weight.block)
    stages = min(_MOST_STAGES, (_SHARED_OF_SM // shape.blocks - _SHARED_BESIDES) // stage)
    return max(stages * stage, 4 * shape.tokens * (shape.rows + RESULT_PADDING))


def token_bytes(weight: Fp4Units, path: Path) -> int:
    """Bytes of a token's operand per 128 k: codes, metadata, scales."""
    scales = 4 if weight.format == "mxfp4" else 8
    sparse, dense = 32 + 8 + 4, 64 + scales
    return {"sharq": sparse + dense, "sharq_dense": 2 * dense, "sparse": sparse, "dense": dense}[path]


def path_of(operand: Any) -> Path:
    """All of an operand: device arrays named as in `SharqOperand` or `Fp4Matrix`."""
    if not hasattr(operand, "residual"):
        return "dense"
    return "sharq_dense" if operand.meta is None else "sharq"


def kernel_path(weight: Fp4Units, path: Path) -> str:
    """What runs, for the user."""
    one = "dense OMMA"
    sparse = "sparse OMMA" if fp4_name(weight) == "nvfp4x32" else "expanded backbone on dense OMMA"
    return {"sharq": f"{sparse} + {one}", "sharq_dense": f"{one} twice", "sparse": sparse, "dense": one}[path]


def linear(
    operand: Any, weight: Fp4Units, output: Output, workspace: Workspace, chosen: Plan, path: Path | None = None
) -> Launch:
    """out = operand · weightᵀ, scaled, with bias and residual as `Ops.fp4_linear` says.

    operand: device arrays named as in `SharqOperand` or `Fp4Matrix`, rows of `padded(K)` codes. path: None for all of
    the operand; "sparse", "dense": a SharQ operand's backbone or residual alone. chosen: `plan` of the same M, weight
    and path. Raises InvalidArgument for an operand that does not fit.
    """
    path = path or path_of(operand)
    _check(weight, path)
    if operand.format != weight.format:
        raise InvalidArgument(f"activations in {operand.format} cannot be multiplied with a weight in {weight.format}")
    M, N = output.out.shape
    shape = [np.int32(M), np.int32(N), np.int32(weight.K)]
    cut = [np.int32(chosen.cut.slice_k), np.int32(chosen.cut.slices_per_block)]
    work = [workspace.partials, workspace.arrivals] if chosen.cut.partials else [None, None]
    args = [*_operand_arrays(operand, path), operand.g, weight.units, weight.g]
    args += [output.bias, output.residual, output.out, np.int32(OUTPUT_TYPES[output.out.dtype]), *shape, *cut, *work]
    name = fp4_name(weight)
    kernel = f"linear_{name}_{path}_m{chosen.shape.tokens}"
    return Launch(f"linear_{name}_sm120.cu", kernel, chosen.grid, (chosen.shape.threads, 1, 1), chosen.shared, args)


def _operand_arrays(operand: Any, path: Path) -> list[Any]:
    """backbone, metadata, backbone_scale, codes, codes_scale; None for what is not multiplied."""
    if not hasattr(operand, "residual"):
        return [None, None, None, operand.payload, operand.scale]
    backbone = [operand.backbone, operand.meta, operand.backbone_scale]
    residual = [operand.residual, operand.residual_scale]
    return [*(backbone if path != "dense" else [None] * 3), *(residual if path != "sparse" else [None] * 2)]


def _check(weight: Fp4Units, path: Path) -> None:
    if weight.format == "hif4":
        raise InvalidArgument("no block-scaled instruction multiplies hif4; use the products of launch_linear")
    if weight.placed:
        raise InvalidArgument("FP4 instructions read nibbles as they are: pack this weight with placed=False")
    if path == "sparse" and fp4_name(weight) != "nvfp4x32":
        raise InvalidArgument(f"sparse products take nvfp4 weights with a scale per 32 k, not {fp4_name(weight)}")
