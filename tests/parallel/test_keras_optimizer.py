"""The distributed optimizer of Keras on real ranks; true for any number of them."""

import gc

import keras
import numpy as np
import pytest
from keras_training import (
    BACKEND,
    OPTIMIZERS,
    apply,
    batch,
    equal_on_all_ranks,
    floatx,
    furthest,
    gradients,
    model,
    shard,
    train,
    train_alone,
    train_sharded,
)
from stub_chooser import let_auto_choose

import hpc_dl.keras as hvd
from hpc_dl.compress import Auto, only, policy_of
from hpc_dl.errors import MismatchError, OptionError, ReplicaDivergenceError, UnsupportedError
from hpc_dl.keras.backend import to_numpy

# Keras' own variables on torch, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of the TensorFlow backend")


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


@pytest.fixture
def rows() -> int:
    return 6 * hvd.size()


@pytest.fixture
def _double():
    with floatx("float64"):
        yield


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_n_ranks_train_like_one_with_n_times_the_batch(name, rows):
    alone = train_alone(OPTIMIZERS[name], 4, rows)
    together = train_sharded(OPTIMIZERS[name], 4, rows)
    assert furthest(alone, together) <= 1e-10
    assert equal_on_all_ranks(together)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_same_in_float32_up_to_rounding(name, rows):
    alone = train_alone(OPTIMIZERS[name], 4, rows)
    together = train_sharded(OPTIMIZERS[name], 4, rows)
    assert furthest(alone, together) <= 2e-4
    assert equal_on_all_ranks(together)


def _fit(optimizer, steps, rows, data, **options):
    net = model()
    net.compile(optimizer, "mse", **options)
    x, y = (
        np.concatenate(part) for part in zip(*(data(s, rows) for s in range(steps)), strict=True)
    )
    net.fit(x, y, batch_size=len(x) // steps, shuffle=False, verbose=0)
    return net.get_weights()


@pytest.mark.parametrize("eagerly", [False, True])
def test_fit_is_one_fit_on_the_whole_batches(eagerly, rows):
    alone = _fit(OPTIMIZERS["adam"](), 3, rows, batch, run_eagerly=eagerly)
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["adam"]())
    together = _fit(optimizer, 3, rows, shard, run_eagerly=eagerly)
    assert furthest(alone, together) <= 2e-4
    assert equal_on_all_ranks(together)


@needs_tensorflow
@pytest.mark.usefixtures("_double")
def test_fit_in_a_graph_is_exact_and_several_steps_run_in_one_call(rows):
    alone = _fit(OPTIMIZERS["sgd"](), 4, rows, batch)
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["sgd"](), backward_passes_per_step=1)
    together = _fit(optimizer, 4, rows, shard, steps_per_execution=2)
    assert furthest(alone, together) <= 1e-10
    assert equal_on_all_ranks(together)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("average", [False, True])
def test_backward_passes_are_added_up_before_they_travel(average, rows):
    def whole(step):
        parts = [batch(2 * step + i, rows) for i in range(2)]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def alone():
        # Two passes of b rows, not averaged, are twice the gradient of 2 b rows.
        return keras.optimizers.SGD(0.1 if average else 0.2, momentum=0.9)

    expected = train(model(), alone(), 2, whole)
    optimizer = hvd.DistributedOptimizer(
        OPTIMIZERS["sgd"](), backward_passes_per_step=2, average_aggregated_gradients=average
    )
    net = model()
    got = train(net, optimizer, 4, lambda step: shard(step, rows))
    assert furthest(expected, got) <= 1e-10
    # The optimizer counts its own steps, as with the whole batch.
    assert int(to_numpy(optimizer.iterations)) == 2


@needs_tensorflow
def test_backward_passes_in_a_graph(rows):
    optimizer = hvd.DistributedOptimizer(
        OPTIMIZERS["adam"](), backward_passes_per_step=2, average_aggregated_gradients=True
    )
    together = _fit(optimizer, 4, rows, shard)
    eager = hvd.DistributedOptimizer(
        OPTIMIZERS["adam"](), backward_passes_per_step=2, average_aggregated_gradients=True
    )
    assert furthest(together, _fit(eager, 4, rows, shard, run_eagerly=True)) <= 1e-5
    assert equal_on_all_ranks(together)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("groups", [1, 3, "lists"])
def test_groups_do_not_change_the_result(groups, rows):
    alone = train_alone(OPTIMIZERS["sgd"], 2, rows)
    net = model()
    wanted = [net.trainable_variables[1:3]] if groups == "lists" else groups
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["sgd"](), groups=wanted)
    together = train(net, optimizer, 2, lambda step: shard(step, rows))
    assert furthest(alone, together) <= 1e-10
    if hvd.size() > 1 and hvd.global_process_set.group().comm.name == "mpi":
        (buckets,) = optimizer.distribution._combination._reduction.reducers._known.values()
        layout = buckets.reducer.layout
        assert len(layout.buckets) == {1: 1, 3: 3, "lists": 2}[groups]
        if groups == "lists":
            together = {v.path for v in wanted[0]}
            assert together in [{p.name for p in bucket.parameters} for bucket in layout.buckets]


def test_backward_passes_are_of_the_same_variables():
    a, b = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), backward_passes_per_step=2)
    optimizer.build([a, b])
    one = keras.ops.ones([1])
    optimizer.apply([one, one], [a, b])
    with pytest.raises(OptionError, match=r"2 variables .* and now with 1 variables"):
        optimizer.apply([one], [b])
    with pytest.raises(OptionError, match="same order"):
        optimizer.apply([one, one], [b, a])


def test_some_layers_can_be_each_ranks_own(rows):
    net = model(seed=0)
    own = net.layers[-1]
    optimizer = hvd.PartialDistributedOptimizer(
        keras.optimizers.SGD(0.1), local_layers=own, scale_local_gradients=False, guard=False
    )
    # Each rank sees other data, so what is its own comes apart, and the rest does not.
    train(net, optimizer, 1, lambda step: batch(hvd.rank(), rows))
    own_names = {v.path for v in own.trainable_variables}
    values = {v.path: to_numpy(v) for v in net.trainable_variables}
    assert equal_on_all_ranks([x for path, x in values.items() if path not in own_names])
    if hvd.size() > 1:
        assert not equal_on_all_ranks([values[path] for path in own_names])
    with pytest.raises(OptionError, match="has no variables yet"):
        hvd.PartialDistributedOptimizer(
            keras.optimizers.SGD(0.1), local_layers=[keras.layers.Dense(2)]
        )


def test_an_optimizer_that_is_gone_leaves_no_buckets(rows):
    group = hvd.global_process_set.group()
    gc.collect()
    before = len(group._reducers)
    shared = len(getattr(group.comm, "_segments", ()))
    for _ in range(3):
        train(
            model(),
            hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)),
            1,
            lambda s: shard(s, rows),
        )
        gc.collect()
    assert len(group._reducers) == before
    assert len(getattr(group.comm, "_segments", ())) == shared


@pytest.mark.parametrize(("compression", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_compression_rounds_and_replicas_stay_equal(compression, tolerance, rows):
    alone = train_alone(OPTIMIZERS["sgd"], 3, rows)
    together = train_sharded(OPTIMIZERS["sgd"], 3, rows, compression=compression)
    assert furthest(alone, together) <= tolerance
    assert equal_on_all_ranks(together)
    if hvd.size() > 1:
        assert furthest(alone, together) > 0


@pytest.mark.usefixtures("_double")
def test_predivision_does_not_change_the_result(rows):
    alone = train_alone(OPTIMIZERS["sgd"], 2, rows)
    together = train_sharded(OPTIMIZERS["sgd"], 2, rows, gradient_predivide_factor=hvd.size() * 1.5)
    assert furthest(alone, together) <= 1e-10


@pytest.mark.usefixtures("_double")
def test_sum_is_size_times_the_average(rows):
    def larger():
        return keras.optimizers.SGD(0.01 * hvd.size())

    alone = train_alone(larger, 2, rows)
    together = train_sharded(lambda: keras.optimizers.SGD(0.01), 2, rows, op=hvd.Sum)
    assert furthest(alone, together) <= 1e-10


@needs_tensorflow
@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_rows_of_embeddings(sparse_as_dense):
    import tensorflow as tf

    table = keras.Variable(np.ones((6, 2)), dtype="float32", name="table")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), sparse_as_dense=sparse_as_dense)
    row = hvd.rank() % 5
    values = tf.ones((2, 2)) * float(hvd.rank() + 1)
    slices = tf.IndexedSlices(values, tf.constant([row, row + 1]), tf.constant([6, 2]))
    optimizer.apply([slices], [table])
    expected = np.ones((6, 2))
    for rank in range(hvd.size()):
        expected[rank % 5 : rank % 5 + 2] -= (rank + 1) / hvd.size()
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-6, atol=1e-6)


@needs_tensorflow
@pytest.mark.parametrize(
    ("compression", "row_bytes"),
    [("none", 4 + 96), ("fp16", 4 + 48), (only("*", "int8", min_bytes=0), 4 + 4 + 24)],
    ids=["none", "fp16", "int8"],
)
def test_rows_travel_as_compression_says(compression, row_bytes):
    """A rank's rows of one number are added up before, so they travel once."""
    import tensorflow as tf

    table = keras.Variable(np.zeros((50, 24)), dtype="float32", name="table")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compression)
    row = hvd.rank() % 49
    values = tf.ones((3, 24)) * float(hvd.rank() + 1)
    slices = tf.IndexedSlices(values, tf.constant([row, row + 1, row]), tf.constant([50, 24]))
    optimizer.apply([slices], [table])
    expected = np.zeros((50, 24))
    for rank in range(hvd.size()):
        expected[rank % 49] -= 2 * (rank + 1) / hvd.size()
        expected[rank % 49 + 1] -= (rank + 1) / hvd.size()
    np.testing.assert_allclose(table.numpy(), expected, rtol=1e-3)
    done = optimizer.traffic()
    assert done.bytes_sent == (hvd.size() - 1) * 2 * row_bytes
    assert done.bytes_dense == (hvd.size() - 1) * 2 * (8 + 96)


@needs_tensorflow
@pytest.mark.parametrize("in_graph", [False, True])
def test_rows_travel_as_auto_has_chosen(in_graph, monkeypatch):
    import tensorflow as tf

    let_auto_choose(monkeypatch, lambda: [policy_of("fp16")], every=2)
    table = keras.Variable(np.zeros((50, 240)), dtype="float32", name="table")
    bias = keras.Variable(np.zeros(24), dtype="float32", name="bias")
    auto = Auto(candidates=("none", "fp16"))
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), compression=auto)
    optimizer.build([table, bias])

    def step():
        values = tf.ones((2, 240))
        slices = tf.IndexedSlices(values, tf.constant([3, 7]), tf.constant([50, 240]))
        optimizer.apply([slices, tf.ones(24)], [table, bias])

    run, sent = tf.function(step) if in_graph else step, [0]
    for _ in range(4):
        run()
        sent.append(optimizer.traffic().bytes_sent)
    plain, half = (2 * (hvd.size() - 1) * (4 + n * 240) for n in (4, 2))
    steps, bias = np.diff(sent), 256 * hvd.size()  # and the padding of its bucket, at most
    assert plain <= steps[0] <= plain + bias
    assert half <= steps[-1] <= half + bias


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_variable_without_a_gradient_is_left_alone(rows):
    net = model()
    before = net.get_weights()
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS["sgd"]())
    grads = gradients(net, *shard(0, rows))
    apply(optimizer, [None, *grads[1:]], net.trainable_variables)
    after = net.get_weights()
    assert np.array_equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])
    assert equal_on_all_ranks(after)


def test_local_variables_keep_their_own_gradient():
    shared, own = (keras.Variable(np.zeros(3), dtype="float32", name=n) for n in "ab")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    optimizer.register_local_var(own)
    gradient = keras.ops.ones(3) * float(hvd.rank() + 1)
    apply(optimizer, [gradient, gradient], [shared, own])
    mean = (hvd.size() + 1) / 2
    np.testing.assert_allclose(to_numpy(shared), -mean, rtol=1e-6)
    local = (hvd.rank() + 1) / hvd.size()
    np.testing.assert_allclose(to_numpy(own), -local, rtol=1e-6)


def test_a_process_set_trains_among_itself():
    if hvd.size() == 1:
        pytest.skip("one rank has no smaller set of ranks")
    half = hvd.add_process_set(range(hvd.size() - 1))
    try:
        variable = keras.Variable(np.zeros(2), dtype="float32", name="v")
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), process_set=half)
        apply(optimizer, [keras.ops.ones(2) * float(hvd.rank())], [variable])
        expected = (hvd.size() - 2) / 2 if half.included() else hvd.rank()
        np.testing.assert_allclose(to_numpy(variable), -expected, rtol=1e-6)
    finally:
        hvd.remove_process_set(half)


def test_ranks_with_other_variables_learn_which():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    variable = keras.Variable(np.zeros(2), dtype="float32", name=f"of_rank_{hvd.rank()}")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    with pytest.raises(MismatchError, match=r"'of_rank_0'.*'of_rank_1'"):
        apply(optimizer, [keras.ops.ones(2)], [variable])


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_gradient_that_one_rank_lacks_is_named():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    pair = [keras.Variable(np.zeros(2), dtype="float32", name=n) for n in ("one", "two")]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    second = keras.ops.ones(2) if hvd.rank() == 0 else None
    with pytest.raises(MismatchError, match=r"'two'.* only on rank 0"):
        apply(optimizer, [keras.ops.ones(2), second], pair)


def test_overflow_on_one_rank_skips_the_step_on_all(rows):
    net = model()
    scaler = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=8.0)
    optimizer = hvd.DistributedOptimizer(scaler)
    before = net.get_weights()
    grads = [g * 8.0 for g in gradients(net, *shard(0, rows))]
    overflown = [g * np.inf for g in grads] if hvd.rank() == hvd.size() - 1 else grads
    apply(optimizer, overflown, net.trainable_variables)
    assert furthest(before, net.get_weights()) == 0
    assert float(to_numpy(optimizer.dynamic_scale)) == 4.0
    apply(optimizer, [g / 2.0 for g in grads], net.trainable_variables)
    alone = train_alone(lambda: keras.optimizers.SGD(0.1), 1, rows)
    assert furthest(alone, net.get_weights()) <= 2e-4


def test_loss_scaling_around_a_distributed_optimizer_is_refused(rows):
    net = model()
    inner = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    outer = keras.optimizers.LossScaleOptimizer(inner)
    with pytest.raises(UnsupportedError, match="Wrap the other way round"):
        apply(outer, gradients(net, *shard(0, rows)), net.trainable_variables)


def test_the_guard_finds_replicas_that_differ(rows):
    net = model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
    train(net, optimizer, 2, lambda step: shard(step, rows))
    kernel = net.trainable_variables[2]
    kernel.assign(kernel + 0.25 * hvd.rank())
    if hvd.size() == 1:
        train(net, optimizer, 1, lambda step: shard(step, rows))
        return
    with pytest.raises(ReplicaDivergenceError, match=kernel.path):
        train(net, optimizer, 1, lambda step: shard(step, rows))


def test_the_guard_can_be_switched_off(rows):
    net = model(seed=hvd.rank())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), guard=False)
    train(net, optimizer, 4, lambda step: shard(step, rows))
    assert equal_on_all_ranks(net.get_weights()) == (hvd.size() == 1)


@needs_tensorflow
def test_the_guard_speaks_from_inside_a_graph(rows):
    net = model(seed=hvd.rank())
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    x, y = shard(0, 4 * rows)
    if hvd.size() == 1:
        net.fit(x, y, batch_size=6, verbose=0)
        return
    with pytest.raises(Exception, match=r"ReplicaDivergenceError.*after step 1 the"):
        net.fit(x, y, batch_size=6, verbose=0)


@needs_tensorflow
def test_xla_is_refused_with_the_remedy(rows):
    net = model()
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=True)
    x, y = shard(0, rows)
    if hvd.size() == 1:
        net.fit(x, y, verbose=0)
        return
    with pytest.raises(UnsupportedError, match="jit_compile=False"):
        net.fit(x, y, verbose=0)


def test_bad_options_are_named():
    sgd = keras.optimizers.SGD
    with pytest.raises(OptionError, match="Keras 3 optimizer"):
        hvd.DistributedOptimizer("sgd")
    with pytest.raises(OptionError, match="distributed already"):
        hvd.DistributedOptimizer(hvd.DistributedOptimizer(sgd(0.1)))
    with pytest.raises(OptionError, match="inside this one"):
        hvd.DistributedOptimizer(
            keras.optimizers.LossScaleOptimizer(hvd.DistributedOptimizer(sgd(0.1)))
        )
    for options in (
        {"backward_passes_per_step": 0},
        {"op": "mean"},
        {"op": hvd.Adasum},
        {"gradient_predivide_factor": 2.0, "op": hvd.Sum},
        {"gradient_predivide_factor": 0.0},
        {"groups": "all"},
        {"compression": "zip"},
    ):
        with pytest.raises(OptionError):
            hvd.DistributedOptimizer(sgd(0.1), **options)
