"""The names that the Keras and the TensorFlow adapter share."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

import hpc_dl.keras
import hpc_dl.tensorflow
import hpc_dl.tensorflow.keras


def test_tensorflow_names_what_horovod_has_there_from_keras():
    for name in ("DistributedOptimizer", "SyncBatchNormalization"):
        assert getattr(hpc_dl.tensorflow, name) is getattr(hpc_dl.keras, name)
    with pytest.raises(AttributeError, match="no_such_name"):
        hpc_dl.tensorflow.no_such_name  # noqa: B018


def test_horovods_other_name_of_the_keras_adapter():
    for name in hpc_dl.keras.__all__:
        assert getattr(hpc_dl.tensorflow.keras, name) is getattr(hpc_dl.keras, name)
