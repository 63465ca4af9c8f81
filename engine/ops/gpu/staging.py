"""A step's arrays on their way to the device, and memory that steps use again.

What a step needs from the host goes in one transfer (`PackedArrays`). `StagedBatch` holds any step's batch;
`StagedDecode` that of a step in which every sequence has one new token, in memory that stays where it is, so that what
was recorded on one such step serves the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch
from engine.ops.gpu.device import Device
from engine.ops.gpu.launch_attention import (
    FIRST_PARTIAL,
    POSITION,
    SEQUENCE,
    TILE_TOKENS,
    AttentionPlan,
    AttentionShape,
    in_rounds,
    num_splits,
    plan_attention,
)

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]

_I32, _U32, _F32, _BYTE = np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32), np.dtype(np.uint8)
_ALIGNMENT = 16  # bytes: the widest load of a kernel


class Scratch:
    """Named device memory, grown to the largest use and used again by every later one.

    Taking a name again ends the life of what was taken before; what was recorded on it keeps it alive. `GpuOps` has the
    largest steps take theirs first (`GpuOps.rehearsal`), so that none grows later.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, np.dtype[Any]], Any] = {}
        self._one_operand = False

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self._grown(name, prod(shape), dtype, self._device.empty)[: prod(shape)].reshape(shape)

    def counters(self, name: str, size: int) -> Any:
        """uint32 [size], zero at first; who uses them leaves them zero."""
        return self._grown(name, size, _U32, self._device.zeros)[:size]

    def _grown(self, name: str, size: int, dtype: np.dtype[Any], new: Callable[..., Any]) -> Any:
        key = (name, dtype)
        if key not in self._buffers or self._buffers[key].size < size:
            self._buffers.pop(key, None)  # first, as there may be no room for both
            self._buffers[key] = new((size,), dtype)
        return self._buffers[key]

    def operand(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Memory for an array of prepared activations: of its own, unless `one_operand` says that one lives at a time.

        Models multiply each operand before they prepare the next; other callers may hold several.
        """
        return self.take(name, shape, dtype) if self._one_operand else self._device.empty(shape, dtype)

    @contextmanager
    def one_operand(self) -> Iterator[None]:
        """Operands share memory: recordings would keep every layer's otherwise."""
        self._one_operand = True
        try:
            yield
        finally:
            self._one_operand = False


class PackedArrays:
    """Arrays that go to the device in one transfer: fill `host`, `send`, launch on `device`; the names are layout's.

    allocate: gives the memory on the device; None: memory of their own.
    """

    def __init__(
        self, device: Device, layout: Layout, allocate: Callable[[tuple[int, ...], np.dtype[Any]], Any] | None = None
    ) -> None:
        places: dict[str, slice] = {}
        nbytes = 0
        for name, (shape, dtype) in layout.items():
            places[name] = slice(nbytes, nbytes + prod(shape) * dtype.itemsize)
            nbytes = -(-places[name].stop // _ALIGNMENT) * _ALIGNMENT
        self._to = device
        self._packed = np.zeros(nbytes, _BYTE)
        self._memory = (allocate or device.empty)((nbytes,), _BYTE)

        def views(memory: Any) -> dict[str, Any]:
            return {name: memory[places[name]].view(dtype).reshape(shape) for name, (shape, dtype) in layout.items()}

        self.host: dict[str, NDArray[Any]] = views(self._packed)
        self.device: dict[str, Any] = views(self._memory)

    def send(self) -> None:
        self._to.write(self._memory, self._packed)


def send_all(device: Device, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """New device arrays with these arrays' contents, in one transfer."""
    packed = PackedArrays(device, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    for name, array in arrays.items():
        packed.host[name][...] = array
    packed.send()
    return packed.device


@dataclass(frozen=True, slots=True)
class PlannedAttention:
    """How one kind of attention layer goes through a step, and its arrays: the same in every such layer."""

    plan: AttentionPlan
    decode_items: Any
    prefill_items: Any
    partials: Any
    arrivals: Any


def take_attention_scratch(scratch: Scratch, partials: int, arrivals: int) -> tuple[Any, Any]:
    """Partials and arrivals, which all layers of all steps share, one after the other."""
    taken = scratch.take("attention partials", (max(1, partials),), _F32)
    return taken, scratch.counters("attention arrivals", max(1, arrivals))


class StagedBatch:
    """A step's arrays in device memory, under the names of `Batch`; host: the batch itself."""

    def __init__(self, batch: Batch, device: Device, scratch: Scratch) -> None:
        self.host = batch
        self.num_decode_rows = batch.num_decode_rows
        names = ("token_ids", "positions", "slot_mapping", "block_tables")
        sent = send_all(device, {name: getattr(batch, name) for name in names})
        self.token_ids, self.positions, self.slot_mapping, self.block_tables = (sent[name] for name in names)
        self._device = device
        self._scratch = scratch
        self._planned: dict[tuple[AttentionShape, int | None], PlannedAttention] = {}

    def planned(self, shape: AttentionShape, window: int | None) -> PlannedAttention:
        key = (shape, window)
        if key not in self._planned:
            plan = plan_attention(self.host, shape, window)
            items = {"decode_items": plan.decode_items, "prefill_items": plan.prefill_items}
            sent = send_all(self._device, items)
            sizes = plan.partials_size(shape), plan.arrivals_size(shape)
            partials, arrivals = take_attention_scratch(self._scratch, *sizes)
            self._planned[key] = PlannedAttention(plan, partials=partials, arrivals=arrivals, **sent)
        return self._planned[key]


class StagedDecode:
    """A step of up to S sequences with one new token each and up to `blocks` blocks of context.

    Everything that launches depend on follows from S and blocks. Rows that no sequence has repeat the one of shortest
    context: they find no NaN that it does not, add nothing to a maximum over the batch, and write their K and V to
    `spare_block`. Every attention item has room for the partial results of the longest context.
    """

    num_decode_rows: int | None = None  # all

    def __init__(
        self, device: Device, scratch: Scratch, shape: AttentionShape, S: int, blocks: int, block_size: int,
        spare_block: int,
    ) -> None:  # fmt: skip
        self.num_positions = blocks * block_size
        self._shape = shape
        self._spare_slot = spare_block * block_size
        self._splits = num_splits(0, self.num_positions - 1)
        rows = np.zeros(S, np.int32)
        one_token_each = Batch(
            rows, rows, rows, np.arange(S + 1, dtype=np.int32), rows + 1, np.zeros((S, blocks), np.int32), rows
        )
        plan = plan_attention(one_token_each, shape)
        n = len(plan.decode_items)
        first_partial, num_partials, rounds = in_rounds(np.full(n, self._splits), shape.partial_size(plan.partial_rows))
        self._plan = replace(plan, num_partials=num_partials, most_splits=self._splits if n else 0, rounds=rounds)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "positions", "slot_mapping"), (S,))
        shapes |= {"block_tables": (S, blocks)}
        shapes |= {"decode_items": plan.decode_items.shape, "prefill_items": plan.prefill_items.shape}
        layout = {name: (shape, _I32) for name, shape in shapes.items()}
        self._packed = PackedArrays(device, layout, partial(scratch.take, "decode step"))
        self._packed.host["decode_items"][...] = plan.decode_items
        self._packed.host["decode_items"][:, FIRST_PARTIAL] = first_partial
        self._packed.host["prefill_items"][...] = plan.prefill_items
        arrays = self._packed.device
        names = ("token_ids", "positions", "slot_mapping", "block_tables")
        self.token_ids, self.positions, self.slot_mapping, self.block_tables = (arrays[name] for name in names)
        sizes = self._plan.partials_size(shape), self._plan.arrivals_size(shape)
        self._partials, self._arrivals = take_attention_scratch(scratch, *sizes)

    def fill(self, batch: Batch) -> None:
        """Send another step's batch, of one new token per sequence."""
        S, host = len(batch.token_ids), self._packed.host
        width = min(batch.block_tables.shape[1], host["block_tables"].shape[1])
        shortest = int(batch.context_lens.argmin())
        for name in ("token_ids", "positions"):
            host[name][:S] = getattr(batch, name)
            host[name][S:] = getattr(batch, name)[shortest]
        host["slot_mapping"][:S] = batch.slot_mapping
        host["slot_mapping"][S:] = self._spare_slot
        host["block_tables"][:S, :width] = batch.block_tables[:, :width]
        host["block_tables"][S:, :width] = batch.block_tables[shortest, :width]
        for name in ("decode_items", "prefill_items"):
            items = host[name]
            items[:, POSITION] = host["positions"][items[:, SEQUENCE]]
        self._packed.send()

    def planned(self, shape: AttentionShape, window: int | None) -> PlannedAttention:
        assert shape == self._shape, "one model's attention layers are of one shape"
        arrays, plan = self._packed.device, self._plan
        if window is not None and plan.most_splits:  # a row sees few tiles, hence few splits
            plan = replace(plan, most_splits=min(plan.most_splits, (window - 1) // TILE_TOKENS + 2))
        return PlannedAttention(plan, arrays["decode_items"], arrays["prefill_items"], self._partials, self._arrivals)
