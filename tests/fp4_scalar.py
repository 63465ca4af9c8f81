"""FP4, HiF4 and SharQ once more, in exact rationals and one element at a time: what the NumPy definition is tested by.

Written from the specification, not from `engine.ops.fp4`, and sharing nothing with it. A number is (negative,
magnitude) with the magnitude a Fraction, so that −0 has its sign; every rounding is the call of a function. Codes are
found by looking for the nearest value in a table.
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction as Q

Number = tuple[bool, Q]
ZERO: Number = (False, Q(0))


def rounded(magnitude: Q, bits: int, smallest: int) -> Q:
    """A non-negative rational to `bits` significant bits, no finer than 2^smallest, ties to even."""
    if magnitude == 0:
        return magnitude
    n, d = magnitude.numerator, magnitude.denominator
    exponent = n.bit_length() - d.bit_length()
    exponent -= n << max(-exponent, 0) < d << max(exponent, 0)  # floor(log2)
    unit = max(exponent - bits + 1, smallest)  # 2^unit is the step
    d <<= max(unit, 0)
    count, rest = divmod(n << max(-unit, 0), d)
    count += 2 * rest > d or (2 * rest == d and count % 2 == 1)
    return Q(count << max(unit, 0), 1 << max(-unit, 0))


def fp32(magnitude: Q) -> Q:
    return rounded(magnitude, 24, -149)


def bf16(magnitude: Q) -> Q:
    return rounded(magnitude, 8, -133)


def number(x: float) -> Number:
    return (str(float(x)).startswith("-"), abs(Q(float(x))))


def nearest(table: list[Q], value: Q) -> int:
    """The index of the nearest entry, the even one of two equally near; beyond the ends, the ends."""
    above = bisect_left(table, value)
    if above == 0 or above == len(table):
        return min(above, len(table) - 1)
    below, left, right = above - 1, value - table[above - 1], table[above] - value
    if left == right:
        return below if below % 2 == 0 else above
    return below if left < right else above


E2M1 = [Q(v) / 2 for v in (0, 1, 2, 3, 4, 6, 8, 12)]
S1P2 = [Q(v, 4) for v in range(8)]
UE4M3 = [Q(m, 512) if e == 0 else Q(8 + m, 8) * Q(2) ** (e - 7) for e in range(16) for m in range(8)][:0x7F]
E6M2 = [Q(4 + m, 4) * Q(2) ** (e - 48) for e in range(64) for m in range(4)][:0xFF]
E8M0 = [Q(2) ** (b - 127) for b in range(255)]


def code_of(table: list[Q], value: Number) -> int:
    return nearest(table, value[1]) | 8 * value[0]


def value_of(table: list[Q], code: int) -> Number:
    return (code >= 8, table[code & 7])


def times(value: Number, factor: Q) -> Number:
    return (value[0], value[1] * factor)


def minus(a: Number, b: Number) -> Number:
    """a − b rounded to fp32; an exact zero is +0 unless −0 − (+0)."""
    exact = (-a[1] if a[0] else a[1]) - (-b[1] if b[0] else b[1])
    if exact == 0:
        return (a[0] and a[1] == 0 and not b[0], exact)
    return (exact < 0, fp32(abs(exact)))


# ---- blocks: values to (codes, scale, decoded values) ----------------------------------------------------------------


def nvfp4_scale(magnitude: Q, divisor: int = 6) -> int:
    return nearest(UE4M3, min(max(fp32(magnitude / divisor), UE4M3[1]), UE4M3[-1]))


def nvfp4_block(x: list[Number], scale: int | None = None) -> tuple[list[int], int, list[Number]]:
    byte = nvfp4_scale(max(v for _, v in x)) if scale is None else scale
    reciprocal = fp32(1 / UE4M3[byte])
    codes = [code_of(E2M1, (n, min(fp32(v * reciprocal), Q(6)))) for n, v in x]
    return codes, byte, [times(value_of(E2M1, c), UE4M3[byte]) for c in codes]


def mxfp4_scale(magnitude: Q) -> int:
    if magnitude == 0:
        return 0
    exponent = next(e for e in range(-149, 129) if Q(2) ** (e + 1) > magnitude)
    return min(max(exponent - 2 + 127, 0), 254)


def mxfp4_block(x: list[Number], scale: int | None = None) -> tuple[list[int], int, list[Number]]:
    byte = mxfp4_scale(max(v for _, v in x)) if scale is None else scale
    codes = [code_of(E2M1, (n, fp32(v / E8M0[byte]))) for n, v in x]
    return codes, byte, [times(value_of(E2M1, c), E8M0[byte]) for c in codes]


def hif4_scale(magnitude: Q) -> int:
    return nearest(E6M2, min(max(fp32(magnitude * fp32(Q(1, 7))), E6M2[0]), E6M2[-1]))


def hif4_block(x: list[Number], scale: int | None = None) -> tuple[list[int], int, list[Number]]:
    byte = hif4_scale(max(v for _, v in x)) if scale is None else scale
    E, word, codes, values = E6M2[byte], byte, [], []
    for k, (n, v) in enumerate(x):
        of8, of4 = x[k // 8 * 8 : k // 8 * 8 + 8], x[k // 4 * 4 : k // 4 * 4 + 4]
        e8 = int(max(m for _, m in of8) / E >= 4)
        e16 = int(max(m for _, m in of4) / E / 2**e8 >= 2)
        word |= e8 << (8 + k // 8) | e16 << (16 + k // 4)
        step = E * 2 ** (e8 + e16)
        codes.append(code_of(S1P2, (n, fp32(v / step))))
        values.append(times(value_of(S1P2, codes[-1]), step))
    return codes, word, values


BLOCK = {"nvfp4": nvfp4_block, "mxfp4": mxfp4_block, "hif4": hif4_block}
SCALE = {"nvfp4": nvfp4_scale, "mxfp4": mxfp4_scale, "hif4": hif4_scale}


def quantized(x: list[Number], format: str, block: int) -> tuple[list[int], list[int], list[Number]]:
    parts = [BLOCK[format](x[k : k + block]) for k in range(0, len(x), block)]
    return sum((p[0] for p in parts), []), [p[1] for p in parts], sum((p[2] for p in parts), [])


def packed(codes: list[int]) -> list[int]:
    return [codes[k] + 16 * codes[k + 1] for k in range(0, len(codes), 2)]


# ---- SharQ -----------------------------------------------------------------------------------------------------------


def global_scale(amax: Q, largest: int = 2688) -> Q:
    return max(fp32(amax / largest), fp32(Q("1e-9")))


def kept_candidates(x: list[Number], width: int) -> list[list[int]]:
    """Per chunk of four candidates of `width` elements, the numbers of the two that stay."""
    chunks = []
    for start in range(0, len(x), 4 * width):
        scores = [max(v for _, v in x[start + c * width : start + (c + 1) * width]) for c in range(4)]
        order = sorted(range(4), key=lambda c: (-scores[c], c))
        chunks.append(sorted(order[:2]))
    return chunks


def sharq_row(row: list[float], format: str, sparse: bool, g: Q | None = None) -> dict[str, list[int] | Q]:
    """Every field of one row's operand; g is given where it is shared by a tensor."""
    X = [number(v) for v in row]
    if g is None:
        g = global_scale(max(v for _, v in X)) if format == "nvfp4" else Q(1)
    x = [(n, bf16(fp32(v / g))) for n, v in X]
    width, small, large = {"nvfp4": (2, 16, 32), "mxfp4": (2, 32, 32), "hif4": (1, 64, 64)}[format]
    meta, stays = None, [True] * len(x)
    if sparse:
        chunks = kept_candidates(x, width)
        stays = [k // width % 4 in chunks[k // (4 * width)] for k in range(len(x))]
        meta = packed([i0 | i1 << 2 for i0, i1 in chunks])
    codes, scales, values = quantized(
        [v if stay else ZERO for v, stay in zip(x, stays, strict=True)], format, large if sparse else small
    )
    r = [minus(v, b) if stay else v for v, b, stay in zip(x, values, stays, strict=True)]
    residual, residual_scales, _ = quantized(r, format, small)
    return {
        "g": g,
        "backbone": packed([c for c, stay in zip(codes, stays, strict=True) if stay]),
        "meta": meta,
        "backbone_scale": scales,
        "residual": packed(residual),
        "residual_scale": residual_scales,
    }


# ---- weight grades ---------------------------------------------------------------------------------------------------


def halves(terms: list[Q]) -> Q:
    while len(terms) > 1:
        half = len(terms) // 2
        terms = [fp32(a + b) for a, b in zip(terms[:half], terms[half:], strict=True)]
    return terms[0]


def squared_error(x: list[Number], values: list[Number]) -> Q:
    return halves([fp32(minus(a, b)[1] ** 2) for a, b in zip(x, values, strict=True)])


def graded_shard(
    w: list[list[float]], format: str, block: int, grade: str, factors: list[Q]
) -> tuple[Q, list[list[int]], list[list[int]]]:
    """g, payload rows and scale rows of a shard."""
    W = [[number(v) for v in row] for row in w]
    g = Q(1)
    if format == "nvfp4":
        g = global_scale(max(v for row in W for _, v in row), 1536 if grade == "4over6" else 2688)
    payload, scales = [], []
    for row in W:
        x = [(n, bf16(fp32(v / g))) for n, v in row]
        blocks = [_graded_block(x[k : k + block], format, grade, factors) for k in range(0, len(x), block)]
        payload.append(packed(sum((codes for codes, _ in blocks), [])))
        scales.append([scale for _, scale in blocks])
    return g, payload, scales


def _graded_block(x: list[Number], format: str, grade: str, factors: list[Q]) -> tuple[list[int], int]:
    amax = max(v for _, v in x)
    candidates = {
        "rtn": lambda: [SCALE[format](amax)],
        "4over6": lambda: [nvfp4_scale(amax, 6), nvfp4_scale(amax, 4)],
        "sweep": lambda: [SCALE[format](fp32(amax * f)) for f in factors],
    }[grade]()
    tried = [BLOCK[format](x, scale) for scale in dict.fromkeys(candidates)]
    codes, scale, _ = min(tried, key=lambda block: squared_error(x, block[2]))  # min keeps the first of equals
    return codes, scale
