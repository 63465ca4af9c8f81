"""Prove that a checkpoint and a model fit: every parameter filled exactly once, nothing left over, no shape bent.

A tensor dropped in silence is a wrong model that still talks, so everything is compared before the first byte is
read. Names and shapes come from the model, which alone knows what it needs. Values are not looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, TypeVar

from engine.errors import WeightsError
from engine.json_file import brief
from engine.weights.checkpoint import named
from engine.weights.parts import FLOATS
from engine.weights.quantized import LogicalEntry
from engine.weights.safetensors_file import TensorEntry

Entry = TensorEntry | LogicalEntry
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
_LISTED = 5  # tensors named in a message


class TensorSource(Protocol[T_co]):
    """What is filled from: a `Checkpoint` of arrays, or a `LogicalCheckpoint` of arrays and quantised matrices."""

    directory: Path

    def names(self) -> tuple[str, ...]: ...

    def entry(self, name: str) -> Entry: ...

    def tensor(self, name: str) -> T_co: ...


def fill(
    expected: Mapping[str, tuple[int, ...]],
    checkpoint: TensorSource[T],
    consume: Callable[[str, T], None],
    *,
    ignore: Iterable[str] = (),
    ties: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Call `consume(name, tensor)` once for each expected parameter, in the order of the files' bytes.

    expected: parameter -> shape, a quantised weight's being its [N, K]. Plain tensors are read-only views of the mapped
        files: float32, float16 or bfloat16; quantised ones come from a `LogicalCheckpoint` only.
    ignore: fnmatch patterns of tensors that may be there and are dropped (expected ones never are).
    ties: tensors that may be there and are dropped because they repeat an expected parameter: name -> that
        parameter, whose shape they must have ({"lm_head.weight": "model.embed_tokens.weight"}).
    progress: called with (bytes done, bytes in all) after each tensor.
    Raises WeightsError naming tensor, file, expected and found shape before anything is consumed.
    """
    patterns, ties = tuple(ignore), ties or {}
    shapes = dict(expected) | {name: expected[target] for name, target in ties.items()}
    entries = [checkpoint.entry(name) for name in checkpoint.names()]
    kept = [entry for entry in entries if entry.name in shapes or not _matches(entry.name, patterns)]
    _check_types(kept, expected, ties)
    _check_names(kept, expected, shapes, checkpoint)
    _check_shapes(kept, shapes)
    wanted = [entry for entry in kept if entry.name in expected]
    done, total = 0, sum(entry.nbytes for entry in wanted)
    for entry in wanted:
        consume(entry.name, checkpoint.tensor(entry.name))
        done += entry.nbytes
        if progress is not None:
            progress(done, total)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_types(entries: list[Entry], expected: Mapping[str, object], ties: Mapping[str, str]) -> None:
    for entry in entries:
        if isinstance(entry, TensorEntry):
            if (entry.name in expected or entry.name in ties) and entry.dtype not in FLOATS:
                raise WeightsError(
                    f"{entry.file}: tensor {brief(entry.name)} is {entry.dtype} {list(entry.shape)}; "
                    f"checkpoints quantised in this way are not supported yet, only {', '.join(FLOATS)}"
                )
        elif entry.name in ties:
            raise WeightsError(
                f"{entry.file}: {brief(entry.name)} is quantised ({entry.dtype}), so it cannot be the same as "
                f"{ties[entry.name]}, which the configuration ties it to"
            )


def _check_names(
    entries: list[Entry],
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: TensorSource[object],
) -> None:
    present = {entry.name for entry in entries}
    missing = [name for name in expected if name not in present]
    surplus = [entry for entry in entries if entry.name not in shapes]
    problems = []
    if missing:
        problems.append(f"missing: {named(missing, _LISTED)}, the first of shape {list(expected[missing[0]])}")
    if surplus:
        first = surplus[0]
        names = named([entry.name for entry in surplus], _LISTED)
        problems.append(
            f"unknown to the model: {names}, the first {first.dtype} {list(first.shape)} in {first.file.name}"
        )
    if problems:
        raise WeightsError(f"{checkpoint.directory}: the weights do not match the model: {'; '.join(problems)}")


def _check_shapes(entries: list[Entry], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [entry for entry in entries if entry.shape != shapes[entry.name]]
    if not wrong:
        return
    shown = "; ".join(
        f"{brief(entry.name)} in {entry.file.name}: expected {list(shapes[entry.name])}, found {list(entry.shape)}"
        for entry in wrong[:_LISTED]
    )
    more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    raise WeightsError(f"{wrong[0].file.parent}: wrong shape for {len(wrong)} of {len(entries)} tensors: {shown}{more}")
