"""Do replicas stay equal under Keras 3? Horovod's own optimizer beside that of hpc_dl.

Ranks begin with equal weights, train on different data with ``model.fit``, and compare:

    hpc-dl launch -n 2 benchmarks/keras_divergence.py

Horovod 0.28.1 hooks methods that Keras 3 no longer calls, so it never reduces, and says
nothing. The exit code is 1 if the replicas of hpc_dl differ.
"""

import hashlib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import hpc_dl.keras as hvd
from hpc_dl.comm.choose import installed_horovod


def trained(wrap) -> list[np.ndarray]:
    """Return the weights of this rank after an epoch with the optimizer that ``wrap`` makes."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(wrap(keras.optimizers.SGD(0.1, momentum=0.9)), "mse")
    mine = np.random.default_rng(hvd.rank())
    x, y = mine.normal(size=(64, 8)), mine.normal(size=(64, 1))
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return model.get_weights()


def report(name: str, weights: list[np.ndarray]) -> bool:
    """Print a line for each rank; tell whether all ranks hold the same weights."""
    digest = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()[:16]
    size = float(sum(np.abs(w).sum() for w in weights))
    everyone = hvd.allgather_object((digest, size))
    equal = len({theirs for theirs, _ in everyone}) == 1
    if hvd.rank() == 0:
        for rank, (theirs, l1) in enumerate(everyone):
            print(f"{name:<28} rank {rank}  L1 {l1:.6f}  sha256 {theirs}")
        print(f"{name:<28} replicas {'are equal' if equal else 'DIFFER'}\n", flush=True)
    return equal


def main() -> int:
    """Train with both optimizers and compare."""
    horovod = installed_horovod()
    with_horovod = horovod is not None and "tensorflow" in horovod.frameworks
    hvd.init(comm="horovod" if with_horovod else None)
    if with_horovod:
        import horovod.tensorflow.keras

        report("horovod.tensorflow.keras", trained(horovod.tensorflow.keras.DistributedOptimizer))
    elif hvd.rank() == 0:
        print("Horovod is not built for TensorFlow here; only hpc_dl is shown\n")
    return 0 if report("hpc_dl.keras", trained(hvd.DistributedOptimizer)) else 1


if __name__ == "__main__":
    sys.exit(main())
