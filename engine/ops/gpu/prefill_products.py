"""Products of prefill rows: wgmma where the GPU has it for such activations, else tiles of mma.sync.

Which kernel a row meets follows from the GPU, the weight and the activations' type, never from how many rows there are:
a prompt may be cut into chunks of any length. FP4 and FP8 activations are made bf16 first, in scratch memory that every
product uses again; `launch_linear.expanded_shapes` says how much.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from engine.ops.gpu import launch_linear
from engine.ops.gpu.device import Device
from engine.ops.gpu.launch import Launch, shared_limit
from engine.ops.gpu.launch_linear import Expanded, Kind, Output, TilePlan
from engine.ops.gpu.staging import Scratch
from engine.ops.gpu.weight_layout import Fp4Units, Fp8Units

_BF16 = np.dtype(ml_dtypes.bfloat16)


class PrefillProducts:
    """Launches of each product on one device; parameters as those of the `launch_linear` functions they call."""

    def __init__(self, device: Device, scratch: Scratch) -> None:
        self._arch = device.arch
        self._sms = device.sms
        self._shared_limit = shared_limit(device.arch)
        self._scratch = scratch

    def linear(self, x: Any, w: Any, output: Output) -> list[Launch]:
        if self._on_wgmma(x.dtype):
            return [launch_linear.wgmma(x, w, output)]
        return [launch_linear.tile(x, w, output, self._plan_tile(output, copied_weight=True))]

    def w4a16_linear(self, x: Any, weight: Fp4Units, output: Output) -> list[Launch]:
        if self._on_wgmma(x.dtype):
            return [launch_linear.w4a16_wgmma(x, weight, output)]
        return [launch_linear.w4a16_tile(x, weight, output, self._plan_tile(output))]

    def fp4_linear(
        self, operand: Any, weight: Fp4Units, output: Output, kind: Kind | None = None
    ) -> list[Launch]:  # fmt: skip
        """kind: what of the operand to multiply, and how; by default all of it."""
        kind = kind or launch_linear.prefill_kind(operand)
        shapes = launch_linear.expanded_shapes(kind, len(operand.g), operand.K)
        arrays = {name: self._scratch.take(f"expanded {name}", *shape) for name, shape in shapes.items()}
        on_wgmma = self._on_wgmma(_BF16)
        expanded = Expanded(kind, on_wgmma, operand.g, **arrays)
        if on_wgmma:
            product = launch_linear.fp4_wgmma(expanded, weight, output)
        else:
            product = launch_linear.fp4_tile(expanded, weight, output, self._plan_tile(output, kind))
        return [*launch_linear.expand(operand, weight, expanded), product]

    def fp8_linear(self, operand: Any, weight: Fp8Units, output: Output) -> list[Launch]:
        x = self._scratch.take("expanded first", operand.codes.shape, _BF16)
        return [launch_linear.expand_fp8(operand.codes, x), *self.w8a16_linear(x, weight, output, operand.scale)]

    def w8a16_linear(self, x: Any, weight: Fp8Units, output: Output, token_scale: Any = None) -> list[Launch]:
        if self._on_wgmma(x.dtype):
            return [launch_linear.w8a16_wgmma(x, weight, output, token_scale)]
        return [launch_linear.w8a16_tile(x, weight, output, self._plan_tile(output), token_scale)]

    def _on_wgmma(self, dtype: np.dtype[Any]) -> bool:
        return self._arch == "sm_90a" and dtype == _BF16

    def _plan_tile(self, output: Output, kind: Kind = "one", *, copied_weight: bool = False) -> TilePlan:
        M, N = output.out.shape
        limit = self._shared_limit
        return launch_linear.plan_tile(M, N, kind, copied_weight=copied_weight, sms=self._sms, shared_limit=limit)
