"""Options of gradients, their groups, and the buckets that adapters fill; on threads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_dl.arrays import Parameter
from hpc_dl.comm import Op
from hpc_dl.comm.threads import run_threads
from hpc_dl.errors import MismatchError, OptionError
from hpc_dl.world import Group, global_process_set
from hpc_dl.world.gradients import gradient_options, group_names, unique
from hpc_dl.world.reducers import Reducers


def options(**changed):
    arguments = {
        "op": Op.AVERAGE,
        "compression": None,
        "predivide": 1.0,
        "sparse_as_dense": False,
        "groups": None,
        "process_set": global_process_set,
        "guard": True,
    }
    return gradient_options(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"op": "mean"}, "average"),
        ({"predivide": 0}, "> 0"),
        ({"predivide": 2.0, "op": Op.SUM}, "op=Average only"),
        ({"groups": -1}, "number of groups"),
        ({"groups": [1, 2]}, "list of lists"),
        ({"groups": [["kernel"]]}, "not of their names"),
    ],
)
def test_bad_options_are_named(changed, said):
    with pytest.raises(OptionError, match=said):
        options(**changed)


def test_groups_are_a_number_or_lists():
    assert options().groups == 0
    assert options(groups=3).groups == 3
    a, b, c = object(), object(), object()
    assert options(groups=[[a], (b, c)]).groups == ((a,), (b, c))


@given(st.integers(0, 9), st.integers(0, 12))
def test_a_number_of_groups_shares_out_the_names(count, length):
    names = [f"n{i}" for i in range(length)]
    groups = group_names(count, names, names)
    assert [name for group in groups for name in group] == (names if count else [])
    if count and names:
        sizes = [len(group) for group in groups]
        assert len(sizes) == min(count, length)
        assert max(sizes) - min(sizes) <= 1


def test_lists_of_variables_become_names():
    a, b, c = object(), object(), object()
    assert group_names(((c, a), (object(),)), ["a", "b", "c"], [a, b, c]) == (("c", "a"), ())
    with pytest.raises(OptionError, match="'a' is in two groups"):
        group_names(((a,), (b, a)), ["a", "b", "c"], [a, b, c])


@given(st.lists(st.sampled_from(["x", "y", "z"]), max_size=8))
def test_unique_names_are_unique_and_keep_the_first(names):
    numbered = unique(names)
    assert len(set(numbered)) == len(names)
    assert [name.partition("#")[0] for name in numbered] == names
    assert set(names) <= set(numbered)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sets_of_gradients_take_turns(size):
    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, 2.0)
        results = []
        for step in range(4):
            length = 3 + step % 2
            found = reducers.find((Parameter("a", (length,), np.dtype("f8")),))
            found.places[0].view[:] = comm.rank + step
            found.reducer.finish()
            results.append(found.places[0].view.copy())
        return results, reducers.traffic().bytes_sent

    for results, sent in run_threads(size, rank):
        for step, result in enumerate(results):
            expected = 2 * ((size - 1) / 2 + step)
            np.testing.assert_allclose(result, np.full(3 + step % 2, expected))
        assert (sent > 0) == (size > 1)


def test_ranks_with_other_gradients_learn_which():
    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.SUM)
        with pytest.raises(MismatchError, match=r"'w0'.*'w1'"):
            reducers.find((Parameter(f"w{comm.rank}", (2,), np.dtype("f4")),))

    run_threads(2, rank)


def test_a_set_that_is_new_to_one_rank_only_is_found_out():
    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.SUM)
        known = (Parameter("a", (2,), np.dtype("f4")),)
        reducers.find(known).reducer.finish()
        new = (Parameter("b", (2,), np.dtype("f4")),)
        with pytest.raises(MismatchError, match=r"reduce.*plan|plan.*reduce"):
            reducers.find(known if comm.rank else new).reducer.finish()

    run_threads(2, rank)
