"""Write safetensors files: every dtype the reader knows (FP8 included), whole or not at all.

The file appears under its name only when it is complete and on disk. Wider dtypes come first and the data starts on a
64-byte boundary, so that every tensor of a mapped file is aligned for its type. Sharding is the caller's business.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidArgument, WeightsError
from engine.weights.safetensors_file import DTYPES, MAX_HEADER

_SPELLING = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64  # bytes; a cache line


def save_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (any shapes, dtypes of DTYPES, need not be contiguous) to `path`, replacing it atomically.

    Raises InvalidArgument for what the format cannot hold, WeightsError when the file cannot be written.
    """
    path = Path(path)
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # stable: given order within a width
    header = _header(ordered, metadata)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with draft.open("wb") as file:
                file.write(len(header).to_bytes(8, "little"))
                file.write(header)
                for _, array in ordered:
                    file.write(_raw(array))
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as problem:
        raise WeightsError(f"{path}: cannot be written: {problem.strerror}") from problem


def _header(ordered: list[tuple[str, NDArray[Any]]], metadata: Mapping[str, str] | None) -> bytes:
    fields: dict[str, Any] = {}
    if metadata is not None:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise InvalidArgument("metadata must map text to text")
        fields["__metadata__"] = dict(metadata)
    position = 0
    for name, array in ordered:
        if name == "__metadata__" or not isinstance(name, str):
            raise InvalidArgument(f"{name!r} cannot be a tensor's name")
        if array.dtype not in _SPELLING:
            raise InvalidArgument(f"tensor {name!r} has dtype {array.dtype}; supported: {', '.join(DTYPES)}")
        offsets = [position, position + array.nbytes]
        fields[name] = {"dtype": _SPELLING[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        position = offsets[1]
    try:
        data = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as problem:
        raise InvalidArgument(f"names and metadata must be valid Unicode: {problem.object[:60]!r}") from None
    if len(data) > MAX_HEADER - _ALIGNMENT:
        raise InvalidArgument(f"a header of {len(data)} bytes is above the format's {MAX_HEADER}")
    return data + b" " * (-(8 + len(data)) % _ALIGNMENT)


def _raw(array: NDArray[Any]) -> memoryview:
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data
