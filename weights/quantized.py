"""A checkpoint in which a quantised weight is one tensor: `Checkpoint`'s face, with `X.weight` [N, K] whatever it is
stored as.

Plain tensors pass through as arrays; a quantised weight comes out as `Fp4Matrix` or `Fp8Matrix`, payload and scales
still views of the mapped files. Opening proves from the headers alone that files and configuration agree: each module
that the scheme quantises has exactly the tensors its convention asks for, in shapes that fit, and no other module has
any. Input scales are accounted for and not read; KV cache scales, where the scheme speaks of such a cache, are read
apart (`kv_scales`).
Values (scales that are NaN, negative, infinite) are checked when a tensor is read, since that is when they are touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import WeightsError
from engine.fp4_types import Fp4Matrix
from engine.fp8_types import Fp8Matrix
from engine.json_file import brief
from engine.quant.groups import narrowest
from engine.quant.scheme import QuantScheme, Storage
from engine.weights.checkpoint import Checkpoint
from engine.weights.parts import KV_SCALES, MARKS, parts_of
from engine.weights.safetensors_file import TensorEntry
from engine.weights.scales import block_scales, cache_scale, fp8_scales, global_scale, refuse_nan_codes

Weight = NDArray[Any] | Fp4Matrix | Fp8Matrix


@dataclass(frozen=True, slots=True)
class LogicalEntry:
    """A quantised weight as one tensor. dtype is its format in capitals: "NVFP4", "MXFP4", "HIF4", "FP8"."""

    name: str  # "….weight"
    file: Path  # of the payload
    dtype: str
    shape: tuple[int, ...]  # [N, K]
    nbytes: int  # of all its parts
    storage: Storage
    parts: Mapping[str, TensorEntry]  # suffix -> physical tensor


class LogicalCheckpoint:
    """The weights of a model directory, open for reading. Also a context manager.

    scheme: what `engine.models.quantization.read_quantization` returned; None reads plain tensors only.
    Raises WeightsError naming file and tensor for whatever is missing, surplus, malformed or at odds with the scheme.
    """

    def __init__(self, directory: str | os.PathLike[str], scheme: QuantScheme | None) -> None:
        self._files = Checkpoint(directory)
        self.directory = self._files.directory
        self.scheme = scheme
        self._entries = _logical_entries(self._files, scheme)

    @property
    def files(self) -> tuple[Path, ...]:
        return self._files.files

    @property
    def nbytes(self) -> int:
        """Size of what `tensor` hands out; input and KV scales do not count."""
        return sum(entry.nbytes for entry in self._entries.values())

    def names(self) -> tuple[str, ...]:
        """All logical tensors, in the order of their first bytes in the files."""
        return tuple(self._entries)

    def storages(self) -> dict[str, Storage]:
        """How each quantised module is stored."""
        entries = self._entries.values()
        return {e.name.removesuffix(".weight"): e.storage for e in entries if isinstance(e, LogicalEntry)}

    def entry(self, name: str) -> TensorEntry | LogicalEntry:
        if name not in self._entries:
            raise WeightsError(f"{self.directory}: no tensor {name!r} among its {len(self._entries)}")
        return self._entries[name]

    def tensor(self, name: str) -> Weight:
        """A read-only view of a plain tensor, or a quantised weight whose arrays are such views where they can be.

        NVFP4 whose neighbouring scales are all equal comes with a scale per 32 k.
        """
        entry = self.entry(name)
        if isinstance(entry, TensorEntry):
            return self._files.tensor(name)
        return _fp8(entry, self._files) if entry.storage.format == "fp8" else _fp4(entry, self._files)

    def kv_scales(self) -> dict[str, np.float32]:
        """What K or V is divided by before it becomes E4M3, by the tensor's name; {} where no scale is for E4M3.

        Raises WeightsError for a scale that is not one positive number.
        """
        if self.scheme is None or self.scheme.kv_cache != "FP8":
            return {}
        names = [name for name in self._files.names() if name.rpartition(".")[2] in KV_SCALES]
        return {name: cache_scale(self._files.entry(name), self._files) for name in names}

    def release(self, name: str) -> None:
        """Give the pages of all the tensor's parts back to the system."""
        entry = self.entry(name)
        for part in [entry] if isinstance(entry, TensorEntry) else entry.parts.values():
            self._files.release(part.name)

    def close(self) -> None:
        """Close all files; views already handed out stay valid."""
        self._files.close()

    def __enter__(self) -> LogicalCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ---- opening: headers against scheme ---------------------------------------------------------------------------------


def _logical_entries(files: Checkpoint, scheme: QuantScheme | None) -> dict[str, TensorEntry | LogicalEntry]:
    entries = {name: files.entry(name) for name in files.names()}
    if scheme is None:
        return dict(entries)
    modules = _modules(entries, scheme)
    logical: dict[str, TensorEntry | LogicalEntry] = {}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        if suffix in KV_SCALES:
            _check_kv_scale(entry, scheme)
        elif module in modules and suffix in modules[module]:
            logical.setdefault(f"{module}.weight", _quantized(module, modules[module], scheme))
        else:
            logical[name] = entry
    return logical


def _modules(entries: Mapping[str, TensorEntry], scheme: QuantScheme) -> dict[str, dict[str, TensorEntry]]:
    """The quantised modules and their tensors by suffix, biases left out."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and len(entry.shape) == 2 and scheme.storage(module) is not None or suffix in MARKS:
            modules.setdefault(module, {})[suffix] = entry
    for module, found in modules.items():  # a part whose payload is missing or is a vector: say so, not "plain"
        if f"{module}.weight" in entries:
            found["weight"] = entries[f"{module}.weight"]
    return modules


def _quantized(module: str, found: Mapping[str, TensorEntry], scheme: QuantScheme) -> LogicalEntry:
    """One quantised weight, its tensors complete and fitting."""
    first = next(iter(found.values()))
    storage = scheme.storage(module)
    if storage is None:
        marks = ", ".join(sorted(found.keys() - {"weight"}))
        raise WeightsError(f"{first.file}: {brief(module)} should be plain according to {scheme.name}, but has {marks}")
    parts = parts_of(storage)
    where = f"{first.file}: {brief(module)} ({scheme.name})"
    missing = [suffix for suffix in parts.suffixes if suffix not in found]
    surplus = sorted(found.keys() - {*parts.suffixes, *parts.unread})
    for problem, suffixes in (("lacks", missing), ("has the unknown", surplus)):
        if suffixes:
            raise WeightsError(f"{where} {problem} {', '.join(suffixes)}; needed: {', '.join(parts.suffixes)}")
    read = {suffix: found[suffix] for suffix in parts.suffixes}
    for suffix, dtypes in (parts.payload, parts.scale, (parts.global_scale, ("F32",))):
        if suffix is not None and read[suffix].dtype not in dtypes:
            raise WeightsError(f"{where}: {suffix} is {read[suffix].dtype}; expected {' or '.join(dtypes)}")
    shape = _check_shapes(where, read, storage)
    nbytes = sum(entry.nbytes for entry in read.values())
    payload = read[parts.payload[0]]
    return LogicalEntry(f"{module}.weight", payload.file, storage.dtype, shape, nbytes, storage, read)


def _check_shapes(where: str, read: Mapping[str, TensorEntry], storage: Storage) -> tuple[int, int]:
    """The logical [N, K]."""
    parts = parts_of(storage)
    payload, scale = read[parts.payload[0]], read[parts.scale[0]]
    if len(payload.shape) != 2 or 0 in payload.shape:
        raise WeightsError(f"{where}: {parts.payload[0]} has shape {list(payload.shape)}; expected two dimensions")
    N, K = payload.shape[0], payload.shape[1] * (1 if storage.format == "fp8" else 2)
    rows, columns = storage.tile
    if storage.format != "fp8" and K % columns:
        raise WeightsError(f"{where}: K = {K} is not a multiple of {columns}, the k per scale")
    shape = (-(-N // (rows or N)), -(-K // (columns or K)))
    allowed = {shape} | ({(N,)} if storage.tile == (1, 0) else {(), (1,)} if storage.tile == (0, 0) else set())
    if scale.shape not in allowed:
        raise WeightsError(
            f"{where}: {parts.scale[0]} has shape {list(scale.shape)}; for a weight [{N}, {K}] expected {list(shape)}"
        )
    if parts.global_scale is not None and read[parts.global_scale].shape not in ((), (1,)):
        raise WeightsError(
            f"{where}: {parts.global_scale} has shape {list(read[parts.global_scale].shape)}; expected one number"
        )
    return N, K


def _check_kv_scale(entry: TensorEntry, scheme: QuantScheme) -> None:
    if scheme.kv_cache is None:
        raise WeightsError(
            f"{entry.file}: {brief(entry.name)} scales a quantised KV cache, of which the configuration says nothing"
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


def _fp4(entry: LogicalEntry, files: Checkpoint) -> Fp4Matrix:
    parts, rows = parts_of(entry.storage), entry.shape[0]
    payload = files.tensor(entry.parts[parts.payload[0]].name)
    scale = block_scales(entry.parts[parts.scale[0]], files, entry.storage.format)
    g = np.float32(1)
    if parts.global_scale is not None:
        g = global_scale(entry.parts[parts.global_scale], files, divides=parts.divides)
    matrix = Fp4Matrix(entry.storage.format, payload, scale, np.full(rows, g))  # type: ignore[arg-type]  # not fp8
    return narrowest(matrix)


def _fp8(entry: LogicalEntry, files: Checkpoint) -> Fp8Matrix:
    parts, (N, K) = parts_of(entry.storage), entry.shape
    payload = files.tensor(entry.parts[parts.payload[0]].name).view(np.uint8)
    refuse_nan_codes(entry.parts[parts.payload[0]], payload)
    tile = (entry.storage.tile[0] or N, entry.storage.tile[1] or K)
    scale = fp8_scales(entry.parts[parts.scale[0]], files)
    return Fp8Matrix(payload, scale.reshape(-(-N // tile[0]), -(-K // tile[1])), tile)
