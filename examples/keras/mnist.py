"""Handwritten digits in the style of Horovod's Keras MNIST script.

The only line that differs from a Horovod script is the import. Run it on two ranks, with the
backend of your choice:

    hpc-dl launch -n 2 examples/keras/mnist.py
    KERAS_BACKEND=torch hpc-dl launch -n 2 examples/keras/mnist.py
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import hpc_dl.keras as hvd


def pin_gpu():
    """Let this process see one GPU only, if there are any."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
    else:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(hvd.local_rank())


def datasets():
    """Return the digits as training and test sets, (images, labels) each."""
    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype("float32")
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:-360], order[-360:]
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def network():
    """Return a small convolutional network for images of 8 x 8."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Dropout(0.25),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def main():
    """Parse the options, train, and print the accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--warmup-epochs", type=int, default=2)
    parser.add_argument("--fp16-allreduce", action="store_true")
    parser.add_argument("--checkpoint-dir", type=Path)
    args = parser.parse_args()

    hvd.init()
    pin_gpu()
    (images, labels), test = datasets()
    # Each rank trains on its own part, and all on the same number of batches.
    share = len(images) // hvd.size()
    mine = slice(hvd.rank() * share, (hvd.rank() + 1) * share)

    model = network()
    # More ranks see more images in a step, so the step may be larger.
    scaled_lr = args.lr * hvd.size()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.Adam(scaled_lr),
        compression=hvd.Compression.fp16 if args.fp16_allreduce else hvd.Compression.none,
        backward_passes_per_step=1,
        average_aggregated_gradients=True,
    )
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(),
        optimizer=optimizer,
        metrics=["accuracy"],
    )

    callbacks = [
        # All ranks begin with the weights of rank 0, at random or from a checkpoint.
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        # In front of all callbacks that look at metrics.
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(
            initial_lr=scaled_lr, warmup_epochs=args.warmup_epochs, verbose=1
        ),
        keras.callbacks.ReduceLROnPlateau(patience=5, verbose=1),
    ]
    # One rank writes, so that ranks do not damage each other's files.
    if hvd.rank() == 0 and args.checkpoint_dir:
        args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        path = args.checkpoint_dir / "checkpoint-{epoch}.keras"
        callbacks.append(keras.callbacks.ModelCheckpoint(path))

    model.fit(
        images[mine],
        labels[mine],
        batch_size=args.batch_size,
        epochs=args.epochs,
        callbacks=callbacks,
        validation_data=test,
        verbose=2 if hvd.rank() == 0 else 0,
    )
    _, accuracy = model.evaluate(*test, verbose=0)
    if hvd.rank() == 0:
        print(f"test accuracy {accuracy:.4f}", flush=True)


if __name__ == "__main__":
    main()
