"""`python -m engine.bench attention`: paged attention, for decoding and for prompts.

    decode S = 16, 4096   16 sequences, one new token each, 4096 tokens in the cache: bound by reading K and V,
                          whose GB/s stand beside the read bandwidth measured first
    prefill 2048          one prompt of 2048 tokens: bound by arithmetic, 2 H D T (T + 1) operations

Layers take turns, so that the K and V of each are cold when their turn comes. Values are random. Times are medians over
rounds in which the read bandwidth has its turn, too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from engine.bench.machine import describe_machine
from engine.bench.report import Row, add_output_options, as_markdown, write_report
from engine.bench.shapes import SHAPES, any_config
from engine.bench.steps import decode_rows
from engine.bench.timing import BenchDevice, Call, bench_device, copies_for, interleaved, read_bandwidth
from engine.cli import say
from engine.config import ModelConfig
from engine.core import Batch
from engine.errors import InvalidArgument
from engine.runner import cache_dtype

BF16 = np.dtype(ml_dtypes.bfloat16)
_FILL_ROWS = 4096  # tokens whose K and V are written at once
_MEMORY_SHARE = 0.5  # of what is available
_CEILING = "read"


@dataclass(frozen=True, slots=True)
class Case:
    """S sequences of `context` tokens, of which `new` are this step's."""

    S: int
    context: int
    new: int

    @property
    def name(self) -> str:
        return f"prefill {self.new}" if self.new > 1 else f"decode S = {self.S}, {self.context}"

    def kv_bytes(self, config: ModelConfig, dtype: np.dtype[Any]) -> int:
        return self.S * self.context * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize

    def operations(self, config: ModelConfig) -> int:
        """Multiplications and additions of q·k and p·v."""
        seen = sum(range(self.context - self.new + 1, self.context + 1))
        return self.S * 4 * config.num_heads * config.head_dim * seen

    def batch(self, block_size: int) -> Batch:
        """Sequence s has the blocks from s · B on."""
        B = -(-self.context // block_size)
        starts = np.arange(self.S, dtype=np.int32) * B * block_size
        positions = np.arange(self.context - self.new, self.context, dtype=np.int32)
        rows = self.S * self.new
        return Batch(
            token_ids=np.zeros(rows, np.int32),
            positions=np.tile(positions, self.S),
            slot_mapping=(starts[:, None] + positions).reshape(-1).astype(np.int32),
            query_start=np.arange(0, rows + 1, self.new, dtype=np.int32),
            context_lens=np.full(self.S, self.context, np.int32),
            block_tables=np.arange(self.S * B, dtype=np.int32).reshape(self.S, B),
            logit_rows=np.arange(self.new - 1, rows, self.new, dtype=np.int32),
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument("--model", default="qwen2.5-7b", help=f"shape ({', '.join(SHAPES)}) or directory")
    group.add_argument("--context", nargs="*", type=int, default=[512, 4096, 32768], help="of decoding sequences")
    group.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="decoding sequences (default: 1 16)")
    group.add_argument("--prefill", nargs="*", type=int, default=[512, 2048, 8192], help="prompt lengths")
    group.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"), help="auto: bfloat16")
    group.add_argument("--device", default="auto", help="auto | cpu | cuda | cuda:extension (default: %(default)s)")
    group.add_argument("--deterministic", action="store_true", help="GPU: prompts in answers' order of sums")
    group.add_argument("--threads", type=int, help="CPU threads (default: physical cores this process may use)")
    group.add_argument("--seconds", type=float, default=0.5, help="for each case (default: %(default)s)")
    add_output_options(parser)


def main(options: argparse.Namespace) -> None:
    """Measure, print."""
    lengths = [*options.context, *options.prefill, *options.batch]
    if not lengths or min(lengths) < 1:
        raise InvalidArgument("--context, --batch and --prefill count from 1")
    config, kv = any_config(options.model), cache_dtype(options.kv_cache_dtype, BF16)
    cases = [Case(S, context, 1) for context in options.context for S in options.batch]
    cases += [Case(1, T, T) for T in options.prefill]
    device = bench_device(options.device, options.threads, options.deterministic)
    reader, read_bytes = device.reader()
    ceiling = read_bandwidth(device, reader, read_bytes)
    say(f"{device.ops.kernel_path}: memory read at {ceiling / 1e9:.1f} GB/s")
    rows: list[Row] = []
    skipped: list[str] = []
    for case in cases:
        if 2 * case.kv_bytes(config, kv) > device.available_memory() * _MEMORY_SHARE:
            skipped.append(f"{case.name}: {case.kv_bytes(config, kv) / 1e9:.1f} GB of K and V do not fit")
            say(f"skipped: {skipped[-1]}")
            continue
        say(case.name)
        subjects = {_CEILING: [reader], case.name: list(_calls(case, config, kv, device))}
        rows.append(_row(case, config, kv, interleaved(device, subjects, options.seconds), read_bytes))
    report = {
        "what": "attention over a paged cache: medians over interleaved rounds",
        "model": options.model,
        "kv_cache_dtype": str(kv),
        "kernel_path": device.ops.kernel_path,
        "read_gb_per_s": round(ceiling / 1e9, 2),
        "skipped": skipped,
        "notes": device.notes,
        "rows": rows,
        "machine": describe_machine(),
    }
    write_report(options, report, as_table(report))


def _calls(case: Case, config: ModelConfig, kv: np.dtype[Any], device: BenchDevice) -> Iterator[Call]:
    """One per layer, each with a cache of its own."""
    ops, H, KVH, D = device.ops, config.num_heads, config.num_kv_heads, config.head_dim
    layers = copies_for(case.kv_bytes(config, kv), device.rotation_bytes)
    batch = replace(case.batch(ops.kv_block_size), num_decode_rows=decode_rows(case.new, ops))
    blocks = batch.block_tables.size
    cache = ops.new_kv_cache(
        num_layers=layers, num_blocks=blocks, num_kv_heads=KVH, head_dim=D, dtype=kv, activations=BF16
    )
    slots = blocks * ops.kv_block_size
    values = np.random.default_rng(2).standard_normal((min(slots, _FILL_ROWS), (H + 2 * KVH) * D), np.float32)
    qkv = device.array(values.astype(BF16))
    for layer in range(layers):
        _fill(cache, layer, slots, qkv, config, device)
    rows = case.S * case.new
    q = device.array(np.random.default_rng(1).standard_normal((rows, H * D), np.float32).astype(BF16))
    out = ops.empty((rows, H * D), BF16)
    staged = ops.stage(batch)
    attend = partial(ops.attention, q, staged, cache, scale=D**-0.5, window=None, out=out)
    for layer in range(layers):
        yield partial(attend, layer)


def _fill(cache: Any, layer: int, slots: int, qkv: Any, config: ModelConfig, device: BenchDevice) -> None:
    """K and V of qkv's rows in every slot."""
    ops, H, D = device.ops, config.num_heads, config.head_dim
    table = device.array(np.ones((1, D), np.float32))
    for start in range(0, slots, _FILL_ROWS):
        count = min(_FILL_ROWS, slots - start)
        whole = np.arange(start, start + count, dtype=np.int32)
        batch = Batch(
            token_ids=np.zeros(count, np.int32),
            positions=np.zeros(count, np.int32),  # the table's only row
            slot_mapping=whole,
            query_start=np.array([0, count], np.int32),
            context_lens=np.array([count], np.int32),
            block_tables=np.zeros((1, 1), np.int32),
            logit_rows=np.zeros(1, np.int32),
        )
        out = ops.empty((count, H * D), BF16)
        ops.rope_and_cache(
            qkv[:count], table, ops.stage(batch), cache, layer, q_norm=None, k_norm=None, eps=0.0, out=out
        )


def _row(case: Case, config: ModelConfig, kv: np.dtype[Any], times: dict[str, list[float]], read_bytes: int) -> Row:
    seconds = times[case.name]
    nbytes = case.kv_bytes(config, kv)
    decode = case.new == 1
    shares = [nbytes / own / (read_bytes / read) for own, read in zip(seconds, times[_CEILING], strict=True)]
    median = statistics.median(seconds)
    return {
        "test": case.name,
        "S": case.S,
        "context": case.context,
        "new": case.new,
        "microseconds": round(median * 1e6, 2),
        "bytes": nbytes,
        "gb_per_s": round(nbytes / median / 1e9, 2) if decode else None,
        "of_ceiling": round(statistics.median(shares), 3) if decode else None,
        "tflop_per_s": None if decode else round(case.operations(config) / median / 1e12, 3),
        "rounds": len(seconds),
    }


def as_table(report: dict[str, Any]) -> str:
    about = (
        f"{report['model']}, K and V {report['kv_cache_dtype']}: {report['kernel_path']}; "
        f"memory read at {report['read_gb_per_s']} GB/s"
    )
    columns = ["test", "µs", "MB of K and V", "GB/s", "of the ceiling", "TFLOP/s"]
    lines: list[Sequence[object]] = [
        [
            row["test"],
            f"{row['microseconds']:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
            row["gb_per_s"],
            None if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}",
            row["tflop_per_s"],
        ]
        for row in report["rows"]
    ]
    return "\n\n".join([about, as_markdown(columns, lines), *(f"skipped: {reason}" for reason in report["skipped"])])
