"""What a checkpoint recommends: sampling defaults and the tokens that end an answer (generation_config.json).

The values the file lists are the defaults of SamplingParams fields left None; `do_sample` is not consulted, as in
vLLM: many checkpoints list a temperature and leave do_sample out, and whoever wants greedy output says temperature 0.
Everything else the file may hold (max_new_tokens, beam search, …) is not a default here and is left alone.

An answer ends at any end-of-sequence token that generation_config.json, config.json or the tokenizer names: chat
models routinely name only some of them in each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.core import SamplingParams
from engine.errors import ConfigError, RequestError
from engine.json_file import brief, read_json

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """sampling: arguments for SamplingParams.with_defaults. stop_token_ids: ids that end an answer."""

    sampling: Mapping[str, float | int]
    stop_token_ids: frozenset[int]

    @classmethod
    def from_directory(
        cls, path: str | os.PathLike[str], *, model_eos: Iterable[int], tokenizer_eos: int | None
    ) -> GenerationDefaults:
        """Read `path`/generation_config.json, if there is one. Raises ConfigError for a malformed or invalid file."""
        file = Path(path) / "generation_config.json"
        values = read_json(file, ConfigError) if file.exists() else {}
        sampling = {name: values[name] for name in _SAMPLING if values.get(name) is not None}
        try:
            SamplingParams(**sampling)  # the same types and ranges as a caller's own
        except RequestError as error:
            raise ConfigError(f"{file}: {error}") from error
        stops = {*model_eos, *_token_ids(values.get("eos_token_id"), file)}
        if tokenizer_eos is not None:
            stops.add(tokenizer_eos)
        return cls(sampling, frozenset(stops))


def _token_ids(value: Any, file: Path) -> list[int]:
    """The ids in an eos_token_id entry, which may be absent, one id or a list."""
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ConfigError(f"{file}: eos_token_id must be a token id or a list of them, not {brief(value)}")
    return ids
