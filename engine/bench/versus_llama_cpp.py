"""`python -m engine.bench llama-cpp`: this engine beside llama.cpp on the CPU, same shape, in turns.

Both sides hold random weights in the Qwen2.5-0.5B shape (24 layers, hidden 896, FFN 4864, 14/2 heads, vocabulary
32,000, tied), in the types asked for. A round measures us, then the peer: 512-token prefill, then 64 decoded tokens at
batch 1 after a prompt of one token. Ours is timed through `LLM.stream`, so scheduler, sampler and detokeniser are in
it; the peer's is its C API without a sampler. Reported: medians of tokens/s, and the median over rounds of the ratio
within a round. llama.cpp's own tools give a model a Q8_0 head: --peer-head q8_0 beside --quant-head fp8 compares equal
widths. Its NVFP4 blocks are random codes, because its Python library cannot make them from values. The peer's
environment is the user's to make: pip install llama-cpp-python gguf.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.bench.machine import describe_machine
from engine.bench.report import Row, add_output_options, as_markdown, write_report
from engine.bench.synthetic import write_model
from engine.cli import say
from engine.errors import DeviceError

if TYPE_CHECKING:
    from engine import LLM

SHAPE = "qwen2.5-0.5b-32k"
PEER_TYPES = ("bf16", "q4_0", "q8_0", "nvfp4")
PREFILL, DECODE = 512, 64
Ask = Callable[[str, int], float]  # (what, how many tokens) -> seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer-python", required=True, help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--work", type=Path, required=True, help="folder for the two random models (2 GB), kept")
    parser.add_argument("--quant", default="bf16", help="our method (default: %(default)s)")
    parser.add_argument("--quant-head", default="bf16", help="our head: bf16 | fp8 | nvfp4 (default: %(default)s)")
    parser.add_argument("--grade", default="rtn", help="our weight grade, which does not change the speed")
    parser.add_argument("--peer-type", choices=PEER_TYPES, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--peer-head", choices=PEER_TYPES, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    add_output_options(parser)


def main(options: argparse.Namespace) -> None:
    """Measure, print."""
    options.work.mkdir(parents=True, exist_ok=True)
    write_model(SHAPE, options.work / SHAPE)
    with _ours(options) as llm, _peer(options) as (ask, versions):
        _prefill(llm), _decode(llm), ask("prefill", PREFILL), ask("decode", DECODE)  # warm-up
        rounds = []
        for number in range(options.rounds):
            rounds.append(_round(llm, ask))
            say(f"round {number + 1} of {options.rounds}: {_text(rounds[-1])}")
        report = {
            "what": "Qwen2.5-0.5B shape, vocabulary 32,000: tokens per second, medians; ratio within a round",
            "ours": options.quant,
            "our_head": options.quant_head,
            "peer": options.peer_type,
            "peer_head": options.peer_head,
            "threads": options.threads,
            "kernel_path": llm.kernel_path,
            "rows": [_row(rounds, name) for name in ("prefill", "decode")],
            "rounds": rounds,
            "machine": describe_machine() | versions,
        }
    write_report(options, report, _table(report))


def _ours(options: argparse.Namespace) -> LLM:
    from engine import LLM  # with tokenizers, which other benchmarks do without

    return LLM(
        options.work / SHAPE,
        quant=options.quant,
        quant_head=options.quant_head,
        grade=options.grade,
        threads=options.threads,
        enable_prefix_caching=False,
        quant_cache=False,
    )


@contextmanager
def _peer(options: argparse.Namespace) -> Iterator[tuple[Ask, dict[str, str]]]:
    """A function ask(what, count) -> seconds, answered by the peer's process, and the peer's versions."""
    script = Path(__file__).with_name("versus_llama_cpp_peer.py")
    model = options.work / f"{options.peer_type}-head-{options.peer_head}.gguf"
    command = [options.peer_python, str(script), str(model), "--threads", str(options.threads)]
    command += ["--type", options.peer_type, "--head", options.peer_head]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def answer() -> Any:
            line = answers.readline()
            if not line:
                raise DeviceError(f"the peer's process, {options.peer_python}, has ended; its message is above")
            return json.loads(line)

        def ask(what: str, count: int) -> float:
            print(json.dumps({what: count}), file=requests, flush=True)
            return float(answer())

        yield ask, answer()
        requests.close()


def _round(llm: LLM, ask: Ask) -> dict[str, dict[str, float]]:
    ours_prefill, peer_prefill = PREFILL / _prefill(llm), PREFILL / ask("prefill", PREFILL)
    ours_decode, peer_decode = DECODE / _decode(llm), DECODE / ask("decode", DECODE)
    return {
        "prefill": {"ours": ours_prefill, "peer": peer_prefill, "ratio": ours_prefill / peer_prefill},
        "decode": {"ours": ours_decode, "peer": peer_decode, "ratio": ours_decode / peer_decode},
    }


def _prefill(llm: LLM) -> float:
    """Seconds from submitting 512 tokens to the first answer token."""
    from engine import SamplingParams

    tokens = [300 + i * 7919 % 31000 for i in range(PREFILL)]
    start = time.perf_counter()
    with llm.stream(tokens, SamplingParams(temperature=0, max_tokens=1)) as stream:
        next(stream)
        return time.perf_counter() - start


def _decode(llm: LLM) -> float:
    """Seconds for 64 answer tokens after the first."""
    from engine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=DECODE + 1, ignore_eos=True)
    with llm.stream([300], params) as stream:
        next(stream)
        start = time.perf_counter()
        for _ in range(DECODE):
            next(stream)
        return time.perf_counter() - start


def _row(rounds: list[dict[str, dict[str, float]]], name: str) -> Row:
    medians = {key: statistics.median(r[name][key] for r in rounds) for key in ("ours", "peer", "ratio")}
    return {"test": f"{name} {PREFILL if name == 'prefill' else DECODE}"} | {k: round(v, 3) for k, v in medians.items()}


def _table(report: dict[str, Any]) -> str:
    columns = [
        "tokens/s",
        f"ours: {report['ours']}, head {report['our_head']}",
        f"llama.cpp: {report['peer']}, head {report['peer_head']}",
        "ratio",
    ]
    lines = [[row["test"], f"{row['ours']:.1f}", f"{row['peer']:.1f}", f"{row['ratio']:.2f}"] for row in report["rows"]]
    return f"{report['kernel_path']}. {report['machine']['cpu']}\n\n{as_markdown(columns, lines)}"


def _text(measured: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {v['ours']:.1f} / {v['peer']:.1f} = {v['ratio']:.2f}" for name, v in measured.items())
