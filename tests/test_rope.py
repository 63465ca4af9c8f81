"""Rotary tables against Transformers' rotary modules (committed results) and against properties of the definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from config_variants import ROPE_POSITIONS, VARIANTS

from engine.config import RopeConfig
from engine.models.registry import read_config
from engine.rope import attention_factor, inverse_frequencies, rope_table

_GOLDEN = np.load(Path(__file__).parent / "golden" / "rope.npz")
_ULP = 2.0**-23  # of float32 at 1


@pytest.mark.parametrize("name", VARIANTS)
def test_frequencies_equal_transformers(name: str) -> None:
    model = read_config(VARIANTS[name], name)
    expected = _GOLDEN[f"{name}/inv_freq"]
    # Transformers computes in float32 throughout, with up to five roundings; we round once.
    np.testing.assert_allclose(inverse_frequencies(model.rope, model.head_dim), expected, rtol=5 * _ULP)
    assert attention_factor(model.rope) == pytest.approx(float(_GOLDEN[f"{name}/attention_factor"]), rel=1e-12)


@pytest.mark.parametrize("name", ["llama-3.1-8b-instruct", "rope-linear", "rope-yarn-mscale", "llama-head-dim-24"])
def test_table_equals_transformers(name: str) -> None:
    model = read_config(VARIANTS[name], name)
    table = rope_table(model.rope, model.head_dim, max(ROPE_POSITIONS) + 1)[ROPE_POSITIONS]
    expected = _GOLDEN[f"{name}/table"]
    assert table.dtype == np.float32 and table.shape == expected.shape
    # A frequency that differs by five roundings turns pair i by that much more per position.
    angles = np.multiply.outer(ROPE_POSITIONS, np.tile(_GOLDEN[f"{name}/inv_freq"], 2)).astype(np.float64)
    tolerance = attention_factor(model.rope) * (5 * _ULP * angles + 2 * _ULP)
    assert (np.abs(table - expected) <= tolerance).all()


def test_position_zero_and_unit_circle() -> None:
    table = rope_table(RopeConfig(theta=5e5), 64, 5000).astype(np.float64)
    cos, sin = table[:, :32], table[:, 32:]
    assert (cos[0] == 1).all() and (sin[0] == 0).all()
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=3e-7)
    np.testing.assert_allclose(table[:7, 0], [math.cos(p) for p in range(7)], atol=6e-8)  # pair 0 turns by 1


def test_prefix_does_not_depend_on_length() -> None:
    rope = RopeConfig(kind="yarn", factor=4.0, original_max_position=32)
    long = rope_table(rope, 24, 4100)  # longer than one chunk of the computation
    for length in (0, 1, 17, 4096, 4097):
        np.testing.assert_array_equal(rope_table(rope, 24, length), long[:length])


def test_angle_is_rounded_as_in_training() -> None:
    """cos of float32(position · frequency), not of the exact product: they differ at large angles."""
    rope, position = RopeConfig(theta=10000.0), 99991
    frequency = inverse_frequencies(rope, 128)[1]
    rounded = np.cos(np.float64(np.float32(position) * frequency))
    exact = np.cos(np.float64(position) * np.float64(frequency))
    assert abs(rounded - exact) > 1e-5
    assert rope_table(rope, 128, position + 1)[position, 1] == np.float32(rounded)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_context_extension_lowers_only_long_wavelengths(kind: str) -> None:
    plain = inverse_frequencies(RopeConfig(theta=5e5), 128).astype(np.float64)
    rope = RopeConfig(theta=5e5, kind=kind, factor=8.0, original_max_position=8192)  # type: ignore[arg-type]
    ratio = plain / inverse_frequencies(rope, 128)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8)
    assert (np.diff(ratio) >= -1e-6).all() and ((ratio > 1.01) & (ratio < 7.9)).any()
