"""Arrays are compared by their bytes, and the first difference is named."""

import numpy as np
import pytest

from hpc_dl.testing.same import assert_same_bytes


def test_same() -> None:
    x = np.array([0.0, np.nan, np.inf], np.float32)
    assert_same_bytes(x, x.copy())
    assert_same_bytes(x.tobytes(), x)
    assert_same_bytes([x, x], [x, x.copy()])
    assert_same_bytes([], [])


def test_differs() -> None:
    x = np.zeros(100_000, np.uint8)
    y = x.copy()
    y[[70, 900]] = 3
    with pytest.raises(AssertionError, match="payload: 2 of 100000 bytes differ; byte 70 is 3"):
        assert_same_bytes(y, x, "payload")
    with pytest.raises(AssertionError, match="differ"):  # -0.0 == 0.0, yet not its bytes
        assert_same_bytes(np.float32([0.0]), np.float32([-0.0]))


def test_another_length() -> None:
    with pytest.raises(AssertionError, match="3 bytes instead of 4"):
        assert_same_bytes(b"abc", b"abcd")
    with pytest.raises(AssertionError, match="array 1 is there once only"):
        assert_same_bytes([np.zeros(1)], [np.zeros(1), np.zeros(1)])


def test_the_array_is_named() -> None:
    with pytest.raises(AssertionError, match="outs: array 1: 1 of 1 bytes"):
        assert_same_bytes([b"a", b"b"], [b"a", b"c"], "outs")
