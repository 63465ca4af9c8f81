"""The process that renders a chat template: run as a script by engine.chat_template, never imported by the engine.

It speaks JSON, one line each way: first the templates by name, answered {} or {"error"} once it is ready; then
requests {"name", "variables"}, each answered {"text"} or {"error"}. It imports nothing of the engine, so that it
starts fast.

Arguments: memory limit (bytes), output limit (bytes of UTF-8), CPU seconds a request may take, then the module search
path of the engine's process, for Python runs isolated and would miss packages that only that path names.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NoReturn

if sys.platform != "win32":
    import resource


MESSAGE_LIMIT = 500  # characters of an error message, which the template may have made


class RefusedError(Exception):
    """The template called raise_exception; the message is its own."""


class OutputLimitError(Exception):
    """The output exceeds its limit."""


def make_environment() -> Any:
    """Jinja as chat templates expect it: Transformers' settings, filters and functions."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}…{% endgeneration %} marks the assistant's text for training; here its content is all."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The tojson filter; Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: object) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise RefusedError(str(message))


def strftime_now(format: str) -> str:
    """The current local time, for templates that tell the model the date."""
    return datetime.now().strftime(format)


def render(template: Any, variables: dict[str, Any], max_bytes: int) -> str:
    """The template's output. Raises OutputLimitError as soon as it exceeds `max_bytes` of UTF-8."""
    pieces: list[str] = []
    size = 0
    for piece in template.generate(variables):
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > max_bytes:
            raise OutputLimitError
        pieces.append(piece)
    return "".join(pieces)


def describe(error: Exception) -> str:
    """What went wrong, to follow "the chat template "."""
    from jinja2 import TemplateSyntaxError

    if isinstance(error, RefusedError):
        return f"refused the conversation: {error}"
    if isinstance(error, OutputLimitError):
        return "produced too much text"
    if isinstance(error, TemplateSyntaxError):
        return f"is malformed at line {error.lineno}: {error.message}"
    return f"failed: {type(error).__name__}: {error}"


def answers(lines: Iterator[bytes], max_bytes: int, cpu_seconds: int) -> Iterator[dict[str, str]]:
    """Answer each line in turn. Out of memory, the process is not to be trusted further and ends unanswered."""
    sources = json.loads(next(lines))
    try:
        environment = make_environment()
    except ImportError as error:
        yield {"error": f"cannot be rendered: {error}; install jinja2"}
        return
    yield {}
    templates: dict[str, Any] = {}
    for line in lines:
        limit_cpu(cpu_seconds)
        try:
            request = json.loads(line)
            name = request["name"]
            if name not in templates:
                templates[name] = environment.from_string(sources[name])
            yield {"text": render(templates[name], request["variables"], max_bytes)}
        except MemoryError:
            raise
        except Exception as error:  # a template can raise any
            yield {"error": describe(error)[:MESSAGE_LIMIT]}


def limit(kind: int, value: int) -> None:
    """Set a soft resource limit, as far as the hard one allows."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def limit_memory(max_bytes: int) -> None:
    """Bound the address space; only Linux enforces that."""
    if sys.platform == "linux":
        limit(resource.RLIMIT_AS, max_bytes)


def limit_cpu(seconds: int) -> None:
    """Have the system end this process if it uses more, should nobody be left to wait for its answer."""
    if sys.platform != "win32":
        limit(resource.RLIMIT_CPU, int(time.process_time()) + seconds + 1)


def main(arguments: list[str]) -> None:
    """Serve standard input until it ends."""
    max_memory, max_output, cpu_seconds = map(int, arguments[:3])
    sys.path[:] = arguments[3:]
    limit_memory(max_memory)
    for answer in answers(iter(sys.stdin.buffer), max_output, cpu_seconds):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
