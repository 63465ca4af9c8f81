"""4-bit elements, E2M1 and S1P2, and how two of them share a byte.

    bit     3    2    1    0                   code & 7:   0   1    2   3    4    5    6    7
    E2M1  | s | e1   e0 | m  |   (FP4)                     0  .5    1  1.5   2    3    4    6
    S1P2  | s | i  | f1   f0 |   (HiF4)                    0  .25  .5  .75   1  1.25 1.5  1.75

    byte  |  code of k + 1  |  code of k  |    k even: the low nibble holds the even k

Both are sign and magnitude, so code 8 is minus zero: it is what a negative number (or −0) that rounds to zero becomes,
and decodes to −0. Neither has infinities or NaN; what is too large saturates.
"""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_SIGN = np.uint8(8)
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
S1P2_VALUES = np.array([*np.arange(8) / 4, *-np.arange(8.0) / 4], np.float32)

# Where one magnitude ends and the next begins. A tie goes to the even code, so every second border belongs above.
_E2M1_BORDERS = ((0.25, operator.gt), (0.75, operator.ge), (1.25, operator.gt), (1.75, operator.ge),
                 (2.5, operator.gt), (3.5, operator.ge), (5.0, operator.gt))  # fmt: skip


def encode_e2m1(x: F32) -> U8:
    """Codes of x, nearest, ties to the even code, saturating at ±6. x of any shape, finite."""
    magnitude = np.abs(x)
    code: U8 = np.signbit(x) * _SIGN
    for border, beyond in _E2M1_BORDERS:
        code += beyond(magnitude, np.float32(border))
    return code


def encode_s1p2(x: F32) -> U8:
    """Codes of x, nearest, ties to the even code, saturating at ±1.75. x of any shape, finite."""
    quarters = np.rint(np.minimum(np.abs(x), np.float32(1.75)) * np.float32(4))
    return quarters.astype(np.uint8) | np.signbit(x) * _SIGN


def pack(codes: U8) -> U8:
    """Two codes a byte along the last axis: [..., K] to [..., K/2], K even."""
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def unpack(payload: U8) -> U8:
    """The inverse of `pack`: [..., K/2] to [..., K]."""
    codes = np.empty((*payload.shape[:-1], payload.shape[-1] * 2), np.uint8)
    codes[..., 0::2] = payload & 15
    codes[..., 1::2] = payload >> 4
    return codes
