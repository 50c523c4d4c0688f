"""Compressed gradients in Keras on real ranks, on both backends; true for any number of them."""

import keras
import numpy as np
import pytest
from keras_training import BACKEND, apply, equal_on_all_ranks, gradients, tensor
from same_training import assert_same_training
from stub_chooser import let_auto_choose

import hpc_dl.keras as hvd
from hpc_dl.compress import Auto, Limits, Unit, make, only, policy_of, unchecked
from hpc_dl.errors import MismatchError, OptionError
from hpc_dl.reduce import reshard
from hpc_dl.reduce.exchange import make_exchange
from hpc_dl.testing.same import assert_same_bytes

# Keras' own variables on torch, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of the TensorFlow backend")

SPECS = ("int8", "onebit", "topk:ratio=0.05", "dgc:ratio=0.05", "powersgd:rank=2", "sketch")
WIDTH, INNER = 160, 130


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


def model():
    """Make a model with two matrices of 81 KB each, and two small biases."""
    net = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            keras.layers.Dense(INNER, activation="tanh", name="hidden"),
            keras.layers.Dense(WIDTH, name="out"),
        ],
        name="net",
    )
    generator = np.random.default_rng(7)
    net.set_weights([generator.normal(size=w.shape) * 0.05 for w in net.get_weights()])
    return net


def batch(step, rank):
    x = np.random.default_rng([step, rank]).normal(size=(8, WIDTH))
    return x, 0.5 * x


def wrapped(compression, rate=1.0, **options):
    return hvd.DistributedOptimizer(keras.optimizers.SGD(rate), compression=compression, **options)


def take(net, optimizer, steps):
    for step in steps:
        given = gradients(net, *batch(step, hvd.rank()))
        apply(optimizer, given, net.trainable_variables)
    return net.get_weights()


def error(net):
    x, y = batch(99, 0)
    predicted = np.tanh(x @ net.get_weights()[0] + net.get_weights()[1]) @ net.get_weights()[2]
    return float(np.square(predicted + net.get_weights()[3] - y).mean())


@pytest.mark.parametrize("spec", SPECS)
def test_replicas_stay_equal_and_learn(spec):
    net = model()
    before = error(net)
    # Momentum of the compressor's own makes steps ten times as long.
    optimizer = wrapped(unchecked(spec), 0.1 if spec.startswith("dgc") else 1.0)
    assert equal_on_all_ranks(take(net, optimizer, range(20)))
    assert error(net) < before


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.05", "powersgd:rank=2", "int8"])
def test_bytes_on_the_wire_are_counted(spec):
    optimizer = wrapped(policy_of([only("*", spec, min_bytes=0, min_ndim=0)]))
    net = model()
    take(net, optimizer, range(4))
    done = optimizer.traffic()
    if hvd.size() == 1:
        assert done.bytes_sent == done.bytes_dense == 0
        return
    elements = sum(w.size for w in net.get_weights())
    assert done.steps == 4
    share = 2 * (hvd.size() - 1) / hvd.size()
    assert done.bytes_dense == pytest.approx(4 * share * 4 * elements, rel=1e-3)
    least = {"onebit": 25, "topk:ratio=0.05": 6, "powersgd:rank=2": 8, "int8": 3.5}[spec]
    assert done.bytes_dense / done.bytes_sent > least / max(1, hvd.size() / 2)


@pytest.mark.parametrize("spec", [*SPECS, "bf16:error_feedback=fp32", "qsgd", "terngrad"])
def test_what_travels_is_the_same_on_all_backends(spec):
    """It is what the engine makes of the arrays alone: the same bits, the same bytes."""
    if hvd.size() == 1:
        return
    shape, path = (WIDTH, INNER), "same/kernel"
    unit, name = Unit.single(path, shape), "kernel"
    variable = keras.Variable(np.zeros(shape, np.float32), name=name)
    variable._path = path
    exchange = make_exchange(hvd.global_process_set.group().comm, unit, make(spec))
    optimizer = wrapped(unchecked(spec), guard=False)
    expected, sent = np.zeros(unit.size, np.float32), 0
    for step in range(3):
        flat = np.random.default_rng([step, hvd.rank()]).normal(size=unit.size)
        flat = flat.astype(np.float32)
        apply(optimizer, [tensor(flat.reshape(shape))], [variable])
        sent += exchange.run(flat, step)
        expected -= flat
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable.value).reshape(-1), expected)
    assert optimizer.traffic().bytes_sent == sent
    (saved,) = optimizer.compression_state().values()
    for key, array in exchange.arrays().items():
        np.testing.assert_array_equal(saved[key], array)


def test_rules_are_for_paths_of_variables():
    net = model()
    paths = [v.path for v in net.trainable_variables]
    assert paths[0] == "net/hidden/kernel"
    rules = [("*/hidden/*", "topk:ratio=0.01"), only("net/out/*", "none"), ("*", "onebit")]
    optimizer = wrapped(rules)
    before = net.get_weights()
    given = [np.asarray(keras.ops.convert_to_numpy(g)) for g in gradients(net, *batch(0, 0))]
    apply(optimizer, [tensor(g) for g in given], net.trainable_variables)
    changed = [b - a for b, a in zip(before, net.get_weights(), strict=True)]
    # All ranks had the same gradients, so the average is known.
    for i in (1, 2, 3):
        np.testing.assert_allclose(changed[i], given[i], rtol=1e-3, atol=1e-6)
    if hvd.size() > 1:
        assert np.count_nonzero(changed[0]) == round(0.01 * given[0].size)
        assert list(optimizer.compression_state()) == paths[:1]


@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.05", "powersgd:rank=2", "dgc:ratio=0.1"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(spec):
    through, halves, later = model(), model(), model()
    expected = take(through, wrapped(unchecked(spec), 0.1), range(6))
    first = wrapped(unchecked(spec), 0.1)
    take(halves, first, range(3))
    later.set_weights(halves.get_weights())
    second = wrapped(unchecked(spec), 0.1)
    second.load_compression_state(first.compression_state())
    assert_same_training(take(later, second, range(3, 6)), expected)


def test_what_is_owed_survives_a_change_of_the_number_of_ranks():
    optimizer = wrapped("onebit")
    net = model()
    take(net, optimizer, range(3))
    states = hvd.allgather_object(optimizer.compression_state())
    merged = reshard(states)
    if hvd.size() == 1:
        assert merged == {}
        return
    resumed = wrapped("onebit", 0.0)
    resumed.load_compression_state(merged)
    assert resumed.compression_state() == merged  # as long as there was no step
    take(net, resumed, [3])
    assert set(resumed.compression_state()) == {"net/hidden/kernel", "net/out/kernel"}
    for name, state in resumed.compression_state().items():
        assert int(state["step"]) == 4
        owed = np.mean([other[name]["residual"] for other in states], 0)
        np.testing.assert_allclose(merged[name]["residual"], owed, rtol=1e-6)


def test_backward_passes_are_compressed_once():
    once, twice = model(), model()
    expected = take(once, wrapped("onebit"), range(1))
    optimizer = wrapped("onebit", backward_passes_per_step=2, average_aggregated_gradients=True)
    got = take(twice, optimizer, [0, 0])
    assert optimizer.traffic().steps == (1 if hvd.size() > 1 else 0)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eagerly", [False, True])
def test_fit(eagerly):
    """In a graph and without one: replicas stay equal, and bytes are counted in each step."""
    net = model()
    before = error(net)
    optimizer = wrapped("powersgd:rank=2", 0.5)
    net.compile(optimizer, "mse", run_eagerly=eagerly)
    x, y = (np.concatenate(p) for p in zip(*(batch(s, hvd.rank()) for s in range(10)), strict=True))
    net.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert equal_on_all_ranks(net.get_weights())
    assert error(net) < before
    done = optimizer.traffic()
    if hvd.size() > 1:
        assert done.steps == 10
        assert done.bytes_dense > 8 * done.bytes_sent


def test_warm_up_is_the_dense_control_to_the_bit():
    dense = take(model(), wrapped("none"), range(3))
    assert_same_training(take(model(), wrapped("topk:ratio=0.01,warmup=3"), range(3)), dense)


def test_a_cast_by_name_is_horovods_cast():
    by_class = take(model(), wrapped(hvd.Compression.fp16), range(3))
    assert_same_training(take(model(), wrapped("fp16"), range(3)), by_class)


def test_ranks_with_different_compression_are_told():
    if hvd.size() == 1:
        return
    optimizer = wrapped("onebit" if hvd.rank() else "topk:ratio=0.01")
    with pytest.raises(MismatchError, match=r"topk|onebit"):
        take(model(), optimizer, [0])


@pytest.mark.parametrize("op", [hvd.Max, hvd.Product])
def test_only_means_and_sums_are_compressed(op):
    with pytest.raises(OptionError, match="Average or Sum"):
        wrapped("onebit", op=op)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(OptionError, match="unknown compression 'tpok'; valid: auto, bf16"):
        wrapped("tpok")


@pytest.mark.parametrize("chosen", ["onebit", "none"])
def test_auto_goes_on_with_what_it_chose(chosen, monkeypatch):
    let_auto_choose(monkeypatch, lambda: [policy_of(chosen)], every=4)
    optimizer = wrapped(Auto(candidates=("none", "fp16", "onebit"), steps=3))
    net = model()
    assert equal_on_all_ranks(take(net, optimizer, range(4)))
    before = optimizer.traffic()
    # Buckets are a little longer than what lies in them.
    assert before.bytes_sent == pytest.approx(before.bytes_dense, rel=1e-3)
    assert equal_on_all_ranks(take(net, optimizer, range(4, 8)))
    if hvd.size() == 1:
        return
    after = optimizer.traffic()
    assert after.steps == 8
    sent, dense = after.bytes_sent - before.bytes_sent, after.bytes_dense - before.bytes_dense
    assert dense == before.bytes_dense
    if chosen == "none":
        assert sent == pytest.approx(dense, rel=1e-3)
        return
    assert dense > 20 * sent
    resumed = wrapped(Auto(candidates=("none", "fp16", "onebit"), steps=3))
    later = model()
    later.set_weights(net.get_weights())
    resumed.load_compression_state(optimizer.compression_state())
    assert_same_training(take(later, resumed, range(8, 11)), take(net, optimizer, range(8, 11)))
    assert 20 * resumed.traffic().bytes_sent < resumed.traffic().bytes_dense


def test_compression_is_suspended_when_the_loss_jumps(caplog):
    policy = policy_of("onebit")._replace(limits=Limits(every=1, max_loss=2.0, pause=2))
    optimizer = wrapped(policy, 0.0)
    optimizer.report_loss(1.0)  # before the first step: nothing to suspend yet
    net, sent = model(), []
    with caplog.at_level("WARNING", "hpc_dl.compress"):
        for step in range(6):
            before = optimizer.traffic().bytes_sent
            take(net, optimizer, [step])
            sent.append(optimizer.traffic().bytes_sent - before)
            optimizer.report_loss(9.0 if step == 2 else 1.0)
    if hvd.size() == 1:
        return
    # The loss after the third step is seen in the fourth; two steps without compression.
    assert sent[0] == sent[3] < sent[4] / 8
    assert sent[4] == sent[5]
    assert ("the loss is 9" in caplog.text) == (hvd.rank() == 0)


# --- tapes --------------------------------------------------------------------------


def _tape(compression):
    import tensorflow as tf

    import hpc_dl.tensorflow as on_tensorflow

    return on_tensorflow.DistributedGradientTape(tf.GradientTape(), compression=compression)


def _taped(net, step, compression):
    import tensorflow as tf

    import hpc_dl.tensorflow as on_tensorflow

    x, y = (tensor(part) for part in batch(step, hvd.rank()))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(net(x) - y))
    tape = on_tensorflow.DistributedGradientTape(tape, compression=compression)
    return tape.gradient(loss, net.trainable_variables)


@needs_tensorflow
@pytest.mark.parametrize("spec", ["onebit", "topk:ratio=0.05", "powersgd:rank=2"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_tapes_are_as_good_as_optimizers(spec, in_graph):
    """What was left of a step is kept, though scripts make a new tape for each."""
    import tensorflow as tf

    net, control = model(), model()
    plain = keras.optimizers.SGD(0.5)
    plain.build(net.trainable_variables)

    def step_of(step):
        found = _taped(net, step, policy)
        plain.apply_gradients(zip(found, net.trainable_variables, strict=True))

    # A seed of its own: tapes with equal options share what they keep.
    policy = policy_of(spec)._replace(seed=1 + in_graph)
    graphs = {step: tf.function(lambda step=step: step_of(step)) for step in range(4)}
    for step in range(4):
        graphs[step]() if in_graph else step_of(step)
    expected = take(control, wrapped(policy, 0.5), range(4))
    assert equal_on_all_ranks(net.get_weights())
    for a, b in zip(net.get_weights(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


@needs_tensorflow
def test_tapes_take_auto():
    net = model()
    auto = Auto(candidates=["none", "onebit"], steps=2)
    for step in range(6):
        found = _taped(net, step, auto)
        for v, g in zip(net.trainable_variables, found, strict=True):
            v.assign_sub(0.5 * g)
    assert equal_on_all_ranks(net.get_weights())


@needs_tensorflow
def test_tapes_of_a_run_that_is_resumed_go_on_with_what_was_owed():
    """Also where the sets of variables change."""
    net = model()
    first, second = (policy_of("onebit")._replace(seed=seed) for seed in (11, 12))
    for step in range(3):
        _taped(net, step, first)
    state = _tape(first).compression_state()
    tape = _tape(second)
    tape.load_compression_state(state)
    expected = _taped(net, 3, first)
    assert_same_training([g.numpy() for g in _taped(net, 3, second)], [g.numpy() for g in expected])
    if hvd.size() == 1:
        assert state == {}
        return
    assert set(state) == {"net/hidden/kernel", "net/out/kernel"}
    after, other = (_tape(policy).compression_state() for policy in (first, second))
    for name, saved in after.items():
        assert_same_bytes(saved["residual"], other[name]["residual"])
    assert _tape(first).traffic().steps == 4


@needs_tensorflow
@pytest.mark.parametrize("spec", ["none", "fp16"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_after_auto_has_chosen_a_cast_horovods_operations_reduce(spec, in_graph, monkeypatch):
    import tensorflow as tf

    from hpc_dl.tensorflow import native

    calls = []
    allreduce = native.allreduce
    monkeypatch.setattr(native, "allreduce", lambda *given: calls.append(1) or allreduce(*given))
    let_auto_choose(monkeypatch, lambda: [policy_of(spec)], every=2)
    net, control = model(), model()
    auto = policy_of(Auto(candidates=("none", "fp16", "onebit")))._replace(seed=21 + in_graph)
    auto = auto._replace(seed=auto.seed + 10 * (spec == "fp16"))
    optimizer, plain = wrapped(auto, 0.5), wrapped(spec, 0.5)
    x = [tensor(np.stack([batch(s, hvd.rank())[i] for s in range(5)])) for i in range(2)]
    sent = []

    def step_of(number):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(net(x[0][number]) - x[1][number]))
        optimizer.apply(tape.gradient(loss, net.trainable_variables), net.trainable_variables)

    optimizer.build(net.trainable_variables)
    run = tf.function(step_of) if in_graph else step_of
    for number in range(5):
        run(tf.constant(number))
        sent.append(optimizer.traffic().bytes_sent)
    got, expected = net.get_weights(), take(control, plain, range(5))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
    assert equal_on_all_ranks(got)
    if hvd.size() == 1:
        return
    assert optimizer.traffic().steps == 5
    steps = np.diff(sent)
    assert steps[0] == pytest.approx((2 if spec == "fp16" else 1) * steps[-1], rel=1e-2)
    if hvd.global_process_set.group().comm.name == "horovod":
        assert calls


def test_a_loss_that_is_reported_before_the_first_step_counts(caplog):
    policy = policy_of("onebit")._replace(limits=Limits(every=1, max_loss=2.0, pause=2))
    optimizer = wrapped(policy, 0.0)
    optimizer.report_loss(1.0)
    net = model()
    with caplog.at_level("WARNING", "hpc_dl.compress"):
        take(net, optimizer, [0])
        optimizer.report_loss(9.0)
        take(net, optimizer, [1])
    said = hvd.size() > 1 and hvd.rank() == 0
    assert ("the loss is 9, and was 1" in caplog.text) == said


def losses_of(net, batches):
    return [float(np.square(keras.ops.convert_to_numpy(net(x)) - y).mean()) for x, y in batches]


@needs_tensorflow
@pytest.mark.parametrize("several", [4, 2, 3])
def test_the_callback_of_metrics_tells_the_mean_of_steps_that_are_executed_together(several):
    """The last ones of an epoch may be fewer."""
    net, told = model(), []
    optimizer = wrapped("onebit", 0.0)
    optimizer.report_loss = told.append
    net.compile(optimizer, "mse", steps_per_execution=several)
    batches = [batch(step, hvd.rank()) for step in range(4)]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    callbacks = [hvd.callbacks.MetricAverageCallback()]
    net.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    losses = losses_of(net, batches)
    means = [np.mean(losses[begin : begin + several]) for begin in range(0, 4, several)]
    np.testing.assert_allclose(told, means * 2, rtol=1e-3)


def test_the_callback_of_metrics_tells_of_a_loss_that_is_not_finite_once():
    """The mean of the epoch stays so, and says nothing of the batches after it."""
    net, told = model(), []
    optimizer = wrapped("onebit", 0.0)
    optimizer.report_loss = told.append
    net.compile(optimizer, "mse")
    callback = hvd.callbacks.MetricAverageCallback()
    callback.set_model(net)
    for epoch, means in enumerate([[1.0, np.nan, np.nan], [3.0, np.inf, np.inf], [4.0, 5.0]]):
        callback.on_epoch_begin(epoch)
        for number, mean in enumerate(means):
            callback.on_train_batch_end(number, {"loss": mean})
    np.testing.assert_array_equal(told, [1.0, np.nan, 3.0, np.inf, 4.0, 6.0])


def test_the_callback_of_metrics_tells_the_guard_the_loss_of_each_batch():
    net, told = model(), []
    optimizer = wrapped("onebit", 0.0)
    optimizer.report_loss = told.append
    net.compile(optimizer, "mse")
    batches = [batch(step, hvd.rank()) for step in range(3)]
    x, y = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    callbacks = [hvd.callbacks.MetricAverageCallback()]
    net.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    np.testing.assert_allclose(told, losses_of(net, batches) * 2, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Gradients do not exist for variables")
@pytest.mark.parametrize("spec", ["onebit", "powersgd:rank=2"])
def test_what_a_variable_owes_is_sent_once_while_others_come_and_go(spec):
    """What was applied and what is owed add up to the gradients."""
    net = model()
    optimizer = wrapped(spec, 1.0)
    variables, before = net.trainable_variables, net.get_weights()
    steps = [(0, 1, 2, 3), (0, 1), (0, 1, 2, 3), (2,), (0, 2), (0, 1, 2, 3)]

    def given(step, rank, number):
        shape = before[number].shape
        drawn = np.random.default_rng([step, rank, number]).normal(size=shape)
        return drawn.astype(np.float32)

    for step, there in enumerate(steps):
        mine = [tensor(given(step, hvd.rank(), i)) if i in there else None for i in range(4)]
        apply(optimizer, mine, variables)
    ranks, states = range(hvd.size()), hvd.allgather_object(optimizer.compression_state())
    for i, (old, new) in enumerate(zip(before, net.get_weights(), strict=True)):
        taken = [step for step, there in enumerate(steps) if i in there]
        mean = sum(given(step, rank, i) for step in taken for rank in ranks) / hvd.size()
        found = [state.get(variables[i].path, {}) for state in states]
        owed = sum(
            state.get("residual", 0) / hvd.size() + state.get("server", 0) for state in found
        )
        total = (old - new).reshape(-1) + owed
        np.testing.assert_allclose(total, mean.reshape(-1), rtol=1e-3, atol=1e-3)
