"""Rows of numbers of every kind, and arrays compared bit by bit: for tests of kernels whose bits are defined."""

from __future__ import annotations

import ml_dtypes
import numpy as np

F32, F16, BF16 = (np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16))
DTYPES = [F32, F16, BF16]


def bits(array):
    """The array's bit patterns, every NaN made the same one: which NaN an operation gives is left open."""
    patterns = array.view(np.uint32 if array.itemsize == 4 else np.uint16).copy()
    patterns[np.isnan(array.astype(np.float32))] = 0xFFFF
    return patterns


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    np.testing.assert_array_equal(bits(actual), bits(expected))


def all_patterns(rng, shape, dtype):
    """Random bit patterns: subnormals, infinities and NaN occur, and every magnitude."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return rng.integers(0, 2 ** (8 * dtype.itemsize), shape, unsigned).view(dtype)


def rows_of_many_sizes(rng, C, dtype):
    """Rows whose sums of squares are ordinary, tiny, subnormal, zero, overflowing, infinite and NaN."""
    with np.errstate(over="ignore"):
        scales = np.array([1, 1, 1e-3, 30, 1e-20, 1e-41, 0, 1e19, 3e37], np.float32)[:, None]
        x = (rng.normal(0, 1, (scales.size, C)) * scales).astype(np.float32).astype(dtype)
    x[1, 0], x[2, C - 1] = np.inf, np.nan
    return x
