"""The weight grade `gram`: rounding errors made up for along K, against a covariance read off the weights themselves.

Rounding every element to the nearest code keeps ‖Δ‖² small, Δ being the weight's error, but what a layer gets wrong is
E‖Δx‖² = tr(Δ H Δᵀ) with H = E[x xᵀ], and inputs x are far from equally strong in all directions. Given H, an error can
be made up for by the codes that follow: error feedback along K (optimal brain surgery; GPTQ, arXiv 2210.17323). There H
comes from calibration text. Here it comes from nothing but the weights: every update of a trained weight was a sum of
outer products with its inputs, so its rows have come to lie where the inputs do, and

    H = Σ wᵀ w  over all shards that read the input (q, k, v; gate, up), scaled to a mean diagonal of 1, plus 1 on it

is a guess at E[x xᵀ]. Cosine similarity with the real second moments, on held-out text of the bundled model:

                                      q | k | v   gate | up   attention's output   down
    Σ wᵀ w                               .70         .68             .66            .41
    of random tokens sent through it     .58         .51             .49            .38
    the identity                         .41         .46             .33            .48

Where the shards have fewer rows than K (down projections), wᵀw is singular and says little: they are left to `sweep`.
The other layers' outputs on that text have .66 of the squared error that `sweep` gives them (mean over layers).

Per row of x = bf16(fp32(w / g)), g as for `sweep`, with H⁻¹ = UᵀU, U upper triangular:

1. Block by block along K: the scale that `sweep` chooses for the block as it now is; then k by k the nearest code, and
   its error / U[k, k] times U[k, later] is taken off what is still to be rounded.
2. Twice through K: each code becomes the nearest to where tr(Δ H Δᵀ) has its minimum, all other codes given.

H is summed and inverted in fp64, the rest is fp32. Unlike the other grades this one is not defined to the last bit:
another library's matrix products may tip a code that is nearly a tie. It takes about 5 N K² multiplications for a shard
and 3 K³ for an input, against some 200 N K for `sweep`: nothing for a small model, an hour or two of one core for seven
billion parameters. For E2M1 elements only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.fp4_types import Fp4Matrix
from engine.ops.contract import Array
from engine.ops.fp4.blocks import BlockFormat, Scale
from engine.ops.fp4.elements import pack
from engine.ops.fp4.grades import best_scale, candidates, global_scale, largest_magnitude
from engine.ops.fp4.split import round_bf16

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_DAMPING = 1.0  # added to a mean diagonal of 1: only the guess's strong directions are right; .5 and 2 are worse
_REFINEMENTS = 2  # a third changes little
_ROWS = 1024  # rounded at once: their errors and gradients fit a cache


def can_guess(shards: Sequence[Array]) -> bool:
    """Whether the shards [N_i, K] have rows enough to say something of their input."""
    return sum(len(w) for w in shards) >= shards[0].shape[1]


def covariance(shards: Sequence[Array]) -> F64:
    """H [K, K], the guess at the second moments of the input that the shards [N_i, K] share, positive definite.

    Raises NumericalError (NaN, infinity).
    """
    K = shards[0].shape[1]
    largest = max(largest_magnitude(w) for w in shards) or np.float32(1)
    total = np.zeros((K, K))
    for w in shards:
        for start in range(0, len(w), _ROWS):
            rows = w[start : start + _ROWS].astype(np.float32) / largest  # so that squares keep to fp32's range
            total += rows.T @ rows
    mean = np.trace(total) / K
    return (total / mean if mean > 0 else total) + _DAMPING * np.eye(K)


def quantize(shards: Sequence[Array], fmt: BlockFormat) -> list[Fp4Matrix]:
    """Shards [N_i, K] that share an input and `can_guess`, each with its own g. Raises NumericalError."""
    H = covariance(shards)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    return [_quantized(w, H.astype(np.float32), U.astype(np.float32), fmt) for w in shards]


def _quantized(w: Array, H: F32, U: F32, fmt: BlockFormat) -> Fp4Matrix:
    g = global_scale(w, fmt, "sweep")
    payload, scale = [], []
    for start in range(0, len(w), _ROWS):
        rows = slice(start, start + _ROWS)
        x = round_bf16(w[rows].astype(np.float32) / g[rows, None])
        codes, scales = _with_feedback(x, U, fmt)
        for _ in range(_REFINEMENTS):
            codes = _refined(x, codes, scales, H, fmt)
        payload.append(pack(codes))
        scale.append(scales)
    return Fp4Matrix(fmt.name, np.concatenate(payload), np.concatenate(scale), g)


def _with_feedback(x: F32, U: F32, fmt: BlockFormat) -> tuple[U8, Scale]:
    """Codes [R, K] and scales [R, K/block] of x [R, K], each error passed on to the elements after it."""
    rest, codes = x.copy(), np.empty(x.shape, np.uint8)
    scales = np.empty((x.shape[0], x.shape[1] // fmt.block), np.uint8)
    for block in range(scales.shape[1]):
        begin, end = block * fmt.block, (block + 1) * fmt.block
        part = rest[:, begin:end]
        scale = best_scale(part, fmt, candidates(np.abs(part).max(axis=-1), fmt, "sweep"))
        errors = np.empty_like(part)
        for i, k in enumerate(range(begin, end)):
            codes[:, k], value = _nearest(part[:, i], scale, fmt)
            errors[:, i] = (part[:, i] - value) / U[k, k]
            part[:, i + 1 :] -= errors[:, i, None] * U[k, k + 1 : end]
        rest[:, end:] -= errors @ U[begin:end, end:]
        scales[:, block] = scale
    return codes, scales


def _refined(x: F32, codes: U8, scales: Scale, H: F32, fmt: BlockFormat) -> U8:
    """Codes [R, K] after one pass of coordinate descent on tr(Δ H Δᵀ), Δ = x − values."""
    values, codes = _values(codes, scales, fmt), codes.copy()
    gradient = (x - values) @ H  # half of it, and towards smaller errors
    for block, scale in enumerate(scales.T):
        begin, end = block * fmt.block, (block + 1) * fmt.block
        near = gradient[:, begin:end].copy()
        changes = np.empty_like(near)
        for i, k in enumerate(range(begin, end)):
            codes[:, k], value = _nearest(values[:, k] + near[:, i] / H[k, k], scale, fmt)
            changes[:, i] = value - values[:, k]
            near[:, i + 1 :] -= changes[:, i, None] * H[k, k + 1 : end]
        gradient[:, end:] -= changes @ H[begin:end, end:]
    return codes


def _nearest(x: F32, scale: Scale, fmt: BlockFormat) -> tuple[U8, F32]:
    """Codes and values of one element x [R] of each row, under its block's scale [R]."""
    code = fmt.encode(x[:, None], scale)
    return code[:, 0], (fmt.integers(code, scale) * fmt.unit(scale)[:, None])[:, 0]


def _values(codes: U8, scales: Scale, fmt: BlockFormat) -> F32:
    blocks = codes.reshape(*scales.shape, fmt.block)
    return (fmt.integers(blocks, scales) * fmt.unit(scales)[..., None]).reshape(codes.shape)
