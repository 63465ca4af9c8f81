"""The architectures the engine runs, and the way from a parsed config.json to a `ModelConfig`.

The name in `architectures` decides, because it names the computation. A file whose `model_type` says something else
is refused: Transformers would go by that one, and the two would compute different models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

from engine.config import ModelConfig
from engine.models.fields import Fields
from engine.models.llama import read_llama, read_mistral
from engine.models.qwen import read_qwen2, read_qwen3

Reader = Callable[[Fields], ModelConfig]

_ARCHITECTURES: dict[str, tuple[str, Reader]] = {  # name in config.json -> model_type, reader
    "LlamaForCausalLM": ("llama", read_llama),
    "MistralForCausalLM": ("mistral", read_mistral),
    "Qwen2ForCausalLM": ("qwen2", read_qwen2),
    "Qwen3ForCausalLM": ("qwen3", read_qwen3),
}
SUPPORTED_ARCHITECTURES = tuple(_ARCHITECTURES)


def read_config(config_json: Mapping[str, Any], path: str | PathLike[str]) -> ModelConfig:
    """The model that a parsed config.json describes; `path` is named in errors.

    Raises ConfigError for anything missing, malformed, inconsistent, or not computed by this engine.
    """
    fields = Fields(config_json, str(path))
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    names = fields.strings("architectures")
    if names is None or len(names) != 1:
        fields.refuse("architectures", f"must name one architecture; supported: {supported}")
    if names[0] not in _ARCHITECTURES:
        fields.refuse("architectures", f"not supported; supported: {supported}")
    model_type, reader = _ARCHITECTURES[names[0]]
    if "model_type" in fields and fields.raw("model_type") != model_type:
        fields.refuse("model_type", f"{names[0]} needs model_type {model_type!r}")
    return reader(fields)
