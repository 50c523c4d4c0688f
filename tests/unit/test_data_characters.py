"""A text as numbers, and the pieces of it that ranks learn from."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_dl.data.characters import python_help, windows


def test_the_text_is_pythons_help_and_nothing_is_lost() -> None:
    text = python_help()
    assert len(text.train) + len(text.test) > 100_000
    assert 0.09 < len(text.test) / (len(text.train) + len(text.test)) < 0.11
    numbers = np.concatenate([text.train, text.test])
    assert set(numbers.tolist()) == set(range(len(text.alphabet)))
    assert "for" in "".join(text.alphabet[i] for i in text.train[:20_000])
    assert np.array_equal(python_help().train, text.train)


@settings(deadline=None)
@given(st.integers(2, 300), st.data(), st.integers(1, 8), st.integers(0, 2**32), st.integers(0, 99))
def test_windows_are_pieces_of_the_text(
    size: int, data: st.DataObject, count: int, seed: int, step: int
) -> None:
    length = data.draw(st.integers(1, size - 1))
    text = np.arange(size)
    found = windows(text, count, length, seed, step, rank=0)
    assert found.shape == (count, length + 1)
    assert (np.diff(found, axis=1) == 1).all()
    assert 0 <= found.min() <= found.max() < size
    np.testing.assert_array_equal(windows(text, count, length, seed, step, rank=0), found)


def test_steps_ranks_and_seeds_have_other_windows() -> None:
    text = np.arange(1 << 20)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    starts = {tuple(windows(text, 4, 8, *key)[:, 0]) for key in keys}
    assert len(starts) == len(keys)


def test_the_whole_text_can_be_drawn() -> None:
    starts = windows(np.arange(10), 2000, 4, 0, 0, 0)[:, 0]
    assert set(starts.tolist()) == set(range(6))
