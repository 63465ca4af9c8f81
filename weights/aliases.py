"""Short names of models: one table, and the only place that knows them.

A bare name means the instruction-tuned model, as people who type short names mostly want answers; `-base` means the
pretrained one. `-instruct` may be spelled out.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Alias(NamedTuple):
    """A repository id on the Hugging Face Hub and what it holds: "instruct" or "base"."""

    repo: str
    kind: str


# short name, instruct repository, base repository (None: never published)
_MODELS: tuple[tuple[str, str, str | None], ...] = (
    ("qwen2-0.5b", "Qwen/Qwen2-0.5B-Instruct", "Qwen/Qwen2-0.5B"),
    ("qwen2-1.5b", "Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2-1.5B"),
    ("qwen2-7b", "Qwen/Qwen2-7B-Instruct", "Qwen/Qwen2-7B"),
    ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"),
    ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B"),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B"),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
    ("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-14B"),
    ("qwen2.5-32b", "Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-32B"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"),
    ("qwen3-4b", "Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base"),
    ("qwen3-8b", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base"),
    ("qwen3-14b", "Qwen/Qwen3-14B", "Qwen/Qwen3-14B-Base"),
    ("qwen3-32b", "Qwen/Qwen3-32B", None),
    ("llama-2-7b", "meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
    ("llama-2-13b", "meta-llama/Llama-2-13b-chat-hf", "meta-llama/Llama-2-13b-hf"),
    ("llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B"),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
    ("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B"),
    ("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B"),
    ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
)


def _table() -> dict[str, Alias]:
    table: dict[str, Alias] = {}
    for name, instruct, base in _MODELS:
        table[name] = table[f"{name}-instruct"] = Alias(instruct, "instruct")
        if name.startswith("llama-2-"):  # what its publisher calls the instruct model
            table[f"{name}-chat"] = table[name]
        if base is not None:
            table[f"{name}-base"] = Alias(base, "base")
    return table


ALIASES: Mapping[str, Alias] = MappingProxyType(_table())
