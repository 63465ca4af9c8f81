"""Machine code of kernels that are launched while the one before runs: all wait, and before that touch weights alone.

On every way through the code, as NVRTC made it: a compiler that moved a load before the wait would be seen. No GPU
needed.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("cupy", reason="CuPy brings NVRTC's binding; pip install '.[cuda13]'")

from machine_code import Instruction, Kernel, kernels

from engine.ops.gpu.launch import WAITING

WAIT, NEXT = "ACQBULK", "PREEXIT"  # griddepcontrol.wait and .launch_dependents
MEMORY = re.compile(r"(LDG|LD|STG|ST|ATOMG|ATOM|REDG|RED|UBLKCP|LDGSTS|EXIT)(\.|$)")


def before_the_wait(kernel: Kernel) -> list[Instruction]:
    """All that may execute before it."""
    seen, waiting = {0}, [0]
    while waiting:
        here = waiting.pop()
        if kernel.instructions[here].name != WAIT:
            waiting += [there for there in kernel.successors[here] if there not in seen]
            seen.update(kernel.successors[here])
    return [kernel.instructions[i] for i in sorted(seen)]


@pytest.mark.parametrize("source", sorted(WAITING))
def test_they_wait_before_they_touch_anything_or_end(source: str) -> None:
    """Decode products alone have copies (LDGSTS) of weights under way."""
    arch = "sm_120a" if source.endswith("_sm120.cu") else "sm_90a"
    for name, kernel in kernels(source, arch).items():
        early = before_the_wait(kernel)
        assert {WAIT, NEXT} <= {instruction.name for instruction in early}, name
        touched = {match[1] for instruction in early if (match := MEMORY.match(instruction.name))}
        assert touched == ({"LDGSTS"} if name.startswith("linear_decode_") else set()), name


@pytest.mark.parametrize("source", sorted(WAITING))
def test_what_others_may_write_is_not_read_as_constant(source: str) -> None:
    """ld.global.nc may read what lay there when the kernel began, which is before the wait. FP8 weights have scales."""
    arch = "sm_120a" if source.endswith("_sm120.cu") else "sm_90a"
    for name, kernel in kernels(source, arch).items():
        constant = [instruction.name for instruction in kernel.instructions if "CONSTANT" in instruction.name]
        assert not constant or name.startswith("linear_decode_fp8_"), name


def test_older_gpus_have_no_such_instruction() -> None:
    for kernel in kernels("rms_norm.cu", "sm_89").values():
        assert not {WAIT, NEXT} & {instruction.name for instruction in kernel.instructions}
