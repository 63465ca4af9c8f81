"""Perplexity: which tokens are scored, and with which loss."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_model

from engine import LLM, SamplingParams
from engine.errors import InvalidArgument
from engine.eval import build_parser, negative_log_likelihood, plot_comparison, read_text, token_losses, windows
from engine.weights.locate import DEMO_DIRECTORY


@given(st.integers(2, 60), st.data())
def test_windows_score_each_token_once(window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    count = data.draw(st.integers(window, 400))
    scored: list[int] = []
    for begin, first, end in windows(count, window, stride):
        assert 0 <= begin < first < end <= count and end - begin <= window
        assert end - begin == window or (stride < window and end == count)
        if scored and stride < window:
            assert first - begin >= window - stride or end == count, "too little context"
        scored += range(first, end)
    if stride == window:  # the literature's rule, said another way
        assert scored == [i for i in range(count // window * window) if i % window]
    else:
        assert scored == list(range(1, count))


@pytest.mark.parametrize(("count", "window", "stride"), [(5, 6, 3), (50, 1, 1), (50, 6, 0), (50, 6, 7)])
def test_impossible_windows_are_refused(count: int, window: int, stride: int) -> None:
    with pytest.raises(InvalidArgument):
        list(windows(count, window, stride))


def test_loss_against_the_definition() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [1000.0, 0.0, -1000.0]], np.float32)
    expected = [-math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(3))), 1000.0]
    assert np.allclose(negative_log_likelihood(logits, [1, 1]), expected, rtol=1e-12)


def test_losses_are_the_prompt_logprobs(tmp_path: Path) -> None:
    """Against the other way to the same figures: prompt_logprobs of each window."""
    ids = np.random.default_rng(1).integers(0, 256, 100).tolist()
    with LLM(write_model("qwen3_tied", tmp_path)) as llm:
        losses = token_losses(llm, ids, 32, 20)
        expected: dict[int, float] = {}
        for begin in range(0, 100, 20):
            part = ids[begin : begin + 32]
            scored = llm.generate(part, SamplingParams(prompt_logprobs=0, max_tokens=1))[0].prompt_logprobs
            assert scored is not None
            for position in range(1, len(part)):
                entry = scored[position]
                assert entry is not None
                expected.setdefault(begin + position, -entry[part[position]].logprob)
    assert np.allclose(losses, [expected[i] for i in range(1, 100)], atol=1e-6)  # fp32 logprobs


def test_reading_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("one \n\n two \n")
    assert read_text(path, wikitext=False) == "one \n\n two \n"
    assert read_text(path, wikitext=True) == "one \n\n\n\n\n\n two \n"
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidArgument, match="cannot read"):
        read_text(path, wikitext=False)


def test_the_bundled_model_predicts_its_held_out_text(tmp_path: Path) -> None:
    """An untrained model of 4096 tokens is at perplexity 4096. The part is prose, which this model knows less well than
    code; the model card has the whole text's figure."""
    path = tmp_path / "part.txt"
    path.write_text((DEMO_DIRECTORY / "heldout.txt").read_text()[:30_000])
    command = [sys.executable, "-m", "engine.eval", "perplexity", "--text", str(path), "--window", "512", "--json"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    report = json.loads(result.stdout)
    assert report["tokens"] > 5_000
    assert 5 < report["perplexity"] < 60


def test_layer_errors_have_no_cache_to_choose_a_type_for() -> None:
    options = build_parser().parse_args(["layers", "--kv-cache-dtype", "fp8"])
    with pytest.raises(InvalidArgument, match="leave --kv-cache-dtype at auto"):
        options.main(options)


def test_a_comparison_is_drawn(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    row = {"method": "bf16", "grade": None, "bits_per_weight": None, "perplexity": 10.0, "recovered": [1, 1, 1]}
    other = {**row, "method": "sharq", "grade": "rtn", "bits_per_weight": 4.25, "perplexity": 10.2}
    plot_comparison(
        pyplot, [row, other | {"recovered": [0.5, 0.4, 0.7]}, other | {"recovered": None}], tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_published_model_is_compared_as_far_as_its_download(tmp_path: Path) -> None:
    """The documented command for the paper's model: all is understood, and what is missing is the download alone."""
    command = [sys.executable, "-m", "engine.eval", "compare", "--model", "qwen2.5-7b", "--methods", "nvfp4", "sharq"]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert "error: Qwen/Qwen2.5-7B-Instruct is not completely in the cache" in result.stderr
    assert "Traceback" not in result.stderr
