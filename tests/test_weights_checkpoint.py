"""Checkpoints of one and of many files, and the proof that a model's parameters are all there."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from engine.errors import WeightsError
from engine.weights.checkpoint import INDEX, SINGLE, Checkpoint
from engine.weights.coverage import fill
from engine.weights.write import save_safetensors

TENSORS = {
    "embed": np.arange(12, dtype=np.float32).reshape(4, 3).astype(ml_dtypes.bfloat16),
    "norm": np.arange(3, dtype=np.float32),
    "up": np.arange(6, dtype=np.float16).reshape(2, 3),
    "scale": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
}
SHAPES = {name: array.shape for name, array in TENSORS.items()}


def write_shards(directory: Path, shards: dict[str, list[str]], weight_map: dict | None = None) -> Path:
    """Alternately written by our writer and by the format's library."""
    for number, (file, names) in enumerate(shards.items()):
        save = save_safetensors if number % 2 else lambda path, tensors: safetensors.numpy.save_file(tensors, path)
        save(directory / file, {name: TENSORS[name] for name in names})
    listed = weight_map if weight_map is not None else {name: file for file, names in shards.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return directory


SHARDS = {"b.safetensors": ["embed", "scale"], "a.safetensors": ["norm"], "c.safetensors": ["up", "none"]}


@pytest.fixture(params=["single", "sharded"])
def directory(request, tmp_path):
    if request.param == "single":
        save_safetensors(tmp_path / SINGLE, TENSORS)
        return tmp_path
    return write_shards(tmp_path, SHARDS)


def test_one_namespace_over_all_files(directory):
    with Checkpoint(directory) as checkpoint:
        assert set(checkpoint.names()) == set(TENSORS)
        assert checkpoint.nbytes == sum(array.nbytes for array in TENSORS.values())
        for name, array in TENSORS.items():
            found = checkpoint.tensor(name)
            assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()
            assert checkpoint.entry(name).file in checkpoint.files
            checkpoint.release(name)
        with pytest.raises(WeightsError, match="no tensor 'x' among its 5"):
            checkpoint.tensor("x")
    with pytest.raises(WeightsError, match="closed"):
        checkpoint.tensor("embed")


def test_names_are_grouped_by_file_in_the_order_of_their_bytes(tmp_path):
    checkpoint = Checkpoint(write_shards(tmp_path, SHARDS))
    entries = [checkpoint.entry(name) for name in checkpoint.names()]
    assert [path.name for path in checkpoint.files] == list(SHARDS)
    order = [(checkpoint.files.index(entry.file), entry.begin, entry.end) for entry in entries]
    assert order == sorted(order)


def test_single_file_wins_over_an_index(tmp_path):
    write_shards(tmp_path, {"a.safetensors": ["norm"]})
    save_safetensors(tmp_path / SINGLE, {"up": TENSORS["up"]})
    assert Checkpoint(tmp_path).names() == ("up",)


def test_missing_files_say_what_was_looked_for(tmp_path):
    with pytest.raises(WeightsError, match=f"neither {SINGLE} nor {INDEX} is there$"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"found pytorch_model\.bin, but only safetensors"):
        Checkpoint(tmp_path)
    with pytest.raises(WeightsError, match="No such file"):
        Checkpoint(tmp_path / "none")
    write_shards(tmp_path, SHARDS)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of the 3 files listed .* missing, a\.safetensors"):
        Checkpoint(tmp_path)


NOT_PLAIN_NAMES: list[object] = [
    *("../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..\\a.safetensors", "C:a.safetensors"),
    *("", "..", "a.bin", "a\0.safetensors", "\u202e.safetensors", "é" * 200 + ".safetensors"),
    *(3, None, ["a.safetensors"]),
]


@pytest.mark.parametrize("name", NOT_PLAIN_NAMES, ids=ascii)
def test_index_must_not_lead_out_of_the_directory(tmp_path, name):
    save_safetensors(tmp_path / "a.safetensors", {"norm": TENSORS["norm"]})
    inner = tmp_path / "inner"
    inner.mkdir()
    write_shards(inner, {}, {"norm": name})
    with pytest.raises(WeightsError, match="'norm': .* is not the plain name of a .safetensors file"):
        Checkpoint(inner)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "malformed JSON"),
        ("[]", "object is required"),
        ("{}", "weight_map must be"),
        ('{"weight_map": []}', "weight_map must be"),
        ('{"weight_map": {}}', "weight_map must be"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' appears more than once"),
    ],
)
def test_malformed_index(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightsError, match=message):
        Checkpoint(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    shards = {"a.safetensors": ["norm", "up"], "b.safetensors": ["embed"]}
    listed = {"norm": "a.safetensors", "up": "a.safetensors", "embed": "b.safetensors"}
    Checkpoint(write_shards(tmp_path, shards, listed))
    for wrong, message in [
        (listed | {"ghost": "b.safetensors"}, r"b\.safetensors: 1 tensor \('ghost'\) listed .* absent"),
        ({"norm": "a.safetensors", "embed": "b.safetensors"}, r"a\.safetensors: 1 tensor \('up'\) present but not"),
        (listed | {"up": "b.safetensors"}, r"'up'"),
    ]:
        with pytest.raises(WeightsError, match=message):
            Checkpoint(write_shards(tmp_path, shards, wrong))
    shards["b.safetensors"].append("up")  # in both files, listed for one
    with pytest.raises(WeightsError, match=r"b\.safetensors: 1 tensor \('up'\) present but not listed"):
        Checkpoint(write_shards(tmp_path, shards, listed))


class Collector:
    def __init__(self) -> None:
        self.found: dict[str, np.ndarray] = {}
        self.order: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def consume(self, name: str, array: np.ndarray) -> None:
        self.found[name] = array
        self.order.append(name)

    def progress(self, done: int, total: int) -> None:
        self.steps.append((done, total))


def test_fill_delivers_everything_once_in_file_order(directory):
    got = Collector()
    with Checkpoint(directory) as checkpoint:
        fill(SHAPES, checkpoint, got.consume, progress=got.progress)
        assert got.order == list(checkpoint.names())
        total = checkpoint.nbytes
    assert sorted(got.order) == sorted(TENSORS)
    assert all(got.found[name].tobytes() == array.tobytes() for name, array in TENSORS.items())
    assert len(got.steps) == 5 and got.steps[-1] == (total, total)
    assert [done for done, _ in got.steps] == sorted(done for done, _ in got.steps)


def refused(expected: dict, checkpoint: Checkpoint, **options: object) -> str:
    got = Collector()
    with pytest.raises(WeightsError) as caught:
        fill(expected, checkpoint, got.consume, **options)
    assert got.order == []  # nothing is consumed before everything fits
    return str(caught.value)


def test_missing_and_surplus_tensors_are_named_together(directory):
    checkpoint = Checkpoint(directory)
    message = refused({"embed": (4, 3), "wq": (8, 8), "wk": (2,)}, checkpoint)
    assert "missing: 2 tensors ('wq', 'wk'), the first of shape [8, 8]" in message
    assert "unknown to the model: 4 tensors (" in message and "'norm'" in message and ".safetensors" in message
    many = {f"layer.{i}": (1,) for i in range(7)} | SHAPES
    assert "7 tensors ('layer.0', 'layer.1', 'layer.2', 'layer.3', 'layer.4' and 2 more)" in refused(many, checkpoint)


def test_shapes_must_match_exactly(directory):
    message = refused(SHAPES | {"embed": (3, 4), "scale": (1,)}, Checkpoint(directory))
    assert "'embed' in" in message and "expected [3, 4], found [4, 3]" in message
    assert "expected [1], found []" in message and "wrong shape for 2 of 5 tensors" in message


def test_ignored_tensors_are_dropped_but_never_expected_ones(directory):
    got = Collector()
    fill({"embed": (4, 3), "norm": (3,)}, Checkpoint(directory), got.consume, ignore=["up", "s*", "n*"])
    assert sorted(got.order) == ["embed", "norm"]


def test_tied_tensor_may_repeat_its_target_with_the_same_shape_only(tmp_path):
    embed = TENSORS["embed"]
    save_safetensors(tmp_path / SINGLE, {"embed": embed, "head": embed})
    got = Collector()
    fill({"embed": (4, 3)}, Checkpoint(tmp_path), got.consume, ties={"head": "embed"})
    assert got.order == ["embed"]
    save_safetensors(tmp_path / SINGLE, {"embed": embed})
    fill({"embed": (4, 3)}, Checkpoint(tmp_path), got.consume, ties={"head": "embed"})
    save_safetensors(tmp_path / SINGLE, {"embed": embed, "head": embed[:2]})
    message = refused({"embed": (4, 3)}, Checkpoint(tmp_path), ties={"head": "embed"})
    assert "'head' in model.safetensors: expected [4, 3], found [2, 3]" in message


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float64", "float8_e4m3fn"])
def test_other_types_are_refused_by_name(tmp_path, dtype):
    save_safetensors(tmp_path / SINGLE, {"w": np.zeros((2, 2), dtype)})
    message = refused({"w": (2, 2)}, Checkpoint(tmp_path))
    assert "model.safetensors: tensor 'w' is " in message and "not supported yet" in message
