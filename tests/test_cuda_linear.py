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
from engine.fp4_types import BLOCKS, Fp4Matrix
from engine.ops.fp4 import blocks, product
from engine.ops.fp4.elements import pack
from engine.ops.gpu import launch_linear, weight_layout
from engine.ops.gpu.device import EmulatedDevice
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule
from engine.ops.gpu.launch_linear import Output, Workspace
from engine.ops.gpu.launch_rows import padded
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
    return Workspace(dev.empty((max(1, plan.partials),), F32), dev.zeros((max(1, plan.arrivals),), np.dtype(np.uint32)))


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
    plan = launch_linear.plan_fp4_decode(weight, len(x), launch_linear.type_name(x.dtype), sms=sms)
    output = Output(out, bias, residual)
    dev.launch(launch_linear.w4a16_decode(x, weight, output, workspace(plan, dev), sms))
    return out


def run_fp4(operand, matrix, *, out_dtype=None, bias=None, residual=None, dev=None, sms=132):
    dev = dev or device()
    weight = weight_layout.pack_fp4([matrix]).on(dev.upload)
    T = len(operand.g)
    out = dev.empty((T, matrix.rows), np.dtype(out_dtype or F32))
    paths = 1 if isinstance(operand, Fp4Matrix) else 2
    plan = launch_linear.plan_fp4_decode(weight, T, "fp4", paths=paths, sms=sms)
    work = workspace(plan, dev)
    launch = launch_linear.fp4_decode(device_operand(operand, dev), weight, Output(out, bias, residual), work, sms)
    dev.launch(launch)
    assert not work.arrivals.any()
    return out


def exact(operand, matrix):
    """float64 product, both paths."""
    from engine.ops.fp4.split import paths

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
