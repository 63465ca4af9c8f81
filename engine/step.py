"""What one step computes: chunks of sequences, and the `Batch` of arrays that tells the model so.

The scheduler chooses the chunks; here they become rows. Nothing is decided and no state is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.core import Batch
from engine.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens [start, end) of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def prefills(self) -> bool:
        """Whether its rows are prefill rows; otherwise all are decode rows."""
        return self.start < self.sequence.num_prefill


class LogitRow(NamedTuple):
    """Whose logits a row holds: those after `sequence.tokens[position]`. is_last: the next token is sampled from it."""

    sequence: Sequence
    position: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """One step's work. `batch` holds the chunks back to back; `logit_rows[i]` describes `batch.logit_rows[i]`."""

    batch: Batch
    chunks: tuple[Chunk, ...]
    logit_rows: tuple[LogitRow, ...]
    preempted: tuple[Sequence, ...]  # that lost their blocks to make room, in the order they were chosen

    @property
    def sampled(self) -> list[tuple[int, Sequence]]:
        """(i, sequence) for each sequence that gets a token: its logits are the i-th row of the model's [R, V]."""
        return [(i, row.sequence) for i, row in enumerate(self.logit_rows) if row.is_last]


def build_step(chunks: list[Chunk], preempted: list[Sequence], block_size: int) -> ScheduledStep:
    """Lay the chunks out as rows, decode rows first. Each sequence's block table covers at least its chunk's end."""
    chunks = sorted(chunks, key=lambda chunk: chunk.prefills)  # stable
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    ends = np.array([chunk.end for chunk in chunks], np.int32)
    query_start = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(ends - starts, out=query_start[1:])
    owners = np.repeat(np.arange(len(chunks)), ends - starts)  # [T], row -> chunk
    positions = np.arange(query_start[-1], dtype=np.int32) - (query_start[:-1] - starts)[owners]
    num_blocks = -(-ends // block_size)
    block_tables = np.zeros((len(chunks), num_blocks.max()), np.int32)
    for row, count, chunk in zip(block_tables, num_blocks, chunks, strict=True):
        row[:count] = chunk.sequence.block_table[:count]

    logit_rows = []
    for seq, start, end in chunks:
        sampled_at = None if seq.only_scored else len(seq.tokens) - 1
        logit_rows += [LogitRow(seq, p, p == sampled_at) for p in range(max(start, seq.next_logit), end)]
    owed_from = np.array([chunk.sequence.next_logit for chunk in chunks], np.int32)
    batch = Batch(
        token_ids=np.array([token for seq, start, end in chunks for token in seq.tokens[start:end]], np.int32),
        positions=positions,
        slot_mapping=block_tables[owners, positions // block_size] * block_size + positions % block_size,
        query_start=query_start,
        context_lens=ends,
        block_tables=block_tables,
        logit_rows=np.flatnonzero(positions >= owed_from[owners]).astype(np.int32),
        num_decode_rows=sum(chunk.end - chunk.start for chunk in chunks if not chunk.prefills),
    )
    return ScheduledStep(batch, tuple(chunks), tuple(logit_rows), tuple(preempted))
