"""Every sample goes where it should, whatever the number of ranks."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.data import permutation, shard_indices
from hpc_dl.data.streams import Purpose, stream
from hpc_dl.errors import OptionError

N = st.integers(0, 200)
SIZE = st.integers(1, 9)
SEED = st.integers(0, 2**64 - 1)


def shards(n: int, size: int, **options: object) -> list[np.ndarray]:
    return [shard_indices(n, rank, size, **options) for rank in range(size)]  # type: ignore[arg-type]


@given(N, SIZE, SEED, st.booleans())
def test_uneven_has_each_sample_exactly_once(n: int, size: int, seed: int, shuffle: bool) -> None:
    parts = shards(n, size, seed=seed, shuffle=shuffle)
    assert sorted(np.concatenate(parts)) == list(range(n))
    lengths = [len(part) for part in parts]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(N, SIZE, SEED)
def test_drop_leaves_out_fewer_than_there_are_ranks(n: int, size: int, seed: int) -> None:
    parts = shards(n, size, seed=seed, remainder="drop")
    seen = np.concatenate(parts)
    assert {len(part) for part in parts} == {n // size}
    assert len(set(seen)) == len(seen) == n - n % size


@given(N, SIZE, SEED)
def test_pad_repeats_fewer_than_there_are_ranks(n: int, size: int, seed: int) -> None:
    parts = shards(n, size, seed=seed, remainder="pad")
    seen = np.concatenate(parts)
    assert {len(part) for part in parts} == {-(-n // size)}
    assert set(seen) == set(range(n))
    assert len(seen) - n < size


@given(st.integers(1, 200), SIZE, SEED, st.integers(0, 50))
def test_ranks_together_have_seen_a_prefix_of_one_order(
    n: int, size: int, seed: int, seen: int
) -> None:
    """So the images of a step do not depend on how many ranks share them."""
    together = np.concatenate([part[:seen] for part in shards(n, size, seed=seed)])
    assert set(together) == set(permutation(n, seed)[: seen * size])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_tomorrow() -> None:
    """A resumed run must go on in the order it began with, on any version of NumPy."""
    order = permutation(1000, seed=7, epoch=3)
    digest = hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("5dd4a4a3c0ab66a3")


def test_an_order_has_no_favourites() -> None:
    """Each sample comes first about equally often: chi-squared with 9 degrees of freedom."""
    firsts = np.bincount([permutation(10, 0, epoch)[0] for epoch in range(2000)], minlength=10)
    chi_squared = float(((firsts - 200) ** 2 / 200).sum())
    assert chi_squared < 27.9  # exceeded by chance in 1 of 1000 seeds, but the seeds are fixed


def test_the_global_generator_is_not_touched() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    shard_indices(100, 0, 2, epoch=1, seed=3)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]


def test_streams_of_two_purposes_differ() -> None:
    words = {int(stream(purpose, 1, 2, 3).random_raw()) for purpose in Purpose}
    assert len(words) == len(Purpose)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((-1, 0, 1), "n must be 0 or more"),
        ((5, 2, 2), "rank from 0 to size - 1"),
        ((5, 0, 0), "size 1 or more"),
        ((5, 0, 1, -1), "epoch=-1"),
        ((5, 0, 1, 0, 2**64), "seed="),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: tuple[int, ...], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        shard_indices(*arguments)


def test_an_unknown_remainder_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match="'keep'; valid: drop, pad, uneven"):
        shard_indices(5, 0, 2, remainder="keep")  # type: ignore[arg-type]
