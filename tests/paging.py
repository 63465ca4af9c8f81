"""Batches over scattered KV-cache blocks, for tests of the operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch


@dataclass(frozen=True)
class Paging:
    """Which physical blocks each sequence owns."""

    tables: list[NDArray[np.int32]]
    block_size: int

    def batch(self, spans: list[tuple[int, int, int]], num_decoding: int | None = None) -> Batch:
        """One step that computes tokens [start, stop) of sequence s for every (s, start, stop).

        num_decoding: how many of these, the first, have decode rows; None: all.
        """
        positions = [np.arange(start, stop, dtype=np.int32) for _, start, stop in spans]
        slots = [
            self.tables[s][p // self.block_size] * self.block_size + p % self.block_size
            for (s, _, _), p in zip(spans, positions, strict=True)
        ]
        width = max(len(self.tables[s]) for s, _, _ in spans)
        counts = [stop - start for _, start, stop in spans]
        return Batch(
            token_ids=np.zeros(sum(counts), np.int32),
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate(slots).astype(np.int32),
            query_start=np.cumsum([0, *counts]).astype(np.int32),
            context_lens=np.array([stop for _, _, stop in spans], np.int32),
            block_tables=np.stack([np.pad(self.tables[s], (0, width - len(self.tables[s]))) for s, _, _ in spans]),
            logit_rows=np.zeros(0, np.int32),
            num_decode_rows=None if num_decoding is None else sum(counts[:num_decoding]),
        )


def scattered(rng: np.random.Generator, lengths: list[int], block_size: int, spare_blocks: int = 3) -> Paging:
    """Room for sequences of these lengths, in blocks that are neither contiguous nor ordered."""
    counts = [-(-length // block_size) for length in lengths]
    blocks = rng.permutation(sum(counts) + spare_blocks).astype(np.int32)
    return Paging(np.split(blocks, np.cumsum(counts))[: len(counts)], block_size)


def total_blocks(paging: Paging) -> int:
    """Blocks a cache needs for these tables."""
    return int(max(table.max() for table in paging.tables)) + 1
