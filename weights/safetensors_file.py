"""One safetensors file, memory-mapped: tensors are read-only views of the file and cost no memory until touched.

    byte 0      8             8 + n
         | n u64 | n bytes JSON | data: the tensors end to end, no gaps, no overlaps |
    JSON: {"__metadata__": {str: str}, name: {"dtype": "BF16", "shape": [N, K], "data_offsets": [begin, end]}, ...}
    Offsets count from the data's start; values are little-endian and row-major.

A parser of our own, because the format's library has no NumPy type for FP8 and hides where a tensor lies. A file is
checked completely when it is opened, so that nothing read later depends on an unchecked number from the header. Not
checked here: whether the tensors are the ones a model needs (`engine.weights.coverage`) and whether values are finite.
A file cut short by someone else while it is mapped kills the process (SIGBUS); no reader of mapped files can help it.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from engine.errors import WeightsError
from engine.json_file import brief, parse_json

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "I64": np.dtype("<i8"),
        "I32": np.dtype("<i4"),
        "I16": np.dtype("<i2"),
        "I8": np.dtype("i1"),
        "U64": np.dtype("<u8"),
        "U32": np.dtype("<u4"),
        "U16": np.dtype("<u2"),
        "U8": np.dtype("u1"),
        "BOOL": np.dtype("?"),
    }
)
MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_DIMS = 32  # NumPy 1's limit
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS leaves in place of the file


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. begin and end are byte positions in the file."""

    name: str
    file: Path
    dtype: str  # the format's spelling, a key of DTYPES
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """An open file. Also a context manager.

    Every fault of the file, and every name it does not have, is a WeightsError naming the file and the tensor.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map: mmap.mmap | None = _map_file(self.path)
        start, header = _read_header(self.path, self._map)
        self.metadata: dict[str, str] = _check_metadata(self.path, header.pop("__metadata__", {}))
        entries = [_check_entry(self.path, name, fields, start, len(self._map)) for name, fields in header.items()]
        entries.sort(key=lambda entry: (entry.begin, entry.end))
        _check_no_gaps(self.path, entries, start, len(self._map))
        self._entries = {entry.name: entry for entry in entries}

    def names(self) -> tuple[str, ...]:
        """All tensors, in the order of their bytes."""
        return tuple(self._entries)

    def entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise WeightsError(f"{self.path}: no tensor {name!r} among its {len(self._entries)}")
        return self._entries[name]

    def tensor(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view of the mapped file; it stays valid after `close`.

        Views of files from careless writers may be unaligned (`flags.aligned`).
        """
        entry = self.entry(name)
        view: NDArray[Any] = np.ndarray(entry.shape, DTYPES[entry.dtype], buffer=self._mapped(), offset=entry.begin)
        return view

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system: resident memory falls; touching a view reads the file again."""
        entry = self.entry(name)
        mapped = self._mapped()
        if entry.nbytes and hasattr(mapped, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            begin = entry.begin - entry.begin % mmap.PAGESIZE  # a neighbour's bytes on a shared page only reload
            mapped.madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def close(self) -> None:
        """Let the mapping go: now, or when the last view of it is gone."""
        self._map = None

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise WeightsError(f"{self.path}: the file was closed")
        return self._map


def _map_file(path: Path) -> mmap.mmap:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise WeightsError(f"{path}: not a regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise WeightsError(f"{path}: {size} bytes are too few for a safetensors file: truncated?")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except OSError as problem:
        raise WeightsError(f"{path}: cannot be read: {problem.strerror}") from None
    except ValueError as problem:  # an impossible path; a file that shrank since fstat
        raise WeightsError(f"{path}: cannot be read: {problem}") from None


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[int, dict[str, Any]]:
    """The data's first byte and the parsed JSON header."""
    length = int.from_bytes(mapped[:8], "little")
    if mapped[: len(_LFS_POINTER)] == _LFS_POINTER:
        raise WeightsError(f"{path}: a Git LFS pointer and not the weights; run `git lfs pull`")
    if length > MAX_HEADER:
        raise WeightsError(f"{path}: a header of {length} bytes, above the format's {MAX_HEADER}: not safetensors?")
    if length > len(mapped) - 8:
        raise WeightsError(f"{path}: a header of {length} bytes in a file of {len(mapped)}: truncated?")
    data = mapped[8 : 8 + length]
    if data[:1] != b"{":
        raise WeightsError(f"{path}: the header starts with {data[:1]!r} and not with '{{': not safetensors?")
    return 8 + length, parse_json(data, f"{path}: header", WeightsError)


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path}: __metadata__ must map text to text")
    return metadata


def _check_entry(path: Path, name: str, fields: object, start: int, file_size: int) -> TensorEntry:
    """The header's claim about one tensor, checked by itself."""
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(fields, dict) or set(fields) != _ENTRY_KEYS:
        raise WeightsError(f"{where}: exactly dtype, shape and data_offsets are required, found {brief(fields)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightsError(f"{where}: dtype {brief(dtype)} is not one of {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS:
        raise WeightsError(f"{where}: shape {brief(shape)} is not a list of up to {_MAX_DIMS} non-negative numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise WeightsError(f"{where}: data_offsets {brief(offsets)} are not two non-negative numbers")
    itemsize = DTYPES[dtype].itemsize
    if math.prod(size for size in shape if size) * itemsize >= 1 << 63:  # NumPy refuses it even beside a zero
        raise WeightsError(f"{where}: shape {brief(shape)} is beyond any memory")
    begin, end = offsets
    if end - begin != math.prod(shape) * itemsize:
        raise WeightsError(
            f"{where}: {dtype} {brief(shape)} takes {math.prod(shape) * itemsize} bytes, "
            f"data_offsets {brief(offsets)} give it {end - begin}"
        )
    if start + end > file_size:
        raise WeightsError(f"{where}: ends at byte {start + end} of a file of {file_size}: truncated?")
    return TensorEntry(name, path, dtype, tuple(shape), start + begin, start + end)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)  # no bools


def _check_no_gaps(path: Path, entries: list[TensorEntry], start: int, file_size: int) -> None:
    """Entries sorted by position must tile the data: no byte twice, none unclaimed."""
    position, before = start, "the header"
    for entry in entries:
        if entry.begin < position:
            raise WeightsError(f"{path}: tensors {before} and {brief(entry.name)} overlap at byte {entry.begin}")
        if entry.begin > position:
            raise WeightsError(
                f"{path}: {entry.begin - position} unused bytes between {before} and {brief(entry.name)}"
            )
        position, before = entry.end, brief(entry.name)
    if position != file_size:
        raise WeightsError(f"{path}: {file_size - position} unused bytes after {before}")
