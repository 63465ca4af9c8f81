"""Chat templates: the shapes real models ship, where they are found, and templates that mean harm."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from engine.chat_template import ChatTemplate, Limits
from engine.errors import ChatTemplateError, EngineError, RequestError, TokenizerError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "  Grüße, 世界 <b>&amp;</b> "}
ANSWER = {"role": "assistant", "content": "Hello."}

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and loop.index0 < ns.last %}
        {{- '<|im_start|>assistant\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

INST = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate\nuser/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
{{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{% endfor %}
"""


def template(source: str, **tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, tokens)


def test_chatml() -> None:
    chat = template(CHATML)
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  Grüße, 世界 <b>&amp;</b> <|im_end|>\n"
    assert chat.render([SYSTEM, USER]) == turns + "<|im_start|>assistant\n"
    assert chat.render([SYSTEM, USER], add_generation_prompt=False) == turns
    assert chat.render([SYSTEM, USER], enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."}
    assert "hm" not in chat.render([USER, thought, USER])
    assert "<|im_start|>assistant\nHello.<|im_end|>" in chat.render([USER, thought, USER])
    tools = [{"type": "function", "function": {"name": "wetter", "description": "für <Städte> & 'Orte'"}}]
    assert chat.render([USER], tools=tools).startswith(
        "<|im_start|>system\n# Tools\n"
        '{"type": "function", "function": {"name": "wetter", "description": "für <Städte> & \'Orte\'"}}\n<|im_end|>\n'
    )


def test_header_style() -> None:
    chat = template(HEADERS, bos_token="<|begin|>")
    expected = (
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nDate: {}\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGrüße, 世界 <b>&amp;</b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert chat.render([SYSTEM, USER], date_string="1 May") == expected.format("1 May")
    years = [expected.format(datetime.now().year)]
    assert chat.render([SYSTEM, USER]) in [*years, expected.format(datetime.now().year)]


def test_instruction_style_and_its_refusal() -> None:
    chat = template(INST, bos_token="<s>", eos_token="</s>")
    conversation = [{"role": "user", "content": "a"}, ANSWER, {"role": "user", "content": "b"}]
    assert chat.render(conversation) == "<s>[INST] a [/INST] Hello.</s>[INST] b [/INST]"
    with pytest.raises(
        ChatTemplateError, match=r"refused the conversation: .* must alternate user/assistant/user"
    ) as e:
        chat.render([USER, USER])
    assert "\n" not in str(e.value)
    assert chat.render(conversation[:1]) == "<s>[INST] a [/INST]"


def test_what_templates_rely_on() -> None:
    render = template(
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %} {{ {'ü': [1]} | tojson(indent=1) }} {{ '' ~ tools ~ documents }} [{{ bos_token }}]"
        "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ raise_exception is defined }}"
    ).render
    assert render([ANSWER]) == '013 {\n "ü": [\n  1\n ]\n} NoneNone []Hello.True'


@pytest.mark.parametrize("content", ["text", [{"type": "text", "text": "a"}], None])
def test_content_may_be_text_parts_or_nothing(content: Any) -> None:
    source = "{{ messages[0].content | tojson }}"
    assert json.loads(template(source).render([{"role": "user", "content": content}])) == content


@pytest.mark.parametrize(
    "messages",
    [[], "hi", None, {}, ["hi"], [{"content": "x"}], [{"role": "user"}], [{"role": 1, "content": "x"}]]
    + [[{"role": "user", "content": content}] for content in (3, {"a": 1}, b"x", {1, 2})],
)
def test_malformed_messages_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="message"):
        template("x").render(messages)


def test_arguments_that_are_not_json_are_refused() -> None:
    circular: list[Any] = []
    circular.append(circular)
    for value in (print, {1, 2}, circular):
        with pytest.raises(RequestError, match="plain JSON data"):
            template("x").render([USER], extra=value)


# ---- templates that mean harm -------------------------------------------------------------------------------------

# `one` is 1, passed in: Jinja computes what is constant while it compiles, which has a test of its own below.
SLOW = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{{ 10 ** (one * 10 ** 9) % 7 }}",
    "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
]
LARGE = [
    "{{ 'a' * one * 10 ** 10 }}",
    "{{ '%2000000000d' % one }}",
    "{{ '{:2000000000}'.format(one) }}",
    "{{ 'a' | center(one * 2 * 10 ** 9) }}",
    "{{ 'a'.ljust(one * 2 * 10 ** 9) }}",
    "{{ ','.join(['aaaaaaaaaa' * one * 10 ** 6] * 10 ** 4) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{{ range(99999) | map('string') | list * 9999 }}",
    "{{ [one] | batch(10 ** 9, 0) | list }}",
]
LONG = ["{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}"]
FAILING = [
    "{% for a in [[]] recursive %}{{ loop([a]) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10 ** 12) | list }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__globals__.keys() }}",
    "{{ ''['__class__'].__base__.__subclasses__() }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ one / 0 }}",
    "{{ nothing.here }}",
    "{% include '/etc/hostname' %}",
    "{{ raise_exception('x' * one * 10 ** 7) }}",
]
BOUNDS = Limits(seconds=1.0, memory_bytes=300 << 20, output_bytes=1 << 20)
HARMFUL = [
    *((source, "did not finish within 1 s|MiB of memory") for source in SLOW),
    *((source, "MiB of memory|did not finish|too much text|failed: OverflowError") for source in LARGE),
    *((source, "produced too much text") for source in LONG),
    *((source, "failed: |refused the conversation: x") for source in FAILING),
]


@pytest.fixture(scope="module")
def harmful() -> Iterator[ChatTemplate]:
    """All of them in one template, chosen by the conversation."""
    cases = "".join(f"{{% if n == {n} %}}{source}{{% endif %}}" for n, (source, _) in enumerate(HARMFUL))
    chat = ChatTemplate({"default": cases + "{{ n }}"}, {}, BOUNDS)
    yield chat
    chat.close()


@pytest.mark.parametrize("n", range(len(HARMFUL)), ids=lambda n: HARMFUL[n][0][:40])
def test_harm_ends_in_one_clear_error_and_the_next_rendering_works(harmful: ChatTemplate, n: int) -> None:
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError, match=HARMFUL[n][1]) as error:
        harmful.render([USER], n=n, one=1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.monotonic() - begun < 30  # not a measurement: without bounds, some of these never end
    assert harmful.render([USER], n=-1) == "-1"


def test_harm_while_compiling() -> None:
    for source, message in (
        ("{% if %}", "malformed at line 1"),
        ("a\n{{ x", "malformed at line 2"),
        ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "failed: RecursionError|crashed|malformed"),
        ("{% if 10 ** 10 ** 10 == 'a' * 10 ** 12 %}{% endif %}", "did not finish|MiB of memory|failed"),
    ):
        with pytest.raises(ChatTemplateError, match=message):
            ChatTemplate({"default": source}, {}, BOUNDS).render([USER])


def test_threads_take_turns() -> None:
    chat = template("{{ messages[0].content }}")
    results: dict[int, str] = {}

    def work(n: int) -> None:
        results[n] = "".join(chat.render([{"role": "user", "content": f"{n};"}]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"{n};" * 20 for n in range(4)}


def test_close_ends_the_process_and_rendering_starts_another() -> None:
    chat = template("{{ messages[0].content }}")
    assert chat.render([ANSWER]) == "Hello."
    assert chat._worker is not None
    process = chat._worker._process
    chat.close()
    assert process.returncode is not None
    assert chat.render([ANSWER]) == "Hello."
    chat._worker._process.kill()  # as the system might, between renderings
    chat._worker._process.wait()
    assert chat.render([ANSWER]) == "Hello."
    process = chat._worker._process
    del chat
    assert process.returncode is not None


def test_an_interrupted_rendering_does_not_leak_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = template("{{ messages[0].content }}")
    assert chat.render([ANSWER]) == "Hello."
    assert chat._worker is not None
    send = chat._worker._send

    def interrupted(message: bytes) -> bytes:
        send(message)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat._worker, "_send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.render([USER])
    assert chat.render([ANSWER]) == "Hello."


# ---- where templates are found ------------------------------------------------------------------------------------


def write(directory: Path, jinja: str | None = None, config: Any = None, legacy: Any = None) -> ChatTemplate | None:
    for name, content in (
        ("chat_template.jinja", jinja),
        ("tokenizer_config.json", None if config is None else json.dumps(config)),
        ("chat_template.json", None if legacy is None else json.dumps(legacy)),
    ):
        if content is not None:
            (directory / name).write_text(content, encoding="utf-8")
    return ChatTemplate.from_directory(directory)


def test_no_template(tmp_path: Path) -> None:
    assert write(tmp_path) is None
    assert write(tmp_path, config={"bos_token": "<s>", "chat_template": None}) is None


def test_precedence_and_special_tokens(tmp_path: Path) -> None:
    tokens = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    added: list[tuple[dict[str, Any], str]] = [
        ({"legacy": {"chat_template": "legacy"}}, "legacy"),
        ({"config": {"chat_template": "config", **tokens}}, "config"),
        ({"jinja": "{{ eos_token }}"}, "</s>"),
    ]
    for files, text in added:
        found = write(tmp_path, **files)
        assert found is not None and found.render([USER]) == text
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ pad_token }}|", encoding="utf-8")
    found = ChatTemplate.from_directory(tmp_path)
    assert found is not None and found.render([USER]) == "<s>|"
    assert found.render([USER], bos_token="!") == "!|"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    chat = write(tmp_path, config={"chat_template": named})
    assert chat is not None
    assert chat.render([USER]) == "plain"
    assert chat.render([USER], tools=[{"name": "f"}]) == "tools"
    assert chat.render([USER], tools=[]) == "plain"
    chat = write(tmp_path, config={"chat_template": named[:1]})
    assert chat is not None and chat.render([USER], tools=[{"name": "f"}]) == "plain"


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({"config": {"chat_template": 5}}, ChatTemplateError),
        ({"config": {"chat_template": [{"name": "default"}]}}, ChatTemplateError),
        ({"config": {"chat_template": [{"name": "default", "template": 1}]}}, ChatTemplateError),
        ({"config": {"chat_template": [{"name": [], "template": "x"}]}}, ChatTemplateError),
        ({"config": {"chat_template": [{"name": "rag", "template": "x"}]}}, ChatTemplateError),
        ({"config": []}, TokenizerError),
        ({"legacy": "x"}, ChatTemplateError),
    ],
)
def test_malformed_files(tmp_path: Path, files: dict[str, Any], error: type[EngineError]) -> None:
    with pytest.raises(error, match="chat_template|tokenizer_config"):
        write(tmp_path, **files)


def test_a_jinja_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ChatTemplateError, match="not UTF-8"):
        ChatTemplate.from_directory(tmp_path)
