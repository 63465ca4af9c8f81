"""The tiny checkpoints themselves: files as Hugging Face writes them, committed results complete and of their size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tiny_models import CASES, PROMPT_TOKENS, V, load_golden, tensors, write_model

from engine.models.registry import read_config


@pytest.mark.parametrize("name", CASES)
def test_golden_is_complete(name: str) -> None:
    golden = load_golden(name)
    assert golden.logits.shape == (PROMPT_TOKENS, V) and golden.logits.dtype == np.float32
    assert len(golden.prompt) == PROMPT_TOKENS and len(golden.greedy) == len(golden.margins) == 16
    assert int(golden.logits[-1].argmax()) == golden.greedy[0]
    assert 0.8 < golden.logits.std() < 1.2


@pytest.mark.parametrize("name", CASES)
def test_config_and_parameters_agree(name: str) -> None:
    """Two readings of one config.json: the readers' ModelConfig, and the checkpoint writer's own."""
    model = read_config(CASES[name].config, name)
    shapes = {tensor: values.shape for tensor, values in tensors(name)}
    layer = "model.layers.1."
    assert shapes["model.embed_tokens.weight"] == (model.vocab_size, model.hidden_size)
    assert shapes[f"{layer}self_attn.q_proj.weight"] == (model.num_heads * model.head_dim, model.hidden_size)
    assert shapes[f"{layer}self_attn.v_proj.weight"] == (model.num_kv_heads * model.head_dim, model.hidden_size)
    assert shapes[f"{layer}mlp.down_proj.weight"] == (model.hidden_size, model.intermediate_size)
    present = {
        "qkv_bias": f"{layer}self_attn.k_proj.bias",
        "o_bias": f"{layer}self_attn.o_proj.bias",
        "mlp_bias": f"{layer}mlp.up_proj.bias",
        "qk_norm": f"{layer}self_attn.q_norm.weight",
    }
    assert {flag: tensor in shapes for flag, tensor in present.items()} == {f: getattr(model, f) for f in present}
    assert model.tie_word_embeddings == ("lm_head.weight" not in shapes)
    assert {str(values.dtype) for _, values in tensors(name)} == {model.dtype}


def test_sharded_files_hold_every_tensor_once(tmp_path: Path) -> None:
    directory = write_model("qwen3_tied", tmp_path / "model", shards=4)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 4
    found: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            assert not set(opened.keys()) & set(found)
            found |= dict.fromkeys(opened.keys(), file.name)
    assert found == index["weight_map"] and set(found) == {tensor for tensor, _ in tensors("qwen3_tied")}
