"""The KV cache in FP8 (E4M3): its codes on every backend, attention over them, whole models, the option, the scales.

Codes are compared to the bit with a search for the nearest number, attention with float64 over the codes' values.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bit_patterns import BF16, DTYPES, F16, F32, assert_same_bits
from numpy.typing import NDArray
from paging import scattered, total_blocks
from quantized_files import f32, write_file
from tiny_models import CASES, write_model

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.errors import DeviceError, InvalidArgument, NumericalError, WeightsError
from engine.loading import kv_cache_scales
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.ops.contract import Ops
from engine.ops.gpu.emulator import EmulatedModule
from engine.ops.reference import ReferenceKVCache, ReferenceOps
from engine.quant.scheme import Pattern, QuantScheme, Rule, Storage
from engine.runner import cache_dtype, plan_cache

try:
    from engine.ops.cpu import CpuOps, available_isas

    ISAS = available_isas()
except ImportError:
    ISAS = ()

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BACKENDS = ["numpy", *ISAS, "emulate"]
each_backend = pytest.mark.parametrize("name", BACKENDS)
each_backend_and_dtype = pytest.mark.parametrize(
    "name, dtype",
    [(name, dtype) for name in BACKENDS for dtype in DTYPES if name != "emulate" or dtype == BF16],
    ids=str,
)
PROMPT = np.random.default_rng(0).integers(0, 256, 40).tolist()


@lru_cache
def backend(name: str) -> Ops:
    if name in ISAS:
        return CpuOps(2, name)
    if name == "emulate":
        emulator()
    return select_backend(name, deterministic=name == "emulate")


@lru_cache
def emulator() -> None:
    try:
        EmulatedModule.compile("embed.cu")
    except DeviceError as error:
        pytest.skip(f"kernels cannot be compiled for the emulator: {error}")


# ---- codes -----------------------------------------------------------------------------------------------------------

VALUES = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float64)  # of the codes 0 … 126, ascending


def nearest(x: NDArray[Any]) -> NDArray[np.uint8]:
    """By distance to every number there is; of two as near the one with the even code."""
    magnitude = np.abs(x.astype(np.float64))
    high = np.clip(np.searchsorted(VALUES, magnitude), 1, 126)
    low = high - 1
    down, up = magnitude - VALUES[low], VALUES[high] - magnitude
    take_high = (up < down) | ((up == down) & (high % 2 == 0))
    return (np.where(take_high, high, low) | np.where(np.signbit(x), 128, 0)).astype(np.uint8)


def hard_cases(dtype: np.dtype[Any]) -> NDArray[Any]:
    """Every number of E4M3, the middles between them, their neighbours in fp32; beyond ±448; subnormals; both zeros."""
    middles = (VALUES[1:] + VALUES[:-1]) / 2
    near = np.concatenate([VALUES, middles]).astype(F32)
    beyond = np.array([463.9, 464, 464.1, 479, 480, 1e4, 6e4, 1e-8, 1e-40, 2.0**-149], F32)
    magnitudes = np.concatenate([near, np.nextafter(near, F32.type(0)), np.nextafter(near, F32.type(np.inf)), beyond])
    return np.concatenate([magnitudes, -magnitudes]).astype(dtype)


def codes_of(cache: Any, layer: int, D: int) -> list[NDArray[np.uint8]]:
    """K's and V's [blocks, KVH, 16, D] out of a backend's layout."""
    if isinstance(cache, ReferenceKVCache):
        return [x[layer].view(np.uint8).transpose(0, 2, 1, 3) for x in (cache.k, cache.v)]
    if not hasattr(cache, "tiles"):
        return [np.asarray(x[layer][:-1]) for x in (cache.k, cache.v)]
    tiles = cache.tiles(layer)  # as engine/ops/cpu/kv_cache.h draws them
    KVH, blocks, _ = tiles.shape
    lines = tiles.reshape(KVH, blocks, -1, 4, 2, 8)  # line of 64, quarter, line of bf16, element
    k, v = np.split(lines.transpose(0, 1, 2, 4, 3, 5).reshape(KVH, blocks, -1), [16 * D], axis=2)
    k = k.reshape(KVH, blocks, D // 2, 16, 2).transpose(1, 0, 3, 2, 4).reshape(blocks, KVH, 16, D)
    v = v.reshape(KVH, blocks, 16, -1).transpose(1, 0, 2, 3)
    assert not v[..., D:].any()
    return [k, v[..., :D]]


def table(P: int, D: int, *, turned: bool) -> NDArray[np.float32]:
    angles = np.arange(P)[:, None] * 10.0 ** (-np.arange(D // 2) / D) * turned
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(F32)


def write(ops: Ops, qkv: Any, rope: Any, batch: Any, cache: Any, H: int, D: int, **norms: Any) -> NDArray[Any]:
    constant = {name: None if norm is None else ops.constant(norm) for name, norm in norms.items()}
    out = ops.rope_and_cache(
        ops.constant(qkv),
        ops.constant(rope),
        ops.stage(batch),
        cache,
        1,
        q_norm=constant.get("q_norm"),
        k_norm=constant.get("k_norm"),
        eps=1e-6,
        out=ops.empty((len(qkv), H * D), qkv.dtype),
    )
    return ops.to_host(out)


def new_cache(ops: Ops, blocks: int, KVH: int, D: int, dtype: np.dtype[Any], scales: Any = None) -> Any:
    return ops.new_kv_cache(
        num_layers=2, num_blocks=blocks, num_kv_heads=KVH, head_dim=D, dtype=E4M3, activations=dtype, scales=scales
    )


@each_backend_and_dtype
@pytest.mark.parametrize("scales", [None, (0.37, 3.0)], ids=str)
def test_codes_are_the_nearest(name: str, dtype: np.dtype[Any], scales: tuple[float, float] | None) -> None:
    H, KVH, D = 2, 2, 24
    x = hard_cases(dtype)
    T = -(-len(x) // (KVH * D))
    paging = scattered(np.random.default_rng(1), [T], 16)
    batch, ops = paging.batch([(0, 0, T)]), backend(name)
    x = np.resize(x, (T, KVH * D))
    given = None if scales is None else np.array([[9, scales[0]], [9, scales[1]]], F32)
    cache = new_cache(ops, total_blocks(paging), KVH, D, dtype, given)
    write(
        ops, np.concatenate([np.ones((T, H * D), dtype), x, -x], axis=1), table(T, D, turned=False), batch, cache, H, D
    )
    rows = batch.slot_mapping // 16, slice(None), batch.slot_mapping % 16
    for kind, codes, values, scale in zip("kv", codes_of(cache, 1, D), (x, -x), scales or (1, 1), strict=True):
        wanted = nearest(values.astype(F32) / np.float32(scale)).reshape(T, KVH, D)
        found = codes[rows]
        if kind == "k":  # turned by nothing it is 1 · x − 0 · y, which may change a zero's sign
            found, wanted = (np.where(c == 128, 0, c) for c in (found, wanted))
        np.testing.assert_array_equal(found, wanted)
    assert not any(codes.any() for codes in codes_of(cache, 0, D))


@each_backend_and_dtype
@pytest.mark.parametrize("D", [8, 24, 64, 256])
@pytest.mark.parametrize("with_norm", [False, True])
def test_codes_are_the_same_everywhere(name: str, dtype: np.dtype[Any], D: int, with_norm: bool) -> None:
    """Norm and rotation in fp32, then one rounding: not a rounding to the activations' dtype before it."""
    rng = np.random.default_rng(D)
    H, KVH = 6, 2
    paging = scattered(rng, [50, 30], 16)
    batch = paging.batch([(0, 38, 50), (1, 29, 30)])
    qkv = (rng.normal(0, 1, (13, (H + 2 * KVH) * D)) * 10 ** rng.uniform(-4, 3, (13, 1))).astype(dtype)
    norms = {n: rng.normal(1, 0.2, D).astype(F32) if with_norm else None for n in ("q_norm", "k_norm")}
    scales = rng.uniform(0.1, 3, (2, 2)).astype(F32)
    found = []
    for ops in (ReferenceOps(), backend(name)):
        cache = new_cache(ops, total_blocks(paging), KVH, D, dtype, scales)
        q = write(ops, qkv, table(60, D, turned=True), batch, cache, H, D, **norms)
        found.append((q, *codes_of(cache, 1, D)))
    assert_same_bits(found[1][0], found[0][0])
    for own, reference in zip(found[1][1:], found[0][1:], strict=True):
        np.testing.assert_array_equal(own, reference)
        assert own.any()


@each_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_and_infinity_are_refused(name: str, bad: float, where: str) -> None:
    H, KVH, D = 2, 1, 16
    paging, ops = scattered(np.random.default_rng(1), [9], 16), backend(name)
    qkv = np.ones((9, (H + 2 * KVH) * D), BF16)
    cache = new_cache(ops, total_blocks(paging), KVH, D, BF16)
    rope, batch = table(9, D, turned=False), paging.batch([(0, 0, 9)])
    qkv[7, 3] = bad  # q may hold anything
    write(ops, qkv, rope, batch, cache, H, D)
    qkv[7, (H + (where == "v") * KVH) * D + 11] = bad
    with pytest.raises(NumericalError):
        write(ops, qkv, rope, batch, cache, H, D)


@each_backend
def test_scales_that_do_not_fit(name: str) -> None:
    sizes = {"num_layers": 2, "num_blocks": 1, "num_kv_heads": 1, "head_dim": 8}
    for bad in (np.ones((2, 3), F32), np.zeros((2, 2), F32), np.full((2, 2), np.inf, F32)):
        with pytest.raises(InvalidArgument, match="scales of a KV cache"):
            backend(name).new_kv_cache(**sizes, dtype=E4M3, activations=BF16, scales=bad)
    with pytest.raises(InvalidArgument, match="bfloat16 has no scales"):
        backend(name).new_kv_cache(**sizes, dtype=BF16, scales=np.ones((2, 2), F32))
    plain, narrow = (backend(name).new_kv_cache(**sizes, dtype=dtype, activations=BF16) for dtype in (BF16, E4M3))
    assert narrow.nbytes * 2 == plain.nbytes


# ---- attention -------------------------------------------------------------------------------------------------------


class Scene:
    """Sequences whose K and V are in an E4M3 cache with scales, and their queries."""

    def __init__(self, ops: Ops, dtype: np.dtype[Any], H: int, KVH: int, D: int, lengths: list[int]) -> None:
        rng = np.random.default_rng(D)
        self.ops, self.dtype, self.H, self.KVH, self.D = ops, dtype, H, KVH, D
        self.scales = np.array([[1, 0.6], [1, 1.7]], F32)
        self.paging = scattered(rng, lengths, 16)
        self.cache = new_cache(ops, total_blocks(self.paging), KVH, D, dtype, self.scales)
        self.rope = table(max(lengths), D, turned=False)
        self.qkv = [rng.normal(0, 1, (n, (H + 2 * KVH) * D)).astype(dtype) for n in lengths]
        for s, n in enumerate(lengths):
            write(ops, self.qkv[s], self.rope, self.paging.batch([(s, 0, n)]), self.cache, H, D)

    def queries(self, spans: Any) -> NDArray[Any]:
        return np.concatenate([self.qkv[s][start:stop, : self.H * self.D] for s, start, stop in spans])

    def attend(self, *spans: tuple[int, int, int], window: int | None = None) -> NDArray[Any]:
        q, batch = self.queries(spans), self.ops.stage(self.paging.batch(list(spans)))
        out = self.ops.empty(q.shape, self.dtype)
        scale = self.D**-0.5
        return self.ops.to_host(
            self.ops.attention(self.ops.constant(q), batch, self.cache, 1, scale=scale, window=window, out=out)
        )

    def expected(self, *spans: tuple[int, int, int], window: int | None = None) -> tuple[Any, Any]:
        """Dense masks in float64 over the codes' values; and the same of |v|."""
        found: tuple[list[Any], list[Any]] = [], []
        for s, start, stop in spans:
            n, slots = stop, self.paging.tables[s][np.arange(stop) // 16]
            k, v = (
                codes[slots, :, np.arange(n) % 16].view(E4M3).astype(np.float64) * np.float64(scale)
                for codes, scale in zip(codes_of(self.cache, 1, self.D), self.scales[:, 1], strict=True)
            )
            q = self.qkv[s][:n, : self.H * self.D].astype(np.float64).reshape(n, self.H, self.D)
            k, v = (np.repeat(x, self.H // self.KVH, axis=1) for x in (k, v))
            i, j = np.indices((n, n))
            visible = (j <= i) & (i - j < (window or n))
            scores = np.where(visible, self.D**-0.5 * np.einsum("ihd,jhd->hij", q, k), -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            for rows, values in zip(found, (v, np.abs(v)), strict=True):
                rows.append(np.einsum("hij,jhd->ihd", p, values)[start:].reshape(stop - start, -1))
        return np.concatenate(found[0]), np.concatenate(found[1])


ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}


@each_backend_and_dtype
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("H, KVH, D", [(7, 1, 64), (4, 2, 40), (2, 2, 256)])
def test_attention_equals_float64(
    name: str, dtype: np.dtype[Any], window: int | None, H: int, KVH: int, D: int
) -> None:
    """The result is rounded to dtype, on a GPU each weight as well; fp32 sums and exponentials add some 1e-5 of |v|."""
    scene = Scene(backend(name), dtype, H, KVH, D, [150, 40, 65])
    spans = (0, 90, 150), (1, 0, 40), (2, 64, 65)
    values, sizes = scene.expected(*spans, window=window)
    error = np.abs(scene.attend(*spans, window=window).astype(np.float64) - values)
    weights = 1.01 * sizes if name == "emulate" else 0
    assert (error <= ROUNDING[dtype] * (np.abs(values) + weights) + 1e-5 * sizes).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("D", [8, 24, 72, 128])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_has_the_bits_of_the_same_values_in_bf16(isa: str, D: int, window: int | None) -> None:
    """Codes are expanded, exactly, before anything is computed."""
    H, KVH, lengths, ops = 6, 2, [150, 77], backend(isa)
    rng = np.random.default_rng(D)
    paging = scattered(rng, lengths, 16)
    exact = rng.choice(VALUES[:100], (sum(lengths), (H + 2 * KVH) * D)) * rng.choice([-1, 1], (sum(lengths), 1))
    batch = paging.batch([(0, 0, 150), (1, 0, 77)])
    outs = []
    for dtype in (E4M3, BF16):
        cache = ops.new_kv_cache(
            num_layers=2, num_blocks=total_blocks(paging), num_kv_heads=KVH, head_dim=D, dtype=dtype
        )
        q = write(ops, exact.astype(BF16), table(150, D, turned=False), batch, cache, H, D)
        outs.append(ops.attention(q, batch, cache, 1, scale=0.05, window=window, out=np.zeros_like(q)))
    assert_same_bits(*outs)


@each_backend_and_dtype
@pytest.mark.parametrize("H, KVH, D, window", [(7, 1, 64, None), (4, 2, 200, 40)])
def test_rows_do_not_depend_on_chunks_or_batches(
    name: str, dtype: np.dtype[Any], H: int, KVH: int, D: int, window: int | None
) -> None:
    n = 150
    scene = Scene(backend(name), dtype, H, KVH, D, [n, 77, 20])
    whole = scene.attend((0, 0, n), window=window)
    for cut in (1, 16, 63, 64, 149):
        pieces = [scene.attend((0, 0, cut), window=window), scene.attend((0, cut, n), window=window)]
        assert_same_bits(np.concatenate(pieces), whole)
    for t in (0, 15, 64, 149):
        assert_same_bits(scene.attend((0, t, t + 1), window=window), whole[t : t + 1])
    batched = scene.attend((2, 19, 20), (0, 3, n), (1, 40, 77), window=window)
    assert_same_bits(batched[1 : 1 + n - 3], whole[3:])


# ---- whole models ----------------------------------------------------------------------------------------------------


def logits(path: Path, device: str, **options: Any) -> NDArray[np.float32]:
    with LLM(path, device=device, max_model_len=64, max_num_seqs=4, **{"kv_cache_dtype": "fp8", **options}) as llm:
        return llm.logits(PROMPT)


def relative(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> tuple[float, float]:
    """Root mean square and largest difference, in standard deviations."""
    error = got - wanted
    return float(np.sqrt(np.mean(error**2)) / wanted.std()), float(np.abs(error).max() / wanted.std())


@pytest.mark.parametrize("case", ["qwen3_tied", "mistral_window", "qwen2_tied_group7", "llama_head24_mha6"])
def test_backends_agree(tmp_path: Path, case: str) -> None:
    """To the limits of bf16 caches. The cache costs more than that, so that both have it shows."""
    path = write_model(case, tmp_path)
    numpy, cpu = (logits(path, device, dtype="bfloat16") for device in ("numpy", "cpu"))
    rms, largest = relative(cpu, numpy)
    assert rms <= 0.02 and largest <= 0.1
    emulator()
    rms, largest = relative(logits(path, "emulate", dtype="bfloat16"), cpu)
    assert rms <= 0.02 and largest <= 0.1
    assert 0.005 < relative(logits(path, "cpu", dtype="float32"), logits(path, "cpu", kv_cache_dtype="auto"))[0] < 0.2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_activations_on_the_cpu(tmp_path: Path, dtype: str) -> None:
    path = write_model("qwen3_tied", tmp_path)
    rms, _ = relative(logits(path, "cpu", dtype=dtype), logits(path, "numpy", dtype=dtype))
    assert rms <= (1e-5 if dtype == "float32" else 0.01)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_activations_are_refused_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    emulator()
    with pytest.raises(InvalidArgument, match=f"bfloat16.*not .*{dtype}"):
        logits(write_model("qwen3_tied", tmp_path), "emulate", dtype=dtype)


def test_a_batch_on_the_device_generates_as_alone(tmp_path: Path) -> None:
    """Recorded decode steps, padding rows among them, over codes."""
    emulator()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompts = [PROMPT[:9], PROMPT[5:25], PROMPT[:3]]
    path = write_model("qwen3_tied", tmp_path)
    with LLM(path, device="emulate", dtype="bfloat16", max_model_len=64, kv_cache_dtype="fp8") as llm:
        together = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
        assert together == [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]


# ---- the option ------------------------------------------------------------------------------------------------------


def test_a_cache_of_the_same_size_holds_twice_as_much() -> None:
    config = read_config(CASES["qwen3_tied"].config, "a test's model")
    plans = [
        plan_cache(
            config, EngineConfig(kv_cache_bytes=1 << 20, max_num_seqs=999), ReferenceOps(), cache_dtype(name, BF16)
        )
        for name in ("auto", "fp8")
    ]
    assert plans[1].num_blocks == 2 * plans[0].num_blocks and plans[1].nbytes == plans[0].nbytes
    assert "in bfloat16" in str(plans[0]) and "in FP8 (E4M3)" in str(plans[1])


@pytest.mark.parametrize("value", ["fp8_e5m2", "int8", "", None, 8])
def test_unknown_names_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidArgument, match="kv_cache_dtype"):
        LLM(write_model("qwen3_tied", tmp_path), kv_cache_dtype=value)


# ---- scales of checkpoints -------------------------------------------------------------------------------------------


def scheme(kv_cache: str | None) -> QuantScheme:
    rule = Rule(Pattern("Linear", "linear"), Storage("fp8", "modelopt", (0, 0)))
    return QuantScheme("modelopt FP8", "fp8", (rule,), kv_cache=kv_cache)


def test_scales_are_read_under_both_names(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.self_attn.k_proj.k_scale": f32(0.5),
        "model.layers.0.self_attn.v_proj.v_scale": f32([0.25]),
        "model.layers.2.self_attn.k_scale": f32(3.0),
    }
    write_file(tmp_path / "model.safetensors", tensors)
    scales = kv_cache_scales(tmp_path, scheme("FP8"), 3)
    np.testing.assert_array_equal(scales, np.array([[0.5, 1, 3], [0.25, 1, 1]], F32))
    assert kv_cache_scales(tmp_path, scheme("NVFP4"), 3) is None  # they mean something else there
    assert kv_cache_scales(tmp_path, None, 3) is None
    with pytest.raises(WeightsError, match="layers.2.self_attn.k_scale"):
        kv_cache_scales(tmp_path, scheme("FP8"), 2)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, [1.0, 1.0]])
def test_bad_scales_are_refused(tmp_path: Path, value: Any) -> None:
    write_file(tmp_path / "model.safetensors", {"model.layers.0.self_attn.k_scale": f32(value)})
    with pytest.raises(WeightsError, match="k_scale"):
        kv_cache_scales(tmp_path, scheme("FP8"), 1)
