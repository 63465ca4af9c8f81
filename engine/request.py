"""A request on its way through the engine: the channel its caller reads, and the answers as they grow.

The worker thread writes, the caller's thread reads the channel; nothing else is shared. Text leaves an answer only when
it is certain: whole characters, and nothing that might turn out to be the beginning of a stop string.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.core import CompletionOutput, Logprob, RequestOutput, SamplingParams, StreamPiece
from engine.errors import EngineError
from engine.sampler import SampledToken, SamplerState
from engine.sequence import Sequence
from engine.stop_strings import StopStrings
from engine.tokenizer import Detokenizer, Tokenizer

Event: TypeAlias = StreamPiece | RequestOutput | EngineError  # the last two end the channel


class Answer:
    """One sequence's answer: its sampler, its text so far, and the rules that end it."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, *, seed: int, eos_token_ids: Iterable[int]) -> None:
        params = sequence.params
        eos = tuple(eos_token_ids)
        self.sequence = sequence
        self.sampler = SamplerState(params, seed=seed, index=sequence.index, prompt=sequence.tokens, eos_token_ids=eos)
        self._stop_ids = frozenset(params.stop_token_ids or ()) | frozenset(() if params.ignore_eos else eos)
        self._stops = StopStrings(params.stop or ())
        self._detokenizer = Detokenizer(tokenizer, sequence.tokens)
        self._piece = ""  # text that became certain since the last piece was taken
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []

    def push(self, sampled: SampledToken) -> bool:
        """Take the next token; True when it ends the answer. A token that stops it leaves no text of its own."""
        self.sampler.append(sampled.token_id)
        self.token_ids.append(sampled.token_id)
        if self._logprobs is not None and sampled.logprobs is not None:
            self._logprobs.append(sampled.logprobs)
        if sampled.token_id in self._stop_ids:
            return True
        return self._push_text(self._detokenizer.push([sampled.token_id]))

    def _push_text(self, text: str) -> bool:
        if len(self.token_ids) <= self.sequence.params.min_tokens:  # too early to stop, so nothing to look for
            self._piece += text
            return False
        text, stopped = self._stops.push(text)
        self._piece += text
        if stopped:
            self._detokenizer.finish()  # what it holds back comes after the stop string
        return stopped

    def take_piece(self) -> StreamPiece:
        """What the newest token added. Once the sequence has finished, everything still held back as well."""
        reason = self.sequence.finish_reason
        if reason is not None:
            self._push_text(self._detokenizer.finish())
            self._piece += self._stops.flush()
        piece, self._piece = self._piece, ""
        self._text.append(piece)
        return StreamPiece(self.sequence.index, piece, self.token_ids[-1:], reason)

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            self.sequence.index, "".join(self._text), self.token_ids, self._logprobs, self.sequence.finish_reason
        )


@dataclass(slots=True, eq=False)
class Request:
    """A submitted request; `channel` ends with a RequestOutput or the error that ended it.

    A request for logits has no answers: its one sequence is run over the prompt and `prompt_logits` is filled.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams  # with the model's defaults filled in
    seed: int
    prompt_logits: NDArray[np.float32] | None = None  # [T, V]
    channel: SimpleQueue[Event] = field(default_factory=SimpleQueue)
    answers: list[Answer] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    num_unfinished: int = 0  # sequences; kept by the worker
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None  # when it came, as `submitted`

    def next_event(self) -> StreamPiece | RequestOutput:
        """Wait for what comes next. The end stays where it is, so that every reader comes to it.

        Raises the error that ended the request.
        """
        event = self.channel.get()
        if isinstance(event, StreamPiece):
            return event
        self.channel.put(event)
        if isinstance(event, EngineError):
            raise fresh(event)
        return event

    def result(self) -> RequestOutput:
        """What there is of the answers so far. Called by the worker."""
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[answer.output() for answer in self.answers],
            num_cached_tokens=self.num_cached_tokens,
            seconds_to_first_token=None if self.first_token is None else self.first_token - self.submitted,
            seconds=time.perf_counter() - self.submitted,
        )


def fresh(error: EngineError) -> EngineError:
    """The same error again, to raise: an exception that is kept would collect every frame it is raised through."""
    again = type(error)(*error.args)
    again.__cause__ = error.__cause__
    return again
