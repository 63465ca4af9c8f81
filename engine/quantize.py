"""`python -m engine.quantize MODEL OUT`: a model's quantised copy, on disk.

The copy is a directory like the source: weights, config.json with a `quantization_config`, tokenizer, templates. It
says how it was made (method, grade), and loads without quantising again. The source is never touched; OUT appears when
everything is written and has been read back, not before; a run that was interrupted is continued by the same command.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine import __version__
from engine.cli import run, say
from engine.errors import ConfigError, InvalidArgument
from engine.json_file import read_json
from engine.models.linears import EMBEDDING, linear_modules
from engine.models.quantization import MODELOPT_FILE, read_quantization
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.progress import progress_bar
from engine.quant.grades import GRADES
from engine.quant.recipe import Recipe
from engine.quant.registry import HEADS, QUANTISING
from engine.quant.scheme import HEAD
from engine.weights import conversion, export
from engine.weights.checkpoint import Checkpoint
from engine.weights.locate import locate
from engine.weights.quantized import LogicalCheckpoint


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it."""

    out: Path
    quantized: int  # linear layers
    left: tuple[str, ...]  # linear layers that did not fit and stay as stored
    nbytes: int
    source_nbytes: int
    resumed_shards: int


def quantize_model(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    layout: str = "native",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the quantised copy of the model directory `source` to `out`, which must not exist (or be empty).

    progress: called with (bytes of the source done, bytes in all). Raises InvalidArgument, ConfigError, WeightsError,
    NumericalError; whatever is raised, nothing that looks like a model is at `out`.
    """
    export.check(recipe, layout)
    config_json = read_json(source / "config.json", ConfigError)
    config = read_config(config_json, source / "config.json")
    scheme = read_quantization(config_json, source)
    if scheme is not None:
        raise InvalidArgument(f"{source} is quantised already ({scheme.name}); start from the original model")
    out = Path(os.path.abspath(out))  # "." has no name to make a work folder from
    conversion.check_target(out, source)
    linears = linear_modules(config)
    tied = f"{EMBEDDING}.weight" if config.tie_word_embeddings else None
    with Checkpoint(source) as checkpoint:
        plan = conversion.plan_conversion(checkpoint, recipe, export.as_layout(layout), linears, tied, config.head_dim)
        quantized = {item.name.removesuffix(".weight") for item in plan.items if item.kind is not None}
        left = [module for module in linears if module not in quantized]
        described = export.describe(recipe, export.as_layout(layout), left, __version__)
        with conversion.work_folder(out, plan) as work:
            metadata = {"format": "pt", "quant": recipe.quant, "grade": str(recipe.grade), "head": recipe.head}
            resumed = conversion.write_shards(plan, select_backend(), work, metadata, progress)
            conversion.copy_other_files(source, work)
            if described.modelopt is not None:
                conversion.write_text(work / MODELOPT_FILE, json.dumps(described.modelopt, indent=2))
            parts = {"tie_word_embeddings": False} if HEAD in quantized else {}  # a quantised head is a copy
            written = {**config_json, **parts, "quantization_config": described.config}
            conversion.write_text(work / "config.json", json.dumps(written, indent=2))
            with LogicalCheckpoint(work, read_quantization(written, work)) as copy:  # refuses whatever does not agree
                nbytes = copy.nbytes
            conversion.publish(work, out)
        unfit = tuple(name for name in left if name != HEAD or recipe.head_kind is not None)
        return Report(out, len(quantized), unfit, nbytes, checkpoint.nbytes, resumed)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine.quantize", description="Write a model's quantised copy.")
    parser.add_argument("model", help="'demo', directory, repo id or alias")
    parser.add_argument("out", type=Path, help="directory to make")
    parser.add_argument("--quant", required=True, help=" | ".join(QUANTISING))
    parser.add_argument("--grade", help=f"codes and scales: {' | '.join(GRADES)} (default: sweep; fp8: rtn)")
    parser.add_argument("--format", default="native", help=f"{' | '.join(export.LAYOUTS)} (default: %(default)s)")
    parser.add_argument("--quant-head", default="bf16", help=f"{' | '.join(HEADS)} (default: %(default)s, as stored)")
    parser.add_argument("--quant-fallback", help="bf16: layers that do not fit the method stay as stored")
    parser.add_argument("--revision", help="branch, tag or commit of a Hugging Face repo")
    parser.add_argument("-v", "--verbose", action="store_true", help="tracebacks on errors")
    return parser


def main(options: argparse.Namespace) -> None:
    recipe = Recipe(options.quant, options.grade, options.quant_head, options.quant_fallback)
    export.check(recipe, options.format)  # before gigabytes are downloaded
    source = locate(options.model, revision=options.revision)
    if source.note:
        say(source.note)
    with progress_bar("quantising", shown=True) as update:
        report = quantize_model(source.path, options.out, recipe, layout=options.format, progress=update)
    if report.resumed_shards:
        say(f"{report.resumed_shards} shards were there from an earlier run")
    if report.left:
        say(f"as stored, because they do not fit: {', '.join(report.left)}")
    say(
        f"{report.out}: {report.quantized} linear layers in {recipe.body}, grade {recipe.grade}, head {recipe.head}; "
        f"{report.source_nbytes / 1e6:.1f} MB -> {report.nbytes / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    sys.exit(run(main, build_parser()))
