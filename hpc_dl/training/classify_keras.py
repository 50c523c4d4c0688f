"""Train and test a classifier in Keras 3."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

import hpc_dl.keras as hvd
from hpc_dl.data import Batch
from hpc_dl.data.images import Pixels
from hpc_dl.observe import Run, weights_digest
from hpc_dl.training.plan import Outcome, Plan

Logs = dict[str, float]


def own_device() -> None:
    """Take this rank's GPU, if there are any, and its share of the cores.

    To be called before Keras computes anything: TensorFlow settles this at its begin.
    """
    if keras.backend.backend() == "torch":
        from hpc_dl.training import classify_torch

        classify_torch.own_device()
        return
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        own = gpus[hvd.local_rank() % len(gpus)]
        tf.config.set_visible_devices(own, "GPU")
        tf.config.experimental.set_memory_growth(own, True)
    cores = len(os.sched_getaffinity(0)) // hvd.local_size()
    wanted = int(os.environ.get("OMP_NUM_THREADS", "0") or 0) or cores
    tf.config.threading.set_intra_op_parallelism_threads(max(1, min(cores, wanted)))


def fit(
    model: keras.Model, plan: Plan, run: Run, callbacks: Sequence[keras.callbacks.Callback] = ()
) -> Outcome:
    """Train as planned and test after each epoch; all ranks call this.

    Args:
        model: compiled with a wrapped optimizer and the metric ``"accuracy"``.
        plan: this rank's batches.
        run: where metrics go.
        callbacks: more of them, for example for the learning rate.
    """
    recorder = _Recorder(plan, run)
    model.fit(
        _inputs(plan.all_training_batches()),
        epochs=plan.epochs,
        steps_per_epoch=plan.steps,
        shuffle=False,
        verbose=0,
        callbacks=[
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            *callbacks,
            hvd.callbacks.MetricAverageCallback(),
            recorder,
        ],
    )
    weights = ((v.path, keras.ops.convert_to_numpy(v)) for v in model.trainable_variables)
    traffic = model.optimizer.traffic()
    return Outcome(
        recorder.tested.get("loss"),
        recorder.tested.get("accuracy"),
        traffic.bytes_sent,
        traffic.bytes_dense,
        weights_digest(weights),
    )


class _Recorder(keras.callbacks.Callback):
    """Tests after each epoch and records it."""

    def __init__(self, plan: Plan, run: Run):
        super().__init__()
        self.tested: Logs = {}
        self._plan, self._run = plan, run

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._run.resume()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        values = logs or {}
        self._run.step(
            self._plan.images_in(batch),
            lambda: {name: values[name] for name in ("loss", "accuracy")},
        )

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        self._run.pause()
        values = logs or {}
        self.tested = _test(self.model, self._plan)
        self._run.record(
            {
                "loss": values["loss"],
                "accuracy": values["accuracy"],
                **{f"test_{name}": value for name, value in self.tested.items()},
                "lr": float(self.model.optimizer.learning_rate),
            }
        )


class Rates(keras.callbacks.Callback):
    """Sets the learning rate before each step."""

    def __init__(self, base: float, schedule: Callable[[int], float]):
        """Use ``base`` times ``schedule(step)``, steps counted from 0 over all epochs."""
        super().__init__()
        self._base, self._schedule, self._step = base, schedule, 0

    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        self.model.optimizer.learning_rate = self._base * self._schedule(self._step)
        self._step += 1


class SgdWithL2(keras.optimizers.SGD):
    """SGD whose weight decay is part of the gradient, as PyTorch's is.

    Keras' own ``weight_decay`` goes past the momentum, which makes it ten times weaker at a
    momentum of 0.9.
    """

    def __init__(self, *args: Any, l2: float = 0.0, **options: Any):
        """Add ``l2`` times the weight to the gradient of each matrix, not of vectors."""
        super().__init__(*args, **options)
        self.l2 = l2

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Change a variable by one step."""
        if self.l2 and len(variable.shape) > 1:
            gradient = gradient + self.l2 * keras.ops.convert_to_tensor(variable)
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        """Return what it can be made from again."""
        return {**super().get_config(), "l2": self.l2}


class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy of integer labels, a part of which is given to all classes.

    Keras smooths one-hot labels only.
    """

    def __init__(self, smoothing: float = 0.0):
        """Give ``smoothing``, from 0 to below 1, of each label to all classes alike."""
        super().__init__(name="cross_entropy")
        self.smoothing = smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each image from labels (n,) and logits (n, classes)."""
        logs = keras.ops.log_softmax(y_pred)
        labels = keras.ops.cast(keras.ops.reshape(y_true, (-1, 1)), "int32")
        right = keras.ops.squeeze(keras.ops.take_along_axis(logs, labels, axis=-1), -1)
        everywhere = keras.ops.mean(logs, axis=-1)
        return -(1 - self.smoothing) * right - self.smoothing * everywhere


def _test(model: keras.Model, plan: Plan) -> Logs:
    if plan.test is None:
        return {}
    # Moving means differ between ranks; rank 0's model is the one to be kept.
    moving = [v for v in model.non_trainable_variables if v.name.startswith("moving_")]
    if moving:
        hvd.broadcast_variables(moving, root_rank=0)
    sums = np.zeros(3)
    for images, labels in _inputs(plan.test_batches()):
        values: Any = model.test_on_batch(images, labels, return_dict=True)
        model.reset_metrics()
        sums += np.array([values["loss"], values["accuracy"], 1.0]) * len(labels)
    loss, right, count = np.asarray(hvd.allreduce(sums, op=hvd.Sum, name="test"))
    return {"loss": float(loss / count), "accuracy": float(right / count)}


def _inputs(batches: Iterator[Batch]) -> Iterator[tuple[Pixels, Any]]:
    """Give Keras the layout that its backend wants."""
    last = keras.config.image_data_format() == "channels_last"
    for images, labels in batches:
        yield images.transpose(0, 2, 3, 1) if last else images, labels
