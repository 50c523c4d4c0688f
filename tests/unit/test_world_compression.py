"""What each parameter owes, while the sets of gradients change, and what auto has chosen."""

import threading

import numpy as np
import pytest
from stub_chooser import let_auto_choose

from hpc_dl.arrays import Parameter
from hpc_dl.comm import Op
from hpc_dl.comm.threads import run_threads
from hpc_dl.compress import Auto, Limits, only, policy_of, unchecked
from hpc_dl.errors import MismatchError, OptionError
from hpc_dl.reduce import Saved, reshard
from hpc_dl.reduce.compression import BucketCompression
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


F64 = np.dtype(np.float64)
#: Large enough to be compressed by the usual rules as float64, not as float32.
WIDE = [Parameter(name, (rows, 100), F64) for name, rows in (("a", 100), ("b", 110), ("c", 120))]


@pytest.mark.parametrize("by_auto", [False, True])
def test_nothing_is_lost_of_gradients_that_travel_as_another_type(by_auto, monkeypatch):
    """Rules are for the sizes of the gradients, and buckets may hold another type."""
    policy = policy_of("onebit")
    if by_auto:
        let_auto_choose(monkeypatch, lambda: [policy_of("onebit"), policy_of("onebit")], every=2)
        policy = policy_of(Auto(candidates=("none",)))
    steps = [tuple(WIDE["abc".index(p.name)] for p in there) for there in STEPS]

    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=policy)
        sums = {p.name: np.zeros(p.size) for p in WIDE}
        for step, parameters in enumerate(steps):
            for name, out in take(reducers, parameters, step, comm.rank).items():
                sums[name] += out
        return sums, reducers.compression_state()

    results = run_threads(2, rank)
    for parameter in WIDE:
        there = [step for step, parameters in enumerate(steps) if parameter in parameters]
        given = sum(gradient(parameter, r, step) for r in range(2) for step in there) / 2
        left = sum(owed(state, parameter.name, 2) for _, state in results) / 2
        out = results[0][0][parameter.name]
        np.testing.assert_allclose(out + left, given, rtol=1e-4, atol=2e-4)


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


def test_a_state_of_another_size_is_refused_at_once_where_sizes_are_known():
    def rank(comm):
        other = LARGE._replace(shape=(10, 10))
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything("onebit"))
        take(reducers, (LARGE,), 0, comm.rank)
        with pytest.raises(OptionError, match=r"'large'.*100 values"):
            reducers.load_compression_state(states_of("onebit", comm, other))

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


#: Which gradients there are, where auto leaves onebit in the sixth step, without b.
LEAVES = [(A, B)] * 5 + [(A,)] * 2 + [(A, B)] * 3


def paid(comm, spoiled=(), resumed_after=None, op=Op.AVERAGE):
    """Take the steps of ``LEAVES``; return by name what was given, and what came out."""
    group, policy = Group(comm), policy_of(Auto(candidates=("none", "onebit")))
    reducers = Reducers(group, "gradients", op, policy=policy)
    out, given = ({p.name: np.zeros(p.size) for p in (A, B)} for _ in range(2))
    for step, parameters in enumerate(LEAVES):
        found = reducers.find(parameters)
        for parameter, place in zip(parameters, found.places, strict=True):
            place.view[:] = gradient(parameter, comm.rank, step)
            if step in spoiled and comm.rank == 0:
                place.view[0] = np.nan
            found.reducer.ready(place.bucket)
        reducers.finish(found.reducer)
        if step not in spoiled:
            for parameter, place in zip(parameters, found.places, strict=True):
                out[parameter.name] += place.view
                mean = sum(gradient(parameter, r, step) for r in range(comm.size)) / comm.size
                given[parameter.name] += mean * (comm.size if op is Op.SUM else 1)
        if step == resumed_after:
            saved = reducers.compression_state()
            reducers = Reducers(group, "gradients", op, policy=policy)
            reducers.load_compression_state(saved)
    assert not any(state.get("residual", out["a"][:0]).any() for state in owing(reducers))
    return given, out


def owing(reducers):
    return [s for n, s in reducers.compression_state().items() if n in ("a", "b")]


@pytest.mark.parametrize("op", [Op.AVERAGE, Op.SUM])
@pytest.mark.parametrize(
    ("spoiled", "resumed_after"), [((), None), ((5,), None), ((5, 6, 7), None), ((), 6)]
)
def test_what_auto_leaves_is_paid_in_the_first_good_step(
    spoiled, resumed_after, op, monkeypatch, caplog
):
    """Whether the gradient was missing in the step that decided, or was spoiled there."""
    choices = [[everything("onebit"), policy_of("none")] for _ in range(2)]
    let_auto_choose(monkeypatch, lambda: choices.pop() if choices else [], every=3)
    for given, out in run_threads(2, lambda comm: paid(comm, spoiled, resumed_after, op)):
        for name in ("a", "b"):
            np.testing.assert_allclose(out[name], given[name], rtol=1e-4, atol=1e-3)
    assert "dropped" not in caplog.text


def test_what_auto_leaves_is_paid_when_no_rank_has_joined(monkeypatch):
    choices = [[everything("onebit"), policy_of("none")] for _ in range(2)]
    let_auto_choose(monkeypatch, lambda: choices.pop(), every=2)

    def rank(comm):
        group = Group(comm)
        policy = policy_of(Auto(candidates=("none", "onebit")))
        reducers = Reducers(group, "gradients", Op.AVERAGE, policy=policy)
        for step in range(4):
            take(reducers, (A, B), step, comm.rank)
        # The new buckets are there, and what is owed is not paid yet.
        reducers.find((A, B))
        owes = [state["residual"].copy() for state in owing(reducers)]
        assert len(owes) == 2
        assert all(owed.any() for owed in owes)
        if comm.rank == 0:
            take(reducers, (A, B), 4, comm.rank)
        group.join()
        for state, owed in zip(owing(reducers), owes, strict=True):
            assert_same_bytes(state["residual"], owed)
        take(reducers, (A, B), 5, comm.rank)
        assert not owing(reducers)

    run_threads(2, rank)


@pytest.mark.parametrize("spec", ["randomk:ratio=0.2", "onebit"])
def test_a_state_of_the_same_run_takes_it_back(spec):
    """Also the number of the step, on which random choices depend, in each set of gradients."""

    def rank(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        saved, outs = {}, {}
        for step, parameters in enumerate(STEPS):
            saved[step] = reducers.compression_state()
            outs[step] = take(reducers, parameters, step, comm.rank)
        for first in (6, 3):
            reducers.load_compression_state(saved[first])
            for step in range(first, len(STEPS)):
                for name, out in take(reducers, STEPS[step], step, comm.rank).items():
                    assert_same_bytes(out, outs[step][name], f"{name} in {step} from {first}")

    run_threads(2, rank)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.9", "demo:decay=1,k=20"])
@pytest.mark.parametrize("ranks", [None, 2, 3])
def test_nothing_is_lost_where_buckets_are_others_after_a_load(spec, size, ranks):
    """What a rank owed of sums that lie on another rank now is still owed, once."""
    parameters = A, B, C

    def before(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        outs = [take(reducers, parameters, step, comm.rank) for step in range(4)]
        return sum_of(outs), reducers.compression_state()

    def after(comm):
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        reducers.load_compression_state(loaded[comm.rank])
        outs = [take(reducers, parameters[::-1], 4, comm.rank)]
        reducers.find((A,)), reducers.find((B,)), reducers.find((C,))  # nothing is owed of sums
        return sum_of(outs), reducers.compression_state()

    def sum_of(outs):
        return {p.name: sum(out[p.name].astype(np.float64) for out in outs) for p in parameters}

    first = run_threads(size, before)
    states = [state for _, state in first]
    assert any(state["a"]["server"].any() for state in states)
    loaded = states if ranks is None else [reshard(states)] * ranks
    later = run_threads(len(loaded), after)
    for p in parameters:
        given = sum(gradient(p, r, step) for r in range(size) for step in range(4)) / size
        given += sum(gradient(p, r, 4) for r in range(len(loaded))) / len(loaded)
        left = sum(owed(state, p.name, len(loaded)) for _, state in later) / len(loaded)
        out = first[0][0][p.name] + later[0][0][p.name]
        np.testing.assert_allclose(out + left, given, rtol=1e-4, atol=3e-4)


def test_a_state_of_the_same_run_takes_the_guard_back():
    limits = Limits(every=1, min_cosine=0.99, pause=50)

    def rank(comm):
        policy = everything("onebit")._replace(limits=limits)
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=policy)
        before = reducers.compression_state()
        for step in range(3):
            saved = reducers.compression_state() if step else before
            take(reducers, (A,), step, comm.rank)
            if step == 0:
                start = reducers.compression_state()
        assert saved["a"]["guard"][1]
        start["a"]["guard"] = np.array([0, 0, -1.0])
        reducers.load_compression_state(start)
        assert_same_bytes(reducers.compression_state()["a"]["guard"], start["a"]["guard"])

    run_threads(2, rank)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("spec", ["onebit:warmup=2", "randomk:ratio=0.2"])
def test_a_state_that_only_one_rank_has_loaded_is_an_error(spec, started):
    def rank(comm):
        through = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        for step in range(4):
            take(through, (A, B), step, comm.rank)
        resumed = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=everything(spec))
        if started:
            take(resumed, (A, B), 0, comm.rank)
        if comm.rank == 1:
            resumed.load_compression_state(through.compression_state())
        with pytest.raises(MismatchError, match=r"states of compression.*step 4.*same"):
            take(resumed, (A, B), 4, comm.rank)

    run_threads(2, rank)


def test_a_state_of_another_suspension_is_an_error():
    def rank(comm):
        policy = everything("onebit")
        through = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=policy)
        take(through, (A,), 0, comm.rank)
        state = through.compression_state()
        if comm.rank == 1:
            state["a"]["guard"] = np.array([500, 1, -1.0])
        through.load_compression_state(state)
        with pytest.raises(MismatchError, match=r"states of compression.*until step 500"):
            take(through, (A,), 1, comm.rank)

    run_threads(2, rank)


def test_a_state_that_comes_late_and_has_no_place_is_told_and_dropped(caplog):
    def rank(comm):
        state = states_of("onebit", comm)
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=policy_of("fp16"))
        take(reducers, (LARGE,), 0, comm.rank)
        reducers.load_compression_state(state)
        assert not reducers.compression_state()

    with caplog.at_level("WARNING", "hpc_dl.compress"):
        run_threads(2, rank)
    assert caplog.text.count("'large'") == 2


def test_what_moves_is_copied_and_nothing_else(monkeypatch):
    """Sets that alternate and share little cost little."""
    asked: list[set[str]] = []
    whole = BucketCompression.state_dict

    def noted(self, names=None):
        found = whole(self, names)
        asked.append(set(found))
        return found

    def rank(comm):
        policy = everything("onebit")
        reducers = Reducers(Group(comm), "gradients", Op.AVERAGE, policy=policy)
        for step, there in enumerate([(A, B), (B, C), (A, B), (B, C)]):
            take(reducers, there, step, comm.rank)
        asked.clear()
        reducers.find((A, B))

    monkeypatch.setattr(BucketCompression, "state_dict", noted)
    run_threads(1, rank)
    assert asked
    assert all(names == {"b"} for names in asked)
