"""`python -m engine.eval`: how well a model predicts a text.

`perplexity` cuts the text's tokens into windows and scores each token given those before it in its window. A stride
below the window gives every token at least window − stride tokens of context and costs window / stride times as much.
With the default stride (= window) the first token of each window has no context and is not scored, and an incomplete
last window is dropped, which is how the literature reports WikiText-2 at 2048 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.cli import add_model_options, open_model, run, say
from engine.errors import InvalidArgument

if TYPE_CHECKING:
    from engine.llm import LLM

DEFAULT_WINDOW = 2048


def windows(num_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored token, end) of each window over num_tokens tokens; every token is scored at most once.

    With stride == window only whole windows come; with a smaller stride the last one ends at the last token.
    Raises InvalidArgument unless 1 <= stride <= window, 2 <= window, and the text fills one window.
    """
    if window < 2 or not 1 <= stride <= window:
        raise InvalidArgument(f"the stride must be in 1 … window and the window at least 2, not {stride} and {window}")
    if num_tokens < window:
        raise InvalidArgument(f"the text has {num_tokens} tokens, fewer than one window of {window}; lower the window")
    scored = 1
    for begin in range(0, num_tokens, stride):
        end = min(begin + window, num_tokens)
        if end <= scored or (stride == window and end - begin < window):
            return
        yield begin, max(scored, begin + 1), end
        scored = end


def token_losses(llm: LLM, token_ids: Sequence[int], window: int, stride: int) -> NDArray[np.float64]:
    """Negative log-likelihood in nats of each scored token, in order."""
    losses = []
    for begin, first, end in windows(len(token_ids), window, stride):
        logits = llm.logits(token_ids[begin:end])[first - begin - 1 : -1]
        losses.append(negative_log_likelihood(logits, token_ids[first:end]))
    return np.concatenate(losses)


def negative_log_likelihood(logits: NDArray[np.float32], targets: Sequence[int]) -> NDArray[np.float64]:
    """−log softmax(logits)[target] of each row, in float64; logits [T, V], targets [T]."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), list(targets)]


def read_text(path: Path, *, wikitext: bool) -> str:
    """The file's text. wikitext: lines joined as the data set's rows are in the literature, two newlines between rows
    that keep their own. Raises InvalidArgument for a file that cannot be read or is not UTF-8."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read {path}: {error}") from error
    return "\n\n".join(text.splitlines(keepends=True)) if wikitext else text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    perplexity = commands.add_parser("perplexity", help="perplexity of a text")
    perplexity.add_argument("--text", type=Path, help="UTF-8 file (default: the bundled model's held-out text)")
    perplexity.add_argument("--wikitext", action="store_true", help="join lines as WikiText's rows are joined")
    perplexity.add_argument("--window", type=int, help="tokens (default: 2048, or the longest the model allows)")
    perplexity.add_argument("--stride", type=int, help="tokens (default: the window)")
    perplexity.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_model_options(perplexity)
    perplexity.set_defaults(main=perplexity_main)
    return parser


def perplexity_main(options: argparse.Namespace) -> None:
    """Print the perplexity with its standard error."""
    from engine.weights.locate import DEMO_DIRECTORY

    path = options.text or DEMO_DIRECTORY / "heldout.txt"
    text = read_text(path, wikitext=options.wikitext)
    with open_model(options) as llm:
        window = options.window or min(DEFAULT_WINDOW, llm.max_model_len)
        losses = token_losses(llm, llm.encode(text), window, options.stride or window)
        report = {
            "model": llm.name,
            "text": path.name,
            "window": window,
            "stride": options.stride or window,
            "tokens": len(losses),
            "nats_per_token": float(losses.mean()),
            "standard_error": float(losses.std(ddof=1) / math.sqrt(len(losses))),
            "perplexity": math.exp(losses.mean()),
            "dtype": options.dtype,
            "kernel_path": llm.kernel_path,
        }
    if options.json:
        print(json.dumps(report))
    else:
        print(f"perplexity {report['perplexity']:.4f}")
        say(f"{report['nats_per_token']:.5f} ± {report['standard_error']:.5f} nats per token over {len(losses)} tokens")


if __name__ == "__main__":
    parser = build_parser()
    sys.exit(run(lambda options: options.main(options), parser))
