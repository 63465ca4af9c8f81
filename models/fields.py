"""Typed, range-checked reading of one JSON object of a model's configuration.

A config.json is somebody else's text: a value of the wrong type must become one sentence that names the file, the key,
the value and what is allowed, not a TypeError three layers down. Absent and null are different things here, as they
are in Transformers (an absent `sliding_window` of Mistral means 4096, null means none), so each reader says what
absence means by a default and only the `optional_` readers accept null.

Keys nobody asks for stay unread; which of them must not be ignored is the caller's knowledge (`refuse_unless`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NoReturn

from engine.errors import ConfigError

_MAX_SHOWN = 80  # characters of an offending value quoted in a message
_REQUIRED: Final[Any] = object()


class Fields:
    """The fields of one JSON object. `source` names the file, `prefix` the place in it ("rope_scaling.")."""

    def __init__(self, data: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self._data = data
        self._source = source
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self._data.get(key) is not None

    def present(self) -> list[str]:
        """The names of all fields with a value other than null."""
        return [key for key in self._data if key in self]

    def raw(self, key: str) -> Any:
        """The value as parsed, None where absent."""
        return self._data.get(key)

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise ConfigError about this key, quoting its value."""
        raise ConfigError(f"{self._source}: {self._prefix}{key} = {_shown(self._data.get(key))}: {why}")

    def fail(self, message: str) -> NoReturn:
        """Raise ConfigError about the object as a whole."""
        raise ConfigError(f"{self._source}: {message}")

    def integer(self, key: str, low: int, high: int, default: int = _REQUIRED) -> int:
        """A whole number in [low, high]; `default` where absent."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"must be a whole number from {low} to {high}")
        return value

    def optional_integer(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number in [low, high], or None for null; `default` where absent."""
        return default if key not in self._data else self.integer(key, low, high) if key in self else None

    def number(self, key: str, low: float, high: float, default: float = _REQUIRED) -> float:
        """A number in [low, high] (JSON integers count); `default` where absent."""
        value = self._value(key, default)
        # A NaN compares false and a huge integer compares exactly, so both are refused before float() sees them.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            self.refuse(key, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float, default: float | None = None) -> float | None:
        """A number in [low, high], or None for null; `default` where absent."""
        return default if key not in self._data else self.number(key, low, high) if key in self else None

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        """true or false; `default` where absent."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return value

    def choice(self, key: str, allowed: Collection[str], default: str = _REQUIRED) -> str:
        """One of the allowed strings; `default` where absent."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in allowed:
            self.refuse(key, f"not supported; supported: {', '.join(allowed)}")
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self._value(key, _REQUIRED)
        if not isinstance(value, str):
            self.refuse(key, "must be text")
        return value

    def strings(self, key: str) -> list[str] | None:
        """A list of strings; None where absent or null."""
        value = self._data.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            self.refuse(key, "must be a list of strings")
        return value

    def integers(self, key: str, low: int, high: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        """One whole number or a list of them, each in [low, high]; () for null, `default` where absent."""
        if key not in self._data:
            return tuple(default)
        if key not in self:
            return ()
        value = self._data[key]
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                self.refuse(key, f"must be a whole number from {low} to {high}, or a list of them")
        return tuple(items)

    def child(self, key: str) -> Fields | None:
        """The object under `key`; None where absent, null or empty."""
        value = self._data.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "must be an object")
        return Fields(value, self._source, f"{self._prefix}{key}.") if value else None

    def refuse_unless(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse each of these keys that is there with a value other than null and the neutral ones listed."""
        for key, values in neutral.items():
            if key in self and not any(_same(self._data[key], value) for value in values):
                allowed = f" other than {' or '.join(_shown(value) for value in values)}" if values else ""
                self.refuse(key, f"this model asks for {key}{allowed}, which the engine does not compute")

    def _value(self, key: str, default: Any) -> Any:
        value = self._data.get(key, default)
        if value is _REQUIRED:
            self.fail(f"{self._prefix}{key} is missing")
        return value


def _same(found: Any, neutral: Any) -> bool:
    """Equality that keeps true apart from 1 and lets 1 equal 1.0, as JSON readers do."""
    return isinstance(found, bool) == isinstance(neutral, bool) and found == neutral


def _shown(value: Any) -> str:
    """The value as JSON on one line, cut short; never deep, since a message must not be able to fail."""
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)):
        return "{…}" if isinstance(value, dict) else "[…]"
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"
