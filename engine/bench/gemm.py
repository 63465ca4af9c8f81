"""`python -m engine.bench gemm`: the matrix products of a decode step, every method beside bf16.

The matrices are those of real models: q|k|v, output, gate|up, down and the head, with 1 to 64 rows of activations. At
so few rows a product takes as long as its weights take to be read, so the machine's read bandwidth is measured first,
and again in every round, and each figure comes with its share of it. Weights are used in rotation, from sets twice as
large as the last-level cache, because in a model each layer's weights were last seen a whole step ago. What a method
does to activations beforehand (with the norm or the SwiGLU that it is fused with) has rows of its own. On a GPU,
NVIDIA's libraries are measured beside the methods where they are installed: cuBLAS in bf16, cuBLASLt in FP8; beside
SharQ its sparse path alone (`engine.bench.backbone`); and more than 64 rows (`--m 256 1024`) are multiplied as those of
a prompt are, by kernels of their own.

A product's bytes are its weights'. A preparation's are what it reads and writes; up to 64 rows it finds its input where
the layer before has left it, in a cache, and of more rows it takes inputs in rotation too.

Values are random and repeat every 256 rows: they do not change how long a product takes. Times are medians over rounds
in which every method has its turn, Python's part of a call included; ratios and shares are medians of the ratios within
a round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from engine.bench import backbone
from engine.bench.cublas import BF16_PEER, FP8_PEER, Peer, peers
from engine.bench.machine import describe_machine
from engine.bench.report import Row, add_output_options, as_markdown, distinct_colors, load_pyplot, write_report
from engine.bench.shapes import SHAPES, any_config, fused_linears
from engine.bench.steps import decode_rows
from engine.bench.synthetic import random_weight
from engine.bench.timing import BenchDevice, Call, GpuDevice, bench_device, copies_for, interleaved, read_bandwidth
from engine.cli import say
from engine.config import QuantConfig
from engine.errors import DeviceError, InvalidArgument
from engine.ops.contract import Array
from engine.quant.method import LinearMethod
from engine.quant.registry import AS_STORED, METHODS, LayerMethods, bits_per_weight, resolve
from engine.workspace import Workspace

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYERS = ("qkv", "o", "gate_up", "down", "head")
_CEILING = "read"
_IN_CACHE = 64  # rows up to which activations stay in a cache from one layer to the next
_OPERAND_ARRAYS = (
    "g", "backbone", "meta", "backbone_scale", "residual", "residual_scale", "payload", "codes", "scale"
)  # fmt: skip
_MEMORY_SHARE = 0.9  # of what is available: the rest is for the operating system and for what the estimate leaves out


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of one model."""

    model: str
    layer: str
    N: int
    K: int

    def weight_bytes(self, method: str) -> int:
        """Codes and block scales, without a layout's padding."""
        return int(self.N * self.K * (bits_per_weight(QuantConfig(method)) or 16) / 8)


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what")
    group.add_argument(
        "--model",
        nargs="+",
        default=["qwen2.5-0.5b"],
        help=f"shapes ({', '.join(SHAPES)}) or model directories (default: qwen2.5-0.5b)",
    )
    group.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all")
    group.add_argument("--m", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64], help="rows (default: 1 2 4 … 64)")
    group.add_argument("--methods", nargs="+", default=list(METHODS), help=f"default: {' '.join(METHODS)}")
    device = "auto | cpu | numpy | cuda | cuda:extension (default: %(default)s)"
    group.add_argument("--device", default="auto", help=device)
    group.add_argument("--deterministic", action="store_true", help="GPU: prompts in answers' order of sums")
    group.add_argument("--no-peers", action="store_true", help="GPU: leave NVIDIA's libraries out")
    group.add_argument("--threads", type=int, help="CPU threads (default: physical cores this process may use)")
    group.add_argument("--seconds", type=float, default=0.5, help="for each matrix and M (default: %(default)s)")
    add_output_options(parser, plot=True)


@dataclass(frozen=True, slots=True)
class Setup:
    """What every measurement shares."""

    device: BenchDevice
    reader: Call  # the ceiling: reads read_bytes of memory
    read_bytes: int
    Ms: Sequence[int]
    seconds: float  # for all methods on one matrix and M
    peers: Mapping[str, Peer]


def main(options: argparse.Namespace) -> None:
    """Measure all products that fit the memory; say which were left out, and why."""
    pyplot = load_pyplot(options.plot)
    if min(options.m) < 1:
        raise InvalidArgument(f"--m counts rows: at least 1, not {min(options.m)}")
    quants = {name: resolve(QuantConfig(name, "rtn"), None) for name in options.methods}
    products = list(_products(options.model, options.layers))
    device = bench_device(options.device, options.threads, options.deterministic)
    found, missing = ({}, []) if options.no_peers else _peers(device)
    setup = Setup(device, *device.reader(), options.m, options.seconds, found)
    ceiling = read_bandwidth(device, setup.reader, setup.read_bytes)
    say(f"{device.ops.kernel_path}: memory read at {ceiling / 1e9:.1f} GB/s")
    rows: list[Row] = []
    skipped: list[str] = missing
    for product in products:
        methods, reasons = fitting(product, quants, device)
        for reason in reasons:
            skipped.append(f"{product.model} {product.layer}: {reason}")
            say(f"skipped: {skipped[-1]}")
        if methods:
            rows += measure(product, methods, setup)
    report = {
        "what": "matrix products of a decode step: medians over interleaved rounds",
        "kernel_path": device.ops.kernel_path,
        "read_gb_per_s": round(ceiling / 1e9, 2),
        "rotation_bytes": device.rotation_bytes,
        "skipped": skipped,
        "notes": device.notes,
        "rows": rows,
        "machine": describe_machine(),
    }
    write_report(options, report, as_tables(report))
    if pyplot is not None:
        plot(pyplot, report, options.plot)


def _peers(device: BenchDevice) -> tuple[dict[str, Peer], list[str]]:
    return peers(device.device) if isinstance(device, GpuDevice) else ({}, [])


def _products(models: Sequence[str], layers: Sequence[str]) -> Iterator[Product]:
    for model in models:
        for layer, (N, K) in fused_linears(any_config(model)).items():
            if layer in layers:
                yield Product(Path(model).name, layer, N, K)


def fitting(
    product: Product, quants: Mapping[str, QuantConfig], device: BenchDevice
) -> tuple[dict[str, LinearMethod], list[str]]:
    """The methods that can run this product, and why others cannot; none where memory does not suffice for all."""
    methods: dict[str, LinearMethod] = {}
    reasons = []
    for name, quant in quants.items():
        try:
            methods[name] = LayerMethods(quant, device.ops, Workspace(device.ops))((product.layer,), product.K)
        except InvalidArgument as error:  # K does not fit its blocks
            reasons.append(str(error))
    needed = memory_needed(product, methods, device.rotation_bytes)
    available = int(device.available_memory() * _MEMORY_SHARE)
    if needed > available:
        return {}, [f"needs {needed / 1e9:.2f} GB and {available / 1e9:.2f} GB are free; choose fewer --methods"]
    return methods, reasons


def memory_needed(product: Product, methods: Iterable[str], rotation_bytes: int) -> int:
    """Bytes of all methods' weights in rotation, and of one weight before it is laid out."""
    sizes = [product.weight_bytes(name) for name in methods]
    rotations = sum(size * copies_for(size, rotation_bytes) for size in sizes)
    return rotations + max(sizes, default=0)


def measure(product: Product, methods: Mapping[str, LinearMethod], setup: Setup) -> Iterator[Row]:
    """The rows of one matrix: its products and what is prepared for them, for every M and method."""
    weights = {name: _weights(product, name, method, setup.device) for name, method in methods.items()}
    others = {name: _peer_weights(product, peer, setup.device) for name, peer in setup.peers.items()}
    sizes = {name: product.weight_bytes(name) for name in methods}
    sizes |= {name: product.N * product.K * peer.bytes_per_weight for name, peer in setup.peers.items()}
    for M in setup.Ms:
        say(f"{product.model} {product.layer} {product.N} x {product.K}, M = {M}")
        x = setup.device.array(_random(M, product.K))
        out = setup.device.ops.empty((M, product.N), BF16)
        calls: dict[str, list[Call]] = {}
        for name, method in methods.items():
            operand = method.prepare(x)
            multiply = partial(method.matmul, operand, out=out, num_decode_rows=decode_rows(M, setup.device.ops))
            calls[name] = [partial(multiply, weight=weight) for weight in weights[name]]
        if "sharq" in methods and isinstance(setup.device, GpuDevice):
            ops, operand = setup.device.gpu_ops, methods["sharq"].prepare(x)
            calls[backbone.NAME] = backbone.backbone_calls(ops, operand, weights["sharq"], out)
            sizes[backbone.NAME] = sizes["sharq"]
        calls |= _peer_calls(setup.peers, others, M)
        yield from _timed(product, product.layer, M, calls, sizes, setup)
        calls, moved = _preparations(product, methods, M, setup.device)
        yield from _timed(product, f"prepare {product.layer}", M, calls, moved, setup)


def _weights(product: Product, name: str, method: LinearMethod, device: BenchDevice) -> list[Any]:
    source = random_weight(name, product.N, product.K, device.ops)
    copies = copies_for(product.weight_bytes(name), device.rotation_bytes)
    return [method.pack([source]) for _ in range(copies)]


def _peer_weights(product: Product, peer: Peer, device: BenchDevice) -> list[Any]:
    nbytes = product.N * product.K * peer.bytes_per_weight
    return [peer.weight(product.N, product.K) for _ in range(copies_for(nbytes, device.rotation_bytes))]


def _peer_calls(found: Mapping[str, Peer], weights: Mapping[str, list[Any]], M: int) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = {}
    for name, peer in found.items():
        try:
            calls[name] = list(peer.product(M, weights[name]))
            calls[name][0]()
        except DeviceError as problem:
            say(f"skipped: {name}, M = {M}: {problem}")
            calls.pop(name, None)
    return calls


def _preparations(
    product: Product, methods: Mapping[str, LinearMethod], M: int, device: BenchDevice
) -> tuple[dict[str, list[Call]], dict[str, int]]:
    """What turns activations into this layer's operand, per method, and the bytes a call reads and writes.

    Only where a decoder layer has such a step of its own: gate|up and the head repeat what q|k|v shows.
    """
    K = product.K
    if product.layer not in ("qkv", "o", "down"):
        return {}, {}
    x = _random(M, 2 * K if product.layer == "down" else K)
    copies = copies_for(x.nbytes, device.rotation_bytes) if M > _IN_CACHE else 1
    inputs = [device.array(x) for _ in range(copies)]
    norm = np.ones(K, np.float32)
    weight = device.array(norm)
    calls: dict[str, list[Call]] = {}
    nbytes: dict[str, int] = {}
    for name, method in methods.items():
        steps: dict[str, Callable[[Any], Any]] = {
            "qkv": partial(_after_norm, method, weight),
            "o": method.prepare,
            "down": method.prepare_silu_mul,
        }
        step = steps[product.layer]
        operand = step(inputs[0])
        if operand is not inputs[0]:
            calls[name] = [partial(step, x) for x in inputs]
            nbytes[name] = x.nbytes + operand_bytes(operand) + (norm.nbytes if product.layer == "qkv" else 0)
    return calls, nbytes


def _after_norm(method: LinearMethod, weight: Any, x: Any) -> Any:
    return method.prepare_norm(x, weight, 1e-6)


def operand_bytes(operand: Any) -> int:
    """Of an array, or of an operand's arrays, whichever backend's and in one path or two."""
    if hasattr(operand, "nbytes"):
        return int(operand.nbytes)
    arrays = (getattr(operand, name, None) for name in _OPERAND_ARRAYS)
    return sum(array.nbytes for array in arrays if array is not None)


def _random(M: int, K: int) -> Array:
    values = np.random.default_rng(1).standard_normal((min(M, 256), K), np.float32).astype(BF16)
    return np.resize(values, (M, K))


def _timed(
    product: Product,
    layer: str,
    M: int,
    calls: Mapping[str, Sequence[Call]],
    nbytes: Mapping[str, int],
    setup: Setup,
) -> Iterator[Row]:
    """One row per method; nbytes: what a call must move at least."""
    if not calls:
        return
    times = interleaved(setup.device, {_CEILING: [setup.reader], **calls}, setup.seconds)
    ceilings = [setup.read_bytes / time for time in times[_CEILING]]
    for name in calls:
        rates = [nbytes[name] / time for time in times[name]]
        median = statistics.median(times[name])
        yield {
            "model": product.model,
            "layer": layer,
            "N": product.N,
            "K": product.K,
            "M": M,
            "method": name,
            "microseconds": round(median * 1e6, 2),
            "bytes": nbytes[name],
            "gb_per_s": round(statistics.median(rates) / 1e9, 2),
            "of_ceiling": _median_ratio(rates, ceilings),
            "tflop_per_s": None if " " in layer else round(_operations(product, M) / median / 1e12, 3),
            "times_bf16": _median_ratio(times[AS_STORED], times[name]) if AS_STORED in times else None,
            "times_cublas_bf16": _median_ratio(times[BF16_PEER], times[name]) if BF16_PEER in times else None,
            "times_cublaslt_fp8": _median_ratio(times[FP8_PEER], times[name]) if FP8_PEER in times else None,
            "rounds": len(rates),
        }


def _operations(product: Product, M: int) -> int:
    return 2 * M * product.N * product.K


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


def as_tables(report: Mapping[str, Any]) -> str:
    """One table per matrix: a line per method, a column per M."""
    parts = [f"{report['kernel_path']}; memory read at {report['read_gb_per_s']} GB/s. {report['machine']['cpu']}"]
    for (model, layer), rows in _grouped(report["rows"]).items():
        Ms = sorted({row["M"] for row in rows})
        lines = []
        for method in dict.fromkeys(row["method"] for row in rows):
            own = {row["M"]: row for row in rows if row["method"] == method}
            lines.append([method, f"{own[Ms[0]]['bytes'] / 1e6:.2f}", *(_cell(own[M]) for M in Ms)])
        shape = f"{rows[0]['N']} x {rows[0]['K']}" if " " not in layer else f"K = {rows[0]['K']}"
        peer = any(row["times_cublas_bf16"] for row in rows)
        parts.append(f"### {model} {layer}, {shape}: µs, GB/s, share of the ceiling, x {'cuBLAS ' * peer}bf16")
        parts.append(as_markdown(["method", "MB", *(f"M = {M}" for M in Ms)], lines))
    return "\n\n".join([*parts, *(f"skipped: {reason}" for reason in report["skipped"])])


def _cell(row: Row) -> str:
    ratio = row["times_cublas_bf16"] or row["times_bf16"]
    beside = "" if ratio is None else f", {ratio:.2f}x"
    return f"{row['microseconds']:.1f}, {row['gb_per_s']:.1f}, {row['of_ceiling']:.0%}{beside}"


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["layer"]), []).append(row)
    return groups


def plot(pyplot: Any, report: Mapping[str, Any], path: Path) -> None:
    """Times over M, a panel per matrix, a line per method."""
    groups = _grouped(report["rows"])
    names = list(dict.fromkeys(row["method"] for row in report["rows"]))
    colors = dict(zip(names, distinct_colors(pyplot, len(names)), strict=True))
    figure, panels = pyplot.subplots(1, len(groups), figsize=(4 * len(groups), 4), squeeze=False, layout="constrained")
    for ((model, layer), rows), panel in zip(groups.items(), panels[0], strict=True):
        Ms = list(dict.fromkeys(row["M"] for row in rows))
        for name in dict.fromkeys(row["method"] for row in rows):
            times = [row["microseconds"] for row in rows if row["method"] == name]
            panel.plot(Ms, times, marker=".", label=name, color=colors[name])
        panel.set(title=f"{model} {layer}", xlabel="M", ylabel="µs", xscale="log", yscale="log")
        panel.set_xticks(Ms, list(map(str, Ms)))
        panel.set_xticks([], minor=True)
    panels[0][0].legend()
    figure.suptitle(f"{report['kernel_path']}, memory read at {report['read_gb_per_s']} GB/s")
    figure.savefig(path)
    pyplot.close(figure)
