"""Launches of the sampling kernels, cuda/sample.cu: from logits on the device to the next tokens.

Nothing here allocates or launches. The kernels give the same token for any number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.ops.gpu.launch import Launch
from engine.ops.gpu.launch_rows import row_stride

SOURCE = "sample.cu"
_THREADS = 256  # of kernels that several blocks share a row in
_PER_THREAD = 16  # logits of a row


def row_maxima(logits: Any, keys: Any) -> Launch:
    """logits [S, V] float32; keys [S] uint64, zero before."""
    S, V = logits.shape
    args = [logits, row_stride(logits), keys, np.int32(V)]
    return Launch(SOURCE, "row_maxima", (_chunks(V), S, 1), (_threads(V, _THREADS), 1, 1), 0, args)


def adjust_logits(logits: Any, lists: Mapping[str, Any]) -> Launch:
    """lists: the kernel's arrays by the names it has for them."""
    names = ("mask_start", "mask_ids", "bias_start", "bias_ids", "bias", "penalty_start", "penalty_ids", "counts")
    args = [logits, row_stride(logits), *(lists[name] for name in names)]
    args += [lists[name] for name in ("repetition", "presence", "frequency")]
    return Launch(SOURCE, "adjust_logits", (len(logits), 1, 1), (_THREADS, 1, 1), 0, args)


def token_weights(logits: Any, keys: Any, temperature: Any, weights: Any) -> Launch:
    """temperature [S] float64; weights [S, V] float64."""
    S, V = logits.shape
    args = [logits, row_stride(logits), keys, temperature, weights, np.int32(V)]
    return Launch(SOURCE, "token_weights", (_chunks(V), S, 1), (_threads(V, _THREADS), 1, 1), 0, args)


def sample_rows(
    logits: Any, weights: Any, raw_keys: Any, keys: Any, rows: Mapping[str, Any], token_ids: Any, status: Any
) -> Launch:
    """rows: the kernel's arrays [S] by the names it has for them. weights: None where all rows are greedy."""
    S, V = logits.shape
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "index", "position")
    args = [logits, row_stride(logits), weights, raw_keys, keys, *(rows[name] for name in names)]
    args += [token_ids, status, np.int32(V)]
    return Launch(SOURCE, "sample_rows", (S, 1, 1), (_threads(V, 1024), 1, 1), 0, args)


def _chunks(V: int) -> int:
    """Blocks that share a row."""
    return -(-V // (_THREADS * _PER_THREAD))


def _threads(V: int, most: int) -> int:
    """Whole warps, as many as a row keeps busy."""
    return min(most, -(-V // (32 * _PER_THREAD)) * 32)
