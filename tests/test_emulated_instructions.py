"""Matrix products on the emulator against independent statements of them.

Fragment layouts, scale selectors and metadata maps: full matrices are scattered into registers by the formulas of
fragments.py, the emulated wrapper runs, and the gathered result is compared with an exact matrix product. Rounding:
Python fractions. Nothing here has seen a GPU; what the models rest on is stated in cuda/emulate/ptx.h.
"""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from fragments import (
    A_4,
    A_8,
    A_8_K16,
    A_16,
    B_4,
    B_4_LONG,
    B_8,
    B_8_K16,
    B_8_LONG,
    B_16,
    B_16_LONG,
    LEGAL_NIBBLES,
    Fragment,
    accumulator,
    metadata_16,
    metadata_halves,
    metadata_s8_k32,
    picked_k,
    scales_a,
    scales_b,
)
from numpy.typing import NDArray
from ptx_probes import probe

from engine.errors import KernelFault

WARP = (32, 1, 1)
BF16, F16, E4M3, E2M1 = ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
E8M0 = ml_dtypes.float8_e8m0fnu
Array = NDArray[np.generic]


def codes_of(values: Array, dtype: type) -> Array:
    """The bits of `values` in `dtype`, exactly."""
    cast = values.astype(dtype)
    assert (cast.astype(np.float64) == values).all()
    return _bits(cast)


def _bits(cast: Array) -> Array:
    if cast.dtype == np.dtype(E2M1):
        return cast.view(np.uint8) & np.uint8(15)
    return cast.view(np.uint16 if cast.dtype.itemsize == 2 else np.uint8)


def run(arch: str, kernel: str, c: Array, *operands: Array) -> Array:
    """Launches one warp per case; c [cases, 16, 8] in and out."""
    layout = accumulator()
    words = layout.scatter(np.ascontiguousarray(c).view(np.uint32))
    registers = words.view(c.dtype).copy()
    probe(arch).launch(kernel, (len(c), 1, 1), WARP, 0, [*map(np.ascontiguousarray, operands), registers])
    return layout.gather(registers)


# --- Fragment layouts: every single element, and random matrices, exactly ---------------------------------------------

# name, arch, element type, A, B
DENSE = [
    ("mma_bf16", "sm_80", BF16, A_16, B_16),
    ("mma_f16", "sm_80", F16, A_16, B_16),
    ("mma_bf16", "sm_90a", BF16, A_16, B_16),
    ("mma_e4m3", "sm_90a", E4M3, A_8, B_8),
    ("mma_s8_k16", "sm_80", np.int8, A_8_K16, B_8_K16),
    ("mma_s8_k32", "sm_80", np.int8, A_8, B_8),
]


def small(rng: np.random.Generator, dtype: type, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Values that `dtype` holds exactly and whose sums of products fp32 and the models hold exactly."""
    if dtype is np.int8:
        return rng.integers(-128, 128, shape).astype(np.float64)
    return rng.integers(-8, 9, shape).astype(np.float64)


@pytest.mark.parametrize(("name", "arch", "dtype", "a_layout", "b_layout"), DENSE, ids=lambda v: str(v)[:12])
def test_dense_products(name: str, arch: str, dtype: type, a_layout: Fragment, b_layout: Fragment) -> None:
    """Each A element alone against a random B (256 or 512 cases), then random A, with random C."""
    rng = np.random.default_rng(1)
    m, k = a_layout.shape
    a = np.concatenate([np.eye(m * k).reshape(-1, m, k), small(rng, dtype, (8, m, k))])
    b = small(rng, dtype, (len(a), 8, k))
    c = rng.integers(-99, 100, (len(a), 16, 8)).astype(np.int32 if dtype is np.int8 else np.float32)
    out = run(arch, name, c, a_layout.scatter(codes_of(a, dtype)), b_layout.scatter(codes_of(b, dtype)))
    np.testing.assert_array_equal(out, c + a @ b.transpose(0, 2, 1))


def test_s8_sums_wrap() -> None:
    a, b = np.full((1, 16, 32), -128.0), np.full((1, 8, 32), -128.0)
    c = np.full((1, 16, 8), 2**31 - 1, np.int32)
    out = run("sm_80", "mma_s8_k32", c, A_8.scatter(codes_of(a, np.int8)), B_8.scatter(codes_of(b, np.int8)))
    assert (out == -(2**31) + 32 * 128 * 128 - 1).all()


# name, arch, type, A as stored, B, metadata map, k per place of a nibble
def _selected(function: object, selector: int) -> object:
    return lambda nibbles: function(nibbles, selector, 0xFFFFFFFF)  # type: ignore[operator]


SPARSE = [
    ("mma_sp_bf16_0", "sm_80", BF16, A_16, B_16_LONG, _selected(metadata_16, 0)),
    ("mma_sp_bf16_1", "sm_90a", BF16, A_16, B_16_LONG, _selected(metadata_16, 1)),
    ("mma_sp_f16_0", "sm_80", F16, A_16, B_16_LONG, _selected(metadata_16, 0)),
    ("mma_sp_f16_1", "sm_80", F16, A_16, B_16_LONG, _selected(metadata_16, 1)),
    ("mma_sp_s8_k32_0", "sm_80", np.int8, A_8_K16, B_8, _selected(metadata_s8_k32, 0)),
    ("mma_sp_s8_k32_1", "sm_80", np.int8, A_8_K16, B_8, _selected(metadata_s8_k32, 1)),
    ("mma_sp_s8_k64", "sm_80", np.int8, A_8, B_8_LONG, metadata_halves),
]


def expand(a: Array, nibbles: Array, group: int) -> NDArray[np.float64]:
    """The matrix with its zeros: stored [cases, 16, S] -> [cases, 16, 2 S]."""
    full = np.zeros((*a.shape[:2], 2 * a.shape[2]))
    np.put_along_axis(full, picked_k(nibbles, group), a, axis=2)
    return full


def nibble_cases(rng: np.random.Generator, chunks: int) -> Array:
    """Every single nibble changed from 0100 to 1110, then random legal ones."""
    single = np.full((16 * chunks, 16 * chunks), 0b0100, np.uint8)
    np.fill_diagonal(single, 0b1110)
    return np.concatenate([single.reshape(-1, 16, chunks), rng.choice(LEGAL_NIBBLES, (16, 16, chunks))])


@pytest.mark.parametrize(("name", "arch", "dtype", "a_layout", "b_layout", "words"), SPARSE, ids=lambda v: str(v)[:16])
def test_sparse_products(
    name: str, arch: str, dtype: type, a_layout: Fragment, b_layout: Fragment, words: object
) -> None:
    """Each metadata nibble alone, then random ones; lanes that are not selected hold illegal words."""
    rng = np.random.default_rng(2)
    nibbles = nibble_cases(rng, a_layout.shape[1] // 2)
    a = small(rng, dtype, (len(nibbles), *a_layout.shape))
    b = small(rng, dtype, (len(nibbles), *b_layout.shape))
    c = rng.integers(-99, 100, (len(a), 16, 8)).astype(np.int32 if dtype is np.int8 else np.float32)
    a_words, b_words = a_layout.scatter(codes_of(a, dtype)), b_layout.scatter(codes_of(b, dtype))
    out = run(arch, name, c, a_words, b_words, words(nibbles))  # type: ignore[operator]
    np.testing.assert_array_equal(out, c + expand(a, nibbles, 1) @ b.transpose(0, 2, 1))


@pytest.mark.parametrize("nibble", [0b0000, 0b0001, 0b0101, 0b0110, 0b1111, 0b1011])
def test_illegal_metadata_is_an_error(nibble: int) -> None:
    nibbles = np.full((1, 16, 8), 0b0100, np.uint8)
    nibbles[0, 11, 6] = nibble
    zero = np.zeros((1, 32, 4), np.uint32)
    with pytest.raises(KernelFault, match="metadata nibble"):
        run("sm_80", "mma_sp_bf16_0", np.zeros((1, 16, 8), np.float32), zero, zero, metadata_16(nibbles, 0, 0))


# --- Block-scaled FP4 -------------------------------------------------------------------------------------------------

# kernel, sparse, scale type, scales per row, (byte a, byte b), (thread a, thread b)
SCALED = [
    ("nvfp4", False, "ue4m3", 4, (0, 0), (0, 0)),
    ("nvfp4_threads_13", False, "ue4m3", 4, (0, 0), (1, 3)),
    ("mxfp4", False, "ue8m0", 2, (0, 0), (0, 0)),
    ("mxfp4_bytes_20_threads_12", False, "ue8m0", 2, (2, 0), (1, 2)),
    ("mxfp4_bytes_02_threads_01", False, "ue8m0", 2, (0, 2), (0, 1)),
    ("sparse_nvfp4", True, "ue4m3", 4, (0, 0), (0, 0)),
    ("sparse_nvfp4_threads_12", True, "ue4m3", 4, (0, 0), (1, 2)),
    ("sparse_mxfp4", True, "ue8m0", 2, (0, 0), (0, 0)),
    ("sparse_mxfp4_bytes_22_threads_13", True, "ue8m0", 2, (2, 2), (1, 3)),
]
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def scale_values(kind: str, codes: Array) -> NDArray[np.float64]:
    return codes.view(E4M3 if kind == "ue4m3" else E8M0).astype(np.float64)


class Fp4Case:
    """Codes, scale bytes and metadata of many products of one kernel, and their exact result."""

    def __init__(self, spec: tuple, cases: int, rng: np.random.Generator) -> None:
        self.kernel, self.sparse, self.kind, self.count, self.bytes, self.threads = spec
        self.k = 128 if self.sparse else 64
        self.a = rng.integers(0, 16, (cases, 16, 64)).astype(np.uint8)
        self.b = rng.integers(0, 16, (cases, 8, self.k)).astype(np.uint8)
        one = 0x38 if self.kind == "ue4m3" else 127
        self.sa = np.full((cases, 16, self.count), one, np.uint8)
        self.sb = np.full((cases, 8, self.count), one, np.uint8)
        self.nibbles = rng.choice(LEGAL_NIBBLES, (cases, 16, 16)) if self.sparse else None
        self.c = rng.integers(-99, 100, (cases, 16, 8)).astype(np.float32)

    def full_a(self) -> NDArray[np.float64]:
        values = E2M1_VALUES[self.a]
        return expand(values, self.nibbles, 2) if self.nibbles is not None else values

    def scaled(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        repeat = self.k // self.count
        a = self.full_a() * np.repeat(scale_values(self.kind, self.sa), repeat, axis=2)
        b = E2M1_VALUES[self.b] * np.repeat(scale_values(self.kind, self.sb), repeat, axis=2)
        return a, b

    def run(self) -> Array:
        nan = 0x7F if self.kind == "ue4m3" else 0xFF  # in every byte that nobody should read
        operands = [A_4.scatter(self.a), (B_4_LONG if self.sparse else B_4).scatter(self.b)]
        if self.nibbles is not None:
            operands.append(metadata_halves(self.nibbles))
        operands.append(scales_a(self.sa, self.bytes[0], self.threads[0], nan))
        operands.append(scales_b(self.sb, self.bytes[1], self.threads[1], nan))
        return run("sm_120a", self.kernel, self.c, *operands)


@pytest.mark.parametrize("spec", SCALED, ids=lambda s: s[0])
def test_fp4_fragments_and_scale_bytes(spec: tuple) -> None:
    """Every scale byte alone doubled or quartered, every metadata nibble alone, single elements of A and B: exact."""
    rng = np.random.default_rng(3)
    sparse, count = spec[1], spec[3]
    case = Fp4Case(spec, 24 * count + 64 + (256 if sparse else 0), rng)
    one = case.sa[0, 0, 0]
    up = one + (8 if spec[2] == "ue4m3" else 1), one + (16 if spec[2] == "ue4m3" else 2)
    for i in range(16 * count):
        case.sa[i].reshape(-1)[i] = up[0]
    for i in range(8 * count):
        case.sb[16 * count + i].reshape(-1)[i] = up[1]
    lone = slice(24 * count, 24 * count + 64)  # one element of A, and the column of B it meets
    places = rng.integers(0, 16 * 64, 64)
    case.a[lone] = 0
    np.put_along_axis(case.a[lone].reshape(64, -1), places[:, None], 2, axis=1)
    if case.nibbles is not None:
        case.nibbles[-256:] = nibble_cases(rng, 16)[:256]
    a, b = case.scaled()
    np.testing.assert_array_equal(case.run(), case.c + a @ b.transpose(0, 2, 1))


# --- Rounding, by fractions -------------------------------------------------------------------------------------------


def exponent_of(x: Fraction) -> int:
    """floor(log2 |x|)."""
    n, d = abs(x.numerator), x.denominator
    e = n.bit_length() - d.bit_length()
    return e if Fraction(n, d) >= Fraction(2) ** e else e - 1


def toward_zero(x: Fraction, exponent: int) -> Fraction:
    """x as a multiple of 2^exponent."""
    unit = Fraction(2) ** exponent
    n = abs(x) / unit
    return (n.numerator // n.denominator) * unit * (1 if x >= 0 else -1)


def to_fp32_toward_zero(x: Fraction, mantissa: int = 23) -> float:
    if x == 0:
        return 0.0
    e = max(exponent_of(x), -126)
    value = toward_zero(x, e - mantissa)
    return float("inf") * (1 if x > 0 else -1) if abs(value) >= Fraction(2) ** 128 else float(value)


def fused(a: Array, b: Array, c: float, minimum: int, bits: int, step: int, mantissa: int = 23) -> float:
    """MMA-Sim's fused step: addends truncated `bits` below the largest exponent, exact sum, truncated to fp32.

    `minimum` is the smallest normal exponent of the operands' type: a subnormal counts with it.
    """
    total = c
    for begin in range(0, len(a), step):
        addends = []
        for x, y in zip(a[begin : begin + step], b[begin : begin + step], strict=True):
            fx, fy = Fraction(float(x)), Fraction(float(y))
            if fx * fy:
                addends.append((fx * fy, max(exponent_of(fx), minimum) + max(exponent_of(fy), minimum)))
        fc = Fraction(total)
        if fc:
            addends.append((fc, max(exponent_of(fc), -126)))
        top = max([e for _, e in addends], default=-126)
        top = max(top, -126)
        total = to_fp32_toward_zero(sum((toward_zero(v, top - bits) for v, _ in addends), Fraction(0)), mantissa)
    return total


def wide(rng: np.random.Generator, dtype: type, shape: tuple[int, ...], spread: int) -> Array:
    """Random values over `spread` binades, some zero, some subnormal, in `dtype`."""
    info = ml_dtypes.finfo(dtype)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-spread, spread // 4 + 1, shape)
    x[rng.random(shape) < 0.1] = 0
    x = np.where(rng.random(shape) < 0.05, float(info.tiny) * rng.random(shape), x)
    return np.clip(x, -float(info.max), float(info.max)).astype(dtype)


# name, arch, type, A, B, smallest normal exponent, bits below the top, products per step, mantissa kept
ROUNDING = [
    ("mma_bf16", "sm_80", BF16, A_16, B_16, -126, 24, 8, 23),
    ("mma_bf16", "sm_89", BF16, A_16, B_16, -126, 24, 8, 23),
    ("mma_bf16", "sm_90a", BF16, A_16, B_16, -126, 25, 16, 23),
    ("mma_f16", "sm_80", F16, A_16, B_16, -14, 24, 8, 23),
    ("mma_f16", "sm_90a", F16, A_16, B_16, -14, 25, 16, 23),
    ("mma_e4m3", "sm_89", E4M3, A_8, B_8, -6, 13, 16, 13),
    ("mma_e4m3", "sm_90a", E4M3, A_8, B_8, -6, 25, 32, 23),
]


@pytest.mark.parametrize(
    ("name", "arch", "dtype", "a_layout", "b_layout", "minimum", "bits", "step", "mantissa"),
    ROUNDING,
    ids=lambda v: str(v)[:12],
)
def test_accumulation_rounds_as_stated(
    name: str, arch: str, dtype: type, a_layout: Fragment, b_layout: Fragment, minimum: int, bits: int, step: int,
    mantissa: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(4)
    spread = {BF16: 20, F16: 10, E4M3: 6}[dtype]
    a, b = wide(rng, dtype, (4, *a_layout.shape), spread), wide(rng, dtype, (4, *b_layout.shape), spread)
    c = (rng.standard_normal((4, 16, 8)) * 2.0 ** rng.integers(-30, 12, (4, 16, 8))).astype(np.float32)
    b[1, :, 1::2], a[1, :, 1::2] = b[1, :, ::2], -a[1, :, ::2]  # everything cancels but C
    c[1, ::2] = 0
    c[2] *= np.float32(2.0**60)  # a big C swallows the products
    c[3] = np.float32(1e-45) * rng.integers(-5, 6, (16, 8))  # subnormal C
    out = run(arch, name, c, a_layout.scatter(_bits(a)), b_layout.scatter(_bits(b)))
    for case in range(4):
        for i, j in zip(rng.integers(0, 16, 40), rng.integers(0, 8, 40), strict=True):
            expected = fused(a[case, i], b[case, j], float(c[case, i, j]), minimum, bits, step, mantissa)
            assert out[case, i, j] == expected, (case, i, j)


def test_infinities_and_nans_follow_ieee() -> None:
    """And leave every other element of the tile as it is."""
    rng = np.random.default_rng(5)
    inf, nan = np.inf, np.nan
    a = wide(rng, BF16, (6, 16, 16), 4)
    b = wide(rng, BF16, (6, 8, 16), 4)
    c = rng.standard_normal((6, 16, 8)).astype(np.float32)
    plain = run("sm_90a", "mma_bf16", c, A_16.scatter(_bits(a)), B_16.scatter(_bits(b)))
    b[:, 2, 3] = 1
    a[0, 5, 3], b[1, 2, 3], a[2, 5, 3], c[3, 5, 2], c[4, 5, 2] = inf, nan, inf, -inf, nan
    c[2, 5, 2] = -inf
    a[5, 5, 3], a[5, 5, 4], b[5, :, 3], b[5, :, 4] = inf, 1, 0, 1  # 0 · inf
    out = run("sm_90a", "mma_bf16", c, A_16.scatter(_bits(a)), B_16.scatter(_bits(b)))
    assert out[0, 5, 2] == inf and np.isnan(out[1, :, 2]).all() and np.isnan(out[2, 5, 2]) and out[3, 5, 2] == -inf
    assert np.isnan(out[4, 5, 2]) and np.isnan(out[5, 5]).all()
    assert (out[np.isnan(out)].view(np.uint32) == 0x7FFFFFFF).all()
    rows = np.arange(16) != 5
    np.testing.assert_array_equal(
        out[:5, rows][:, :, [0, 1, 3, 4, 5, 6, 7]], plain[:5, rows][:, :, [0, 1, 3, 4, 5, 6, 7]]
    )
    assert np.isfinite(out[:5, rows][:, :, [0, 1, 3, 4, 5, 6, 7]]).all()


def fp4_rounding(
    case: Fp4Case, i: int, m: int, n: int, below_dots: int = 27, below_c: int = 35, least: int = -174
) -> float:
    """BLACKWELL §4 for one element: dots of 16 stored products in quarter units, mant · 2^e scales."""
    ks = picked_k(case.nibbles[i, m], 2) if case.nibbles is not None else np.arange(64)

    def scale(byte: int) -> tuple[int, int] | None:
        if case.kind == "ue8m0":
            return None if byte == 0xFF else (8, byte - 127 - 3)  # a mantissa of 8 is 1.0
        if byte & 0x7F == 0x7F:
            return None
        e, mantissa = byte >> 3 & 15, byte & 7
        return (mantissa, 1 - 10) if e == 0 else (8 + mantissa, e - 10)

    addends: list[tuple[Fraction, int]] = []
    c = float(case.c[i, m, n])
    if np.isnan(c) or any(scale(int(s)) is None for s in (*case.sa[i, m], *case.sb[i, n])):
        return float("nan")
    for dot in range(4):
        at = ks[16 * dot : 16 * dot + 16]
        products = [
            int(4 * E2M1_VALUES[case.a[i, m, 16 * dot + s]] * E2M1_VALUES[case.b[i, n, at[s]]]) for s in range(16)
        ]
        (ma, ea), (mb, eb) = (scale(int(s[i, r, dot * case.count // 4])) for s, r in ((case.sa, m), (case.sb, n)))
        if any(products) and ma * mb:
            x = ea + eb - 2
            addends.append((sum(products) * ma * mb * Fraction(2) ** x, x - below_dots))
    if c:
        addends.append((Fraction(c), max(exponent_of(Fraction(c)), -126) - below_c))
    lsb = max([least, *(e for _, e in addends)])
    return to_fp32_toward_zero(sum((toward_zero(v, lsb) for v, _ in addends), Fraction(0)))


@pytest.mark.parametrize("spec", [SCALED[0], SCALED[2], SCALED[5], SCALED[7]], ids=lambda s: s[0])
def test_fp4_rounds_as_stated(spec: tuple) -> None:
    rng = np.random.default_rng(6)
    case = Fp4Case(spec, 12, rng)
    top = 0x7F if case.kind == "ue4m3" else 255
    middle = (0x20, 0x50) if case.kind == "ue4m3" else (100, 150)
    for i in range(12):
        low, high = middle if i < 4 else (0, top)
        case.sa[i] = rng.integers(low, high, case.sa[i].shape)
        case.sb[i] = rng.integers(low, high, case.sb[i].shape)
    case.c = (rng.standard_normal((12, 16, 8)) * 2.0 ** rng.integers(-20, 20, (12, 16, 8))).astype(np.float32)
    case.c[1] *= np.float32(2.0**40)  # a big C
    case.c[2] = 0
    case.a[3, :, 16:32] = 0  # a dot of zeros, whatever its scale
    case.a[4, :, 32:] = case.a[4, :, :32] ^ 8  # cancellation
    case.b[4, :, case.k // 2 :] = case.b[4, :, : case.k // 2]
    if case.nibbles is not None:
        case.nibbles[4, :, 8:] = case.nibbles[4, :, :8]
    half = case.count // 2
    case.sa[4, :, half:], case.sb[4, :, half:] = case.sa[4, :, :half], case.sb[4, :, :half]
    case.sa[5, ::3, 0], case.sb[6, ::3, 1] = 0, 0  # UE4M3 zero; UE8M0's smallest
    case.sa[7, ::3, 0] = top  # NaN
    case.sb[7, ::3, 1] = 0xFF
    if case.kind == "ue4m3":
        case.sa[8] = rng.integers(0, 8, case.sa[8].shape)  # subnormal scales
        case.sb[9] |= 0x80  # a sign bit that means nothing
    case.c[10] = np.float32(1e-45) * rng.integers(-9, 10, (16, 8))
    case.c[11, 0, 0] = np.nan
    out = case.run()
    picks = [(i, m, n) for i in range(12) for m, n in zip(rng.integers(0, 16, 30), rng.integers(0, 8, 30), strict=True)]
    for i, m, n in [*picks, (11, 0, 0), (7, 0, 0), (7, 5, 3)]:
        np.testing.assert_equal(out[i, m, n], np.float32(fp4_rounding(case, i, m, n)), err_msg=f"{(i, m, n)}")


@pytest.mark.parametrize("spec", [SCALED[0], SCALED[2]], ids=lambda s: s[0])
def test_fp4_alignment_is_as_stated(spec: tuple) -> None:
    """What is large cancels, so that the bits cut off the rest show: below a dot, below C, below 2^-174."""
    rng = np.random.default_rng(8)
    case = Fp4Case(spec, 9, rng)
    nvfp4 = case.kind == "ue4m3"
    half = case.count // 2
    case.c[:] = 0
    case.a[:, :, 48:] = 0
    for scales, large, small in ((case.sa, (0x78, 0x7F), (0, 0x10)), (case.sb, (0x78, 0x7F), (0, 0x10))):
        if not nvfp4:
            large, small = (127, 131), (110, 116)
        scales[:, :, :half] = rng.integers(*large, (9, scales.shape[1], 1))
        scales[:, :, half:] = rng.integers(*small, (9, scales.shape[1], 1))
    dots = case.scaled()
    for i in range(9):
        if i % 3 == 0:  # the second dot is minus the first
            case.a[i, :, 16:32], case.b[i, :, 16:32] = case.a[i, :, :16] ^ 8, case.b[i, :, :16]
        elif i % 3 == 1:  # C is minus the first dot
            case.a[i, :, 16:32] = 0
            case.c[i] = -(dots[0][i, :, :16] @ dots[1][i, :, :16].T)
        elif not nvfp4:  # the first dot is a multiple of 2^-149, the third minus 2^-175, 2^-174 or 2^-176
            case.a[i, :, 1:], case.b[i, :, 1:] = 0, 0
            case.a[i, :, 32], case.b[i, :, 32] = {2: (10, 1), 5: (10, 2), 8: (9, 1)}[i]
            case.sa[i], case.sb[i] = [53, 40], [54, 40]
    out = case.run()
    places = [(i, m, n) for i in range(9) for m in range(16) for n in range(0, 8, 3)]
    for i, m, n in places:
        assert out[i, m, n] == np.float32(fp4_rounding(case, i, m, n)), (i, m, n)
    others = [{"below_dots": 26}, {"below_dots": 28}, {"below_c": 34}, {"below_c": 36}]
    for other in others if nvfp4 else [*others, {"least": -175}, {"least": -173}]:
        assert any(fp4_rounding(case, *at, **other) != fp4_rounding(case, *at) for at in places), other
