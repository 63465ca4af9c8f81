"""Rotary-embedding tables: the cosines and sines of every position, for each frequency rule the engine knows.

Pair i of a head (elements i and i + D/2) turns by position · inv_freq_i. The frequencies fall geometrically from 1 to
about 1 / theta; the kinds that extend a model's context lower them:
    linear   all by `factor`
    llama3   long wavelengths by `factor`, short ones not, a linear blend of the two frequencies in between
    yarn     the same idea with the blend linear in the pair's index, and cos and sin scaled by a constant as well

Rounding follows how models are trained: float32 frequencies, and their float32 product with the position as the angle.
(At position 100,000 the exact angle would differ by thousandths of a radian.) All else happens in float64 and is
rounded once, so tables are equal on every machine whose mathematics library errs below that rounding.
Not done here: kinds whose frequencies depend on the running sequence's length (dynamic, longrope).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from engine.config import RopeConfig

MAX_POSITIONS = 1 << 24  # float32 counts exactly up to here
_CHUNK = 4096  # positions at a time, to keep the float64 intermediates small


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> NDArray[np.float32]:
    """float32 [P, D] for positions 0 … P - 1: row p = cos [D/2] | sin [D/2], times the kind's attention factor.

    head_dim D must be even; num_positions P at most MAX_POSITIONS.
    """
    assert head_dim % 2 == 0 and 0 <= num_positions <= MAX_POSITIONS, (head_dim, num_positions)
    half = head_dim // 2
    inv_freq = inverse_frequencies(rope, head_dim)
    scale = attention_factor(rope)
    table = np.empty((num_positions, head_dim), np.float32)
    for start in range(0, num_positions, _CHUNK):
        rows = table[start : start + _CHUNK]
        positions = np.arange(start, start + len(rows), dtype=np.float32)
        angle = (positions[:, None] * inv_freq).astype(np.float64)
        rows[:, :half] = np.cos(angle) * scale
        rows[:, half:] = np.sin(angle) * scale
    return table


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> NDArray[np.float32]:
    """float32 [D/2]: the angle in radians by which each pair turns per position."""
    plain = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        plain = plain / rope.factor
    elif rope.kind == "llama3":
        plain = _blend(plain, rope.factor, _llama3_share(plain, rope))
    elif rope.kind == "yarn":
        plain = _blend(plain, rope.factor, _yarn_share(head_dim, rope))
    return plain.astype(np.float32)


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied with: 1 except for yarn, which sharpens attention over longer contexts."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(rope.factor, rope.mscale) / _yarn_mscale(rope.factor, rope.mscale_all_dim)
    return _yarn_mscale(rope.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _blend(plain: NDArray[np.float64], factor: float, kept: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each frequency as a mix of itself (share `kept`, 0 … 1) and itself lowered by `factor`."""
    return plain * kept + plain / factor * (1.0 - kept)


def _llama3_share(plain: NDArray[np.float64], rope: RopeConfig) -> NDArray[np.float64]:
    """[D/2]: 1 where the original context holds `high_freq_factor` turns or more, 0 at `low_freq_factor` or fewer."""
    turns = rope.original_max_position * plain / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(share, 0.0, 1.0)


def _yarn_share(head_dim: int, rope: RopeConfig) -> NDArray[np.float64]:
    """[D/2]: 1 up to the pair that makes `beta_fast` turns in the original context, 0 from that of `beta_slow` on."""

    def pair_with(turns: float) -> float:
        wavelength = rope.original_max_position / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001  # a step instead of a division by zero; the width is the one models were trained with
    return 1.0 - np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
