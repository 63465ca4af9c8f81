"""Types of the compiled extension; what the operations compute is in engine/ops/contract.py."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from engine.fp4_types import Fp4Matrix, SharqOperand
from engine.fp8_types import Fp8Matrix
from engine.ops.contract import Array

kv_block_size: int

def isa_names() -> list[str]: ...
def new_kv_cache(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: np.dtype[Any],
    scales: NDArray[np.float32] | None = None,
) -> KVCache: ...

@final
class PackedWeight:
    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shard_rows(self) -> tuple[int, ...]: ...

@final
class PackedFp4:
    @property
    def format(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

@final
class PackedFp8:
    @property
    def N(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

@final
class PreparedOperand:
    @property
    def format(self) -> str: ...
    @property
    def T(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def paths(self) -> int: ...
    @property
    def g(self) -> NDArray[np.float32]: ...
    @property  # two paths
    def backbone(self) -> NDArray[np.uint8]: ...
    @property
    def meta(self) -> NDArray[np.uint8] | None: ...
    @property
    def backbone_scale(self) -> NDArray[Any]: ...
    @property
    def residual(self) -> NDArray[np.uint8]: ...
    @property
    def residual_scale(self) -> NDArray[Any]: ...
    @property  # one path
    def payload(self) -> NDArray[np.uint8]: ...
    @property
    def scale(self) -> NDArray[Any]: ...

@final
class KVCache:
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def tiles(self, layer: int) -> NDArray[np.uint8]: ...

@final
class Backend:
    def __init__(self, threads: int, isa: str) -> None: ...
    def pack_weight(self, shards: Sequence[Array]) -> PackedWeight: ...
    def linear(
        self, x: Array, weight: PackedWeight, out: Array, bias: NDArray[np.float32] | None, residual: Array | None
    ) -> None: ...
    def prepare_fp4(
        self,
        x: Array,
        format: str,
        paths: int,
        sparse: bool,
        norm_weight: NDArray[np.float32] | None,
        eps: float,
        silu: bool,
        fixed_g: float,
    ) -> PreparedOperand: ...
    def quantize_weight(
        self, w: Array, format: str, block: int, grade: str
    ) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.float32]]: ...
    def quantize_feedback(
        self,
        w: Array,
        g: float,
        format: str,
        block: int,
        first: NDArray[np.float32],
        later: NDArray[np.float32],
        weight: NDArray[np.float32],
        refinements: int,
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...
    def pack_fp4(self, shards: Sequence[Fp4Matrix]) -> PackedFp4: ...
    def fp4_linear(
        self,
        operand: PreparedOperand | SharqOperand | Fp4Matrix,
        weight: PackedFp4,
        out: Array,
        bias: NDArray[np.float32] | None,
        residual: Array | None,
    ) -> None: ...
    def w4a16_linear(
        self, x: Array, weight: PackedFp4, out: Array, bias: NDArray[np.float32] | None, residual: Array | None
    ) -> None: ...
    def prepare_fp8(
        self,
        x: Array,
        norm_weight: NDArray[np.float32] | None,
        eps: float,
        silu: bool,
        codes: NDArray[np.uint8],
        scale: NDArray[np.float32],
    ) -> None: ...
    def pack_fp8(self, shards: Sequence[Fp8Matrix]) -> PackedFp8: ...
    def fp8_linear(
        self,
        codes: NDArray[np.uint8],
        scale: NDArray[np.float32],
        weight: PackedFp8,
        out: Array,
        bias: NDArray[np.float32] | None,
        residual: Array | None,
    ) -> None: ...
    def w8a16_linear(
        self, x: Array, weight: PackedFp8, out: Array, bias: NDArray[np.float32] | None, residual: Array | None
    ) -> None: ...
    def all_finite(self, array: Array) -> bool: ...
    def embed(self, table: Array, token_ids: NDArray[np.int32], out: Array) -> None: ...
    def rms_norm(self, x: Array, weight: NDArray[np.float32], eps: float, out: Array) -> None: ...
    def silu_mul(self, gate_up: Array, out: Array) -> None: ...
    def rope_and_cache(
        self,
        qkv: Array,
        rope_table: NDArray[np.float32],
        positions: NDArray[np.int32],
        slot_mapping: NDArray[np.int32],
        cache: KVCache,
        layer: int,
        q_norm: NDArray[np.float32] | None,
        k_norm: NDArray[np.float32] | None,
        eps: float,
        out: Array,
    ) -> None: ...
    def attention(
        self,
        q: Array,
        positions: NDArray[np.int32],
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        block_tables: NDArray[np.int32],
        cache: KVCache,
        layer: int,
        scale: float,
        window: int | None,
        out: Array,
    ) -> None: ...
