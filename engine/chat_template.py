"""A conversation as the text its model was trained on: the checkpoint's own Jinja template, rendered within bounds.

A chat template is a program somebody else wrote. Jinja's sandbox keeps it from reaching files or Python's internals,
but not from running for ever or filling memory, and nothing inside the process can: `"a" * 10**10`, `10**10**10` or
printing a list nested in itself fifty times over are single operations of the interpreter, which no check between
operations interrupts. So the template runs, sandboxed all the same, in a small process of its own
(template_worker.py), which is killed when a rendering exceeds its time, and which the system bounds in memory (on
Linux) and CPU time. The process starts with the first rendering, about 0.1 s, and serves all later ones, each in well
under a millisecond plus the template's own time. An error, of whatever kind, ends only the rendering it happens in.

What it does not do: accept Python functions as tools (JSON schemas only), or encode the text. Encode it with
add_special_tokens=False: templates write BOS themselves.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ChatTemplateError, RequestError, TokenizerError
from engine.json_file import read_json

_START_SECONDS = 30.0  # for Python and Jinja to load from a slow, cold disk
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may use."""

    seconds: float = 5.0  # templates take milliseconds; the rest is for a loaded machine
    memory_bytes: int = 1 << 30  # of address space, some 100 MB of which Python and Jinja need themselves
    output_bytes: int = 16 << 20  # UTF-8; several times a context of a million tokens


class ChatTemplate:
    """One model's chat template; safe to use from several threads, which take turns.

    Close it, or let it be collected, to end its process.
    """

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], limits: Limits = Limits()
    ) -> None:
        """`sources`: Jinja text by name; "default" is used, and "tool_use", if there, when tools are given."""
        if "default" not in sources:
            raise ChatTemplateError(f'chat_template has no "default", only {", ".join(sorted(sources)) or "none"}')
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._limits = limits
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> ChatTemplate | None:
        """The template of the model in `path`, or None if it has none.

        chat_template.jinja comes before tokenizer_config.json's chat_template, and that before the chat_template.json
        of older vision models. Raises ChatTemplateError, or TokenizerError for a malformed tokenizer_config.json.
        """
        directory = Path(path)
        config = _read_if_there(directory / "tokenizer_config.json", TokenizerError)
        template: Any = _read_jinja(directory / "chat_template.jinja")
        if template is None:
            template = config.get("chat_template")
        if template is None:
            template = _read_if_there(directory / "chat_template.json", ChatTemplateError).get("chat_template")
        return None if template is None else cls(_named(template), _special_tokens(config))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as text, ending where the answer is to begin.

        messages: {"role": ..., "content": ...} each; kwargs: further variables of the template, such as
        enable_thinking. Raises RequestError for malformed arguments, ChatTemplateError when the template fails,
        refuses the conversation or exceeds its limits.
        """
        _check_messages(messages)
        variables = self._special_tokens | kwargs
        variables |= {"messages": messages, "tools": tools, "documents": documents}
        variables["add_generation_prompt"] = add_generation_prompt
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        request = _to_json({"name": name, "variables": variables})
        with self._lock:
            return self._ask(request)

    def close(self) -> None:
        """End the template's process. Rendering again starts another."""
        with self._lock:
            self._discard()

    def _ask(self, request: bytes) -> str:
        try:
            if self._worker is None or not self._worker.alive():
                self._worker = _Worker(self._limits)
                _check(self._worker.exchange(_to_json(self._sources), _START_SECONDS))
            answer = self._worker.exchange(request, self._limits.seconds)
        except BaseException:  # whatever interrupts an exchange, KeyboardInterrupt included, leaves half of it behind
            self._discard()
            raise
        _check(answer)
        return answer["text"]

    def _discard(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()


class _Worker:
    """The process that renders. It ends with this object, and by itself when this process is gone."""

    def __init__(self, limits: Limits) -> None:
        script = Path(__file__).with_name("template_worker.py")
        bounds = (limits.memory_bytes, limits.output_bytes, int(limits.seconds) + 1)
        command = [sys.executable, "-I", str(script), *map(str, bounds), *sys.path]
        self._memory_bytes = limits.memory_bytes
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in the terminal is for the engine, not for this process
            )
        except OSError as error:
            raise ChatTemplateError(f"cannot start {command[0]!r} to render the chat template: {error}") from error
        self.end = weakref.finalize(self, _end, self._process)

    def alive(self) -> bool:
        """False once the process has ended, for instance by the system's hand while it waited."""
        return self._process.poll() is None

    def exchange(self, message: bytes, seconds: float) -> dict[str, str]:
        """Send a line, return the answer. After an error the worker is of no further use."""
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            line = self._send(message)
        finally:
            timer.cancel()
            timer.join()  # afterwards it either has killed the process or never will
        if expired.is_set():
            raise ChatTemplateError(f"the chat template did not finish within {seconds:g} s")
        if not line.endswith(b"\n"):
            raise ChatTemplateError(
                f"the chat template needs more than {self._memory_bytes >> 20} MiB of memory, or its process crashed "
                f"(exit status {self._process.wait()})"
            )
        answer: dict[str, str] = json.loads(line)
        return answer

    def _send(self, message: bytes) -> bytes:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(message + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self._process.stdout.readline()


def _check(answer: Mapping[str, str]) -> None:
    if "error" in answer:
        raise ChatTemplateError(f"the chat template {' '.join(answer['error'].split())}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()  # closes the pipes and waits


def _to_json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages, tools and template arguments must be plain JSON data: {error}") from None


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"messages must be a non-empty list, not {_short(messages)}")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {position} must have a role, a string: {_short(message)}")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"message {position} must have content: {_short(message)}")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise RequestError(f"message {position}'s content must be text or a list of parts: {_short(message)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _read_if_there(file: Path, error: type[TokenizerError] | type[ChatTemplateError]) -> dict[str, Any]:
    return read_json(file, error) if file.exists() else {}


def _read_jinja(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ChatTemplateError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ChatTemplateError(f"{file}: not UTF-8 at byte {error.start}") from None
    return text


def _named(template: Any) -> dict[str, str]:
    """Template texts by name, from one text or a list of {"name", "template"}."""
    entries = [{"name": "default", "template": template}] if isinstance(template, str) else template
    try:
        named = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError):
        named = {None: None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ChatTemplateError(f'chat_template must be text or a list of {{"name", "template"}}: {_short(template)}')
    return named


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens' texts, which templates use by these names."""
    tokens = {name: config.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
