"""The Keras adapter under Horovod's other name: ``import hpc_dl.tensorflow.keras as hvd``."""

from hpc_dl.keras import *  # noqa: F403
