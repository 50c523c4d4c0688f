"""Train a small Keras model on shards of a batch, or on the whole of it: shared by tests.

It works on the backend that KERAS_BACKEND names. Steps are written out, on torch down to the
matrix products: those of Keras 3.15 on torch are computed in float32 whatever ``floatx`` is.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import hpc_dl.keras as hvd

BACKEND = keras.config.backend()

Maker = Callable[[], Any]

OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "clipped": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, weight_decay=0.01, global_clipnorm=0.1
    ),
    "averaged": lambda: keras.optimizers.Adam(
        0.01, clipnorm=0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "accumulated": lambda: keras.optimizers.AdamW(0.01, gradient_accumulation_steps=2),
}


@contextmanager
def floatx(name: str):
    """Set Keras' default type for a while."""
    before = keras.config.floatx()
    _set_type(name)
    try:
        yield
    finally:
        _set_type(before)


def _set_type(name: str) -> None:
    keras.config.set_floatx(name)
    keras.config.set_dtype_policy(name)


def model(seed: int = 7) -> Any:
    """Make a model whose initial weights depend on the seed alone."""
    net = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, activation="tanh", name="hidden"),
            keras.layers.Dense(3, name="out"),
        ],
        name="net",
    )
    generator = np.random.default_rng(seed)
    net.set_weights([generator.normal(size=w.shape) * 0.3 for w in net.get_weights()])
    return net


def batch(step: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Make the whole batch of a step: inputs (rows, 5) and targets (rows, 3)."""
    generator = np.random.default_rng(1000 + step)
    return generator.normal(size=(rows, 5)), generator.normal(size=(rows, 3))


def shard(step: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut this rank's part out of the batch of a step."""
    x, y = batch(step, rows)
    return x[hvd.rank() :: hvd.size()], y[hvd.rank() :: hvd.size()]


def tensor(x: np.ndarray) -> Any:
    """Make a tensor of the backend in the type of ``floatx``."""
    x = x.astype(keras.config.floatx())
    if BACKEND == "torch":
        import torch

        return torch.from_numpy(x)
    return keras.ops.convert_to_tensor(x)


def gradients(net: Any, x: np.ndarray, y: np.ndarray) -> list[Any]:
    """Return the gradients of the mean squared error."""
    if BACKEND == "torch":
        net.zero_grad()
        w1, b1, w2, b2 = (v.value for v in net.trainable_variables)
        predicted = (tensor(x) @ w1 + b1).tanh() @ w2 + b2
        (predicted - tensor(y)).square().mean().backward()
        return [v.value.grad for v in net.trainable_variables]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(net(tensor(x)) - tensor(y)))
    return list(tape.gradient(loss, net.trainable_variables))


def apply(optimizer: Any, grads: list[Any], variables: list[Any]) -> None:
    """Apply gradients as the backend's trainer does."""
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            optimizer.apply(grads, variables)
    else:
        optimizer.apply_gradients(zip(grads, variables, strict=True))


def train(net: Any, optimizer: Any, steps: int, data: Callable[[int], Any]) -> list[np.ndarray]:
    """Take steps on ``data(step)`` and return the weights."""
    for step in range(steps):
        apply(optimizer, gradients(net, *data(step)), net.trainable_variables)
    return net.get_weights()


def train_alone(make: Maker, steps: int, rows: int) -> list[np.ndarray]:
    """Train on whole batches, without hpc_dl."""
    return train(model(), make(), steps, lambda step: batch(step, rows))


def train_sharded(make: Maker, steps: int, rows: int, **options: Any) -> list[np.ndarray]:
    """Train on this rank's shards with a distributed optimizer."""
    optimizer = hvd.DistributedOptimizer(make(), **options)
    return train(model(), optimizer, steps, lambda step: shard(step, rows))


def furthest(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Return the largest difference of any two weights."""
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def equal_on_all_ranks(weights: list[np.ndarray]) -> bool:
    """Tell whether all ranks hold the same weights, to the bit."""
    everyone = hvd.allgather_object([w.tobytes() for w in weights])
    return all(theirs == everyone[0] for theirs in everyone)
