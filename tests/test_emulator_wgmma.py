"""The emulator's checker on warpgroup products: planted bugs, and random programs against a second formulation.

wgmma reads shared memory and writes registers until wgmma.wait_group says that it is done. The emulator runs it at
once, so only the checker can see a program that does not wait.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fragments import accumulator
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import KernelFault
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule, Schedule

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux")

THREADS, WARPS, ROUNDS = 128, 4, 5


@cache
def module(checked: bool) -> EmulatedModule:
    source = Path(__file__).parent / "emulator_kernels" / "warpgroups.cu"
    return EmulatedModule.compile(source, arch="sm_90a", checked=checked)


# --- Planted bugs -----------------------------------------------------------------------------------------------------


def image(matrix: np.ndarray) -> np.ndarray:
    """[64, 16] bf16 as blocks of 8 × 8: a group of eight rows is both its halves of k."""
    return np.ascontiguousarray(matrix.reshape(8, 8, 2, 8).transpose(0, 2, 1, 3)).reshape(-1).view(np.uint8)


def run(kernel: str, checked: bool, schedule: Schedule, threads: int = THREADS) -> None:
    """Launches a pipeline and compares its sums with NumPy's."""
    rng = np.random.default_rng(1)
    a = rng.integers(-4, 5, (64, 16)).astype(ml_dtypes.bfloat16)
    b = rng.integers(-4, 5, (ROUNDS, 64, 16)).astype(ml_dtypes.bfloat16)
    sums = np.zeros((4, 32, 32), np.float32)
    arguments = [image(a), np.concatenate([image(one) for one in b]), np.int32(ROUNDS), sums]
    module(checked).launch(kernel, (1, 1, 1), (threads, 1, 1), 0, arguments, schedule=schedule)
    expected = sum(a.astype(np.float32) @ one.astype(np.float32).T for one in b)
    np.testing.assert_array_equal(accumulator(64).gather(sums).reshape(64, 64), expected)


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


@pytest.mark.parametrize("checked", [False, True], ids=["fast", "checking"])
@pytest.mark.parametrize(("kernel", "threads"), [("none", 128), ("none_copies", 128), ("bulk_pipeline", 160)])
def test_correct_pipelines(kernel: str, threads: int, checked: bool, schedule: Schedule) -> None:
    run(kernel, checked, schedule, threads)


LINE = r".*warpgroups\.cu:\d+.*"
IN_USE = rf"in use: (write|asynchronous copy) of \d+ bytes at .*; a wgmma of warp \d at {LINE} reads there"
# Kernel -> what the report says
FLAWS = {
    "two_buffers": IN_USE,  # the last round still reads what is overwritten
    "weak_wait": IN_USE,  # for the round before the last, not the last
    "late_wait": IN_USE,  # only behind the loop
    "no_commit": IN_USE,  # so wait_group waits for nothing
    "no_barrier": "in use|data race|uninitialised",  # other warps have not waited, nor written what is read
    "no_proxy_fence": rf"no proxy fence: wgmma's read .*; written by thread \(\d+, 0, 0\) at .*{LINE}",
    "early_proxy_fence": None,  # before the copy has landed; a store of the round before is well covered
    "sums_read": rf"in use: read of a register at {LINE}, thread .*; the wgmma at {LINE}",
    "sums_written": rf"in use: write of a register at {LINE}, thread .*; the wgmma at {LINE}",
    "no_wgmma_fence": "no wgmma.fence",
    "sums_changed": "no wgmma.fence",  # the fence came before the change
}


@pytest.mark.parametrize("copies", ["", "_copies"], ids=["stores", "copies"])
@pytest.mark.parametrize("flaw", FLAWS)
def test_planted_bugs(flaw: str, copies: str, schedule: Schedule) -> None:
    """B written by the threads, or by cp.async, which then also finds accesses to what is in flight."""
    report = FLAWS[flaw]
    if report is None:
        report = "no proxy fence"
        if not copies:
            return run(flaw, True, schedule)
    with pytest.raises(KernelFault, match=report):
        run(flaw + copies, True, schedule)
    return None


def test_a_buffer_released_too_early(schedule: Schedule) -> None:
    with pytest.raises(KernelFault, match="in use: asynchronous copy"):
        run("released_early", True, schedule, 160)


# --- Random programs --------------------------------------------------------------------------------------------------

ACTIVE = (0, 3, 32, 64, 97)  # threads that write or fence; four of them in lane 0 or 1 … of their warps
WRITE, BLOCK, WARP, PAIR, PROXY_FENCE, PRODUCT, WAIT = range(1, 8)
PAIRS = [(a, b) for a in range(WARPS) for b in range(a + 1, WARPS)]


@dataclass(frozen=True)
class Step:
    """One operation of some threads; value: the word written, or the groups that may stay pending."""

    operation: int
    threads: tuple[int, ...]
    value: int = 0


def warps(*numbers: int) -> tuple[int, ...]:
    return tuple(thread for w in numbers for thread in range(32 * w, 32 * w + 32))


ALL = warps(*range(WARPS))
STEPS = st.one_of(
    st.builds(Step, st.just(WRITE), st.sampled_from([(t,) for t in ACTIVE]), st.sampled_from((0, 31))),
    st.builds(Step, st.just(PROXY_FENCE), st.sampled_from([(t,) for t in ACTIVE] + [ALL])),
    st.just(Step(PRODUCT, ALL)),
    st.builds(Step, st.just(WAIT), st.sampled_from([ALL, *(warps(w) for w in range(WARPS))]), st.integers(0, 1)),
    st.just(Step(BLOCK, ALL)),
    st.builds(Step, st.just(WARP), st.sampled_from([warps(w) for w in range(WARPS)])),
    st.builds(Step, st.just(PAIR), st.sampled_from([warps(*pair) for pair in PAIRS])),
)


class Verdict:
    """Happens-before as sets of events, by thread: every write, fence, and read of a group by a warp that it has done.

    A warp's product reads on behalf of its first lane, and is done for all its lanes at the wait that retires it.
    """

    def __init__(self, program: Sequence[Step]) -> None:
        self.known: list[set[tuple]] = [set() for _ in range(THREADS)]
        self.covered: dict[tuple, set[tuple]] = {}  # fence -> events that its thread knew
        self.settled: set[tuple] = set()  # events before the last block barrier
        self.through: set[tuple] = set()  # writes that a fence between two block barriers covers
        self.overwritten: set[tuple] = set()
        self.groups = 0
        self.retired = [0] * WARPS
        self.wrong = any(not self.allows(index, step) for index, step in enumerate(program))

    def allows(self, index: int, step: Step) -> bool:
        if step.operation == WRITE:
            return self.write(("write", index, step.threads[0], step.value))
        if step.operation == PROXY_FENCE:
            for thread in step.threads:
                event = ("fence", index, thread, None)
                self.covered[event] = set(self.known[thread])
                self.known[thread].add(event)
        elif step.operation == PRODUCT:
            self.groups += 1
            return all(self.reads(w) for w in range(WARPS))
        elif step.operation == WAIT:
            for w in {thread // 32 for thread in step.threads}:
                for group in range(self.retired[w] + 1, self.groups - step.value + 1):
                    self.retired[w] = group
                    for thread in warps(w):
                        self.known[thread].add(("read", group, w, None))
        else:
            together = set().union(*(self.known[thread] for thread in step.threads))
            for thread in step.threads:
                self.known[thread] |= together
            if step.operation == BLOCK:
                for covered in (self.covered[event] & self.settled for event in together if event[0] == "fence"):
                    self.through |= covered
                self.settled |= together
        return True

    def write(self, event: tuple) -> bool:
        _, _, thread, word = event
        known = self.known[thread]
        before = {other for other in set().union(*self.known) if other[0] == "write" and other[3] == word}
        ordered = before <= known
        self.overwritten |= before
        done = all(("read", group, w, None) in known for group in range(1, self.groups + 1) for w in range(WARPS))
        known.add(event)
        return ordered and done

    def reads(self, warp: int) -> bool:
        """Whether each word's last writes are known to the warp's first lane, and known to wgmma's proxy."""
        known = self.known[32 * warp]
        writes = {event for event in set().union(*self.known) if event[0] == "write"} - self.overwritten
        return all(write in known and self.fenced(write, known, 32 * warp) for write in writes)

    def fenced(self, write: tuple, known: set[tuple], reader: int) -> bool:
        fences = [event for event in known if event[0] == "fence" and write in self.covered[event]]
        return write in self.through or any(event[2] in (write[2], reader) for event in fences)


def finds(program: Sequence[Step], schedule: int) -> bool:
    codes = np.zeros((max(1, len(program)), THREADS), np.int32)
    for row, step in zip(codes, program, strict=False):
        row[list(step.threads)] = step.operation + 16 * step.value
    arguments = [codes, np.int32(len(codes)), np.zeros(THREADS, np.float32)]
    try:
        module(True).launch("run_program", (1, 1, 1), (THREADS, 1, 1), 0, arguments, schedule=SCHEDULES[schedule])
    except KernelFault as fault:
        assert any(kind in str(fault) for kind in ("in use", "data race", "no proxy fence")), fault
        return True
    return False


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=10), st.integers(0, len(SCHEDULES) - 1))
def test_verdict_on_random_programs(program: list[Step], schedule: int) -> None:
    assert finds(program, schedule) == Verdict(program).wrong


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(ACTIVE), st.sampled_from(ACTIVE), st.lists(STEPS, max_size=3), st.lists(STEPS, max_size=3),
    st.integers(0, 3),
)  # fmt: skip
def test_verdict_on_a_write_a_product_and_a_write(
    first: int, second: int, before: list[Step], between: list[Step], schedule: int
) -> None:
    """With the synchronisation that is needed most of the time, and something among it that may spoil it."""
    program = [
        Step(WRITE, (first,)),
        *before[:1],
        Step(PROXY_FENCE, (first,)),
        *before[1:],
        Step(BLOCK, ALL),
        Step(PRODUCT, ALL),
        *between[:1],
        Step(WAIT, ALL),
        *between[1:],
        Step(BLOCK, ALL),
        Step(WRITE, (second,)),
    ]
    assert finds(program, schedule) == Verdict(program).wrong
