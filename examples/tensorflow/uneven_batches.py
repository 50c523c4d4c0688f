"""Ranks with different numbers of batches: each calls ``join`` when it has no more.

hpc-dl launch -n 3 examples/tensorflow/uneven_batches.py
"""

import tensorflow as tf

import hpc_dl.tensorflow as hvd


def main():
    """Train a line on rank + 1 times three batches."""
    hvd.init()
    slope = tf.Variable(0.0, name="slope")
    hvd.broadcast_variables([slope], root_rank=0)

    @tf.function
    def training_step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(slope * x - 2.0 * x))
        tape = hvd.DistributedGradientTape(tape)
        (gradient,) = tape.gradient(loss, [slope])
        slope.assign_sub(0.1 * gradient)
        return loss

    batches = 3 * (hvd.rank() + 1)
    for number in range(batches):
        training_step(tf.random.stateless_normal([16], seed=[hvd.rank(), number]))
    last = int(hvd.join())
    # The rank that joined last has made all steps; the others take its result.
    hvd.broadcast_variables([slope], root_rank=last)
    print(
        f"rank {hvd.rank()} had {batches} batches; rank {last} was the last; "
        f"slope {float(slope):.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
