"""What the matrix products become: the instructions that were meant, counted in NVRTC's machine code. No GPU needed."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("cupy", reason="CuPy brings NVRTC's binding; pip install '.[cuda13]'")

from machine_code import kernels


def instructions(source, arch):
    """Kernel -> how often each instruction occurs."""
    return {name: Counter(i.name for i in kernel.instructions) for name, kernel in kernels(source, arch).items()}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sharq_of_many_tokens_runs_its_backbone_on_sparse_products(arch):
    """Of a warp's 64 tokens × 32 n × 64 k: 32 sparse products of 32 k, and 64 dense ones of 16 k for the residual."""
    kernels = instructions("linear_nvfp4x32_tile.cu", arch)
    for tokens in (1, 2):
        fused = kernels[f"linear_tile_nvfp4x32_sparse_and_dense_bf16_m{tokens}"]
        assert (fused["HMMA.SP.16832.F32.BF16"], fused["HMMA.16816.F32.BF16"]) == (32, 64)
        sparse = kernels[f"linear_tile_nvfp4x32_sparse_bf16_m{tokens}"]
        assert (sparse["HMMA.SP.16832.F32.BF16"], sparse["HMMA.16816.F32.BF16"]) == (32, 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_sharq_of_few_tokens_has_one_product_for_both_paths(arch):
    """Of 16 n × 128 k and eight columns, four tokens with two paths: eight products, as for eight tokens with one."""
    kernels = instructions("linear_nvfp4x32.cu", arch)
    for tiles in (1, 2, 4):
        assert kernels[f"linear_decode_nvfp4x32_fp4_t{tiles}"]["HMMA.16816.F32"] == 8 * tiles


def test_hopper_products_are_wgmma():
    """Four of 16 k a step and path, two sparse ones of 32 k. Those of fragments take two steps a turn of the loop."""
    kernels = instructions("linear_nvfp4x32_wgmma.cu", "sm_90a")
    found = {
        name.removeprefix("linear_wgmma_nvfp4x32_"): {n: c for n, c in counts.items() if "GMMA" in n}
        for name, counts in kernels.items()
        if name.startswith("linear_")
    }
    assert found == {
        "bf16_n256": {"HGMMA.64x256x16.F32.BF16": 4},
        "bf16_n128": {"HGMMA.64x128x16.F32.BF16": 4},
        "one": {"HGMMA.64x128x16.F32.BF16": 8},
        "two": {"HGMMA.64x128x16.F32.BF16": 16},
        "sparse": {"HGMMA.SP.64x128x32.F32.BF16": 4},
        "sparse_and_dense": {"HGMMA.SP.64x128x32.F32.BF16": 4, "HGMMA.64x128x16.F32.BF16": 8},
    }
