"""What the matrix products become: the instructions that were meant, counted in NVRTC's machine code. No GPU needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

pytest.importorskip("cupy", reason="CuPy brings NVRTC's binding; pip install '.[cuda13]'")

from engine.errors import DeviceError
from engine.ops.gpu import compile as compiling

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/ +(?:@!?U?P\w+ +)?(?P<name>[A-Z][\w.]*)")


def disassembler():
    """nvdisasm of a wheel, else on PATH."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations or () if spec else ()
    wheels = [path for folder in folders for path in sorted(Path(folder).glob("*/bin/nvdisasm"))]
    return str(wheels[0]) if wheels else shutil.which("nvdisasm")


@lru_cache
def instructions(source, arch):
    """Kernel -> how often each instruction occurs."""
    tool = disassembler()
    if tool is None:
        pytest.skip("nvdisasm is not installed (pip install nvidia-nvdisasm)")
    try:
        cubin = compiling.cubin(source, arch)
    except DeviceError as error:
        if "NVRTC" in str(error) and "compile" not in str(error):
            pytest.skip(str(error))
        raise
    text = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.text\.(\w+):", text, flags=re.MULTILINE)[1:]
    return {name: Counter(INSTRUCTION.findall(body)) for name, body in zip(parts[::2], parts[1::2], strict=True)}


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
    """Four of 16 k a step and path; none is waited for alone."""
    kernels = instructions("linear_nvfp4x32_wgmma.cu", "sm_90a")
    found = {
        name.removeprefix("linear_wgmma_nvfp4x32_"): {n: c for n, c in counts.items() if "GMMA" in n}
        for name, counts in kernels.items()
    }
    assert found == {
        "one_n256": {"HGMMA.64x256x16.F32.BF16": 4},
        "one_n128": {"HGMMA.64x128x16.F32.BF16": 4},
        "two_n128": {"HGMMA.64x128x16.F32.BF16": 8},
        # two steps in a turn of the loop, each with two sparse products of 32 k
        "sparse_and_dense_n128": {"HGMMA.SP.64x128x32.F32.BF16": 4, "HGMMA.64x128x16.F32.BF16": 8},
    }
