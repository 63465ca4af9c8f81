"""Whole models against Transformers' committed outputs, every architecture, RoPE kind and option, on every CPU path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import CASES, Golden, golden_record, load_golden, weights_digest, write_model

from engine import LLM, SamplingParams

# In fp32 nothing but the order of sums differs. Greedy tokens must agree wherever Transformers itself is sure.
MAX_ERROR = 1e-3  # of the logits' standard deviation
SURE_MARGIN = 5e-3
# bf16 keeps 8 bits: each of ~15 roundings on the way adds up to 2^-9 of a value, 4 % is what they can come to.
BFLOAT16_RMS = 0.04
DEVICES = ("cpu", "numpy")


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Golden]:
    name = request.param
    return name, write_model(name, tmp_path_factory.mktemp(name)), load_golden(name)


def test_weights_are_those_of_the_golden_run(case: tuple[str, Path, Golden]) -> None:
    name, _, _ = case
    assert weights_digest(name) == golden_record()["cases"][name]["digest"]


@pytest.mark.parametrize("device", DEVICES)
def test_float32_equals_transformers(case: tuple[str, Path, Golden], device: str) -> None:
    _, path, golden = case
    with LLM(path, device=device, dtype="float32") as llm:
        logits = llm.logits(golden.prompt)
        following = llm.logits(golden.prompt + golden.greedy[:-1])[len(golden.prompt) - 1 :].argmax(axis=1)
        params = SamplingParams(temperature=0, max_tokens=len(golden.greedy), ignore_eos=True)
        answer = llm.generate(golden.prompt, params)[0].outputs[0].token_ids
    assert np.abs(logits - golden.logits).max() <= MAX_ERROR * golden.logits.std()
    sure = np.array(golden.margins) > SURE_MARGIN
    assert np.array_equal(following[sure], np.array(golden.greedy)[sure])
    certain = len(sure) if sure.all() else int(sure.argmin())  # up to the first step at which either token is right
    assert answer[:certain] == golden.greedy[:certain]


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_stays_close(case: tuple[str, Path, Golden], device: str) -> None:
    _, path, golden = case
    with LLM(path, device=device, dtype="bfloat16") as llm:
        error = llm.logits(golden.prompt) - golden.logits
    assert np.sqrt(np.mean(error**2)) <= BFLOAT16_RMS * golden.logits.std()
