"""`python -m engine.bench SUBJECT`."""

from __future__ import annotations

import argparse
import sys

from engine.bench import startup, versus_llama_cpp
from engine.cli import run

_SUBJECTS = {"startup": startup, "llama-cpp": versus_llama_cpp}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.bench", description=__doc__)
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks on errors")
    subjects = parser.add_subparsers(dest="subject", required=True)
    for name, module in _SUBJECTS.items():
        own = subjects.add_parser(name, description=module.__doc__)
        module.add_options(own)
        own.set_defaults(main=module.main)
    return parser


if __name__ == "__main__":
    sys.exit(run(lambda options: options.main(options), build_parser()))
