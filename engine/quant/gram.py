"""The weight grade `gram`: rounding errors made up for along K, against a covariance read off the weights themselves.

Rounding every element to the nearest code keeps ‖Δ‖² small, Δ being the weight's error, but what a layer gets wrong is
E‖Δx‖² = tr(Δ H Δᵀ) with H = E[x xᵀ], and inputs x are far from equally strong in all directions. Given H, errors can be
made up for by the codes that follow and scales be chosen by what they cost in the end: `engine.ops.fp4.feedback`. There
is no text here to take H from, random tokens or a run of the model neither: the seven weights of one decoder layer and
its two norms are enough for a guess. Every update of a trained weight was a sum of outer products with its inputs, so
its rows have come to lie where the inputs do, and what reads the residual stream says how it is distributed:

    R = unit(Σ wᵀw over q, k, v) + unit(Σ wᵀw over gate, up)       unit: scaled to a mean diagonal of 1

    q, k, v and gate, up   Σ = D (unit(R) + ½ I) D, D so that the diagonal is γ², as a norm with weight γ leaves it
    o                      unit(A) + unit(oᵀo): A = v Σ vᵀ, repeated for the heads that share values, and halved
                           between different heads, which attend to different tokens
    down                   E[g u (g u)ᵀ] = (G Σ Gᵀ) ∘ (U Σ Uᵀ) + (G Σ Uᵀ) ∘ (U Σ Gᵀ) + m mᵀ, m = diag(G Σ Uᵀ): the
                           moments of g ∘ u for normal x with covariance Σ (Isserlis); SiLU(g) is taken as g / 2

the latter two scaled to a mean diagonal of 1, plus ½ I. Cosine similarity with the real second moments on held-out text
of the bundled model (means over layers), and the squared error of the outputs there when `sweep` has 1:

                                                  q | k | v   gate | up    o    down
    this guess                                       .71         .72      .68   .44
    Σ wᵀw of the weights that read the input alone   .66         .64      .63   .39
    of random tokens sent through the model          .59         .49      .37   .32
    of text that it makes up itself                  .89         .85      .79   .74
    the identity                                     .39         .44      .32   .45
    squared error by this guess                      .61         .65      .29   .87

The constants were chosen by the Kullback-Leibler divergence on other text than results/compare_demo.json's. Perplexity
is a noisier judge: between dampings of .4 and .6 the share of NVFP4's loss that `sharq` wins back moves by four points.

A weight on its own (a head, `engine.quant.fp4.quantize_weight`) has unit(wᵀw) + ½ I for its input, or `sweep` where it
has fewer rows than K.

Beyond K = 4096 the columns are cut into equal parts, each with its own H: what errors of one part do to another's is
left out, and no matrix larger than that is decomposed. Products are fp32, the decomposition fp64, by NumPy's libraries:
another machine's may tip a code that is nearly a tie; given H every backend makes the same bits. For the layers of a
model with seven billion parameters (Qwen2.5-7B's shapes) the guesses take some twenty minutes of one core and 0.6 GB,
the codes forty, shared by all threads; `sweep` takes half a minute. In NumPy the codes take seventy times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.errors import NumericalError
from engine.fp4_types import Fp4Matrix
from engine.ops.contract import Array, Ops
from engine.ops.fp4.blocks import BlockFormat
from engine.ops.fp4.feedback import Feedback
from engine.ops.fp4.grades import global_scale, largest_magnitude

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Moments = Callable[[slice], F64]  # of some columns: [their number, their number], positive definite

PARTS = {  # of a decoder layer: field of `Layer` -> tensor
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}
_DAMPING = 0.5  # added to a mean diagonal of 1: only a guess's strong directions are right; .2 and 1 are no better
_BETWEEN_HEADS = 0.5
_LEAST = 1e-3  # of a channel whose norm weight is zero, relative to the mean
_LONGEST = 4096  # columns with one H
_ROWS = 1024  # multiplied at once


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights [N, K] of one decoder layer, its norms' weights [C], and the size of a head."""

    q: Array
    k: Array
    v: Array
    o: Array
    gate: Array
    up: Array
    down: Array
    attention_norm: Array
    mlp_norm: Array
    head_dim: int


def quantize_layer(ops: Ops, layer: Layer, fields: Collection[str], fmt: BlockFormat) -> Mapping[str, Fp4Matrix]:
    """Of the layer's weights those named, by their names here. Raises NumericalError (NaN, infinity)."""
    made: dict[str, Fp4Matrix] = {}
    for group, moments in _inputs(layer):
        shards = {name: getattr(layer, name) for name in group if name in fields}
        made |= zip(shards, _quantize(ops, list(shards.values()), moments, fmt), strict=True)
    return made


def quantize_alone(ops: Ops, shards: Sequence[Array], fmt: BlockFormat) -> list[Fp4Matrix]:
    """Shards [N_i, K] that share an input of which nothing else is known. Raises NumericalError (NaN, infinity)."""
    if sum(len(w) for w in shards) < shards[0].shape[1]:
        return [ops.quantize_weight(w, format=fmt.name, block=fmt.block, grade="sweep") for w in shards]
    return _quantize(ops, shards, _of(_damped(_gram(shards))), fmt)


# ---- guesses ---------------------------------------------------------------------------------------------------------


def _inputs(layer: Layer) -> Iterator[tuple[tuple[str, ...], Moments]]:
    """Fields of `Layer` that share an input, and its second moments."""
    readers = _unit(_gram([layer.q, layer.k, layer.v])) + _unit(_gram([layer.gate, layer.up]))
    attention, mlp = (_normed(readers, norm) for norm in (layer.attention_norm, layer.mlp_norm))
    yield ("q", "k", "v"), _of(attention)
    yield ("o",), lambda columns: _attended(layer, attention, columns)
    yield ("gate", "up"), _of(mlp)
    yield ("down",), lambda columns: _gated(layer.gate, layer.up, mlp, columns)


def _of(H: F64) -> Moments:
    return lambda columns: H[columns, columns]


def _normed(readers: F64, norm: Array) -> F64:
    """[C, C], what a norm with this weight puts out."""
    power = norm.astype(np.float64) ** 2
    if not np.isfinite(power).all():
        raise NumericalError("a norm's weight holds NaN or infinity")
    H = _damped(readers)
    factor = np.sqrt((power / (power.mean() or 1) + _LEAST) / np.diag(H))
    return factor[:, None] * H * factor


def _attended(layer: Layer, inputs: F64, columns: slice) -> F64:
    """Of attention's output: each head has averages of the values it shares with others."""
    D, K = layer.head_dim, layer.o.shape[1]
    head, within = np.divmod(np.arange(K)[columns], D)
    values = _scaled(layer.v)[head * len(layer.v) // K * D + within]
    own = (values @ inputs.astype(np.float32) @ values.T).astype(np.float64)
    own *= np.where(head[:, None] == head, 1, _BETWEEN_HEADS)
    return _damped(_unit(own) + _unit(_gram([layer.o[:, columns]])))


def _gated(gate: Array, up: Array, inputs: F64, columns: slice) -> F64:
    """Of gate ∘ up for normal inputs."""
    root = np.linalg.cholesky(inputs).astype(np.float32)
    g, u = (_scaled(w[columns]) @ root for w in (gate, up))
    mixed = g @ u.T
    mean = np.diag(mixed)
    return _damped(((g @ g.T) * (u @ u.T) + mixed * mixed.T + np.outer(mean, mean)).astype(np.float64))


def _gram(shards: Sequence[Array]) -> F64:
    """Σ wᵀw [K, K] over all rows, to scale."""
    largest = max(largest_magnitude(w) for w in shards) or np.float32(1)
    total = np.zeros((shards[0].shape[1],) * 2)
    for w in shards:
        for start in range(0, len(w), _ROWS):
            rows = w[start : start + _ROWS].astype(np.float32) / largest  # so that squares keep to fp32's range
            total += rows.T @ rows
    return total


def _scaled(w: Array) -> F32:
    """With a largest magnitude of 1."""
    return np.divide(w.astype(np.float32), largest_magnitude(w) or np.float32(1))


def _unit(H: F64) -> F64:
    """Scaled to a mean diagonal of 1; zeros stay."""
    return H / (np.trace(H) / len(H) or 1)


def _damped(H: F64) -> F64:
    return _unit(H) + _DAMPING * np.eye(len(H))


# ---- codes -----------------------------------------------------------------------------------------------------------


def _quantize(ops: Ops, shards: Sequence[Array], moments: Moments, fmt: BlockFormat) -> list[Fp4Matrix]:
    scales = [global_scale(w, fmt, "sweep") for w in shards]
    parts: list[list[Fp4Matrix]] = [[] for _ in shards]
    for columns in _cut(shards[0].shape[1], fmt.block) if shards else ():
        feedback = Feedback.of(moments(columns))
        for w, g, own in zip(shards, scales, parts, strict=True):
            own.append(ops.quantize_feedback(w[:, columns], g[0], feedback, format=fmt.name, block=fmt.block))
    return [_joined(own) for own in parts]


def _cut(K: int, block: int) -> list[slice]:
    """Runs of columns, as equal as whole blocks allow."""
    blocks, parts = K // block, -(-K // _LONGEST)
    ends = [blocks * part // parts * block for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]


def _joined(parts: Sequence[Fp4Matrix]) -> Fp4Matrix:
    if len(parts) == 1:
        return parts[0]
    payload, scale = (np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("payload", "scale"))
    return Fp4Matrix(parts[0].format, payload, scale, parts[0].g)
