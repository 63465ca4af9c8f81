"""Launches of the attention kernels: which rows go to which kernel, grids, shared memory, scratch.

A step is planned once, from the batch (`plan_attention`), and launched in every layer (`launches`). A row is a (token,
query head) pair of one KV head's group, as in cuda/attention_tile.cuh. Where decode rows are few they are split along
their context over many blocks (attention_decode); all others go through attention_prefill, 128 rows to a block, which
gives decode rows the bits that attention_decode would, and takes a faster order of sums for prefill rows. So how many
there are, which batch-mates decide, never changes a result. fp32 models have one kernel for all their rows,
attention_f32, with one order and never fast.

Nothing here allocates or launches: arrays, NumPy's or a device's, are the caller's, and `Launch` says what to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch
from engine.errors import InvalidArgument
from engine.ops.gpu.launch import Launch

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]

DECODE, PREFILL, FP32 = "attention_decode.cu", "attention_prefill.cu", "attention_f32.cu"
TILE_TOKENS = 64
DECODE_ROWS = 16  # of an item: one MMA tile
FUSED_SPLITS = 24  # up to so many splits the decode kernel joins them itself
NO_WINDOW = 2**31 - 1
_PADDED = (64, 96, 128, 256)  # head_dims the kernels exist for; others are padded in registers and shared memory
_LEVEL_TILES = np.array([16, 64, 256])  # from here on a split has twice as many tiles as before
_LEVEL_SPLITS = np.array([0, 8, 24, 56])
# A chunk of up to so many rows after a long context: attention_prefill would walk it in one block per KV head.
_FEW_ROWS, _LONG_CONTEXT = 128, 1024
_ITEM = 8  # int32 per item: sequence, first_token, position, first_row, rows, first_partial, 0, 0
SEQUENCE, POSITION, FIRST_PARTIAL = 0, 2, 5  # columns of these
MOST_PARTIALS = 1 << 24  # float32 elements of scratch that a launch may take, unless one item takes more: 64 MiB


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What a model's attention layers have in common. Raises InvalidArgument for what no kernel takes."""

    H: int
    KVH: int
    D: int
    dtype: Literal["bf16", "f16", "f32"] = "bf16"  # of q, out, and K and V unless these are E4M3
    kv_e4m3: bool = False

    def __post_init__(self) -> None:
        if self.KVH < 1 or self.H % self.KVH:
            raise InvalidArgument(f"{self.H} query heads are not a multiple of {self.KVH} KV heads")
        if not 8 <= self.D <= _PADDED[-1] or self.D % 8:
            raise InvalidArgument(f"head_dim must be a multiple of 8 up to {_PADDED[-1]}, not {self.D}")
        if self.dtype not in ("bf16", "f16", "f32") or (self.kv_e4m3 and self.dtype != "bf16"):
            cache = "an E4M3 cache" if self.kv_e4m3 else "its own cache"
            raise InvalidArgument(
                f"attention on the GPU takes bf16, f16, f32, or bf16 with an E4M3 cache, not {self.dtype} with {cache}"
            )

    @property
    def G(self) -> int:
        """Query heads that share a KV head."""
        return self.H // self.KVH

    @property
    def padded(self) -> int:
        """The head_dim of the kernel that serves D."""
        return next(D for D in _PADDED if self.D <= D)

    @property
    def prefill_rows(self) -> int:
        """Rows of a prefill block."""
        return 128 if self.padded <= 128 else 64

    def partial_size(self, rows: int) -> int:
        """float32 elements of the result that one split of an item of so many rows leaves, all heads together."""
        return self.KVH * max(1, rows) * (self.D + 4)

    def kernel(self, operation: str) -> str:
        return f"attention_{operation}_{self.dtype}{'_e4m3' if self.kv_e4m3 else ''}_{self.padded}"

    def shared_bytes(self, operation: Literal["decode", "prefill"]) -> int:
        """Dynamic shared memory, as KvTiles::kSharedBytes has it."""
        two_stages = self.padded <= 128 and not (self.kv_e4m3 and operation == "prefill")
        stages = 2 if two_stages else 1
        tile = TILE_TOKENS * (self.padded + 8) * 2
        if self.kv_e4m3:
            one_wide = operation == "decode" and self.padded > 128  # K and V take turns
            return 2 * stages * TILE_TOKENS * self.padded + (1 if one_wide else 2) * tile
        return 2 * stages * tile


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """A step's rows shared out. The items go to the device; the rest is for launching."""

    decode_items: I32  # [n, 8], see AttentionItem in cuda/attention_tile.cuh
    prefill_items: I32  # [n, 8], those of decode rows first
    num_like_decode: int  # how many these are
    partial_rows: int  # of a decode item, at most
    num_partials: int
    most_splits: int  # of a decode item; 0 where there is none
    rounds: tuple[slice, ...] = (slice(None),)  # decode items launched one after the other, which share the scratch

    def partials_size(self, shape: AttentionShape) -> int:
        """float32 elements of scratch."""
        return self.num_partials * shape.partial_size(self.partial_rows)

    def arrivals_size(self, shape: AttentionShape) -> int:
        """uint32 elements that are zero before the first launch; every launch leaves them zero."""
        return len(self.decode_items) * shape.KVH


def split_of_tile(tile: Any) -> Any:
    """The run of tiles whose results are summed up apart, of whole numbers or arrays: cuda/attention_tile.cuh."""
    level = np.searchsorted(_LEVEL_TILES, tile, side="right")
    return _LEVEL_SPLITS[level] + (tile >> level)


def num_splits(first_token: Any, last_token: Any) -> Any:
    """Splits that the tokens of a sequence from first to last touch."""
    return split_of_tile(last_token // TILE_TOKENS) - split_of_tile(first_token // TILE_TOKENS) + 1


def most_scratch(shape: AttentionShape, *, tokens: int, sequences: int, context: int) -> tuple[int, int]:
    """The largest `partials_size` and `arrivals_size` of a step of so many tokens and sequences, each of up to
    `context` tokens."""
    rows = _whole_tokens(DECODE_ROWS, shape.G)
    items = tokens * shape.G // rows + min(tokens, sequences)
    splits = int(num_splits(0, context - 1))
    item = splits * shape.partial_size(rows) if splits > 1 else 0
    return min(items * item, max(MOST_PARTIALS, item)), items * shape.KVH


def in_rounds(partials: I64, unit: int) -> tuple[I64, int, tuple[slice, ...]]:
    """Where each item's partial results [n] begin, how many there are at once, and which items run at once.

    unit: float32 elements of a partial result.
    """
    ends = np.cumsum(partials)
    first, rounds, largest = ends - partials, [], 0
    begin = 0
    while begin < len(partials):
        before = first[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + MOST_PARTIALS // unit, side="right")))
        largest = max(largest, int(ends[end - 1] - before))
        first[begin:end] -= before
        rounds.append(slice(begin, end))
        begin = end
    return first, largest, tuple(rounds)


def plan_attention(batch: Batch, shape: AttentionShape, window: int | None = None) -> AttentionPlan:
    """Shares the rows of a batch out among blocks; once per step (and window)."""
    G = shape.G
    new_tokens = np.diff(batch.query_start).astype(np.int64)
    rows, positions = new_tokens * G, batch.context_lens - new_tokens
    num_decode_rows = batch.query_start[-1] if batch.num_decode_rows is None else batch.num_decode_rows
    decoding = batch.query_start[:-1] < num_decode_rows
    few = decoding & (shape.dtype != "f32") & _few_rows(rows, G, batch.context_lens)
    step = np.where(few, _whole_tokens(DECODE_ROWS, G), _whole_tokens(shape.prefill_rows, G))

    items_of = -(-rows // step)
    s = np.repeat(np.arange(len(rows)), items_of)  # sequence of every item
    first_row = (np.arange(len(s)) - np.repeat(np.cumsum(items_of) - items_of, items_of)) * step[s]
    own_rows = np.minimum(step[s], rows[s] - first_row)
    lowest = np.maximum(0, positions[s] + first_row // G - (window or NO_WINDOW) + 1)
    highest = positions[s] + (first_row + own_rows - 1) // G

    decode = few[s]
    splits = np.where(decode, num_splits(lowest, highest), 0)
    partial_rows = int(own_rows[decode].max(initial=0))
    partials = np.where(splits > 1, splits, 0)[decode]
    first_partial, num_partials, rounds = in_rounds(partials, shape.partial_size(partial_rows))
    columns = (s, batch.query_start[s], positions[s], first_row, own_rows)
    items = np.zeros((len(s), _ITEM), np.int32)
    items[:, : len(columns)] = np.stack(columns, axis=1)
    items[decode, FIRST_PARTIAL] = first_partial
    order = np.lexsort((-highest[~decode], ~decoding[s][~decode]))  # decode rows, then longest first
    return AttentionPlan(
        decode_items=items[decode],
        prefill_items=items[~decode][order],
        num_like_decode=int(np.count_nonzero(decoding[s] & ~decode)),
        partial_rows=partial_rows,
        num_partials=num_partials,
        most_splits=int(splits.max(initial=0)),
        rounds=rounds,
    )


def _few_rows(rows: I64, G: int, context: I32) -> Any:
    return (rows <= max(G, DECODE_ROWS)) | ((rows <= _FEW_ROWS) & (context >= _LONG_CONTEXT))


def _whole_tokens(rows: int, G: int) -> int:
    """Rows of an item, at most `rows`: whole tokens where one fits."""
    return rows // G * G or rows


@dataclass(frozen=True, slots=True, eq=False)
class AttentionArrays:
    """Where a layer's attention reads and writes; rows of q and out may be part of wider ones."""

    q: Any  # [T, H·D]
    k_cache: Any  # [blocks, KVH, 16, D] of this layer: q's dtype, or uint8 E4M3 codes
    v_cache: Any
    block_tables: Any  # [S, B] int32
    out: Any  # [T, H·D]
    decode_items: Any  # the plan's, where the kernels can read them
    prefill_items: Any
    partials: Any  # float32, plan.partials_size
    arrivals: Any  # uint32, plan.arrivals_size
    k_scales: Any = None  # [KVH] float32, with an E4M3 cache: a value is its head's scale times its code
    v_scales: Any = None


def launches(
    shape: AttentionShape,
    plan: AttentionPlan,
    arrays: AttentionArrays,
    *,
    scale: float,
    window: int | None = None,
    split_blocks: int | None = None,
) -> list[Launch]:
    """The launches that write out, in order.

    Rows of q must begin at multiples of 4 bytes (fp32: 16), those of out at 8, the caches at 16.
    scale > 0: of the scores. window: tokens a row sees at most, its own included; the one the plan was made for.
    split_blocks: blocks that share the splits of an item and head; None: one for each split. It changes no bit.
    """
    if not scale > 0:
        raise InvalidArgument(f"the scale of attention scores must be positive, not {scale}")
    if window is not None and window < 1:
        raise InvalidArgument(f"window must be at least 1, not {window}")
    if shape.kv_e4m3 == (arrays.k_scales is None or arrays.v_scales is None):
        raise InvalidArgument("k_scales and v_scales belong to an E4M3 cache, and only to one")
    found: list[Launch] = []
    head = [arrays.q, _stride(arrays.q), arrays.k_cache, arrays.v_cache, arrays.block_tables]
    head.append(np.int32(arrays.block_tables.shape[1]))
    sizes = [np.int32(shape.H), np.int32(shape.KVH), np.int32(shape.D), np.float32(scale)]
    sizes += [np.int32(window or NO_WINDOW), arrays.k_scales, arrays.v_scales]
    tail = [arrays.out, _stride(arrays.out)]
    if shape.dtype == "f32":
        n = len(plan.prefill_items)
        args = [*head, arrays.prefill_items, *sizes[:5], *tail]  # no scales
        return [Launch(FP32, "attention_f32", (shape.KVH, n, 1), (256, 1, 1), 0, args)] if n else []
    parts = slice(0, plan.num_like_decode), slice(plan.num_like_decode, len(plan.prefill_items))
    for part, like_decode in zip(parts, (1, 0), strict=True):
        if n := part.stop - part.start:
            args = [*head, arrays.prefill_items[part], *sizes, np.int32(like_decode), *tail]
            block, grid = (256 if shape.padded <= 128 else 128, 1, 1), (shape.KVH, n, 1)
            found.append(Launch(PREFILL, shape.kernel("prefill"), grid, block, shape.shared_bytes("prefill"), args))
    for part in plan.rounds if len(plan.decode_items) else ():
        n = len(plan.decode_items[part])
        scratch = [arrays.partials, np.int32(plan.partial_rows), arrays.arrivals]
        args = [*head, arrays.decode_items[part], *sizes, *scratch, *tail]
        grid = (split_blocks or plan.most_splits, shape.KVH, n)
        found.append(Launch(DECODE, shape.kernel("decode"), grid, (128, 1, 1), shape.shared_bytes("decode"), args))
        if plan.most_splits > FUSED_SPLITS:
            grid = (plan.partial_rows, shape.KVH, n)
            found.append(Launch(DECODE, f"attention_join_{shape.dtype}", grid, (64, 1, 1), 0, args))
    return found


def _stride(rows: Any) -> np.int64:
    """Elements from row to row."""
    return np.int64(rows.strides[0] // rows.itemsize)
