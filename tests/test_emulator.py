"""The CUDA emulator tested on itself: correct kernels pass and agree with NumPy, every planted bug is found.

The kernels are in tests/emulator_kernels/; each bug is launched under several schedules, since a race must be reported
whichever thread happens to come first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from engine.errors import DeviceError, InvalidArgument, KernelFault
from engine.ops.gpu import elf, sources
from engine.ops.gpu.emulator import SCHEDULES, EmulatedModule, Order, Schedule

KERNELS = Path(__file__).parent / "emulator_kernels"
F32, U32, I32 = np.float32, np.uint32, np.int32
BUILDS = {"fast": False, "checking": True}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux")


@cache
def module(name: str, checked: bool) -> EmulatedModule:
    return EmulatedModule.compile(KERNELS / name, arch="sm_90", checked=checked)


@pytest.fixture(params=BUILDS)
def correct(request: pytest.FixtureRequest) -> EmulatedModule:
    return module("correct.cu", BUILDS[request.param])


@pytest.fixture(params=SCHEDULES, ids=str)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def whole(low: int, high: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.int32)


# --- Correct kernels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("row_sums_i32", np.int32), ("row_sums_f64", np.float64)])
def test_block_reduction(correct: EmulatedModule, schedule: Schedule, name: str, dtype: type) -> None:
    x = whole(-50, 50, 5, 301).astype(dtype)
    sums = np.zeros(5, dtype)
    correct.launch(name, (5, 1, 1), (128, 1, 1), 0, [x, sums, np.int32(301)], schedule=schedule)
    np.testing.assert_array_equal(sums, x.sum(1))


def test_double_buffer(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(-9, 9, 7, 256).astype(np.float32)
    out = np.zeros(256, np.float32)
    correct.launch("double_buffer", (1, 1, 1), (64, 1, 1), 0, [x, out, np.int32(7)], schedule=schedule)
    np.testing.assert_array_equal(out, np.roll(x, -1, axis=1).sum(0))


def test_histogram(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(0, 256, 3000).astype(np.uint8)
    counts = np.zeros(256, np.uint32)
    correct.launch("histogram", (3, 1, 1), (96, 1, 1), 0, [x, counts, np.int32(x.size)], schedule=schedule)
    np.testing.assert_array_equal(counts, np.bincount(x, minlength=256))


def test_last_block_adds_up(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(-9, 9, 6 * 64).astype(np.float32)
    parts, finished, total = np.zeros(6, np.float32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    correct.launch("last_block_sum", (6, 1, 1), (64, 1, 1), 0, [x, parts, finished, total], schedule=schedule)
    assert total[0] == x.sum()


def test_spin_lock(correct: EmulatedModule, schedule: Schedule) -> None:
    count = np.zeros(1, np.int32)
    correct.launch("spin_lock", (1, 1, 1), (96, 1, 1), 0, [count], schedule=schedule)
    assert count[0] == 96


def test_transpose_through_dynamic_shared_memory(correct: EmulatedModule, schedule: Schedule) -> None:
    x = numbers(37, 21).astype(ml_dtypes.bfloat16)
    out = np.zeros((21, 37), ml_dtypes.bfloat16)
    shared = 8 * (16 + 1) * 2
    arguments = [x, out, np.int32(37), np.int32(21)]
    correct.launch("transpose", (2, 5, 1), (16, 8, 1), shared, arguments, schedule=schedule)
    np.testing.assert_array_equal(out.view(np.uint16), x.T.view(np.uint16))


def test_warp_functions(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(0, 100, 32)
    out = np.zeros((32, 8), np.int32)
    correct.launch("warp_functions", (1, 1, 1), (32, 1, 1), 0, [x, out], schedule=schedule)
    lanes = np.arange(32)

    def bits(mask: np.ndarray) -> int:
        return int(np.int64((mask.astype(np.int64) << lanes).sum()).astype(np.int32))

    assert (out[:, 0] == bits(x % 2 == 1)).all()
    assert out[:, 1].tolist() == [bits(x % 3 == x[lane] % 3) for lane in lanes]
    assert (out[:, 2] == x.sum() + x.max()).all()
    assert out[:, 3].tolist() == [x[lane - 3] if lane % 8 >= 3 else x[lane] for lane in lanes]
    assert out[:, 4].tolist() == [x[lane + 5] if lane + 5 < 32 else x[lane] for lane in lanes]
    assert out[:, 5].tolist() == [x[lane // 4 * 4 + 1] for lane in lanes]
    assert (out[:, 6] == 4 + 2 * (7 in x) + 1).all()
    assert (out[:16, 7] == x[:16].sum()).all() and (out[16:, 7] == x[16:].max()).all()


def test_warp_exchange_in_a_partial_warp(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(0, 1000, 40)
    out = np.zeros(40, np.int32)
    correct.launch("warp_exchange", (1, 1, 1), (40, 1, 1), 0, [x, out], schedule=schedule)
    expected = np.concatenate([np.roll(x[:32], -3), np.roll(x[32:], -3)]) + 3
    np.testing.assert_array_equal(out, expected)


def test_counted_barriers(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(0, 50, 70)
    out = np.zeros(70, np.int32)
    correct.launch("counted_barriers", (1, 1, 1), (70, 1, 1), 0, [x, out], schedule=schedule)
    assert (out == (x % 2).sum() * 4 + 2 + (5 in x)).all()


def test_producer_and_consumer(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(0, 1000, 6, 32)
    out = np.zeros_like(x)
    correct.launch("producer_consumer", (1, 1, 1), (64, 1, 1), 0, [x, out, np.int32(6)], schedule=schedule)
    np.testing.assert_array_equal(out, x[:, ::-1])


def test_pipeline_of_bulk_copies(correct: EmulatedModule, schedule: Schedule) -> None:
    x = whole(0, 1000, 5, 32)
    out = np.zeros(32, np.int32)
    correct.launch("bulk_pipeline", (1, 1, 1), (64, 1, 1), 0, [x, out, np.int32(5)], schedule=schedule)
    np.testing.assert_array_equal(out, x.sum(0)[::-1])


def rounded_once(a: Any, b: Any, c: Any, dtype: Any) -> np.ndarray:
    """a·b + c in exact arithmetic, rounded to the nearest number of a 16-bit dtype, ties to even."""
    result = []
    for x, y, z in zip(a, b, c, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = int(np.array(float(exact), dtype).view(np.uint16))
        around = np.array([near - 1, near, near + 1], np.uint16).view(dtype).astype(np.float64)
        order = [(abs(Fraction(value) - exact), (near + i) % 2, near + i) for i, value in enumerate(around, -1)]
        result.append(min(order)[2])
    return np.array(result, np.uint16)


@pytest.mark.parametrize(
    ("name", "dtype", "bits"), [("fma_bf16", ml_dtypes.bfloat16, (4, 4)), ("fma_f16", np.float16, (5, 6))]
)
def test_half_precision_fma_rounds_once(name: str, dtype: Any, bits: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    # Products of numbers with these many fractional bits lie half-way between two of the dtype: a c too small for an
    # fp32 sum decides, and rounding twice would lose it.
    a, b = (1 + (2 * random.integers(0, 2 ** (n - 1), 1024) + 1) / 2**n for n in bits)
    c = random.choice([-1, 1], 1024) * np.exp2(random.integers(-24, 3, 1024)) * random.uniform(1, 2, 1024)
    c[:256] = random.choice([-1, 0, 1], 256) * 2.0**-24
    a, b, c = (values.astype(dtype) for values in (a, b, c))
    out = np.zeros(1024, dtype)
    module("correct.cu", False).launch(name, (4, 1, 1), (256, 1, 1), 0, [a, b, c, out])
    np.testing.assert_array_equal(out.view(np.uint16), rounded_once(a, b, c, dtype))


def test_integer_intrinsics(correct: EmulatedModule) -> None:
    x = np.random.default_rng(0).integers(0, 2**32, (16, 2), dtype=np.uint32)
    x[3] = 0, 0xFFFFFFFF
    f = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1e20, -1e20, np.nan, np.inf, -np.inf, 3e9, 2147483520, 7, -7, 0.0], F32
    )
    out = np.zeros((16, 10), np.uint32)
    correct.launch("integer_intrinsics", (1, 1, 1), (16, 1, 1), 0, [x, f, out])

    def signed_bytes(word: int) -> list[int]:
        return np.array([word], np.uint32).view(np.int8).tolist()

    def saturated(value: float, low: int, high: int) -> int:
        return 0 if np.isnan(value) else int(max(low, min(high, np.rint(np.float64(value)))))

    for i, (a, b) in enumerate(x.tolist()):
        both = b << 32 | a
        byte = [both >> 8 * k & 255 for k in range(8)]
        permuted = [byte[4], byte[1], 255 * (byte[2] >> 7), byte[7]]  # 0x7a14: a is byte 2's sign
        dot = sum(p * q for p, q in zip(signed_bytes(a), signed_bytes(b), strict=True)) - 3
        low, high = a >> i, a << i & 0xFFFFFFFF
        expected = [
            int.from_bytes(bytes(permuted), "little"),
            int(f"{a:032b}"[::-1], 2),
            both << i >> 32 & 0xFFFFFFFF,
            both >> i & 0xFFFFFFFF,
            dot % 2**32,
            32 - low.bit_length(),
            (high & -high).bit_length(),
            a * b >> 32,
            saturated(f[i], -(2**31), 2**31 - 1) % 2**32,
            saturated(f[i], 0, 2**32 - 1),
        ]
        assert out[i].tolist() == expected, i


# --- Planted bugs -----------------------------------------------------------------------------------------------------

RACE, UNWRITTEN, BOUNDS = "data race", "uninitialised", "out of bounds"
SOURCE_LINE = r"bugs\.cu:\d+"


def zeros(n: int, dtype: type = F32) -> np.ndarray:
    return np.zeros(n, dtype)


# name, what the report says, threads, blocks, bytes of dynamic shared memory, arguments
BUGS: list[tuple[str, str, int, int, int, Sequence[Any]]] = [
    ("missing_barrier", f"({RACE}|{UNWRITTEN}): .*{SOURCE_LINE}: shared array values", 64, 1, 0, [zeros(64)]),
    ("missing_syncwarp", f"{RACE}|{UNWRITTEN}", 32, 1, 0, [zeros(32)]),
    ("buffer_reuse", f"{RACE}: .*{SOURCE_LINE}.*{SOURCE_LINE}", 64, 1, 0, [zeros(64)]),
    ("double_buffer_overrun", f"in flight|{RACE}", 64, 1, 0, [zeros(5 * 256), zeros(64)]),
    ("atomic_and_plain", f"{RACE}: .*atomic", 64, 1, 0, [zeros(64, U32)]),
    ("byte_neighbours_race", f"{RACE}: .* of 1 bytes .* byte 6 of 64", 64, 1, 0, [zeros(64, np.uint8)]),
    ("named_barrier_too_small", f"{RACE}|{UNWRITTEN}", 96, 1, 0, [zeros(96)]),
    ("unwritten_slot", f"{UNWRITTEN}: .*shared array values, byte 68 of 256", 64, 1, 0, [zeros(64)]),
    ("unwritten_dynamic_byte", f"{UNWRITTEN}: .*byte 64 of 80", 64, 1, 80, [zeros(64, np.uint8)]),
    ("weak_wait_group", "in flight: .*bugs.cu", 64, 1, 0, [zeros(512), zeros(64)]),
    ("wait_without_barrier", f"in flight|{RACE}|{UNWRITTEN}", 64, 1, 0, [zeros(512), zeros(64)]),
    ("stage_not_emptied", f"in flight|{RACE}", 32, 1, 0, [zeros(64, I32), zeros(32, I32)]),
    ("stage_not_awaited", f"in flight|{RACE}", 32, 1, 0, [zeros(32, I32), zeros(32, I32)]),
    ("beyond_inner_array", f"{SOURCE_LINE}: {BOUNDS}: index 8 of 'float \\[8\\]'", 8, 1, 0, [zeros(8)]),
    ("beyond_static", f"{BOUNDS}: write of 4 bytes at {SOURCE_LINE}: shared array values", 64, 1, 0, [zeros(64)]),
    ("into_the_neighbour", f"{BOUNDS}: .*shared array (first|second), byte 256 of 256", 64, 1, 0, [zeros(64)]),
    ("beyond_dynamic", f"{BOUNDS}: .*dynamic shared memory, byte 256 of 256", 64, 1, 256, [zeros(64)]),
    ("beyond_global", f"{BOUNDS}: .*argument 0, byte 256 of 256", 64, 1, 0, [zeros(64), zeros(64)]),
    ("before_global", f"{BOUNDS}: .*argument 1, byte -4 of 256", 64, 1, 0, [zeros(64), zeros(64)]),
    ("write_to_const", "pointer to const", 64, 1, 0, [zeros(64), zeros(64)]),
    ("misaligned", f"{SOURCE_LINE}: misaligned", 32, 1, 0, [zeros(64), zeros(32)]),
    ("wild_pointer", BOUNDS, 32, 1, 0, [zeros(32)]),
    ("threads_share_an_element", RACE, 64, 1, 0, [zeros(32, I32)]),
    ("blocks_share_an_element", "race between blocks", 64, 4, 0, [zeros(128, I32)]),
    ("block_reads_another", "race between blocks", 64, 4, 0, [zeros(256, I32)]),
    ("last_block_unfenced", "race between blocks", 32, 3, 0, [zeros(3), zeros(1, U32), zeros(1)]),
]
# Found in a fast build as well.
STUCK: list[tuple[str, str, int, Sequence[Any]]] = [
    ("skipped_barrier", f"{SOURCE_LINE}: divergent barrier", 64, [zeros(64)]),
    ("divergent_barrier", f"{SOURCE_LINE}: divergent barrier: .*{SOURCE_LINE}", 64, [zeros(64)]),
    ("divergent_shuffle", f"{SOURCE_LINE}: divergent warp operation: .*{SOURCE_LINE}", 32, [zeros(32, I32)]),
    ("shuffle_outside_its_mask", "not in its own mask", 32, [zeros(32, I32)]),
    ("shuffle_with_the_dead", "deadlock: (.|\n)*warp operation for lanes 0xffffffff", 32, [zeros(32, I32)]),
    ("barrier_of_too_many", "deadlock: (.|\n)*64 threads.* at barrier 2", 64, [zeros(64, I32)]),
    ("failed_assertion", f"{SOURCE_LINE}: assertion: out == nullptr", 32, [zeros(32, I32)]),
]
ENDLESS = ["endless_spin", "endless_loop", "endless_barriers"]


@pytest.mark.parametrize(("name", "report", "threads", "blocks", "shared", "arguments"), BUGS, ids=[b[0] for b in BUGS])
def test_checking_build_finds(
    name: str, report: str, threads: int, blocks: int, shared: int, arguments: Sequence[Any], schedule: Schedule
) -> None:
    arrays = [array.copy() for array in arguments]
    with pytest.raises(KernelFault, match=report) as fault:
        module("bugs.cu", True).launch(name, (blocks, 1, 1), (threads, 1, 1), shared, arrays, schedule=schedule)
    assert f"in kernel {name}, block (" in str(fault.value)


@pytest.mark.parametrize("checked", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize(("name", "report", "threads", "arguments"), STUCK, ids=[bug[0] for bug in STUCK])
def test_every_build_finds(
    name: str, report: str, threads: int, arguments: Sequence[Any], schedule: Schedule, checked: bool
) -> None:
    with pytest.raises(KernelFault, match=report):
        module("bugs.cu", checked).launch(name, (1, 1, 1), (threads, 1, 1), 0, arguments, schedule=schedule)


@pytest.mark.parametrize("checked", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_kernels_are_stopped(name: str, checked: bool) -> None:
    with pytest.raises(KernelFault, match=r"time limit of 0\.3 s"):
        module("bugs.cu", checked).launch(name, (1, 1, 1), (64, 1, 1), 0, [zeros(1, U32)], time_limit=0.3)


@pytest.mark.parametrize("name", ["wild_pointer", "full_stack"])
def test_a_fault_is_a_report_and_not_a_crash(name: str) -> None:
    fast = module("bugs.cu", False)
    for _ in range(2):  # and the next launch works
        with pytest.raises(KernelFault, match="fault: access to address"):
            fast.launch(name, (1, 1, 1), (32, 1, 1), 0, [zeros(32, I32 if name == "full_stack" else F32)])
    test_counted_barriers(module("correct.cu", False), SCHEDULES[0])


def test_uninitialised_memory_shows_under_two_poisons() -> None:
    results = []
    for poison in (0x00, 0x41):
        out = zeros(64)
        module("bugs.cu", False).launch("unwritten_slot", (1, 1, 1), (64, 1, 1), 0, [out], poison=poison)
        results.append(out)
    assert np.flatnonzero(results[0] != results[1]).tolist() == [63 - 17]


def test_schedules_uncover_races_without_the_checker() -> None:
    """Strict priorities in both orders, lazy and eager copies: results differ, though nothing is checked."""

    def outcomes(name: str, *inputs: np.ndarray, schedules: Sequence[Schedule]) -> set[bytes]:
        found = set()
        for schedule in schedules:
            out = zeros(64)
            arguments = [*inputs, out]
            module("bugs.cu", False).launch(name, (1, 1, 1), (64, 1, 1), 0, arguments, schedule=schedule)
            found.add(out.tobytes())
        return found

    both_orders = [Schedule(Order.ASCENDING), Schedule(Order.DESCENDING)]
    x = np.arange(5 * 256, dtype=F32)
    assert len(outcomes("missing_barrier", schedules=both_orders)) == 2
    assert len(outcomes("buffer_reuse", schedules=both_orders)) == 2
    late, early = Schedule(lazy_copies=True), Schedule(lazy_copies=False)
    assert len(outcomes("weak_wait_group", x[:512], schedules=[late, early])) == 2
    assert len(outcomes("double_buffer_overrun", x, schedules=[late, early])) == 2


# --- Launches ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_argument(correct: EmulatedModule) -> None:
    out = np.zeros(1)
    values = [np.int8(-5), np.uint16(65535), np.int64(2**40), np.float32(0.25), np.float64(0.5), np.bool_(True)]
    correct.launch("every_kind", (1, 1, 1), (1, 1, 1), 0, [None, out, *values])
    assert out[0] == -5 + 65535 + 2**40 + 0.25 + 0.5 + 1
    kinds = "".join(parameter.kind for parameter in correct.kernels["every_kind"].parameters)
    assert kinds == "cpiuiffu"


def test_rows_of_a_wider_array(correct: EmulatedModule) -> None:
    x = numbers(5, 64)[:, 16:48]
    out = np.zeros((5, 32), np.float32)
    correct.launch("strided_rows", (5, 1, 1), (32, 1, 1), 0, [x, out, np.int32(32), np.int64(64)])
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([zeros(8, I32), zeros(8, I32)], "takes 3 arguments, not 2"),
        ([zeros(8, I32), zeros(8, I32), 8], "give a NumPy scalar"),
        ([zeros(8, I32), zeros(8, I32), np.int64(8)], "has 4 bytes"),
        ([zeros(8, I32), zeros(8, I32), np.float32(8)], "float32 does not fit"),
        ([zeros(8, I32), np.int64(8), np.int32(8)], "is a pointer"),
        ([np.zeros((4, 4), I32).T, zeros(8, I32), np.int32(8)], "neither contiguous nor rows"),
        ([zeros(8, I32), np.frombuffer(bytes(32), I32), np.int32(8)], "read-only"),
    ],
)
def test_arguments_are_checked(arguments: Sequence[Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        module("correct.cu", False).launch("row_sums_i32", (1, 1, 1), (32, 1, 1), 0, arguments)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((1, 1, 1), (512, 1, 1), 0, "512 threads in a block; it can have at most 256"),  # __launch_bounds__(256)
        ((1, 70000, 1), (32, 1, 1), 0, r"grid \(1, 70000, 1\)"),
        ((1, 1, 1), (32, 0, 1), 0, r"block \(32, 0, 1\)"),
        ((1, 1, 1), (1, 1, 128), 0, r"block \(1, 1, 128\)"),
        ((1, 1, 1), (32, 1, 1), 300_000, "300000 bytes of dynamic shared memory; sm_90 has at most 232448"),
    ],
)
def test_shapes_are_checked(grid: Any, block: Any, shared: int, message: str) -> None:
    arguments = [zeros(8, I32), zeros(8, I32), np.int32(8)]
    with pytest.raises(InvalidArgument, match=message):
        module("correct.cu", False).launch("row_sums_i32", grid, block, shared, arguments)


def test_launches_from_several_threads() -> None:
    modules = [module("correct.cu", False), module("correct.cu", True)]
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        x, sums = whole(-50, 50, 3, 200, seed=seed), np.zeros(3, np.int32)
        try:
            modules[seed % 2].launch("row_sums_i32", (3, 1, 1), (64, 1, 1), 0, [x, sums, np.int32(200)])
            np.testing.assert_array_equal(sums, x.sum(1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# --- Builds -----------------------------------------------------------------------------------------------------------

SMALL = 'extern "C" __global__ void arch(int* out) {{ *out = __CUDA_ARCH__; {} }}\n'


def write(folder: Path, body: str = "", name: str = "small.cu") -> Path:
    path = folder / name
    path.write_text(SMALL.format(body))
    return path


def arch_of(built: EmulatedModule) -> int:
    out = np.zeros(1, np.int32)
    built.launch("arch", (1, 1, 1), (1, 1, 1), 0, [out])
    return int(out[0])


@pytest.mark.parametrize(
    ("arch", "number", "feature"), [("sm_80", 800, ""), ("sm_90a", 900, "90"), ("sm_120a", 1200, "120")]
)
def test_architectures_and_defines(tmp_path: Path, arch: str, number: int, feature: str) -> None:
    body = f"\n#ifdef __CUDA_ARCH_FEAT_SM{feature}_ALL\n*out += MORE;\n#endif\n"
    built = EmulatedModule.compile(write(tmp_path, body), arch=arch, defines=["MORE=7"])
    assert arch_of(built) == number + (7 if feature else 0)
    with pytest.raises(DeviceError, match="unknown GPU architecture 'sm_12'"):
        EmulatedModule.compile(write(tmp_path), arch="sm_12")


def test_compiler_errors_show_the_log_and_the_kernels_own_line(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"small\.cu:1:.*error: .*no_such_name"):
        EmulatedModule.compile(write(tmp_path, "no_such_name();"))
    (tmp_path / "empty.cu").write_text("__global__ void not_an_entry() {}\n")
    with pytest.raises(DeviceError, match="no entry point"):
        EmulatedModule.compile(tmp_path / "empty.cu")
    with pytest.raises(DeviceError, match="cannot read the kernel source"):
        EmulatedModule.compile(tmp_path / "absent.cu")


def test_no_compiler_and_no_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceError, match="no C\\+\\+ compiler"):
        EmulatedModule.compile(write(tmp_path))
    with pytest.raises(DeviceError, match=r"of CUDA 9\.0, the compiler's, or older in .*\(of CUDA 1\d\.\d\)"):
        sources.cuda_include_directories(newest=(9, 0))
    assert sources.cuda_include_directories(newest=(99, 0)) == sources.cuda_include_directories()
    monkeypatch.setattr(sources, "HEADER_WHEELS", ("no-such-wheel",))
    monkeypatch.setattr(sources, "HEADERS", ("no_such_header.h",))
    with pytest.raises(DeviceError, match="pip install no-such-wheel"):
        sources.cuda_include_directories()


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text is another entry, the same text is not built again, a damaged entry is replaced."""
    folder = tmp_path / "emulator"
    folder.mkdir()
    for runtime in module("correct.cu", False)._path.parent.glob("runtime-*.so"):  # or it would be compiled again
        (folder / runtime.name).write_bytes(runtime.read_bytes())
    monkeypatch.setenv("ENGINE_CACHE", str(tmp_path))

    def entries() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("small-*.so")}

    source = write(tmp_path)
    EmulatedModule.compile(source)
    first = entries()
    EmulatedModule.compile(source)
    assert entries() == first and len(first) == 1
    write(tmp_path, "*out += 1;")
    EmulatedModule.compile(source)
    assert len(entries()) == 2
    write(tmp_path, "*out += 2;")
    damaged = "import sys; from engine.ops.gpu.emulator import EmulatedModule as M; M.compile(sys.argv[1])"
    command = [sys.executable, "-c", damaged, str(source)]
    root = Path(__file__).parent.parent
    children = [subprocess.Popen(command, cwd=root) for _ in range(2)]  # at once: neither harms the other
    assert [child.wait() for child in children] == [0, 0]
    for path in folder.glob("small-*.so"):
        path.write_bytes(path.read_bytes()[:-100])
    assert arch_of(EmulatedModule.compile(source)) == 902
    assert not [path for path in folder.iterdir() if path.name.startswith("build-")]


def test_shared_arrays_have_gaps_in_a_checking_build() -> None:
    def arrays(checked: bool) -> list[elf.TlsSymbol]:
        path = module("bugs.cu", checked)._path
        return [symbol for symbol in elf.tls_symbols(path) if re.search("into_the_neighbour", symbol.name)]

    first, second = arrays(True)
    assert first.size == second.size == 256 and second.offset - first.offset >= 256 + 256
    assert len(arrays(False)) == 2 and os.path.exists(module("bugs.cu", False)._path)
