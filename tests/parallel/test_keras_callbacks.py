"""Keras callbacks, saved models and SyncBatchNormalization on real ranks; for any number."""

import keras
import numpy as np
import pytest
from keras_training import BACKEND, OPTIMIZERS, batch, equal_on_all_ranks, furthest, model, shard

import hpc_dl.keras as hvd
from hpc_dl.errors import MismatchError, OptionError, ReplicaDivergenceError, UnsupportedError
from hpc_dl.keras.backend import to_numpy
from hpc_dl.keras.optimizer import is_distributed

# Keras' own variables on torch, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def _world():
    hvd.init()


@pytest.fixture
def rows() -> int:
    return 6 * hvd.size()


class Recorder(keras.callbacks.Callback):
    """Notes the learning rate of each batch, and the metrics of each epoch."""

    def __init__(self):
        super().__init__()
        self.rates, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.rates.append(float(to_numpy(self.model.optimizer.learning_rate)))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))


def test_a_whole_run_with_all_callbacks(rows, tmp_path):
    root, steps, epochs = hvd.size() - 1, 3, 3
    net = model(seed=hvd.rank())
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.3, momentum=0.9)), "mse")
    recorder = Recorder()
    best = tmp_path / "best.keras"
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(root),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(0.3, warmup_epochs=2, verbose=1),
        hvd.callbacks.LearningRateScheduleCallback(0.3, 0.1, start_epoch=2),
        hvd.callbacks.BestModelCheckpoint(monitor="val_loss", filepath=str(best)),
        recorder,
    ]
    x, y = shard(0, steps * rows)
    held_out = batch(100 + hvd.rank(), 8)
    net.fit(
        x,
        y,
        batch_size=6,
        epochs=epochs,
        verbose=0,
        callbacks=callbacks,
        validation_data=held_out,
        shuffle=False,
    )
    assert equal_on_all_ranks(net.get_weights())

    n = hvd.size()
    warm = [0.3 / n * (1 + (i + 1) / steps * (n - 1) / 2) for i in range(2 * steps)]
    np.testing.assert_allclose(recorder.rates, warm + [0.3] * steps, rtol=1e-5)
    assert recorder.epochs[-1]["lr"] == pytest.approx(0.3)

    # Metrics are averages: the same everywhere, and of what each rank would have said.
    for theirs in hvd.allgather_object(recorder.epochs):
        assert theirs == recorder.epochs
    own = net.evaluate(*held_out, verbose=0)
    averaged = float(np.mean(hvd.allgather_object(own)))
    assert recorder.epochs[-1]["val_loss"] == pytest.approx(averaged, rel=1e-4)

    assert hvd.allgather_object(best.exists()) == [rank == 0 for rank in range(n)]


def test_the_model_that_is_best_on_average_is_kept(tmp_path):
    """By its own metric each rank would keep another one."""
    n, path = hvd.size(), tmp_path / "best.keras"
    net = model()
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    callback = hvd.callbacks.BestModelCheckpoint(monitor="val_loss", filepath=str(path))
    callback.set_model(net)
    averages, kept = [3.0, 1.0, 2.0], []
    for epoch, average in enumerate(averages):
        net.set_weights([w + 1 for w in net.get_weights()])
        kept.append(net.get_weights())
        # Far apart between ranks, with their mean as said; rank 0's falls from epoch to epoch.
        slope = -10.0 * epoch * (hvd.rank() == 0) + 10.0 * epoch * (hvd.rank() == n - 1)
        callback.on_epoch_end(epoch, {"val_loss": average + slope})
    assert callback.best == pytest.approx(1.0)
    if hvd.rank() == 0:
        best = keras.models.load_model(path).get_weights()
        assert furthest(best, kept[1]) == 0


def test_an_epoch_without_the_metric_is_passed_over(tmp_path):
    net = model()
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    callback = hvd.callbacks.BestModelCheckpoint(filepath=str(tmp_path / "best.keras"))
    callback.set_model(net)
    if hvd.rank() == 0:
        with pytest.warns(UserWarning, match="val_loss"):
            callback.on_epoch_end(0, {"loss": 1.0})
    else:
        callback.on_epoch_end(0, {"loss": 1.0})
    callback.on_epoch_end(1, {"loss": 1.0, "val_loss": 2.0})
    assert callback.best == pytest.approx(2.0)


def test_arrays_among_the_metrics_are_averaged():
    logs = {"f1": np.array([hvd.rank(), 1.0]), "loss": float(hvd.rank())}
    hvd.callbacks.MetricAverageCallback().on_epoch_end(0, logs)
    np.testing.assert_allclose(logs["f1"], [(hvd.size() - 1) / 2, 1.0])
    assert logs["loss"] == pytest.approx((hvd.size() - 1) / 2)


def test_each_rank_keeps_its_seeds(rows):
    """Ranks with seeds of their own go on to draw different masks."""
    net = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dropout(0.5, seed=hvd.rank()), keras.layers.Dense(3)]
    )
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    net.fit(*shard(0, rows), batch_size=6, verbose=0, callbacks=[callback])
    states = [to_numpy(v).tolist() for v in net.non_trainable_variables if "seed" in v.path]
    everyone = hvd.allgather_object(states)
    assert states
    assert len({str(theirs) for theirs in everyone}) == hvd.size()
    assert equal_on_all_ranks(net.get_weights())


def test_an_optimizer_that_is_not_distributed_is_found_out(rows):
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    net = model(seed=0)
    net.compile(keras.optimizers.SGD(0.1), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    with pytest.raises(ReplicaDivergenceError, match="after epoch 1 the replicas differ"):
        net.fit(*shard(0, rows), batch_size=6, verbose=0, callbacks=[callback])


def test_broadcast_comes_before_the_first_batch_of_a_built_model(rows):
    root = hvd.size() - 1
    expected = model(seed=root)
    expected.compile(OPTIMIZERS["sgd"](), "mse")
    expected.fit(*batch(0, rows), batch_size=rows, verbose=0)
    net = model(seed=hvd.rank())
    net.compile(hvd.DistributedOptimizer(OPTIMIZERS["sgd"]()), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(root)
    net.fit(*shard(0, rows), batch_size=6, verbose=0, callbacks=[callback])
    assert furthest(expected.get_weights(), net.get_weights()) <= 1e-4


def test_a_model_that_is_built_by_its_first_batch_is_broadcast_after_it(rows):
    keras.utils.set_random_seed(hvd.rank())
    net = keras.Sequential([keras.layers.Dense(3)])
    net.compile(hvd.DistributedOptimizer(OPTIMIZERS["adam"]()), "mse")
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    net.fit(*shard(0, 3 * rows), batch_size=6, verbose=0, callbacks=[callback])
    assert callback.broadcast_done
    assert equal_on_all_ranks(net.get_weights())
    optimizer = [to_numpy(v) for v in net.optimizer.variables]
    assert equal_on_all_ranks(optimizer)


def test_local_variables_are_not_broadcast(rows):
    net = model(seed=hvd.rank())
    before = net.get_weights()
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.0), guard=False), "mse")
    kernel = net.trainable_variables[0]
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=[kernel])
    net.fit(*shard(0, rows), batch_size=6, verbose=0, callbacks=[callback])
    assert np.array_equal(net.get_weights()[0], before[0])
    assert np.array_equal(net.get_weights()[2], model(seed=0).get_weights()[2])
    with pytest.raises(OptionError, match="no variable"):
        hvd.callbacks.BroadcastGlobalVariablesCallback(0, local_variables=[1])


@pytest.mark.filterwarnings("ignore:.*experiment.*:UserWarning")
def test_mixed_precision_is_put_right(rows):
    net = keras.Sequential(
        [keras.Input((5,), dtype="float32"), keras.layers.Dense(3, dtype="mixed_float16")],
    )
    net.dtype_policy = keras.dtype_policies.get("mixed_float16")
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    assert isinstance(net.optimizer, keras.optimizers.LossScaleOptimizer)
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    x, y = shard(0, 2 * rows)
    if hvd.rank() == hvd.size() - 1:
        x[0] = np.inf  # This rank alone overflows in the first batch.
    net.fit(x, y, batch_size=6, verbose=0, shuffle=False, callbacks=[callback])
    assert is_distributed(net.optimizer)
    assert not is_distributed(net.optimizer.inner_optimizer)
    assert float(to_numpy(net.optimizer.dynamic_scale)) == 2.0**14
    assert int(to_numpy(net.optimizer.inner_optimizer.iterations)) == 1
    assert equal_on_all_ranks(net.get_weights())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is of the TensorFlow backend")
def test_a_callback_switches_xla_off(rows):
    net = model()
    net.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=True)
    net.fit(*shard(0, rows), verbose=0, callbacks=[hvd.callbacks.MetricAverageCallback()])
    assert net.jit_compile == (hvd.size() == 1)


def test_other_metrics_on_other_ranks_are_named():
    if hvd.size() == 1:
        pytest.skip("one rank cannot differ from itself")
    callback = hvd.callbacks.MetricAverageCallback()
    name = "accuracy" if hvd.rank() == 0 else "mae"
    with pytest.raises(MismatchError, match=r"accuracy, loss on rank 0, loss, mae"):
        callback.on_epoch_end(0, {"loss": 1.0, name: 2.0})


def test_saved_models_load_in_plain_keras_and_here(rows, tmp_path):
    net = model()
    net.compile(hvd.DistributedOptimizer(OPTIMIZERS["adam"]()), "mse")
    net.fit(*shard(0, 2 * rows), batch_size=6, verbose=0)
    path = tmp_path / "model.keras"
    net.save(path)
    plain = keras.models.load_model(path)
    assert type(plain.optimizer) is type(OPTIMIZERS["adam"]())
    assert not is_distributed(plain.optimizer)
    assert int(to_numpy(plain.optimizer.iterations)) == 2
    loaded = hvd.load_model(path, compression=hvd.Compression.fp16)
    assert is_distributed(loaded.optimizer)
    state = [[to_numpy(v) for v in m.optimizer.variables] for m in (net, loaded)]
    assert furthest(*state) == 0
    loaded.fit(*shard(1, rows), batch_size=6, verbose=0)
    assert equal_on_all_ranks(loaded.get_weights())
    assert furthest(loaded.get_weights(), net.get_weights()) > 0


def test_values_and_objects():
    n, rank = hvd.size(), hvd.rank()
    assert float(hvd.allreduce(float(rank))) == pytest.approx((n - 1) / 2)
    assert float(hvd.allreduce(rank + 1.0, op=hvd.Max)) == n
    np.testing.assert_array_equal(
        to_numpy(hvd.allgather(np.full(rank + 1, rank))).shape, n * (n + 1) // 2
    )
    assert float(hvd.broadcast(float(rank), n - 1)) == n - 1
    part = to_numpy(hvd.reducescatter(np.ones((n, 2), "float32"), op=hvd.Sum))
    np.testing.assert_array_equal(part, np.full((1, 2), n))
    assert hvd.broadcast_object(rank, 0) == 0
    net = model(seed=rank)
    hvd.broadcast_global_variables(n - 1, net)
    assert furthest(net.get_weights(), model(seed=n - 1).get_weights()) == 0
    with pytest.raises(UnsupportedError, match="pass the model"):
        hvd.broadcast_global_variables(0)


@pytest.mark.parametrize("masked", [False, True])
def test_batch_normalisation_over_all_ranks(masked):
    generator = np.random.default_rng(1)
    # Ranks contribute different numbers of samples.
    counts = [3 + rank for rank in range(hvd.size())]
    whole = (generator.normal(size=(sum(counts), 4, 2)) * 3 + 50).astype("float32")
    mask = generator.random(whole.shape[:2]) < 0.7
    start = sum(counts[: hvd.rank()])
    own = slice(start, start + counts[hvd.rank()])
    synced, plain = hvd.SyncBatchNormalization(), keras.layers.BatchNormalization()
    results = [
        layer(
            keras.ops.convert_to_tensor(whole[part]),
            training=True,
            mask=keras.ops.convert_to_tensor(mask[part]) if masked else None,
        )
        for layer, part in ((synced, own), (plain, slice(None)))
    ]
    expected = to_numpy(results[1])[own]
    np.testing.assert_allclose(to_numpy(results[0]), expected, rtol=1e-3, atol=1e-3)
    for mine, theirs in zip(synced.weights, plain.weights, strict=True):
        np.testing.assert_allclose(to_numpy(mine), to_numpy(theirs), rtol=1e-4)


def test_batch_normalisation_trains_like_one_rank(rows):
    def run(layer, optimizer, data):
        net = keras.Sequential([keras.Input((5,)), layer, keras.layers.Dense(3)])
        generator = np.random.default_rng(0)
        net.layers[1].set_weights([generator.normal(size=(5, 3)), np.zeros(3)])
        net.compile(optimizer, "mse")
        for step in range(3):
            net.train_on_batch(*data(step, rows))
        return net.get_weights()

    sgd = keras.optimizers.SGD
    alone = run(keras.layers.BatchNormalization(), sgd(0.1), batch)
    together = run(
        hvd.SyncBatchNormalization(fused=False), hvd.DistributedOptimizer(sgd(0.1)), shard
    )
    assert furthest(alone, together) <= 2e-4
    with pytest.raises(OptionError, match="fused"):
        hvd.SyncBatchNormalization(fused=True)
