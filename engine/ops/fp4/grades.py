"""How the block scales of a weight are chosen, each shard for itself, without calibration data.

    rtn      the format's own rule: the largest magnitude of the block lands on the largest element
    4over6   NVFP4 only: amax/6 or amax/4 per block, whichever has the smaller error; amax/6 wins ties.
             g = amax / (256 · 6) instead of amax / (448 · 6), so that amax/4 of the largest block is still a scale
    sweep    the rule applied to amax · f for 40 factors f = fp32(linspace(.65, 1.6)); the smallest error, and among
             equals the smallest factor

Squared error on random weights relative to `rtn` with blocks of 32 (normal; Student-t with 4 degrees of freedom):

    blocks of 32   rtn 1; 1       4over6 .90; .96   sweep .80; .87
    blocks of 16   rtn .87; .78   4over6 .73; .70   sweep .64; .63

MXFP4's sweep wins 5 % of its own error, HiF4's 10 %. A wider range than .65 … 1.6 and other global scales changed
nothing beyond the third digit: that is what plain squared error has to give, the next step is to know which errors
matter (`engine.quant.gram`, from the weights alone).

To the last bit, for x = bf16(fp32(w / g)) in blocks: a candidate is the rule on fp32(amax · f); its error is the sum
over the block of fp32(e · e), e = fp32(x − value), added in fp32 by halves (k with k + block/2, then quarters, …); no
fused multiply-add. The factors of `sweep` are closer together (at most 3.8 %) than two neighbouring scales of any
format (at least 6.9 %), so it tries exactly the consecutive scale bytes from the first factor's to the last's, in
order. Errors of MXFP4 weights beyond 2^±63 leave fp32's range and are then all alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument, NumericalError
from engine.fp4_types import Fp4Matrix
from engine.ops.fp4.blocks import BlockFormat, Scale
from engine.ops.fp4.elements import pack
from engine.ops.fp4.scales import encode_ue4m3
from engine.ops.fp4.split import G_MIN, NVFP4_MAX, round_bf16

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
Grade = Literal["rtn", "4over6", "sweep"]

_FOUR_OVER_SIX_MAX = np.float32(256 * 6)
_SWEEP_FIRST, _SWEEP_LAST = np.float32(0.65), np.float32(1.6)
_SWEEP_LARGEST = np.float32(2e38)  # times 1.6 is still finite
_CHUNK = 1 << 19  # elements worked on at once: a few arrays of 2 MB


def quantize(w: NDArray[Any], *, fmt: BlockFormat, grade: Grade) -> Fp4Matrix:
    """One shard w [N, K], N ≥ 1, K a multiple of fmt.block. Memory beyond the result is a few megabytes.

    Raises InvalidArgument (a grade the format does not have) and NumericalError (NaN, infinity).
    """
    check_grade(grade, fmt)
    N, K = w.shape
    g = global_scale(w, fmt, grade)
    parts = [_quantize_rows(_f32(w[chunk]) / g[chunk, None], fmt, grade) for chunk in _chunks(N, K)]
    payload, scale = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Fp4Matrix(fmt.name, payload, scale, g)


def check_grade(grade: str, fmt: BlockFormat) -> None:
    if grade not in get_args(Grade):
        raise InvalidArgument(f"unknown weight grade {grade!r}; known: {', '.join(get_args(Grade))}")
    if grade == "4over6" and fmt.name != "nvfp4":
        raise InvalidArgument(f"the weight grade 4over6 is defined for nvfp4, not for {fmt.name}; use rtn or sweep")


def _chunks(N: int, K: int) -> list[slice]:
    rows = max(1, _CHUNK // K)
    return [slice(start, start + rows) for start in range(0, N, rows)]


def global_scale(w: NDArray[Any], fmt: BlockFormat, grade: Grade) -> F32:
    """g [N] of a shard w [N, K], the same in all rows. Raises NumericalError."""
    amax = largest_magnitude(w)
    if not fmt.has_global_scale:
        if not np.isfinite(round_bf16(np.array(amax))):
            raise NumericalError(f"the weight's largest magnitude, {amax:g}, is infinite in bfloat16")
        return np.ones(len(w), np.float32)
    largest = _FOUR_OVER_SIX_MAX if grade == "4over6" else NVFP4_MAX
    return np.full(len(w), max(amax / largest, G_MIN), np.float32)


def largest_magnitude(w: NDArray[Any]) -> np.float32:
    """Of a shard w [N, K]. Raises NumericalError (NaN, infinity)."""
    amax = np.array([np.abs(_f32(w[chunk])).max() for chunk in _chunks(*w.shape)]).max()
    if not np.isfinite(amax):
        raise NumericalError("the weight holds NaN or infinity; FP4 has codes for neither")
    return np.float32(amax)


def _f32(w: NDArray[Any]) -> F32:
    return w.astype(np.float32, copy=False)


def _quantize_rows(scaled: F32, fmt: BlockFormat, grade: Grade) -> tuple[U8, Scale]:
    """Packed codes [R, K/2] and scales [R, K/block] of w / g."""
    x = round_bf16(scaled).reshape(scaled.shape[0], scaled.shape[1] // fmt.block, fmt.block)
    scale = best_scale(x, fmt, candidates(np.abs(x).max(axis=-1), fmt, grade))
    return pack(fmt.encode(x, scale).reshape(scaled.shape)), scale


def candidates(amax: F32, fmt: BlockFormat, grade: Grade) -> Iterator[U8]:
    """Scale bytes to try, in the order that decides ties."""
    if grade == "sweep":
        first = fmt.scale_byte(amax * _SWEEP_FIRST)
        last = fmt.scale_byte(np.minimum(amax, _SWEEP_LARGEST) * _SWEEP_LAST)
        for step in range(int((last - first).max(initial=0)) + 1):
            yield np.minimum(first + np.uint8(step), last)  # no scale byte is near 255: nothing wraps
        return
    yield fmt.scale_byte(amax)
    if grade == "4over6":
        yield encode_ue4m3(amax / np.float32(4))


def best_scale(x: F32, fmt: BlockFormat, candidates: Iterator[U8]) -> Scale:
    """The stored scale with the smallest error for each block of x [R, blocks, block]; the first of equals."""
    best = fmt.complete(next(candidates), x)
    smallest: F32 | None = None  # not computed where there is nothing to compare with
    for byte in candidates:
        if smallest is None:
            smallest = squared_error(x, best, fmt)
        scale = fmt.complete(byte, x)
        error = squared_error(x, scale, fmt)
        better = error < smallest
        best = np.where(better, scale, best)
        smallest = np.where(better, error, smallest)
    return best


@np.errstate(over="ignore")
def squared_error(x: F32, scale: Scale, fmt: BlockFormat) -> F32:
    """What each block of x [..., block] loses under its scale [...], summed by halves."""
    error = x - fmt.integers(fmt.encode(x, scale), scale) * fmt.unit(scale)[..., None]
    total = error * error
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
