"""`python -m engine.generate`: what goes to stdout and what to stderr, exit codes, chat, signals, closed pipes.

Where the process itself matters (signals, pipes, terminals) it runs as one; otherwise `main` runs in this one.
"""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from tiny_models import write_model

from engine import LLM, CompletionOutput, RequestOutput, SamplingParams
from engine.cli import run
from engine.generate import _rates as rates
from engine.generate import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
REPORT_KEYS = {
    *("text", "token_ids", "finish_reason", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps"),
    *("peak_memory_bytes", "device", "kernel_path"),
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template."""
    return write_model("qwen3_tied", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model("qwen3_tied", tmp_path_factory.mktemp("chat"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that never stops by itself before a context that takes many seconds to fill."""
    directory = write_model("qwen3_tied", tmp_path_factory.mktemp("endless"))
    config = json.loads((directory / "config.json").read_text())
    config |= {"max_position_embeddings": 40_000, "eos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").unlink()  # names an end of sequence as well
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


class Cli:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        self._monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self._capsys.readouterr()
        try:
            code = run(main, build_parser())
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, err

    def good(self, *arguments: object, stdin: bytes = b"") -> str:
        code, out, err = self(*arguments, stdin=stdin)
        assert code == 0, err
        return out


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


def answers(directory: Path, prompts: list[Any], **params: Any) -> list[str]:
    """What the Python API makes of the same."""
    with LLM(directory) as llm:
        return [out.outputs[0].text for out in llm.generate(prompts, SamplingParams(**params))]


# ---- one-shot -----------------------------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_statistics_to_stderr(cli: Cli, model: Path) -> None:
    (expected,) = answers(model, ["hello"], temperature=0, max_tokens=20)
    code, out, err = cli("--model", model, "-p", "hello", "--temp", 0, "--max-tokens", 20)
    assert (code, out) == (0, expected + "\n")
    lines = err.splitlines()
    assert [line.split()[0] for line in lines] == ["prompt", "generation", "peak"]
    assert "5 tokens" in lines[0] and "20 tokens" in lines[1] and "(length)" in lines[1]


def test_several_prompts_are_answered_in_order(cli: Cli, model: Path) -> None:
    prompts = ["one", "two two", "three three three"]
    expected = answers(model, prompts, temperature=0, max_tokens=9)
    options = [part for prompt in prompts for part in ("-p", prompt)]
    code, out, err = cli("--model", model, *options, "--temp", 0, "-m", 9)
    assert (code, out) == (0, "".join(f"{text}\n" for text in expected))
    assert [line.split()[1] for line in err.splitlines() if line.startswith("prompt")] == ["3", "7", "17"]


def test_a_dash_reads_stdin_to_the_last_byte(cli: Cli, model: Path) -> None:
    text = "grüße\n\n"
    (expected,) = answers(model, [text], temperature=0, max_tokens=9)
    assert cli.good("--model", model, "-p", "-", "--temp", 0, "-m", 9, stdin=text.encode()) == expected + "\n"


def test_json_is_one_object_a_prompt_with_the_promised_keys(cli: Cli, model: Path) -> None:
    code, out, err = cli("--model", model, "-p", "ab", "-p", "cde", "--json", "--temp", 0, "-m", 9)
    assert (code, err) == (0, "")
    reports = [json.loads(line) for line in out.splitlines()]
    assert len(reports) == 2 and all(set(report) == REPORT_KEYS for report in reports)
    with LLM(model) as llm:
        for report, prompt in zip(reports, ("ab", "cde"), strict=True):
            output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=9))[0].outputs[0]
            assert report["text"] == output.text and report["token_ids"] == output.token_ids
            assert report["finish_reason"] == output.finish_reason
            assert report["prompt_tokens"] == len(prompt)
            assert report["generation_tokens"] == len(output.token_ids)
            assert (report["device"], report["kernel_path"]) == (llm.device, llm.kernel_path)
        for report in reports:
            assert report["prompt_tps"] > 0 and report["generation_tps"] > 0
            assert report["peak_memory_bytes"] > 10_000_000


@pytest.mark.parametrize(
    ("num_tokens", "first", "end", "prompt_tps", "generation_tps"),
    [(21, 0.5, 2.5, 16.0, 10.0), (1, 0.5, 0.5, 16.0, 0.0), (0, None, 2.0, 4.0, 0.0)],
)
def test_rates_follow_from_the_engines_clock(
    num_tokens: int, first: float | None, end: float, prompt_tps: float, generation_tps: float
) -> None:
    """Not from when pieces are read: answers to several prompts grow together and are read one after the other."""
    output = CompletionOutput(0, "", [1] * num_tokens, None, "length")
    request = RequestOutput("x", [1] * 8, None, [output], seconds_to_first_token=first, seconds=end)
    assert rates(request) == pytest.approx((prompt_tps, generation_tps))


def test_stop_ends_the_answer_before_it(cli: Cli, model: Path) -> None:
    (whole,) = answers(model, ["hello"], temperature=0, max_tokens=40)
    stops = [whole[30:32], whole[12:15]]
    first = min(whole.index(stop) for stop in stops)
    out = cli.good("--model", model, "-p", "hello", "--temp", 0, "-m", 40, "--stop", stops[0], "--stop", stops[1])
    assert out == whole[:first] + "\n"


def test_a_seed_repeats(cli: Cli, model: Path) -> None:
    arguments = ("--model", model, "-p", "hello", "-m", 30, "--temp", 1.3, "--top-p", 0.9, "--top-k", 50)
    first, again, other = (cli.good(*arguments, "--min-p", 0.001, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
    sampling = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "min_p": 0.001}
    assert first == answers(model, ["hello"], max_tokens=30, seed=1, **sampling)[0] + "\n"


def test_by_default_256_tokens_are_enough(cli: Cli, endless: Path) -> None:
    report = json.loads(cli.good("--model", endless, "-p", "x", "--json", "--ignore-chat-template"))
    assert report["generation_tokens"] == 256


def test_the_template_is_applied_unless_told_otherwise(cli: Cli, model: Path, chat_model: Path) -> None:
    def ids(*arguments: object) -> tuple[int, str]:
        report = json.loads(cli.good("--model", chat_model, "-p", "hi", "--json", "--temp", 0, "-m", 9, *arguments))
        return report["prompt_tokens"], report["text"]

    for arguments, prompt in (
        ((), "[user]hi[assistant]"),
        (("--system-prompt", "be nice"), "[system]be nice[user]hi[assistant]"),
        (("--ignore-chat-template",), "hi"),
    ):
        assert ids(*arguments) == (len(prompt), answers(chat_model, [prompt], temperature=0, max_tokens=9)[0])
    code, out, err = cli("--model", model, "-p", "hi", "--system-prompt", "be nice")
    assert (code, out) == (1, "") and "needs a model with a chat template" in err


def test_verbose_says_what_was_chosen(cli: Cli, tmp_path: Path) -> None:
    write_model("qwen3_tied", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "top_k": 7}')
    _, _, err = cli("--model", tmp_path, "-p", "x", "-m", 1, "-v", "--dtype", "float32", "--max-model-len", 77)
    for part in ("Qwen3ForCausalLM", "activations float32", "77 tokens", "temperature 0.25, top_k 7", "KV cache"):
        assert part in err
    _, _, err = cli("--model", tmp_path, "-p", "x", "-m", 1)
    assert "Qwen3ForCausalLM" not in err


def test_a_cache_in_fp8_is_told(cli: Cli, model: Path) -> None:
    arguments = ("--model", model, "-p", "x", "--temp", "0", "-m", "3", "-v")
    for option, told in (((), "tokens in bfloat16"), (("--kv-cache-dtype", "fp8"), "tokens in FP8 (E4M3)")):
        code, _, err = cli(*arguments, *option)
        assert code == 0 and told in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either -p PROMPT"),
        (("-p", "x", "--chat"), "give either -p PROMPT"),
        (("--chat", "--json"), "--chat goes with neither --json"),
        (("--chat", "--ignore-chat-template"), "nor --ignore-chat-template"),
        (("-p", "-", "-p", "-"), "can be given once"),
        (("-p", ""), "the prompt is empty"),
        (("-p", "-"), "the prompt is empty"),
        (("-p", "x", "-m", "0"), "max_tokens must be at least 1, not 0"),
        (("-p", "x", "--temp", "-1"), r"temperature must be in [0, inf), not -1.0"),
        (("-p", "x", "--temp", "nan"), "temperature"),
        (("-p", "x", "--stop", ""), "stop strings must be non-empty"),
        (("-p", "x", "--threads", "0"), "threads must be a whole number from 1 up, not 0"),
        (("-p", "x", "--device", "tpu"), "unknown device 'tpu'"),
        (("-p", "x", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("-p", "x", "--kv-cache-dtype", "int8"), "unknown kv_cache_dtype 'int8'; choose auto"),
        (("-p", "x" * 200), "200 tokens and at most 127 fit"),
        (("-p", "\udcff"), "lone surrogate"),
        (("--chat",), "has no chat template"),
    ],
)
def test_errors_are_one_line(cli: Cli, model: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = cli("--model", model, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert len(err) < 400


def test_verbose_errors_come_with_a_traceback(cli: Cli, model: Path) -> None:
    code, _, err = cli("--model", model, "-p", "", "-v")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: the prompt is empty")


def test_unusable_options_exit_with_2(cli: Cli, model: Path) -> None:
    for arguments in (("--nonsense",), ("-p", "x", "--top-k", "many")):
        code, out, err = cli("--model", model, *arguments)
        assert (code, out) == (2, "") and "usage:" in err


def test_stdin_must_be_utf8(cli: Cli, model: Path) -> None:
    code, _, err = cli("--model", model, "-p", "-", stdin=b"abc\xff")
    assert code == 1 and err == "error: stdin is not valid UTF-8 (byte 3: invalid start byte)\n"


def test_a_narrow_stdout_is_no_error(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(sys, "argv", ["generate", "--model", str(model), "-p", "x", "-m", "60", "--seed", "1"])
    assert run(main, build_parser()) == 0
    narrow.flush()
    (expected,) = answers(model, ["x"], max_tokens=60, seed=1)
    assert not expected.isascii()
    assert narrow.buffer.getvalue() == f"{expected}\n".encode("ascii", "replace")  # type: ignore[attr-defined]


# ---- chat ---------------------------------------------------------------------------------------------------------


def test_a_conversation_from_a_pipe(cli: Cli, chat_model: Path) -> None:
    turns = ["hello", "grüß dich", "bye"]
    prompts, expected = "[system]be nice", []
    for turn in turns:
        prompts += f"[user]{turn}"
        (text,) = answers(chat_model, [f"{prompts}[assistant]"], temperature=0, max_tokens=5)
        expected.append(text)
        prompts += f"[assistant]{text}"
    stdin = "\n  \nhello\n\n grüß dich \nbye".encode()  # lines that say nothing are no turns
    code, out, err = cli(
        *("--model", chat_model, "--chat", "--system-prompt", "be nice", "--temp", 0, "-m", 5), stdin=stdin
    )
    assert code == 0 and out == "".join(f"{text}\n" for text in expected)
    assert "> " not in out + err, "nobody is there to be asked"


def test_a_conversation_forgets_its_oldest_turns_when_it_must(cli: Cli, chat_model: Path) -> None:
    stdin = b"".join(b"turn %d\n" % i for i in range(12))
    code, out, err = cli("--model", chat_model, "--chat", "--temp", 0, "-m", 8, stdin=stdin)
    assert code == 0 and out.count("\n") >= 12
    assert "oldest turn no longer fits" in err
    code, _, err = cli("--model", chat_model, "--chat", stdin=b"x" * 200 + b"\n")
    assert code == 1 and "at most 127 fit" in err


def test_chat_refuses_invalid_utf8(cli: Cli, chat_model: Path) -> None:
    code, out, err = cli("--model", chat_model, "--chat", "-m", 2, stdin=b"fine\nab\xc3\n")
    assert code == 1 and out.count("\n") >= 1
    assert err.splitlines()[-1] == "error: stdin is not valid UTF-8 (byte 2: invalid continuation byte)"


# ---- the process --------------------------------------------------------------------------------------------------


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "engine.generate", *map(str, arguments)]


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[Any]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command(*arguments), cwd=ROOT, **pipes))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def wait_for(stream: IO[bytes], text: bytes = b"") -> bytes:
    """Read until `text` has come (or anything at all)."""
    seen = b""
    while not seen or text not in seen:
        new = os.read(stream.fileno(), 4096)
        assert new, f"ended after {seen!r}"
        seen += new
    return seen


def test_ctrl_c_ends_the_program(process: Any, endless: Path) -> None:
    running = process("--model", endless, "-p", "x", "-m", 39_000)
    wait_for(running.stdout)  # so it streams: the answer is nowhere near its end
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, b"interrupted\n")


def test_ctrl_c_in_a_chat_ends_the_answer_only(process: Any, endless: Path) -> None:
    running = process("--model", endless, "--chat", "-m", 15_000)
    wait_for(running.stderr, b"Ctrl-C")
    for turn in (b"hello\n", b"again\n"):
        running.stdin.write(turn)
        running.stdin.flush()
        os.set_blocking(running.stdout.fileno(), True)
        wait_for(running.stdout)
        running.send_signal(signal.SIGINT)
        wait_for(running.stderr, b"(stopped)\n")
        os.set_blocking(running.stdout.fileno(), False)
        running.stdout.read()  # what is left of this answer, so that the next text seen is the next answer's
    running.stdin.close()
    running.stdin = None
    _, err = running.communicate(timeout=60)
    assert running.returncode == 0 and b"Traceback" not in err


def test_a_chat_at_a_terminal(endless: Path) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, command("--model", endless, "--chat", "-m", 15_000))
    with os.fdopen(terminal, "r+b", buffering=0) as screen:
        wait_for(screen, b"> ")
        screen.write(b"\x03")  # Ctrl-C at the prompt abandons the line and asks again
        wait_for(screen, b"> ")
        screen.write(b"hello\n")
        wait_for(screen, b"hello\r\n")
        wait_for(screen)
        screen.write(b"\x03")
        wait_for(screen, b"(stopped)\r\n> ")
        screen.write(b"\x04")  # Ctrl-D
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def shell(script: str, *arguments: object) -> tuple[str, str]:
    """stdout and stderr of a shell script in which $@ is the command."""
    done = subprocess.run(
        ["bash", "-c", script, "bash", *command(*arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.stdout, done.stderr


def test_a_reader_that_leaves_is_no_error(endless: Path) -> None:
    out, err = shell('"$@" | head -c 10 | wc -c; echo ${PIPESTATUS[0]}', "--model", endless, "-p", "x", "-m", 39_000)
    assert (out.split(), err) == (["10", "0"], "")


def test_a_full_disk_is_one_line(model: Path) -> None:
    out, err = shell('"$@" > /dev/full; echo $?', "--model", model, "-p", "x", "-m", 3)
    assert out == "1\n" and err.count("\n") == 1 and "No space left" in err


def test_stdin_may_be_missing_or_unreadable(model: Path) -> None:
    out, err = shell('"$@" 0>/dev/null; echo $?', "--model", model, "-p", "-")
    assert out == "1\n" and err == "error: stdin cannot be read: Bad file descriptor\n"
    out, err = shell('"$@" <&-; echo $?', "--model", model, "-p", "-")
    assert out == "1\n" and err == "error: there is no stdin to read\n"


def test_help_loads_no_model_code() -> None:
    script = "import sys; sys.argv = ['x', '--help']; sys.modules['tokenizers'] = None; import runpy; "
    script += "runpy.run_module('engine.generate', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--ignore-chat-template" in done.stdout
