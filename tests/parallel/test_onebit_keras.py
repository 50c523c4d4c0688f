"""1-bit Adam and 1-bit LAMB of Keras on real ranks; true for any number of them."""

import keras
import numpy as np
import pytest
from keras_training import (
    BACKEND,
    apply,
    batch,
    equal_on_all_ranks,
    floatx,
    furthest,
    gradients,
    model,
    shard,
    train,
)

import hpc_dl.keras as hvd
from hpc_dl.errors import OptionError, UnsupportedError
from hpc_dl.keras.backend import to_numpy

# Keras' own variables on torch, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of the TensorFlow backend")

KINDS = {"adam": hvd.OneBitAdam, "lamb": hvd.OneBitLamb}


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


def own(kind="adam", **options):
    return KINDS[kind](0.01, **{"freeze_step": 4, **options})


def distributed(kind="adam", passes=1, **options):
    return hvd.DistributedOptimizer(
        own(kind, **options), backward_passes_per_step=passes, average_aggregated_gradients=True
    )


def alone(optimizer, steps, rows):
    return train(model(), optimizer, steps, lambda step: batch(step, rows))


def together(optimizer, steps, rows):
    return train(model(), optimizer, steps, lambda step: shard(step, rows))


@pytest.mark.usefixtures("_double")
def test_before_the_freeze_it_is_adam(rows):
    adam = alone(keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-9), 5, rows)
    options = {"freeze_step": 5, "weight_decay": 0.1, "epsilon": 1e-9}
    assert furthest(alone(own(**options), 5, rows), adam) <= 1e-8
    # Gradients travel as float32.
    assert furthest(together(distributed(**options), 5, rows), adam) <= 1e-4


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("kind", KINDS)
def test_n_ranks_train_like_one_with_the_whole_batch_after_the_freeze(kind, rows):
    optimizer = distributed(kind, compression="none")
    got = together(optimizer, 9, rows)
    assert furthest(alone(own(kind), 9, rows), got) <= 2e-4
    assert equal_on_all_ranks(got)


@pytest.mark.usefixtures("_double")
def test_backward_passes_count_as_one_step(rows):
    optimizer = distributed(passes=2, compression="none")

    def half(step):
        x, y = shard(step // 2, rows)
        return x[step % 2 :: 2], y[step % 2 :: 2]

    assert furthest(alone(own(), 8, rows), train(model(), optimizer, 16, half)) <= 2e-4
    assert int(to_numpy(optimizer.iterations)) == 8


def _fit(optimizer, steps, rows, data, **options):
    net = model()
    net.compile(optimizer, "mse", **options)
    x, y = (np.concatenate(p) for p in zip(*(data(s, rows) for s in range(steps)), strict=True))
    net.fit(x, y, batch_size=len(x) // steps, shuffle=False, verbose=0)
    return net.get_weights()


@pytest.mark.parametrize("kind", KINDS)
def test_fit_is_one_fit_on_the_whole_batches(kind, rows):
    # steps_per_execution: several steps, with the freeze among them, in one call of a graph.
    several = {"steps_per_execution": 4} if BACKEND == "tensorflow" else {}
    expected = _fit(own(kind), 8, rows, batch)
    got = _fit(distributed(kind, compression="none"), 8, rows, shard, **several)
    assert furthest(expected, got) <= 5e-4
    assert equal_on_all_ranks(got)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_stay_equal_to_the_bit(kind, rows):
    got = together(distributed(kind), 14, rows)
    assert equal_on_all_ranks(got)
    assert all(np.isfinite(w).all() for w in got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_saved_model_resumes_exactly(kind, stop, rows, tmp_path):
    straight = together(distributed(kind), 9, rows)

    first = model()
    first.compile(distributed(kind), "mse")
    train(first, first.optimizer, stop, lambda step: shard(step, rows))
    path = tmp_path / "model.keras"
    first.save(path)
    compression = first.optimizer.compression_state()

    second = hvd.load_model(path)
    assert type(second.optimizer) is KINDS[kind]
    second.optimizer.load_compression_state(compression)
    got = train(second, second.optimizer, 9 - stop, lambda step: shard(stop + step, rows))
    assert furthest(straight, got) == 0


def test_a_saved_model_alone_begins_no_new_warm_up(rows, tmp_path):
    straight = together(distributed(compression="none"), 10, rows)
    first = model()
    first.compile(distributed(compression="none"), "mse")
    train(first, first.optimizer, 6, lambda step: shard(step, rows))
    first.save(tmp_path / "model.keras")
    second = hvd.load_model(tmp_path / "model.keras")
    got = train(second, second.optimizer, 4, lambda step: shard(6 + step, rows))
    assert furthest(straight, got) <= 1e-5


@pytest.mark.usefixtures("_double")
def test_a_rank_that_goes_on_alone_makes_its_momentum_itself(rows):
    """What it gets then are gradients, also after the freeze."""
    net, other = model(), model()
    optimizer, plain = distributed(compression="none"), own()
    train(net, optimizer, 6, lambda step: batch(step, rows))
    train(other, plain, 6, lambda step: batch(step, rows))
    hvd.shutdown()
    hvd.init("serial")
    try:
        got = train(net, optimizer, 4, lambda step: batch(6 + step, rows))
        expected = train(other, plain, 4, lambda step: batch(6 + step, rows))
    finally:
        hvd.shutdown()
    assert furthest(expected, got) <= 2e-4


def test_local_variables_keep_a_momentum_of_their_own(rows):
    net, reference = model(), model()
    optimizer = distributed(compression="none")
    for variable in net.trainable_variables[2:]:
        optimizer.register_local_var(variable)
    plain = own()
    for step in range(8):
        x, y = shard(step, rows)
        reference.set_weights([*net.get_weights()[:2], *reference.get_weights()[2:]])
        grads = gradients(reference, x, y)
        scaled = [g / hvd.size() for g in grads]
        apply(plain, scaled, reference.trainable_variables)
        apply(optimizer, gradients(net, x, y), net.trainable_variables)
    assert furthest(net.get_weights()[2:], reference.get_weights()[2:]) <= 1e-4


@needs_tensorflow
def test_sparse_gradients_are_refused_unless_they_travel_as_dense_ones():
    import tensorflow as tf

    for dense in (False, True):
        table = keras.layers.Embedding(10, 4)
        table.build((None,))
        table.set_weights([np.arange(40.0).reshape(10, 4)])
        optimizer = hvd.DistributedOptimizer(
            own(freeze_step=2, compression="none"), sparse_as_dense=dense
        )

        def step(table=table, optimizer=optimizer):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(table(tf.constant([1, 2 + hvd.rank()]))))
            apply(
                optimizer,
                tape.gradient(loss, table.trainable_variables),
                table.trainable_variables,
            )

        if dense:
            for _ in range(4):
                step()
            assert equal_on_all_ranks(table.get_weights())
        else:
            with pytest.raises(UnsupportedError, match="sparse_as_dense=True"):
                step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression": "onebit"}, "brings its compression along"),
        ({"op": hvd.Sum}, "needs averages"),
        ({"gradient_predivide_factor": 2.0}, "needs averages"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        hvd.DistributedOptimizer(own(), **options)


def test_what_comes_between_the_steps_is_refused():
    with pytest.raises(OptionError, match="mixed_bfloat16"):
        hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(own()))
    with pytest.raises(OptionError, match="backward_passes_per_step"):
        hvd.DistributedOptimizer(own(gradient_accumulation_steps=2))
    with pytest.raises(OptionError, match="saved with the model"):
        own(compression=["onebit"])


@pytest.mark.parametrize(
    ("make", "compression"),
    [
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), "dgc"),
        (lambda: keras.optimizers.Adam(), "onebit"),
        (lambda: keras.optimizers.Nadam(), "dgc"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop()), "demo"),
        (lambda: keras.optimizers.SGD(0.1), "topk:error_feedback=off"),
    ],
)
def test_pairs_that_do_not_converge_are_refused_on_any_number_of_ranks(make, compression):
    with pytest.raises(OptionError, match="unchecked"):
        hvd.DistributedOptimizer(make(), compression=compression)
