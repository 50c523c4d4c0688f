"""Distributed deep learning on supercomputers.

Import one of the adapters in a training script::

    import hpc_dl.torch as hvd       # PyTorch
    import hpc_dl.keras as hvd       # Keras 3
    import hpc_dl.tensorflow as hvd  # TensorFlow

Importing this package alone loads no framework, no MPI and no Horovod.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
