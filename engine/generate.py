"""`python -m engine.generate`: text from a model, streamed to stdout.

Prompts given with -p run together in one batch and are printed in order; --chat holds a conversation. A model with a
chat template has it applied unless --ignore-chat-template says otherwise. Statistics and progress go to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.cli import add_model_options, open_model, run, say
from engine.core import RequestOutput, SamplingParams
from engine.errors import RequestError
from engine.memory import peak_memory

if TYPE_CHECKING:
    from engine.llm import LLM, Message, TextStream


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
    _check_combination(options)
    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in options.prompt or ()]
    with open_model(options) as llm:
        if llm.sampling_defaults and options.verbose:
            say(f"the model's sampling defaults: {_list(llm.sampling_defaults)}")
        if options.chat:
            _chat(llm, params, options.system_prompt)
        else:
            _answer(llm, prompts, params, options)


def _check_combination(options: argparse.Namespace) -> None:
    if bool(options.prompt) == options.chat:
        raise RequestError("give either -p PROMPT (or -p - to read stdin) or --chat")
    if options.chat and (options.json or options.ignore_chat_template):
        raise RequestError("--chat goes with neither --json nor --ignore-chat-template")
    if (options.prompt or []).count("-") > 1:
        raise RequestError("-p - can be given once: stdin is one prompt")


def _list(values: dict[str, float | int]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _read_stdin(*, line: bool = False) -> str:
    """All of stdin or its next line, which is "" at the end; UTF-8 whatever the locale."""
    if sys.stdin is None:
        raise RequestError("there is no stdin to read")
    try:
        return (sys.stdin.buffer.readline() if line else sys.stdin.buffer.read()).decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not valid UTF-8 (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise RequestError(f"stdin cannot be read: {error.strerror}") from error


def _encode(llm: LLM, prompt: str, options: argparse.Namespace) -> list[int]:
    if llm.has_chat_template and not options.ignore_chat_template:
        return llm.encode_chat([*_system(options.system_prompt), {"role": "user", "content": prompt}])
    if options.system_prompt is not None:
        raise RequestError("--system-prompt needs a model with a chat template, and the template applied")
    return llm.encode(prompt)


def _system(prompt: str | None) -> list[Message]:
    return [] if prompt is None else [{"role": "system", "content": prompt}]


def _answer(llm: LLM, prompts: Sequence[str], params: SamplingParams, options: argparse.Namespace) -> None:
    """All prompts at once; their answers in order."""
    encoded = [_encode(llm, prompt, options) for prompt in prompts]
    streams = [llm.stream(ids, params) for ids in encoded]
    outputs = []
    for stream in streams:
        if options.json:
            print(json.dumps(_report(llm, stream.result())), flush=True)
        else:
            _print(stream)
            outputs.append(stream.result())
    if not options.json:
        _say_statistics(outputs)


def _print(stream: TextStream) -> None:
    for piece in stream:
        print(piece.text, end="", flush=True)
    print(flush=True)


def _report(llm: LLM, output: RequestOutput) -> dict[str, object]:
    answer, (prompt_tps, generation_tps) = output.outputs[0], _rates(output)
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "generation_tokens": len(answer.token_ids),
        "prompt_tps": round(prompt_tps, 2),
        "generation_tps": round(generation_tps, 2),
        "peak_memory_bytes": peak_memory(),
        "device": llm.device,
        "kernel_path": llm.kernel_path,
    }


def _rates(output: RequestOutput) -> tuple[float, float]:
    """Prompt tokens per second until the first answer token came, and answer tokens per second after it."""
    first = output.seconds_to_first_token or output.seconds
    num_after = max(len(output.outputs[0].token_ids) - 1, 0)
    return len(output.prompt_token_ids) / max(first, 1e-9), num_after / max(output.seconds - first, 1e-9)


def _say_statistics(outputs: Sequence[RequestOutput]) -> None:
    for output in outputs:
        answer, (prompt_tps, generation_tps) = output.outputs[0], _rates(output)
        say(f"prompt {len(output.prompt_token_ids)} tokens, {prompt_tps:.1f} tokens/s")
        say(f"generation {len(answer.token_ids)} tokens, {generation_tps:.1f} tokens/s ({answer.finish_reason})")
    say(f"peak memory {peak_memory() / 2**30:.3f} GiB")


def _chat(llm: LLM, params: SamplingParams, system_prompt: str | None) -> None:
    """Turns until the end of input."""
    system = _system(system_prompt)
    llm.encode_chat([*system, {"role": "user", "content": "hello"}])  # refuse a model without a template at once
    say("chat: Ctrl-C stops an answer, Ctrl-D ends the conversation")
    turns: list[Message] = []
    while text := _read_turn():
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": _take_turn(llm, system, turns, params)})


def _read_turn() -> str:
    """The next line that says something; "" at the end of input. At a terminal Ctrl-C only abandons the line."""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    while True:
        try:
            if at_terminal:
                print("> ", end="", file=sys.stderr, flush=True)
            line = _read_stdin(line=True)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            say("")
            continue
        if not line or line.strip():
            return line.strip()


def _take_turn(llm: LLM, system: list[Message], turns: list[Message], params: SamplingParams) -> str:
    """The answer to the conversation, printed as it comes. Ctrl-C ends it: then what was said so far."""
    said = []
    try:
        with llm.stream(_encode_turns(llm, system, turns, params.max_tokens or 0), params) as stream:
            for piece in stream:
                said.append(piece.text)
                print(piece.text, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        say("(stopped)")
    return "".join(said)


def _encode_turns(llm: LLM, system: list[Message], turns: list[Message], num_answer: int) -> list[int]:
    """The conversation's tokens. Its oldest turns are forgotten where they leave no room for an answer."""
    room = llm.max_model_len - min(num_answer, llm.max_model_len // 2)
    while len(ids := llm.encode_chat([*system, *turns])) > room and len(turns) > 2:
        del turns[:2]
        say("(the oldest turn no longer fits the context and is forgotten)")
    return ids


if __name__ == "__main__":
    sys.exit(run(main, build_parser()))
