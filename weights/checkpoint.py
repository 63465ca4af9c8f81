"""A model's weights as one namespace over its safetensors files.

Either `model.safetensors`, or the shards that `model.safetensors.index.json` lists; the single file wins where both
are present, as in other software. All headers are read and checked against the index at once (a few milliseconds);
the data stay on disk until a tensor is touched. Other formats are not read.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from engine.errors import WeightsError
from engine.json_file import brief, read_json
from engine.weights.safetensors_file import SafetensorsFile, TensorEntry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = (".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")


class Checkpoint:
    """The tensors of a model directory, open for reading. Also a context manager.

    Raises WeightsError naming file and tensor when files are missing, malformed, or disagree with the index.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        weight_map = read_weight_map(self.directory)
        names = dict.fromkeys(weight_map.values()) if weight_map is not None else [SINGLE]
        _check_present(self.directory, list(names))
        self._files = {name: SafetensorsFile(self.directory / name) for name in names}
        if weight_map is not None:
            _check_against_index(self.directory, weight_map, self._files)
        self._owner = {tensor: file for file in self._files.values() for tensor in file.names()}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self._files.values())

    @property
    def nbytes(self) -> int:
        """The data's size: all tensors, without headers."""
        return sum(self.entry(name).nbytes for name in self._owner)

    def names(self) -> tuple[str, ...]:
        """All tensors, file by file and within a file in the order of their bytes."""
        return tuple(self._owner)

    def entry(self, name: str) -> TensorEntry:
        return self._file_of(name).entry(name)

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of the mapped file; see SafetensorsFile.tensor."""
        return self._file_of(name).tensor(name)

    def release(self, name: str) -> None:
        """Give the tensor's pages back to the system; see SafetensorsFile.release."""
        self._file_of(name).release(name)

    def close(self) -> None:
        """Close all files; views already handed out stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file_of(self, name: str) -> SafetensorsFile:
        if name not in self._owner:
            raise WeightsError(f"{self.directory}: no tensor {name!r} among its {len(self._owner)}")
        return self._owner[name]


def read_weight_map(directory: Path) -> dict[str, str] | None:
    """The index's tensor name -> file name, or None where `model.safetensors` holds everything.

    Raises WeightsError when neither exists or the index is malformed; whether its files exist is not looked at.
    """
    if (directory / SINGLE).is_file():
        return None
    index = directory / INDEX
    if not index.is_file():
        raise WeightsError(f"{directory}: neither {SINGLE} nor {INDEX} is there{_what_is_there(directory)}")
    weight_map = read_json(index, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: weight_map must be a non-empty object of tensor names and file names")
    for tensor, name in weight_map.items():
        if not _is_plain_file_name(name):
            raise WeightsError(
                f"{index}: tensor {brief(tensor)}: {brief(name)} is not the plain name of a .safetensors file"
            )
    return weight_map


def _is_plain_file_name(name: object) -> bool:
    """True for a name that cannot lead out of its directory on any system."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()  # in particular no NUL, which no file name can hold
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
        and len(name.encode()) <= 255
    )


def _check_present(directory: Path, names: list[str]) -> None:
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise WeightsError(
            f"{directory}: {len(absent)} of the {len(names)} files listed in {INDEX} are missing, {absent[0]} first: "
            "an incomplete download?"
        )


def _check_against_index(directory: Path, weight_map: dict[str, str], files: dict[str, SafetensorsFile]) -> None:
    present = {name: set(file.names()) for name, file in files.items()}
    absent = [tensor for tensor, name in weight_map.items() if tensor not in present[name]]
    if absent:
        name = weight_map[absent[0]]
        raise WeightsError(f"{directory / name}: {named(absent)} listed in {INDEX} but absent from the file")
    for name, tensors in present.items():
        unlisted = sorted(tensor for tensor in tensors if weight_map.get(tensor) != name)
        if unlisted:
            raise WeightsError(f"{directory / name}: {named(unlisted)} present but not listed for this file in {INDEX}")


def named(names: list[str], limit: int = 5) -> str:
    """How many tensors and the first few of them: "7 tensors ('a', 'b', 'c', 'd', 'e' and 2 more)"."""
    shown = ", ".join(brief(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def _what_is_there(directory: Path) -> str:
    try:
        found = sorted(path.name for path in directory.iterdir())
    except OSError as problem:
        return f" ({problem.strerror})"
    related = [name for name in found if name.endswith((".safetensors", *_OTHER_FORMATS))][:5]
    if not related:
        return ""
    return f"; found {', '.join(related)}, but only safetensors files under those names are read"
