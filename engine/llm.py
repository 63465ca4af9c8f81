"""`LLM`: one model in this process, for generating text, chatting, streaming and reading logits.

It joins tokenizer, model, scheduler and worker thread and adds nothing to what they do. Any number of threads may call
it at once: their requests share the batch. Several LLMs may live in one process; each has its own memory and threads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.blocks import BlockPool
from engine.chat_template import ChatTemplate
from engine.config import EngineConfig
from engine.core import RequestOutput, SamplingParams, StreamPiece
from engine.errors import ChatTemplateError, ConfigError, InvalidArgument, RequestError
from engine.generation_defaults import GenerationDefaults
from engine.json_file import read_json
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.progress import progress_bar
from engine.request import Request
from engine.runner import ModelRunner, activation_dtype, load_model, plan_cache
from engine.sampler import check_against_vocab, resolve_seed
from engine.scheduler import Scheduler
from engine.tokenizer import Tokenizer
from engine.weights.locate import locate
from engine.worker import Worker

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, Any]  # {"role": …, "content": …}


class LLM:
    """A loaded model.

    model: "demo" (bundled), an alias such as "qwen2.5-7b", a Hugging Face repo id, or a directory.
    device, dtype, max_model_len, threads, max_num_seqs, max_num_batched_tokens, kv_cache_bytes,
    enable_prefix_caching: see `EngineConfig`; None or "auto" chooses, and `describe()` tells what was chosen.
    use_generation_config: whether sampling fields left None take the checkpoint's generation_config.json values.
    progress: bars on stderr, where that is a terminal, while downloading and loading.
    Raises ModelNotFound, ConfigError, WeightsError, TokenizerError, DeviceError, CapacityError, InvalidArgument.
    """

    def __init__(
        self,
        model: str | PathLike[str] = "demo",
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        revision: str | None = None,
        threads: int | None = None,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        kv_cache_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        use_generation_config: bool = True,
        progress: bool = False,
    ) -> None:
        engine = EngineConfig(
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            enable_prefix_caching=enable_prefix_caching,
            threads=threads,
        )
        ops = select_backend(engine.device, engine.threads)
        location = locate(fspath(model), revision=revision, progress=progress)
        path = Path(location.path)
        self.config = read_config(read_json(path / "config.json", ConfigError), path)
        self.tokenizer = Tokenizer.from_directory(path)
        defaults = GenerationDefaults.from_directory(
            path, model_eos=self.config.eos_token_ids, tokenizer_eos=self.tokenizer.eos_token_id
        )
        self._dtype = activation_dtype(engine.dtype, self.config.dtype)
        with progress_bar("loading", shown=progress) as update:
            loaded = load_model(self.config, path, ops, self._dtype, progress=update)
        self._plan = plan_cache(self.config, engine, ops.kv_block_size, self._dtype.itemsize)
        pool = BlockPool(self._plan.num_blocks, ops.kv_block_size, enable_prefix_caching=engine.enable_prefix_caching)
        scheduler = Scheduler(
            pool,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_model_len=self._plan.max_model_len,
        )
        runner = ModelRunner(loaded, ops, self._plan, self._dtype)
        self._worker = Worker(runner, scheduler, self.tokenizer, eos_token_ids=defaults.stop_token_ids)
        self._close = weakref.finalize(self, self._worker.close)
        self._path = path
        self._template: ChatTemplate | None = None
        self.name = location.name
        self.kernel_path = ops.kernel_path
        self.device = "cpu"
        self.max_model_len = self._plan.max_model_len
        self.sampling_defaults: dict[str, float | int] = dict(defaults.sampling) if use_generation_config else {}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several (text or token ids) together; results in the order of the prompts.

        params: one for all, or one per prompt. Never applies a chat template. Raises RequestError for a request that
        can never be served, NumericalError when the model computes NaN; the other prompts are then cancelled.
        """
        several = _as_prompts(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(several)
        if len(each) != len(several):
            raise InvalidArgument(f"{len(several)} prompts got {len(each)} sampling parameters; give one, or as many")
        streams: list[TextStream] = []
        try:
            for prompt, own in zip(several, each, strict=True):
                streams.append(self.stream(prompt, own))
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TextStream:
        """Start one request and return its pieces as an iterator; closing the iterator early cancels the request."""
        text, ids = (prompt, self.encode(prompt)) if isinstance(prompt, str) else (None, self._check_ids(prompt))
        request = self._new_request(text, ids, params or SamplingParams())
        self._worker.submit(request)
        return TextStream(self._worker, request)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation [{"role": …, "content": …}, …]; template_arguments reach the template's variables.

        Raises ChatTemplateError for a model without a template, or where the template refuses the messages.
        """
        return self.generate([self.encode_chat(messages, tools=tools, **template_arguments)], params)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Raw logits float32 [T, V] after each of T tokens."""
        ids = self._check_ids(token_ids)
        request = self._new_request(None, ids, SamplingParams(prompt_logprobs=0))
        request.prompt_logits = np.empty((len(ids), self.config.vocab_size), np.float32)
        self._worker.submit(request)
        with TextStream(self._worker, request) as stream:
            stream.result()
        return request.prompt_logits

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens the model's tokenizer puts around a prompt."""
        return self.tokenizer.encode(text)

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **arguments: Any
    ) -> list[int]:
        """Token ids of a conversation put through the chat template, ready for the assistant's turn."""
        template = self._chat_template()
        if template is None:
            raise ChatTemplateError(f"{self.name} has no chat template; give it a plain prompt instead")
        return self.tokenizer.encode(template.render(messages, tools=tools, **arguments), add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template() is not None

    def describe(self) -> str:
        """What was chosen: model, types, kernels, cache."""
        config = self.config
        return (
            f"{self.name}: {config.architecture}, {config.num_layers} layers, hidden {config.hidden_size}, "
            f"vocabulary {config.vocab_size}\n"
            f"device {self.device} ({self.kernel_path}), weights {config.dtype}, activations {self._dtype}\n"
            f"{self._plan}"
        )

    def close(self) -> None:
        """Stop the worker and free everything; unfinished requests end with EngineClosed. Idempotent."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chat_template(self) -> ChatTemplate | None:
        if self._template is None:
            self._template = ChatTemplate.from_directory(self._path)
        return self._template

    def _new_request(self, text: str | None, ids: list[int], params: SamplingParams) -> Request:
        params = params.with_defaults(self.sampling_defaults)
        check_against_vocab(params, self.config.vocab_size)
        return Request(text, ids, params, resolve_seed(params))

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        V = self.config.vocab_size
        for position, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise RequestError(f"a prompt is text or a list of token ids, not {type(token).__name__} at {position}")
            if not 0 <= token < V:
                raise RequestError(f"prompt token {token} at position {position} is outside the vocabulary [0, {V})")
        return [int(token) for token in ids]


class TextStream(Iterator[StreamPiece]):
    """The pieces of one running request. Leaving it before its end (close, with, garbage collection) cancels it."""

    def __init__(self, worker: Worker, request: Request) -> None:
        self._worker = worker
        self._request = request
        self._result: RequestOutput | None = None
        self._ended = False

    def __next__(self) -> StreamPiece:
        if self._ended:
            raise StopIteration
        event = self._request.channel.get()
        if isinstance(event, StreamPiece):
            return event
        self._ended = True
        if isinstance(event, BaseException):
            raise event
        self._result = event
        raise StopIteration

    def result(self) -> RequestOutput:
        """Read to the end; the finished request."""
        for _ in self:
            pass
        assert self._result is not None, "the stream was closed or failed before"
        return self._result

    def close(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._ended:
            self._ended = True
            self._worker.cancel(self._request)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts: a text or a list of token ids is one."""
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) > 0 and all(isinstance(item, (int, np.integer)) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
