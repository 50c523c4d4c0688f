"""Learning-rate callbacks on one rank, driven by hand."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras_training import BACKEND

import hpc_dl.keras as hvd
from hpc_dl.errors import OptionError
from hpc_dl.keras.backend import to_numpy
from hpc_dl.keras.callbacks import schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Model:
    """As much of a model as the callbacks look at."""

    name = "model"
    jit_compile = False

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.fixture(autouse=True)
def _world():
    hvd.init(comm="serial")
    yield
    hvd.shutdown()


def run(callback, optimizer, epochs: int, steps: int) -> list[float]:
    """Return the learning rate of each batch."""
    callback.set_model(Model(optimizer))
    callback.set_params({"steps": steps})
    callback.on_train_begin()
    rates = []
    for epoch in range(epochs):
        callback.on_epoch_begin(epoch)
        for batch in range(steps):
            callback.on_train_batch_begin(batch)
            rates.append(float(to_numpy(optimizer.learning_rate)))
            callback.on_train_batch_end(batch)
        logs = {}
        callback.on_epoch_end(epoch, logs)
        assert logs["lr"] == pytest.approx(rates[-1])
    return rates


@pytest.mark.parametrize("size", [1, 2, 8])
def test_warmup_goes_from_the_rate_of_one_rank_to_that_of_all(monkeypatch, capsys, size):
    monkeypatch.setattr(schedule, "size", lambda: size)
    callback = hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=3, verbose=1)
    rates = run(callback, keras.optimizers.SGD(0.8), epochs=4, steps=5)
    assert rates[14] == pytest.approx(0.8)
    assert rates[15:] == pytest.approx([0.8] * 5)
    steps = np.diff([0.8 / size, *rates[:15]])
    assert steps == pytest.approx([(0.8 - 0.8 / size) / 15] * 15, rel=1e-4, abs=1e-7)
    assert capsys.readouterr().out.count("finished gradual learning rate warmup to 0.8") == 1


@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
@pytest.mark.parametrize("execution", [1, 4, 10])
def test_warmup_ends_at_the_rate_of_all(monkeypatch, epochs, execution):
    """With a fraction of an epoch, and called only once for several steps."""
    monkeypatch.setattr(schedule, "size", lambda: 8)
    callback = hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=epochs)
    optimizer, steps = keras.optimizers.SGD(0.8), 10
    callback.set_model(Model(optimizer))
    callback.set_params({"steps": steps})
    callback.on_train_begin()
    rates = []
    for epoch in range(4):
        callback.on_epoch_begin(epoch)
        for batch in range(0, steps, execution):
            callback.on_train_batch_begin(batch)
            rates.append(float(to_numpy(optimizer.learning_rate)))
        callback.on_epoch_end(epoch, {})
    assert rates[0] == pytest.approx(0.1 + 0.7 / (epochs * steps))
    assert np.all(np.diff(rates) >= -1e-7)
    assert max(rates) == pytest.approx(0.8)
    after = -(-steps // execution) * -(-epochs // 1)
    assert rates[int(after) :] == pytest.approx([0.8] * (len(rates) - int(after)))


@pytest.mark.parametrize("epochs", [-1, float("nan"), float("inf")])
def test_warmup_of_no_such_number_of_epochs(epochs):
    with pytest.raises(OptionError, match="0 or more"):
        hvd.callbacks.LearningRateWarmupCallback(0.8, warmup_epochs=epochs)


def test_a_staircase_acts_at_the_beginning_of_its_epochs():
    callback = hvd.callbacks.LearningRateScheduleCallback(
        1.0, lambda epoch: 1 / (1 + epoch), start_epoch=1, end_epoch=3
    )
    rates = run(callback, keras.optimizers.SGD(7.0), epochs=4, steps=2)
    assert rates == pytest.approx([7, 7, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1 / 3])


def test_a_number_is_the_base_of_a_power():
    callback = hvd.callbacks.LearningRateScheduleCallback(1.0, 0.5, start_epoch=1)
    rates = run(callback, keras.optimizers.SGD(3.0), epochs=4, steps=1)
    assert rates == pytest.approx([3.0, 1.0, 0.5, 0.25])


@given(st.lists(st.floats(0.25, 4.0), min_size=2, max_size=5), st.sampled_from(["sgd", "rmsprop"]))
def test_corrected_momentum_is_that_of_the_paper(multipliers, kind):
    """v' = m v lr'/lr + lr' g, which is m u + g for u = v / lr, whatever the rate does."""
    hvd.init(comm="serial")
    optimizer = (
        keras.optimizers.SGD(0.5, momentum=0.9)
        if kind == "sgd"
        else keras.optimizers.RMSprop(0.5, momentum=0.9, rho=1.0, epsilon=1.0)
    )
    variable = keras.Variable(np.zeros(2), dtype="float32", name="v")
    optimizer.build([variable])
    callback = hvd.callbacks.LearningRateScheduleCallback(
        0.5, lambda epoch: multipliers[int(epoch)]
    )
    callback.set_model(Model(optimizer))
    previous, accumulated = np.zeros(2), np.zeros(2)
    for epoch, multiplier in enumerate(multipliers):
        callback.on_epoch_begin(epoch)
        callback.on_train_batch_begin(0)
        optimizer.apply([keras.ops.convert_to_tensor([1.0, -2.0])], [variable])
        accumulated = 0.9 * accumulated - np.array([1.0, -2.0])
        now = to_numpy(variable).copy()
        expected = 0.5 * multiplier * accumulated
        np.testing.assert_allclose(now - previous, expected, rtol=2e-4, atol=2e-5)
        previous = now


def test_without_the_correction_velocities_stay():
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    variable = keras.Variable(np.zeros(1), dtype="float32", name="v")
    optimizer.build([variable])
    optimizer.momentums[0].assign([3.0])
    callback = hvd.callbacks.LearningRateScheduleCallback(5.0, 1.0, momentum_correction=False)
    run(callback, optimizer, epochs=1, steps=1)
    assert to_numpy(optimizer.momentums[0]) == pytest.approx([3.0])


def test_what_is_missing_is_named():
    with pytest.raises(OptionError, match="initial_lr"):
        hvd.callbacks.LearningRateScheduleCallback(None, 1.0)
    unknown = hvd.callbacks.LearningRateWarmupCallback(0.1)
    unknown.set_params({"steps": None})
    with pytest.raises(OptionError, match="steps_per_epoch"):
        unknown.on_train_begin()
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    fixed = hvd.callbacks.LearningRateScheduleCallback(0.1, 0.5)
    fixed.set_model(Model(keras.optimizers.SGD(decay)))
    with pytest.raises(OptionError, match="LearningRateSchedule"):
        fixed.on_train_batch_begin(0)


def test_the_best_model_has_a_name_and_is_of_an_epoch():
    assert hvd.callbacks.BestModelCheckpoint().filepath == "best_model.keras"
    weights = hvd.callbacks.BestModelCheckpoint(save_weights_only=True)
    assert weights.filepath == "best_model.weights.h5"
    with pytest.raises(OptionError, match="save_freq"):
        hvd.callbacks.BestModelCheckpoint(save_freq=10)


def test_a_backend_that_is_not_served_is_named(monkeypatch):
    from hpc_dl.errors import UnsupportedError
    from hpc_dl.keras import backend

    assert backend.NAME == BACKEND
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(UnsupportedError, match=r"'jax'.*KERAS_BACKEND=tensorflow"):
        backend._find()
