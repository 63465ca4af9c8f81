"""`python -m engine.bench startup`: how long a user waits before anything happens.

Whole processes, timed from outside: `import engine`, and the bundled model from process start to its first token (a
process that exits after one token, so the figure includes the interpreter's start and end).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

from engine.bench.machine import describe_machine
from engine.bench.report import add_output_options, as_markdown, write_report

_COMMANDS = {
    "python itself": ["-c", "pass"],
    "import engine": ["-c", "import engine"],
    "first token": ["-m", "engine.generate", "-p", "The", "--max-tokens", "1", "--json"],
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=11)
    add_output_options(parser)


def main(options: argparse.Namespace) -> None:
    """Run the commands in turns, print medians in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for _ in range(options.runs + 1):
        for name, command in _COMMANDS.items():
            seconds[name].append(_seconds(command))
    report: dict[str, Any] = {
        "what": "seconds from process start to exit, median",
        "runs": options.runs,
        "rows": [
            {"process": name, "seconds": round(statistics.median(values[1:]), 4)}  # the first warms up
            for name, values in seconds.items()
        ],
        "machine": describe_machine(),
    }
    table = as_markdown(["process", "seconds"], [list(row.values()) for row in report["rows"]])
    write_report(options, report, table)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start
