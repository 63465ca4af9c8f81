"""`LLM`: one model in this process, for generating text, chatting, streaming and reading logits.

It joins tokenizer, model, scheduler and worker thread and adds nothing to what they do. Any number of threads may call
it at once: their requests share the batch. Several LLMs may live in one process; each has its own memory and threads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.blocks import BlockPool
from engine.chat_template import ChatTemplate
from engine.config import EngineConfig, QuantConfig
from engine.core import RequestOutput, SamplingParams, StreamPiece
from engine.errors import (
    CapacityError,
    ChatTemplateError,
    ConfigError,
    EngineError,
    InvalidArgument,
    RequestError,
)
from engine.generation_defaults import GenerationDefaults
from engine.json_file import read_json
from engine.loading import kv_cache_scales, load_model
from engine.memory import available_memory
from engine.models.quantization import read_quantization
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.ops.contract import Ops
from engine.ops.fp8 import E4M3
from engine.progress import progress_bar
from engine.quant.registry import AS_STORED, check_quant, resolve
from engine.rehearsal import start_runner
from engine.request import Request
from engine.runner import ModelRunner, activation_dtype, cache_dtype, sequence_length
from engine.sampler import check_against_vocab, resolve_seed
from engine.scheduler import Scheduler, check_prompt_length
from engine.tokenizer import Tokenizer
from engine.weights.locate import locate
from engine.worker import Worker

Prompt: TypeAlias = str | Sequence[int]
Message: TypeAlias = Mapping[str, Any]  # {"role": …, "content": …}


class LLM:
    """A loaded model.

    model: "demo" (bundled), an alias such as "qwen2.5-7b", a Hugging Face repo id, or a directory.
    device, dtype, max_model_len, threads, deterministic, max_num_seqs, max_num_batched_tokens, kv_cache_bytes,
    kv_cache_dtype, enable_prefix_caching: see `EngineConfig`; None or "auto" chooses, and `describe()` tells what was
    chosen.
    quant, grade, quant_head, quant_fallback, sharq_scale, sharq_compat: how linear layers store weights and take
    activations, see `QuantConfig` and `engine.quant.registry`.
    quant_cache: whether the quantised weights of a larger plain model are kept on disk (`engine.cache_directory`).
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
        deterministic: bool = False,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        kv_cache_bytes: int | None = None,
        kv_cache_dtype: str = EngineConfig.kv_cache_dtype,
        enable_prefix_caching: bool = True,
        use_generation_config: bool = True,
        quant: str = QuantConfig.method,
        grade: str | None = None,
        quant_head: str | None = None,
        quant_fallback: str | None = None,
        sharq_scale: str = QuantConfig.scale,
        sharq_compat: bool = False,
        quant_cache: bool = True,
        progress: bool = False,
    ) -> None:
        engine = EngineConfig(
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_bytes=kv_cache_bytes,
            kv_cache_dtype=kv_cache_dtype,
            enable_prefix_caching=enable_prefix_caching,
            threads=threads,
            deterministic=deterministic,
        )
        asked = QuantConfig(quant, grade, quant_fallback, sharq_scale, sharq_compat, quant_head)
        check_quant(asked)  # before anything is downloaded
        if not isinstance(model, (str, PathLike)):
            raise InvalidArgument(f"model must be a name or a directory, not {model!r}")
        ops = select_backend(engine.device, engine.threads, deterministic=engine.deterministic)
        location = locate(str(fspath(model)), revision=revision, progress=progress)
        path = Path(location.path)
        config_json = read_json(path / "config.json", ConfigError)
        self.config = read_config(config_json, path / "config.json")
        self._scheme = read_quantization(config_json, path)
        self.quant = resolve(asked, self._scheme, tied_head=self.config.tie_word_embeddings)
        self.tokenizer = Tokenizer.from_directory(path)
        defaults = GenerationDefaults.from_directory(
            path, model_eos=self.config.eos_token_ids, tokenizer_eos=self.tokenizer.eos_token_id
        )
        self._dtype = activation_dtype(engine.dtype, self.config.dtype)
        sequence_length(self.config, engine)  # refused before gigabytes are read, not after
        self._kv_dtype = cache_dtype(engine.kv_cache_dtype, self._dtype)
        calibrated = self._kv_dtype == E4M3
        self._kv_scales = kv_cache_scales(path, self._scheme, self.config.num_layers) if calibrated else None
        runner = self._load(engine, ops, path, cache=quant_cache, progress=progress)
        self._worker = self._start(engine, ops, runner, defaults.stop_token_ids)
        self._stop_worker = weakref.finalize(self, self._worker.close)
        self._path = path
        self._note = location.note
        self.name = location.name
        plain = self.quant.method == AS_STORED
        self.kernel_path = runner.kernel_path if plain else f"{self.quant.method}: {runner.kernel_path}"
        self.device = "cpu" if engine.device in ("auto", "numpy") else engine.device
        self.max_model_len = self._plan.max_model_len
        self.sampling_defaults: dict[str, float | int] = dict(defaults.sampling) if use_generation_config else {}

    def _load(self, engine: EngineConfig, ops: Ops, path: Path, *, cache: bool, progress: bool) -> ModelRunner:
        """Weights first, then scratch memory, then the cache, whose size follows from what they left."""
        bar = partial(progress_bar, shown=progress)
        loaded = load_model(self.config, path, ops, self._dtype, self.quant, self._scheme, cache=cache, progress=bar)
        self._weights = loaded.weights
        runner = start_runner(loaded.model, ops, engine, self._dtype, self._kv_dtype, self._kv_scales)
        self._plan = runner.plan
        return runner

    def _start(self, engine: EngineConfig, ops: Ops, runner: ModelRunner, stop_token_ids: Iterable[int]) -> Worker:
        pool = BlockPool(self._plan.num_blocks, ops.kv_block_size, enable_prefix_caching=engine.enable_prefix_caching)
        scheduler = Scheduler(
            pool,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_model_len=self._plan.max_model_len,
            short_prompt_tokens=ops.short_prompt_tokens,
        )
        # Some checkpoints name tokens beyond their vocabulary, which no answer can contain.
        eos_token_ids = [token for token in stop_token_ids if token < self.config.vocab_size]
        return Worker(runner, scheduler, self.tokenizer, eos_token_ids=eos_token_ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or several (text or token ids) together; results in the order of the prompts.

        params: one for all, or one per prompt. Never applies a chat template. Raises RequestError for a request that
        can never be served, then before any is started; NumericalError when the model computes NaN, EngineClosed; what
        runs of the other prompts is then cancelled.
        """
        several = _as_prompts(prompts)
        each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params] * len(several)
        if len(each) != len(several):
            raise RequestError(f"{len(several)} prompts got {len(each)} sampling parameters; give one, or as many")
        streams = self._submit([self._request(prompt, own) for prompt, own in zip(several, each, strict=True)])
        try:
            return [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TextStream:
        """Start one request and return its pieces as an iterator; closing the iterator early cancels the request.

        Raises as `generate` does: RequestError and EngineClosed here, the others while reading.
        """
        (stream,) = self._submit([self._request(prompt, params)])
        return stream

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation [{"role": …, "content": …}, …]: one output, as from `generate`.

        template_arguments reach the template's variables. Raises as `generate` does, and ChatTemplateError for a model
        without a template, or where the template refuses the messages.
        """
        return self.generate([self.encode_chat(messages, tools=tools, **template_arguments)], params)

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Raw logits float32 [T, V] after each of T tokens, T up to max_model_len.

        Raises RequestError, NumericalError where any is NaN or infinite, CapacityError where memory does not suffice.
        """
        request = self._new_request(None, token_ids, SamplingParams(prompt_logprobs=0), only_scored=True)
        request.prompt_logits = logits = _new_logits(len(request.prompt_token_ids), self.config.vocab_size)
        (stream,) = self._submit([request])
        with stream:
            stream.result()
        return logits

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens the model's tokenizer puts around a prompt."""
        return self.tokenizer.encode(text)

    def encode_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **arguments: Any
    ) -> list[int]:
        """Token ids of a conversation put through the chat template, ready for the assistant's turn."""
        if self._template is None:
            raise ChatTemplateError(f"{self.name} has no chat template; give it a plain prompt instead")
        text = self._template.render(messages, tools=tools, **arguments)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Raises ChatTemplateError for one that is malformed."""
        return self._template is not None

    def describe(self) -> str:
        """What was chosen: model, types, kernels, cache."""
        config = self.config
        note = f"{self._note}\n" if self._note else ""
        return (
            f"{note}{self.name}: {config.architecture}, {config.num_layers} layers, hidden {config.hidden_size}, "
            f"vocabulary {config.vocab_size}\n"
            f"device {self.device} ({self.kernel_path}), activations {self._dtype}\n"
            f"weights {config.dtype}, linear layers {self._weights}\n"
            f"{self._plan}{'' if self._kv_scales is None else ', K and V scaled as the checkpoint says'}"
        )

    def close(self) -> None:
        """Stop the worker and free everything; unfinished requests end with EngineClosed. Idempotent."""
        self._stop_worker()
        template = vars(self).get("_template")  # None where none was asked for, too
        if template is not None:
            template.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate.from_directory(self._path)

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        text, ids = (prompt, self.encode(prompt)) if isinstance(prompt, str) else (None, prompt)
        return self._new_request(text, ids, SamplingParams() if params is None else params)

    def _new_request(
        self, text: str | None, token_ids: Sequence[int], params: SamplingParams, *, only_scored: bool = False
    ) -> Request:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"params must be SamplingParams, not {type(params).__name__}")
        params = params.with_defaults(self.sampling_defaults)
        check_against_vocab(params, self.config.vocab_size)
        ids = _checked_ids(token_ids, self.config.vocab_size)
        check_prompt_length(len(ids), self.max_model_len, only_scored=only_scored)
        return Request(text, ids, params, resolve_seed(params))

    def _submit(self, requests: Sequence[Request]) -> list[TextStream]:
        streams = [TextStream(self, self._worker, request) for request in requests]  # an interrupt cancels them
        self._worker.submit(requests)
        return streams


class TextStream(Iterator[StreamPiece]):
    """The pieces of one running request. Leaving it before its end (close, with, garbage collection) cancels it.

    With n > 1 the answers' pieces come interleaved; `StreamPiece.index` tells them apart. It keeps its LLM open.
    """

    def __init__(self, llm: LLM, worker: Worker, request: Request) -> None:
        self._llm = llm  # which would close itself once nobody else holds it
        self._worker = worker
        self._request = request
        self._ended = False

    def __next__(self) -> StreamPiece:
        if self._ended:
            raise StopIteration
        try:
            event = self._request.next_event()
        except EngineError:
            self._ended = True
            raise
        if isinstance(event, StreamPiece):
            return event
        self._ended = True
        raise StopIteration

    def result(self) -> RequestOutput:
        """Wait for the end; the finished request, or of a cancelled one what there is (finish reason "abort").

        Raises the error that ended the request.
        """
        while isinstance(event := self._request.next_event(), StreamPiece):
            pass
        self._ended = True
        return event

    def close(self) -> None:
        """Cancel the request unless it has ended. A thread that waits for the next piece finds the end."""
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
    items: list[Any] = _items(prompts, "prompts are text, token ids or a list of these")
    return [items] if items and isinstance(items[0], (int, np.integer)) else items


def _checked_ids(ids: Any, V: int) -> list[int]:
    """Token ids in [0, V), whether from a caller or from a tokenizer that knows more tokens than the model."""
    items = _items(ids, "a prompt is text or a list of token ids")
    for position, token in enumerate(items):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise RequestError(f"a prompt is text or a list of token ids, not {type(token).__name__} at {position}")
        if not 0 <= token < V:
            raise RequestError(f"prompt token {token} at position {position} is outside the vocabulary [0, {V})")
    return [int(token) for token in items]


def _items(values: Any, what: str) -> list[Any]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes, bytearray, memoryview)):
        raise RequestError(f"{what}, not {type(values).__name__}")
    return list(values)


def _new_logits(T: int, V: int) -> NDArray[np.float32]:
    needed, available = 4 * T * V, available_memory()
    if needed > available:
        raise CapacityError(
            f"logits of {T} tokens over a vocabulary of {V} take {needed / 2**30:.1f} GiB and {available / 2**30:.1f} "
            "GiB of memory are available; ask for fewer tokens, or for prompt_logprobs"
        )
    return np.empty((T, V), np.float32)
