"""No plan asks for more shared memory than a block has, on any architecture that its kernel is for.

Static arrays are allowed for: what ptxas reports of them, rounded up (tests/test_cuda_compile.py reads attention's).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from bit_patterns import BF16

from engine.errors import DeviceError
from engine.ops.gpu import launch_linear, launch_linear_sm120
from engine.ops.gpu.device import EmulatedDevice
from engine.ops.gpu.launch import Launch, shared_limit
from engine.ops.gpu.launch_attention import AttentionShape
from engine.ops.gpu.launch_linear import Kind
from engine.ops.gpu.launch_rows import Rows

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a", "sm_121a"]
each_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)
TOKENS = [*range(1, 35), 48, 64, 65, 128, 1000]
K = [128, 384, 896, 3584, 4864, 18944, 32768]


@each_architecture
def test_attention(arch: str) -> None:
    for D in range(8, 257, 8):
        for dtype, kv_e4m3 in (("bf16", False), ("f16", False), ("bf16", True)):
            shape = AttentionShape(1, 1, D, dtype, kv_e4m3)  # type: ignore[arg-type]
            assert shape.shared_bytes("decode") + 3400 <= shared_limit(arch), shape.kernel("decode")
            assert shape.shared_bytes("prefill") <= shared_limit(arch), shape.kernel("prefill")


def fp4_weights(k: int) -> Iterator[Any]:
    for format, block in (("nvfp4", 16), ("nvfp4", 32), ("mxfp4", 32), ("hif4", 64)):
        yield SimpleNamespace(format=format, block=block, N=4096, K=k, placed=False)


@each_architecture
@pytest.mark.parametrize("sms", [1, 132])
def test_decode_products(arch: str, sms: int) -> None:
    plans: list[Any] = []
    for k in K:
        for M in TOKENS:
            plans.append(launch_linear.plan_16_bit_decode(4096, k, M, sms=sms))
            fp8: Any = SimpleNamespace(N=4096, K=k)
            plans += [launch_linear.plan_fp8_decode(fp8, M, kind, sms=sms) for kind in ("fp8", "bf16", "f16")]
            for weight in fp4_weights(k):
                plans += [launch_linear.plan_fp4_decode(weight, M, kind, sms=sms) for kind in ("bf16", "f16", "fp4")]
                plans.append(launch_linear.plan_fp4_decode(weight, M, "fp4", paths=2, sms=sms))
    assert max(plan.shared for plan in plans) + 128 <= shared_limit(arch)


@each_architecture
@pytest.mark.parametrize("kind, copied_weight", [("one", True), *((kind, False) for kind in get_args(Kind))])
def test_products_for_many_tokens(arch: str, kind: Kind, copied_weight: bool) -> None:
    """copied_weight: 16-bit ones, which are multiplied with 16-bit activations alone."""
    limit = shared_limit(arch)
    for M in TOKENS:
        plan = launch_linear.plan_tile(M, 4096, kind, copied_weight=copied_weight, sms=1, shared_limit=limit)
        assert plan.shared <= limit


@pytest.mark.parametrize("copied_weight", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_products_of_warpgroups(copied_weight: bool, sliced: bool) -> None:
    for N in (64, 4096):
        plan = launch_linear.plan_wgmma(1000, N, copied_weight=copied_weight, sliced=sliced)
        assert plan.shared <= shared_limit("sm_90a")


@pytest.mark.parametrize("arch", launch_linear_sm120.ARCHITECTURES)
def test_products_on_fp4_instructions(arch: str) -> None:
    for M in TOKENS:
        for weight in fp4_weights(3584):
            if weight.format == "hif4":
                continue
            for path in ("sharq", "sharq_dense", "dense"):
                if path == "sharq" and (weight.format, weight.block) != ("nvfp4", 32):
                    continue
                assert launch_linear_sm120.plan(M, weight, path, sms=170).shared <= shared_limit(arch)


@each_architecture
def test_preparing_the_longest_rows(arch: str) -> None:
    rows = Rows(np.empty((1, 2 * 32768), BF16), silu=True)
    assert rows.launch("prepare_fp8.cu", "prepare_fp8", []).shared + 640 <= shared_limit(arch)


def test_a_launch_beyond_it_is_refused() -> None:
    launch = Launch("embed.cu", "embed_bf16_bf16", (1, 1, 1), (128, 1, 1), (99 << 10) + 1, [])
    with pytest.raises(DeviceError, match="embed_bf16_bf16 needs 101377 bytes .* 101376 on sm_86"):
        EmulatedDevice("sm_86").launch(launch)
