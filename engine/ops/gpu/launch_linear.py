"""Launches of the matrix products: which kernel, how the work is cut, what arguments; headers of cuda/linear_* say why.

Three families, each for every kind of weight:
    decode    decode rows; for few tokens, bound by reading the weight; serves any number in column groups
    tile      prefill rows on mma.sync, sm_80 and newer; SharQ's backbone on sparse products
    wgmma     prefill rows on sm_90a; bf16 activations, FP4 and FP8 ones made so

Nothing here allocates or launches. Within a family a token's bits depend on its row, K and N alone (`slice_k`, and the
width of a wgmma tile); all else that a plan chooses is for speed. Families sum in different orders, which is why the
kind of a row says which it takes (`engine.scheduler`), and never how many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from engine.errors import InvalidArgument
from engine.ops.gpu.launch import Launch, shared_limit
from engine.ops.gpu.launch_rows import padded, row_stride, type_name
from engine.ops.gpu.weight_layout import CODE_BYTES, FP4_UNIT_K, FP8_UNIT_K, TILE_ROWS, Fp4Units, Fp8Units, unit_bytes

COLUMNS = 8  # of an mma
STAGES = 4  # kStages
RESULT_PADDING = 8  # kResultPadding
OUTPUT_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
EXPAND_THREADS = 256
_LARGEST_SHARED = shared_limit("sm_90a")
_DECODE_SHARED = shared_limit("sm_86") - 1024  # plans serve every architecture; a kibibyte for scales and static arrays
# Four blocks an SM of 32 tokens and 128 rows, the largest of plan_decode; launch_linear_sm120's have no more.
MOST_SPLIT = 4 * 32 * 128


DECODE_TOKENS = 64  # two column groups of 32: beyond, dequantising over and over costs more than reading


def slice_k(K: int) -> int:
    """How many k are summed before the sum is added to others': a power of two, at most 8 slices."""
    size = 256
    while 8 * size < K:
        size *= 2
    return size


@dataclass(frozen=True, slots=True)
class KCut:
    """How blocks share K, in slices that one block sums each, and the workspace in which the sums meet."""

    slice_k: int
    slices: int
    slices_per_block: int
    partials: int  # floats of workspace; 0 where a block has all slices
    arrivals: int  # counters, zero before and after
    room: int  # floats that suffice for this and for all fewer tokens

    @property
    def splits(self) -> int:
        """Blocks along K."""
        return -(-self.slices // self.slices_per_block)


def cut_k(M: int, N: int, K: int, *, sms: int, blocks: int, splits: int) -> KCut:
    """blocks: that share M · N; splits: how many of these K should be shared by, for speed. It changes no bit.

    K is split where blocks are few: `MOST_SPLIT` results at most for each of the device's multiprocessors.
    """
    size = slice_k(K)
    slices = -(-K // size)
    per_block = -(-slices // max(1, min(splits, slices)))
    split = per_block < slices
    rows = -(-N // TILE_ROWS) * TILE_ROWS
    return KCut(
        slice_k=size,
        slices=slices,
        slices_per_block=per_block,
        partials=slices * M * rows if split else 0,
        arrivals=blocks if split else 0,
        room=slices * min(M * rows, MOST_SPLIT * sms) if slices > 1 else 0,
    )


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """How cuda/linear_decode.cuh cuts M · N · K."""

    tiles: int  # of 8 columns a block
    warps: int  # of 16 rows a block
    column_groups: int
    row_blocks: int
    cut: KCut
    chunk_k: int
    shared: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.column_groups, self.cut.splits, self.row_blocks)


def plan_decode(
    M: int, N: int, K: int, *, sms: int, unit_k: int, unit_bytes: int, padding: int, paths: int = 1,
    scale_group: int = 0,
) -> DecodePlan:  # fmt: skip
    """The plan for M tokens. sms: of the device; unit_k, unit_bytes: of the weight's layout; padding: bytes after a
    column of factors; scale_group: k per fp32 scale of the input, 0 where it has none."""
    tiles = next(tiles for tiles in (1, 2, 4) if M * paths <= COLUMNS * tiles or tiles == 4)
    warps = 4 if tiles == 1 else 8
    group_tokens = COLUMNS * tiles // paths
    groups = -(-M // group_tokens)
    row_blocks = -(-N // (TILE_ROWS * warps))
    blocks = groups * row_blocks
    cut = cut_k(M, N, K, sms=sms, blocks=blocks, splits=-(-4 * sms // blocks))  # four blocks an SM keep it busy

    columns = min(M, group_tokens) * paths
    others = warps * STAGES * unit_bytes + 4 * group_tokens * (TILE_ROWS * warps + RESULT_PADDING)
    budget = (20 if tiles < 4 else 36) * 1024  # bytes of factors, so that two to four blocks fit an SM
    budget = min(budget, _DECODE_SHARED - others)
    chunk = cut.slice_k
    while chunk > FP4_UNIT_K and columns * (2 * chunk + padding) > budget:
        chunk //= 2
    shared = others + columns * (2 * chunk + padding)
    if scale_group:
        shared += 4 * (chunk // scale_group) * COLUMNS * tiles
    return DecodePlan(tiles, warps, groups, row_blocks, cut, chunk, shared)


@dataclass(frozen=True, slots=True)
class Output:
    """Where a product goes and what is added on the way."""

    out: Any  # [M, N] float32, float16 or bfloat16
    bias: Any = None  # [N] float32
    residual: Any = None  # [M, N] of out's dtype; may be out

    def of(self, rows: slice) -> Output:
        """These rows' part."""
        return Output(self.out[rows], self.bias, None if self.residual is None else self.residual[rows])


@dataclass(frozen=True, slots=True)
class Workspace:
    """Memory that launches share, one after the other."""

    partials: Any  # float32, at least `KCut.partials`
    arrivals: Any  # uint32, zero, at least `KCut.arrivals`


def fp4_name(weight: Fp4Units) -> str:
    """How entry points spell a weight's format."""
    return f"nvfp4x{weight.block}" if weight.format == "nvfp4" else weight.format


def plan_fp4_decode(weight: Fp4Units, M: int, input_type: str, *, sms: int, paths: int = 1) -> DecodePlan:
    """input_type: fp4 (one or two paths), bf16 or f16."""
    scale_group = {"bf16": 128, "f16": 0, "fp4": {"nvfp4": 0, "mxfp4": 32, "hif4": 64}[weight.format]}[input_type]
    return plan_decode(
        M, weight.N, weight.K, unit_k=FP4_UNIT_K, unit_bytes=unit_bytes(weight.format, weight.block), padding=64,
        paths=paths, scale_group=scale_group, sms=sms,
    )  # fmt: skip


def w4a16_decode(x: Any, weight: Fp4Units, output: Output, workspace: Workspace, plan: DecodePlan) -> Launch:
    """x [M, K] bfloat16 or float16; plan: of the same weight, M and input."""
    input_type = type_name(x.dtype)
    kernel = f"linear_decode_{fp4_name(weight)}_{input_type}_t{plan.tiles}"
    args = [x, row_stride(x), weight.units, weight.g, *_decode_arguments(plan, output, workspace, weight.K)]
    return _decode_launch(f"linear_{fp4_name(weight)}.cu", kernel, plan, args)


def fp4_decode(operand: Any, weight: Fp4Units, output: Output, workspace: Workspace, plan: DecodePlan) -> Launch:
    """operand: device arrays named as in `SharqOperand` or `Fp4Matrix`, rows of `padded(K)` codes; plan: of the same
    weight, M and paths."""
    two_paths = hasattr(operand, "residual")
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


def plan_fp8_decode(weight: Fp8Units, M: int, input_type: str, *, sms: int) -> DecodePlan:
    """input_type: fp8, bf16 or f16."""
    return plan_decode(
        M, weight.N, weight.K, unit_k=FP8_UNIT_K, unit_bytes=CODE_BYTES, padding=16,
        scale_group=128 if input_type == "bf16" else 0, sms=sms,
    )  # fmt: skip


def fp8_decode(operand: Any, weight: Fp8Units, output: Output, workspace: Workspace, plan: DecodePlan) -> Launch:
    """operand: device arrays `codes` uint8 [M, padded(K)] and `scale` float32 [M]; plan: of the same weight and M."""
    args = [operand.codes, operand.scale, *_fp8_arguments(weight)]
    args += _decode_arguments(plan, output, workspace, operand.codes.shape[1])
    return _decode_launch("linear_fp8.cu", f"linear_decode_fp8_fp8_t{plan.tiles}", plan, args)


def w8a16_decode(x: Any, weight: Fp8Units, output: Output, workspace: Workspace, plan: DecodePlan) -> Launch:
    """x [M, K] bfloat16 or float16; plan: of the same weight, M and input."""
    input_type = type_name(x.dtype)
    args = [x, row_stride(x), *_fp8_arguments(weight), *_decode_arguments(plan, output, workspace, weight.K)]
    return _decode_launch("linear_fp8.cu", f"linear_decode_fp8_{input_type}_t{plan.tiles}", plan, args)


def plan_16_bit_decode(N: int, K: int, M: int, *, sms: int) -> DecodePlan:
    return plan_decode(M, N, K, unit_k=64, unit_bytes=2048, padding=64, sms=sms)


def decode(x: Any, w: Any, output: Output, workspace: Workspace, plan: DecodePlan) -> Launch:
    """x [M, K] and w [N, K] of one type, bfloat16 or float16, w contiguous. Raises InvalidArgument (K, types)."""
    N, K = w.shape
    if K % 8 or x.dtype != w.dtype:
        raise InvalidArgument(f"x and w must have one type and K a multiple of 8; got {x.dtype}, {w.dtype} and K = {K}")
    args = [x, row_stride(x), w, *_decode_arguments(plan, output, workspace, K)]
    return _decode_launch("linear_bf16.cu", f"linear_decode_{type_name(x.dtype)}_t{plan.tiles}", plan, args)


# ---- many tokens -----------------------------------------------------------------------------------------------------

TILE_N = 128
TILE_STAGES = 3  # kTileStages
Kind = Literal["one", "two", "sparse_and_dense", "sparse"]
# Of a token and 64 k in a stage of shared memory.
STAGE_BYTES: dict[Kind, int] = {"one": 128, "two": 256, "sparse_and_dense": 192, "sparse": 64}


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How cuda/linear_tile.cuh cuts M · N."""

    warps_m: int  # of 64 tokens a block
    grid: tuple[int, int, int]
    shared: int


def plan_tile(
    M: int, N: int, kind: Kind = "one", *, copied_weight: bool, sms: int, shared_limit: int = _LARGEST_SHARED
) -> TilePlan:
    """Blocks of 128 tokens where that leaves every SM one and shared memory suffices, else of 64.

    copied_weight: 16-bit weights; packed ones are dequantised into two buffers. shared_limit: bytes a block may have.
    """
    row_blocks = -(-N // TILE_N)
    for warps_m in (2, 1):
        tokens = 64 * warps_m
        blocks = -(-M // tokens) * row_blocks
        stage = tokens * STAGE_BYTES[kind] + (TILE_N * 128 if copied_weight else 0)
        pipeline = TILE_STAGES * stage + (0 if copied_weight else 2 * TILE_N * 128)
        shared = max(pipeline, 4 * tokens * (TILE_N + RESULT_PADDING))
        if warps_m == 1 or (blocks >= sms and shared <= shared_limit):
            return TilePlan(warps_m, (-(-M // tokens), row_blocks, 1), shared)
    raise AssertionError("the loop ends at one warp")


@dataclass(frozen=True, slots=True)
class Expanded:
    """Activations in FP4 as bf16, in memory that `expand` fills; arrays as `expanded_shapes` says.

    fragments: in the order of wgmma's registers (cuda/linear_fp4_wgmma.cuh) and not row by row.
    """

    kind: Kind
    fragments: bool
    g: Any  # float32 [M]
    first: Any
    second: Any = None
    metadata: Any = None


def prefill_kind(operand: Any) -> Kind:
    """What prefill rows of an FP4 operand are expanded to."""
    if not hasattr(operand, "residual"):
        return "one"
    return "two" if operand.meta is None else "sparse_and_dense"


def expanded_shapes(kind: Kind, M: int, K: int) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Field of `Expanded` -> shape and dtype in device memory. Rows are padded to 16, which fragments have."""
    P, bf16, sparse = padded(K), np.dtype(ml_dtypes.bfloat16), kind.startswith("sparse")
    tiles = -(-M // 16)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {"first": ((16 * tiles, P // 2 if sparse else P), bf16)}
    if kind in ("two", "sparse_and_dense"):
        shapes["second"] = ((16 * tiles, P), bf16)
    if sparse:
        shapes["metadata"] = ((tiles, P // 64, 32), np.dtype(np.uint32))
    return shapes


def expand(operand: Any, weight: Fp4Units, to: Expanded) -> list[Launch]:
    """Launches that fill `to` from an operand as `fp4_decode` takes it. kind "one": a single path, or the residual of a
    SharQ operand; "two": both of its paths, the backbone dense or made so; "sparse": its sparse backbone."""
    if not hasattr(operand, "residual"):
        return [_expand(weight, to, to.first, operand.payload, None, operand.scale)]
    residual = (operand.residual, None, operand.residual_scale)
    if to.kind == "one":
        return [_expand(weight, to, to.first, *residual)]
    backbone = (operand.backbone, operand.meta, operand.backbone_scale)
    first = _expand(weight, to, to.first, *backbone, words=to.metadata)
    return [first] if to.kind == "sparse" else [first, _expand(weight, to, to.second, *residual)]


def _expand(
    weight: Fp4Units, to: Expanded, out: Any, codes: Any, metadata: Any, scale: Any, words: Any = None
) -> Launch:  # fmt: skip
    """One path; words: the instructions' metadata, where it stays sparse."""
    name, M, K = fp4_name(weight), len(to.g), out.shape[1] * (1 if words is None else 2)
    order = "permuted" if to.kind.startswith("sparse") and weight.format != "hif4" else "dense"
    kernel = f"expand_{name}_{order if words is None else 'sparse'}{'_fragments' if to.fragments else ''}"
    source = f"linear_{name}_{'wgmma' if to.fragments else 'tile'}.cu"
    args = [codes, metadata, scale, np.int32(K // scale.shape[1]), out, *([] if words is None else [words])]
    values = len(out) * K // 8  # threads with one store each; as many as words of metadata at least
    grid = (-(-values // EXPAND_THREADS), 1, 1)
    return Launch(source, kernel, grid, (EXPAND_THREADS, 1, 1), 0, [*args, np.int32(M), np.int32(K)])


def tile(x: Any, w: Any, output: Output, plan: TilePlan) -> Launch:
    """x [M, K] and w [N, K] as `decode` takes them."""
    (M, K), N = x.shape, len(w)
    if K % 8 or x.dtype != w.dtype:
        raise InvalidArgument(f"x and w must have one type and K a multiple of 8; got {x.dtype}, {w.dtype} and K = {K}")
    args = [x, row_stride(x), w, *_tile_arguments(output, M, N, K)]
    return _tile_launch("linear_bf16_tile.cu", f"linear_tile_{type_name(x.dtype)}", plan, args)


def w4a16_tile(x: Any, weight: Fp4Units, output: Output, plan: TilePlan) -> Launch:
    """x [M, K] bfloat16, or float16 where the weight is nvfp4. Raises InvalidArgument (f16 with other formats, whose
    scales it does not have: `w4a16_decode` takes them, any number of tokens)."""
    if x.dtype == np.float16 and weight.format != "nvfp4":
        raise InvalidArgument(
            f"float16 activations with {weight.format} weights have no tile product; use w4a16_decode"
        )
    kernel = f"linear_tile_{fp4_name(weight)}_one_{type_name(x.dtype)}"
    args = [x, None, None, row_stride(x), weight.units, None, weight.g]
    args += _tile_arguments(output, len(x), weight.N, weight.K)
    return _tile_launch(f"linear_{fp4_name(weight)}_tile.cu", kernel, plan, args)


def fp4_tile(operand: Expanded, weight: Fp4Units, output: Output, plan: TilePlan) -> Launch:
    M, K = len(operand.g), padded(weight.K)
    kernel = f"linear_tile_{fp4_name(weight)}_{operand.kind}_bf16"
    args = [operand.first, operand.second, operand.metadata, np.int64(K), weight.units, operand.g, weight.g]
    args += _tile_arguments(output, M, weight.N, K)
    return _tile_launch(f"linear_{fp4_name(weight)}_tile.cu", kernel, plan, args)


WGMMA_TOKENS, WGMMA_STAGES = 128, 4


@dataclass(frozen=True, slots=True)
class WgmmaPlan:
    """How cuda/linear_wgmma.cuh cuts M · N."""

    rows: int  # n of a tile
    grid: tuple[int, int, int]
    shared: int


def plan_wgmma(M: int, N: int, *, copied_weight: bool, sliced: bool) -> WgmmaPlan:
    """sliced: whether sums must be cut along K, which only narrow tiles do. The order of sums follows from `rows`, so
    that depends on N and the product, not on M."""
    rows = 128 if sliced or N < 4096 else 256
    stage = WGMMA_TOKENS * 128 + (rows * 128 if copied_weight else 0)
    return _wgmma_plan(M, N, rows, WGMMA_STAGES * stage + (0 if copied_weight else 3 * rows * 128))


def _wgmma_plan(M: int, N: int, rows: int, pipeline: int) -> WgmmaPlan:
    """pipeline: bytes of shared memory before results take it."""
    shared = max(pipeline, 4 * WGMMA_TOKENS * (rows + RESULT_PADDING))
    return WgmmaPlan(rows, (-(-M // WGMMA_TOKENS), -(-N // rows), 1), shared)


def wgmma(x: Any, w: Any, output: Output) -> Launch:
    """x [M, K] and w [N, K] bfloat16, w contiguous. Raises InvalidArgument (K, types)."""
    (M, K), N = x.shape, len(w)
    if K % 8 or not x.dtype == w.dtype == ml_dtypes.bfloat16:
        raise InvalidArgument(f"x and w must be bfloat16 and K a multiple of 8; got {x.dtype}, {w.dtype} and K = {K}")
    plan = plan_wgmma(M, N, copied_weight=True, sliced=False)
    args = [x, row_stride(x), w, *_tile_arguments(output, M, N, K)]
    return _wgmma_launch("linear_bf16_wgmma.cu", f"linear_wgmma_bf16_n{plan.rows}", plan, args)


def w4a16_wgmma(x: Any, weight: Fp4Units, output: Output) -> Launch:
    """x [M, K] bfloat16."""
    plan = plan_wgmma(len(x), weight.N, copied_weight=False, sliced=False)
    args = [x, row_stride(x), weight.units, None, weight.g, *_tile_arguments(output, len(x), weight.N, weight.K)]
    name = fp4_name(weight)
    return _wgmma_launch(f"linear_{name}_wgmma.cu", f"linear_wgmma_{name}_bf16_n{plan.rows}", plan, args)


def fp4_wgmma(operand: Expanded, weight: Fp4Units, output: Output) -> Launch:
    """operand: fragments."""
    M, K, name = len(operand.g), padded(weight.K), fp4_name(weight)
    plan = _wgmma_plan(M, weight.N, 128, 4 * 128 * 128)  # four buffers of weights
    args = [operand.first, operand.second, operand.metadata, weight.units, operand.g, weight.g]
    args += _tile_arguments(output, M, weight.N, K)
    return _wgmma_launch(f"linear_{name}_wgmma.cu", f"linear_wgmma_{name}_{operand.kind}", plan, args)


def _wgmma_launch(source: str, kernel: str, plan: WgmmaPlan, args: list[Any]) -> Launch:
    return Launch(source, kernel, plan.grid, (256, 1, 1), plan.shared, args)


def expand_fp8(codes: Any, out: Any) -> Launch:
    """codes uint8 [M, padded K] as bfloat16 of the same shape, for `w8a16_tile` and `w8a16_wgmma`."""
    M, K = codes.shape
    grid = (-(-M * K // 8 // EXPAND_THREADS), 1, 1)
    return Launch("linear_fp8_tile.cu", "expand_fp8", grid, (EXPAND_THREADS, 1, 1), 0, [codes, out, np.int64(M * K)])


def w8a16_tile(x: Any, weight: Fp8Units, output: Output, plan: TilePlan, token_scale: Any = None) -> Launch:
    """x [M, K] bfloat16 or float16; with a scale [M] per token where x is what `expand_fp8` made."""
    args = [x, row_stride(x), *_fp8_arguments(weight), token_scale, *_tile_arguments(output, *_shape(x, weight))]
    return _tile_launch("linear_fp8_tile.cu", f"linear_tile_fp8_{type_name(x.dtype)}", plan, args)


def w8a16_wgmma(x: Any, weight: Fp8Units, output: Output, token_scale: Any = None) -> Launch:
    """x [M, K] bfloat16; token_scale as for `w8a16_tile`."""
    several_scales = weight.scale.shape[0] > 1
    plan = plan_wgmma(len(x), weight.N, copied_weight=False, sliced=several_scales)
    args = [x, row_stride(x), *_fp8_arguments(weight), token_scale, *_tile_arguments(output, *_shape(x, weight))]
    return _wgmma_launch("linear_fp8_wgmma.cu", f"linear_wgmma_fp8_n{plan.rows}", plan, args)


def _shape(x: Any, weight: Fp8Units) -> tuple[int, int, int]:
    """M, N, K; rows of x may be padded as FP8 operands are."""
    return len(x), weight.N, x.shape[1]


def _tile_arguments(output: Output, M: int, N: int, K: int) -> list[Any]:
    out_type = np.int32(OUTPUT_TYPES[output.out.dtype])
    shape = [np.int32(M), np.int32(N), np.int32(K), np.int32(slice_k(K))]
    return [output.bias, output.residual, output.out, out_type, *shape]


def _tile_launch(source: str, kernel: str, plan: TilePlan, args: list[Any]) -> Launch:
    return Launch(source, f"{kernel}_m{plan.warps_m}", plan.grid, (128 * plan.warps_m, 1, 1), plan.shared, args)


def _fp8_arguments(weight: Fp8Units) -> list[Any]:
    return [weight.units, weight.scale, np.int32(weight.scale.shape[0])]


def _decode_arguments(plan: DecodePlan, output: Output, workspace: Workspace, K: int) -> list[Any]:
    M, N = output.out.shape
    shape = [np.int32(M), np.int32(N), np.int32(K)]
    cut = [np.int32(plan.cut.slice_k), np.int32(plan.cut.slices_per_block), np.int32(plan.chunk_k)]
    work = [workspace.partials, workspace.arrivals] if plan.cut.partials else [None, None]
    out_type = np.int32(OUTPUT_TYPES[output.out.dtype])
    return [output.bias, output.residual, output.out, out_type, *shape, *cut, *work]


def _decode_launch(source: str, kernel: str, plan: DecodePlan, args: list[Any]) -> Launch:
    return Launch(source, kernel, plan.grid, (32 * plan.warps, 1, 1), plan.shared, args)
