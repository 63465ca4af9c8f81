"""The pieces decoders are built from: embedding, norm, linear, attention, MLP.

A layer knows its parameters by their checkpoint names and hands each one out as a `Parameter` that fills it; whoever
loads weights proves that all are filled exactly once. Layers hold no activations: those live in the `Workspace`. The
arithmetic is the backend's (`Ops`) and the quantisation method's (`LinearMethod`); nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.config import ModelConfig, RopeConfig
from engine.ops.contract import Array, KVCache, Ops
from engine.quant.method import LinearMethod, Weight
from engine.rope import rope_table
from engine.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Parameter:
    """One checkpoint tensor a layer wants.

    fill(tensor) takes it (possibly read-only views of a mapped file) and returns the names of tensors whose source
    memory is no longer needed, because they were copied or laid out anew. Only linear layers' weights may be quantised.
    """

    name: str
    shape: tuple[int, ...]
    fill: Callable[[Any], Sequence[str]]


class Methods(Protocol):
    """Which method serves which linear layer."""

    def __call__(self, names: Sequence[str], K: int) -> LinearMethod:
        """names: the checkpoint prefixes of the shards that share an input of K."""


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer of one model shares."""

    ops: Ops
    workspace: Workspace
    dtype: np.dtype[Any]  # of activations
    methods: Methods


class Embedding:
    """Token table [V, C], kept as stored (memory-mapped)."""

    def __init__(self, context: Context, name: str, vocab_size: int, hidden_size: int) -> None:
        self._context = context
        self._name = name
        self._shape = (vocab_size, hidden_size)
        self.table: Array | None = None

    def parameters(self) -> Iterator[Parameter]:
        yield Parameter(self._name, self._shape, self._fill)

    def _fill(self, array: Array) -> Sequence[str]:
        self.table = self._context.ops.constant(array)
        return (self._name,)  # rows are read on demand; nothing of it need stay resident

    def __call__(self, token_ids: NDArray[np.int32]) -> Array:
        assert self.table is not None
        context = self._context
        out = context.workspace.take("hidden", (len(token_ids), self._shape[1]), context.dtype)
        return context.ops.embed(self.table, token_ids, out=out)


class RMSNorm:
    """Weight [C] of a root-mean-square norm, in fp32 whatever its stored type (an exact conversion)."""

    def __init__(self, context: Context, name: str, size: int, eps: float) -> None:
        self._context = context
        self._name = name
        self._size = size
        self._weight: Array | None = None
        self.eps = eps

    @property
    def weight(self) -> Array:
        assert self._weight is not None
        return self._weight

    def parameters(self) -> Iterator[Parameter]:
        yield Parameter(self._name, (self._size,), self._fill)

    def _fill(self, array: Array) -> Sequence[str]:
        self._weight = self._context.ops.constant(array.astype(np.float32))
        return (self._name,)


class Linear:
    """One or more weight shards [N_i, K] that read the same input, multiplied in one call.

    names are the shards' checkpoint prefixes (".weight" and ".bias" are appended); outputs lie side by side in order.
    """

    def __init__(self, context: Context, shards: dict[str, int], K: int, *, bias: bool, role: str) -> None:
        self._context = context
        self._method = context.methods(tuple(shards), K)
        self._shards = shards  # name -> N_i
        self._K = K
        self._role = role
        self._pending: dict[str, Weight] = {}
        self._weight: Any = None
        self.N = sum(shards.values())
        self._biases: dict[str, Array] | None = {} if bias else None
        self._bias: Array | None = None

    def parameters(self) -> Iterator[Parameter]:
        for name, rows in self._shards.items():
            yield Parameter(f"{name}.weight", (rows, self._K), partial(self.fill_weight, name))
            if self._biases is not None:
                yield Parameter(f"{name}.bias", (rows,), partial(self._fill_bias, self._biases, name))

    def _fill_bias(self, biases: dict[str, Array], name: str, array: Array) -> Sequence[str]:
        biases[name] = array.astype(np.float32)
        if len(biases) == len(self._shards):
            self._bias = self._context.ops.constant(np.concatenate([biases[shard] for shard in self._shards]))
        return (f"{name}.bias",)

    def fill_weight(self, name: str, shard: Weight) -> Sequence[str]:
        """Take one shard; the last one to arrive packs them all and releases their sources."""
        self._pending[name] = shard
        if len(self._pending) < len(self._shards):
            return ()
        self._weight = self._method.pack([self._pending[shard] for shard in self._shards])
        self._pending.clear()
        return tuple(f"{shard}.weight" for shard in self._shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in the backend's layout, which a decode step reads once."""
        return self._weight.nbytes

    def prepare(self, x: Array) -> Any:
        """Operand of x [T, K]."""
        return self._method.prepare(x)

    def prepare_norm(self, x: Array, norm: RMSNorm) -> Any:
        """Operand of the normalised x [T, K]."""
        return self._method.prepare_norm(x, norm.weight, norm.eps)

    def prepare_silu_mul(self, gate_up: Array) -> Any:
        """Operand of silu(gate) · up; gate_up [T, 2K]."""
        return self._method.prepare_silu_mul(gate_up)

    def __call__(
        self,
        operand: Any,
        T: int,
        *,
        residual: Array | None = None,
        dtype: np.dtype[Any] | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        """[T, N]; with a residual [T, N] the sum is written over it. num_decode_rows: as in the step's `Batch`."""
        out = residual
        if out is None:
            out = self._context.workspace.take(self._role, (T, self.N), dtype or self._context.dtype)
        return self._method.matmul(
            operand, self._weight, out=out, bias=self._bias, residual=residual, num_decode_rows=num_decode_rows
        )


class RotaryTable:
    """cos | sin of every position met so far; a context of 128k tokens costs nothing before it is used."""

    def __init__(self, context: Context, rope: RopeConfig, head_dim: int) -> None:
        self._context = context
        self._rope = rope
        self._head_dim = head_dim
        self._table: Array = np.empty((0, head_dim), np.float32)

    def covering(self, num_positions: int) -> Array:
        """[P, D] with P at least num_positions; doubles, so that growing costs no more than the final size twice."""
        if num_positions > len(self._table):
            rows = max(num_positions, 2 * len(self._table), 512)
            self._table = self._context.ops.constant(rope_table(self._rope, self._head_dim, rows))
        return self._table


class Attention:
    """Pre-norm grouped-query attention over the paged cache: norm, q|k|v, (qk-norm,) rope, attention, output."""

    def __init__(self, context: Context, config: ModelConfig, prefix: str, norm: str, layer: int) -> None:
        D, H, KVH, C = config.head_dim, config.num_heads, config.num_kv_heads, config.hidden_size
        self._context = context
        self._layer = layer
        self._window = config.layer_windows[layer]
        self._scale = D**-0.5
        self._eps = config.rms_norm_eps
        self._width = H * D
        self._norm = RMSNorm(context, f"{norm}.weight", C, config.rms_norm_eps)
        shards = {f"{prefix}.q_proj": H * D, f"{prefix}.k_proj": KVH * D, f"{prefix}.v_proj": KVH * D}
        self._qkv = Linear(context, shards, C, bias=config.qkv_bias, role="qkv")
        self._output = Linear(context, {f"{prefix}.o_proj": C}, H * D, bias=config.o_bias, role="o")
        self._q_norm = RMSNorm(context, f"{prefix}.q_norm.weight", D, config.rms_norm_eps) if config.qk_norm else None
        self._k_norm = RMSNorm(context, f"{prefix}.k_norm.weight", D, config.rms_norm_eps) if config.qk_norm else None

    def parameters(self) -> Iterator[Parameter]:
        for part in (self._norm, self._qkv, self._output, self._q_norm, self._k_norm):
            if part is not None:
                yield from part.parameters()

    @property
    def weight_bytes(self) -> int:
        return self._qkv.nbytes + self._output.nbytes

    def __call__(self, x: Array, step: Any, cache: KVCache, rope_table: Array) -> Array:
        """x [T, C] plus attention's output, written over x; rope_table [P, D] covers the step's positions."""
        ops, take, T = self._context.ops, self._context.workspace.take, len(x)
        qkv = self._qkv(self._qkv.prepare_norm(x, self._norm), T, num_decode_rows=step.num_decode_rows)
        q = ops.rope_and_cache(
            qkv,
            rope_table,
            step,
            cache,
            self._layer,
            q_norm=self._q_norm.weight if self._q_norm else None,
            k_norm=self._k_norm.weight if self._k_norm else None,
            eps=self._eps,
            out=take("q", (T, self._width), x.dtype),
        )
        out = take("attention", (T, self._width), x.dtype)
        ops.attention(q, step, cache, self._layer, scale=self._scale, window=self._window, out=out)
        return self._output(self._output.prepare(out), T, residual=x, num_decode_rows=step.num_decode_rows)


class GatedMLP:
    """Pre-norm SwiGLU feed-forward: norm, gate|up, silu · up, down."""

    def __init__(self, context: Context, config: ModelConfig, prefix: str, norm: str) -> None:
        C, F = config.hidden_size, config.intermediate_size
        self._norm = RMSNorm(context, f"{norm}.weight", C, config.rms_norm_eps)
        shards = {f"{prefix}.gate_proj": F, f"{prefix}.up_proj": F}
        self._gate_up = Linear(context, shards, C, bias=config.mlp_bias, role="gate_up")
        self._down = Linear(context, {f"{prefix}.down_proj": C}, F, bias=config.mlp_bias, role="down")

    def parameters(self) -> Iterator[Parameter]:
        for part in (self._norm, self._gate_up, self._down):
            yield from part.parameters()

    @property
    def weight_bytes(self) -> int:
        return self._gate_up.nbytes + self._down.nbytes

    def __call__(self, x: Array, step: Any) -> Array:
        """x [T, C] plus the MLP's output, written over x."""
        T, num_decode_rows = len(x), step.num_decode_rows
        gate_up = self._gate_up(self._gate_up.prepare_norm(x, self._norm), T, num_decode_rows=num_decode_rows)
        return self._down(self._down.prepare_silu_mul(gate_up), T, residual=x, num_decode_rows=num_decode_rows)
