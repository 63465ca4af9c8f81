"""Run Transformers once on the tiny checkpoints and on config.json variants; write the results the tests compare with.

    python tests/golden/make_golden.py        (development only: needs torch and transformers; about a minute)

Writes beside itself:
    logits.npz      per case float32 [PROMPT_TOKENS, V]: eager attention, float32, one thread
    golden.json     versions; per case the weights' digest, 16 greedy tokens with top-2 margins, bfloat16 error
    configs.json    config.json variants (published models and corner cases) with what Transformers reads from each
    rope.npz        per variant inverse frequencies [D/2], attention factor and table rows at ROPE_POSITIONS

It refuses to write a case that does not show its own feature (`TinyCase.without`), that eager and SDPA attention
disagree on, or whose parameters Transformers does not all find.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from config_variants import ROPE_POSITIONS, VARIANTS  # noqa: E402
from tiny_models import CASES, prompt, weights_digest, write_model  # noqa: E402

GREEDY_TOKENS = 16


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logits, cases = {}, {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            logits[name], cases[name] = run_case(name, write_model(name, Path(folder)))
        facts = f"std {logits[name].std():.3f}, least margin {min(cases[name]['margins']):.4f}"
        print(f"{name}: {facts}, bfloat16 error {cases[name]['bfloat16_rms']}")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    np.savez_compressed(HERE / "logits.npz", **logits)
    write_json("golden.json", versions, "cases", cases)
    configs, ropes = read_variants()
    write_json("configs.json", versions, "variants", configs)
    np.savez_compressed(HERE / "rope.npz", **ropes)


def run_case(name: str, directory: Path) -> tuple[np.ndarray, dict[str, Any]]:
    reference = forward(load(directory), prompt())
    std = reference.std()
    sdpa = forward(load(directory, attn_implementation="sdpa"), prompt())
    assert np.abs(reference - sdpa).max() < 1e-4 * std, f"{name}: eager and SDPA attention disagree"
    if CASES[name].without:
        change = rms(reference - forward(load(directory, overrides=CASES[name].without), prompt())) / std
        assert change > 0.02, f"{name}: the feature changes logits by {change:.3f} of their deviation only"
    bfloat16 = forward(load(directory, dtype=torch.bfloat16), prompt())
    tokens, margins = greedy(load(directory))
    return reference, {
        "digest": weights_digest(name),
        "greedy": tokens,
        "margins": [round(margin, 6) for margin in margins],
        "bfloat16_rms": round(rms(reference - bfloat16) / float(std), 5),
    }


def load(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    overrides: dict[str, Any] | None = None,
) -> Any:
    config = read_by_transformers(json.loads((directory / "config.json").read_text()) | (overrides or {}))
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, problems
    return model.eval()


def read_by_transformers(raw: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return AutoConfig.from_pretrained(folder)


@torch.no_grad()
def forward(model: Any, tokens: list[int]) -> np.ndarray:
    return np.asarray(model(torch.tensor([tokens])).logits[0].float().numpy(), np.float32)


def greedy(model: Any) -> tuple[list[int], list[float]]:
    """By recomputing the whole sequence for each token: no cache to go wrong, no stop token."""
    tokens, margins = prompt(), []
    for _ in range(GREEDY_TOKENS):
        row = forward(model, tokens)[-1]
        second, first = np.argsort(row)[-2:]
        margins.append(float(row[first] - row[second]))
        tokens.append(int(first))
    return tokens[-GREEDY_TOKENS:], margins


def read_variants() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    configs, ropes = {}, {}
    for name, raw in VARIANTS.items():
        config = read_by_transformers(raw)
        configs[name] = {"config": raw, "expected": expected(config)}
        rotary = rotary_module(config)
        ropes[f"{name}/inv_freq"] = rotary.inv_freq.numpy().astype(np.float32)
        ropes[f"{name}/attention_factor"] = np.float64(rotary.attention_scaling)
        cos, sin = rotary(torch.zeros(1), torch.tensor([ROPE_POSITIONS]))
        half = cos.shape[-1] // 2
        ropes[f"{name}/table"] = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1).numpy().astype(np.float32)
    return configs, ropes


def rotary_module(config: Any) -> Any:
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config).model.rotary_emb)
    return kind(config)


def expected(config: Any) -> dict[str, Any]:
    """What Transformers makes of a config, read off the model it builds wherever that shows it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    shapes = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    head_dim = layer.self_attn.head_dim
    eos = config.eos_token_id
    return {
        "vocab_size": model.lm_head.weight.shape[0],
        "hidden_size": model.lm_head.weight.shape[1],
        "intermediate_size": shapes["mlp.gate_proj.weight"][0],
        "num_layers": len(model.model.layers),
        "num_heads": shapes["self_attn.q_proj.weight"][0] // head_dim,
        "num_kv_heads": shapes["self_attn.k_proj.weight"][0] // head_dim,
        "head_dim": head_dim,
        "rms_norm_eps": layer.input_layernorm.variance_epsilon,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_windows": [layer_window(config, decoder) for decoder in model.model.layers],
        "tie_word_embeddings": config.tie_word_embeddings,
        "qkv_bias": "self_attn.k_proj.bias" in shapes,
        "o_bias": "self_attn.o_proj.bias" in shapes,
        "mlp_bias": "mlp.down_proj.bias" in shapes,
        "qk_norm": "self_attn.q_norm.weight" in shapes,
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32",
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": [] if eos is None else eos if isinstance(eos, list) else [eos],
    }


def layer_window(config: Any, decoder: Any) -> int | None:
    if config.model_type == "mistral":
        return config.sliding_window
    return getattr(decoder.self_attn, "sliding_window", None)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def write_json(name: str, versions: dict[str, str], key: str, records: dict[str, Any]) -> None:
    """{"versions": …, key: {name: record, …}} with a line for each record, so that a change shows as a line."""
    lines = ",\n".join(f" {json.dumps(label)}: {json.dumps(record)}" for label, record in records.items())
    text = f'{{"versions": {json.dumps(versions)},\n"{key}": {{\n{lines}\n}}}}\n'
    (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
