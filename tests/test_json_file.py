"""engine.json_file accepts what the json module accepts, less what a model's file must not hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, WeightsError
from engine.json_file import parse_json, read_json

_scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
_values = st.recursive(
    _scalars | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def test_escaped_characters_beyond_16_bits():
    assert parse_json(b'{"a": "\\ud83d\\ude00 \\\\ud83d"}', "x", ConfigError) == {"a": "\U0001f600 \\ud83d"}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), _values))
def test_whatever_json_writes_is_read_back(value):
    assert parse_json(json.dumps(value).encode(), "x", ConfigError) == value


BAD = {
    "empty": (b"", "malformed JSON at line 1, column 1"),
    "cut off": (b'{"a": 1,\n "b"', "line 2"),
    "two values": (b"{}{}", "column 3"),
    "byte order mark": (b"\xef\xbb\xbf{}", "malformed"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    "list": (b"[1]", "object is required, found list"),
    "string": (b'"config"', "object is required, found str"),
    "null": (b"null", "object is required"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 1}', "'a' appears more than once"),
    "nested duplicate": (b'{"x": [{"k": {}, "k": {}}]}', "'k' appears more than once"),
    "NaN": (b'{"a": NaN}', "NaN is not"),
    "-Infinity": (b'{"a": -Infinity}', "-Infinity is not"),
    "float overflow": (b'{"a": 1e999}', "1e999 is out of range"),
    "long integer": (b'{"a": ' + b"9" * 100_000 + b"}", "100000 digits"),
    "half a surrogate pair": (b'{"a": ["\\uD83D"]}', "half of a surrogate pair"),
    "long key": (b'{"a": {"' + b"k" * 1001 + b'": 1}}', "a key of 1001 characters"),
    "deep lists": (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("error", [ConfigError, WeightsError])
def test_bad_content_is_the_callers_error_naming_the_file(tmp_path, case, error):
    data, message = BAD[case]
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(error) as caught:
        read_json(path, error)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_unreadable_and_special_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "none.json", ConfigError)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_json(tmp_path, ConfigError)
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_json(pipe, ConfigError)
    (tmp_path / "file").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path / "file" / "config.json", ConfigError)
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(loop, ConfigError)


def test_size_limit(tmp_path: Path):
    path = tmp_path / "big.json"
    path.write_text('{"a": 12}')
    assert read_json(path, ConfigError, max_bytes=9) == {"a": 12}
    with pytest.raises(ConfigError, match="larger than 8 bytes"):
        read_json(path, ConfigError, max_bytes=8)
