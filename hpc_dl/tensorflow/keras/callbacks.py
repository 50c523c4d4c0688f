"""The callbacks under Horovod's other name: ``from hpc_dl.tensorflow.keras import callbacks``."""

from hpc_dl.keras.callbacks import *  # noqa: F403
