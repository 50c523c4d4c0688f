"""Bucket layouts: every gradient has one place, and no two overlap."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.arrays import BFLOAT16, Layout, Parameter, plan
from hpc_dl.arrays.layout import ALIGNMENT

DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def parameters(draw: st.DrawFn) -> list[Parameter]:
    drawn = draw(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=12))
    return [Parameter(f"p{i}", shape, dtype) for i, (shape, dtype) in enumerate(drawn)]


def _spans(layout: Layout) -> dict[str, tuple[int, int, int]]:
    """Map each name to (bucket, first element, one past the last)."""
    sizes = {p.name: p.size for bucket in layout.buckets for p in bucket.parameters}
    return {name: (b, at, at + sizes[name]) for name, (b, at) in layout.place().items()}


@given(parameters(), st.integers(0, 2000))
def test_every_parameter_has_a_place_of_its_own(given_: list[Parameter], capacity: int) -> None:
    layout = plan(given_, capacity)
    placed = [p for bucket in layout.buckets for p in bucket.parameters]
    assert sorted(placed) == sorted(given_)
    for number, bucket in enumerate(layout.buckets):
        assert {p.dtype for p in bucket.parameters} == {bucket.dtype}
        spans = sorted(span[1:] for span in _spans(layout).values() if span[0] == number)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert spans[-1][1] <= bucket.size
        assert all(offset * bucket.dtype.itemsize % ALIGNMENT == 0 for offset in bucket.offsets)
    assert layout.nbytes == sum(bucket.nbytes for bucket in layout.buckets)


@given(parameters(), st.integers(0, 2000))
def test_capacity_holds_except_for_one_alone(given_: list[Parameter], capacity: int) -> None:
    for bucket in plan(given_, capacity).buckets:
        # Parameters of no elements may follow one that fills a bucket.
        full = [p for p in bucket.parameters if p.size]
        assert sum(p.nbytes for p in full) <= capacity or len(full) == 1


@given(parameters(), st.integers(0, 2000))
def test_buckets_go_in_the_order_in_which_they_fill(given_: list[Parameter], capacity: int) -> None:
    order = {p.name: i for i, p in enumerate(given_)}
    last = [max(order[p.name] for p in b.parameters) for b in plan(given_, capacity).buckets]
    assert last == sorted(last)


@given(parameters(), st.integers(0, 2000), st.data())
def test_groups_travel_together_and_alone(
    given_: list[Parameter], capacity: int, data: st.DataObject
) -> None:
    names = data.draw(st.permutations([p.name for p in given_]))
    cut = data.draw(st.integers(0, len(names)))
    groups = [names[: cut // 2], names[cut // 2 : cut]]
    group_of = {name: number for number, group in enumerate(groups) for name in group}
    layout = plan(given_, capacity, groups)
    assert sorted(layout.place()) == sorted(names)
    seen = []
    for bucket in layout.buckets:
        members = {group_of.get(p.name) for p in bucket.parameters}
        assert len(members) == 1
        seen.append((members.pop(), bucket.dtype.name))
    grouped = [key for key in seen if key[0] is not None]
    assert len(grouped) == len(set(grouped)), "a group of one type is in two buckets"


def test_nothing_to_reduce() -> None:
    assert plan([], 100) == Layout(())
    assert plan([], 100).nbytes == 0


@pytest.mark.parametrize(("shape", "size"), [((), 1), ((0, 3), 0), ((2, 3), 6)])
def test_parameter_sizes(shape: tuple[int, ...], size: int) -> None:
    parameter = Parameter("p", shape, np.dtype(np.float64))
    assert (parameter.size, parameter.nbytes) == (size, 8 * size)
