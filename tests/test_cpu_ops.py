"""The C++ row operations, rotary embedding and attention against the NumPy definitions, on every instruction set.

The first three are compared bit by bit. Attention has a tolerance against the reference, and bitwise equality with
itself however its rows are batched, chunked and shared among threads.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from bit_patterns import BF16, DTYPES, F16, F32, all_patterns, assert_same_bits, rows_of_many_sizes
from paging import Paging, scattered, total_blocks

from engine.errors import InvalidArgument
from engine.ops.reference import ReferenceOps

try:
    from engine.ops.cpu import CpuOps, available_isas
except ImportError as error:
    pytest.skip(f"the C++ extension is not built: {error}", allow_module_level=True)

REFERENCE = ReferenceOps()
ISAS = available_isas()
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_isa = pytest.mark.parametrize("isa", ISAS)


@lru_cache
def backend(isa: str, threads: int = 2) -> CpuOps:
    return CpuOps(threads, isa)


# ---- row operations --------------------------------------------------------------------------------------------------


@each_isa
@each_dtype
@pytest.mark.parametrize("C", [8, 24, 200, 1000, 1024, 2600])
def test_rms_norm_bits(isa, dtype, C):
    rng = np.random.default_rng(C)
    x = np.concatenate([rows_of_many_sizes(rng, C, dtype), rng.normal(0, 2, (40, C)).astype(dtype)])
    weight = rng.normal(1, 0.3, C).astype(np.float32)
    out = backend(isa, 3).rms_norm(x, weight, 1e-6, out=np.zeros_like(x))
    assert_same_bits(out, REFERENCE.rms_norm(x, weight, 1e-6, out=np.zeros_like(x)))


@each_isa
@each_dtype
def test_silu_mul_bits(isa, dtype):
    rng = np.random.default_rng(1)
    F = 1 << 16
    gate = np.arange(F, dtype=np.uint16).view(dtype) if dtype.itemsize == 2 else all_patterns(rng, F, dtype)
    rows = [np.concatenate([gate, rng.normal(0, 1, F).astype(dtype)]) for _ in range(2)]
    rows[1][:F] = rng.normal(0, 30, F).astype(dtype)
    gate_up = np.stack(rows)
    out = np.zeros((2, F), dtype)
    assert_same_bits(backend(isa, 3).silu_mul(gate_up, out=out), REFERENCE.silu_mul(gate_up, out=out.copy()))
    narrow = np.ascontiguousarray(gate_up[:, : 2 * 27])  # 27 columns: a tail
    out = np.zeros((2, 27), dtype)
    assert_same_bits(backend(isa).silu_mul(narrow, out=out), REFERENCE.silu_mul(narrow, out=out.copy()))


@each_isa
@each_dtype
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_embed_bits(isa, dtype, table_dtype):
    rng = np.random.default_rng(2)
    table = all_patterns(rng, (300, 75), table_dtype)
    ids = rng.integers(0, 300, 200).astype(np.int32)
    out = backend(isa, 3).embed(table, ids, out=np.zeros((200, 75), dtype))
    with np.errstate(invalid="ignore"):  # NumPy warns where it meets a signalling NaN
        assert_same_bits(out, REFERENCE.embed(table, ids, out=np.zeros((200, 75), dtype)))


@each_isa
def test_row_operations_accept_rows_that_lie_apart(isa):
    rng = np.random.default_rng(3)
    wide = rng.normal(0, 1, (6, 200)).astype(BF16)
    x, weight = wide[:, 8:104], np.ones(96, np.float32)
    frame = np.zeros((6, 128), BF16)
    backend(isa).rms_norm(x, weight, 1e-6, out=frame[:, :96])
    assert_same_bits(frame[:, :96].copy(), REFERENCE.rms_norm(x, weight, 1e-6, out=np.zeros((6, 96), BF16)))
    assert not frame[:, 96:].any()


# ---- rotary embedding ------------------------------------------------------------------------------------------------


def tokens_of(cache, dtype, D, layer):
    """K and V [KVH, blocks, 16, D] out of the cache's tiles, as engine/ops/cpu/kv_cache.h draws them."""
    tiles = cache.tiles(layer)
    KVH, blocks, _ = tiles.shape
    DV = -(-D // 16) * 16
    k, v = np.split(tiles.view(dtype), [16 * D], axis=2)
    if dtype == BF16:
        k = k.reshape(KVH, blocks, D // 2, 16, 2).transpose(0, 1, 3, 2, 4)
    else:
        k = k.reshape(KVH, blocks, D, 16).transpose(0, 1, 3, 2)
    v = v.reshape(KVH, blocks, 16, DV)
    assert not v[..., D:].any()
    return k.reshape(KVH, blocks, 16, D), v[..., :D]


@each_isa
@each_dtype
@pytest.mark.parametrize("D", [8, 24, 64, 72, 128, 256])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_and_cache_bits(isa, dtype, D, with_norm):
    rng = np.random.default_rng(D)
    H, KVH, eps = 6, 2, 1e-6
    paging = scattered(rng, [50, 30], 16)
    batch = paging.batch([(0, 10, 50), (1, 29, 30)])
    T, blocks = batch.positions.size, total_blocks(paging)
    qkv = rng.normal(0, 1, (T, (H + 2 * KVH) * D)).astype(dtype)
    many_sizes = rows_of_many_sizes(rng, qkv.shape[1], dtype)
    qkv[: len(many_sizes)] = many_sizes
    table = rng.normal(0, 1, (60, D)).astype(np.float32)
    table[12] = 0  # products of zeros: their signs must agree too
    norm = {name: rng.normal(1, 0.2, D).astype(np.float32) if with_norm else None for name in ("q_norm", "k_norm")}
    caches, outs = [], []
    for ops in (backend(isa, 3), REFERENCE):
        cache = ops.new_kv_cache(num_layers=3, num_blocks=blocks, num_kv_heads=KVH, head_dim=D, dtype=dtype)
        outs.append(ops.rope_and_cache(qkv, table, batch, cache, 1, **norm, eps=eps, out=np.zeros((T, H * D), dtype)))
        caches.append(cache)
    assert_same_bits(*outs)
    k, v = tokens_of(caches[0], dtype, D, 1)
    assert_same_bits(np.ascontiguousarray(k), np.ascontiguousarray(caches[1].k[1].transpose(2, 0, 1, 3)))
    assert_same_bits(np.ascontiguousarray(v), np.ascontiguousarray(caches[1].v[1].transpose(2, 0, 1, 3)))
    assert not caches[0].tiles(0).any() and not caches[0].tiles(2).any()


# ---- attention -------------------------------------------------------------------------------------------------------


class Scene:
    """Sequences whose K and V are in a cache, and their queries: attention over any of their rows can be asked for."""

    def __init__(self, ops, dtype, H, KVH, D, lengths, seed=0):
        rng = np.random.default_rng(seed)
        self.ops, self.dtype, self.width = ops, dtype, H * D
        self.scale = D**-0.5
        self.paging: Paging = scattered(rng, lengths, 16)
        self.cache = ops.new_kv_cache(
            num_layers=2, num_blocks=total_blocks(self.paging), num_kv_heads=KVH, head_dim=D, dtype=dtype
        )
        self.table = np.concatenate([np.ones((1, D // 2)), np.zeros((1, D // 2))], axis=1).astype(np.float32)
        self.table = np.repeat(self.table, max(lengths), axis=0)  # no rotation
        self.qkv = [rng.normal(0, 1, (n, (H + 2 * KVH) * D)).astype(dtype) for n in lengths]
        for s, length in enumerate(lengths):
            self.write(s, 0, length, self.qkv[s])

    def write(self, s, start, stop, rows):
        batch = self.paging.batch([(s, start, stop)])
        out = np.zeros((stop - start, self.width), self.dtype)
        self.ops.rope_and_cache(rows, self.table, batch, self.cache, 1, q_norm=None, k_norm=None, eps=0.0, out=out)

    def attend(self, *spans, window=None):
        """Outputs of the rows of every (sequence, start, stop), one after the other."""
        batch = self.paging.batch(list(spans))
        q = np.concatenate([self.qkv[s][start:stop, : self.width] for s, start, stop in spans])
        out = np.full(q.shape, np.nan, self.dtype)
        return self.ops.attention(q, batch, self.cache, 1, scale=self.scale, window=window, out=out)


@lru_cache
def reference_attention(dtype, H, KVH, D, lengths, spans, window):
    scene = Scene(REFERENCE, dtype, H, KVH, D, lengths)
    return scene.attend(*spans, window=window).astype(np.float64)


def assert_close_to_reference(isa, dtype, H, KVH, D, lengths, spans, window):
    """The same value or its neighbour in dtype, after fp32 sums of up to 256 products of size 1 (3e-5)."""
    expected = reference_attention(dtype, H, KVH, D, lengths, spans, window)
    actual = Scene(backend(isa), dtype, H, KVH, D, lengths).attend(*spans, window=window).astype(np.float64)
    step = {F32: 2.0**-23, F16: 2.0**-10, BF16: 2.0**-7}[dtype]
    assert (np.abs(actual - expected) <= step * np.abs(expected) + 3e-5).all()


@each_isa
@each_dtype
@pytest.mark.parametrize("window", [None, 1, 33, 100])
@pytest.mark.parametrize("H, KVH, D", [(14, 2, 64), (4, 4, 8), (6, 2, 72), (3, 1, 256), (20, 1, 24)])
def test_attention_equals_the_reference(isa, dtype, window, H, KVH, D):
    assert_close_to_reference(isa, dtype, H, KVH, D, (150, 40, 65), ((0, 90, 150), (1, 0, 40), (2, 64, 65)), window)


@each_isa
@each_dtype
@pytest.mark.parametrize("window", [None, 1000])
def test_attention_over_a_long_context(isa, dtype, window):
    assert_close_to_reference(isa, dtype, 2, 1, 16, (5000,), ((0, 4990, 5000),), window)


def split_points(isa, dtype, length):
    """Every one on the fastest path, those around tile and chunk borders and some more on the others."""
    if isa == ISAS[0] and dtype == BF16:
        return range(1, length)
    return sorted({p for p in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, length - 1) if p < length})


@each_isa
@each_dtype
@pytest.mark.parametrize("H, KVH, window", [(14, 2, None), (4, 4, None), (14, 2, 40), (4, 4, 40)])
def test_attention_rows_do_not_depend_on_chunks_batches_or_threads(isa, dtype, H, KVH, window):
    n, D = 150, 64
    scene = Scene(backend(isa, 2), dtype, H, KVH, D, [n, 77, 20])
    whole = scene.attend((0, 0, n), window=window)
    for split in split_points(isa, dtype, n):
        pieces = [scene.attend((0, 0, split), window=window), scene.attend((0, split, n), window=window)]
        assert_same_bits(np.concatenate(pieces), whole)
    singles = [scene.attend((0, t, t + 1), window=window) for t in range(n)]
    assert_same_bits(np.concatenate(singles), whole)
    batched = scene.attend((2, 19, 20), (0, 3, n), (1, 40, 77), window=window)
    assert_same_bits(batched[1 : 1 + n - 3], whole[3:])
    for threads in (1, 3, 16):
        scene.ops = backend(isa, threads)
        assert_same_bits(scene.attend((0, 0, n), window=window), whole)
        assert_same_bits(scene.attend((0, n - 1, n), window=window), whole[n - 1 :])


@each_isa
@each_dtype
def test_attention_never_touches_what_a_row_does_not_see(isa, dtype):
    n, cut, window = 130, 75, 20
    scene = Scene(backend(isa, 2), dtype, 14, 2, 64, [n])
    middle = scene.attend((0, cut - 10, cut), window=window)
    causal = scene.attend((0, 0, cut))
    poison = np.full_like(scene.qkv[0], np.nan)
    scene.write(0, cut, n, poison[cut:])
    assert_same_bits(scene.attend((0, 0, cut)), causal)
    scene.write(0, 0, cut - 10 - window + 1, poison[: cut - 10 - window + 1])
    assert_same_bits(scene.attend((0, cut - 10, cut), window=window), middle)
    assert np.isnan(scene.attend((0, cut, cut + 1)).astype(np.float32)).all()


@each_isa
def test_attention_survives_scores_that_overflow(isa):
    scene = Scene(backend(isa), F32, 1, 1, 8, [70])
    rows = scene.qkv[0].copy()
    rows[:65, 8:16] = -1e30  # K of the first chunk and one more: scores of −inf
    rows[:, :8] = 1e30
    scene.qkv[0][:] = rows
    rows[65:, 8:16] = 0
    scene.write(0, 0, 70, rows)
    out = scene.attend((0, 69, 70))
    np.testing.assert_allclose(out[0], rows[65:, 16:].mean(axis=0), rtol=1e-5)


# ---- argument checks -------------------------------------------------------------------------------------------------


def rope_arguments(dtype=BF16):
    paging = Paging([np.arange(2, dtype=np.int32)], 16)
    return {
        "qkv": np.zeros((3, 4 * 16), dtype),
        "rope_table": np.zeros((20, 16), np.float32),
        "batch": paging.batch([(0, 17, 20)]),
        "q_norm": None,
        "k_norm": None,
        "out": np.zeros((3, 2 * 16), dtype),
        "layer": 0,
    }


def replaced(batch, **fields):
    return type(batch)(**{name: fields.get(name, getattr(batch, name)) for name in batch.__slots__})


def ints(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "change",
    [
        {"qkv": np.zeros((3, 63), BF16)},
        {"qkv": np.zeros((3, 64), F32)},
        {"qkv": np.zeros((3, 128), BF16)[:, ::2]},
        {"out": np.zeros((2, 32), BF16)},
        {"rope_table": np.zeros((20, 8), np.float32)},
        {"rope_table": np.zeros((20, 16), np.float64)},
        {"rope_table": np.zeros((19, 16), np.float32)},
        {"q_norm": np.zeros(8, np.float32)},
        {"k_norm": np.zeros(16, BF16)},
        {"layer": 2},
        {"layer": -1},
        {"slot_mapping": ints(0, 1, 32)},
        {"slot_mapping": ints(0, -1, 2)},
        {"slot_mapping": np.arange(3)},
        {"positions": ints(17, 18)},
    ],
    ids=lambda change: "-".join(change),
)
def test_rope_and_cache_refuses(change):
    ops, arguments = backend(ISAS[0]), rope_arguments()
    cache = ops.new_kv_cache(num_layers=2, num_blocks=2, num_kv_heads=1, head_dim=16, dtype=BF16)
    batch_change = {k: v for k, v in change.items() if k in ("slot_mapping", "positions")}
    arguments |= {k: v for k, v in change.items() if k not in batch_change}
    arguments["batch"] = replaced(arguments["batch"], **batch_change)
    with pytest.raises(InvalidArgument):
        ops.rope_and_cache(cache=cache, eps=1e-6, **arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": ints(16, 17, 18)},
        {"query_start": ints(0, 2)},
        {"query_start": ints(1, 3)},
        {"query_start": ints(0, 1, 3)},
        {"context_lens": ints(33)},
        {"context_lens": ints(2)},
        {"block_tables": ints(0, 2)[None]},
        {"block_tables": ints(0, -1)[None]},
        {"block_tables": ints(0)[None]},
        {"block_tables": ints(0, 1)},
    ],
    ids=lambda change: "-".join(change),
)
def test_attention_refuses(change):
    ops, batch = backend(ISAS[0]), rope_arguments()["batch"]
    cache = ops.new_kv_cache(num_layers=2, num_blocks=2, num_kv_heads=1, head_dim=16, dtype=BF16)
    q, out = np.zeros((3, 32), BF16), np.zeros((3, 32), BF16)
    ops.attention(q, batch, cache, 0, scale=1.0, window=None, out=out)
    with pytest.raises(InvalidArgument):
        ops.attention(q, replaced(batch, **change), cache, 0, scale=1.0, window=None, out=out)
    with pytest.raises(InvalidArgument):
        ops.attention(q, batch, cache, 0, scale=1.0, window=0, out=out)


@pytest.mark.parametrize("D", [0, 4, 12, 264])
def test_new_kv_cache_refuses_head_dims(D):
    with pytest.raises(InvalidArgument, match=f"{D}"):
        backend(ISAS[0]).new_kv_cache(num_layers=1, num_blocks=2, num_kv_heads=1, head_dim=D, dtype=BF16)


def test_row_operations_refuse_what_does_not_fit():
    ops, x = backend(ISAS[0]), np.zeros((3, 16), BF16)
    with pytest.raises(InvalidArgument, match="token id 7"):
        ops.embed(x, ints(0, 7), out=np.zeros((2, 16), BF16))
    with pytest.raises(InvalidArgument, match="token id -1"):
        ops.embed(x, ints(0, -1), out=np.zeros((2, 16), BF16))
    with pytest.raises(InvalidArgument):
        ops.rms_norm(x, np.ones(8, np.float32), 1e-6, out=x.copy())
    with pytest.raises(InvalidArgument):
        ops.rms_norm(x, np.ones(16, np.float32), 1e-6, out=np.zeros((3, 16), F32))
    with pytest.raises(InvalidArgument):
        ops.silu_mul(x, out=np.zeros((3, 16), BF16))
