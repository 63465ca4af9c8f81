"""Paged attention's CUDA kernels on the emulator: values against float64, and bits that must not depend on who asks.

Scenes hold sequences whose K and V lie in scattered blocks; every slot that no token owns holds NaN.
"""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
from bit_patterns import BF16, F16, F32, assert_same_bits
from paging import Paging, scattered, total_blocks

from engine.errors import DeviceError, InvalidArgument
from engine.ops.gpu import launch_attention
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule
from engine.ops.gpu.launch_attention import (
    DECODE,
    FUSED_SPLITS,
    AttentionArrays,
    AttentionShape,
    launches,
    num_splits,
    plan_attention,
)
from engine.ops.reference import ReferenceKVCache, ReferenceOps

try:
    EmulatedModule.compile(DECODE)
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
NAMES = {BF16: "bf16", F16: "f16", F32: "f32"}
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}  # largest relative error of one rounding


@lru_cache
def module(source, head_dim=None):
    """All kernels; or those for one (padded) head_dim, in a checking build."""
    if head_dim is None:
        return EmulatedModule.compile(source)
    return EmulatedModule.compile(source, checked=True, defines=(f"HEAD_DIM={head_dim}",))


class Scene:
    """Sequences of these lengths, their queries, and a cache of dtype or (kv=E4M3) of codes with a scale per head."""

    def __init__(self, H, KVH, D, lengths, dtype=BF16, kv=None, seed=0):
        rng = np.random.default_rng(seed)
        kv = kv or dtype
        self.shape = AttentionShape(H, KVH, D, NAMES[dtype], kv == E4M3)
        self.dtype, self.scale = dtype, D**-0.5
        self.paging: Paging = scattered(rng, lengths, 16)
        self.q = [rng.normal(0, 1.5, (n, H * D)).astype(dtype) for n in lengths]
        size = (total_blocks(self.paging), KVH, 16, D)
        self.k, self.v = (np.full(size, np.nan, kv) for _ in range(2))
        self.scales = [rng.uniform(0.5, 2, KVH).astype(F32) for _ in range(2)] if kv == E4M3 else [None, None]
        for s, n in enumerate(lengths):
            for cache in (self.k, self.v):
                self.put(cache, s, 0, rng.normal(0, 1, (n, KVH, D)))

    def put(self, cache, s, start, rows):
        """Writes tokens start, start + 1, … of sequence s; rows [tokens, KVH, D]."""
        at = np.arange(start, start + len(rows))
        cache[self.paging.tables[s][at // 16], :, at % 16] = rows.astype(cache.dtype)

    def queries(self, spans):
        return np.concatenate([self.q[s][start:stop] for s, start, stop in spans])

    def attend(self, *spans, window=None, decoding=None, split_blocks=None, checked=False, **launch):
        """Outputs of the rows of every (sequence, start, stop), one after the other; decoding: as `Paging.batch`."""
        batch = self.paging.batch(list(spans), decoding)
        plan = plan_attention(batch, self.shape, window)
        wide = np.pad(self.queries(spans), ((0, 0), (0, 8)))  # as in a row of q | k | v
        frame = np.full((len(wide), wide.shape[1] + 8), np.nan, self.dtype)
        k, v = (cache.view(np.uint8) if self.shape.kv_e4m3 else cache for cache in (self.k, self.v))
        arrivals = np.zeros(max(1, plan.arrivals_size(self.shape)), np.uint32)
        arrays = AttentionArrays(
            q=wide[:, :-8],
            k_cache=k,
            v_cache=v,
            block_tables=batch.block_tables,
            out=frame[:, 8:-8],
            decode_items=plan.decode_items,
            prefill_items=plan.prefill_items,
            partials=np.full(max(1, plan.partials_size(self.shape)), np.nan, F32),
            arrivals=arrivals,
            k_scales=self.scales[0],
            v_scales=self.scales[1],
        )
        options = {"window": window, "split_blocks": split_blocks}
        for source, kernel, grid, block, shared, args in launches(
            self.shape, plan, arrays, scale=self.scale, **options
        ):
            module(source, self.shape.padded if checked else None).launch(kernel, grid, block, shared, args, **launch)
        assert not arrivals.any()
        assert np.isnan(frame[:, :8].astype(F32)).all() and np.isnan(frame[:, -8:].astype(F32)).all()
        return frame[:, 8:-8].copy()

    def expected(self, spans, window=None):
        """(outputs, and the same with |v|) in float64, rounded to float32."""
        batch = self.paging.batch(list(spans))
        k, v = (
            (cache.astype(F32) * (1 if scale is None else scale[:, None, None])).transpose(0, 2, 1, 3)[None]
            for cache, scale in zip((self.k, self.v), self.scales, strict=True)
        )
        q = self.queries(spans)
        return [
            ReferenceOps()
            .attention(
                q, batch, ReferenceKVCache(k, values), 0, scale=self.scale, window=window, out=np.zeros(q.shape, F32)
            )
            .astype(np.float64)
            for values in (v, np.abs(v))
        ]


def assert_close(scene, *spans, window=None, **options):
    """Each weight and the result are rounded to dtype; fp32 sums and exponentials add some 1e-6 of |v|."""
    values, sizes = scene.expected(spans, window)
    out = scene.attend(*spans, window=window, **options).astype(np.float64)
    step = ROUNDING[scene.dtype]
    assert (np.abs(out - values) <= step * (np.abs(values) + 1.01 * sizes) + 1e-5 * sizes).all()


# ---- values ----------------------------------------------------------------------------------------------------------

HEADS = [(2, 2), (4, 2), (4, 1), (7, 1), (8, 1)]
LENGTHS = (1, 15, 17, 64, 65, 130, 300, 700)
each_type = pytest.mark.parametrize(
    "dtype, kv", [(BF16, BF16), (F16, F16), (F32, F32), (BF16, E4M3)], ids=["bf16", "f16", "f32", "bf16-e4m3"]
)


@each_type
@pytest.mark.parametrize("D", [8, 24, 40, 64, 80, 96, 128, 256])
def test_decode_equals_float64(dtype, kv, D):
    H, KVH = HEADS[D // 8 % len(HEADS)]
    scene = Scene(H, KVH, D, LENGTHS, dtype, kv, seed=D)
    newest = [(s, n - 1, n) for s, n in enumerate(LENGTHS)]
    assert_close(scene, *newest)
    assert_close(scene, *newest, window=100)


@each_type
@pytest.mark.parametrize("D", [8, 24, 40, 64, 80, 96, 128, 256])
def test_prefill_equals_float64(dtype, kv, D):
    H, KVH = HEADS[D // 8 % len(HEADS)]
    scene = Scene(H, KVH, D, (150, 80, 33, 20), dtype, kv, seed=D)
    spans = (0, 110, 150), (1, 0, 80 if D <= 96 else 30), (2, 32, 33), (3, 0, 20)
    assert_close(scene, *spans, decoding=0)
    assert_close(scene, *spans, window=37, decoding=1)


@pytest.mark.parametrize("H, KVH", [*HEADS, (20, 1), (12, 4)])
@pytest.mark.parametrize("window", [None, 1, 64, 200])
def test_groups_and_windows(H, KVH, window):
    scene = Scene(H, KVH, 64, (250, 90, 70))
    for decoding in (1, None):
        assert_close(scene, (0, 249, 250), (1, 60, 90), (2, 68, 70), window=window, decoding=decoding)


@pytest.mark.parametrize("context", [1100, 5000, 17000])
@pytest.mark.parametrize("window", [None, 3000])
@pytest.mark.parametrize("kv", [BF16, E4M3], ids=str)
def test_decode_over_a_long_context(context, window, kv):
    """Splits of every length; with more than FUSED_SPLITS a launch of its own joins them."""
    assert (num_splits(0, 4999) > FUSED_SPLITS) and (num_splits(0, 1099) <= FUSED_SPLITS)
    assert_close(Scene(2, 1, 16, (context, 40), kv=kv), (0, context - 3, context), (1, 39, 40), window=window)


@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_every_e4m3_code_is_read_exactly(D):
    """With a single token the weight is 1, so the output is v."""
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0
    lengths = (1,) * -(-256 // D)
    scene = Scene(1, 1, D, lengths, kv=E4M3)
    scene.scales = [np.full(1, 0.75, F32), np.full(1, 0.5, F32)]
    values = np.resize(codes, (len(lengths), 1, 1, D)).view(E4M3)
    for s, row in enumerate(values):
        scene.put(scene.v, s, 0, row)
    out = scene.attend(*[(s, 0, 1) for s in range(len(lengths))])
    expected = values.astype(F32).reshape(-1, D) * 0.5 + np.float32(0)  # no negative zeros
    assert_same_bits(out, expected.astype(BF16))


def test_scores_that_overflow():
    scene = Scene(1, 1, 8, (70,))
    scene.q[0][:] = 1e30
    k = np.zeros((70, 1, 8))
    k[:65] = -1e30  # the first tile and one more: scores of -inf
    scene.put(scene.k, 0, 0, k)
    out = scene.attend((0, 69, 70))
    values = [scene.v[scene.paging.tables[0][t // 16], 0, t % 16].astype(F32) for t in range(65, 70)]
    np.testing.assert_allclose(out[0].astype(F32), np.mean(values, axis=0), rtol=2.0**-7, atol=2.0**-8)


# ---- bits ------------------------------------------------------------------------------------------------------------


@each_type
@pytest.mark.parametrize("H, KVH, D, window", [(7, 1, 64, None), (4, 2, 40, 70), (2, 2, 128, None), (4, 1, 256, 40)])
@pytest.mark.parametrize("decoding", [None, 0], ids=["decode", "prefill"])
def test_bits_of_either_kind_of_rows(dtype, kv, H, KVH, D, window, decoding):
    """Alone, in chunks of any cut, with prefix-cached context, with batch-mates: the same as in one chunk."""
    n = 150
    scene = Scene(H, KVH, D, (n, 77, 20), dtype, kv)
    options = {"window": window, "decoding": decoding}
    whole = scene.attend((0, 0, n), **options)
    for cut in (1, 16, 63, 64, 100, 149):
        pieces = [scene.attend((0, 0, cut), **options), scene.attend((0, cut, n), **options)]
        assert_same_bits(np.concatenate(pieces), whole)
    for t in (0, 1, 15, 16, 63, 64, 127, 128, 149):
        assert_same_bits(scene.attend((0, t, t + 1), **options), whole[t : t + 1])
    batched = scene.attend((2, 19, 20), (0, 3, n), (1, 40, 77), **options)
    assert_same_bits(batched[1 : 1 + n - 3], whole[3:])


@pytest.mark.parametrize("window", [None, 1500])
def test_bits_of_decode_rows_where_splits_are_longer(window):
    """More than 128 rows go through the prefill kernel, a few through the other; splits of 1, 2 and 4 tiles.

    6400 elements of f16: another order of joining would show in a few of them.
    """
    n = 4500
    scene = Scene(1, 1, 64, (n,), F16)
    whole = scene.attend((0, n - 140, n), window=window)
    assert_same_bits(scene.attend((0, n - 100, n), window=window), whole[-100:])
    assert_same_bits(scene.attend((0, n - 1, n), window=window), whole[-1:])
    prefill = scene.attend((0, n - 140, n), window=window, decoding=0)
    assert (prefill != whole).any(), "the orders were meant to differ"


def test_bits_never_depend_on_batch_mates():
    """Of decode rows few and many, and of prefill rows; nor on how many blocks share the splits."""
    scene = Scene(4, 2, 64, (300, 700, 90, 33, 150))
    single, many, prefill = (1, 699, 700), (0, 200, 300), (4, 20, 150)
    alone = [scene.attend(single), scene.attend(many), scene.attend(prefill, decoding=0)]
    for split_blocks in (None, 1, 3):
        spans = (2, 0, 90), single, many, (3, 32, 33), prefill
        mixed = scene.attend(*spans, decoding=3, split_blocks=split_blocks)
        for rows, own in zip((slice(90, 91), slice(91, 191), slice(192, 322)), alone, strict=True):
            assert_same_bits(mixed[rows], own)


def test_a_query_sees_nothing_beyond_the_context():
    """Later tokens' blocks, and blocks before the window, are never read: their table entries may be anything."""
    scene = Scene(2, 1, 64, (200,))
    spans, window = (0, 150, 160), 30
    before = scene.attend(spans, window=window), scene.attend((0, 159, 160), window=window)
    table = scene.paging.tables[0]
    table[10:] = table[:7] = 2**30
    assert_same_bits(scene.attend(spans, window=window), before[0])
    assert_same_bits(scene.attend((0, 159, 160), window=window), before[1])


# ---- races, gaps, bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, kv, H, KVH, D, window",
    [
        (BF16, BF16, 4, 2, 64, None),
        (F16, F16, 7, 1, 56, 50),
        (BF16, E4M3, 2, 2, 40, None),
        (BF16, E4M3, 2, 1, 200, None),
        (BF16, BF16, 1, 1, 256, None),
        (F32, F32, 4, 2, 24, 50),
    ],
)
def test_checked(dtype, kv, H, KVH, D, window):
    """Schedules and poisons change nothing, and the checker has nothing to say."""
    scene = Scene(H, KVH, D, (150, 330), dtype, kv)
    spans = (0, 120, 150), (1, 329, 330)
    plain = scene.attend(*spans, window=window)
    for schedule, poison in zip(SCHEDULES, (0xFF, 0, 0x7F, 0x3C), strict=True):
        options = {"schedule": schedule, "poison": poison, "checked": schedule == SCHEDULES[0]}
        out = scene.attend(*spans, window=window, **options)
        assert_same_bits(out, plain)


def test_checked_where_k_and_v_take_turns():
    """Two tiles in a split: the second's K is widened where the first's V was."""
    scene = Scene(1, 1, 200, (1160,), kv=E4M3)
    for schedule in SCHEDULES:
        assert_close(scene, (0, 1159, 1160), checked=True, schedule=schedule)


def test_checked_joins():
    scene = Scene(2, 1, 16, (3000,))
    assert_same_bits(scene.attend((0, 2999, 3000), checked=True), scene.attend((0, 2999, 3000)))


# ---- planning --------------------------------------------------------------------------------------------------------


def test_the_plan_covers_every_row_once():
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = rng.integers(1, 3000, 6).tolist()
        spans = [(s, int(rng.integers(max(0, n - rng.choice([1, 5, 60, 400])), n)), n) for s, n in enumerate(lengths)]
        KVH, G = int(rng.integers(1, 4)), int(rng.choice([1, 2, 7, 8, 20]))
        shape = AttentionShape(KVH * G, KVH, 64)
        batch = scattered(rng, lengths, 16).batch(spans, num_decoding=int(rng.integers(0, 7)))
        plan = plan_attention(batch, shape)
        first_tokens = plan.prefill_items[:, 1] < batch.num_decode_rows
        assert (np.flatnonzero(first_tokens) == np.arange(plan.num_like_decode)).all()
        assert (plan.decode_items[:, 1] < batch.num_decode_rows).all(), "prefill rows have one kernel"
        rows = [
            (first * G + row + i)
            for items in (plan.decode_items, plan.prefill_items)
            for _, first, _, row, count, *_ in items.tolist()
            for i in range(count)
        ]
        assert sorted(rows) == list(range(batch.query_start[-1] * G))
        partials = [
            p
            for _, _, position, row, count, first, *_ in plan.decode_items.tolist()
            if (splits := num_splits(0, position + (row + count - 1) // G)) > 1
            for p in range(first, first + splits)
        ]
        assert partials == list(range(plan.num_partials))


def test_padded_batches():
    """A captured graph has more items than a step: those without rows do nothing."""
    scene = Scene(2, 1, 64, (100, 30))
    batch = scene.paging.batch([(0, 99, 100)])
    plan = plan_attention(batch, scene.shape)
    assert plan.decode_items[0, 4] == 2
    q, out = scene.q[0][99:100], np.full((1, 128), np.nan, BF16)
    items = np.pad(plan.decode_items, ((0, 3), (0, 0)))
    partials, arrivals = np.zeros(plan.partials_size(scene.shape), F32), np.zeros(8, np.uint32)
    padded = launch_attention.AttentionPlan(items, plan.prefill_items, 0, 2, plan.num_partials, plan.most_splits)
    arrays = AttentionArrays(
        q, scene.k, scene.v, batch.block_tables, out, items, plan.prefill_items, partials, arrivals
    )
    for source, *launch in launches(scene.shape, padded, arrays, scale=scene.scale):
        module(source).launch(*launch)
    assert_same_bits(out, scene.attend((0, 99, 100)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((6, 4, 64), "6 query heads"),
        ((4, 4, 20), "multiple of 8"),
        ((4, 4, 264), "up to 256"),
        ((4, 4, 64, "f64"), "not f64"),
        ((4, 4, 64, "f16", True), "f16 with an E4M3 cache"),
    ],
)
def test_shapes_no_kernel_takes(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        AttentionShape(*arguments)
