"""A plain checkpoint whose linear weights come out quantised, each made when it is first read.

For grades that look at a whole decoder layer: who loads a model asks for one tensor at a time. Nothing is written; the
weights made ahead, those of one layer at most where a checkpoint keeps its layers together, are held until asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.ops.contract import Ops
from engine.quant.recipe import Recipe
from engine.quant.scheme import Storage
from engine.weights.checkpoint import Checkpoint
from engine.weights.conversion import Quantiser, plan_conversion
from engine.weights.quantized import LogicalEntry, Weight
from engine.weights.safetensors_file import TensorEntry


class QuantisedOnReading:
    """`Checkpoint`'s face. linears, tied, head_dim: as for `plan_conversion`, whose errors it raises.

    Each quantised weight can be read once.
    """

    def __init__(
        self,
        source: Checkpoint,
        recipe: Recipe,
        ops: Ops,
        linears: Mapping[str, tuple[int, int]],
        tied: str | None,
        head_dim: int,
    ) -> None:
        plan = plan_conversion(source, recipe, "native", linears, tied, head_dim, plain=False)
        self.directory = source.directory
        self._source = source
        self._items = {item.name: item for item in plan.items}
        self._quantiser = Quantiser(plan, ops)
        self._names = (*self._items, *(name for name in source.names() if name not in self._items))

    def storages(self) -> dict[str, Storage]:
        """How each quantised module is stored."""
        items = self._items.values()
        return {item.name.removesuffix(".weight"): item.storage for item in items if item.storage is not None}

    def names(self) -> tuple[str, ...]:
        return self._names

    def entry(self, name: str) -> TensorEntry | LogicalEntry:
        item = self._items.get(name)
        if item is None or item.storage is None:
            return self._source.entry(name)
        plain = self._source.entry(item.source)
        N, K = plain.shape
        return LogicalEntry(name, plain.file, item.storage.dtype, (N, K), item.nbytes, item.storage, {})

    def tensor(self, name: str) -> Weight:
        """A view of a plain tensor, or a quantised weight. Raises NumericalError naming the tensor."""
        item = self._items.get(name)
        return self._source.tensor(name) if item is None else self._quantiser.take(item)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system."""
        item = self._items.get(name)
        self._source.release(name if item is None else item.source)
