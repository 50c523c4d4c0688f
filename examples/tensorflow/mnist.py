"""Handwritten digits in the style of Horovod's MNIST script for TensorFlow 2, a loop of its own.

The only line that differs from a Horovod script is the import. Run it on two ranks:

    hpc-dl launch -n 2 examples/tensorflow/mnist.py
"""

import argparse
from pathlib import Path

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hpc_dl.tensorflow as hvd


def datasets():
    """Return the digits as training and test sets, (images, labels) each."""
    digits = load_digits()
    images = (digits.images[..., None] / 16.0).astype("float32")
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:-360], order[-360:]
    return (images[train], digits.target[train]), (images[test], digits.target[test])


def main():
    """Parse the options, train, and print the accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--checkpoint-dir", type=Path)
    args = parser.parse_args()

    hvd.init()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")

    (images, labels), (test_images, test_labels) = datasets()
    dataset = tf.data.Dataset.from_tensor_slices((images, labels))
    dataset = dataset.shard(hvd.size(), hvd.rank()).repeat().shuffle(1000).batch(args.batch_size)

    model = tf.keras.Sequential(
        [
            tf.keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            tf.keras.layers.Conv2D(32, 3, activation="relu"),
            tf.keras.layers.MaxPooling2D(),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(64, activation="relu"),
            tf.keras.layers.Dense(10),
        ]
    )
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # More ranks see more images in a step, so the step may be larger.
    optimizer = tf.keras.optimizers.Adam(args.lr * hvd.size())

    @tf.function
    def training_step(images, labels, first_batch):
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        # From here on gradients are averages over the ranks.
        tape = hvd.DistributedGradientTape(tape)
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        # After the first step, because model and optimizer make their variables in it.
        if first_batch:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(optimizer.variables, root_rank=0)
        return value

    # More ranks need fewer steps for the same number of images.
    for step, (x, y) in enumerate(dataset.take(args.steps // hvd.size())):
        value = training_step(x, y, step == 0)
        if step % 20 == 0 and hvd.rank() == 0:
            print(f"step {step} loss {float(value):.4f}", flush=True)

    if hvd.rank() == 0 and args.checkpoint_dir:
        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
        checkpoint.save(str(args.checkpoint_dir / "checkpoint"))

    # Each rank tests a part; the average of equal parts is the whole.
    mine = slice(hvd.rank(), len(test_images) // hvd.size() * hvd.size(), hvd.size())
    right = tf.argmax(model(test_images[mine]), axis=1) == test_labels[mine]
    accuracy = hvd.allreduce(tf.reduce_mean(tf.cast(right, tf.float32)), name="accuracy")
    if hvd.rank() == 0:
        print(f"test accuracy {float(accuracy):.4f}", flush=True)


if __name__ == "__main__":
    main()
