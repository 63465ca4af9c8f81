"""Whole steps on a device: decode steps recorded once and replayed, the next tokens chosen where the logits are.

A decode step runs a few hundred kernels of a few microseconds each; launching them one by one from Python takes longer
than running them. Steps in which every sequence has one new token are therefore recorded, lazily: for 1, 2, 4, 8, 16,
24 … sequences and for contexts of up to 16, 32, 64 … blocks, so that few recordings serve all (`StagedDecode` says what
fills the rest of one). Replayed or not, a token's result has the same bits. Steps with longer chunks or prefill rows
run as they are. Recordings share their memory, as one step runs at a time.

A step meets the host once, where it gives it the tokens; the flag that kernels raise for NaN comes with them. Rows that
log-probabilities are wanted of, or that no token can be chosen from, are left to the host's sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core import Batch, SamplingRow, StepLimits
from engine.errors import NumericalError
from engine.ops.gpu import launch_rows, launch_sample
from engine.ops.gpu.device import Device, Recording
from engine.ops.gpu.launch_attention import AttentionShape, most_scratch
from engine.ops.gpu.staging import Layout, PackedArrays, Scratch, StagedDecode, take_attention_scratch

Forward = Callable[[Any, int], Any]  # a staged batch and how many positions it may reach -> hidden states [T, C]
Head = Callable[[Any], Any]  # hidden states [R, C] -> logits [R, V]

_LEAST_BLOCKS = 16  # of a recording's contexts: shorter ones would be recorded often and save nothing
_LEAST_IDS = 64  # of the room for the ids that penalties, bias and masks concern
_MOST_ROWS = 512  # tokens chosen at once
_MOST_TOP_K = 2**31 - 1  # more than any vocabulary
_I32, _U64, _F64 = np.dtype(np.int32), np.dtype(np.uint64), np.dtype(np.float64)


def bucket(count: int) -> int:
    """Of how many rows a recording serves `count`: 1, 2, 4, 8, 16, 24, 32, …"""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


class StepReport:
    """What a step tells the host, in one download: whether a row was invalid, its tokens, and each one's status."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._array = device.zeros((1 + 2 * _MOST_ROWS,), _I32)
        self.invalid = self._array[:1]  # 1 + a row in which a preparation met NaN or infinity; 0: none

    def tokens(self, R: int) -> Any:
        return self._array[1 : 1 + R]

    def status(self, R: int) -> Any:
        """[R]: 0 where the token is one."""
        return self._array[1 + R : 1 + 2 * R]

    def read(self, R: int) -> NDArray[np.int32]:
        """Tokens and status [2, R], once all work before is done. Raises NumericalError, once for a step."""
        host = self._device.download(self._array[: 1 + 2 * R])
        if host[0]:
            self._device.write(self.invalid, np.zeros(1, np.int32))
            raise NumericalError(
                f"row {host[0] - 1} of a layer's input holds NaN or infinity, or becomes infinite in bf16"
            )
        tokens: NDArray[np.int32] = host[1:].reshape(2, R)
        return tokens


@dataclass(slots=True)
class _Decode:
    """One kind of decode step; hidden: where a replay leaves its result."""

    staged: StagedDecode
    recording: Recording | None = None
    hidden: Any = None


class GpuSteps:
    """`engine.ops.contract.Steps` of one model on one device.

    shape: of its attention layers. spare_block: of the cache, one that no sequence has. stage: `Ops.stage`. record:
    whether decode steps, and choices of tokens, are recorded.
    """

    def __init__(
        self, device: Device, scratch: Scratch, report: StepReport, shape: AttentionShape, *, block_size: int,
        spare_block: int, limits: StepLimits, stage: Callable[[Batch], Any], record: bool,
    ) -> None:  # fmt: skip
        self._device = device
        self._scratch = scratch
        self._report = report
        self._shape = shape
        self._block_size = block_size
        self._spare_block = spare_block
        self._max_num_seqs = limits.sequences
        self._stage = stage
        self._record = record
        self._decodes: dict[tuple[int, int], _Decode] = {}
        self._choices: dict[tuple[int, int, bool], _Choice] = {}
        recorded = f"recorded decode steps up to {limits.sequences}" if record else "decode steps not recorded"
        self.description = f"{recorded}, sampling on the device"
        self._reserve_attention(limits)

    def _reserve_attention(self, limits: StepLimits) -> None:
        """What attention takes depends on how a step's tokens are shared out; this is for any way."""
        sequences = self._rows(min(limits.sequences, limits.tokens))
        context = self._blocks(limits.context) * self._block_size
        tokens = max(limits.tokens, sequences)
        partials, arrivals = most_scratch(self._shape, tokens=tokens, sequences=sequences, context=context)
        take_attention_scratch(self._scratch, partials, arrivals)

    def hidden(self, batch: Batch, forward: Forward) -> Any:
        """Hidden states [T, C] of a step, valid until the next one."""
        S = len(batch.context_lens)
        if self._record and len(batch.token_ids) == S and batch.num_decode_rows in (None, S):
            return self._replayed(batch, forward)
        with self._scratch.one_operand():
            return forward(self._stage(batch), int(batch.positions.max()) + 1)

    def _replayed(self, batch: Batch, forward: Forward) -> Any:
        S = len(batch.context_lens)
        assert self._max_num_seqs >= S, f"{S} sequences in a step, more than max_num_seqs {self._max_num_seqs}"
        step = self._decode(self._rows(S), self._blocks(int(batch.context_lens.max())))
        step.staged.fill(batch)
        if step.recording is None:

            def work() -> None:
                step.hidden = forward(step.staged, step.staged.num_positions)

            step.recording = self._capture(work)
        step.recording.run()
        return step.hidden[:S]

    def _rows(self, S: int) -> int:
        return min(bucket(S), self._max_num_seqs)

    def _blocks(self, context: int) -> int:
        """Of the recording for contexts of so many tokens."""
        return max(_LEAST_BLOCKS, 1 << (-(-context // self._block_size) - 1).bit_length())

    def _decode(self, S: int, blocks: int) -> _Decode:
        if (S, blocks) not in self._decodes:
            staged = StagedDecode(
                self._device, self._scratch, self._shape, S, blocks, self._block_size, self._spare_block
            )
            self._decodes[S, blocks] = _Decode(staged)
        return self._decodes[S, blocks]

    def choose(self, hidden: Any, rows: Sequence[int], choices: Sequence[SamplingRow], head: Head) -> list[int | None]:
        """The next token of each of these rows of hidden [T, C], or None where the host must look at its logits."""
        found: list[int | None] = []
        for start in range(0, len(rows), _MOST_ROWS):
            part = slice(start, start + _MOST_ROWS)
            found += self._choose(hidden, rows[part], choices[part], head)
        return found

    def _choose(self, hidden: Any, rows: Sequence[int], choices: Sequence[SamplingRow], head: Head) -> list[int | None]:
        R, room, draws = bucket(len(rows)), _room(choices), any(row.temperature > 0 for row in choices)
        key = (R, room, draws)
        if key not in self._choices:
            gathered = self._scratch.take("gathered", (R, hidden.shape[1]), hidden.dtype)
            self._choices[key] = _Choice(self._device, self._scratch, self._report, gathered, room, draws=draws)
        choice = self._choices[key]
        choice.fill(rows, choices)
        self._device.launch(launch_rows.embed(hidden, choice.rows, choice.gathered))
        if self._record:
            if choice.recording is None:
                choice.recording = self._capture(lambda: choice.launch(head))
            choice.recording.run()
        else:
            with self._scratch.one_operand():
                choice.launch(head)
        tokens, status = self._report.read(R)[:, : len(rows)].tolist()
        return [None if bad else token for token, bad in zip(tokens, status, strict=True)]

    def _capture(self, work: Callable[[], None]) -> Recording:
        with self._scratch.one_operand():
            return self._device.capture(work)


class _Choice:
    """Tokens of up to R rows, in memory that stays where it is. Rows beyond those asked for repeat the first, greedily.

    room: ids that the rows' penalties may concern together, their bias, their masks; 0 where no row has any. draws:
    whether any row may be other than greedy.
    """

    def __init__(
        self, device: Device, scratch: Scratch, report: StepReport, gathered: Any, room: int, *, draws: bool
    ) -> None:
        self.gathered = gathered  # [R, C], the hidden states
        self.recording: Recording | None = None
        self._device = device
        self._scratch = scratch
        self._report = report
        self._adjusts = room > 0
        self._draws = draws
        self._packed = PackedArrays(device, _layout(len(gathered), room), partial(scratch.take, "choice"))

    @property
    def rows(self) -> Any:
        """Which rows to gather, on the device."""
        return self._packed.device["rows"]

    def fill(self, rows: Sequence[int], choices: Sequence[SamplingRow]) -> None:
        """Send what another step's rows ask for."""
        host, R = self._packed.host, len(rows)
        host["rows"][:R], host["rows"][R:] = rows, rows[0]
        for name, dtype in (_SETTINGS | _PENALTIES if self._adjusts else _SETTINGS).items():
            host[name][:R] = np.array([getattr(row, name) for row in choices], dtype)
        host["top_k"][:R] = [min(row.top_k, _MOST_TOP_K) for row in choices]
        host["temperature"][R:] = 0.0
        if self._adjusts:
            for kind, fields in _LISTS.items():
                self._fill_lists(kind, fields, choices)
        self._packed.send()

    def _fill_lists(self, kind: str, fields: Mapping[str, str], choices: Sequence[SamplingRow]) -> None:
        """Rows' lists one after the other, and where each begins."""
        host, starts = self._packed.host, self._packed.host[f"{kind}_start"]
        for name, field in fields.items():
            lists = [getattr(row, field) for row in choices]
            ends = np.cumsum([len(values) for values in lists])
            host[name][: ends[-1]] = np.concatenate(lists)
            starts[1 : 1 + len(ends)], starts[1 + len(ends) :] = ends, ends[-1]

    def launch(self, head: Head) -> None:
        """From `gathered` to the report."""
        launch, zeros, R = self._device.launch, self._device.zeros, len(self.gathered)
        rows, logits = self._packed.device, head(self.gathered)
        raw_keys = keys = zeros((R,), _U64)
        launch(launch_sample.row_maxima(logits, raw_keys))
        if self._adjusts:
            keys = zeros((R,), _U64)
            launch(launch_sample.adjust_logits(logits, rows))
            launch(launch_sample.row_maxima(logits, keys))
        weights = None
        if self._draws:
            weights = self._scratch.take("token weights", logits.shape, _F64)
            launch(launch_sample.token_weights(logits, keys, rows["temperature"], weights))
        tokens, status = self._report.tokens(R), self._report.status(R)
        launch(launch_sample.sample_rows(logits, weights, raw_keys, keys, rows, tokens, status))


# Fields of SamplingRow that kernels take as they are, by name; ids and what belongs to them, as lists of all rows.
_SETTINGS: dict[str, np.dtype[Any]] = {
    "seed": _U64, "index": _U64, "temperature": _F64, "top_p": _F64, "min_p": _F64, "position": _I32,
}  # fmt: skip
_PENALTIES: dict[str, np.dtype[Any]] = {"repetition": _F64, "presence": _F64, "frequency": _F64}
_LISTS = {
    "mask": {"mask_ids": "masked"},
    "bias": {"bias_ids": "bias_ids", "bias": "bias"},
    "penalty": {"penalty_ids": "penalised", "counts": "counts"},
}


def _room(choices: Sequence[SamplingRow]) -> int:
    """For the longest of the lists: a power of two, or 0 where all are empty."""
    longest = max(
        sum(len(getattr(row, field)) for row in choices) for fields in _LISTS.values() for field in fields.values()
    )
    return max(_LEAST_IDS, 1 << (longest - 1).bit_length()) if longest else 0


def _layout(R: int, room: int) -> Layout:
    settings = _SETTINGS | dict.fromkeys(("rows", "top_k"), _I32)
    layout: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    for name, dtype in (settings | _PENALTIES if room else settings).items():
        layout[name] = ((R,), dtype)
    for kind, fields in _LISTS.items() if room else ():
        layout[f"{kind}_start"] = ((R + 1,), _I32)
        for name in fields:
            layout[name] = ((room,), _F64 if name == "bias" else _I32)
    return layout
