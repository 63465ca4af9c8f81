"""How many instructions the prepare kernels execute for an element, counted in NVRTC's machine code. No GPU needed.

At 70 % of an H200's bandwidth its schedulers have 27.8 for an element of two bytes in and .91 out, and 47 where gate
and up come in (cuda/prepare.cuh). A loop's shortest way round is counted: the one without exact divisions and other
exceptions. Compilers differ by a few per cent, which the bounds leave.
"""

from __future__ import annotations

import pytest

pytest.importorskip("cupy", reason="CuPy brings NVRTC's binding; pip install '.[cuda13]'")

from machine_code import Instruction, kernels

TILE = 16  # elements of a round
QUANTISING = {
    ("prepare_sharq.cu", "sharq_nvfp4_sparse"): 27.3,
    ("prepare_sharq.cu", "sharq_nvfp4_dense"): 27.5,
    ("prepare_sharq.cu", "sharq_mxfp4_sparse"): 23.5,
    ("prepare_sharq.cu", "sharq_mxfp4_dense"): 24.5,
    ("prepare_sharq.cu", "sharq_hif4_sparse"): 52,
    ("prepare_sharq.cu", "sharq_hif4_dense"): 42,
    ("prepare_fp4.cu", "fp4_nvfp4"): 15,
    ("prepare_fp4.cu", "fp4_mxfp4"): 12.5,
    ("prepare_fp4.cu", "fp4_hif4"): 21,
    ("prepare_fp8.cu", "fp8"): 5.5,
}


def per_element(kernel, wanted):
    count = kernel.round(wanted)
    assert count, "the instruction that marks the loop is gone"
    return count / TILE


def writes_codes(instruction: Instruction) -> bool:
    return instruction.name.startswith(("STG.E.64", "STG.E.128"))


def looks_for_the_largest(instruction: Instruction) -> bool:
    return "MNMX" in instruction.name and "NAN" in instruction.name


def keeps_the_row(instruction: Instruction) -> bool:
    return instruction.name.startswith("STS.128")


def has_a_polynomial(instruction: Instruction) -> bool:
    """exp32's term in r^5."""
    return instruction.name == "FFMA" and "0.00836" in instruction.operands


@pytest.mark.parametrize(("source", "kernel"), QUANTISING)
def test_instructions_of_an_element(source, kernel):
    found = kernels(source, "sm_90a")[f"prepare_{kernel}_bf16"]
    unaligned = 1.4 if kernel == "fp8" else 1.0  # its rows may begin anywhere
    assert per_element(found, writes_codes) <= QUANTISING[source, kernel]
    assert per_element(found, looks_for_the_largest) <= 1.8 * unaligned
    assert per_element(found, keeps_the_row) <= 6.2 * unaligned  # with a norm: the shortest way to a kept row
    assert per_element(found, has_a_polynomial) <= 27.5 * unaligned


def test_rows_fit_the_schedulers_of_an_h200():
    """132 SMs of four at 1.7 GHz, 4.3 TB/s, 2 bytes in and .91 out for an element of SharQ: 70 %, less a margin."""
    found = kernels("prepare_sharq.cu", "sm_90a")["prepare_sharq_nvfp4_sparse_bf16"]
    a_second = 132 * 4 * 32 * 1.7e9
    plain = per_element(found, writes_codes) + per_element(found, looks_for_the_largest)
    assert plain <= a_second * 2.91 / (0.68 * 4.3e12)
