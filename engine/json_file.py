"""Read JSON objects from files nobody vouches for: model configurations, shard indexes, safetensors headers.

Python's parser is lenient where a model's files should not be: it keeps the last of two equal keys, accepts NaN,
turns 1e999 into infinity and overflows the stack on deep nesting. Here each of these is an error of the caller's
chosen type, in one sentence that names the source. What the object must contain is the caller's business.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import EngineError

MAX_BYTES = 64 << 20  # the largest file in real models (a tokenizer.json) is under 40 MB
_MAX_KEY = 1000  # characters; keys are tensor and option names, and errors quote them
_MAX_DIGITS = 40  # no count or offset needs more; int() takes quadratic time on long ones


def read_json(path: str | os.PathLike[str], error: type[EngineError], max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The object in the UTF-8 JSON file `path`; anything else raises `error` naming the path and the place in it."""
    return parse_json(_read_bytes(Path(path), error, max_bytes), str(path), error)


def parse_json(data: bytes, source: str, error: type[EngineError]) -> dict[str, Any]:
    """The object in `data`, UTF-8 JSON; anything else raises `error`, whose message starts with `source`."""
    try:
        value = _DECODER.decode(data.decode("utf-8"))
        if b"\\ud" in data or b"\\uD" in data:  # surrogates: halves of a character, none alone
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{source}: not UTF-8 at byte {problem.start}") from None
    except UnicodeEncodeError:
        raise error(f"{source}: a string holds half of a surrogate pair, which is no character") from None
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, column {problem.colno}"
        raise error(f"{source}: malformed JSON at {place}: {problem.msg}") from None
    except _Refused as problem:
        raise error(f"{source}: {problem}") from None
    except RecursionError:
        raise error(f"{source}: JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise error(f"{source}: a JSON object is required, found {type(value).__name__}")
    return value


def brief(value: object, limit: int = 200) -> str:
    """`repr(value)`, cut to `limit` characters: what a hostile file holds must not flood an error message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _read_bytes(path: Path, error: type[EngineError], max_bytes: int) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise error(f"{path}: not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    if len(data) > max_bytes:
        raise error(f"{path}: larger than {max_bytes} bytes, which no file of this kind should be")
    return data


class _Refused(ValueError):
    """Valid to Python's parser, not to ours."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if len(key) > _MAX_KEY:
            raise _Refused(f"a key of {len(key)} characters")
        if key in found:
            raise _Refused(f"key {brief(key)} appears more than once in one object")
        found[key] = value
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise _Refused(f"a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Refused(f"number {text[:_MAX_DIGITS]} is out of range")
    return number


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_finite, parse_constant=_constant
)
