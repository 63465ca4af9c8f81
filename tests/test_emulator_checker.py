"""The race checker against a second formulation: random programs, and happens-before as sets of events.

A program is a table of steps by threads. In each step some threads access a few bytes of shared memory, or a group
synchronises: the block, a warp, four lanes of one, two warps at a named barrier at which one of them may only arrive.
The model keeps, for every thread, the set of all accesses that it knows to lie before, and looks at all pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import KernelFault
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux")

THREADS = 96
ACTIVE = (0, 1, 2, 5, 32, 64)  # threads that access memory: some share a warp, some of those the four lanes
READ, WRITE, ATOMIC, BLOCK, WARP, PART, ARRIVE, PART_SYNC = range(1, 9)


@dataclass(frozen=True)
class Access:
    thread: int
    operation: int
    offset: int
    size: int

    @property
    def code(self) -> int:
        return self.operation + 16 * self.size + 256 * self.offset


@dataclass(frozen=True)
class Sync:
    """Every participant comes; those that wait then know what all participants knew."""

    codes: dict[int, int]  # thread -> operation

    @property
    def waiting(self) -> set[int]:
        return {thread for thread, operation in self.codes.items() if operation != ARRIVE}


Step = Access | Sync


@st.composite
def accesses(draw: st.DrawFn) -> Access:
    operation = draw(st.sampled_from((READ, READ, WRITE, ATOMIC)))
    size = 4 if operation == ATOMIC else draw(st.sampled_from((1, 2, 4)))
    offset = draw(st.integers(0, 8 // size - 1)) * size
    return Access(draw(st.sampled_from(ACTIVE)), operation, offset, size)


def accesses_to_one_word() -> st.SearchStrategy[Access]:
    operations = st.sampled_from((READ, READ, READ, WRITE, ATOMIC))
    return st.builds(Access, st.sampled_from(ACTIVE), operations, st.just(0), st.just(4))


def all_syncs() -> list[Sync]:
    warps = [range(first, first + 32) for first in (0, 32, 64)]
    pairs = [(a, b) for a in warps for b in warps if a != b]
    return [
        Sync(dict.fromkeys(range(THREADS), BLOCK)),
        Sync(dict.fromkeys(range(4), PART)),
        *(Sync(dict.fromkeys(warp, WARP)) for warp in warps),
        *(Sync(dict.fromkeys([*a, *b], PART_SYNC)) for a, b in pairs if a.start < b.start),
        *(Sync(dict.fromkeys(a, ARRIVE) | dict.fromkeys(b, PART_SYNC)) for a, b in pairs),
    ]


SYNCS = all_syncs()


def syncs() -> st.SearchStrategy[Sync]:
    return st.sampled_from(SYNCS)


def races(program: Sequence[Step]) -> bool:
    """Whether some two accesses conflict and neither is known to lie before the other."""
    known: list[set[int]] = [set() for _ in range(THREADS)]
    for index, step in enumerate(program):
        if isinstance(step, Sync):
            together = set().union(*(known[thread] for thread in step.codes))
            for thread in step.waiting:
                known[thread] |= together
            continue
        for earlier in range(index):
            other = program[earlier]
            if isinstance(other, Access) and conflict(other, step) and earlier not in known[step.thread]:
                return True
        known[step.thread].add(index)
    return False


def conflict(a: Access, b: Access) -> bool:
    overlap = a.offset < b.offset + b.size and b.offset < a.offset + a.size
    harmless = a.operation == b.operation and a.operation in (READ, ATOMIC)
    return overlap and not harmless and a.thread != b.thread


@cache
def module() -> EmulatedModule:
    return EmulatedModule.compile(Path(__file__).parent / "emulator_kernels" / "programs.cu", checked=True)


def table(program: Sequence[Step]) -> np.ndarray:
    codes = np.zeros((max(1, len(program)), THREADS), np.int32)
    for row, step in zip(codes, program, strict=False):
        for thread, code in {step.thread: step.code}.items() if isinstance(step, Access) else step.codes.items():
            row[thread] = code
    return codes


def finds_race(program: Sequence[Step], schedule: int) -> bool:
    codes, sink = table(program), np.zeros(THREADS, np.int32)
    arguments = [codes, np.int32(len(codes)), sink]
    try:
        module().launch("run_program", (1, 1, 1), (THREADS, 1, 1), 0, arguments, schedule=SCHEDULES[schedule])
    except KernelFault as fault:
        assert "data race" in str(fault), fault
        return True
    return False


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(accesses(), accesses(), syncs()), max_size=14), st.integers(0, len(SCHEDULES) - 1))
def test_verdict_on_random_programs(program: list[Step], schedule: int) -> None:
    assert finds_race(program, schedule) == races(program)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(accesses_to_one_word(), min_size=3, max_size=5),
    st.lists(syncs(), min_size=5, max_size=5),
    st.integers(0, 3),
)
def test_verdict_on_synchronised_accesses_to_one_word(
    sequence: list[Access], between: list[Sync], schedule: int
) -> None:
    """Synchronisation after every access: most are free of races, which draws without structure rarely are."""
    program: list[Step] = []
    for i, access in enumerate(sequence):
        program += [access, between[i], between[(i + 1) % 5]]
    assert finds_race(program, schedule) == races(program)


@pytest.mark.parametrize("schedule", range(2))
def test_verdict_on_every_pair_of_writes(schedule: int) -> None:
    """Any two threads, any synchronisation between them: all there are."""
    for first in ACTIVE:
        for second in ACTIVE:
            for sync in SYNCS:
                program: list[Step] = [Access(first, WRITE, 0, 4), sync, Access(second, WRITE, 0, 4)]
                assert finds_race(program, schedule) == races(program), program


@pytest.mark.parametrize("schedule", range(2))
def test_verdict_on_reads_that_follow_one_write(schedule: int) -> None:
    """A reader that comes after the write says nothing about another that does not."""
    for third in ACTIVE:
        for sync in SYNCS:
            for second in ACTIVE:
                program: list[Step] = [
                    Access(0, WRITE, 0, 4),
                    sync,
                    Access(second, READ, 0, 4),
                    Access(third, READ, 0, 4),
                ]
                assert finds_race(program, schedule) == races(program), program
