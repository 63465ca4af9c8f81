"""The house rules that no type checker sees: imports point downward, importing the package is cheap, names resolve."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each floor may import itself where it is marked and the floors below it, never one above. A path ends with "/" where
# it names a folder. Order matters: the first match counts.
FLOORS: list[tuple[int, str]] = [
    (0, "engine/__init__.py"),
    (0, "engine/core.py"),
    (0, "engine/cache_directory.py"),
    (0, "engine/config.py"),
    (0, "engine/errors.py"),
    (0, "engine/fp4_types.py"),
    (0, "engine/fp8_types.py"),
    (0, "engine/json_file.py"),
    (0, "engine/memory.py"),
    (0, "engine/progress.py"),
    (1, "engine/blocks.py"),
    (1, "engine/sequence.py"),
    (1, "engine/step.py"),
    (1, "engine/scheduler.py"),
    (1, "engine/stop_strings.py"),
    (1, "engine/tokenizer.py"),
    (1, "engine/chat_template.py"),
    (1, "engine/generation_defaults.py"),
    (1, "engine/ops/"),
    (2, "engine/workspace.py"),
    (2, "engine/rope.py"),
    (3, "engine/quant/"),
    (4, "engine/layers.py"),
    (4, "engine/sampler.py"),
    (5, "models/"),
    (5, "weights/"),
    (6, "engine/loading.py"),
    (6, "engine/runner.py"),
    (6, "engine/rehearsal.py"),
    (7, "engine/request.py"),
    (7, "engine/worker.py"),
    (8, "engine/llm.py"),
    (9, "engine/"),  # command lines
]
# Neighbours on one floor that must not know each other.
STRANGERS = [("models/", "weights/"), ("engine/scheduler.py", "engine/ops/"), ("engine/blocks.py", "engine/ops/")]
PUBLIC_NAMES_ONLY = "engine/__init__.py"  # resolves names lazily, so what it names is above it


def _sources() -> list[Path]:
    folders = ("engine", "models", "weights")
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "demo" not in p.parts)


def _floor(path: str) -> int:
    return next(floor for floor, at in FLOORS if path == at or (at.endswith("/") and path.startswith(at)))


def _imported_files(path: Path) -> set[str]:
    """Files of ours that a module imports, as paths from the root; imports for type checkers included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {file for name in names if name.split(".")[0] == "engine" for file in _files_of(name)}


def _files_of(name: str) -> set[str]:
    parts = name.split(".")[1:]
    if parts and parts[0] not in ("models", "weights"):
        parts = ["engine", *parts]
    stem = "/".join(parts)
    return {file for file in (f"{stem}.py", f"{stem}/__init__.py") if stem and (ROOT / file).is_file()}


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    own = str(path.relative_to(ROOT))
    if own == PUBLIC_NAMES_ONLY:
        return
    for imported in _imported_files(path):
        assert _floor(imported) <= _floor(own), f"{own} imports {imported}, which is on a floor above"
        for one, other in STRANGERS:
            assert not (own.startswith(one) and imported.startswith(other)), f"{own} must not know {imported}"
            assert not (own.startswith(other) and imported.startswith(one)), f"{own} must not know {imported}"


def test_import_is_light() -> None:
    """`import engine` loads no backend, no tokenizer library, and never torch, transformers or cupy."""
    code = "import sys, json, engine; print(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    loaded = {name.split(".")[0] for name in json.loads(out)}
    assert not loaded & {"torch", "transformers", "cupy", "tokenizers", "jinja2", "huggingface_hub", "numpy"}


def test_running_a_model_never_loads_torch() -> None:
    code = (
        "import sys; from engine import LLM, SamplingParams\n"
        "with LLM('demo') as llm: llm.generate('x', SamplingParams(max_tokens=1))\n"
        "bad = {'torch', 'transformers', 'huggingface_hub', 'jinja2'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_resolve() -> None:
    import engine

    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = engine.no_such_name


def test_a_host_programs_own_modules_stay_reachable(tmp_path: Path) -> None:
    """A service with its own models.py, weights.py and cuda.py can embed the engine."""
    for name in ("models", "weights", "cuda"):
        (tmp_path / f"{name}.py").write_text(f"MINE = '{name}'\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.append({str(ROOT)!r})\n"
        "import engine.models.registry, engine.weights.locate, models, weights, cuda\n"
        "assert (models.MINE, weights.MINE, cuda.MINE) == ('models', 'weights', 'cuda')\n"
        "assert engine.models.__name__ == 'engine.models'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
