"""Sparse FP4 alone: the product of SharQ's backbone without the residual's, for the benchmark of products on a GPU.

No method multiplies so; it shows what the residual path costs. With FP4 instructions it is the sparse ones, for a
prompt's rows 2:4 sparse bf16 products (activations expanded first, as for SharQ). The kernels for few rows have no
sparse form: weights are all they wait for. There one path's dense product on the same weights stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from engine.bench.steps import decode_rows
from engine.bench.timing import Call
from engine.ops.contract import Array
from engine.ops.gpu import launch_linear, launch_linear_sm120
from engine.ops.gpu.backend import GpuOps
from engine.ops.gpu.launch import Launch
from engine.ops.gpu.launch_linear import KCut, Output, Workspace
from engine.ops.gpu.prefill_products import PrefillProducts
from engine.ops.gpu.staging import Scratch
from engine.ops.gpu.weight_layout import Fp4Units

NAME = "sharq-backbone"


def backbone_calls(ops: GpuOps, operand: Any, weights: Sequence[Fp4Units], out: Array) -> list[Call]:
    """A call per weight. operand: of `GpuOps.prepare_sharq`, its backbone sparse; weights alike; out [M, N]."""
    output, first = Output(out), weights[0]
    if not first.placed:
        return [_call(ops, [launch]) for launch in _on_fp4_instructions(ops, operand, weights, output)]
    if decode_rows(len(out), ops) is None:
        return [_call(ops, [launch]) for launch in _of_few_rows(ops, operand, weights, output)]
    products = PrefillProducts(ops.device, Scratch(ops.device))
    return [_call(ops, products.fp4_linear(operand, weight, output, "sparse")) for weight in weights]


def _on_fp4_instructions(ops: GpuOps, operand: Any, weights: Sequence[Fp4Units], output: Output) -> list[Launch]:
    chosen = launch_linear_sm120.plan(len(output.out), weights[0], "sparse", sms=ops.device.sms)
    workspace = _workspace(ops, chosen.cut)
    return [launch_linear_sm120.linear(operand, w, output, workspace, chosen, path="sparse") for w in weights]


def _of_few_rows(ops: GpuOps, operand: Any, weights: Sequence[Fp4Units], output: Output) -> list[Launch]:
    path = SimpleNamespace(payload=operand.residual, scale=operand.residual_scale, g=operand.g, format=operand.format)
    plan = launch_linear.plan_fp4_decode(weights[0], len(output.out), "fp4", sms=ops.device.sms)
    workspace = _workspace(ops, plan.cut)
    return [launch_linear.fp4_decode(path, weight, output, workspace, plan) for weight in weights]


def _workspace(ops: GpuOps, cut: KCut) -> Workspace:
    counters = ops.device.zeros((max(1, cut.arrivals),), np.dtype(np.uint32))
    return Workspace(ops.empty((max(1, cut.partials),), np.dtype(np.float32)), counters)


def _call(ops: GpuOps, launches: Sequence[Launch]) -> Call:
    def run() -> None:
        for launch in launches:
            ops.device.launch(launch)

    return run
