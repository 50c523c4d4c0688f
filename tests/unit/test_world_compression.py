"""What each parameter owes, while the sets of gradients change, and what auto has chosen."""

import threading

import numpy as np
import pytest
from stub_chooser import let_auto_choose

from hpc_dl.arrays import Parameter
from hpc_dl.comm import Op
from hpc_dl.comm.threads import run_threads
from hpc_dl.compress import Auto, only, policy_of, unchecked
from hpc_dl.errors import MismatchError, OptionError
from hpc_dl.reduce import Saved, reshard
from hpc_dl.testing.same import assert_same_bytes
from hpc_dl.world import Group
from hpc_dl.world.reducers import Reducers

pytestmark = pytest.mark.timeout(120)

F32 = np.dtype(np.float32)
A, B, C = (
    Parameter("a", (37, 29), F32),
    Parameter("b", (64, 33), F32),
    Parameter("c", (31, 41), F32),
)
#: Which gradients there are in each step.
STEPS = [(A, B), (A, B), (A,), (B, C), (A, B), (A, B, C), (C,), (A,), (A, B)]
SPECS = ["onebit", "topk:ratio=0.1", "topk:ratio=0.9", "powersgd:rank=2", "demo:decay=1", "int4"]


def everything(spec):
    if spec == "none":
        return policy_of(spec)
    return policy_of([only("*", unchecked(spec).rules[0].scheme, min_bytes=0, min_ndim=0)])


def gradient(parameter, rank, step):
    seed = [*parameter.name.encode(), rank, step]
    return np.random.default_rng(seed).standard_normal(parameter.size).astype(np.float32)


def take(reducers, parameters, step, rank):
    """Reduce the gradients of a step; return what came out, by name."""
    found = reducers.find(parameters)
    for parameter, place in zip(parameters, found.places, strict=True):
        place.view[:] = gradient(parameter, rank, step)
        found.reducer.ready(place.bucket)
    reducers.finish(found.reducer)
    pairs = zip(parameters, found.places, strict=True)
    return {parameter.name: place.view.copy() for parameter, place in pairs}


def owed(state: Saved, name: str, ranks: int) -> np.ndarray:
    """Return what a rank owes of the sum over the ranks."""
    return state[name]["residual"] + ranks * state[name].get("server", 0)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_is_lost_or_sent_twice_while_the_sets_of_gradients_change(spec, size):
    """Sums of what came out, and of what is owed, are the sums of the gradients."""

    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        sums = {p.name: np.zeros(p.size) for p in (A, B, C)}
        for step, parameters in enumerate(STEPS):
            for name, out in take(reducers, parameters, step, comm.rank).items():
                sums[name] += out
        return sums, reducers.compression_state()

    results = run_threads(size, rank)
    (sums, state), states = results[0], [state for _, state in results]
    assert set(state) == {"a", "b", "c"}
    for parameter in (A, B, C):
        steps = [step for step, there in enumerate(STEPS) if parameter in there]
        given = sum(gradient(parameter, r, step) for r in range(size) for step in steps) / size
        if spec.startswith("demo"):  # what its summing ranks owe are coefficients
            assert not any(saved[parameter.name]["server"].any() for saved in states)
        left = sum(owed(saved, parameter.name, size) for saved in states) / size
        np.testing.assert_allclose(sums[parameter.name] + left, given, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("spec", ["onebit", "powersgd:rank=2", "randomk:ratio=0.2"])
def test_a_state_is_taken_up_once(spec):
    """It is not loaded again whenever another set of gradients comes."""

    def rank(comm):
        through = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        for step, parameters in enumerate(STEPS[:4]):
            take(through, parameters, step, comm.rank)
        resumed = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        resumed.load_compression_state(through.compression_state())
        for step, parameters in enumerate(STEPS[4:], 4):
            expected = take(through, parameters, step, comm.rank)
            for name, out in take(resumed, parameters, step, comm.rank).items():
                assert_same_bytes(out, expected[name])

    run_threads(2, rank)


def test_ranks_that_have_joined_move_what_they_owe_too():
    def rank(comm):
        group = Group(comm)
        policy = everything("randomk:ratio=0.2")
        reducers = Reducers(group, "gradients", Op.AVERAGE, policy=policy)
        sums = {p.name: np.zeros(p.size) for p in (A, B)}
        counts = 0

        def add(step, parameters):
            for name, out in take(reducers, parameters, step, comm.rank).items():
                sums[name] += out

        for step, parameters in enumerate([(A, B), (A,)]):
            add(step, parameters)
        if comm.rank == 0:
            for step, parameters in enumerate([(A, B), (A,), (A, B)], 2):
                add(step, parameters)
            counts = 3
        group.join()
        add(2 + counts, (A, B))
        return sums, reducers.compression_state()

    results = run_threads(2, rank)
    states = [state for _, state in results]
    assert states[0]["a"]["step"] == states[1]["a"]["step"]
    # Rank 1 joined before step 2, and its step after the join is its third.
    mine = {"a": [0, 1, 2, 3, 4, 5], "b": [0, 2, 4, 5]}, {"a": [0, 1, 2], "b": [0, 2]}
    for p in (A, B):
        given = sum(gradient(p, r, step) for r in range(2) for step in mine[r][p.name]) / 2
        left = sum(owed(state, p.name, 2) for state in states) / 2
        # What came out while it had joined is known to rank 0 alone.
        np.testing.assert_allclose(results[0][0][p.name] + left, given, rtol=1e-4, atol=2e-4)


def auto(**changed):
    return policy_of(Auto(candidates=("none", "fp16", "onebit"), steps=3)._replace(**changed))


@pytest.fixture
def _chooses_onebit(monkeypatch):
    let_auto_choose(monkeypatch, lambda: [policy_of("onebit")], every=3)


@pytest.fixture
def _chooses_once(monkeypatch):
    """Let the choice be made by the first optimizer of each of two ranks, and by no other."""
    left = [[policy_of("onebit")], [policy_of("onebit")], [], []]
    let_auto_choose(monkeypatch, lambda: left.pop(0), every=3)


LARGE = Parameter("large", (160, 130), F32)


@pytest.mark.usefixtures("_chooses_once")
@pytest.mark.parametrize("resharded", [False, True])
def test_a_run_that_is_resumed_goes_on_with_what_auto_chose(resharded):
    states, lock = [], threading.Lock()

    def rank(comm):
        through = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        for step in range(6):
            take(through, (LARGE,), step, comm.rank)
        state = through.compression_state()
        assert state["large"]["residual"].any()
        if resharded:
            with lock:
                states.append(state)
            comm.barrier()
            state = reshard(states)
        resumed = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        resumed.load_compression_state(state)
        assert set(resumed.compression_state()) == set(state)
        outs = [take(each, (LARGE,), 6, comm.rank)["large"] for each in (through, resumed)]
        assert resumed.traffic().bytes_sent < resumed.traffic().bytes_dense / 8
        if not resharded:
            assert_same_bytes(*outs)

    run_threads(2, rank)


def test_that_nothing_is_compressed_is_a_choice_that_is_kept_too(monkeypatch):
    let_auto_choose(monkeypatch, lambda: [policy_of("none")], every=3)

    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        for step in range(5):
            take(reducers, (LARGE,), step, comm.rank)
        resumed = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        resumed.load_compression_state(reducers.compression_state())
        assert not resumed.compression.deciding
        assert resumed.compression.policy == reducers.compression.policy

    run_threads(2, rank)


@pytest.mark.usefixtures("_chooses_onebit")
def test_a_state_that_only_one_rank_has_is_an_error_everywhere():
    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        for step in range(5):
            take(reducers, (LARGE,), step, comm.rank)
        resumed = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        if comm.rank == 0:
            resumed.load_compression_state(reducers.compression_state())
        with pytest.raises(MismatchError, match=r"onebit"):
            take(resumed, (LARGE,), 5, comm.rank)

    run_threads(2, rank)


@pytest.mark.usefixtures("_chooses_onebit")
def test_a_state_that_comes_while_auto_still_looks_is_taken_up_when_it_decides():
    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        for step in range(5):
            take(reducers, (LARGE,), step, comm.rank)
        state = reducers.compression_state()
        resumed = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=auto())
        take(resumed, (LARGE,), 5, comm.rank)
        resumed.load_compression_state(state)
        assert set(resumed.compression_state()) == set(state)
        for step in range(6, 8):
            take(resumed, (LARGE,), step, comm.rank)
        waiting = resumed.compression_state()["large"]
        assert_same_bytes(waiting["residual"], state["large"]["residual"])
        take(resumed, (LARGE,), 8, comm.rank)
        assert int(resumed.compression_state()["large"]["step"]) == int(state["large"]["step"]) + 1

    run_threads(2, rank)


def states_of(spec, comm, parameter=LARGE):
    reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
    for step in range(3):
        take(reducers, (parameter,), step, comm.rank)
    return reducers.compression_state()


@pytest.mark.parametrize(
    ("saved", "now", "said"),
    [
        ("powersgd:rank=2", "onebit", "state.q.large"),
        ("powersgd:rank=2", "powersgd:rank=3", "state.q.large"),
        ("onebit", "powersgd:rank=2", "server"),
        ("onebit", "none", "residual"),
    ],
)
def test_what_has_no_place_under_another_compression_is_told_once(saved, now, said, caplog):
    def rank(comm):
        state = states_of(saved, comm)
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(now))
        reducers.load_compression_state(state)
        for step in range(3, 5):
            take(reducers, (LARGE,), step, comm.rank)

    with caplog.at_level("WARNING", "hpc_dl.compress"):
        run_threads(2, rank)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2, told  # one on each rank: what they hold differs
    assert all("'large'" in text and said in text.lower() for text in told)


def test_what_is_owed_goes_on_under_another_compression():
    def rank(comm):
        state = states_of("powersgd:rank=2", comm)
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything("onebit"))
        reducers.load_compression_state(state)
        reducers.find((LARGE,))
        now = reducers.compression_state()
        assert_same_bytes(now["large"]["residual"], state["large"]["residual"])

    run_threads(2, rank)


def test_a_state_of_another_size_is_refused():
    def rank(comm):
        other = LARGE._replace(shape=(10, 10))
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything("onebit"))
        reducers.load_compression_state(states_of("onebit", comm, other))
        with pytest.raises(OptionError, match=r"'large'.*100 values"):
            reducers.find((LARGE,))

    run_threads(2, rank)


def test_loading_replaces_what_was_owed():
    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything("onebit"))
        for step in range(3):
            take(reducers, (LARGE,), step, comm.rank)
        assert reducers.compression_state()["large"]["residual"].any()
        reducers.load_compression_state({})
        state = reducers.compression_state()["large"]
        assert not state["residual"].any()
        assert not state["server"].any()

    run_threads(2, rank)


@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM])
def test_nothing_is_lost_when_auto_changes_its_mind(op, monkeypatch, caplog):
    """What is owed goes on under another compression, and is paid where there is none."""
    specs = ["onebit", "onebit", "powersgd:rank=2", "topk:ratio=0.9", "none", "onebit", "none"]
    let_auto_choose(monkeypatch, lambda: [everything(spec) for spec in specs])

    def rank(comm):
        policy = policy_of(Auto(candidates=("none",)))
        reducers = Reducers(Group(comm), "gradients", op, 2.0, policy)
        sums = {p.name: np.zeros(p.size) for p in (A, B)}
        for step in range(len(specs) + 1):
            for name, out in take(reducers, (A, B), step, comm.rank).items():
                sums[name] += out
        assert not reducers.compression.deciding
        assert reducers.traffic().steps == len(specs) + 1
        return sums

    results = run_threads(2, rank)
    for p in (A, B):
        steps = range(len(specs) + 1)
        given = 2 * sum(gradient(p, r, step) for r in range(2) for step in steps)
        given /= 2 if op is Op.AVERAGE else 1
        for sums in results:
            np.testing.assert_allclose(sums[p.name], given, rtol=1e-4, atol=1e-3)
    assert "dropped" not in caplog.text


def test_a_loss_that_is_reported_before_the_first_step_reaches_the_guard():
    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything("onebit"))
        reducers.report_loss(7.5)
        take(reducers, (A, B), 0, comm.rank)
        (reducer,) = {buckets.reducer for buckets in reducers._known.values()}
        return reducer.compression.quality.loss

    assert run_threads(2, rank) == [7.5, 7.5]
