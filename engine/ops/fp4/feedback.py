"""Weight codes chosen one after the other along K, each making up for the errors of those before it.

What a row's rounding errors d = value − x [K] cost a layer is d H dᵀ, H [K, K] the second moments of its input (or a
guess at them, `engine.quant.gram`). Nearest codes keep each |d_k| small; here every code is the one nearest to

    t_k = x_k − Σ_j d_j M[j, k]

in three passes through K that differ in M alone:

1. With H = V Vᵀ, V upper triangular, d H dᵀ = Σ_k (Σ_{j ≤ k} d_j V[j, k])². Code k has the last word in the k-th term:
   it is smallest at t_k with M = V[j, k] / V[k, k] for j < k (optimal brain surgery; GPTQ, arXiv 2210.17323; written
   as by QuIP, arXiv 2307.13304). Here the block's scale is chosen too: of those `sweep` tries for the block of t, the
   one with the smallest Σ_k V[k, k]² (t_k − value_k)² over the block, the smallest scale among equals.
2. twice: the minimum of d H dᵀ over d_k, all others given, is at t_k with M = H[j, k] / H[k, k] for j ≠ k.

To the last bit, given M and V[k, k]²: x = bf16(fp32(w / g)). For a block of k, t = x, then t_k = fp32(t_k − fp32(d_j ·
M[j, k])) for j = 0, 1, … with the errors as they are: all j in the later passes, those of earlier blocks in the first.
Then k by k: the code nearest to t_k, the new error fp32(value − x_k), its change fp32(new − old) with old = 0 in the
first pass, and for the rest of the block t_j = fp32(t_j − fp32(change · M[k, j])). A scale's cost is the sum in
ascending k of fp32(V[k, k]² · fp32(e · e)), e = fp32(t_k − value). No fused multiply-add. Rows do not depend on each
other. Weights without a global scale beyond 2^±63 leave fp32's range. For E2M1 elements only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.fp4_types import Fp4Matrix
from engine.ops.fp4.blocks import BlockFormat, Scale
from engine.ops.fp4.elements import pack
from engine.ops.fp4.grades import candidates
from engine.ops.fp4.split import round_bf16

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

REFINEMENTS = 2  # a third changes little
_ROWS = 1024  # worked on at once


@dataclass(frozen=True, slots=True)
class Feedback:
    """What the passes take of H. All float32."""

    first: F32  # [K, K] V[j, k] / V[k, k] for j < k, else 0
    later: F32  # [K, K] H[j, k] / H[k, k] for j ≠ k, else 0
    weight: F32  # [K] V[k, k]²

    @staticmethod
    def of(H: F64) -> Feedback:
        """H [K, K] symmetric and positive definite; only ratios of its elements matter."""
        V = np.linalg.cholesky(H[::-1, ::-1])[::-1, ::-1]
        diagonal = np.diag(V)
        first = np.triu(V / diagonal, 1).astype(np.float32)
        later = (H / np.diag(H)).astype(np.float32)
        np.fill_diagonal(later, 0)
        return Feedback(first, later, (diagonal**2).astype(np.float32))


def quantize(w: NDArray[Any], g: np.float32, fmt: BlockFormat, feedback: Feedback) -> Fp4Matrix:
    """w [N, K] with the global scale g (1 where the format has none), finite."""
    parts = [_quantize_rows(w[start : start + _ROWS], g, fmt, feedback) for start in range(0, len(w), _ROWS)]
    payload, scale = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Fp4Matrix(fmt.name, payload, scale, np.full(len(w), g, np.float32))


@np.errstate(over="ignore", invalid="ignore")
def _quantize_rows(w: NDArray[Any], g: np.float32, fmt: BlockFormat, feedback: Feedback) -> tuple[U8, Scale]:
    """Packed codes [R, K/2] and scales [R, K/block]."""
    x = round_bf16(np.divide(w.astype(np.float32), g))
    errors, codes = np.zeros_like(x), np.empty(x.shape, np.uint8)
    scales = np.empty((x.shape[0], x.shape[1] // fmt.block), np.uint8)
    for M in (feedback.first, *[feedback.later] * REFINEMENTS):
        for block in range(scales.shape[1]):
            begin, end = block * fmt.block, (block + 1) * fmt.block
            here, within = slice(begin, end), M[begin:end, begin:end]
            target = x[:, here].copy()
            for j in range(begin if M is feedback.first else len(M)):
                target -= errors[:, j, None] * M[j, here]
            if M is feedback.first:
                scales[:, block] = _best_scale(target, x[:, here], within, feedback.weight[here], fmt)
            codes[:, here], errors[:, here], _ = _rounded(
                target, x[:, here], errors[:, here], within, scales[:, block], fmt
            )
    return pack(codes), scales


def _best_scale(target: F32, x: F32, M: F32, weight: F32, fmt: BlockFormat) -> Scale:
    """The scale [R] with the smallest cost for blocks of targets [R, block]."""
    best = np.zeros(len(target), np.uint8)
    smallest: F32 | None = None
    for scale in candidates(np.abs(target).max(axis=-1), fmt, "sweep"):
        *_, misses = _rounded(target, x, np.zeros_like(x), M, scale, fmt)
        cost = np.zeros(len(target), np.float32)
        for k in range(len(weight)):
            cost += weight[k] * (misses[:, k] * misses[:, k])
        better = True if smallest is None else cost < smallest
        best = np.where(better, scale, best)
        smallest = cost if smallest is None else np.where(better, cost, smallest)
    return best


def _rounded(target: F32, x: F32, old: F32, M: F32, scale: Scale, fmt: BlockFormat) -> tuple[U8, F32, F32]:
    """Codes, errors and t − value [R, block] of a block, whose targets move as its errors change."""
    target, codes, errors, misses = target.copy(), np.empty(x.shape, np.uint8), np.empty_like(x), np.empty_like(x)
    for k in range(x.shape[1]):
        code = fmt.encode(target[:, k, None], scale)
        value = (fmt.integers(code, scale) * fmt.unit(scale)[:, None])[:, 0]
        codes[:, k], errors[:, k], misses[:, k] = code[:, 0], value - x[:, k], target[:, k] - value
        change = errors[:, k] - old[:, k]
        target[:, k + 1 :] -= change[:, None] * M[k, k + 1 :]
    return codes, errors, misses
