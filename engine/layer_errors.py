"""What a method costs each linear layer: the error of its output on the inputs that the layer really gets.

The model runs as stored. Beside each linear layer's product y runs the method's, y', on the same input; the error is
√(Σ (y' − y)² / Σ y²) over all tokens and outputs, without bias. As every layer sees exact inputs, errors of one layer
do not reach the next: this shows where a method hurts, `engine.eval compare` what the model loses by it. q, k, v and
gate, up count apart though they are multiplied together. The head is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.bench.steps import OneSequence
from engine.config import ModelConfig, QuantConfig
from engine.layers import Context
from engine.loading import fill_model
from engine.models.decoder import Decoder
from engine.models.linears import linear_modules
from engine.ops.contract import Array, Ops
from engine.quant.as_stored import AsStored
from engine.quant.grades import needs_layer
from engine.quant.method import LinearMethod, Weight
from engine.quant.recipe import Recipe
from engine.quant.registry import LayerMethods
from engine.quant.scheme import HEAD
from engine.weights.checkpoint import Checkpoint
from engine.weights.quantised_on_reading import QuantisedOnReading
from engine.workspace import Workspace

F32 = NDArray[np.float32]
_STEP = 512  # tokens run at once


@dataclass(slots=True)
class LayerError:
    """Sums of squares over everything a layer has put out."""

    difference: float = 0.0
    output: float = 0.0

    @property
    def relative(self) -> float:
        """NaN where the layer puts out nothing but zeros."""
        return math.sqrt(self.difference / self.output) if self.output else math.nan


class Probe:
    """A layer's method that computes as stored, and beside it measures another method on the same input."""

    name = "probe"

    def __init__(
        self,
        errors: Sequence[LayerError],
        full: AsStored,
        other: LinearMethod,
        ops: Ops,
        shards: Callable[[], Sequence[Weight]] | None,
    ) -> None:
        self._errors = errors  # of each shard
        self._full = full
        self._other = other
        self._ops = ops
        self._shards = shards  # for the other method, where it does not quantise what it is given
        self._ends: list[int] = []  # of the shards' outputs

    def pack(self, shards: Sequence[Weight]) -> Any:
        assert all(isinstance(shard, np.ndarray) for shard in shards), "only plain checkpoints are probed"
        arrays: list[Array] = list(shards)  # type: ignore[arg-type]
        self._ends = list(np.cumsum([len(array) for array in arrays]))
        return self._full.pack(arrays), self._other.pack(arrays if self._shards is None else self._shards())

    def prepare(self, x: Array) -> Array:
        return self._full.prepare(x)

    def prepare_norm(self, x: Array, weight: F32, eps: float) -> Array:
        return self._full.prepare_norm(x, weight, eps)

    def prepare_silu_mul(self, gate_up: Array) -> Array:
        return self._full.prepare_silu_mul(gate_up)

    def matmul(
        self,
        operand: Array,
        weight: Any,
        *,
        out: Array,
        bias: F32 | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        plain, quantised = weight
        self._measure(operand, plain, quantised, self._ops.empty(out.shape, np.dtype(np.float32)))
        return self._full.matmul(operand, plain, out=out, bias=bias, residual=residual, num_decode_rows=num_decode_rows)

    def _measure(self, x: Array, plain: Any, quantised: Any, exact: Array) -> None:
        self._full.matmul(x, plain, out=exact)
        found = self._other.matmul(self._other.prepare(x), quantised, out=np.empty_like(exact))
        start = 0
        for end, error in zip(self._ends, self._errors, strict=True):
            y, other = (part[:, start:end].astype(np.float64) for part in (exact, found))
            error.difference += float(((other - y) ** 2).sum())
            error.output += float((y**2).sum())
            start = end


def layer_errors(
    directory: Path,
    config: ModelConfig,
    ops: Ops,
    dtype: np.dtype[Any],
    quant: QuantConfig,
    windows: Iterable[Sequence[int]],
) -> dict[str, LayerError]:
    """Module name -> error, in the model's order, of a plain checkpoint under `quant` (resolved).

    windows: token ids, each a sequence of its own. Raises WeightsError, NumericalError, CapacityError, and
    InvalidArgument for layers that do not fit the method.
    """
    errors: dict[str, LayerError] = {}
    full = AsStored(ops, Workspace(ops))
    others = LayerMethods(quant, ops, Workspace(ops))

    with Checkpoint(directory) as checkpoint:
        quantised = _quantised(checkpoint, config, quant, ops) if needs_layer(quant.grade) else None

        def probes(names: Sequence[str], K: int) -> LinearMethod:
            if tuple(names) == (HEAD,):
                return full
            errors.update((name, LayerError()) for name in names)
            shards = None if quantised is None else partial(_tensors, quantised, names)
            return Probe([errors[name] for name in names], full, others(names, K), ops, shards)

        model = Decoder(config, Context(ops, Workspace(ops), dtype, probes))
        fill_model(model, checkpoint, ops)
    texts = list(windows)
    sequence = OneSequence(model, ops, dtype, max(map(len, texts)))
    for tokens in texts:
        for start in range(0, len(tokens), _STEP):
            sequence.run(tokens[start : start + _STEP], start)
    return errors


def _quantised(source: Checkpoint, config: ModelConfig, quant: QuantConfig, ops: Ops) -> QuantisedOnReading:
    recipe = Recipe(quant.method, quant.grade, fallback=quant.fallback)
    return QuantisedOnReading(source, recipe, ops, linear_modules(config), None, config.head_dim)


def _tensors(source: QuantisedOnReading, modules: Sequence[str]) -> list[Weight]:
    return [source.tensor(f"{module}.weight") for module in modules]


def kind_and_depth(module: str) -> tuple[str, int]:
    """("q_proj", 3) of "model.layers.3.self_attn.q_proj"."""
    parts = module.split(".")
    return parts[-1], int(parts[2])


def pooled(errors: Mapping[str, LayerError], by: Literal["kind", "depth"]) -> dict[Any, float]:
    """Root mean square of the layers' relative errors by kind or depth, each layer counting alike."""
    groups: dict[Any, list[float]] = {}
    for module, error in errors.items():
        kind, depth = kind_and_depth(module)
        groups.setdefault(kind if by == "kind" else depth, []).append(error.relative)
    return {key: math.sqrt(float(np.mean(np.square(values)))) for key, values in groups.items()}
