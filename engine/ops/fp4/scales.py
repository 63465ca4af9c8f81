"""Block scales: UE4M3 (NVFP4), E8M0 (MXFP4), E6M2 (HiF4). All positive, one byte each.

    bit      7     6     5     4     3     2     1     0
    UE4M3 |  0  | e3    e2    e1    e0 | m2    m1    m0 |   (1 + m/8) · 2^(e−7); e = 0: m · 2^−9; 0x7F NaN; max 448
    E8M0  | e7    e6    e5    e4    e3    e2    e1    e0 |   2^(e−127); 0xFF NaN; no zero
    E6M2  | e5    e4    e3    e2    e1    e0 | m1    m0 |   (1 + m/4) · 2^(e−48); 0xFF NaN; max 1.5 · 2^15; no zero

UE4M3 is E4M3 without its sign; bytes with bit 7 set are not UE4M3 and decode to NaN here, so that nobody takes a
negative scale for a number. An encoder's input is finite and not negative; it never returns a NaN code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

UE4M3_MIN, UE4M3_MAX = np.float32(2.0**-9), np.float32(448)
E6M2_MIN, E6M2_MAX = np.float32(2.0**-48), np.float32(1.5 * 2**15)


def encode_ue4m3(s: F32) -> U8:
    """The nearest UE4M3 (ties to even, subnormals kept) of s clamped to [2^−9, 448]: never 0, never NaN."""
    s = np.clip(s, UE4M3_MIN, UE4M3_MAX)
    subnormal = np.rint(s * np.float32(512))  # exact product; 8 is the smallest normal number's code as well
    normal = _round_mantissa(s, 3) - (120 << 3)  # fp32's bias 127 to 7
    return np.where(s < np.float32(2.0**-6), subnormal, normal).astype(np.uint8)


def encode_e8m0_floor(amax: F32, max_exponent: int) -> U8:
    """2^(floor(log2 amax) − max_exponent), the OCP MX rule, clamped to E8M0's range; amax 0 gives byte 0.

    max_exponent is that of the largest element (2 for E2M1, whose largest is 6 = 1.5 · 2²).
    """
    _, exponent = np.frexp(amax)  # amax = f · 2^exponent, f in [0.5, 1): floor(log2 amax) = exponent − 1
    byte = np.clip(exponent - 1 - max_exponent + 127, 0, 254)
    return np.where(amax == 0, 0, byte).astype(np.uint8)


def encode_e6m2(s: F32) -> U8:
    """The nearest E6M2 (ties to even) of s clamped to [2^−48, 1.5 · 2^15]: never NaN."""
    return (_round_mantissa(np.clip(s, E6M2_MIN, E6M2_MAX), 2) - ((127 - 48) << 2)).astype(np.uint8)


def _round_mantissa(s: F32, bits: int) -> NDArray[np.int32]:
    """fp32's biased exponent and the top `bits` of its mantissa as one number, rounded to nearest, ties to even.

    s is normal and positive. A carry out of the mantissa lands in the exponent, as it should.
    """
    dropped = 23 - bits
    raw = np.ascontiguousarray(s, np.float32).view(np.int32)
    half_less_one = (1 << (dropped - 1)) - 1
    return (raw + half_less_one + (raw >> dropped & 1)) >> dropped


def _ue4m3_values() -> F32:
    code = np.arange(256)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[0x7F:] = np.nan
    return values.astype(np.float32)


def _e8m0_values() -> F32:
    values = 2.0 ** (np.arange(256) - 127.0)
    values[0xFF] = np.nan
    return values.astype(np.float32)


def _e6m2_values() -> F32:
    code = np.arange(256)
    values = (4 + (code & 3)) * 2.0 ** ((code >> 2) - 50.0)
    values[0xFF] = np.nan
    return values.astype(np.float32)


UE4M3_VALUES = _ue4m3_values()  # [256] float32, indexed by the byte
E8M0_VALUES = _e8m0_values()
E6M2_VALUES = _e6m2_values()
