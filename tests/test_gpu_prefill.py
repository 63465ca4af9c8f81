"""Prefill rows on the GPU backend: which kernels multiply them, that these compute the same, and whose rows they are.

A product's decode rows and prefill rows are compared bit for bit with the same rows multiplied alone: neither kind may
depend on the other, nor on where a chunk begins. Against the CPU's definition the limits are the issue's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import write_model

from engine import LLM, SamplingParams
from engine.config import QuantConfig
from engine.errors import DeviceError
from engine.ops.contract import Ops
from engine.ops.gpu.backend import GpuOps
from engine.ops.gpu.device import EmulatedDevice
from engine.ops.gpu.emulator import EmulatedModule
from engine.ops.gpu.launch import Launch
from engine.ops.reference import ReferenceOps
from engine.quant.as_stored import AsStored
from engine.quant.fp8_linear import Fp8WeightsOnly
from engine.quant.method import LinearMethod
from engine.quant.registry import FP4_METHODS, LayerMethods, resolve
from engine.workspace import Workspace

try:
    EmulatedModule.compile("embed.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
N, K = 40, 192
DECODE, T = 3, 75  # rows of a step: three decode
PROMPT = np.random.default_rng(0).integers(0, 256, 100).tolist()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of all products launched, in order, without the block's size; "expand" for what comes before one."""
    names: list[str] = []
    launch = EmulatedDevice.launch

    def recorded(device: EmulatedDevice, what: Launch) -> None:
        if what.kernel.startswith(("linear_", "expand_")):
            names.append(re.sub(r"^linear_|(?<=expand)_.*|_[tmn]\d+$", "", what.kernel))
        launch(device, what)

    monkeypatch.setattr(EmulatedDevice, "launch", recorded)
    yield names


# ---- one product -----------------------------------------------------------------------------------------------------


@lru_cache
def gpu(arch: str, deterministic: bool = False) -> GpuOps:
    return GpuOps(EmulatedDevice(arch), deterministic=deterministic)


def method_of(name: str, ops: Ops) -> LinearMethod:
    if name == "w8a16":
        return Fp8WeightsOnly(ops, AsStored(ops, Workspace(ops)))
    quant = resolve(QuantConfig(name, "rtn" if name in FP4_METHODS else None), None)
    return LayerMethods(quant, ops, Workspace(ops))(("layer",), K)


def random(shape: tuple[int, ...], seed: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def product(ops: Ops, name: str, rows: slice, num_decode_rows: int | None, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Of these rows of one layer's input, with bias, in fp32, added to a residual."""
    method = method_of(name, ops)
    x, residual = random((T, K), 1, dtype)[rows], random((T, N), 2, F32)[rows]
    weight = method.pack([random((24, K), 3, dtype), random((16, K), 4, dtype)])
    out, bias = ops.constant(residual), ops.constant(random((N,), 5, F32))
    operand = method.prepare(ops.constant(x))
    method.matmul(operand, weight, out=out, bias=bias, residual=out, num_decode_rows=num_decode_rows)
    return ops.to_host(out)


# Of the prefill rows: launches that expand the operand, and the product on mma.sync's tiles and on wgmma.
KERNELS = {
    "bf16": (0, "tile_bf16", "wgmma_bf16"),
    "w4a16": (0, "tile_nvfp4x16_one_bf16", "wgmma_nvfp4x16_bf16"),
    "w8a16": (0, "tile_fp8_bf16", "wgmma_fp8"),
    "fp8": (1, "tile_fp8_bf16", "wgmma_fp8"),
    "nvfp4": (1, "tile_nvfp4x16_one_bf16", "wgmma_nvfp4x16_one"),
    "mxfp4": (1, "tile_mxfp4_one_bf16", "wgmma_mxfp4_one"),
    "hif4": (1, "tile_hif4_one_bf16", "wgmma_hif4_one"),
    "sharq": (2, "tile_nvfp4x32_sparse_and_dense_bf16", "wgmma_nvfp4x32_sparse_and_dense"),
    "sharq-mxfp4": (2, "tile_mxfp4_sparse_and_dense_bf16", "wgmma_mxfp4_sparse_and_dense"),
    "sharq-hif4": (2, "tile_hif4_sparse_and_dense_bf16", "wgmma_hif4_sparse_and_dense"),
    "sharq-dense": (2, "tile_nvfp4x32_two_bf16", "wgmma_nvfp4x32_two"),
}
CASES = [(arch, name) for arch in ("sm_90", "sm_90a") for name in KERNELS] + [("sm_80", "bf16"), ("sm_80", "sharq")]


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_a_products_two_kinds_of_rows(arch: str, name: str, kernels: list[str]) -> None:
    ops, everything = gpu(arch), slice(0, T)
    mixed = product(ops, name, everything, DECODE, BF16)
    expanding, tile, wgmma = KERNELS[name]
    assert kernels[0].startswith("decode_"), "decode rows have a product of their own"
    assert kernels[1:] == ["expand"] * expanding + [wgmma if arch == "sm_90a" else tile]
    reference = product(ReferenceOps(), name, everything, None, BF16)
    assert np.abs(mixed - reference).max() <= 1e-5 * np.abs(reference).max()
    cut = 50  # of a chunk, not at a tile's border
    alone = [(slice(0, DECODE), None), (slice(DECODE, cut), 0), (slice(cut, T), 0)]
    np.testing.assert_array_equal(mixed, np.concatenate([product(ops, name, *part, BF16) for part in alone]))
    one_kind = product(gpu(arch, deterministic=True), name, everything, DECODE, BF16)
    np.testing.assert_array_equal(one_kind, product(ops, name, everything, None, BF16))


@pytest.mark.parametrize("name", ["nvfp4", "sharq", "sharq-mxfp4", "sharq-dense"])
def test_fp4_instructions_have_one_order_for_all_rows(name: str, kernels: list[str]) -> None:
    ops = gpu("sm_120a")
    mixed = product(ops, name, slice(0, T), DECODE, BF16)
    assert len(kernels) == 1
    np.testing.assert_array_equal(mixed, product(ops, name, slice(0, T), None, BF16))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bf16", "tile_f16"), ("w4a16", "tile_nvfp4x16_one_f16"), ("w8a16", "tile_fp8_f16")],
)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
def test_f16_activations_take_tiles(name: str, expected: str, arch: str, kernels: list[str]) -> None:
    mixed = product(gpu(arch), name, slice(0, T), DECODE, F16)
    assert kernels[0].startswith("decode_") and kernels[1:] == [expected]
    reference = product(ReferenceOps(), name, slice(0, T), None, F16)
    assert np.abs(mixed - reference).max() <= 1e-5 * np.abs(reference).max()


def test_f16_has_no_tiles_for_scales_it_cannot_hold(kernels: list[str]) -> None:
    """MXFP4 weights, f16 activations: every row decodes."""
    ops, out = gpu("sm_90"), np.empty((T, N), F32)
    matrix = ops.quantize_weight(random((N, K), 3, BF16), format="mxfp4", block=32, grade="rtn")
    weight, x = ops.pack_fp4([matrix], weights_only=True), ops.constant(random((T, K), 1, F16))
    kinds = [ops.w4a16_linear(x, weight, out=ops.constant(out), num_decode_rows=n) for n in (0, None)]
    assert [kernel.startswith("decode_mxfp4") for kernel in kernels] == [True, True]
    np.testing.assert_array_equal(*map(ops.to_host, kinds))


# ---- whole models ----------------------------------------------------------------------------------------------------


def load(path: Path, device: str, quant: str = "bf16", **options: Any) -> LLM:
    fallback = "bf16" if quant.endswith("hif4") else None  # the tiny model's FFN of 96 is no multiple of 64
    options = {"dtype": "bfloat16", "max_model_len": 128, "max_num_seqs": 4, "quant_fallback": fallback, **options}
    return LLM(path, device=device, quant=quant, **options)


QUANTS = ["bf16", "w4a16", "nvfp4", "sharq", "sharq-mxfp4", "sharq-hif4", "fp8"]
MODELS = [(device, quant) for device in ("emulate", "emulate:sm_90a") for quant in QUANTS]
FP4_INSTRUCTIONS = ("emulate:sm_120a", "sharq")
MODELS += [(f"emulate:{arch}", quant) for arch in ("sm_80", "sm_120a") for quant in ("bf16", "sharq")]


@pytest.mark.parametrize(("device", "quant"), MODELS)
def test_logits_of_a_long_prompt(tmp_path: Path, device: str, quant: str, kernels: list[str]) -> None:
    path, results = write_model("qwen3_tied", tmp_path), []
    for name in (device, "cpu"):
        with load(path, name, quant) as llm:
            results.append(llm.logits(PROMPT[:70]))
    error = results[0] - results[1]
    rms = np.sqrt(np.mean(error**2)) / results[1].std()
    assert rms <= (0.02 if quant in ("bf16", "w4a16") else 0.25)  # FP4 and FP8 codes flip and cascade
    if quant in ("bf16", "w4a16"):
        assert np.abs(error).max() <= 0.1 * results[1].std()
    products = [name.partition("_")[0] for name in kernels if not name.startswith("expand")]
    assert products.count("decode") == 2, "the head, 70 rows of logits in two parts"
    family = "wgmma" if device.endswith("90a") else "nvfp4x32" if (device, quant) == FP4_INSTRUCTIONS else "tile"
    assert {*products} == {"decode", family}


def test_which_prompts_prefill(tmp_path: Path, kernels: list[str]) -> None:
    """Those above 64 tokens, to the last token whatever the chunk; never answers; none with deterministic."""
    path = write_model("qwen3_tied", tmp_path)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

    def families(prompt: list[int], **options: Any) -> list[str]:
        """Of each step's first product, as long as they change."""
        kernels.clear()
        with load(path, "emulate", max_num_batched_tokens=69, **options) as llm:
            llm.generate([prompt], params)
        first = [name.partition("_")[0] for name in kernels]
        return [name for i, name in enumerate(first) if i == 0 or first[i - 1] != name]

    assert families(PROMPT[:64]) == ["decode"]
    assert families(PROMPT[:65]) == ["tile", "decode"]
    assert families(PROMPT[:70]) == ["tile", "decode"], "the second chunk, of one token, too"
    assert families(PROMPT[:70], deterministic=True) == ["decode"]
