"""The safetensors reader and writer against the format's own library, and every way a file can lie."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from engine.errors import InvalidArgument, WeightsError
from engine.weights.safetensors_file import DTYPES, MAX_HEADER, SafetensorsFile
from engine.weights.write import save_safetensors

SHAPES = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (4, 1, 7)]


def random_bytes(dtype: np.dtype, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Any bit pattern of the dtype, NaNs included (BOOL: 0 and 1)."""
    high = 2 if dtype == np.dtype("?") else 256
    return rng.integers(0, high, math.prod(shape) * dtype.itemsize, np.uint8).view(dtype).reshape(shape)


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def write_raw(path: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    """A file put together by hand, so that each part can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def every_tensor(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        f"{name}.{index}": random_bytes(dtype, shape, rng)
        for name, dtype in DTYPES.items()
        for index, shape in enumerate(SHAPES)
    }


def test_reads_what_the_library_writes(tmp_path):
    rng = np.random.default_rng(1)
    theirs = {  # the library's NumPy side knows these
        f"{dtype}.{index}": random_bytes(np.dtype(dtype), shape, rng)
        for dtype in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", ml_dtypes.bfloat16)
        for index, shape in enumerate(SHAPES)
    }
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(theirs, path, metadata={"format": "pt", "ключ": "значение"})
    with SafetensorsFile(path) as file:
        assert set(file.names()) == set(theirs)
        assert file.metadata == {"format": "pt", "ключ": "значение"}
        for name, array in theirs.items():
            assert same_bits(file.tensor(name), array), name
            assert file.entry(name).nbytes == array.nbytes and file.entry(name).shape == array.shape


def test_the_library_reads_what_we_write(tmp_path):
    tensors = every_tensor(np.random.default_rng(2))
    path = tmp_path / "a.safetensors"
    save_safetensors(path, tensors, {"by": "us"})
    entries = dict(safetensors.deserialize(path.read_bytes()))
    assert set(entries) == set(tensors)
    for name, array in tensors.items():
        assert entries[name]["dtype"] == name.split(".")[0]
        assert tuple(entries[name]["shape"]) == array.shape
        assert bytes(entries[name]["data"]) == array.tobytes(), name
    with safetensors.safe_open(path, "np") as theirs:
        assert theirs.metadata() == {"by": "us"}


def test_round_trip_of_every_dtype_and_shape_is_aligned_and_read_only(tmp_path):
    tensors = every_tensor(np.random.default_rng(3))
    path = tmp_path / "a.safetensors"
    save_safetensors(path, tensors)
    with SafetensorsFile(path) as file:
        for name, array in tensors.items():
            view = file.tensor(name)
            assert same_bits(view, array), name
            assert view.flags.aligned and view.flags.c_contiguous and not view.flags.writeable
            assert view.base is not None
    assert list(tmp_path.iterdir()) == [path]


def test_names_come_in_the_order_of_their_bytes_and_ranges_point_at_them(tmp_path):
    header = {
        "late": {"dtype": "U8", "shape": [3], "data_offsets": [4, 7]},
        "early": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    path = write_raw(tmp_path / "a.safetensors", header, np.float32(7.5).tobytes() + b"xyz")
    with SafetensorsFile(path) as file:
        assert file.names() == ("early", "late")
        assert file.tensor("early").shape == () and file.tensor("early") == 7.5
        entry = file.entry("late")
        assert path.read_bytes()[entry.begin : entry.end] == b"xyz" and entry.file == path


def test_unaligned_file_still_reads_correctly(tmp_path):
    values = np.arange(-4, 4).astype(ml_dtypes.bfloat16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]}}).encode()
    header += b" " * (1 - len(header) % 2)  # data at an odd position
    with SafetensorsFile(write_raw(tmp_path / "a.safetensors", header, values.tobytes())) as file:
        assert not file.tensor("x").flags.aligned
        assert np.array_equal(file.tensor("x").astype(np.float32), np.arange(-4, 4, dtype=np.float32))


def test_empty_file_without_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {})
    with SafetensorsFile(path) as file:
        assert file.names() == ()
    safetensors.numpy.save_file({}, path)
    assert SafetensorsFile(path).names() == ()


def test_views_outlive_close_but_the_file_answers_no_more(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": np.arange(1000)})
    with SafetensorsFile(path) as file:
        view = file.tensor("x")
    path.unlink()
    assert view.sum() == 999 * 500
    with pytest.raises(WeightsError, match="closed"):
        file.tensor("x")
    with pytest.raises(WeightsError, match="closed"):
        file.release("x")


def resident_file_kib() -> int:
    fields = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in fields if line.startswith("RssFile:"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc to see resident memory")
def test_release_returns_pages_and_keeps_views_valid(tmp_path):
    path = tmp_path / "a.safetensors"
    size = 24 << 20
    save_safetensors(path, {"a": np.ones(size, np.uint8), "b": np.full(size, 2, np.uint8), "none": np.ones((0,), "u1")})
    with SafetensorsFile(path) as file:
        start = resident_file_kib()
        a, b = file.tensor("a"), file.tensor("b")
        assert a.sum(dtype=np.int64) == size and b.sum(dtype=np.int64) == 2 * size
        touched = resident_file_kib()
        assert touched - start > 1.8 * size / 1024
        file.release("a")
        file.release("none")
        assert touched - resident_file_kib() > 0.9 * size / 1024
        assert a.sum(dtype=np.int64) == size


def test_unknown_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": np.ones(2)})
    with SafetensorsFile(path) as file:
        for question in (file.entry, file.tensor, file.release):
            with pytest.raises(WeightsError, match=r"a\.safetensors: no tensor 'y' among its 1"):
                question("y")


def one(**changes: object) -> dict:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def two(begin: int, end: int, size: int) -> dict:
    return {
        "u": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        "v": {"dtype": "U8", "shape": [size], "data_offsets": [begin, end]},
    }


BAD_HEADERS = {
    "not an object": (b"[]", "not safetensors"),
    "empty": (b"", "not safetensors"),
    "leading space": (b' {"a":1}', "not safetensors"),
    "malformed": (b'{"w": ', "malformed JSON at line 1"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "duplicate names": (
        b'{"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
        b' "w": {"dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}',
        "'w' appears more than once",
    ),
    "duplicate keys": (
        b'{"w": {"dtype": "U8", "dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}',
        "'dtype' appears more than once",
    ),
    "deep": (b'{"w": ' + b"[" * 100_000, "nested too deeply"),
    "NaN": (b'{"w": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN"),
    "entry is a list": ({"w": []}, "'w': exactly dtype, shape and data_offsets"),
    "entry is null": ({"w": None}, "exactly dtype"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, "exactly dtype"),
    "unknown key": (one(strides=[1]), "exactly dtype"),
    "unknown dtype": (one(dtype="F4"), "'w': dtype 'F4' is not one of F64"),
    "dtype is a list": (one(dtype=["F32"]), "dtype"),
    "shape is a number": (one(shape=2), "shape 2 is not a list"),
    "negative size": (one(shape=[-2]), "shape"),
    "fractional size": (one(shape=[2.0]), "shape"),
    "boolean size": (one(shape=[True, 2]), "shape"),
    "text size": (one(shape=["2"]), "shape"),
    "too many dimensions": (one(shape=[2] + [1] * 32), "shape"),
    "product overflows 64 bits": (one(shape=[2**32, 2**32]), "beyond any memory"),
    "bytes overflow 64 bits": (one(shape=[2**62]), "beyond any memory"),
    "overflow beside a zero": (one(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), "beyond any memory"),
    "one offset": (one(data_offsets=[0]), "data_offsets"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "data_offsets"),
    "negative offset": (one(data_offsets=[-8, 0]), "data_offsets"),
    "fractional offset": (one(data_offsets=[0, 8.0]), "data_offsets"),
    "reversed offsets": (one(data_offsets=[8, 0]), "takes 8 bytes, data_offsets [8, 0] give it -8"),
    "range too short": (one(data_offsets=[0, 4]), "F32 [2] takes 8 bytes, data_offsets [0, 4] give it 4"),
    "range too long": (one(shape=[1]), "takes 4 bytes"),
    "beyond the file": (one(data_offsets=[8, 16]), "truncated?"),
    "far beyond the file": (one(data_offsets=[2**64, 2**64 + 8]), "truncated?"),
    "absurd but consistent": (one(shape=[2**60], data_offsets=[0, 2**62]), "truncated?"),
    "overlap": (two(2, 8, 6), "'u' and 'v' overlap"),
    "same range": (two(0, 4, 4), "'u' and 'v' overlap"),
    "hole between": (two(5, 8, 3), "1 unused bytes between 'u' and 'v'"),
    "hole before": ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "4 unused bytes between the header"),
    "unused tail": (two(4, 6, 2), "2 unused bytes after 'v'"),
    "zero-size inside another": (two(2, 2, 0), "overlap"),
    "no tensors but data": ({}, "8 unused bytes after the header"),
    "metadata is a list": (one() | {"__metadata__": []}, "__metadata__"),
    "metadata is null": (one() | {"__metadata__": None}, "__metadata__"),
    "metadata holds numbers": (one() | {"__metadata__": {"n": 1}}, "__metadata__"),
}


STRICTER_THAN_THE_LIBRARY = {"duplicate names", "unknown key", "metadata is null", "too many dimensions"}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_header(tmp_path, case):
    header, message = BAD_HEADERS[case]
    path = write_raw(tmp_path / "bad.safetensors", header, b"12345678")
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    if case not in STRICTER_THAN_THE_LIBRARY:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(path.read_bytes())


def test_the_same_file_unspoiled_is_accepted(tmp_path):
    path = write_raw(tmp_path / "good.safetensors", one() | {"__metadata__": {}}, b"12345678")
    assert SafetensorsFile(path).names() == ("w",)
    path = write_raw(tmp_path / "good.safetensors", two(4, 8, 4), b"12345678")
    assert SafetensorsFile(path).names() == ("u", "v")


@pytest.mark.parametrize(
    "length, message",
    [(2**64 - 1, "above the format's"), (MAX_HEADER + 1, "above"), (MAX_HEADER, "truncated"), (1000, "truncated")],
)
def test_header_length_that_lies(tmp_path, length, message):
    with pytest.raises(WeightsError, match=message):
        SafetensorsFile(write_raw(tmp_path / "bad.safetensors", one(), b"12345678", length=length))


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": np.ones((3, 5), np.float32), "y": np.ones(3, np.uint8)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"a\.safetensors"):
            SafetensorsFile(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(WeightsError, match="1 unused bytes after"):
        SafetensorsFile(path)


def test_what_is_not_a_readable_file(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="not a regular file"):
        SafetensorsFile(tmp_path)
    with pytest.raises(WeightsError, match="null byte|null character"):
        SafetensorsFile("a\0b")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(WeightsError, match="not a regular file"):
        SafetensorsFile(pipe)
    pointer = tmp_path / "lfs.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(WeightsError, match="git lfs pull"):
        SafetensorsFile(pointer)


def test_writer_takes_views_and_keeps_values(tmp_path):
    path = tmp_path / "a.safetensors"
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    save_safetensors(path, {"t": base.T, "s": base[::2, 1::2], "r": base[::-1]})
    with SafetensorsFile(path) as file:
        assert np.array_equal(file.tensor("t"), base.T)
        assert np.array_equal(file.tensor("s"), base[::2, 1::2])
        assert np.array_equal(file.tensor("r"), base[::-1])


def test_writer_refuses_what_the_format_cannot_hold(tmp_path):
    path = tmp_path / "a.safetensors"
    array = np.ones(2, np.float32)
    bad: list[tuple[dict, dict | None]] = [
        ({"x": array.astype(np.complex64)}, None),
        ({"x": array.astype(">f4")}, None),
        ({"x": np.array(["text"])}, None),
        ({"__metadata__": array}, None),
        ({"\ud800": array}, None),
        ({"x": array}, {"n": 1}),
    ]
    for tensors, metadata in bad:
        with pytest.raises(InvalidArgument):
            save_safetensors(path, tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_writer_fails_without_touching_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"x": np.ones(2)})
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match=r"a\.safetensors: cannot be written: No space left"):
        save_safetensors(path, {"x": np.zeros(2)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(WeightsError, match="cannot be written"):
        save_safetensors(tmp_path / "none" / "a.safetensors", {"x": np.zeros(2)})
