"""Measurements, one subject each; `python -m engine.bench SUBJECT --help` says what a subject does and how.

Tables go to stdout (-o md, csv or json), messages to stderr; --save keeps the JSON report with machine and versions.
"""

from __future__ import annotations

import argparse
import sys

from engine.bench import attention, gemm, model, startup, synthetic, versus_llama_cpp
from engine.cli import run

_SUBJECTS = {
    "gemm": (gemm, "the matrix products of a decode step, all methods side by side, beside the read bandwidth"),
    "attention": (attention, "paged attention for decoding and for prompts, beside the read bandwidth"),
    "model": (model, "whole models: prompt and generation speed at several depths, peak memory"),
    "llama-cpp": (versus_llama_cpp, "a small model beside llama.cpp, in turns"),
    "startup": (startup, "how long a user waits before anything happens"),
    "synthetic": (synthetic, "write a model directory with random weights in a real model's shape"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks on errors")
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, (module, short) in _SUBJECTS.items():
        own = subjects.add_parser(
            name, help=short, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_options(own)
        own.set_defaults(main=module.main)
    return parser


if __name__ == "__main__":
    sys.exit(run(lambda options: options.main(options), build_parser()))
