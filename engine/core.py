"""Plain data that crosses module borders: requests, sampling parameters, results, and one step's `Batch`.

Nothing here computes beyond validating itself; nothing here imports more than the standard library and NumPy.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]


class Logprob(NamedTuple):
    """One candidate token's log-probability (natural log, of the raw model distribution) and 1-based rank."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. None falls to generation_config.json, then to the neutral value.

    Raises RequestError for values out of range.
    """

    n: int = 1  # answers, at most 1024
    temperature: float | None = None  # >= 0; 0 = greedy; neutral 1
    top_p: float | None = None  # (0, 1]
    top_k: int | None = None  # 0 or -1 = off
    min_p: float | None = None  # [0, 1]
    repetition_penalty: float | None = None  # > 0; neutral 1; over prompt and answer
    presence_penalty: float = 0.0  # [-2, 2]; over the answer
    frequency_penalty: float = 0.0  # [-2, 2]; over the answer
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None  # None = from the operating system's entropy
    stop: str | Sequence[str] | None = None  # never emitted
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = None  # None = to the end of the context
    min_tokens: int = 0
    logprobs: int | None = None  # top candidates per answer token besides the chosen one
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every value; collections are copied, so that nobody can change them later."""
        for name, low, high, low_open in _RANGES:
            _check_range(name, getattr(self, name), low, high, low_open)
        for name, least, most in _INTEGERS:
            _check_integer(name, getattr(self, name), least, most)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is larger than max_tokens {self.max_tokens}")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, not {_shown(self.ignore_eos)}")
        self._keep("stop", _checked_stops(self.stop))
        self._keep("stop_token_ids", _checked_ids("stop_token_ids", self.stop_token_ids))
        if self.logit_bias is not None:
            self._keep("logit_bias", _checked_bias(self.logit_bias))

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the one way to set a field of a frozen dataclass

    def with_defaults(self, defaults: Mapping[str, float | int]) -> SamplingParams:
        """Fill fields that are None from `defaults` (generation_config.json); explicit values win."""
        filled = {f.name: getattr(self, f.name) for f in fields(self)}
        filled.update({k: v for k, v in defaults.items() if k in filled and filled[k] is None})
        return SamplingParams(**filled)


_INF = math.inf
_RANGES: tuple[tuple[str, float, float, bool], ...] = (  # name, low, high, low excluded
    ("temperature", 0.0, _INF, False),
    ("top_p", 0.0, 1.0, True),
    ("min_p", 0.0, 1.0, False),
    ("repetition_penalty", 0.0, _INF, True),
    ("presence_penalty", -2.0, 2.0, False),
    ("frequency_penalty", -2.0, 2.0, False),
)
_INTEGERS: tuple[tuple[str, int, int | None], ...] = (  # name, least, most
    ("n", 1, 1024),  # each answer has state of its own: millions would fill the memory before the first token
    ("top_k", -1, None),
    ("max_tokens", 1, None),
    ("min_tokens", 0, None),
    ("logprobs", 0, None),
    ("prompt_logprobs", 0, None),
    ("seed", 0, None),  # the sampler knows the most
)


def _check_range(name: str, value: object, low: float, high: float, low_open: bool) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise RequestError(f"{name} must be a number, not {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond any float
        number = _INF
    above = number > low if low_open else number >= low
    if not (above and number <= high and number < _INF):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high == _INF else ']'}"
        raise RequestError(f"{name} must be in {interval}, not {_shown(value)}")


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RequestError(f"{name} must be a whole number, not {_shown(value)}")
    if value < least:
        raise RequestError(f"{name} must be at least {least}, not {_shown(value)}")
    if most is not None and value > most:
        raise RequestError(f"{name} must be at most {most}, not {_shown(value)}")


def _checked_stops(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else _items("stop", stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop strings must be non-empty text, not {_shown(text)}")
    return texts


def _checked_ids(name: str, ids: Any) -> tuple[int, ...]:
    tokens = _items(name, ids)
    for token in tokens:
        _check_token(name, token)
    return tokens


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, not be {_shown(bias)}")
    for token, value in bias.items():
        _check_token("logit_bias", token)
        if value is None:
            raise RequestError(f"logit_bias of token {token} must be a number, not None")
        _check_range(f"logit_bias of token {token}", value, -100.0, 100.0, False)
    return dict(bias)


def _check_token(name: str, token: object) -> None:
    if token is None:
        raise RequestError(f"{name} must hold token ids, not None")
    _check_integer(f"a token id in {name}", token, 0)


def _items(name: str, values: Any) -> tuple[Any, ...]:
    if values is None:
        return ()
    if not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a list, not {_shown(values)}")
    return tuple(values)


def _shown(value: object) -> str:
    """What a caller passed, for a message: short whatever it is, and never an error itself."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    return reprlib.repr(value)


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a request (a request with n > 1 has several)."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None  # None while running


@dataclass(slots=True)
class RequestOutput:
    """A finished request."""

    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # first entry None
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0  # prompt tokens served from the prefix cache
    seconds_to_first_token: float | None = None  # since submission; None where no token came
    seconds: float = 0.0  # from submission to the end


@dataclass(frozen=True, slots=True)
class StreamPiece:
    """What one step added to one answer. text may be empty (half a character, a held-back stop prefix)."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: the rows of S sequences back to back, those that decode before those that prefill.

    Sequence s owns rows [query_start[s], query_start[s + 1]); its rows are its newest tokens, in order, and of one kind
    (`engine.scheduler` says of which). A slot is block * block_size + offset in the paged KV cache.
    """

    token_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T], 0-based in the sequence
    slot_mapping: NDArray[np.int32]  # [T], where the row's K and V are written
    query_start: NDArray[np.int32]  # [S + 1]
    context_lens: NDArray[np.int32]  # [S], tokens in the cache once this step's are written
    block_tables: NDArray[np.int32]  # [S, B], physical blocks in order, padded with 0
    logit_rows: NDArray[np.int32]  # [R], the rows whose logits are wanted
    num_decode_rows: int | None = None  # rows [0, n) decode, rows [n, T) prefill; None: all decode


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What no step exceeds, so that memory for any can be taken before the first."""

    tokens: int
    sequences: int
    context: int  # tokens of one sequence, its new ones included


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What choosing the token of one row takes, as numbers: `engine.sampler`'s steps 2 to 10. Ids are distinct."""

    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    min_p: float
    seed: int  # of the request, below 2^64
    index: int  # which of its samples
    position: int  # answer tokens so far
    masked: NDArray[np.int64]  # ids that min_tokens forbids
    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float64]
    penalised: NDArray[np.int64]  # ids
    counts: NDArray[np.float64]  # of these in the answer
    repetition: float
    presence: float
    frequency: float
