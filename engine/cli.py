"""What every command line shares: the options that choose and run a model, and how errors reach the user.

An error becomes one line on stderr and exit status 1 (2 for unusable options, as argparse does, 130 after Ctrl-C); a
traceback appears under `-v` only. Errors are the engine's own and the system's (a full disk, no memory); any other
exception is a bug and stays one. stdout carries results alone, so that it can be piped.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.llm import LLM


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, in which precision, and -v."""
    group = parser.add_argument_group("model and device")
    group.add_argument("--model", default="demo", help="directory, repo id or alias (default: %(default)s)")
    group.add_argument("--revision", help="branch, tag or commit of a Hugging Face repo")
    group.add_argument("--device", default="auto", help="auto | cpu | numpy | cuda | emulate (default: %(default)s)")
    group.add_argument("--threads", type=int, help="CPU threads (default: physical cores this process may use)")
    group.add_argument("--deterministic", action="store_true", help="GPU: the same bits as prompt and as answer")
    group.add_argument("--dtype", default="auto", help="activations: auto | bfloat16 | float16 | float32")
    group.add_argument("--kv-cache-dtype", default="auto", help="auto (as the activations) | fp8 (half the memory)")
    group.add_argument("--max-model-len", type=int, help="longest sequence, prompt and answer together, in tokens")
    group.add_argument(
        "--quant", default="auto", help="auto (as the checkpoint) | bf16 (as stored) | fp8 | w4a16 | nvfp4 | sharq | …"
    )
    group.add_argument("--grade", help="weight codes and scales: rtn | 4over6 | sweep | gram (default: sweep)")
    group.add_argument("--quant-head", help="lm_head: bf16 (as stored) | fp8 | nvfp4 (default: as the checkpoint)")
    group.add_argument("--quant-fallback", help="bf16: layers that do not fit the method stay as stored")
    group.add_argument("--sharq-scale", default="token", help="token | tensor (the paper's; depends on the batch)")
    group.add_argument("--sharq-compat", action="store_true", help="round to bf16 between the paths, as the paper")
    group.add_argument("--no-quant-cache", action="store_true", help="keep no quantised weights on disk")
    group.add_argument("-v", "--verbose", action="store_true", help="say what was chosen; tracebacks on errors")


def open_model(options: argparse.Namespace) -> LLM:
    """The model that `add_model_options`' options describe; reports what it chose under -v."""
    from engine.llm import LLM  # the tokenizer library and the backend load here, not for --help or a bad option

    llm = LLM(
        options.model,
        revision=options.revision,
        device=options.device,
        threads=options.threads,
        deterministic=options.deterministic,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        kv_cache_dtype=options.kv_cache_dtype,
        quant=options.quant,
        grade=options.grade,
        quant_head=options.quant_head,
        quant_fallback=options.quant_fallback,
        sharq_scale=options.sharq_scale,
        sharq_compat=options.sharq_compat,
        quant_cache=not options.no_quant_cache,
        progress=True,
    )
    if options.verbose:
        say(llm.describe())
    elif options.device != "numpy" and llm.kernel_path.startswith("numpy"):
        say(f"note: running on the NumPy path ({llm.kernel_path})")
    return llm


def say(text: str) -> None:
    """One message for the person at the terminal: stderr."""
    print(text, file=sys.stderr, flush=True)


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> int:
    """Parse, run, and turn what goes wrong into a line and an exit status."""
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        main(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our stdout has left, which is its right
        _drop_stdout()
        return 0
    except (EngineError, OSError, MemoryError) as error:
        if options.verbose:
            traceback.print_exc()
        say(f"error: {' '.join(str(error).split()) or 'out of memory'}")
        if isinstance(error, OSError):
            _drop_stdout()
        return 1
    return 0


def _drop_stdout() -> None:
    """What is still buffered can never be written; without this Python tries, and complains, as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
