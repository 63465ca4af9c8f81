"""The contract every backend fulfils: what each operation computes, on which shapes and types.

A backend is a value (`Ops`) chosen once from the device; models call nothing else. `engine.ops.reference` is the NumPy
definition of every operation, `engine.ops.cpu` the C++ one. Arrays are row-major ("C") unless said otherwise; on CPU
backends they are NumPy arrays whose dtype is float32, float16 or ml_dtypes.bfloat16.

Guarantees each backend gives:
* fp32 accumulation, one rounding to the output's dtype;
* a row's result depends on that row alone (and for attention on its own sequence), bitwise: never on T, on the other
  rows, on how a prefill was cut into chunks or on the number of threads. Hence every reduction order is a function of
  K, D or the absolute position alone. A backend with `short_prompt_tokens` has one order for decode rows and another
  for prefill rows, in products and attention (`num_decode_rows` says which are which, see `Batch`); others ignore it;
* `rms_norm`, `rope_and_cache`, `silu_mul`, `embed` and the codes of `prepare_*` and `quantize_*` have the same bits
  on every backend (their arithmetic is fixed in `reference`, `engine.ops.fp4` and `engine.ops.fp8`); `linear`,
  `fp4_linear`, `w4a16_linear`, `fp8_linear`, `w8a16_linear` and `attention` may differ between backends in accumulation
  order only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch, SamplingRow, StepLimits
from engine.fp4_types import Format, Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops.fp4.feedback import Feedback
from engine.ops.fp4.grades import Grade
from engine.ops.fp4.split import ScaleRule

Array = NDArray[Any]  # activations: float32, float16 or ml_dtypes.bfloat16
Norm = tuple[NDArray[np.float32], float]  # an RMSNorm's weight [K] and eps


class PackedWeight(Protocol):
    """A weight [N, K] in the backend's own layout; N counts all shards one after the other."""

    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class PackedFp4(Protocol):
    """An FP4 weight [N, K] in the backend's own layout: the codes, block scales and global scales it was given."""

    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class PackedFp8(Protocol):
    """An FP8 weight [N, K] in the backend's own layout: the codes and scales it was given."""

    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Fp4Operand(Protocol):
    """Activations [T, K] in FP4. A backend's own class, its arrays named as in `SharqOperand` or `Fp4Matrix`."""

    @property
    def format(self) -> str: ...
    @property
    def K(self) -> int: ...
    @property
    def g(self) -> NDArray[np.float32]: ...


class KVCache(Protocol):
    """Paged K and V of all layers in the backend's own layout; `block_size` tokens a block.

    They have the activations' dtype, or are E4M3 codes: K after its rotation and V, each rounded once, from fp32, to
    e4m3(clamp(fp32(x / scale), ±448)), nearest, ties to even, and read as code × scale, exactly. The scale is one of a
    layer's K or V and fixed for the cache's life.
    """

    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Steps(Protocol):
    """What a backend with a device of its own does with a step as a whole, so that it meets the host once."""

    description: str  # for the user: "recorded decode steps up to 64, sampling on the device"

    def hidden(self, batch: Batch, forward: Callable[[Any, int], Array]) -> Array:
        """Hidden states [T, C] of a step, valid until the next one.

        forward(staged batch, num_positions) gives them. It may be called now and never again: what it does must follow
        from the staged batch's shapes and from num_positions, above which no position is.
        """

    def choose(
        self, hidden: Array, rows: Sequence[int], choices: Sequence[SamplingRow], head: Callable[[Array], Array]
    ) -> list[int | None]:
        """The next token of each of these rows of hidden [T, C], as `engine.sampler` defines it (a sum's last bits may
        differ), or None where the row's logits are not such that one can be chosen.

        head gives logits [R, V] of hidden states [R, C]; of it the same holds as of forward. Raises NumericalError as
        `Ops.to_host` does.
        """


class Ops(Protocol):
    """The operations of one backend. `out` arrays are written in full and returned; they never overlap inputs, except
    that `residual` of `linear` may be `out` itself. A `weight` is what this backend's `pack_weight` returned, a `cache`
    what its `new_kv_cache` did: no backend takes another's, which is why these parameters carry no type."""

    kernel_path: str  # what runs, for the user: "avx512-bf16, 2 threads" | "numpy"
    kv_block_size: int  # tokens per KV block this backend's layout wants
    short_prompt_tokens: int | None  # prompts of more have prefill rows (`engine.scheduler`); None: no row is one

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Uninitialised memory this backend can write to (64-byte aligned on the CPU)."""

    def constant(self, array: Array) -> Array:
        """A parameter (norm weight, bias, table) in this backend's memory; on the CPU the array itself."""

    def stage(self, batch: Batch) -> Any:
        """A step's batch in this backend's memory, as `embed`, `rope_and_cache` and `attention` want it."""

    def take_rows(self, x: Array, rows: NDArray[np.int32]) -> Array:
        """x[rows] [R, C], a copy; x [T, C], rows [R] on the host."""

    def to_host(self, x: Array) -> NDArray[Any]:
        """x as NumPy has it, once every operation before is done; no copy on the CPU.

        Raises NumericalError where an operation since the last call met NaN or infinity and could not say so at once.
        """

    def all_finite(self, array: Array) -> bool:
        """Whether no element is NaN or infinite. Any shape; float32, float16, bfloat16."""

    def pack_weight(self, shards: Sequence[Array]) -> PackedWeight:
        """Lay [N_i, K] shards (one dtype, one K) out for `linear`; the values stay exactly as given."""

    def linear(
        self,
        x: Array,
        weight: Any,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        """out = x · weightᵀ + bias + residual.

        x [T, K]; bias [N]; residual [T, N] of x's dtype; out [T, N] of x's dtype or float32. Products and sums in fp32
        (a bf16 × bf16 product is exact there); bias, then residual are added in fp32 before the one rounding.
        num_decode_rows: as in the step's `Batch`.
        """

    def prepare_sharq(
        self,
        x: Array,
        *,
        format: Format = "nvfp4",
        sparse: bool = True,
        scale: ScaleRule = "token",
        norm: Norm | None = None,
        silu: bool = False,
    ) -> Fp4Operand:
        """SharQ's split of activations into backbone and residual, to the bits of `engine.ops.fp4.split`.

        x [T, K] float32 or bfloat16, K a multiple of 32 (hif4: 64). norm = (weight [K], eps): of bf16(rms_norm(x));
        silu: of bf16(silu(gate) · up), x [T, 2K] = gate | up; not both. scale: nvfp4's g per row, or one for all rows.
        Raises NumericalError where x, or x rounded to bf16, holds NaN or infinity.
        """

    def prepare_fp4(
        self,
        x: Array,
        *,
        format: Format = "nvfp4",
        scale: ScaleRule = "token",
        norm: Norm | None = None,
        silu: bool = False,
    ) -> Fp4Operand:
        """Activations in one path: nvfp4 in blocks of 16, mxfp4 32, hif4 64. Parameters as for `prepare_sharq`."""

    def quantize_weight(self, w: Array, *, format: Format, block: int, grade: Grade) -> Fp4Matrix:
        """One shard w [N, K] with a global scale of its own, to the bits of `engine.ops.fp4.grades`.

        w float32, bfloat16 or float16, N ≥ 1, K a multiple of the block (nvfp4 16 or 32, mxfp4 32, hif4 64). Raises
        InvalidArgument (a grade the format does not have) and NumericalError (NaN, infinity).
        """

    def quantize_feedback(
        self, w: Array, g: np.float32, feedback: Feedback, *, format: Format, block: int
    ) -> Fp4Matrix:
        """w [N, K], finite, with the global scale g and codes that make up for each other's errors, to the bits of
        `engine.ops.fp4.feedback`. Types and shapes as for `quantize_weight`; nvfp4 and mxfp4 only (InvalidArgument).
        """

    def pack_fp4(self, shards: Sequence[Fp4Matrix], *, weights_only: bool = False) -> PackedFp4:
        """Lay [N_i, K] shards (one format, K and block) out for `fp4_linear`, or, weights_only, for `w4a16_linear`.

        Each row keeps its own g. Backends may have one layout for both.
        """

    def fp4_linear(
        self,
        operand: Any,
        weight: Any,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        """out = (backbone + residual path) · weightᵀ · g · g_w + bias + residual; the weight's format is the operand's.

        operand: from this backend's `prepare_*`, or a `SharqOperand` or `Fp4Matrix`; weight: from its `pack_fp4`. out
        [T, N] of any activation dtype; bias [N]; residual [T, N] of out's dtype, may be out itself. Dot products are
        exact integers within a group of k, fp32 across groups and paths, then one rounding.
        """

    def w4a16_linear(
        self,
        x: Array,
        weight: Any,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        """The same with activations x [T, K] as they are: out = x · (weight's values)ᵀ + bias + residual."""

    def prepare_fp8(self, x: Array, *, norm: Norm | None = None, silu: bool = False) -> Any:
        """Activations in E4M3 with a scale per token, to the bits of `engine.ops.fp8`; arrays named as in `Fp8Operand`.

        x [T, K] of any activation dtype, any K; norm and silu as for `prepare_sharq`. Raises NumericalError where x, or
        what norm or silu make of it, holds NaN or infinity.
        """

    def pack_fp8(self, shards: Sequence[Fp8Matrix]) -> PackedFp8:
        """Lay [N_i, K] shards out for `fp8_linear`. Their scales may be shared by any number of rows, but along k by as
        many in all of them. Raises NumericalError (NaN codes) and InvalidArgument.
        """

    def fp8_linear(
        self,
        operand: Any,
        weight: Any,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        """out = operand · weightᵀ + bias + residual, scales included; weight: from this backend's `pack_fp8`.

        out [T, N] of any activation dtype; bias [N]; residual [T, N] of out's dtype, may be out itself. E4M3 products
        are exact in fp32 and summed there, times the weight's scale, then the token's; one rounding at the end.
        """

    def w8a16_linear(
        self,
        x: Array,
        weight: Any,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        """The same with activations x [T, K] as they are: out = x · (weight's values)ᵀ + bias + residual."""

    def embed(self, table: Array, token_ids: NDArray[np.int32], *, out: Array) -> Array:
        """out[t] = table[token_ids[t]]; table [V, C], converted to out's dtype [T, C]."""

    def rms_norm(self, x: Array, weight: NDArray[np.float32], eps: float, *, out: Array) -> Array:
        """out = (x · inv_rms) · weight; x, out [T, C]; weight [C]. The order of the sum is fixed: see `reference`."""

    def silu_mul(self, gate_up: Array, *, out: Array) -> Array:
        """out = silu(gate) · up; gate_up [T, 2F] = gate | up; out [T, F]."""

    def kv_cache_budget(self) -> int:
        """Bytes that a KV cache may take now unless told otherwise."""

    def new_kv_cache(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: np.dtype[Any],
        activations: np.dtype[Any] | None = None,
        scales: NDArray[np.float32] | None = None,
    ) -> KVCache:
        """Zeroed cache of num_blocks · kv_block_size token slots per layer.

        dtype: of K and V, the activations' or ml_dtypes.float8_e4m3fn; activations: theirs, None where it is the same.
        scales [2, layers], of E4M3's K and V; None: 1. Raises InvalidArgument for what the backend does not do.
        """

    def rehearsal(self) -> AbstractContextManager[object] | None:
        """Steps run inside take the memory that they need and compute nothing; later ones find what is kept of it.

        What it yields holds the rest, which a step takes in passing, for as long as it lives. None where the backend
        does not ask for that. Raises CapacityError as operations do.
        """

    def new_steps(self, cache: Any, *, num_heads: int, limits: StepLimits) -> Steps | None:
        """For a model of so many query heads, whose K and V this cache takes; None where steps are run operation by
        operation and the host chooses tokens."""

    def rope_and_cache(
        self,
        qkv: Array,
        rope_table: NDArray[np.float32],
        batch: Batch,
        cache: Any,
        layer: int,
        *,
        q_norm: NDArray[np.float32] | None,
        k_norm: NDArray[np.float32] | None,
        eps: float,
        out: Array,
    ) -> Array:
        """Per head: RMSNorm over D where q_norm/k_norm [D] are given, then rotary embedding; K and V go to the cache.

        qkv [T, (H + 2·KVH)·D] = q | k | v; rope_table [P, D] = cos [D/2] | sin [D/2] per position, with
        out_i = x_i·cos_i − x_{i+D/2}·sin_i and out_{i+D/2} = x_{i+D/2}·cos_i + x_i·sin_i in fp32. Rows go to
        batch.slot_mapping. out [T, H·D] receives the rotated q. With an E4M3 cache it raises NumericalError where K or
        V holds NaN or infinity.
        """

    def attention(
        self, q: Array, batch: Batch, cache: Any, layer: int, *, scale: float, window: int | None, out: Array
    ) -> Array:
        """Causal attention of every row over its own sequence's cached tokens (its own included).

        q, out [T, H·D]; head h reads KV head h // (H / KVH). A row at position p of its sequence sees positions
        max(0, p − window + 1) … p. softmax(scale · q·kᵀ) in fp32.
        """
