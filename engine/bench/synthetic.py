"""Models with random weights in the shapes of real ones: for timing, where values do not matter.

In memory (`random_decoder`, built and quantised layer by layer) or as a Hugging Face style directory (`write_model`,
`python -m engine.bench synthetic`). Weights are scaled to keep activations finite, and repeat after some hundred rows;
nothing sensible comes out. The tokenizer knows single bytes only, so give such a model token ids.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.bench.quick_weights import QuickGpuOps, shape_only
from engine.bench.shapes import SHAPES, shape_config
from engine.config import ModelConfig, QuantConfig
from engine.errors import InvalidArgument
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.layers import Context
from engine.models.decoder import Decoder
from engine.models.linears import linear_modules
from engine.ops.contract import Ops
from engine.ops.reference import ReferenceOps
from engine.quant.method import Weight
from engine.quant.recipe import Recipe
from engine.quant.registry import AS_STORED, LayerMethods
from engine.quant.scheme import HEAD
from engine.weights.checkpoint import INDEX
from engine.weights.write import save_safetensors
from engine.workspace import Workspace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BF16 = np.dtype(ml_dtypes.bfloat16)
_ROWS = 256  # of random numbers; then they repeat
_SHARD_BYTES = 2 << 30


def random_decoder(config: ModelConfig, ops: Ops, dtype: np.dtype[Any], quant: QuantConfig) -> Decoder:
    """A model that never was on disk; quant: resolved. One layer at a time exists unquantised."""
    workspace = Workspace(ops)
    model = Decoder(config, Context(ops, workspace, dtype, LayerMethods(quant, ops, workspace)))
    linears = linear_modules(config) if isinstance(ops, QuickGpuOps) else {}
    for parameter in model.parameters():
        module = parameter.name.removesuffix(".weight")
        if module in linears:
            parameter.fill(random_weight(_stored_as(module, linears[module][1], quant), *linears[module], ops))
        else:
            parameter.fill(_values(parameter.name, parameter.shape))
    return model


def _stored_as(module: str, K: int, quant: QuantConfig) -> str:
    """The method whose weights a linear layer has."""
    if module == HEAD:
        return quant.head or AS_STORED
    if quant.method == AS_STORED or (quant.fallback and not Recipe(quant.method, "rtn").body.fits(K)):
        return AS_STORED
    return quant.method


def random_weight(method: str, N: int, K: int, ops: Ops) -> Weight:
    """A weight [N, K] as a quantised checkpoint of this method would hold it; bf16 for "bf16". K must fit.

    For `QuickGpuOps` a weight's shape without its memory.
    """
    if isinstance(ops, QuickGpuOps):
        return shape_only(random_weight(method, 1, K, ReferenceOps()), N)
    w = _matrix(min(N, _ROWS), K)
    if method == AS_STORED:
        return _repeated(w, N)
    recipe = Recipe(method, "rtn")
    m = recipe.quantize(w, recipe.body, ReferenceOps())
    if isinstance(m, Fp8Matrix):
        return Fp8Matrix(_repeated(m.payload, N), _repeated(m.scale, N), m.tile)
    return Fp4Matrix(m.format, _repeated(m.payload, N), _repeated(m.scale, N), _repeated(m.g, N))


def write_model(shape: str, directory: Path) -> None:
    """A directory of the named shape, in bf16, in files of about 2 GB; an existing one is kept.

    Raises InvalidArgument for an unknown shape.
    """
    config = shape_config(shape)
    if (directory / "config.json").exists():  # written last
        return
    directory.mkdir(parents=True, exist_ok=True)
    _byte_tokenizer().save(str(directory / "tokenizer.json"))
    files: dict[str, str] = {}  # tensor -> file
    for number, shard in enumerate(_shards(config), start=1):
        name = f"model-{number:05d}.safetensors"
        save_safetensors(directory / name, shard)
        files |= dict.fromkeys(shard, name)
    (directory / INDEX).write_text(json.dumps({"weight_map": files}, indent=1))
    (directory / "config.json").write_text(json.dumps(SHAPES[shape], indent=1))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shape", help=" | ".join(SHAPES))
    parser.add_argument("directory", type=Path, help="to write; must be empty or absent")


def main(options: argparse.Namespace) -> None:
    """Write a model directory for other command lines to read."""
    if options.directory.exists() and any(options.directory.iterdir()):
        raise InvalidArgument(f"{options.directory} is not empty")
    write_model(options.shape, options.directory)


def _shards(config: ModelConfig) -> Iterator[dict[str, NDArray[Any]]]:
    """The model's tensors, in parts of about _SHARD_BYTES."""
    ops = ReferenceOps()  # never runs: the decoder only says what it wants
    methods = LayerMethods(QuantConfig(AS_STORED, head=AS_STORED), ops, Workspace(ops))
    shard: dict[str, NDArray[Any]] = {}
    for parameter in Decoder(config, Context(ops, Workspace(ops), BF16, methods)).parameters():
        shard[parameter.name] = _values(parameter.name, parameter.shape)
        if sum(array.nbytes for array in shard.values()) >= _SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _values(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A parameter: random matrices, biases of 0, norms of 1."""
    if len(shape) == 1:
        return np.full(shape, 0 if name.endswith(".bias") else 1, BF16)
    N, K = shape
    return _repeated(_matrix(min(N, _ROWS), K), N)


@cache
def _matrix(N: int, K: int) -> NDArray[Any]:
    values = np.random.default_rng(0).standard_normal((N, K), np.float32) * np.float32(K**-0.5)
    return values.astype(BF16)


def _repeated(array: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.resize(array, (rows, *array.shape[1:]))


def _byte_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # nothing else here needs it

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
