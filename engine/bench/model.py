"""`python -m engine.bench model`: whole models, as llama-bench measures them.

    pp512          tokens per second of a prompt of 512 tokens, in steps of at most 512
    tg128          of 128 tokens generated one by one
    tg128 @ d512   the same after 512 tokens that were there before and are not timed

A step is the model's forward pass with the head on its last row; there is no scheduler, sampler or tokenizer in it
(`llama-cpp` measures what users see). Mean and standard deviation over repetitions in which every test has its turn.
Generating is bound by the weights and the cache that each token reads: the rate at which they were read stands beside
it, with its share of the read bandwidth that was measured first, in a process of its own so that the peak memory
reported is the model's. On a GPU that process is this one, and `--graph-batch` adds what one step of so many sequences
takes as a CUDA graph, without Python:

    step16 @ d512  16 sequences, one new token each, after 512 tokens; tokens per second of all together

The model is a directory or alias, or a shape that gets random weights, quantised layer by
layer as they are made, without a file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.bench.attention import Case
from engine.bench.machine import describe_machine
from engine.bench.report import Row, add_output_options, as_markdown, write_report
from engine.bench.shapes import SHAPES, shape_config
from engine.bench.steps import OneSequence
from engine.bench.synthetic import random_decoder
from engine.bench.timing import BenchDevice, Call, GpuDevice, bench_device, read_bandwidth
from engine.cli import say
from engine.config import EngineConfig, ModelConfig, QuantConfig
from engine.errors import ConfigError, InvalidArgument
from engine.json_file import read_json
from engine.loading import load_model
from engine.memory import peak_memory
from engine.models.decoder import Decoder
from engine.models.quantization import read_quantization
from engine.models.registry import read_config
from engine.ops.contract import Ops
from engine.progress import progress_bar
from engine.quant.registry import resolve
from engine.runner import ModelRunner, activation_dtype, cache_dtype, plan_cache
from engine.weights.locate import locate

_STEP = 512  # tokens of a prompt that are run at once, the engine's own default


@dataclass(frozen=True, slots=True)
class Model:
    """What runs, and how it came to be."""

    decoder: Decoder
    quant: QuantConfig
    dtype: np.dtype[Any]
    kv_dtype: np.dtype[Any]
    embedding_bytes: int  # 0 where the head is the same matrix
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Test:
    """`count` tokens, in one prompt or one by one, after `depth` others."""

    kind: str  # "pp" | "tg"
    count: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.count}" + (f" @ d{self.depth}" if self.depth else "")


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--model", default="demo", help="directory, repo id or alias (default: %(default)s)")
    which.add_argument("--shape", help=f"random weights instead: {' | '.join(SHAPES)}")
    group.add_argument("--quant", default="auto", help="method (default: as the checkpoint; shapes: bf16)")
    group.add_argument("--grade", default=None, help="weight grade (default: sweep; shapes: rtn, as values are random)")
    group.add_argument("--quant-head", help="lm_head: bf16 | fp8 | nvfp4 (default: as the checkpoint)")
    group.add_argument("--quant-fallback", help="bf16: layers that do not fit the method stay as stored")
    group.add_argument("--kv-cache-dtype", default="auto", choices=("auto", "fp8"), help="auto: as the activations")
    group.add_argument("--pp", nargs="*", type=int, default=[512], help="prompt lengths (default: 512)")
    group.add_argument("--tg", nargs="*", type=int, default=[128], help="tokens to generate (default: 128)")
    group.add_argument("--depth", nargs="+", type=int, default=[0], help="tokens there before (default: 0)")
    group.add_argument("--repetitions", type=int, default=5)
    group.add_argument(
        "--graph-batch", nargs="*", type=int, default=[], help="GPU: sequences of a step as a CUDA graph"
    )
    device = "auto | cpu | numpy | cuda | cuda:extension (default: %(default)s)"
    group.add_argument("--device", default="auto", help=device)
    group.add_argument("--deterministic", action="store_true", help="GPU: prompts in answers' order of sums")
    group.add_argument("--threads", type=int, help="CPU threads (default: physical cores this process may use)")
    add_output_options(parser)


def main(options: argparse.Namespace) -> None:
    """Load, measure, print."""
    tests = list(_tests(options))
    device = bench_device(options.device, options.threads, options.deterministic)
    if options.graph_batch and not isinstance(device, GpuDevice):
        raise InvalidArgument("--graph-batch needs --device cuda")
    bandwidth = read_bandwidth(device, *device.reader()) if isinstance(device, GpuDevice) else _bandwidth(options)
    say(f"{device.ops.kernel_path}: memory read at {bandwidth / 1e9:.1f} GB/s")
    model = _load(options, device.ops)
    longest = max((test.depth + test.count for test in tests), default=2)
    sequence = OneSequence(model.decoder, device.ops, model.dtype, longest, model.kv_dtype)
    config = model.decoder.config
    rates = measure(sequence, tests, device, options.repetitions, config.vocab_size) if tests else {}
    rows = [_row(test, rates[test], model, bandwidth) for test in tests]
    for S in options.graph_batch:
        rows += [graph_row(S, depth, model, device, bandwidth, options.repetitions) for depth in options.depth]
    weights = model.decoder.weight_bytes + model.embedding_bytes
    name = options.shape or options.model
    report = {
        "what": "tokens per second of a model's steps, mean and standard deviation over repetitions",
        "model": name if options.shape else Path(name).name,
        "random_weights": bool(options.shape),
        "quant": model.quant.method,
        "grade": model.quant.grade,
        "head": model.quant.head,
        "kv_cache_dtype": str(model.kv_dtype),
        "kernel_path": device.ops.kernel_path,
        "read_gb_per_s": round(bandwidth / 1e9, 2),
        "load_seconds": round(model.load_seconds, 2),
        "weight_bytes": weights,
        "cache_bytes": sequence.cache_bytes,
        "peak_rss_bytes": peak_memory(),
        "peak_rss_limit_bytes": int(1.3 * weights) + sequence.cache_bytes + 200_000_000,
        "notes": device.notes,
        "rows": rows,
        "machine": describe_machine(),
    }
    write_report(options, report, as_table(report))


def _tests(options: argparse.Namespace) -> Iterator[Test]:
    """Raises InvalidArgument where there is nothing to measure."""
    if not options.pp and not options.tg and not options.graph_batch:
        raise InvalidArgument("nothing to measure: give --pp or --tg a length")
    if min([*options.pp, *options.tg, *options.graph_batch, options.repetitions]) < 1 or min(options.depth) < 0:
        raise InvalidArgument("--pp, --tg and --repetitions count from 1, --depth from 0")
    for depth in options.depth:
        yield from (Test("pp", count, depth) for count in options.pp)
        yield from (Test("tg", count, depth) for count in options.tg)


def _bandwidth(options: argparse.Namespace) -> float:
    """Measured elsewhere: its buffer would count as this process's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        return other.submit(_bandwidth_here, options.device, options.threads).result()


def _bandwidth_here(device_name: str, threads: int | None) -> float:
    device = bench_device(device_name, threads)
    return read_bandwidth(device, *device.reader())


def _load(options: argparse.Namespace, ops: Ops) -> Model:
    start = time.perf_counter()
    asked = QuantConfig(options.quant, options.grade, options.quant_fallback, head=options.quant_head)
    if options.shape:
        config = shape_config(options.shape)
        quant = resolve(QuantConfig(asked.method, asked.grade or "rtn", asked.fallback, head=asked.head), None)
        dtype = activation_dtype("auto", config.dtype)
        decoder = random_decoder(config, ops, dtype, quant)
    else:
        path = Path(locate(options.model).path)
        config_json = read_json(path / "config.json", ConfigError)
        config, scheme = read_config(config_json, path / "config.json"), read_quantization(config_json, path)
        quant = resolve(asked, scheme, tied_head=config.tie_word_embeddings)
        dtype = activation_dtype("auto", config.dtype)
        bar = partial(progress_bar, shown=True)
        decoder = load_model(config, path, ops, dtype, quant, scheme, cache=False, progress=bar).model
    seconds = time.perf_counter() - start
    kv_dtype = cache_dtype(options.kv_cache_dtype, dtype)
    return Model(decoder, quant, dtype, kv_dtype, _embedding_bytes(config, quant), seconds)


def _embedding_bytes(config: ModelConfig, quant: QuantConfig) -> int:
    shared = config.tie_word_embeddings and quant.head == "bf16"
    return 0 if shared else config.vocab_size * config.hidden_size * (4 if config.dtype == "float32" else 2)


def measure(
    sequence: OneSequence, tests: list[Test], device: BenchDevice, repetitions: int, V: int
) -> dict[Test, list[float]]:
    """Tokens per second of each test in each repetition; one more repetition comes first and does not count.

    All tests run parts of one random text, so what a test writes to the cache is what was there.
    """
    tokens = np.random.default_rng(0).integers(0, V, max(test.depth + test.count for test in tests)).tolist()
    for call in _prompt(sequence, tokens, 0, max(test.depth for test in tests)):
        call()
    rates: dict[Test, list[float]] = {test: [] for test in tests}
    for repetition in range(repetitions + 1):
        for test in tests:
            steps = _prompt if test.kind == "pp" else _one_by_one
            seconds = device.seconds(list(steps(sequence, tokens, test.depth, test.depth + test.count)))
            if repetition:
                rates[test].append(test.count / seconds)
        say(f"repetition {repetition} of {repetitions}")
    return rates


def _prompt(sequence: OneSequence, tokens: list[int], begin: int, end: int) -> Iterator[Call]:
    """Steps of up to _STEP tokens; the last also predicts."""
    for start in range(begin, end, _STEP):
        stop = min(start + _STEP, end)
        step = sequence.predict if stop == end else sequence.run
        yield partial(step, tokens[start:stop], start, prompt_tokens=end - begin)


def _one_by_one(sequence: OneSequence, tokens: list[int], begin: int, end: int) -> Iterator[Call]:
    for position in range(begin, end):
        yield partial(sequence.predict, tokens[position : position + 1], position)


def _row(test: Test, rates: list[float], model: Model, bandwidth: float) -> Row:
    mean = statistics.fmean(rates)
    read = None if test.kind == "pp" else mean * bytes_per_token(test, model)
    return {
        "test": test.name,
        "tokens_per_s": round(mean, 2),
        "std": round(statistics.stdev(rates), 2) if len(rates) > 1 else None,
        "gb_per_s": None if read is None else round(read / 1e9, 2),
        "of_ceiling": None if read is None else round(read / bandwidth, 3),
        "repetitions": len(rates),
    }


def graph_row(S: int, depth: int, model: Model, device: BenchDevice, bandwidth: float, repetitions: int) -> Row:
    """A step of S sequences, captured once and repeated: its first layer writes K and V that are there already."""
    config = model.decoder.config
    plan = plan_cache(config, EngineConfig(max_model_len=depth + 2, max_num_seqs=S), device.ops, model.kv_dtype)
    runner = ModelRunner(model.decoder, device.ops, plan, model.dtype)
    batch = Case(S, depth + 1, 1).batch(plan.block_size)

    def step() -> None:
        model.decoder.logits(model.decoder.forward(batch, runner.cache))

    turn = device.turn([step], 1)
    seconds = [turn() for _ in range(repetitions + 1)][1:]
    rates = [S / time for time in seconds]
    read = (model.decoder.weight_bytes + S * kv_bytes_per_token(model) * (depth + 1)) / statistics.fmean(seconds)
    return {
        "test": f"step{S}" + (f" @ d{depth}" if depth else ""),
        "tokens_per_s": round(statistics.fmean(rates), 2),
        "std": round(statistics.stdev(rates), 2) if len(rates) > 1 else None,
        "gb_per_s": round(read / 1e9, 2),
        "of_ceiling": round(read / bandwidth, 3),
        "repetitions": len(rates),
    }


def kv_bytes_per_token(model: Model) -> int:
    config = model.decoder.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.kv_dtype.itemsize


def bytes_per_token(test: Test, model: Model) -> float:
    """What a generated token must read, on average over the test: all weights, K and V so far (windows aside)."""
    return model.decoder.weight_bytes + kv_bytes_per_token(model) * (test.depth + (test.count + 1) / 2)


def as_table(report: dict[str, Any]) -> str:
    """The model, the tests, the memory."""
    weights = "random weights" if report["random_weights"] else "as loaded"
    grade = f", grade {report['grade']}" if report["grade"] else ""
    about = (
        f"{report['model']} ({weights}): {report['quant']}{grade}, head {report['head']}, K and V "
        f"{report['kv_cache_dtype']}; {report['kernel_path']}; memory read at {report['read_gb_per_s']} GB/s. "
        f"{report['machine']['cpu']}"
    )
    lines = [
        [
            row["test"],
            f"{row['tokens_per_s']:.2f}" + ("" if row["std"] is None else f" ± {row['std']:.2f}"),
            None if row["gb_per_s"] is None else f"{row['gb_per_s']:.1f}",
            None if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}",
        ]
        for row in report["rows"]
    ]
    memory = (
        f"weights {report['weight_bytes'] / 1e6:.0f} MB, cache {report['cache_bytes'] / 1e6:.0f} MB, peak memory "
        f"{report['peak_rss_bytes'] / 1e6:.0f} MB (1.3 x weights + cache + 200 MB = "
        f"{report['peak_rss_limit_bytes'] / 1e6:.0f} MB); loaded in {report['load_seconds']:.1f} s"
    )
    table = as_markdown(["test", "tokens/s", "GB/s of weights and cache", "of the ceiling"], lines)
    return f"{about}\n\n{table}\n\n{memory}"
