"""How results leave: a table for people, CSV or JSON on stdout, a JSON file to commit, a plot.

A report is one JSON object: what was measured, the `rows`, the machine with its versions. Files under `results/` are
such objects, named after the subject and what distinguishes the run (`gemm_qwen2.5-7b.json`).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import InvalidArgument

Row = dict[str, Any]


def add_output_options(parser: argparse.ArgumentParser, *, plot: bool = False) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", choices=("md", "csv", "json"), default="md", help="on stdout (default: md)")
    group.add_argument("--save", type=Path, metavar="FILE.json", help="also write the JSON report to a file")
    if plot:
        group.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the figures (needs matplotlib)")


def write_report(options: argparse.Namespace, report: dict[str, Any], table: str) -> None:
    """Save and print. report has `rows` alike in their keys; table: what people read instead."""
    text = json.dumps(report, indent=1)
    if options.save:
        options.save.write_text(text + "\n")
    print({"md": table, "csv": as_csv(report["rows"]), "json": text}[options.output])


def as_csv(rows: Sequence[Row]) -> str:
    """A header and one line per row; None is an empty field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def as_markdown(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A table; None is an empty cell."""
    cells = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in cells)


def load_pyplot(path: Path | None) -> Any:
    """matplotlib.pyplot, drawing to files; None without a path.

    Ask before measuring. Raises InvalidArgument where matplotlib is missing, or the file's directory is.
    """
    if path is None:
        return None
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise InvalidArgument(f"--plot needs matplotlib ({error}): pip install 'sharq-engine[bench]'") from None
    if not path.absolute().parent.is_dir():
        raise InvalidArgument(f"--plot {path}: there is no directory {path.absolute().parent}")
    matplotlib.use("agg")
    return pyplot


def distinct_colors(pyplot: Any, count: int) -> list[Any]:
    """As many colours as needed; the default cycle repeats after ten."""
    return [pyplot.get_cmap("turbo")((i + 0.5) / count) for i in range(count)]
