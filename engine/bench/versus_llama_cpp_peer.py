"""The peer's side of `engine.bench.versus_llama_cpp`, for an environment of its own with llama-cpp-python and gguf.

Started as `python versus_llama_cpp_peer.py MODEL.gguf --threads N`; makes the file first if it is missing (random
weights in the Qwen2.5-0.5B shape with a vocabulary of 32,000), then answers one JSON request per line: {"prefill": T}
or {"decode": count} with the seconds taken. A prefill is one batch of T tokens with the last token's logits, a decode
is `count` single tokens after a prompt of one. Imports nothing of the engine.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

LAYERS, C, F, H, KVH, V = 24, 896, 4864, 14, 2, 32000


def write_gguf(path: Path, weight_type: str, head_type: str) -> None:
    """A Qwen2-shaped file with random weights of the given types; embeddings and head are one tensor (tied)."""
    rng = np.random.default_rng(0)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "qwen2")
    writer.add_context_length(2048)
    writer.add_embedding_length(C)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(KVH)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += [f"token{i}" for i in range(len(tokens), V)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (V - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name: str, N: int, K: int, kind: str) -> None:
        raw = gguf.GGMLQuantizationType[kind.upper()]
        if kind == "nvfp4":
            blocks = random_nvfp4(rng, N, K)
        else:
            blocks = gguf.quants.quantize(rng.standard_normal((N, K), np.float32) * np.float32(K**-0.5), raw)
        writer.add_tensor(name, blocks, raw_dtype=raw)

    matrix("token_embd.weight", V, C, head_type)
    writer.add_tensor("output_norm.weight", np.ones(C, np.float32))
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", np.ones(C, np.float32))
        for name, N in (("attn_q", C), ("attn_k", KVH * C // H), ("attn_v", KVH * C // H)):
            matrix(f"{block}.{name}.weight", N, C, weight_type)
            writer.add_tensor(f"{block}.{name}.bias", np.zeros(N, np.float32))
        matrix(f"{block}.attn_output.weight", C, C, weight_type)
        matrix(f"{block}.ffn_gate.weight", F, C, weight_type)
        matrix(f"{block}.ffn_up.weight", F, C, weight_type)
        matrix(f"{block}.ffn_down.weight", C, F, weight_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def random_nvfp4(rng: np.random.Generator, N: int, K: int) -> NDArray[np.uint8]:
    """Valid blocks of llama.cpp's NVFP4, bytes [N, K / 64 * 36]: gguf knows the type and cannot quantise to it.

    A block is 64 k: four UE4M3 scales, one per 16 k, then 32 bytes of codes, two a byte. Codes are uniform and scales
    lie in 2^-6 ... 2^-5, which gives values about as large as the other types' weights.
    """
    blocks = rng.integers(0, 256, (N, K // 64, 36), np.uint8)
    blocks[..., :4] = rng.integers(0x08, 0x10, (N, K // 64, 4), np.uint8)
    return blocks.reshape(N, -1)


class Peer:
    """One model in a llama.cpp context, CPU only."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        context_params = llama_cpp.llama_context_default_params()
        context_params.n_ctx = 2048
        context_params.n_batch = context_params.n_ubatch = 512
        context_params.n_threads = context_params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, context_params)
        self._memory = llama_cpp.llama_get_memory(self._context)

    def _run(self, tokens: list[int], position: int) -> None:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(tokens) - 1
        status = llama_cpp.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode failed with status {status}"
        assert llama_cpp.llama_get_logits_ith(self._context, -1)[0] is not None
        llama_cpp.llama_batch_free(batch)

    def prefill(self, T: int) -> float:
        """Seconds for T tokens in one batch."""
        llama_cpp.llama_memory_clear(self._memory, True)
        tokens = [300 + i * 7919 % 31000 for i in range(T)]
        start = time.perf_counter()
        self._run(tokens, 0)
        return time.perf_counter() - start

    def decode(self, count: int) -> float:
        """Seconds for `count` tokens, one at a time, after a prompt of one."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self._run([300], 0)
        start = time.perf_counter()
        for i in range(count):
            self._run([301 + i], 1 + i)
        return time.perf_counter() - start


@llama_cpp.llama_log_callback
def _silence(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """stdout carries answers only."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--type", default="bf16")
    parser.add_argument("--head", default="bf16")
    options = parser.parse_args()
    if not options.model.exists():
        write_gguf(options.model, options.type, options.head)
    peer = Peer(options.model, options.threads)
    print(json.dumps({"llama_cpp_python": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        ((what, count),) = json.loads(line).items()
        print(json.dumps(getattr(peer, what)(count)), flush=True)


if __name__ == "__main__":
    main()
