"""The matrix-product CUDA kernels on the emulator, against float64 products of the dequantised operands.

The emulator's tensor cores round as measured ones do (cuda/emulate/ptx_mma.h), so tolerances are those of hardware.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from engine.errors import DeviceError, InvalidArgument
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops import fp8
from engine.ops.fp4 import blocks, product
from engine.ops.fp4.elements import pack
from engine.ops.fp4.split import paths
from engine.ops.gpu import launch_linear, weight_layout
from engine.ops.gpu.device import EmulatedDevice
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule
from engine.ops.gpu.launch_linear import Output, Workspace
from engine.ops.gpu.launch_rows import padded, type_name
from engine.ops.reference import ReferenceOps

try:
    EmulatedModule.compile("embed.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

BF16 = np.dtype(ml_dtypes.bfloat16)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
FORMATS = [("nvfp4", 32), ("nvfp4", 16), ("mxfp4", 32), ("hif4", 64)]
REFERENCE = ReferenceOps()
each_format = pytest.mark.parametrize(("format", "block"), FORMATS, ids=lambda v: str(v))


@lru_cache
def device(arch="sm_90", checked=False, schedule=SCHEDULES[0]):
    return EmulatedDevice(arch, checked=checked, schedule=schedule)


def fp4_matrix(rng, rows, K, format, block, spread=1.0):
    """Random codes and scales, zero blocks and extremes of the scale formats among them."""
    x = rng.standard_normal((rows, K)).astype(np.float32) * np.exp(spread * rng.standard_normal((rows, K // block)))[
        :, :, None
    ].repeat(block, 2).reshape(rows, K)
    x[:, : block // 2] = 0
    x[rng.random((rows, K)) < 0.1] = 0
    if rows > 1:
        x[1, :block] = 0
    codes, scale = blocks.quantize(x.astype(np.float32), blocks.block_format(format, block))
    g = (0.5 + rng.random(rows)).astype(np.float32) if format == "nvfp4" else np.ones(rows, np.float32)
    return Fp4Matrix(format, pack(codes), scale, g)


def dequantized(m):
    return product.block_values(m).astype(np.float64) * m.g[:, None].astype(np.float64)


def workspace(plan, dev):
    cut = plan.cut
    return Workspace(dev.empty((max(1, cut.partials),), F32), dev.zeros((max(1, cut.arrivals),), np.dtype(np.uint32)))


def device_operand(operand, dev):
    """An operand as preparations leave it on the device: K padded to 128."""
    K = operand.K
    P = padded(K)

    def widen(a, per_k, fill=0):
        wide = np.full((a.shape[0], P // per_k), fill, a.dtype)
        wide[:, : a.shape[1]] = a
        return dev.upload(wide)

    if isinstance(operand, Fp4Matrix):
        arrays = {"payload": widen(operand.payload, 2), "scale": widen(operand.scale, operand.block)}
    else:
        sparse = operand.sparse
        arrays = {
            "backbone": widen(operand.backbone, 4 if sparse else 2),
            "meta": widen(operand.meta, 8 if operand.format == "hif4" else 16, 0x44) if sparse else None,
            "backbone_scale": widen(operand.backbone_scale, K // operand.backbone_scale.shape[1]),
            "residual": widen(operand.residual, 2),
            "residual_scale": widen(operand.residual_scale, K // operand.residual_scale.shape[1]),
        }
    return SimpleNamespace(**arrays, g=dev.upload(operand.g), format=operand.format)


def run_w4a16(x, matrix, *, out_dtype=None, bias=None, residual=None, dev=None, sms=132):
    dev = dev or device()
    weight = weight_layout.pack_fp4([matrix]).on(dev.upload)
    out = dev.empty((len(x), matrix.rows), np.dtype(out_dtype or F32))
    plan = launch_linear.plan_fp4_decode(weight, len(x), type_name(x.dtype), sms=sms)
    output = Output(out, bias, residual)
    dev.launch(launch_linear.w4a16_decode(x, weight, output, workspace(plan, dev), plan))
    return out


def run_fp4(operand, matrix, *, out_dtype=None, bias=None, residual=None, dev=None, sms=132):
    dev = dev or device()
    weight = weight_layout.pack_fp4([matrix]).on(dev.upload)
    T = len(operand.g)
    out = dev.empty((T, matrix.rows), np.dtype(out_dtype or F32))
    paths = 1 if isinstance(operand, Fp4Matrix) else 2
    plan = launch_linear.plan_fp4_decode(weight, T, "fp4", paths=paths, sms=sms)
    work = workspace(plan, dev)
    launch = launch_linear.fp4_decode(device_operand(operand, dev), weight, Output(out, bias, residual), work, plan)
    dev.launch(launch)
    assert not work.arrivals.any()
    return out


def exact(operand, matrix):
    """float64 product, both paths."""
    parts = [operand] if isinstance(operand, Fp4Matrix) else paths(operand)
    return sum(dequantized(p) @ dequantized(matrix).T for p in parts)


def assert_close(y, expected, tolerance):
    scale = np.abs(expected).max()
    error = np.abs(y.astype(np.float64) - expected).max() / scale
    assert error <= tolerance, f"error {error:.2e} of max |Y|"


@each_format
def test_fp4_units_unpack_to_what_was_packed(format, block):
    rng = np.random.default_rng(1)
    shards = [fp4_matrix(rng, rows, 192, format, block) for rows in (5, 32, 1)]
    for placed in (False, True):
        again = weight_layout.unpack_fp4(weight_layout.pack_fp4(shards, placed=placed))
        for name in ("payload", "scale", "g"):
            assert (getattr(again, name) == np.concatenate([getattr(s, name) for s in shards])).all()


@each_format
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_w4a16_decode(format, block, dtype):
    rng = np.random.default_rng(2)
    for M, N, K in ((1, 40, 192), (5, 16, 64), (16, 100, 576), (19, 33, 320), (1, 16, 2304)):
        matrix = fp4_matrix(rng, N, K, format, block)
        x = rng.standard_normal((M, K)).astype(dtype)
        # Products are exact, sums are fp32 truncated over 128 k and rounded beyond
        assert_close(run_w4a16(x, matrix), x.astype(np.float64) @ dequantized(matrix).T, 1e-6)


@each_format
@pytest.mark.parametrize("kind", ["sparse", "dense", "one path"])
def test_fp4_decode(format, block, kind):
    rng = np.random.default_rng(3)
    for M, N, K in ((1, 40, 192), (4, 16, 64), (9, 100, 576), (1, 16, 2304)):
        matrix = fp4_matrix(rng, N, K, format, block)
        x = (rng.standard_normal((M, K)) * np.exp(rng.standard_normal((M, K)))).astype(BF16)
        if kind == "one path":
            operand = REFERENCE.prepare_fp4(x, format=format)
        else:
            operand = REFERENCE.prepare_sharq(x, format=format, sparse=kind == "sparse")
        y = run_fp4(operand, matrix)
        assert_close(y, exact(operand, matrix), 2e-6)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_sharq_over_a_long_row_beside_the_reference(arch):
    """K of a real model, an outlier, a global scale per shard: as near to float64 as NumPy's fp32 sums."""
    rng = np.random.default_rng(22)
    x = rng.standard_normal((2, 4096)).astype(BF16)
    x[0, 5] = 60
    w = rng.standard_normal((16, 4096)).astype(np.float32)
    matrix = REFERENCE.quantize_weight(w, format="nvfp4", block=32, grade="sweep")
    operand = REFERENCE.prepare_sharq(x)
    y = run_fp4(operand, matrix, dev=device(arch))
    reference = REFERENCE.fp4_linear(operand, REFERENCE.pack_fp4([matrix]), out=np.empty((2, 16), np.float32))
    assert_close(y, reference.astype(np.float64), 1e-6)
    assert_close(y, exact(operand, matrix), 1e-6)


# ---- FP8 and 16-bit weights ------------------------------------------------------------------------------------------


def fp8_matrix(rng, N, K, tile):
    """All codes but NaN's, and scales per tile."""
    codes = rng.integers(0, 256, (N, K), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80
    shape = (-(-N // tile[0]), -(-K // tile[1]))
    return Fp8Matrix(codes, (0.5 + rng.random(shape)).astype(np.float32), tile)


def fp8_values(matrix):
    scales = np.repeat(fp8.row_scales(matrix), matrix.tile[1], axis=1)[:, : matrix.K]
    return fp8.decode(matrix.payload).astype(np.float64) * scales


def run_fp8(x, matrix, *, out_dtype=F32, dev=None, sms=132):
    """x: rows, or an operand of codes and scale."""
    dev = dev or device()
    weight = weight_layout.pack_fp8([matrix]).on(dev.upload)
    is_operand = hasattr(x, "codes")
    M = len(x.codes) if is_operand else len(x)
    out = dev.empty((M, matrix.rows), np.dtype(out_dtype))
    plan = launch_linear.plan_fp8_decode(weight, M, "fp8" if is_operand else type_name(x.dtype), sms=sms)
    function = launch_linear.fp8_decode if is_operand else launch_linear.w8a16_decode
    dev.launch(function(x, weight, Output(out), workspace(plan, dev), plan))
    return out


FP8_SHAPES = [(1, 40, 192, (1, 192)), (5, 16, 72, (16, 72)), (17, 100, 576, (128, 128)), (1, 20, 2304, (128, 128))]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_w8a16_decode(dtype):
    rng = np.random.default_rng(4)
    for M, N, K, tile in FP8_SHAPES:
        matrix = fp8_matrix(rng, N, K, tile)
        x = rng.standard_normal((M, K)).astype(dtype)
        assert_close(run_fp8(x, matrix), x.astype(np.float64) @ fp8_values(matrix).T, 1e-6)


def test_fp8_decode():
    rng = np.random.default_rng(5)
    for M, N, K, tile in FP8_SHAPES:
        matrix = fp8_matrix(rng, N, K, tile)
        codes, scale = fp8.quantize_rows(rng.standard_normal((M, K)).astype(np.float32))
        wide = np.zeros((M, padded(K)), np.uint8)
        wide[:, :K] = codes
        y = run_fp8(SimpleNamespace(codes=device().upload(wide), scale=scale), matrix)
        assert_close(y, (fp8.decode(codes).astype(np.float64) * scale[:, None]) @ fp8_values(matrix).T, 1e-6)


def run_16_bit(x, w, *, out_dtype=F32, bias=None, residual=None, dev=None, sms=132):
    dev = dev or device()
    out = dev.empty((len(x), len(w)), np.dtype(out_dtype))
    plan = launch_linear.plan_16_bit_decode(*w.shape, len(x), sms=sms)
    output = Output(out, bias, residual)
    dev.launch(launch_linear.decode(dev.upload(x), dev.upload(w), output, workspace(plan, dev), plan))
    return out


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bit_decode(dtype):
    rng = np.random.default_rng(6)
    for M, N, K in ((1, 40, 896), (3, 16, 8), (17, 100, 200), (33, 33, 264)):
        x, w = (rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (N, K)))
        assert_close(run_16_bit(x, w), x.astype(np.float64) @ w.astype(np.float64).T, 1e-6)


# ---- what holds for every product of few tokens ----------------------------------------------------------------------


def take(operand, rows):
    """Some tokens of an operand."""
    if isinstance(operand, np.ndarray):
        return operand[rows]
    if isinstance(operand, SimpleNamespace):
        return SimpleNamespace(codes=operand.codes[rows], scale=operand.scale[rows])
    fields = {
        name: value[rows] if isinstance(value, np.ndarray) else value
        for name in operand.__slots__
        for value in [getattr(operand, name)]
    }
    return type(operand)(**fields)


def decode_case(kind, M, N, K, rng):
    """A weight of `kind`, M tokens for it, and how to multiply them."""
    x = (rng.standard_normal((M, K)) * np.exp(rng.standard_normal((M, K)))).astype(BF16)
    if kind == "bf16":
        return x, rng.standard_normal((N, K)).astype(BF16), run_16_bit
    if kind == "w8a16":
        return x, fp8_matrix(rng, N, K, (128, 128)), run_fp8
    if kind == "fp8":
        codes, scale = fp8.quantize_rows(x.astype(np.float32))
        wide = np.pad(codes, ((0, 0), (0, padded(K) - K)))
        return SimpleNamespace(codes=wide, scale=scale), fp8_matrix(rng, N, K, (1, K)), run_fp8
    format, block = {"mxfp4": ("mxfp4", 32), "hif4": ("hif4", 64), "w16": ("nvfp4", 16)}.get(
        kind.split()[0], ("nvfp4", 32)
    )
    matrix = fp4_matrix(rng, N, K, format, block)
    if kind.endswith("w4a16"):
        return x, matrix, run_w4a16
    if kind.endswith("one"):
        return REFERENCE.prepare_fp4(x, format=format), matrix, run_fp4
    return REFERENCE.prepare_sharq(x, format=format), matrix, run_fp4


KINDS = [
    "bf16",
    "w8a16",
    "fp8",
    "w32 w4a16",
    "w16 w4a16",
    "w32 sharq",
    "w16 sharq",
    "mxfp4 sharq",
    "hif4 sharq",
    "w32 one",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_has_the_same_bits_in_every_batch(kind):
    """Alone or with others, in any column, whether K is split over blocks or not, under any schedule."""
    rng = np.random.default_rng(7)
    x, weight, run = decode_case(kind, 37, 40, 704, rng)
    together = run(x, weight)
    for rows in (slice(0, 1), slice(36, 37), slice(4, 13), slice(3, 20)):
        assert (run(take(x, rows), weight) == together[rows]).all()
    for sms in (0, 1):  # a block has all three slices, or two column groups' blocks split them
        assert (run(x, weight, sms=sms) == together).all()
    for schedule in SCHEDULES[1:]:
        some = slice(2, 7)
        assert (run(take(x, some), weight, dev=device(schedule=schedule)) == together[some]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_checked(kind):
    rng = np.random.default_rng(8)
    x, weight, run = decode_case(kind, 5, 20, 320, rng)
    assert (run(x, weight, dev=device(checked=True)) == run(x, weight)).all()
    assert (run(x, weight, dev=device(checked=True), sms=0) == run(x, weight)).all()  # slice after slice in a block


@pytest.mark.parametrize("kind", ["bf16", "w32 sharq", "w16 w4a16"])
@pytest.mark.parametrize("out_dtype", [F32, F16, BF16], ids=str)
def test_bias_residual_and_one_rounding(kind, out_dtype):
    rng = np.random.default_rng(9)
    x, weight, run = decode_case(kind, 3, 24, 320, rng)
    y = run(x, weight)
    bias = (rng.standard_normal(24) * 50).astype(np.float32)
    residual = (rng.standard_normal((3, 24)) * 50).astype(out_dtype)
    expected = ((y + bias) + residual.astype(np.float32)).astype(out_dtype)
    in_place = device().upload(residual)
    assert (run(x, weight, out_dtype=out_dtype, bias=bias, residual=in_place) == expected).all()


# ---- many tokens -----------------------------------------------------------------------------------------------------


def tile_16_bit(x, w, *, out_dtype=F32, bias=None, residual=None, dev=None, sms=1):
    dev = dev or device()
    out = dev.empty((len(x), len(w)), np.dtype(out_dtype))
    plan = launch_linear.plan_tile(len(x), len(w), copied_weight=True, sms=sms)
    dev.launch(launch_linear.tile(dev.upload(x), dev.upload(w), Output(out, bias, residual), plan))
    return out


def tile_w4a16(x, matrix, *, out_dtype=F32, bias=None, residual=None, dev=None, sms=1):
    dev = dev or device()
    weight = weight_layout.pack_fp4([matrix]).on(dev.upload)
    out = dev.empty((len(x), matrix.rows), np.dtype(out_dtype))
    plan = launch_linear.plan_tile(len(x), matrix.rows, copied_weight=False, sms=sms)
    dev.launch(launch_linear.w4a16_tile(dev.upload(x), weight, Output(out, bias, residual), plan))
    return out


def tile_fp4(operand, matrix, *, kind=None, out_dtype=F32, bias=None, residual=None, dev=None, sms=1):
    """kind: what of the operand; all of it unless given."""
    dev = dev or device()
    weight = weight_layout.pack_fp4([matrix]).on(dev.upload)
    if kind is None:
        kind = "one" if isinstance(operand, Fp4Matrix) else "sparse_and_dense" if operand.sparse else "two"
    M = len(operand.g)
    out = dev.empty((M, matrix.rows), np.dtype(out_dtype))
    plan = launch_linear.plan_tile(M, matrix.rows, kind, copied_weight=False, sms=sms)
    dev.launch(launch_linear.fp4_tile(expanded(operand, weight, kind, dev), weight, Output(out, bias, residual), plan))
    return out


def expanded(operand, weight, kind, dev, fragments=False):
    shapes = launch_linear.expanded_shapes(kind, len(operand.g), operand.K)
    arrays = {name: dev.empty(*shape) for name, shape in shapes.items()}
    made = launch_linear.Expanded(kind, fragments, operand.g, **arrays)
    for launch in launch_linear.expand(device_operand(operand, dev), weight, made):
        dev.launch(launch)
    return made


def wgmma(x, weight, *, kind=None, checked=False, schedule=SCHEDULES[0]):
    """x rows or an FP4 operand, of which `kind`, or all; weight [N, K] bf16 or FP4."""
    dev = device("sm_90a", checked, schedule)
    N = len(weight) if isinstance(weight, np.ndarray) else weight.rows
    out = dev.empty((len(x) if isinstance(x, np.ndarray) else len(x.g), N), F32)
    if isinstance(weight, np.ndarray):
        launch = launch_linear.wgmma(dev.upload(x), dev.upload(weight), Output(out))
    else:
        units = weight_layout.pack_fp4([weight]).on(dev.upload)
        if isinstance(x, np.ndarray):
            launch = launch_linear.w4a16_wgmma(dev.upload(x), units, Output(out))
        else:
            if kind is None:
                kind = "one" if isinstance(x, Fp4Matrix) else "sparse_and_dense" if x.sparse else "two"
            launch = launch_linear.fp4_wgmma(expanded(x, units, kind, dev, True), units, Output(out))
    dev.launch(launch)
    return out


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_16_bit_tile(dtype, arch):
    rng = np.random.default_rng(10)
    for M, N, K in ((70, 130, 200), (3, 16, 8), (130, 40, 896)):
        x, w = (rng.standard_normal(shape).astype(dtype) for shape in ((M, K), (N, K)))
        # A tensor core truncates each sum of 8 or 16 products, up to 256 k in a row
        y = tile_16_bit(x, w, dev=device(arch))
        assert_close(y, x.astype(np.float64) @ w.astype(np.float64).T, 4e-6 if arch == "sm_80" else 2e-6)


@each_format
def test_w4a16_tile(format, block):
    rng = np.random.default_rng(11)
    for M, N, K in ((70, 130, 192), (3, 16, 64), (130, 40, 832)):
        matrix = fp4_matrix(rng, N, K, format, block)
        for dtype in (BF16, F16) if format == "nvfp4" else (BF16,):
            x = rng.standard_normal((M, K)).astype(dtype)
            assert_close(tile_w4a16(x, matrix), x.astype(np.float64) @ dequantized(matrix).T, 2e-6)


@each_format
@pytest.mark.parametrize("kind", ["sparse", "dense", "one path"])
def test_fp4_tile(format, block, kind):
    rng = np.random.default_rng(12)
    for M, N, K in ((70, 130, 192), (3, 16, 64), (130, 40, 832)):
        matrix = fp4_matrix(rng, N, K, format, block)
        x = (rng.standard_normal((M, K)) * np.exp(rng.standard_normal((M, K)))).astype(BF16)
        if kind == "one path":
            operand = REFERENCE.prepare_fp4(x, format=format)
        else:
            operand = REFERENCE.prepare_sharq(x, format=format, sparse=kind == "sparse")
        assert_close(tile_fp4(operand, matrix), exact(operand, matrix), 2e-6)


@each_format
@pytest.mark.parametrize("multiply", [tile_fp4, wgmma], ids=["tile", "wgmma"])
def test_separate_sparse_and_dense_products_add_up(format, block, multiply):
    """What the paper describes, two products over one weight, against the fused one and float64."""
    rng = np.random.default_rng(13)
    matrix = fp4_matrix(rng, 140, 320, format, block)
    operand = REFERENCE.prepare_sharq(rng.standard_normal((20, 320)).astype(BF16), format=format)
    sparse, dense = (multiply(operand, matrix, kind=kind) for kind in ("sparse", "one"))
    backbone, residual = paths(operand)
    assert_close(sparse, exact(backbone, matrix), 2e-6)
    assert_close(dense, exact(residual, matrix), 2e-6)
    assert_close(sparse + dense, multiply(operand, matrix).astype(np.float64), 2e-6)


def tile_case(kind, M, N, K, rng):
    x, weight, run = decode_case(kind, M, N, K, rng)
    return x, weight, {run_16_bit: tile_16_bit, run_w4a16: tile_w4a16, run_fp4: tile_fp4}[run]


TILE_KINDS = ["bf16", "w32 w4a16", "w32 sharq", "w16 sharq", "mxfp4 one", "hif4 sharq"]


@pytest.mark.parametrize("kind", TILE_KINDS)
def test_a_token_has_the_same_bits_in_every_tile(kind):
    """Alone or with others, in blocks of 64 or 128 tokens, under any schedule."""
    rng = np.random.default_rng(14)
    x, weight, run = tile_case(kind, 150, 40, 320, rng)
    together = run(x, weight)
    assert (run(x, weight, sms=132) == together).all()  # blocks of 64
    for rows in (slice(0, 1), slice(149, 150), slice(60, 133)):
        assert (run(take(x, rows), weight) == together[rows]).all()
    for schedule in SCHEDULES[1:]:
        some = slice(2, 20)
        assert (run(take(x, some), weight, dev=device(schedule=schedule)) == together[some]).all()


@pytest.mark.parametrize("kind", ["bf16", "w32 sharq"])
def test_checked_tile(kind):
    rng = np.random.default_rng(15)
    x, weight, run = tile_case(kind, 20, 130, 320, rng)
    assert (run(x, weight, dev=device(checked=True)) == run(x, weight)).all()


@pytest.mark.parametrize("kind", ["bf16", "w32 sharq"])
def test_bias_and_residual_of_a_tile(kind):
    rng = np.random.default_rng(16)
    x, weight, run = tile_case(kind, 3, 24, 320, rng)
    bias, residual = rng.standard_normal(24).astype(np.float32), rng.standard_normal((3, 24)).astype(BF16)
    expected = ((run(x, weight) + bias) + residual.astype(np.float32)).astype(BF16)
    assert (run(x, weight, out_dtype=BF16, bias=bias, residual=device().upload(residual)) == expected).all()


# Narrow tiles, and one wide (N of 4096 and more): a few K, since the emulator takes 0.2 ms for a wgmma.
WGMMA_SHAPES = [(130, 200, 200), (3, 16, 64), (20, 4104, 72)]


@pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
def test_bf16_wgmma(checked):
    rng = np.random.default_rng(17)
    for M, N, K in WGMMA_SHAPES:
        x, w = (rng.standard_normal(shape).astype(BF16) for shape in ((M, K), (N, K)))
        assert_close(wgmma(x, w, checked=checked), x.astype(np.float64) @ w.astype(np.float64).T, 2e-6)


@each_format
def test_fp4_wgmma(format, block):
    """W4A16 with wide and narrow tiles, FP4 activations in one path, in two dense ones, and SharQ's with its backbone
    sparse."""
    rng = np.random.default_rng(18)
    for M, N, K in ((130, 150, 704), (3, 4104, 64)):
        matrix = fp4_matrix(rng, N, K, format, block)
        x = (rng.standard_normal((M, K)) * np.exp(rng.standard_normal((M, K)))).astype(BF16)
        assert_close(wgmma(x, matrix), x.astype(np.float64) @ dequantized(matrix).T, 2e-6)
        sharq = (REFERENCE.prepare_sharq(x, format=format, sparse=sparse) for sparse in (True, False))
        for operand in (REFERENCE.prepare_fp4(x, format=format), *sharq):
            assert_close(wgmma(operand, matrix), exact(operand, matrix), 2e-6)


@each_format
def test_checked_sharq_wgmma(format, block):
    """Two blocks of tokens, two slices of K, tails in M, N and K: nothing raced for, nothing overwritten in use."""
    rng = np.random.default_rng(23)
    matrix = fp4_matrix(rng, 20, 320, format, block)
    operand = REFERENCE.prepare_sharq(rng.standard_normal((131, 320)).astype(BF16), format=format)
    y = wgmma(operand, matrix, checked=True, schedule=SCHEDULES[1])
    assert (y == wgmma(operand, matrix)).all()


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_token_has_the_same_bits_in_every_wgmma(sparse):
    rng = np.random.default_rng(19)
    matrix = fp4_matrix(rng, 40, 320, "nvfp4", 32)
    operand = REFERENCE.prepare_sharq(rng.standard_normal((140, 320)).astype(BF16), sparse=sparse)
    together = wgmma(operand, matrix)
    for rows in (slice(0, 1), slice(139, 140), slice(60, 133)):
        assert (wgmma(take(operand, rows), matrix) == together[rows]).all()
    for schedule in SCHEDULES[1:]:
        assert (wgmma(operand, matrix, schedule=schedule) == together).all()


def many_fp8(x, matrix, *, arch="sm_90", checked=False):
    """w8a16 of x or, of an operand, w8a8: tiles of mma.sync, or wgmma on sm_90a."""
    dev = device(arch, checked)
    weight = weight_layout.pack_fp8([matrix]).on(dev.upload)
    token_scale = None
    if isinstance(x, SimpleNamespace):
        wide = dev.empty(x.codes.shape, BF16)
        dev.launch(launch_linear.expand_fp8(dev.upload(x.codes), wide))
        x, token_scale = wide, x.scale
    out = dev.empty((len(x), matrix.rows), F32)
    if arch == "sm_90a":
        dev.launch(launch_linear.w8a16_wgmma(dev.upload(x), weight, Output(out), token_scale))
        return out
    plan = launch_linear.plan_tile(len(x), matrix.rows, copied_weight=False, sms=1)
    dev.launch(launch_linear.w8a16_tile(dev.upload(x), weight, Output(out), plan, token_scale))
    return out


@pytest.mark.parametrize("arch", ["sm_90", "sm_90a"])
def test_fp8_of_many_tokens(arch):
    rng = np.random.default_rng(20)
    for M, N, K, tile in [(70, 140, 192, (1, 192)), (3, 16, 72, (16, 72)), (130, 40, 704, (128, 128))]:
        matrix = fp8_matrix(rng, N, K, tile)
        for dtype in (BF16, F16) if arch == "sm_90" else (BF16,):
            x = rng.standard_normal((M, K)).astype(dtype)
            y = many_fp8(x, matrix, arch=arch)
            assert_close(y, x.astype(np.float64) @ fp8_values(matrix).T, 2e-6)
        codes, scale = fp8.quantize_rows(rng.standard_normal((M, K)).astype(np.float32))
        operand = SimpleNamespace(codes=np.pad(codes, ((0, 0), (0, padded(K) - K))), scale=scale)
        values = fp8.decode(codes).astype(np.float64) * scale[:, None]
        assert_close(many_fp8(operand, matrix, arch=arch), values @ fp8_values(matrix).T, 2e-6)


def test_what_products_refuse():
    rng = np.random.default_rng(21)
    matrix = fp4_matrix(rng, 16, 64, "mxfp4", 32)
    with pytest.raises(InvalidArgument, match="one format, K and block"):
        weight_layout.pack_fp4([matrix, fp4_matrix(rng, 16, 64, "nvfp4", 32)])
    with pytest.raises(InvalidArgument, match="128 k or for all of K"):
        weight_layout.pack_fp8([fp8_matrix(rng, 16, 256, (16, 64))])
    with pytest.raises(InvalidArgument, match="multiple of 8"):
        run_16_bit(np.zeros((1, 12), BF16), np.zeros((16, 12), BF16))
    with pytest.raises(InvalidArgument, match="w4a16_decode"):
        tile_w4a16(np.zeros((1, 64), F16), matrix)
