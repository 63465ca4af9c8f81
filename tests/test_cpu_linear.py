"""The C++ `linear`, `pack_weight` and `all_finite` on every instruction set this CPU has.

`linear` is compared with float64 products of the stored values, within the bound that fp32 accumulation in any order
obeys, and bit by bit with itself under every batching and number of threads. Rounding is compared with ml_dtypes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from engine.errors import EngineError, InvalidArgument

try:
    from engine.ops.cpu import CpuOps, available_isas
except ImportError as error:
    pytest.skip(f"the C++ extension is not built: {error}", allow_module_level=True)

F32, F16, BF16 = (np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
DTYPES = [F32, F16, BF16]
ISAS = available_isas()
each_isa = pytest.mark.parametrize("isa", ISAS)
each_x_dtype = pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
each_w_dtype = pytest.mark.parametrize("w_dtype", DTYPES, ids=str)

UNIT_ROUNDOFF = {F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
SMALLEST = {F32: 2.0**-149, F16: 2.0**-24, BF16: 2.0**-133}  # subnormal


@lru_cache
def backend(isa: str = ISAS[0], threads: int = 2) -> CpuOps:
    return CpuOps(threads, isa)


def normal(rng, shape, dtype, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def run(ops, x, weight, out_dtype=None, **addends):
    """linear into memory full of NaN, so that an element left unwritten shows."""
    out = np.full((x.shape[0], weight.N), np.nan, out_dtype or x.dtype)
    assert ops.linear(x, weight, out=out, **addends) is out
    return out


def bits(array):
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def assert_close(out, x, w, bias=None, residual=None):
    """K products and sums and the two addends in fp32: each rounds once, in whatever order, and no partial result is
    larger than the sum of absolute values (first-order bound, with 10 % for the higher orders). Then one rounding."""
    terms = [x.astype(np.float64) @ w.astype(np.float64).T]
    sizes = [np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)).T]
    for addend in (bias, residual):
        if addend is not None:
            terms.append(np.broadcast_to(addend.astype(np.float64), out.shape))
            sizes.append(np.abs(terms[-1]))
    exact, size = sum(terms), sum(sizes)
    accumulated = 1.1 * (x.shape[1] + 2) * UNIT_ROUNDOFF[F32] * size
    rounded = UNIT_ROUNDOFF[out.dtype] * (np.abs(exact) + accumulated) + SMALLEST[out.dtype]
    error = np.abs(out.astype(np.float64) - exact)
    assert np.all(error <= accumulated + rounded), f"worst excess {np.max(error - accumulated - rounded)}"


# ---- values ----------------------------------------------------------------------------------------------------------


@each_isa
@each_x_dtype
@each_w_dtype
def test_every_number_of_rows(isa, x_dtype, w_dtype):
    rng = np.random.default_rng(1)
    w = normal(rng, (70, 45), w_dtype)  # N and K are whole numbers of nothing
    weight = backend(isa).pack_weight([w])
    for T in range(1, 41):
        x = normal(rng, (T, 45), x_dtype)
        assert_close(run(backend(isa), x, weight), x, w)


@each_isa
@each_x_dtype
@each_w_dtype
def test_every_tail_of_columns_and_depth(isa, x_dtype, w_dtype):
    rng = np.random.default_rng(2)
    shapes = [(N, 40) for N in (1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100)]
    shapes += [(37, K) for K in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 127, 129, 255, 1000, 1001)]
    for N, K in shapes:
        w = normal(rng, (N, K), w_dtype, K**-0.5)
        weight = backend(isa).pack_weight([w])
        for T in (1, 3, 7):  # rows laid out element by element and by transposes
            x = normal(rng, (T, K), x_dtype)
            assert_close(run(backend(isa), x, weight, F32), x, w)


@each_isa
@pytest.mark.parametrize("T", [130, 511, 513, 700])  # on both sides of the 512 rows that are multiplied at a time
def test_many_rows(isa, T):
    rng = np.random.default_rng(T)
    for dtype in (BF16, F32):
        x, w = normal(rng, (T, 200), dtype), normal(rng, (150, 200), BF16, 200**-0.5)
        assert_close(run(backend(isa, 3), x, backend(isa, 3).pack_weight([w])), x, w)


@each_isa
@each_x_dtype
@pytest.mark.parametrize("out_is_f32", [False, True])
def test_bias_and_residual(isa, x_dtype, out_is_f32):
    rng = np.random.default_rng(3)
    x, w = normal(rng, (9, 77), x_dtype), normal(rng, (75, 77), BF16)
    bias, residual = normal(rng, 75, F32, 10), normal(rng, (9, 75), x_dtype, 10)
    weight = backend(isa).pack_weight([w])
    for addends in ({"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
        out = run(backend(isa), x, weight, F32 if out_is_f32 else x_dtype, **addends)
        assert_close(out, x, w, **addends)


@each_isa
def test_residual_may_be_out(isa):
    rng = np.random.default_rng(4)
    x, w, residual = normal(rng, (20, 64), BF16), normal(rng, (100, 64), BF16), normal(rng, (20, 100), BF16)
    weight = backend(isa).pack_weight([w])
    expected = run(backend(isa), x, weight, residual=residual)
    backend(isa).linear(x, weight, out=residual, residual=residual)
    np.testing.assert_array_equal(bits(residual), bits(expected))


@each_isa
@each_x_dtype
def test_rounding_is_that_of_ml_dtypes(isa, x_dtype):
    """0 · w + bias, with every kind of fp32 as bias: ties, subnormals, overflow, infinities and NaN."""
    rng = np.random.default_rng(5)
    patterns = rng.integers(0, 2**32, 6000, np.uint32)
    patterns[:2000] = patterns[:2000] >> 16 << 16 | 0x8000  # halfway between two bf16
    patterns[2000:4000] = patterns[2000:4000] >> 13 << 13 | 0x1000  # halfway between two fp16
    patterns[3000:4000] = patterns[3000:4000] & 0x8FFFFFFF | 0x30000000  # of fp16's magnitude, subnormals included
    patterns[4000:4100] = patterns[4000:4100] & 0x807FFFFF  # fp32 subnormals
    bias = patterns.view(np.float32)
    weight = backend(isa).pack_weight([np.ones((bias.size, 1), BF16)])
    out = run(backend(isa), np.zeros((1, 1), x_dtype), weight, bias=bias)[0]
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (bias + np.float32(0)).astype(x_dtype)
    nan = np.isnan(bias)
    assert nan.any() and np.isnan(out[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(bits(out)[~nan], bits(expected)[~nan])


@each_isa
@each_x_dtype
@each_w_dtype
def test_stored_values_are_multiplied_exactly(isa, x_dtype, w_dtype):
    """The identity returns the weight: every normal value of the two-byte types, and of fp32 a sample.

    Subnormal bf16 weights count as 0 in a bf16 dot product (the instruction's definition), nowhere else.
    """
    rng = np.random.default_rng(6)
    patterns = np.arange(2**16, dtype=np.uint16) if w_dtype != F32 else rng.integers(0, 2**32, 2**16, np.uint32)
    values = patterns.view(w_dtype)
    magnitude = np.abs(values.astype(np.float32))
    smallest = 0 if w_dtype == F16 else 2.0**-126
    values = values[np.isfinite(magnitude) & ((magnitude >= smallest) | (magnitude == 0))]
    w = np.resize(values, (-(-values.size // 33), 33))
    out = run(backend(isa), np.eye(33).astype(x_dtype), backend(isa).pack_weight([w]), F32)
    np.testing.assert_array_equal(out, w.astype(np.float32).T)  # −0 equals 0


@each_isa
def test_subnormal_weights_count_where_x_is_fp32(isa):
    w = np.full((3, 4), 2.0**-130, BF16)
    out = run(backend(isa), np.full((1, 4), 2.0**20, F32), backend(isa).pack_weight([w]))
    assert (out == 2.0**-108).all()


@each_isa
def test_infinity_and_nan_stay_in_their_row_and_column(isa):
    rng = np.random.default_rng(7)
    for dtype in DTYPES:
        x, w = normal(rng, (14, 35), dtype), normal(rng, (40, 35), dtype)
        clean = run(backend(isa), x, backend(isa).pack_weight([w]))
        x[3, 5], w[33, 34] = np.nan, np.inf
        out = run(backend(isa), x, backend(isa).pack_weight([w]))
        touched = np.zeros(out.shape, bool)
        touched[3], touched[:, 33] = True, True
        assert not np.isfinite(out[touched].astype(np.float32)).any()
        np.testing.assert_array_equal(bits(out)[~touched], bits(clean)[~touched])


# ---- a row's bits are its own ----------------------------------------------------------------------------------------


@each_isa
@each_x_dtype
@each_w_dtype
def test_a_row_is_the_same_in_every_batch(isa, x_dtype, w_dtype):
    rng = np.random.default_rng(8)
    x, w = normal(rng, (40, 131), x_dtype), normal(rng, (100, 131), w_dtype)
    bias = normal(rng, 100, F32)
    weight = backend(isa, 1).pack_weight([w])
    alone = np.concatenate([run(backend(isa, 1), x[t : t + 1], weight, bias=bias) for t in range(40)])
    for T in range(1, 41):
        out = run(backend(isa, 1 + T % 3), x[40 - T :], weight, bias=bias)
        np.testing.assert_array_equal(bits(out), bits(alone[40 - T :]))


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_a_large_batch(isa, dtype):
    rng = np.random.default_rng(9)
    x, w = normal(rng, (600, 66), dtype), normal(rng, (200, 66), BF16)
    weight = backend(isa, 1).pack_weight([w])
    whole = [run(backend(isa, threads), x, weight) for threads in (1, 2, 3)]
    for other in whole[1:]:
        np.testing.assert_array_equal(bits(other), bits(whole[0]))
    for first, T in ((0, 1), (13, 5), (505, 12), (511, 1), (512, 30), (599, 1)):
        part = run(backend(isa, 2), x[first : first + T], weight)
        np.testing.assert_array_equal(bits(part), bits(whole[0][first : first + T]))


# ---- weights and layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_follow_one_another(dtype):
    rng = np.random.default_rng(10)
    ops = backend()
    shards = [normal(rng, (N, 50), dtype) for N in (5, 64, 17)]
    weight, x = ops.pack_weight(shards), normal(rng, (6, 50), F32)
    assert (weight.N, weight.K, weight.shard_rows) == (86, 50, (5, 64, 17))
    assert weight.nbytes == 96 * 50 * dtype.itemsize  # whole tiles of 32 columns, nothing else
    together = run(ops, x, weight)
    apart = np.concatenate([run(ops, x, ops.pack_weight([shard])) for shard in shards], axis=1)
    np.testing.assert_array_equal(bits(together), bits(apart))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shards_may_be_read_only_unaligned_and_strided(dtype):
    """A memory-mapped tensor begins at any byte; a slice of columns has rows further apart than they are long."""
    rng = np.random.default_rng(11)
    ops, x = backend(), normal(rng, (2, 40), F32)
    w = normal(rng, (33, 40), dtype)
    raw = np.zeros(w.nbytes + 1, np.uint8)
    raw[1:] = w.view(np.uint8).reshape(-1)
    unaligned = raw[1:].view(dtype).reshape(w.shape)
    unaligned.flags.writeable = False
    wide = np.zeros((33, 60), dtype)
    wide[:, 10:50] = w
    expected = run(ops, x, ops.pack_weight([w]))
    for same in (unaligned, wide[:, 10:50]):
        np.testing.assert_array_equal(bits(run(ops, x, ops.pack_weight([same]))), bits(expected))


def test_a_weight_outlives_its_shards_and_its_backend():
    rng = np.random.default_rng(12)
    x, w = normal(rng, (3, 64), BF16), normal(rng, (64, 64), BF16)
    short_lived = CpuOps(2)
    weight = short_lived.pack_weight([w.copy()])
    del short_lived
    for _ in range(50):  # weights come and go in the same slabs
        backend().pack_weight([np.ones((64, 64), BF16)])
    assert_close(run(backend(), x, weight), x, w)


def test_rows_may_be_further_apart_than_long():
    rng = np.random.default_rng(13)
    ops, w = backend(), normal(rng, (50, 40), BF16)
    weight = ops.pack_weight([w])
    x, residual = normal(rng, (9, 60), BF16), normal(rng, (18, 50), BF16)
    out = np.full((9, 70), 7, BF16)
    ops.linear(x[:, 20:], weight, out=out[:, 11:61], residual=residual[::2])
    expected = run(ops, x[:, 20:].copy(), weight, residual=residual[::2].copy())
    np.testing.assert_array_equal(bits(out[:, 11:61]), bits(expected))
    assert (out[:, :11] == 7).all() and (out[:, 61:] == 7).all()


def test_no_rows():
    weight = backend().pack_weight([np.ones((8, 8), BF16)])
    assert run(backend(), np.empty((0, 8), BF16), weight).shape == (0, 8)


def test_one_backend_serves_several_threads():
    rng = np.random.default_rng(14)
    ops, w = CpuOps(3), normal(rng, (300, 90), BF16)
    weight = ops.pack_weight([w])
    inputs = [normal(rng, (T, 90), BF16) for T in (1, 2, 20, 64)]
    expected = [run(ops, x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda i: run(ops, inputs[i % 4], weight), range(400)))
    for i, out in enumerate(outs):
        np.testing.assert_array_equal(bits(out), bits(expected[i % 4]))


FORKING = """
import os, sys
import numpy as np
from engine.ops.cpu import CpuOps
ops = CpuOps(3)
x, w = np.ones((40, 64), np.float32), ops.pack_weight([np.ones((300, 64), np.float32)])
out = np.zeros((40, 300), np.float32)
ops.linear(x, w, out=out)
child = os.fork()
out[:] = 0
ops.linear(x, w, out=out)
ok = bool((out == 64).all())
del ops, w
if child == 0:
    os._exit(0 if ok else 1)
sys.exit(not ok or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own():
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", FORKING], cwd=root, check=True, timeout=60)


# ---- all_finite ------------------------------------------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_finite_sees_every_element(isa, dtype):
    """One special value anywhere: at the ends, around the vectors, the 1024-element stretches and the 65536-element
    ranges that threads take, and at random."""
    rng = np.random.default_rng(15)
    size = 3 * 65536 + 77
    array = normal(rng, size, dtype)
    array[::1000] = np.finfo(dtype).max if dtype != BF16 else ml_dtypes.finfo(dtype).max
    array[1::1000] = 0
    assert backend(isa).all_finite(array)
    edges = [0, 15, 16, 1023, 1024, 65535, 65536, 2 * 65536 - 1, 3 * 65536, size - 77 + 16, size - 1]
    for i, position in enumerate([*edges, *rng.integers(0, size, 20)]):
        kept = array[position]
        array[position] = (np.nan, np.inf, -np.inf)[i % 3]
        assert not backend(isa).all_finite(array), position
        array[position] = kept
    assert backend(isa).all_finite(array)


@each_isa
def test_all_finite_on_every_two_byte_pattern(isa):
    for dtype in (F16, BF16):
        values = np.arange(2**16, dtype=np.uint16).view(dtype)
        expected = np.isfinite(values.astype(np.float32))
        assert [backend(isa).all_finite(values[i : i + 1]) for i in range(0, 2**16, 97)] == expected[::97].tolist()
        assert backend(isa).all_finite(values[expected]) and not backend(isa).all_finite(values[~expected][:1])


def test_all_finite_on_any_shape_and_alignment():
    ops = backend()
    assert ops.all_finite(np.empty((0, 3), F32)) and ops.all_finite(np.array(1.0, F32))
    assert not ops.all_finite(np.full((2, 3, 4), np.nan, BF16))
    raw = np.zeros(4001, np.uint8)
    unaligned = raw[1:].view(F32)
    assert ops.all_finite(unaligned)
    unaligned[-1] = -np.inf
    assert not ops.all_finite(unaligned)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_with_their_shapes():
    ops = backend()
    weight = ops.pack_weight([np.ones((6, 8), BF16)])
    x, out = np.ones((3, 8), BF16), np.empty((3, 6), BF16)
    read_only = out.copy()
    read_only.flags.writeable = False
    cases = {
        r"x must be \[3, 8\], not \[3, 7\]": dict(x=np.ones((3, 7), BF16)),
        r"out must be \[3, 6\], not \[3, 8\]": dict(out=np.empty((3, 8), BF16)),
        r"out must have x's dtype or float32.*float16 \[3, 6\]": dict(out=np.empty((3, 6), F16)),
        r"x must be float32, float16 or bfloat16, not float64 \[3, 8\]": dict(x=np.ones((3, 8))),
        r"x must have 2 dimensions, not bfloat16 \[8\]": dict(x=np.ones(8, BF16)),
        r"x must have contiguous.*strides": dict(x=np.ones((8, 3), BF16).T),
        r"out is read-only": dict(out=read_only),
        r"bias must be a contiguous float32 \[6\], not float32 \[5\]": dict(bias=np.ones(5, F32)),
        r"bias must be a contiguous float32 \[6\], not bfloat16": dict(bias=np.ones(6, BF16)),
        r"residual must be \[3, 6\], not \[2, 6\]": dict(residual=np.ones((2, 6), BF16)),
        r"residual must have x's dtype": dict(residual=np.ones((3, 6), F32)),
    }
    for message, change in cases.items():
        with pytest.raises(InvalidArgument, match=message):
            ops.linear(**{"x": x, "weight": weight, "out": out, **change})
    with pytest.raises(InvalidArgument, match="non-overlapping"):
        ops.linear(x, weight, out=np.lib.stride_tricks.as_strided(out, (3, 6), (2, 2)))


def test_bad_weights_and_choices_are_refused():
    ops = backend()
    cases = {
        "at least one shard": [],
        r"one dtype and one K.*\[2, 8\] and bfloat16 \[2, 9\]": [np.ones((2, 8), BF16), np.ones((2, 9), BF16)],
        "one dtype and one K": [np.ones((2, 8), BF16), np.ones((2, 8), F32)],
        "must not be empty": [np.ones((0, 8), BF16)],
        "float32, float16 or bfloat16": [np.ones((2, 8), np.int32)],
    }
    for message, shards in cases.items():
        with pytest.raises(InvalidArgument, match=message):
            ops.pack_weight(shards)
    with pytest.raises(InvalidArgument, match="contiguous array"):
        ops.all_finite(np.ones((4, 4), F32).T[1:])
    with pytest.raises(InvalidArgument, match="'sse9' is not available here; choose one of .*portable"):
        CpuOps(1, "sse9")
    with pytest.raises(EngineError, match="threads must be in 1..1024, not 0"):
        CpuOps(0)


def test_the_kernel_path_tells_what_runs():
    assert ISAS[-1] == "portable"
    assert CpuOps(1).kernel_path == f"{ISAS[0]}, 1 thread"
    assert CpuOps(3, "portable").kernel_path == "portable, 3 threads"
