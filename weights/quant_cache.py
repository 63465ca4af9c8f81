"""Quantised weights of a plain checkpoint, made once and kept on disk: the second start reads a quarter of the bytes.

An entry is a folder named by what it was made from (the source's files, their sizes and times) and how (formats,
grade). It holds the quantised weights and nothing else; plain tensors are read from the source. Entries are written as
a model is that is quantised to disk, whole or not at all, and are never removed by the engine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from engine.errors import WeightsError
from engine.ops.contract import Ops
from engine.quant.recipe import Recipe
from engine.quant.scheme import Pattern, QuantScheme, Rule, Storage
from engine.weights.checkpoint import Checkpoint
from engine.weights.conversion import Plan, check_target, plan_conversion, publish, work_folder, write_shards
from engine.weights.quantized import LogicalCheckpoint, LogicalEntry, Weight
from engine.weights.safetensors_file import TensorEntry


class CachedWeights:
    """A plain checkpoint with some of its weights quantised: `Checkpoint`'s face. Also a context manager.

    ops: what quantises, on every backend to the same bits. linears, tied, head_dim: as for `plan_conversion`. The
    entry in `cache` is made if it is not there; progress(done, total) counts the source's bytes while it is. Raises
    InvalidArgument, WeightsError and NumericalError as conversion does, WeightsError also where the cache cannot be
    written.
    """

    def __init__(
        self,
        source: Checkpoint,
        recipe: Recipe,
        ops: Ops,
        linears: Mapping[str, tuple[int, int]],
        tied: str | None,
        head_dim: int,
        cache: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        plan = plan_conversion(source, recipe, "native", linears, tied, head_dim, plain=False)
        self.directory = source.directory
        self.entry_directory = cache / _key(plan)
        self._source = source
        self._quantized = _entry(plan, ops, self.entry_directory, progress)
        made = set(self._quantized.names())
        self._names = (*made, *(name for name in source.names() if name not in made))

    def storages(self) -> dict[str, Storage]:
        """How each quantised module is stored."""
        return self._quantized.storages()

    def names(self) -> tuple[str, ...]:
        return self._names

    def entry(self, name: str) -> TensorEntry | LogicalEntry:
        return self._of(name).entry(name)

    def tensor(self, name: str) -> Weight:
        return self._of(name).tensor(name)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system."""
        self._of(name).release(name)

    def close(self) -> None:
        """Close the entry; the source is its opener's."""
        self._quantized.close()

    def __enter__(self) -> CachedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _of(self, name: str) -> Checkpoint | LogicalCheckpoint:
        return self._quantized if name in self._quantized.names() else self._source


def _key(plan: Plan) -> str:
    text = json.dumps([str(plan.source.directory.resolve()), plan.record])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _entry(plan: Plan, ops: Ops, directory: Path, progress: Callable[[int, int], None]) -> LogicalCheckpoint:
    if directory.is_dir():
        try:
            return _opened(plan, directory)
        except WeightsError:  # damaged since it was written
            shutil.rmtree(directory)
    check_target(directory, plan.source.directory)
    with work_folder(directory, plan) as work:
        write_shards(plan, ops, work, {"format": "pt", "grade": str(plan.recipe.grade)}, progress)
        publish(work, directory)
    return _opened(plan, directory)


def _opened(plan: Plan, directory: Path) -> LogicalCheckpoint:
    modules = {item.name.removesuffix(".weight"): item.storage for item in plan.items}
    rules = tuple(Rule(Pattern(module, "name"), storage) for module, storage in modules.items() if storage)
    entry = LogicalCheckpoint(directory, QuantScheme("cached", plan.recipe.quant, rules, grade=plan.recipe.grade))
    if set(entry.names()) != {item.name for item in plan.items}:
        entry.close()
        raise WeightsError(f"{directory}: not the tensors that were written")
    return entry
