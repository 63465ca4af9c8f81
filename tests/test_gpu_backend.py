"""The GPU backend on the emulator: operation by operation and whole tiny models, against the CPU's definition.

The FP4 codes of prepared activations must agree to the bit; products differ in the order of fp32 sums alone. Over a
whole model a difference in the last bit of bf16 flips codes and cascades: there the size of the difference is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import write_model

from engine import LLM, SamplingParams
from engine.bench.backbone import backbone_calls
from engine.errors import DeviceError, InvalidArgument, NumericalError
from engine.ops.backends import select_backend
from engine.ops.contract import Ops
from engine.ops.fp4.split import paths
from engine.ops.gpu.backend import GpuOps
from engine.ops.gpu.device import EmulatedDevice
from engine.ops.gpu.emulator import EmulatedModule
from engine.ops.gpu.launch import Launch
from engine.ops.reference import ReferenceOps
from engine.quant import fp4, fp8
from engine.quant.registry import FP4_METHODS

try:
    EmulatedModule.compile("embed.cu")
except DeviceError as error:
    pytest.skip(f"kernels cannot be compiled for the emulator: {error}", allow_module_level=True)

BF16 = np.dtype(ml_dtypes.bfloat16)
REFERENCE = ReferenceOps()
PROMPT = np.random.default_rng(0).integers(0, 256, 40).tolist()


@pytest.fixture(scope="module", params=["emulate", "emulate:sm_120a"])
def gpu(request: pytest.FixtureRequest) -> Ops:
    """The family of kernels that dequantises, and the one with FP4 instructions."""
    return select_backend(request.param)


def random(rows: int, columns: int, seed: int, dtype: Any = BF16) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(dtype)


# ---- one layer, fed the same input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [3, 80])
def test_the_benchmarks_sparse_path_alone(gpu: GpuOps, T: int) -> None:
    """Where few rows have no sparse product, the residual's dense one stands for it."""
    N, K = 40, 192
    w, x = fp4.quantize_weight(random(N, K, 1), format="nvfp4", block=32), random(T, K, 2)
    packed, operand, out = (
        gpu.pack_fp4([w]),
        gpu.prepare_sharq(gpu.constant(x)),
        gpu.empty((T, N), np.dtype(np.float32)),
    )
    for call in backbone_calls(gpu, operand, [packed], out):
        call()
    sparse, residual = paths(REFERENCE.prepare_sharq(x))
    multiplied = sparse if T == 80 or not packed.placed else residual
    expected = REFERENCE.fp4_linear(multiplied, REFERENCE.pack_fp4([w]), out=np.zeros((T, N), np.float32))
    np.testing.assert_allclose(gpu.to_host(out), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", [name for name, rule in FP4_METHODS.items() if rule.paths != "weights only"])
@pytest.mark.parametrize("before", ["nothing", "norm", "silu"])
def test_a_layer_in_fp4(gpu: Ops, name: str, before: str) -> None:
    """Operands bit for bit, outputs to 1e-5 of the largest: the issue's limits."""
    rule, T, N, K = FP4_METHODS[name], 5, 40, 192
    norm = (random(1, K, 1, np.float32)[0], 1e-6) if before == "norm" else None
    x = random(T, 2 * K if before == "silu" else K, 2)
    shards = [random(24, K, 3), 30 * random(16, K, 4)]
    weights = [fp4.quantize_weight(w, format=rule.format, block=rule.block) for w in shards]
    operands = []
    for ops in (REFERENCE, gpu):
        constant = None if norm is None else (ops.constant(norm[0]), norm[1])
        given, silu = ops.constant(x), before == "silu"
        if rule.paths == "one":
            operands.append(ops.prepare_fp4(given, format=rule.format, norm=constant, silu=silu))
        else:
            sparse = rule.paths == "sparse and dense"
            operands.append(ops.prepare_sharq(given, format=rule.format, sparse=sparse, norm=constant, silu=silu))
    for field in ("payload", "scale", "g", "backbone", "meta", "backbone_scale", "residual", "residual_scale"):
        wanted = getattr(operands[0], field, None)
        if wanted is not None:
            got = getattr(operands[1], field)
            np.testing.assert_array_equal(got[:, : wanted.shape[1]] if wanted.ndim == 2 else got, wanted, field)
    bias, residual = random(1, N, 5, np.float32)[0], random(T, N, 6, np.float32)
    results = [
        ops.to_host(
            ops.fp4_linear(
                operand,
                ops.pack_fp4(weights),
                out=ops.empty((T, N), np.dtype(np.float32)),
                bias=ops.constant(bias),
                residual=ops.constant(residual),
            )
        )
        for ops, operand in zip((REFERENCE, gpu), operands, strict=True)
    ]
    assert np.abs(results[1] - results[0]).max() <= 1e-5 * np.abs(results[0]).max()


def products(ops: Ops, T: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every product of T tokens and a weight of 264 rows, K = 704 in three slices."""
    N, K = 264, 704
    x, w = ops.constant(random(T, K, 7)), random(N, K, 8)
    out = ops.empty((T, N), np.dtype(np.float32))
    yield "bf16", ops.to_host(ops.linear(x, ops.pack_weight([w]), out=out))
    codes = ops.pack_fp8([fp8.quantize_weight(w)])
    yield "w8a16", ops.to_host(ops.w8a16_linear(x, codes, out=out))
    yield "fp8", ops.to_host(ops.fp8_linear(ops.prepare_fp8(x), codes, out=out))
    for name, rule in FP4_METHODS.items():
        matrix = fp4.quantize_weight(w, format=rule.format, block=rule.block)
        weight = ops.pack_fp4([matrix], weights_only=rule.paths == "weights only")
        if rule.paths == "weights only":
            yield name, ops.to_host(ops.w4a16_linear(x, weight, out=out))
            continue
        if rule.paths == "one":
            operand = ops.prepare_fp4(x, format=rule.format)
        else:
            operand = ops.prepare_sharq(x, format=rule.format, sparse=rule.paths == "sparse and dense")
        yield name, ops.to_host(ops.fp4_linear(operand, weight, out=out))


class WatchedDevice(EmulatedDevice):
    """Keeps the grids of what is launched."""

    def __init__(self, arch: str, sms: int) -> None:
        super().__init__(arch, sms=sms)
        self.grids: list[tuple[int, int, int]] = []

    def launch(self, launch: Launch) -> None:
        self.grids.append(launch.grid)
        super().launch(launch)


@pytest.mark.parametrize(("arch", "T"), [("sm_80", 3), ("sm_80", 70), ("sm_90a", 70), ("sm_120a", 3)])
def test_results_do_not_depend_on_how_many_multiprocessors_share_the_work(arch: str, T: int) -> None:
    one, many = WatchedDevice(arch, 1), WatchedDevice(arch, 500)
    for (name, result), (_, other) in zip(products(GpuOps(one), T), products(GpuOps(many), T), strict=True):
        np.testing.assert_array_equal(result, other, name)
    assert one.grids != many.grids, "the work was meant to be shared differently"


def test_nan_in_an_input_is_told_with_the_result(gpu: Ops) -> None:
    x = random(3, 64, 1)
    x[1, 7] = np.nan
    gpu.prepare_sharq(gpu.constant(x))
    with pytest.raises(NumericalError, match="row 1 of a layer's input"):
        gpu.to_host(gpu.constant(x))
    gpu.to_host(gpu.constant(x))  # told once


def test_activations_in_float32_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="bfloat16 or float16, not float32"):
        LLM(write_model("qwen3_tied", tmp_path), device="emulate", dtype="float32").logits([1, 2, 3])


# ---- whole models ----------------------------------------------------------------------------------------------------


def relative(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> tuple[float, float]:
    """Root mean square and largest difference, in standard deviations."""
    error = got - wanted
    return float(np.sqrt(np.mean(error**2)) / wanted.std()), float(np.abs(error).max() / wanted.std())


def logits(path: Path, device: str, **options: Any) -> NDArray[np.float32]:
    with LLM(path, device=device, dtype="bfloat16", max_model_len=64, max_num_seqs=4, **options) as llm:
        return llm.logits(PROMPT)


@pytest.mark.parametrize(
    "case",
    ["qwen3_tied", "llama31_rope_llama3", "mistral_window", "qwen2_tied_group7", "llama_biases", "llama_head24_mha6"],
)
def test_a_model_in_bf16(tmp_path: Path, case: str) -> None:
    rms, largest = relative(*(logits(write_model(case, tmp_path), device) for device in ("emulate", "cpu")))
    assert rms <= 0.02 and largest <= 0.1


@pytest.mark.parametrize("device", ["emulate", "emulate:sm_120a"])
@pytest.mark.parametrize("quant", ["w4a16", "sharq"])
def test_a_model_whose_weights_are_in_fp4(tmp_path: Path, quant: str, device: str) -> None:
    path = write_model("qwen3_tied", tmp_path)
    rms, _ = relative(*(logits(path, name, quant=quant) for name in (device, "cpu")))
    assert rms <= (0.02 if quant == "w4a16" else 0.25)


@pytest.mark.parametrize("quant", ["fp8", "nvfp4", "mxfp4", "sharq-dense", "sharq-mxfp4"])
def test_a_quantised_model(tmp_path: Path, quant: str) -> None:
    path = write_model("qwen3_tied", tmp_path)
    rms, _ = relative(*(logits(path, device, quant=quant) for device in ("emulate", "cpu")))
    assert rms <= 0.25


def test_sharq_generates_as_it_scores(tmp_path: Path) -> None:
    """Decode steps, in a batch, pick what the logits of the whole text say, where these are sure."""
    path = write_model("qwen3_tied", tmp_path)
    with LLM(path, device="emulate", dtype="bfloat16", max_model_len=64, max_num_seqs=4, quant="sharq") as llm:
        prompts = [PROMPT[:9], PROMPT[5:17]]
        for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)):
            ids = list(output.outputs[0].token_ids)
            scored = llm.logits([*output.prompt_token_ids, *ids])[len(output.prompt_token_ids) - 1 : -1]
            best = np.sort(scored, axis=1)
            sure = best[:, -1] - best[:, -2] > 0.3 * scored.std()
            assert sure.any() and (scored.argmax(axis=1)[sure] == np.array(ids)[sure]).all()
