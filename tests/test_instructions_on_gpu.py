"""The emulator's instruction models against the GPU they model, bit for bit: the same probes, the same registers.

Runs where CuPy finds a GPU. A difference here means that the model is wrong, not the GPU: fragment layouts, metadata
maps, scale selectors and rounding are then to be corrected in cuda/emulate/, and their notes on how sure they are with
them. Not yet run on any GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fragments import LEGAL_NIBBLES
from numpy.typing import NDArray
from ptx_probes import PROBES, probe

from engine.errors import DeviceError
from engine.ops.gpu.compile import cubin
from engine.ops.gpu.cuda_device import CudaDevice

Array = NDArray[Any]
Rng = np.random.Generator
CASES = 256  # warps per probe


@functools.cache
def gpu() -> tuple[str, Any] | str:
    """(architecture, the probes' module), or why there is none."""
    try:
        device = CudaDevice()
    except DeviceError as error:
        return str(error)
    import cupy

    return device.arch, cupy.RawModule(path=str(cubin(PROBES, device.arch)))


def on_gpu(kernel: str, grid: int, block: int, shared: int, args: list[Any]) -> list[Any]:
    """The arguments as the kernel leaves them."""
    import cupy

    found = gpu()
    assert not isinstance(found, str)
    function = found[1].get_function(kernel)
    held = [cupy.asarray(x.view(np.uint8)) if isinstance(x, np.ndarray) else x for x in args]
    function((grid,), (block,), tuple(held), shared_mem=shared)
    pairs = zip(args, held, strict=True)
    return [cupy.asnumpy(h).view(a.dtype).reshape(a.shape) if isinstance(a, np.ndarray) else a for a, h in pairs]


def words(rng: Rng, registers: int) -> Array:
    return rng.integers(0, 2**32, (CASES, 32, registers), np.uint32)


def reals(rng: Rng, registers: int, dtype: type, spread: int) -> Array:
    """Values over `spread` binades as registers, a tenth of them zero, a few subnormal."""
    count = 32 // np.dtype(dtype).itemsize // 8
    shape = (CASES, 32, registers * count)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, 1, shape)
    x[rng.random(shape) < 0.1] = 0
    x = np.where(rng.random(shape) < 0.03, float(ml_dtypes.finfo(dtype).tiny) * rng.random(shape), x)
    return np.ascontiguousarray(x.astype(dtype)).view(np.uint32)


def sums(rng: Rng) -> Array:
    return (rng.standard_normal((CASES, 32, 4)) * 2.0 ** rng.integers(-30, 10, (CASES, 32, 4))).astype(np.float32)


def counts(rng: Rng) -> Array:
    return rng.integers(-(2**31), 2**31, (CASES, 32, 4)).astype(np.int32)


def metadata(rng: Rng) -> Array:
    """Legal nibbles in every lane."""
    nibbles = rng.choice(LEGAL_NIBBLES, (CASES, 32, 8)).astype(np.uint32)
    return np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), axis=2)


def scales(rng: Rng, lowest: int, highest: int) -> Array:
    return np.ascontiguousarray(rng.integers(lowest, highest, (CASES, 32, 4)).astype(np.uint8)).view(np.uint32)


Operands = Callable[[Rng], list[Array]]


@dataclass(frozen=True)
class Probe:
    kernel: str
    operands: Operands
    arch: str = ""  # only there; "": everywhere


def floats(kernel: str, dtype: type, spread: int, a: int, b: int, arch: str = "") -> Probe:
    return Probe(kernel, lambda rng: [reals(rng, a, dtype, spread), reals(rng, b, dtype, spread), sums(rng)], arch)


def sparse_floats(kernel: str, dtype: type, spread: int) -> Probe:
    return Probe(kernel, lambda rng: [*(reals(rng, 4, dtype, spread) for _ in "ab"), metadata(rng), sums(rng)])


def fp4(kernel: str, scale_range: tuple[int, int], sparse: bool) -> Probe:
    def operands(rng: Rng) -> list[Array]:
        a_and_b = [words(rng, 4), words(rng, 4 if sparse else 2)]
        return [*a_and_b, *([metadata(rng)] if sparse else []), *(scales(rng, *scale_range) for _ in "ab"), sums(rng)]

    return Probe(kernel, operands, "sm_120a")


BF16, F16, E4M3 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn
PRODUCTS = [
    floats("mma_bf16", BF16, 20, 4, 2),
    floats("mma_f16", F16, 10, 4, 2),
    floats("mma_e4m3", E4M3, 6, 4, 2),
    Probe("mma_s8_k16", lambda rng: [words(rng, 2), words(rng, 1), counts(rng)]),
    Probe("mma_s8_k32", lambda rng: [words(rng, 4), words(rng, 2), counts(rng)]),
    *(sparse_floats(f"mma_sp_bf16_{selector}", BF16, 20) for selector in (0, 1)),
    *(sparse_floats(f"mma_sp_f16_{selector}", F16, 10) for selector in (0, 1)),
    Probe("mma_sp_s8_k32_0", lambda rng: [words(rng, 2), words(rng, 2), metadata(rng), counts(rng)]),
    Probe("mma_sp_s8_k32_1", lambda rng: [words(rng, 2), words(rng, 2), metadata(rng), counts(rng)]),
    Probe("mma_sp_s8_k64", lambda rng: [words(rng, 4), words(rng, 4), metadata(rng), counts(rng)]),
    fp4("nvfp4", (0, 256), False),
    fp4("nvfp4_threads_13", (0x20, 0x50), False),
    fp4("mxfp4", (110, 145), False),
    fp4("mxfp4_bytes_20_threads_12", (110, 145), False),
    fp4("mxfp4_bytes_02_threads_01", (110, 145), False),
    fp4("sparse_nvfp4", (0, 256), True),
    fp4("sparse_nvfp4_threads_12", (0x20, 0x50), True),
    fp4("sparse_mxfp4", (110, 145), True),
    fp4("sparse_mxfp4_bytes_22_threads_13", (110, 145), True),
]


def both(kernel: str, grid: int, block: int, shared: int, args: list[Any], arch: str = "") -> None:
    """Runs on GPU and emulator; the last argument must come out the same. Skips where that cannot be."""
    found = gpu()
    if isinstance(found, str):
        pytest.skip(found)
    emulated = probe(found[0])
    if kernel not in emulated.kernels or (arch and arch != found[0]):
        pytest.skip(f"{found[0]} has no such instruction")
    there = on_gpu(kernel, grid, block, shared, args)
    here = [x.copy() if isinstance(x, np.ndarray) else x for x in args]
    emulated.launch(kernel, (grid, 1, 1), (block, 1, 1), shared, here)
    np.testing.assert_array_equal(here[-1].view(np.uint8), there[-1].view(np.uint8))


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.kernel)
def test_products(case: Probe) -> None:
    both(case.kernel, CASES, 32, 0, case.operands(np.random.default_rng(1)), case.arch)


@pytest.mark.parametrize("transposed", ["", "_trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, transposed: str) -> None:
    rng = np.random.default_rng(2)
    rows = rng.permutation(64)[:32].astype(np.int32)
    args = [rng.integers(0, 256, 1024).astype(np.uint8), rows, np.zeros((32, count), np.uint32)]
    both(f"ldmatrix_x{count}{transposed}", 1, 32, 0, args)


@pytest.mark.parametrize(
    ("kernel", "per_thread", "out"),
    [("to_e4m3", 2, np.uint16), ("to_ue8m0", 2, np.uint16), ("to_e2m1", 8, np.uint32)],
)
def test_conversions_of_any_bits(kernel: str, per_thread: int, out: type) -> None:
    """fp32 of random bits: infinities and NaNs among them."""
    bits = np.random.default_rng(3).integers(0, 2**32, 64 * 32 * per_thread, np.uint32)
    both(kernel, 64, 32, 0, [bits.view(np.float32), np.zeros(64 * 32, out)])


def test_reciprocals() -> None:
    """To two units in the last place, which silu_mul corrects, and E2M1 codes want far less than."""
    if isinstance(found := gpu(), str):
        pytest.skip(found)
    rng = np.random.default_rng(4)
    x = ((1 + rng.random(64 * 32)) * 2.0 ** rng.integers(-120, 120, 64 * 32)).astype(np.float32)
    _, there = on_gpu("reciprocals", 64, 32, 0, [x, np.zeros_like(x)])
    assert np.abs(there.astype(np.float64) * x - 1).max() <= 2.0**-22


@pytest.mark.parametrize("n", [64, 128, 256])
def test_wgmma_rounding(n: int) -> None:
    """Without swizzle: A's 64 × 16 in 8 × 8 blocks, then B's n × 16; any values will do, so the image is random."""
    rng = np.random.default_rng(n)
    image = (rng.standard_normal((64 + n) * 16) * 2.0 ** rng.integers(-12, 1, (64 + n) * 16)).astype(BF16)
    descriptor = 128 >> 4 << 16 | 256 >> 4 << 32  # halves of k next to each other, groups of 8 rows 256 bytes apart
    c = rng.standard_normal((128, n // 2)).astype(np.float32)
    args = [image.view(np.uint8), np.int32(image.nbytes), np.uint64(descriptor), np.uint64(descriptor | 2048 >> 4), c]
    both(f"wgmma_{n}_kk", 1, 128, image.nbytes, args)


@pytest.mark.parametrize("registers", ["", "_registers"])
@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_wgmma(selector: int, registers: str) -> None:
    """A's kept 64 × 16, B's 128 × 32, both without swizzle, and metadata of each case and lane: map and rounding."""
    rng = np.random.default_rng(selector)
    image = (rng.standard_normal(64 * 16 + 128 * 32) * 2.0 ** rng.integers(-12, 1, 64 * 16 + 128 * 32)).astype(BF16)
    a, b = 128 >> 4 << 16 | 256 >> 4 << 32, 128 >> 4 << 16 | 512 >> 4 << 32 | 2048 >> 4
    cases = CASES // 8
    words = metadata(rng)[: 4 * cases].reshape(cases, 128)
    c = (rng.standard_normal((cases, 128, 64)) * 2.0 ** rng.integers(-20, 4, (cases, 128, 64))).astype(np.float32)
    of_a = reals(rng, 4, BF16, 12)[: 4 * cases].reshape(cases, 128, 4) if registers else np.uint64(a)
    args = [image.view(np.uint8), np.int32(image.nbytes), of_a, np.uint64(b), words, c]
    both(f"wgmma_sp_128{registers}_{selector}", cases, 128, image.nbytes, args)
