"""The row-wise CUDA kernels (embed, rms_norm, silu_mul, rope_and_cache) on the emulator, bit for bit NumPy's.

The fast build runs every shape and type; the checking build, which finds races and accesses out of bounds, a few.
"""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np
import pytest
from bit_patterns import BF16, DTYPES, F16, F32, all_patterns, assert_same_bits, rows_of_many_sizes
from paging import scattered, total_blocks

from engine.errors import DeviceError
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule
from engine.ops.reference import ReferenceOps

try:
    EmulatedModule.compile("embed.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

REFERENCE = ReferenceOps()
NAMES = {F32: "f32", F16: "f16", BF16: "bf16"}
CHECKED = [pytest.param(False, id="fast"), pytest.param(True, id="checked")]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_build = pytest.mark.parametrize("checked", CHECKED)


@lru_cache
def module(source, checked=False):
    return EmulatedModule.compile(source, checked=checked)


def stride(rows):
    return np.int64(rows.strides[0] // rows.itemsize)


def unwritten(shape, dtype):
    """Memory full of a NaN that no kernel writes, so that a gap shows."""
    return np.full(shape, np.nan, dtype)


# ---- embed -----------------------------------------------------------------------------------------------------------


def embed(table, ids, out, checked=False, threads=64):
    name = f"embed_{NAMES[table.dtype]}_{NAMES[out.dtype]}"
    args = [table, stride(table), ids, out, stride(out), np.int32(table.shape[1])]
    module("embed.cu", checked).launch(name, (len(ids), 1, 1), (threads, 1, 1), 0, args)
    return out


@each_dtype
@pytest.mark.parametrize("table_dtype", DTYPES, ids=str)
def test_embed(dtype, table_dtype):
    rng = np.random.default_rng(1)
    for C in (1, 8, 75, 1032):
        table = all_patterns(rng, (40, C), table_dtype)
        ids = rng.integers(0, 40, 9).astype(np.int32)
        with np.errstate(invalid="ignore"):  # NumPy warns where it meets a signalling NaN
            expected = REFERENCE.embed(table, ids, out=np.zeros((9, C), dtype))
        assert_same_bits(embed(table, ids, unwritten((9, C), dtype)), expected)


def test_embed_checked_and_rows_that_lie_apart():
    rng = np.random.default_rng(2)
    wide, frame = rng.normal(0, 1, (20, 100)).astype(F32), np.zeros((5, 64), BF16)
    table, out = wide[:, 3:53], frame[:, 8:58]
    ids = np.array([19, 0, 7, 7, 3], np.int32)
    embed(table, ids, out, checked=True)
    assert_same_bits(out.copy(), REFERENCE.embed(table, ids, out=np.zeros((5, 50), BF16)))
    assert not frame[:, :8].any() and not frame[:, 58:].any()


# ---- rms_norm --------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps, out, checked=False, threads=128, **launch):
    args = [x, stride(x), weight, np.float32(eps), out, stride(out), np.int32(x.shape[1])]
    name = f"rms_norm_{NAMES[x.dtype]}"
    module("rms_norm.cu", checked).launch(name, (len(x), 1, 1), (threads, 1, 1), 0, args, **launch)
    return out


@each_dtype
@pytest.mark.parametrize("C", [8, 27, 64, 96, 896, 1024, 1025, 4864, 18944])
def test_rms_norm(dtype, C):
    rng = np.random.default_rng(C)
    x = rows_of_many_sizes(rng, C, dtype)[: 3 if C > 4000 else None]
    weight = rng.normal(1, 0.3, C).astype(F32)
    expected = REFERENCE.rms_norm(x, weight, 1e-6, out=np.zeros_like(x))
    assert_same_bits(rms_norm(x, weight, 1e-6, unwritten(x.shape, dtype)), expected)


@each_build
@pytest.mark.parametrize("threads", [32, 96, 128, 256, 1024])
def test_rms_norm_in_blocks_of_any_size(threads, checked):
    rng = np.random.default_rng(threads)
    x, weight = rng.normal(0, 2, (2, 2056)).astype(BF16), rng.normal(1, 0.3, 2056).astype(F32)
    expected = REFERENCE.rms_norm(x, weight, 1e-6, out=np.zeros_like(x))
    for schedule, poison in zip(SCHEDULES, (0xFF, 0, 0x7F, 0x3C), strict=True):
        out = rms_norm(x, weight, 1e-6, unwritten(x.shape, BF16), checked, threads, schedule=schedule, poison=poison)
        assert_same_bits(out, expected)


@each_build
def test_rms_norm_of_rows_that_lie_apart(checked):
    wide, weight = np.random.default_rng(3).normal(0, 1, (4, 203)).astype(BF16), np.ones(96, F32)
    for first in (8, 11):
        x, frame = wide[:, first : first + 96], np.zeros((4, 129), BF16)
        rms_norm(x, weight, 1e-6, frame[:, 16:112], checked)
        expected = REFERENCE.rms_norm(x, weight, 1e-6, out=np.zeros((4, 96), BF16))
        assert_same_bits(frame[:, 16:112].copy(), expected)
        assert not frame[:, :16].any() and not frame[:, 112:].any()


# ---- silu_mul --------------------------------------------------------------------------------------------------------


def silu_mul(gate_up, out, checked=False, threads=64):
    F = out.shape[1]
    args = [gate_up, stride(gate_up), out, stride(out), np.int32(F)]
    grid = (len(out), -(-F // (8 * threads)), 1)
    module("silu_mul.cu", checked).launch(f"silu_mul_{NAMES[out.dtype]}", grid, (threads, 1, 1), 0, args)
    return out


@each_dtype
def test_silu_mul_of_every_gate(dtype):
    """All 65,536 gates of a 16-bit type, as many random ones of float32."""
    rng, F = np.random.default_rng(1), 1 << 14
    gate = np.arange(1 << 16, dtype=np.uint16).view(dtype) if dtype.itemsize == 2 else all_patterns(rng, 1 << 16, dtype)
    gate_up = np.concatenate([gate.reshape(4, F), rng.normal(0, 3, (4, F)).astype(dtype)], axis=1)
    gate_up = np.concatenate([gate_up, rng.normal(0, 30, (1, 2 * F)).astype(dtype)])
    expected = REFERENCE.silu_mul(gate_up, out=np.zeros((5, F), dtype))
    assert_same_bits(silu_mul(gate_up, unwritten((5, F), dtype)), expected)


@each_build
@each_dtype
@pytest.mark.parametrize("F", [1, 27, 64, 520])
def test_silu_mul_tails(dtype, F, checked):
    gate_up = np.random.default_rng(F).normal(0, 2, (3, 2 * F + 8)).astype(dtype)[:, : 2 * F]
    expected = REFERENCE.silu_mul(gate_up, out=np.zeros((3, F), dtype))
    assert_same_bits(silu_mul(gate_up, unwritten((3, F), dtype), checked), expected)


# ---- rope_and_cache --------------------------------------------------------------------------------------------------


def rope_and_cache(qkv, table, batch, norms, k, v, out, checked=False, threads=128, e4m3=None):
    """k, v [blocks, KVH, 16, D]; e4m3: scales of K and V, and the flag."""
    _, KVH, _, D = k.shape
    H = out.shape[1] // D
    group = 1 << (D // 8 - 1).bit_length()
    args = [
        qkv, stride(qkv), table, batch.positions, batch.slot_mapping, *norms, np.float32(1e-6),
        out, stride(out), k, v, np.int32(H), np.int32(KVH), np.int32(D),
    ]  # fmt: skip
    grid = (len(qkv), -(-(H + 2 * KVH) * group // threads), 1)
    name = f"rope_and_cache_{NAMES[qkv.dtype]}{'_e4m3' if e4m3 else ''}"
    module("rope_and_cache.cu", checked).launch(name, grid, (threads, 1, 1), 0, [*args, *(e4m3 or ())])


def assert_rope_equals_reference(dtype, D, with_norm, checked, H=6, KVH=2):
    rng = np.random.default_rng(D)
    paging = scattered(rng, [50, 30], 16)
    batch = paging.batch([(0, 38, 50), (1, 29, 30)])
    T, blocks = batch.positions.size, total_blocks(paging)
    qkv = rng.normal(0, 1, (T, (H + 2 * KVH) * D)).astype(dtype)
    many_sizes = rows_of_many_sizes(rng, qkv.shape[1], dtype)
    qkv[: len(many_sizes)] = many_sizes
    table = rng.normal(0, 1, (60, D)).astype(F32)
    table[12] = 0  # products of zeros: their signs must agree too
    norms = [rng.normal(1, 0.2, D).astype(F32) if with_norm else None for _ in range(2)]

    reference = REFERENCE.new_kv_cache(num_layers=1, num_blocks=blocks, num_kv_heads=KVH, head_dim=D, dtype=dtype)
    expected = np.zeros((T, H * D), dtype)
    REFERENCE.rope_and_cache(qkv, table, batch, reference, 0, q_norm=norms[0], k_norm=norms[1], eps=1e-6, out=expected)
    k, v = np.zeros((2, blocks, KVH, 16, D), dtype)
    out = unwritten(expected.shape, dtype)
    rope_and_cache(qkv, table, batch, norms, k, v, out, checked)
    assert_same_bits(out, expected)
    assert_same_bits(k, np.ascontiguousarray(reference.k[0].transpose(0, 2, 1, 3)))
    assert_same_bits(v, np.ascontiguousarray(reference.v[0].transpose(0, 2, 1, 3)))


@each_dtype
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("D", [8, 24, 64, 72, 96, 128, 256])
def test_rope_and_cache(dtype, D, with_norm):
    assert_rope_equals_reference(dtype, D, with_norm, checked=False)


@pytest.mark.parametrize("with_norm", [False, True])
def test_rope_and_cache_checked(with_norm):
    assert_rope_equals_reference(BF16, 24, with_norm, checked=True)
    assert_rope_equals_reference(BF16, 128, with_norm, checked=True, H=4, KVH=1)


def test_rope_and_cache_of_rows_that_lie_apart():
    rng = np.random.default_rng(5)
    batch = scattered(rng, [20], 16).batch([(0, 15, 20)])
    table, D, H, KVH = rng.normal(0, 1, (20, 16)).astype(F32), 16, 3, 1
    wide, frame = rng.normal(0, 1, (5, 91)).astype(F16), np.zeros((5, 55), F16)
    qkv, q = wide[:, 5:85], frame[:, 3:51]
    blocks = int(batch.slot_mapping.max()) // 16 + 1
    reference = REFERENCE.new_kv_cache(num_layers=1, num_blocks=blocks, num_kv_heads=KVH, head_dim=D, dtype=F16)
    expected = np.zeros((5, H * D), F16)
    REFERENCE.rope_and_cache(qkv, table, batch, reference, 0, q_norm=None, k_norm=None, eps=1e-6, out=expected)
    k, v = np.zeros((2, blocks, KVH, 16, D), F16)
    rope_and_cache(qkv, table, batch, [None, None], k, v, q)
    assert_same_bits(q.copy(), expected)
    assert_same_bits(k, np.ascontiguousarray(reference.k[0].transpose(0, 2, 1, 3)))
    assert not frame[:, :3].any() and not frame[:, 51:].any()


@each_build
@pytest.mark.parametrize("D", [8, 72, 256])
def test_rope_and_cache_into_e4m3(D, checked):
    rng = np.random.default_rng(D)
    H, KVH = 3, 2
    paging = scattered(rng, [20], 16)
    batch, blocks = paging.batch([(0, 9, 20)]), total_blocks(paging)
    qkv = (rng.normal(0, 1, (11, (H + 2 * KVH) * D)) * 10 ** rng.uniform(-4, 3, (11, 1))).astype(BF16)
    table, norms = rng.normal(0, 1, (20, D)).astype(F32), [rng.normal(1, 0.2, D).astype(F32), None]
    scales = rng.uniform(0.1, 3, (2, 1)).astype(F32)
    options = {"num_layers": 1, "num_blocks": blocks, "num_kv_heads": KVH, "head_dim": D}
    reference = REFERENCE.new_kv_cache(**options, dtype=np.dtype(ml_dtypes.float8_e4m3fn), scales=scales)
    expected = np.zeros((11, H * D), BF16)
    REFERENCE.rope_and_cache(qkv, table, batch, reference, 0, q_norm=norms[0], k_norm=None, eps=1e-6, out=expected)

    invalid, by_head = np.zeros(1, np.int32), [np.repeat(scale, KVH) for scale in scales]
    k, v = np.zeros((2, blocks, KVH, 16, D), np.uint8)
    out = unwritten(expected.shape, BF16)
    rope_and_cache(qkv, table, batch, norms, k, v, out, checked, e4m3=[*by_head, invalid])
    assert_same_bits(out, expected)
    np.testing.assert_array_equal(k, reference.k[0].view(np.uint8).transpose(0, 2, 1, 3))
    np.testing.assert_array_equal(v, reference.v[0].view(np.uint8).transpose(0, 2, 1, 3))
    assert k.any() and v.any() and not invalid[0]

    qkv[4, H * D + 5], qkv[2, -1], qkv[8, 0] = np.nan, np.inf, np.nan  # of k, v and q
    rope_and_cache(qkv, table, batch, norms, k, v, out, checked, e4m3=[*by_head, invalid])
    assert invalid[0] == 4 + 1  # the largest row
