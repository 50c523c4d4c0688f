"""Half precision gives what Horovod's own gives; true for any number of ranks and communicator."""

import numpy as np
import pytest
import tensorflow as tf

import hpc_dl.tensorflow as hvd

horovod = pytest.importorskip("horovod.tensorflow", reason="Horovod is not built for TensorFlow")

ROWS = 40


@pytest.fixture(autouse=True)
def _worlds():
    hvd.init()
    horovod.init()
    assert (horovod.rank(), horovod.size()) == (hvd.rank(), hvd.size())


def gradient_of(library, weights: tf.Variable, x: np.ndarray) -> np.ndarray:
    """Return the averaged gradient of the sum of squares of ``x * weights``."""
    with library.DistributedGradientTape(
        tf.GradientTape(), compression=library.Compression.fp16
    ) as tape:
        loss = tf.reduce_sum(tf.square(x * weights)) / 2
    return tape.gradient(loss, [weights])[0].numpy()


@pytest.mark.parametrize("exact", [True, False])
def test_the_gradients_of_a_tape(exact: bool) -> None:
    weights = tf.Variable(np.ones(ROWS, np.float32))
    generator = np.random.default_rng(hvd.rank())
    # Squares of these are added without rounding, by up to 64 ranks.
    x = generator.integers(-8, 9, ROWS) if exact else generator.normal(size=ROWS)
    x = x.astype(np.float32)
    ours, theirs = (gradient_of(library, weights, x) for library in (hvd, horovod))
    largest = horovod.allreduce(x * x, op=horovod.Sum, name=f"parity.{exact}").numpy()
    # Horovod rounds after each addition and after the division, and we round once: where the
    # sum is exact, what is left is the division.
    roundings = 2 if exact else hvd.size() + 2
    np.testing.assert_array_less(abs(ours - theirs), roundings * 2.0**-11 * largest + 1e-30)
    np.testing.assert_allclose(ours, largest / hvd.size(), rtol=(hvd.size() + 2) * 2.0**-11)
