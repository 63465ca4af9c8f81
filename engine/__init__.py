"""sharq-engine: a torch-free inference engine for Llama and Qwen decoders.

    from engine import LLM, SamplingParams
    llm = LLM("demo")
    print(llm.generate("def main", SamplingParams(max_tokens=32))[0].outputs[0].text)

Importing this package loads neither the tokenizer library nor a backend: names are resolved at first use, so a service
that only wants `SamplingParams` or the exceptions pays nothing.

The packages `engine.models` and `engine.weights` live in the top-level folders `models/` and `weights/` of a checkout
(installed wheels carry them inside `engine/`). In a bare checkout the folder above is put on this package's path, so
that both arrangements import the same names and a host program's own `models.py` or `weights.py` stays reachable.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_here = Path(__file__).resolve().parent
if not (_here / "models").is_dir() and (_here.parent / "setup.py").is_file():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.core import CompletionOutput, Logprob, RequestOutput, SamplingParams, StreamPiece
    from engine.errors import EngineError
    from engine.llm import LLM

_HOME = {  # public name -> module that defines it
    "LLM": "engine.llm",
    "SamplingParams": "engine.core",
    "CompletionOutput": "engine.core",
    "RequestOutput": "engine.core",
    "StreamPiece": "engine.core",
    "Logprob": "engine.core",
    "EngineConfig": "engine.config",
    "EngineError": "engine.errors",
}
__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineError",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "StreamPiece",
]


def __getattr__(name: str) -> Any:
    """Load a public name's module at first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
