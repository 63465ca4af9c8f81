"""The GPU backend on a GPU, with both kernel loaders: whole models, guarantees, graphs, errors.

Kernels one by one are tested by the emulator's own tests, which the plugin gpu_for_emulator runs on a GPU; what is here
needs the device: that both loaders, recordings and CUDA graphs give the same bits, that batch-mates never matter, and
that a model computes what the CPU computes. Skipped where there is no GPU. Not yet run on any.

Models are made here, in memory: neither files nor tokenizers are needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.config import QuantConfig
from engine.core import Batch, SamplingParams, StepLimits
from engine.errors import CapacityError, DeviceError, NumericalError
from engine.layers import Context
from engine.models.decoder import Decoder
from engine.models.registry import read_config
from engine.ops.backends import select_backend
from engine.ops.gpu.cuda_device import CudaDevice
from engine.ops.gpu.launch import Launch
from engine.quant.registry import METHODS, LayerMethods, resolve
from engine.sampler import SamplerState, sample_row
from engine.workspace import Workspace

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
LOADERS = ("nvrtc", "extension")
VOCAB, CONTEXT = 300, 96
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 256,
    "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 512,
    "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip
PROMPT = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
Logits = NDArray[np.float32]


@lru_cache
def gpu(loader: str) -> CudaDevice | str:
    """The device, or why there is none."""
    try:
        return CudaDevice(loader)
    except DeviceError as problem:
        return str(problem)


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest) -> str:
    found = gpu(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return request.param


@pytest.fixture
def device(loader: str) -> CudaDevice:
    found = gpu(loader)
    assert not isinstance(found, str)
    return found


def most(loader: str, wanted: int, emulated: int) -> int:
    """A size for a GPU, or a small one where the emulator stands in for it."""
    found = gpu(loader)
    return emulated if isinstance(found, CudaDevice) and found.name.startswith("Emulated") else wanted


class Model:
    """A decoder with random weights and sequences of up to CONTEXT tokens, each with cache blocks of its own."""

    def __init__(
        self,
        device: str,
        quant: str = "bf16",
        *,
        sequences: int = 4,
        deterministic: bool = False,
        kv_dtype: np.dtype[Any] = BF16,
    ) -> None:
        self.ops = select_backend(device, deterministic=deterministic)
        config = read_config(CONFIG, "a test's model")
        workspace = Workspace(self.ops)
        methods = LayerMethods(resolve(QuantConfig(quant, "rtn"), None), self.ops, workspace)
        self.decoder = Decoder(config, Context(self.ops, workspace, BF16, methods))
        for parameter in self.decoder.parameters():
            parameter.fill(_values(parameter.name, parameter.shape))
        self._blocks = CONTEXT // self.ops.kv_block_size
        self._lengths = [0] * sequences
        self.cache = self.ops.new_kv_cache(
            num_layers=config.num_layers,
            num_blocks=sequences * self._blocks,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=kv_dtype,
            activations=BF16,
        )

    def step(self, work: Mapping[int, Sequence[int]], prefilling: int = 0) -> dict[int, Logits]:
        """New tokens of some sequences in one batch; logits [n, V] of each. prefilling: how many do, the last ones."""
        batch = self.batch(work, prefilling)
        hidden = self.ops.take_rows(self.decoder.forward(batch, self.cache), batch.logit_rows)
        logits = self.ops.to_host(self.decoder.logits(hidden)).copy()
        for s, tokens in work.items():
            self._lengths[s] += len(tokens)
        return dict(zip(work, np.split(logits, batch.query_start[1:-1]), strict=True))

    def batch(self, work: Mapping[int, Sequence[int]], prefilling: int = 0) -> Batch:
        starts = [self._lengths[s] for s in work]
        positions = np.concatenate([start + np.arange(len(t)) for start, t in zip(starts, work.values(), strict=True)])
        first_slots = np.repeat([s * CONTEXT for s in work], [len(tokens) for tokens in work.values()])
        ends = np.cumsum([0, *map(len, work.values())])
        return Batch(
            token_ids=np.concatenate([np.array(tokens) for tokens in work.values()]).astype(np.int32),
            positions=positions.astype(np.int32),
            slot_mapping=(first_slots + positions).astype(np.int32),
            query_start=ends.astype(np.int32),
            context_lens=(np.array(starts) + np.diff(ends)).astype(np.int32),
            block_tables=np.array([np.arange(self._blocks) + s * self._blocks for s in work], np.int32),
            logit_rows=np.arange(ends[-1], dtype=np.int32),
            num_decode_rows=int(ends[len(work) - prefilling]),
        )


def _values(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape)
    if len(shape) == 2:
        return (values * (1 if "embed" in name else shape[1] ** -0.5)).astype(BF16)
    return (0.1 * values + (0 if name.endswith(".bias") else 1)).astype(BF16)


def device_string(loader: str) -> str:
    return f"cuda:{loader}"


def rows_of(model: Model, tokens: Sequence[int], chunk: int, *, prefills: bool = False) -> Logits:
    """Logits of a text that runs alone, in chunks."""
    parts = [model.step({0: tokens[i : i + chunk]}, int(prefills))[0] for i in range(0, len(tokens), chunk)]
    return np.concatenate(parts)


# ---- what a model computes -------------------------------------------------------------------------------------------


@lru_cache
def on_cpu(quant: str) -> Logits:
    return rows_of(Model("cpu", quant), PROMPT, len(PROMPT))


# Root mean square and largest difference from the CPU, in standard deviations of the logits: the limits. Where
# activations are quantised, a last bit flips codes and cascades: there only the first is held.
LIMITS = {"bf16": (0.02, 0.1), "w4a16": (0.02, 0.1)}


@pytest.mark.parametrize("quant", METHODS)
@pytest.mark.parametrize("prefills", [False, True], ids=["decode", "prefill"])
def test_small_models(loader: str, quant: str, prefills: bool) -> None:
    """With the products, and the order of attention, of either kind of rows."""
    expected = on_cpu(quant)
    found = rows_of(Model(device_string(loader), quant), PROMPT, len(PROMPT), prefills=prefills)
    error = (found - expected) / expected.std()
    rms, largest = LIMITS.get(quant, (0.25, np.inf))
    assert np.sqrt(np.mean(error**2)) <= rms and np.abs(error).max() <= largest


def test_a_small_model_with_a_cache_in_fp8(loader: str) -> None:
    """The same limits; and a text's bits in chunks, deterministically, are those of the whole."""
    expected = rows_of(Model("cpu", kv_dtype=E4M3), PROMPT, len(PROMPT))
    found = rows_of(Model(device_string(loader), kv_dtype=E4M3), PROMPT, len(PROMPT))
    error = (found - expected) / expected.std()
    assert np.sqrt(np.mean(error**2)) <= LIMITS["bf16"][0] and np.abs(error).max() <= LIMITS["bf16"][1]
    tokens = PROMPT[: most(loader, 40, 18)]
    texts = [
        rows_of(Model(device_string(loader), deterministic=True, kv_dtype=E4M3), tokens, chunk) for chunk in (99, 7, 1)
    ]
    assert len({text.tobytes() for text in texts}) == 1


def test_loaders_give_the_same_bits() -> None:
    for name in LOADERS:
        if isinstance(found := gpu(name), str):
            pytest.skip(found)
    for quant in ("bf16", "sharq"):
        first, second = (rows_of(Model(device_string(name), quant), PROMPT, 16) for name in LOADERS)
        assert first.tobytes() == second.tobytes()


def test_nan_is_told_with_the_result(loader: str) -> None:
    ops = select_backend(device_string(loader))
    x = np.ones((3, 64), BF16)
    x[1, 7] = np.nan
    ops.prepare_sharq(ops.constant(x))
    with pytest.raises(NumericalError, match="row 1 of a layer's input"):
        ops.to_host(ops.constant(x))


# ---- guarantees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["bf16", "w4a16", "sharq", "fp8"])
def test_batch_mates_never_matter(loader: str, quant: str) -> None:
    """A sequence's prompt and 3 decode steps, alone and beside up to 63 others, bit for bit."""
    alone = Model(device_string(loader), quant, sequences=1)
    expected = [alone.step({0: PROMPT[:21]})[0], *(alone.step({0: [PROMPT[21 + i]]})[0] for i in range(3))]
    for others in sorted({most(loader, n, min(n, 2)) for n in (1, 7, 16, 33, 63)}):
        model = Model(device_string(loader), quant, sequences=others + 1)
        mates = {s: PROMPT[s % 7 : s % 7 + 5 + s % 20] for s in range(1, others + 1)}
        found = [model.step({0: PROMPT[:21], **mates})[0]]
        for i in range(3):
            found.append(model.step({s: [PROMPT[21 + i]] for s in range(others + 1)})[0])
        for step, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert a.tobytes() == b.tobytes(), f"step {step} beside {others} others"


@pytest.mark.parametrize("quant", ["bf16", "w4a16", "nvfp4", "sharq", "sharq-hif4", "fp8"])
def test_a_long_prompt_in_any_chunk(loader: str, quant: str) -> None:
    """Prefill rows whole, in chunks, token by token, and beside sequences that decode: bit for bit."""
    tokens = (PROMPT * 3)[: most(loader, 90, 18)]

    def text(chunk: int) -> Logits:
        return rows_of(Model(device_string(loader), quant, sequences=1), tokens, chunk, prefills=True)

    expected = text(len(tokens))
    for chunk in (1, 7, 65):
        assert text(chunk).tobytes() == expected.tobytes(), f"chunks of {chunk}"
    model = Model(device_string(loader), quant, sequences=3)
    model.step({1: PROMPT[:9], 2: PROMPT[3:20]})
    decoding = {1: [PROMPT[9]], 2: [PROMPT[20]]}
    assert model.step({**decoding, 0: tokens}, prefilling=1)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("quant", ["bf16", "w4a16", "sharq", "fp8"])
def test_deterministic_in_any_chunk(loader: str, quant: str) -> None:
    """The same text whole, in chunks, token by token, and beside another: bit for bit."""
    tokens = PROMPT[: most(loader, 40, 18)]

    def model(sequences: int = 1) -> Model:
        return Model(device_string(loader), quant, sequences=sequences, deterministic=True)

    expected = rows_of(model(), tokens, len(tokens))
    for chunk in (1, 7, 16):
        assert rows_of(model(), tokens, chunk).tobytes() == expected.tobytes(), f"chunks of {chunk}"
    batched = model(2).step({1: PROMPT[3:12], 0: tokens})[0]
    assert batched.tobytes() == expected.tobytes()


def test_the_same_again(loader: str) -> None:
    for quant in ("bf16", "sharq"):
        first, second = (rows_of(Model(device_string(loader), quant), PROMPT, 16) for _ in range(2))
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("quant", ["bf16", "sharq"])
def test_small_recorded_steps(loader: str, quant: str) -> None:
    """Decode steps replayed from CUDA graphs give the bits of single launches, sampling kernels the host's tokens."""
    model = Model(device_string(loader), quant, sequences=5)
    limits = StepLimits(tokens=64, sequences=5, context=CONTEXT)
    steps = model.ops.new_steps(model.cache, num_heads=CONFIG["num_attention_heads"], limits=limits)
    assert steps is not None
    model.step({s: PROMPT[s : 2 * s + 9] for s in range(5)})
    for S in (5, 3, 1, 3):  # the last replays what the second recorded
        work = {s: [PROMPT[S + s]] for s in range(S)}
        states = [
            SamplerState(SamplingParams(temperature=0.7 * s, top_p=0.9, repetition_penalty=1 + s / 4), seed=s)
            for s in range(S)
        ]
        for state in states:
            state.append(PROMPT[0])
        hidden = steps.hidden(
            model.batch(work), lambda staged, end: model.decoder.forward_staged(staged, end, model.cache)
        )
        replayed = model.ops.to_host(model.decoder.logits(hidden)).copy()
        chosen = steps.choose(hidden, range(S), [state.as_row() for state in states], model.decoder.logits)
        launched = np.concatenate(list(model.step(work).values()))
        assert replayed.tobytes() == launched.tobytes()
        assert chosen == [sample_row(row, state, str).token_id for row, state in zip(launched, states, strict=True)]


# ---- the device ------------------------------------------------------------------------------------------------------


def read_launch(device: CudaDevice, buffer: Any, out: Any) -> Launch:
    args = [buffer, np.int64(buffer.nbytes // 16), out]
    return Launch("read_bandwidth.cu", "read_bandwidth", (3, 1, 1), (64, 1, 1), 0, args)


def test_small_reading_and_memory(device: CudaDevice) -> None:
    """Uploads, writes over, rows, views, repeated rows; and the benchmarks' kernel against NumPy."""
    rng = np.random.default_rng(1)
    host = rng.integers(0, 2**32, (37, 12), np.uint32)
    there = device.upload(host)
    np.testing.assert_array_equal(device.download(there), host)
    np.testing.assert_array_equal(device.download(there[5:9]), host[5:9])
    np.testing.assert_array_equal(device.download(there[-1].view(np.dtype(np.uint8))), host[-1].view(np.uint8))
    for _ in range(9):  # more than copies that may be under way
        host = rng.integers(0, 2**32, (37, 12), np.uint32)
        device.write(there, host)
    np.testing.assert_array_equal(device.download(there), host)
    np.testing.assert_array_equal(device.download(device.repeat_rows(host, 100)), np.resize(host, (100, 12)))
    out = device.zeros((1,), np.dtype(np.uint32))
    device.launch(read_launch(device, there, out))
    assert device.download(out)[0] == np.bitwise_xor.reduce(host, axis=None)


def test_small_recordings_and_graphs(device: CudaDevice) -> None:
    """A recording, and a graph captured from launches or from a recording, do what the launches do."""
    host = np.random.default_rng(2).integers(0, 2**32, 4096, np.uint32)
    there, out = device.upload(host), device.zeros((1,), np.dtype(np.uint32))
    once, twice = np.bitwise_xor.reduce(host), 0
    launch = read_launch(device, there, out)
    device.record([launch])()
    assert device.download(out)[0] == once
    device.record([launch, launch, launch])()
    assert device.download(out)[0] == twice
    graph = device.capture(lambda: device.launch(launch))  # runs it once
    assert device.download(out)[0] == once
    graph.run()
    assert device.download(out)[0] == twice
    recording = device.record([launch] * 5)
    graph = device.capture(recording)
    graph.run()
    assert device.download(out)[0] == twice and device.seconds(graph.run) > 0


def test_a_captured_step_is_the_step(loader: str) -> None:
    """Logits of a decode step replayed as a graph, after its arrays were overwritten."""
    model = Model(device_string(loader), "bf16", sequences=2)
    model.step({0: PROMPT[:9], 1: PROMPT[4:10]})
    device = model.ops.device  # type: ignore[attr-defined]  # GpuOps has one
    batch = model.batch({0: [PROMPT[9]], 1: [PROMPT[10]]})
    expected = model.ops.to_host(model.decoder.logits(model.decoder.forward(batch, model.cache))).copy()
    staged = model.ops.stage(batch)
    model.ops.stage = lambda _: staged  # type: ignore[method-assign]  # no copy from the host in a graph
    kept: list[Any] = []
    graph = device.capture(lambda: kept.append(model.decoder.logits(model.decoder.forward(batch, model.cache))))
    device.write(kept[-1], np.zeros(kept[-1].shape, np.float32))
    graph.run()
    assert device.download(kept[-1]).tobytes() == expected.tobytes()


def test_errors_name_the_kernel(loader: str, device: CudaDevice) -> None:
    out = device.zeros((1,), np.dtype(np.uint32))
    launch = read_launch(device, device.upload(np.zeros(64, np.uint32)), out)
    with pytest.raises(DeviceError, match="read_bandwidth"):
        device.launch(launch._replace(shared=1 << 20))  # more than any GPU has
    with pytest.raises(DeviceError, match="no_such_kernel"):
        device.launch(launch._replace(kernel="no_such_kernel"))
    if loader == "extension":
        with pytest.raises(DeviceError, match=r"takes 3 arguments, not 2|argument"):
            device.launch(launch._replace(args=launch.args[:2]))
    CudaDevice(loader, debug=True).launch(launch)


def test_too_little_memory_is_told(device: CudaDevice) -> None:
    with pytest.raises(CapacityError, match=r"the GPU has no \d+ MiB left \(\d+ MiB are free\)"):
        device.empty((device.memory_bytes * 2,), np.dtype(np.uint8))
