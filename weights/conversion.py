"""Write a model's quantised copy: planned whole from headers, made shard by shard, published in one step.

Nothing is at OUT before the copy is complete. Work goes on in a hidden folder beside it (`.OUT.partial`), shard after
shard, each file appearing under its name only when it is on disk; the last act renames the folder. A run that was
stopped leaves the folder, and the same command finds the finished shards and goes on; another recipe or a changed
source starts afresh. One process at a time: the folder is locked. The source is opened for reading only, and its pages
are given back tensor by tensor, so memory holds one shard's quantised weights and little else.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument, NumericalError, WeightsError
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.ops.contract import Ops
from engine.quant.gram import Layer
from engine.quant.recipe import Kind, Recipe
from engine.quant.scheme import Storage
from engine.weights.checkpoint import INDEX, SINGLE, Checkpoint
from engine.weights.export import Layout, parts_in_file, storage_of, tensors_of
from engine.weights.parts import FLOATS
from engine.weights.safetensors_file import DTYPES, SafetensorsFile
from engine.weights.write import save_safetensors

_REVISION = 2  # raised when the same recipe makes other bits: gram's rule is the second
RECORD = "quantize.json"  # in the work folder: what is being made, from what
_SHARD_BYTES = 256 << 20  # of quantised weights held at once; half a bf16 layer of a model with 7 billion parameters
_COPIED = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model", "LICENSE*", "NOTICE*")
_REWRITTEN = ("config.json", "hf_quant_config.json", INDEX, RECORD)
TIED_HEAD = "lm_head.weight"


class Item(NamedTuple):
    """One weight or other tensor of the source and what becomes of it."""

    name: str  # in the copy, "….weight" for a quantised one
    source: str  # in the source
    kind: Kind | None  # None: copied
    storage: Storage | None
    tensors: Mapping[str, tuple[np.dtype[Any], Any]]  # in the copy: name -> dtype, shape
    nbytes: int  # in the copy
    source_nbytes: int


class Shard(NamedTuple):
    file: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about the copy that is known before the first weight is read."""

    source: Checkpoint
    recipe: Recipe
    shards: tuple[Shard, ...]
    head_dim: int
    record: Mapping[str, Any]

    @property
    def items(self) -> list[Item]:
        return [item for shard in self.shards for item in shard.items]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)


def plan_conversion(
    source: Checkpoint,
    recipe: Recipe,
    layout: Layout,
    linears: Mapping[str, tuple[int, int]],
    tied: str | None,
    head_dim: int,
    *,
    plain: bool = True,
) -> Plan:
    """linears: module -> (N, K) of the layers to quantise as the recipe says, `lm_head` among them if it has a head.

    tied: the tensor that is the head's weight as well, if there is one; a quantised head is then made from it and the
    two part. head_dim: the attention's. plain: whether the copy holds the other tensors too. Raises InvalidArgument
    (K that does not fit), WeightsError (tensors missing or of another shape).
    """
    kinds = recipe.kinds(linears)
    items = [item for item in _items(source, layout, kinds, linears, tied) if plain or item.kind is not None]
    missing = kinds.keys() - {item.name.removesuffix(".weight") for item in items if item.kind is not None}
    if missing:
        raise WeightsError(f"{source.directory}: no tensor '{min(missing)}.weight', which the model needs")
    shards = _cut(items)
    files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in source.files}
    made = {shard.file: [item.name for item in shard.items] for shard in shards}
    settings = [recipe.quant, recipe.grade, recipe.head, recipe.fallback, layout]
    record = {"revision": _REVISION, "source": files, "recipe": settings, "shards": made}
    return Plan(source, recipe, shards, head_dim, record)


def _items(
    source: Checkpoint,
    layout: Layout,
    kinds: Mapping[str, Kind],
    linears: Mapping[str, tuple[int, int]],
    tied: str | None,
) -> Iterator[Item]:
    split = tied is not None and "lm_head" in kinds
    for name in source.names():
        entry, module = source.entry(name), name.removesuffix(".weight")
        if split and name == TIED_HEAD:
            continue  # made from the table it repeats
        if name == f"{module}.weight" and module in kinds:
            yield _quantized(source, module, name, kinds[module], layout, linears[module])
            continue
        yield Item(name, name, None, None, {name: (DTYPES[entry.dtype], entry.shape)}, entry.nbytes, entry.nbytes)
        if split and name == tied:
            yield _quantized(source, "lm_head", name, kinds["lm_head"], layout, linears["lm_head"])


def _quantized(source: Checkpoint, module: str, name: str, kind: Kind, layout: Layout, shape: tuple[int, int]) -> Item:
    entry = source.entry(name)
    if entry.shape != shape or entry.dtype not in FLOATS:
        raise WeightsError(
            f"{entry.file}: tensor {name!r} is {entry.dtype} {list(entry.shape)}; "
            f"expected {', '.join(FLOATS)} {list(shape)}"
        )
    storage = storage_of(kind, layout)
    tensors = parts_in_file(module, shape, storage)
    nbytes = sum(int(np.prod(size)) * dtype.itemsize for dtype, size in tensors.values())
    return Item(f"{module}.weight", name, kind, storage, tensors, nbytes, entry.nbytes)


def _cut(items: Iterable[Item]) -> tuple[Shard, ...]:
    """Items in the source's order, as many to a file as keep its quantised weights below the limit."""
    parts: list[list[Item]] = [[]]
    held = 0
    for item in items:
        if parts[-1] and held + item.nbytes > _SHARD_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += item.nbytes
    total = len(parts)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    return tuple(Shard(name, tuple(part)) for name, part in zip(names, parts, strict=True))


# ---- the work folder -------------------------------------------------------------------------------------------------


def check_target(out: Path, source: Path) -> None:
    """Raise InvalidArgument unless a model may be made at `out`."""
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument(f"{out} exists already; choose another place or remove it first")
    if out.resolve().is_relative_to(source.resolve()):
        raise InvalidArgument(f"{out} lies inside the source {source}; choose a place outside it")


@contextmanager
def work_folder(out: Path, plan: Plan) -> Iterator[Path]:
    """The locked folder in which the copy for `out` is made, with what an earlier run of the same plan finished.

    What goes wrong with the disk inside becomes a WeightsError that says how to go on.
    """
    work = out.parent / f".{out.name}.partial"
    try:
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
        try:
            _lock(handle, work)
            _start_or_resume(work, plan)
            yield work
        finally:
            os.close(handle)
    except (OSError, WeightsError) as problem:
        cause = problem if isinstance(problem, OSError) else problem.__cause__
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"no space left ({cause.strerror})" if full else cause.strerror or str(cause)
        how = f"what is finished stays in {work}; run the same command again to go on, or remove it"
        raise WeightsError(f"{out}: cannot be written: {what}{f'; {how}' if work.is_dir() else ''}") from problem


def _lock(handle: int, work: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidArgument(f"another process is at work in {work}") from None


def _start_or_resume(work: Path, plan: Plan) -> None:
    """Keep what belongs to the plan, remove what does not; refuse a folder that is none of ours."""
    record, wanted = work / RECORD, json.dumps(plan.record, indent=1)
    found = list(work.iterdir())
    same = record.is_file() and record.read_text(encoding="utf-8", errors="replace") == wanted
    if found and not record.is_file() and not all(path.name.endswith(".tmp") for path in found):
        raise InvalidArgument(f"{work} holds files of unknown origin; remove it first")
    keep = {RECORD, *(shard.file for shard in plan.shards)} if same else set()
    for path in found:
        if path.name not in keep:
            path.unlink()
    if not same:
        write_text(record, wanted)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


# ---- making it -------------------------------------------------------------------------------------------------------


def write_shards(
    plan: Plan, ops: Ops, work: Path, metadata: Mapping[str, str], progress: Callable[[int, int], None]
) -> int:
    """Make what is not there yet; how many shards an earlier run had finished. progress counts the source's bytes.

    Raises NumericalError naming the tensor, WeightsError for the disk.
    """
    total, done, resumed = sum(item.source_nbytes for item in plan.items), 0, 0
    quantiser = Quantiser(plan, ops)
    _check_space(plan, work)
    for shard in plan.shards:
        if _finished(work / shard.file, shard):
            resumed += 1
            done += sum(item.source_nbytes for item in shard.items)
            progress(done, total)
            continue
        tensors: dict[str, NDArray[Any]] = {}
        for item in shard.items:
            tensors |= _made(item, plan, quantiser)
            done += item.source_nbytes
            progress(done, total)
        save_safetensors(work / shard.file, tensors, metadata)
        for item in shard.items:
            plan.source.release(item.source)
    if len(plan.shards) > 1:
        weight_map = {name: shard.file for shard in plan.shards for item in shard.items for name in item.tensors}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_text(work / INDEX, json.dumps(index, indent=1))
    return resumed


class Quantiser:
    """Makes a plan's weights one by one, and keeps those that had to be made with an earlier one."""

    def __init__(self, plan: Plan, ops: Ops) -> None:
        self._plan = plan
        self._ops = ops
        self._wanted = {item.source for item in plan.items if item.kind is not None}
        self._ahead: dict[str, Fp4Matrix] = {}

    def take(self, item: Item) -> Fp4Matrix | Fp8Matrix:
        """The weight of an item that has a kind. Raises NumericalError naming the tensor."""
        assert item.kind is not None
        source, recipe = self._plan.source, self._plan.recipe
        layer = recipe.layer_of(item.source, item.kind)
        try:
            if layer is None:
                return recipe.quantize(source.tensor(item.source), item.kind, self._ops)
            if item.source not in self._ahead:
                self._ahead |= self._made_together(layer, item.kind)
            return self._ahead.pop(item.source)
        except NumericalError as problem:
            where = f"tensor {item.source!r}" if layer is None else f"the layer of tensor {item.source!r}"
            raise NumericalError(f"{source.entry(item.source).file}: {where}: {problem}") from problem

    def _made_together(self, layer: Mapping[str, str], kind: Kind) -> dict[str, Fp4Matrix]:
        tensors = {field: self._plan.source.tensor(name) for field, name in layer.items()}
        wanted = [field for field, name in layer.items() if name in self._wanted]
        whole = Layer(**tensors, head_dim=self._plan.head_dim)
        made = self._plan.recipe.quantize_layer(whole, wanted, kind, self._ops)
        return {layer[field]: matrix for field, matrix in made.items()}


def _made(item: Item, plan: Plan, quantiser: Quantiser) -> dict[str, NDArray[Any]]:
    """The item's tensors."""
    if item.kind is None or item.storage is None:
        return {item.name: plan.source.tensor(item.source)}
    weight = quantiser.take(item)
    plan.source.release(item.source)
    return tensors_of(item.name.removesuffix(".weight"), weight, item.storage)


def _finished(path: Path, shard: Shard) -> bool:
    """Whether the file is there with exactly the shard's tensors. Files appear whole, so a header tells."""
    if not path.is_file():
        return False
    try:
        with SafetensorsFile(path) as file:
            found = {name: (DTYPES[file.entry(name).dtype], file.entry(name).shape) for name in file.names()}
    except WeightsError:
        return False  # damaged since; it is made again
    return found == {name: part for item in shard.items for name, part in item.tensors.items()}


def _check_space(plan: Plan, work: Path) -> None:
    needed = sum(sum(item.nbytes for item in shard.items) for shard in plan.shards if not (work / shard.file).is_file())
    free = shutil.disk_usage(work).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def copy_other_files(source: Path, work: Path) -> None:
    """Tokenizer, generation defaults, chat template, licence: what the copy needs unchanged."""
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}):
        if path.name not in _REWRITTEN and not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, work / path.name)


def publish(work: Path, out: Path) -> None:
    """Turn the finished work folder into `out`, on disk before it has that name."""
    for path in work.iterdir():
        _sync(path)
    _sync(work)
    work.rename(out)
    (out / RECORD).unlink()
    _sync(out.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
