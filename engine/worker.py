"""The thread that runs the engine: takes requests in, steps model and sampler, sends results out.

One thread owns the model, the cache and the scheduler, so none of them needs a lock; callers on any thread submit and
cancel through an inbox that is emptied between steps, and read each request's own channel. An error that belongs to one
request (logits that are NaN, settings that leave no token) ends that request alone. Anything unexpected closes the
engine, since the state behind it can no longer be trusted: all requests end with EngineClosed, caused by it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineClosed, EngineError, NumericalError
from engine.ops.contract import Array
from engine.request import Answer, Request, fresh
from engine.runner import PROMPT_ROWS, ModelRunner
from engine.sampler import SampledToken, prompt_logprobs, sample_row
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.step import ScheduledStep
from engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class _Cancel:
    request: Request


class Worker:
    """Starts its thread at once; `close` ends it. All public methods may be called from any thread."""

    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, tokenizer: Tokenizer, *, eos_token_ids: Iterable[int]
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._eos = tuple(eos_token_ids)
        self._inbox: SimpleQueue[tuple[Request, ...] | _Cancel | None] = SimpleQueue()  # None = close
        self._requests: set[Request] = set()  # unfinished
        self._answers: dict[Sequence, Answer] = {}
        # Nothing is put into the inbox once it is closed. Reentrant: a stream that the garbage collector finds while
        # this thread is inside cancels itself.
        self._gate = threading.RLock()
        self._closed: EngineClosed | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests, which the same step will see first; their channels say how they go. Raises EngineClosed."""
        with self._gate:
            if self._closed is not None:
                raise fresh(self._closed)
            if not self._thread.is_alive():
                raise EngineClosed("the engine's thread does not exist in this process; load the model after forking")
            self._inbox.put(tuple(requests))

    def cancel(self, request: Request) -> None:
        """End a request early (finish reason "abort"); nothing if it has ended."""
        with self._gate:
            if self._closed is None:
                self._inbox.put(_Cancel(request))

    def close(self) -> None:
        """End the thread after its current step; what is unfinished gets EngineClosed. Idempotent."""
        self._shut(EngineClosed("the engine was closed"))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _shut(self, why: EngineClosed) -> None:
        with self._gate:
            if self._closed is None:
                self._closed = why
                self._inbox.put(None)

    def _run(self) -> None:
        try:
            while self._take_inbox():
                self._step()
            end = EngineClosed("the engine was closed before the request was finished")
        except BaseException as error:  # not swallowed: every caller gets it
            traceback.clear_frames(error.__traceback__)  # or it would hold the model
            why = f": {error}" if isinstance(error, EngineError) else f" after an internal error: {error!r}"
            end = EngineClosed(f"the engine stopped{why}")
            end.__cause__ = error
            self._shut(end)
        for request in self._requests | self._left_in_inbox():
            request.channel.put(end)
        self._requests.clear()
        self._answers.clear()
        del self._runner, self._scheduler  # the model and the cache go, whoever still holds the closed engine

    def _left_in_inbox(self) -> set[Request]:
        left: set[Request] = set()
        while True:
            try:
                message = self._inbox.get_nowait()
            except Empty:
                return left
            if isinstance(message, tuple):
                left.update(message)

    def _take_inbox(self) -> bool:
        """Admit and cancel what callers asked for; waits while there is nothing to do. False = close."""
        while True:
            try:
                message = self._inbox.get(block=not self._scheduler.has_unfinished)
            except Empty:
                return True
            if message is None:
                return False
            if isinstance(message, _Cancel):
                self._cancel(message.request)
            else:
                for request in message:
                    self._admit(request)

    def _admit(self, request: Request) -> None:
        self._requests.add(request)
        request.num_unfinished = request.params.n
        try:
            for index in range(request.params.n):
                self._add_sequence(request, index)
        except EngineError as error:
            self._fail(request, error)

    def _add_sequence(self, request: Request, index: int) -> None:
        only_scored = request.prompt_logits is not None
        sequence = Sequence(request, index, list(request.prompt_token_ids), request.params, only_scored=only_scored)
        self._scheduler.add(sequence)
        if not only_scored:
            answer = Answer(sequence, self._tokenizer, seed=request.seed, eos_token_ids=self._eos)
            request.answers.append(answer)
            self._answers[sequence] = answer
        if index == 0 and request.params.prompt_logprobs is not None:
            request.prompt_logprobs = [None]

    def _cancel(self, request: Request) -> None:
        if self._abort(request):
            request.channel.put(request.result())

    def _fail(self, request: Request, error: EngineError) -> None:
        if self._abort(request):
            request.channel.put(error.with_traceback(None))  # whose frames would hold this step's arrays

    def _abort(self, request: Request) -> bool:
        """End what is unfinished of a request; False if it has ended."""
        if request not in self._requests:
            return False
        for sequence in self._scheduler.abort(request):
            self._answers.pop(sequence, None)
        self._requests.remove(request)
        return True

    def _step(self) -> None:
        step = self._scheduler.schedule()
        if step is None:
            return
        hidden = self._runner.hidden(step.batch)
        self._score_prompts(step, hidden)
        sampled = self._sample(step, hidden)
        stopped = {sequence for sequence, token in sampled.items() if self._answers[sequence].push(token)}
        tokens = {sequence: token.token_id for sequence, token in sampled.items()}
        finished = self._scheduler.complete(step, tokens, stopped)
        now = time.perf_counter()
        for sequence in sampled:
            request: Request = sequence.request_id
            request.first_token = request.first_token or now
            request.channel.put(self._answers[sequence].take_piece())
        for sequence in finished:
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        request: Request = sequence.request_id
        self._answers.pop(sequence, None)
        if sequence.index == 0:  # the others read from the cache what the first has computed
            request.num_cached_tokens = sequence.num_cached_tokens
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            self._requests.remove(request)
            request.channel.put(request.result())

    def _sample(self, step: ScheduledStep, hidden: Array) -> dict[Sequence, SampledToken]:
        """A token for each sequence that is due one; a request whose row is unusable fails and gets none."""
        due = [(row, sequence) for row, sequence in step.sampled if not sequence.is_finished]
        states = [self._answers[sequence].sampler for _, sequence in due]
        tokens = self._runner.choose(hidden, [row for row, _ in due], states)
        left = [row for (row, _), token in zip(due, tokens, strict=True) if token is None]
        logits = dict(zip(left, self._runner.logits(hidden, left), strict=True)) if left else {}
        sampled = {}
        for (row, sequence), state, token in zip(due, states, tokens, strict=True):
            if sequence.is_finished:  # a sibling's error ended the request
                continue
            if token is not None:
                sampled[sequence] = SampledToken(token, None)
                continue
            try:
                sampled[sequence] = sample_row(logits[row], state, self._tokenizer.token_text)
            except EngineError as error:
                self._fail(sequence.request_id, error)
        return {sequence: token for sequence, token in sampled.items() if not sequence.is_finished}

    def _score_prompts(self, step: ScheduledStep, hidden: Array) -> None:
        """Logits or log-probabilities of the prompt rows that requests asked for, a bounded number at a time."""
        wanted: dict[Sequence, list[tuple[int, int]]] = {}
        for i, row in enumerate(step.logit_rows):
            if row.sequence.scores_prompt and row.position < row.sequence.num_prompt:
                wanted.setdefault(row.sequence, []).append((i, row.position))
        for sequence, rows in wanted.items():
            for start in range(0, len(rows), PROMPT_ROWS):
                if sequence.is_finished:  # the part before was unusable
                    break
                part = rows[start : start + PROMPT_ROWS]
                logits = self._runner.logits(hidden, [i for i, _ in part])
                self._record_prompt_rows(sequence.request_id, part[0][1], logits)

    def _record_prompt_rows(self, request: Request, position: int, logits: NDArray[np.float32]) -> None:
        """logits [r, V] follow the prompt tokens at position … position + r - 1."""
        following = request.prompt_token_ids[position + 1 : position + 1 + len(logits)]
        count = request.params.prompt_logprobs
        try:
            if request.prompt_logits is not None:
                request.prompt_logits[position : position + len(logits)] = check_finite(logits, position)
            elif request.prompt_logprobs is not None and count is not None:
                scored = logits[: len(following)]  # nothing follows the last prompt token yet
                request.prompt_logprobs += prompt_logprobs(
                    scored, following, count, self._tokenizer.token_text, first_position=position
                )
        except EngineError as error:
            self._fail(request, error)


def check_finite(logits: NDArray[np.float32], position: int) -> NDArray[np.float32]:
    """The rows [r, V] as they are. Raises NumericalError where any is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if bad.size:
        raise NumericalError(f"the model's logits at prompt position {position + bad[0]} are NaN or infinite")
    return logits
