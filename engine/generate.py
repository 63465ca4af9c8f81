"""`python -m engine.generate`: text from a model, streamed to stdout.

Prompts given with -p run together in one batch and are printed in order; --chat holds a conversation. A model with a
chat template has it applied unless --ignore-chat-template says otherwise. Statistics and progress go to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.cli import add_model_options, open_model, run, say
from engine.core import FinishReason, SamplingParams, StreamPiece
from engine.errors import RequestError
from engine.memory import peak_memory

if TYPE_CHECKING:
    from engine.llm import LLM


@dataclass(slots=True)
class Answer:
    """One prompt's answer as it arrives, with the clock readings its rates follow from."""

    prompt_tokens: int
    started: float
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first: float = 0.0
    last: float = 0.0

    def add(self, piece: StreamPiece) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.finish_reason = piece.finish_reason

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second until the first answer token."""
        return self.prompt_tokens / max(self.first - self.started, 1e-9)

    @property
    def generation_tps(self) -> float:
        """Answer tokens per second after the first."""
        return max(len(self.token_ids) - 1, 0) / max(self.last - self.first, 1e-9)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.generate", description="Generate text from a model.")
    what = parser.add_argument_group("what to generate")
    what.add_argument("-p", "--prompt", action="append", help="prompt; '-' reads stdin; may be given several times")
    what.add_argument("--chat", action="store_true", help="hold a conversation; Ctrl-C stops an answer")
    what.add_argument("--system-prompt", help="system message, for models with a chat template")
    what.add_argument("--ignore-chat-template", action="store_true", help="give the model the bare prompt")
    what.add_argument("-m", "--max-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    what.add_argument("--json", action="store_true", help="one JSON object per prompt on stdout")
    how = parser.add_argument_group("sampling (unset: the model's generation_config.json, then neutral)")
    how.add_argument("--temp", type=float, help="temperature; 0 = greedy")
    how.add_argument("--top-k", type=int)
    how.add_argument("--top-p", type=float)
    how.add_argument("--min-p", type=float)
    how.add_argument("--seed", type=int)
    how.add_argument("--stop", action="append", help="stop at this text; may be given several times")
    add_model_options(parser)
    return parser


def main(options: argparse.Namespace) -> None:
    params = SamplingParams(
        temperature=options.temp,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        stop=options.stop,
        max_tokens=options.max_tokens,
    )
    if bool(options.prompt) == options.chat:
        raise RequestError("give either -p PROMPT (or -p - to read stdin) or --chat")
    if options.chat and options.json:
        raise RequestError("--json does not go with --chat")
    prompts = [_read_prompt(prompt) for prompt in options.prompt or ()]
    with open_model(options) as llm:
        if llm.sampling_defaults and options.verbose:
            say(f"the model's sampling defaults: {_list(llm.sampling_defaults)}")
        if options.chat:
            _chat(llm, params, options.system_prompt)
        else:
            _answer(llm, prompts, params, options)


def _list(values: dict[str, float | int]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _read_prompt(prompt: str) -> str:
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not valid UTF-8 (byte {error.start}: {error.reason})") from error


def _encode(llm: LLM, prompt: str, options: argparse.Namespace) -> list[int]:
    if llm.has_chat_template and not options.ignore_chat_template:
        return llm.encode_chat(_messages(options.system_prompt, prompt))
    if options.system_prompt is not None:
        raise RequestError("--system-prompt needs a model with a chat template")
    return llm.encode(prompt)


def _messages(system: str | None, user: str) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": user}]


def _answer(llm: LLM, prompts: Sequence[str], params: SamplingParams, options: argparse.Namespace) -> None:
    """All prompts at once; their answers in order."""
    encoded = [_encode(llm, prompt, options) for prompt in prompts]
    started = time.perf_counter()
    streams = [llm.stream(ids, params) for ids in encoded]
    answers = []
    for ids, stream in zip(encoded, streams, strict=True):
        answer = Answer(len(ids), started)
        answers.append(answer)
        _follow(stream, answer, echo=not options.json)
        if options.json:
            print(json.dumps(_report(llm, answer), ensure_ascii=False), flush=True)
    if not options.json:
        _say_statistics(answers)


def _follow(stream: Iterator[StreamPiece], answer: Answer, *, echo: bool) -> None:
    for piece in stream:
        answer.add(piece)
        if echo:
            print(piece.text, end="", flush=True)
    if echo:
        print(flush=True)


def _report(llm: LLM, answer: Answer) -> dict[str, object]:
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "generation_tokens": len(answer.token_ids),
        "prompt_tps": round(answer.prompt_tps, 2),
        "generation_tps": round(answer.generation_tps, 2),
        "peak_memory_bytes": peak_memory(),
        "device": llm.device,
        "kernel_path": llm.kernel_path,
    }


def _say_statistics(answers: Sequence[Answer]) -> None:
    for answer in answers:
        say(f"prompt {answer.prompt_tokens} tokens, {answer.prompt_tps:.1f} tokens/s")
        say(f"generation {len(answer.token_ids)} tokens, {answer.generation_tps:.1f} tokens/s ({answer.finish_reason})")
    say(f"peak memory {peak_memory() / 2**30:.3f} GiB")


def _chat(llm: LLM, params: SamplingParams, system: str | None) -> None:
    """Turns until end of input. Ctrl-C during an answer keeps what was said so far and asks for the next turn."""
    history = [] if system is None else [{"role": "system", "content": system}]
    llm.encode_chat([*history, {"role": "user", "content": "hello"}])  # refuse a model without a template at once
    say("chat: an empty line or Ctrl-D ends it, Ctrl-C stops an answer")
    while text := _read_turn():
        history.append({"role": "user", "content": text})
        ids = llm.encode_chat(history)
        answer = Answer(len(ids), time.perf_counter())
        stream = llm.stream(ids, params)
        try:
            _follow(stream, answer, echo=True)
        except KeyboardInterrupt:
            stream.close()
            print(flush=True)
            say("(stopped)")
        history.append({"role": "assistant", "content": answer.text})


def _read_turn() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise RequestError(f"input is not valid UTF-8 ({error.reason})") from error


if __name__ == "__main__":
    sys.exit(run(main, build_parser()))
