"""The dense decoder that Llama, Mistral, Qwen2 and Qwen3 share: they differ in the flags of `ModelConfig` alone.

Parameter names are those of the Hugging Face checkpoints. Forward and head are separate because logits are wanted for
few rows: the last of each sequence, not of each prompt token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.config import ModelConfig
from engine.core import Batch
from engine.layers import Attention, Context, Embedding, GatedMLP, Linear, Parameter, RMSNorm, RotaryTable
from engine.ops.contract import Array, KVCache
from engine.quant.scheme import HEAD


class Decoder:
    """Embedding, `num_layers` × (attention, MLP), norm, head."""

    redundant_tensors = ("*.rotary_emb.inv_freq",)  # patterns of what older exports carry and the config implies

    def __init__(self, config: ModelConfig, context: Context) -> None:
        V, C = config.vocab_size, config.hidden_size
        self.config = config
        self._ops = context.ops
        self._rope = RotaryTable(context, config.rope, config.head_dim)
        self._embedding = Embedding(context, "model.embed_tokens.weight", V, C)
        self._layers = [
            (
                Attention(context, config, f"{prefix}.self_attn", f"{prefix}.input_layernorm", layer),
                GatedMLP(context, config, f"{prefix}.mlp", f"{prefix}.post_attention_layernorm"),
            )
            for layer in range(config.num_layers)
            for prefix in (f"model.layers.{layer}",)
        ]
        self._norm = RMSNorm(context, "model.norm.weight", C, config.rms_norm_eps)
        self._head = Linear(context, {HEAD: V}, C, bias=False, role="logits")

    def parameters(self) -> Iterator[Parameter]:
        """Every checkpoint tensor this model needs, each exactly once."""
        for attention, mlp in self._layers:
            yield from attention.parameters()
            yield from mlp.parameters()
        yield from self._norm.parameters()
        if not self.config.tie_word_embeddings:
            yield from self._embedding.parameters()
            yield from self._head.parameters()
            return
        (table,) = self._embedding.parameters()

        def fill_both(array: Array) -> Sequence[str]:
            self._head.fill_weight(HEAD, array)
            return table.fill(array)

        yield Parameter(table.name, table.shape, fill_both)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all linear layers' weights, the head's included: what a decode step reads of them."""
        return self._head.nbytes + sum(attention.weight_bytes + mlp.weight_bytes for attention, mlp in self._layers)

    @property
    def tied_tensors(self) -> dict[str, str]:
        """Tensors that only repeat a parameter, if a checkpoint has them at all: name -> that parameter."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}

    def forward(self, batch: Batch, cache: KVCache) -> Array:
        """Hidden states [T, C] before the last norm; writes this step's K and V. Valid until the next call."""
        return self.forward_staged(self._ops.stage(batch), int(batch.positions.max()) + 1, cache)

    def forward_staged(self, step: Any, num_positions: int, cache: KVCache) -> Array:
        """The same of a batch in the backend's memory (`Ops.stage`), its positions below num_positions."""
        rope_table = self._rope.covering(num_positions)
        x = self._embedding(step.token_ids)
        for attention, mlp in self._layers:
            x = attention(x, step, cache, rope_table)
            x = mlp(x, step)
        return x

    def logits(self, hidden: Array) -> Array:
        """Logits float32 [R, V] of rows [R, C] of `forward`'s result. Valid until the next call.

        All count as decode rows, so that a row's logits do not depend on how many are wanted with it. They come few at
        a time: one for a sequence, a scored prompt's in parts.
        """
        return self._head(self._head.prepare_norm(hidden, self._norm), len(hidden), dtype=np.dtype(np.float32))
