"""The names that the Keras and the TensorFlow adapter share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest

import hpc_dl.keras
import hpc_dl.tensorflow
import hpc_dl.tensorflow.keras
from hpc_dl.errors import OptionError


def test_tensorflow_names_what_horovod_has_there_from_keras():
    assert hpc_dl.tensorflow.SyncBatchNormalization is hpc_dl.keras.SyncBatchNormalization
    with pytest.raises(AttributeError, match="no_such_name"):
        hpc_dl.tensorflow.no_such_name  # noqa: B018


def test_horovods_optimizer_of_tensorflow():
    hpc_dl.keras.init(comm="serial")
    optimizer = hpc_dl.tensorflow.DistributedOptimizer(
        keras.optimizers.SGD(), "mine", False, backward_passes_per_step=2
    )
    assert optimizer.distribution._passes.number == 2
    assert optimizer.distribution._label == "mine"
    with pytest.raises(OptionError, match="use_locking"):
        hpc_dl.tensorflow.DistributedOptimizer(keras.optimizers.SGD(), use_locking=True)
    hpc_dl.keras.shutdown()


def test_horovods_other_name_of_the_callbacks():
    from hpc_dl.tensorflow.keras.callbacks import MetricAverageCallback

    assert MetricAverageCallback is hpc_dl.keras.callbacks.MetricAverageCallback


def test_horovods_other_name_of_the_keras_adapter():
    for name in set(hpc_dl.keras.__all__) - {"callbacks"}:  # a module of that name, tested above
        assert getattr(hpc_dl.tensorflow.keras, name) is getattr(hpc_dl.keras, name)
