"""Loading: a checkpoint directory becomes a model on a backend, its weights in the form the methods want.

It joins the three that do not know each other: the checkpoint (engine.weights), the architecture (engine.models) and
the backend (engine.ops). A quantised checkpoint's weights are taken as they are. A plain one's are quantised on the way
in, and kept in the cache on disk where that takes longer than reading them again would.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.cache_directory import cache_directory
from engine.config import ModelConfig, QuantConfig
from engine.errors import CapacityError, InvalidArgument, NumericalError, WeightsError
from engine.json_file import brief
from engine.layers import Context
from engine.models.decoder import Decoder
from engine.models.linears import EMBEDDING, linear_modules
from engine.ops.contract import Ops
from engine.quant.grades import needs_layer
from engine.quant.recipe import Recipe
from engine.quant.registry import AS_STORED, LayerMethods, weight_format
from engine.quant.scheme import HEAD, QuantScheme
from engine.weights.checkpoint import Checkpoint
from engine.weights.coverage import fill
from engine.weights.quant_cache import CachedWeights
from engine.weights.quantised_on_reading import QuantisedOnReading
from engine.weights.quantized import LogicalCheckpoint, Weight
from engine.workspace import Workspace

WORTH_CACHING = 1 << 27  # quantised weights: fewer take under a second
Weights = Checkpoint | LogicalCheckpoint | CachedWeights | QuantisedOnReading
Progress = Callable[
    [str], AbstractContextManager[Callable[[int, int], None]]
]  # a task's name -> its progress(done, total)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model and where its quantised weights came from."""

    model: Decoder
    weights: str  # for the user: "nvfp4, grade sweep, quantised while loading; head as stored"


def load_model(
    config: ModelConfig,
    directory: Path,
    ops: Ops,
    dtype: np.dtype[Any],
    quant: QuantConfig,
    scheme: QuantScheme | None,
    *,
    cache: bool,
    progress: Progress,
) -> Loaded:
    """The model of a checkpoint directory, every parameter filled exactly once and finite.

    quant, scheme: as `registry.resolve` returned and took them. cache: whether weights quantised here may be kept on
    disk. Raises WeightsError, NumericalError, CapacityError, and InvalidArgument for a method that does not fit the
    model.
    """
    with ExitStack() as stack:  # closed files: what the model keeps mapped stays valid
        weights, origin = _open(config, directory, ops, quant, scheme, cache, progress, stack)
        if isinstance(weights, CachedWeights | QuantisedOnReading) and f"{HEAD}.weight" in weights.names():
            config = replace(config, tie_word_embeddings=False)  # a quantised head is a copy
        workspace = Workspace(ops)
        stored = None if isinstance(weights, Checkpoint) else weights.storages()
        context = Context(ops, workspace, dtype, LayerMethods(quant, ops, workspace, stored))
        model = Decoder(config, context)
        try:
            with progress("loading") as update:
                fill_model(model, weights, ops, update)
        except CapacityError as problem:
            raise CapacityError(f"the weights do not fit: {problem}; choose a quant of fewer bits") from None
    return Loaded(model, _described(quant, origin))


def kv_cache_scales(directory: Path, scheme: QuantScheme | None, num_layers: int) -> NDArray[np.float32] | None:
    """The scales [2, layers] of K and V that a checkpoint has for a cache in E4M3, 1 where a layer has none; None where
    no layer has one. Raises WeightsError."""
    if scheme is None or scheme.kv_cache is None:
        return None
    with LogicalCheckpoint(directory, scheme) as weights:
        found = weights.kv_scales()
    if not found:
        return None
    scales = np.ones((2, num_layers), np.float32)
    for layer in range(num_layers):
        attention = f"model.layers.{layer}.self_attn"
        for row, x in enumerate("kv"):  # ModelOpt's name, compressed-tensors'
            name = next((n for n in (f"{attention}.{x}_proj.{x}_scale", f"{attention}.{x}_scale") if n in found), None)
            if name is not None:
                scales[row, layer] = found.pop(name)
    if found:
        raise WeightsError(f"{directory}: {brief(next(iter(found)))} scales no K or V of {num_layers} layers")
    return scales


def fill_model(
    model: Decoder,
    weights: Weights,
    ops: Ops,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Every parameter of the model, exactly once and finite. Raises WeightsError and NumericalError."""
    parameters = {parameter.name: parameter for parameter in model.parameters()}

    def consume(name: str, tensor: Weight) -> None:
        if isinstance(tensor, np.ndarray) and not ops.all_finite(tensor):
            raise NumericalError(f"{weights.directory}: tensor {name} contains NaN or infinite values")
        for used in parameters[name].fill(tensor):
            weights.release(used)

    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    fill(shapes, weights, consume, ignore=model.redundant_tensors, ties=model.tied_tensors, progress=progress)


def _open(
    config: ModelConfig,
    directory: Path,
    ops: Ops,
    quant: QuantConfig,
    scheme: QuantScheme | None,
    cache: bool,
    progress: Progress,
    stack: ExitStack,
) -> tuple[Weights, str]:
    """The weights, and where those that are quantised come from."""
    if scheme is not None:
        return stack.enter_context(LogicalCheckpoint(directory, scheme)), f"from the checkpoint, {scheme.name}"
    source = stack.enter_context(Checkpoint(directory))
    linears = linear_modules(config)
    tied = f"{EMBEDDING}.weight" if config.tie_word_embeddings else None
    origin = "quantised while loading"
    if quant.method == AS_STORED:
        return source, origin
    recipe = Recipe(quant.method, quant.grade, quant.head or AS_STORED, quant.fallback)
    what = (source, recipe, ops, linears, tied, config.head_dim)
    if cache and sum(N * K for N, K in linears.values()) >= WORTH_CACHING:
        try:
            with progress("quantising") as update:
                cached = CachedWeights(*what, cache_directory("quantised"), update)
            return stack.enter_context(cached), f"cached in {cached.entry_directory}"
        except (WeightsError, InvalidArgument) as problem:  # a full disk, another process at work; worse shows up again
            origin = f"{origin}, not cached ({problem})"
    return QuantisedOnReading(*what) if needs_layer(quant.grade) else source, origin


def _described(quant: QuantConfig, origin: str) -> str:
    body, grade = weight_format(quant.method), f", grade {quant.grade}" if quant.grade else ""
    head = "as stored" if quant.head == AS_STORED else quant.head
    if body is None and quant.head == AS_STORED:
        return "as stored"
    return f"{body or 'as stored'}{grade}, {origin}; head {head}"
