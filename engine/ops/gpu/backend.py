"""The GPU backend: `engine.ops.contract.Ops` as launches of the kernels in cuda/, on a GPU or on the emulator.

Parameters go to the device once, when they are packed; a step's batch once, when it is staged; what comes back is what
`to_host` is asked for, or the tokens that `engine.ops.gpu.steps` chose. Kernels meet NaN and infinity where Python does
not look: they raise a flag, which is read with the result, so that a step has one point at which host and device meet.

Decode rows and prefill rows (`engine.scheduler` says which are which) have products of their own, which sum in
different orders, and attention has an order for each; a step with both reads the weights twice. With `deterministic`
every row is a decode row.

Activations are bf16 or f16 (the products have no fp32 form); logits are float32. `sharq_compat` is not done
here: it is for comparing with the paper and multiplies in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.core import Batch, StepLimits
from engine.errors import InvalidArgument
from engine.fp4_types import Format, Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops.contract import Array, Norm, Ops
from engine.ops.fp4.feedback import Feedback
from engine.ops.fp4.grades import Grade
from engine.ops.fp4.split import ScaleRule
from engine.ops.fp8 import cache_scales
from engine.ops.gpu import launch_attention, launch_linear, launch_linear_sm120, launch_rows, weight_layout
from engine.ops.gpu.device import Device, RehearsalDevice
from engine.ops.gpu.launch import Launch
from engine.ops.gpu.launch_attention import AttentionShape
from engine.ops.gpu.launch_linear import OUTPUT_TYPES, KCut, Output, Workspace
from engine.ops.gpu.launch_rows import Rows
from engine.ops.gpu.prefill_products import PrefillProducts
from engine.ops.gpu.staging import Scratch, StagedBatch
from engine.ops.gpu.steps import GpuSteps, StepReport
from engine.ops.gpu.weight_layout import Fp4Units, Fp8Units
from engine.ops.reference import ReferenceOps

_Launches = Callable[[slice, Output], Sequence[Launch]]  # of a product's rows
_I32, _U32, _F32 = np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32)
_ACTIVATIONS = ("bf16", "f16")


@dataclass(frozen=True, slots=True, eq=False)
class GpuKVCache:
    """K and V as cuda/kv_cache.cuh has them: [layers, blocks, KVH, 16, D] each, and a spare block at the end."""

    k: Any  # of the activations' dtype, or uint8: E4M3 codes
    v: Any
    k_scales: Any = None  # float32 [layers, KVH], with codes
    v_scales: Any = None

    @property
    def num_blocks(self) -> int:
        """Without the spare one, which takes what rows that belong to no sequence write."""
        return int(self.k.shape[1]) - 1

    @property
    def block_size(self) -> int:
        return int(self.k.shape[3])

    @property
    def nbytes(self) -> int:
        return int(self.k.nbytes + self.v.nbytes)

    def attention_shape(self, H: int) -> AttentionShape:
        """Of layers with H query heads."""
        _, _, KVH, _, D = self.k.shape
        return AttentionShape(H, KVH, D, "f16" if self.k.dtype == np.float16 else "bf16", self.k_scales is not None)

    def scales_of(self, layer: int) -> tuple[Any, Any]:
        return (None, None) if self.k_scales is None else (self.k_scales[layer], self.v_scales[layer])


@dataclass(frozen=True, slots=True, eq=False)
class GpuOperand:
    """Prepared activations: the arrays of `SharqOperand` or `Fp4Matrix` in device memory, K padded to 128.

    In one path the fields are payload and scale; in two, backbone … residual_scale, with meta where the backbone is
    sparse.
    """

    format: Format
    T: int
    K: int
    sparse: bool
    arrays: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name == "meta":  # a dense backbone has none
            return self.arrays.get(name)
        try:
            return self.arrays[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, rows: slice) -> GpuOperand:
        """Neighbouring rows."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return replace(self, T=len(arrays["g"]), arrays=arrays)

    @property
    def two_paths(self) -> bool:
        return "residual" in self.arrays


@dataclass(frozen=True, slots=True, eq=False)
class GpuFp8Operand:
    """`Fp8Operand` in device memory, K padded to 128."""

    codes: Any  # uint8 [T, padded K]
    scale: Any  # float32 [T]

    def __getitem__(self, rows: slice) -> GpuFp8Operand:
        """Neighbouring rows."""
        return GpuFp8Operand(self.codes[rows], self.scale[rows])


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
    """A 16-bit weight, row by row."""

    w: Any  # [N, K]

    @property
    def N(self) -> int:
        return int(self.w.shape[0])

    @property
    def K(self) -> int:
        return int(self.w.shape[1])

    @property
    def nbytes(self) -> int:
        return int(self.w.nbytes)


class GpuOps:
    """`Ops` on one device.

    A token's result is bitwise the same beside any batch-mates and in any chunk; deterministic: whether it is prompt or
    answer, too. What that costs is the benchmarks' to say. record: whether decode steps are recorded and replayed.
    host: what quantises weights and looks for NaN before they are uploaded, the same whatever it is; default: NumPy.
    """

    kv_block_size = 16

    def __init__(
        self, device: Device, *, deterministic: bool = False, record: bool = True, host: Ops | None = None
    ) -> None:
        self.device = device
        self.deterministic = deterministic
        self._record = record
        self.short_prompt_tokens = None if deterministic else launch_linear.DECODE_TOKENS
        self._fp4_instructions = device.arch in launch_linear_sm120.ARCHITECTURES
        fp4 = ", FP4 instructions" if self._fp4_instructions else ""
        self.kernel_path = device.name + fp4 + (", deterministic" if deterministic else "")
        self._host = host or ReferenceOps()
        self._scratch = Scratch(device)
        self._prefill = PrefillProducts(device, self._scratch)
        self._report = StepReport(device)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        return self.device.empty(shape, np.dtype(dtype))

    def constant(self, array: Array) -> Array:
        return self.device.upload(np.ascontiguousarray(array))

    def stage(self, batch: Batch) -> StagedBatch:
        one_kind = replace(batch, num_decode_rows=None) if self.deterministic else batch
        return StagedBatch(one_kind, self.device, self._scratch)

    def take_rows(self, x: Array, rows: NDArray[np.int32]) -> Array:
        out = self.empty((len(rows), x.shape[1]), x.dtype)
        if len(rows):
            where = self.empty(rows.shape, _I32)
            self.device.write(where, np.ascontiguousarray(rows, np.int32))
            self._run(launch_rows.embed(x, where, out))
        return out

    def to_host(self, x: Array) -> NDArray[Any]:
        host = self.device.download(x)
        self._report.read(0)
        return host

    def all_finite(self, array: Array) -> bool:
        return self._host.all_finite(array)

    def kv_cache_budget(self) -> int:
        return self.device.kv_cache_budget()

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
    ) -> GpuKVCache:
        """Raises InvalidArgument for a dtype of activations that not all kernels have; E4M3 goes with bfloat16."""
        scales = cache_scales(dtype, scales, num_layers)
        if activations is None:
            activations = np.dtype(dtype if scales is None else ml_dtypes.bfloat16)
        if launch_rows.type_name(activations) not in _ACTIVATIONS:
            raise InvalidArgument(f"activations on the GPU are bfloat16 or float16, not {activations}")
        if scales is not None and activations == np.float16:
            raise InvalidArgument(
                "on the GPU a KV cache in FP8 goes with bfloat16 activations, not with float16; choose "
                "dtype='bfloat16' or kv_cache_dtype='auto'"
            )
        shape = (num_layers, num_blocks + 1, num_kv_heads, self.kv_block_size, head_dim)
        stored = np.dtype(dtype if scales is None else np.uint8)
        k, v = (self.device.zeros(shape, stored) for _ in range(2))
        if scales is None:
            return GpuKVCache(k, v)
        k_scales, v_scales = (self.device.upload(np.repeat(own[:, None], num_kv_heads, axis=1)) for own in scales)
        return GpuKVCache(k, v, k_scales, v_scales)

    @contextmanager
    def rehearsal(self) -> Iterator[object]:
        device, self.device = self.device, RehearsalDevice(self.device)
        try:
            yield self.device.passing
        finally:
            self.device = device

    def new_steps(self, cache: GpuKVCache, *, num_heads: int, limits: StepLimits) -> GpuSteps:
        return GpuSteps(
            self.device,
            self._scratch,
            self._report,
            cache.attention_shape(num_heads),
            block_size=self.kv_block_size,
            spare_block=cache.num_blocks,
            limits=limits,
            stage=self.stage,
            record=self._record,
        )

    # ---- rows --------------------------------------------------------------------------------------------------------

    def embed(self, table: Array, token_ids: NDArray[np.int32], *, out: Array) -> Array:
        return self._into(out, launch_rows.embed(table, token_ids, out))

    def rms_norm(self, x: Array, weight: NDArray[np.float32], eps: float, *, out: Array) -> Array:
        return self._into(out, launch_rows.rms_norm(x, weight, eps, out))

    def silu_mul(self, gate_up: Array, *, out: Array) -> Array:
        return self._into(out, launch_rows.silu_mul(gate_up, out))

    def rope_and_cache(
        self,
        qkv: Array,
        rope_table: NDArray[np.float32],
        batch: Any,
        cache: Any,
        layer: int,
        *,
        q_norm: NDArray[np.float32] | None,
        k_norm: NDArray[np.float32] | None,
        eps: float,
        out: Array,
    ) -> Array:
        k, v = cache.k[layer], cache.v[layer]
        k_scales, v_scales = cache.scales_of(layer)
        e4m3 = None if k_scales is None else launch_rows.E4m3Cache(k_scales, v_scales, self._report.invalid)
        args = (qkv, rope_table, batch.positions, batch.slot_mapping, q_norm, k_norm, eps, out, k, v, e4m3)
        return self._into(out, launch_rows.rope_and_cache(*args))

    def attention(
        self, q: Array, batch: Any, cache: Any, layer: int, *, scale: float, window: int | None, out: Array
    ) -> Array:
        shape = cache.attention_shape(q.shape[1] // cache.k.shape[-1])
        planned = batch.planned(shape, window)
        k_scales, v_scales = cache.scales_of(layer)
        arrays = launch_attention.AttentionArrays(
            q=q,
            k_cache=cache.k[layer],
            v_cache=cache.v[layer],
            block_tables=batch.block_tables,
            out=out,
            decode_items=planned.decode_items,
            prefill_items=planned.prefill_items,
            partials=planned.partials,
            arrivals=planned.arrivals,
            k_scales=k_scales,
            v_scales=v_scales,
        )
        launches = launch_attention.launches(shape, planned.plan, arrays, scale=scale, window=window)
        return self._into(out, *launches)

    # ---- activations in FP4 and FP8 ----------------------------------------------------------------------------------

    def prepare_sharq(
        self,
        x: Array,
        *,
        format: Format = "nvfp4",
        sparse: bool = True,
        scale: ScaleRule = "token",
        norm: Norm | None = None,
        silu: bool = False,
    ) -> GpuOperand:
        rows = Rows(x, norm, silu)
        operand = self._operand(format, rows, launch_rows.sharq_shapes(format, sparse, rows.T, rows.K), sparse)
        self._run(launch_rows.prepare_sharq(rows, operand, self._amax(rows, scale), self._report.invalid))
        return operand

    def prepare_fp4(
        self,
        x: Array,
        *,
        format: Format = "nvfp4",
        scale: ScaleRule = "token",
        norm: Norm | None = None,
        silu: bool = False,
    ) -> GpuOperand:
        rows = Rows(x, norm, silu)
        operand = self._operand(format, rows, launch_rows.fp4_shapes(format, rows.T, rows.K), False)
        self._run(launch_rows.prepare_fp4(rows, operand, self._amax(rows, scale), self._report.invalid))
        return operand

    def prepare_fp8(self, x: Array, *, norm: Norm | None = None, silu: bool = False) -> GpuFp8Operand:
        rows = Rows(x, norm, silu)
        codes = self._scratch.operand("codes", (rows.T, launch_rows.padded(rows.K)), np.dtype(np.uint8))
        operand = GpuFp8Operand(codes, self._scratch.operand("scale", (rows.T,), _F32))
        self._run(launch_rows.prepare_fp8(rows, operand.codes, operand.scale, self._report.invalid))
        return operand

    def quantize_weight(self, w: Array, *, format: Format, block: int, grade: Grade) -> Fp4Matrix:
        return self._host.quantize_weight(w, format=format, block=block, grade=grade)

    def quantize_feedback(
        self, w: Array, g: np.float32, feedback: Feedback, *, format: Format, block: int
    ) -> Fp4Matrix:
        return self._host.quantize_feedback(w, g, feedback, format=format, block=block)

    def _operand(self, format: Format, rows: Rows, shapes: dict[str, Any], sparse: bool) -> GpuOperand:
        arrays = {name: self._scratch.operand(name, shape, dtype) for name, (shape, dtype) in shapes.items()}
        return GpuOperand(format, rows.T, rows.K, sparse, arrays)

    def _amax(self, rows: Rows, scale: ScaleRule) -> Any:
        if scale == "token":
            return None
        amax = self.device.zeros((1,), _F32)
        self._run(launch_rows.prepare_amax(rows, amax, self._report.invalid))
        return amax

    # ---- products ----------------------------------------------------------------------------------------------------

    def pack_weight(self, shards: Sequence[Array]) -> _Packed:
        """Raises InvalidArgument for float32 weights, which no kernel multiplies."""
        kinds = {shard.dtype for shard in shards}
        if len(kinds) > 1 or not kinds <= OUTPUT_TYPES.keys() - {_F32}:
            raise InvalidArgument(
                f"weights on the GPU are bfloat16 or float16, not {' and '.join(map(str, kinds))}; convert the "
                "checkpoint, or choose a quantised method"
            )
        return _Packed(self.device.upload(np.concatenate(shards)))

    def linear(
        self,
        x: Array,
        weight: _Packed,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        def decode(rows: slice, output: Output) -> list[Launch]:
            plan = launch_linear.plan_16_bit_decode(weight.N, weight.K, len(output.out), sms=self.device.sms)
            return [launch_linear.decode(x[rows], weight.w, output, self._workspace(plan.cut), plan)]

        def prefill(rows: slice, output: Output) -> list[Launch]:
            return self._prefill.linear(x[rows], weight.w, output)

        return self._multiply(Output(out, bias, residual), num_decode_rows, decode, prefill)

    def pack_fp4(self, shards: Sequence[Fp4Matrix], *, weights_only: bool = False) -> Fp4Units:
        """Codes stay as they are where FP4 instructions multiply them, else lie as dequantising wants them."""
        placed = weights_only or not self._fp4_instructions or shards[0].format == "hif4"
        return weight_layout.pack_fp4(shards, placed=placed).on(self.device.upload)

    def fp4_linear(
        self,
        operand: Any,
        weight: Fp4Units,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        output = Output(out, bias, residual)
        if not weight.placed:
            path = launch_linear_sm120.path_of(operand)
            chosen = launch_linear_sm120.plan(len(out), weight, path, sms=self.device.sms)
            workspace = self._workspace(chosen.cut)
            return self._into(out, launch_linear_sm120.linear(operand, weight, output, workspace, chosen))

        def decode(rows: slice, output: Output) -> list[Launch]:
            paths, M = 2 if operand.two_paths else 1, len(output.out)
            plan = launch_linear.plan_fp4_decode(weight, M, "fp4", sms=self.device.sms, paths=paths)
            return [launch_linear.fp4_decode(operand[rows], weight, output, self._workspace(plan.cut), plan)]

        def prefill(rows: slice, output: Output) -> list[Launch]:
            return self._prefill.fp4_linear(operand[rows], weight, output)

        return self._multiply(output, num_decode_rows, decode, prefill)

    def w4a16_linear(
        self,
        x: Array,
        weight: Fp4Units,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        input_type = launch_rows.type_name(x.dtype)
        if input_type == "f16" and weight.format != "nvfp4":
            num_decode_rows = None  # whose scales f16 does not have: no kernel for many tokens takes them

        def decode(rows: slice, output: Output) -> list[Launch]:
            plan = launch_linear.plan_fp4_decode(weight, len(output.out), input_type, sms=self.device.sms)
            return [launch_linear.w4a16_decode(x[rows], weight, output, self._workspace(plan.cut), plan)]

        def prefill(rows: slice, output: Output) -> list[Launch]:
            return self._prefill.w4a16_linear(x[rows], weight, output)

        return self._multiply(Output(out, bias, residual), num_decode_rows, decode, prefill)

    def pack_fp8(self, shards: Sequence[Fp8Matrix]) -> Fp8Units:
        return weight_layout.pack_fp8(shards).on(self.device.upload)

    def fp8_linear(
        self,
        operand: Any,
        weight: Fp8Units,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        def decode(rows: slice, output: Output) -> list[Launch]:
            plan = launch_linear.plan_fp8_decode(weight, len(output.out), "fp8", sms=self.device.sms)
            return [launch_linear.fp8_decode(operand[rows], weight, output, self._workspace(plan.cut), plan)]

        def prefill(rows: slice, output: Output) -> list[Launch]:
            return self._prefill.fp8_linear(operand[rows], weight, output)

        return self._multiply(Output(out, bias, residual), num_decode_rows, decode, prefill)

    def w8a16_linear(
        self,
        x: Array,
        weight: Fp8Units,
        *,
        out: Array,
        bias: NDArray[np.float32] | None = None,
        residual: Array | None = None,
        num_decode_rows: int | None = None,
    ) -> Array:
        def decode(rows: slice, output: Output) -> list[Launch]:
            input_type = launch_rows.type_name(x.dtype)
            plan = launch_linear.plan_fp8_decode(weight, len(output.out), input_type, sms=self.device.sms)
            return [launch_linear.w8a16_decode(x[rows], weight, output, self._workspace(plan.cut), plan)]

        def prefill(rows: slice, output: Output) -> list[Launch]:
            return self._prefill.w8a16_linear(x[rows], weight, output)

        return self._multiply(Output(out, bias, residual), num_decode_rows, decode, prefill)

    def _multiply(self, output: Output, num_decode_rows: int | None, decode: _Launches, prefill: _Launches) -> Array:
        """Run a product's launches for its decode rows and for its prefill rows."""
        T = len(output.out)
        n = T if num_decode_rows is None or self.deterministic else num_decode_rows
        for rows, launches in ((slice(0, n), decode), (slice(n, T), prefill)):
            if rows.start < rows.stop:
                self._into(output.out, *launches(rows, output.of(rows)))
        return output.out

    def _workspace(self, cut: KCut) -> Workspace:
        """Scratch for one product: launches share it one after the other."""
        partials = self._scratch.take("split products", (max(1, cut.room),), _F32)
        return Workspace(partials, self._scratch.counters("split products", max(1, cut.arrivals)))

    # ---- launching ---------------------------------------------------------------------------------------------------

    def _into(self, out: Array, *launches: Launch) -> Array:
        for launch in launches:
            self._run(launch)
        return out

    def _run(self, launch: Launch) -> None:
        self.device.launch(launch)
