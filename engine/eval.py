"""`python -m engine.eval`: how well a model predicts a text.

`perplexity` cuts the text's tokens into windows and scores each token given those before it in its window. A stride
below the window gives every token at least window − stride tokens of context and costs window / stride times as much.
With the default stride (= window) the first token of each window has no context and is not scored, and an incomplete
last window is dropped, which is how the literature reports WikiText-2 at 2048 tokens.

`compare` puts quantisation methods beside the model as stored, on the same windows: perplexity, Kullback-Leibler
divergence of the next-token distributions, how often both prefer the same token, and the share of the loss that NVFP4
(round-to-nearest weights) costs which a method wins back, with a 95 % bootstrap interval over windows.

`layers` shows where a method hurts: the error of each linear layer's output on its real input, see
`engine.layer_errors`.
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
from engine.bench.report import as_markdown, distinct_colors, load_pyplot
from engine.cli import add_model_options, open_model, run, say
from engine.config import QuantConfig
from engine.errors import ConfigError, InvalidArgument
from engine.json_file import read_json
from engine.layer_errors import LayerError, kind_and_depth, layer_errors, pooled
from engine.models.quantization import read_quantization
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.quant.grades import has_grade
from engine.quant.registry import FP4_METHODS, QUANTISING, bits_per_weight, resolve
from engine.runner import activation_dtype
from engine.tokenizer import Tokenizer
from engine.weights.locate import DEMO_DIRECTORY, locate

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
    compare.add_argument("--max-tokens", type=int, help="read no more tokens of the text than this")
    compare.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the table (needs matplotlib)")
    compare.set_defaults(main=compare_main)
    layers = commands.add_parser("layers", help="output error of each linear layer on its real input")
    layers.add_argument("--max-tokens", type=int, default=8192, help="of the text (default: %(default)s)")
    layers.set_defaults(main=layers_main)
    for command in (compare, layers):
        command.add_argument("--methods", nargs="+", default=list(QUANTISING), help="default: all")
        command.add_argument("--grades", nargs="+", default=["sweep"], help="rtn 4over6 sweep gram (default: sweep)")
    for command in (perplexity, compare, layers):
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
            "kv_cache_dtype": options.kv_cache_dtype,
            "kernel_path": llm.kernel_path,
        }
    if options.json:
        print(json.dumps(report))
    else:
        print(f"perplexity {report['perplexity']:.4f}")
        say(f"{report['nats_per_token']:.5f} ± {report['standard_error']:.5f} nats per token over {len(losses)} tokens")


def compare_main(options: argparse.Namespace) -> None:
    """Print one row per method and grade, in Markdown or as JSON."""
    pyplot = load_pyplot(options.plot)
    text, name = _text_of(options)
    reference: tuple[str, str | None] = ("nvfp4", "rtn")  # what shares are measured against
    wanted = [reference, *(pair for pair in methods_and_grades(options) if pair != reference)]
    options.quant = "bf16"
    with open_model(options) as stored:
        token_ids = stored.encode(text)[: options.max_tokens]
        window, stride = _window_of(options, stored)
        rows = [measure(stored, stored, token_ids, window, stride)]
        for method, grade in wanted:
            options.quant, options.grade = method, grade
            with open_model(options) as other:
                rows.append(measure(stored, other, token_ids, window, stride))
            say(f"{_label(method, grade)}: {rows[-1].loss - rows[0].loss:+.5f} nats per token")
    tokens = sum(map(len, rows[0].losses))
    table = [_row(row, rows) for row in rows]
    if options.json:
        about = {"model": options.model, "text": name, "window": window, "stride": stride, "tokens": tokens}
        about |= {"dtype": options.dtype, "kv_cache_dtype": options.kv_cache_dtype}  # of all alike
        print(json.dumps({**about, "rows": table, "machine": describe_machine()}, indent=1))
    else:
        print(_markdown(table))
    if pyplot is not None:
        plot_comparison(pyplot, table, options.plot)


def methods_and_grades(options: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Each method with the grades its format has; fp8 has none."""
    for method in options.methods:
        rule = FP4_METHODS.get(method)
        if rule is None:
            yield method, None
            continue
        yield from ((method, grade) for grade in options.grades if has_grade(rule.format, grade))


def _row(row: Measured, rows: Sequence[Measured]) -> dict[str, Any]:
    share = recovered(row, rows[1], rows[0])
    return {
        "method": row.quant.method,
        "grade": row.quant.grade,
        "bits_per_weight": bits_per_weight(row.quant),
        "perplexity": round(math.exp(row.loss), 4),
        "added_nats": round(row.loss - rows[0].loss, 6),
        "divergence": round(row.divergence, 6),
        "top1_agreement": round(row.agreement, 5),
        "recovered": None if share is None else [round(value, 4) for value in share],
    }


def _markdown(table: Sequence[dict[str, Any]]) -> str:
    columns = ["method", "grade", "bits", "perplexity", "nats added", "KL", "same top-1", "gap recovered (95 %)"]
    lines = []
    for row in table:
        share = row["recovered"]
        lines.append(
            [
                row["method"],
                row["grade"],
                row["bits_per_weight"] or "as stored",
                f"{row['perplexity']:.3f}",
                f"{row['added_nats']:+.4f}",
                f"{row['divergence']:.4f}",
                f"{row['top1_agreement']:.2%}",
                None if share is None else f"{share[0]:.0%} ({share[1]:.0%} … {share[2]:.0%})",
            ]
        )
    return as_markdown(columns, lines)


def plot_comparison(pyplot: Any, table: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity over bits per weight, the model as stored as a line; beside it, in the same colours, the shares."""
    stored, *rows = table
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 2 + 0.3 * len(rows)), layout="constrained")
    left.axhline(stored["perplexity"], linestyle="--", color="gray", label="as stored")
    for place, (row, color) in enumerate(zip(rows, distinct_colors(pyplot, len(rows)), strict=True)):
        left.plot(row["bits_per_weight"], row["perplexity"], "o", color=color)
        if row["recovered"] is not None:
            share, low, high = row["recovered"]
            spread = [[max(0, share - low)], [max(0, high - share)]]
            right.errorbar(share, place, xerr=spread, fmt="o", capsize=3, color=color)
    left.set(xlabel="bits per weight", ylabel="perplexity")
    left.legend()
    right.set_yticks(range(len(rows)), [_label(row["method"], row["grade"]) for row in rows])
    right.invert_yaxis()
    right.set(xlabel="share of NVFP4's added loss won back, 95 % interval")
    figure.savefig(path)
    pyplot.close(figure)


def _label(method: str, grade: str | None) -> str:
    return f"{method} {grade}" if grade else method


def layers_main(options: argparse.Namespace) -> None:
    """Print errors by kind and by depth for every method and grade; all layers' errors as JSON."""
    if options.kv_cache_dtype != "auto":
        raise InvalidArgument("layers measures linear layers on their real inputs; leave --kv-cache-dtype at auto")
    text, name = _text_of(options)
    path = Path(locate(options.model, revision=options.revision).path)
    config_json = read_json(path / "config.json", ConfigError)
    config = read_config(config_json, path / "config.json")
    if read_quantization(config_json, path) is not None:
        raise InvalidArgument(f"{options.model} is quantised already; errors are measured against the original model")
    ops = select_backend(options.device, options.threads)
    token_ids = Tokenizer.from_directory(path).encode(text)[: options.max_tokens]
    window = options.window or min(DEFAULT_WINDOW, config.max_position_embeddings)
    texts = [token_ids[begin:end] for begin, _, end in windows(len(token_ids), window, options.stride or window)]
    found: list[tuple[QuantConfig, dict[str, LayerError]]] = []
    for method, grade in methods_and_grades(options):
        quant = resolve(
            QuantConfig(method, grade, options.quant_fallback, options.sharq_scale, options.sharq_compat), None
        )
        dtype = activation_dtype(options.dtype, config.dtype)
        found.append((quant, layer_errors(path, config, ops, dtype, quant, texts)))
        say(f"{_label(method, grade)}: done")
    if options.json:
        about = {"model": options.model, "text": name, "window": window, "tokens": sum(map(len, texts))}
        rows = [row for quant, errors in found for row in _layer_rows(quant, errors)]
        print(json.dumps({**about, "dtype": options.dtype, "rows": rows, "machine": describe_machine()}, indent=1))
    else:
        print(_layer_tables(found))


def _layer_rows(quant: QuantConfig, errors: dict[str, LayerError]) -> Iterator[dict[str, Any]]:
    for module, error in errors.items():
        kind, depth = kind_and_depth(module)
        about = {"method": quant.method, "grade": quant.grade, "layer": module, "kind": kind, "depth": depth}
        yield {**about, "error": round(error.relative, 6)}


def _layer_tables(found: Sequence[tuple[QuantConfig, dict[str, LayerError]]]) -> str:
    """Errors by kind of layer, a line per method; and by depth, a column per method."""
    kinds = [pooled(errors, "kind") for _, errors in found]
    by_kind = [
        [quant.method, quant.grade, *(f"{error:.2%}" for error in own.values())]
        for (quant, _), own in zip(found, kinds, strict=True)
    ]
    depths = [pooled(errors, "depth") for _, errors in found]
    by_depth = [[depth, *(f"{own[depth]:.2%}" for own in depths)] for depth in depths[0]]
    names = [_label(quant.method, quant.grade) for quant, _ in found]
    return f"{as_markdown(['method', 'grade', *kinds[0]], by_kind)}\n\n{as_markdown(['layer', *names], by_depth)}"


if __name__ == "__main__":
    parser = build_parser()
    sys.exit(run(lambda options: options.main(options), parser))
