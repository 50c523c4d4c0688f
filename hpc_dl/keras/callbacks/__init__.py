"""Keras callbacks with Horovod's names."""

from hpc_dl.keras.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hpc_dl.keras.callbacks.checkpoint import BestModelCheckpoint
from hpc_dl.keras.callbacks.metrics import MetricAverageCallback
from hpc_dl.keras.callbacks.schedule import (
    LearningRateScheduleCallback,
    LearningRateWarmupCallback,
)

__all__ = [
    "BestModelCheckpoint",
    "BroadcastGlobalVariablesCallback",
    "LearningRateScheduleCallback",
    "LearningRateWarmupCallback",
    "MetricAverageCallback",
]
