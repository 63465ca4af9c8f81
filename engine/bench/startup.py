"""`python -m engine.bench startup`: how long a user waits before anything happens.

Whole processes, timed from outside: `import engine`, and the bundled model from process start to its first token (a
process that exits after one token, so the figure includes the interpreter's start and end).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from engine.bench.machine import describe_machine

_COMMANDS = {
    "python itself": ["-c", "pass"],
    "import engine": ["-c", "import engine"],
    "first token": ["-m", "engine.generate", "-p", "The", "--max-tokens", "1", "--json"],
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=11)
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")


def main(options: argparse.Namespace) -> None:
    """Run the commands in turns, print medians in seconds, and the JSON last."""
    seconds: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    for _ in range(options.runs + 1):
        for name, command in _COMMANDS.items():
            seconds[name].append(_seconds(command))
    report = {
        "what": "seconds from process start to exit, median",
        **{name: round(statistics.median(values[1:]), 4) for name, values in seconds.items()},  # the first warms up
        "runs": options.runs,
        "machine": describe_machine(),
    }
    text = json.dumps(report, indent=1)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start
