"""Gradient tapes on real ranks; true for any number of them."""

import gc
import os
import weakref

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

import hpc_dl.tensorflow as hvd
from hpc_dl.compress import Limits, policy_of
from hpc_dl.errors import MismatchError, OptionError, ReplicaDivergenceError
from hpc_dl.reduce import Traffic


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


@pytest.fixture(params=["eager", "graph"])
def mode(request):
    return tf.function if request.param == "graph" else lambda function: function


def variables() -> list[tf.Variable]:
    generator = np.random.default_rng(3)
    return [
        tf.Variable(generator.normal(size=(4, 3)), name="kernel"),
        tf.Variable(np.zeros(3), name="bias"),
    ]


def batch(step: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(step)
    return generator.normal(size=(rows, 4)), generator.normal(size=(rows, 3))


def loss_of(w, x, y):
    return tf.reduce_mean(tf.square(tf.tanh(x @ w[0] + w[1]) - y))


def step_of(w, wrap):
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = loss_of(w, x, y)
        for variable, g in zip(w, wrap(tape).gradient(loss, w), strict=True):
            variable.assign_sub(0.1 * g)
        return loss

    return step


def distance(one, other) -> float:
    return max(float(np.abs(a.numpy() - b.numpy()).max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 1}, {"gradient_predivide_factor": 3.0}, {"sparse_as_dense": True}],
)
def test_n_ranks_descend_like_one_with_n_times_the_batch(mode, options):
    rows = 4 * hvd.size()
    alone, together = variables(), variables()
    step_alone = step_of(alone, lambda tape: tape)
    step = mode(step_of(together, lambda tape: hvd.DistributedGradientTape(tape, **options)))
    for number in range(4):
        x, y = batch(number, rows)
        step_alone(x, y)
        step(tf.constant(x[hvd.rank() :: hvd.size()]), tf.constant(y[hvd.rank() :: hvd.size()]))
    assert distance(alone, together) <= 1e-10


def test_the_tape_can_be_wrapped_before_it_records():
    w = tf.Variable([1.0, 2.0])
    with hvd.DistributedGradientTape(tf.GradientTape(persistent=True)) as tape:
        loss = tf.reduce_sum(w * w) * float(hvd.rank() + 1)
    assert isinstance(tape, tf.GradientTape)
    factor = (hvd.size() + 1) / 2
    np.testing.assert_allclose(tape.gradient(loss, w), 2 * factor * w.numpy(), rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(loss, [w])[0], 2 * factor * w.numpy(), rtol=1e-6)


def test_sources_may_be_nested_missing_sparse_and_tensors(mode):
    table = tf.Variable(np.ones((8, 2)), name="table")
    w, unused = tf.Variable(2.0, dtype=tf.float64), tf.Variable(1.0)
    x = tf.constant(3.0, tf.float64)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            rows = tf.gather(table, [hvd.rank(), hvd.rank() + 1])
            loss = tf.reduce_sum(rows) * w * x * float(hvd.rank() + 1)
        tape = hvd.DistributedGradientTape(tape)
        return tape.gradient(loss, {"t": table, "rest": [w, x, unused]})

    result = mode(run)(x)
    mean = (hvd.size() + 1) / 2
    assert result["rest"][2] is None
    assert float(result["rest"][0]) == pytest.approx(4 * 3 * mean)
    assert float(result["rest"][1]) == pytest.approx(4 * 2 * mean)
    assert isinstance(result["t"], tf.IndexedSlices)
    expected = np.zeros((8, 2))
    for rank in range(hvd.size()):
        expected[rank : rank + 2] += 6 * (rank + 1) / hvd.size()
    np.testing.assert_allclose(tf.convert_to_tensor(result["t"]), expected)


def test_a_tensor_in_front_of_the_variables_does_not_switch_the_guard_off():
    if hvd.size() == 1:
        pytest.skip("one replica cannot diverge")
    w = tf.Variable(1.0 + hvd.rank())

    def step(number):
        x = tf.constant(float(number))
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = w * x
        return hvd.DistributedGradientTape(tape).gradient(loss, [x, w])

    step(1)
    with pytest.raises(ReplicaDivergenceError, match="1 parameters"):
        step(2)


def test_tensors_of_any_shape_leave_no_buckets_behind():
    def step(rows):
        x, w = tf.ones([rows, 2]) * (hvd.rank() + 1.0), tf.ones([2])
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            loss = tf.reduce_sum(x * x) + tf.reduce_sum(w)
        return hvd.DistributedGradientTape(tape).gradient(loss, [x, w])[0]

    group = hvd.global_process_set.group()
    before = len(group._reducers), len(group._counts)
    for rows in range(1, 6):
        mean = 2 * (hvd.size() + 1) / 2
        np.testing.assert_allclose(step(rows), np.full((rows, 2), mean), rtol=1e-6)
    assert len(group._reducers) <= before[0] + 1
    assert len(group._counts) <= before[1] + 2


def test_a_tape_can_be_wrapped_twice():
    w = tf.Variable([1.0, 2.0])
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(w * w) * float(hvd.rank() + 1)
    mean = hvd.DistributedGradientTape(tape)
    total = hvd.DistributedGradientTape(tape, op=hvd.Sum, guard=False)
    expected = 2 * w.numpy() * (hvd.size() + 1) / 2
    np.testing.assert_allclose(mean.gradient(loss, w), expected, rtol=1e-6)
    np.testing.assert_allclose(total.gradient(loss, w), expected * hvd.size(), rtol=1e-6)


def test_looking_at_a_tape_on_one_rank_begins_nothing(caplog):
    """All ranks begin reductions alike, with the first gradients; a loss waits for them."""
    limits = Limits(every=1, max_loss=2.0)
    policies = [policy_of("onebit")._replace(seed=seed, limits=limits) for seed in (31, 32)]
    w = tf.Variable(tf.ones((160, 130)), name="large")

    def taped(policy):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(w * w)
        return loss, hvd.DistributedGradientTape(tape, compression=policy)

    if hvd.rank() == 0:
        _, tape = taped(policies[0])
        assert tape.traffic() == Traffic(0, 0, 0.0)
        assert tape.compression_state() == {}
        tape.report_loss(1.0)
    with caplog.at_level("WARNING", "hpc_dl.compress"):
        for policy in (*reversed(policies), policies[0]):
            loss, tape = taped(policy)
            expected = 2 * w.numpy()
            np.testing.assert_allclose(tape.gradient(loss, w), expected, rtol=1e-2)
            tape.report_loss(9.0)
    assert ("the loss is 9, and was 1" in caplog.text) == (hvd.size() > 1 and hvd.rank() == 0)


def test_a_process_set_that_is_gone_keeps_nothing():
    if hvd.size() < 3:
        pytest.skip("a set of one rank reduces nothing, and one of all ranks is there already")
    some = hvd.add_process_set([0, 1])
    w, group = tf.Variable([1.0, 2.0]), None
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(w * w)
    if some.included():
        hvd.DistributedGradientTape(tape, process_set=some).gradient(loss, w)
        group = weakref.ref(some.group())
    hvd.remove_process_set(some)
    del some, tape
    gc.collect()
    assert group is None or group() is None


def test_local_sources_keep_their_gradient():
    a, b = tf.Variable(1.0, name="a"), tf.Variable(1.0, name="b")
    with tf.GradientTape() as tape:
        loss = (a + b) * float(hvd.rank() + 1)
    tape = hvd.DistributedGradientTape(tape)
    tape.register_local_source(b)
    local, shared = tape.get_local_and_global_gradients(loss, [a, b])
    assert float(shared[0][1]) == pytest.approx((hvd.size() + 1) / 2)
    assert float(local[0][1]) == pytest.approx((hvd.rank() + 1) / hvd.size())


def test_two_tapes_in_one_graph():
    first, second = variables(), variables()

    @tf.function
    def step(x, y):
        with tf.GradientTape() as one, tf.GradientTape() as two:
            a, b = loss_of(first, x, y), loss_of(second, 2 * x, y)
        one = hvd.DistributedGradientTape(one).gradient(a, first)
        two = hvd.DistributedGradientTape(two).gradient(b, second)
        return one, two

    x, y = (tf.constant(part) for part in batch(hvd.rank(), 4))
    one, two = step(x, y)
    for weights, gradients, scale in ((first, one, 1.0), (second, two, 2.0)):
        expected = [np.zeros(v.shape) for v in weights]
        for rank in range(hvd.size()):
            their_x, their_y = (tf.constant(part) for part in batch(rank, 4))
            with tf.GradientTape() as tape:
                loss = loss_of(weights, scale * their_x, their_y)
            for total, g in zip(expected, tape.gradient(loss, weights), strict=True):
                total += g.numpy() / hvd.size()
        for total, g in zip(expected, gradients, strict=True):
            np.testing.assert_allclose(g, total, rtol=1e-12)


def test_gradients_that_are_constant_on_some_ranks(mode):
    """What a graph knows beforehand is not reduced before its turn."""
    a, b = tf.Variable([1.0, 2.0], name="a"), tf.Variable(3.0, name="b")

    def step():
        with tf.GradientTape() as tape:
            linear = tf.reduce_sum(a) * 2.0
            loss = linear if hvd.rank() == 0 else linear * b + tf.reduce_sum(a * a)
            loss += b * b
        return hvd.DistributedGradientTape(tape).gradient(loss, [a, b])

    size, step = hvd.size(), mode(step)
    for _ in range(3):
        of_a, of_b = step()
        others = np.array([2 * 3.0 + 2 * 1.0, 2 * 3.0 + 2 * 2.0])
        np.testing.assert_allclose(of_a, (2.0 + (size - 1) * others) / size, rtol=1e-6)
        assert float(of_b) == pytest.approx((6.0 + (size - 1) * (6.0 + 6.0)) / size)


def test_a_constant_is_reduced_in_each_call(mode):
    """The number of ranks at work is such a sum: it must not be that of the first call."""
    name = f"constant.{mode is tf.function}"
    call = mode(lambda: hvd.allreduce(tf.ones([2]), op=hvd.Sum, name=name))
    before = hvd.size()
    assert call().numpy().tolist() == [before] * 2
    if hvd.rank() == hvd.size() - 1:
        hvd.join()
        return
    assert call().numpy().tolist() == [before - 1] * 2
    hvd.join()


def test_uneven_batches_join(mode):
    w = variables()
    step = mode(step_of(w, hvd.DistributedGradientTape))
    for number in range(3 + 4 * hvd.rank()):
        x, y = batch(number, 4)
        step(tf.constant(x), tf.constant(y))
    last = int(hvd.join())
    assert last == hvd.size() - 1
    # The last rank has made all steps; the others may take its weights and go on.
    hvd.broadcast_variables(w, last)
    step(*map(tf.constant, batch(0, 4)))


def test_the_guard_compares_the_variables():
    w = variables()
    step = step_of(w, hvd.DistributedGradientTape)
    x, y = (tf.constant(part) for part in batch(0, 4))
    # Before the first step they may differ: scripts broadcast after the first batch.
    w[0].assign_add(tf.ones_like(w[0]) * float(hvd.rank()))
    step(x, y)
    if hvd.size() == 1:
        step(x, y)
        return
    with pytest.raises(ReplicaDivergenceError, match="'kernel:0'"):
        step(x, y)
    unguarded = step_of(w, lambda tape: hvd.DistributedGradientTape(tape, guard=False))
    for _ in range(3):
        unguarded(x, y)


def test_other_variables_on_other_ranks_are_named():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    w = tf.Variable(1.0, name=f"of_rank_{hvd.rank()}")
    with tf.GradientTape() as tape:
        loss = w * w
    tape = hvd.DistributedGradientTape(tape)
    with pytest.raises(MismatchError, match=r"'of_rank_0:0'.*'of_rank_1:0'"):
        tape.gradient(loss, [w])


def test_bad_options_are_named():
    with pytest.raises(OptionError, match="GradientTape"):
        hvd.DistributedGradientTape("tape")
    with pytest.raises(OptionError, match="op=Average only"):
        hvd.DistributedGradientTape(tf.GradientTape(), op=hvd.Sum, gradient_predivide_factor=2.0)
    with pytest.raises(OptionError, match="bf16"):
        hvd.DistributedGradientTape(tf.GradientTape(), compression="zip")
    with pytest.raises(OptionError, match="no layer"):
        hvd.PartialDistributedGradientTape(tf.GradientTape(), local_layers=[1])
