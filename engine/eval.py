"""`python -m engine.eval`: how well a model predicts a text.

`perplexity` cuts the text's tokens into windows and scores each token given those before it in its window. A stride
below the window gives every token at least window − stride tokens of context and costs window / stride times as much.
With the default stride (= window) the first token of each window has no context and is not scored, and an incomplete
last window is dropped, which is how the literature reports WikiText-2 at 2048 tokens.

`compare` puts quantisation methods beside the model as stored, on the same windows: perplexity, Kullback-Leibler
divergence of the next-token distributions, how often both prefer the same token, and the share of the loss that NVFP4
(round-to-nearest weights) costs which a method wins back, with a 95 % bootstrap interval over windows.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.bench.machine import describe_machine
from engine.cli import add_model_options, open_model, run, say
from engine.config import QuantConfig
from engine.errors import InvalidArgument
from engine.quant.registry import FP4_METHODS, bits_per_weight
from engine.weights.locate import DEMO_DIRECTORY

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
    return -_log_softmax(logits)[np.arange(len(logits)), list(targets)]


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Measured:
    """One method's figures over a text."""

    quant: QuantConfig
    losses: list[NDArray[np.float64]]  # per window, nats per scored token
    divergence: float  # mean KL(as stored ‖ method), nats
    agreement: float  # share of positions with the same most probable token

    @property
    def loss(self) -> float:
        return float(np.concatenate(self.losses).mean())


def measure(stored: LLM, other: LLM, token_ids: Sequence[int], window: int, stride: int) -> Measured:
    """Both models over the same windows."""
    losses, divergences, agreements = [], [], []
    for begin, first, end in windows(len(token_ids), window, stride):
        rows = slice(first - begin - 1, -1)
        p, q = (_log_softmax(llm.logits(token_ids[begin:end])[rows]) for llm in (stored, other))
        losses.append(-q[np.arange(len(q)), token_ids[first:end]])
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        agreements.append(p.argmax(axis=1) == q.argmax(axis=1))
    divergence, agreement = np.concatenate(divergences).mean(), np.concatenate(agreements).mean()
    return Measured(other.quant, losses, float(divergence), float(agreement))


def recovered(
    method: Measured, worst: Measured, best: Measured, *, resamples: int = 2000
) -> tuple[float, float, float] | None:
    """1 − (method − best) / (worst − best) in mean loss, and its 2.5 and 97.5 % quantiles under resampled windows.

    None where worst is not worse than best.
    """
    sums = np.array([[window.sum() for window in m.losses] for m in (method, worst, best)])  # [3, windows]
    draws = np.random.default_rng(0).integers(0, sums.shape[1], (resamples, sums.shape[1]))
    samples = np.concatenate([sums.sum(axis=1)[:, None], sums[:, draws].sum(axis=2)], axis=1)
    gap = samples[1] - samples[2]
    if gap[0] <= 0:
        return None
    share = 1 - (samples[0] - samples[2]) / gap
    low, high = np.quantile(share[1:], (0.025, 0.975))
    return float(share[0]), float(low), float(high)


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
    perplexity.set_defaults(main=perplexity_main)
    compare = commands.add_parser("compare", help="quantisation methods beside the model as stored")
    compare.add_argument("--methods", nargs="+", default=list(FP4_METHODS), help="default: all")
    compare.add_argument("--grades", nargs="+", default=["sweep"], help="rtn 4over6 sweep (default: sweep)")
    compare.add_argument("--max-tokens", type=int, help="read no more tokens of the text than this")
    compare.set_defaults(main=compare_main)
    for command in (perplexity, compare):
        command.add_argument("--text", type=Path, help="UTF-8 file (default: the bundled model's held-out text)")
        command.add_argument("--wikitext", action="store_true", help="join lines as WikiText's rows are joined")
        command.add_argument("--window", type=int, help="tokens (default: 2048, or the longest the model allows)")
        command.add_argument("--stride", type=int, help="tokens (default: the window)")
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        add_model_options(command)
    return parser


def _text_of(options: argparse.Namespace) -> tuple[str, str]:
    """The text to score and its file's name."""
    path = options.text or DEMO_DIRECTORY / "heldout.txt"
    return read_text(path, wikitext=options.wikitext), path.name


def _window_of(options: argparse.Namespace, llm: LLM) -> tuple[int, int]:
    window = options.window or min(DEFAULT_WINDOW, llm.max_model_len)
    return window, options.stride or window


def perplexity_main(options: argparse.Namespace) -> None:
    """Print the perplexity with its standard error."""
    text, name = _text_of(options)
    with open_model(options) as llm:
        window, stride = _window_of(options, llm)
        losses = token_losses(llm, llm.encode(text), window, stride)
        report = {
            "model": llm.name,
            "quant": llm.quant.method,
            "text": name,
            "window": window,
            "stride": stride,
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


def compare_main(options: argparse.Namespace) -> None:
    """Print one row per method and grade, in Markdown or as JSON."""
    text, name = _text_of(options)
    wanted = [("nvfp4", "rtn")]  # what shares are measured against
    wanted += [(m, g) for m in options.methods for g in options.grades if (m, g) not in wanted and _has_grade(m, g)]
    options.quant = "bf16"
    with open_model(options) as stored:
        token_ids = stored.encode(text)[: options.max_tokens]
        window, stride = _window_of(options, stored)
        rows = [measure(stored, stored, token_ids, window, stride)]
        for method, grade in wanted:
            options.quant, options.grade = method, grade
            with open_model(options) as other:
                rows.append(measure(stored, other, token_ids, window, stride))
            say(f"{method} {grade}: {rows[-1].loss - rows[0].loss:+.5f} nats per token")
    tokens = sum(map(len, rows[0].losses))
    table = [_row(row, rows) for row in rows]
    if options.json:
        about = {"model": options.model, "text": name, "window": window, "stride": stride, "tokens": tokens}
        print(json.dumps({**about, "dtype": options.dtype, "rows": table, "machine": describe_machine()}, indent=1))
    else:
        print(_markdown(table))


def _has_grade(method: str, grade: str) -> bool:
    return grade != "4over6" or method not in FP4_METHODS or FP4_METHODS[method].format == "nvfp4"


def _row(row: Measured, rows: Sequence[Measured]) -> dict[str, Any]:
    share = recovered(row, rows[1], rows[0])
    return {
        "method": row.quant.method,
        "grade": row.quant.grade if row.quant.method in FP4_METHODS else None,
        "bits_per_weight": bits_per_weight(row.quant),
        "perplexity": round(math.exp(row.loss), 4),
        "added_nats": round(row.loss - rows[0].loss, 6),
        "divergence": round(row.divergence, 6),
        "top1_agreement": round(row.agreement, 5),
        "recovered": None if share is None else [round(value, 4) for value in share],
    }


def _markdown(table: Sequence[dict[str, Any]]) -> str:
    lines = ["| method | grade | bits | perplexity | nats added | KL | same top-1 | gap recovered (95 %) |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in table:
        share = row["recovered"]
        shown = "" if share is None else f"{share[0]:.0%} ({share[1]:.0%} … {share[2]:.0%})"
        lines.append(
            f"| {row['method']} | {row['grade'] or ''} | {row['bits_per_weight'] or 'as stored'} "
            f"| {row['perplexity']:.3f} | {row['added_nats']:+.4f} | {row['divergence']:.4f} "
            f"| {row['top1_agreement']:.2%} | {shown} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = build_parser()
    sys.exit(run(lambda options: options.main(options), parser))
